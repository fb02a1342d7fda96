"""Load SmartBrush and SmartBrush: their files, the edit they make, what they tell and refuse, progress, memory."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from host_double import InterruptProcessingException, InvalidPrompt
from model_files import write_random
from node_pictures import boxes, noise
from node_schemas import embedded
from safetensors.torch import load_file, save_file

from mimicbrush_core.checkpoints import header_metadata
from mimicbrush_core.modules import bundled_config

H, W = 72, 96
SIZE, STEPS = 64, 2
SOURCE, MASK = noise(1, H, W), boxes(H, W, (20, 24), side=40)
FOLDER = "smartbrush"
TEXT = "a red disc"
MASK_BIAS = -1.3


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small model of random weights, as one file; it predicts masks of about a tenth of the cells."""
    small = bundled_config("smartbrush_small")
    config = {**small, "name": "random", "defaults": {**small["defaults"], "size": SIZE, "steps": STEPS}}
    path = write_random(tmp_path_factory.mktemp("weights") / "random.safetensors", config)
    tensors = load_file(path)
    tensors["unet.conv_out.bias"][4] = MASK_BIAS
    save_file(tensors, path, metadata=header_metadata(config))
    return path


@pytest.fixture(scope="module")
def model(load):
    """What a SMARTBRUSH_MODEL wire carries."""
    return load("LoadSmartBrush")


@pytest.fixture
def paint(pack, model):
    """paint(**inputs): the node, with this module's model and pictures where nothing else is given."""

    def run(**inputs):
        given = {"model": model, "source": SOURCE, "mask": MASK, "text": TEXT}
        return pack.call("SmartBrush", **given | inputs)

    return run


@pytest.fixture
def errors(pack):
    return pack.core("errors")


# --- Load --------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_way_to_get_one(pack, models):
    with pytest.raises(InvalidPrompt) as error:
        pack.call("LoadSmartBrush", model_name="gone.safetensors")
    said = ("gone.safetensors", "SmartBrush has no public weights", "mimicbrush train --system smartbrush", str(models))
    for one in (*said, "press R", embedded("smartbrush")):
        assert one in str(error.value)


def test_the_description_tells_that_no_weights_are_public(pack):
    assert "Nobody has published" in pack.object_info()["MimicBrushLoadSmartBrush"]["description"]


def test_the_template_tells_the_words_that_the_embedded_model_knows():
    template = json.loads((Path(__file__).parents[2] / "workflows" / "smartbrush.json").read_text("utf-8"))
    (note,) = (node["widgets_values"][0] for node in template["nodes"] if node["type"] == "MarkdownNote")
    told = [word for line in re.findall("^- .+: (.+)$", note, re.MULTILINE) for word in line.split(", ")]
    assert sorted(told) == sorted(bundled_config("smartbrush_small")["tokenizer"]["words"])


def test_the_embedded_model_is_loaded_by_its_name(pack):
    loaded = pack.call("LoadSmartBrush", model_name=embedded("smartbrush")).model.model
    assert loaded.config["name"] == "SmartBrush small (embedded)"


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors"])
def test_what_is_not_in_the_folder_is_refused(pack, models, file, name):
    shutil.copy(file, models.parent / "secret.safetensors")
    with pytest.raises(InvalidPrompt, match="There is no model"):
        pack.call("LoadSmartBrush", model_name=name)


def test_a_file_of_another_system_is_refused_by_its_name(pack, models, errors):
    shutil.copy(pack.core("checkpoints").embedded_model_path(), models / "brush.safetensors")
    with pytest.raises(errors.ModelFileError, match=r"brush\.safetensors is MimicBrush; SmartBrush was expected"):
        pack.call("LoadSmartBrush", model_name="brush.safetensors")


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("auto", torch.float32)])
def test_a_precision_s_name_is_the_weights_type(pack, mine, precision, dtype):
    loaded = pack.call("LoadSmartBrush", model_name="mine.safetensors", precision=precision).model.model
    for _, module in loaded.modules.items():
        assert {weight.dtype for weight in module.parameters()} == {dtype}
        assert not any(weight.is_inference() for weight in module.parameters())


def test_a_file_that_changed_is_loaded_again(pack, mine):
    load = pack.nodes["MimicBrushLoadSmartBrush"]
    before = load.fingerprint_inputs("mine.safetensors", "auto")
    assert load.fingerprint_inputs("mine.safetensors", "auto") == before
    assert load.fingerprint_inputs("mine.safetensors", "fp16") != before
    os.utime(mine, ns=(1, 1))
    assert load.fingerprint_inputs("mine.safetensors", "auto") != before
    assert load.validate_inputs(None) is True and load.fingerprint_inputs(None, "auto") == ()


# --- the edit ----------------------------------------------------------------------------------------------

