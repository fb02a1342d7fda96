"""The held-out cases every model is judged on: four fixed lists, a function of nothing but set and index.

Scenes come from seeds that training never reaches (`scenes.HELD_OUT_SEED` and beyond), each set from its own
stretch of them. Pairs differ as two frames of one clip do (`scenes.CLIP_LIKE`) unless a harder difficulty is asked
for. The scenes do not depend on the size of the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ArgumentError
from ..training.hole_masks import maskable_parts, object_mask, part_mask
from ..training.scenes import (
    CLIP_LIKE,
    HELD_OUT_SEED,
    Difficulty,
    FramePair,
    render_between_objects,
    render_pair,
    render_textured_scene,
)

CASES = 200
"""Cases in each set."""

GROW = 2
"""Pixels by which a mask reaches over what it is to hide."""

LARGEST_REGION = 0.6
"""Largest share of the picture that is masked in a textured scene: more leaves too little to go by."""

_SET_STRETCH = 1_000_000  # seeds reserved for each set


@dataclass(frozen=True)
class Case:
    """One edit with its true answer; S is the side in pixels.

    source, reference, truth: uint8 [S,S,3]; the truth is the source itself except between objects.
    mask: bool [S,S], True = repaint. wrong_reference: uint8 [S,S,3], the reference of the list's next case
    (for the last one, of the first).
    index: 0.., place in the set and seed of the noise; scene_seed: what the scene was drawn from.
    """

    set_name: str
    index: int
    scene_seed: int
    source: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    wrong_reference: np.ndarray
    truth: np.ndarray


def held_out_cases(
    set_name: str, n: int = CASES, size: int = 128, difficulty: Difficulty = CLIP_LIKE
) -> Iterator[Case]:
    """The first n cases (1..`CASES`) of a set of `SETS`, one by one, as pictures of size x size pixels.

    A case's wrong reference is the very array that is the next case's reference.
    """
    check_sets([set_name], n)
    scene = _draw(set_name, 0, size, difficulty)
    for index in range(n):
        following = _draw(set_name, (index + 1) % CASES, size, difficulty)
        (pair, mask), wrong = scene, following[0].reference
        seed = scene_seed(set_name, index)
        yield Case(set_name, index, seed, pair.source, mask, pair.reference, wrong, pair.truth)
        scene = following


def check_sets(sets: list[str] | tuple[str, ...], n: int) -> None:
    """Raise ArgumentError for an unknown set or a number of cases that no set has."""
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets:
        raise ArgumentError(f"Unknown set {unknown[0] if unknown else ''!r}. Choose from: {', '.join(SETS)}.")
    check_count(n)


def check_count(n: int) -> None:
    """Raise ArgumentError for a number of cases that no set has."""
    if not 1 <= n <= CASES:
        raise ArgumentError(f"n is {n}; each set has {CASES} cases, so it must be between 1 and {CASES}.")


def drawn_by_lot(n: int, pictured: int) -> frozenset[int]:
    """Which of n cases are pictured: the same for every model, chosen by nobody."""
    return frozenset(np.random.default_rng(0).permutation(n)[:pictured].tolist())


def scene_seed(set_name: str, index: int) -> int:
    """The seed that a case's scene is drawn from."""
    return HELD_OUT_SEED + SETS.index(set_name) * _SET_STRETCH + index


def _draw(set_name: str, index: int, size: int, difficulty: Difficulty) -> tuple[FramePair, np.ndarray]:
    return _DRAWERS[set_name](scene_seed(set_name, index), index, size, difficulty)


def _one_part(seed: int, index: int, size: int, difficulty: Difficulty) -> tuple[FramePair, np.ndarray]:
    pair = render_pair(seed, size, difficulty)
    parts = maskable_parts(pair.parts)
    return pair, part_mask(pair.parts, int(parts[index % len(parts)]), GROW)


def _whole_object(seed: int, index: int, size: int, difficulty: Difficulty) -> tuple[FramePair, np.ndarray]:
    pair = render_pair(seed, size, difficulty)
    return pair, object_mask(pair.parts, GROW)


def _part_of_another(seed: int, index: int, size: int, difficulty: Difficulty) -> tuple[FramePair, np.ndarray]:
    pair, part = render_between_objects(seed, size, difficulty)
    return pair, part_mask(pair.parts, part, GROW)


def _one_region(seed: int, index: int, size: int, difficulty: Difficulty) -> tuple[FramePair, np.ndarray]:
    pair = render_textured_scene(seed, size, replace(difficulty, texture=1.0))
    masks = [part_mask(pair.parts, int(part), GROW) for part in maskable_parts(pair.parts)]
    fitting = [mask for mask in masks if mask.mean() <= LARGEST_REGION] or [min(masks, key=np.mean)]
    return pair, fitting[index % len(fitting)]


_DRAWERS = {
    "parts": _one_part,
    "objects": _whole_object,
    "between objects": _part_of_another,
    "textured scenes": _one_region,
}
SETS = tuple(_DRAWERS)
