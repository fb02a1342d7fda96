"""Pictures -> latents and image tokens, and latents -> pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .images import to_model_range


class ImageProjection(nn.Module):
    """Image encoder tokens -> cross-attention tokens: one linear layer named `projector` (`LinearResampler`)."""

    def __init__(self, input_dim: int, output_dim: int):
        super().__init__()
        self.projector = nn.Linear(input_dim, output_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T,input_dim] -> [B,T,output_dim]."""
        return self.projector(tokens)


def image_tokens(image_encoder: nn.Module, projection: nn.Module, pixel_values: Tensor) -> Tensor:
    """Cross-attention tokens of a picture prepared by `images.clip_pixel_values`.

    pixel_values [B,3,s,s] -> [B,T,D]. The tokens are the original's `hidden_states[-2]`: all patch tokens and
    the class token, without the last layer, the final LayerNorm and the visual projection. The encoder is
    loaded without that last layer (`checkpoints`), so here they are its last hidden state.
    """
    parameter = next(image_encoder.parameters())
    output = image_encoder(pixel_values=pixel_values.to(parameter.device, parameter.dtype), output_hidden_states=True)
    return projection(output.hidden_states[-1])


def unconditional_tokens(image_encoder: nn.Module, projection: nn.Module) -> Tensor:
    """The tokens of "no reference": those of all-zero `pixel_values` (the mean colour), [1,T,D]."""
    size = image_encoder.config.image_size
    return image_tokens(image_encoder, projection, torch.zeros(1, 3, size, size))


def encode_latents(vae: nn.Module, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
    """Picture in [-1,1], [B,3,H,W] -> scaled latents [B,4,h,w].

    The posterior is taken at its mode; with `noise` [B,4,h,w] it is sampled with that draw, as the original
    does. The input is made contiguous: channels-last GroupNorm is inexact on CPU.
    """
    encoded = vae.encode(pixels.contiguous())
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
    else:  # AutoencoderTiny has no posterior
        latents = encoded.latents
    return latents * vae.config.scaling_factor


@torch.no_grad()
def encode_pictures(vae: nn.Module, pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [H,W,3] of one size -> float32 latents [B,4,h,w] on the VAE's device, at the posterior's mode."""
    pixels = torch.cat([to_model_range(picture) for picture in pictures])
    parameter = next(vae.parameters())
    return encode_latents(vae, pixels.to(parameter.device, parameter.dtype)).float()


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents [B,4,h,w] -> picture [B,3,H,W], about [-1,1], not clamped."""
    return vae.decode(latents / vae.config.scaling_factor).sample
