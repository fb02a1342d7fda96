"""The training loop, on `accelerate`: one process, several on a machine (GPUs, or CPU cores), or several machines.

What is learned is a `Task` (see `tasks` and `finetune`). All randomness is keyed by the sample's global index, so a
run that was killed and resumed sees the same samples as one that was not, and gives the same weights bit for bit.

A run folder holds, for a task named `name`:

* `name.pt`: the checkpoint, resumable; it is written beside its place and renamed, so that it is always whole;
* `name.jsonl`: the log, one JSON line each `log_every` steps; `name_validation.jsonl`: one for each validation;
* `sheets/`: the validations' pictures; `tensorboard/`: the same for TensorBoard, where it is asked for.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from ..errors import ArgumentError, MimicBrushError, ModelFileError, as_output_error
from ..images import save_png
from ..whole_file import whole_file
from .optimizer import make_optimizer

logger = logging.getLogger(__name__)

PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
"""Names of the forward pass's precision -> accelerate's. Learned weights are float32 in all of them."""

_PATIENCE = timedelta(hours=3)  # how long processes wait for the first one's validation and checkpoints


@dataclass(frozen=True)
class Validation:
    """What a validation found. figures: for the log; sheet: labelled pictures, or None."""

    figures: dict[str, float]
    sheet: Image.Image | None = None


class Task:
    """What the loop needs to know of a thing to learn.

    name: of the run's files. learned: the networks by part name; of them the parameters that require gradients.
    """

    name: str
    learned: dict[str, nn.Module]

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of the samples with these global indices, and figures for the log."""
        raise NotImplementedError

    def computing(self) -> AbstractContextManager:
        """Entered around each forward *and* backward pass: gradient checkpointing runs the forward in both."""
        return nullcontext()

    def expect(self, indices: Iterator[int], at_once: int) -> None:
        """Told once, before the first step: what this process will ask for, in order and without end, and how many
        in each pass."""

    def validate(self) -> Validation | None:
        """Judge the networks as they are, in evaluation mode and without gradients; the first process only."""
        return None


@dataclass(frozen=True)
class TrainingSettings:
    """How a run goes.

    samples: where it ends. batch: samples per step, over all processes and `accumulate` passes together.
    optimizer, lr, adam_lr: as in `optimizer.make_optimizer`. warmup_steps: the rate rises over them; cooldown: the
    last share of the samples, over which it falls to zero. clip: largest norm of the gradient.
    ema_decay: of the averaged weights, which are what a run leaves; 0: no averaging.
    checkpoint_minutes, checkpoint_steps: how often a checkpoint is written. minutes: stop after this time.
    precision: of `PRECISIONS`. validate_every: steps, beginning with none; 0: never.
    accumulate: passes of a step, each with an equal part of the batch. log_every: steps.
    """

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
    optimizer: str = "muon"
    clip: float = 1.0
    accumulate: int = 1
    checkpoint_steps: int | None = None
    validate_every: int = 0
    tensorboard: bool = False
    log_every: int = 50

    def check(self, processes: int = 1) -> None:
        """Raise ArgumentError for what cannot be."""
        if self.precision not in PRECISIONS:
            raise ArgumentError(f"Unknown precision {self.precision!r}. Choose one of: {', '.join(PRECISIONS)}.")
        if min(self.samples, self.batch, self.accumulate, self.log_every) < 1:
            raise ArgumentError("samples, batch, accumulate and log_every must be at least 1.")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.cooldown <= 1 or self.lr <= 0 or self.clip <= 0:
            raise ArgumentError("ema_decay and cooldown lie between 0 and 1; lr and clip are positive.")
        if self.batch % (processes * self.accumulate):
            raise ArgumentError(
                f"The batch of {self.batch} does not divide among {processes} processes with {self.accumulate} passes "
                "each. Choose a multiple of their product."
            )


