"""MimicBrush: what it reads, how its inputs are prepared, how its reference is read, how a picture is finished.

Chen et al., "Zero-shot Image Editing with Reference Imitation", NeurIPS 2024, arXiv 2406.07547. Where the
released code and the paper differ, the released code is followed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import images, masks
from ..attention import ReferenceFeatures, ReferenceReading
from ..checkpoints import embedded_model_path, load_modules
from ..depth import estimate_depth, no_depth_map
from ..encoders import decode_latents, encode_latents, image_tokens, unconditional_tokens
from ..errors import ArgumentError
from ..modules import Modules
from ..references import Reference
from ..sampling import StepInfo, denoise, guide, initial_noise, make_scheduler

WHITE, BLACK = 255, 0
MAX_GUIDANCE = 100.0
PREVIEW_LATENT_SIDE = 32


@dataclass(frozen=True)
class EditSettings:
    """How an edit is made. None means the model's own default.

    seed: 0..2^63-1, drawn on the CPU: the same picture on every device, alone or in a batch.
    steps: 1..1000. guidance: 1 = conditional prediction only. scheduler: a name of `sampling.SCHEDULERS`.
    size: side of the square the model works on, a multiple of 64.
    weight: of the reference; 0 = as if there were none, 1 = as trained.
    keep_shape: condition on the source's depth (texture transfer).
    zoom: edit a window around the mask at full resolution instead of the whole picture; margin: its border
        on each side relative to the mask's longer side; minimum: its smallest side in pixels.
    feather: how many pixels the edit fades out beyond the mask.
    """

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    size: int | None = None
    weight: float = 1.0
    keep_shape: bool = False
    zoom: bool = False
    margin: float = 0.5
    minimum: int = masks.ZOOM_MINIMUM
    feather: int = 10


@dataclass(frozen=True)
class Progress:
    """Handed to `on_progress` after each piece of work; raise `Cancelled` there to stop the edit.

    stage: "reference" (features written ahead) or "sampling". preview(): uint8 [h,w,3], the picture as predicted
    now, decoded small; None outside sampling. It costs a small decode, only when called.
    """

    stage: str
    done: int
    total: int
    preview: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class SourceCondition:
    """What rides beside the latents: mask [B,1,h,w], latents of the holed picture [B,4,h,w], depth [B,4,h,w]."""

    mask: Tensor
    hole_latents: Tensor
    depth: Tensor

    def channels(self) -> Tensor:
        """[B,9,h,w] in the original's order."""
        return torch.cat([self.mask, self.hole_latents, self.depth], dim=1)


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
    settings: EditSettings


