"""Learning SmartBrush: an object painted into a mask, by words and by how literally the mask is to be taken.

Xie et al., arXiv 2212.05034. Where the paper's text is silent the choices are ours: the ladder of masks is
`masks.precise_mask`, and the picture is noised where the *coarse* mask is, not where the object is: else the noise
would show the exact shape, and the predicted mask would have nothing to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..encoders import encode_pictures
from ..errors import ArgumentError
from ..evaluation.smartbrush import brush_figures, brush_sheet, evaluate_brush
from ..masks import MAX_PRECISION_LEVEL, latent_coverage, precise_mask
from ..modules import SMARTBRUSH, BrushModules, resized
from ..systems.smartbrush import SmartBrush, composed
from ..text import encode_text, make_tokenizer
from .curriculum import Curriculum
from .dice import dice_loss
from .objective import Denoising, error_inside, weighted_mean
from .scene_pool import ScenePool
from .segments import Segment
from .shapes import draw_shape
from .trainer import Task, Validation

LOSS_REGIONS = ("mask", "full")
"""Where the error of the noise counts: where there is noise, or everywhere (as one reader of the paper notes it)."""

_VALIDATION_CASES = 24


@dataclass(frozen=True)
class Shares:
    """Of the samples: whole, text to image with a mask that is the whole picture; no_text, with empty words."""

    whole: float = 0.2
    no_text: float = 0.1


@dataclass(frozen=True)
class Weights:
    """Of the loss: mask, of the predicted mask's DICE beside the error of the noise; region, of `LOSS_REGIONS`."""

    mask: float = 0.01
    region: str = "mask"

    def __post_init__(self) -> None:
        if self.region not in LOSS_REGIONS:
            raise ArgumentError(f"Unknown loss region {self.region!r}. Choose one of: {', '.join(LOSS_REGIONS)}.")


@dataclass(frozen=True)
class _Scene:
    """One encoded segment: latents [4,h,w]; mask bool [S,S], the object's own pixels."""

    latents: Tensor
    mask: np.ndarray
    text: str


@dataclass(frozen=True)
class _Sample:
    """What one training sample makes of its scene.

    clean, noise [4,h,w]. mask [1,h,w] of 0 and 1: the cells that the coarse mask touches. target [1,h,w] in 0..1: how
    much of each the object covers. has_object: 1, or 0 for text to image, where no mask is known.
    """

    clean: Tensor
    noise: Tensor
    mask: Tensor
    target: Tensor
    has_object: Tensor
    timestep: Tensor
    level: Tensor
    text: str


