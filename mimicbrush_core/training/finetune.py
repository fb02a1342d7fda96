"""The large recipe: MimicBrush from Stable Diffusion or from a MimicBrush, whole, in parts, or as a LoRA.

As the paper describes it (arXiv 2406.07547, section 3): the mean squared error of the predicted noise on the *clean*
source's latents, mask, latents of the holed source and depth beside the noisy latents, the reference U-Net on the
clean reference at the same timestep; depth dropped for half of the samples (dropped = the map of zero input), the
reference for a tenth (dropped = the unconditional tokens, and nothing is read); trained are the imitative U-Net, the
image projection and the depth projector, with Adam at 1e-5 in batches of 64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import reading_blocks
from ..checkpoints import save_modules
from ..errors import ArgumentError
from ..lora import LoraLayer, write_lora
from ..modules import MIMICBRUSH, Modules, resized
from ..systems.mimicbrush import MimicBrush
from .dataset import sample_loader
from .encoding import EncodedSample, PreparedSamples, SampleEncoder
from .extras import require
from .objective import Batch, LossTerms, Objective
from .run_notes import RUN_NAMES, check_continues, recalled, remember
from .samples import TrainingSample
from .starts import StartingPoint
from .trainer import (
    Task,
    TrainingSettings,
    Validation,
    averaged_weights,
    load_averaged,
    make_accelerator,
    read_checkpoint,
    train,
)
from .validation import cases_of, judge

logger = logging.getLogger(__name__)

NAME = RUN_NAMES[MIMICBRUSH]
PAPER_PARTS = ("unet", "image_projection", "depth_projector")
TRAINABLE = (*PAPER_PARTS, "reference_unet", "image_encoder")
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of every attention of the imitative U-Net."""

FULL = TrainingSettings(
    samples=640_000, batch=64, lr=1e-5, optimizer="adam", warmup_steps=500, cooldown=0.0, ema_decay=0.9999
)
"""Batch, rate and optimizer are the paper's; how long it trained is not published."""
LORA = TrainingSettings(samples=2000, batch=4, lr=1e-4, optimizer="adam", warmup_steps=20, cooldown=0.2, ema_decay=0.99)

_KEY = 0xF17E  # first number of this recipe's random streams


class Dataset(Protocol):
    """Samples by their global index: drawn (`TrainingSample`) or prepared (`EncodedSample`)."""

    def __getitem__(self, index: int) -> TrainingSample | EncodedSample: ...


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what.

    train: parts of `TRAINABLE`. lora_rank: instead of them, a LoRA of this rank on the imitative U-Net; lora_alpha:
    its scale is alpha / rank; None: 1. drop_depth, drop_reference: shares of the samples.
    outside_weight: of the error outside the hole, against 1 + outside_weight inside; None: all of it alike.
    gradient_checkpointing: compute parts of the forward pass again in the backward pass instead of keeping them.
    half_frozen: hold U-Nets and image encoder in the forward pass's precision where they are not trained.
    validation_steps: of a validation's pictures.
    """

    train: tuple[str, ...] = PAPER_PARTS
    lora_rank: int = 0
    lora_alpha: float | None = None
    drop_depth: float = 0.5
    drop_reference: float = 0.1
    outside_weight: float | None = None
    gradient_checkpointing: bool = True
    half_frozen: bool = False
    validation_steps: int = 20

    def check(self) -> None:
        """Raise ArgumentError for what cannot be."""
        unknown = [part for part in self.train if part not in TRAINABLE]
        if unknown or not (self.train or self.lora_rank):
            raise ArgumentError(
                f"{unknown[0] if unknown else 'Nothing'!r} cannot be trained. Choose among {', '.join(TRAINABLE)}."
            )
        if not 0 <= self.lora_rank <= 1024:
            raise ArgumentError(f"The LoRA rank is {self.lora_rank}; it must be between 1 and 1024.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ArgumentError(f"The LoRA alpha is {self.lora_alpha}; it must be positive.")
        if not (0 <= self.drop_depth <= 1 and 0 <= self.drop_reference <= 1):
            raise ArgumentError("drop_depth and drop_reference are shares between 0 and 1.")

    @property
    def alpha(self) -> float:
        return float(self.lora_rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that learn."""
        return ("unet",) if self.lora_rank else self.train


# --- making modules ready --------------------------------------------------------------------------------------


def make_trainable(modules: Modules, recipe: Recipe, half: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Let what the recipe trains require gradients, and nothing else; returns the parts that learn.

    half: the precision that frozen parts are held in; None: as they are. A LoRA's initial values come from torch's
    generator.
    """
    recipe.check()
    for _, module in modules.items():
        if module is not None:
            module.requires_grad_(False)
    for part in recipe.parts:
        if recipe.lora_rank:
            add_lora(modules.unet, recipe.lora_rank, recipe.alpha)
        else:
            getattr(modules, part).float().requires_grad_(True)
    if half is not None:
        _halve_frozen(modules, half)
    if recipe.gradient_checkpointing:
        _enable_checkpointing(modules, recipe)
    return {part: getattr(modules, part) for part in recipe.parts}


def add_lora(unet: nn.Module, rank: int, alpha: float) -> None:
    """Put peft's LoRA layers around `LORA_LAYERS`; only they require gradients then."""
    peft = require("peft", "Training a LoRA")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_LAYERS))
    peft.inject_adapter_in_model(config, unet)


