"""Procedural pictures of one named shape: a picture, the shape's exact mask, and words for it.

What instance segmentation with captions is to SmartBrush's recipe, drawn by the painter of `scenes`: a shape of a
known class, colour and finish before a background, sometimes with other shapes behind it. Everything is a function of
the seed; the scene does not depend on the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .scenes import (
    Draw,
    Frame,
    Light,
    Material,
    Part,
    Pose,
    SceneObject,
    Shape,
    box,
    draw_backdrop,
    ellipse,
    object_view,
    polygon,
    ring,
    union,
)

_STREAM = 7  # of the seed's random streams; `scenes` uses 0 to 6
_LIGHT = Light(1, 1, 1, slope_x=0, slope_y=0, towards_x=0, towards_y=-1)  # neutral, so that colours keep their names

Colour = tuple[float, float, float]

COLOURS: dict[str, tuple[Colour, Colour]] = {
    "red": ((0.87, 0.10, 0.10), (0.62, 0.04, 0.06)),
    "orange": ((0.98, 0.54, 0.06), (1.00, 0.72, 0.34)),
    "yellow": ((0.98, 0.88, 0.10), (0.86, 0.74, 0.02)),
    "green": ((0.13, 0.65, 0.20), (0.40, 0.84, 0.42)),
    "blue": ((0.12, 0.28, 0.86), (0.42, 0.56, 0.98)),
    "purple": ((0.52, 0.16, 0.72), (0.72, 0.44, 0.90)),
    "pink": ((0.98, 0.58, 0.76), (0.98, 0.78, 0.88)),
    "brown": ((0.48, 0.28, 0.12), (0.34, 0.17, 0.05)),
    "black": ((0.07, 0.07, 0.08), (0.27, 0.27, 0.29)),
    "grey": ((0.52, 0.52, 0.53), (0.38, 0.38, 0.39)),
    "white": ((0.97, 0.97, 0.96), (0.80, 0.80, 0.82)),
}
"""Name -> the colour, and the shade its patterns have beside it; channels 0..1."""

FINISHES = {"plain": "solid", "striped": "stripes", "checked": "checks", "dotted": "dots"}
"""Word -> pattern of a `scenes.Material`."""


def _star() -> Shape:
    """Five kites from the tips across the middle: they overlap, so that no seam shows."""
    tips = [math.radians(-90 + 72 * k) for k in range(5)]

    def at(radius: float, angle: float) -> tuple[float, float]:
        return radius * math.cos(angle), radius * math.sin(angle)

    inner, half_turn = 0.45, math.radians(36)
    kites = [(at(1, a), at(inner, a + half_turn), at(-0.3, a), at(inner, a - half_turn)) for a in tips]
    return union(*(polygon(*kite) for kite in kites))


def _heart() -> Shape:
    """Two discs and the quadrilateral of their tangents from the point below."""
    middle, radius, tip = (0.45, -0.35), 0.5, 0.95
    away_x, away_y = -middle[0], tip - middle[1]
    reach = math.hypot(away_x, away_y)
    cos, sin = radius / reach, -math.sqrt(1 - (radius / reach) ** 2)
    x = middle[0] + radius * (away_x * cos - away_y * sin) / reach
    y = middle[1] + radius * (away_x * sin + away_y * cos) / reach
    lobes = (ellipse(side * middle[0], middle[1], radius, radius) for side in (-1, 1))
    return union(*lobes, polygon((0, tip), (x, y), (0, -0.45), (-x, y)))


SHAPES: dict[str, Callable[[], Shape]] = {
    "disc": partial(ellipse, 0, 0, 0.85, 0.85),
    "square": partial(box, 0, 0, 0.8, 0.8),
    "triangle": partial(polygon, (0, -0.95), (0.95, 0.8), (-0.95, 0.8)),
    "star": _star,
    "heart": _heart,
    "cross": lambda: union(box(0, 0, 0.95, 0.33), box(0, 0, 0.33, 0.95)),
    "ring": partial(ring, 0, 0, 0.68, 0.68, 0.24),
    "diamond": partial(polygon, (0, -1), (0.66, 0), (0, 1), (-0.66, 0)),
}
"""Word -> the shape in its own units, about -1..1."""


@dataclass(frozen=True)
class Look:
    """What a shape is called: keys of `SHAPES`, `COLOURS` and `FINISHES`."""

    shape: str
    colour: str
    finish: str

    @property
    def label(self) -> str:
        """The class alone, "a disc"."""
        return f"a {self.shape}"

    @property
    def coloured(self) -> str:
        """Without the finish, "a red disc"."""
        return f"{_article(self.colour)} {self.colour} {self.shape}"

    @property
    def caption(self) -> str:
        """All of it, "a red striped disc"."""
        return f"{_article(self.colour)} {self.colour} {self.finish} {self.shape}"


@dataclass(frozen=True)
class ShapeScene:
    """A drawn picture of S x S pixels and what is known of it.

    picture: uint8 [S,S,3]; background: the same without the shape. mask: bool [S,S], the shape's own pixels.
    text: one of the look's three phrases, the caption most often.
    """

    picture: np.ndarray
    background: np.ndarray
    mask: np.ndarray
    text: str
    look: Look


def draw_shape(seed: int, size: int = 64) -> ShapeScene:
    """The scene of a seed; those from `scenes.HELD_OUT_SEED` on are never learned from."""
    draw = Draw(seed, _STREAM)
    look = _draw_look(draw, ())
    thing, pose = _draw_thing(draw, look), _draw_pose(draw, 0.34, 0.86)
    others = [_draw_look(draw, (look,)) for _ in range(draw.pick((0, 0, 0, 1, 2)))]
    behind = [(_draw_thing(draw, other), _draw_pose(draw, 0.18, 0.34)) for other in others]
    text = draw.pick((look.caption, look.caption, look.caption, look.coloured, look.label))
    backdrop = draw_backdrop(draw, 1.0, COLOURS[look.colour])
    frame = Frame(size)
    frame.backdrop(backdrop, _LIGHT)
    for one, place in behind:
        _paint(frame, one, place)
    frame.parts[:] = 0
    background = (np.clip(frame.image, 0, 1) * 255 + 0.5).astype(np.uint8)
    _paint(frame, thing, pose)
    picture, parts, _ = frame.finish(_LIGHT)
    return ShapeScene(picture, np.ascontiguousarray(background.transpose(1, 2, 0)), parts > 0, text, look)


def nearest_colour(rgb: Sequence[float]) -> str:
    """The name in `COLOURS` whose colour or shade, or what lies between them, is nearest to 0..1 channels."""
    return min(COLOURS, key=lambda name: _distance(np.asarray(rgb, np.float64), *np.array(COLOURS[name], np.float64)))


def _distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """From a point to a line segment, all [3]."""
    along = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return float(np.linalg.norm(point - start - along * (end - start)))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _draw_look(draw: Draw, unlike: Sequence[Look]) -> Look:
    """Any look whose class and colour none of the others has."""
    shapes = [name for name in SHAPES if all(name != other.shape for other in unlike)]
    colours = [name for name in COLOURS if all(name != other.colour for other in unlike)]
    return Look(draw.pick(shapes), draw.pick(colours), draw.pick(tuple(FINISHES)))


def _draw_thing(draw: Draw, look: Look) -> SceneObject:
    angle = math.radians(draw.pick((0, 45, 90, 135)) + draw.around(10))
    material = Material(
        kind=FINISHES[look.finish],
        colours=np.array(COLOURS[look.colour], np.float32).T.copy(),
        width=draw.uniform(0.28, 0.36),
        direction=(math.cos(angle), math.sin(angle)),
        shift=(draw.uniform(0, 1), draw.uniform(0, 1)),
        grid=np.zeros((8, 8), np.float32),  # of noise alone
    )
    return SceneObject((Part(SHAPES[look.shape](), material, index=1, base=0.5, relief=0.1),), (0.0, 0.0), 1.0)


def _draw_pose(draw: Draw, smallest: float, largest: float) -> Pose:
    return Pose(
        degrees=draw.around(15),  # more, and a square would be a diamond
        fill=draw.uniform(smallest, largest),
        place_x=draw.around(1),
        place_y=draw.around(1),
        shear=draw.around(0.05),
        stretch=draw.around(0.1),
        tilt_x=0.0,
        tilt_y=0.0,
        mirror=1,
    )


def _paint(frame: Frame, thing: SceneObject, pose: Pose) -> None:
    view = object_view(pose, thing, frame.size)
    for part in thing.parts:
        frame.part(part, view, _LIGHT, thing.half)
