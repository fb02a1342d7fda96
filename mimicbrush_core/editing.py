"""What an edit is, whatever the system: its settings, its progress, its results, and how a picture is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from . import images, masks
from .acceleration import EXACT, Acceleration
from .errors import ArgumentError, PictureError
from .sampling import StepInfo

MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class RepaintSettings:
    """How an edit is made, by whatever system. None means the model's own default.

    seed: 0..2^63-1, drawn on the CPU: the same picture on every device, alone or in a batch.
    steps: 1..500. guidance: 1 = conditional prediction only. scheduler: a name of `sampling.SCHEDULERS`, or `PLMS`;
        spacing: of its timesteps, a name of `sampling.SPACINGS`.
    size: side of the square the model works on, a multiple of 64; None: that of the encoded reference.
    zoom: edit a window around the mask at full resolution instead of the whole picture; margin: its border
        on each side relative to the mask's longer side; minimum: its smallest side in pixels.
    paste_back: only the masked region is taken from the model's answer, the rest stays the source's own; otherwise
        the whole window is the model's, as its VAE gives it back.
    feather: how many pixels the edit fades out beyond the mask.
    color_match: 0..1, how much of the colour difference just outside the mask is taken off the edit.
    count_up: in a batch, picture i takes seed + i; otherwise all take the same.
    at_once: how many pictures of a batch the model works on together.
    """

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    spacing: str | None = None
    size: int | None = None
    zoom: bool = False
    margin: float = 0.5
    minimum: int = masks.ZOOM_MINIMUM
    paste_back: bool = True
    feather: int = 10
    color_match: float = 0.0
    count_up: bool = False
    at_once: int = 4

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "seed": (0, 2**63 - 1),
        "guidance": (0.0, MAX_GUIDANCE),
        "margin": (0.0, 10.0),
        "minimum": (1, images.MAX_SIDE),
        "feather": (0, 256),
        "color_match": (0.0, 1.0),
        "at_once": (1, 1024),
    }

    def check(self) -> None:
        """Raise ArgumentError for a number out of its range."""
        for name, (low, high) in self.LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(f"{name} is {value}; it must be between {low} and {high}.")

    def seeds(self, count: int) -> list[int]:
        """One per picture of a batch."""
        return [(self.seed + index) % 2**63 if self.count_up else self.seed for index in range(count)]


@dataclass(frozen=True)
class EditSettings(RepaintSettings):
    """How MimicBrush makes an edit.

    weight: of a reference given without its own; 0 = as if there were none, 1 = as trained.
    keep_shape: 0..1, how strictly the source's depth is kept (texture transfer).
    acceleration: what may be approximated, to be faster.
    """

    weight: float = 1.0
    keep_shape: float = 0.0
    acceleration: Acceleration = EXACT

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        **RepaintSettings.LIMITS,
        "weight": (0.0, 10.0),
        "keep_shape": (0.0, 1.0),
    }

    def check(self) -> None:
        super().check()
        self.acceleration.check()


@dataclass(frozen=True)
class Progress:
    """Handed to `on_progress` after each piece of work; raise there (e.g. `Cancelled`) to stop the edit.

    stage: "reference" (features written ahead) or "sampling". done of total: over the whole call.
    preview(): uint8 [h,w,3], the picture as predicted now, decoded small; None outside sampling. It costs a small
    decode, only when called.
    """

    stage: str
    done: int
    total: int
    preview: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class EditResult:
    """picture: uint8 [H,W,3], the edit pasted back, bit-identical to the source beyond the feather.
    raw: uint8 [h,w,3], the model's whole answer for `window`, not pasted.
    alpha: uint8 [H,W], how much of the edit each pixel took. settings: with the model's defaults filled in.
    """

    picture: np.ndarray
    raw: np.ndarray
    alpha: np.ndarray
    window: masks.CropWindow
    settings: RepaintSettings


@dataclass(frozen=True)
class BatchResult:
    """pictures: float [N,H,W,C] like the sources, bit-identical to them where `alpha` is 0.
    raw: float32 [N,h,w,3], the model's whole answers for `window`. alpha: float32 [N,H,W] in 0..1.
    window: one for all pictures, so that the crop of a video does not jump.
    """

    pictures: Tensor
    raw: Tensor
    alpha: Tensor
    window: masks.CropWindow
    settings: RepaintSettings


class Reporter:
    """Counts an edit's work and tells `on_progress` of it.

    features: how many features of references are written ahead. total: these and all evaluations of the model.
    preview(latents) -> uint8 [h,w,3].
    """

    def __init__(self, on_progress: Callable[[Progress], None] | None, features: int, total: int, preview):
        self._tell = on_progress or (lambda progress: None)
        self._features, self._total, self._preview = features, total, preview
        self._written = self._steps = 0

    def features(self, count: int) -> None:
        """`count` more features were written."""
        self._written += count
        self._tell(Progress("reference", min(self._written, self._features), self._total))

    def step(self, info: StepInfo) -> None:
        """One more evaluation was made."""
        self._steps += 1
        # Features beyond the store's bound are not written ahead: sampling starts after all that were counted.
        done = self._features + self._steps
        self._tell(Progress("sampling", done, self._total, lambda: self._preview(info.predicted_latents)))


# --- batches -------------------------------------------------------------------------------------------------


def batch_size(counts: dict[str, int]) -> int:
    """How many pictures a batch makes when each role gives 1 or N; raises PictureError for other counts."""
    wanted = max(counts.values())
    if any(count not in (1, wanted) for count in counts.values()):
        listed = ", ".join(f"{count} {role}{'s' if count != 1 else ''}" for role, count in counts.items())
        raise PictureError(
            f"The batches do not fit together: {listed}. Each must hold either one (used for all) or as many as the "
            "longest."
        )
    return wanted


def repeated(values: Sequence, count: int) -> list:
    """One value for each of `count` pictures, from one or `count` values."""
    return list(values) if len(values) == count else [values[0]] * count


def eight_bit_pictures(pictures: Tensor, role: str) -> list[np.ndarray]:
    """Float [B,H,W,C] as the models see them: uint8 [H,W,3] each, values beyond 0..1 clipped."""
    if pictures.ndim != 4:
        raise PictureError(
            f"The {role} has the shape {list(pictures.shape)}. Give pictures as [batch, height, width, channels]."
        )
    # NaN survives the clamp and is refused by name; infinities become white or black.
    return [images.picture_from_array(picture.float().clamp(0, 1), role) for picture in pictures]


def mask_arrays(mask: Tensor) -> list[np.ndarray]:
    """Float [B,H,W] masks, or one [H,W], as float32 [H,W] each."""
    return [one.detach().cpu().float().numpy() for one in (mask[None] if mask.ndim == 2 else mask)]


def checked_masks(mask: Tensor, height: int, width: int) -> list[np.ndarray]:
    """`mask_arrays`, checked; some may be empty (frames to leave alone), not all."""
    arrays = mask_arrays(mask)
    for array in arrays:
        masks.check_mask_values(array)
    fullest = max(arrays, key=lambda array: float(array.max()))
    masks.check_mask(fullest, height, width)
    return arrays


def edit_window(mask_list: Sequence[np.ndarray], settings: RepaintSettings) -> masks.CropWindow:
    """The window to work on: the whole picture, or with `zoom` a square around everything the masks touch."""
    touched = np.maximum.reduce([mask > masks.VISIBLE for mask in mask_list])
    if not settings.zoom:
        return masks.whole_picture(*touched.shape)
    return masks.zoom_window(touched.astype(np.float32), settings.margin, settings.minimum, settings.feather)


# --- finishing a picture -------------------------------------------------------------------------------------


def opacity(mask: np.ndarray, window: masks.CropWindow, settings: RepaintSettings, soft: bool = False) -> np.ndarray:
    """How much of the model's answer for `window` each pixel takes, uint8 [H,W]; mask float [H,W].

    soft: the mask's grey values blend softly. Nothing of it where nothing is masked.
    """
    if settings.paste_back:
        return masks.feather_alpha(mask, settings.feather, soft) * masks.binarize(mask).any()
    alpha = np.zeros(mask.shape, np.uint8)
    alpha[window.slices] = 255 * masks.binarize(mask).any()
    return alpha


def color_matched(raw: np.ndarray, part: np.ndarray, mask: np.ndarray, settings: RepaintSettings) -> np.ndarray:
    """The model's answer, shifted towards the source's colours at the seam; all uint8 [h,w,3], mask float [h,w]."""
    if settings.color_match == 0:
        return raw
    offset = masks.seam_offset(raw, part, mask > masks.VISIBLE, reach=settings.feather + 4)
    shifted = raw + np.float32(settings.color_match) * offset
    return np.rint(shifted).clip(0, 255).astype(np.uint8)


def pasted(source: np.ndarray, raw: np.ndarray, alpha: np.ndarray, window: masks.CropWindow) -> np.ndarray:
    """One picture, uint8 [H,W,3], with the edit of `window` blended in as the original does it."""
    return window.placed(masks.paste_back(raw, source[window.slices], alpha[window.slices]), source)


def pasted_batch(sources: Tensor, raw: Tensor, alpha: np.ndarray, window: masks.CropWindow) -> Tensor:
    """Float sources [N,H,W,C] with float edits [N,h,w,3] of `window` blended in by alpha uint8 [N,H,W].

    Beyond alpha nothing changes, in no bit. A fourth channel (transparency) is made that much more opaque.
    """
    rows, columns = window.slices
    pictures = sources.clone()
    part, part_alpha = pictures[:, rows, columns], np.ascontiguousarray(alpha[:, rows, columns])
    part[..., :3] = masks.paste_back_float(raw.to(part), part[..., :3], part_alpha)
    if part.shape[-1] == 4:
        opaque = torch.ones_like(part[..., 3:])
        part[..., 3:] = masks.paste_back_float(opaque, part[..., 3:], part_alpha)
    return pictures
