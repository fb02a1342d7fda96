"""The embedded model's recipe: three stages, each resumable, and the export of what they learned.

1. autoencoder: pictures <-> latents. Then its latents are scaled to unit spread and both it and the depth
   network are rounded to float16, so that imitation is learned on exactly what is shipped.
2. depth: the depth network.
3. imitation: both U-Nets, image encoder and projections.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..checkpoints import save_modules
from ..encoders import encode_latents
from ..errors import ArgumentError
from ..images import to_model_range
from ..modules import Modules, build_modules, bundled_config
from .scenes import render_pair
from .tasks import AutoencoderTask, Curriculum, DepthTask, ImitationTask
from .trainer import TrainingSettings, load_averaged, make_accelerator, train

logger = logging.getLogger(__name__)

STAGES = {
    "autoencoder": TrainingSettings(samples=24_000, batch=16, lr=1e-3, adam_lr=5e-4, warmup_steps=50, cooldown=0.4),
    "depth": TrainingSettings(samples=14_400, batch=16, lr=4e-3, adam_lr=2e-3, warmup_steps=50, cooldown=0.4),
    "imitation": TrainingSettings(samples=170_000, batch=48, lr=5e-3, adam_lr=2e-3, cooldown=0.4),
}
"""Stages in order, with the settings the shipped model was trained with."""


def run_stage(
    stage: str,
    run_folder: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    curriculum: Curriculum | None = None,
    on_log: Callable[[dict], None] | None = None,
    **changes,
) -> None:
    """Train or resume one stage in `run_folder`; `changes` replace fields of the stage's settings.

    device: as for `trainer.make_accelerator`.
    """
    if stage not in STAGES:
        raise ArgumentError(f"Unknown stage {stage!r}. Choose one of: {', '.join(STAGES)}.")
    settings = replace(STAGES[stage], **{key: value for key, value in changes.items() if value is not None})
    modules, config = _start(run_folder, stage, seed)
    accelerator = make_accelerator(settings, device, run_folder)
    for _, module in modules.items():
        module.to(accelerator.device)
    if stage == "autoencoder":
        task = AutoencoderTask(modules, seed)
    elif stage == "depth":
        task = DepthTask(modules, seed)
    else:
        task = ImitationTask(modules, config, seed, curriculum)
    train(task, run_folder, settings, on_log, accelerator)


def export(run_folder: Path, path: Path) -> int:
    """Write the averaged weights of a run as one float16 model; returns the samples imitation has seen."""
    modules, config = _start(run_folder, "imitation", seed=0)
    samples = load_averaged(_checkpoint(run_folder, "imitation"), _imitation_modules(modules))
    save_modules(path, modules, config, torch.float16)
    return samples


def _start(run_folder: Path, stage: str, seed: int) -> tuple[Modules, dict]:
    """Fresh modules, with what the earlier stages learned; the same weights for the same seed."""
    torch.manual_seed(seed)
    config = bundled_config("mimicbrush_small")
    modules = build_modules(config)
    if stage == "imitation":
        for earlier, part in (("autoencoder", "vae"), ("depth", "depth_network")):
            path = _checkpoint(run_folder, earlier)
            if not path.exists():
                raise ArgumentError(f"{run_folder} has no {path.name}: train the stage {earlier!r} first.")
            module = getattr(modules, part)
            load_averaged(path, {part: module})
            module.requires_grad_(False).half().float()
        config["vae"]["scaling_factor"] = _unit_scale(modules)
        modules.vae.register_to_config(scaling_factor=config["vae"]["scaling_factor"])
    return modules, config


def _checkpoint(run_folder: Path, stage: str) -> Path:
    return run_folder / f"{stage}.pt"


def _imitation_modules(modules: Modules) -> dict:
    return {name: module for name, module in modules.items() if name not in ("vae", "depth_network")}


@torch.no_grad()
def _unit_scale(modules: Modules, scenes: int = 32) -> float:
    """The factor that brings the autoencoder's latents to unit spread, to four digits."""
    frames = np.stack([render_pair(seed).source for seed in range(scenes)])
    pixels = torch.cat([to_model_range(frame) for frame in frames])
    return round(float(1 / encode_latents(modules.vae, pixels).std()), 4)