SETTINGS = [
    ({}, {}),
    ({"seed": 5}, {"seed": 5}),
    ({"steps": 3}, {"steps": 3}),
    ({"guidance": 6.0}, {"guidance": 6.0}),
    ({"sampler": "dpmpp_2m", "scheduler": "karras"}, {"scheduler": "dpmpp_2m", "spacing": "karras"}),
    ({"negative_text": "blue"}, {"negative": "blue"}),
    ({"mask_precision": 0}, {"precision": 0}),
    ({"preserve_background": False}, {"preserve_background": False}),
    ({"refine_from": 1.0}, {"refine_from": 1.0}),
    ({"threshold": 0.0}, {"threshold": 0.0}),
    ({"paste_back": False}, {"paste_back": False}),
    ({"feather": 0}, {"feather": 0}),
    ({"color_match": 1.0}, {"color_match": 1.0}),
    ({"zoom": True, "zoom_margin": 0.1}, {"zoom": True, "margin": 0.1}),
]


@pytest.mark.parametrize("inputs, fields", SETTINGS, ids=[" ".join(given) or "defaults" for given, _ in SETTINGS])
def test_the_node_makes_the_edit_of_the_core(pack, paint, model, inputs, fields):
    """And each input is told: it makes another picture than the defaults do."""
    source, mask = (noise(1, 200, 240), boxes(200, 240, (90, 100), side=40)) if "zoom" in inputs else (SOURCE, MASK)
    result = paint(source=source, mask=mask, **inputs)
    settings = pack.core("systems.smartbrush").BrushSettings(**fields)
    model.bring("pictures", "text", "unet")
    expected = model.model.edit_batch(source, mask, TEXT, settings)
    assert torch.equal(result.image, expected.pictures) and torch.equal(result.raw, expected.raw)
    assert torch.equal(result.blend, expected.alpha)
    assert torch.equal(result.predicted, expected.predicted) and torch.equal(result.repainted, expected.region)
    window = expected.window
    assert (result.x, result.y, result.width, result.height) == (window.x, window.y, window.width, window.height)
    if inputs:
        assert (result.image - paint(source=source, mask=mask).image).abs().max() > 0.01


def test_part_of_the_mask_is_given_back_to_the_background(paint):
    result = paint(feather=0)
    given_back = (MASK == 1) & (result.repainted == 0)
    assert given_back.any() and result.repainted.any()
    assert torch.equal(result.image[given_back], SOURCE[given_back])
    assert torch.equal(result.blend, result.repainted)
    assert not result.predicted[:, :10].any() and 0 < result.predicted.max() <= 1
    assert result.ui is None


def test_a_predicted_mask_that_is_not_believed_is_told(paint):
    result = paint(threshold=1.0)
    assert torch.equal(result.repainted, MASK)
    assert "Picture 1" in result.ui.text and "threshold" in result.ui.text


def test_the_text_counts(paint):
    assert (paint().raw - paint(text="a blue star").raw).abs().max() > 0.01


def test_batches_and_their_seeds(paint):
    sources = torch.cat([SOURCE, 1 - SOURCE])
    result = paint(source=sources, seed=3, batch_seeds="count up", at_once=2)
    for index in range(2):
        alone = paint(source=sources[index, None], seed=3 + index).image[0]
        assert (result.image[index] - alone).abs().max() <= 1 / 255 + 1e-6
    assert result.predicted.shape == result.repainted.shape == (2, H, W)


# --- what is refused ---------------------------------------------------------------------------------------


def test_an_unknown_word_is_named(paint, errors):
    with pytest.raises(errors.ArgumentError, match=r"not know 'dragon'.*disc"):
        paint(text="a dragon")


def test_an_empty_mask_is_refused(paint, errors):
    with pytest.raises(errors.PictureError, match="mask is empty"):
        paint(mask=torch.zeros(1, H, W))


def test_an_option_that_does_not_exist_is_refused(paint, errors):
    with pytest.raises(errors.ArgumentError, match="magic"):
        paint(batch_seeds="magic")


# --- progress, cancelling, memory --------------------------------------------------------------------------


def test_progress_counts_every_step_and_shows_the_picture(host, paint):
    paint(steps=3)
    [bar] = host.bars
    assert bar.values == [1, 2, 3] and {total for _, total, _ in bar.updates} == {3}
    kind, picture, _ = bar.previews[0]
    assert kind == "JPEG" and picture.size == (64, 64)


def test_cancelling_stops_at_once_and_leaves_the_model_as_it_was(host, paint):
    expected = paint().image
    host.reset()
    host.on_update = lambda bar: host.interrupt()
    with pytest.raises(InterruptProcessingException):
        paint()
    assert len(host.bars[0].updates) == 1
    host.reset()
    assert torch.equal(paint().image, expected)


def test_all_of_it_is_on_the_device_together(host, model, paint):
    host.reset()
    paint()
    [load] = host.loads
    assert load.models == [model.patchers[group] for group in ("pictures", "text", "unet")] and load.whole


def test_more_pictures_at_once_need_more_room(host, paint):
    rooms = []
    for at_once in (4, 16):
        paint(source=SOURCE.expand(16, -1, -1, -1), at_once=at_once, steps=1)
        rooms.append(host.loads[-1].memory)
    assert rooms[0] < rooms[1]
