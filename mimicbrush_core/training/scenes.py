"""Procedural frame pairs: one small scene seen twice, with everything about it known.

A pair is what two frames of a video are to the paper's recipe: the same object in another pose, under another
light, before another background. Because the scene is drawn here, the part of every pixel and the depth come
for free, and so does the truth of an edit between two different objects (`render_between_objects`).

How a picture is made:

* A *shape* is a signed distance function (negative inside) with bounds, in object units (x right, y down).
* A *part* is a shape with a *material*, evaluated around the part's centre: patterns move with the object.
* An *object* is a list of parts in painter's order, made by a class builder (the table `_BUILDERS`).
* A *pose* places the object in the frame (a 3x3 matrix), a *light* shades it, a *backdrop* is behind it.

To add a class: write a builder `_name(draw)` that returns its shapes in painter's order (always the same
number of them, in the same order: a part's index is its name), enter it in `_BUILDERS` and add the name at
the end of `CLASSES`. Any change of the draws changes the scenes of all seeds, the held-out ones too.

Everything is a function of the seed. Array arithmetic keeps to + - * /, floor, sqrt and comparisons, which
are exactly rounded everywhere; sin, cos and matrix products, which may differ in the last bit between
machines, are used on single numbers only.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from ..masks import bounding_box, grown

CLASSES = ("mug", "fish", "house", "shoe", "flower", "bottle", "car", "butterfly", "face")
HELD_OUT_SEED = 1_000_000_000  # seeds from here on are never used in training
MIN_PART_SHARE = 0.015  # of all pixels: a part that large can be masked and judged on its own

_KEY = 0x5CE7E5  # first number of every random stream of this module; a new one makes other scenes
_OBJECT, _OTHER_OBJECT, _POSE, _LIGHT, _BACKDROP, _CHOICE, _TEXTURED = range(7)  # the streams of one seed
_TEXTURED_SHARE = 0.62  # of all parts of an object, at Difficulty.texture = 1: more is hard to read
_TEXTURED_REGIONS = 0.85  # of all regions of a textured scene, likewise
_TEXTURED_BACKDROPS = 0.45  # of all backgrounds, likewise

Array = np.ndarray
Colour = tuple[float, float, float]
Bounds = tuple[float, float, float, float]  # x0, y0, x1, y1
Rendered = tuple[Array, Array, Array]  # one frame: image, parts, depth


@dataclass(frozen=True)
class Difficulty:
    """How far frame B may be from frame A; each number in 0..1 (the curriculum turns them up with time).

    pose: rotation, scale, position, flip, shear, perspective and aspect.
    light: exposure, tint, direction and gradient.
    background: chance that B stands before another background.
    texture: share of patterned materials (0: solid and gradient only); the same in both frames.
    With pose = light = background = 0 the reference equals the source bit for bit.
    """

    pose: float = 1.0
    light: float = 1.0
    background: float = 1.0
    texture: float = 1.0


FULL_DIFFICULTY = Difficulty()
CLIP_LIKE = Difficulty(pose=0.5, light=0.5, background=0.5, texture=0.3)
"""As two frames of one clip (the recipe drops pairs that are too different), on objects of mostly plain materials.
Models are judged on it; patterns have a set of their own, the textured scenes."""


@dataclass(frozen=True)
class FramePair:
    """Two frames with their annotations; S is the side in pixels.

    source, reference: uint8 [S, S, 3], frame A and frame B.
    parts, reference_parts: uint8 [S, S], 0 the background, 1..n the parts; the same index is the same part.
    depth, reference_depth: float32 [S, S] in 0..1, relative inverse depth (nearer is larger).
    class_name: one of `CLASSES`, or "textured".
    truth: uint8 [S, S, 3], what a perfect edit gives: the source itself, except between objects.
    moved: the 3x3 matrix that takes the object's pixels in the source to the reference; between objects about so.
    """

    source: Array
    reference: Array
    parts: Array
    reference_parts: Array
    depth: Array
    reference_depth: Array
    class_name: str
    truth: Array
    moved: Matrix


# ---------------------------------------------------------------------------------------------- random draws


class Draw:
    """Short names for single draws from one of a seed's independent streams."""

    def __init__(self, seed: int, stream: int) -> None:
        self._rng = np.random.default_rng((_KEY, int(seed), stream))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._rng.random()

    def around(self, half_range: float) -> float:
        return self.uniform(-half_range, half_range)

    def chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number from low..high, both included."""
        return min(high, low + int(self._rng.random() * (high - low + 1)))

    def pick(self, options: Sequence):
        return options[self.integer(0, len(options) - 1)]

    def grid(self, rows: int, columns: int) -> Array:
        return self._rng.random((rows, columns), dtype=np.float32)


def _colour(draw: Draw) -> Colour:
    """A colour with channels 0..1: mostly vivid, sometimes pastel, sometimes nearly grey, white or black."""
    mood = draw.uniform(0, 1)
    hue = draw.uniform(0, 1)
    if mood < 0.65:
        return colorsys.hsv_to_rgb(hue, draw.uniform(0.65, 1.0), draw.uniform(0.5, 0.98))
    if mood < 0.87:
        return colorsys.hsv_to_rgb(hue, draw.uniform(0.2, 0.6), draw.uniform(0.65, 0.98))
    return colorsys.hsv_to_rgb(hue, draw.uniform(0.0, 0.15), draw.uniform(0.08, 0.97))


def _difference(a: Colour, b: Colour) -> float:
    """Distance of two colours, green counting most (0..1.73, as seen rather than as stored)."""
    return math.sqrt(0.8 * (a[0] - b[0]) ** 2 + 1.5 * (a[1] - b[1]) ** 2 + 0.7 * (a[2] - b[2]) ** 2)


def _contrasting_colour(draw: Draw, others: Sequence[Colour], enough: float) -> Colour:
    """The first of eight draws that is `enough` away from all others, or the farthest of them."""
    best, best_distance = (0.0, 0.0, 0.0), -1.0
    for _ in range(8):
        candidate = _colour(draw)
        distance = min((_difference(candidate, other) for other in others), default=2.0)
        if distance > best_distance:
            best, best_distance = candidate, distance
        if distance >= enough:
            break
    return best


# ---------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    """A region: distance(x, y) is float32, negative inside; bounds enclose the region."""

    distance: Callable[[Array, Array], Array]
    bounds: Bounds

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.bounds
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def half_size(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.bounds
        return (x1 - x0) / 2, (y1 - y0) / 2


def ellipse(cx: float, cy: float, rx: float, ry: float) -> Shape:
    """An axis-aligned ellipse (the distance is approximate away from the edge)."""

    def distance(x: Array, y: Array) -> Array:
        u, v = (x - cx) / rx, (y - cy) / ry
        level = np.sqrt(u * u + v * v)
        u, v = u / rx, v / ry
        return level * (level - 1) / np.maximum(np.sqrt(u * u + v * v), 1e-4)

    return Shape(distance, (cx - rx, cy - ry, cx + rx, cy + ry))


def box(cx: float, cy: float, hx: float, hy: float, corner: float = 0.0) -> Shape:
    """A rectangle of half sides hx, hy with rounded corners."""

    def distance(x: Array, y: Array) -> Array:
        u = np.abs(x - cx) - (hx - corner)
        v = np.abs(y - cy) - (hy - corner)
        outside_u, outside_v = np.maximum(u, 0), np.maximum(v, 0)
        outside = np.sqrt(outside_u * outside_u + outside_v * outside_v)
        return outside + np.minimum(np.maximum(u, v), 0) - corner

    return Shape(distance, (cx - hx, cy - hy, cx + hx, cy + hy))


def capsule(xa: float, ya: float, xb: float, yb: float, radius: float) -> Shape:
    """A thick line from a to b with round ends."""
    dx, dy = xb - xa, yb - ya
    length2 = max(dx * dx + dy * dy, 1e-6)

    def distance(x: Array, y: Array) -> Array:
        u, v = x - xa, y - ya
        along = np.clip((u * dx + v * dy) / length2, 0, 1)
        u, v = u - along * dx, v - along * dy
        return np.sqrt(u * u + v * v) - radius

    bounds = (min(xa, xb) - radius, min(ya, yb) - radius, max(xa, xb) + radius, max(ya, yb) + radius)
    return Shape(distance, bounds)


def polygon(*points: tuple[float, float]) -> Shape:
    """A convex polygon, corners in either turning sense (exact inside; outside, corners stay sharp)."""
    area2 = sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(points, points[1:] + points[:1], strict=True))
    corners = points if area2 > 0 else points[::-1]
    edges = []
    for (xa, ya), (xb, yb) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = max(math.sqrt((xb - xa) ** 2 + (yb - ya) ** 2), 1e-6)
        nx, ny = (yb - ya) / length, (xa - xb) / length
        edges.append((nx, ny, nx * xa + ny * ya))

    def distance(x: Array, y: Array) -> Array:
        result = None
        for nx, ny, offset in edges:
            side = x * nx + y * ny - offset
            result = side if result is None else np.maximum(result, side)
        return result

    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return Shape(distance, (min(xs), min(ys), max(xs), max(ys)))


def ring(cx: float, cy: float, rx: float, ry: float, thickness: float) -> Shape:
    """The line of an ellipse, `thickness` wide to either side."""
    line = ellipse(cx, cy, rx, ry)

    def distance(x: Array, y: Array) -> Array:
        return np.abs(line.distance(x, y)) - thickness

    x0, y0, x1, y1 = line.bounds
    return Shape(distance, (x0 - thickness, y0 - thickness, x1 + thickness, y1 + thickness))


def plane() -> Shape:
    """Everywhere; the bounds only have to reach beyond the frame in any pose."""
    return Shape(lambda x, y: np.full_like(x, -1.0), (-2.4, -2.4, 2.4, 2.4))


def rotated(shape: Shape, degrees: float) -> Shape:
    """The shape turned about the middle of its bounds."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    (cx, cy), (hx, hy) = shape.centre, shape.half_size

    def distance(x: Array, y: Array) -> Array:
        u, v = x - cx, y - cy
        return shape.distance(u * cos + v * sin + cx, v * cos - u * sin + cy)

    wide, high = abs(cos) * hx + abs(sin) * hy, abs(sin) * hx + abs(cos) * hy
    return Shape(distance, (cx - wide, cy - high, cx + wide, cy + high))


