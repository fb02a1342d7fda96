"""Coarse edits: a masked region moved, scaled, turned, mirrored, copied or cut out, with a hole where nothing is left.

The result is the layout for a model that makes it believable: pictures with transparency, alpha 1 = known, 0 = hole.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks
from .editing import batch_size, checked_masks, mask_arrays, repeated
from .errors import ArgumentError
from .images import MAX_SIDE
from .mask_tools import check_pictures

MOVE, DUPLICATE, CUT = "move", "duplicate", "cut"
MODES = (MOVE, DUPLICATE, CUT)
NO_FLIP, FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM = "none", "left-right", "top-bottom"
FLIPS = (NO_FLIP, FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM)
SCALES = (0.05, 10.0)

_NOTHING = 1e-9  # opacities below this are what the arithmetic of positions leaves of none
_CHECKER_SHADES = (0.8, 0.6)


@dataclass(frozen=True)
class CoarseEdit:
    """What happens to the masked region.

    mode: "move" leaves a hole where the region was, "duplicate" keeps it there, too, "cut" only leaves the hole.
    flip, scale and rotation are done in this order about the centre of the region's bounding box, then it is moved:
    flip: "left-right" or "top-bottom" mirrors it. scale: 1 = as it is. rotation: degrees, clockwise.
    x, y: pixels to the right and down.
    """

    mode: str = MOVE
    x: int = 0
    y: int = 0
    scale: float = 1.0
    rotation: float = 0.0
    flip: str = NO_FLIP

    def check(self) -> None:
        """Raise ArgumentError for a choice that does not exist or a number out of its range."""
        for name, options in (("mode", MODES), ("flip", FLIPS)):
            if getattr(self, name) not in options:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(options)}.")
        limits = {
            "x": (-MAX_SIDE, MAX_SIDE),
            "y": (-MAX_SIDE, MAX_SIDE),
            "scale": SCALES,
            "rotation": (-math.inf, math.inf),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ArgumentError(f"{name} is {value}; it must be between {low} and {high}.")

    @property
    def matrix(self) -> Tensor:
        """What an offset (x, y) from the region's centre becomes before the move, float64 [2,2]; y points down."""
        angle = math.radians(self.rotation % 360)
        turned = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        mirrored = [-1 if self.flip == FLIP_LEFT_RIGHT else 1, -1 if self.flip == FLIP_TOP_BOTTOM else 1]
        return self.scale * torch.tensor(turned, dtype=torch.float64) * torch.tensor(mirrored)


@dataclass(frozen=True)
class CoarseEditResult:
    """pictures: float32 [N,H,W,4], not premultiplied, alpha 1 = known; what became fully transparent is black.
    holes: float32 [N,H,W], 1 - alpha. moved: float32 [N,H,W], how much of each pixel the moved region covers.
    """

    pictures: Tensor
    holes: Tensor
    moved: Tensor


def coarse_edit(sources: Tensor, mask: Tensor, edit: CoarseEdit) -> CoarseEditResult:
    """Edit the masked region of each picture, float [B,H,W,3 or 4] in 0..1 under masks [B,H,W]; each one of a batch,
    or one for all.

    Soft masks move soft edges. What is not touched keeps its bits, and so does a region that lands pixel on pixel
    (moves, flips, quarter turns of a box whose sides are both odd or both even). A picture whose own mask is empty
    comes back as it was. The result is again a source: edits of several regions are made one after the other.
    Raises ArgumentError for the edit, PictureError for pictures and masks that cannot be used.
    """
    edit.check()
    check_pictures(sources, "source")
    mask_list = checked_masks(mask, *sources.shape[1:3])
    count = batch_size({"source": len(sources), "mask": len(mask_list)})
    pairs = zip(repeated(sources, count), repeated(mask_list, count), strict=True)
    pictures, moved = zip(*(_edited(source, torch.from_numpy(one), edit) for source, one in pairs), strict=True)
    pictures = torch.stack(pictures)
    return CoarseEditResult(pictures, 1 - pictures[..., 3], torch.stack(moved))


def with_holes(pictures: Tensor, holes: Tensor) -> Tensor:
    """Pictures float [B,H,W,3 or 4] made transparent where holes float [B,H,W] are 1: float32 [N,H,W,4].

    What is transparent already stays so. Each one of a batch, or one for all. Raises PictureError.
    """
    check_pictures(pictures, "coarse edit")
    hole_list = mask_arrays(holes)
    for hole in hole_list:
        masks.check_mask_values(hole, "hole")
        masks.check_mask_size(hole, *pictures.shape[1:3], "hole")
    count = batch_size({"coarse edit": len(pictures), "hole": len(hole_list)})
    layers = torch.stack(repeated(pictures, count)).cpu().float()
    known = 1 - torch.from_numpy(np.stack(repeated(hole_list, count))).clamp(0, 1)
    alpha = layers[..., 3].minimum(known) if layers.shape[-1] == 4 else known
    return torch.cat([layers[..., :3], alpha[..., None]], dim=-1)