class MimicBrush:
    """A loaded model. One instance serves any number of edits; it caches only constants of its weights."""

    def __init__(self, modules: Modules, config: dict):
        self.modules = modules
        self.config = config
        self._unconditional: Tensor | None = None
        self._no_depth: Tensor | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **files,
    ) -> MimicBrush:
        """Load a model (default: the embedded one) onto a device; `files` as in `checkpoints.load_modules`."""
        modules, config = load_modules(path or embedded_model_path(), dtype=dtype, **files)
        return cls(modules, config).to(device)

    def to(self, device: str | torch.device) -> MimicBrush:
        for _, module in self.modules.items():
            module.to(device)
        self._unconditional = self._no_depth = None
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

    # -- conditions -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_reference(self, picture: np.ndarray, size: int | None = None, noise: Tensor | None = None) -> Reference:
        """Encode a reference picture uint8 [H,W,3] of any size for edits of the given size.

        noise [1,4,h,w]: the VAE posterior's draw (default: its mode). The result keeps its features per
        timestep and can serve many edits of this model.
        """
        square = images.pad_to_square(picture, WHITE)
        pixels = images.to_model_range(images.resize_lanczos(square, self._size(size)))
        clip_size = self.modules.image_encoder.config.image_size
        tokens = image_tokens(
            self.modules.image_encoder,
            self.modules.image_projection,
            images.clip_pixel_values(square, clip_size).to(self.device),
        )
        return Reference(self._encode(pixels, noise), tokens, owner=self)

    @torch.no_grad()
    def encode_source(
        self,
        picture: np.ndarray,
        mask: np.ndarray,
        size: int | None = None,
        *,
        keep_shape: bool = False,
        noise: Tensor | None = None,
    ) -> SourceCondition:
        """Prepare a source picture uint8 [H,W,3] and its mask float [H,W] (1 = repaint).

        Padding, black hole at native resolution, LANCZOS to the model's size, nearest latent mask; the depth is
        that of the picture without the hole.
        """
        size = self._size(size)
        square = images.pad_to_square(picture, WHITE)
        holed = images.cut_hole(square, images.pad_to_square(masks.binarize(mask), BLACK))
        pixels = images.to_model_range(images.resize_lanczos(holed, size))
        latent_mask = masks.latent_mask(masks.mask_for_model(mask, size), self.latent_factor)
        hole_latents = self._encode(pixels, noise)
        depth_map = self.estimate_depth(square) if keep_shape else self.no_depth_map()
        depth = self.modules.depth_projector(depth_map, hole_latents.shape[-2:]).float()
        return SourceCondition(latent_mask.to(self.device), hole_latents, depth)

    @torch.no_grad()
    def estimate_depth(self, square: np.ndarray) -> Tensor:
        """Relative inverse depth of a square picture uint8 [S,S,3], [1,s,s] in the network's raw range."""
        pixels = images.depth_pixel_values(square, self.config["depth_network"]["image_size"])
        return estimate_depth(self.modules.depth_network, pixels.to(self.device))

    @torch.no_grad()
    def no_depth_map(self) -> Tensor:
        """The map that stands for "no depth" [1,s,s]; a constant of the weights, computed once."""
        if self._no_depth is None:
            size = self.config["depth_network"]["image_size"]
            self._no_depth = no_depth_map(self.modules.depth_network, size)
        return self._no_depth

    @torch.no_grad()
    def unconditional_tokens(self) -> Tensor:
        """Cross-attention tokens of "no reference" [1,T,D]; a constant of the weights, computed once."""
        if self._unconditional is None:
            self._unconditional = unconditional_tokens(self.modules.image_encoder, self.modules.image_projection)
        return self._unconditional

    def _encode(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        pixels = pixels.to(self.device, self.dtype)
        noise = None if noise is None else noise.to(self.device, self.dtype)
        return encode_latents(self.modules.vae, pixels, noise).float()

    def _size(self, size: int | None) -> int:
        size = size or self.config["defaults"]["size"]
        # The U-Net halves the latents once per level below the first.
        multiple = self.latent_factor * 2 ** (len(self.config["unet"]["block_out_channels"]) - 1)
        if size < multiple or size % multiple:
            raise ArgumentError(f"size is {size}; this model needs a multiple of {multiple}.")
        return size

    # -- sampling -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: SourceCondition,
        references: Sequence[tuple[Reference, float]],
        noise: Tensor,
        scheduler,
        guidance: float,
        *,
        on_features: Callable[[int, int], None] | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Denoise to latents [B,4,h,w].

        condition: tensors of batch 1 or B. references: (reference, weight) each; those of weight 0 do not count,
        and with none left the conditional prediction is the unconditional one. The image tokens are the
        first counting reference's. noise: float32 [B,4,h,w]. scheduler: of `sampling.make_scheduler`.
        guidance: 1 evaluates the conditional row only; otherwise e_u + g (e_c - e_u).
        """
        counting = [(reference, weight) for reference, weight in references if weight > 0]
        for reference, _ in counting:
            self._check_reference(reference, noise)
            reference.prepare(self.modules.reference_unet, scheduler.timesteps.tolist(), on_batch=on_features)

        batch = len(noise)
        guided = bool(counting) and guidance != 1
        beside = condition.channels().to(self.device, self.dtype).expand(batch, -1, -1, -1)
        unconditional = self.unconditional_tokens()
        tokens = counting[0][0].tokens if counting else unconditional
        tokens = tokens.expand(batch, -1, -1)
        if guided:
            tokens = torch.cat([unconditional.expand(batch, -1, -1), tokens])
        copies = 2 if guided else 1

        with ReferenceReading(self.modules.unet) as reading:
            reading.reading_rows = batch

            def predict(latents: Tensor, timestep: Tensor) -> Tensor:
                reading.references = [
                    ReferenceFeatures(reference.banks_at(self.modules.reference_unet, timestep), weight)
                    for reference, weight in counting
                ]
                model_input = torch.cat([latents.to(self.dtype), beside], dim=1)  # [B,13,h,w]
                output = self.modules.unet(
                    torch.cat([model_input] * copies), timestep, encoder_hidden_states=tokens.to(self.dtype)
                ).sample.float()
                return guide(*output.chunk(2), guidance) if guided else output

            return denoise(predict, noise.to(self.device), scheduler, on_step)

    def _check_reference(self, reference: Reference, noise: Tensor) -> None:
        if reference.owner is not self:
            raise ArgumentError("The reference was encoded by another model. Encode it again with this one.")
        if reference.latents.shape[-2:] != noise.shape[-2:]:
            raise ArgumentError(
                f"The reference was encoded for latents of {tuple(reference.latents.shape[-2:])}, this edit has "
                f"{tuple(noise.shape[-2:])}. Encode the reference for the same size as the edit."
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B,4,h,w] -> pictures uint8 [B,H,W,3]."""
        return images.from_model_range(decode_latents(self.modules.vae, latents.to(self.dtype)).float())

    def preview(self, latents: Tensor) -> np.ndarray:
        """The first picture of the batch, decoded from reduced latents: quick and coarse, uint8 [h,w,3]."""
        shrink = max(1, max(latents.shape[-2:]) // PREVIEW_LATENT_SIDE)
        return self.decode(F.avg_pool2d(latents[:1], shrink))[0]

    # -- the whole edit -------------------------------------------------------------------------------------

    def edit(
        self,
        source: np.ndarray,
        mask: np.ndarray,
        reference: np.ndarray | Reference,
        settings: EditSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> EditResult:
        """Repaint the masked region of a picture so that it imitates the reference.

        source uint8 [H,W,3] (or float 0..1); mask float [H,W], 1 = repaint; reference: a picture of any size, or
        one already encoded by this model for the same size. Raises PictureError or ArgumentError before any
        work is done if something does not fit.
        """
        source = images.picture_from_array(source, "source")
        masks.check_mask(mask, *source.shape[:2])
        settings = self._completed(settings or EditSettings())
        scheduler = make_scheduler(self.config["scheduler"], settings.scheduler, settings.steps)
        report = on_progress or (lambda progress: None)

        window = masks.whole_picture(*source.shape[:2])
        if settings.zoom:
            window = masks.zoom_window(mask, settings.margin, settings.minimum, settings.feather)
        part, part_mask = source[window.slices], mask[window.slices]
        condition = self.encode_source(part, part_mask, settings.size, keep_shape=settings.keep_shape)
        if not isinstance(reference, Reference):
            reference = self.encode_reference(images.picture_from_array(reference, "reference"), settings.size)

        latents = self.sample(
            condition,
            [(reference, settings.weight)],
            initial_noise([settings.seed], tuple(condition.hole_latents.shape[1:])),
            scheduler,
            settings.guidance,
            on_features=lambda done, total: report(Progress("reference", done, total)),
            on_step=lambda step: report(
                Progress("sampling", step.step, step.steps, lambda: self.preview(step.predicted_latents))
            ),
        )
        raw = self._fit(self.decode(latents)[0], *part.shape[:2])
        alpha = masks.feather_alpha(mask, settings.feather)
        picture = source.copy()
        picture[window.slices] = masks.paste_back(raw, part, alpha[window.slices])
        return EditResult(picture, raw, alpha, window, settings)

    @staticmethod
    def _fit(square: np.ndarray, height: int, width: int) -> np.ndarray:
        """The model's square answer -> uint8 [height,width,3]: scaled to the long side, padding cropped."""
        side = max(height, width)
        return images.crop_padding(images.resize_bilinear(square, side, side), height, width)

    def _completed(self, settings: EditSettings) -> EditSettings:
        """Check the settings and fill in the model's defaults."""
        defaults = self.config["defaults"]
        filled = {key: defaults[key] for key in ("steps", "guidance", "scheduler") if getattr(settings, key) is None}
        settings = replace(settings, size=self._size(settings.size), **filled)
        limits = {
            "seed": (0, 2**63 - 1),
            "guidance": (0.0, MAX_GUIDANCE),
            "weight": (0.0, 10.0),
            "margin": (0.0, 10.0),
            "minimum": (1, images.MAX_SIDE),
            "feather": (0, 256),
        }
        for name, (low, high) in limits.items():
            value = getattr(settings, name)
            if not low <= value <= high:
                raise ArgumentError(f"{name} is {value}; it must be between {low} and {high}.")
        return settings
