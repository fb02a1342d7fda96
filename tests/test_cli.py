"""The command line: the main job, its metadata, and that every wrong input ends clearly with nothing written."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from model_files import write_random
from PIL import Image
from test_paint_by_example import WEIGHTS, tiny_config

from mimicbrush_core.cli import main
from mimicbrush_core.coarse_edit import CoarseEdit, coarse_edit
from mimicbrush_core.convert import convert
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.images import save_png
from mimicbrush_core.modules import bundled_config
from mimicbrush_core.systems.magic_fixup import FixupSettings, MagicFixup
from mimicbrush_core.systems.smartbrush import BrushSettings, SmartBrush

SETTING, PICTURE, MODEL, OUTPUT = 2, 3, 4, 5


@pytest.fixture
def pictures(tmp_path):
    """source.png, mask.png and reference.png in a folder of their own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    source, mask, reference = EXAMPLES[0].render(128)
    for name, picture in (("source", source), ("mask", mask), ("reference", reference)):
        save_png(folder / f"{name}.png", picture, {})
    return folder


def edit(folder, output, *options, source="source.png", mask="mask.png", reference="reference.png"):
    inputs = [str(folder / name) for name in (source, mask, reference)]
    return main(["edit", *inputs, "-o", str(output), "--device", "cpu", *options])


def test_edit_writes_the_picture_its_settings_and_a_sheet(pictures, tmp_path):
    output, grid = tmp_path / "out.png", tmp_path / "grid.png"
    assert edit(pictures, output, "--steps", "2", "--seed", "5", "--grid", str(grid)) == 0
    with Image.open(output) as result, Image.open(pictures / "source.png") as source:
        assert result.size == source.size
        note = json.loads(result.text["mimicbrush"])
        mask = np.asarray(Image.open(pictures / "mask.png"))
        assert (np.asarray(result)[mask > 0] != np.asarray(source)[mask > 0]).any()
    assert note["settings"]["seed"] == 5 and note["settings"]["steps"] == 2
    assert note["settings"]["guidance"] is not None and note["model"]
    with Image.open(grid) as sheet:
        assert sheet.width > 4 * 200


def test_edit_repeats_itself(pictures, tmp_path):
    for name in ("a.png", "b.png"):
        assert edit(pictures, tmp_path / name, "--steps", "2") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_transparent_source_stays_transparent(pictures, tmp_path):
    source = Image.open(pictures / "source.png")
    source.putalpha(77)
    source.save(pictures / "alpha.png")
    assert edit(pictures, tmp_path / "out.png", "--steps", "1", "--feather", "0", source="alpha.png") == 0
    alpha = np.asarray(Image.open(tmp_path / "out.png"))[..., 3]
    mask = np.asarray(Image.open(pictures / "mask.png"))
    assert set(alpha[mask == 0]) == {77} and set(alpha[mask > 0]) == {255}


def _empty_mask(folder):
    Image.new("L", (128, 128)).save(folder / "mask.png")


def _mask_of_another_size(folder):
    Image.new("L", (64, 128), 255).save(folder / "mask.png")


def _one_pixel(folder):
    Image.new("RGB", (1, 1)).save(folder / "source.png")


def _huge(folder):
    Image.new("L", (20_000, 16)).save(folder / "source.png")


def _animated(folder):
    frames = [Image.new("RGB", (128, 128), (index * 90, 0, 0)) for index in range(3)]
    frames[0].save(folder / "source.png", save_all=True, append_images=frames[1:])


def _cmyk(folder):
    Image.new("CMYK", (128, 128)).save(folder / "reference.png", format="JPEG")


