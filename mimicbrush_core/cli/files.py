"""`mimicbrush download`, `verify` and `convert`."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArgumentError, Cancelled, ModelFileError


def add_download(commands) -> None:
    download = commands.add_parser("download", help="fetch the released weights, from their authors")
    download.add_argument("--system", default="mimicbrush", choices=("mimicbrush", "magic-fixup"), help="(%(default)s)")
    download.add_argument("--into", help="folder for the files (default: MimicBrush or MagicFixup)")
    download.add_argument("--revision", help="branch, tag or commit (default: the lock file's)")
    download.add_argument("--file", action="append", default=[], help="only this file; repeatable")
    download.add_argument("--yes", action="store_true", help="do not ask before the download")
    download.add_argument(
        "--accept-licence",
        action="store_true",
        help="I have read the licence and accept it; needed for Magic Fixup: non-commercial research only",
    )
    download.set_defaults(run=_download)


def add_verify(commands) -> None:
    verify = commands.add_parser("verify", help="say what a weight file or folder is, and whether it can be used")
    verify.add_argument("path", help="a weight file, or a folder with weights")
    verify.add_argument("--deep", action="store_true", default=None, help="read every value (default: below 2 GB)")
    verify.add_argument("--hash", action="store_true", help="show SHA-256, and compare it with the lock file")
    verify.add_argument("--json", action="store_true", help="print the report for programs")
    verify.set_defaults(run=_verify)


def add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="turn original files into one .safetensors that loads by itself")
    convert.add_argument(
        "source",
        help="MimicBrush's folder or mimicbrush.bin; Paint by Example's diffusers folder or original checkpoint; "
        "or a single-file model",
    )
    convert.add_argument("-o", "--output", required=True, help="the .safetensors to write")
    convert.add_argument("--vae", help="VAE file or folder, where it is not in the source's folder")
    convert.add_argument("--depth", help="Depth Anything file or folder, where it is not in the source's folder")
    convert.add_argument("--precision", default="fp16", choices=("fp16", "bf16", "fp32"), help="(%(default)s)")
    convert.add_argument("--overwrite", action="store_true", help="replace existing output")
    convert.set_defaults(run=_convert)


def _download(arguments: argparse.Namespace) -> None:
    from ..hub import RELEASES, download, plan_download

    release = RELEASES[arguments.system]
    folder = arguments.into or release.repository.split("/")[1]
    chosen = {"names": arguments.file, "revision": arguments.revision, "release": release}
    try:
        with _transfer_bars() as show:
            plan = plan_download(folder, **chosen, on_progress=show)
        if plan.missing:
            print(f"{release.repository} at commit {plan.revision}:")
            for file in plan.missing:
                print(f"  {file.size / 1e6:10.1f} MB  {file.name}")
            print("These files have licences of their own: see docs/licences.md and the repository's page.")
            if release.terms and not arguments.accept_licence:
                raise ArgumentError(
                    f"{release.terms}. Add --accept-licence if you have read the licence and accept it."
                )
            if not arguments.yes:
                _ask(f"Fetch {plan.bytes_to_fetch / 1e9:.2f} GB into {plan.folder}?")
        with _transfer_bars() as show:
            download(plan, show, accepted=release.terms if arguments.accept_licence else "")
    except KeyboardInterrupt as error:
        raise Cancelled("interrupted. What arrived is kept: run the same command again to go on.") from error
    print(f"{plan.folder} is complete and verified. Use it with --model {plan.folder}")


def _verify(arguments: argparse.Namespace) -> None:
    from ..verify import describe, inspect

    report = inspect(arguments.path, deep=arguments.deep, hash=arguments.hash)
    print(report.to_json() if arguments.json else describe(report))
    if not report.usable:
        reason = report.problems[0] if report.problems else f"it is {report.title}. {' '.join(report.notes[:1])}"
        raise ModelFileError(f"{arguments.path} cannot be used here: {reason}")


def _convert(arguments: argparse.Namespace) -> None:
    from ..convert import convert
    from ..hub import Progress

    with _transfer_bars() as show:
        output = convert(
            arguments.source,
            arguments.output,
            vae=arguments.vae,
            depth=arguments.depth,
            precision=arguments.precision,
            overwrite=arguments.overwrite,
            on_progress=lambda *step: show(Progress(Path(arguments.output).name, *step)),
        )
    print(f"Wrote {output} ({output.stat().st_size / 1e9:.2f} GB), checked. It loads without any other file.")


@contextmanager
def _transfer_bars():
    """Gives a function that shows a transfer's progress: one bar per file and stage."""
    from tqdm import tqdm

    bars: dict[tuple[str, str], tqdm] = {}

    def show(progress) -> None:
        key = (progress.name, progress.stage)
        if key not in bars:
            description = f"{progress.name}: {progress.stage}"
            bars[key] = tqdm(total=progress.total, desc=description, unit="B", unit_scale=True, leave=False)
        bars[key].update(progress.done - bars[key].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _ask(question: str) -> None:
    """Raises Cancelled unless the user agrees; ArgumentError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ArgumentError("A download has to be agreed to, and there is no terminal to ask on. Add --yes.")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise Cancelled("not agreed to; nothing was written.")
