"""Bundled example sets: source, mask and reference, rendered on the spot, so that everything runs at once.

Their scenes come from seeds the embedded model was never trained on, fixed before it was: not a selection of good
results.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .training.hole_masks import grown, maskable_parts, object_mask
from .training.scenes import CLIP_LIKE, HELD_OUT_SEED, render_between_objects, render_pair

EXAMPLE_SIZE = 256


@dataclass(frozen=True)
class Example:
    """One set. kind: "part", "object" or "between objects"; seed: counted from the held-out seeds."""

    name: str
    title: str
    kind: str
    seed: int
    keep_shape: bool = False

    def render(self, size: int = EXAMPLE_SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source uint8 [S,S,3], mask float32 [S,S] with 1 = repaint, reference uint8 [S,S,3])."""
        seed = HELD_OUT_SEED + self.seed
        if self.kind == "between objects":
            pair, part = render_between_objects(seed, size, CLIP_LIKE)
            mask = pair.parts == part
        else:
            pair = render_pair(seed, size, CLIP_LIKE)
            whole = self.kind == "object"
            mask = object_mask(pair.parts, 0) if whole else pair.parts == _largest_part(pair.parts)
        return pair.source, grown(mask, 2 * size // 128).astype(np.float32), pair.reference


def _largest_part(parts: np.ndarray) -> int:
    candidates = maskable_parts(parts)
    return int(candidates[np.bincount(parts.ravel())[candidates].argmax()])


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
