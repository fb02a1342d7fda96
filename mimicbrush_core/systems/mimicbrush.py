"""MimicBrush: what it reads, how its inputs are prepared, how its reference is read.

Chen et al., "Zero-shot Image Editing with Reference Imitation", NeurIPS 2024, arXiv 2406.07547. Where the
released code and the paper differ, the released code is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from .. import editing, images, masks
from ..acceleration import EXACT, Acceleration, DeepFeatures
from ..attention import ReadingObserver, ReferenceFeatures, ReferenceReading
from ..depth import DepthCondition, drawn_map, estimate_depth, fitted_depth_pictures, no_depth_map
from ..editing import BatchResult, EditResult, EditSettings, Progress, Reporter
from ..encoders import image_tokens, unconditional_tokens
from ..errors import ArgumentError
from ..modules import MIMICBRUSH, Modules
from ..references import Reference, ReferenceUse
from ..repaint import Condition, Repainter, Work, device_of
from ..reuse import KeptTokens, SharedStart
from ..sampling import Draw, StepInfo, denoise, guide


@dataclass(frozen=True)
class SourceCondition(Condition):
    """mask [B,1,h,w], latents of the holed picture [B,4,h,w], depth [B,4,h,w]."""

    mask: Tensor
    hole_latents: Tensor
    depth: Tensor

    def channels(self) -> Tensor:
        """[B,9,h,w] in the original's order."""
        return torch.cat([self.mask, self.hole_latents, self.depth], dim=1)


RunObserver = Callable[[float, Sequence[ReferenceUse]], ReadingObserver | None]
"""observer(progress, references): asked before each step, 0..1 of the run, in which these references are read; what it
gives is told of every reading in the step."""


@dataclass(frozen=True)
class _Step:
    """What one step does.

    progress: which share of the run is done before it, 0..1. features_at: the timestep whose reference features are
    read. active: the references read. guided: whether the unconditional row is computed, too. deep: whether the
    U-Net's deep blocks are.
    """

    progress: float
    features_at: float
    active: tuple[ReferenceUse, ...]
    guided: bool
    deep: bool


