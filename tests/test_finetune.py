"""The large recipe: its loss against a hand computation, where it begins, what it trains, LoRA, and the engine."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from model_files import micro_config
from PIL import Image
from safetensors.torch import load_file, save_file

from mimicbrush_core.attention import ReferenceFeatures, ReferenceReading
from mimicbrush_core.checkpoints import save_modules
from mimicbrush_core.cli import main
from mimicbrush_core.errors import ArgumentError, MimicBrushError, ModelFileError, OutputError
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.images import save_png, to_model_range
from mimicbrush_core.lora import LoraLayer, load_lora, lora_key, read_lora, write_lora
from mimicbrush_core.modules import PART_NAMES, Modules, build_part, bundled_config, random_part
from mimicbrush_core.references import write_features
from mimicbrush_core.systems.mimicbrush import EditSettings, MimicBrush
from mimicbrush_core.training import finetune as recipe_module
from mimicbrush_core.training import trainer
from mimicbrush_core.training.encoding import PreparedSamples, SampleEncoder
from mimicbrush_core.training.finetune import (
    LORA,
    PAPER_PARTS,
    TRAINABLE,
    FineTuneTask,
    Recipe,
    export,
    finetune,
    make_trainable,
)
from mimicbrush_core.training.samples import TrainingSample
from mimicbrush_core.training.starts import StartingPoint, widened
from mimicbrush_core.training.trainer import TrainingSettings, train

SIDE = 16
TINY = TrainingSettings(
    samples=16, batch=4, lr=1e-3, optimizer="adam", precision="fp32", warmup_steps=2, cooldown=0.5, log_every=1
)
ALL_KEPT = {"drop_depth": 0.0, "drop_reference": 0.0}


def tiny_config():
    """The micro model with a depth projector that halves three times, as training and sampling need it."""
    return {**micro_config(), "depth_projector": {"out_channels": 4, "block_out_channels": [4, 4, 4, 4]}}


class Drawn:
    """Random pictures by their index: blocks of colour, half of each cut out."""

    def __init__(self, side=SIDE):
        self.side = side

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        small = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
        source, reference = small.repeat(self.side // 4, 1).repeat(self.side // 4, 2)
        mask = np.zeros((self.side, self.side), bool)
        top = int(rng.integers(0, self.side // 2))
        mask[top : top + self.side // 2, : self.side // 2 + 1] = True
        return TrainingSample(index, source, reference, mask, "drawn")


START: StartingPoint  # set by `start`


@pytest.fixture(scope="module", autouse=True)
def start(tmp_path_factory):
    """A tiny model whose every branch counts: of fresh weights attention is even and depth is zero."""
    global START
    config, generator = tiny_config(), torch.Generator().manual_seed(0)
    parts = {part: random_part(part, config, "cpu", torch.float32, generator, bias=0.1) for part in PART_NAMES}
    path = tmp_path_factory.mktemp("start") / "model.safetensors"
    save_modules(path, Modules(**parts), config, torch.float32)
    START = StartingPoint(model=str(path))


def task_of(recipe, seed=3, dataset=None):
    """(task, modules, config) on fresh weights, the same ones each time."""
    modules, config = START.load()
    torch.manual_seed(0)
    make_trainable(modules, recipe)
    return FineTuneTask(modules, config, dataset or Drawn(), recipe, seed), modules, config


def gradients(recipe, indices=(0, 1, 2, 3)):
    """(loss, {parameter: gradient}) of one batch."""
    task, *_ = task_of(recipe)
    with task.computing():
        loss, _ = task.loss(0, list(indices))
        loss.backward()
    named = {f"{part}.{k}": p for part, module in task.learned.items() for k, p in module.named_parameters()}
    return float(loss.detach()), {name: p.grad for name, p in named.items() if p.requires_grad}


def trained(folder, recipe=None, settings=TINY, **options):
    finetune(folder, START, Drawn(), recipe or Recipe(), settings, device="cpu", **options)
    return torch.load(folder / "finetune.pt", weights_only=True)


def same(one, two):
    """Whether two checkpoints hold the same weights and averages, bit for bit."""
    return all(
        one[kind].keys() == two[kind].keys() and all(torch.equal(one[kind][k], two[kind][k]) for k in one[kind])
        for kind in ("weights", "ema")
    )


def assert_close(one, two):
    """Weights up to the rounding of sums in another order."""
    for name, value in one.items():
        if "k_proj.bias" not in name:  # has no gradient but rounding, which Adam makes as large as any
            assert torch.allclose(value, two[name], atol=5e-5), name


def logged(folder, key="loss"):
    return [json.loads(line)[key] for line in (folder / "finetune.jsonl").read_text().splitlines()]


# --- the loss ----------------------------------------------------------------------------------------------------


def by_hand(modules, config, sample, draw, outside_weight=None):
    """One sample's loss, computed from the inference code and the formulas, and the error inside its hole."""
    model = MimicBrush(modules, config)
    mask = sample.mask.astype(np.float32)
    condition = model.encode_source(sample.source, mask, SIDE, keep_shape=float(draw.with_depth))
    clean = model._encode(to_model_range(sample.source), None)
    noise, timestep = torch.from_numpy(draw.noise)[None], torch.tensor([draw.timestep])
    noisy = DDIMScheduler(**config["scheduler"]).add_noise(clean, noise, timestep)
    beside = torch.cat([condition.mask, condition.hole_latents, condition.depth], dim=1)
    model_input = torch.cat([noisy, beside], dim=1)
    if draw.with_reference:
        reference = model.encode_reference(sample.reference, SIDE)
        banks = write_features(modules.reference_unet, reference.latents, timestep, reference.tokens)
        with ReferenceReading(modules.unet) as reading:
            reading.references = [ReferenceFeatures(banks)]
            predicted = modules.unet(model_input, timestep, encoder_hidden_states=reference.tokens).sample
    else:
        tokens = model.unconditional_tokens()
        predicted = modules.unet(model_input, timestep, encoder_hidden_states=tokens).sample
    error = (predicted - noise).square()
    if outside_weight is None:
        return error.mean()
    weight = outside_weight + condition.mask.expand_as(error)
    return (weight * error).sum() / weight.sum()


