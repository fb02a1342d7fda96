"""Looking inside an edit: how much each pixel leaned on the reference, and where in it a point looked.

Both come from the joint attention over the picture's own tokens and the references' (`attention`). A query's mass on
all reference tokens is its *reliance*; how that mass lies over the tokens is where it *looks*. Means over the heads,
over the steps and over the chosen blocks; only running sums are kept. Looking changes nothing of the edit.

The half that the plain attention has in the blend is not counted: a reliance of 1 means that the joint attention sees
nothing but the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import editing, images, masks
from .attention import ReadingObserver, reading_blocks
from .depth import DepthCondition
from .editing import BatchResult, EditSettings, Progress
from .errors import ArgumentError
from .references import Reference, ReferenceUse
from .systems.mimicbrush import MimicBrush

ALL, COARSE, MIDDLE, FINE = "all", "coarse", "middle", "fine"
BLOCKS = (ALL, COARSE, MIDDLE, FINE)
"""Which blocks are looked at. fine: those of the finest grid of tokens that reads; middle: of half its resolution;
coarse: of less."""

MAX_POINTS = 12

Point = tuple[float, float]
"""(x, y) in pixels; the centre of the upper left pixel is (0.5, 0.5)."""


def chosen_blocks(unet: nn.Module, choice: str) -> list[str]:
    """Names of the reading blocks of one of `BLOCKS`. Raises ArgumentError for another, and where there are none."""
    if choice not in BLOCKS:
        raise ArgumentError(f"blocks is {choice!r}; it must be one of: {', '.join(BLOCKS)}.")
    halvings = _halvings(reading_blocks(unet))
    wanted = {ALL: lambda n: True, FINE: lambda n: n == 0, MIDDLE: lambda n: n == 1, COARSE: lambda n: n > 1}[choice]
    names = [name for name, count in halvings.items() if wanted(count)]
    if not names:
        raise ArgumentError(f"This model has no {choice} blocks that read a reference. Choose {ALL!r}.")
    return names


def _halvings(names: Sequence[str]) -> dict[str, int]:
    """How often each reading block's grid is half of the finest that reads."""
    # Every upper block but the last doubles the grid at its end; the middle works on the first one's.
    levels = {name: int(name.split(".")[1]) if name.startswith("up_blocks.") else 0 for name in names}
    return {name: max(levels.values()) - level for name, level in levels.items()}


# --- recording -----------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What one block has shown: sums over `readings`, of the share [N] and of the looks {reference: [P,N]}."""

    readings: int = 0
    share: Tensor | float = 0.0
    looks: dict[Reference, Tensor] = field(default_factory=dict)


class ReadingRecorder:
    """An observer for `MimicBrush.sample` that keeps how the first picture of the batch reads its references.

    blocks: the names of those to look at. start, end: the share of the run, 0..1, in which they are looked at.
    points [P,2]: (x, y) in 0..1 of the model's square, whose looks are kept.
    """

    def __init__(self, blocks: Sequence[str], points: Tensor, start: float = 0.0, end: float = 1.0):
        self._sums = {name: _Sums() for name in blocks}
        self._points, self._start, self._end = points, start, end
        self._uses: Sequence[ReferenceUse] = ()
        self._unread = 0  # steps in which no reference was read

    def __call__(self, progress: float, uses: Sequence[ReferenceUse]) -> ReadingObserver | None:
        if not self._start <= progress < self._end:
            return None
        self._uses = uses
        self._unread += not uses
        return self._record

    def _record(
        self, block: str, query: Tensor, references: Sequence[tuple[Tensor, Tensor, float]], share: Tensor
    ) -> None:
        if block not in self._sums:
            return
        sums = self._sums[block]
        sums.readings += 1
        sums.share = sums.share + share[0].mean(0)
        if len(self._points):
            count = query.shape[2]
            cells = _cells(self._points, math.isqrt(count)).to(query.device)
            masses = reference_masses(query[0][:, cells], [(key[0], w) for key, _, w in references], share[0][:, cells])
            for use, mass in zip(self._uses, masses, strict=True):
                grid = sums.looks.setdefault(use.reference, mass.new_zeros(len(mass), count))
                grid.index_add_(1, use.reference.offered(count).to(mass.device), mass)

    def reliance(self, side: int) -> Tensor:
        """The share of the joint attention that was on the references, [side,side] over the model's square."""
        maps = [
            _resized(sums.share.cpu()[None] / (sums.readings + self._unread), side)[0]
            for sums in self._sums.values()
            if sums.readings
        ]
        return torch.stack(maps).mean(0) if maps else torch.zeros(side, side)

    def looks(self, reference: Reference, side: int) -> Tensor:
        """Where in a reference the points looked, [P,side,side] over its square: attention per unit of area."""
        maps = [
            _resized(sums.looks[reference].cpu() / sums.readings, side) * (sums.share.numel())
            for sums in self._sums.values()
            if reference in sums.looks
        ]
        return torch.stack(maps).mean(0) if maps else torch.zeros(len(self._points), side, side)


