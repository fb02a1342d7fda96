"""An evaluation as a table for the model card, as a sheet of unpicked pictures, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from PIL import Image

from ..errors import ArgumentError
from ..sheets import contact_sheet, show_mask
from .evaluate import KINDS, Outcome, Results
from .metrics import bootstrap_interval, interval_text
from .track import scene_seed

TILE = 128
"""Side of a sheet's pictures in pixels."""

COLUMNS = ("masked source", "reference", "result", "truth", "wrong reference", "no reference")
"""A sheet's columns; the last two are the results with another case's reference and with none."""


# --- numbers -----------------------------------------------------------------------------------------------


def summary(results: Results) -> dict[str, dict]:
    """Per set: n, the mean PSNR and SSIM of each kind, and right minus none and right minus wrong.

    A difference is {"mean", "low", "high", "won"}: low and high bound the mean with 95 %, won is the share of
    cases in which the right reference gave the larger number.
    """
    return {name: _set_summary(results, name) for name in results.scores}


def card_table(results: Results) -> str:
    """The results as a Markdown table, one row per set, with a line on how they were made."""
    head = (
        "set",
        "cases",
        "right",
        "wrong",
        "none",
        "autoencoder's bound",
        "right - none",
        "right - wrong",
        "right beats none",
        "right beats wrong",
        "SSIM, right - none",
    )
    rows = [_card_row(name, numbers) for name, numbers in summary(results).items()]
    table = markdown_table(head, rows)
    side = results.size
    return (
        f"{results.model}, {results.steps} steps, guidance {results.guidance:g}, {results.scheduler}, "
        f"{side} x {side} pixels: masked PSNR in dB on held-out cases, one seed per case, before pasting; "
        f"differences with 95 % intervals over cases.\n\n{table}\n"
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_json(results: Results) -> str:
    """Settings, summary and the scores of every case as JSON text."""
    cases = {
        name: [
            {"index": index, "scene_seed": scene_seed(name, index)} | {kind: asdict(one[kind]) for kind in KINDS}
            for index, one in enumerate(scores)
        ]
        for name, scores in results.scores.items()
    }
    settings = {key: getattr(results, key) for key in ("model", "size", "steps", "guidance", "scheduler")}
    return json.dumps({"settings": settings, "summary": summary(results), "cases": cases}, indent=1)


def _set_summary(results: Results, name: str) -> dict:
    metrics = ("psnr", "ssim")
    means = {metric: {kind: float(results.values(name, kind, metric).mean()) for kind in KINDS} for metric in metrics}
    differences = {
        f"{metric}_right_minus_{kind}": _difference(results.differences(name, kind, metric))
        for metric in metrics
        for kind in ("none", "wrong")
    }
    return {"n": len(results.scores[name]), **means, **differences}


def _difference(values: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high, "won": float((values > 0).mean())}


def _card_row(name: str, numbers: dict) -> tuple[str, ...]:
    none, wrong = numbers["psnr_right_minus_none"], numbers["psnr_right_minus_wrong"]
    return (
        name,
        str(numbers["n"]),
        *(f"{numbers['psnr'][kind]:.2f}" for kind in KINDS),
        _with_interval(none, "+.2f"),
        _with_interval(wrong, "+.2f"),
        f"{none['won']:.0%}",
        f"{wrong['won']:.0%}",
        _with_interval(numbers["ssim_right_minus_none"], "+.3f"),
    )


def _with_interval(difference: dict[str, float], form: str) -> str:
    return interval_text(difference["mean"], difference["low"], difference["high"], form)


# --- pictures ----------------------------------------------------------------------------------------------


def sheet(results: Results) -> Image.Image:
    """The pictured cases of each set, whatever they look like: one row per case, `COLUMNS` across, RGB.

    Results are shown unpasted.
    """
    shown = [outcome for outcomes in results.pictured.values() for outcome in outcomes]
    if not shown:
        raise ArgumentError("These results hold no case, so there is nothing to show.")
    titles = [f"{outcome.case.set_name}, case {outcome.case.index}" for outcome in shown]
    return contact_sheet([_row(outcome) for outcome in shown], COLUMNS, TILE, titles)


def _row(outcome: Outcome) -> tuple[np.ndarray, ...]:
    """In the order of `COLUMNS`, uint8 [S,S,3] each."""
    case, given = outcome.case, outcome.pictures
    holed = show_mask(case.source, case.mask, strength=1.0)
    return holed, case.reference, given["right"], case.truth, given["wrong"], given["none"]