def make_accelerator(settings: TrainingSettings, device: str, run_folder: Path | None = None) -> Accelerator:
    """Join the other processes (of `accelerate launch` or `torchrun`), if there are any.

    device: "cpu" for CPUs only (gloo); "cuda" (nccl) or "mps" for what the machine has, "auto" for the best of it;
    "cuda:1" chooses one for a process that is alone. run_folder: where trackers write. Raises ArgumentError.
    """
    settings.check()
    if settings.precision == "fp16" and device == "cpu":
        raise ArgumentError("fp16 trains on a graphics card only. On a CPU use bf16 or fp32.")
    if settings.tensorboard and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ArgumentError("TensorBoard is not installed. Install it with `pip install tensorboard`, or leave it off.")
    if device.startswith("cuda:") and torch.cuda.is_available():
        torch.cuda.set_device(device)
    if device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        device = "cpu"  # said plainly: accelerate joins processes on CPUs only if it is told to
    # accelerate keeps one precision and device per program, and has no public way to ask for others later.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=PRECISIONS[settings.precision],
            # as a plugin: the bare number would give way to an environment variable of `accelerate launch`
            gradient_accumulation_plugin=GradientAccumulationPlugin(settings.accumulate, sync_with_dataloader=False),
            log_with="tensorboard" if settings.tensorboard else None,
            project_dir=run_folder,
            kwargs_handlers=[
                # A dropped reference leaves the reference U-Net without gradients, on some processes or all.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=_PATIENCE),
            ],
        )
    except ValueError as error:  # e.g. bf16 on a card that has none
        raise ArgumentError(f"This machine cannot train so: {error} Choose another precision or device.") from error
    if device != "auto" and accelerator.device.type != torch.device(device).type:
        raise ArgumentError(f"The device {device!r} is not available on this machine. Use cpu, or auto.")
    return accelerator


def part_from_others() -> None:
    """Leave the group of processes, at the end of a program; one that just ends may abort while the others talk."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(
    task: Task,
    run_folder: Path,
    settings: TrainingSettings,
    on_log: Callable[[dict], None] | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """Run or resume `task` until `settings.samples` are seen or `settings.minutes` have passed.

    accelerator: of `make_accelerator`, whose device the task's networks are on; default: that of the networks.
    on_log: called with each record of the log, by the first process. The averaged weights are loaded into the
    networks at the end. Raises ArgumentError (settings, or a checkpoint of another run) and MimicBrushError.
    """
    if accelerator is None:
        device = next(parameter for module in task.learned.values() for parameter in module.parameters()).device
        accelerator = make_accelerator(settings, str(device), run_folder)
    _Run(task, run_folder, settings, on_log, accelerator).go()


def load_averaged(path: Path, modules: dict[str, nn.Module]) -> int:
    """Load a checkpoint's averaged weights into `modules`; returns the samples they have seen."""
    return copy_averaged(read_checkpoint(path), modules, path)


def copy_averaged(state: dict, modules: dict[str, nn.Module], path: Path) -> int:
    """As `load_averaged`, of a checkpoint that was read already; path: where, for messages."""
    averaged = averaged_weights(state)
    for name, parameter in _named_parameters(modules).items():
        if name not in averaged:
            raise ModelFileError(f"The checkpoint {path} has no {name!r}: it is of another run.")
        _copy(parameter, averaged[name])
    return state["samples"]


def averaged_weights(state: dict) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint by "part.name"; the last ones where it has no average."""
    return state["ema"] or state["weights"]


def read_checkpoint(path: Path) -> dict:
    """What `train` saved. Raises ModelFileError: missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelFileError(f"There is no checkpoint {path}. Train first.") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelFileError(
            f"The checkpoint {path} cannot be read ({error}). The disk has failed, or it is another file; begin the "
            "run again in a new folder."
        ) from error


# --- a run ---------------------------------------------------------------------------------------------------


