"""Peak memory of one whole edit with random weights of the real model's sizes.

    python -m benchmarks.memory                  all seven networks in SD-1.5 sizes, 512 px, one step
    python -m benchmarks.memory --small          the embedded model's configuration

The real sizes have 9.4 GiB of weights. No weight is ever held twice; what the peak has above the weights is
the work's own memory. On a CPU and in float32 only.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import SEED, machine_facts, print_facts, random_part
from mimicbrush_core.modules import PART_NAMES, Modules, bundled_config
from mimicbrush_core.systems.mimicbrush import EditSettings, MimicBrush, Progress

MIB = 1 << 20


# --- the process's memory ----------------------------------------------------------------------------------


def current_and_peak() -> tuple[int, int]:
    """Resident bytes now, and the most since the start or the last `reset_peak`."""
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


def reset_peak() -> bool:
    """Start counting the peak anew; False where the system does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Phase:
    """What one phase needed, in bytes and seconds; peak: the largest resident size within it."""

    name: str
    resident_after: int
    peak: int
    seconds: float


class PhaseRecorder:
    """Call `end(name)` at the end of each phase."""

    def __init__(self):
        self.phases: list[Phase] = []
        self.per_phase = reset_peak()
        self._start = time.perf_counter()

    def end(self, name: str) -> None:
        now, peak = current_and_peak()
        self.phases.append(Phase(name, now, peak, time.perf_counter() - self._start))
        reset_peak()
        self._start = time.perf_counter()

    @property
    def peak(self) -> int:
        return max(process_peak(), *(phase.peak for phase in self.phases))


# --- the weights -------------------------------------------------------------------------------------------


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


def _tensors(module):
    return (*module.parameters(), *module.buffers())


# --- the edit ----------------------------------------------------------------------------------------------


def run_edit(model: MimicBrush, size: int, steps: int, recorder: PhaseRecorder) -> None:
    """One edit of a random picture of size x size, recorded in phases."""
    generator = np.random.default_rng(SEED)
    source, reference = (generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((size, size), dtype=np.float32)
    mask[size // 4 : size // 2, size // 4 : size // 2] = 1.0

    def on_progress(progress: Progress) -> None:
        if progress.done == progress.total:
            recorder.end("encoding, features" if progress.stage == "reference" else "sampling")

    model.edit(source, mask, reference, EditSettings(seed=SEED, size=size, steps=steps), on_progress)
    recorder.end("decoding, pasting")


def print_report(weights: dict[str, int], recorder: PhaseRecorder, before: int) -> None:
    total = sum(weights.values())
    print(f"\n{'part':20} {'weights MiB':>12}")
    for part, size in weights.items():
        print(f"{part:20} {size / MIB:12.1f}")
    print(f"{'all':20} {total / MIB:12.1f}   each held once: no shared, no oversized storage")

    peak_title = "peak MiB" if recorder.per_phase else "peak so far"
    print(f"\n{'phase':20} {peak_title:>12} {'after MiB':>12} {'seconds':>10}")
    for phase in recorder.phases:
        peak, after = phase.peak / MIB, phase.resident_after / MIB
        print(f"{phase.name:20} {peak:12.1f} {after:12.1f} {phase.seconds:10.1f}")
    whole, libraries = recorder.peak / MIB, before / MIB
    work = whole - libraries - total / MIB
    print(f"{'all':20} {whole:12.1f}")
    print(f"  = weights {total / MIB:.1f} + interpreter and libraries {libraries:.1f} + work {work:.1f}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, help="picture side in pixels (the model's own default)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="the embedded model's sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a weight is held twice."""
    chosen = parse_arguments(arguments)
    torch.set_num_threads(chosen.threads)
    config = bundled_config("mimicbrush_small" if chosen.small else "mimicbrush_sd15")
    size = chosen.size or config["defaults"]["size"]
    facts = machine_facts("cpu", "float32", chosen.threads, size)
    print_facts(facts)

    recorder = PhaseRecorder()
    recorder.end("start")
    before = recorder.phases[0].resident_after
    model = MimicBrush(Modules(**{name: random_part(name, config) for name in PART_NAMES}), config)
    recorder.end("random weights")
    run_edit(model, size, chosen.steps, recorder)

    weights = count_weights(model.modules)
    try:
        check_held_once(model.modules)
    except RuntimeError as error:
        print(error)
        return 1
    print_report(weights, recorder, before)
    if chosen.json:
        phases = [vars(phase) for phase in recorder.phases]
        data = {"facts": facts, "weights": weights, "before": before, "phases": phases, "peak": recorder.peak}
        chosen.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
