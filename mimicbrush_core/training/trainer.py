"""The training loop: steps, learning rate, averaging, checkpoints that resume, several processes.

What is learned is a `Task` (see `tasks`). All randomness is keyed by the sample's global index, so a run that
was killed and resumed sees the same samples as one that was not.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .optimizer import Ema, MuonAdamW

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What the loop needs to know of a thing to learn."""

    name: str
    learned: dict[str, nn.Module]

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss of the samples with these global indices, and figures for the log."""


@dataclass(frozen=True)
class TrainingSettings:
    """samples: where the run ends; cooldown: the last share of them, over which the rate falls to zero."""

    samples: int
    batch: int = 32
    lr: float = 2e-3
    adam_lr: float = 1e-3
    warmup_steps: int = 100
    cooldown: float = 0.2
    ema_decay: float = 0.999
    checkpoint_minutes: float = 3.0
    minutes: float | None = None
    precision: str = "bf16"


def train(
    task: Task,
    run_folder: Path,
    settings: TrainingSettings,
    on_log: Callable[[dict], None] | None = None,
) -> None:
    """Run or resume `task` until `settings.samples` are seen or `settings.minutes` have passed.

    The batch counts all processes (`torchrun`; gloo on CPU, nccl on CUDA) together. Leaves `<task>.pt` (resumable) and
    `<task>.jsonl` (log) in the run folder, written by the first process; each checkpoint replaces the last
    in one step. The averaged weights are loaded into the modules at the end.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    rank, world = _join_processes()
    if settings.batch % world:
        raise ValueError(f"batch {settings.batch} does not divide among {world} processes")
    share = settings.batch // world
    named = _named_parameters(task.learned)
    optimizer = MuonAdamW(task.learned.values(), settings.lr, settings.adam_lr)
    ema = Ema(named, settings.ema_decay)
    path = run_folder / f"{task.name}.pt"
    step = _resume(path, named, optimizer, ema)
    device_type = next(iter(named.values())).device.type
    autocast = torch.autocast(device_type, torch.bfloat16, enabled=settings.precision == "bf16")

    log = _Log(run_folder / f"{task.name}.jsonl", settings.batch, on_log) if rank == 0 else None
    for module in task.learned.values():
        module.train()
    started = last_saved = time.monotonic()
    while step * settings.batch < settings.samples and not _out_of_time(started, settings.minutes, world):
        first = step * settings.batch + rank * share
        with autocast:
            loss, figures = task.loss(step, list(range(first, first + share)))
        loss.backward()
        _average_gradients(optimizer.parameters, world)
        norm = optimizer.step(_rate(step, settings))
        ema.update(named)
        step += 1
        if log is not None:
            log.add(step, {"loss": float(loss.detach()), "grad_norm": norm, **figures})
            if time.monotonic() - last_saved > 60 * settings.checkpoint_minutes:
                _save(path, step, settings.batch, named, optimizer, ema)
                last_saved = time.monotonic()
    if rank == 0:
        _save(path, step, settings.batch, named, optimizer, ema)
    _copy_into(named, ema.values)
    for module in task.learned.values():
        module.eval()


def load_averaged(path: Path, modules: dict[str, nn.Module]) -> int:
    """Load a checkpoint's averaged weights into `modules`; returns the samples they have seen."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    _copy_into(_named_parameters(modules), state["ema"])
    return state["samples"]


class _Log:
    """Means of the figures over some steps, one JSON line each."""

    def __init__(self, path: Path, batch: int, on_log: Callable[[dict], None] | None, every: int = 50):
        self._path, self._batch, self._on_log, self._every = path, batch, on_log, every
        self._figures: dict[str, list[float]] = {}
        self._since = time.monotonic()

    def add(self, step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self._figures.setdefault(key, []).append(value)
        if step % self._every:
            return
        seconds = time.monotonic() - self._since
        steps = len(self._figures["loss"])
        record = {"step": step, "samples": step * self._batch}
        record["samples_per_second"] = round(steps * self._batch / seconds, 2)
        record |= {key: round(sum(values) / len(values), 5) for key, values in self._figures.items()}
        self._figures, self._since = {}, time.monotonic()
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s", record)
        if self._on_log is not None:
            self._on_log(record)


def _rate(step: int, settings: TrainingSettings) -> float:
    """Warm-up, plateau, linear cool-down; 0..1."""
    seen = step * settings.batch / settings.samples
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return warm * min(1.0, (1.0 - seen) / settings.cooldown) if settings.cooldown else warm


def _named_parameters(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter for part, module in modules.items() for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def _copy_into(named: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, parameter in named.items():
        parameter.copy_(values[name])


def _save(path: Path, step: int, batch: int, named: dict[str, Tensor], optimizer: MuonAdamW, ema: Ema) -> None:
    """Write beside the old checkpoint, then replace it in one step."""
    state = {
        "step": step,
        "samples": step * batch,
        "weights": {name: parameter.detach() for name, parameter in named.items()},
        "ema": ema.values,
        "ema_updates": ema.updates,
        "optimizer": optimizer.state_dict(),
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _resume(path: Path, named: dict[str, Tensor], optimizer: MuonAdamW, ema: Ema) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    _copy_into(named, state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["ema"].items():
        ema.values[name].copy_(value)
    ema.updates = state["ema_updates"]
    logger.info("resumed %s at step %d", path, state["step"])
    return state["step"]


# --- several processes -------------------------------------------------------------------------------------


def _join_processes() -> tuple[int, int]:
    """(rank, number of processes) as `torchrun` set them; a lone process is (0, 1)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def _average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    if world == 1:
        return
    for parameter in parameters:  # a part that this step did not use has no gradient, on every process
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= world
    offset = 0
    for parameter in parameters:
        count = parameter.numel()
        parameter.grad.copy_(flat[offset : offset + count].view_as(parameter))
        offset += count


def _out_of_time(started: float, minutes: float | None, world: int) -> bool:
    """Whether the time is up; the processes decide together, or one would wait for the others for ever."""
    if minutes is None:
        return False
    late = torch.tensor(float(time.monotonic() - started > 60 * minutes))
    if world > 1:
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return bool(late)
