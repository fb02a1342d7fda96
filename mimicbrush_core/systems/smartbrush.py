"""SmartBrush: what it reads, how its inputs are prepared, how it is sampled.

Xie et al., "SmartBrush: Text and Shape Guided Object Inpainting with Diffusion Model", CVPR 2023, arXiv 2212.05034.
Nobody has published weights or code: the formulas are the paper's, and what it leaves open (how the precision enters
the network, when its predicted mask takes over) is this project's own. Weights come from this project's training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import editing, images, masks
from ..editing import BatchResult, EditResult, Progress, RepaintSettings, Reporter
from ..errors import ArgumentError
from ..modules import SMARTBRUSH, BrushModules
from ..repaint import Condition, Repainter, Work
from ..reuse import KeptTokens, SharedStart
from ..sampling import Draw, StepInfo, denoise, guide
from ..text import encode_text, make_tokenizer

MEMORY = 0.5
"""How much of the predicted mask of the steps before stays in a step's: single predictions flicker."""

REACH = 1
"""How many cells the predicted mask is grown before the background is given back: the object's edge needs room."""

SMALLEST = 0.05
"""Less than this share of the given mask, and the predicted mask is not believed."""


@dataclass(frozen=True)
class BrushSettings(RepaintSettings):
    """How SmartBrush makes an edit.

    negative: what the picture should not show.
    precision: how literally the mask's shape is meant, from 0, the object's exact silhouette, to the model's coarsest
        level (4), a box around it; 2 for a sloppy brush. The model is told so; the mask itself is taken as it is given,
        and not grown again: `masks.precise_mask` makes coarser ones.
    preserve_background: give back what is inside the mask but beside the object, as the model predicts it.
    refine_from: 0..1, the share of the steps after which the predicted mask takes over; 1 = never.
    threshold: 0..1, what counts as the object in the predicted mask.
    keep_prompt_mask: go on telling the model the given mask and precision once the predicted mask has taken over. Off,
        it is told the refined mask, as an exact one: as in training, where noise fills the mask, but the refined one is
        a cell wider than the object, which then grows to fill it (measured with the embedded model).
    """

    negative: str = ""
    precision: int = 2
    preserve_background: bool = True
    refine_from: float = 0.4
    threshold: float = 0.5
    keep_prompt_mask: bool = True

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        **RepaintSettings.LIMITS,
        "precision": (0, masks.MAX_PRECISION_LEVEL),
        "refine_from": (0.0, 1.0),
        "threshold": (0.0, 1.0),
    }

    def check(self) -> None:
        super().check()
        if not isinstance(self.precision, int):
            raise ArgumentError(f"precision is {self.precision!r}; it must be a whole number.")


@dataclass(frozen=True, eq=False)
class EncodedText:
    """An encoded text: its tokens [1,L,D], and the model that made it."""

    tokens: Tensor
    owner: SmartBrush


