"""Load Magic Fixup and Magic Fixup: their files, their licence, the edit they make, what they refuse, progress."""

import os
import shutil

import pytest
import torch
from host_double import NODE_ID, InterruptProcessingException, InvalidPrompt
from model_files import write_random
from node_pictures import boxes, noise
from node_schemas import embedded
from safetensors.torch import load_file
from test_magic_fixup import WEIGHTS, tiny_config

from mimicbrush_core.modules import bundled_config

H, W = 72, 96
SIZE, STEPS = 64, 2
ORIGINAL, MASK = noise(1, H, W), boxes(H, W, (20, 20), side=24)
FOLDER = "magic_fixup"
RESEARCH = "Adobe Research License: non-commercial research only"


@pytest.fixture(scope="module")
def config():
    small = bundled_config("magic_fixup_small")
    del small["licence"]  # as in a file of one's own
    return {**small, "name": "random", "defaults": {**small["defaults"], "size": SIZE, "steps": STEPS}}


@pytest.fixture(scope="module")
def file(tmp_path_factory, config):
    """A small model of random weights, as one file."""
    return write_random(tmp_path_factory.mktemp("weights") / "random.safetensors", config)


@pytest.fixture(scope="module")
def model(load):
    """What a MAGIC_FIXUP_MODEL wire carries."""
    return load("LoadMagicFixup")


@pytest.fixture(scope="module")
def coarse(host_and_pack):
    """What Coarse Edit gives: image, hole, moved region."""
    return host_and_pack[1].call("CoarseEdit", source=ORIGINAL, mask=MASK, x=40)


@pytest.fixture
def fix(pack, model, coarse):
    """fix(**inputs): the node, with this module's model and pictures where nothing else is given."""

    def run(**inputs):
        given = {"model": model, "original": ORIGINAL, "coarse_edit": coarse.image}
        return pack.call("MagicFixup", **given | inputs)

    return run


@pytest.fixture
def errors(pack):
    return pack.core("errors")


def model_names(pack, node="MimicBrushLoadMagicFixup"):
    return pack.object_info()[node]["input"]["required"]["model_name"][1]["options"]


# --- Load --------------------------------------------------------------------------------------------------


def test_load_lists_the_user_s_files_and_the_embedded_model(pack, models):
    for name in ("mine.safetensors", "notes.txt"):
        (models / name).write_bytes(b"")
    assert model_names(pack) == ["mine.safetensors", embedded("magic-fixup")]


def test_a_missing_file_is_named_with_the_page_the_licence_and_the_way(pack, models):
    with pytest.raises(InvalidPrompt) as error:
        pack.call("LoadMagicFixup", model_name="gone.safetensors")
    said = ("gone.safetensors", "huggingface.co/HadiZayer/MagicFixup", RESEARCH, str(models.parent), str(models))
    for one in (*said, "Download MimicBrush", "Convert MimicBrush", "press R", embedded("magic-fixup")):
        assert one in str(error.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors"])
def test_what_is_not_in_the_folder_is_refused(pack, models, file, name):
    shutil.copy(file, models.parent / "secret.safetensors")
    with pytest.raises(InvalidPrompt, match="There is no model"):
        pack.call("LoadMagicFixup", model_name=name)
    with pytest.raises(FileNotFoundError):  # neither do the functions behind the check find it
        pack.nodes["MimicBrushLoadMagicFixup"].execute(name, "auto")


def test_a_file_of_another_system_is_refused_by_its_name(pack, models, errors):
    shutil.copy(pack.core("checkpoints").embedded_model_path(), models / "brush.safetensors")
    with pytest.raises(errors.ModelFileError, match=r"brush\.safetensors is MimicBrush; Magic Fixup was expected"):
        pack.call("LoadMagicFixup", model_name="brush.safetensors")


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("auto", torch.float32)])
def test_a_precision_s_name_is_the_weights_type(pack, mine, precision, dtype):
    loaded = pack.call("LoadMagicFixup", model_name="mine.safetensors", precision=precision).model.model
    for _, module in loaded.modules.items():
        assert {weight.dtype for weight in module.parameters()} == {dtype}
        assert not any(weight.is_inference() for weight in module.parameters())


def test_a_file_that_changed_is_loaded_again(pack, mine):
    load = pack.nodes["MimicBrushLoadMagicFixup"]
    before = load.fingerprint_inputs("mine.safetensors", "auto")
    assert load.fingerprint_inputs("mine.safetensors", "auto") == before
    assert load.fingerprint_inputs("mine.safetensors", "fp16") != before
    os.utime(mine, ns=(1, 1))
    assert load.fingerprint_inputs("mine.safetensors", "auto") != before
    assert load.validate_inputs(None) is True and load.fingerprint_inputs(None, "auto") == ()


