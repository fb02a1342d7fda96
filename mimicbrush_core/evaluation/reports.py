"""The held-out evaluation of a model of any system, as one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from ..modules import MAGIC_FIXUP, MIMICBRUSH, PAINT_BY_EXAMPLE, SMARTBRUSH
from ..repaint import Repainter
from ..training.scenes import CLIP_LIKE, FULL_DIFFICULTY
from .evaluate import evaluate, evaluate_exemplars
from .fixups import evaluate_fixups, fixup_json, fixup_sheet, fixup_table
from .report import card_table, sheet, to_json
from .smartbrush import brush_json, brush_sheet, brush_table, evaluate_brush
from .track import SETS


@dataclass(frozen=True)
class Report:
    """table: Markdown, with a line on how it was made. figures: of every case, JSON. sheet: cases drawn by lot."""

    table: str
    figures: str
    sheet: Image.Image


def report_on(
    model: Repainter,
    cases: int,
    steps: int | None = None,
    guidance: float | None = None,
    hard: bool = False,
    on_case: Callable[[object], None] | None = None,
) -> Report:
    """Answer and judge the first `cases` (1..200) of each of the system's sets.

    steps, guidance: None = the model's defaults; Magic Fixup knows no guidance. hard: MimicBrush's pairs differ in
    anything. on_case: called after each case; may raise to cancel.
    """
    if model.system == MAGIC_FIXUP:
        found = evaluate_fixups(model, cases, steps, on_case=on_case)
        return Report(fixup_table(found), fixup_json(found), fixup_sheet(found))
    if model.system == SMARTBRUSH:
        found = evaluate_brush(model, cases, steps, guidance, on_case=on_case)
        return Report(brush_table(found), brush_json(found), brush_sheet(found))
    if model.system == PAINT_BY_EXAMPLE:
        found = evaluate_exemplars(model, cases, steps, guidance, on_case=on_case)
    else:
        difficulty = FULL_DIFFICULTY if hard else CLIP_LIKE
        found = evaluate(model, SETS, cases, steps, guidance, on_case=on_case, difficulty=difficulty)
    return Report(card_table(found), to_json(found), sheet(found))


def sets_of(system: str) -> Sequence[str]:
    """The names of the sets that a system is judged on."""
    return SETS if system == MIMICBRUSH else (system,)
