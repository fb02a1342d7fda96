"""What a loop costs against steps, references and batch, and a step against size: counted, and timed beside it.

    python -m benchmarks.cost                    counts at SD-1.5 sizes; times what costs up to four plain steps
    python -m benchmarks.cost --at-most 0        counts only: no weights, a few minutes
    python -m benchmarks.cost --small            narrow U-Nets: does it run

Counted: floating-point operations of the code itself, by torch's counter on tensors without content. The unit is one
plain inpainting step of the same size (U-Net alone, both guidance rows, batch 1): what nobody goes below without
approximating. Timed: the same calls on random weights, in each round beside such a plain step.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    CLOCKS,
    DTYPES,
    Variant,
    argument_parser,
    deliver,
    markdown_table,
    model_config,
    ratios,
    spread,
    spread_text,
    started,
    time_rounds,
)
from benchmarks.step import (
    FIRST_RUN,
    GUIDANCE,
    KNOWN,
    ORIGINAL,
    PLAIN,
    StepInputs,
    StepModel,
    count_flops,
    make_variants,
    random_inputs,
)
from mimicbrush_core.references import Reference, ReferenceUse
from mimicbrush_core.sampling import make_scheduler
from mimicbrush_core.systems.mimicbrush import SourceCondition

SIZES = (256, 512, 768, 1024)
SERIES = {"steps": (1, 2, 4, 10, 20, 50), "references": (1, 2, 3, 4), "batch": (1, 2, 4, 8)}
"""What is varied, one at a time, from one step with one reference and one picture."""
STATES = (FIRST_RUN, KNOWN)


@dataclass(frozen=True)
class Case:
    """One sampling loop. state: whether its references' features are already known."""

    state: str
    steps: int = 1
    references: int = 1
    batch: int = 1


def all_cases(series: Mapping[str, Sequence[int]]) -> list[tuple[str, Case]]:
    """(series, case); the case of one step, reference and picture is in each of them."""
    return [
        (name, Case(state, **{name: value})) for name, values in series.items() for state in STATES for value in values
    ]


def loop(model: StepModel, inputs: StepInputs, references: Sequence[Reference], case: Case) -> Variant:
    """`MimicBrush.sample` with the model's own scheduler, as an edit calls it."""
    read = references[: case.references]
    scheduler = make_scheduler(model.config["scheduler"], "ddim", case.steps)
    noise = inputs.latents.repeat(case.batch, 1, 1, 1)
    condition = SourceCondition(inputs.mask, inputs.hole_latents, inputs.depth)

    def bring_about() -> None:
        for reference in read:
            if case.state == KNOWN:
                reference.prepare(model.modules.reference_unet, scheduler.timesteps.tolist())
            else:
                reference.clear()

    uses = [ReferenceUse(reference) for reference in read]
    return Variant(lambda: model.sample(condition, uses, noise, scheduler, GUIDANCE), before=bring_about)


def loops(model: StepModel, inputs: StepInputs, wanted: Sequence[Case]) -> dict[Case, Variant]:
    """The loops of several cases, which share their references and so the memory of the features."""
    count = max((case.references for case in wanted), default=0)
    dtype = model.dtype
    references = [
        Reference(inputs.reference_latents.to(dtype), inputs.tokens.to(dtype), owner=model) for _ in range(count)
    ]
    return {case: loop(model, inputs, references, case) for case in wanted}


def counted(config: dict, size: int, dtype: torch.dtype, wanted: Sequence[Case]) -> dict[Case, int]:
    """Floating-point operations of each case."""
    inputs = random_inputs(config, size, "meta")
    model = StepModel(config, "meta", dtype, inputs.unconditional_tokens)
    found = {}
    for case, variant in loops(model, inputs, wanted).items():
        variant.before()
        with FlopCounterMode(display=False) as counter:
            variant.run()
        found[case] = counter.get_total_flops()
    return found


