"""Strong augmentation of training pictures: one projective warp and one colour jitter each.

The paper augments source and reference independently, with colour jitter, rotation, resizing, flipping and a
random projective transformation, and finds strong better than weak (arXiv 2406.07547, sections 3.3 and 4.3). Its
numbers are not published; those below are this project's.

All of the geometry is one projective matrix in *unit coordinates* (0..1 across the picture): it maps a point of
the result to the point of the picture that is shown there. So the same matrix serves pictures, segmentation maps
and points of any resolution.

The part that is shown always lies inside the picture: it is cropped, never filled. Black borders would be learned,
and mirrored borders would repeat things, so that the hole could be filled from its own picture's rim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

ROTATION = 30.0
"""Degrees to either side. This and the other limits hold at strength 1; at 0 nothing changes."""
PROJECTION = 0.15
"""How far each corner moves along each axis, in sides (below 0.25, so that it stays a convex view)."""
STRETCH = 0.2
"""Change of the ratio of width and height, to either side."""
SMALLEST_CROP = 0.6
"""The least side of what is shown, relative to the largest that fits."""
FLIP = 0.5
"""Chance of a horizontal flip. Not a vertical one: little that is photographed hangs upside down."""
BRIGHTNESS = CONTRAST = SATURATION = 0.3
"""Factors are drawn from 1 - x to 1 + x."""
HUE = 0.06
"""Turns of the colour wheel, to either side: a red stays a red, or the reference's colours would mean nothing."""

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_LUMA = _TO_YIQ[0]


@dataclass(frozen=True)
class Jitter:
    """Colour changes: three factors (1 = none) and a turn of the colour wheel (0 = none)."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def augment(
    rng: np.random.Generator, picture: np.ndarray, size: int, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """A drawn warp and jitter of a picture uint8 [H,W,3]: the result uint8 [size,size,3], and the warp [3,3]."""
    warp = draw_warp(rng, strength)
    return jitter_colours(warp_picture(picture, warp, size), draw_jitter(rng, strength)), warp


# --- geometry ----------------------------------------------------------------------------------------------


def draw_warp(rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """A random warp, float64 [3,3], from the result's unit coordinates to the picture's; strength 0..1.

    The same draws for every strength: with 0 they give the identity.
    """
    tilt = rng.uniform(-PROJECTION, PROJECTION, (4, 2))
    turn = np.radians(rng.uniform(-ROTATION, ROTATION)) * strength
    stretch = 1 + rng.uniform(-STRETCH, STRETCH) * strength
    crop = 1 - rng.uniform(0, 1 - SMALLEST_CROP) * strength
    flipped = rng.random() < FLIP * strength
    place = rng.random(2)

    corners = _CORNERS - 0.5 + strength * tilt
    corners = corners * (stretch**0.5, stretch**-0.5)
    cos, sin = np.cos(turn), np.sin(turn)
    corners = corners @ np.array([[cos, sin], [-sin, cos]])
    if flipped:
        corners = corners[[1, 0, 3, 2]]
    low, high = corners.min(0), corners.max(0)
    scale = crop / (high - low).max()
    room = 1 - scale * (high - low)
    return _homography(_CORNERS, scale * (corners - low) + place * room)


def _homography(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The projective matrix [3,3] that takes four points to four others, each [4,2]; its last entry is 1."""
    rows, values = [], []
    for (x, y), (u, v) in zip(start, end, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1).reshape(3, 3)


def is_mirrored(warp: np.ndarray) -> bool:
    """Whether the warp flips: what turned clockwise turns the other way in the result."""
    return bool(np.linalg.det(warp) < 0)


def warp_points(points: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Where points of the picture come to lie, both [N,2] as (x, y) in unit coordinates; outside 0..1 = cropped."""
    moved = np.column_stack([points, np.ones(len(points))]) @ np.linalg.inv(warp).T
    return moved[:, :2] / moved[:, 2:]


def warp_picture(picture: np.ndarray, warp: np.ndarray, size: int) -> np.ndarray:
    """What the warp shows of a picture uint8 [H,W,3], uint8 [size,size,3].

    Interpolated bicubically; a picture that is shown smaller is first resized to the result's scale, as Pillow's
    transformation does not antialias.
    """
    image = Image.fromarray(picture)
    shown = _mean_side(warp, image.size)
    if shown > size:
        resized = (max(1, round(side * size / shown)) for side in image.size)
        image = image.resize(tuple(resized), Image.Resampling.LANCZOS)
    return np.array(_transformed(image, warp, size, Image.Resampling.BICUBIC))


def warp_labels(labels: np.ndarray, warp: np.ndarray, size: int) -> np.ndarray:
    """What the warp shows of a segmentation map int32 [H,W], int32 [size,size]; labels are never mixed."""
    return np.array(_transformed(Image.fromarray(labels), warp, size, Image.Resampling.NEAREST))


def _transformed(image: Image.Image, warp: np.ndarray, size: int, resample: Image.Resampling) -> Image.Image:
    pixels = np.diag([*image.size, 1.0]) @ warp @ np.diag([1 / size, 1 / size, 1.0])
    coefficients = (pixels / pixels[2, 2]).ravel()[:8]
    return image.transform((size, size), Image.Transform.PERSPECTIVE, tuple(coefficients), resample)


def _mean_side(warp: np.ndarray, size: tuple[int, int]) -> float:
    """Side in pixels of a square with the area that the warp shows of a picture of `size` (width, height)."""
    corners = np.column_stack([_CORNERS, np.ones(4)]) @ warp.T
    x, y = (corners[:, :2] / corners[:, 2:] * size).T
    return (abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2) ** 0.5


# --- colour ------------------------------------------------------------------------------------------------


def draw_jitter(rng: np.random.Generator, strength: float = 1.0) -> Jitter:
    """Random colour changes; strength 0..1."""
    brightness, contrast, saturation, hue = rng.uniform(-strength, strength, 4)
    return Jitter(1 + BRIGHTNESS * brightness, 1 + CONTRAST * contrast, 1 + SATURATION * saturation, HUE * hue)


def jitter_colours(picture: np.ndarray, jitter: Jitter) -> np.ndarray:
    """The changes applied to a picture uint8 [H,W,3], in one step, so that it is clipped and rounded once.

    Brightness scales; contrast spreads around the mean brightness; saturation spreads around a pixel's own grey;
    hue turns about the grey axis (in YIQ).
    """
    angle = 2 * np.pi * jitter.hue
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    saturate = jitter.saturation * np.eye(3) + (1 - jitter.saturation) * np.ones((3, 1)) * _LUMA
    colours = jitter.contrast * jitter.brightness * saturate @ _FROM_YIQ @ turn @ _TO_YIQ
    mean = jitter.brightness * picture.reshape(-1, 3).mean(0) @ _LUMA
    affine = np.column_stack([colours, np.full(3, (1 - jitter.contrast) * mean)])
    return np.array(Image.fromarray(picture).convert("RGB", tuple(affine.ravel())))
