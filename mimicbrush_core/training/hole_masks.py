"""Masks for training: which part of the source is cut out and has to be imitated.

Every mask is bool [S,S], True = cut out. The grid is the paper's: N x N cells, N in 3..10, cells with matched
features masked with 75 %, others with 50 % (arXiv 2406.07547, section 3.3). A cell is matched where it holds a feature
that both frames show (`matching`) or, in drawn scenes, the object that both show.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..masks import bounding_box, grown

SMALLEST_PART = 0.008
"""Share of the picture below which a part is not masked on its own."""
MASK_SHARES = (0.32, 0.23, 0.25, 0.1, 0.1)
"""How often a drawn scene's mask is one part, the whole object, a grid, strokes, or the box around a part."""
LARGEST_SEGMENT = 0.6
"""Share of the picture above which a segment is not masked: it is the background rather than a thing."""


def draw_mask(rng: np.random.Generator, parts: np.ndarray, shares: tuple[float, ...] = MASK_SHARES) -> np.ndarray:
    """A mask of a random kind, as often as `shares` has it, for a source with part indices `parts` uint8 [S,S]; never
    empty. Where there is no background, a grid takes the place of the whole object."""
    kind = rng.choice(5, p=shares)
    if kind == 0:
        mask = part_mask(parts, int(rng.choice(maskable_parts(parts))), grow=int(rng.integers(0, 4)))
    elif kind == 1 and (parts == 0).any():
        mask = object_mask(parts, grow=int(rng.integers(1, 5)))
        if rng.random() < 0.4:
            mask = boxed(mask)
    elif kind in (1, 2):
        mask = grid_mask(rng, parts > 0)
    elif kind == 3:
        mask = stroke_mask(rng, parts.shape[0])
    else:
        mask = boxed(part_mask(parts, int(rng.choice(maskable_parts(parts))), grow=2))
    return mask if mask.any() else part_mask(parts, int(parts.max()), grow=2)


def maskable_parts(parts: np.ndarray) -> np.ndarray:
    """Indices of the parts that are large enough to be masked on their own."""
    counts = np.bincount(parts.ravel(), minlength=2)
    counts[0] = 0
    large = np.flatnonzero(counts >= SMALLEST_PART * parts.size)
    return large if len(large) else np.array([counts.argmax()])


def part_mask(parts: np.ndarray, index: int, grow: int = 2) -> np.ndarray:
    """One part, grown by some pixels."""
    return grown(parts == index, grow)


def object_mask(parts: np.ndarray, grow: int = 2) -> np.ndarray:
    """The whole object, grown by some pixels."""
    return grown(parts > 0, grow)


def boxed(mask: np.ndarray) -> np.ndarray:
    """The bounding box of a mask; an empty one stays empty."""
    box = np.zeros_like(mask)
    if mask.any():
        box[bounding_box(mask).slices] = True
    return box


def grid_mask(rng: np.random.Generator, matched: np.ndarray) -> np.ndarray:
    """The paper's grid: cells holding `matched` pixels are masked with 75 %, others with 50 %."""
    size = matched.shape[0]
    cells = int(rng.integers(3, 11))
    edges = np.linspace(0, size, cells + 1).round().astype(int)
    mask = np.zeros_like(matched)
    for top, bottom in zip(edges[:-1], edges[1:], strict=True):
        for left, right in zip(edges[:-1], edges[1:], strict=True):
            chance = 0.75 if matched[top:bottom, left:right].any() else 0.5
            mask[top:bottom, left:right] = rng.random() < chance
    return mask


def stroke_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    """Free-form strokes, as an artist paints them."""
    picture = Image.new("L", (size, size))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 4))):
        width = int(rng.integers(size // 12, size // 4))
        points = [tuple(rng.uniform(0.15 * size, 0.85 * size, 2))]
        for _ in range(int(rng.integers(2, 6))):
            x, y = points[-1] + rng.normal(0, 0.18 * size, 2)
            points.append((float(x), float(y)))
        draw.line(points, fill=255, width=width, joint="curve")
        for x, y in points:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return np.asarray(picture) > 0


def loose_mask(rng: np.random.Generator, thing: np.ndarray) -> np.ndarray:
    """A mask with room around an object bool [S,S]: a wider box, a bulging outline, or the object itself, grown.

    The first two are those of Paint by Example (arXiv 2211.13227, section 3.2, as its code draws them); the third is
    what artists draw.
    """
    kind = rng.integers(3)
    if kind == 0:
        return grown(thing, int(rng.integers(1, 5)))
    box = bounding_box(thing)
    height, width = thing.shape
    right, bottom = box.x + box.width, box.y + box.height
    # How far each side moves outward: up to 0.4 of the room it has.
    up, left, down, across = (
        int(rng.integers(0, 1 + int(0.4 * r))) for r in (box.y, box.x, height - bottom, width - right)
    )
    mask = np.zeros_like(thing)
    if kind == 1:
        mask[box.y - up : bottom + down, box.x - left : right + across] = True
        return mask
    middle_x, middle_y = box.x + box.width / 2, box.y + box.height / 2
    corners = [(box.x, box.y), (right, box.y), (right, bottom), (box.x, bottom)]
    pulls = [(middle_x, box.y - up), (right + across, middle_y), (middle_x, bottom + down), (box.x - left, middle_y)]
    outline = []
    for side in range(4):
        outline += _curve(rng, corners[side], pulls[side], corners[(side + 1) % 4], jitter=width / 100)
    picture = Image.fromarray(mask)
    ImageDraw.Draw(picture).polygon(outline, fill=1)
    return np.array(picture)


def _curve(rng: np.random.Generator, start, pull, end, jitter: float) -> list[tuple[float, float]]:
    """The corner `start`, and 18 shaken points of the quadratic Bezier curve from there to `end`."""
    u = np.arange(1, 19)[:, None] / 20
    points = (1 - u) ** 2 * np.array(start) + 2 * u * (1 - u) * np.array(pull) + u**2 * np.array(end)
    points += rng.uniform(-jitter, jitter, points.shape)
    return [tuple(start), *map(tuple, points.tolist())]


def segment_mask(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray | None:
    """One to three segments of a map int32 [S,S] (0 belongs to none), a little grown; None if none is fit.

    The paper's masks for still pictures (arXiv 2406.07547, section 3.3). Fit are segments that cover
    `SMALLEST_PART` to `LARGEST_SEGMENT` of the picture.
    """
    found, counts = np.unique(labels[labels != 0], return_counts=True)
    fit = found[(counts >= SMALLEST_PART * labels.size) & (counts <= LARGEST_SEGMENT * labels.size)]
    if not len(fit):
        return None
    chosen = rng.choice(fit, min(len(fit), int(rng.integers(1, 4))), replace=False)
    mask = np.isin(labels, chosen)
    # In small steps: a wide filter takes the square of its width.
    for _ in range(int(rng.integers(0, 1 + max(1, labels.shape[0] // 64)))):
        mask = grown(mask, 1)
    return mask
