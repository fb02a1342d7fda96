"""The evaluation: its numbers against hand-computed ones, the fixed cases, a tiny run, the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mimicbrush_core.errors import ArgumentError
from mimicbrush_core.evaluation import report, track
from mimicbrush_core.evaluation.evaluate import (
    KINDS,
    PICTURED,
    Outcome,
    Results,
    Score,
    answer,
    drawn_by_lot,
    evaluate,
    score,
)
from mimicbrush_core.evaluation.metrics import PSNR_CAP, bootstrap_interval, masked_psnr, ssim
from mimicbrush_core.evaluation.report import COLUMNS, TILE, card_table, sheet, summary, to_json
from mimicbrush_core.evaluation.track import CASES, GROW, LARGEST_REGION, SETS, held_out_cases, scene_seed
from mimicbrush_core.modules import build_modules, bundled_config
from mimicbrush_core.references import ReferenceUse
from mimicbrush_core.sampling import initial_noise, make_scheduler
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.training.hole_masks import grown
from mimicbrush_core.training.scenes import (
    CLIP_LIKE,
    HELD_OUT_SEED,
    render_between_objects,
    render_pair,
    render_textured_scene,
)

SIZE, STEPS, GUIDANCE = 64, 2, 2.0


@pytest.fixture(scope="module")
def model() -> MimicBrush:
    """The embedded model's topology with random weights, at 64 pixels."""
    torch.manual_seed(0)
    config = bundled_config("mimicbrush_small")
    config["defaults"] = {**config["defaults"], "size": SIZE}
    return MimicBrush(build_modules(config), config)


@pytest.fixture(scope="module")
def results(model) -> Results:
    return evaluate(model, n=2, steps=STEPS, guidance=GUIDANCE)


def noise_picture(seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


# --- metrics -----------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    truth = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[:2] = True
    result = truth.copy()
    result[:2] = 110  # an error of 10 everywhere inside
    result[2:] = 0  # outside does not count
    assert masked_psnr(result, truth, mask) == pytest.approx(20 * math.log10(255 / 10))
    result[:1] = 100  # on half of the masked pixels
    assert masked_psnr(result, truth, mask) == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(2))


def test_psnr_sees_negative_differences_and_is_capped():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    everywhere = np.ones((8, 8), bool)
    assert masked_psnr(black, white, everywhere) == masked_psnr(white, black, everywhere) == 0
    assert masked_psnr(white, white, everywhere) == PSNR_CAP


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)


def test_ssim_of_one_window_computed_by_hand():
    a, b = noise_picture(1), noise_picture(2)
    mask = np.zeros((32, 32), bool)
    mask[14, 17] = True
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    expected = []
    for channel in range(3):
        x, y = (picture[9:20, 12:23, channel].astype(float) for picture in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        both = (weights * (x - mx) * (y - my)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        expected.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b, mask) == pytest.approx(np.mean(expected), abs=1e-9)


def test_ssim_is_one_for_equals_and_local():
    a = noise_picture(3)
    changed = a.copy()
    changed[:8, :8] = noise_picture(4)[:8, :8]
    far, near = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    far[13:], near[:8, :8] = True, True
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, changed, far) == pytest.approx(1)  # the nearest change is beyond the window
    assert ssim(a, changed, near) < 0.5
    assert ssim(a, changed) == pytest.approx(ssim(changed, a))


@pytest.mark.parametrize(
    "change",
    [
        {"result": noise_picture(0, 16)},
        {"result": noise_picture(0).astype(np.float32)},
        {"mask": np.zeros((32, 32), bool)},
        {"mask": np.ones((32, 32), np.float32)},
    ],
)
def test_metrics_refuse_what_they_cannot_compare(change):
    arguments = {"result": noise_picture(0), "truth": noise_picture(1), "mask": np.ones((32, 32), bool)}
    for metric in (masked_psnr, ssim):
        with pytest.raises(ArgumentError):
            metric(**arguments | change)