@dataclass(frozen=True)
class BrushCondition(Condition):
    """clean [B,4,h,w]: of the picture. mask [B,1,h,w] of 0 and 1: the cells that the mask touches."""

    clean: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Painted:
    """What a run makes of B pictures.

    latents [B,4,h,w]. predicted [B,1,h,w] in 0..1: the object's mask as the model sees it, inside the given one.
    kept [B,1,h,w] of 0 and 1: the cells that were repainted. disbelieved bool [B]: the predicted mask left (almost)
    nothing of the given one and was not followed.
    """

    latents: Tensor
    predicted: Tensor
    kept: Tensor
    disbelieved: Tensor

    def rows(self) -> list[Painted]:
        """One for each picture."""
        columns = [getattr(self, field.name).split(1) for field in fields(self)]
        return [Painted(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class BrushResult(EditResult):
    """predicted: float32 [H,W] in 0..1, the object's mask as the model sees it, inside the given one.
    region: float32 [H,W], what of the mask was repainted; the rest was given back to the background.
    warnings: what did not go as asked for.
    """

    predicted: np.ndarray
    region: np.ndarray
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BrushBatchResult(BatchResult):
    """predicted, region: as in `BrushResult`, float32 [N,H,W]. warnings: of all pictures."""

    predicted: Tensor
    region: Tensor
    warnings: tuple[str, ...]


class SmartBrush(Repainter):
    """A loaded SmartBrush."""

    system = SMARTBRUSH

    def __init__(self, modules: BrushModules, config: dict):
        super().__init__(modules, config)
        self._tokenizer = make_tokenizer(config)

    @torch.no_grad()
    def encode_text(self, text: str) -> EncodedText:
        """Encode what the picture should show, or (as `negative`) should not. It can serve many edits of this model.

        Raises ArgumentError where the model knows a few words only, and not these.
        """
        return EncodedText(encode_text(self.modules.text_encoder, self._tokenizer([text])), owner=self)

    @torch.no_grad()
    def encode_source(self, picture: np.ndarray, mask: np.ndarray, size: int | None = None) -> BrushCondition:
        """Prepare a source picture uint8 [H,W,3] and its mask float [H,W] (1 = repaint).

        The picture is padded with white and encoded whole, at the mode of the VAE's posterior; every cell that the
        mask touches is to be repainted.
        """
        size = self._size(size)
        square = images.resize_lanczos(images.pad_to_square(picture, images.WHITE), size)
        clean = self._encode(images.to_model_range(square), None)
        touched = masks.latent_coverage(mask, size, self.latent_factor) > 0
        return BrushCondition(clean, touched.float().to(clean.device))

    @torch.no_grad()
    def sample(
        self,
        condition: BrushCondition,
        text: EncodedText,
        negative: EncodedText,
        noise: Tensor,
        scheduler,
        settings: BrushSettings,
        *,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Painted:
        """Denoise the mask over the clean picture.

        condition: tensors of batch 1 or B. noise: float32 [B,4,h,w]. scheduler: of `sampling.make_scheduler`.
        settings: complete; guidance 1 evaluates the row of `text` only, otherwise e_n + g (e_t - e_n), of the noise
        and not of the predicted mask. on_step may raise to cancel.
        """
        for one in (text, negative):
            self._check_owner(one)
        unet, guided = self.modules.unet, settings.guidance != 1
        tokens = [negative.tokens, text.tokens] if guided else [text.tokens]
        batch, rows = len(noise), len(tokens)
        tokens = torch.cat([one.to(self.device, self.dtype).expand(batch, -1, -1) for one in tokens])
        region = _Region(condition, batch, settings, len(scheduler.timesteps))

        with KeptTokens(unet), SharedStart(unet) as start:
            start.on = guided

            def predict(latents: Tensor, timestep: Tensor) -> Tensor:
                model_input = torch.cat([region.composed(latents), region.mask], dim=1)  # [B,5,h,w]
                output = unet(
                    model_input.to(self.dtype).repeat(rows, 1, 1, 1),
                    timestep,
                    encoder_hidden_states=tokens,
                    class_labels=region.levels.repeat(rows),
                ).sample.float()
                answers, logits = output[:, :-1], output[-batch:, -1:]
                region.learn(logits.sigmoid())
                return guide(*answers.chunk(2), settings.guidance) if guided else answers

            def report(info: StepInfo) -> None:
                on_step(replace(info, predicted_latents=region.composed(info.predicted_latents)))

            latents = denoise(predict, noise.to(self.device), scheduler, report if on_step else None)
        return Painted(region.composed(latents), region.predicted * region.given, region.kept, region.disbelieved)

    def _check_owner(self, text: EncodedText) -> None:
        if text.owner is not self:
            raise ArgumentError("The text was encoded by another model. Encode it again with this one.")

    def edit(
        self,
        source: np.ndarray,
        mask: np.ndarray,
        text: str | EncodedText,
        settings: BrushSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> BrushResult:
        """Paint what a text says into the masked region of a picture.

        source uint8 [H,W,3] (or float 0..1); mask float [H,W], 1 = repaint; text: in words, or already encoded by this
        model. Raises PictureError or ArgumentError before any work is done if something does not fit.
        """
        done: dict[int, Painted] = {}
        begin = partial(self._begin, text, done)
        result = self._edit(source, mask, settings or BrushSettings(), begin, on_progress)
        predicted, region = _whole(done[0], np.asarray(mask), result.window)
        warnings = (_DISBELIEVED,) if done[0].disbelieved else ()
        return BrushResult(**vars(result), predicted=predicted, region=region, warnings=warnings)

    def edit_batch(
        self,
        sources: Tensor,
        mask: Tensor,
        text: str | EncodedText,
        settings: BrushSettings | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> BrushBatchResult:
        """Paint what a text says into a batch of pictures float [B,H,W,3 or 4] in 0..1 under masks float [B,H,W].

        sources and masks: each one, used for all, or as many as the longer. All share the text and one window. With
        paste_back soft mask values blend softly; a picture whose own mask is empty comes back as it was. Raises as
        `edit` does.
        """
        done: dict[int, Painted] = {}
        begin = partial(self._begin, text, done)
        result = self._edit_batch(sources, mask, settings or BrushSettings(), begin, on_progress)
        mask_list = editing.repeated(editing.mask_arrays(mask), len(result.pictures))
        found = torch.zeros(2, *result.alpha.shape)  # predicted masks and regions
        for index, painted in done.items():
            found[:, index] = torch.from_numpy(np.stack(_whole(painted, mask_list[index], result.window)))
        warnings = tuple(f"Picture {index + 1}: {_DISBELIEVED}" for index in done if done[index].disbelieved)
        return BrushBatchResult(**vars(result), predicted=found[0], region=found[1], warnings=warnings)

    def _begin(
        self,
        text: str | EncodedText,
        done: dict[int, Painted],
        sources: Sequence[np.ndarray],
        mask_list: Sequence[np.ndarray],
        window: masks.CropWindow,
        settings: BrushSettings,
    ) -> Work:
        """done: is filled with what is made of each picture."""
        text = text if isinstance(text, EncodedText) else self.encode_text(text)
        negative = self.encode_text(settings.negative)
        begun: list[int] = []

        def condition(index: int, part: np.ndarray, mask: np.ndarray) -> BrushCondition:
            begun.append(index)
            return self.encode_source(part, mask, settings.size)

        def sample(condition: BrushCondition, draw: Draw, scheduler, report: Reporter) -> Tensor:
            painted = self.sample(condition, text, negative, draw(), scheduler, settings, on_step=report.step)
            done.update(zip(begun, painted.rows(), strict=True))
            begun.clear()
            return painted.latents

        return Work(condition, sample, region=lambda index, mask: mask * _in_window(done[index].kept, mask.shape))

    def _completed(self, settings: BrushSettings, size: int | None) -> BrushSettings:
        completed, coarsest = super()._completed(settings, size), self.config["unet"]["num_class_embeds"] - 1
        if settings.precision > coarsest:
            raise ArgumentError(f"precision is {settings.precision}; this model's coarsest level is {coarsest}.")
        return completed


_DISBELIEVED = (
    "the model's own mask left (almost) nothing of the one that was given, so the background was not given back. Try "
    "another seed, a larger mask, or a lower threshold."
)


def composed(inside: Tensor, outside: Tensor, mask: Tensor) -> Tensor:
    """Latents [B,4,h,w]: `inside` where the mask [B,1,h,w] of 0 and 1 is 1, `outside` bit for bit where it is 0."""
    return torch.where(mask > 0, inside, outside)


class _Region:
    """Where a run paints, in cells of 0 and 1, and what its model is told of that.

    given [B,1,h,w]: the mask that was asked for. kept [B,1,h,w]: what of it is painted; elsewhere is the clean picture,
    without noise, at every step. mask [B,1,h,w] and levels [B]: what the model is told, and how precise that is.
    """

    def __init__(self, condition: BrushCondition, batch: int, settings: BrushSettings, steps: int):
        self._clean = condition.clean.expand(batch, -1, -1, -1)
        self.given = self.kept = self.mask = condition.mask.expand(batch, -1, -1, -1)
        self.levels = torch.full((batch,), settings.precision, device=condition.mask.device)
        self.disbelieved = torch.zeros(batch, dtype=torch.bool, device=condition.mask.device)
        self.predicted: Tensor | None = None
        self._settings, self._step = settings, 0
        self._refine_at = settings.refine_from * steps if settings.preserve_background else steps

    def composed(self, latents: Tensor) -> Tensor:
        return composed(latents, self._clean, self.kept)

    def learn(self, predicted: Tensor) -> None:
        """Take in a step's predicted mask [B,1,h,w] in 0..1; from `refine_from` on it says what is painted."""
        before = predicted if self.predicted is None else self.predicted
        self.predicted = MEMORY * before + (1 - MEMORY) * predicted
        if self._step >= self._refine_at:
            self._refine()
        self._step += 1

    def _refine(self) -> None:
        """Give back what is not the object's. It never grows again: what was given back carries no noise."""
        found = (self.predicted > self._settings.threshold).float()
        found = F.max_pool2d(found, 2 * REACH + 1, stride=1, padding=REACH) * self.kept
        believed = found.sum(dim=(1, 2, 3)) >= SMALLEST * self.given.sum(dim=(1, 2, 3))
        self.disbelieved = ~believed
        self.kept = torch.where(believed[:, None, None, None], found, self.kept)
        if not self._settings.keep_prompt_mask:
            # As in training, where noise fills the mask: the refined one is an exact one.
            self.mask = self.kept
            self.levels = torch.where(believed, 0, self.levels)


def _in_window(cells: Tensor, size: tuple[int, int], mode: str = "nearest") -> np.ndarray:
    """Values of the model's square [1,1,h,w] -> float32 [H,W] of its window's size, the padding cropped."""
    side = max(size)
    return images.crop_padding(F.interpolate(cells, size=(side, side), mode=mode)[0, 0].cpu().numpy(), *size)


def _whole(painted: Painted, mask: np.ndarray, window: masks.CropWindow) -> tuple[np.ndarray, np.ndarray]:
    """(the predicted mask, the repainted part of `mask`), float32 [H,W] of the whole picture."""
    black, size = np.zeros(mask.shape, np.float32), (window.height, window.width)
    predicted = _in_window(painted.predicted, size, "bilinear")
    region = mask[window.slices] * _in_window(painted.kept, size)
    return window.placed(predicted, black), window.placed(region, black)