class MimicBrush(Repainter):
    """A loaded MimicBrush; it caches only constants of its weights."""

    system = MIMICBRUSH

    def __init__(self, modules: Modules, config: dict):
        super().__init__(modules, config)
        self._unconditional: Tensor | None = None
        self._no_depth: Tensor | None = None
        self._no_depth_features: dict[tuple[int, int], Tensor] = {}

    def optimize(self, *, channels_last: bool = False, compiled: bool = False, vae_tiling: bool = False) -> MimicBrush:
        """Choose how the networks run; once, after loading. Results change in the last bits, with tiles a little more.

        channels_last: how the U-Nets' weights lie in memory. compiled: their transformer blocks by torch.compile; the
        first steps at each size then wait for the compiler. vae_tiling: squares above 512 pixels are encoded and
        decoded in tiles. Raises ArgumentError for a VAE that has none.
        """
        vae, unets = self.modules.vae, (self.modules.unet, self.modules.reference_unet)
        if vae_tiling and isinstance(vae, AutoencoderTiny):
            raise ArgumentError("This model's VAE is small and has no tiles. Leave vae_tiling off.")
        if channels_last:
            for unet in unets:
                unet.to(memory_format=torch.channels_last)
        if compiled:
            from torch._dynamo import config  # a slow import

            # A U-Net has 16 blocks of more kinds than the compiler takes on by itself; it would leave the rest alone.
            config.recompile_limit = max(64, config.recompile_limit)
            for unet in unets:
                unet.compile_repeated_blocks()
        if vae_tiling:
            vae.enable_tiling()
        return self

    def to(self, device: str | torch.device) -> MimicBrush:
        self._unconditional = self._no_depth = None
        self._no_depth_features.clear()
        return super().to(device)

    # -- conditions -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_reference(
        self,
        picture: np.ndarray,
        size: int | None = None,
        noise: Tensor | None = None,
        mask: np.ndarray | None = None,
    ) -> Reference:
        """Encode a reference picture uint8 [H,W,3] of any size for edits of the given size.

        noise [1,4,h,w]: the VAE posterior's draw (default: its mode). mask float [H,W]: the part to imitate,
        1 = this; the rest is laid white and not offered to the reader, so that it cannot show in any edit. The
        result keeps its features per timestep and can serve many edits of this model.
        """
        size, region = self._size(size), None
        if mask is not None:
            masks.check_mask(mask, *picture.shape[:2], role="reference mask")
            picture = np.where(masks.binarize(mask)[..., None], picture, np.uint8(images.WHITE))
            region = masks.latent_coverage(mask, size, self.latent_factor)
        square = images.pad_to_square(picture, images.WHITE)
        pixels = images.to_model_range(images.resize_lanczos(square, size))
        clip_size = self.modules.image_encoder.config.image_size
        tokens = image_tokens(
            self.modules.image_encoder,
            self.modules.image_projection,
            images.clip_pixel_values(square, clip_size).to(device_of(self.modules.image_encoder)),
        )
        return Reference(self._encode(pixels, noise), tokens, owner=self, region=region, picture=picture)

    @torch.no_grad()
    def encode_source(
        self,
        picture: np.ndarray,
        mask: np.ndarray,
        size: int | None = None,
        *,
        keep_shape: float = 0.0,
        depth_map: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> SourceCondition:
        """Prepare a source picture uint8 [H,W,3] and its mask float [H,W] (1 = repaint).

        Padding, black hole at native resolution, LANCZOS to the model's size, nearest latent mask.
        keep_shape: 0..1, between "no depth" and the depth's own feature; depth_map [1,s,s]: in the network's raw
        range; default: that of the picture without the hole.
        """
        size = self._size(size)
        square = images.pad_to_square(picture, images.WHITE)
        holed = images.cut_hole(square, images.pad_to_square(masks.binarize(mask), images.BLACK))
        pixels = images.to_model_range(images.resize_lanczos(holed, size))
        latent_mask = masks.latent_mask(masks.mask_for_model(mask, size), self.latent_factor)
        hole_latents = self._encode(pixels, noise)
        latent_size = tuple(hole_latents.shape[-2:])
        if keep_shape == 0:
            depth = self.no_depth_feature(latent_size)
        else:
            depth_map = self.estimate_depth(square) if depth_map is None else depth_map
            depth = self._depth_feature(depth_map, latent_size)
            if keep_shape != 1:
                depth = torch.lerp(self.no_depth_feature(latent_size), depth, float(keep_shape))
        device = hole_latents.device
        return SourceCondition(latent_mask.to(device), hole_latents, depth.to(device))

    @torch.no_grad()
    def estimate_depth(self, square: np.ndarray) -> Tensor:
        """Relative inverse depth of a square picture uint8 [S,S,3], [1,s,s] in the network's raw range."""
        pixels = images.depth_pixel_values(square, self.config["depth_network"]["image_size"])
        return estimate_depth(self.modules.depth_network, pixels.to(device_of(self.modules.depth_network)))

    @torch.no_grad()
    def depth_condition(
        self,
        pictures: Sequence[np.ndarray],
        drawn: Tensor | None = None,
        *,
        near_is_white: bool = True,
        strength: float = 1.0,
        on_picture: Callable[[int, int], None] | None = None,
    ) -> DepthCondition:
        """The shapes to keep of pictures uint8 [H,W,3], one per edited picture or one for all.

        drawn float [B,h,w] in 0..1: the artist's own depth pictures; default: what the network sees.
        Where they are used, 1 stands for the nearest the network sees in the same picture, 0 for 0.
        on_picture(done, total) is called before each picture and may raise to cancel.
        """
        if not 0 <= strength <= 1:
            raise ArgumentError(f"The depth strength is {strength}; it must be between 0 and 1.")
        maps = []
        for picture in pictures:
            if on_picture is not None:
                on_picture(len(maps), len(pictures))
            maps.append(self.estimate_depth(images.pad_to_square(picture, images.WHITE)))
        nearest = torch.stack([one.max() for one in maps]).clamp_min(torch.finfo(torch.float32).tiny)
        if drawn is not None:
            drawn = fitted_depth_pictures(drawn, *pictures[0].shape[:2])
            drawn = drawn if near_is_white else 1 - drawn
            count = editing.batch_size({"source": len(pictures), "depth picture": len(drawn)})
            pictures, maps = editing.repeated(pictures, count), editing.repeated(maps, count)
            drawn, nearest = drawn.expand(count, -1, -1), nearest.expand(count)
            maps = [drawn_map(*one) for one in zip(drawn, maps, nearest.tolist(), strict=True)]
        return DepthCondition(np.stack(pictures), drawn, torch.cat(maps), nearest, strength)

    @torch.no_grad()
    def _depth_map(self, depth: DepthCondition, index: int, window: masks.CropWindow) -> Tensor:
        """The depth of one picture's window [1,s,s]; a part is looked at again, at its full resolution."""
        picture = depth.pictures[index]
        if window == masks.whole_picture(*picture.shape[:2]):
            return depth.maps[index : index + 1]
        seen = self.estimate_depth(images.pad_to_square(picture[window.slices], images.WHITE))
        if depth.drawn is None:
            return seen
        return drawn_map(depth.drawn[index][window.slices], seen, float(depth.nearest[index]))

    def _depth_feature(self, depth_map: Tensor, latent_size: tuple[int, int]) -> Tensor:
        projector = self.modules.depth_projector
        return projector(depth_map.to(device_of(projector)), latent_size).float()

    @torch.no_grad()
    def no_depth_map(self) -> Tensor:
        """The map that stands for "no depth" [1,s,s]; a constant of the weights, computed once."""
        if self._no_depth is None:
            size = self.config["depth_network"]["image_size"]
            self._no_depth = no_depth_map(self.modules.depth_network, size)
        return self._no_depth

    @torch.no_grad()
    def no_depth_feature(self, latent_size: tuple[int, int]) -> Tensor:
        """The depth channels of "no depth" [1,4,h,w]; a constant of the weights, computed once for each size."""
        if latent_size not in self._no_depth_features:
            self._no_depth_features[latent_size] = self._depth_feature(self.no_depth_map(), latent_size)
        return self._no_depth_features[latent_size]

    @torch.no_grad()
    def unconditional_tokens(self) -> Tensor:
        """Cross-attention tokens of "no reference" [1,T,D]; a constant of the weights, computed once."""
        if self._unconditional is None:
            self._unconditional = unconditional_tokens(self.modules.image_encoder, self.modules.image_projection)
        return self._unconditional

    @property
    def knows_constants(self) -> bool:
        """Whether what depends on the weights only is computed."""
        return self._unconditional is not None and self._no_depth is not None

    def compute_constants(self) -> None:
        """Compute what depends on the weights only, ahead of the first edit."""
        self.unconditional_tokens()
        self.no_depth_map()

    # -- sampling -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: SourceCondition,
        references: Sequence[ReferenceUse],
        noise: Tensor,
        scheduler,
        guidance: float,
        *,
        acceleration: Acceleration = EXACT,
        on_features: Callable[[int], None] | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        observer: RunObserver | None = None,
    ) -> Tensor:
        """Denoise to latents [B,4,h,w].

        condition: tensors of batch 1 or B. references: those of weight 0 do not count, and in a step in which none
        is read the conditional prediction is the unconditional one. The tokens of several references are attended
        to side by side. noise: float32 [B,4,h,w]. scheduler: of `sampling.make_scheduler`.
        guidance: 1 evaluates the conditional row only; otherwise e_u + g (e_c - e_u).
        acceleration: what may be approximated.
        on_features(n): after n more features were written ahead; it may raise to cancel, like on_step.
        observer: watches how the references are read; the picture stays what it is without it.
        """
        plan = self._plan(references, scheduler, guidance, acceleration)
        for reference in dict.fromkeys(use.reference for use in references):  # once, if it is used twice
            self._check_reference(reference, noise)
            read_at = [step.features_at for step in plan if any(use.reference is reference for use in step.active)]
            reference.prepare(self.modules.reference_unet, read_at, on_batch=on_features)

        unet, reference_unet, batch = self.modules.unet, self.modules.reference_unet, len(noise)
        beside = condition.channels().to(self.device, self.dtype).expand(batch, -1, -1, -1)
        tokens = self._tokens_by_step(plan, batch)
        steps = zip(plan, tokens, strict=True)

        with (
            ReferenceReading(unet) as reading,
            KeptTokens(unet),
            SharedStart(unet) as start,
            DeepFeatures(unet) as deep_features,
        ):
            reading.reading_rows = batch

            def predict(latents: Tensor, timestep: Tensor) -> Tensor:
                step, step_tokens = next(steps)
                reading.references = [
                    ReferenceFeatures(use.reference.banks_at(reference_unet, step.features_at), use.weight)
                    for use in step.active
                ]
                reading.observer = observer(step.progress, step.active) if observer is not None else None
                start.on = step.guided
                model_input = torch.cat([latents.to(self.dtype), beside], dim=1)  # [B,13,h,w]
                if step.guided:
                    model_input = model_input.repeat(2, 1, 1, 1)
                if step.deep or not deep_features.serve(len(model_input)):
                    output = unet(model_input, timestep, encoder_hidden_states=step_tokens).sample
                else:
                    output = deep_features.predict(model_input, timestep, step_tokens)
                output = output.float()
                return guide(*output.chunk(2), guidance) if step.guided else output

            return denoise(predict, noise.to(self.device), scheduler, on_step)

    @staticmethod
    def _plan(
        references: Sequence[ReferenceUse], scheduler, guidance: float, acceleration: Acceleration
    ) -> list[_Step]:
        """What is done in each step."""
        timesteps = scheduler.timesteps.tolist()
        plan = []
        for index in range(len(timesteps)):
            active = tuple(use for use in references if use.active(index, len(timesteps)))
            plan.append(
                _Step(
                    progress=index / len(timesteps),
                    features_at=timesteps[acceleration.reference_step(index)],
                    active=active,
                    guided=bool(active) and guidance != 1 and acceleration.guided(index, len(timesteps)),
                    deep=acceleration.deep(index),
                )
            )
        return plan

    def _tokens_by_step(self, plan: Sequence[_Step], batch: int) -> list[Tensor]:
        """The tokens of each step; steps that read the same have the same tensor, as `KeptTokens` wants it."""
        reads = [(step.active, step.guided) for step in plan]
        tokens = {read: self._tokens(*read, batch) for read in dict.fromkeys(reads)}
        return [tokens[read] for read in reads]

    def _tokens(self, active: Sequence[ReferenceUse], guided: bool, batch: int) -> Tensor:
        """Cross-attention tokens [B or 2B, T, D], the unconditional rows first."""
        unconditional = self.unconditional_tokens().to(self.device, self.dtype).expand(batch, -1, -1)
        if not active:
            return unconditional
        own = [use.reference.tokens.to(self.device, self.dtype).expand(batch, -1, -1) for use in active]
        tokens = torch.cat(own, dim=1)
        if not guided:
            return tokens
        # Repeated keys and values leave an attention's output as it is: so rows of equal length cost no mask.
        return torch.cat([unconditional.repeat(1, len(own), 1), tokens])

    def check_owner(self, reference: Reference) -> None:
        """Raise ArgumentError for a reference that another model encoded."""
        if reference.owner is not self:
            raise ArgumentError("The reference was encoded by another model. Encode it again with this one.")

    def _check_reference(self, reference: Reference, noise: Tensor) -> None:
        self.check_owner(reference)
        if reference.latents.shape[-2:] != noise.shape[-2:]:
            raise ArgumentError(
                f"The reference was encoded for a size of {self.size_of(reference)}, this edit has "
                f"{noise.shape[-1] * self.latent_factor}. Encode the reference for the same size as the edit."
            )

    # -- the whole edit -------------------------------------------------------------------------------------

    def edit(
        self,
        source: np.ndarray,
        mask: np.ndarray,
        reference: np.ndarray | Reference | ReferenceUse | Sequence[ReferenceUse],
        settings: EditSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        depth: DepthCondition | None = None,
    ) -> EditResult:
        """Repaint the masked region of a picture so that it imitates the reference, as the original does it.

        source uint8 [H,W,3] (or float 0..1); mask float [H,W], 1 = repaint; reference: a picture of any size, or
        one or several already encoded by this model for the same size. depth: another shape to keep than
        settings.keep_shape's, which is the source's own. Raises PictureError or ArgumentError before any work is
        done if something does not fit.
        """
        begin = partial(self._begin, reference, depth)
        return self._edit(source, mask, settings or EditSettings(), begin, on_progress, self.size_of(reference))

    def edit_batch(
        self,
        sources: Tensor,
        mask: Tensor,
        reference: np.ndarray | Reference | ReferenceUse | Sequence[ReferenceUse],
        settings: EditSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        depth: DepthCondition | None = None,
        observer: RunObserver | None = None,
    ) -> BatchResult:
        """Repaint a batch of pictures float [B,H,W,3 or 4] in 0..1 under masks float [B,H,W].

        sources, masks and depth: each one, used for all, or as many as the longest. All share the references' work
        and one window. Soft mask values blend softly; a picture whose own mask is empty comes back as it was.
        observer: as in `sample`. Raises as `edit` does.
        """
        begin = partial(self._begin, reference, depth, observer=observer)
        counts = {"depth": len(depth)} if depth else {}
        return self._edit_batch(
            sources, mask, settings or EditSettings(), begin, on_progress, self.size_of(reference), counts
        )

    def _uses(self, reference, settings: EditSettings) -> list[ReferenceUse]:
        """Whatever a caller gave as reference, as a list of uses."""
        if isinstance(reference, Reference):
            return [ReferenceUse(reference, settings.weight)]
        if isinstance(reference, ReferenceUse):
            return [reference]
        if isinstance(reference, (list, tuple)):
            return list(reference)
        picture = images.picture_from_array(reference, "reference")
        return [ReferenceUse(self.encode_reference(picture, settings.size), settings.weight)]

    def _begin(
        self,
        reference: np.ndarray | Reference | ReferenceUse | Sequence[ReferenceUse],
        depth: DepthCondition | None,
        sources: Sequence[np.ndarray],
        mask_list: Sequence[np.ndarray],
        window: masks.CropWindow,
        settings: EditSettings,
        *,
        observer: RunObserver | None = None,
    ) -> Work:
        """Refuse depth that does not fit, encode the references, and count the features they still lack."""
        if depth is not None:
            _check_depth(depth, sources, mask_list)
        uses = self._uses(reference, settings)
        plan = self._plan(uses, self._scheduler(settings), settings.guidance, settings.acceleration)
        missing = {
            (id(use.reference), step.features_at)
            for step in plan
            for use in step.active
            if use.reference.missing([step.features_at])
        }

        def condition(index: int, part: np.ndarray, mask: np.ndarray) -> SourceCondition:
            keep_shape, depth_map = settings.keep_shape, None
            if depth is not None:
                keep_shape = depth.strength
                depth_map = self._depth_map(depth, index % len(depth), window) if keep_shape else None
            return self.encode_source(part, mask, settings.size, keep_shape=keep_shape, depth_map=depth_map)

        def sample(condition: SourceCondition, draw: Draw, scheduler, report: Reporter) -> Tensor:
            return self.sample(
                condition,
                uses,
                draw(),
                scheduler,
                settings.guidance,
                acceleration=settings.acceleration,
                on_features=report.features,
                on_step=report.step,
                observer=observer,
            )

        return Work(condition, sample, len(missing))

    def size_of(self, reference) -> int | None:
        """The size an encoded reference (or the first of several) was encoded for; None for a picture."""
        if isinstance(reference, (list, tuple)):
            reference = reference[0] if reference else None
        encoded = reference.reference if isinstance(reference, ReferenceUse) else reference
        return encoded.latents.shape[-1] * self.latent_factor if isinstance(encoded, Reference) else None


def _check_depth(depth: DepthCondition, sources: Sequence[np.ndarray], mask_list: Sequence[np.ndarray]) -> None:
    if depth.pictures.shape[1:3] != sources[0].shape[:2]:
        raise ArgumentError(
            f"The depth was made for a picture of {depth.pictures.shape[2]} x {depth.pictures.shape[1]} pixels, "
            f"the source is {sources[0].shape[1]} x {sources[0].shape[0]}. Make it from a picture of that size."
        )
    for index, mask in enumerate(mask_list):
        depth.check_visible(index % len(depth), masks.binarize(mask))
