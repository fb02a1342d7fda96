"""What is learned of a batch: the noise (or v) on the clean latents, by a model that sees the hole and the reference.

The loss of both recipes, the embedded model's and the full one's. The target is the *clean* picture, never the one
with the hole; beside the noisy latents ride, in the original's order, mask (1 channel), latents of the holed picture
(4) and depth (4), exactly as at inference (`systems.mimicbrush.SourceCondition`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..attention import CpuTrainingAttention, ReadingObserver, ReferenceFeatures, ReferenceReading
from ..encoders import decode_latents, image_tokens
from ..modules import Modules
from ..references import write_features
from .correspondence import Matching


@dataclass(frozen=True)
class Batch:
    """What the loss of B samples is computed from, on one device. The *last* R rows have a reference.

    clean [B,4,h,w]: latents of the clean picture, the target. mask [B,1,h,w]: 1 = cut out; hole [B,4,h,w]: latents of
    the source with its black hole. depths: of each row its map [s,s] in the network's raw range; None = dropped.
    noise [B,4,h,w], timesteps int64 [B]. reference [R,4,h,w]: clean latents of the references; image: their pixels for
    the image encoder [R,3,s,s], or what it made of them [R,T,E]. points [R,P,5]: where the reading is to look, as of
    `correspondence.draw_points`; None: not known. picture [B,3,H,W]: the clean picture, -1..1, and picture_mask
    [B,1,H,W]: 1 = cut out; both only where pictures are compared.
    """

    clean: Tensor
    mask: Tensor
    hole: Tensor
    depths: Sequence[Tensor | None]
    noise: Tensor
    timesteps: Tensor
    reference: Tensor
    image: Tensor
    points: Tensor | None = None
    picture: Tensor | None = None
    picture_mask: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """What counts in the loss, and how much.

    outside: the error outside the hole, against 1 + outside inside; None: all of it counts alike.
    tolerance: None, or the samples' errors count by the logarithm of what they are beyond it: halving a small error is
    worth as much as halving a large one, as PSNR has it.
    picture: the error inside the hole of the picture that the prediction amounts to, by its logarithm. Latents do not
    weigh alike in it: of the embedded autoencoder's, an even error shows 4 to 6 times as much as noise of its size.
    matching: looking at the right places, where a batch knows them.
    """

    outside: float | None = None
    tolerance: float | None = None
    picture: float = 0.0
    matching: float = 0.0


class Denoising:
    """A configuration's diffusion as training sees it: latents noised, and what is to be predicted of them.

    scheduler: the configuration's. alphas: the cumulative products of all timesteps, float32 [timesteps].
    """

    def __init__(self, scheduler: dict, device: torch.device):
        self.alphas = DDIMScheduler(**scheduler).alphas_cumprod.to(device)
        self._predicts_v = scheduler["prediction_type"] == "v_prediction"

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at timesteps int64 [B]; all [B,4,h,w]."""
        alpha = self._alpha(timesteps)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or v for a configuration that predicts it."""
        if not self._predicts_v:
            return noise
        alpha = self._alpha(timesteps)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    def estimate(self, clean: Tensor, error: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction amounts to which differs from the target by `error`; all [B,4,h,w]."""
        alpha = self._alpha(timesteps)
        return clean - (1 - alpha).sqrt() * (error if self._predicts_v else error / alpha.sqrt())

    def _alpha(self, timesteps: Tensor) -> Tensor:
        return self.alphas[timesteps][:, None, None, None]


def weighted_means(error: Tensor, weight: Tensor) -> Tensor:
    """Each sample's weighted mean [B]; error [B,C,h,w], weight [B,1,h,w]."""
    return (weight * error).mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3))


def weighted_mean(error: Tensor, weight: Tensor) -> Tensor:
    """The mean over B samples of each one's weighted mean."""
    return weighted_means(error, weight).mean()


def error_inside(error: Tensor, mask: Tensor) -> float:
    """The mean error [B,C,h,w] where the mask [B,1,h,w] is 1: a figure for the log."""
    return float((mask * error).sum() / (mask.sum() * error.shape[1]).clamp_min(1))


def _laid_out(latents: Tensor) -> Tensor:
    """Latents in the order in memory that convolutions in bfloat16 are fastest in on a CPU: two to three times."""
    halved = torch.is_autocast_enabled("cpu") and latents.device.type == "cpu"
    return latents.contiguous(memory_format=torch.channels_last) if halved else latents


