"""Magic Fixup: what it reads, how its inputs are prepared, how it is sampled.

Alzayer et al., "Magic Fixup: Streamlining Photo Editing by Watching Dynamic Videos", ACM TOG 2025, arXiv 2403.13044.
Where the released code and the paper differ, the released code is followed. The published weights are for
non-commercial research only (docs/licences.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import editing, images, masks
from ..attention import DetailReading, transformer_blocks
from ..editing import BatchResult, EditResult, Progress, RepaintSettings
from ..errors import ArgumentError, PictureError
from ..hole_fill import fill_hole
from ..modules import MAGIC_FIXUP
from ..references import write_features
from ..repaint import Condition, Repainter, Work
from ..sampling import Draw, StepInfo, denoise, last_steps

OPAQUE = 128
"""A pixel of a coarse edit is a hole where its 8-bit alpha is less than this."""

RIM = 3
"""How many pixels a hole is grown before it is filled: the colours at its edge are mixed with nothing."""


@dataclass(frozen=True)
class FixupSettings(RepaintSettings):
    """How Magic Fixup makes an edit.

    scheduler, spacing, guidance: it is sampled by DDIM and knows no guidance.
    strength: the share of the steps that are made, above 0 to 1. 1 starts from almost pure noise, as the released
        code does; less starts from the coarse edit with less noise and stays closer to it.
    eta: 0..1, how much of the noise a step leaves is drawn anew; the original's is 1.
    paste_back: off, as in the original: the whole picture passes through the VAE.
    """

    strength: float = 1.0
    eta: float = 1.0
    paste_back: bool = False

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        **RepaintSettings.LIMITS,
        "guidance": (1.0, 1.0),
        "strength": (0.01, 1.0),
        "eta": (0.0, 1.0),
    }

    def check(self) -> None:
        super().check()
        if self.scheduler not in (None, "ddim") or self.spacing == "karras":
            raise ArgumentError("Magic Fixup is sampled with the scheduler 'ddim', without Karras spacing.")


@dataclass(frozen=True)
class FixupCondition(Condition):
    """edit_latents [B,4,h,w]: of the coarse edit with its holes filled. original_latents [B,4,h,w]: of the photo.
    known [B,1,h,w]: 1 = known, 0 = hole, soft at its edges.
    """

    edit_latents: Tensor
    original_latents: Tensor
    known: Tensor


class MagicFixup(Repainter):
    """A loaded Magic Fixup."""

    system = MAGIC_FIXUP

    @torch.no_grad()
    def encode(self, original: np.ndarray, coarse: np.ndarray, size: int | None = None) -> FixupCondition:
        """Prepare a photo uint8 [H,W,3] and its coarse edit uint8 [H,W,4], alpha 255 = known, 0 = hole.

        Both are squashed to the model's square, as the original does it, and the holes filled there. The VAE's
        posterior is taken at its mode (the original draws). Raises PictureError where nothing of the edit is known.
        """
        size = self._size(size)
        filled, alpha = prepare_coarse(coarse, size)
        edit_latents = self._encode(images.to_model_range(filled), None)
        original_latents = self._encode(images.to_model_range(images.resize_bicubic(original, size)), None)
        known = masks.soft_latent_mask(torch.from_numpy(alpha).float()[None, None] / 255, self.latent_factor)
        return FixupCondition(edit_latents, original_latents, known.to(edit_latents.device))

    @torch.no_grad()
    def sample(
        self,
        condition: FixupCondition,
        draw: Draw,
        scheduler,
        *,
        eta: float = 1.0,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Denoise the noised coarse edit to latents [B,4,h,w].

        condition: tensors of batch 1 or B. draw: gives the noise [B,4,h,w] of the start, then for each step that of
        the original and, where eta is not 0, that of the step itself. scheduler: DDIM of `sampling.make_scheduler`;
        its first timestep is where the run starts. on_step may raise to cancel.
        """
        unet, device = self.modules.unet, self.device
        noise = draw().to(device)
        batch = len(noise)
        edit, original, known = (
            one.to(device).expand(batch, -1, -1, -1)
            for one in (condition.edit_latents, condition.original_latents, condition.known)
        )

        with DetailReading(unet) as reading:

            def predict(latents: Tensor, timestep: Tensor) -> Tensor:
                # The original is noised as much as the edit, and anew in every step: so was the training.
                noised = scheduler.add_noise(original, draw().to(device), timestep[None])
                reading.features = self._details(torch.cat([noised, original, known], dim=1), timestep)
                model_input = torch.cat([latents, edit, known], dim=1).to(self.dtype)  # [B,9,h,w]
                return unet(model_input, timestep, encoder_hidden_states=None).sample.float()

            start = scheduler.add_noise(edit, noise, scheduler.timesteps[:1])
            return denoise(predict, start, scheduler, on_step, eta=eta, draw=draw)

    def _details(self, model_input: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """The detail extractor's features of all blocks."""
        timesteps = timestep.expand(len(model_input)).to(model_input.device)
        return write_features(self.modules.detail_extractor, model_input, timesteps, None, transformer_blocks)

    def edit(
        self,
        original: np.ndarray,
        coarse: np.ndarray,
        settings: FixupSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        mask: np.ndarray | None = None,
    ) -> EditResult:
        """Make a coarse edit of a photo believable.

        original: uint8 [H,W,3] (or float 0..1). coarse: [H,W,4] of the same size (`coarse_edit.coarse_edit`), alpha
        1 = known, 0 = hole; without alpha it has no holes. mask: float [H,W], 1 = what zoom and paste_back are about,
        with the place the object came from and the one it went to; default: `changed_regions`. Beyond what is pasted
        back the original stays. Raises PictureError or ArgumentError before any work is done if something does not fit.
        """
        layer = images.layer_from_array(coarse, "coarse edit")
        if mask is None:
            [mask] = changed_regions([images.picture_from_array(original, "source")], [layer])
        begin = partial(self._begin, [layer])
        return self._edit(original, mask, settings or FixupSettings(), begin, on_progress)

    def edit_batch(
        self,
        originals: Tensor,
        coarse: Tensor,
        settings: FixupSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        mask: Tensor | None = None,
    ) -> BatchResult:
        """Make a batch of coarse edits float [B,H,W,3 or 4] in 0..1 of photos float [B,H,W,3 or 4] believable.

        Photos, edits and masks float [B,H,W]: each one, used for all, or as many as the longest. With paste_back soft
        mask values blend softly; a picture whose own mask is empty comes back as it was. Raises as `edit` does.
        """
        layers = [images.layer_from_array(one.float().clamp(0, 1), "coarse edit") for one in coarse]
        if mask is None:
            mask = torch.from_numpy(changed_regions(editing.eight_bit_pictures(originals, "source"), layers))
        begin, counts = partial(self._begin, layers), {"coarse edit": len(layers)}
        return self._edit_batch(originals, mask, settings or FixupSettings(), begin, on_progress, counts=counts)

    def _begin(
        self,
        layers: Sequence[np.ndarray],
        originals: Sequence[np.ndarray],
        mask_list: Sequence[np.ndarray],
        window: masks.CropWindow,
        settings: FixupSettings,
    ) -> Work:
        _check_sizes(layers, originals)
        layers = editing.repeated(layers, len(originals))
        return Work(
            condition=lambda index, part, mask: self.encode(part, layers[index][window.slices], settings.size),
            sample=lambda condition, draw, scheduler, report: self.sample(
                condition, draw, scheduler, eta=settings.eta, on_step=report.step
            ),
        )

    def _scheduler(self, settings: FixupSettings):
        return last_steps(super()._scheduler(settings), settings.strength)

    def _fitted(self, square: np.ndarray, height: int, width: int) -> np.ndarray:
        """The model's square answer -> uint8 [height,width,3], as it was squashed."""
        return images.resize_bicubic(square, (height, width))


def prepare_coarse(coarse: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A coarse edit uint8 [H,W,4] at the model's size: its colours with the holes filled, and its alpha, both uint8.

    Raises PictureError where nothing of it is known.
    """
    square = images.resize_bicubic(coarse, size)  # Pillow counts colours by their alpha, so holes do not bleed
    colors, alpha = square[..., :3], square[..., 3]
    hole = masks.grown(alpha < OPAQUE, RIM)
    return fill_hole(colors, hole), alpha


def changed_regions(originals: Sequence[np.ndarray], layers: Sequence[np.ndarray]) -> np.ndarray:
    """Where coarse edits uint8 [H,W,4] are holes or show another thing than the photos uint8 [H,W,3]: float32 [N,H,W].

    Raises PictureError for other sizes and numbers, and where no coarse edit differs from its photo.
    """
    _check_sizes(layers, originals)
    count = editing.batch_size({"source": len(originals), "coarse edit": len(layers)})
    photos, layers = np.stack(editing.repeated(originals, count)), np.stack(editing.repeated(layers, count))
    changed = (layers[..., :3] != photos).any(axis=-1) | (layers[..., 3] < 255)
    if not changed.any():
        raise PictureError("The coarse edit is the original: nothing was moved. Give one in which something was.")
    return changed.astype(np.float32)


def _check_sizes(layers: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> None:
    (height, width), (coarse_height, coarse_width) = originals[0].shape[:2], layers[0].shape[:2]
    if (height, width) != (coarse_height, coarse_width):
        raise PictureError(
            f"The coarse edit is {coarse_width} x {coarse_height} pixels, the original {width} x {height}. Give a "
            "coarse edit of the original's size."
        )
