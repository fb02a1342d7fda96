"""The recipe: masks, curriculum, what is learned from what, and a trainer that resumes exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from mimicbrush_core.cli import main
from mimicbrush_core.encoders import decode_latents, encode_latents
from mimicbrush_core.errors import ArgumentError
from mimicbrush_core.modules import build_modules, bundled_config
from mimicbrush_core.systems.magic_fixup import MagicFixup
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.systems.paint_by_example import PaintByExample
from mimicbrush_core.systems.smartbrush import SmartBrush
from mimicbrush_core.training import hole_masks, objective
from mimicbrush_core.training.curriculum import Curriculum
from mimicbrush_core.training.objective import Denoising, LossTerms
from mimicbrush_core.training.optimizer import MuonAdamW
from mimicbrush_core.training.recipe import RECIPES, export, run_stage
from mimicbrush_core.training.scenes import CLIP_LIKE, HELD_OUT_SEED, render_pair
from mimicbrush_core.training.tasks import DepthTask, ImitationTask
from mimicbrush_core.training.trainer import TrainingSettings, load_averaged, train

TINY = TrainingSettings(samples=8, batch=2, warmup_steps=2, precision="fp32")


@pytest.fixture
def parts():
    return render_pair(3).parts


@pytest.fixture(scope="module")
def modules_and_config():
    torch.manual_seed(0)
    config = bundled_config("mimicbrush_small")
    return build_modules(config), config


def imitation(modules_and_config, **options):
    return ImitationTask(*modules_and_config, seed=0, scenes=4, echo=2, **options)


# --- masks -------------------------------------------------------------------------------------------------


def test_the_grid_masks_matched_cells_with_three_quarters_and_others_with_half():
    matched = np.zeros((120, 120), bool)
    matched[:60] = True  # 120 divides by most cell counts, so rows of cells are cleanly matched or not
    rng = np.random.default_rng(0)
    masks = np.stack([hole_masks.grid_mask(rng, matched) for _ in range(800)])
    assert masks[:, :30].mean() == pytest.approx(0.75, abs=0.02)
    assert masks[:, 90:].mean() == pytest.approx(0.5, abs=0.02)


def test_masks_are_never_empty_and_of_every_kind(parts):
    shares = [hole_masks.draw_mask(np.random.default_rng(seed), parts).mean() for seed in range(100)]
    assert min(shares) > 0
    assert np.std(shares) > 0.1


def test_a_textured_scene_is_never_masked_whole():
    parts = np.ones((64, 64), np.uint8)
    parts[:32] = 2
    assert all(not hole_masks.draw_mask(np.random.default_rng(s), parts).all() for s in range(60))


def test_a_part_mask_covers_its_part(parts):
    index = int(hole_masks.maskable_parts(parts)[0])
    mask = hole_masks.part_mask(parts, index, grow=2)
    assert mask[parts == index].all()
    assert mask.sum() > (parts == index).sum()


# --- imitation ---------------------------------------------------------------------------------------------


def test_the_curriculum_goes_from_identity_to_free_pairs():
    curriculum = Curriculum(identity=10, full=20)
    assert curriculum.difficulty(9).pose == 0 and curriculum.difficulty(20) == CLIP_LIKE
    assert 0 < curriculum.difficulty(15).light < CLIP_LIKE.light


def test_timesteps_begin_at_the_top_and_half_of_them_stay_there():
    curriculum, rng = Curriculum(identity=10, full=20), np.random.default_rng(0)
    early = np.array([curriculum.draw_timestep(rng, 0, 1000) for _ in range(2000)])
    late = np.array([curriculum.draw_timestep(rng, 30, 1000) for _ in range(2000)])
    assert early.min() >= 899 and early.max() == 999
    assert late.min() < 50 and late.max() == 999
    assert 0.6 < (late >= 899).mean() < 0.7  # half of all, and 0.316 of the others


def test_identity_gives_the_source_as_its_own_reference(modules_and_config):
    task = imitation(modules_and_config, curriculum=Curriculum(identity=100, full=200))
    for sample in task._draw([0, 1, 2, 3]):
        assert torch.equal(sample.scene.latents[0], sample.scene.latents[1])


def test_the_target_is_the_clean_picture_not_the_holed_one(modules_and_config):
    task = imitation(modules_and_config)
    (sample,) = task._draw([0])
    expected = task._encode([np.moveaxis(sample.scene.pixels[sample.source].numpy(), 0, -1)])[0]
    assert torch.allclose(sample.scene.truths[sample.source], expected, atol=1e-4)


def test_the_wanted_output_is_v_of_the_clean_latents(modules_and_config):
    task = imitation(modules_and_config)
    samples = task._draw([0, 1])
    batch = replace(task._batch(samples, with_reference=True), timesteps=torch.tensor([999, 400]))
    clean = torch.stack([sample.scene.truths[sample.source] for sample in samples])
    noise = torch.stack([torch.from_numpy(sample.noise) for sample in samples])
    with torch.no_grad(), task.computing():
        _, wanted = task.objective.predict(batch)
    assert torch.allclose(wanted[0], -clean[0], atol=1e-3)  # zero terminal SNR: pure regression
    alpha = task.objective.denoising.alphas[400]
    assert torch.allclose(wanted[1], alpha.sqrt() * noise[1] - (1 - alpha).sqrt() * clean[1], atol=1e-5)


def test_the_loss_reaches_every_learned_network(modules_and_config):
    task = imitation(modules_and_config)
    for module in task.learned.values():
        module.requires_grad_(True)
    step = next(s for s in range(20) if np.random.default_rng((0, 4, s)).random() >= task.drop_reference)
    with task.computing():
        loss, figures = task.loss(step, [0, 1, 2, 3])
        loss.backward()
    assert set(figures) == {"masked_with", "matching"}
    for name, module in task.learned.items():
        gradients = [p.grad for p in module.parameters()]
        assert any(g is not None and g.abs().max() > 0 for g in gradients), name
        module.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in task.modules.vae.parameters())


def test_looking_elsewhere_counts_by_its_weight(modules_and_config):
    task = imitation(modules_and_config)
    batch = task._batch(task._draw([0, 1]), with_reference=True)
    losses = {}
    with torch.no_grad(), task.computing():
        for weight in (0.0, 0.5):
            task.objective.terms = replace(task.objective.terms, matching=weight)
            losses[weight], figures = task.objective.loss(batch)
        unknown, _ = task.objective.loss(replace(batch, points=None))
    assert figures["matching"] > 1  # of a model that has learned nothing
    assert losses[0.5] == pytest.approx(float(losses[0.0]) + 0.5 * figures["matching"], rel=1e-5)
    assert unknown == losses[0.0]


def test_small_errors_count_like_large_ones_by_the_logarithm(modules_and_config):
    task = imitation(modules_and_config, terms=LossTerms(outside=0.2, tolerance=0.05))
    batch = task._batch(task._draw([0, 1, 2]), with_reference=False)
    with torch.no_grad(), task.computing():
        loss, _ = task.objective.loss(batch)
        predicted, wanted = task.objective.predict(batch)
    weight = (batch.mask + 0.2).expand_as(wanted)
    errors = [float((w * (p - t) ** 2).sum() / w.sum()) for w, p, t in zip(weight, predicted, wanted, strict=True)]
    assert loss == pytest.approx(np.mean(np.log(np.array(errors) + 0.05)), rel=1e-4)


@pytest.mark.parametrize("config", ["mimicbrush_small", "mimicbrush_sd15"])
def test_the_estimate_is_the_picture_that_a_sampler_would_predict(config):
    """For v and for the noise, against diffusers' own."""
    settings = bundled_config(config)["scheduler"]
    denoising, scheduler = Denoising(settings, torch.device("cpu")), DDIMScheduler(**settings)
    scheduler.set_timesteps(len(denoising.alphas))
    clean, noise, predicted = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (20, 500, 900):
        timesteps = torch.full((2,), timestep)
        noisy = denoising.noised(clean, noise, timesteps)
        estimate = denoising.estimate(clean, predicted - denoising.target(clean, noise, timesteps), timesteps)
        expected = scheduler.step(predicted, timestep, noisy).pred_original_sample
        assert (estimate - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_picture_term_is_the_error_of_the_decoded_picture_in_the_hole(modules_and_config):
    task = imitation(modules_and_config)
    batch = task._batch(task._draw([0, 1, 2]), with_reference=False)
    losses = {}
    with torch.no_grad(), task.computing():
        for picture in (0.0, 0.5):
            task.objective.terms = replace(task.objective.terms, picture=picture)
            losses[picture], figures = task.objective.loss(batch)
        predicted, wanted = task.objective.predict(batch)
        latents = task.objective.denoising.estimate(batch.clean, predicted - wanted, batch.timesteps)
        error = (decode_latents(task.modules.vae, latents) - batch.picture) ** 2
    holes = batch.picture_mask.bool().expand_as(error)
    errors = np.array([float(e[hole].mean()) for e, hole in zip(error, holes, strict=True)])
    term = np.log(errors + task.objective.picture_tolerance).mean()
    assert losses[0.5] == pytest.approx(float(losses[0.0]) + 0.5 * term, rel=1e-4)
    assert figures["picture_psnr"] == pytest.approx(np.mean(10 * np.log10(4 / errors)), rel=1e-4)


def test_the_picture_to_be_compared_is_the_truth(modules_and_config):
    """Between objects, where the source is another picture, too."""
    for between in (0.0, 1.0):
        curriculum = Curriculum(identity=0, full=0, between_objects=between, textured_scenes=0)
        task = imitation(modules_and_config, curriculum=curriculum)
        samples = task._draw([0, 1])
        batch = task._batch(samples, with_reference=True)
        encoded = encode_latents(task.modules.vae, batch.picture)
        assert torch.allclose(encoded, batch.clean, atol=1e-4)
        shown = torch.stack([sample.scene.pixels[sample.source] for sample in samples])
        assert torch.equal(((batch.picture + 1) * 127.5).round(), shown.float()) == (between == 0)


def test_a_stage_has_scenes_and_masks_of_its_own(modules_and_config):
    later = Curriculum(first_scene=1000, masks=(0, 0, 1, 0, 0), between_objects=0, textured_scenes=0)
    first, other = (imitation(modules_and_config, curriculum=one)._draw([0, 1]) for one in (Curriculum(), later))
    assert not torch.equal(first[0].scene.pixels, other[0].scene.pixels)
    pair = render_pair(1000, 128, later.difficulty(0))
    assert np.array_equal(other[0].scene.pixels[0].permute(1, 2, 0), pair.source)
    for sample in other:  # grids: straight edges only, in as few rows of pixels as there are rows of cells
        assert len(np.unique(sample.mask, axis=0)) <= 10


def test_a_dropped_reference_is_not_read(modules_and_config, monkeypatch):
    task = imitation(modules_and_config)
    monkeypatch.setattr(task, "drop_reference", 1.0)
    monkeypatch.setattr(objective, "write_features", None)  # calling it would fail
    with task.computing():
        _, figures = task.loss(0, [0, 1])
    assert set(figures) == {"masked_none"}


def test_samples_depend_on_their_global_index_only(modules_and_config):
    one = imitation(modules_and_config)._draw([2, 3])
    two = imitation(modules_and_config)._draw([3])
    assert np.array_equal(one[1].noise, two[0].noise) and np.array_equal(one[1].mask, two[0].mask)
    assert torch.equal(one[1].scene.pixels, two[0].scene.pixels)


def test_scenes_are_used_again_with_new_masks_and_then_replaced(modules_and_config):
    task = imitation(modules_and_config)  # 4 scenes, each used twice
    first, again, later = (task._draw([index])[0] for index in (0, 4, 8))
    assert first.scene is again.scene and not np.array_equal(first.noise, again.noise)
    assert not torch.equal(first.scene.pixels, later.scene.pixels)
    assert max(task.scenes.number(index) for index in range(10_000_000, 10_000_100)) < HELD_OUT_SEED


# --- the trainer -------------------------------------------------------------------------------------------


def depth_task():
    torch.manual_seed(1)
    return DepthTask(build_modules(bundled_config("mimicbrush_small")), seed=0, size=64)


def weights(task):
    return {k: v.clone() for module in task.learned.values() for k, v in module.state_dict().items()}


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = depth_task()
    train(whole, tmp_path / "whole", TINY)
    # The same schedule, stopped after two of four steps.
    stopped, calls = depth_task(), []
    own_loss = stopped.loss

    def loss(step, indices):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(step)
        return own_loss(step, indices)

    stopped.loss = loss
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "parts", replace(TINY, checkpoint_minutes=0.0))
    resumed = depth_task()
    train(resumed, tmp_path / "parts", TINY)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert not list((tmp_path / "parts").glob("*.unfinished"))


