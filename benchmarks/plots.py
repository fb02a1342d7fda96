"""The plots of docs/performance.md, from the results of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cost import STATES, per_picture
from benchmarks.edit import EXACT, STAGE_NAMES
from benchmarks.step import FIRST_RUN, KNOWN, ORIGINAL, PLAIN

COLORS = {ORIGINAL: "tab:gray", FIRST_RUN: "tab:orange", KNOWN: "tab:blue", PLAIN: "black"}
Results = Mapping[str, dict]
"""Task name -> what it wrote as JSON."""


def draw_all(results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """Every plot whose tasks are there, as PNG; prefix: of the tasks' names, and of the files'."""
    mine = {name.removeprefix(prefix): data for name, data in results.items() if name.startswith(prefix)}
    steps = [data for name, data in mine.items() if name.startswith("step")]
    figures = {}
    if "cost" in mine:
        figures["size"] = size_figure(mine["cost"]["sizes"], steps)
        figures["cost"] = cost_figure(mine["cost"]["points"])
    if "solvers" in mine:
        figures["solvers"] = solvers_figure(mine["solvers"]["points"], mine["solvers"]["scale"])
    edits = {title: mine[name]["edits"] for name, title in EDIT_TITLES.items() if name in mine}
    if edits:
        figures["edit"] = edit_figure(edits)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{prefix}{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


EDIT_TITLES = {"edit": "SD-1.5 sizes", "edit_small": "embedded model"}


def size_figure(counted: Sequence[dict], steps: Sequence[dict]) -> Figure:
    """One step against size, as a share of the original's: counted lines, measured points."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    sizes = [one["size"] for one in counted]
    for name in (FIRST_RUN, KNOWN, PLAIN):
        floor = [one[name] / one[ORIGINAL] for one in counted]
        axes.plot(sizes, floor, "--", color=COLORS[name], label=f"{name}, counted")
        ratio = f"{name} / {ORIGINAL}"
        points = [(one["facts"]["size"], one["ratios"][ratio]) for one in steps if ratio in one["ratios"]]
        _measured(axes, points, COLORS[name], f"{name}, measured")
    axes.axhline(1, color=COLORS[ORIGINAL], linewidth=1)
    _label(axes, "one step against size", "pixels a side", f"of the original's step ({ORIGINAL} = 1)")
    axes.set_xticks(sizes)
    return figure


def cost_figure(points: Sequence[dict]) -> Figure:
    """A loop against steps, references and batch, in plain steps: counted lines, measured points."""
    names = dict.fromkeys(point["series"] for point in points)
    figure, panels = plt.subplots(1, len(names), figsize=(13, 4), layout="constrained")
    for axes, series in zip(panels, names, strict=True):
        values = list(dict.fromkeys(point["value"] for point in points if point["series"] == series))
        axes.plot(values, values if series == "steps" else [1] * len(values), color=COLORS[PLAIN], label=PLAIN)
        for state in STATES:
            mine = [point for point in points if (point["series"], point["state"]) == (series, state)]
            each = [per_picture(point) for point in mine]
            axes.plot(values, [one["counted"] for one in each], "--", color=COLORS[state], label=f"{state}, counted")
            measured = [(p["value"], one["measured"]) for p, one in zip(mine, each, strict=True) if one["measured"]]
            _measured(axes, measured, COLORS[state], f"{state}, measured")
        unit = "plain steps a picture" if series == "batch" else "plain steps"
        _label(axes, f"cost against {series}", series, unit)
        axes.set_xticks(values)
        if series == "steps":
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(values, [str(value) for value in values], minor=False)
        else:
            axes.set_ylim(bottom=0)
    return figure


def solvers_figure(points: Sequence[dict], scale: Mapping[str, float]) -> Figure:
    """Distance to 50 steps of DDIM against steps: a panel for each spacing, a line for each solver."""
    spacings = list(dict.fromkeys(point["spacing"] for point in points))
    figure, panels = plt.subplots(
        1, len(spacings), figsize=(1.5 + 3.4 * len(spacings), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, spacing in zip(panels[0], spacings, strict=True):
        for index, solver in enumerate(dict.fromkeys(point["solver"] for point in points)):
            mine = [point for point in points if (point["solver"], point["spacing"]) == (solver, spacing)]
            steps = [point["steps"] for point in mine]
            distances = [point["distance"]["median"] for point in mine]
            axes.plot(steps, distances, "o-", markersize=3, linewidth=4 - index, label=solver)  # some lie on others
        for (name, distance), style in zip(scale.items(), (":", "--"), strict=True):
            axes.axhline(distance, color="black", linewidth=1, linestyle=style, label=name)
        axes.set(xscale="log", yscale="log")
        ticks = sorted({point["steps"] for point in points} & {1, 2, 4, 8, 15, 30, 50})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        _label(axes, spacing, "steps", "distance to DDIM with 50 steps")
    return figure


def edit_figure(edits: Mapping[str, Sequence[dict]]) -> Figure:
    """The stages' shares of exact edits, a bar for each kind of edit."""
    bars = [
        (f"{title}: {one['state']}, {one['steps']} step{'s' * (one['steps'] > 1)}", one["shares"])
        for title, found in edits.items()
        for one in found
        if one["way"] == EXACT
    ]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    for stage in STAGE_NAMES:
        widths = [100 * shares[stage] for _, shares in bars]
        axes.barh([name for name, _ in bars], widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="% of the edit's time", xlim=(0, 100))
    axes.legend(ncols=len(STAGE_NAMES), loc="lower center", bbox_to_anchor=(0.3, 1), fontsize=8, frameon=False)
    return figure


def _measured(axes: Axes, points: Sequence[tuple[float, dict]], color: str, label: str) -> None:
    """Medians with their spread, at each value."""
    if not points:
        return
    medians = [one["median"] for _, one in points]
    spans = [[one["median"] - one["min"] for _, one in points], [one["max"] - one["median"] for _, one in points]]
    axes.errorbar([x for x, _ in points], medians, spans, fmt="o", color=color, markersize=5, capsize=3, label=label)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
