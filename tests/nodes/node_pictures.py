"""Little pictures and masks as the host's wires carry them: float [B,H,W,C] and [B,H,W]."""

import torch


def noise(count, height, width, seed=0, channels=3):
    """A random IMAGE whose values lie on no 8-bit grid."""
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def boxes(height, width, *corners, side=16):
    """A MASK with a white square of `side` at each (top, left); None: an empty one."""
    masks = torch.zeros(len(corners), height, width)
    for mask, corner in zip(masks, corners, strict=True):
        if corner is not None:
            mask[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = 1
    return masks
