"""The depth condition: Depth Anything's map, projected to four channels beside the latents.

The map is relative inverse depth after a ReLU, not normalised. "No depth" is not zero: it is the map of an
all-zero input tensor, sent through both networks, a constant of the weights (`mimicbrush` original:
`run_gradio3_demo.py`, shape control off).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import PictureError
from .images import crop_padding

PROJECTOR_STRIDE = 8
"""The projector halves its input three times, so the map is first resized to 8 x the latent size."""


class DepthProjector(nn.Module):
    """Depth map -> `out_channels` feature channels at latent size (the original's `DepthGuider`).

    Key names are the original's: conv_in, blocks.0..5, conv_out. All convolutions are 3x3 with padding 1; every
    second one of `blocks` has stride 2; SiLU follows all but the last.
    """

    def __init__(self, out_channels: int = 4, block_out_channels: Sequence[int] = (16, 32, 64, 128)):
        super().__init__()
        self.conv_in = nn.Conv2d(1, block_out_channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(block_out_channels[:-1], block_out_channels[1:], strict=True):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(block_out_channels[-1], out_channels, 3, padding=1)

    def forward(self, depth_map: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """depth_map [B,H,W] raw network range, latent_size (h,w)  ->  [B,out_channels,h,w]."""
        height, width = latent_size
        x = F.interpolate(
            depth_map[:, None],
            size=(height * PROJECTOR_STRIDE, width * PROJECTOR_STRIDE),
            mode="bilinear",
            align_corners=True,
        ).to(self.conv_in.weight.dtype)
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


def estimate_depth(depth_network: nn.Module, pixel_values: Tensor) -> Tensor:
    """Relative inverse depth of a picture prepared by `images.depth_pixel_values`.

    depth_network: transformers' DepthAnythingForDepthEstimation, kept in its own dtype (float32).
    pixel_values [B,3,s,s]  ->  [B,s,s], >= 0, not normalised.
    """
    dtype = next(depth_network.parameters()).dtype
    return depth_network(pixel_values=pixel_values.to(dtype)).predicted_depth


def no_depth_map(depth_network: nn.Module, size: int) -> Tensor:
    """The map that stands for "no depth": the network's answer to an all-zero input, [1,size,size]."""
    parameter = next(depth_network.parameters())
    zeros = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
    return estimate_depth(depth_network, zeros)


# --- the shape an artist asks to keep -------------------------------------------------------------------------

ASPECT_TOLERANCE = 0.02
"""A depth picture may differ this much in width / height from its picture: preprocessors round to multiples."""


@dataclass(frozen=True)
class DepthCondition:
    """Whose shape an edit keeps, and how strictly. Made by `MimicBrush.depth_condition`.

    pictures: uint8 [B,H,W,3], whose depth it is. drawn: float32 [B,H,W] in 0..1, 1 = nearest, the artist's own
    depth; None: the network's. maps: float32 [B,s,s], the maps used for whole pictures, in the network's raw range.
    nearest: float32 [B], the largest value the network gave each picture: what 1.0 in a depth picture stands for
    (0.0 stands for 0). strength: 0 = "no depth", 1 = full.
    """

    pictures: np.ndarray
    drawn: Tensor | None
    maps: Tensor
    nearest: Tensor
    strength: float = 1.0

    def __len__(self) -> int:
        return len(self.pictures)

    def first(self) -> DepthCondition:
        """Of the first picture only."""
        drawn = None if self.drawn is None else self.drawn[:1]
        return replace(self, pictures=self.pictures[:1], drawn=drawn, maps=self.maps[:1], nearest=self.nearest[:1])

    def as_pictures(self) -> Tensor:
        """The depth used, float32 [B,H,W] in 0..1, 1 = nearest; read back as a depth picture it gives the same maps."""
        height, width = self.pictures.shape[1:3]
        side = max(height, width)
        scaled = self.maps / self.nearest[:, None, None]
        square = F.interpolate(scaled[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
        return crop_padding(square.movedim(0, -1), height, width).movedim(-1, 0).clamp(0, 1)

    def check_visible(self, index: int, hole: np.ndarray) -> None:
        """Raise PictureError where the network would look at a hole: bool [H,W], the pixels to repaint.

        Some versions of ComfyUI's frontend save masked pixels as black, and then there is no shape to keep.
        """
        if self.drawn is None and self.strength > 0 and hole.any() and not self.pictures[index][hole].any():
            raise PictureError(
                "The picture given for the depth is pure black under the mask, so there is no shape to keep. Take the "
                "depth from the picture before it was masked, or connect a depth picture, or leave the depth away."
            )


def fitted_depth_pictures(drawn: Tensor, height: int, width: int) -> Tensor:
    """Depth pictures float [B,h,w] in 0..1, resized to a picture's [B,height,width].

    Raises PictureError for values that are not finite or not of 0..1, and another aspect.
    """
    low, high = float(drawn.min()), float(drawn.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise PictureError(f"The depth picture has values from {low:.4g} to {high:.4g}; they must lie within 0 to 1.")
    drawn_height, drawn_width = drawn.shape[1:]
    aspect = (drawn_width / drawn_height) / (width / height)
    if abs(aspect - 1) > ASPECT_TOLERANCE:
        raise PictureError(
            f"The depth picture is {drawn_width} x {drawn_height} pixels, the source {width} x {height}: they do not "
            "show the same frame. Give a depth picture of the source's shape."
        )
    drawn = drawn.float().clamp(0, 1)
    if (drawn_height, drawn_width) == (height, width):
        return drawn
    return F.interpolate(drawn[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]


def drawn_map(drawn: Tensor, network_map: Tensor, nearest: float) -> Tensor:
    """A depth picture as the network would have given it: [H,W] in 0..1 -> raw [1,s,s].

    network_map [1,s,s]: the network's own, of the same picture padded to a square: kept in the padding.
    """
    height, width = drawn.shape
    side = max(height, width)
    square = F.interpolate(network_map[None], (side, side), mode="bilinear", align_corners=False)
    crop_padding(square[0, 0], height, width)[:] = drawn.to(square) * nearest
    return F.interpolate(square, network_map.shape[-2:], mode="bilinear", antialias=True)[0]
