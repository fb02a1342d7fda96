"""Mask arithmetic and geometry: what is masked, how literally its shape is taken, how the models see it, where to
zoom, how to paste back.

A mask is `np.ndarray` float32 `[H, W]`, 0..1, 1 = repaint. The numbers follow the original
`run_gradio3_demo.py` of MimicBrush (functions named in the docstrings).
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from .errors import ArgumentError, PictureError
from .images import pad_to_square, resize_lanczos

THRESHOLD = 128
"""A pixel is masked when its 8-bit mask value is greater than this."""

ZOOM_MINIMUM = 128
"""Default smallest side of the zoom window: a window of 128 pixels is enlarged four times for a 512-pixel
model; a smaller one would show it little but blur."""

VISIBLE = 0.5 / 255
"""Mask values above this are not black: they round to at least 1 of 255."""

MAX_PRECISION_LEVEL = 4
"""The coarsest level of `precise_mask`: the bounding box. 0 is the exact silhouette."""
_PRECISION_SIGMAS = (6, 14, 30)  # of the levels between, in pixels of a picture whose shorter side is 512
_PRECISION_SIDE = 512
_PRECISION_THRESHOLD = 0.1

_RANGE_TOLERANCE = 1e-3
_Values = TypeVar("_Values", np.ndarray, torch.Tensor)


def binarize(mask: np.ndarray) -> np.ndarray:
    """Which pixels are repainted, bool `[H, W]`: round(mask * 255) > 128, so 128/255 itself is not masked.

    (original: `run_local`, `> 128` on the 8-bit grey mask)
    """
    return np.rint(mask * np.float32(255)) > THRESHOLD


def check_mask(mask: np.ndarray, height: int, width: int, role: str = "mask") -> None:
    """Raise PictureError unless `mask` fits a picture of `height` x `width` and masks at least one pixel.

    Refused: another shape or size, NaN, values outside 0..1 (by more than 1e-3), no pixel above the
    threshold. `role` is how messages call it.
    """
    check_mask_values(mask, role)
    check_not_empty(mask, role)
    check_mask_size(mask, height, width, role)


def check_mask_size(mask: np.ndarray, height: int, width: int, role: str = "mask") -> None:
    """Raise PictureError unless `mask` `[H, W]` has the size of the picture."""
    if mask.shape != (height, width):
        raise PictureError(
            f"The {role} is {mask.shape[1]} x {mask.shape[0]} pixels, the picture "
            f"{width} x {height}. Give a mask of the picture's size."
        )


def check_mask_values(mask: np.ndarray, role: str = "mask") -> None:
    """Raise PictureError unless `mask` is one `[H, W]` of values within 0..1."""
    if mask.ndim != 2:
        raise PictureError(f"The {role} has the shape {list(mask.shape)}. Give one mask as [height, width].")
    low, high = float(mask.min()), float(mask.max())  # NaN survives min and max
    if math.isnan(low):
        raise PictureError(f"The {role} contains NaN values. Check the step that produced it.")
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        raise PictureError(f"The {role} has values from {low:.4g} to {high:.4g}. Masks must lie within 0 to 1.")


def check_not_empty(mask: np.ndarray, role: str = "mask") -> None:
    """Raise PictureError where no pixel of `mask` `[..., H, W]` counts as masked."""
    if not binarize(mask).any():
        raise PictureError(
            f"The {role} is empty: its largest value is {round(float(mask.max()) * 255)} of 255, and only "
            f"pixels above {THRESHOLD} count as masked. Paint the region to repaint in white."
        )


def mask_for_model(mask: np.ndarray, size: int) -> np.ndarray:
    """The mask as the model sees it: float32 `[size, size]` of only 0 and 1.

    Binarised, padded with black to a square, resized by Pillow's 8-bit LANCZOS, and cut at 0.5.
    (original: `infer_single` and diffusers' mask processor)
    """
    square = pad_to_square(_as_bytes(mask), 0)
    resized = resize_lanczos(square, size)
    return (resized.astype(np.float32) / np.float32(255) >= 0.5).astype(np.float32)


def latent_mask(model_mask: np.ndarray, scale_factor: int) -> torch.Tensor:
    """The model's mask `[H, W]` at latent size, float32 `[1, 1, H / f, W / f]`: the top-left pixel of each
    cell.

    Nearest, as in the original, so strokes thinner than `scale_factor` pixels may vanish. Raises
    ArgumentError where the sides are no multiples of `scale_factor`. (original: `prepare_mask_latents`)
    """
    height, width = model_mask.shape
    if height % scale_factor or width % scale_factor:
        raise ArgumentError(f"A mask of {width} x {height} does not divide into cells of {scale_factor} pixels.")
    cells = np.array(model_mask[::scale_factor, ::scale_factor], dtype=np.float32)
    return torch.from_numpy(cells)[None, None]


def keep_mask(mask: np.ndarray, size: int) -> torch.Tensor:
    """The opposite of a mask as Paint by Example and Magic Fixup see it, float32 `[1, 1, size, size]`: 1 = keep.

    Padded with black (keep) to a square, resized by Pillow's 8-bit LANCZOS, then cut: what is at least half masked,
    from 128 of 255 on, is repainted. (original: `1 - m / 255 >= 0.5`)
    """
    square = pad_to_square(np.rint(np.clip(mask, 0, 1) * 255).astype(np.uint8), 0)
    return torch.from_numpy((resize_lanczos(square, size) < THRESHOLD).astype(np.float32))[None, None]


def soft_latent_mask(model_mask: torch.Tensor, scale_factor: int) -> torch.Tensor:
    """A mask `[B, 1, H, W]` at latent size, `[B, 1, H / f, W / f]`: the mean of each cell's four middle pixels.

    Plain bilinear, so that edges become quarters. (original: Paint by Example's and Magic Fixup's resize, made before
    torchvision had antialiasing)
    """
    return F.interpolate(model_mask, scale_factor=1 / scale_factor, mode="bilinear", align_corners=False)


def latent_coverage(mask: np.ndarray, size: int, scale_factor: int) -> torch.Tensor:
    """How much of each latent cell a mask `[H, W]` covers, float32 `[1, 1, size / f, size / f]` in 0..1.

    Counted at the mask's own resolution, so that no region is too small to count.
    """
    square = torch.from_numpy(pad_to_square(binarize(mask), False)).float()
    return F.adaptive_avg_pool2d(square[None, None], size // scale_factor)


# -------------------- precision


def precise_mask(mask: np.ndarray, level: int) -> np.ndarray:
    """The mask with its shape taken less literally, a new float32 `[H, W]`: level 0 is the mask itself, 4 its
    filled bounding box.

    Levels 1 to 3 add what a Gaussian blur (sigma 6, 14 and 30 pixels where the picture's shorter side has 512)
    lifts above 0.1: low enough for the area to grow and for thin parts to stay. Each level contains the finer ones
    and none leaves the box, which the blur alone does not promise: a wide one loses specks that a narrow one keeps,
    and runs out of the box. Soft values below the added ones are kept; an empty mask stays empty. Raises
    ArgumentError for another level. (after the precision of SmartBrush, arXiv 2212.05034, which publishes neither
    widths nor threshold: these are ours)
    """
    if isinstance(level, bool) or not isinstance(level, (int, np.integer)) or not 0 <= level <= MAX_PRECISION_LEVEL:
        raise ArgumentError(
            f"The precision level is {level!r}; it must be a whole number from 0 (the exact silhouette) to "
            f"{MAX_PRECISION_LEVEL} (the bounding box)."
        )
    coarser = np.array(mask, np.float32)
    visible = mask > VISIBLE
    if level == 0 or not visible.any():
        return coarser
    box = bounding_box(visible)
    inside = coarser[box.slices]
    if level == MAX_PRECISION_LEVEL:
        inside[:] = 1
        return coarser
    for sigma in _PRECISION_SIGMAS[:level]:
        blurred = _blurred_inside(mask, box, sigma * min(mask.shape) / _PRECISION_SIDE)
        inside[blurred > _PRECISION_THRESHOLD] = 1
    return coarser


def _blurred_inside(mask: np.ndarray, box: "CropWindow", sigma: float) -> np.ndarray:
    """`gaussian_blur` of a mask that is black outside `box`, only there: float32 of the box's size."""
    around = box.grown(_gaussian_radius(sigma), *mask.shape)
    return gaussian_blur(mask[around.slices], sigma)[box.within(around).slices]


def gaussian_blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur `[H, W]` by a Gaussian of `sigma` pixels, cut at 3 sigma, the border pixels repeated: float32 `[H, W]`.

    As two products with band matrices, which is several times faster for wide blurs than a convolution.
    """
    height, width = values.shape
    return _gaussian_matrix(height, sigma) @ values.astype(np.float32) @ _gaussian_matrix(width, sigma).T


def _gaussian_matrix(length: int, sigma: float) -> np.ndarray:
    """What a blur takes of each pixel of a line, float32 `[length, length]`; rows sum to 1."""
    taps = np.arange(-_gaussian_radius(sigma), _gaussian_radius(sigma) + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    rows = np.arange(length)[:, None]
    matrix = np.zeros((length, length), np.float32)
    np.add.at(matrix, (rows, np.clip(rows + taps, 0, length - 1)), (weights / weights.sum()).astype(np.float32))
    return matrix


def _gaussian_radius(sigma: float) -> int:
    return math.ceil(3 * sigma)


# -------------------- growing and cleaning up


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The largest value within `pixels` in both directions (a square), `[H, W]` of the mask's own type."""
    side = 2 * pixels + 1
    across = F.max_pool2d(torch.from_numpy(mask.astype(np.float32))[None], (1, side), stride=1, padding=(0, pixels))
    return F.max_pool2d(across, (side, 1), stride=1, padding=(pixels, 0))[0].numpy().astype(mask.dtype)


def cleaned(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Without the spots and gaps that are up to about 2 * `pixels` across, bool `[H, W]`; 0 changes nothing.

    Each pixel goes with the majority around it, weighted by a Gaussian of `pixels`: straight edges stay where they
    are, corners become round.
    """
    return (mask if pixels == 0 else gaussian_blur(mask, pixels)) > 0.5


# -------------------- feathering and pasting


def feather_alpha(mask: np.ndarray, feather: int = 10, soft: bool = False) -> np.ndarray:
    """The opacity of the result when it is pasted back, uint8 `[H, W]`.

    The binarised mask, blurred `feather` times by 3x3: 255 well inside, 0 further than `feather` pixels
    outside; 0 passes give a hard edge, 10 are the original's. With `soft` the mask's own grey values are
    blurred instead, so that an artist's soft edge stays: a binary mask gives the same either way. Raises
    ArgumentError for a negative or fractional count. (original: `run_local`, ten times
    cv2.GaussianBlur(3x3, sigma 0); its benchmark script blurs the soft mask)
    """
    if isinstance(feather, bool) or not isinstance(feather, (int, np.integer)) or feather < 0:
        raise ArgumentError(f"The feather must be a whole number of pixels, 0 or more, not {feather!r}.")
    values = np.rint(np.clip(mask, 0, 1) * 255).astype(np.uint8) if soft else _as_bytes(mask)
    return binomial_blur(values, int(feather))


def binomial_blur(values: np.ndarray, passes: int) -> np.ndarray:
    """Blur uint8 `[H, W]` `passes` times with the 3x3 kernel [1 2 1] x [1 2 1] / 16; a new uint8 array.

    Each pass rounds back to 8 bits, (sum + 8) >> 4, and mirrors at the picture's borders without repeating
    the border pixel: bit-exact with cv2.GaussianBlur on uint8. Only the surroundings of the non-zero pixels
    are computed.
    """
    blurred = values.copy()
    if not values.any():
        return blurred
    # One pixel more than the blur can reach: mirroring at the window's inner borders then only meets zeros.
    rows, columns = bounding_box(values > 0).grown(passes + 1, *values.shape).slices
    part = values[rows, columns].astype(np.uint16)
    for _ in range(passes):
        part = _blur_once(part)
    blurred[rows, columns] = part
    return blurred


def _blur_once(part: np.ndarray) -> np.ndarray:
    padded = np.pad(part, 1, mode="reflect")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]  # at most 4 * 255
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] + 8) >> 4  # at most 16 * 255 + 8


def paste_back(result: np.ndarray, source: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend `result` over `source` (both uint8 `[H, W, 3]`) by `alpha` uint8 `[H, W]`; a new uint8 array.

    The mix is truncated, not rounded, as in the original. Where alpha is 0 the source's bytes are kept, where
    it is 255 the result's. Raises ArgumentError where the sizes differ. (original: the end of `run_local`)
    """
    if not (result.shape == source.shape and alpha.shape == source.shape[:2]):
        raise ArgumentError(
            f"Result {list(result.shape)}, source {list(source.shape)} and alpha "
            f"{list(alpha.shape)} do not fit together."
        )
    pasted = np.where((alpha == 255)[..., None], result, source)
    # Only the soft border needs arithmetic; float64 because truncation shows the last bit.
    border = (alpha > 0) & (alpha < 255)
    weight = alpha[border].astype(np.float64)[:, None] / 255
    pasted[border] = (result[border] * weight + source[border] * (1 - weight)).astype(np.uint8)
    return pasted


def paste_back_float(result: _Values, source: _Values, alpha: np.ndarray | torch.Tensor) -> _Values:
    """Blend `result` over `source`, both floating point 0..1 `[..., H, W, C]` arrays or tensors, by `alpha`.

    `alpha`: uint8 `[H, W]`, or `[..., H, W]` for one per picture. The leading (batch) dimensions broadcast.
    Returns the kind and dtype of `source`, neither rounded nor truncated; where alpha is 0 the source is kept
    bit for bit (also where the result is NaN).
    """
    base = torch.as_tensor(source)
    painted = torch.as_tensor(result).to(base)
    opacity = torch.as_tensor(alpha).to(base.device)[..., None]
    weight = opacity.to(base.dtype) / 255
    pasted = torch.where(opacity == 0, base, painted * weight + base * (1 - weight))
    return pasted.numpy() if isinstance(source, np.ndarray) else pasted


def seam_offset(result: np.ndarray, source: np.ndarray, hole: np.ndarray, reach: int) -> np.ndarray:
    """How much brighter the source is than the result just outside the hole, float32 `[3]` in 0..255.

    result, source: uint8 `[H, W, 3]`; hole: bool `[H, W]`; the ring is `reach` pixels wide. Both pictures
    show the same there, so what differs (the median, per channel) is the model's own drift of colour. Zero
    where there is no ring: a mask that covers everything has no seam.
    """
    ring = grown(hole, reach) & ~hole
    if not ring.any():
        return np.zeros(3, np.float32)
    return np.median(source[ring].astype(np.float32) - result[ring], axis=0)


def _as_bytes(mask: np.ndarray) -> np.ndarray:
    return binarize(mask).astype(np.uint8) * np.uint8(255)


# -------------------- crop windows


@dataclass(frozen=True)
class CropWindow:
    """A part of the source picture, in its pixels; square unless the picture is smaller than the square."""

    x: int
    y: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """(rows, columns), to index `[H, W, ...]` arrays with."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)

    def placed(self, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """A copy of `whole` `[H, W, ...]` with `part` in this window."""
        result = whole.copy()
        result[self.slices] = part
        return result

    def joined(self, other: "CropWindow") -> "CropWindow":
        """The smallest window that holds both."""
        left, top = min(self.x, other.x), min(self.y, other.y)
        right, bottom = (
            max(self.x + self.width, other.x + other.width),
            max(self.y + self.height, other.y + other.height),
        )
        return CropWindow(left, top, right - left, bottom - top)

    def within(self, other: "CropWindow") -> "CropWindow":
        """This window as seen from the upper left corner of another one around it."""
        return CropWindow(self.x - other.x, self.y - other.y, self.width, self.height)

    def grown(self, pixels: int, height: int, width: int) -> "CropWindow":
        """This window with `pixels` more on each side, cut at the borders of a picture of `height` x
        `width`."""
        left, top = max(self.x - pixels, 0), max(self.y - pixels, 0)
        right = min(self.x + self.width + pixels, width)
        bottom = min(self.y + self.height + pixels, height)
        return CropWindow(left, top, right - left, bottom - top)


def whole_picture(height: int, width: int) -> CropWindow:
    """The window that is the whole picture."""
    return CropWindow(0, 0, width, height)


def zoom_window(mask: np.ndarray, margin: float = 0.5, minimum: int = ZOOM_MINIMUM, feather: int = 10) -> CropWindow:
    """A square window around the mask, to repaint a small region at the model's full resolution.

    `margin` is relative: on each side of the mask's bounding box at least this share of its longest side
    stays visible, so 0.5 makes the window twice as wide as the mask, 0 cuts it tight. It never gets smaller
    than `minimum` pixels, nor so small that the feather (`feather` passes, plus one pixel) is cut off. The
    window is centred on the mask and shifted to stay inside the picture; where the picture is shorter than
    the window, it is cut to the picture and no longer square (padded to a square later, like any whole
    picture). Raises PictureError for an empty mask, ArgumentError for a setting out of range.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ArgumentError(f"The zoom margin must be 0 or more, not {margin!r}.")
    if minimum < 1 or feather < 0:
        raise ArgumentError(
            f"The smallest window ({minimum!r}) must be at least 1 pixel, the feather ({feather!r}) at least 0."
        )
    hole = binarize(mask)
    if not hole.any():
        raise PictureError(
            f"The mask is empty (no pixel above {THRESHOLD} of 255), so there is nothing to "
            "zoom to. Paint the region to repaint in white."
        )
    box = bounding_box(hole)
    longest = max(box.width, box.height)
    side = max(math.ceil(longest * (1 + 2 * margin)), longest + 2 * (feather + 1), minimum)
    x, width = _place(box.x, box.width, side, mask.shape[1])
    y, height = _place(box.y, box.height, side, mask.shape[0])
    return CropWindow(x, y, width, height)


def _place(start: int, length: int, side: int, limit: int) -> tuple[int, int]:
    """Start and length of a stretch of `side` pixels centred on start..start + length, inside 0..limit."""
    side = min(side, limit)
    first = start - (side - length) // 2
    return min(max(first, 0), limit - side), side


def bounding_box(hole: np.ndarray) -> CropWindow:
    """The smallest window that holds every True of a bool `[H, W]` array with at least one."""
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return CropWindow(left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