@torch.no_grad()
@pytest.mark.parametrize("outside_weight", [None, 0.2])
def test_the_loss_is_what_the_paper_says(outside_weight):
    recipe = Recipe(drop_reference=0.5, outside_weight=outside_weight, gradient_checkpointing=False)
    task, modules, config = task_of(recipe)
    indices = list(range(8))
    draws = [task._draw(index, (4, 8, 8)) for index in indices]
    assert len({(draw.with_depth, draw.with_reference) for draw in draws}) == 4  # all combinations are tried
    with task.computing():
        loss, figures = task.loss(0, indices)
    pairs = zip(indices, draws, strict=True)
    expected = [by_hand(modules, config, Drawn()[index], draw, outside_weight) for index, draw in pairs]
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert set(figures) == {"masked_none", "masked_with"}


def test_the_target_is_the_clean_picture_and_the_depth_is_of_it():
    task, modules, config = task_of(Recipe(**ALL_KEPT))
    batch, sample = task.batch([5]), Drawn()[5]
    model = MimicBrush(modules, config)
    clean = model._encode(to_model_range(sample.source), None)
    holed = sample.source.copy()
    holed[sample.mask] = 0
    assert torch.allclose(batch.clean, clean, atol=1e-6)
    assert torch.allclose(batch.hole, model._encode(to_model_range(holed), None), atol=1e-6)
    assert not torch.allclose(batch.clean, batch.hole, atol=1e-2)
    assert torch.allclose(batch.depths[0], model.estimate_depth(sample.source)[0], atol=1e-6)
    assert torch.allclose(batch.reference, model.encode_reference(sample.reference, SIDE).latents, atol=1e-6)


def test_the_channels_are_latents_mask_hole_depth(monkeypatch):
    task, modules, config = task_of(Recipe(**ALL_KEPT))
    seen = []
    monkeypatch.setattr(modules.unet, "forward", lambda x, *args, **kwargs: seen.append(x) or _Answer(x[:, :4]))
    batch, sample = task.batch([2]), Drawn()[2]
    with task.computing(), torch.no_grad():
        task.objective.predict(batch)
    condition = MimicBrush(modules, config).encode_source(sample.source, sample.mask.astype(np.float32), SIDE)
    kept = MimicBrush(modules, config).encode_source(sample.source, sample.mask.astype(np.float32), SIDE, keep_shape=1)
    assert seen[0].shape[1] == 13
    assert torch.equal(seen[0][:, 4:5], condition.mask)
    assert torch.allclose(seen[0][:, 5:9], condition.hole_latents, atol=1e-6)
    assert torch.allclose(seen[0][:, 9:], kept.depth, atol=1e-6)


class _Answer:
    def __init__(self, sample):
        self.sample = sample


def test_depth_is_dropped_for_half_and_the_reference_for_a_tenth():
    task, *_ = task_of(Recipe())
    draws = [task._draw(index, (1, 1, 1)) for index in range(4000)]
    assert np.mean([draw.with_depth for draw in draws]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([draw.with_reference for draw in draws]) == pytest.approx(0.9, abs=0.02)
    steps = np.array([draw.timestep for draw in draws])
    assert steps.min() < 5 and steps.max() > 994 and np.mean(steps) == pytest.approx(499.5, abs=20)


def test_a_dropped_reference_changes_nothing_and_a_kept_one_does():
    class Other(Drawn):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return replace(sample, reference=255 - sample.reference)

    for drop, same_loss in ((1.0, True), (0.0, False)):
        losses = []
        for dataset in (Drawn(), Other()):
            task, *_ = task_of(Recipe(drop_reference=drop), dataset=dataset)
            with task.computing():
                losses.append(float(task.loss(0, [0, 1])[0].detach()))
        assert (losses[0] == losses[1]) is same_loss


def test_a_loss_outside_its_context_is_refused():
    task, *_ = task_of(Recipe())
    with pytest.raises(RuntimeError, match="computing"):
        task.loss(0, [0])


# --- memory savers change nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Recipe(train=TRAINABLE, drop_reference=0.3), Recipe(lora_rank=2)])
def test_gradient_checkpointing_gives_the_same_gradients(recipe):
    loss, kept = gradients(replace(recipe, gradient_checkpointing=False))
    again, recomputed = gradients(replace(recipe, gradient_checkpointing=True))
    assert loss == pytest.approx(again, rel=1e-6) and kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        if gradient is not None:
            assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-7), name
    parts = {name.split(".")[0] for name, gradient in kept.items() if gradient is not None and gradient.any()}
    assert parts == set(recipe.parts)