# --- the licence, and how released weights get here --------------------------------------------------------


def test_the_description_tells_the_licence(pack):
    for node in ("MimicBrushLoadMagicFixup", "MimicBrushMagicFixup"):
        assert "non-commercial research only" in pack.object_info()[node]["description"]


def test_the_embedded_model_is_ours(pack, host):
    loaded = pack.call("LoadMagicFixup", model_name=embedded("magic-fixup"))
    assert loaded.licence == "Apache-2.0" and loaded.model.model.config["name"] == "Magic Fixup small (embedded)"


def test_a_file_that_names_no_licence_is_said_to_name_none(pack, host, mine):
    loaded = pack.call("LoadMagicFixup", model_name="mine.safetensors")
    assert "names none" in loaded.licence and loaded.licence in loaded.ui.text
    assert host.texts == [(NODE_ID, loaded.ui.text)]  # on the node itself


@pytest.mark.parametrize("name", ["magic.ckpt", "magic.pth", "magic.safetensors"])
@pytest.mark.parametrize("prefix", ["", "_forward_module."])
def test_published_weights_are_converted_and_their_licence_travels_and_is_shown(pack, host, monkeypatch, name, prefix):
    """Plain, wrapped, with a training framework's prefix; in models/ under any name, or alone in a folder there."""
    monkeypatch.setattr(pack.core("checkpoints"), "bundled_config", lambda _: tiny_config())
    state = {prefix + key: value for key, value in load_file(WEIGHTS).items()}
    host.models.mkdir()
    if name.endswith(".safetensors"):
        release = name
        shutil.copy(WEIGHTS, host.models / name)
    else:
        release = "magic_fixup_release"
        folder = host.models / release / "as published"
        folder.mkdir(parents=True)
        torch.save({"state_dict": state} if name == "magic.pth" else state, folder / name)
    converted = pack.call("Convert", release=release, name="fixup")
    assert str(host.models / FOLDER / "fixup.safetensors") in converted.ui.text
    assert model_names(pack) == ["fixup.safetensors", embedded("magic-fixup")]
    loaded = pack.call("LoadMagicFixup", model_name=converted.model_name)
    assert loaded.model.model.config["name"] == "tiny"
    assert loaded.licence == RESEARCH and loaded.ui.text == f"Licence: {RESEARCH}"


def test_published_files_have_no_place_in_the_model_folder(pack, errors):
    with pytest.raises(errors.ArgumentError, match="holds converted models"):
        pack.call("Convert", release=FOLDER)


# --- the edit ----------------------------------------------------------------------------------------------

SETTINGS = [
    ({}, {}),
    ({"seed": 5}, {"seed": 5}),
    ({"steps": 3}, {"steps": 3}),
    ({"strength": 0.5}, {"strength": 0.5}),
    ({"eta": 0.0}, {"eta": 0.0}),
    ({"size": 128}, {"size": 128}),
    ({"color_match": 1.0}, {"color_match": 1.0}),
    ({"paste_back": True}, {"paste_back": True}),
    ({"paste_back": True, "feather": 2}, {"paste_back": True, "feather": 2}),
    ({"zoom": True, "zoom_margin": 0.1}, {"zoom": True, "margin": 0.1}),
]


@pytest.mark.parametrize("inputs, fields", SETTINGS, ids=[" ".join(given) or "defaults" for given, _ in SETTINGS])
def test_the_node_makes_the_edit_of_the_core(pack, fix, model, inputs, fields):
    """And each input is told: it makes another picture than the defaults do."""
    original, edit = ORIGINAL, pack.call("CoarseEdit", source=ORIGINAL, mask=MASK, x=40).image
    if "zoom" in inputs:
        original, mask = noise(1, 200, 240), boxes(200, 240, (90, 100), side=24)
        edit = pack.call("CoarseEdit", source=original, mask=mask, x=20).image
    result = fix(original=original, coarse_edit=edit, **inputs)
    settings = pack.core("systems.magic_fixup").FixupSettings(**fields)
    model.bring("pictures", "unets")
    expected = model.model.edit_batch(original, edit, settings)
    assert torch.equal(result.image, expected.pictures) and torch.equal(result.raw, expected.raw)
    assert torch.equal(result.blend, expected.alpha)
    window = expected.window
    assert (result.x, result.y, result.width, result.height) == (window.x, window.y, window.width, window.height)
    if inputs:
        assert (result.image - fix(original=original, coarse_edit=edit).image).abs().max() > 0.01


def test_as_it_comes_the_whole_picture_is_the_model_s_answer(fix):
    result = fix()
    assert torch.equal(result.image, result.raw) and (result.blend == 1).all() and result.image.shape == ORIGINAL.shape


