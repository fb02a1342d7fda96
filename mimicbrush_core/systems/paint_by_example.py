"""Paint by Example: what it reads, how its inputs are prepared, how it is sampled.

Yang et al., "Paint by Example: Exemplar-based Image Editing with Diffusion Models", CVPR 2023, arXiv 2211.13227. Where
the released code and the paper differ, the released code is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .. import images, masks
from ..editing import BatchResult, EditResult, Progress, RepaintSettings
from ..errors import ArgumentError
from ..modules import PAINT_BY_EXAMPLE
from ..repaint import Condition, Repainter, Work, device_of
from ..reuse import KeptTokens, SharedStart
from ..sampling import StepInfo, denoise, guide

EXEMPLAR_FITS = {
    "stretch": images.resize_bicubic,
    "crop": lambda picture, size: picture,  # as CLIP's own preparation does it: the middle square
    "pad": lambda picture, size: images.pad_to_square(picture, images.WHITE),
}
"""How an exemplar becomes square: squashed, as the original does it and was trained; its middle; or on white."""


@dataclass(frozen=True)
class ExemplarSettings(RepaintSettings):
    """How Paint by Example makes an edit.

    paste_back: off, as in the original: the whole picture passes through the VAE.
    exemplar_fit: of an exemplar that is not encoded yet, a name of EXEMPLAR_FITS.
    """

    paste_back: bool = False
    exemplar_fit: str = "stretch"

    def check(self) -> None:
        super().check()
        _check_fit(self.exemplar_fit)


@dataclass(frozen=True, eq=False)
class Exemplar:
    """An encoded exemplar: its one token [1,1,D], and the model that made it."""

    token: Tensor
    owner: PaintByExample


@dataclass(frozen=True)
class SourceCondition(Condition):
    """hole_latents [B,4,h,w]: of the picture with a grey hole. keep [B,1,h,w]: 1 = keep, soft at its edges."""

    hole_latents: Tensor
    keep: Tensor

    def channels(self) -> Tensor:
        """[B,5,h,w] in the original's order."""
        return torch.cat([self.hole_latents, self.keep], dim=1)