def test_bootstrap_interval_covers_a_known_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(1.5, 2, 100), seed, draws=1000)
        covered += low <= 1.5 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_interval_has_the_known_width_and_is_reproducible():
    differences = np.random.default_rng(1).normal(0, 3, 200)
    low, high = bootstrap_interval(differences, 5)
    standard_error = differences.std() / math.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    assert (low, high) == bootstrap_interval(differences, 5) != bootstrap_interval(differences, 6)
    narrow_low, narrow_high = bootstrap_interval(differences, 5, share=0.5)
    assert low < narrow_low < differences.mean() < narrow_high < high
    assert bootstrap_interval(np.full(7, 2.0)) == (2.0, 2.0)
    with pytest.raises(ArgumentError):
        bootstrap_interval(np.zeros(0))


# --- the track ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_name", SETS)
def test_cases_are_reproducible_and_well_formed(set_name):
    first, again = list(held_out_cases(set_name, 6, SIZE)), list(held_out_cases(set_name, 4, SIZE))
    for a, b in zip(first, again, strict=False):
        for name in ("source", "mask", "reference", "wrong_reference", "truth"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for index, case in enumerate(first):
        assert (case.set_name, case.index, case.scene_seed) == (set_name, index, scene_seed(set_name, index))
        for picture in (case.source, case.reference, case.wrong_reference, case.truth):
            assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
        assert case.mask.shape == (SIZE, SIZE) and case.mask.dtype == bool
        np.testing.assert_array_equal(case.truth[~case.mask], case.source[~case.mask])
        assert np.array_equal(case.truth, case.source) == (set_name != "between objects")
        assert not np.array_equal(case.reference, case.wrong_reference)
    for case, following in pairwise(first):
        assert case.wrong_reference is following.reference


@pytest.mark.parametrize("set_name", SETS)
def test_masks_are_neither_empty_nor_everything(set_name):
    shares = [case.mask.mean() for case in held_out_cases(set_name, 60, SIZE)]
    assert min(shares) > 0.008 and max(shares) < 0.9
    if set_name == "textured scenes":
        assert max(shares) <= LARGEST_REGION


def test_masks_cover_what_they_are_named_after():
    for case in held_out_cases("parts", 5):
        parts = render_pair(case.scene_seed, difficulty=CLIP_LIKE).parts
        hidden = [i for i in range(1, parts.max() + 1) if np.array_equal(grown(parts == i, GROW), case.mask)]
        assert len(hidden) == 1
    for case in held_out_cases("objects", 5):
        np.testing.assert_array_equal(
            case.mask, grown(render_pair(case.scene_seed, difficulty=CLIP_LIKE).parts > 0, GROW)
        )
    for case in held_out_cases("between objects", 5):
        pair, part = render_between_objects(case.scene_seed, difficulty=CLIP_LIKE)
        np.testing.assert_array_equal(case.mask, grown(pair.parts == part, GROW))
        np.testing.assert_array_equal(case.truth, pair.truth)
    for case in held_out_cases("textured scenes", 5):
        parts = render_textured_scene(case.scene_seed, difficulty=replace(CLIP_LIKE, texture=1.0)).parts
        assert any(np.array_equal(grown(parts == i, GROW), case.mask) for i in range(1, parts.max() + 1))


def test_seeds_are_held_out_and_used_once():
    seeds = [scene_seed(name, index) for name in SETS for index in range(CASES)]
    assert min(seeds) >= HELD_OUT_SEED
    assert len(set(seeds)) == len(seeds)


def test_the_last_case_takes_the_first_reference(monkeypatch):
    monkeypatch.setattr(track, "CASES", 3)
    cases = list(track.held_out_cases("parts", 3, SIZE))
    np.testing.assert_array_equal(cases[-1].wrong_reference, cases[0].reference)


@pytest.mark.parametrize("arguments", [("parts", 0), ("parts", CASES + 1), ("wholes", 3)])
def test_unknown_sets_and_counts_are_refused(arguments):
    with pytest.raises(ArgumentError):
        next(held_out_cases(*arguments))


# --- evaluation --------------------------------------------------------------------------------------------


def test_results_have_all_scores_and_settings(model, results):
    assert (results.size, results.steps, results.guidance) == (SIZE, STEPS, GUIDANCE)
    assert results.scheduler == model.config["defaults"]["scheduler"]
    assert tuple(results.scores) == SETS
    for name in SETS:
        for kind in KINDS:
            for metric in ("psnr", "ssim"):
                values = results.values(name, kind, metric)
                assert values.shape == (2,) and np.isfinite(values).all()
        for outcome in results.pictured[name]:
            assert set(outcome.pictures) == set(KINDS)
            for picture in outcome.pictures.values():
                assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8


def test_the_three_answers_differ_and_right_minus_right_is_zero(results):
    for outcome in results.pictured["objects"]:
        right, wrong, none = (outcome.pictures[kind] for kind in ("right", "wrong", "none"))
        assert not np.array_equal(right, wrong) and not np.array_equal(right, none)
    assert (results.differences("objects", "right") == 0).all()


def test_defaults_are_the_models_own_and_on_case_is_told(model):
    seen = []
    config = {**model.config, "defaults": {**model.config["defaults"], "steps": 1, "guidance": 1.0}}
    plain = evaluate(MimicBrush(model.modules, config), ["textured scenes"], 3, batch=2, on_case=seen.append)
    assert (plain.steps, plain.guidance) == (1, 1.0)
    assert [outcome.case.index for outcome in seen] == [0, 1, 2]
    assert [outcome.scores for outcome in seen] == plain.scores["textured scenes"]


def test_batched_answers_equal_those_of_the_ordinary_edit_case_by_case(model):
    """Compared with one case at a time, the model's own reference and sampling, nothing batched."""
    cases = list(held_out_cases("between objects", 3, SIZE))
    batched = answer(model, cases, STEPS, GUIDANCE)
    for row, case in enumerate(cases):
        condition = model.encode_source(case.source, case.mask.astype(np.float32))
        noise = initial_noise([case.index], tuple(condition.hole_latents.shape[1:]))
        wanted = {
            "right": [ReferenceUse(model.encode_reference(case.reference))],
            "wrong": [ReferenceUse(model.encode_reference(case.wrong_reference))],
            "none": [ReferenceUse(model.encode_reference(case.reference), 0.0)],
        }
        for kind, references in wanted.items():
            scheduler = make_scheduler(model.config["scheduler"], "ddim", STEPS)
            alone = model.decode(model.sample(condition, references, noise, scheduler, GUIDANCE))[0]
            assert np.abs(alone.astype(int) - batched[kind][row]).max() <= 1, (kind, row)


def test_the_batch_size_does_not_matter(model, results):
    again = evaluate(model, ["parts"], n=2, steps=STEPS, guidance=GUIDANCE, batch=1)
    for kind in KINDS:
        np.testing.assert_allclose(again.values("parts", kind), results.values("parts", kind), atol=0.01)


def test_oracle_reaches_the_cap_and_a_painted_hole_does_not():
    for name in SETS:
        case = next(held_out_cases(name, 1, SIZE))
        assert score(case.truth, case) == Score(PSNR_CAP, pytest.approx(1))
        holed = np.where(case.mask[..., None], np.uint8(0), case.truth)
        assert score(holed, case).psnr < 30
        outside = np.where(case.mask[..., None], case.truth, np.uint8(0))
        assert score(outside, case).psnr == PSNR_CAP


def test_an_oracle_model_reaches_the_autoencoders_bound(model):
    """A model that answers with the truth's latents gives what the autoencoder gives."""
    cases = list(held_out_cases("objects", 2, SIZE))
    oracle = MimicBrush(model.modules, model.config)
    truths = torch.cat([oracle.encode_reference(case.truth).latents for case in cases])
    oracle.sample = lambda condition, references, noise, *_: truths.repeat(len(noise) // 2, 1, 1, 1)
    answers = answer(oracle, cases, STEPS, GUIDANCE)
    np.testing.assert_array_equal(answers["right"], answers["autoencoder"])


def test_evaluate_refuses_bad_arguments(model):
    for arguments in ({"sets": ["wholes"]}, {"sets": []}, {"n": CASES + 1}, {"batch": 0}):
        with pytest.raises(ArgumentError):
            evaluate(model, **arguments)


# --- report ------------------------------------------------------------------------------------------------


def made_up_results() -> Results:
    """Two sets of four cases with easy numbers: right 20..23, wrong 15, none 18..18.3, bound 30."""
    made = Results("toy", SIZE, 10, 1.5, "ddim")
    for name in SETS[:2]:
        for case in held_out_cases(name, 4, SIZE):
            psnr = {"right": 20 + case.index, "wrong": 15, "none": 18 + 0.1 * case.index, "autoencoder": 30}
            scores = {kind: Score(float(psnr[kind]), psnr[kind] / 100) for kind in KINDS}
            made.add(Outcome(case, {kind: case.source for kind in KINDS}, scores))
    return made


def test_card_table_shows_the_means_and_paired_differences():
    table = card_table(made_up_results())
    row = next(line for line in table.splitlines() if line.startswith("| parts"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["parts", "4", "21.50", "15.00", "18.15", "30.00"]
    assert cells[6].startswith("+3.35 [+") and cells[7].startswith("+6.50 [+")
    assert cells[8:10] == ["100%", "100%"] and cells[10].startswith("+0.034 [+")
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {12}
    assert "10 steps, guidance 1.5, ddim, 64 x 64" in table
    table.encode("cp1252")  # a Windows console can print it


def test_won_counts_cases_not_decibels():
    made = made_up_results()
    made.scores["parts"][0]["right"] = Score(1.0, 0.0)  # one case lost by far
    numbers = summary(made)["parts"]["psnr_right_minus_none"]
    assert numbers["won"] == 0.75
    assert numbers["mean"] == pytest.approx((1 - 18 + 2.9 + 3.8 + 4.7) / 4)
    assert numbers["low"] < numbers["mean"] < numbers["high"]


def test_json_holds_every_case():
    document = json.loads(to_json(made_up_results()))
    assert document["settings"] == {
        "model": "toy", "size": SIZE, "steps": 10, "guidance": 1.5, "scheduler": "ddim",
    }  # fmt: skip
    assert [case["right"]["psnr"] for case in document["cases"]["parts"]] == [20, 21, 22, 23]
    assert document["cases"]["objects"][2]["scene_seed"] == scene_seed("objects", 2)
    assert document["summary"]["objects"]["psnr"]["autoencoder"] == 30


def test_sheet_shows_all_pictured_cases(results):
    page = sheet(results)
    assert page.mode == "RGB"
    assert page.width >= len(COLUMNS) * TILE and page.height >= 2 * len(SETS) * TILE
    fewer = sheet(replace(results, pictured={name: kept[:1] for name, kept in results.pictured.items()}))
    assert fewer.width == page.width and page.height >= fewer.height + len(SETS) * TILE


def test_pictured_cases_are_drawn_by_lot():
    """The same for every model, and not the first ones."""
    assert drawn_by_lot(200, PICTURED) == drawn_by_lot(200, PICTURED) != frozenset(range(PICTURED))
    assert len(drawn_by_lot(200, PICTURED)) == PICTURED and drawn_by_lot(200, PICTURED) <= frozenset(range(200))
    assert drawn_by_lot(3, PICTURED) == {0, 1, 2}
    results = Results("toy", SIZE, 10, 1.5, "ddim", to_picture=frozenset({1, 4}))
    for index in range(6):
        results.add(Outcome(SimpleNamespace(index=index, set_name="parts"), {}, {}))
    assert [outcome.case.index for outcome in results.pictured["parts"]] == [1, 4]


def test_sheet_rows_are_in_the_columns_order(results, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        report, "contact_sheet", lambda rows, labels, tile, titles: drawn.update(rows=rows, titles=titles)
    )
    sheet(results)
    assert drawn["titles"] == [f"{name}, case {index}" for name in SETS for index in range(2)]
    outcomes = [outcome for name in SETS for outcome in results.pictured[name]]
    for row, outcome in zip(drawn["rows"], outcomes, strict=True):
        case, given = outcome.case, outcome.pictures
        expected = (case.reference, given["right"], case.truth, given["wrong"], given["none"])
        for shown, picture in zip(row[1:], expected, strict=True):
            assert shown is picture
        np.testing.assert_array_equal(row[0][~case.mask], case.source[~case.mask])
        assert len(np.unique(row[0][case.mask], axis=0)) == 1  # the hole shows nothing of what it hides


def test_sheet_refuses_results_without_pictures(results):
    with pytest.raises(ArgumentError):
        sheet(replace(results, pictured={}))
