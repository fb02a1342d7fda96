"""Learning Magic Fixup, small: a rough collage of a moved object made to look as if it had been photographed.

Alzayer et al., arXiv 2403.13044: the pairs are two moments of one scene, the coarse edit is made of the first, and
the second is what it should have been. Here the scenes are drawn, with a light that falls off and a shadow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..attention import DetailReading, transformer_blocks
from ..encoders import encode_pictures
from ..evaluation.fixups import KINDS, collage, evaluate_fixups, fixup_sheet
from ..masks import grown, soft_latent_mask
from ..modules import FixupModules, resized
from ..references import write_features
from ..systems.magic_fixup import MagicFixup, prepare_coarse
from .curriculum import Curriculum
from .objective import Denoising, error_inside, weighted_mean
from .scene_pool import ScenePool
from .scenes import render_move
from .trainer import Task, Validation


@dataclass(frozen=True)
class _Scene:
    """One encoded pair; latents [4,h,w], known and changed [1,h,w] in 0..1."""

    target: Tensor
    edit: Tensor
    original: Tensor
    known: Tensor
    changed: Tensor


class FixupTask(Task):
    """Denoise the true frame beside its collage, looking at the original noised as much.

    Learned: synthesizer and detail extractor. Loss: the model's own prediction target (v or epsilon), weighted towards
    what changed (the original weights nothing: ours is to learn from fewer samples). The original's dropped edits
    serve a guidance that is off in its inference; ours never drops any.
    """

    outside_weight = 0.25
    validation_cases = 16

    def __init__(
        self,
        modules: FixupModules,
        config: dict,
        seed: int,
        size: int | None = None,
        curriculum: Curriculum | None = None,
        held: int = 1024,
        echo: int = 8,
    ):
        """size: of the pictures; default: the model's. held, echo: as for `ScenePool`."""
        self.modules, self.seed = modules, seed
        self.learned = {"unet": modules.unet, "detail_extractor": modules.detail_extractor}
        self.size = size or config["defaults"]["size"]
        self.name = f"fixup_{self.size}"
        self.config = resized(config, self.size)
        self.curriculum = curriculum or Curriculum(identity=0, full=20_000)
        self.device = modules.unet.device
        self.denoising = Denoising(config["scheduler"], self.device)
        self.scenes = ScenePool(self._render, held, echo)
        self._reading: DetailReading | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        with DetailReading(self.modules.unet) as reading:
            self._reading = reading
            try:
                yield
            finally:
                self._reading = None

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        scenes = self.scenes.of(indices)
        timesteps, noise, reference_noise = self._draws(indices, scenes[0].target.shape)
        target, edit, original, known, changed = (
            torch.stack([getattr(scene, field) for scene in scenes]).to(self.device)
            for field in ("target", "edit", "original", "known", "changed")
        )
        unet = self.modules.unet
        noised = self.denoising.noised(original, reference_noise, timesteps)
        detail_input = torch.cat([noised, original, known], dim=1)  # [B,9,h,w]
        self._reading.features = write_features(
            self.modules.detail_extractor, detail_input, timesteps, None, transformer_blocks
        )
        model_input = torch.cat([self.denoising.noised(target, noise, timesteps), edit, known], dim=1)  # [B,9,h,w]
        predicted = unet(model_input.to(unet.dtype), timesteps, encoder_hidden_states=None).sample.float()
        error = (predicted - self.denoising.target(target, noise, timesteps)).square()
        return weighted_mean(error, self.outside_weight + changed), {"changed": error_inside(error.detach(), changed)}

    def validate(self) -> Validation:
        results = evaluate_fixups(MagicFixup(self.modules, self.config), self.validation_cases)
        return Validation({kind: float(results.values(kind).mean()) for kind in KINDS}, fixup_sheet(results))

    def _draws(self, indices: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps int64 [B], and noise [B,4,h,w] for the frame and for the original."""
        timesteps, noise = [], []
        for index in indices:
            rng = np.random.default_rng((self.seed, 3, index))
            timesteps.append(self.curriculum.draw_timestep(rng, index, len(self.denoising.alphas)))
            noise.append(rng.standard_normal((2, *shape), dtype=np.float32))
        drawn = torch.from_numpy(np.stack(noise)).to(self.device)  # [B,2,4,h,w]
        return torch.tensor(timesteps, device=self.device), drawn[:, 0], drawn[:, 1]

    def _render(self, numbers: dict[int, int]) -> list[_Scene]:
        pictures, known, changed = [], [], []
        for number in numbers:
            scene = render_move(number, self.size)
            rough = int(np.random.default_rng((self.seed, 5, number)).integers(3))
            filled, alpha = prepare_coarse(collage(scene, rough), self.size)
            pictures += [scene.target, filled, scene.original]
            known.append(alpha.astype(np.float32) / 255)
            changed.append(grown(scene.before | scene.after, self.size // 8).astype(np.float32))
        latents = encode_pictures(self.modules.vae, pictures).cpu().unflatten(0, (-1, 3))  # [N,3,4,h,w]
        factor = self.size // latents.shape[-1]
        known, changed = (
            soft_latent_mask(torch.from_numpy(np.stack(one))[:, None], factor) for one in (known, changed)
        )
        return [_Scene(*rows, known[n], changed[n]) for n, rows in enumerate(latents)]
