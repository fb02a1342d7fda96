"""Load Paint by Example and Paint by Example: their files, the edit they make, what they refuse, progress, memory."""

import os
import shutil

import pytest
import torch
from host_double import InterruptProcessingException, InvalidPrompt, NotOnDevice
from node_pictures import boxes, noise
from node_schemas import embedded
from test_paint_by_example import WEIGHTS, tiny_config

from mimicbrush_core.convert import convert

H, W = 72, 96
STEPS = 3
SOURCE, MASK, EXEMPLAR = noise(1, H, W), boxes(H, W, (20, 20), side=24), noise(1, 50, 40, seed=9)
FOLDER = "paint_by_example"


@pytest.fixture(scope="module")
def config():
    return {**tiny_config(), "defaults": {"size": 64, "steps": STEPS, "guidance": 5.0, "scheduler": "plms"}}


@pytest.fixture(scope="module")
def file(tmp_path_factory, config):
    """A small model of random weights, as one file."""
    return convert(WEIGHTS, tmp_path_factory.mktemp("weights") / "tiny.safetensors", config=config, precision="fp32")


@pytest.fixture(scope="module")
def model(load):
    """What a PAINT_BY_EXAMPLE_MODEL wire carries."""
    return load("LoadPaintByExample")


@pytest.fixture
def paint(pack, model):
    """paint(**inputs): the node, with this module's model and pictures where nothing else is given."""

    def run(**inputs):
        return pack.call(
            "PaintByExample", **{"model": model, "source": SOURCE, "mask": MASK, "exemplar": EXEMPLAR} | inputs
        )

    return run


@pytest.fixture
def errors(pack):
    return pack.core("errors")


def model_names(pack, node):
    return pack.object_info()[node]["input"]["required"]["model_name"][1]["options"]


# --- Load --------------------------------------------------------------------------------------------------


def test_the_embedded_model_is_loaded_as_a_new_node_has_it(pack, host):
    loaded = pack.call("LoadPaintByExample").model.model
    assert loaded.config["name"] == "Paint by Example small (embedded)"


def test_a_missing_file_is_named_with_what_to_do(pack, host):
    assert model_names(pack, "MimicBrushLoadPaintByExample") == [embedded("paint-by-example")]
    with pytest.raises(InvalidPrompt) as error:
        pack.call("LoadPaintByExample", model_name="gone.safetensors")
    said = ("gone.safetensors", "huggingface.co/Fantasy-Studio/Paint-by-Example", str(host.models / FOLDER))
    for one in (*said, "Convert MimicBrush", "press R", embedded("paint-by-example")):
        assert one in str(error.value)


def test_each_load_lists_its_own_folder(pack, host, models):
    (host.models / "mimicbrush").mkdir()
    for name in ("mimicbrush/other.safetensors", f"{FOLDER}/mine.safetensors", f"{FOLDER}/notes.txt"):
        (host.models / name).write_bytes(b"")
    assert model_names(pack, "MimicBrushLoadPaintByExample") == ["mine.safetensors", embedded("paint-by-example")]
    assert model_names(pack, "MimicBrushLoad") == ["other.safetensors", embedded("mimicbrush")]


@pytest.mark.parametrize("name", ["gone.safetensors", "../secret.safetensors"])
def test_what_is_not_in_the_folder_is_refused(pack, models, file, name):
    shutil.copy(file, models.parent / "secret.safetensors")
    with pytest.raises(InvalidPrompt, match="There is no model"):
        pack.call("LoadPaintByExample", model_name=name)
    with pytest.raises(FileNotFoundError):  # neither do the functions behind the check find it
        pack.nodes["MimicBrushLoadPaintByExample"].execute(name, "auto")


def test_a_file_of_the_other_system_is_refused_by_its_name(pack, host, models, mine, errors):
    shutil.copy(pack.core("checkpoints").embedded_model_path(), models / "brush.safetensors")
    with pytest.raises(errors.ModelFileError, match=r"brush\.safetensors is MimicBrush; Paint by Example was expected"):
        pack.call("LoadPaintByExample", model_name="brush.safetensors")
    (host.models / "mimicbrush").mkdir()
    shutil.copy(mine, host.models / "mimicbrush" / "painter.safetensors")
    with pytest.raises(errors.ModelFileError, match=r"painter\.safetensors is Paint by Example; MimicBrush was"):
        pack.call("Load", model_name="painter.safetensors")


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("auto", torch.float32)])
def test_a_precision_s_name_is_the_weights_type(pack, mine, precision, dtype):
    loaded = pack.call("LoadPaintByExample", model_name="mine.safetensors", precision=precision).model.model
    for _, module in loaded.modules.items():
        assert {weight.dtype for weight in module.parameters()} == {dtype}
        assert not any(weight.is_inference() for weight in module.parameters())


