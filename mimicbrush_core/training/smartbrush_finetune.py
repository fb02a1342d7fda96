"""The large SmartBrush: from Stable Diffusion 1.5, its inpainting model or a SmartBrush, on one's own masked objects.

Xie et al., arXiv 2212.05034. The U-Net is trained, text encoder and autoencoder are not: AdamW at 1e-5, the predicted
mask's DICE weighing 0.01, a fifth of the samples text to image, a tenth without words, all timesteps alike. The paper
does not say how large its batches were and how long it trained.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from ..checkpoints import save_modules
from ..errors import ArgumentError
from ..masks import MAX_PRECISION_LEVEL, precise_mask
from ..modules import SMARTBRUSH, BrushModules, resized
from ..sheets import contact_sheet, show_mask
from ..systems.smartbrush import BrushSettings, SmartBrush
from .brush_start import BrushStart
from .dataset import sample_loader
from .run_notes import RUN_NAMES, check_continues, recalled, remember
from .segments import Segment, Segments
from .smartbrush_task import Shares, SmartBrushTask, Weights
from .trainer import TrainingSettings, Validation, load_averaged, make_accelerator, train

NAME = RUN_NAMES[SMARTBRUSH]

FULL = TrainingSettings(
    samples=640_000, batch=64, lr=1e-5, optimizer="adam", warmup_steps=500, cooldown=0.0, ema_decay=0.9999
)
"""Only the rate and the optimizer are known; the rest is as for MimicBrush."""

VALIDATION_STEPS = 20
"""Of a validation's pictures."""

_JUDGED = 16  # held-out samples that a validation's figures are the means of


@dataclass(frozen=True)
class BrushRecipe:
    """How it is trained.

    gradient_checkpointing: compute parts of the forward pass again in the backward pass instead of keeping them.
    half_frozen: hold the text encoder in the forward pass's precision. shares, weights: as for `SmartBrushTask`.
    """

    gradient_checkpointing: bool = True
    half_frozen: bool = False
    shares: Shares = field(default_factory=Shares)
    weights: Weights = field(default_factory=Weights)


class BrushFineTuneTask(SmartBrushTask):
    """SmartBrush's task at full size.

    segments: of the size that is trained at; each is used once. workers: processes that draw them ahead. held_out:
    what a validation is made on.
    """

    def __init__(
        self,
        modules: BrushModules,
        config: dict,
        segments: Segments,
        recipe: BrushRecipe,
        seed: int = 0,
        *,
        workers: int = 0,
        held_out: Sequence[Segment] = (),
    ):
        config = resized(config, segments.size)
        judge = partial(judge_brush, held_out=held_out) if held_out else None
        super().__init__(
            modules, config, segments, seed, shares=recipe.shares, weights=recipe.weights, name=NAME, judge=judge
        )
        self._workers = workers

    def expect(self, indices: Iterator[int], at_once: int) -> None:
        if self._workers:
            self._segments = _DrawnAhead(self._segments, indices, self._workers)

    def _encode(self, numbers: dict[int, int]) -> list:
        # What is learned is not to be rounded by the forward pass's precision.
        with torch.autocast(self.device.type, enabled=False):
            return super()._encode(numbers)


class _DrawnAhead:
    """Segments by their numbers, drawn by `workers` processes in the order in which they will be asked for."""

    def __init__(self, segments: Callable[[int], Segment], indices: Iterator[int], workers: int):
        self._loader = iter(sample_loader(_Numbered(segments), indices, 1, workers))

    def __call__(self, number: int) -> Segment:
        ((drawn, segment),) = next(self._loader)
        if drawn != number:
            raise RuntimeError(f"segment {number} was asked for, {drawn} came")
        return segment


@dataclass(frozen=True)
class _Numbered:
    segments: Callable[[int], Segment]

    def __getitem__(self, number: int) -> tuple[int, Segment]:
        return number, self.segments(number)


# --- validation --------------------------------------------------------------------------------------------


