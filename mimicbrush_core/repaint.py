"""The whole edit, whatever the system: pictures checked, cut to a window, encoded, sampled, fitted and finished.

A system (`systems/`) says how its inputs are encoded and sampled; all else is here, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import editing, images, masks
from .checkpoints import embedded_model_path, load_modules
from .editing import BatchResult, EditResult, Progress, RepaintSettings, Reporter
from .encoders import decode_latents, encode_latents
from .errors import ArgumentError
from .modules import Parts
from .sampling import Draw, SeededDraws, make_scheduler

PREVIEW_LATENT_SIDE = 32


@dataclass(frozen=True)
class Condition:
    """What rides beside the latents of B pictures; every field is a tensor [B,...]."""

    @classmethod
    def of(cls, conditions: Sequence[Condition]) -> Condition:
        """Several as one batch."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(one, name) for one in conditions]) for name in names})


@dataclass(frozen=True)
class Work:
    """How the pictures of one call are repainted.

    condition(index, part, mask): of picture number `index`, whose window is `part` uint8 [h,w,3], its mask [h,w].
    sample(condition, draw, scheduler, report) -> latents [B,4,h,w]; all its randomness is drawn from `draw`.
    features: how many features of references are written ahead in the course of it.
    region(index, mask): asked for after the sampling, what of its mask [h,w] was repainted; default: all.
    """

    condition: Callable[[int, np.ndarray, np.ndarray], Condition]
    sample: Callable[[Condition, Draw, object, Reporter], Tensor]
    features: int = 0
    region: Callable[[int, np.ndarray], np.ndarray] = lambda index, mask: mask


Begin = Callable[[Sequence[np.ndarray], Sequence[np.ndarray], masks.CropWindow, RepaintSettings], Work]
"""begin(sources, masks, window, settings): what can be refused is refused here, and what all share is encoded."""


