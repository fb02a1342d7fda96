"""Magic Fixup on held-out cases: is its answer closer to the true frame than the coarse collage it was given?

A case is an object that was moved, scaled and turned (`scenes.render_move`): cut out roughly and pasted, as a user
does, its shadow stays behind, the light on it is wrong, and there is a hole where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from PIL import Image

from ..coarse_edit import MOVE, CoarseEdit, coarse_edit, layer_over_checker
from ..encoders import encode_pictures
from ..images import layer_from_array
from ..masks import grown
from ..sampling import SeededDraws, last_steps
from ..sheets import contact_sheet
from ..systems.magic_fixup import FixupCondition, MagicFixup, prepare_coarse
from ..training.scenes import HELD_OUT_SEED, MovedObject, render_move
from .metrics import masked_psnr, mean_with_interval, ssim
from .report import TILE, markdown_table
from .track import CASES, check_count, drawn_by_lot

FIRST_SEED = HELD_OUT_SEED + 10_000_000
"""Of the scenes: a stretch of their own, beyond those of the track."""

KINDS = ("result", "collage", "autoencoder")
"""What is judged: the model's answer; the coarse edit with its holes filled; the best the autoencoder could give."""

METRICS = {"psnr": ("PSNR in dB", ".2f"), "ssim": ("SSIM", ".3f")}

COLUMNS = ("original", "coarse edit", "holes filled", "result", "truth")
"""A sheet's."""

PICTURED = 12
"""Pictures of this many cases are kept for a sheet."""

ROUGH_CUT = 1
"""Pixels by which the cut reaches over the object."""


@dataclass(frozen=True)
class FixupCase:
    """One edit with its true answer; S is the side in pixels.

    original, truth: uint8 [S,S,3]. coarse: uint8 [S,S,4], alpha 0 = hole. changed: bool [S,S], around the object's
    old place and its new one, with the shadows: what is judged.
    """

    index: int
    original: np.ndarray
    coarse: np.ndarray
    truth: np.ndarray
    changed: np.ndarray


@dataclass(frozen=True)
class FixupOutcome:
    """One case answered. pictures: uint8 [S,S,3] for each of `KINDS`; psnr in dB and ssim over what changed."""

    case: FixupCase
    pictures: dict[str, np.ndarray]
    psnr: dict[str, float]
    ssim: dict[str, float]