def test_pasted_back_only_what_was_edited_changes(fix, coarse):
    result = fix(paste_back=True, feather=0)
    edited = (coarse.hole + coarse.moved) > 0
    assert edited.any() and torch.equal(result.blend == 1, edited)
    assert torch.equal(result.image[~edited], ORIGINAL[~edited])
    assert torch.equal(result.image[edited], result.raw[edited])


def test_a_region_says_what_is_pasted_back_and_zoomed_in_on(fix):
    original, region = noise(1, 200, 240), boxes(200, 240, (40, 200), side=12)
    given = {"original": original, "coarse_edit": 1 - original, "region": region}
    assert torch.equal(fix(**given, paste_back=True, feather=0).blend, region)
    zoomed = fix(**given, zoom=True, zoom_margin=0.1)
    assert zoomed.width < 240 and zoomed.x <= 200 and zoomed.x + zoomed.width >= 212


def test_a_hole_beside_an_opaque_edit_is_the_hole_of_a_transparent_one(fix, coarse):
    opaque = coarse.image[..., :3]
    assert torch.equal(fix(coarse_edit=opaque, hole=coarse.hole).image, fix().image)
    assert (fix(coarse_edit=opaque).image - fix().image).abs().max() > 0.01


def test_original_and_coarse_edit_both_count(fix, coarse):
    assert (fix().raw - fix(original=1 - ORIGINAL).raw).abs().max() > 0.02
    other = torch.cat([1 - coarse.image[..., :3], coarse.image[..., 3:]], dim=-1)
    assert (fix().raw - fix(coarse_edit=other).raw).abs().max() > 0.02


def test_batches_and_their_seeds(fix, coarse):
    originals = torch.cat([ORIGINAL, 1 - ORIGINAL])
    result = fix(original=originals, seed=3, batch_seeds="count up", at_once=2)
    for index in range(2):
        alone = fix(original=originals[index, None], seed=3 + index).image[0]
        assert (result.image[index] - alone).abs().max() <= 1 / 255 + 1e-6
    assert len(fix(coarse_edit=coarse.image.expand(3, -1, -1, -1)).image) == 3


# --- what is refused ---------------------------------------------------------------------------------------


def test_an_edit_that_moved_nothing_is_refused(fix, errors):
    with pytest.raises(errors.PictureError, match="nothing was moved"):
        fix(coarse_edit=ORIGINAL)


def test_pictures_of_different_sizes_are_refused(fix, coarse, errors):
    with pytest.raises(errors.PictureError, match="coarse edit is 90 x 72 pixels, the original 96 x 72"):
        fix(coarse_edit=coarse.image[:, :, :90])
    with pytest.raises(errors.PictureError, match="hole is 90 x 72 pixels"):
        fix(hole=coarse.hole[..., :90])


def test_an_option_that_does_not_exist_is_refused(fix, errors):
    with pytest.raises(errors.ArgumentError, match="magic"):
        fix(batch_seeds="magic")


def test_a_size_that_does_not_fit_is_refused(fix, errors):
    with pytest.raises(errors.ArgumentError, match="size is 72; this model needs a multiple of 16"):
        fix(size=72)


# --- progress, cancelling, memory --------------------------------------------------------------------------


def test_progress_counts_every_step_and_shows_the_picture(host, fix):
    fix(steps=4, strength=0.5)
    [bar] = host.bars
    assert bar.values == [1, 2] and {total for _, total, _ in bar.updates} == {2}
    kind, picture, _ = bar.previews[0]
    assert kind == "JPEG" and picture.size == (64, 64)


@pytest.mark.parametrize("at", [1, 2])
def test_cancelling_stops_at_once_and_leaves_the_model_as_it_was(host, fix, at):
    expected = fix().image
    host.reset()
    host.on_update = lambda bar: host.interrupt() if len(bar.updates) == at else None
    with pytest.raises(InterruptProcessingException):
        fix()
    assert len(host.bars[0].updates) == at
    host.reset()
    assert torch.equal(fix().image, expected)


def test_both_unets_are_on_the_device_together(host, model, fix):
    host.reset()
    fix()
    [load] = host.loads
    assert load.models == [model.patchers["pictures"], model.patchers["unets"]] and load.whole


def test_more_pictures_at_once_and_larger_ones_need_more_room(host, fix, coarse):
    rooms = []
    for at_once, size in ((4, 0), (16, 0), (4, 128)):
        fix(coarse_edit=coarse.image.expand(16, -1, -1, -1), at_once=at_once, steps=1, size=size)
        rooms.append(host.loads[-1].memory)
    assert rooms[0] < rooms[1] and rooms[0] < rooms[2]
