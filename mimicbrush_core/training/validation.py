"""Judging a model in training: its answers to fixed held-out cases with the right, a wrong and no reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..evaluation.evaluate import KINDS, Results, add_judged, started
from ..evaluation.report import sheet, summary
from ..evaluation.track import Case
from ..repaint import Repainter
from .samples import TrainingSample
from .trainer import Validation


def judge(
    model: Repainter, cases: Iterable[Case], steps: int | None = None, guidance: float | None = None, at_once: int = 8
) -> Validation:
    """Masked PSNR in dB by set, and a sheet of the first cases; steps, guidance: None = the model's defaults."""
    results = started(model, steps, guidance)
    add_judged(model, cases, results, at_once)
    return Validation(_figures(results), sheet(results))


def _figures(results: Results) -> dict[str, float]:
    figures = {}
    for name, numbers in summary(results).items():
        figures |= {f"{name}: {kind}": numbers["psnr"][kind] for kind in KINDS}
        for other in ("none", "wrong"):
            figures[f"{name}: right - {other}"] = numbers[f"psnr_right_minus_{other}"]["mean"]
    return figures


def cases_of(samples: Sequence[TrainingSample]) -> list[Case]:
    """Samples as cases: each one's wrong reference is the next one's reference, the truth is the source itself."""
    cases = []
    for index, sample in enumerate(samples):
        wrong = samples[(index + 1) % len(samples)].reference
        case = Case(
            set_name="held out",
            index=index,
            scene_seed=sample.index,
            source=sample.source,
            mask=sample.mask,
            reference=sample.reference,
            wrong_reference=wrong,
            truth=sample.source,
        )
        cases.append(case if len(samples) > 1 else replace(case, wrong_reference=255 - sample.reference))
    return cases