def _halve_frozen(modules: Modules, half: torch.dtype) -> None:
    """The large networks only: the autoencoder's answers are targets, and the depth network stays float32 always."""
    for module in (modules.unet, modules.reference_unet, modules.image_encoder):
        for parameter in module.parameters() if module is not None else ():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(half)


def _enable_checkpointing(modules: Modules, recipe: Recipe) -> None:
    for unet in (modules.unet, modules.reference_unet):
        unet.enable_gradient_checkpointing()
    # The writer ends the reference U-Net's pass by an exception in this block, which torch's checkpoints would have
    # to be left through.
    last = list(reading_blocks(modules.reference_unet))[-1]
    modules.reference_unet.get_submodule(last.rsplit(".transformer_blocks.", 1)[0]).gradient_checkpointing = False
    if "image_encoder" in recipe.parts:
        encoder = modules.image_encoder  # transformers 6 has the new name only, 4 the old one
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})


# --- the task ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """What is drawn for one sample, by its global index alone."""

    timestep: int
    noise: np.ndarray  # float32 [4,h,w]
    with_depth: bool
    with_reference: bool


class FineTuneTask(Task):
    """The recipe as the trainer's task.

    modules: of `make_trainable`, on the device; dataset: samples by global index. held_out: samples that a validation
    is made on. workers: processes that draw samples ahead.
    """

    name = NAME

    def __init__(
        self,
        modules: Modules,
        config: dict,
        dataset: Dataset,
        recipe: Recipe,
        seed: int = 0,
        *,
        workers: int = 0,
        held_out: Sequence[TrainingSample] = (),
    ):
        self.modules, self.config, self.recipe, self.seed = modules, config, recipe, seed
        self.learned = {part: getattr(modules, part) for part in recipe.parts}
        self.device = next(modules.unet.parameters()).device
        self._dataset, self._workers, self._held_out = dataset, workers, held_out
        self._batches: Iterator[list] | None = None
        if isinstance(dataset, PreparedSamples):
            self._encoder, constants = None, dataset.constants()
        else:
            self._encoder = SampleEncoder(modules, config, pixels="image_encoder" in recipe.parts)
            constants = self._encoder.constants()
        self.objective = Objective(
            modules, config["scheduler"], constants.no_depth, constants.no_image, LossTerms(recipe.outside_weight)
        )

    def computing(self) -> AbstractContextManager:
        return self.objective.computing()

    def expect(self, indices: Iterator[int], at_once: int) -> None:
        self._batches = iter(sample_loader(self._dataset, indices, at_once, self._workers))

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        return self.objective.loss(self.batch(indices))

    def batch(self, indices: list[int]) -> Batch:
        """The samples with these global indices, those without a reference first (`objective.Batch`)."""
        samples = [self._dataset[index] for index in indices] if self._batches is None else next(self._batches)
        if self._encoder is not None and [sample.index for sample in samples] != indices:
            raise RuntimeError(f"samples {indices} were asked for, {[sample.index for sample in samples]} came")
        shape = self._latent_shape(samples[0])
        draws = [self._draw(index, shape) for index in indices]
        if self._encoder is not None:
            samples = self._encoder.encode(samples, [draw.with_depth for draw in draws])
        pairs = sorted(zip(draws, samples, strict=True), key=lambda pair: pair[0].with_reference)
        draws, samples = [draw for draw, _ in pairs], [sample for _, sample in pairs]
        without = sum(not draw.with_reference for draw in draws)
        return Batch(
            clean=self._stacked([sample.clean for sample in samples]),
            mask=self._stacked([sample.mask for sample in samples]),
            hole=self._stacked([sample.hole for sample in samples]),
            depths=[s.depth.to(self.device) if d.with_depth else None for d, s in pairs],
            noise=self._stacked([torch.from_numpy(draw.noise) for draw in draws]),
            timesteps=torch.tensor([draw.timestep for draw in draws], device=self.device),
            reference=self._stacked([sample.reference for sample in samples])[without:],
            image=self._stacked([sample.image for sample in samples])[without:],
        )

    def validate(self) -> Validation | None:
        if not self._held_out or self._encoder is None:
            return None
        size = len(self._held_out[0].source)
        model = MimicBrush(self.modules, resized(self.config, size))
        steps = min(self.recipe.validation_steps, self.config["defaults"]["steps"])
        return judge(model, cases_of(self._held_out), steps, at_once=1)

    def _latent_shape(self, sample: TrainingSample | EncodedSample) -> tuple[int, ...]:
        if isinstance(sample, EncodedSample):
            return tuple(sample.clean.shape)
        side = len(sample.source) // self._encoder.latent_factor
        return (self.config["vae"]["latent_channels"], side, side)

    def _draw(self, index: int, latent_shape: tuple[int, ...]) -> _Draw:
        rng = np.random.default_rng((self.seed, _KEY, index))
        timestep = int(rng.integers(len(self.objective.denoising.alphas)))
        with_depth = rng.random() >= self.recipe.drop_depth
        with_reference = rng.random() >= self.recipe.drop_reference
        return _Draw(timestep, rng.standard_normal(latent_shape, dtype=np.float32), with_depth, with_reference)

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.to(self.device) for tensor in tensors])