def _truncated(folder):
    whole = (folder / "reference.png").read_bytes()
    (folder / "reference.png").write_bytes(whole[: len(whole) // 2])


def _missing(folder):
    (folder / "source.png").unlink()


def _not_a_picture(folder):
    (folder / "mask.png").write_text("hello")


def _nothing_inside(folder):
    (folder / "mask.png").write_bytes(b"")


def _a_folder(folder):
    (folder / "source.png").unlink()
    (folder / "source.png").mkdir()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (_empty_mask, "mask is empty"),
        (_mask_of_another_size, "64 x 128"),
        (_one_pixel, "source.png"),
        (_huge, "20000"),
        (_animated, "source.png"),
        (_cmyk, "CMYK"),
        (_truncated, "reference.png"),
        (_missing, "source.png"),
        (_not_a_picture, "mask.png"),
        (_nothing_inside, "mask.png"),
        (_a_folder, "source.png"),
    ],
)
def test_bad_pictures_end_clearly_and_write_nothing(pictures, tmp_path, capsys, spoil, words):
    spoil(pictures)
    out = tmp_path / "out"
    out.mkdir()
    assert edit(pictures, out / "out.png", "--steps", "1", "--grid", str(out / "grid.png")) == PICTURE
    assert words in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--scheduler", "magic"], SETTING, "magic"),
        (["--steps", "0"], SETTING, "steps"),
        (["--steps", "5000"], SETTING, "steps"),
        (["--guidance", "nan"], SETTING, "guidance"),
        (["--guidance", "-3"], SETTING, "guidance"),
        (["--size", "100"], SETTING, "multiple"),
        (["--seed", "-1"], SETTING, "seed"),
        (["--weight", "-1"], SETTING, "weight"),
        (["--feather", "-1"], SETTING, "feather"),
        (["--margin", "-1", "--zoom"], SETTING, "margin"),
        (["--device", "cuda:99"], SETTING, "cuda:99"),
        (["--device", "toaster"], SETTING, "toaster"),
        (["--model", "nowhere.safetensors"], MODEL, "nowhere.safetensors"),
        (["--grid", "sheet.jpg"], OUTPUT, "sheet.jpg"),
        (["--grid", "no/such/folder/sheet.png"], OUTPUT, "folder"),
    ],
)
def test_bad_arguments_end_clearly_and_write_nothing(pictures, tmp_path, capsys, options, code, words):
    out = tmp_path / "out"
    out.mkdir()
    assert edit(pictures, out / "out.png", *options) == code
    assert words in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_outputs_are_never_overwritten_unless_asked(pictures, tmp_path, capsys):
    output = tmp_path / "out.png"
    output.write_text("precious")
    assert edit(pictures, output, "--steps", "1") == OUTPUT
    assert output.read_text() == "precious" and "--overwrite" in capsys.readouterr().err
    assert edit(pictures, output, "--steps", "1", "--overwrite") == 0


def test_an_output_that_is_no_png_is_refused(pictures, tmp_path):
    assert edit(pictures, tmp_path / "out.jpg") == OUTPUT
    assert not (tmp_path / "out.jpg").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_read_only_folder_is_refused(pictures, tmp_path):
    out = tmp_path / "locked"
    out.mkdir()
    out.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert edit(pictures, out / "out.png") == OUTPUT


def test_a_full_disk_leaves_what_was_there(pictures, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.png"
    output.write_text("precious")

    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    assert edit(pictures, output, "--steps", "1", "--overwrite") == OUTPUT
    assert "No space left" in capsys.readouterr().err
    assert output.read_text() == "precious" and len(list(tmp_path.glob("*.unfinished"))) == 0


def test_an_interrupted_edit_writes_nothing(pictures, tmp_path, monkeypatch):
    from mimicbrush_core.systems.mimicbrush import MimicBrush

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MimicBrush, "decode", interrupt)
    assert edit(pictures, tmp_path / "out.png", "--steps", "1") == 130
    assert not (tmp_path / "out.png").exists()


# -------------------- the system is that of the file


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """A small Paint by Example of random weights, as one file."""
    config = tiny_config()
    config["defaults"] |= {"size": 64, "steps": 2}
    return str(convert(WEIGHTS, tmp_path_factory.mktemp("painter") / "tiny.safetensors", config=config))


def test_edit_with_paint_by_example(pictures, tmp_path, painter):
    output = tmp_path / "out.png"
    assert (
        edit(pictures, output, "--model", painter, "--exemplar-fit", "pad", "--grid", str(tmp_path / "grid.png")) == 0
    )
    with Image.open(output) as result:
        note = json.loads(result.text["mimicbrush"])
    assert (note["model"], note["settings"]["scheduler"]) == ("tiny", "plms")
    assert note["settings"]["exemplar_fit"] == "pad" and not note["settings"]["paste_back"]
    assert "weight" not in note["settings"] and (tmp_path / "grid.png").exists()