def union(*shapes: Shape) -> Shape:
    """All of the shapes as one."""

    def distance(x: Array, y: Array) -> Array:
        result = shapes[0].distance(x, y)
        for shape in shapes[1:]:
            result = np.minimum(result, shape.distance(x, y))
        return result

    corners = list(zip(*(shape.bounds for shape in shapes), strict=True))
    return Shape(distance, (min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3])))


def intersection(a: Shape, b: Shape) -> Shape:
    """What lies in both shapes."""

    def distance(x: Array, y: Array) -> Array:
        return np.maximum(a.distance(x, y), b.distance(x, y))

    low = [max(p, q) for p, q in zip(a.bounds[:2], b.bounds[:2], strict=True)]
    high = [min(p, q) for p, q in zip(a.bounds[2:], b.bounds[2:], strict=True)]
    return Shape(distance, (low[0], low[1], high[0], high[1]))


# --------------------------------------------------------------------------------------------- class builders
# Painter's order, about -1..1 in size (the pose normalises that). Sizes are chosen so that each part keeps
# about 1.5 % of the frame; a part's index is its place in the list, from 1.


def _mug(draw: Draw) -> list[Shape]:
    top, bottom = draw.uniform(0.5, 0.72), draw.uniform(0.45, 0.68)
    high = draw.uniform(0.65, 0.85)
    lip = draw.uniform(0.17, 0.24)
    body = polygon((-top, -high), (top, -high), (bottom, high), (-bottom, high))
    reach, tall = draw.uniform(0.36, 0.46), draw.uniform(0.34, 0.48)
    handle = ring((top + bottom) / 2, draw.around(0.1), reach, tall, 0.11)
    band = intersection(body, box(0, draw.uniform(0.0, 0.25), 1, draw.uniform(0.16, 0.26)))
    return [handle, body, band, ellipse(0, -high, top * 1.02, lip)]


def _fish(draw: Draw) -> list[Shape]:
    long, high = draw.uniform(0.7, 0.85), draw.uniform(0.42, 0.58)
    body = ellipse(0, 0, long, high)
    spread = draw.uniform(0.35, 0.55)
    tail = polygon((-long * 0.72, 0), (-1.25, -spread), (-1.25, spread))
    tip = -high - draw.uniform(0.34, 0.45)
    front, lean = draw.uniform(0.4, 0.5), draw.uniform(-0.45, 0.1)
    fin = polygon((front, -high * 0.6), (-0.6, -high * 0.5), (lean, tip))
    neck = draw.uniform(0.2, 0.32)
    head = intersection(body, ellipse(neck + 0.75, 0, 0.75, 0.9))
    belly = intersection(body, ellipse(-0.1, high * 1.15, 0.7, high * draw.uniform(0.8, 1.0)))
    eye_size = draw.uniform(0.16, 0.19)
    return [tail, fin, body, belly, head, ellipse(neck + 0.25, -high * 0.25, eye_size, eye_size)]