class Objective:
    """The denoising loss of some modules.

    scheduler: the configuration's. no_depth [1,s,s]: the map of "no depth". no_image: the image of "no reference",
    zero pixels [1,3,s,s] or what the image encoder makes of them [1,T,E].
    """

    picture_tolerance = 0.005  # about the embedded autoencoder's own error, on pixels of -1..1

    def __init__(
        self,
        modules: Modules,
        scheduler: dict,
        no_depth: Tensor,
        no_image: Tensor,
        terms: LossTerms | None = None,
    ):
        self.modules, self.terms = modules, terms or LossTerms()
        device = next(modules.unet.parameters()).device
        self.denoising = Denoising(scheduler, device)
        self._no_depth, self._no_image = no_depth.to(device), no_image.to(device)
        self._reading: ReferenceReading | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Entered around `loss` and its backward pass: with gradient checkpointing both read the reference."""
        unets = self.modules.unet, self.modules.reference_unet
        on_cpu = self._no_depth.device.type == "cpu"
        with CpuTrainingAttention(*unets) if on_cpu else nullcontext(), ReferenceReading(self.modules.unet) as reading:
            self._reading = reading
            try:
                yield
            finally:
                self._reading = None

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The mean loss, and the error inside the holes of the rows with and without a reference."""
        matching = None if batch.points is None or not len(batch.reference) else Matching(batch.points)
        predicted, wanted = self.predict(batch, matching)
        difference = predicted.float() - wanted
        error = difference.square()  # [B,4,h,w]
        terms = self.terms
        weight = torch.ones_like(batch.mask) if terms.outside is None else terms.outside + batch.mask
        errors = weighted_means(error, weight)
        loss = (errors if terms.tolerance is None else torch.log(errors + terms.tolerance)).mean()
        split = len(batch.clean) - len(batch.reference)
        figures = {}
        for name, rows in (("masked_none", slice(split)), ("masked_with", slice(split, None))):
            if len(batch.clean[rows]):
                figures[name] = error_inside(error.detach()[rows], batch.mask[rows])
        if terms.picture:
            seen = weighted_means(self._picture_error(batch, difference), batch.picture_mask)  # [B]
            loss = loss + terms.picture * torch.log(seen + self.picture_tolerance).mean()
            figures["picture_psnr"] = float(10 * torch.log10(4 / seen.detach()).mean())
        if matching is not None:
            looking = matching.loss()
            loss, figures["matching"] = loss + terms.matching * looking, float(looking.detach())
        return loss, figures

    def _picture_error(self, batch: Batch, difference: Tensor) -> Tensor:
        """Squared, of the decoded pictures [B,3,H,W]; difference [B,4,h,w]: of prediction and target."""
        latents = self.denoising.estimate(batch.clean, difference, batch.timesteps)
        return (decode_latents(self.modules.vae, _laid_out(latents)).float() - batch.picture).square()

    def predict(self, batch: Batch, observer: ReadingObserver | None = None) -> tuple[Tensor, Tensor]:
        """The imitative U-Net's output and what it should have been, both [B,4,h,w]. observer: told of the reading."""
        if self._reading is None:
            raise RuntimeError("the loss and its backward pass belong within `computing()`")
        unet = self.modules.unet
        noisy = self.denoising.noised(batch.clean, batch.noise, batch.timesteps)
        beside = [batch.mask, batch.hole, self._depth_features(batch)]
        model_input = _laid_out(torch.cat([noisy, *beside], dim=1))  # [B,13,h,w]
        tokens, self._reading.references = self._read(batch)
        self._reading.reading_rows, self._reading.observer = len(batch.reference), observer
        predicted = unet(
            model_input.to(unet.dtype), batch.timesteps, encoder_hidden_states=tokens.to(unet.dtype)
        ).sample
        return predicted, self.denoising.target(batch.clean, batch.noise, batch.timesteps)

    def _read(self, batch: Batch) -> tuple[Tensor, list[ReferenceFeatures]]:
        """Cross-attention tokens [B,T,D], and the features of the rows that have a reference."""
        count, reading = len(batch.clean), len(batch.reference)
        tokens = []
        if reading < count:
            tokens.append(self._tokens(self._no_image).expand(count - reading, -1, -1))
        references = []
        if reading:
            own = self._tokens(batch.image)
            timesteps = batch.timesteps[count - reading :]
            references.append(
                ReferenceFeatures(
                    write_features(self.modules.reference_unet, _laid_out(batch.reference), timesteps, own)
                )
            )
            tokens.append(own)
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0], references

    def _tokens(self, image: Tensor) -> Tensor:
        if image.ndim == 4:
            return image_tokens(self.modules.image_encoder, self.modules.image_projection, image)
        projection = self.modules.image_projection
        return projection(image.to(next(projection.parameters()).dtype))

    def _depth_features(self, batch: Batch) -> Tensor:
        """Depth features [B,4,h,w]; the rows without depth share the constant one, computed once."""
        given = [depth[None] for depth in batch.depths if depth is not None]
        maps = torch.cat([self._no_depth, *given])
        features = self.modules.depth_projector(maps, tuple(batch.clean.shape[-2:])).float()
        given_rows = iter(range(1, len(maps)))
        return features[[0 if depth is None else next(given_rows) for depth in batch.depths]]
