"""Which model a command works with, and on which device.

Heavy imports stay inside the functions of this package, so that --help and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse

from ..errors import ArgumentError

DTYPES = ("auto", "fp32", "fp16", "bf16")
REPAINTING = ("mimicbrush", "paint-by-example")
SYSTEMS = (*REPAINTING, "magic-fixup", "smartbrush")
"""As `modules` names them, which is too slow to import for --help; the default first."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, where, and how exact."""
    parser.add_argument("--model", help="a .safetensors model, or the original's folder (default: the embedded model)")
    parser.add_argument("--vae", help="VAE file or folder, where it is not in the model's folder")
    parser.add_argument("--depth", help="Depth Anything file or folder, where it is not in the model's folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: fp16 on CUDA, else fp32")


def system_of(arguments: argparse.Namespace) -> str:
    """That of the model file; without one, the system asked for."""
    from ..checkpoints import open_model

    if not arguments.model:
        return arguments.system or SYSTEMS[0]
    files = {"vae": arguments.vae, "depth": arguments.depth}
    return open_model(arguments.model, **files, system=arguments.system).config["system"]


def load_mimicbrush(arguments: argparse.Namespace):
    """A MimicBrush; the embedded one where none is named."""
    return load_any(arguments, SYSTEMS[0])[0]


def load_any(arguments: argparse.Namespace, system: str):
    """(the model, the class of its settings)."""
    from ..editing import EditSettings
    from ..systems.magic_fixup import FixupSettings, MagicFixup
    from ..systems.mimicbrush import MimicBrush
    from ..systems.paint_by_example import ExemplarSettings, PaintByExample
    from ..systems.smartbrush import BrushSettings, SmartBrush

    kind, settings = {
        "mimicbrush": (MimicBrush, EditSettings),
        "paint-by-example": (PaintByExample, ExemplarSettings),
        "magic-fixup": (MagicFixup, FixupSettings),
        "smartbrush": (SmartBrush, BrushSettings),
    }[system]
    device, dtype = device_and_dtype(arguments)
    return kind.load(arguments.model, device=device, dtype=dtype, vae=arguments.vae, depth=arguments.depth), settings


def device_and_dtype(arguments: argparse.Namespace):
    """(device, torch dtype) of the options; raises ArgumentError for a device that is not there."""
    import torch

    device = _device(arguments.device)
    half = device.startswith("cuda")
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return device, names.get(arguments.dtype, torch.float16 if half else torch.float32)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ArgumentError(f"Unknown device {name!r}. Use auto, cpu, cuda, cuda:N or mps.") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False):
        raise ArgumentError(f"The device {name!r} is not available on this machine. Use cpu, or auto.")
    return name