def over_checker(pictures: Tensor) -> Tensor:
    """Pictures float [N,H,W,4] laid on a grey checkerboard, which shows through their holes: [N,H,W,3]."""
    height, width = pictures.shape[1:3]
    square = max(4, min(height, width) // 32)
    rows, columns = torch.arange(height)[:, None] // square, torch.arange(width) // square
    board = torch.tensor(_CHECKER_SHADES)[(rows + columns) % 2].to(pictures)[..., None]
    color, alpha = pictures[..., :3], pictures[..., 3:]
    return color * alpha + board * (1 - alpha)


def layer_over_checker(layer: np.ndarray) -> np.ndarray:
    """One layer in 8 bits, uint8 [H,W,4], to be looked at: uint8 [H,W,3]."""
    laid = over_checker(torch.from_numpy(layer)[None].float() / 255)[0]
    return (laid * 255).round().byte().numpy()


# --- one picture ---------------------------------------------------------------------------------------------


def _edited(source: Tensor, mask: Tensor, edit: CoarseEdit) -> tuple[Tensor, Tensor]:
    """(picture float32 [H,W,4], coverage by the moved region float32 [H,W]) of a source [H,W,3 or 4]."""
    picture = source.cpu().float()
    if picture.shape[-1] == 3:
        picture = torch.cat([picture, torch.ones_like(picture[..., :1])], dim=-1)
    coverage = torch.zeros_like(picture[..., 0])
    region = torch.where(mask > masks.VISIBLE, mask, 0).clamp(0, 1)[..., None]
    if not region.any():
        return picture, coverage
    box = masks.bounding_box(region[..., 0].numpy() > 0)
    target = _target_window(box, edit, *coverage.shape)
    touched = box.joined(target)
    picture, part = picture.clone(), picture[touched.slices].double()
    placed = torch.zeros(*part.shape[:2], 5, dtype=part.dtype)
    if edit.mode != CUT:
        layer = _layer(picture[box.slices].double(), region[box.slices].double())
        placed[target.within(touched).slices] = _resampled(layer, box, target, edit)
    gone = torch.zeros_like(part[..., :1]) if edit.mode == DUPLICATE else region[touched.slices].double()
    picture[touched.slices] = _composited(part, gone, placed).float()
    coverage[touched.slices] = placed[..., 0].float()
    return picture, coverage


def _layer(picture: Tensor, region: Tensor) -> Tensor:
    """The region [h,w,1] of a picture [h,w,4] as a premultiplied layer [h,w,5]: coverage, opacity, colour.

    In float64 like all that follows: float32 colours survive being multiplied by an opacity and divided by it again.
    """
    color, alpha = picture[..., :3], picture[..., 3:]
    return torch.cat([region, region * alpha, region * alpha * color], dim=-1)


def _composited(picture: Tensor, gone: Tensor, placed: Tensor) -> Tensor:
    """A picture float64 [h,w,4] without what is `gone` [h,w,1], under a premultiplied layer [h,w,5]."""
    color, alpha = picture[..., :3], picture[..., 3:]
    coverage, placed_alpha, placed_color = placed[..., :1], placed[..., 1:2], placed[..., 2:]
    # Not the product of both: a soft edge that is put back where it was must not become see-through.
    left = torch.minimum(1 - coverage, 1 - gone)
    total = placed_alpha + left * alpha
    mixed = (placed_color + left * alpha * color) / total
    mixed = torch.where(total > 0, mixed, torch.where(left == 1, color, 0))
    return torch.cat([mixed, total], dim=-1)


def _target_window(box: masks.CropWindow, edit: CoarseEdit, height: int, width: int) -> masks.CropWindow:
    """What the box can reach in a picture of this size; half a source pixel further, where interpolation fades out."""
    reach = edit.matrix.abs() @ torch.tensor([box.width / 2 + 0.5, box.height / 2 + 0.5], dtype=torch.float64)
    center = torch.tensor([box.x + box.width / 2 + edit.x, box.y + box.height / 2 + edit.y], dtype=torch.float64)
    limits = torch.tensor([width, height])
    left, top = (center - reach).floor().long().clamp(min=0).minimum(limits).tolist()
    right, bottom = (center + reach).ceil().long().clamp(min=0).minimum(limits).tolist()
    return masks.CropWindow(left, top, right - left, bottom - top)


def _resampled(layer: Tensor, box: masks.CropWindow, target: masks.CropWindow, edit: CoarseEdit) -> Tensor:
    """The target window of an edited premultiplied layer float64 [h,w,5] (see `_layer`) that lies at `box`.

    Bilinear; where the edit shrinks, the mean of as many samples per pixel as there are source pixels in it.
    """
    inverse = edit.matrix.inverse()
    half_box = torch.tensor([box.width / 2, box.height / 2], dtype=torch.float64)
    steps = math.ceil(1 / edit.scale)
    offsets = [(step + 0.5) / steps for step in range(steps)]
    columns = target.x + torch.arange(target.width, dtype=torch.float64) - (box.x + box.width / 2 + edit.x)
    rows = target.y + torch.arange(target.height, dtype=torch.float64) - (box.y + box.height / 2 + edit.y)
    planes = layer.movedim(-1, 0)[None]
    result = torch.zeros(1, layer.shape[-1], target.height, target.width, dtype=layer.dtype)
    for down, right in itertools.product(offsets, offsets):
        y, x = torch.meshgrid(rows + down, columns + right, indexing="ij")
        grid = torch.stack([x, y], dim=-1) @ inverse.T / half_box  # -1..1 across the box
        result += F.grid_sample(planes, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    result = (result / steps**2)[0].movedim(0, -1)
    weights = result[..., [0, 1, 1, 1, 1]]  # of coverage, opacity and colours
    return torch.where(weights < _NOTHING, 0, result)
