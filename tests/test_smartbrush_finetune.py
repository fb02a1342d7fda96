"""The large SmartBrush from the command line: its beginnings, its data, resuming, what it refuses."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_smartbrush import small_sizes, write_base

from mimicbrush_core.checkpoints import embedded_model_path
from mimicbrush_core.cli import main
from mimicbrush_core.encoders import encode_pictures
from mimicbrush_core.errors import ArgumentError, ModelFileError
from mimicbrush_core.systems.smartbrush import BrushSettings, SmartBrush
from mimicbrush_core.training import brush_start, smartbrush_finetune
from mimicbrush_core.training.brush_start import BrushStart
from mimicbrush_core.training.segments import Segments, list_segment_folder
from mimicbrush_core.training.smartbrush_finetune import (
    FULL,
    BrushFineTuneTask,
    BrushRecipe,
    finetune_brush,
    make_brush_trainable,
)
from mimicbrush_core.training.smartbrush_task import Shares, Weights

SIZE = 32
TWO_STEPS = ("--samples", "2", "--batch", "1", "--lr", "1e-3", "--size", str(SIZE), "--device", "cpu")
COCO = ("--coco", "{instances}", "--pictures", "{segments}/image")
BASES = {"--from-sd15": "sd15", "--from-inpainting": "inpainting"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny Stable Diffusion folders, and three pictures with an object each, in both forms of data."""
    folder = tmp_path_factory.mktemp("brush")
    for name, channels in (("sd15", 4), ("inpainting", 9)):
        write_base(folder / name, small_sizes(), channels)
    for name in ("image", "mask", "text"):
        (folder / "segments" / name).mkdir(parents=True)
    annotations = []
    for number in range(3):
        picture = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        mask[8:30, 4 + number : 28] = 255
        Image.fromarray(picture).save(folder / "segments" / "image" / f"{number}.png")
        Image.fromarray(mask).save(folder / "segments" / "mask" / f"{number}.png")
        (folder / "segments" / "text" / f"{number}.txt").write_text("disc\na red disc\n")
        box = [4 + number, 8, 24 - number, 22]
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": box,
                "area": box[2] * box[3],
                "segmentation": [[box[0], 8, 28, 8, 28, 30, box[0], 30]],
            }
        )
    images = [{"id": number, "file_name": f"{number}.png", "height": 40, "width": 48} for number in range(3)]
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps({"1": "a red disc"}))
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """What begins from a Stable Diffusion folder is as small as that of `world`, and validations are quick."""
    monkeypatch.setattr(brush_start, "bundled_config", lambda name: small_sizes())
    monkeypatch.setattr(smartbrush_finetune, "VALIDATION_STEPS", 1)
    monkeypatch.setattr(smartbrush_finetune, "_JUDGED", 3)


def data(world, form="segments"):
    if form == "segments":
        return ["--segments", str(world / "segments")]
    pictures = ["--pictures", str(world / "segments" / "image")]
    return ["--coco", str(world / "instances.json"), *pictures, "--captions", str(world / "captions.json")]


def train(folder, *options):
    return main(["train", "--system", "smartbrush", "--folder", str(folder), *TWO_STEPS, *map(str, options)])


def start(world, **options):
    return BrushStart(sd15=str(world / "sd15"), **options)


def segments_of(world, draw=Segments):
    return draw(list_segment_folder(world / "segments"), SIZE)


def trained(world, folder, settings=None, recipe=None, draw=Segments, **options):
    """The checkpoint of a short run in float32."""
    settings = settings or replace(FULL, samples=6, batch=2, lr=1e-3, warmup_steps=2, precision="fp32", log_every=1)
    segments = segments_of(world, draw)
    finetune_brush(folder, start(world), segments, recipe or BrushRecipe(), settings, device="cpu", **options)
    return torch.load(folder / "smartbrush.pt", weights_only=True)


class Elsewhere(Segments):
    """Segments that this process must not draw."""

    this_process = os.getpid()

    def __call__(self, number):
        assert os.getpid() != self.this_process
        return super().__call__(number)


