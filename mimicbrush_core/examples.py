"""Bundled example sets: source, mask and reference, rendered on the spot, so that everything runs at once.

Their scenes come from seeds the embedded model was never trained on, fixed before it was: not a selection of good
results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .errors import ArgumentError
from .training.hole_masks import grown, maskable_parts, object_mask
from .training.scenes import CLIP_LIKE, HELD_OUT_SEED, FramePair, render_between_objects, render_move, render_pair
from .training.shapes import draw_shape

EXAMPLE_SIZE = 256


@dataclass(frozen=True)
class Example:
    """One set. kind: "part", "object" or "between objects", which have films, "move" or "shape"; seed: counted from
    the held-out seeds."""

    name: str
    title: str
    kind: str
    seed: int
    keep_shape: bool = False

    def render(self, size: int = EXAMPLE_SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source uint8 [S,S,3], mask float32 [S,S] with 1 = repaint, reference uint8 [S,S,3])."""
        sources, mask_list, reference = self.render_clip(1, size)
        return sources[0], mask_list[0], reference

    def render_clip(self, frames: int, size: int = EXAMPLE_SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A little film, in which the source's object moves: sources uint8 [N,S,S,3], masks float32 [N,S,S], and one
        reference uint8 [S,S,3]. One frame is the picture of `render`. Raises ArgumentError where there is no film."""
        if self.kind in _STILLS:
            return self._still(frames, size)
        pair, part = self._scene(size)
        if frames == 1:
            return pair.source[None], _masked(pair.parts, part, size)[None], pair.reference
        sources, mask_list = [], []
        for frame in range(frames):
            still = replace(CLIP_LIKE, pose=CLIP_LIKE.pose * frame / (frames - 1), light=0.0, background=0.0)
            moved = render_pair(HELD_OUT_SEED + self.seed, size, still)
            sources.append(moved.reference)
            mask_list.append(_masked(moved.reference_parts, part, size))
        return np.stack(sources), np.stack(mask_list), pair.reference

    def _still(self, frames: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One frame, in the form of a film."""
        if frames != 1:
            raise ArgumentError(f"{self.title!r} is one picture, not a film. Set frames to 1.")
        source, region, reference = _STILLS[self.kind](HELD_OUT_SEED + self.seed, size)
        return source[None], _generous(region, size)[None], reference

    def _scene(self, size: int) -> tuple[FramePair, int | None]:
        """The frames, and the part that is masked (None: the whole object)."""
        seed = HELD_OUT_SEED + self.seed
        if self.kind == "between objects":
            return render_between_objects(seed, size, CLIP_LIKE)
        pair = render_pair(seed, size, CLIP_LIKE)
        return pair, None if self.kind == "object" else _largest_part(pair.parts)


def _masked(parts: np.ndarray, part: int | None, size: int) -> np.ndarray:
    return _generous(object_mask(parts, 0) if part is None else parts == part, size)


def _generous(region: np.ndarray, size: int) -> np.ndarray:
    """A region bool [S,S] as a mask with some room around it, float32."""
    return grown(region, 2 * size // 128).astype(np.float32)


def _largest_part(parts: np.ndarray) -> int:
    candidates = maskable_parts(parts)
    return int(candidates[np.bincount(parts.ravel())[candidates].argmax()])


_Still = tuple[np.ndarray, np.ndarray, np.ndarray]


def _move(seed: int, size: int) -> _Still:
    """A thing with its shadow, its own pixels, and a picture of it somewhere else."""
    scene = render_move(seed, size)
    return scene.original, scene.before, scene.target


def _shape(seed: int, size: int) -> _Still:
    """A background, the pixels of a shape that is not there, and the picture with it."""
    scene = draw_shape(seed, size)
    return scene.background, scene.mask, scene.picture


_STILLS: dict[str, Callable[[int, int], _Still]] = {"move": _move, "shape": _shape}
"""kind -> (seed, size) -> (source, region bool [S,S], reference)."""

EXAMPLES = (
    Example("part", "A part: repaint it as in another view of the same thing", "part", 900_001),
    Example("object", "A whole object, from another view", "object", 900_002),
    Example("other", "A part of one thing, in the look of another thing's", "between objects", 900_003),
    Example(
        "texture",
        "Material only: the shape is kept by its depth",
        "between objects",
        900_004,
        keep_shape=True,
    ),
)

TO_MOVE = Example("move", "A thing to move somewhere else, with Coarse Edit", "move", 900_005)
"""For Magic Fixup; the sets of `EXAMPLES` are for what imitates a picture."""

TO_NAME = Example("shape", "A place for an orange plain star, with SmartBrush", "shape", 900_003)
"""For SmartBrush: the title has the words for what belongs there. This seed, unlike the others, was chosen, for its
shape: a star leaves much of its box free, so that what a mask's precision does is to be seen."""
