"""What the benchmarks share: random weights, fixed pictures, paired timing, the facts of the machine, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from mimicbrush_core import modules
from mimicbrush_core.systems.mimicbrush import MimicBrush

SEED = 20240611
NARROW_CHANNELS = (32, 64, 128, 128)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
MIB = 1 << 20


# --- models and pictures -------------------------------------------------------------------------------------


def model_config(small: bool) -> dict:
    """The real model's configuration, or the same topology with narrow U-Nets."""
    config = modules.bundled_config("mimicbrush_sd15")
    if small:
        config["unet"] = {**config["unet"], "block_out_channels": NARROW_CHANNELS}
    return config


def random_part(name: str, config: dict, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """One network with fixed random weights, biases among them; on "meta" without any."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(SEED)
    return modules.random_part(name, config, device, dtype, generator, bias=0.1)


def random_model(config: dict, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MimicBrush:
    """All seven networks; the depth network is float32, as it is in use."""
    dtypes = {"depth_network": torch.float32}
    parts = {name: random_part(name, config, device, dtypes.get(name, dtype)) for name in modules.PART_NAMES}
    return MimicBrush(modules.Modules(**parts), config)


def whole_model(chosen: argparse.Namespace) -> MimicBrush:
    """What the options ask for: the embedded model (`--small`), weights of one's own, or random ones of real sizes."""
    dtype = DTYPES[chosen.dtype]
    if chosen.small or chosen.weights:
        return MimicBrush.load(chosen.weights, device=chosen.device, dtype=dtype)
    return random_model(model_config(small=False), chosen.device, dtype)


def random_pictures(count: int, size: int) -> np.ndarray:
    """Fixed pictures uint8 [count,size,size,3]."""
    return np.random.default_rng(SEED).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def square_mask(size: int, shift: int = 0) -> np.ndarray:
    """Float [size,size]: a sixteenth of the picture, a quarter from its corner, `shift` pixels further right."""
    mask = np.zeros((size, size), np.float32)
    mask[size // 4 : size // 2, size // 4 + shift : size // 2 + shift] = 1
    return mask


# --- paired timing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """run: what is timed; before: what has to be so first, not timed. steps: how many it runs; times are of one."""

    run: Callable[[], Any]
    before: Callable[[], None] = lambda: None
    steps: int = 1


def time_rounds(
    variants: dict[Hashable, Variant], rounds: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[Hashable, list[float]]:
    """Seconds of each variant's step in each round; every other round in reverse order."""
    seconds: dict[Hashable, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        names = list(variants) if index % 2 == 0 else list(reversed(variants))
        for name in names:
            variants[name].before()
            synchronize(device)
            start = clock()
            variants[name].run()
            synchronize(device)
            seconds[name].append((clock() - start) / variants[name].steps)
        print(f"round {index + 1} of {rounds} done", file=sys.stderr, flush=True)
    return seconds


def on_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str) -> None:
    if on_cuda(device):
        torch.cuda.synchronize(device)


def ratios(seconds: dict[Hashable, list[float]], name: Hashable, yardstick: Hashable) -> list[float]:
    """Time of a variant over that of a yardstick, within each round."""
    return [mine / other for mine, other in zip(seconds[name], seconds[yardstick], strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def spread_text(values: dict[str, float]) -> str:
    """One table cell of a `spread`."""
    return f"{values['median']:.3f} ({values['min']:.3f}..{values['max']:.3f})"


# --- what is said of it --------------------------------------------------------------------------------------


def machine_facts(device: str, dtype: str, threads: int, size: int) -> dict:
    """What has to be said beside any number measured here."""
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "size": size,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    if on_cuda(device):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def print_facts(facts: dict) -> None:
    for key, value in facts.items():
        if value is not None:
            print(f"{key:10} {value if not isinstance(value, list) else ' '.join(f'{v:.2f}' for v in value)}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column to the left, the others to the right, padded so that it reads well in a terminal, too."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)) + " |"
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    rule = "| " + " | ".join("-" * (width - bool(i)) + ":" * bool(i) for i, width in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def deliver(chosen: argparse.Namespace, facts: dict, table: str, **data) -> None:
    """Print the table; write everything to the file of `--json`."""
    print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps({"facts": facts, "table": table, **data}, indent=2) + "\n")


# --- the options all have ------------------------------------------------------------------------------------


def argument_parser(name: str, description: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options all have. rounds: the default of those that time variants in rounds."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, help="picture side in pixels, a multiple of 64")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="CPU threads")
    if rounds is not None:
        parser.add_argument("--rounds", type=at_least_one, default=rounds)
        parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: CPU seconds, for a busy machine")
    parser.add_argument("--small", action="store_true", help="small networks: does it run, says nothing on speed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    return parser


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def started(chosen: argparse.Namespace, size: int) -> dict:
    """Set the threads; print and return the facts."""
    torch.set_num_threads(chosen.threads)
    facts = machine_facts(chosen.device, chosen.dtype, chosen.threads, size)
    if "clock" in chosen:
        facts["clock"] = chosen.clock
    print_facts(facts)
    return facts