def timed(chosen: Namespace, config: dict, wanted: Sequence[Case]) -> dict[Case, list[float]]:
    """Each case's time over that of a plain step, by round."""
    inputs = random_inputs(config, chosen.size, chosen.device)
    model = StepModel(config, chosen.device, DTYPES[chosen.dtype], inputs.unconditional_tokens)
    variants = {PLAIN: make_variants(model, inputs)[PLAIN]} | loops(model, inputs, wanted)
    for variant in variants.values():  # warm-up
        variant.before()
        variant.run()
    seconds = time_rounds(variants, chosen.rounds, chosen.device, CLOCKS[chosen.clock])
    return {case: ratios(seconds, case, PLAIN) for case in wanted}


def size_records(config: dict, sizes: Sequence[int]) -> list[dict]:
    """TFLOP of one step by size and variant."""
    return [
        {"size": size, **{name: flops[name] / 1e12 for name in (ORIGINAL, FIRST_RUN, KNOWN, PLAIN)}}
        for size in sizes
        for flops in [count_flops(config, size)]
    ]


def records(
    points: Sequence[tuple[str, Case]], plain: int, flops: dict[Case, int], measured: dict[Case, list[float]]
) -> list[dict]:
    """One record for each point of each series; costs in plain steps."""
    return [
        {
            "series": series,
            "value": getattr(case, series),
            **asdict(case),
            "counted": flops[case] / plain,
            "measured": spread(measured[case]) if case in measured else None,
        }
        for series, case in points
    ]


def make_tables(sizes: list[dict], points: list[dict]) -> str:
    """TFLOP by size; then cost by steps and references, and by batch for each picture."""
    names = (ORIGINAL, FIRST_RUN, KNOWN, PLAIN)
    rows = [[one["size"], *(f"{one[n]:.2f} ({one[n] / one[ORIGINAL]:.3f})" for n in names)] for one in sizes]
    tables = [markdown_table(["pixels", *(f"{name}, TFLOP (of the original)" for name in names)], rows)]
    header = [cell for state in STATES for cell in (f"{state}, counted", "measured (min..max)")]
    for series in dict.fromkeys(point["series"] for point in points):
        mine = [point for point in points if point["series"] == series]
        first, known = ([point for point in mine if point["state"] == state] for state in STATES)
        rows = [[one["value"], *_cells(one), *_cells(other)] for one, other in zip(first, known, strict=True)]
        tables.append(markdown_table([series, *header], rows))
    return "\n\n".join(tables)


def per_picture(point: dict) -> dict:
    """A record's costs, divided by the pictures of the batch."""
    measured, batch = point["measured"], point["batch"]
    return {
        "counted": point["counted"] / batch,
        "measured": measured and {key: value / batch for key, value in measured.items()},
    }


def _cells(point: dict) -> tuple[str, str]:
    costs = per_picture(point)
    return f"{costs['counted']:.3f}", spread_text(costs["measured"]) if costs["measured"] else ""


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = argument_parser("cost", __doc__, rounds=3)
    parser.add_argument("--at-most", type=float, default=4, metavar="N", help="time what costs up to N plain steps")
    chosen = parser.parse_args(arguments)
    chosen.size = chosen.size or (64 if chosen.small else 512)
    if chosen.size % 64:
        parser.error(f"--size is {chosen.size}; it must be a multiple of 64")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    config = model_config(chosen.small)
    facts = started(chosen, chosen.size)

    series = {name: values[:2] for name, values in SERIES.items()} if chosen.small else SERIES
    pairs = all_cases(series)
    wanted = list(dict.fromkeys(case for _, case in pairs))
    flops = counted(config, chosen.size, DTYPES[chosen.dtype], wanted)
    plain = count_flops(config, chosen.size)[PLAIN]
    affordable = [case for case in wanted if flops[case] <= chosen.at_most * plain]
    measured = timed(chosen, config, affordable) if affordable else {}
    sizes = size_records(config, SIZES[:1] if chosen.small else SIZES)
    points = records(pairs, plain, flops, measured)
    deliver(chosen, facts, make_tables(sizes, points), sizes=sizes, points=points)
    return 0


if __name__ == "__main__":
    sys.exit(main())