def same(one, two):
    return all(torch.equal(one[kind][k], two[kind][k]) for kind in ("weights", "ema") for k in one[kind])


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["segments", "coco"])
@pytest.mark.parametrize("base", BASES)
def test_two_steps_from_a_base_leave_a_model_that_edits(world, tmp_path, capsys, base, form):
    begin = [base, world / BASES[base]]
    assert train(tmp_path / "run", *begin, *data(world, form)) == 0
    path = tmp_path / "run" / "model.safetensors"
    assert str(path) in capsys.readouterr().out
    model = SmartBrush.load(path)
    assert model.config["trained_samples"] == 2
    begun, _ = BrushStart(**{BASES[base]: str(begin[1])}).load()
    change = {
        part: differs(getattr(begun, part), getattr(model.modules, part)) for part in ("unet", "text_encoder", "vae")
    }
    assert change == {"unet": True, "text_encoder": False, "vae": False}
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[8:24, 8:24] = 1
    source = np.full((SIZE, SIZE, 3), 90, np.uint8)
    result = model.edit(source, mask, "a red disc", BrushSettings(size=SIZE, steps=2, preserve_background=False))
    assert (result.picture != source).any() and np.array_equal(result.region > 0, mask > 0)
    assert main(["train", "--folder", str(tmp_path / "run"), "--export", str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def differs(begun, learned):
    """Whether two modules differ by more than the file's float16."""
    learned = learned.state_dict()
    return any(not torch.equal(v.half().float(), learned[k].float()) for k, v in begun.state_dict().items())


def test_one_goes_on_from_a_smartbrush(world, tmp_path):
    assert train(tmp_path / "first", "--from-sd15", world / "sd15", *data(world)) == 0
    first = tmp_path / "first" / "model.safetensors"
    assert train(tmp_path / "second", "--model", first, *data(world)) == 0
    second = SmartBrush.load(tmp_path / "second" / "model.safetensors")
    assert differs(SmartBrush.load(first).modules.unet, second.modules.unet)
    assert second.config["name"] == "SmartBrush from Stable Diffusion 1.5, trained"
    assert second.config["tokenizer"] == SmartBrush.load(first).config["tokenizer"]


def test_what_is_logged_and_remembered(world, tmp_path):
    assert train(tmp_path, "--from-sd15", world / "sd15", *data(world), "--half-frozen", "--ema", "0") == 0
    records = [json.loads(line) for line in (tmp_path / "smartbrush.jsonl").read_text().splitlines()]
    assert records[-1]["samples"] == 2 and {"loss", "inside", "grad_norm"} <= records[-1].keys()
    remembered = json.loads((tmp_path / "smartbrush.json").read_text())
    assert remembered["start"] == {"sd15": str(world / "sd15")}
    assert remembered["recipe"]["half_frozen"] and remembered["recipe"]["weights"] == {"mask": 0.01, "region": "mask"}
    assert torch.load(tmp_path / "smartbrush.pt", weights_only=True)["ema"] == {}


def test_a_validation_has_a_sheet_and_its_figures(world, tmp_path):
    validated = ["--validate-every", "2", "--validation", world / "segments"]
    assert train(tmp_path, "--from-sd15", world / "sd15", *data(world), *validated) == 0
    records = [json.loads(line) for line in (tmp_path / "smartbrush_validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2]
    assert all(0 < record["held out: dice"] < 1 and record["held out: inside"] > 0 for record in records)
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == [
        "smartbrush_0000000.png",
        "smartbrush_0000002.png",
    ]


def test_a_preview_shows_the_objects_and_trains_nothing(world, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["train", "--system", "smartbrush", "--preview", str(sheet), *data(world, "coco")]) == 0
    assert "3 objects" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.width == 4 + 4 * (256 + 4) and picture.height > 12 * 256
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


# --- a run -------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumed_equals_an_uninterrupted_one_bit_for_bit(world, tmp_path, monkeypatch):
    settings = replace(
        FULL, samples=12, batch=2, lr=1e-3, warmup_steps=2, precision="fp32", accumulate=2, checkpoint_steps=2
    )
    whole = trained(world, tmp_path / "whole", settings)
    own, steps = BrushFineTuneTask.loss, []

    def loss(task, step, indices):
        if len(steps) == 7:  # in the second pass of the fourth step
            raise KeyboardInterrupt
        steps.append(step)
        return own(task, step, indices)

    with monkeypatch.context() as patch:
        patch.setattr(BrushFineTuneTask, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            trained(world, tmp_path / "parts", settings)
    assert torch.load(tmp_path / "parts" / "smartbrush.pt", weights_only=True)["step"] == 2
    resumed = trained(world, tmp_path / "parts", settings)
    assert resumed["step"] == 6 and same(whole, resumed)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_segments_may_be_drawn_by_other_processes(world, tmp_path):
    own = trained(world, tmp_path / "own")
    assert same(own, trained(world, tmp_path / "workers", draw=Elsewhere, workers=2))


def test_a_validation_disturbs_nothing(world, tmp_path):
    settings = replace(FULL, samples=4, batch=2, lr=1e-3, precision="fp32")
    plain = trained(world, tmp_path / "plain", settings)
    held_out = [segments_of(world)(number) for number in (100, 101)]
    assert same(plain, trained(world, tmp_path / "judged", replace(settings, validate_every=1), held_out=held_out))


def test_what_was_trained_is_let_go_before_the_export(world, tmp_path, monkeypatch):
    loaded, alive, own = [], [], (BrushStart.load, smartbrush_finetune.export_brush)

    def load(begin):
        modules, config = own[0](begin)
        loaded.append(weakref.ref(modules.unet))
        return modules, config

    def export(*given):
        alive.append(loaded[0]() is not None)
        return own[1](*given)

    monkeypatch.setattr(BrushStart, "load", load)
    monkeypatch.setattr(smartbrush_finetune, "export_brush", export)
    trained(world, tmp_path)
    assert alive == [False]


def test_gradient_checkpointing_gives_the_same_gradients(world):
    found = {}
    for checkpointing in (False, True):
        modules, config = start(world).load()
        recipe = BrushRecipe(gradient_checkpointing=checkpointing)
        make_brush_trainable(modules, recipe, "cpu")
        assert modules.unet.is_gradient_checkpointing is checkpointing
        modules.unet.train()
        task = BrushFineTuneTask(modules, config, segments_of(world), recipe)
        task.loss(0, [0, 1])[0].backward()
        found[checkpointing] = {name: p.grad for name, p in modules.unet.named_parameters()}
        frozen = (*modules.text_encoder.parameters(), *modules.vae.parameters())
        assert not any(p.requires_grad or p.grad is not None for p in frozen)
    assert any(gradient.abs().sum() > 0 for gradient in found[False].values())
    for name, gradient in found[False].items():
        assert torch.allclose(gradient, found[True][name], rtol=1e-4, atol=1e-7), name


def test_only_the_text_encoder_is_halved(world):
    modules, _ = start(world).load()
    make_brush_trainable(modules, BrushRecipe(half_frozen=True), "cpu", torch.bfloat16)
    assert {part: next(module.parameters()).dtype for part, module in modules.items()} == {
        "unet": torch.float32,
        "text_encoder": torch.bfloat16,
        "vae": torch.float32,
    }


def test_what_is_learned_is_not_rounded_by_the_forward_pass(world):
    modules, config = start(world).load()
    task = BrushFineTuneTask(modules, config, segments_of(world), BrushRecipe())
    picture = segments_of(world)(0).picture
    exact = encode_pictures(modules.vae, [picture])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task._encode({0: 0})[0].latents, exact)
        assert not torch.equal(encode_pictures(modules.vae, [picture])[0], exact)


def test_its_settings_are_the_specifications(world):
    assert (FULL.lr, FULL.optimizer) == (1e-5, "adam")
    modules, config = start(world).load()
    task = BrushFineTuneTask(modules, config, segments_of(world), BrushRecipe())
    assert (task.shares, task.weights) == (Shares(whole=0.2, no_text=0.1), Weights(mask=0.01, region="mask"))
    assert task.curriculum is None and set(task.learned) == {"unet"} and not task.denoising._predicts_v


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--from-sd15", "{sd15}"], "--segments"),
        (["--segments", "{segments}"], "--from-inpainting"),
        (
            ["--from-sd15", "{sd15}", "--from-inpainting", "{inpainting}", "--segments", "{segments}"],
            "sd15, inpainting",
        ),
        (["--from-sd15", "{sd15}", "--segments", "{segments}", "--coco", "{instances}"], "one of --segments"),
        (["--from-sd15", "{sd15}", "--coco", "{instances}"], "--pictures"),
        (["--from-sd15", "{sd15}", "--segments", "{segments}", "--captions", "{captions}"], "--captions"),
        (["--from-sd15", "{sd15}", *COCO, "--captions", "{instances}"], "one phrase for each annotation"),
        (["--from-sd15", "{sd15}", "--segments", "{segments}", "--validate-every", "1"], "--validation"),
        (["--from-sd15", "{sd15}", "--segments", "{segments}", "--validation", "{segments}"], "--validate-every"),
        (["--from-sd15", "{sd15}", "--segments", "{segments}", "--size", "36"], "multiple of"),
        (["--from-sd15", "{sd15}", "--segments", "{segments}", "--stage", "smartbrush_64"], "--stage"),
        (["--from-sd15", "{sd15}", "--segments", "{segments}", "--lora", "4"], "SmartBrush does not know --lora"),
        (["--segments", "{segments}", "--videos", "clips"], "does not know --videos"),
        (["--segments", "{segments}", "--image-encoder", "clip"], "does not know --image-encoder"),
        (["--segments", "{segments}", "--random", "sd15"], "does not know --random"),
        (["--segments", "{segments}", "--prepare", "3"], "does not know --prepare"),
        (["--preview", "sheet.png"], "--segments"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(world, tmp_path, capsys, options, words):
    names = {name: world / name for name in ("sd15", "inpainting", "segments")}
    names |= {name: world / f"{name}.json" for name in ("instances", "captions")}
    assert train(tmp_path / "run", *(option.format(**names) for option in options)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "smartbrush.pt").exists()


@pytest.mark.parametrize("system", ["mimicbrush", "paint-by-example", "magic-fixup"])
@pytest.mark.parametrize("option", ["--coco", "--segments", "--pictures", "--captions"])
def test_the_other_systems_do_not_learn_from_such_data(tmp_path, capsys, system, option):
    assert main(["train", "--system", system, "--folder", str(tmp_path), option, "x"]) == 2
    message = capsys.readouterr().err
    assert f"does not know {option}." in message and "smartbrush" in message


def test_a_system_without_fine_tuning_refuses_its_options(tmp_path, capsys):
    assert main(["train", "--system", "paint-by-example", "--folder", str(tmp_path), "--model", "x"]) == 2
    assert "Paint by Example does not know --model" in capsys.readouterr().err


def test_a_base_is_what_it_was_given_as(world):
    for exchanged in (BrushStart(sd15=str(world / "inpainting")), BrushStart(inpainting=str(world / "sd15"))):
        with pytest.raises(ModelFileError, match="exchanged"):
            exchanged.load()
    with pytest.raises(ModelFileError, match="is MimicBrush; SmartBrush was expected"):
        BrushStart(model=str(embedded_model_path())).load()


def test_a_run_is_not_continued_with_another_beginning(world, tmp_path):
    trained(world, tmp_path)
    before = (tmp_path / "smartbrush.pt").read_bytes()
    with pytest.raises(ArgumentError, match="began with seed 0, not 1"):
        trained(world, tmp_path, seed=1)
    with pytest.raises(ArgumentError, match="began with recipe"):
        trained(world, tmp_path, recipe=BrushRecipe(half_frozen=True))
    assert (tmp_path / "smartbrush.pt").read_bytes() == before


def test_the_system_of_a_folder_need_not_be_said_again(world, tmp_path, capsys):
    assert train(tmp_path, "--from-sd15", world / "sd15", *data(world)) == 0
    assert main(["train", "--folder", str(tmp_path), "--lora", "2"]) == 2
    assert "SmartBrush does not know --lora" in capsys.readouterr().err
    assert main(["train", "--folder", str(tmp_path), "--from-sd15", str(world / "sd15"), *data(world), *TWO_STEPS]) == 0
