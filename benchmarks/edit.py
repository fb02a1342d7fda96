"""A whole edit through `MimicBrush.edit`: its time, the loop's alone, the stages' shares, peak memory on CUDA.

    python -m benchmarks.edit                    random weights of SD-1.5 sizes, 512 px, 2 steps, on the CPU
    python -m benchmarks.edit --small            the embedded model with its own settings
    python -m benchmarks.edit --weights MODEL    a model of one's own
    python -m benchmarks.edit --device cuda --dtype float16 --steps 50 20 --accelerate compiled --roof 989

The last line is the one for a graphics card; --roof is the card's dense half-precision peak in TFLOP/s (989: H200), of
which the loop's share is then told. Nothing is extrapolated: the steps given are the steps run.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from unittest import mock

import numpy as np
import torch

from benchmarks.common import (
    CLOCKS,
    DTYPES,
    MIB,
    SEED,
    Variant,
    argument_parser,
    at_least_one,
    deliver,
    markdown_table,
    on_cuda,
    random_pictures,
    ratios,
    spread,
    spread_text,
    square_mask,
    started,
    synchronize,
    time_rounds,
    whole_model,
)
from benchmarks.cost import Case, counted
from benchmarks.memory import count_weights
from benchmarks.opt_ins import OPT_INS
from benchmarks.step import FIRST_RUN, KNOWN
from mimicbrush_core.evaluation.metrics import masked_psnr
from mimicbrush_core.references import Reference
from mimicbrush_core.systems.mimicbrush import EditResult, EditSettings, MimicBrush

FIRST_EDIT, NEW_REFERENCE, KNOWN_REFERENCE = "first edit", "new reference", "known reference"
EXACT = "exact"
REST = "checks, pasting"
STAGES = {
    "unconditional_tokens": "constants",
    "no_depth_feature": "constants",
    "encode_reference": "reference",
    "encode_source": "source",
    "sample": "loop",
    "decode": "decoding",
}
"""Methods of MimicBrush by the stage they are; writing the features, inside `sample`, is a stage of its own."""
FEATURES = "features"
STAGE_NAMES = ("constants", "reference", "source", FEATURES, "loop", "decoding", REST)


# --- what an edit spends its time on -------------------------------------------------------------------------


class StageClock:
    """Seconds in each stage of an edit; a stage within another counts for itself only."""

    def __init__(self, clock: Callable[[], float], device: str):
        self._clock, self._device = clock, device
        self.seconds: dict[str, float] = {}
        self._stage = REST

    @contextmanager
    def watching(self, model: MimicBrush) -> Iterator[None]:
        """While entered, the stages of this model's edits are timed, from zero."""
        with (
            mock.patch.multiple(
                model, **{name: self._timed(stage, getattr(model, name)) for name, stage in STAGES.items()}
            ),
            mock.patch.object(Reference, "prepare", self._timed(FEATURES, Reference.prepare)),
        ):
            self.seconds = dict.fromkeys(STAGE_NAMES, 0.0)
            self._since = self._clock()
            yield
            self._switch(REST)

    def _timed(self, stage: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            outer = self._switch(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(outer)

        return timed

    def _switch(self, stage: str) -> str:
        """Begin a stage; returns the one that was."""
        synchronize(self._device)
        now = self._clock()
        self.seconds[self._stage] += now - self._since
        outer, self._stage, self._since = self._stage, stage, now
        return outer


@dataclass(frozen=True)
class EditCase:
    """One kind of edit: which reference, how many steps, exact or an opt-in's name."""

    state: str
    steps: int
    way: str = EXACT


@dataclass
class Run:
    """What one edit took. peak: bytes on CUDA at most, with this model's weights and reference alone; else None."""

    stages: dict[str, float]
    peak: int | None
    result: EditResult


class EditRuns:
    """Runs edits of one picture, as variants for `time_rounds`, and keeps what each of them took."""

    def __init__(self, model: MimicBrush, size: int, device: str, clock: Callable[[], float]):
        self.model, self.size, self.device = model, size, device
        self.source, self.reference_picture = random_pictures(2, size)
        self.mask = square_mask(size)
        self.stage_clock = StageClock(clock, device)
        self.runs: dict[EditCase, list[Run]] = {}
        self._models = {EXACT: model}

    def variant(self, case: EditCase) -> Variant:
        if case.way not in self._models:
            self._models[case.way] = OPT_INS[case.way].applied(self.model)
        model = self._models[case.way]
        given = {"seed": SEED, "size": self.size, "steps": case.steps}
        settings = EditSettings(**given | (OPT_INS[case.way].settings if case.way != EXACT else {}))
        known = model.encode_reference(self.reference_picture, self.size) if case.state == KNOWN_REFERENCE else None

        def bring_about() -> None:
            if case.state == FIRST_EDIT:
                model.to(self.device)  # which forgets the constants
            else:
                model.compute_constants()
            if known is not None and not known.stored_bytes:
                model.edit(self.source, self.mask, known, settings)

        def run() -> None:
            others = reset_peak_memory(self.device)  # what other cases keep on the device
            with self.stage_clock.watching(model):
                reference = self.reference_picture if known is None else known
                result = model.edit(self.source, self.mask, reference, settings)
            peak = peak_memory(self.device)
            if peak is not None:
                own = sum(count_weights(model.modules).values()) + (known.stored_bytes if known else 0)
                peak = peak - others + own
            self.runs.setdefault(case, []).append(Run(self.stage_clock.seconds, peak, result))

        return Variant(run, before=bring_about)


def reset_peak_memory(device: str) -> int | None:
    """Start counting anew; bytes allocated on CUDA now, else None."""
    if not on_cuda(device):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: str) -> int | None:
    """Bytes allocated on CUDA at most since the reset, else None."""
    return torch.cuda.max_memory_allocated(device) if on_cuda(device) else None


# --- what is said of it --------------------------------------------------------------------------------------


def record(case: EditCase, runs: Sequence[Run], seconds: dict, exact: Run, mask: np.ndarray, flops: dict) -> dict:
    """One case's figures. ratio: to the exact edit with a known reference and as many steps; psnr: to its picture."""
    yardstick = EditCase(KNOWN_REFERENCE, case.steps)
    totals = [sum(run.stages.values()) for run in runs]
    loop = median(run.stages["loop"] + run.stages[FEATURES] for run in runs)
    peaks = [run.peak for run in runs if run.peak is not None]
    return {
        **vars(case),
        "seconds": spread(seconds[case]),
        "ratio": spread(ratios(seconds, case, yardstick)),
        "loop": loop,
        "shares": {
            stage: median(run.stages[stage] / total for run, total in zip(runs, totals, strict=True))
            for stage in STAGE_NAMES
        },
        "peak": max(peaks) if peaks else None,
        "tflops": flops[case] / 1e12 / loop if case in flops else None,
        "steps_run": runs[-1].result.settings.steps,
        "psnr": masked_psnr(runs[-1].result.raw, exact.result.raw, mask > 0),
    }


def make_table(found: Sequence[dict], roof: float | None) -> str:
    header = ["edit", "steps", "seconds (min..max)", "of known reference", "features + loop, s"]
    header += [*(f"{stage}, %" for stage in STAGE_NAMES), "peak MiB", "TFLOP/s", "% of the roof", "dB to exact"]
    rows = []
    for one in found:
        rate, peak = one["tflops"], one["peak"]
        rows.append(
            [
                f"{one['state']}{'' if one['way'] == EXACT else ', ' + one['way']}",
                one["steps_run"],
                spread_text(one["seconds"]),
                spread_text(one["ratio"]),
                f"{one['loop']:.3f}",
                *(f"{100 * one['shares'][stage]:.1f}" for stage in STAGE_NAMES),
                "" if peak is None else f"{peak / MIB:.0f}",
                "" if rate is None else f"{rate:.2f}",
                "" if rate is None or roof is None else f"{100 * rate / roof:.1f}",
                f"{one['psnr']:.1f}",
            ]
        )
    return markdown_table(header, rows)


def count_loops(config: dict, size: int, dtype: torch.dtype, step_counts: Sequence[int]) -> dict[EditCase, int]:
    """Floating-point operations of features and loop, of the exact edits of real sizes."""
    states = {NEW_REFERENCE: FIRST_RUN, KNOWN_REFERENCE: KNOWN}
    wanted = {EditCase(state, steps): Case(states[state], steps) for state in states for steps in step_counts}
    flops = counted(config, size, dtype, list(wanted.values()))
    return {case: flops[one] for case, one in wanted.items()}


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = argument_parser("edit", __doc__, rounds=3)
    parser.add_argument("--steps", type=at_least_one, nargs="+", help="2; small: the model's own")
    parser.add_argument("--weights", metavar="MODEL", help="a model file or folder instead of random weights")
    parser.add_argument("--accelerate", nargs="+", choices=OPT_INS, default=[], metavar="NAME", help=", ".join(OPT_INS))
    parser.add_argument("--roof", type=float, metavar="TFLOPS", help="the device's peak, for the share reached")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    model = whole_model(chosen)
    defaults = model.config["defaults"]
    size, step_counts = chosen.size or defaults["size"], chosen.steps or ([defaults["steps"]] if chosen.small else [2])
    facts = started(chosen, size)
    facts["model"] = model.config["name"] + ("" if chosen.small or chosen.weights else ", random weights")

    ways = {EXACT: (FIRST_EDIT, NEW_REFERENCE, KNOWN_REFERENCE)}
    ways |= {name: (NEW_REFERENCE, KNOWN_REFERENCE) for name in chosen.accelerate}
    edits = EditRuns(model, size, chosen.device, CLOCKS[chosen.clock])
    cases = [EditCase(state, steps, way) for way in ways for steps in step_counts for state in ways[way]]
    variants = {case: edits.variant(case) for case in cases}
    for variant in variants.values():  # warm-up
        variant.before()
        variant.run()
    edits.runs.clear()
    seconds = time_rounds(variants, chosen.rounds, chosen.device, CLOCKS[chosen.clock])

    flops = {} if chosen.small else count_loops(model.config, size, DTYPES[chosen.dtype], step_counts)
    exact = {steps: edits.runs[EditCase(KNOWN_REFERENCE, steps)][-1] for steps in step_counts}
    found = [record(case, edits.runs[case], seconds, exact[case.steps], edits.mask, flops) for case in cases]
    deliver(chosen, facts, make_table(found, chosen.roof), edits=found, roof=chosen.roof)
    return 0


if __name__ == "__main__":
    sys.exit(main())
