"""Memory of one whole edit with random weights of the real model's sizes: counted, or the peak measured.

    python -m benchmarks.memory --count          bytes of tensors by stage at 512, 768 and 1024 px, in float16
    python -m benchmarks.memory                  measured on the CPU, float32, 512 px (11 GB)
    python -m benchmarks.memory --device cuda --dtype float16 --size 1024
    python -m benchmarks.memory --small          the embedded model's configuration

Counted: what the code would allocate, on tensors without content, with fused attention (its output and log-sum-exp,
no scores). It leaves out what a device's libraries add: context, workspaces, the allocator's rounding.
Measured: on a CPU the process's resident memory, on CUDA what torch allocated. No weight is ever held twice; what the
peak has above the weights is the work's own memory.
"""

from __future__ import annotations

import resource
import sys
import time
import weakref
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import (
    DTYPES,
    MIB,
    deliver,
    machine_facts,
    markdown_table,
    on_cuda,
    print_facts,
    random_model,
    random_pictures,
    square_mask,
)
from benchmarks.step import GUIDANCE, PredictionOnly
from mimicbrush_core import attention
from mimicbrush_core.encoders import decode_latents
from mimicbrush_core.modules import Modules, bundled_config
from mimicbrush_core.references import ReferenceUse
from mimicbrush_core.sampling import make_scheduler
from mimicbrush_core.systems.mimicbrush import MimicBrush

SIZES = (512, 768, 1024)
STAGE_PARTS = {
    "reference": ("image_encoder", "image_projection", "vae"),
    "source": ("vae", "depth_projector"),
    "features": ("reference_unet",),
    "sampling": ("unet",),
    "decoding": ("vae",),
}
"""The networks each stage of an edit runs. What is constant for the weights is known by then."""


# --- the work ------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_stages(model: MimicBrush, size: int, steps: int) -> Iterator[tuple[str, int]]:
    """An edit of a random picture, one stage after the other; yields each one's name and the bytes of features kept.

    Features are kept for all steps, and one step is sampled: all have the same peak.
    """
    picture, reference_picture = random_pictures(2, size)
    reference = model.encode_reference(reference_picture, size)
    yield "reference", 0
    condition = model.encode_source(picture, square_mask(size), size)
    yield "source", 0
    timesteps = make_scheduler(model.config["scheduler"], "ddim", steps).timesteps.tolist()
    reference.prepare(model.modules.reference_unet, timesteps)
    kept = reference.stored_bytes
    yield "features", kept
    noise, scheduler = torch.zeros_like(condition.hole_latents), PredictionOnly(int(timesteps[0]))
    latents = model.sample(condition, [ReferenceUse(reference)], noise, scheduler, GUIDANCE)
    yield "sampling", kept
    decode_latents(model.modules.vae, latents.to(model.dtype)).float()
    yield "decoding", kept


# --- counted -------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of the tensors on "meta" that are alive.

    now: at this moment; peak: the most since the last `reset_peak`. Views count once, with what they look at.
    """

    def __init__(self, known: Sequence[Tensor] = ()):
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._note(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.is_meta:
                self._note(one)
        return result

    def reset_peak(self) -> None:
        self.peak = self.now

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)  # the storage's object lives as long as its memory

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


@contextmanager
def fused_attention():
    """While entered, attention allocates what a fused kernel does: the output, and the log-sum-exp where asked for."""

    def output_only(query: Tensor, _key: Tensor, value: Tensor, *_unused, **_unused_too) -> Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return output_only(query, key, value), query.new_empty(query.shape[:-1], dtype=torch.float32)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", output_only),
        mock.patch.object(attention, "_lse_kernel", lambda _query: with_lse),
    ):
        yield


def count_stages(config: dict, size: int, steps: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by stage beside the weights: each stage's peak without the features kept; and "kept features"."""
    model = random_model(config, "meta", dtype)
    model.compute_constants()
    weights = [tensor for _, module in model.modules.items() for tensor in _tensors(module)]
    found: dict[str, int] = {}
    with fused_attention(), LiveBytes(weights) as live:
        before = live.now
        for stage, kept in run_stages(model, size, steps):
            found[stage] = live.peak - before - kept
            live.reset_peak()
    return found | {"kept features": kept}


def peaks(weights: dict[str, int], stages: dict[str, int]) -> dict[str, int]:
    """The device's peak when all weights stay on it; when those of Encode Reference and those of the sampler take
    turns, as in ComfyUI; and when only the running stage's are there and the features wait in the host's memory."""
    own = {stage: sum(weights[part] for part in parts) for stage, parts in STAGE_PARTS.items()}
    in_sampler = ("source", "features", "sampling", "decoding")
    sampler_weights = sum(weights[part] for part in ("vae", "depth_projector", "unet", "reference_unet"))
    # The features are kept from the stage that writes them on.
    resident = {stage: stages[stage] + (stages["kept features"] if stage != "reference" else 0) for stage in own}
    return {
        "all resident": sum(weights.values()) + max(resident.values()),
        "nodes": max(
            own["reference"] + resident["reference"], *(sampler_weights + resident[stage] for stage in in_sampler)
        ),
        "offload": max(own[stage] + stages[stage] for stage in own),
    }


