"""How close a result is to the truth inside the mask, and how sure a mean over cases is."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError

PSNR_CAP = 100.0
"""Decibels given to a result without any error, so that means stay finite; real results stay far below."""

_PEAK = 255.0
_WINDOW_SIGMA, _WINDOW_RADIUS = 1.5, 5  # Wang et al. 2004: an 11 x 11 Gaussian
_STABILISERS = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2  # of the means, of the variances


def masked_psnr(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the masked pixels and all channels, at most `PSNR_CAP`.

    result, truth: uint8 [H,W,3]; mask: bool [H,W] with at least one True. Peak 255.
    """
    _check(result, truth, mask)
    error = np.square(result[mask].astype(np.float64) - truth[mask]).mean()
    if error == 0:
        return PSNR_CAP
    return min(PSNR_CAP, 10 * math.log10(_PEAK**2 / error))


def ssim(result: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Structural similarity, -1..1, averaged over the masked pixels (None: all) and the channels.

    result, truth: uint8 [H,W,3], both sides at least 6; mask: bool [H,W] with at least one True. Windows are
    Gaussian, 11 x 11, sigma 1.5; near the mask's border they also see what is outside it. The pictures are
    mirrored at their own borders.
    """
    mask = np.ones(result.shape[:2], bool) if mask is None else mask
    _check(result, truth, mask)
    similarity = _ssim_map(_planes(result), _planes(truth)).mean(0)  # [H,W]
    return float(similarity[torch.from_numpy(mask)].mean())


def bootstrap_interval(
    differences: np.ndarray, seed: int = 0, share: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Bounds that hold the mean of paired differences with the given probability (percentile bootstrap).

    differences: [n], one per case, e.g. PSNR with the reference minus PSNR without; whole cases are drawn
    with replacement. The same seed gives the same bounds.
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1 or not len(differences):
        raise ArgumentError(f"Differences of shape {list(differences.shape)} were given; one per case is needed.")
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(differences), size=(draws, len(differences)))
    means = differences[chosen].mean(1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def mean_with_interval(values: np.ndarray, form: str) -> str:
    """A mean and its 95 % interval in a number format, e.g. "+.2f"; "-" where the figure does not exist (NaN)."""
    if np.isnan(values).all():
        return "-"
    return interval_text(float(values.mean()), *bootstrap_interval(values), form)


def interval_text(mean: float, low: float, high: float, form: str) -> str:
    """A mean and its bounds in a number format."""
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _check(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
    if result.shape != truth.shape or mask.shape != truth.shape[:2]:
        raise ArgumentError(
            f"Result {list(result.shape)}, truth {list(truth.shape)} and mask {list(mask.shape)} do not fit together."
        )
    if result.dtype != np.uint8 or truth.dtype != np.uint8 or mask.dtype != bool:
        raise ArgumentError(
            f"Result {result.dtype}, truth {truth.dtype} and mask {mask.dtype} were given; pictures are "
            "measured in 8 bits (uint8) and the mask is bool."
        )
    if not mask.any():
        raise ArgumentError("The mask is empty, so there is nothing to measure.")


def _planes(picture: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> float64 [3,H,W], 0..255."""
    return torch.from_numpy(picture).permute(2, 0, 1).double()


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Similarity around every pixel, [C,H,W] each."""
    mean_a, mean_b, square_a, square_b, product = _window_means(torch.stack([a, b, a * a, b * b, a * b]))
    variance_a, variance_b = square_a - mean_a * mean_a, square_b - mean_b * mean_b
    covariance = product - mean_a * mean_b
    c1, c2 = _STABILISERS
    means = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return means * (2 * covariance + c2) / (variance_a + variance_b + c2)


def _window_means(maps: Tensor) -> Tensor:
    """The Gaussian-weighted mean around every pixel, float64 [N,C,H,W] -> the same shape."""
    offsets = torch.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1, dtype=maps.dtype)
    weights = torch.exp(-offsets.square() / (2 * _WINDOW_SIGMA**2))
    weights = weights / weights.sum()
    padded = F.pad(maps.flatten(0, 1), [_WINDOW_RADIUS] * 4, mode="reflect")[:, None]
    rows = F.conv2d(padded, weights[None, None, :, None])
    return F.conv2d(rows, weights[None, None, None, :])[:, 0].unflatten(0, maps.shape[:2])