# --- a whole run ---------------------------------------------------------------------------------------------------


def finetune(
    run_folder: Path,
    start: StartingPoint,
    dataset: Dataset,
    recipe: Recipe,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    device: str = "auto",
    prepare: int = 0,
    workers: int = 0,
    held_out: Sequence[TrainingSample] = (),
    on_log: Callable[[dict], None] | None = None,
) -> None:
    """Train or resume in `run_folder`; a LoRA is left there as `lora.safetensors` (`export` writes it at any time).

    dataset: samples by global index. prepare: encode that many of them once and train on these alone, without VAE,
    image encoder and depth network in memory (no validation then); 0: encode as they come. workers: processes that
    draw samples ahead. held_out: samples to validate on.
    Raises ArgumentError (settings; a folder of another run), ModelFileError, OutputError.
    """
    recipe.check()
    if prepare and settings.validate_every:
        raise ArgumentError("Prepared samples leave nothing in memory to validate with. Leave one of the two away.")
    if settings.validate_every and not held_out:
        raise ArgumentError("There is nothing to validate on: give held-out pictures (--validation).")
    if prepare and "image_encoder" in recipe.parts:
        raise ArgumentError("The image encoder cannot be trained on prepared samples: it made them.")
    accelerator = make_accelerator(settings, device, run_folder)
    remembered = {"start": start.note(), "recipe": asdict(recipe), "seed": seed, "prepare": prepare}
    check_continues(run_folder, NAME, remembered)
    modules, config = start.load(seed)
    if accelerator.is_main_process:
        remember(run_folder, NAME, remembered)
    if prepare:
        if accelerator.is_main_process:
            _prepared(run_folder, modules, config, dataset, prepare, {"start": start.note(), "seed": seed}, accelerator)
        accelerator.wait_for_everyone()
        dataset = PreparedSamples(run_folder / "prepared")
        modules.vae = modules.image_encoder = modules.depth_network = None
    torch.manual_seed(seed)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision) if recipe.half_frozen else None
    make_trainable(modules, recipe, half)
    for _, module in modules.items():
        if module is not None:
            module.to(accelerator.device)
    task = FineTuneTask(modules, config, dataset, recipe, seed, workers=workers, held_out=held_out)
    train(task, run_folder, settings, on_log, accelerator)
    if recipe.lora_rank and accelerator.is_main_process:
        export(run_folder, run_folder / "lora.safetensors")
    accelerator.wait_for_everyone()


def _prepared(folder: Path, modules: Modules, config: dict, dataset, count: int, note: dict, accelerator) -> None:
    for module in (modules.vae, modules.image_encoder, modules.depth_network):
        module.to(accelerator.device)

    def report(done: int) -> None:
        if done % 50 == 0 or done == count:
            logger.info("prepared %d of %d samples", done, count)

    PreparedSamples.write(folder / "prepared", dataset, count, SampleEncoder(modules, config), note, report)


def export(run_folder: Path, path: Path) -> int:
    """Write what a run has learned, averaged: a LoRA, or the whole model in float16; returns the samples seen."""
    remembered = recalled(run_folder, NAME)
    recipe = Recipe(**{**remembered["recipe"], "train": tuple(remembered["recipe"]["train"])})
    checkpoint = run_folder / f"{NAME}.pt"
    if recipe.lora_rank:
        state = read_checkpoint(checkpoint)
        note = {"rank": recipe.lora_rank, "alpha": recipe.alpha, "samples": state["samples"], **remembered["start"]}
        write_lora(path, lora_layers(averaged_weights(state), recipe.alpha), note)
        return state["samples"]
    modules, config = StartingPoint(**remembered["start"]).load(remembered["seed"])
    samples = load_averaged(checkpoint, {part: getattr(modules, part) for part in recipe.parts})
    config = {**config, "name": f"{config['name']}, trained", "trained_samples": samples}
    save_modules(path, modules, config, torch.float16, depth_dtype=torch.float32)  # as `convert` stores a model
    return samples


def lora_layers(weights: dict[str, Tensor], alpha: float) -> dict[str, LoraLayer]:
    """peft's weights {"unet.<layer>.lora_A.default.weight": ...} -> {layer: its difference}."""
    layers = {}
    for name, down in weights.items():
        layer, ending, rest = name.removeprefix("unet.").partition(".lora_A.")
        if ending:
            layers[layer] = LoraLayer(down, weights[f"unet.{layer}.lora_B.{rest}"], alpha)
    return layers