class PaintByExample(Repainter):
    """A loaded Paint by Example."""

    system = PAINT_BY_EXAMPLE

    @torch.no_grad()
    def encode_exemplar(self, picture: np.ndarray, fit: str = "stretch") -> Exemplar:
        """Encode an exemplar picture uint8 [H,W,3] of any size; a tight crop of the object works best.

        fit: a name of EXEMPLAR_FITS. The result can serve many edits of this model, of any size.
        """
        _check_fit(fit)
        encoder, size = self.modules.exemplar_encoder, self.config["exemplar_encoder"]["image_size"]
        pixels = images.clip_pixel_values(EXEMPLAR_FITS[fit](picture, size), size)
        return Exemplar(encoder(pixels.to(device_of(encoder), self.dtype)), self)

    @torch.no_grad()
    def encode_source(
        self,
        picture: np.ndarray,
        mask: np.ndarray,
        size: int | None = None,
        *,
        soft_edges: bool = True,
        noise: Tensor | None = None,
    ) -> SourceCondition:
        """Prepare a source picture uint8 [H,W,3] and its mask float [H,W] (1 = repaint).

        Padding, LANCZOS to the model's size, and there a hole of mid-grey. soft_edges: the latent mask is reduced as
        in the original; otherwise to the top-left pixel of each cell, as in diffusers. noise [1,4,h,w]: the VAE
        posterior's draw (default: its mode; the original draws).
        """
        size = self._size(size)
        square = images.resize_lanczos(images.pad_to_square(picture, images.WHITE), size)
        keep = masks.keep_mask(mask, size)
        hole_latents = self._encode(images.to_model_range(square) * keep, noise)
        if soft_edges:
            latent_keep = masks.soft_latent_mask(keep, self.latent_factor)
        else:
            latent_keep = masks.latent_mask(keep[0, 0].numpy(), self.latent_factor)
        return SourceCondition(hole_latents, latent_keep.to(hole_latents.device))

    @property
    def unconditional_token(self) -> Tensor:
        """The learned token of "no exemplar" [1,1,D]."""
        return self.modules.exemplar_encoder.uncond_vector

    @torch.no_grad()
    def sample(
        self,
        condition: SourceCondition,
        exemplar: Exemplar,
        noise: Tensor,
        scheduler,
        guidance: float,
        *,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Denoise to latents [B,4,h,w].

        condition: tensors of batch 1 or B. noise: float32 [B,4,h,w]. scheduler: of `sampling.make_scheduler`.
        guidance: 1 evaluates the conditional row only; otherwise e_u + g (e_c - e_u). on_step may raise to cancel.
        """
        if exemplar.owner is not self:
            raise ArgumentError("The exemplar was encoded by another model. Encode it again with this one.")
        unet, guided = self.modules.unet, guidance != 1
        tokens = [self.unconditional_token, exemplar.token] if guided else [exemplar.token]
        batch, rows = len(noise), len(tokens)
        tokens = torch.cat([token.to(self.device, self.dtype).expand(batch, -1, -1) for token in tokens])
        beside = condition.channels().to(self.device, self.dtype).expand(batch, -1, -1, -1)

        with KeptTokens(unet), SharedStart(unet) as start:
            start.on = guided

            def predict(latents: Tensor, timestep: Tensor) -> Tensor:
                model_input = torch.cat([latents.to(self.dtype), beside], dim=1).repeat(rows, 1, 1, 1)  # [rows B,9,h,w]
                output = unet(model_input, timestep, encoder_hidden_states=tokens).sample.float()
                return guide(*output.chunk(2), guidance) if guided else output

            return denoise(predict, noise.to(self.device), scheduler, on_step)

    def edit(
        self,
        source: np.ndarray,
        mask: np.ndarray,
        exemplar: np.ndarray | Exemplar,
        settings: ExemplarSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> EditResult:
        """Repaint the masked region of a picture with the exemplar's object.

        source uint8 [H,W,3] (or float 0..1); mask float [H,W], 1 = repaint, with room for the object; exemplar: a
        picture of any size, or one already encoded by this model. Raises PictureError or ArgumentError before any
        work is done if something does not fit.
        """
        return self._edit(source, mask, settings or ExemplarSettings(), partial(self._begin, exemplar), on_progress)

    def edit_batch(
        self,
        sources: Tensor,
        mask: Tensor,
        exemplar: np.ndarray | Exemplar,
        settings: ExemplarSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> BatchResult:
        """Repaint a batch of pictures float [B,H,W,3 or 4] in 0..1 under masks float [B,H,W].

        sources and masks: each one, used for all, or as many as the longer. All share the exemplar and one window.
        With paste_back soft mask values blend softly; a picture whose own mask is empty comes back as it was. Raises
        as `edit` does.
        """
        begin = partial(self._begin, exemplar)
        return self._edit_batch(sources, mask, settings or ExemplarSettings(), begin, on_progress)

    def _begin(
        self,
        exemplar: np.ndarray | Exemplar,
        sources: Sequence[np.ndarray],
        mask_list: Sequence[np.ndarray],
        window: masks.CropWindow,
        settings: ExemplarSettings,
    ) -> Work:
        if not isinstance(exemplar, Exemplar):
            exemplar = self.encode_exemplar(images.picture_from_array(exemplar, "exemplar"), settings.exemplar_fit)
        return Work(
            condition=lambda index, part, mask: self.encode_source(part, mask, settings.size),
            sample=lambda condition, draw, scheduler, report: self.sample(
                condition, exemplar, draw(), scheduler, settings.guidance, on_step=report.step
            ),
        )


def _check_fit(fit: str) -> None:
    if fit not in EXEMPLAR_FITS:
        raise ArgumentError(f"Unknown exemplar fit {fit!r}. Choose one of: {', '.join(EXEMPLAR_FITS)}.")
