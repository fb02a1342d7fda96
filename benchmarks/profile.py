"""One step with a known reference under torch's profiler: the top operators, copies, conversions, allocations.

    python -m benchmarks.profile                 SD-1.5 sizes, 256 px, on the CPU
    python -m benchmarks.profile --device cuda --dtype float16 --size 512
    python -m benchmarks.profile --small         narrow U-Nets: the same operators in the same number

The step is the second of two, so that what is computed once for an edit is not counted to it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    DTYPES,
    argument_parser,
    deliver,
    markdown_table,
    model_config,
    on_cuda,
    started,
    synchronize,
)
from benchmarks.step import GUIDANCE, StepModel, random_inputs
from mimicbrush_core.references import Reference, ReferenceUse
from mimicbrush_core.sampling import make_scheduler
from mimicbrush_core.systems.mimicbrush import SourceCondition

COUNTED = {
    "aten::copy_": "copies",
    "aten::_to_copy": "conversions of type or device",
    "aten::contiguous": "asked to be contiguous",
    "aten::clone": "clones",
    "aten::cat": "concatenations",
    "aten::_local_scalar_dense": "values read by Python (a wait, if the tensor is on the device)",
    "[memory]": "allocations and releases",
}
TOP = 12


def profile_second_step(sample: Callable[[Callable], object], device: str) -> profile:
    """Profile what `sample(on_step)` does between its first and its second call of on_step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda(device) else [])]
    profiler = profile(activities=activities, profile_memory=True)
    steps = []

    def on_step(info) -> None:
        synchronize(device)
        steps.append(info.step)
        if len(steps) == 1:
            profiler.start()
        elif len(steps) == 2:
            profiler.stop()

    sample(on_step)
    return profiler


def summary(profiler: profile, device: str) -> dict:
    """operators: name, calls, own milliseconds, share of all, in order; counts: of `COUNTED`."""
    own_time = "self_device_time_total" if on_cuda(device) else "self_cpu_time_total"
    events = profiler.key_averages()
    total = sum(getattr(event, own_time) for event in events)
    costly = sorted(events, key=lambda event: getattr(event, own_time), reverse=True)[:TOP]
    calls = {event.key: event.count for event in events}
    return {
        "operators": [
            [event.key, event.count, getattr(event, own_time) / 1e3, getattr(event, own_time) / total]
            for event in costly
        ],
        "counts": {title: calls.get(name, 0) for name, title in COUNTED.items()},
        "milliseconds": total / 1e3,
    }


def make_table(found: dict) -> str:
    operators = [[name, calls, f"{ms:.1f}", f"{100 * share:.1f}"] for name, calls, ms, share in found["operators"]]
    return "\n\n".join(
        [
            markdown_table(["operator", "calls", "own ms", "%"], operators),
            markdown_table(["in one step", "times"], list(found["counts"].items())),
        ]
    )


def parse_arguments(arguments: list[str] | None) -> Namespace:
    return argument_parser("profile", __doc__).parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    size = chosen.size or (64 if chosen.small else 256)
    facts = started(chosen, size)
    config, dtype = model_config(chosen.small), DTYPES[chosen.dtype]
    inputs = random_inputs(config, size, chosen.device)
    model = StepModel(config, chosen.device, dtype, inputs.unconditional_tokens)
    reference = Reference(inputs.reference_latents.to(dtype), inputs.tokens.to(dtype), owner=model)
    condition = SourceCondition(inputs.mask, inputs.hole_latents, inputs.depth)

    def sample(on_step) -> torch.Tensor:
        scheduler = make_scheduler(config["scheduler"], "ddim", 2)
        uses = [ReferenceUse(reference)]
        return model.sample(condition, uses, inputs.latents, scheduler, GUIDANCE, on_step=on_step)

    sample(lambda info: None)  # warm-up; the reference is known then
    found = summary(profile_second_step(sample, chosen.device), chosen.device)
    deliver(chosen, facts, make_table(found), **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