def test_accumulated_passes_equal_a_larger_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")  # of someone's `accelerate config`
    recipe = Recipe(train=TRAINABLE, drop_reference=0.3)
    whole = trained(tmp_path / "whole", recipe)
    passes = trained(tmp_path / "passes", recipe, replace(TINY, accumulate=2))
    assert_close(whole["weights"], passes["weights"])
    assert logged(tmp_path / "whole") == pytest.approx(logged(tmp_path / "passes"), rel=1e-5)


def test_prepared_samples_give_the_same_loss_and_go_on_after_a_kill(tmp_path):
    task, modules, config = task_of(Recipe())
    calls = []

    class Counted(Drawn):
        def __getitem__(self, index):
            calls.append(index)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    encoder = SampleEncoder(modules, config)
    with pytest.raises(KeyboardInterrupt):
        PreparedSamples.write(tmp_path, Counted(), 4, encoder, {"seed": 0})
    prepared = PreparedSamples.write(tmp_path, Counted(), 4, encoder, {"seed": 0})
    assert calls == [0, 1, 2, 2, 3]
    with pytest.raises(ArgumentError, match="other settings"):
        PreparedSamples.write(tmp_path, Drawn(), 4, encoder, {"seed": 1})
    with task.computing():
        expected = float(task.loss(0, [0, 1, 2, 3])[0].detach())
    modules.vae = modules.image_encoder = modules.depth_network = None
    again = FineTuneTask(modules, config, prepared, Recipe(), seed=3)
    with again.computing():
        assert float(again.loss(0, [0, 1, 2, 3])[0].detach()) == pytest.approx(expected, rel=1e-6)
        # beyond the prepared ones they come again, with noise of their own
        assert torch.equal(again.batch([1]).clean, again.batch([5]).clean)
        assert not torch.equal(again.batch([1]).noise, again.batch([5]).noise)


def test_a_run_on_prepared_samples_needs_no_encoders(tmp_path):
    whole = trained(tmp_path / "encoded", settings=replace(TINY, samples=4))
    prepared = trained(tmp_path / "prepared", settings=replace(TINY, samples=4), prepare=4)
    assert_close(whole["weights"], prepared["weights"])
    with pytest.raises(ArgumentError, match="image encoder"):
        trained(tmp_path / "refused", Recipe(train=("image_encoder",)), prepare=4)
    with pytest.raises(ArgumentError, match="validate"):
        trained(tmp_path / "refused", settings=replace(TINY, validate_every=1), prepare=4)


# --- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [PAPER_PARTS, ("reference_unet", "image_encoder")])
def test_only_the_chosen_parts_change(tmp_path, parts):
    before, _ = START.load()
    trained(tmp_path, Recipe(train=parts), replace(TINY, samples=8))
    assert export(tmp_path, tmp_path / "model.safetensors") == 8
    after = MimicBrush.load(tmp_path / "model.safetensors").modules
    for part, module in after.items():
        old = getattr(before, part).state_dict()
        rounded = {k: v if part == "depth_network" else v.half().float() for k, v in old.items()}
        changed = {k for k, v in module.state_dict().items() if not torch.equal(v, rounded[k])}
        assert bool(changed) is (part in parts), part
    assert after.depth_network.dtype == torch.float32


def test_unknown_parts_and_settings_are_refused(tmp_path):
    for wrong in (
        Recipe(train=("vae",)),
        Recipe(train=()),
        Recipe(lora_rank=-1),
        Recipe(lora_rank=2, lora_alpha=0),
        Recipe(drop_depth=2),
    ):
        with pytest.raises(ArgumentError):
            trained(tmp_path, wrong)
    for wrong in (
        {"precision": "fp8"},
        {"batch": 3, "accumulate": 2},
        {"samples": 0},
        {"ema_decay": 1.0},
        {"optimizer": "magic"},
        {"precision": "fp16"},
    ):
        with pytest.raises(ArgumentError):
            trained(tmp_path / "x", settings=replace(TINY, **wrong))
    with pytest.raises(ArgumentError, match="not available"):
        finetune(tmp_path / "x", START, Drawn(), Recipe(), TINY, device="mps" if torch.cuda.is_available() else "cuda")


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    trained(tmp_path, settings=replace(TINY, samples=4))
    with pytest.raises(ArgumentError, match="recipe"):
        trained(tmp_path, Recipe(lora_rank=2))


