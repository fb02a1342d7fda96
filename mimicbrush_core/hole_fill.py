"""Filling the holes of a picture with the colours around them, carried on from the rim inwards.

A pixel takes the mean of the known ones within reach, the near and those along its lines of equal brightness first:
the continuation of Bertalmio, Bertozzi and Sapiro, "Navier-Stokes, Fluid Dynamics, and Image and Video Inpainting",
CVPR 2001, in the order of fast marching (Telea, "An Image Inpainting Technique Based on the Fast Marching Method",
2004), as OpenCV's `INPAINT_NS` combines them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator

import numpy as np

from .errors import PictureError

REACH = 3
"""How far a pixel looks for known ones, in pixels."""

_SPAN = range(-REACH, REACH + 1)
_OFFSETS = np.array([(y, x) for y in _SPAN for x in _SPAN if 0 < y * y + x * x <= REACH**2])
_DOWN, _RIGHT = _OFFSETS[:, :1].astype(np.float32), _OFFSETS[:, 1:].astype(np.float32)
_SEEN = np.unique(np.concatenate([_OFFSETS + step for step in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))]), axis=0)
"""Where a pixel looks: at those within reach and, for their slopes, at the neighbours of these."""
_LENGTH = np.hypot(_DOWN, _RIGHT)
_NEARNESS = 1 / (1 + _LENGTH**4)
_FLAT = 0.01  # slopes below this have no direction
_NO_DIRECTION = 1e-6


def fill_hole(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """A copy of a picture uint8 [H,W,3] whose pixels in `hole`, bool [H,W], are filled; the others are as they were.

    Raises PictureError where everything is a hole.
    """
    if hole.all():
        raise PictureError("The picture is nothing but a hole: there are no colours to fill it with.")
    margin = REACH + 1  # nothing looks further
    around = ((margin, margin), (margin, margin))
    values = np.pad(picture.astype(np.float32), (*around, (0, 0))).reshape(-1, 3)
    known = np.pad(~hole, around).ravel()
    width = hole.shape[1] + 2 * margin
    for pixels in _waves(_from_the_rim(np.pad(hole, around), known), len(known), width):
        values[pixels] = _continued(values, known, pixels, width)
        known[pixels] = True
    filled = values.reshape(-1, width, 3)[margin:-margin, margin:-margin]
    return np.where(hole[..., None], np.rint(filled).astype(np.uint8), picture)


def _waves(order: Iterable[int], count: int, width: int) -> list[np.ndarray]:
    """Pixels in groups that can be filled at once: the result is, bit for bit, that of one after the other in `order`.

    A pixel comes after all that it sees and that precede it, and so before all that it must not see yet.
    """
    seen = _SEEN[:, 0] * width + _SEEN[:, 1]
    wave = np.zeros(count, np.int32)
    groups: list[list[int]] = []
    for pixel in order:
        number = wave[pixel] = wave[pixel + seen].max() + 1
        if number > len(groups):
            groups.append([])
        groups[number - 1].append(pixel)
    return [np.array(group) for group in groups]


def _from_the_rim(hole: np.ndarray, known: np.ndarray) -> Iterator[int]:
    """The pixels of a hole, bool [H,W], nearest to the rim first, as indices of the flattened picture.

    known: bool [H*W]; what is neither known nor hole is a margin, beyond which nothing spreads.
    """
    width = hole.shape[1]
    waiting = hole.ravel().tolist()
    distance = np.where(known, 0.0, math.inf).tolist()
    rim = [i for i in np.flatnonzero(known).tolist() if any(waiting[j] for j in _neighbours(i, width))]
    front = [(0.0, order, pixel) for order, pixel in enumerate(rim)]  # sorted, as a heap is
    order = len(front)
    while front:
        _, _, pixel = heapq.heappop(front)
        for reached in _neighbours(pixel, width):
            if waiting[reached]:
                above, left, below, right = (distance[i] for i in _neighbours(reached, width))
                distance[reached] = _arrival(min(above, below), min(left, right))
                waiting[reached] = False
                yield reached
                heapq.heappush(front, (distance[reached], order, reached))  # of equals the first comes first
                order += 1


def _neighbours(pixel: int, width: int) -> tuple[int, int, int, int]:
    return pixel - width, pixel - 1, pixel + width, pixel + 1


def _arrival(vertical: float, horizontal: float) -> float:
    """The distance of a pixel from those of its nearest neighbours on both axes (the eikonal equation)."""
    low, high = min(vertical, horizontal), max(vertical, horizontal)
    if high - low >= 1:
        return low + 1
    return (low + high + math.sqrt(2 - (high - low) ** 2)) / 2


def _continued(values: np.ndarray, known: np.ndarray, pixels: np.ndarray, width: int) -> np.ndarray:
    """What N pixels should be, float32 [N,3]. values float32 [H*W,3], known bool [H*W]."""
    near = pixels[:, None] + _OFFSETS[:, 0] * width + _OFFSETS[:, 1]  # [N,28]
    colors = values[near]  # [N,28,3]
    slope_down, slope_right = (_slope(values, known, near, colors, step) for step in (width, 1))
    along = np.abs(_DOWN * slope_right - _RIGHT * slope_down)  # across the slope brightness stays the same
    steepness = _LENGTH * np.hypot(slope_down, slope_right)
    direction = np.where(along <= _FLAT, _NO_DIRECTION, along / np.maximum(steepness, _FLAT))
    weights = _NEARNESS * direction * known[near][..., None]
    return (weights * colors).sum(axis=1) / weights.sum(axis=1)


def _slope(values: np.ndarray, known: np.ndarray, near: np.ndarray, colors: np.ndarray, step: int) -> np.ndarray:
    """How much the pixels `near`, of `colors`, differ from their known neighbours on one axis, float32 [N,28,3].

    Without regard to the sign, as in OpenCV; a lone neighbour counts twice.
    """
    before, after = known[near - step][..., None], known[near + step][..., None]
    both = np.abs(values[near - step] - colors) * before + np.abs(values[near + step] - colors) * after
    return both * np.where(before & after, 1, 2)