def _house(draw: Draw) -> list[Shape]:
    wide, top = draw.uniform(0.6, 0.78), draw.uniform(-0.25, -0.05)
    eaves = wide + draw.uniform(0.1, 0.22)
    peak = draw.uniform(-1.0, -0.8)
    side = draw.pick((-1, 1))
    chimney = box(side * wide * 0.68, peak * 0.72, 0.18, 0.36)
    ridge = draw.pick((0.01, 0.01, 0.3, 0.45))
    low = top + 0.03
    roof = polygon((-eaves, low), (-ridge, peak), (ridge, peak), (eaves, low))
    door_high = draw.uniform(0.27, 0.36)
    door = box(side * wide * 0.42, 0.82 - door_high, draw.uniform(0.16, 0.2), door_high, draw.pick((0, 0.12)))
    pane = draw.uniform(0.18, 0.22)
    window = box(-side * wide * 0.42, top + 0.42, pane, pane, draw.pick((0, 0, 0.17)))
    hidden = 0.06  # of the wall, below the roof: no gap between them
    wall = box(0, (0.82 + top - hidden) / 2, wide, (0.82 - top + hidden) / 2)
    return [chimney, wall, roof, door, window]


def _shoe(draw: Draw) -> list[Shape]:
    sole_high = draw.uniform(0.11, 0.16)
    ankle = draw.uniform(0.32, 0.42)
    top = draw.uniform(-0.75, -0.5)
    heel = -0.95 + ankle
    shaft = box(heel, (0.4 + top) / 2, ankle, (0.4 - top) / 2, 0.08)
    vamp = polygon((heel - ankle, 0.45), (heel, -0.3), (heel + ankle, -0.25), (0.75, 0.12), (0.85, 0.45))
    cap = ellipse(0.5, 0.45, draw.uniform(0.48, 0.56), draw.uniform(0.4, 0.5))
    toe = intersection(cap, box(0.5, 0.0, 0.8, 0.47))
    strap = rotated(box(0.02, 0.05, draw.uniform(0.12, 0.16), 0.45, 0.05), draw.uniform(10, 35))
    cuff = box(heel, top, ankle + 0.05, draw.uniform(0.14, 0.19), 0.08)
    sole = box(0.03, 0.45 + sole_high * 0.8, 1.08, sole_high, sole_high * 0.8)
    return [shaft, vamp, strap, toe, cuff, sole]


def _flower(draw: Draw) -> list[Shape]:
    count = draw.integer(5, 7)
    out, petal = draw.uniform(0.36, 0.42), draw.uniform(0.24, 0.29) * (5.6 / count) ** 0.5
    turn = draw.uniform(0, 2 * math.pi)
    angles = [turn + 2 * math.pi * k / count for k in range(count)]
    petals = union(*(ellipse(out * math.cos(a), -0.42 + out * math.sin(a), petal, petal) for a in angles))
    side = draw.pick((-1, 1))
    leaf = rotated(ellipse(side * 0.36, 0.42, 0.34, draw.uniform(0.15, 0.19)), -side * draw.uniform(15, 40))
    wide, base = draw.uniform(0.36, 0.48), draw.uniform(0.24, 0.34)
    pot = polygon((-wide, 0.7), (wide, 0.7), (base, 1.15), (-base, 1.15))
    heart = draw.uniform(0.21, 0.27)
    return [capsule(0, -0.1, 0, 0.8, 0.12), leaf, pot, petals, ellipse(0, -0.42, heart, heart)]


def _bottle(draw: Draw) -> list[Shape]:
    wide, neck = draw.uniform(0.4, 0.52), draw.uniform(0.19, 0.25)
    shoulder = draw.uniform(-0.3, -0.05)
    body = box(0, (1 + shoulder) / 2, wide, (1 - shoulder) / 2, 0.1)
    start, end, broad = shoulder - 0.25, shoulder + 0.1, wide * 0.96
    slope = polygon((-neck, start), (neck, start), (broad, end), (-broad, end))
    middle = draw.uniform(0.35, 0.55)
    label = intersection(body, box(0, middle, draw.pick((wide, wide * 0.75)), draw.uniform(0.2, 0.3), 0.03))
    cap = box(0, -0.85, neck + draw.uniform(0.05, 0.1), draw.uniform(0.15, 0.2), 0.06)
    return [union(box(0, -0.5, neck, 0.4), slope), body, label, cap]


def _car(draw: Draw) -> list[Shape]:
    roof_y = draw.uniform(-0.62, -0.48)
    back, front = draw.uniform(-0.75, -0.5), draw.uniform(0.3, 0.5)
    cabin = polygon((back - 0.12, 0.0), (back + 0.08, roof_y), (front - 0.22, roof_y), (front + 0.12, 0.0))
    split = (back + front) / 2 + draw.around(0.08)
    sill, top = -0.05, roof_y + 0.12
    right, left = split + 0.06, split - 0.06
    windscreen = polygon((right, sill), (right, top), (front - 0.25, top), (front - 0.02, sill))
    rear_window = polygon((left, sill), (left, top), (back + 0.15, top), (back + 0.02, sill))
    body = box(0, 0.14, 1.0, draw.uniform(0.22, 0.28), 0.13)
    wheel = draw.uniform(0.23, 0.29)
    base = draw.uniform(0.5, 0.62)
    wheels = [ellipse(x, 0.38, wheel, wheel) for x in (-base, base)]
    return [cabin, union(windscreen, rear_window), body, *wheels]


def _butterfly(draw: Draw) -> list[Shape]:
    out, up = draw.uniform(0.45, 0.55), draw.uniform(0.3, 0.42)
    wing_x, wing_y = draw.uniform(0.42, 0.52), draw.uniform(0.32, 0.42)
    tilt = draw.uniform(15, 45)
    low_x, low_y = draw.uniform(0.32, 0.42), draw.uniform(0.26, 0.34)
    spot = draw.uniform(0.17, 0.22)
    lower = union(*(rotated(ellipse(s * out * 0.75, 0.4, low_x, low_y), s * tilt) for s in (-1, 1)))
    upper = union(*(rotated(ellipse(s * out, -up, wing_x, wing_y), -s * tilt) for s in (-1, 1)))
    spots = union(*(ellipse(s * (out + 0.12), -up - 0.06, spot, spot * 0.9) for s in (-1, 1)))
    body = capsule(0, -0.45, 0, 0.6, draw.uniform(0.1, 0.14))
    return [lower, upper, spots, body, ellipse(0, -0.55, 0.23, 0.23)]