def test_a_sample_that_does_not_fit_is_refused():
    task, *_ = task_of(Recipe(), dataset=Drawn(side=20))
    with task.computing(), pytest.raises(ArgumentError, match="multiple of 4"):
        SampleEncoder(task.modules, task.config).encode([replace(Drawn()[0], source=np.zeros((18, 18, 3), np.uint8))])


# --- where it begins -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A tiny SD-1.5 and a tiny inpainting pipeline in diffusers layout, CLIP and depth beside them."""
    folder, config = tmp_path_factory.mktemp("sd"), tiny_config()
    torch.manual_seed(7)
    for name, channels in (("sd15", 4), ("inpainting", 9)):
        unet = UNet2DConditionModel(**{**config["unet"], "in_channels": channels})
        (folder / name / "unet").mkdir(parents=True)
        save_file(unet.state_dict(), folder / name / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "inpainting" / "vae").mkdir()
    vae = build_part("vae", config).state_dict()
    save_file(vae, folder / "inpainting" / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "clip").mkdir()
    encoder = {
        key.removeprefix("vision_model."): v for key, v in build_part("image_encoder", config).state_dict().items()
    }
    encoder = {f"vision_model.{key}": value for key, value in encoder.items()}
    encoder["vision_model.post_layernorm.weight"] = torch.ones(8)  # the real file has what is never used
    save_file(encoder, folder / "clip" / "model.safetensors")
    save_file(build_part("depth_network", config).state_dict(), folder / "depth.safetensors")
    return folder


def from_stable_diffusion(folder, **changes):
    paths = {
        "sd15": str(folder / "sd15"),
        "inpainting": str(folder / "inpainting"),
        "image_encoder": str(folder / "clip"),
        "depth": str(folder / "depth.safetensors"),
    }
    return StartingPoint(config=tiny_config(), **{**paths, **changes})


@torch.no_grad()
def test_from_inpainting_the_first_answer_is_the_inpainting_models_whatever_the_depth(stable_diffusion):
    modules, config = from_stable_diffusion(stable_diffusion).load()
    inpainting = UNet2DConditionModel(**{**config["unet"], "in_channels": 9}).eval()
    weights = load_file(stable_diffusion / "inpainting" / "unet" / "diffusion_pytorch_model.safetensors")
    inpainting.load_state_dict(weights)
    torch.manual_seed(1)
    nine, tokens = torch.randn(2, 9, 8, 8), torch.randn(2, 5, 8)
    expected = inpainting(nine, 500, encoder_hidden_states=tokens).sample
    for depth in (torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8, 8) * 100):
        answer = modules.unet(torch.cat([nine, depth], 1), 500, encoder_hidden_states=tokens).sample
        assert torch.allclose(answer, expected, rtol=1e-5, atol=1e-6)
    assert modules.unet.conv_in.weight.shape[1] == 13 and not modules.unet.conv_in.weight[:, 9:].any()
    assert torch.equal(modules.unet.conv_in.weight[:, :9], weights["conv_in.weight"])
    assert torch.equal(modules.reference_unet.conv_in.weight, load_file(
        stable_diffusion / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"])  # fmt: skip


def test_the_new_depth_channels_learn_at_once(stable_diffusion):
    modules, config = from_stable_diffusion(stable_diffusion).load()
    recipe = Recipe(**ALL_KEPT)
    make_trainable(modules, recipe)
    task = FineTuneTask(modules, config, Drawn(), recipe)
    with task.computing():
        task.loss(0, [0, 1])[0].backward()
    assert modules.unet.conv_in.weight.grad[:, 9:].abs().max() > 0


def test_a_single_unet_file_is_a_start_as_well(stable_diffusion):
    files = {
        name: str(stable_diffusion / name / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("sd15", "inpainting")
    }
    modules, _ = from_stable_diffusion(stable_diffusion, **files, vae=str(stable_diffusion / "inpainting/vae")).load()
    whole, _ = from_stable_diffusion(stable_diffusion).load()
    for part, module in modules.items():
        assert all(torch.equal(v, getattr(whole, part).state_dict()[k]) for k, v in module.state_dict().items()), part


def test_starts_that_cannot_be_are_refused(stable_diffusion, tmp_path):
    with pytest.raises(ArgumentError, match="one of"):
        StartingPoint(model="a", random="small").load()
    with pytest.raises(ArgumentError, match=r"not given: .*image_encoder"):
        from_stable_diffusion(stable_diffusion, image_encoder=None).load()
    with pytest.raises(ArgumentError, match="Unknown size"):
        StartingPoint(random="huge").load()
    with pytest.raises(ModelFileError, match="exchanged"):
        sd15, inpainting = str(stable_diffusion / "inpainting"), str(stable_diffusion / "sd15")
        vae = str(stable_diffusion / "inpainting/vae")
        from_stable_diffusion(stable_diffusion, sd15=sd15, inpainting=inpainting, vae=vae).load()
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 9, 3, 3)}, tmp_path / "ldm.safetensors")
    with pytest.raises(ModelFileError, match="diffusers layout"):
        from_stable_diffusion(stable_diffusion, inpainting=str(tmp_path / "ldm.safetensors"), vae=vae).load()
    with pytest.raises(ModelFileError, match="CLIP"):
        from_stable_diffusion(stable_diffusion, image_encoder=str(stable_diffusion / "depth.safetensors")).load()


