"""What a sampler other than this project's needs to run a MimicBrush: conditions, tokens, and when what is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from . import editing, images, masks
from .depth import DepthCondition
from .encoders import encode_latents
from .errors import ArgumentError
from .references import ReferenceUse
from .systems.mimicbrush import MimicBrush, SourceCondition

# --- references ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadingSpan:
    """A stretch of a run, start..end in 0..1 of it, in which the same references are read."""

    start: float
    end: float
    uses: tuple[ReferenceUse, ...]


def reading_spans(uses: Sequence[ReferenceUse]) -> list[ReadingSpan]:
    """The whole run, divided where a reference begins or ends to be read; references of weight 0 do not count."""
    read = [use for use in uses if use.weight > 0]
    bounds = sorted({0.0, 1.0, *(bound for use in read for bound in (use.start, use.end))})
    return [
        ReadingSpan(start, end, tuple(use for use in read if use.start <= start < use.end))
        for start, end in pairwise(bounds)
    ]


def span_tokens(brush: MimicBrush, span: ReadingSpan) -> Tensor:
    """Cross-attention tokens of what is read, side by side, [1,T,D]; those of "no reference" where nothing is."""
    if not span.uses:
        return brush.unconditional_tokens()
    return torch.cat([use.reference.tokens for use in span.uses], dim=1)


def check_references(brush: MimicBrush, uses: Sequence[ReferenceUse]) -> None:
    """Raise ArgumentError for references that another model encoded."""
    for use in uses:
        brush.check_owner(use.reference)


# --- sources -------------------------------------------------------------------------------------------------


@torch.no_grad()
def source_conditions(
    brush: MimicBrush, sources: Tensor, mask: Tensor, size: int, depth: DepthCondition | None = None
) -> tuple[SourceCondition, Tensor]:
    """The conditions of a batch, and the latents of its pictures without the hole, scaled: both of batch N.

    sources float [B,H,W,3 or 4] in 0..1, mask float [B,H,W], 1 = repaint; they and the depth: each one, used for
    all, or as many as the longest. size: side of the model's square. Raises PictureError or ArgumentError.
    """
    pictures = editing.eight_bit_pictures(sources, "source")
    mask_list = editing.checked_masks(mask, *sources.shape[1:3])
    counts = {"source": len(pictures), "mask": len(mask_list)} | ({"depth": len(depth)} if depth else {})
    count = editing.batch_size(counts)
    pictures, mask_list = editing.repeated(pictures, count), editing.repeated(mask_list, count)
    conditions = [
        brush.encode_source(picture, one, size, **_shape_to_keep(depth, index, picture, one))
        for index, (picture, one) in enumerate(zip(pictures, mask_list, strict=True))
    ]
    return SourceCondition.of(conditions), torch.cat([_latents(brush, picture, size) for picture in pictures])


def _shape_to_keep(depth: DepthCondition | None, index: int, picture: np.ndarray, mask: np.ndarray) -> dict:
    """What `encode_source` is told of the depth of one picture."""
    if depth is None:
        return {}
    if depth.pictures.shape[1:3] != picture.shape[:2]:
        raise ArgumentError("The depth was made for a picture of another size. Make it from a picture of the source's.")
    index %= len(depth)
    depth.check_visible(index, masks.binarize(mask))
    return {"keep_shape": depth.strength, "depth_map": depth.maps[index : index + 1]}


def _latents(brush: MimicBrush, picture: np.ndarray, size: int) -> Tensor:
    pixels = images.to_model_range(images.resize_lanczos(images.pad_to_square(picture, images.WHITE), size))
    vae = brush.modules.vae
    return encode_latents(vae, pixels.to(vae.device, vae.dtype)).float()


# --- previews ------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_colors(brush: MimicBrush, pictures: Sequence[np.ndarray], size: int) -> Tensor:
    """How each latent channel is seen as colour, and the colour of zero: [channels + 1, 3], colours in [-1,1].

    The least-squares fit to these pictures, uint8 [H,W,3]; good enough for a preview.
    """
    latents = torch.cat([_latents(brush, picture, size) for picture in pictures]).cpu()  # [B,C,h,w]
    squares = [
        images.resize_lanczos(images.pad_to_square(picture, images.WHITE), latents.shape[-1]) for picture in pictures
    ]
    colors = torch.cat([images.to_model_range(square) for square in squares])  # [B,3,h,w]
    known = latents.movedim(1, -1).flatten(0, 2)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    return torch.linalg.lstsq(known, colors.movedim(1, -1).flatten(0, 2)).solution