def reference_masses(query: Tensor, references: Sequence[tuple[Tensor, float]], share: Tensor) -> list[Tensor]:
    """The joint attention's mass on each token of each reference, mean over the heads: [P,M] for each.

    query [H,P,D]; references: (key [H,M,D], weight > 0) each; share [H,P]: the mass on all of them together.
    """
    scale = 1.0 / math.sqrt(query.shape[-1])
    scores = [(query @ key.mT).float() * scale + math.log(weight) for key, weight in references]
    masses = (torch.cat(scores, dim=-1).softmax(-1) * share[..., None]).mean(0)
    return list(masses.split([one.shape[-1] for one in scores], dim=-1))


def _cells(points: Tensor, side: int) -> Tensor:
    """Indices [P] of the tokens of a grid of side x side, row by row, in which points [P,2] of 0..1 lie."""
    columns, rows = (points * side).long().clamp(0, side - 1).unbind(-1)
    return rows * side + columns


def _resized(grids: Tensor, side: int) -> Tensor:
    """Token grids [P,N], row by row, as [P,side,side]."""
    tokens = math.isqrt(grids.shape[-1])
    square = grids.unflatten(-1, (tokens, tokens))[:, None].float()
    return F.interpolate(square, (side, side), mode="bilinear", align_corners=False)[:, 0]


# --- points --------------------------------------------------------------------------------------------------