def test_a_mimicbrush_file_is_a_start(tmp_path):
    modules, config = START.load()
    save_modules(tmp_path / "model.safetensors", modules, config, torch.float32)
    loaded, _ = StartingPoint(model=str(tmp_path / "model.safetensors")).load()
    assert torch.equal(loaded.unet.conv_in.weight, modules.unet.conv_in.weight)


def test_widening_keeps_what_was_there():
    weight = torch.randn(3, 9, 3, 3)
    wide = widened(weight, 13)
    assert torch.equal(wide[:, :9], weight) and wide.shape == (3, 13, 3, 3) and not wide[:, 9:].any()


# --- LoRA --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A LoRA of the embedded model, trained for a few steps on drawn pictures."""
    folder = tmp_path_factory.mktemp("lora")
    settings = replace(LORA, samples=4, batch=2, lr=2e-2, warmup_steps=0, precision="fp32")
    finetune(folder, StartingPoint(), Drawn(128), Recipe(lora_rank=4, lora_alpha=8), settings, device="cpu")
    return folder / "lora.safetensors"


def picture(model):
    source, mask, reference = EXAMPLES[0].render(128)
    return model.edit(source, mask, reference, EditSettings(steps=1)).picture


def test_a_lora_changes_the_picture_and_strength_zero_restores_it(lora_file):
    model = MimicBrush.load()
    weights = {k: v.clone() for k, v in model.modules.unet.state_dict().items()}
    before = picture(model)
    lora = load_lora(model.modules, lora_file, 1.0)
    full = picture(model)
    lora.strength = 0.5
    half = picture(model)
    assert (full != before).any() and (half != before).any() and (half != full).any()
    lora.strength = 0.0
    assert np.array_equal(picture(model), before)
    with load_lora(model.modules, lora_file, 1.0):
        assert np.array_equal(picture(model), full)
    assert np.array_equal(picture(model), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.modules.unet.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules.unet.modules())
    for wrong in (float("nan"), 1e9):
        with pytest.raises(ArgumentError, match="strength"):
            load_lora(model.modules, lora_file, wrong)


@torch.no_grad()
def test_the_side_branch_is_the_weight_it_stands_for(lora_file):
    model, merged = MimicBrush.load(), MimicBrush.load()
    for key, layer in read_lora(lora_file).items():
        name = next(name for name, _ in merged.modules.unet.named_modules() if lora_key(name) == key)
        weight = merged.modules.unet.get_submodule(name).weight
        weight += 0.7 * (8 / 4) * (layer.up.float() @ layer.down.float())
    torch.manual_seed(0)
    given = torch.randn(1, 13, 32, 32), torch.tensor([500.0])
    tokens = torch.randn(1, 65, model.modules.unet.config.cross_attention_dim)
    load_lora(model.modules, lora_file, 0.7)
    one, two = (m.modules.unet(*given, encoder_hidden_states=tokens).sample for m in (model, merged))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-4)