def fixup_cases(n: int = CASES, size: int = 128) -> Iterator[FixupCase]:
    """The first n (1..200) held-out cases, as pictures of size x size pixels."""
    check_count(n)
    for index in range(n):
        scene = render_move(FIRST_SEED + index, size)
        changed = grown(scene.before | scene.after, size // 8)
        yield FixupCase(index, scene.original, collage(scene, ROUGH_CUT), scene.target, changed)


def collage(scene: MovedObject, rough: int) -> np.ndarray:
    """The coarse edit uint8 [S,S,4] of a scene, cut out with `rough` pixels of background around the object."""
    edit = CoarseEdit(MOVE, round(scene.x), round(scene.y), scene.scale, scene.degrees)
    region = torch.from_numpy(grown(scene.before, rough))[None].float()
    result = coarse_edit(torch.from_numpy(scene.original)[None].float() / 255, region, edit)
    return layer_from_array(result.pictures[0], "coarse edit")


@dataclass
class FixupResults:
    """What an evaluation found, and under which settings. outcomes: of each case in order; those that are not
    `pictured` (drawn by lot) keep no pictures.
    """

    model: str
    size: int
    steps: int
    strength: float
    pictured: frozenset[int]
    outcomes: list[FixupOutcome] = field(default_factory=list)

    def values(self, kind: str, metric: str = "psnr") -> np.ndarray:
        """All cases' numbers of one of `KINDS`, float64 [n]; metric: "psnr" or "ssim"."""
        return np.array([getattr(outcome, metric)[kind] for outcome in self.outcomes], np.float64)

    def add(self, outcome: FixupOutcome) -> None:
        kept = outcome if outcome.case.index in self.pictured else replace(outcome, pictures={})
        self.outcomes.append(kept)


def evaluate_fixups(
    model: MagicFixup,
    n: int = CASES,
    steps: int | None = None,
    strength: float = 1.0,
    batch: int = 16,
    on_case: Callable[[FixupOutcome], None] | None = None,
) -> FixupResults:
    """Answer and judge the first n held-out cases; steps: None = the model's default. on_case may raise to cancel."""
    defaults = model.config["defaults"]
    results = FixupResults(
        model=model.config.get("name", ""),
        size=defaults["size"],
        steps=defaults["steps"] if steps is None else steps,
        strength=strength,
        pictured=drawn_by_lot(n, PICTURED),
    )
    remaining = fixup_cases(n, results.size)
    while cases := list(islice(remaining, batch)):
        for outcome in _answered(model, cases, results.steps, strength):
            results.add(outcome)
            if on_case is not None:
                on_case(outcome)
    return results


def _answered(model: MagicFixup, cases: list[FixupCase], steps: int, strength: float) -> Iterator[FixupOutcome]:
    """Some cases at the model's size; the noise of each has its index as seed."""
    size = model.config["defaults"]["size"]
    condition = FixupCondition.of([model.encode(case.original, case.coarse, size) for case in cases])
    draw = SeededDraws([case.index for case in cases], tuple(condition.edit_latents.shape[1:]))
    scheduler = model.own_scheduler(steps)
    latents = model.sample(condition, draw, last_steps(scheduler, strength))
    pictures = {
        "result": model.decode(latents),
        "collage": np.stack([prepare_coarse(case.coarse, size)[0] for case in cases]),
        "autoencoder": model.decode(encode_pictures(model.modules.vae, [case.truth for case in cases])),
    }
    for row, case in enumerate(cases):
        own = {kind: pictures[kind][row].copy() for kind in KINDS}  # a view would keep the whole batch
        psnr = {kind: masked_psnr(picture, case.truth, case.changed) for kind, picture in own.items()}
        similarity = {kind: ssim(picture, case.truth, case.changed) for kind, picture in own.items()}
        yield FixupOutcome(case, own, psnr, similarity)


# --- report ------------------------------------------------------------------------------------------------


def fixup_table(results: FixupResults) -> str:
    """The results as a Markdown table, with a line on how they were made."""
    gains = {metric: results.values("result", metric) - results.values("collage", metric) for metric in METRICS}
    head = ("over what changed", *KINDS, "result - collage", "result is closer")
    rows = [
        (
            title,
            *(f"{results.values(kind, metric).mean():{form}}" for kind in KINDS),
            mean_with_interval(gains[metric], f"+{form}"),
            f"{(gains[metric] > 0).mean():.0%}",
        )
        for metric, (title, form) in METRICS.items()
    ]
    table = markdown_table(head, rows)
    return (
        f"{results.model}, {results.steps} steps, strength {results.strength:g}, {results.size} x {results.size} "
        f"pixels, {len(results.outcomes)} held-out cases, one seed each, before pasting; the gain with its 95 % "
        f"interval over cases.\n\n{table}\n"
    )


def fixup_json(results: FixupResults) -> str:
    """Settings and the figures of every case as JSON text."""
    settings = {key: getattr(results, key) for key in ("model", "size", "steps", "strength")}
    cases = [{"index": o.case.index, "psnr": o.psnr, "ssim": o.ssim} for o in results.outcomes]
    return json.dumps({"settings": settings, "cases": cases}, indent=1)


def fixup_sheet(results: FixupResults) -> Image.Image:
    """The pictured cases, whatever they look like: one row each, unpasted; RGB."""
    shown = [outcome for outcome in results.outcomes if outcome.pictures]
    rows = [
        (o.case.original, layer_over_checker(o.case.coarse), o.pictures["collage"], o.pictures["result"], o.case.truth)
        for o in shown
    ]
    return contact_sheet(rows, COLUMNS, TILE, [f"case {outcome.case.index}" for outcome in shown])