def judge_brush(model: SmartBrush, held_out: Sequence[Segment]) -> Validation:
    """The errors of a training step on held-out segments, and a sheet of each painted anew into its box.

    Figures: means of the noise's error inside the mask, and of the predicted mask's DICE loss.
    """
    segments = list(islice(cycle(held_out), _JUDGED))
    known = Shares(whole=0.0, no_text=0.0)
    task = SmartBrushTask(model.modules, model.config, segments.__getitem__, seed=0, shares=known)
    found = [task.loss(0, [number])[1] for number in range(_JUDGED)]
    figures = {f"held out: {key}": float(np.mean([one[key] for one in found])) for key in ("inside", "dice")}
    rows = [_painted(model, segment) for segment in held_out]
    sheet = contact_sheet(rows, ("picture", "box", "painted", "predicted mask"), 256, [one.text for one in held_out])
    return Validation(figures, sheet)


def _painted(model: SmartBrush, segment: Segment) -> list[np.ndarray]:
    """The picture, its object's box, what is painted into that, and the mask predicted there; uint8 [S,S,3] each."""
    box = precise_mask(segment.mask.astype(np.float32), MAX_PRECISION_LEVEL)
    steps = min(VALIDATION_STEPS, model.config["defaults"]["steps"])
    # All of the box: what was given back would be the true object's.
    settings = BrushSettings(precision=MAX_PRECISION_LEVEL, steps=steps, preserve_background=False)
    result = model.edit(segment.picture, box, segment.text, settings)
    predicted = np.repeat((result.predicted * 255).astype(np.uint8)[..., None], 3, axis=-1)
    return [segment.picture, show_mask(segment.picture, box), result.picture, predicted]


# --- a whole run -------------------------------------------------------------------------------------------


def finetune_brush(
    run_folder: Path,
    start: BrushStart,
    segments: Segments,
    recipe: BrushRecipe,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
    held_out: Sequence[Segment] = (),
    on_log: Callable[[dict], None] | None = None,
) -> None:
    """Train or resume in `run_folder`; the model is left there as `model.safetensors` (`export_brush` writes it at
    any time).

    workers: processes that draw segments ahead. held_out: segments to validate on.
    Raises ArgumentError (settings; a folder of another run), ModelFileError, PictureError, OutputError.
    """
    start.check()
    if settings.validate_every and not held_out:
        raise ArgumentError("There is nothing to validate on: give held-out pictures (--validation).")
    accelerator = make_accelerator(settings, device, run_folder)
    remembered = {"start": start.note(), "recipe": asdict(recipe), "seed": seed}
    check_continues(run_folder, NAME, remembered)
    modules, config = start.load()
    _check_size(segments.size, modules, config)
    if accelerator.is_main_process:
        remember(run_folder, NAME, remembered)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision) if recipe.half_frozen else None
    make_brush_trainable(modules, recipe, accelerator.device, half)
    task = BrushFineTuneTask(modules, config, segments, recipe, seed, workers=workers, held_out=held_out)
    train(task, run_folder, settings, on_log, accelerator)
    del task, modules
    accelerator.free_memory()
    gc.collect()  # a task and its networks refer to each other, and the export needs nearly as much memory again
    if accelerator.is_main_process:
        export_brush(run_folder, run_folder / "model.safetensors")
    accelerator.wait_for_everyone()


def _check_size(size: int, modules: BrushModules, config: dict) -> None:
    multiple = SmartBrush(modules, config).size_multiple
    if size < multiple or size % multiple:
        raise ArgumentError(f"The pictures' size is {size}; this model needs a multiple of {multiple}.")


def make_brush_trainable(
    modules: BrushModules, recipe: BrushRecipe, device: torch.device | str, half: torch.dtype | None = None
) -> None:
    """Bring all to the device; let the U-Net require gradients, and nothing else.

    half: the precision that the text encoder is held in; None: as it is. The autoencoder stays as it is: its answers
    are what is learned.
    """
    for _, module in modules.items():
        module.to(device).requires_grad_(False)
    modules.unet.float().requires_grad_(True)
    if half is not None:
        modules.text_encoder.to(half)
    if recipe.gradient_checkpointing:
        modules.unet.enable_gradient_checkpointing()


def export_brush(run_folder: Path, path: Path) -> int:
    """Write what a run has learned, averaged, as one float16 model; returns the samples seen."""
    modules, config = BrushStart(**recalled(run_folder, NAME)["start"]).load()
    samples = load_averaged(run_folder / f"{NAME}.pt", {"unet": modules.unet})
    name = f"{config['name'].removesuffix(', trained')}, trained"
    save_modules(path, modules, {**config, "name": name, "trained_samples": samples}, torch.float16)
    return samples