def _face(draw: Draw) -> list[Shape]:
    wide, high = draw.uniform(0.6, 0.7), draw.uniform(0.72, 0.82)
    hair = ellipse(0, -0.05, wide + draw.uniform(0.14, 0.22), high + draw.uniform(-0.1, 0.1))
    head = ellipse(0, 0.12, wide, high)
    brim = draw.uniform(-0.42, -0.3)
    crown = intersection(ellipse(0, brim, wide * 0.98, draw.uniform(0.55, 0.7)), box(0, brim - 1, 2, 1))
    hat = union(crown, box(0, brim, wide * draw.uniform(1.15, 1.4), 0.08, 0.07))
    apart, eye = draw.uniform(0.27, 0.33), draw.uniform(0.14, 0.18)
    eyes = union(*(ellipse(s * apart, 0.02, eye, eye * 1.1) for s in (-1, 1)))
    nose = ellipse(0, 0.31, draw.uniform(0.16, 0.19), draw.uniform(0.16, 0.2))
    smile = draw.uniform(0.28, 0.36)
    mouth = intersection(ellipse(0, 0.54, smile, draw.uniform(0.26, 0.32)), box(0, 1.56, 2, 1))
    return [hair, head, hat, eyes, nose, mouth]


_BUILDERS: dict[str, Callable[[Draw], list[Shape]]] = {
    "mug": _mug,
    "fish": _fish,
    "house": _house,
    "shoe": _shoe,
    "flower": _flower,
    "bottle": _bottle,
    "car": _car,
    "butterfly": _butterfly,
    "face": _face,
}


# ------------------------------------------------------------------------------------------------- materials


@dataclass(frozen=True)
class Material:
    """What a surface looks like, in the coordinates of the part that wears it.

    kind: a key of `_PATTERNS`. colours: float32 [3, n], channels 0..1. width: one stripe or dot in object
    units. direction: cosine and sine of the pattern's angle. shift: offset of the pattern in widths.
    grid: float32 [8, 8] values of the noise, repeating.
    """

    kind: str
    colours: Array
    width: float
    direction: tuple[float, float]
    shift: tuple[float, float]
    grid: Array


@dataclass(frozen=True)
class _Surface:
    """Where a material is asked for: u, v from the part's centre, its half size, pixels per unit."""

    u: Array
    v: Array
    half_size: tuple[float, float]
    pixels: float


def _turned(material: Material, at: _Surface) -> tuple[Array, Array]:
    """Pattern coordinates in widths, turned by the material's direction and shifted."""
    cos, sin = material.direction[0] / material.width, material.direction[1] / material.width
    return at.u * cos + at.v * sin + material.shift[0], at.v * cos - at.u * sin + material.shift[1]


def _mix(material: Material, amount: Array) -> Array:
    """From the first colour (amount 0) to the second (1)."""
    first, second = material.colours[:, 0, None, None], material.colours[:, 1, None, None]
    return first + amount * (second - first)


def _steps(material: Material, place: Array, sharpness: float, repeat: bool = True) -> Array:
    """One colour for every whole number of `place`, with an edge of one pixel between them."""
    place = place + 0.5 / sharpness  # the edge's ramp starts at a whole number: centre it there
    step = np.floor(place)
    edge = np.minimum((place - step) * sharpness, 1)
    count = material.colours.shape[1]
    step = step.astype(np.intp)
    if repeat:
        now, before = step % count, (step - 1) % count
    else:
        now, before = np.clip(step, 0, count - 1), np.clip(step - 1, 0, count - 1)
    old = material.colours[:, before]
    return old + edge * (material.colours[:, now] - old)


def _alternate(place: Array, sharpness: float) -> Array:
    """0 around the even numbers of `place`, 1 around the odd ones, antialiased."""
    half = place * 0.5
    wave = np.abs(half - np.floor(half) - 0.5)  # a triangle: 0 at odd numbers, 1/2 at even ones
    return np.clip((0.25 - wave) * (2 * sharpness) + 0.5, 0, 1)


def _solid(material: Material, at: _Surface) -> Array:
    return np.broadcast_to(material.colours[:, :1, None], (3, *at.u.shape))


def _gradient(material: Material, at: _Surface) -> Array:
    cos, sin = material.direction
    reach = abs(cos) * at.half_size[0] + abs(sin) * at.half_size[1]
    return _mix(material, np.clip((at.u * cos + at.v * sin) / (2 * reach) + 0.5, 0, 1))


def _stripes(material: Material, at: _Surface) -> Array:
    return _steps(material, _turned(material, at)[0], material.width * at.pixels)


def _checks(material: Material, at: _Surface) -> Array:
    p, q = _turned(material, at)
    sharpness = material.width * at.pixels
    a, b = _alternate(p, sharpness), _alternate(q, sharpness)
    return _mix(material, a + b - 2 * a * b)


def _dots(material: Material, at: _Surface) -> Array:
    p, q = _turned(material, at)
    p, q = p * 0.55, q * 0.55  # a cell holds one dot and the space around it
    row = np.floor(q)
    p = p + 0.5 * (row - 2 * np.floor(row * 0.5))  # every second row stands between the dots of the first
    p, q = p - np.floor(p) - 0.5, q - row - 0.5
    inside = 0.31 - np.sqrt(p * p + q * q)
    return _mix(material, np.clip(inside * (material.width / 0.55 * at.pixels) + 0.5, 0, 1))


def _noise(material: Material, at: _Surface) -> Array:
    p, q = _turned(material, at)
    p, q = p * 0.7, q * 0.7
    column, row = np.floor(p), np.floor(q)
    p, q = p - column, q - row
    p, q = p * p * (3 - 2 * p), q * q * (3 - 2 * q)
    left, top = column.astype(np.intp) & 7, row.astype(np.intp) & 7
    right, below = (left + 1) & 7, (top + 1) & 7
    grid = material.grid
    upper = grid[top, left] * (1 - p) + grid[top, right] * p
    lower = grid[below, left] * (1 - p) + grid[below, right] * p
    return _mix(material, np.clip((upper + (lower - upper) * q - 0.5) * 2.2 + 0.5, 0, 1))


def _bands(material: Material, at: _Surface) -> Array:
    """As many bands as colours, across the whole part (not repeated)."""
    along, reach = (at.u, at.half_size[0]) if material.shift[1] < 0.35 else (at.v, at.half_size[1])
    count = material.colours.shape[1]
    scale = count / (2 * reach)
    place = along * scale + (count / 2 + (material.shift[0] - 0.5) * 0.5)
    return _steps(material, place, at.pixels / scale, repeat=False)


def _rings(material: Material, at: _Surface) -> Array:
    u = at.u - (material.shift[0] - 0.5) * at.half_size[0]
    v = at.v - (material.shift[1] - 0.5) * at.half_size[1]
    return _steps(material, np.sqrt(u * u + v * v) / material.width, material.width * at.pixels)