def test_paint_by_example_pastes_back_when_asked(pictures, tmp_path, painter):
    kept = []
    for name, options in (("whole.png", []), ("pasted.png", ["--paste-back", "--feather", "0"])):
        assert edit(pictures, tmp_path / name, "--model", painter, *options) == 0
        source, mask, result = (
            np.asarray(Image.open(path)) for path in (pictures / "source.png", pictures / "mask.png", tmp_path / name)
        )
        kept.append(np.array_equal(result[mask == 0], source[mask == 0]))
        assert (result[mask > 0] != source[mask > 0]).any()
    assert kept == [False, True]


FOR_MIMICBRUSH = (["--weight", "1"], ["--keep-shape"], ["--shape-strength", "0.5"], ["--lora", "any.safetensors"])
FOR_FIXUPS = (["--coarse", "edit.png"], ["--strength", "0.5"], ["--eta", "0"])
FOR_OTHERS = (["--exemplar-fit", "crop"], ["--paste-back"], *FOR_FIXUPS)


@pytest.mark.parametrize("options", FOR_MIMICBRUSH + FOR_FIXUPS, ids=" ".join)
def test_what_paint_by_example_does_not_know_is_refused_by_name(pictures, tmp_path, painter, capsys, options):
    assert edit(pictures, tmp_path / "out.png", "--model", painter, *options) == SETTING
    message = capsys.readouterr().err
    assert "The model is Paint by Example" in message and options[0] in message
    assert not (tmp_path / "out.png").exists()


def test_paint_by_example_knows_no_depth(pictures, tmp_path, painter, capsys):
    for model in (painter, str(WEIGHTS)):
        assert edit(pictures, tmp_path / "out.png", "--model", model, "--depth", "depth.pth") == SETTING
        message = capsys.readouterr().err
        assert "Paint by Example" in message and "depth" in message


@pytest.mark.parametrize("options", FOR_OTHERS, ids=" ".join)
def test_what_mimicbrush_does_not_know_is_refused_by_name(pictures, tmp_path, capsys, options):
    assert edit(pictures, tmp_path / "out.png", *options) == SETTING
    message = capsys.readouterr().err
    assert "The model is MimicBrush" in message and options[0] in message
    assert not (tmp_path / "out.png").exists()


def test_an_unknown_exemplar_fit_is_refused(pictures, tmp_path, painter, capsys):
    assert edit(pictures, tmp_path / "out.png", "--model", painter, "--exemplar-fit", "squash") == SETTING
    assert "stretch, crop, pad" in capsys.readouterr().err


def test_the_demo_is_for_mimicbrush(tmp_path, painter, capsys):
    assert main(["demo", "-o", str(tmp_path / "demo"), "--model", painter, "--device", "cpu"]) == MODEL
    assert "is Paint by Example; MimicBrush was expected" in capsys.readouterr().err


# -------------------- Magic Fixup: an original and its coarse edit


@pytest.fixture(scope="module")
def fixer(tmp_path_factory):
    """A small Magic Fixup of random weights, as one file."""
    config = bundled_config("magic_fixup_small")
    config["defaults"] |= {"size": 64, "steps": 2}
    return str(write_random(tmp_path_factory.mktemp("fixer") / "fixer.safetensors", config))


@pytest.fixture
def coarse(pictures):
    """edit.png beside the other pictures: the masked part moved to the right, as another program may save it."""
    source, mask = (np.asarray(Image.open(pictures / f"{name}.png")) for name in ("source", "mask"))
    result = coarse_edit(torch.tensor(source)[None] / 255, torch.tensor(mask)[None] / 255, CoarseEdit(x=30))
    Image.fromarray((result.pictures[0].numpy() * 255).round().astype(np.uint8)).save(pictures / "edit.png")
    return pictures / "edit.png"


def fix(folder, output, *options):
    given = ["--coarse", str(folder / "edit.png"), "--device", "cpu"]
    return main(["edit", str(folder / "source.png"), "-o", str(output), *given, *options])


