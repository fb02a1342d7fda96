"""What importing costs: the core and the pack's nodes, beside torch and the libraries' classes alone.

    python -m benchmarks.imports

Each import runs in an interpreter of its own, in alternating order; the pack against the tests' stand-in of its host,
which has imported torch, as ComfyUI has. The packages it brings that the libraries alone do not are named.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import (
    MIB,
    at_least_one,
    deliver,
    machine_facts,
    markdown_table,
    print_facts,
    ratios,
    spread,
    spread_text,
)

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES, CORE, PACK = "torch, diffusers, transformers", "core", "pack"
BODIES = {
    "torch": "import torch",
    LIBRARIES: (
        "import torch\n"
        "from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel\n"
        "from transformers import CLIPVisionModelWithProjection, DepthAnythingForDepthEstimation"
    ),
    CORE: "import mimicbrush_core.systems.mimicbrush",
    PACK: (
        f"sys.path.insert(0, {str(ROOT / 'tests' / 'nodes')!r})\n"
        "from pathlib import Path\n"
        "from host_double import ROOT, Host, installed, loaded_pack\n"
        "with installed(Host(Path('models'))), loaded_pack(ROOT): pass"
    ),
}
"""What is imported, as Python; the libraries' classes are those the core builds its networks of."""

HEAVY = ("accelerate", "av", "cv2", "matplotlib", "peft", "scipy", "tensorboard", "torchvision")
"""Nothing of the pack may need these to be imported."""

IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")
"""`-X importtime`: microseconds of the module itself, of what it imports with it, its name."""


def imported(name: str) -> dict:
    """One import in a fresh interpreter: seconds, peak bytes of the process, top-level packages."""
    script = (
        f"import sys, time\nstart = time.perf_counter()\n{BODIES[name]}\nseconds = time.perf_counter() - start\n"
        "import json, resource\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)\n"
        "packages = sorted({module.split('.')[0] for module in sys.modules})\n"
        "print(json.dumps({'seconds': seconds, 'peak': peak, 'packages': packages}))"
    )
    return json.loads(_python("-c", script).stdout.splitlines()[-1])


def seconds_by_package(name: str) -> dict[str, float]:
    """Each top-level package's own share of an import, without what it imports of others; the costliest first."""
    return sums_by_package(_python("-X", "importtime", "-c", f"import sys\n{BODIES[name]}").stderr)


def sums_by_package(report: str) -> dict[str, float]:
    """The same from the report of `-X importtime`."""
    seconds: Counter = Counter()
    for microseconds, module in IMPORT_LINE.findall(report):
        seconds[module.split(".")[0]] += int(microseconds) / 1e6
    return dict(seconds.most_common())


def _python(*arguments: str) -> subprocess.CompletedProcess:
    """Raises RuntimeError with what Python said, if it fails."""
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result


def added(packages: Sequence[str], beside: Sequence[str]) -> list[str]:
    """Packages, without Python's own, that are among the first but not among the second."""
    return sorted(set(packages) - set(beside) - sys.stdlib_module_names)


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.imports", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if the core or the pack brings something heavy."""
    chosen = parse_arguments(arguments)
    facts = machine_facts("cpu", "float32", 1, 0)
    facts = {key: facts[key] for key in ("date", "cpu", "torch", "diffusers", "load")}
    print_facts(facts)

    runs: dict[str, list[dict]] = {name: [] for name in BODIES}
    for index in range(chosen.rounds + 1):
        for name in BODIES if index % 2 == 0 else reversed(BODIES):
            runs[name].append(imported(name))
    runs = {name: found[1:] for name, found in runs.items()}  # the first fills the disk's cache
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    packages = {name: found[0]["packages"] for name, found in runs.items()}
    brought = {name: added(packages[name], packages[LIBRARIES]) for name in (CORE, PACK)}

    rows = [
        [
            name,
            spread_text(spread(seconds[name])),
            spread_text(spread(ratios(seconds, name, LIBRARIES))),
            f"{max(run['peak'] for run in found) / MIB:.0f}",
            ", ".join(brought.get(name, ())),
        ]
        for name, found in runs.items()
    ]
    table = markdown_table(["import", "seconds (min..max)", f"of {LIBRARIES}", "peak MiB", "brings"], rows)
    costly = list(seconds_by_package(PACK).items())[:8]
    table += "\n\n" + markdown_table(["the pack's import, by package", "own s"], [[n, f"{s:.3f}"] for n, s in costly])
    deliver(chosen, facts, table, seconds=seconds, brought=brought, costly=dict(costly))
    return 1 if set(HEAVY) & {name for names in brought.values() for name in names} else 0


if __name__ == "__main__":
    sys.exit(main())