_PATTERNS: dict[str, Callable[[Material, _Surface], Array]] = {
    "solid": _solid,
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "noise": _noise,
    "bands": _bands,
    "rings": _rings,
}
PLAIN = ("solid", "gradient")
TEXTURED = tuple(kind for kind in _PATTERNS if kind not in PLAIN)
_ON_SMALL_PARTS = ("stripes", "checks", "bands", "rings")  # readable with only two or three repeats


def _material(draw: Draw, kind: str, width: float, avoid: Sequence[Colour], contrast: float = 0.5) -> Material:
    """A material of this kind; its first colour keeps away from `avoid`, the others from each other."""
    count = {"solid": 1, "stripes": draw.pick((2, 2, 3)), "bands": draw.pick((2, 3, 3))}.get(kind, 2)
    colours = [_contrasting_colour(draw, avoid, 0.35)]
    while len(colours) < count:
        colours.append(_contrasting_colour(draw, colours, contrast))
    angle = draw.uniform(0, 2 * math.pi)
    return Material(
        kind=kind,
        colours=np.array(colours, np.float32).T.copy(),
        width=width,
        direction=(math.cos(angle), math.sin(angle)),
        shift=(draw.uniform(0, 1), draw.uniform(0, 1)),
        grid=draw.grid(8, 8),
    )


def _first_colour(material: Material) -> Colour:
    return tuple(material.colours[:, 0].tolist())


# --------------------------------------------------------------------------------------------------- objects


@dataclass(frozen=True)
class Part:
    shape: Shape
    material: Material
    index: int  # 0: belongs to the background
    base: float  # inverse depth of the part's rim
    relief: float  # how much nearer its middle is


@dataclass(frozen=True)
class SceneObject:
    parts: tuple[Part, ...]
    centre: tuple[float, float]
    half: float  # half size: what the pose scales to the wished share of the frame

    def with_material(self, index: int, material: Material) -> SceneObject:
        """The same object, one part of it made of something else."""
        parts = tuple(replace(p, material=material) if p.index == index else p for p in self.parts)
        return replace(self, parts=parts)

    def material(self, index: int) -> Material:
        return next(part.material for part in self.parts if part.index == index)


def _draw_kind(draw: Draw, patterned: float, small: bool) -> str:
    """A pattern with this probability, else a plain kind."""
    textured, plain = draw.chance(patterned), draw.pick(PLAIN)
    pattern = draw.pick(_ON_SMALL_PARTS if small else TEXTURED)
    return pattern if textured else plain


def _dress(
    draw: Draw, shapes: Sequence[Shape], half: float, patterned: float, unlike: SceneObject | None = None
) -> list[Part]:
    """Materials for the shapes, first colours apart from the parts before (and from the object `unlike`)."""
    parts: list[Part] = []
    for index, shape in enumerate(shapes, start=1):
        narrow = 2 * min(min(shape.half_size), half)
        width = min(draw.uniform(0.15, 0.27) * half, max(narrow / 2.4, 0.12 * half))
        avoid = [_first_colour(part.material) for part in parts[-4:]]
        if unlike is not None:
            avoid.append(_first_colour(unlike.material(index)))
        material = _material(draw, _draw_kind(draw, patterned, narrow < 0.45 * half), width, avoid)
        relief = 0.1 + 0.12 * min(narrow / half, 1)
        parts.append(Part(shape, material, index, 0.5 + 0.035 * index, relief))
    return parts


def _build_object(class_name: str, draw: Draw, texture: float, unlike: SceneObject | None = None) -> SceneObject:
    shapes = _BUILDERS[class_name](draw)
    x0, y0, x1, y1 = union(*shapes).bounds
    wide, high = (x1 - x0) / 2, (y1 - y0) / 2
    # Between the longer side and the mean of both: long thin objects may be longer, or their parts get tiny.
    half = 0.5 * max(wide, high) + 0.5 * math.sqrt(wide * high)
    parts = _dress(draw, shapes, half, _TEXTURED_SHARE * texture, unlike)
    return SceneObject(tuple(parts), ((x0 + x1) / 2, (y0 + y1) / 2), half)


# ------------------------------------------------------------------------------------------------------ pose

Matrix = tuple[tuple[float, float, float], ...]


def _product(a: Matrix, b: Matrix) -> Matrix:
    return tuple(tuple(sum(a[i][k] * b[k][j] for k in range(3)) for j in range(3)) for i in range(3))


def _inverse(m: Matrix) -> Matrix:
    (a, b, c), (d, e, f), (g, h, i) = m
    det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    rows = (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )
    return tuple(tuple(value / det for value in row) for row in rows)


def _project(m: Matrix, x: float, y: float) -> tuple[float, float]:
    w = m[2][0] * x + m[2][1] * y + m[2][2]
    return (m[0][0] * x + m[0][1] * y + m[0][2]) / w, (m[1][0] * x + m[1][1] * y + m[1][2]) / w


@dataclass(frozen=True)
class Pose:
    """How an object stands in the frame.

    degrees: rotation. fill: side of the object as a share of the frame's. place_x, place_y: -1..1 of the room
    left in the frame. shear, stretch, tilt_x, tilt_y: small numbers around 0 (tilt is perspective).
    mirror: 1 or -1.
    """

    degrees: float
    fill: float
    place_x: float
    place_y: float
    shear: float
    stretch: float
    tilt_x: float
    tilt_y: float
    mirror: int


def _draw_poses(draw: Draw, amount: float, fill: tuple[float, float]) -> tuple[Pose, Pose]:
    """Frame A's pose and frame B's; with amount 0 they are equal."""
    a = Pose(
        degrees=draw.around(18),
        fill=draw.uniform(*fill),
        place_x=draw.around(1),
        place_y=draw.around(1),
        shear=draw.around(0.05),
        stretch=draw.around(0.05),
        tilt_x=draw.around(0.04),
        tilt_y=draw.around(0.04),
        mirror=draw.pick((-1, 1)),
    )
    scale = 1 + amount * (draw.uniform(0.75, 1.3) - 1)
    b = Pose(
        degrees=a.degrees + amount * draw.around(35),
        fill=min(max(a.fill * scale, 0.85 * fill[0]), 1.06 * fill[1]),
        place_x=a.place_x + amount * (draw.around(1) - a.place_x),
        place_y=a.place_y + amount * (draw.around(1) - a.place_y),
        shear=a.shear + amount * draw.around(0.15),
        stretch=a.stretch + amount * draw.around(0.1),
        tilt_x=a.tilt_x + amount * draw.around(0.1),
        tilt_y=a.tilt_y + amount * draw.around(0.1),
        mirror=-a.mirror if draw.chance(0.15 * amount) else a.mirror,
    )
    return a, b


