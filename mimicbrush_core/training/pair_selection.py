"""Which two frames make a pair: alike enough to show the same things, different enough to have to look.

The paper measures similarity by SSIM and drops pairs that are too alike or too different (arXiv 2406.07547, section
3.3); its thresholds are not published. Ours, `SSIM_BOUNDS`, were chosen by measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import PictureError
from ..evaluation.metrics import ssim
from ..images import resize_lanczos
from .frames import Clip, OpenClip, Unreadable, opened, square_window

SSIM_SIDE = 16
"""Pairs are compared at this size, by their coarse structure. At larger sizes SSIM looks at texture, which the
slightest movement changes, and at plain areas, which are alike anywhere: with the best threshold for each, drawn
pairs (`scenes.CLIP_LIKE`) and strangers are told apart in 82 % of the cases at 64 px, 86 % at 32, 90 % at 16."""

SSIM_BOUNDS = (0.2, 0.9)
"""The least and greatest similarity of a pair. Chosen by measuring (5 %, median, 95 % of each set, at 16 px):

- nothing moved: photographs recompressed as JPEG of quality 20 0.99, 1.00, 1.00
- hardly anything moved: photographs panned by 1 % of the frame 0.98, 0.99, 0.99, by 2 % 0.93, 0.94, 0.96; drawn scenes
  in a tenth of the full pose and light 0.89, 0.97, 0.99; two real videos one frame later 0.59, 0.94, 1.00 (a lively
  one) and 0.99, 1.00, 1.00 (a calm one)
- pairs worth having: drawn scenes 0.10, 0.40, 0.81, textured ones 0.15, 0.48, 0.79; photographs panned by 5 % 0.61,
  0.66, 0.74; half a second of the lively video -0.01, 0.29, 0.64, two thirds of the calm one 0.54, 0.59, 0.62
- nothing in common: drawn scenes -0.02, 0.08, 0.20, textured ones -0.03, 0.04, 0.13; photographs -0.05, 0.03, 0.13

So 0.2 drops 95 % of the drawn strangers (99 % of the textured ones) and keeps 84 % (89 %) of the pairs; 0.9 drops what
stands still and what moves by a fiftieth of the frame or less."""

TRIES = 8
"""Second frames that are tried for a first one."""
FIRST_FRAMES = 50
"""First frames, each of the next clip, that are tried for a sample before the collection is found unusable."""

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class FoundPair:
    """Two square frames uint8 [L,L,3] of one clip, the same window of both, and their similarity."""

    source: np.ndarray
    reference: np.ndarray
    similarity: float
    path: Path


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two square pictures uint8 [L,L,3] (any sides) scaled to `SSIM_SIDE` pixels."""
    return ssim(resize_lanczos(a, SSIM_SIDE), resize_lanczos(b, SSIM_SIDE))


def find_pair(
    rng: np.random.Generator,
    clips: Sequence[Clip],
    on_unreadable: Callable[[Path, str], None],
    bounds: tuple[float, float] = SSIM_BOUNDS,
) -> FoundPair:
    """The first drawn pair whose similarity lies within the bounds: up to `TRIES` with each of `FIRST_FRAMES`.

    Depends on the generator and the files only. PictureError where all clips fail or none gives such a pair.
    """
    values: list[float] = []

    def attempt(clip: Clip) -> FoundPair | None:
        with opened(clip) as film:
            return _pair_of(rng, film, clip.path, bounds, values)

    pair = first_of(rng, clips, attempt, on_unreadable, FIRST_FRAMES)
    if pair is None:
        alike = sum(value > bounds[1] for value in values)
        raise PictureError(
            f"None of {len(values)} pairs drawn from {len(clips)} clips is usable: {alike} are too alike "
            f"(SSIM above {bounds[1]}), {len(values) - alike} too different (below {bounds[0]}). Give clips in which "
            "something moves and that have no cuts, or give still pictures."
        )
    return pair


def first_of(
    rng: np.random.Generator,
    items: Sequence[Item],
    attempt: Callable[[Item], Value | None],
    on_unreadable: Callable[[Path, str], None],
    limit: int,
) -> Value | None:
    """What `attempt` gives for a drawn item, or for the next one, around and around, until it gives something.

    None after `limit` attempts that gave None. Unreadable items are reported and passed over, however many;
    PictureError if there are no others.
    """
    start, tried = int(rng.integers(len(items))), 0
    for offset in range(len(items) * limit):
        item = items[(start + offset) % len(items)]
        try:
            value = attempt(item)
        except Unreadable as error:
            on_unreadable(item.path, str(error))
            if offset == len(items) - 1 and not tried:
                raise PictureError(
                    f"None of the {len(items)} training files could be read; the last one is {item.path}: {error}. "
                    "Check the folders and what is in them."
                ) from error
            continue
        if value is not None:
            return value
        tried += 1
        if tried == limit:
            break
    return None


def _pair_of(
    rng: np.random.Generator, film: OpenClip, path: Path, bounds: tuple[float, float], values: list[float]
) -> FoundPair | None:
    """A pair with a drawn first frame, or None; every measured similarity is appended to `values`.

    The gap to the second frame is drawn evenly by its logarithm. What was too alike sets the least gap of the next
    try, what was too different the greatest: lively clips need short gaps, calm ones long.
    """
    place, first = rng.random(), int(rng.integers(film.frames))
    room = {-1: first, 1: film.frames - 1 - first}
    direction = int(rng.choice((-1, 1)))
    if room[direction] == 0:
        direction = -direction
    shortest, longest = 1, min(room[direction], film.longest_gap)
    source = square_window(film.read(first), place)
    for _ in range(TRIES):
        gap = min(max(int(np.exp(rng.uniform(np.log(shortest), np.log(longest + 1)))), shortest), longest)
        reference = square_window(film.read(first + direction * gap), place)
        value = similarity(source, reference)
        values.append(value)
        if bounds[0] <= value <= bounds[1]:
            return FoundPair(source, reference, value, path)
        if value > bounds[1]:
            shortest = gap + 1
        else:
            longest = gap - 1
        if shortest > longest:
            break
    return None