def test_every_stage_resumes_the_checkpoints_of_the_first_engine(tmp_path):
    """Their format: step, samples, weights, ema, ema_updates, and both optimizers' states; no more."""
    task = depth_task()
    train(task, tmp_path, TINY)
    path = tmp_path / "depth.pt"
    state = torch.load(path, weights_only=True)
    assert set(state) == {"step", "samples", "weights", "ema", "ema_updates", "optimizer"}
    assert set(state["optimizer"]) == {"muon", "adam"}
    assert (
        set(state["weights"]) == set(state["ema"]) == {f"depth_network.{k}" for k, _ in task.network.named_parameters()}
    )
    resumed = depth_task()
    train(resumed, tmp_path, replace(TINY, samples=10))
    assert torch.load(path, weights_only=True)["step"] == 5


def test_a_validation_of_the_embedded_recipe_answers_its_held_out_track(modules_and_config, monkeypatch):
    task = imitation(modules_and_config)
    monkeypatch.setattr(task, "validation_cases", 1)
    found = task.validate()
    for name in ("parts", "objects", "between objects", "textured scenes"):
        figures = found.figures
        assert figures[f"{name}: right - none"] == pytest.approx(figures[f"{name}: right"] - figures[f"{name}: none"])
    assert found.sheet.width > 6 * 128