def object_view(pose: Pose, thing: SceneObject, size: int, inside: bool = True) -> Matrix:
    """Object units to pixels. `inside`: shrink and place the object so that all of it is in the frame."""
    cos, sin = math.cos(math.radians(pose.degrees)), math.sin(math.radians(pose.degrees))
    unit = 1 / thing.half
    cx, cy = thing.centre
    centred = ((pose.mirror * unit, 0.0, -pose.mirror * unit * cx), (0.0, unit, -unit * cy), (0.0, 0.0, 1.0))
    wide, high = 1 + pose.stretch, 1 - pose.stretch
    form = ((wide, pose.shear, 0.0), (0.0, high, 0.0), (pose.tilt_x, pose.tilt_y, 1.0))
    turn = ((cos, -sin, 0.0), (sin, cos, 0.0), (0.0, 0.0, 1.0))
    view = _product(turn, _product(form, centred))
    scale = pose.fill * size / 2
    if not inside:
        x, y = (size * (0.5 + 0.12 * place) for place in (pose.place_x, pose.place_y))
        return _product(_placing(scale, x, y), view)
    corners = [_project(view, x, y) for part in thing.parts for x, y in _corners(part.shape.bounds)]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    extent = max(max(xs) - min(xs), max(ys) - min(ys))
    scale = min(scale, 0.94 * size / extent)
    spot = []
    for low, high, place in ((min(xs), max(xs), pose.place_x), (min(ys), max(ys), pose.place_y)):
        room = 0.97 * size - scale * (high - low)
        spot.append(size / 2 + place * room / 2 - scale * (low + high) / 2)
    return _product(_placing(scale, *spot), view)


def _placing(scale: float, x: float, y: float) -> Matrix:
    return ((scale, 0.0, x), (0.0, scale, y), (0.0, 0.0, 1.0))


def _corners(bounds: Bounds) -> tuple[tuple[float, float], ...]:
    x0, y0, x1, y1 = bounds
    return (x0, y0), (x1, y0), (x0, y1), (x1, y1)


# --------------------------------------------------------------------------------------- light and background


@dataclass(frozen=True)
class Light:
    """Every number is one factor: red, green, blue (exposure times tint), slope over the frame, direction."""

    red: float
    green: float
    blue: float
    slope_x: float
    slope_y: float
    towards_x: float
    towards_y: float

    def blend(self, other: Light, amount: float) -> Light:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Light(*(a + amount * (b - a) for a, b in pairs))


def _draw_light(draw: Draw) -> Light:
    exposure = draw.uniform(0.74, 1.14)
    tint = [1 + draw.around(0.1) for _ in range(3)]
    slope, angle = draw.uniform(0, 0.24), draw.uniform(0, 2 * math.pi)
    # The light comes rather from above: -y.
    towards = math.radians(-90 + draw.around(75))
    return Light(
        *(exposure * channel for channel in tint),
        slope_x=slope * math.cos(angle),
        slope_y=slope * math.sin(angle),
        towards_x=math.cos(towards),
        towards_y=math.sin(towards),
    )


@dataclass(frozen=True)
class _Backdrop:
    """Background in frame coordinates (-1..1 over the frame): a material, blobs before it, and its depth."""

    material: Material
    blobs: tuple[Part, ...]
    far: float  # inverse depth at the top of the frame
    rise: float  # how much nearer the bottom is
    lean: float  # how much nearer the right side is than the left


def draw_backdrop(draw: Draw, texture: float, avoid: Sequence[Colour]) -> _Backdrop:
    """A calm background that contrasts with the object's colours."""
    textured = draw.chance(_TEXTURED_BACKDROPS * texture)
    pattern = draw.pick(("noise", "noise", "stripes", "checks", "dots"))
    kind = pattern if textured else draw.pick(("solid", "gradient", "gradient"))
    material = _material(draw, kind, draw.uniform(0.22, 0.45), avoid, contrast=0.3)
    if kind != "solid":  # faint: pull the other colours towards the first
        first = material.colours[:, :1]
        material = replace(material, colours=first + draw.uniform(0.2, 0.5) * (material.colours - first))
    blobs = []
    for _ in range(draw.pick((0, 0, 0, 1, 2))):
        side = (draw.uniform(0.08, 0.22), draw.uniform(0.08, 0.22))
        shape_of = draw.pick((ellipse, box))
        place = (draw.pick((-1, 1)) * draw.uniform(0.5, 0.9), draw.around(0.95))
        shape = rotated(shape_of(*place, *side), draw.around(40))
        surface = _material(draw, draw.pick(PLAIN), 0.2, [_first_colour(material)])
        blobs.append(Part(shape, surface, index=0, base=0.3, relief=0.06))
    return _Backdrop(
        material,
        tuple(blobs),
        far=draw.uniform(0.05, 0.12),
        rise=draw.uniform(0.0, 0.15),
        lean=draw.uniform(0.0, 0.05),
    )


# ------------------------------------------------------------------------------------------------- rendering


