"""How the task of a small model grows while it is learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .hole_masks import MASK_SHARES
from .scenes import CLIP_LIKE, Difficulty


@dataclass(frozen=True)
class Curriculum:
    """How the task of imitation grows, in samples seen.

    identity: until then the reference is the source itself; full: from then on pairs differ as two frames of one
    clip do (`scenes.CLIP_LIKE`), and linearly less between the two.
    high_noise: the share of all timesteps, from the noisiest, that is trained at first: one step from noise to
    picture is plain regression, and correspondence is learned fastest there. Later the range grows to all, but
    `high_noise_samples` of the samples stay there.
    between_objects, textured_scenes: their share of the scenes. masks: see `hole_masks.MASK_SHARES`.
    first_scene: the number of the first scene, so that a later stage sees other ones.
    """

    identity: int = 12_000
    full: int = 40_000
    high_noise: float = 0.1
    high_noise_samples: float = 0.5
    between_objects: float = 0.15
    textured_scenes: float = 0.15
    masks: tuple[float, ...] = MASK_SHARES
    first_scene: int = 0

    def progress(self, sample: int) -> float:
        """0 while the task is identity, 1 when it is complete."""
        return min(1.0, max(0.0, (sample - self.identity) / max(1, self.full - self.identity)))

    def draw_timestep(self, rng: np.random.Generator, sample: int, count: int) -> int:
        """A timestep of 0..count-1, more often a noisy one."""
        spread = self.high_noise
        if rng.random() >= self.high_noise_samples:
            spread += (1 - spread) * self.progress(sample)
        return min(count - 1, int(count * (1 - spread * rng.random() ** 2)))

    def difficulty(self, sample: int) -> Difficulty:
        grown = self.progress(sample)
        return Difficulty(
            CLIP_LIKE.pose * grown, CLIP_LIKE.light * grown, CLIP_LIKE.background * grown, CLIP_LIKE.texture
        )