def spread_points(mask: np.ndarray, count: int) -> list[Point]:
    """Pixels of a mask float [H,W], evenly spread over it, at most `count`: from the top down. Always the same ones."""
    rows, columns = np.nonzero(masks.binarize(mask))
    step = max(1, math.isqrt(len(rows) // _CANDIDATES))  # a large mask is looked at on a coarser grid
    kept = (rows % step == 0) & (columns % step == 0)
    pixels = np.stack([columns, rows], axis=1)
    pixels = (pixels[kept] if kept.any() else pixels).astype(np.float32)
    centers = _farthest(pixels, min(count, len(pixels)))
    for _ in range(_ROUNDS):  # Lloyd's: each centre moves to the middle of what is nearest to it
        nearest = _distances(pixels, centers).argmin(axis=1)
        centers = np.stack([_middle(pixels[nearest == index]) for index in range(len(centers))])
    return [(float(x) + 0.5, float(y) + 0.5) for x, y in sorted(centers, key=lambda center: (center[1], center[0]))]


_CANDIDATES, _ROUNDS = 4096, 8


def _farthest(pixels: np.ndarray, count: int) -> np.ndarray:
    """`count` of pixels [N,2]: the one nearest to the middle, then always the one farthest from those chosen."""
    chosen = [_middle(pixels)]
    while len(chosen) < count:
        chosen.append(pixels[_distances(pixels, np.stack(chosen)).min(axis=1).argmax()])
    return np.stack(chosen)


def _middle(pixels: np.ndarray) -> np.ndarray:
    """The one of pixels [N,2] that is nearest to their mean: so it is in a shape that its mean is not in."""
    return pixels[_distances(pixels, pixels.mean(axis=0, keepdims=True)).argmin()]


def _distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared distances [N,M] of [N,2] from [M,2]."""
    return ((points[:, None] - others[None]) ** 2).sum(axis=-1)


def marked_points(marks: np.ndarray, height: int, width: int) -> list[Point]:
    """One point in the middle of each connected spot of a mask float [height,width], from the top down.

    Raises PictureError for a mask that is empty or of another size, ArgumentError for more than MAX_POINTS spots.
    """
    masks.check_mask(marks, height, width, role="mask of points")
    spots = _spots(masks.binarize(marks))
    if len(spots) > MAX_POINTS:
        raise ArgumentError(
            f"The mask of points has {len(spots)} separate spots; at most {MAX_POINTS} can be shown. Paint fewer dots."
        )
    return sorted(
        ((x + 0.5, y + 0.5) for x, y in (_middle(spot).tolist() for spot in spots)), key=lambda one: one[::-1]
    )


def _spots(hole: np.ndarray) -> list[np.ndarray]:
    """The connected spots of bool [H,W], diagonals too: the (x, y) of their pixels, float32 [N,2] each."""
    runs: list[tuple[int, int, int]] = []  # of True in a row: row, first column, the column after the last
    spot_of: list[int] = []  # the run that stands for the spot; itself, or one that joined it
    above = np.empty((0, 3), int)  # the row's before: index, first, end

    def spot(run: int) -> int:
        while spot_of[run] != run:
            run = spot_of[run]
        return run

    for row, line in enumerate(hole):
        edges = np.flatnonzero(np.diff(line, prepend=False, append=False))
        current = []
        for first, end in edges.reshape(-1, 2).tolist():
            run = len(runs)
            runs.append((row, first, end))
            spot_of.append(run)
            for other in above[(above[:, 1] <= end) & (above[:, 2] >= first), 0].tolist():
                spot_of[spot(other)] = run
            current.append((run, first, end))
        above = np.array(current, int).reshape(-1, 3)
    pixels: dict[int, list[tuple[int, int]]] = {}
    for run, (row, first, end) in enumerate(runs):
        pixels.setdefault(spot(run), []).extend((column, row) for column in range(first, end))
    return [np.array(one, np.float32) for one in pixels.values()]


# --- inspecting an edit --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """Where one point of the source looks.

    point: in the source's pixels. reference: the one it looks at most. share: 0..1, the part of all it sees of
    references that is on this one. peak: in the pixels of that reference's picture. heat float32 [s,s]: how much it
    sees of each place of that picture, padded to a square, relative to the most.
    """

    point: Point
    reference: Reference
    share: float
    peak: Point
    heat: Tensor


@dataclass(frozen=True)
class Inspection:
    """edit: of one picture. reliance float32 [H,W] in the source's pixels, 0..1; 0 beyond the edit's window.
    looks: one per point."""

    edit: BatchResult
    reliance: Tensor
    looks: list[Look]


def inspect_edit(
    brush: MimicBrush,
    sources: Tensor,
    mask: Tensor,
    references: Sequence[ReferenceUse],
    settings: EditSettings | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    depth: DepthCondition | None = None,
    blocks: str = ALL,
    start: float = 0.0,
    end: float = 1.0,
    points: Sequence[Point] | int = 0,
) -> Inspection:
    """Edit one picture as `edit_batch` does, the first of each batch, and see how it reads its references.

    sources float [B,H,W,3 or 4], mask float [B,H,W]. blocks: one of `BLOCKS`; start, end: the share of the steps, 0..1,
    that is looked at. points: in the source's pixels, or how many to spread over the mask. Raises ArgumentError where
    nothing would be seen, and what `edit_batch` raises, before any work is done.
    """
    settings = settings or EditSettings()
    settings.check()
    source, mask, depth = sources[:1], mask[:1], depth.first() if depth is not None else None
    [mask_array] = editing.checked_masks(mask, *source.shape[1:3])
    window = editing.edit_window([mask_array], settings)
    names = chosen_blocks(brush.modules.unet, blocks)
    _check_span(brush, settings, references, start, end, reading=points != 0)
    if isinstance(points, int):
        points = spread_points(mask_array, points) if points else []
    recorder = ReadingRecorder(names, _in_square(points, window), start, end)
    edit = brush.edit_batch(source, mask, references, settings, on_progress, depth=depth, observer=recorder)
    side = edit.settings.size // brush.latent_factor
    reliance = torch.zeros(mask_array.shape)
    reliance[window.slices] = in_frame(recorder.reliance(side), window.height, window.width)
    return Inspection(edit, reliance, _looks(recorder, points, references, side))


def _check_span(
    brush: MimicBrush,
    settings: EditSettings,
    references: Sequence[ReferenceUse],
    start: float,
    end: float,
    reading: bool,
) -> None:
    """Raise ArgumentError where no step is looked at, or with `reading` none that reads a reference."""
    steps = settings.steps or brush.config["defaults"]["steps"]
    seen = [step for step in range(steps) if start <= step / steps < end]
    if not seen:
        raise ArgumentError(f"None of the {steps} steps lies between start {start:g} and end {end:g}. Widen the span.")
    if reading and not any(use.active(step, steps) for use in references for step in seen):
        raise ArgumentError(
            "No reference is read in the steps looked at, so no point looks anywhere. Look at other steps, or give a "
            "reference more weight or a longer span."
        )


def _in_square(points: Sequence[Point], window: masks.CropWindow) -> Tensor:
    """Points in the source's pixels as [P,2] in 0..1 of the window, padded to a square."""
    side = max(window.width, window.height)
    left, top = (side - window.width) // 2, (side - window.height) // 2
    for x, y in points:
        if not (0 <= x - window.x < window.width and 0 <= y - window.y < window.height):
            raise ArgumentError(
                f"The point ({x:g}, {y:g}) lies outside of the window that is worked on: {window.width} x "
                f"{window.height} pixels at ({window.x}, {window.y}). Mark points in and around the mask."
            )
    moved = [((x - window.x + left) / side, (y - window.y + top) / side) for x, y in points]
    return torch.tensor(moved, dtype=torch.float32).reshape(-1, 2)


def _looks(
    recorder: ReadingRecorder, points: Sequence[Point], references: Sequence[ReferenceUse], side: int
) -> list[Look]:
    once = list(dict.fromkeys(use.reference for use in references))
    seen = [recorder.looks(one, side) for one in once]  # [P,side,side] each
    result = []
    for index, point in enumerate(points):
        masses = torch.stack([one[index].sum() for one in seen])
        chosen = int(masses.argmax())
        reference, heat = once[chosen], seen[chosen][index]
        peak = _peak(heat, *reference.picture.shape[:2])
        result.append(Look(point, reference, float(masses[chosen] / masses.sum()), peak, heat / heat.max()))
    return result


def _peak(heat: Tensor, height: int, width: int) -> Point:
    """The most seen place of a square [s,s] within the picture of height x width that was padded to it, in pixels."""
    side, (cells, _) = max(height, width), heat.shape
    left, top = (side - width) // 2, (side - height) // 2
    x = (torch.arange(cells) + 0.5) * side / cells - left
    y = (torch.arange(cells) + 0.5) * side / cells - top
    inside = ((y > 0) & (y < height))[:, None] & ((x > 0) & (x < width))
    index = int(heat.masked_fill(~inside, -1).argmax())
    return float(x[index % cells]), float(y[index // cells])


def in_frame(square: Tensor, height: int, width: int) -> Tensor:
    """A map of the model's square [s,s] in the frame of the picture that was padded to it, [height,width]."""
    side = max(height, width)
    return images.crop_padding(_resized(square.flatten()[None], side)[0], height, width)
