"""Run the benchmarks, one after the other, each in a process of its own; print their tables, draw the plots.

    python -m benchmarks FOLDER                  sized for a laptop's CPU, about ten minutes
    python -m benchmarks FOLDER --full           the sizes the goals are set for; hours on two cores, 11 GB
    python -m benchmarks FOLDER --gpu            for a CUDA card: half precision, 50 and 20 steps, eager and compiled
    python -m benchmarks FOLDER --only step_256 cost
    python -m benchmarks FOLDER --only --write-docs     nothing anew: docs/performance.md from the folder's results

FOLDER gets one JSON file for each benchmark, with all numbers, and the plots.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common import CLOCKS
from benchmarks.plots import draw_all

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PICTURES = PAGE.parent / "performance"

COMMON = {
    "imports": "imports",
    "memory_counted": "memory --count",
    "systems": "systems",
    "edit_small": "edit --small --steps 20 --accelerate guidance_to_0.8 reference_every_2 deep_every_2 dpmpp_2m_20 "
    "channels_last",
}
QUICK = {
    **COMMON,
    "batch_small": "batch --small",
    "step_256": "step --size 256 --rounds 3",
    "cost": "cost --size 256 --at-most 2 --rounds 2",
    "edit": "edit --size 256 --rounds 2",
    "solvers": "solvers --spacings trailing --steps 1 2 4 8 15 30 50",
    "profile": "profile",
}
FULL = {
    **COMMON,
    "batch_small": "batch --small --rounds 5",
    "step_256": "step --size 256",
    "step_512": "step",
    "step_768": "step --size 768 --rounds 3",
    "step_1024": "step --size 1024 --rounds 3",
    "cost": "cost --at-most 10",
    "edit": "edit --steps 4 --accelerate channels_last guidance_to_0.8 reference_every_2 deep_every_2",
    "batch": "batch --size 256 --counts 1 2 4",
    "memory": "memory",
    "solvers": "solvers",
    "profile": "profile --size 512",
}
GPU = {
    f"gpu_{name}": f"{command} --device cuda --dtype float16"
    for name, command in {
        "step_512": "step --accelerate compiled channels_last --rounds 10",
        "step_1024": "step --size 1024 --rounds 5",
        "cost": "cost --at-most 60",
        "edit": "edit --steps 50 20 --rounds 5 --roof 989 --accelerate compiled channels_last guidance_to_0.8 "
        "reference_every_2 deep_every_2",
        "batch": "batch --steps 20 --counts 1 4 8 16",
        "memory_512": "memory --size 512 --steps 50",
        "memory_768": "memory --size 768 --steps 50",
        "memory_1024": "memory --size 1024 --steps 50",
        "profile": "profile --size 512",
    }.items()
}
"""Name of the result -> its command. The roof is an H200's."""


def run(name: str, command: str, folder: Path) -> bool:
    """One benchmark, its result in FOLDER/name.json; whether it succeeded."""
    module, *arguments = command.split()
    print(f"\n## {name}: python -m benchmarks.{command}", flush=True)
    line = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json", str(folder / f"{name}.json")]
    return subprocess.run(line, cwd=ROOT).returncode == 0


def read_results(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def filled_page(page: str, results: Mapping[str, dict]) -> str:
    """The page with each result's table between its markers, `<!-- NAME -->` and `<!-- end NAME -->`.

    What has no result is left as it is. Raises ValueError for a result the page has no place for.
    """
    for name, data in results.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"docs/performance.md has no markers for {name!r}.")
        text = f"{data['table']}\n\n{facts_line(data['facts'])}\n"
        page = pattern.sub(lambda match, text=text: match[1] + text + match[2], page)
    return page


def facts_line(facts: Mapping[str, object]) -> str:
    """Machine and date in one line; the load as its first figure."""
    told = {key: value[0] if isinstance(value, list) else value for key, value in facts.items() if value is not None}
    return "*" + "; ".join(f"{key} {value}" for key, value in told.items()) + "*"


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where results and plots go")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="tasks", action="store_const", const=QUICK, default=QUICK)
    sizes.add_argument("--full", dest="tasks", action="store_const", const=FULL)
    sizes.add_argument("--gpu", dest="tasks", action="store_const", const=GPU)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these alone, or none")
    parser.add_argument("--clock", choices=CLOCKS, help="process: CPU seconds, for a busy machine")
    parser.add_argument("--write-docs", action="store_true", help="bring docs/performance.md up to date")
    chosen = parser.parse_args(arguments)
    names = list(chosen.tasks) if chosen.only is None else chosen.only
    unknown = set(names) - set(chosen.tasks)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(chosen.tasks)}")

    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    timed = ("step", "cost", "edit", "batch")
    failed = []
    for name in names:
        command = chosen.tasks[name]
        if chosen.clock and command.split()[0] in timed:
            command += f" --clock {chosen.clock}"
        if not run(name, command, folder):
            failed.append(name)

    results = read_results(folder)
    for pictures in [folder, *([PICTURES] if chosen.write_docs else [])]:
        for prefix in ("", "gpu_"):
            for path in draw_all(results, pictures, prefix):
                print(path)
    if chosen.write_docs:
        PAGE.write_text(filled_page(PAGE.read_text(), results))
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