def test_the_averaged_weights_are_what_a_run_leaves_and_loads(tmp_path):
    task = depth_task()
    before = weights(task)
    train(task, tmp_path, TINY)
    fresh = depth_task()
    assert load_averaged(tmp_path / "depth.pt", fresh.learned) == 8
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(task).items())
    assert any(not torch.equal(value, before[name]) for name, value in weights(task).items())


def test_muon_and_adam_follow_the_rates_of_their_groups_and_leave_frozen_weights_alone():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 2, 1))
    module[2].requires_grad_(False)
    optimizer = MuonAdamW([module], lr=0.1, adam_lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    for rates, changed in (
        ((0.0, 0.0), set()),
        ((0.1, 0.0), {"0.weight"}),
        ((0.0, 0.1), {"0.bias", "1.weight", "1.bias"}),
    ):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        before = {name: value.clone() for name, value in module.state_dict().items()}
        module(torch.randn(1, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])} == changed


@pytest.mark.parametrize("kind", [MimicBrush, PaintByExample, MagicFixup, SmartBrush], ids=lambda kind: kind.system)
def test_stages_come_in_order_and_export_a_model(tmp_path, kind):
    *earlier, last = RECIPES[kind.system]
    with pytest.raises(ArgumentError, match=earlier[0] if kind is MimicBrush else earlier[-1]):
        run_stage(last, tmp_path, system=kind.system)
    with pytest.raises(ArgumentError, match="Unknown stage"):
        run_stage("cooking", tmp_path, system=kind.system)
    for stage in RECIPES[kind.system]:
        run_stage(stage, tmp_path, system=kind.system, samples=2, batch=2, precision="fp32")
    assert export(tmp_path, tmp_path / "model.safetensors", kind.system) == 2
    model = kind.load(tmp_path / "model.safetensors")
    assert model.modules.vae.config.scaling_factor == model.config["vae"]["scaling_factor"]


