"""The mask tools on batches of pictures: masks taken less literally, what an edit changed, the background kept.

They serve every system and other generators as well. Pictures are float tensors [B,H,W,3 or 4] in 0..1, masks float
tensors [B,H,W] in 0..1, 1 = repaint; each one of a batch, or one for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import masks
from .editing import batch_size, eight_bit_pictures, mask_arrays, pasted_batch, repeated
from .errors import ArgumentError, PictureError

MAX_THRESHOLD = 100.0
MAX_CLEAN_UP = 64
MAX_SOFTNESS = 64.0
MAX_FEATHER = 256

_NOISE_SIGMA = 2.0  # pixels; grain and the blocks of compression are finer than that

# sRGB (IEC 61966-2-1) to CIE XYZ, each row divided by the white point D65, so that white is 1, 1, 1
_XYZ_OF_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_XYZ_OF_RGB /= _XYZ_OF_RGB.sum(axis=1, keepdims=True)


# --- precision -----------------------------------------------------------------------------------------------


def precise_masks(mask: Tensor, level: int) -> Tensor:
    """`masks.precise_mask` of each, float32 [B,H,W]; raises PictureError for what is no mask."""
    return _as_batch([masks.precise_mask(one, level) for one in _checked_masks(mask)])


# --- change --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChangeSettings:
    """When a difference counts as a change.

    threshold: CIE76 colour difference (Delta E; about 2.3 is just noticeable side by side) up to which it does not.
    clean_up: spots and gaps up to twice this many pixels across are taken for noise.
    softness: sigma in pixels by which the mask's edge is blurred; 0 = a hard edge.
    """

    threshold: float = 10.0
    clean_up: int = 4
    softness: float = 2.0

    def check(self) -> None:
        """Raise ArgumentError for a number out of its range."""
        _check_range("threshold", self.threshold, 0, MAX_THRESHOLD)
        _check_range("clean_up", self.clean_up, 0, MAX_CLEAN_UP)
        _check_range("softness", self.softness, 0, MAX_SOFTNESS)


def change_masks(
    before: Tensor, after: Tensor, settings: ChangeSettings | None = None, within: Tensor | None = None
) -> Tensor:
    """Where `after` differs from `before` visibly, float32 [N,H,W]: estimated from the colours, not predicted.

    within: masks; nothing outside them counts. Equal pictures give an empty mask. Transparent pictures are compared
    on white. Raises ArgumentError for settings, PictureError for pictures and masks that do not fit together.
    """
    settings = settings or ChangeSettings()
    settings.check()
    _check_same_size(before, after, "before", "after")
    before_list, after_list = eight_bit_pictures(before, "before"), eight_bit_pictures(after, "after")
    within = torch.ones(1, *before.shape[1:3]) if within is None else within
    limits = _checked_masks(within, *before.shape[1:3])
    count = batch_size({"before picture": len(before_list), "after picture": len(after_list), "mask": len(limits)})
    triples = zip(*(repeated(given, count) for given in (before_list, after_list, limits)), strict=True)
    return _as_batch([np.minimum(change_mask(one, other, settings), limit) for one, other, limit in triples])


def change_mask(before: np.ndarray, after: np.ndarray, settings: ChangeSettings) -> np.ndarray:
    """Where two pictures uint8 [H,W,3] differ visibly, float32 [H,W] in 0..1."""
    changed = masks.gaussian_blur(color_difference(before, after), _NOISE_SIGMA) > settings.threshold
    mask = masks.cleaned(changed, settings.clean_up).astype(np.float32)
    return masks.gaussian_blur(mask, settings.softness).clip(0, 1) if settings.softness > 0 else mask


def color_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How different two pictures uint8 [H,W,3] look, pixel by pixel: CIE76 Delta E, float32 [H,W]."""
    difference = np.zeros(first.shape[:2], np.float32)
    differs = (first != second).any(axis=-1)  # often a small part, and the only one that takes time
    difference[differs] = np.linalg.norm(_lab(first[differs]) - _lab(second[differs]), axis=-1)
    return difference


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 [N,3] in CIE L*a*b* (D65), float32 [N,3]."""
    levels = np.arange(256) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4).astype(np.float32)
    xyz = linear[rgb] @ _XYZ_OF_RGB.T.astype(np.float32)
    x, y, z = np.moveaxis(np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


# --- background ----------------------------------------------------------------------------------------------


def blended(
    background: Tensor, edited: Tensor, mask: Tensor, feather: int = 10, color_match: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The masked region of `edited` over `background`: pictures [N,H,W,C] like the background, opacities float32
    [N,H,W].

    feather: how many pixels the region fades out beyond the mask; soft mask values blend softly.
    color_match: 0..1, how much of the colour difference just outside the mask is taken off the edited picture.
    Where the opacity is 0 the background is kept bit for bit. A transparent background gets more opaque where the
    region covers it; the edited picture's own transparency does not count. Raises ArgumentError for settings,
    PictureError for pictures and masks that do not fit together.
    """
    _check_range("feather", feather, 0, MAX_FEATHER)
    _check_range("color_match", color_match, 0, 1)
    check_pictures(background, "background")
    check_pictures(edited, "edited picture")
    _check_same_size(background, edited, "background", "edited")
    mask_list = _checked_masks(mask, *background.shape[1:3])
    count = batch_size({"background": len(background), "edited picture": len(edited), "mask": len(mask_list)})
    background, edited = (one.expand(count, -1, -1, -1) for one in (background, edited[..., :3]))
    mask_list = repeated(mask_list, count)
    if color_match > 0:
        edited = edited + color_match * _seam_offsets(edited, background, mask_list, reach=feather + 4).to(edited)
        edited = edited.clamp(0, 1)
    alpha = np.stack([masks.feather_alpha(one, feather, soft=True) for one in mask_list])
    height, width = alpha.shape[1:]
    pictures = pasted_batch(background, edited, alpha, masks.whole_picture(height, width))
    return pictures, torch.from_numpy(alpha).float() / 255