def test_the_side_branch_gives_what_peft_trained(tmp_path):
    recipe = Recipe(lora_rank=2, lora_alpha=6)
    state = trained(tmp_path, recipe)
    _, trained_modules, _ = task_of(recipe)
    for name, parameter in trained_modules.unet.named_parameters():
        if f"unet.{name}" in state["ema"]:
            parameter.data.copy_(state["ema"][f"unet.{name}"].half().float())
    plain, _ = START.load()
    load_lora(plain, tmp_path / "lora.safetensors")
    given, tokens = (torch.randn(1, 13, 8, 8), torch.tensor([300.0])), torch.randn(1, 5, 8)
    with torch.no_grad():
        one, two = (m.unet(*given, encoder_hidden_states=tokens).sample for m in (trained_modules, plain))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def test_lora_keys_are_those_comfyui_maps(tmp_path):
    """ComfyUI maps `lora_unet_` + the diffusers name with underscores (comfy/lora.py, comfy/utils.py)."""
    with torch.device("meta"):
        unet = build_part("unet", bundled_config("mimicbrush_sd15"))
    recipe_module.add_lora(unet, rank=4, alpha=4)
    weights = {f"unet.{k}": torch.zeros(v.shape) for k, v in unet.named_parameters() if v.requires_grad}
    layers = recipe_module.lora_layers(weights, alpha=4)
    write_lora(tmp_path / "lora.safetensors", layers)
    places = [f"down_blocks_{b}_attentions_{a}" for b in range(3) for a in range(2)]
    places += [f"up_blocks_{b}_attentions_{a}" for b in range(1, 4) for a in range(3)] + ["mid_block_attentions_0"]
    expected = {
        f"lora_unet_{place}_transformer_blocks_0_{attention}_{layer}.{ending}"
        for place in places
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out_0")
        for ending in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    stored = load_file(tmp_path / "lora.safetensors")
    assert set(stored) == expected and len(expected) == 3 * 128
    key = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_k"
    assert stored[f"{key}.lora_down.weight"].shape == (4, 768) and stored[f"{key}.lora_up.weight"].shape == (1280, 4)
    assert stored[f"{key}.alpha"] == 4 and stored[f"{key}.alpha"].ndim == 0


def test_loras_of_convolutions_and_several_at_once(tmp_path):
    modules, _ = START.load()
    name = "mid_block.resnets.0.conv1"
    conv = modules.unet.get_submodule(name)
    torch.manual_seed(0)
    layer = LoraLayer(torch.randn(2, 8, 3, 3), torch.randn(8, 2, 1, 1), alpha=3.0)
    write_lora(tmp_path / "conv.safetensors", {name: layer}, dtype=torch.float32)
    x = torch.randn(1, 8, 4, 4)
    plain = conv(x)
    merged = conv.weight + 1.5 * torch.einsum("or,rikl->oikl", layer.up[:, :, 0, 0], layer.down)
    first = load_lora(modules, tmp_path / "conv.safetensors", 1.0)
    assert torch.allclose(conv(x), F.conv2d(x, merged, conv.bias, padding=1), atol=1e-5)
    second = load_lora(modules, tmp_path / "conv.safetensors", -1.0)
    assert torch.allclose(conv(x), plain, atol=1e-5)
    first.remove()
    second.remove()
    assert torch.equal(conv(x), plain)


def test_files_that_are_no_fitting_lora_are_refused(tmp_path, lora_file):
    modules, config = START.load()
    with pytest.raises(ModelFileError, match=r"another (system|size)"):
        load_lora(modules, lora_file)
    save_modules(tmp_path / "model.safetensors", modules, config, torch.float16)
    with pytest.raises(ModelFileError, match="not a LoRA"):
        load_lora(modules, tmp_path / "model.safetensors")
    embedded = MimicBrush.load().modules
    tensors = load_file(lora_file)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    for wrong, words in (
        ({**tensors, key: tensors[key][:-1].clone()}, "another size"),
        ({**tensors, key: tensors[key] * float("nan")}, "NaN"),
        ({k: v for k, v in tensors.items() if k != key}, "plain LoRA"),
        ({**tensors, key.replace("lora_up.weight", "dora_scale"): torch.ones(3)}, "plain LoRA"),
        ({"lora_te_text_model_encoder.lora_up.weight": torch.ones(2, 2)}, "text encoder"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ModelFileError, match=words):
            load_lora(embedded, tmp_path / "wrong.safetensors")


# --- the engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Recipe(drop_reference=0.3), Recipe(lora_rank=2)])
def test_an_interrupted_run_resumed_equals_an_uninterrupted_one_bit_for_bit(tmp_path, recipe, monkeypatch):
    settings = replace(TINY, accumulate=2, checkpoint_steps=2)
    whole = trained(tmp_path / "whole", recipe, settings)
    own, calls = FineTuneTask.loss, []

    def loss(task, step, indices):
        if len(calls) == 7:  # in the second pass of the fourth step, after the checkpoint of the second
            raise KeyboardInterrupt
        calls.append(step)
        return own(task, step, indices)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuneTask, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", recipe, settings)
    assert torch.load(tmp_path / "parts" / "finetune.pt", weights_only=True)["step"] == 2
    assert same(whole, trained(tmp_path / "parts", recipe, settings))
    for key in ("step", "loss"):  # no step is logged twice
        assert logged(tmp_path / "whole", key) == logged(tmp_path / "parts", key)
    assert logged(tmp_path / "whole", "step") == [1, 2, 3, 4]


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from mimicbrush_core.training.trainer import part_from_others
from test_finetune import TINY, Drawn, Recipe, StartingPoint, finetune
settings, start = replace(TINY, **{settings!r}), StartingPoint(model={start!r})
finetune(Path({folder!r}), start, Drawn(), Recipe(**{recipe!r}), settings, device="cpu")
state = PartialState()
Path({folder!r}, f"process_{{state.process_index}}_of_{{state.num_processes}}").touch()
part_from_others()
"""


def program(tmp_path, folder, settings, recipe=None):
    """A script that trains in `folder`, to be run in processes of its own."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    given = {"folder": str(folder), "settings": settings, "recipe": recipe or {}, "start": START.model}
    text = PROGRAM.format(paths=paths, **given)
    script = tmp_path / "program.py"
    script.write_text(text)
    return script


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path):
    settings = {"samples": 80, "checkpoint_steps": 1}
    script, folder = program(tmp_path, tmp_path / "killed", settings), tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)
    log, deadline = folder / "finetune.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = torch.load(folder / "finetune.pt", weights_only=True)["step"]
    assert 2 <= stopped < 20, process.stderr.read()
    resumed = trained(folder, settings=replace(TINY, **settings))
    assert same(resumed, trained(tmp_path / "whole", settings=replace(TINY, **settings)))


