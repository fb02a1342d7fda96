"""The embedded models' recipes: stages, each resumable, and the export of what they learned.

MimicBrush:

1. autoencoder: pictures <-> latents. Then its latents are scaled to unit spread and both it and the depth
   network are rounded to float16, so that imitation is learned on exactly what is shipped.
2. depth: the depth network.
3. growing_64, imitation_64, imitation_128, patterns_128, objects_128, finish_128: both U-Nets, image encoder and
   projections. First on small pictures, while the task grows; then with more patterns, and errors that count by their
   logarithm; at last with more whole objects, and the decoded picture's error, too.

Its relatives take the autoencoder of the embedded MimicBrush, and learn on small pictures first, too:

* Paint by Example: the look of an exemplar in one token, then painting from it.
* Magic Fixup: synthesizer and detail extractor together.
* SmartBrush: U-Net and text encoder together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoints import embedded_model_path, load_modules, save_modules
from ..encoders import encode_pictures
from ..errors import ArgumentError
from ..modules import (
    MAGIC_FIXUP,
    MIMICBRUSH,
    PAINT_BY_EXAMPLE,
    SMARTBRUSH,
    Modules,
    Parts,
    build_modules,
    bundled_config,
    small_name,
)
from .curriculum import Curriculum
from .exemplar_task import ExemplarTask, LookTask
from .fixup_task import FixupTask
from .scenes import render_pair
from .smartbrush_task import CONTINUED, small_task
from .tasks import TERMS, AutoencoderTask, DepthTask, ImitationTask
from .trainer import Task, TrainingSettings, averaged_weights, copy_averaged, make_accelerator, read_checkpoint, train


@dataclass(frozen=True)
class Stage:
    """One run of a recipe.

    task(modules, config, seed): what is learned; its name is the stage's. begins_with: earlier stages of the recipe,
    whose weights it goes on from.
    """

    task: Callable[[Parts, dict, int], Task]
    settings: TrainingSettings
    begins_with: tuple[str, ...] = ()


_SMALL_PICTURES = TrainingSettings(samples=72_000, batch=48, lr=5e-3, adam_lr=2e-3, cooldown=0.4, ema_decay=0.995)
_GROWN = Curriculum(identity=0, full=0)  # of a stage that goes on from one on small pictures
_GROWING = Curriculum(identity=6_000, full=30_000, high_noise=0.05, high_noise_samples=0.8, textured_scenes=0.2)
_COMPLETE = replace(_GROWING, identity=0, full=0)
_BY_PART = replace(_COMPLETE, between_objects=0.25, masks=(0.35, 0.3, 0.15, 0.1, 0.1))
_BY_PATTERN = replace(
    _COMPLETE, between_objects=0.15, textured_scenes=0.35, masks=(0.45, 0.3, 0.05, 0.1, 0.1), first_scene=1_000_000
)
_BY_OBJECT = replace(
    _COMPLETE,
    high_noise_samples=0.65,
    between_objects=0.25,
    textured_scenes=0.2,
    masks=(0.35, 0.45, 0.05, 0.1, 0.05),
    first_scene=2_000_000,
)
_FINISH = replace(_BY_OBJECT, high_noise_samples=0.7, first_scene=3_000_000)
_BY_LOGARITHM = replace(TERMS, tolerance=0.05)
_BY_PICTURE = replace(_BY_LOGARITHM, picture=1.0, matching=0.5)
_FULL_SIZE = replace(_SMALL_PICTURES, samples=12_000, lr=2.5e-3, adam_lr=1e-3)
_WORDS = replace(_SMALL_PICTURES, samples=24_000, lr=4e-3, ema_decay=0.998)

RECIPES: dict[str, dict[str, Stage]] = {
    MIMICBRUSH: {
        "autoencoder": Stage(
            lambda modules, config, seed: AutoencoderTask(modules, seed),
            TrainingSettings(samples=24_000, batch=16, lr=1e-3, adam_lr=5e-4, warmup_steps=50, cooldown=0.4),
        ),
        "depth": Stage(
            lambda modules, config, seed: DepthTask(modules, seed),
            TrainingSettings(samples=14_400, batch=16, lr=4e-3, adam_lr=2e-3, warmup_steps=50, cooldown=0.4),
        ),
        "growing_64": Stage(
            partial(ImitationTask, name="growing_64", size=64, curriculum=_GROWING),
            replace(_SMALL_PICTURES, samples=41_280, batch=96, cooldown=0.0, ema_decay=0.998),
            begins_with=("autoencoder", "depth"),
        ),
        "imitation_64": Stage(
            partial(ImitationTask, name="imitation_64", size=64, curriculum=_COMPLETE),
            replace(_SMALL_PICTURES, samples=16_896, lr=2e-3, adam_lr=8e-4, cooldown=0.0),
            begins_with=("autoencoder", "depth", "growing_64"),
        ),
        "imitation_128": Stage(
            partial(ImitationTask, name="imitation_128", size=128, curriculum=_BY_PART),
            replace(_SMALL_PICTURES, samples=18_816, batch=32, lr=2e-3, adam_lr=8e-4, cooldown=0.0),
            begins_with=("autoencoder", "depth", "imitation_64"),
        ),
        "patterns_128": Stage(
            partial(ImitationTask, name="patterns_128", size=128, curriculum=_BY_PATTERN, terms=_BY_LOGARITHM, echo=4),
            replace(_SMALL_PICTURES, samples=44_800, batch=32, lr=2e-3, adam_lr=8e-4, cooldown=0.7),
            begins_with=("autoencoder", "depth", "imitation_128"),
        ),
        "objects_128": Stage(
            partial(ImitationTask, name="objects_128", size=128, curriculum=_BY_OBJECT, terms=_BY_PICTURE, echo=4),
            replace(_FULL_SIZE, samples=32_000, batch=32, cooldown=0.0),
            begins_with=("autoencoder", "depth", "patterns_128"),
        ),
        "finish_128": Stage(
            partial(ImitationTask, name="finish_128", size=128, curriculum=_FINISH, terms=_BY_PICTURE, echo=4),
            replace(_FULL_SIZE, samples=62_400, batch=32, cooldown=1.0),
            begins_with=("autoencoder", "depth", "objects_128"),
        ),
    },
    PAINT_BY_EXAMPLE: {
        "look": Stage(LookTask, replace(_SMALL_PICTURES, samples=60_000)),
        "exemplar_64": Stage(partial(ExemplarTask, size=64), _SMALL_PICTURES, begins_with=("look",)),
        "exemplar_128": Stage(
            partial(ExemplarTask, size=128, curriculum=_GROWN),
            replace(_FULL_SIZE, samples=18_000),
            begins_with=("exemplar_64",),
        ),
    },
    MAGIC_FIXUP: {
        "fixup_64": Stage(partial(FixupTask, size=64), replace(_SMALL_PICTURES, samples=48_000)),
        "fixup_128": Stage(partial(FixupTask, size=128, curriculum=_GROWN), _FULL_SIZE, begins_with=("fixup_64",)),
    },
    SMARTBRUSH: {
        "smartbrush_64": Stage(partial(small_task, size=64), replace(_WORDS, samples=68_640, cooldown=0.0)),
        "smartbrush_128": Stage(
            partial(small_task, size=128, curriculum=CONTINUED), _WORDS, begins_with=("smartbrush_64",)
        ),
    },
}
"""System -> the stages of its embedded model in order, with the settings the shipped one was trained with."""


def run_stage(
    stage: str,
    run_folder: Path,
    *,
    system: str = MIMICBRUSH,
    seed: int = 0,
    device: str = "cpu",
    on_log: Callable[[dict], None] | None = None,
    **changes,
) -> None:
    """Train or resume one stage in `run_folder`; `changes` replace fields of the stage's settings.

    device: as for `trainer.make_accelerator`.
    """
    recipe = RECIPES[system]
    if stage not in recipe:
        raise ArgumentError(f"Unknown stage {stage!r}. Choose one of: {', '.join(recipe)}.")
    chosen = recipe[stage]
    settings = replace(chosen.settings, **{key: value for key, value in changes.items() if value is not None})
    modules, config = _start(run_folder, system, chosen.begins_with, seed)
    accelerator = make_accelerator(settings, device, run_folder)
    for _, module in modules.items():
        module.to(accelerator.device)
    train(chosen.task(modules, config, seed), run_folder, settings, on_log, accelerator)


def export(run_folder: Path, path: Path, system: str = MIMICBRUSH) -> int:
    """Write the averaged weights of a run as one float16 model; returns the samples its last stage has seen."""
    stage, last = list(RECIPES[system].items())[-1]
    modules, config = _start(run_folder, system, last.begins_with, seed=0)
    samples = _load_stage(run_folder, stage, modules)
    save_modules(path, modules, config, torch.float16)
    return samples


def _start(run_folder: Path, system: str, begins_with: Sequence[str], seed: int) -> tuple[Parts, dict]:
    """Fresh modules, with what the earlier stages learned; the same weights for the same seed."""
    torch.manual_seed(seed)
    config = bundled_config(small_name(system))
    modules = build_modules(config)
    if system != MIMICBRUSH:
        _borrow_autoencoder(modules, config)
    for stage in begins_with:
        _load_stage(run_folder, stage, modules)
    if system == MIMICBRUSH and begins_with:
        _settle(modules, config)
    return modules, config


def _load_stage(run_folder: Path, stage: str, modules: Parts) -> int:
    """Give the modules what a stage learned of them; returns the samples it has seen."""
    path = run_folder / f"{stage}.pt"
    if not path.exists():
        raise ArgumentError(f"{run_folder} has no {path.name}: train the stage {stage!r} first.")
    state = read_checkpoint(path)
    learned = {name.partition(".")[0] for name in averaged_weights(state)}
    return copy_averaged(state, {name: module for name, module in modules.items() if name in learned}, path)


def _borrow_autoencoder(modules: Parts, config: dict) -> None:
    """Take the embedded MimicBrush's autoencoder, as it is."""
    embedded, its_config = load_modules(embedded_model_path())
    modules.vae.load_state_dict(embedded.vae.state_dict())
    modules.vae.requires_grad_(False)
    _set_scale(modules, config, its_config["vae"]["scaling_factor"])


def _settle(modules: Modules, config: dict) -> None:
    """Round what imitation is learned on to float16, and scale its latents to unit spread."""
    for module in (modules.vae, modules.depth_network):
        module.requires_grad_(False).half().float()
    _set_scale(modules, config, _unit_scale(modules))


def _set_scale(modules: Parts, config: dict, factor: float) -> None:
    """What latents are multiplied with, for the autoencoder and for the file that is made of it."""
    config["vae"]["scaling_factor"] = factor
    modules.vae.register_to_config(scaling_factor=factor)


def _unit_scale(modules: Modules, scenes: int = 32) -> float:
    """The factor that brings the autoencoder's latents to unit spread, to four digits."""
    frames = [render_pair(seed).source for seed in range(scenes)]
    return round(float(1 / encode_pictures(modules.vae, frames).std()), 4)
