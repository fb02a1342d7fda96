"""The depth condition: Depth Anything's map, projected to four channels beside the latents.

The map is relative inverse depth after a ReLU, not normalised. "No depth" is not zero: it is the map of an
all-zero input tensor, sent through both networks, a constant of the weights (`mimicbrush` original:
`run_gradio3_demo.py`, shape control off).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