class SmartBrushTask(Task):
    """Paint what the words say into a mask of any precision, and tell which of its cells the object takes.

    Learned: the U-Net; the text encoder only where `train_text` is set. Loss: of the model's own prediction target (v
    or epsilon) inside the coarse mask, plus the weighted DICE loss of the predicted mask.
    """

    def __init__(
        self,
        modules: BrushModules,
        config: dict,
        segments: Callable[[int], Segment],
        seed: int,
        *,
        train_text: bool = False,
        curriculum: Curriculum | None = None,
        shares: Shares | None = None,
        weights: Weights | None = None,
        held: int = 1,
        echo: int = 1,
        name: str = SMARTBRUSH,
        judge: Callable[[SmartBrush], Validation] | None = None,
    ):
        """segments: by their number. curriculum: of the timesteps; None: all alike. held, echo: as for `ScenePool`.
        judge: what validates the model, if anything does.
        """
        self.name = name
        self.modules, self.config, self.seed = modules, config, seed
        self.learned = {"unet": modules.unet}
        if train_text:
            self.learned["text_encoder"] = modules.text_encoder
        self.curriculum, self.shares, self.weights = curriculum, shares or Shares(), weights or Weights()
        self.tokenizer = make_tokenizer(config)
        self.device = modules.unet.device
        self.denoising = Denoising(config["scheduler"], self.device)
        self._segments, self._judge = segments, judge
        self._scenes = ScenePool(self._encode, held, echo)

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        samples = [self._draw(*one) for one in zip(self._scenes.of(indices), indices, strict=True)]
        clean, noise, mask, target = (self._gather(samples, name) for name in ("clean", "noise", "mask", "target"))
        timesteps, has_object = self._gather(samples, "timestep"), self._gather(samples, "has_object")
        noisy = composed(self.denoising.noised(clean, noise, timesteps), clean, mask)
        output = self._predict(noisy, mask, timesteps, samples)
        error = (output[:, :4] - self.denoising.target(clean, noise, timesteps)).square()
        weight = mask if self.weights.region == "mask" else torch.ones_like(mask)
        dice = dice_loss(output[:, 4:].sigmoid(), target)
        figures = {"inside": error_inside(error.detach(), mask)}
        if has_object.any():
            figures["dice"] = float((has_object * dice.detach()).sum() / has_object.sum())
        return weighted_mean(error, weight) + self.weights.mask * (has_object * dice).mean(), figures

    def validate(self) -> Validation | None:
        return None if self._judge is None else self._judge(SmartBrush(self.modules, self.config))

    def _predict(self, noisy: Tensor, mask: Tensor, timesteps: Tensor, samples: Sequence[_Sample]) -> Tensor:
        """The U-Net's noise (or v) and mask logits, float32 [B,5,h,w]."""
        unet = self.modules.unet
        token_ids = self.tokenizer([sample.text for sample in samples]).to(self.device)
        return unet(
            torch.cat([noisy, mask], dim=1).to(unet.dtype),
            timesteps,
            encoder_hidden_states=encode_text(self.modules.text_encoder, token_ids).to(unet.dtype),
            class_labels=self._gather(samples, "level"),
        ).sample.float()

    def _gather(self, samples: Sequence[_Sample], name: str) -> Tensor:
        return torch.stack([getattr(sample, name) for sample in samples]).to(self.device)

    # -- samples

    def _draw(self, scene: _Scene, index: int) -> _Sample:
        rng = np.random.default_rng((self.seed, 3, index))
        whole, no_text = rng.random() < self.shares.whole, rng.random() < self.shares.no_text
        level = MAX_PRECISION_LEVEL if whole else int(rng.integers(MAX_PRECISION_LEVEL + 1))
        coarse = np.ones_like(scene.mask) if whole else precise_mask(scene.mask.astype(np.float32), level)
        size = len(scene.mask)
        factor = size // scene.latents.shape[-1]
        return _Sample(
            clean=scene.latents,
            noise=torch.from_numpy(rng.standard_normal(scene.latents.shape, dtype=np.float32)),
            mask=(latent_coverage(coarse, size, factor)[0] > 0).float(),
            target=latent_coverage(scene.mask, size, factor)[0],
            has_object=torch.tensor(float(not whole)),
            timestep=torch.tensor(self._timestep(rng, index)),
            level=torch.tensor(level),
            text="" if no_text else scene.text,
        )

    def _timestep(self, rng: np.random.Generator, index: int) -> int:
        count = len(self.denoising.alphas)
        return int(rng.integers(count)) if self.curriculum is None else self.curriculum.draw_timestep(rng, index, count)

    def _encode(self, numbers: dict[int, int]) -> list[_Scene]:
        segments = [self._segments(number) for number in numbers]
        # One at a time: at full size the encoder needs the most memory.
        latents = [encode_pictures(self.modules.vae, [segment.picture])[0].cpu() for segment in segments]
        return [_Scene(clean, one.mask, one.text) for clean, one in zip(latents, segments, strict=True)]


FROM_NOTHING = Curriculum(identity=0, full=40_000)
CONTINUED = Curriculum(identity=0, full=0, high_noise_samples=0.25)
"""Timesteps of the small model: of its first pictures, and of larger ones once it has learned those."""


def small_task(
    modules: BrushModules, config: dict, seed: int, size: int, curriculum: Curriculum = FROM_NOTHING
) -> SmartBrushTask:
    """The embedded model's: drawn shapes of `size` pixels, the text encoder learned too, from nothing.

    The predicted mask weighs ten times what the paper gives it: the mask head, too, starts from nothing, and has the
    same few samples. config: its default size becomes `size`.
    """

    def segment(number: int) -> Segment:
        scene = draw_shape(number, size)
        return Segment(scene.picture, scene.mask, scene.text)

    return SmartBrushTask(
        modules,
        resized(config, size),
        segment,
        seed,
        train_text=True,
        curriculum=curriculum,
        weights=Weights(mask=0.1),
        held=1024,
        echo=4,
        name=f"{SMARTBRUSH}_{size}",
        judge=_judge,
    )


def _judge(model: SmartBrush) -> Validation:
    results = evaluate_brush(model, _VALIDATION_CASES)
    return Validation(brush_figures(results), brush_sheet(results))
