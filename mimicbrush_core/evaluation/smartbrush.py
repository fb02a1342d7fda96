"""SmartBrush on held-out cases: does it paint what it is told to, in the shape that it is given?

Each case is a drawn scene without its shape: the model paints that shape, by its caption, into its exact silhouette,
a sloppy mask and its box. What it painted is where the picture then differs from the scene; the same measure of the
true picture through the autoencoder is the best that any model could reach. Results are judged as decoded, before
anything is pasted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from PIL import Image

from ..encoders import encode_pictures
from ..masks import MAX_PRECISION_LEVEL, grown, latent_coverage, precise_mask
from ..sampling import initial_noise
from ..sheets import contact_sheet, show_mask
from ..systems.smartbrush import BrushCondition, BrushSettings, EncodedText, Painted, SmartBrush
from ..training.dice import dice_loss
from ..training.scenes import HELD_OUT_SEED
from ..training.shapes import ShapeScene, draw_shape, nearest_colour
from .metrics import mean_with_interval
from .report import markdown_table
from .track import CASES, check_count, drawn_by_lot

BOUND = "autoencoder"
"""The row of the true pictures, encoded and decoded."""

EXACT, SLOPPY, BOX, KEPT = "exact silhouette", "sloppy mask", "box", "box, background kept"

KINDS = {
    EXACT: BrushSettings(precision=0, preserve_background=False),
    SLOPPY: BrushSettings(precision=2, preserve_background=False),
    BOX: BrushSettings(precision=MAX_PRECISION_LEVEL, preserve_background=False),
    KEPT: BrushSettings(precision=MAX_PRECISION_LEVEL, preserve_background=True),
}
"""How a case is answered: the mask is the silhouette's at that precision."""

PICTURED = 12
"""Pictures of this many cases are kept for a sheet."""

_CHANGED = 40  # 8-bit levels, of the channel that changed most: the autoencoder's own errors stay below
_COLUMNS = ("box", "true picture", *KINDS, "predicted mask")


@dataclass(frozen=True)
class BrushCase:
    """index: place in the set and seed of the noise. scene: its background is the source, its mask the silhouette."""

    index: int
    scene: ShapeScene

    def mask(self, kind: str) -> np.ndarray:
        """The mask that is given for one of `KINDS`, or for `BOUND` the silhouette, float32 [S,S] of 0 and 1."""
        return precise_mask(self.scene.mask.astype(np.float32), KINDS[kind].precision if kind in KINDS else 0)


@dataclass(frozen=True)
class BrushScore:
    """given, silhouette: IoU of what was painted with the mask that was given, and with the silhouette; 0..1.

    dice_painted, dice_silhouette: DICE loss of the predicted mask against the same two, in latent cells; 0..1, NaN for
    `BOUND`. background: mean absolute error in 8-bit levels where the box is not the shape. colour: whether what was
    painted has the colour that the text names.
    """

    given: float
    silhouette: float
    dice_painted: float
    dice_silhouette: float
    background: float
    colour: float


@dataclass(frozen=True)
class BrushOutcome:
    """One case answered: pictures uint8 [S,S,3] and scores of each kind; predicted [h,w] in 0..1, of the box."""

    case: BrushCase
    pictures: dict[str, np.ndarray]
    scores: dict[str, BrushScore]
    predicted: np.ndarray


@dataclass
class BrushResults:
    """What an evaluation found, and under which settings. scores: of each case in order. pictured: drawn by lot."""

    model: str
    size: int
    steps: int
    guidance: float
    scores: list[dict[str, BrushScore]] = field(default_factory=list)
    pictured: list[BrushOutcome] = field(default_factory=list)

    def values(self, kind: str, figure: str) -> np.ndarray:
        """One figure of all cases, float64 [n]."""
        return np.array([getattr(scores[kind], figure) for scores in self.scores], np.float64)


def evaluate_brush(
    model: SmartBrush,
    n: int = CASES,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 25,
    on_case: Callable[[BrushOutcome], None] | None = None,
) -> BrushResults:
    """Answer and judge the first n held-out cases (1..200) with one seed each; None = the model's defaults.

    on_case: called after each case; may raise to cancel.
    """
    check_count(n)
    defaults = model.config["defaults"]
    results = BrushResults(
        model=model.config.get("name", ""),
        size=defaults["size"],
        steps=defaults["steps"] if steps is None else steps,
        guidance=defaults["guidance"] if guidance is None else guidance,
    )
    to_picture = drawn_by_lot(n, PICTURED)
    remaining = held_out_shapes(n, results.size)
    while cases := list(islice(remaining, batch)):
        for outcome in _answered(model, cases, results.steps, results.guidance):
            results.scores.append(outcome.scores)
            if outcome.case.index in to_picture:
                results.pictured.append(outcome)
            if on_case is not None:
                on_case(outcome)
    return results


def held_out_shapes(n: int, size: int) -> Iterator[BrushCase]:
    """The first n cases, the same for every model, as pictures of size x size pixels."""
    return (BrushCase(index, draw_shape(HELD_OUT_SEED + index, size)) for index in range(n))