class _TaskModule(nn.Module):
    """A task as one module: what accelerate distributes, and casts the forward pass of."""

    def __init__(self, task: Task):
        super().__init__()
        self.learned = nn.ModuleDict(task.learned)
        self._task = task

    def forward(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        return self._task.loss(step, indices)


class _Run:
    """One run of a task: its networks, optimizer, averages and log, and how far it is.

    step: updates done; seen: samples they took, over all processes.
    """

    def __init__(self, task: Task, folder: Path, settings: TrainingSettings, on_log, accelerator: Accelerator):
        settings.check(accelerator.num_processes)
        self.task, self.folder, self.settings, self.accelerator = task, folder, settings, accelerator
        self.step = self.seen = 0
        self.path = folder / f"{task.name}.pt"
        with as_output_error(f"create the folder {folder}", "Choose another one."):
            folder.mkdir(parents=True, exist_ok=True)
        self.parameters = {k: v for k, v in _named_parameters(task.learned).items() if v.requires_grad}
        if not self.parameters:
            raise ArgumentError("Nothing is to be trained: no parameter requires gradients.")
        self.model = accelerator.prepare_model(_TaskModule(task))
        optimizer = make_optimizer(settings.optimizer, task.learned.values(), settings.lr, settings.adam_lr)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = EMAModel(self._values(), decay=settings.ema_decay) if settings.ema_decay else None
        self._resume()
        self.log = _Log(folder / f"{task.name}.jsonl", self.step, self.seen, accelerator, on_log)
        self.validation_log = _Log(folder / f"{task.name}_validation.jsonl", self.step, self.seen, accelerator, on_log)

    def _values(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    def go(self) -> None:
        settings = self.settings
        if settings.tensorboard:
            self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step}})
        self.task.expect(self._all_indices(), self._share)
        self._set_training(True)
        first_step, validated = self.step, None
        if settings.validate_every and not self.step:
            self._validate()  # what there is to be improved
        started = self.last_saved = time.monotonic()
        while self.seen < settings.samples and not self._out_of_time(started):
            figures = self._update()
            self.log.add(figures)
            if self.step % settings.log_every == 0:
                self.log.write(self.step, self.seen)
            if self._checkpoint_is_due():
                self._save()
            if settings.validate_every and self.step % settings.validate_every == 0:
                self._validate()
                validated = self.step
        self.log.write(self.step, self.seen)
        if self.step > first_step or not self.path.exists():
            self._save()
        if settings.validate_every and validated != self.step and self.step > first_step:
            self._validate()
        if self.ema is not None:
            self.ema.copy_to(self._values())
        self._set_training(False)
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # -- one update

    def _update(self) -> dict[str, list[float]]:
        """Gradients of one batch in `accumulate` passes, and a step; returns the passes' figures."""
        settings, figures = self.settings, {}
        rate = _rate(self.step, self.seen, settings)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        for indices in self._indices(self.seen):
            torch.manual_seed(indices[0])  # for what draws from torch itself, such as dropout
            with self.accelerator.accumulate(self.model):
                with self.task.computing():
                    loss, seen = self.model(self.step, indices)
                    self._check(loss)
                    self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self._values(), settings.clip)
                    seen = {**seen, "grad_norm": float(norm)}
                self.optimizer.step()
                self.optimizer.zero_grad()
            for key, value in {"loss": float(loss.detach()), **seen}.items():
                figures.setdefault(key, []).append(value)
        if self.ema is not None:
            self.ema.step(self._values())
        self.step += 1
        self.seen += settings.batch
        return figures

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(float(loss.detach())):
            raise MimicBrushError(
                f"The loss is {float(loss.detach())} in step {self.step}: the run has diverged. Begin again from the "
                f"last checkpoint ({self.path}) or anew, with a lower learning rate, or in fp32."
            )

    def _indices(self, seen: int) -> Iterator[list[int]]:
        """This process's passes of the step that begins at sample `seen`."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for accumulated in range(self.settings.accumulate):
            first = seen + (accumulated * processes + rank) * self._share
            yield list(range(first, first + self._share))

    @property
    def _share(self) -> int:
        """Samples of one pass of one process."""
        return self.settings.batch // (self.accelerator.num_processes * self.settings.accumulate)

    def _all_indices(self) -> Iterator[int]:
        seen = self.seen
        while True:
            for indices in self._indices(seen):
                yield from indices
            seen += self.settings.batch

    def _out_of_time(self, started: float) -> bool:
        """Whether the time is up; the processes decide together, or one would wait for the others for ever."""
        if self.settings.minutes is None:
            return False
        if time.monotonic() - started > 60 * self.settings.minutes:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _set_training(self, training: bool) -> None:
        for module in self.task.learned.values():
            module.train(training)

    # -- validation

    def _validate(self) -> None:
        """Let the task judge the averaged weights, on the first process; the others wait."""
        began = time.monotonic()
        if self.accelerator.is_main_process:
            with self._averaged(), torch.no_grad(), self.accelerator.autocast():
                found = self.task.validate()
            if found is not None:
                self.validation_log.add({key: [value] for key, value in found.figures.items()})
                if found.sheet is not None:
                    self._save_sheet(found.sheet)
        self.validation_log.write(self.step, self.seen, alone=True)
        self.accelerator.wait_for_everyone()
        self.log.pause(time.monotonic() - began)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the networks, in evaluation mode; then all as it was."""
        values = self._values()
        if self.ema is not None:
            self.ema.store(values)
            self.ema.copy_to(values)
        self._set_training(False)
        try:
            yield
        finally:
            self._set_training(True)
            if self.ema is not None:
                self.ema.restore(values)

    def _save_sheet(self, sheet: Image.Image) -> None:
        folder = self.folder / "sheets"
        with as_output_error(f"write the sample sheet to {folder}"):
            folder.mkdir(exist_ok=True)
            save_png(folder / f"{self.task.name}_{self.step:07d}.png", sheet, {})
        for tracker in self.accelerator.trackers:
            tracker.log_images({"samples": np.asarray(sheet)[None]}, step=self.step, dataformats="NHWC")

    # -- checkpoints

    def _checkpoint_is_due(self) -> bool:
        settings = self.settings
        if settings.checkpoint_steps is not None and self.step % settings.checkpoint_steps == 0:
            return True
        return time.monotonic() - self.last_saved > 60 * settings.checkpoint_minutes

    def _save(self) -> None:
        """Write the checkpoint beside the old one, then replace that in one step; the first process only."""
        self.last_saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "samples": self.seen,
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "ema": {} if self.ema is None else dict(zip(self.parameters, self.ema.shadow_params, strict=True)),
            "ema_updates": 0 if self.ema is None else self.ema.optimization_step,
            "optimizer": self.optimizer.state_dict(),
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        with (
            as_output_error(f"write the checkpoint {self.path}", "The one before is whole. Free some space."),
            whole_file(self.path) as unfinished,
            open(unfinished, "wb") as file,
        ):
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def _resume(self) -> None:
        if not self.path.exists():
            return
        state = read_checkpoint(self.path)
        self._check_fit(state["weights"])
        for name, parameter in self.parameters.items():
            _copy(parameter, state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            averaged = averaged_weights(state)
            for name, value in zip(self.parameters, self.ema.shadow_params, strict=True):
                _copy(value, averaged[name])
            self.ema.optimization_step = state["ema_updates"]
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seen = state["step"], state["samples"]
        logger.info("resumed %s at step %d", self.path, self.step)

    def _check_fit(self, weights: Mapping[str, Tensor]) -> None:
        found = {name: value.shape for name, value in weights.items()}
        expected = {name: value.shape for name, value in self.parameters.items()}
        if found != expected:
            differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise ArgumentError(
                f"The checkpoint {self.path} is of another run: {len(differing)} parameters differ, the first is "
                f"{differing[0]!r}. Train with the settings it began with, or in another folder."
            )


class _Log:
    """Figures of some steps, and their means over steps and processes as one JSON line.

    What an earlier run wrote after `step` is taken out again: those steps come once more.
    """

    def __init__(self, path: Path, step: int, seen: int, accelerator: Accelerator, on_log):
        self._path, self._accelerator, self._on_log = path, accelerator, on_log
        self._figures: dict[str, list[float]] = {}
        self._since, self._seen = time.monotonic(), seen
        if accelerator.is_main_process and path.exists():
            _cut_log(path, step)

    def add(self, figures: Mapping[str, list[float]]) -> None:
        for key, values in figures.items():
            self._figures.setdefault(key, []).extend(values)

    def pause(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self._since += seconds

    def write(self, step: int, seen: int, alone: bool = False) -> None:
        """Log what was added since the last time. Called by all processes; alone: only the first one added."""
        gathered = [self._figures] if alone else gather_object([self._figures])
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        self._figures = {}
        merged: dict[str, list[float]] = {}
        for figures in gathered:
            for key, values in figures.items():  # fp16 may skip a step, whose norm is infinite
                merged.setdefault(key, []).extend(value for value in values if math.isfinite(value))
        if not merged or not self._accelerator.is_main_process:
            return
        record: dict = {"step": step, "samples": seen}
        if not alone:
            record["samples_per_second"] = round((seen - self._seen) / seconds, 4)
        self._seen = seen
        means = {key: sum(values) / len(values) for key, values in merged.items() if values}
        record |= {key: float(f"{mean:.8g}") for key, mean in means.items()}
        with as_output_error(f"write the log {self._path}"), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s", record)
        prefix = "validation/" if alone else "training/"
        self._accelerator.log({prefix + k: v for k, v in record.items() if k not in ("step", "samples")}, step=step)
        if self._on_log is not None:
            self._on_log(record)


def _cut_log(path: Path, step: int) -> None:
    """Keep a log's records up to `step`; a line that was cut off by a kill goes, too."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with whole_file(path) as unfinished:
        unfinished.write_text("".join(kept))


def _rate(step: int, seen: int, settings: TrainingSettings) -> float:
    """Warm-up, plateau, linear cool-down; 0..1."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    left = 1.0 - seen / settings.samples
    return warm * min(1.0, left / settings.cooldown) if settings.cooldown else warm


def _named_parameters(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        f"{part}.{name}": parameter for part, module in modules.items() for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def _copy(target: Tensor, value: Tensor) -> None:
    target.copy_(value)