def test_two_processes_give_the_loss_of_one_with_the_doubled_batch(tmp_path):
    recipe = {"train": TRAINABLE, "drop_reference": 0.3}
    script = program(tmp_path, tmp_path / "two", {"accumulate": 2}, recipe)
    # not `accelerate launch --cpu`, which starts one process on one machine whatever number it is given
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "two").glob("process_*")} == {"process_0_of_2", "process_1_of_2"}
    one = trained(tmp_path / "one", Recipe(**recipe))
    two = torch.load(tmp_path / "two" / "finetune.pt", weights_only=True)
    assert len(logged(tmp_path / "one")) == 4
    assert logged(tmp_path / "one") == pytest.approx(logged(tmp_path / "two"), rel=1e-5)
    assert_close(one["weights"], two["weights"])


def test_the_average_is_the_formulas(tmp_path):
    states = [trained(tmp_path, settings=replace(TINY, samples=4 * n, cooldown=0.0)) for n in (1, 2, 3)]
    name = "unet.conv_in.weight"
    average = states[0]["weights"][name]  # the first update takes the weights as they are
    for updates, state in enumerate(states[1:], start=1):
        decay = min(TINY.ema_decay, (1 + updates) / (10 + updates))
        average = decay * average + (1 - decay) * state["weights"][name]
        assert torch.allclose(state["ema"][name], average, atol=1e-7)
    assert states[2]["ema_updates"] == 3
    assert not torch.equal(states[2]["ema"][name], states[2]["weights"][name])


def test_without_averaging_the_last_weights_are_left(tmp_path):
    state = trained(tmp_path, settings=replace(TINY, samples=8, ema_decay=0.0))
    assert state["ema"] == {} and export(tmp_path, tmp_path / "model.safetensors") == 8
    model = MimicBrush.load(tmp_path / "model.safetensors")
    assert torch.equal(model.modules.unet.conv_in.weight, state["weights"]["unet.conv_in.weight"].half().float())


def test_a_failed_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    before = trained(tmp_path, settings=replace(TINY, samples=4))

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.torch, "save", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            trained(tmp_path, settings=replace(TINY, samples=8))
    assert same(before, torch.load(tmp_path / "finetune.pt", weights_only=True))


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    trained(tmp_path, settings=replace(TINY, samples=4))
    path = tmp_path / "finetune.pt"
    state = torch.load(path, weights_only=True)
    state["weights"].pop("unet.conv_in.weight")
    torch.save(state, path)
    with pytest.raises(ArgumentError, match=r"unet\.conv_in\.weight"):
        trained(tmp_path, settings=replace(TINY, samples=8))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelFileError, match=r"finetune\.pt"):
        trained(tmp_path, settings=replace(TINY, samples=8))


def test_a_diverged_run_stops_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    before = trained(tmp_path, settings=replace(TINY, samples=4))
    own = FineTuneTask.loss
    monkeypatch.setattr(FineTuneTask, "loss", lambda *given: (own(*given)[0] * float("nan"), {}))
    with pytest.raises(MimicBrushError, match="diverged"):
        trained(tmp_path, settings=replace(TINY, samples=8))
    assert same(before, torch.load(tmp_path / "finetune.pt", weights_only=True))


def test_a_changed_batch_goes_on_with_the_next_sample(tmp_path, monkeypatch):
    trained(tmp_path, settings=replace(TINY, samples=8, batch=4))
    asked, own = [], FineTuneTask.loss

    def loss(task, step, indices):
        asked.extend(indices)
        return own(task, step, indices)

    monkeypatch.setattr(FineTuneTask, "loss", loss)
    assert trained(tmp_path, settings=replace(TINY, samples=12, batch=2))["samples"] == 12
    assert asked == [8, 9, 10, 11]


def test_the_gradient_is_clipped(tmp_path):
    settings = replace(TINY, samples=4, warmup_steps=0, cooldown=0.0)
    task, *_ = task_of(Recipe())
    seen = []
    own = trainer.Accelerator.clip_grad_norm_

    def clip(accelerator, parameters, norm):
        before = own(accelerator, parameters, norm)
        seen.append(
            (float(before), float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()))
        )
        return before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Accelerator, "clip_grad_norm_", clip)
        train(task, tmp_path, replace(settings, clip=0.01))
    assert seen[0][0] > 0.01 and seen[0][1] == pytest.approx(0.01, rel=1e-3)