def test_the_relatives_begin_with_the_embedded_autoencoder(tmp_path):
    run_stage("fixup_64", tmp_path, system=MagicFixup.system, samples=2, batch=2, precision="fp32")
    run_stage("fixup_128", tmp_path, system=MagicFixup.system, samples=2, batch=2, precision="fp32")
    export(tmp_path, tmp_path / "model.safetensors", MagicFixup.system)
    ours, theirs = MagicFixup.load(tmp_path / "model.safetensors"), MimicBrush.load()
    assert ours.modules.vae.config.scaling_factor == theirs.modules.vae.config.scaling_factor
    for name, weight in theirs.modules.vae.state_dict().items():
        assert torch.equal(ours.modules.vae.state_dict()[name], weight)


def test_one_command_trains_every_stage_and_leaves_a_model(tmp_path, capsys):
    command = ["train", "--folder", str(tmp_path), "--batch", "4", "--device", "cpu", "--precision", "fp32"]
    assert main([*command, "--samples", "4"]) == 0
    first = MimicBrush.load(tmp_path / "model.safetensors")
    assert first.config["name"] == MimicBrush.load().config["name"]
    assert main([*command, "--samples", "8"]) == 0  # goes on, and renews the model
    again = MimicBrush.load(tmp_path / "model.safetensors")
    assert not torch.equal(again.modules.unet.conv_in.weight, first.modules.unet.conv_in.weight)
    assert capsys.readouterr().out.count("model.safetensors") == 2