def test_a_precision_that_does_not_exist_is_refused(pack, mine, errors):
    with pytest.raises(errors.ArgumentError, match="fp8"):
        pack.call("LoadPaintByExample", model_name="mine.safetensors", precision="fp8")


def test_a_file_that_changed_is_loaded_again(pack, mine):
    load = pack.nodes["MimicBrushLoadPaintByExample"]
    before = load.fingerprint_inputs("mine.safetensors", "auto")
    assert load.fingerprint_inputs("mine.safetensors", "auto") == before
    assert load.fingerprint_inputs("mine.safetensors", "fp16") != before
    os.utime(mine, ns=(1, 1))
    assert load.fingerprint_inputs("mine.safetensors", "auto") != before
    assert load.validate_inputs(None) is True and load.fingerprint_inputs(None, "auto") == ()


# --- Convert -----------------------------------------------------------------------------------------------


def test_convert_writes_where_the_system_s_own_load_looks(pack, host, config, monkeypatch):
    monkeypatch.setattr(pack.core("checkpoints"), "bundled_config", lambda _: config)
    host.models.mkdir()
    shutil.copy(WEIGHTS, host.models / "published.safetensors")
    result = pack.call("Convert", release="published.safetensors", name="painter")
    assert model_names(pack, "MimicBrushLoadPaintByExample")[0] == "painter.safetensors" == result.model_name
    assert str(host.models / FOLDER / "painter.safetensors") in result.ui.text
    assert not (host.models / "mimicbrush").exists()
    assert pack.call("LoadPaintByExample", model_name=result.model_name).model.model.system == "paint-by-example"


def test_a_system_without_nodes_is_refused_by_name(pack, host, config, errors, monkeypatch):
    monkeypatch.setattr(pack.core("checkpoints"), "bundled_config", lambda _: config)
    monkeypatch.delitem(pack.part("host").FOLDERS, "paint-by-example")
    host.models.mkdir()
    shutil.copy(WEIGHTS, host.models / "published.safetensors")
    with pytest.raises(errors.ArgumentError, match="is Paint by Example, for which there are no nodes"):
        pack.call("Convert", release="published.safetensors")


def test_published_files_have_no_place_in_the_model_folder(pack, errors):
    with pytest.raises(errors.ArgumentError, match="holds converted models"):
        pack.call("Convert", release=FOLDER)


# --- the edit ----------------------------------------------------------------------------------------------

SETTINGS = [
    ({}, {}),
    ({"seed": 5}, {"seed": 5}),
    ({"steps": 2}, {"steps": 2}),
    ({"guidance": 1.5}, {"guidance": 1.5}),
    ({"sampler": "ddim"}, {"scheduler": "ddim"}),
    ({"scheduler": "linspace"}, {"spacing": "linspace"}),
    ({"exemplar_fit": "crop"}, {"exemplar_fit": "crop"}),
    ({"exemplar_fit": "pad"}, {"exemplar_fit": "pad"}),
    ({"feather": 3}, {"feather": 3}),
    ({"color_match": 1.0}, {"color_match": 1.0}),
    ({"paste_back": False}, {"paste_back": False}),
    ({"zoom": True, "zoom_margin": 0.1}, {"zoom": True, "margin": 0.1}),
]


@pytest.mark.parametrize("inputs, fields", SETTINGS, ids=[" ".join(given) or "defaults" for given, _ in SETTINGS])
def test_the_node_makes_the_edit_of_the_core(pack, paint, model, inputs, fields):
    """And each input is told: it makes another picture than the defaults do."""
    source, mask = (noise(1, 200, 240), boxes(200, 240, (90, 100), side=24)) if "zoom" in inputs else (SOURCE, MASK)
    result = paint(source=source, mask=mask, **inputs)
    core = pack.core("systems.paint_by_example")
    settings = core.ExemplarSettings(**{"paste_back": True} | fields)
    model.bring("image", "pictures", "unet")
    expected = model.model.edit_batch(source, mask, EXEMPLAR[0], settings)
    assert torch.equal(result.image, expected.pictures) and torch.equal(result.raw, expected.raw)
    assert torch.equal(result.blend, expected.alpha)
    window = expected.window
    assert (result.x, result.y, result.width, result.height) == (window.x, window.y, window.width, window.height)
    if inputs:
        assert (result.image - paint(source=source, mask=mask).image).abs().max() > 0.01