def test_validation_judges_the_averages_and_disturbs_nothing(tmp_path):
    held_out = [Drawn()[10_000 + index] for index in range(2)]
    recipe = Recipe(lora_rank=2, validation_steps=1)
    plain = trained(tmp_path / "plain", recipe)
    validated = trained(
        tmp_path / "validated", recipe, replace(TINY, validate_every=3, tensorboard=True), held_out=held_out
    )
    assert same(plain, validated)
    records = [json.loads(s) for s in (tmp_path / "validated" / "finetune_validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 3, 4]
    for record in records:
        difference = record["held out: right"] - record["held out: none"]
        assert record["held out: right - none"] == pytest.approx(difference, abs=1e-5)
    sheets = sorted(path.name for path in (tmp_path / "validated" / "sheets").iterdir())
    assert sheets == [f"finetune_{step:07d}.png" for step in (0, 3, 4)]
    assert list((tmp_path / "validated" / "tensorboard").glob("events*"))


def test_what_is_judged_are_the_averaged_weights(tmp_path, monkeypatch):
    seen = []

    def validate(task):
        named = {f"{part}.{k}": v for part, module in task.learned.items() for k, v in module.named_parameters()}
        seen.append({name: value.detach().clone() for name, value in named.items()})

    monkeypatch.setattr(FineTuneTask, "validate", validate)
    settings = replace(TINY, samples=12, validate_every=3, cooldown=0.0)
    state = trained(tmp_path, settings=settings, held_out=[Drawn()[10_000]])
    assert all(torch.equal(value, state["ema"][name]) for name, value in seen[-1].items())
    assert any(not torch.equal(value, state["weights"][name]) for name, value in seen[-1].items())


def test_samples_may_be_drawn_by_other_processes(tmp_path):
    assert same(trained(tmp_path / "own"), trained(tmp_path / "workers", workers=2))


def test_half_precision_of_what_is_frozen(tmp_path):
    state = trained(tmp_path, Recipe(lora_rank=2, half_frozen=True), replace(TINY, precision="bf16"))
    assert all(value.dtype == torch.float32 for value in state["weights"].values())
    modules, _ = START.load()
    make_trainable(modules, Recipe(half_frozen=True), torch.bfloat16)
    dtypes = {part: next(module.parameters()).dtype for part, module in modules.items()}
    half = {part for part, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert half == {"reference_unet", "image_encoder"}


def test_the_commands_train_a_lora_and_edit_with_it(tmp_path, capsys):
    folder = tmp_path / "run"
    few = ["--samples", "2", "--batch", "2", "--precision", "fp32", "--lr", "0.05", "--device", "cpu"]
    assert main(["train", "--folder", str(folder), "--lora", "2", "--size", "32", *few]) == 0
    assert "lora.safetensors" in capsys.readouterr().out
    assert main(["train", "--folder", str(folder), "--export", str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "lora.safetensors").read_bytes()
    source, mask, reference = EXAMPLES[0].render(64)
    files = [str(tmp_path / f"{name}.png") for name in ("source", "mask", "reference")]
    for file, content in zip(files, (source, mask, reference), strict=True):
        save_png(file, content, {})
    written = {}
    for name, options in {"plain": [], "full": ["--lora-strength", "3"], "none": ["--lora-strength", "0"]}.items():
        lora = ["--lora", str(folder / "lora.safetensors"), *options] if options else []
        output = tmp_path / f"{name}.png"
        assert main(["edit", *files, "-o", str(output), "--steps", "1", "--device", "cpu", *lora]) == 0
        with Image.open(output) as result:
            written[name] = np.asarray(result)
            assert ("lora" in json.loads(result.text["mimicbrush"])) is bool(options)
    assert np.array_equal(written["plain"], written["none"]) and (written["plain"] != written["full"]).any()
    assert main(["edit", *files, "-o", str(tmp_path / "x.png"), "--lora", files[0], "--device", "cpu"]) == 4


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    folder = ["--folder", str(tmp_path / "run"), "--device", "cpu"]
    for options, code, words in (
        (["--lora", "2", "--model", "nowhere.safetensors"], 4, "nowhere.safetensors"),
        (["--lora", "2", "--precision", "fp16"], 2, "graphics card"),
        (["--lora", "-2"], 2, "rank"),
        (["--lora", "2", "--validate-every", "5"], 2, "--validation"),
        (["--lora", "2", "--validation", str(tmp_path)], 2, "--validate-every"),
        (["--parts", "vae"], 2, "vae"),
        (["--from-sd15", str(tmp_path)], 2, "inpainting"),
        (["--stills", str(tmp_path)], 2, "--lora"),
        (["--stage", "depth", "--accumulate", "5"], 2, "divide"),
    ):
        assert main(["train", *folder, *options]) == code
        assert words in capsys.readouterr().err


def test_the_pack_needs_none_of_the_training_packages():
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})

        from importlib.machinery import PathFinder

        own, hidden = PathFinder.find_spec, ("accelerate", "peft", "tensorboard", "av", "cv2")

        def find_spec(name, path=None, target=None):
            return None if name.split(".")[0] in hidden else own(name, path, target)

        PathFinder.find_spec = find_spec
        import mimicbrush_core.cli, mimicbrush_core.selfcheck, mimicbrush_core.lora, mimicbrush_core.examples
        import mimicbrush_core.evaluation.evaluate
        from mimicbrush_core.systems.mimicbrush import MimicBrush
        MimicBrush.load()
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