class Frame:
    """A frame being painted, float32; colour as [3, S, S] (long rows are faster than pixels of 3)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image = np.zeros((3, size, size), np.float32)
        self.depth = np.zeros((size, size), np.float32)
        self.parts = np.zeros((size, size), np.uint8)
        self.centres = np.arange(size, dtype=np.float32) + np.float32(0.5)

    def backdrop(self, backdrop: _Backdrop, light: Light) -> None:
        """Fill the frame with the background and its blobs."""
        half = self.size / 2
        x, y = np.broadcast_arrays(self.centres[None, :] / half - 1, self.centres[:, None] / half - 1)
        self.image[:] = _PATTERNS[backdrop.material.kind](backdrop.material, _Surface(x, y, (1.0, 1.0), half))
        self.depth[:] = backdrop.far + backdrop.rise * (y + 1) / 2 + backdrop.lean * (x + 1) / 2
        view = _placing(half, half, half)
        for blob in backdrop.blobs:
            self.part(blob, view, light, 1.0)

    def part(self, part: Part, view: Matrix, light: Light, half: float) -> None:
        """Paint one part over what is there, within its bounds in pixels."""
        window = self._window(part.shape, view)
        if window is None:
            return
        rows, columns = window
        back = _inverse(view)
        x, y = self.centres[None, columns], self.centres[rows, None]
        w = x * back[2][0] + (y * back[2][1] + back[2][2])
        px = (x * back[0][0] + (y * back[0][1] + back[0][2])) / w
        py = (x * back[1][0] + (y * back[1][1] + back[1][2])) / w
        pixels = _pixels_per_unit(view, part.shape.centre)
        distance = part.shape.distance(px, py)
        cover = np.clip(0.5 - distance * (pixels / 1.5), 0, 1)
        cover = cover * cover * (3 - 2 * cover)
        height, shade = _relief(distance, part, light, half, pixels)
        cx, cy = part.shape.centre
        surface = _Surface(px - cx, py - cy, part.shape.half_size, pixels)
        colour = _PATTERNS[part.material.kind](part.material, surface) * shade
        below = self.image[:, rows, columns]
        below += cover * (colour - below)
        depth = self.depth[rows, columns]
        depth += cover * (part.base + part.relief * height - depth)
        self.parts[rows, columns][cover >= 0.5] = part.index

    def _window(self, shape: Shape, view: Matrix) -> tuple[slice, slice] | None:
        corners = [_project(view, x, y) for x, y in _corners(shape.bounds)]
        limits = []
        for values in zip(*corners, strict=True):
            low, high = max(math.floor(min(values)) - 2, 0), min(math.ceil(max(values)) + 2, self.size)
            if high - low < 3:  # outside, or too little of it for the slope of the relief
                return None
            limits.append(slice(low, high))
        return limits[1], limits[0]

    def finish(self, light: Light) -> Rendered:
        """Apply the light's colour and slope; image uint8 [S, S, 3], parts, depth."""
        place = self.centres * (2 / self.size) - 1
        slope = 1 + (place[None, :] * light.slope_x + place[:, None] * light.slope_y)
        factors = np.array((light.red, light.green, light.blue), np.float32)
        bright = self.image * (slope * factors[:, None, None])
        image = (np.clip(bright, 0, 1) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(image.transpose(1, 2, 0)), self.parts, np.clip(self.depth, 0, 1)


def _pixels_per_unit(view: Matrix, at: tuple[float, float]) -> float:
    """Pixels per object unit around a point (the geometric mean over directions)."""
    (a, b, _), (d, e, _), (g, h, i) = view
    w = g * at[0] + h * at[1] + i
    x, y = _project(view, *at)
    det = (a - g * x) * (e - h * y) - (b - h * x) * (d - g * y)
    return math.sqrt(abs(det)) / abs(w)


def _relief(distance: Array, part: Part, light: Light, half: float, pixels: float) -> tuple[Array, Array]:
    """Height 0..1 of a pillow over the part, and the factor by which the light shades it."""
    rim = min(0.32 * half, 0.8 * min(part.shape.half_size))  # from the edge to where the pillow is flat
    inward = np.clip(distance * (-1 / rim), 0, 1)
    height = inward * (2 - inward)
    strength = 0.5 * rim * pixels  # differences of heights over 2 pixels, in units of the rim
    slope = np.zeros_like(height)
    slope[:, 1:-1] += (height[:, 2:] - height[:, :-2]) * (-strength * light.towards_x)
    slope[1:-1] += (height[2:] - height[:-2]) * (-strength * light.towards_y)
    return height, 1 + 0.15 * np.clip(slope, -1.6, 1.6)


def _render(
    thing: SceneObject, pose: Pose, light: Light, backdrop: _Backdrop, size: int, inside: bool = True
) -> Rendered:
    """One frame: image uint8 [S, S, 3], parts uint8 [S, S], depth float32 [S, S]."""
    frame = Frame(size)
    frame.backdrop(backdrop, light)
    view = object_view(pose, thing, size, inside)
    for part in thing.parts:
        frame.part(part, view, light, thing.half)
    return frame.finish(light)


# ----------------------------------------------------------------------------------------------- public pairs


def _draw_lights(seed: int, amount: float) -> tuple[Light, Light]:
    draw = Draw(seed, _LIGHT)
    a = _draw_light(draw)
    return a, a.blend(_draw_light(draw), amount)


def _draw_backdrops(seed: int, difficulty: Difficulty, *things: SceneObject) -> tuple[_Backdrop, _Backdrop]:
    draw = Draw(seed, _BACKDROP)
    avoid = [_first_colour(part.material) for thing in things for part in thing.parts]
    a = draw_backdrop(draw, difficulty.texture, avoid)
    another = draw.chance(difficulty.background)
    return a, draw_backdrop(draw, difficulty.texture, avoid) if another else a


_OBJECT_FILL = (0.62, 0.84)  # frame A's side of the object; frame B may go a little beyond
_MOVED_FILL = (0.36, 0.6)  # leaves room to move to
_FALL_OFF = 2.5  # how much steeper the light is there
_SHADOW = 0.09  # how far an object's shadow falls, as a share of the frame
_SHADOW_DEPTH = 0.55
_SCENE_FILL = (1.05, 1.3)  # textured scenes go over the edge


def _draw_first_object(seed: int, texture: float) -> tuple[str, SceneObject]:
    draw = Draw(seed, _OBJECT)
    class_name = draw.pick(CLASSES)
    return class_name, _build_object(class_name, draw, texture)


def _pair(a: Rendered, b: Rendered, class_name: str, truth: Array, moved: Matrix) -> FramePair:
    return FramePair(a[0], b[0], a[1], b[1], a[2], b[2], class_name, truth, moved)


def _moved(first: Matrix, second: Matrix) -> Matrix:
    """From the pixels of one view of an object to those of another."""
    return _product(second, _inverse(first))


def render_pair(seed: int, size: int = 128, difficulty: Difficulty = FULL_DIFFICULTY) -> FramePair:
    """One object seen twice. seed >= 0; the truth is the source. The scene does not depend on the size."""
    class_name, thing = _draw_first_object(seed, difficulty.texture)
    poses = _draw_poses(Draw(seed, _POSE), difficulty.pose, _OBJECT_FILL)
    lights = _draw_lights(seed, difficulty.light)
    backdrops = _draw_backdrops(seed, difficulty, thing)
    a, b = (_render(thing, poses[k], lights[k], backdrops[k], size) for k in range(2))
    return _pair(a, b, class_name, a[0], _moved(*(object_view(pose, thing, size) for pose in poses)))


def render_between_objects(
    seed: int, size: int = 128, difficulty: Difficulty = FULL_DIFFICULTY
) -> tuple[FramePair, int]:
    """Two different objects of one class, and the index of the part that the truth takes from the reference.

    The source equals that of `render_pair` up to the background. The truth is the source with that part's
    material taken from the reference's object, in the source's pose and light.
    """
    texture = difficulty.texture
    class_name, thing = _draw_first_object(seed, texture)
    other = _build_object(class_name, Draw(seed, _OTHER_OBJECT), texture, unlike=thing)
    poses = _draw_poses(Draw(seed, _POSE), difficulty.pose, _OBJECT_FILL)
    lights = _draw_lights(seed, difficulty.light)
    backdrops = _draw_backdrops(seed, difficulty, thing, other)
    a = _render(thing, poses[0], lights[0], backdrops[0], size)
    b = _render(other, poses[1], lights[1], backdrops[1], size)
    index = _large_part(Draw(seed, _CHOICE), a[1], b[1])
    edited = thing.with_material(index, other.material(index))
    repainted = _render(edited, poses[0], lights[0], backdrops[0], size)[0]
    # A part also shines faintly through the antialiased edges of the parts upon it: those pixels stay.
    truth = np.where(grown(a[1] == index, 2)[..., None], repainted, a[0])
    moved = _moved(object_view(poses[0], thing, size), object_view(poses[1], other, size))
    return _pair(a, b, class_name, truth, moved), index


@dataclass(frozen=True)
class MovedObject:
    """A scene before and after its object was moved, scaled and turned: same light, same background.

    original, target: uint8 [S, S, 3]. before, after: bool [S, S], where the object is in each.
    scale, degrees, x, y: the change of the object about the centre of its bounding box in `original`: larger, turned
    clockwise, then moved by pixels to the right and down.
    """

    original: Array
    target: Array
    before: Array
    after: Array
    scale: float
    degrees: float
    x: float
    y: float


def render_move(seed: int, size: int = 128, texture: float = CLIP_LIKE.texture) -> MovedObject:
    """One object of `render_pair`'s, smaller, seen before and after a move. seed >= 0.

    The light falls off across the frame and the object throws a shadow: neither moves along with its pixels.
    """
    _, thing = _draw_first_object(seed, texture)
    first, second = _draw_poses(Draw(seed, _POSE), 1.0, _MOVED_FILL)
    # What no user can do to a picture does not change: shear, perspective, the side it is seen from.
    second = replace(first, degrees=second.degrees, fill=second.fill, place_x=second.place_x, place_y=second.place_y)
    light, _ = _draw_lights(seed, 0.0)
    light = replace(light, slope_x=_FALL_OFF * light.slope_x, slope_y=_FALL_OFF * light.slope_y)
    backdrop, _ = _draw_backdrops(seed, replace(FULL_DIFFICULTY, background=0.0, texture=texture), thing)
    empty = Frame(size)
    empty.backdrop(backdrop, light)
    ground = empty.finish(light)[0]
    before, after = (_render(thing, pose, light, backdrop, size) for pose in (first, second))
    moved = _moved(object_view(first, thing, size), object_view(second, thing, size))
    box = bounding_box(before[1] > 0)
    centre = box.x + box.width / 2, box.y + box.height / 2
    x, y = _project(moved, *centre)
    down, across = moved[1][0] / moved[2][2], moved[0][0] / moved[2][2]
    return MovedObject(
        original=_with_shadow(before, ground, light),
        target=_with_shadow(after, ground, light),
        before=before[1] > 0,
        after=after[1] > 0,
        scale=math.hypot(down, across),
        degrees=math.degrees(math.atan2(down, across)),
        x=x - centre[0],
        y=y - centre[1],
    )


def _with_shadow(rendered: Rendered, ground: Array, light: Light) -> Array:
    """The frame with its object's soft shadow on the empty `ground` uint8 [S, S, 3], away from the light."""
    image, parts, _ = rendered
    size = len(parts)
    away = (round(-light.towards_x * _SHADOW * size), round(-light.towards_y * _SHADOW * size))
    thrown = Image.new("L", (size, size))
    thrown.paste(Image.fromarray(np.where(parts > 0, np.uint8(255), np.uint8(0))), away)
    shade = 1 - _SHADOW_DEPTH / 255 * np.asarray(thrown.filter(ImageFilter.BoxBlur(size / 40)), np.float32)
    darkened = (ground * shade[..., None] + 0.5).astype(np.uint8)
    return np.where(parts[..., None] > 0, image, darkened)


def _large_part(draw: Draw, parts: Array, reference_parts: Array) -> int:
    """A part that is large enough in both frames; if there is none, the one that comes closest."""
    counts = np.minimum(*(np.bincount(p.ravel(), minlength=256) for p in (parts, reference_parts)))
    counts[0] = 0
    large = np.flatnonzero(counts >= MIN_PART_SHARE * parts.size)
    return int(draw.pick(large)) if len(large) else int(counts.argmax())


def _random_shape(draw: Draw, reach: float) -> Shape:
    """Any simple shape, about `reach` in radius, somewhere around the middle."""
    cx, cy = draw.around(0.75), draw.around(0.75)
    rx, ry = reach * draw.uniform(0.7, 1.1), reach * draw.uniform(0.7, 1.1)
    kind = draw.pick(("ellipse", "box", "ring", "triangle", "capsule"))
    if kind == "ellipse":
        shape = ellipse(cx, cy, rx, ry)
    elif kind == "box":
        shape = box(cx, cy, rx, ry, draw.pick((0.0, 0.3)) * reach)
    elif kind == "ring":
        shape = ring(cx, cy, rx, rx, 0.35 * reach)
    elif kind == "triangle":
        shape = polygon((cx - rx * 1.2, cy + ry), (cx + rx * 1.2, cy + ry), (cx + draw.around(rx), cy - ry))
    else:
        shape = capsule(cx - rx, cy, cx + rx, cy, 0.5 * ry)
    return rotated(shape, draw.uniform(-90, 90))


def render_textured_scene(seed: int, size: int = 128, difficulty: Difficulty = FULL_DIFFICULTY) -> FramePair:
    """Overlapping patterned regions instead of an object, seen twice; class_name "textured".

    3 to 8 regions: region 1 is the plane behind, which moves with the rest, so no pixel has index 0 and
    Difficulty.background changes nothing here. Regions may be cut by the frame.
    """
    draw = Draw(seed, _TEXTURED)
    count = draw.integer(3, 8)
    # Large shapes first: the small ones would vanish below them.
    shapes = [plane()] + [_random_shape(draw, 0.62 - 0.3 * k / count) for k in range(1, count)]
    parts = _dress(draw, shapes, 1.0, _TEXTURED_REGIONS * difficulty.texture)
    ground = replace(parts[0], base=0.15, relief=0.0)
    parts = [ground] + [replace(p, base=0.25 + 0.07 * p.index, relief=min(p.relief, 0.15)) for p in parts[1:]]
    thing = SceneObject(tuple(parts), (0.0, 0.0), 1.0)
    poses = _draw_poses(Draw(seed, _POSE), difficulty.pose, _SCENE_FILL)
    lights = _draw_lights(seed, difficulty.light)
    backdrop = draw_backdrop(Draw(seed, _BACKDROP), 0.0, [])
    a, b = (_render(thing, poses[k], lights[k], backdrop, size, inside=False) for k in range(2))
    return _pair(a, b, "textured", a[0], _moved(*(object_view(pose, thing, size, inside=False) for pose in poses)))
