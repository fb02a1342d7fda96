"""Paint by Example and Magic Fixup, small: what they are trained on is what they see at inference; and every system's
held-out evaluation."""

import json

import numpy as np
import pytest
import torch

from mimicbrush_core.evaluation import fixups
from mimicbrush_core.evaluation.evaluate import evaluate_exemplars
from mimicbrush_core.evaluation.exemplars import exemplar_cases, object_crop
from mimicbrush_core.evaluation.fixups import FixupResults, collage, evaluate_fixups, fixup_cases, fixup_table
from mimicbrush_core.evaluation.reports import report_on, sets_of
from mimicbrush_core.masks import bounding_box, grown
from mimicbrush_core.modules import build_modules, bundled_config, small_name
from mimicbrush_core.systems.magic_fixup import MagicFixup
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.systems.paint_by_example import PaintByExample
from mimicbrush_core.systems.smartbrush import SmartBrush
from mimicbrush_core.training.exemplar_task import ExemplarTask, LookTask
from mimicbrush_core.training.fixup_task import FixupTask
from mimicbrush_core.training.hole_masks import loose_mask
from mimicbrush_core.training.scenes import HELD_OUT_SEED, render_move, render_pair

SIZE = 64
INDICES = [0, 1, 2]


def built(name):
    torch.manual_seed(0)
    config = bundled_config(name)
    return build_modules(config), config


@pytest.fixture(scope="module")
def exemplar():
    return ExemplarTask(*built("paint_by_example_small"), seed=3, size=SIZE, held=4, echo=2)


@pytest.fixture(scope="module")
def fixup():
    return FixupTask(*built("magic_fixup_small"), seed=3, size=SIZE, held=4, echo=2)


def drawn(task, indices=INDICES):
    return [task._draw(*one) for one in zip(task.scenes.of(indices), indices, strict=True)]


# --- masks around an object --------------------------------------------------------------------------------


def test_loose_masks_leave_room_around_the_object_and_never_reach_far_from_it():
    boxes = bulging = 0
    for seed in range(60):
        thing = render_pair(seed, SIZE).parts > 0
        mask = loose_mask(np.random.default_rng(seed), thing)
        assert mask.dtype == bool and mask.shape == thing.shape
        assert (mask & thing).sum() > 0.85 * thing.sum()
        box = bounding_box(mask)
        if mask.sum() == box.width * box.height:
            boxes += 1
            assert mask[bounding_box(thing).slices].all()
        elif (mask & ~grown(thing, 4)).any():
            bulging += 1
    assert 10 <= boxes <= 30 and 10 <= bulging <= 30


def test_a_loose_box_takes_at_most_two_fifths_of_the_room():
    thing = np.zeros((100, 100), bool)
    thing[40:60, 50:70] = True
    reached = np.zeros_like(thing)
    for seed in range(200):
        reached |= loose_mask(np.random.default_rng(seed), thing)
    box = bounding_box(reached)
    assert (box.y, box.x) == (24, 30) and (box.y + box.height, box.x + box.width) == (76, 82)


def test_an_exemplar_is_the_objects_box():
    picture = np.arange(10 * 10 * 3, dtype=np.uint8).reshape(10, 10, 3)
    thing = np.zeros((10, 10), bool)
    thing[3:6, 0:4] = True
    assert np.array_equal(object_crop(picture, thing, 1), picture[2:7, 0:5])


# --- Paint by Example --------------------------------------------------------------------------------------


