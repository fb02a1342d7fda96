"""What the benchmarks share: random weights without a second copy, and the facts of the machine."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

import diffusers
import torch
from torch import nn

from mimicbrush_core.modules import build_part, bundled_config

SEED = 20240611
NARROW_CHANNELS = (32, 64, 128, 128)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def model_config(small: bool) -> dict:
    """The real model's configuration, or the same topology with narrow U-Nets."""
    config = bundled_config("mimicbrush_sd15")
    if small:
        config["unet"] = {**config["unet"], "block_out_channels": NARROW_CHANNELS}
    return config


def random_part(name: str, config: dict, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """One network with random weights; every weight is allocated once, in its final place."""
    with torch.device("meta"):
        module = build_part(name, config)
    module = nn.Module.to(module, dtype).requires_grad_(False)  # diffusers' own `to` warns needlessly
    return module if torch.device(device).type == "meta" else _fill(module.to_empty(device=device))


@torch.no_grad()
def _fill(module: nn.Module) -> nn.Module:
    """Fixed random values, in place: unit gain in every layer, so that attention is not uniform."""
    torch.manual_seed(SEED)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            bound = math.sqrt(3 / math.prod(parameter.shape[1:]))
            parameter.uniform_(-bound, bound)
        elif name.endswith("bias"):
            parameter.uniform_(-0.1, 0.1)
        else:  # gains of norms and of residual branches
            parameter.fill_(1.0)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise NotImplementedError(f"{type(module).__name__} has a buffer {name!r} without known content.")
        buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return module


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
