"""How far a predicted mask is from the true one."""

from __future__ import annotations

from torch import Tensor

_SMOOTHING = 1e-5  # so that two empty masks agree


def dice_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - 2|X.Y| / (|X|+|Y|) of predicted masks X and their targets Y, both [B,1,h,w] in 0..1 -> [B].

    0 = they agree, 1 = they share nothing. (SmartBrush, arXiv 2212.05034; unlike V-Net's, arXiv 1606.04797, without
    squares)
    """
    shared = (predicted * target).sum(dim=(1, 2, 3))
    both = predicted.sum(dim=(1, 2, 3)) + target.sum(dim=(1, 2, 3))
    return 1 - (2 * shared + _SMOOTHING) / (both + _SMOOTHING)