def test_edit_with_magic_fixup(pictures, tmp_path, fixer, coarse):
    output, grid = tmp_path / "out.png", tmp_path / "grid.png"
    assert fix(pictures, output, "--model", fixer, "--strength", "0.5", "--eta", "0", "--grid", str(grid)) == 0
    with Image.open(output) as result, Image.open(pictures / "source.png") as source, Image.open(grid) as sheet:
        note = json.loads(result.text["mimicbrush"])
        assert result.size == source.size
        assert (np.asarray(result) != np.asarray(source)).any(axis=-1).mean() > 0.9
        assert 3 * 256 < sheet.width < 4 * 256  # source, coarse edit, result
    assert (note["settings"]["strength"], note["settings"]["eta"]) == (0.5, 0)
    assert not note["settings"]["paste_back"] and "weight" not in note["settings"]
    core = MagicFixup.load(fixer).edit(
        np.asarray(Image.open(pictures / "source.png")),
        np.asarray(Image.open(coarse)),
        FixupSettings(strength=0.5, eta=0),
    )
    assert np.array_equal(np.asarray(Image.open(output)), core.picture)


def test_magic_fixup_pastes_back_within_the_mask_or_what_was_edited(pictures, tmp_path, fixer, coarse):
    source, layer, mask = (np.asarray(Image.open(pictures / f"{name}.png")) for name in ("source", "edit", "mask"))
    edited = (layer[..., :3] != source).any(axis=-1) | (layer[..., 3] < 255)
    for name, given, region in (("a.png", [], edited), ("b.png", [str(pictures / "mask.png")], mask > 0)):
        inputs = [str(pictures / "source.png"), *given, "--coarse", str(coarse), "-o", str(tmp_path / name)]
        options = ["--model", fixer, "--device", "cpu", "--paste-back", "--feather", "0"]
        assert main(["edit", *inputs, *options]) == 0
        result = np.asarray(Image.open(tmp_path / name))
        assert np.array_equal(result[~region], source[~region]) and (result[region] != source[region]).any()


@pytest.mark.parametrize("options", (*FOR_MIMICBRUSH, ["--exemplar-fit", "pad"]), ids=" ".join)
def test_what_magic_fixup_does_not_know_is_refused_by_name(pictures, tmp_path, fixer, coarse, capsys, options):
    assert fix(pictures, tmp_path / "out.png", "--model", fixer, *options) == SETTING
    message = capsys.readouterr().err
    assert "The model is Magic Fixup" in message and options[0] in message
    assert not (tmp_path / "out.png").exists()


def test_what_is_missing_or_too_much_is_named(pictures, tmp_path, fixer, coarse, capsys):
    source, output = str(pictures / "source.png"), ["-o", str(tmp_path / "out.png"), "--device", "cpu"]
    mask, reference = str(pictures / "mask.png"), str(pictures / "reference.png")
    for given, words in (
        ([source], "The model is MimicBrush, which needs a mask"),
        ([source, mask], "The model is MimicBrush, which needs a reference"),
        ([source, "--system", "paint-by-example"], "The model is Paint by Example, which needs a mask"),
        ([source, "--model", fixer], "The model is Magic Fixup, which needs a coarse edit (--coarse)"),
        (
            [source, mask, reference, "--model", fixer, "--coarse", str(coarse)],
            "The model is Magic Fixup, which does not know a reference",
        ),
    ):
        assert main(["edit", *given, *output]) == SETTING
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_coarse_edit_that_cannot_be_read_is_named(pictures, tmp_path, fixer, coarse, capsys):
    coarse.write_bytes(b"nothing")
    assert fix(pictures, tmp_path / "out.png", "--model", fixer) == PICTURE
    assert "edit.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "system, name", [("paint-by-example", "Paint by Example"), ("magic-fixup", "Magic Fixup"), (None, "MimicBrush")]
)
def test_without_a_file_the_system_s_embedded_model_edits(pictures, tmp_path, coarse, system, name):
    run, options = (fix if system == "magic-fixup" else edit), ["--system", system] if system else []
    assert run(pictures, tmp_path / "out.png", *options, "--steps", "1") == 0
    with Image.open(tmp_path / "out.png") as result:
        assert json.loads(result.text["mimicbrush"])["model"] == f"{name} small (embedded)"


