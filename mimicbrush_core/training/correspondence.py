"""Where in the reference each pixel of the hole belongs, and a loss that teaches attention to look there.

Drawn scenes know it: the same point of an object is at one place in the source and at another in the reference. A model
that learns from nothing finds out by itself, too, but takes many times as many samples. Not part of the paper's recipe,
whose U-Nets come with Stable Diffusion's features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

POINTS = 64
"""Points of each sample whose reading is taught."""


def draw_points(
    rng: np.random.Generator, mask: np.ndarray, parts: np.ndarray, reference_parts: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    """Points of the masked object and where the reference shows them: float32 [POINTS,5].

    mask bool [S,S]; parts, reference_parts uint8 [S,S]; moved [3,3]: pixels of the source's object to the reference's.
    Each row is x, y in the source, x, y in the reference, all 0..1, and 1; 0 instead, where the reference does not show
    the point's part at that place.
    """
    size, points = len(mask), np.zeros((POINTS, 5), np.float32)
    rows, columns = np.nonzero(mask & (parts > 0))
    if not len(rows):
        return points
    chosen = rng.integers(len(rows), size=POINTS)
    rows, columns = rows[chosen], columns[chosen]
    x, y, scale = moved @ np.stack([columns + 0.5, rows + 0.5, np.ones(POINTS)])
    there = np.stack([x / scale, y / scale], axis=1)
    inside = ((there >= 0) & (there < size)).all(axis=1)
    column, row = np.where(inside[:, None], there, 0).astype(int).T
    points[:, 0], points[:, 1] = (columns + 0.5) / size, (rows + 0.5) / size
    points[:, 2:4] = there.clip(0, size) / size
    points[:, 4] = inside & (reference_parts[row, column] == parts[rows, columns])
    return points


class Matching:
    """A reading's observer (`attention.ReadingObserver`) that adds up how far its first head looks from the points.

    points [B,POINTS,5]: of the reading rows, as `draw_points` gives them.
    """

    def __init__(self, points: Tensor):
        self._points = points
        self._errors: list[Tensor] = []

    def __call__(self, name: str, query: Tensor, references: Sequence[tuple[Tensor, Tensor, float]], share) -> None:
        """query [B,H,N,D]; of the references only the first counts, its key is [B,H,M,D]."""
        with torch.autocast(query.device.type, enabled=False):
            self._errors.append(looking_elsewhere(query[:, 0].float(), references[0][0][:, 0].float(), self._points))

    def loss(self) -> Tensor:
        """The mean over the blocks that read."""
        return torch.stack(self._errors).mean()


def looking_elsewhere(query: Tensor, key: Tensor, points: Tensor) -> Tensor:
    """The cross-entropy of a head's attention over the reference's tokens towards the points' places there.

    query [B,N,D] and key [B,M,D], square grids row by row; points [B,P,5]. A place lies between four tokens, which are
    wanted by how near they are: what attention then reads is interpolated. Points that count nothing leave no gradient.
    """
    here, there, counts = points[..., :2], points[..., 2:4], points[..., 4]
    grid, other = math.isqrt(query.shape[1]), math.isqrt(key.shape[1])
    column, row = (here * grid).long().clamp(max=grid - 1).unbind(-1)  # [B,P]
    chosen = query.gather(1, (row * grid + column)[..., None].expand(-1, -1, query.shape[-1]))
    scores = chosen @ key.mT / math.sqrt(query.shape[-1])  # [B,P,M]
    wanted = sum(
        weight * scores.gather(-1, token[..., None])[..., 0] for token, weight in _nearest_tokens(there, other)
    )
    error = torch.logsumexp(scores, dim=-1) - wanted  # [B,P]
    return (counts * error).sum() / counts.sum().clamp_min(1)


def _nearest_tokens(places: Tensor, grid: int) -> list[tuple[Tensor, Tensor]]:
    """The four tokens of a grid around places [B,P,2] in 0..1, each [B,P], and their bilinear weights."""
    at = (places * grid - 0.5).clamp(0, grid - 1)
    first = at.floor().clamp(max=max(0, grid - 2))
    beyond = at - first
    corners = []
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        step = torch.tensor(corner, device=at.device)
        column, row = (first + step).clamp(max=grid - 1).long().unbind(-1)
        weight = torch.where(step > 0, beyond, 1 - beyond).prod(-1)
        corners.append((row * grid + column, weight))
    return corners