def count(chosen: Namespace, config: dict, sizes: Sequence[int]) -> None:
    dtype = DTYPES[chosen.dtype]
    weights = count_weights(random_model(config, "meta", dtype).modules)
    stages = {size: count_stages(config, size, chosen.steps, dtype) for size in sizes}
    found = {size: {"stages": stages[size], "peaks": peaks(weights, stages[size])} for size in sizes}
    rows = [[f"weights: {name}", *[mebibytes(value)] * len(sizes)] for name, value in weights.items()]
    for name in (*STAGE_PARTS, "kept features"):
        rows.append(
            [f"{name}{'' if name == 'kept features' else ', work'}", *(mebibytes(stages[s][name]) for s in sizes)]
        )
    for name in ("all resident", "nodes", "offload"):
        rows.append([f"peak: {name}", *(mebibytes(found[size]["peaks"][name]) for size in sizes)])
    table = markdown_table([f"MiB counted, {chosen.dtype}, {chosen.steps} steps", *(f"{s} px" for s in sizes)], rows)
    facts = {"torch": torch.__version__, "dtype": chosen.dtype, "steps": chosen.steps}
    deliver(chosen, facts, table, weights=weights, sizes=found)


# --- measured ------------------------------------------------------------------------------------------------


def current_and_peak(device: str = "cpu") -> tuple[int, int]:
    """Bytes in use now, and the most since the start or the last `reset_peak`: resident ones, on CUDA allocated."""
    if on_cuda(device):
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 0, process_peak()
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return _kilobytes(fields["VmRSS"]), _kilobytes(fields["VmHWM"])


def _kilobytes(field: str) -> int:
    return int(field.split()[0]) * 1024


def process_peak() -> int:
    """ru_maxrss in bytes: the whole process's, or on Linux since the last `reset_peak`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: str = "cpu") -> bool:
    """Start counting the peak anew; False where the system does not offer it."""
    if on_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Phase:
    """What one phase needed, in bytes and seconds; peak: the most within it."""

    name: str
    after: int
    peak: int
    seconds: float


class PhaseRecorder:
    """Call `end(name)` at the end of each phase."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.phases: list[Phase] = []
        self.per_phase = reset_peak(device)
        self._start = time.perf_counter()

    def end(self, name: str) -> None:
        now, peak = current_and_peak(self.device)
        self.phases.append(Phase(name, now, peak, time.perf_counter() - self._start))
        reset_peak(self.device)
        self._start = time.perf_counter()

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)


def count_weights(modules: Modules) -> dict[str, int]:
    """Bytes of parameters and buffers by part, from shapes and dtypes."""
    return {
        part: sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))
        for part, module in modules.items()
    }


def check_held_once(modules: Modules) -> int:
    """Bytes of all distinct storages.

    Raises RuntimeError if two tensors share a storage, or a storage holds more than its tensor.
    """
    storages: dict[int, tuple[str, int]] = {}
    for part, module in modules.items():
        for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
            storage = tensor.untyped_storage()
            owner, _ = storages.get(storage.data_ptr(), (None, 0))
            if owner is not None:
                raise RuntimeError(f"{part}.{name} shares its storage with {owner}.")
            storages[storage.data_ptr()] = (f"{part}.{name}", storage.nbytes())
    held, counted = sum(size for _, size in storages.values()), sum(count_weights(modules).values())
    if held != counted:
        raise RuntimeError(f"The storages hold {held} bytes for weights of {counted} bytes.")
    return held


def _tensors(module: nn.Module) -> tuple[Tensor, ...]:
    return (*module.parameters(), *module.buffers())


def measured_table(weights: dict[str, int], recorder: PhaseRecorder, before: int) -> str:
    total = sum(weights.values())
    rows = [[f"weights: {part}", mebibytes(size), "", ""] for part, size in weights.items()]
    rows.append(["all weights, each held once", mebibytes(total), "", ""])
    rows += [
        [phase.name, mebibytes(phase.peak), mebibytes(phase.after), f"{phase.seconds:.1f}"] for phase in recorder.phases
    ]
    rows.append(["peak", mebibytes(recorder.peak), "", ""])
    rows.append(["of it: interpreter and libraries", mebibytes(before), "", ""])
    rows.append(["of it: work", mebibytes(recorder.peak - before - total), "", ""])
    return markdown_table(["MiB measured", "peak" if recorder.per_phase else "peak so far", "after", "seconds"], rows)


def measure(chosen: Namespace, config: dict, size: int) -> None:
    """Raises RuntimeError if a weight is held twice."""
    facts = machine_facts(chosen.device, chosen.dtype, chosen.threads, size)
    print_facts(facts)
    recorder = PhaseRecorder(chosen.device)
    recorder.end("start")
    before = recorder.phases[0].after
    model = random_model(config, chosen.device, DTYPES[chosen.dtype])
    recorder.end("random weights")
    model.compute_constants()
    recorder.end("constants of the weights")
    for stage, _ in run_stages(model, size, chosen.steps):
        recorder.end(stage)

    weights = count_weights(model.modules)
    check_held_once(model.modules)
    phases = [vars(phase) for phase in recorder.phases]
    found = {"weights": weights, "before": before, "phases": phases, "peak": recorder.peak}
    deliver(chosen, facts, measured_table(weights, recorder, before), **found)


def mebibytes(size: int) -> str:
    return f"{size / MIB:.1f}"


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="count tensors; nothing is computed")
    parser.add_argument("--size", type=int, help="picture side in pixels (the model's own; counted: 512, 768, 1024)")
    parser.add_argument("--steps", type=int, help="1; counted: 50")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="float32; counted: float16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="the embedded model's sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    chosen = parser.parse_args(arguments)
    chosen.steps = chosen.steps or (50 if chosen.count else 1)
    chosen.dtype = chosen.dtype or ("float16" if chosen.count else "float32")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    torch.set_num_threads(chosen.threads)
    config = bundled_config("mimicbrush_small" if chosen.small else "mimicbrush_sd15")
    own_size = config["defaults"]["size"]
    if chosen.count:
        count(chosen, config, [chosen.size] if chosen.size else [own_size] if chosen.small else SIZES)
    else:
        measure(chosen, config, chosen.size or own_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