def test_the_system_asked_for_must_be_that_of_the_file(pictures, tmp_path, fixer, capsys):
    assert edit(pictures, tmp_path / "out.png", "--model", fixer, "--system", "mimicbrush") == MODEL
    assert "is Magic Fixup; MimicBrush was expected" in capsys.readouterr().err


# -------------------- SmartBrush: a text


@pytest.fixture(scope="module")
def brush(tmp_path_factory):
    """A small SmartBrush of random weights, as one file."""
    config = bundled_config("smartbrush_small")
    config["defaults"] |= {"size": 64, "steps": 2}
    return str(write_random(tmp_path_factory.mktemp("brush") / "brush.safetensors", config))


def brush_edit(folder, output, *options):
    pictures = [str(folder / f"{name}.png") for name in ("source", "mask")]
    return main(["edit", *pictures, "-o", str(output), "--device", "cpu", *options])


def test_edit_with_smartbrush(pictures, tmp_path, brush):
    output, grid = tmp_path / "out.png", tmp_path / "grid.png"
    options = ["--text", "a red disc", "--negative", "blue", "--precision", "1", "--whole-mask", "--grid", str(grid)]
    assert brush_edit(pictures, output, "--model", brush, *options) == 0
    source, mask = (np.asarray(Image.open(pictures / f"{name}.png")) for name in ("source", "mask"))
    settings = BrushSettings(negative="blue", precision=1, preserve_background=False)
    core = SmartBrush.load(brush).edit(source, mask.astype(np.float32) / 255, "a red disc", settings)
    with Image.open(output) as result, Image.open(grid) as sheet:
        assert np.array_equal(np.asarray(result), core.picture)
        note = json.loads(result.text["mimicbrush"])
        assert 3 * 256 < sheet.width < 4 * 256  # source, mask, result
    assert note["text"] == "a red disc" and note["settings"]["precision"] == 1
    assert not note["settings"]["preserve_background"]


def test_what_smartbrush_tells_is_told(pictures, tmp_path, brush, caplog):
    given = ["--model", brush, "--text", "a red disc", "--refine-from", "0", "--threshold", "1"]
    assert brush_edit(pictures, tmp_path / "out.png", *given) == 0
    assert "almost" in caplog.text


@pytest.mark.parametrize("options", (*FOR_MIMICBRUSH, *FOR_OTHERS), ids=" ".join)
def test_what_smartbrush_does_not_know_is_refused_by_name(pictures, tmp_path, brush, capsys, options):
    assert brush_edit(pictures, tmp_path / "out.png", "--model", brush, "--text", "a disc", *options) == SETTING
    message = capsys.readouterr().err
    assert "The model is SmartBrush" in message and options[0] in message
    assert not (tmp_path / "out.png").exists()


FOR_BRUSHES = (
    ["--text", "a disc"],
    ["--negative", "blue"],
    ["--precision", "0"],
    ["--whole-mask"],
    ["--refine-from", "1"],
    ["--threshold", "0.1"],
)


@pytest.mark.parametrize("options", FOR_BRUSHES, ids=" ".join)
def test_what_only_smartbrush_knows_is_refused_by_the_others(pictures, tmp_path, capsys, options):
    assert edit(pictures, tmp_path / "out.png", *options) == SETTING
    message = capsys.readouterr().err
    assert "The model is MimicBrush" in message and options[0] in message


def test_smartbrush_needs_a_text_it_knows(pictures, tmp_path, brush, capsys):
    assert brush_edit(pictures, tmp_path / "out.png", "--model", brush) == SETTING
    assert "The model is SmartBrush, which needs a text (--text)" in capsys.readouterr().err
    assert brush_edit(pictures, tmp_path / "out.png", "--model", brush, "--text", "a dragon") == SETTING
    assert "does not know 'dragon'" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


# -------------------- the demo


def test_demo_makes_every_example_and_a_sheet(tmp_path):
    assert main(["demo", "-o", str(tmp_path / "demo"), "--steps", "1", "--device", "cpu"]) == 0
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    parts = ("source", "mask", "reference", "result")
    assert written == {"demo.png"} | {f"{e.name}-{part}.png" for e in EXAMPLES for part in parts}


def test_a_demo_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("precious")
    assert main(["demo", "-o", str(tmp_path / "taken")]) == OUTPUT
    assert (tmp_path / "taken").read_text() == "precious"