def test_what_rides_beside_the_latents_is_what_the_system_prepares(exemplar):
    model = PaintByExample(exemplar.modules, exemplar.config)
    for sample in drawn(exemplar):
        hole, keep = exemplar._beside([sample])
        picture = ((sample.picture.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        prepared = model.encode_source(picture, 1 - sample.keep[0].numpy())
        assert torch.equal(keep, prepared.keep)
        assert torch.allclose(hole, prepared.hole_latents, atol=1e-5)


def test_the_model_never_sees_what_it_is_to_paint(exemplar):
    [sample] = drawn(exemplar, [5])
    hole, _ = exemplar._beside([sample])
    sample.picture[:, sample.keep[0] == 0] = 0.7
    assert torch.equal(exemplar._beside([sample])[0], hole)


def test_a_dropped_exemplar_teaches_the_unconditional_token_only(exemplar):
    encoder = exemplar.modules.exemplar_encoder
    for share, learns in ((0.0, encoder.proj_out.weight), (1.0, encoder.uncond_vector)):
        exemplar.drop_exemplar = share
        loss, figures = exemplar.loss(0, INDICES)
        found = torch.autograd.grad(loss, [encoder.proj_out.weight, encoder.uncond_vector], allow_unused=True)
        assert [gradient is not None for gradient in found] == [
            learns is encoder.proj_out.weight,
            learns is encoder.uncond_vector,
        ]
        assert list(figures) == ["masked_none" if share else "masked_with"]
    del exemplar.drop_exemplar


def test_samples_depend_on_their_index_only(exemplar):
    drawn(exemplar, [2])  # of the same scene as 6, asked for at another time
    again = ExemplarTask(exemplar.modules, exemplar.config, seed=3, size=SIZE, held=4, echo=2)
    for one, other in zip(drawn(exemplar, [6, 1]), drawn(again, [6, 1]), strict=True):
        for field in ("picture", "keep", "clean", "exemplar", "noise"):
            assert torch.equal(getattr(one, field), getattr(other, field))
    other_seed = ExemplarTask(exemplar.modules, exemplar.config, seed=4, size=SIZE, held=4, echo=2)
    assert not torch.equal(drawn(other_seed, [6])[0].noise, drawn(exemplar, [6])[0].noise)


def test_the_look_of_an_exemplar_is_learned():
    modules, config = built("paint_by_example_small")
    task = LookTask(modules, config, seed=0, held=4, echo=64)
    optimizer = torch.optim.Adam([p for module in task.learned.values() for p in module.parameters()], 3e-3)
    losses = []
    for step in range(30):
        loss, _ = task.loss(step, [4 * step + n for n in range(4)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


def test_held_out_exemplars_are_of_the_scene_and_the_wrong_one_is_the_next_cases():
    first, second, third = exemplar_cases(3, SIZE)
    assert first.wrong_reference is second.reference and second.wrong_reference is third.reference
    assert np.array_equal(first.truth, first.source) and first.scene_seed >= HELD_OUT_SEED
    assert first.reference.shape != (SIZE, SIZE, 3)  # a crop


def test_an_evaluation_asks_for_the_right_a_wrong_and_no_exemplar(exemplar):
    model = PaintByExample(exemplar.modules, exemplar.config)
    results = evaluate_exemplars(model, 3, steps=1, batch=2)
    at_once = evaluate_exemplars(model, 3, steps=1, batch=3)
    for kind in ("right", "wrong", "none", "autoencoder"):
        assert np.allclose(results.values("objects", kind), at_once.values("objects", kind), atol=0.02)
    assert results.values("objects", "autoencoder").min() > 0


# --- Magic Fixup -------------------------------------------------------------------------------------------


def test_the_collage_puts_the_object_where_it_is_in_the_true_frame():
    for seed in range(12):
        scene = render_move(seed, 128)
        coarse = collage(scene, 0)
        inside = ~grown(~scene.after, 4)  # well inside the object, where only the light differs
        if not inside.any():
            continue
        assert (coarse[inside][:, 3] == 255).mean() > 0.99
        error = np.abs(coarse[inside][:, :3].astype(int) - scene.target[inside]).mean()
        elsewhere = np.abs(scene.original[inside].astype(int) - scene.target[inside]).mean()
        assert error < 0.6 * elsewhere
        left = scene.before & ~grown(scene.after, 3)
        assert (coarse[left][:, 3] == 0).all()


def test_light_and_shadow_stay_behind_when_pixels_are_moved():
    darker = 0
    for seed in range(12):
        scene = render_move(seed, 128)
        ground = ~grown(scene.before | scene.after, 2)
        assert not np.array_equal(scene.original[ground], scene.target[ground])  # the shadow has moved
        darker += (scene.target[ground].astype(int) < scene.original[ground] - 12).any()
    assert darker >= 10


def test_a_pair_is_encoded_as_the_system_encodes_an_edit(fixup):
    model = MagicFixup(fixup.modules, fixup.config)
    [scene] = fixup._render({7: 0})
    drawn_scene = render_move(7, SIZE)
    rough = int(np.random.default_rng((fixup.seed, 5, 7)).integers(3))
    condition = model.encode(drawn_scene.original, collage(drawn_scene, rough))
    assert torch.equal(scene.known, condition.known[0])
    assert torch.allclose(scene.edit, condition.edit_latents[0], atol=1e-5)
    assert torch.allclose(scene.original, condition.original_latents[0], atol=1e-5)


def test_both_networks_learn_from_the_fixup_loss_and_hooks_are_gone_afterwards(fixup):
    with fixup.computing():
        loss, figures = fixup.loss(0, INDICES)
        loss.backward()
    assert set(figures) == {"changed"}
    for name, module in fixup.learned.items():
        assert all(p.grad is not None for p in module.parameters()), name
        module.zero_grad()
    assert not any(module._forward_pre_hooks for module in fixup.modules.unet.modules())


def test_the_original_is_noised_with_noise_of_its_own(fixup):
    timesteps, noise, reference_noise = fixup._draws([4, 9], (4, 16, 16))
    assert noise.shape == reference_noise.shape == (2, 4, 16, 16)
    assert not torch.equal(noise, reference_noise) and timesteps.dtype == torch.int64
    assert torch.equal(fixup._draws([9], (4, 16, 16))[1][0], noise[1])


def test_held_out_fixups_come_from_seeds_of_their_own_and_judge_what_changed():
    for case in fixup_cases(3, SIZE):
        scene = render_move(fixups.FIRST_SEED + case.index, SIZE)
        assert np.array_equal(case.truth, scene.target)
        assert case.changed[scene.before | scene.after].all()
        far = ~grown(case.changed, 3)
        assert np.abs(case.truth[far].astype(int) - case.original[far]).max(initial=0) <= 12
    assert fixups.FIRST_SEED > HELD_OUT_SEED


def test_a_fixup_evaluation_compares_with_the_collage(fixup):
    model = MagicFixup(fixup.modules, fixup.config)
    results = evaluate_fixups(model, 3, steps=1, batch=2)
    assert [outcome.case.index for outcome in results.outcomes] == [0, 1, 2]
    at_once = evaluate_fixups(model, 3, steps=1, batch=3)
    assert np.allclose(results.values("result"), at_once.values("result"), atol=0.02)
    assert results.values("collage").mean() > results.values("result").mean()  # random weights paint nothing
    table = fixup_table(results)
    assert f"{results.values('collage').mean():.2f}" in table and "0%" in table


@pytest.mark.parametrize("kind", (MimicBrush, PaintByExample, MagicFixup, SmartBrush), ids=lambda kind: kind.system)
def test_every_system_is_reported_on_in_one_way(kind):
    seen = []
    report = report_on(kind(*built(small_name(kind.system))), 2, steps=1, on_case=seen.append)
    assert len(seen) == 2 * len(sets_of(kind.system))
    assert report.table.count("\n| ") >= 2 and "128 x 128" in report.table
    assert json.loads(report.figures, parse_constant=lambda name: pytest.fail(name))["cases"]
    assert report.sheet.mode == "RGB" and report.sheet.height > 2 * 128


def test_the_table_counts_the_cases_in_which_the_answer_is_closer():
    results = FixupResults("a model", SIZE, 1, 1.0, frozenset())
    for gain in (1.0, 2.0, -1.0, 2.0):
        psnr = {"result": 20 + gain, "collage": 20.0, "autoencoder": 30.0}
        results.outcomes.append(fixups.FixupOutcome(None, {}, psnr, {kind: 0.5 for kind in psnr}))
    assert "+1.00 [" in fixup_table(results) and "75%" in fixup_table(results)