def test_as_it_comes_beyond_the_blend_not_one_bit_changes(paint):
    result = paint(source=SOURCE.clone())
    outside = result.blend == 0
    assert outside.any() and torch.equal(result.image[outside], SOURCE[outside])
    assert (result.image - SOURCE)[MASK == 1].abs().mean() > 0.05


def test_without_pasting_back_the_picture_is_the_model_s_answer(paint):
    result = paint(paste_back=False)
    assert torch.equal(result.image, result.raw) and (result.blend == 1).all()


def test_the_exemplar_counts(paint):
    assert (paint().raw - paint(exemplar=1 - EXEMPLAR).raw).abs().max() > 0.02


def test_a_transparent_exemplar_lies_on_white(paint):
    clear = torch.cat([EXEMPLAR, torch.zeros_like(EXEMPLAR[..., :1])], dim=-1)
    assert torch.equal(paint(exemplar=clear).image, paint(exemplar=torch.ones_like(EXEMPLAR)).image)


def test_batches_and_their_seeds(paint):
    source = torch.cat([SOURCE, 1 - SOURCE, SOURCE])
    mask = torch.cat([MASK, MASK, torch.zeros_like(MASK)])
    result = paint(source=source, mask=mask, seed=3, batch_seeds="count up", at_once=2)
    assert torch.equal(result.image[2], SOURCE[0])  # its mask is empty
    for index in range(2):
        alone = paint(source=source[index, None], seed=3 + index).image[0]
        assert (result.image[index] - alone).abs().max() <= 1 / 255 + 1e-6


# --- what is refused ---------------------------------------------------------------------------------------


def test_several_exemplars_are_refused(paint, errors):
    with pytest.raises(errors.PictureError, match=r"batch of 2 pictures.*looks at one"):
        paint(exemplar=noise(2, 40, 40))


def test_an_empty_mask_is_refused(paint, errors):
    with pytest.raises(errors.PictureError, match="mask is empty"):
        paint(mask=torch.zeros_like(MASK))


@pytest.mark.parametrize("name", ["exemplar_fit", "batch_seeds", "sampler", "scheduler"])
def test_an_option_that_does_not_exist_is_refused(paint, errors, name):
    with pytest.raises(errors.ArgumentError, match="magic"):
        paint(**{name: "magic"})


def test_what_plms_does_not_know_is_refused_with_what_to_choose(paint, errors):
    with pytest.raises(errors.ArgumentError, match=r"'plms' does not know Karras spacing.*ddim"):
        paint(scheduler="karras")
    assert paint(scheduler="karras", sampler="ddim").raw.isfinite().all()


# --- progress, cancelling, memory --------------------------------------------------------------------------


def test_progress_counts_every_evaluation_and_shows_the_picture(host, paint):
    paint()
    [bar] = host.bars
    assert bar.values == list(range(1, STEPS + 2))  # plms evaluates the second step twice
    assert {total for _, total, _ in bar.updates} == {STEPS + 1}
    kind, picture, _ = bar.previews[0]
    assert kind == "JPEG" and picture.size == (64, 64)


@pytest.mark.parametrize("at_once, rounds", [(1, 3), (2, 2), (4, 1)])
def test_a_batch_is_worked_on_in_rounds(host, paint, at_once, rounds):
    paint(source=noise(3, H, W), at_once=at_once)
    assert host.bars[0].values[-1] == rounds * (STEPS + 1)


@pytest.mark.parametrize("at", [1, 2])
def test_cancelling_stops_at_once_and_leaves_the_model_as_it_was(host, paint, at):
    expected = paint().image
    host.reset()
    host.on_update = lambda bar: host.interrupt() if len(bar.updates) == at else None
    with pytest.raises(InterruptProcessingException):
        paint()
    assert len(host.bars[0].updates) == at
    host.reset()
    assert torch.equal(paint().image, expected)


def test_the_exemplar_s_encoder_gives_way_to_the_unet(host, model, paint):
    host.reset()
    paint()
    assert [load.models for load in host.loads] == [
        [model.patchers["image"]],
        [model.patchers["pictures"], model.patchers["unet"]],
    ]
    assert all(load.whole for load in host.loads)
    with pytest.raises(NotOnDevice):
        model.model.encode_exemplar((EXEMPLAR[0].numpy() * 255).astype("uint8"))


def test_more_pictures_at_once_need_more_room(host, paint):
    rooms = []
    for at_once in (4, 16):
        paint(source=SOURCE.expand(16, -1, -1, -1), at_once=at_once, steps=1)
        rooms.append(host.loads[-1].memory)
    assert rooms[0] < rooms[1]
