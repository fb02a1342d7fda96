"""What the benchmarks share: fixed random weights, and the facts of the machine."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import diffusers
import torch
from torch import nn

from mimicbrush_core import modules

SEED = 20240611
NARROW_CHANNELS = (32, 64, 128, 128)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def machine_facts(device: str, dtype: str, threads: int, size: int) -> dict:
    """What has to be said beside any number measured here."""
    facts = {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "size": size,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    if torch.device(device).type == "cuda":
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