class Repainter:
    """A loaded model of any system. One instance serves any number of edits.

    system: as a configuration names it.
    """

    system: ClassVar[str]

    def __init__(self, modules: Parts, config: dict):
        self.modules = modules
        self.config = config

    @classmethod
    def load(
        cls,
        path: str | os.PathLike | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **files,
    ):
        """Load a model onto a device; default: the system's embedded one. `files` as in `checkpoints.load_modules`.

        Raises ModelFileError.
        """
        modules, config = load_modules(path or embedded_model_path(cls.system), system=cls.system, dtype=dtype, **files)
        return cls(modules, config).to(device)

    def to(self, device: str | torch.device):
        for _, module in self.modules.items():
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.modules.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.modules.unet.dtype

    @property
    def latent_factor(self) -> int:
        """Picture pixels per latent, 8 for SD-1.5."""
        vae = self.config["vae"]
        return 2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """What the side of the model's square must be a multiple of."""
        # The U-Net halves the latents once per level below the first.
        return self.latent_factor * 2 ** (len(self.config["unet"]["block_out_channels"]) - 1)

    # -- latents --------------------------------------------------------------------------------------------

    def _encode(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        vae = self.modules.vae
        noise = None if noise is None else noise.to(vae.device, vae.dtype)
        return encode_latents(vae, pixels.to(vae.device, vae.dtype), noise).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B,4,h,w] -> pictures uint8 [B,H,W,3]."""
        return images.from_model_range(decode_latents(self.modules.vae, latents.to(self.dtype)).float())

    def preview(self, latents: Tensor) -> np.ndarray:
        """The first picture of the batch, decoded from reduced latents: quick and coarse, uint8 [h,w,3]."""
        shrink = max(1, max(latents.shape[-2:]) // PREVIEW_LATENT_SIDE)
        return self.decode(F.avg_pool2d(latents[:1], shrink))[0]

    # -- settings -------------------------------------------------------------------------------------------

    def _size(self, size: int | None) -> int:
        size, multiple = size or self.config["defaults"]["size"], self.size_multiple
        if size < multiple or size % multiple:
            raise ArgumentError(f"size is {size}; this model needs a multiple of {multiple}.")
        return size

    def _scheduler(self, settings: RepaintSettings):
        return make_scheduler(self.config["scheduler"], settings.scheduler, settings.steps, settings.spacing)

    def own_scheduler(self, steps: int):
        """The one that the model is sampled with where nothing else is asked for."""
        return make_scheduler(self.config["scheduler"], self.config["defaults"]["scheduler"], steps)

    def _completed(self, settings: RepaintSettings, size: int | None) -> RepaintSettings:
        """Check the settings and fill in the model's defaults; size: that of what is encoded already."""
        settings.check()
        defaults = self.config["defaults"]
        filled = {key: defaults[key] for key in ("steps", "guidance", "scheduler") if getattr(settings, key) is None}
        completed = replace(settings, size=self._size(settings.size or size), **filled)
        self._scheduler(completed)  # raises for what does not fit, before any work is done
        return completed

    # -- the whole edit -------------------------------------------------------------------------------------

    def _edit(
        self,
        source: np.ndarray,
        mask: np.ndarray,
        settings: RepaintSettings,
        begin: Begin,
        on_progress: Callable[[Progress], None] | None,
        size: int | None = None,
    ) -> EditResult:
        """Repaint the masked region of one picture; size: of what `begin` has encoded already."""
        source = images.picture_from_array(source, "source")
        masks.check_mask(mask, *source.shape[:2])
        settings = self._completed(settings, size)
        window = editing.edit_window([masks.binarize(mask).astype(np.float32)], settings)
        [raw], [mask] = self._repaint([source], [mask], window, settings, begin, on_progress)
        alpha = editing.opacity(mask, window, settings)
        return EditResult(editing.pasted(source, raw, alpha, window), raw, alpha, window, settings)

    def _edit_batch(
        self,
        sources: Tensor,
        mask: Tensor,
        settings: RepaintSettings,
        begin: Begin,
        on_progress: Callable[[Progress], None] | None,
        size: int | None = None,
        counts: dict[str, int] | None = None,
    ) -> BatchResult:
        """Repaint a batch; counts: how many of what else there are, by name, each one or one per picture."""
        source_list = editing.eight_bit_pictures(sources, "source")
        mask_list = editing.checked_masks(mask, *sources.shape[1:3])
        count = editing.batch_size({"source": len(source_list), "mask": len(mask_list), **(counts or {})})
        settings = self._completed(settings, size)
        window = editing.edit_window(mask_list, settings)
        source_list, mask_list = editing.repeated(source_list, count), editing.repeated(mask_list, count)
        raw_list, mask_list = self._repaint(source_list, mask_list, window, settings, begin, on_progress)

        alpha = np.stack([editing.opacity(one, window, settings, soft=True) for one in mask_list])
        raw = torch.from_numpy(np.stack(raw_list)).float() / 255
        pictures = editing.pasted_batch(sources.expand(count, -1, -1, -1), raw, alpha, window)
        return BatchResult(pictures, raw, torch.from_numpy(alpha).float() / 255, window, settings)

    def _repaint(
        self,
        sources: Sequence[np.ndarray],
        mask_list: Sequence[np.ndarray],
        window: masks.CropWindow,
        settings: RepaintSettings,
        begin: Begin,
        on_progress: Callable[[Progress], None] | None,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The model's answers for the window of each picture, uint8 [h,w,3], and the masks [H,W] of what they repaint.

        Where nothing is masked, the answer is the source.
        """
        work = begin(sources, mask_list, window, settings)
        parts = [source[window.slices] for source in sources]
        part_masks = [mask[window.slices] for mask in mask_list]
        answers, regions = list(parts), list(mask_list)
        seeds = settings.seeds(len(parts))
        to_do = [index for index, mask in enumerate(part_masks) if masks.binarize(mask).any()]
        chunks = [to_do[start : start + settings.at_once] for start in range(0, len(to_do), settings.at_once)]
        evaluations = len(chunks) * len(self._scheduler(settings).timesteps)
        report = Reporter(on_progress, work.features, work.features + evaluations, self.preview)
        side = settings.size // self.latent_factor
        latent_shape = (self.config["vae"]["latent_channels"], side, side)
        for chunk in chunks:
            conditions = [work.condition(index, parts[index], part_masks[index]) for index in chunk]
            draw = SeededDraws([seeds[index] for index in chunk], latent_shape)
            latents = work.sample(conditions[0].of(conditions), draw, self._scheduler(settings), report)
            for index, latent in zip(chunk, latents.split(1), strict=True):  # the decoder needs the most memory
                raw = self._fitted(self.decode(latent)[0], *parts[index].shape[:2])
                region = work.region(index, part_masks[index])
                answers[index] = editing.color_matched(raw, parts[index], region, settings)
                regions[index] = window.placed(region, mask_list[index])
        return answers, regions

    def _fitted(self, square: np.ndarray, height: int, width: int) -> np.ndarray:
        """The model's square answer -> uint8 [height,width,3]: scaled to the long side, padding cropped."""
        side = max(height, width)
        return images.crop_padding(images.resize_bilinear(square, side, side), height, width)


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