def painted_region(picture: np.ndarray, case: BrushCase) -> np.ndarray:
    """Where a picture uint8 [S,S,3] differs from the case's background, inside the silhouette's box; bool [S,S]."""
    change = np.abs(picture.astype(np.int16) - case.scene.background).max(axis=-1)
    return (change > _CHANGED) & (case.mask(BOX) > 0)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two regions bool [S,S]; 0 where both are empty."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def judged(picture: np.ndarray, case: BrushCase, kind: str, predicted: np.ndarray | None) -> BrushScore:
    """Judge an answer uint8 [S,S,3]; predicted [h,w] in 0..1: the model's mask."""
    painted, scene = painted_region(picture, case), case.scene
    beside = (case.mask(BOX) > 0) & ~grown(scene.mask, 1)  # not on the antialiased edge
    error = np.abs(picture.astype(np.float64) - scene.background).mean(axis=-1)
    named = painted.any() and nearest_colour(picture[painted].mean(axis=0) / 255) == scene.look.colour
    return BrushScore(
        given=overlap(painted, case.mask(kind) > 0),
        silhouette=overlap(painted, scene.mask),
        dice_painted=_dice(predicted, painted),
        dice_silhouette=_dice(predicted, scene.mask),
        background=float(error[beside].mean()) if beside.any() else 0.0,
        colour=float(named),
    )


def _dice(predicted: np.ndarray | None, region: np.ndarray) -> float:
    if predicted is None:
        return float("nan")
    cells = latent_coverage(region, len(region), len(region) // len(predicted))
    return float(dice_loss(torch.from_numpy(predicted)[None, None], cells))


def _answered(model: SmartBrush, cases: Sequence[BrushCase], steps: int, guidance: float) -> Iterator[BrushOutcome]:
    painted = {
        kind: _paint(model, cases, kind, replace(settings, steps=steps, guidance=guidance))
        for kind, settings in KINDS.items()
    }
    pictures = {kind: model.decode(one.latents) for kind, one in painted.items()}
    pictures[BOUND] = model.decode(encode_pictures(model.modules.vae, [case.scene.picture for case in cases]))
    masks = {kind: one.predicted[:, 0].cpu().numpy() for kind, one in painted.items()}
    for row, case in enumerate(cases):
        own = {kind: pictures[kind][row].copy() for kind in pictures}  # a view would keep the whole batch
        scores = {
            kind: judged(picture, case, kind, masks[kind][row] if kind in masks else None)
            for kind, picture in own.items()
        }
        yield BrushOutcome(case, own, scores, masks[BOX][row].copy())


def _paint(model: SmartBrush, cases: Sequence[BrushCase], kind: str, settings: BrushSettings) -> Painted:
    """The model's answers to B cases, its own caption for each."""
    condition = BrushCondition.of([model.encode_source(case.scene.background, case.mask(kind)) for case in cases])
    tokens = torch.cat([model.encode_text(case.scene.look.caption).tokens for case in cases])
    noise = initial_noise([case.index for case in cases], tuple(condition.clean.shape[1:]))
    scheduler = model.own_scheduler(settings.steps)
    negative = model.encode_text(settings.negative)
    return model.sample(condition, EncodedText(tokens, model), negative, noise, scheduler, settings)


# --- report ------------------------------------------------------------------------------------------------


def brush_figures(results: BrushResults) -> dict[str, float]:
    """The means of a table's columns, for a log."""
    return {
        f"{kind}: {figure}": float(results.values(kind, figure).mean())
        for kind in KINDS
        for figure in ("given", "silhouette", "dice_painted", "background", "colour")
    }


def brush_json(results: BrushResults) -> str:
    """Settings and the figures of every case as JSON text."""
    settings = {key: getattr(results, key) for key in ("model", "size", "steps", "guidance")}
    cases = [
        {"index": index} | {kind: _as_json(score) for kind, score in scores.items()}
        for index, scores in enumerate(results.scores)
    ]
    return json.dumps({"settings": settings, "cases": cases}, indent=1)


def _as_json(score: BrushScore) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in asdict(score).items()}


def brush_table(results: BrushResults) -> str:
    """The results as Markdown: a table with one row per mask, and what precision and kept background change."""
    head = (
        "mask",
        "IoU with the mask given",
        "IoU with the silhouette",
        "DICE loss, painted",
        "DICE loss, silhouette",
        "background error",
        "colour as named",
    )
    rows = [_row(results, kind) for kind in (*KINDS, BOUND)]
    table = markdown_table(head, rows)
    literal = results.values(EXACT, "given") - results.values(BOX, "given")
    kept = results.values(KEPT, "background") - results.values(BOX, "background")
    return (
        f"{results.model}, {results.steps} steps, guidance {results.guidance:g}, {results.size} x {results.size} "
        f"pixels, {len(results.scores)} held-out cases, one seed each, before pasting; means with 95 % intervals over "
        f"cases.\n\n{table}\n\n"
        f"IoU with the mask given, exact silhouette minus box: {mean_with_interval(literal, '+.3f')}, higher in "
        f"{(literal > 0).mean():.0%} of the cases. Background error, kept minus not kept: "
        f"{mean_with_interval(kept, '+.2f')} of 255, lower in {(kept < 0).mean():.0%}.\n"
    )


def _row(results: BrushResults, kind: str) -> tuple[str, ...]:
    formats = {
        "given": ".3f",
        "silhouette": ".3f",
        "dice_painted": ".3f",
        "dice_silhouette": ".3f",
        "background": ".2f",
        "colour": ".0%",
    }
    return kind, *(mean_with_interval(results.values(kind, figure), form) for figure, form in formats.items())


def brush_sheet(results: BrushResults) -> Image.Image:
    """The pictured cases, whatever they look like: one row each, its caption above, unpasted; RGB."""
    rows = []
    for outcome in results.pictured:
        case, side = outcome.case, results.size
        predicted = Image.fromarray((outcome.predicted * 255).astype(np.uint8)).resize((side, side))
        rows.append(
            [
                show_mask(case.scene.background, case.mask(BOX), strength=1.0),
                case.scene.picture,
                *(outcome.pictures[kind] for kind in KINDS),
                np.asarray(predicted.convert("RGB")),
            ]
        )
    titles = [f"case {one.case.index}: {one.case.scene.look.caption}" for one in results.pictured]
    return contact_sheet(rows, _COLUMNS, titles=titles)