def _seam_offsets(edited: Tensor, background: Tensor, mask_list: Sequence[np.ndarray], reach: int) -> Tensor:
    """`masks.seam_offset` of each picture, in 0..1: float32 [N,1,1,3]."""
    offsets = [
        masks.seam_offset(result, source, mask > masks.VISIBLE, reach)
        for result, source, mask in zip(
            eight_bit_pictures(edited, "edited picture"),
            eight_bit_pictures(background, "background"),
            mask_list,
            strict=True,
        )
    ]
    return torch.from_numpy(np.stack(offsets))[:, None, None] / 255


# --- checks --------------------------------------------------------------------------------------------------


def check_pictures(pictures: Tensor, role: str) -> None:
    """Raise PictureError unless `pictures` are finite and [B,H,W,3 or 4]."""
    if pictures.ndim != 4 or pictures.shape[-1] not in (3, 4):
        raise PictureError(
            f"The {role} has the shape {list(pictures.shape)}. Give pictures as [batch, height, width, 3 or 4]."
        )
    if not pictures.isfinite().all():
        raise PictureError(f"The {role} contains NaN or infinite values. Check the step that produced it.")


def _check_same_size(first: Tensor, second: Tensor, first_role: str, second_role: str) -> None:
    if first.shape[1:3] != second.shape[1:3]:
        (height, width), (other_height, other_width) = first.shape[1:3], second.shape[1:3]
        raise PictureError(
            f"{second_role} is {other_width} x {other_height} pixels, {first_role} {width} x {height}. "
            "Scale or crop one of them to the other's size first."
        )


def _checked_masks(mask: Tensor, height: int | None = None, width: int | None = None) -> list[np.ndarray]:
    """float32 [H,W] each, checked, of this size if it is given; they may be empty."""
    arrays = mask_arrays(mask)
    for array in arrays:
        masks.check_mask_values(array)
        if height is not None:
            masks.check_mask_size(array, height, width)
    return arrays


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ArgumentError(f"{name} is {value}; it must be between {low:g} and {high:g}.")


def _as_batch(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
