"""`mimicbrush evaluate` and `selfcheck`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import MimicBrushError
from .models import SYSTEMS, add_model_options, device_and_dtype, load_any, load_mimicbrush, system_of
from .output import make_folder


def add_evaluate(commands) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a model of any system on its held-out cases")
    evaluate.add_argument("-o", "--output", required=True, help="folder for the table, the sheet and the figures")
    evaluate.add_argument("--system", choices=SYSTEMS, help="without --model: whose embedded model")
    evaluate.add_argument("--cases", type=int, default=200, help="cases per set (%(default)s)")
    evaluate.add_argument("--steps", type=int)
    evaluate.add_argument("--guidance", type=float)
    evaluate.add_argument("--hard", action="store_true", help="MimicBrush: pairs of any pose, light and background")
    add_model_options(evaluate)
    evaluate.set_defaults(run=_evaluate)


def add_selfcheck(commands) -> None:
    check = commands.add_parser("selfcheck", help="try a model on this machine; writes one report to share")
    check.add_argument("-o", "--output", default="mimicbrush-selfcheck", help="folder (%(default)s)")
    check.add_argument("--size", type=int, help="side of the pictures (default: the model's)")
    check.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    check.add_argument(
        "--random",
        nargs="?",
        const="sd15",
        choices=("sd15", "small"),
        help="random weights instead of files: of the real model's size (10 GB in fp32), or small",
    )
    add_model_options(check)
    check.set_defaults(run=_selfcheck)


def _evaluate(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..evaluation.reports import report_on, sets_of

    folder = Path(arguments.output)
    make_folder(folder)
    model, _ = load_any(arguments, system_of(arguments))
    with tqdm(total=len(sets_of(model.system)) * arguments.cases, unit="case") as bar:
        report = report_on(
            model,
            arguments.cases,
            arguments.steps,
            arguments.guidance,
            arguments.hard,
            on_case=lambda _: bar.update(),
        )
    (folder / "table.md").write_text(report.table)
    (folder / "figures.json").write_text(report.figures)
    report.sheet.save(folder / "sheet.png")
    print(report.table)


def _selfcheck(arguments: argparse.Namespace) -> None:
    from ..selfcheck import REPORT_NAME, check_model, model_files, random_model, write_report

    folder = Path(arguments.output)
    make_folder(folder)
    device, dtype = device_and_dtype(arguments)
    if arguments.random:
        files = {}
        make = lambda: random_model(f"mimicbrush_{arguments.random}", device, dtype)  # noqa: E731
    else:
        files = model_files(arguments.model, arguments.vae, arguments.depth)
        make = lambda: load_mimicbrush(arguments)  # noqa: E731
    report = check_model(
        make,
        files,
        device,
        size=arguments.size,
        steps=arguments.steps,
        on_stage=lambda stage: print(stage, flush=True),
    )
    write_report(report, folder / REPORT_NAME)
    for check in report.checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    print(f"The report to share: {folder / REPORT_NAME}")
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        raise MimicBrushError(f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}.")
