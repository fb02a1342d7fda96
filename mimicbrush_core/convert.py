"""Any layout of a model -> one `.safetensors` that loads without any other file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from . import __version__
from .checkpoints import (
    Source,
    converted,
    empty_part,
    fitting_state,
    header_metadata,
    open_model,
)
from .errors import ArgumentError, ModelFileError, OutputError
from .modules import parts_of
from .weight_files import (
    SafetensorsFile,
    SafetensorsWriter,
    check_integrity,
    file_size,
    is_finite,
    sha256_and_check,
)
from .whole_file import unfinished_path

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

HASHING, CONVERTING, CHECKING = "hashing", "converting", "checking"
OnProgress = Callable[[str, int, int], None]


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    vae: str | os.PathLike | None = None,
    depth: str | os.PathLike | None = None,
    precision: str = "fp16",
    config: dict | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write a model as one file; returns its path.

    source, vae, depth, config: as for `checkpoints.load_modules`.
    precision: a name of PRECISIONS. The depth network is stored in float32 whatever it says: it is computed in
        float32, and so a file in fp16 gives bit for bit what the original gives when it is loaded in fp16. It
        would save 0.2 of 4.5 GB. fp32 gives bit for bit what the original gives.
    on_progress: called with the stage (HASHING, CONVERTING, CHECKING), bytes done and bytes in all; an exception
        raised there, e.g. `Cancelled`, ends the conversion.

    Memory holds one weight at a time beside what the system keeps of the files. Ended in any way before the end,
    `output` is what it was before. Raises ModelFileError (the source), OutputError or ArgumentError (precision).
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"The precision {precision!r} is unknown. Use one of {', '.join(PRECISIONS)}.")
    report = on_progress or (lambda stage, done, total: None)
    output = Path(output)
    _check_output(output, overwrite)
    model = open_model(source, vae=vae, depth=depth, config=config)
    _check_not_source(output, model)
    parts = _empty_parts(model)
    layout = _layout(parts, PRECISIONS[precision])
    origin = _checked_origin(model, report)
    header = {
        **model.config,
        "precision": precision,
        "converter": f"mimicbrush {__version__}",
        "origin": origin,
    }
    with SafetensorsWriter(output, layout, header_metadata(header)) as writer:
        _write_tensors(model, parts, layout, writer, report)
        writer.finish(lambda written: _check_written(written, layout, report))
    return output


def _check_output(path: Path, overwrite: bool) -> None:
    if path.suffix.lower() != ".safetensors":
        raise OutputError(f"The output {path} should end in .safetensors: other programs go by the name.")
    if not path.parent.is_dir():
        raise OutputError(f"The output folder {path.parent} does not exist. Create it first.")
    if path.is_dir():
        raise OutputError(f"The output {path} is a folder. Choose another name.")
    if path.exists() and not overwrite:
        raise OutputError(f"The output {path} exists already. Choose another name, or allow it to be overwritten.")


def _check_not_source(output: Path, model: Source) -> None:
    for file in model.files.values():
        for written in (output, unfinished_path(output)):
            if written.exists() and written.samefile(file):
                raise OutputError(
                    f"{written} would be overwritten, but is what is to be converted. Choose another name."
                )


def _empty_parts(model: Source) -> dict[str, dict[str, torch.Tensor]]:
    """{part: the state dict it should have, without memory behind it}.

    Checks every key and shape of the source on the way, before anything is hashed or written.
    """
    parts = {}
    for part in parts_of(model.config):
        parts[part] = empty_part(part, model.config, model.file_of(part)).state_dict()
        fitting_state(part, model, parts[part])
    return parts


def _layout(parts: dict[str, dict], dtype: torch.dtype) -> dict[str, tuple]:
    """{name in the file: (dtype, shape)}, the float32 network first: readers need aligned tensors."""
    return {
        f"{part}.{name}": (torch.float32 if part == "depth_network" else dtype, tuple(value.shape))
        for part in sorted(parts, key=lambda part: part != "depth_network")
        for name, value in parts[part].items()
    }


def _checked_origin(model: Source, report: OnProgress) -> dict:
    """{role: name, bytes and SHA-256 of the file}, with the files' own checksums compared.

    A converted file that is converted again keeps where it came from.
    """
    total = sum(file_size(file) for file in model.files.values())
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        report(HASHING, done, total)

    origin = {}
    for role, file in model.files.items():
        digest = sha256_and_check(file, count)
        origin[role] = {"name": file.name, "bytes": file_size(file), "sha256": digest}
    if "origin" in model.config:
        origin["origin"] = model.config["origin"]
    return origin


def _write_tensors(
    model: Source,
    parts: dict,
    layout: dict,
    writer: SafetensorsWriter,
    report: OnProgress,
) -> None:
    part, state = "", {}
    for key, (dtype, _) in layout.items():
        if not key.startswith(part + "."):
            part, state = key.split(".", 1)[0], {}
            model.close()  # let go of the last part before the next is opened
            state = fitting_state(part, model, parts[part])
        name = key.removeprefix(part + ".")
        value = converted(part, name, state.pop(name), dtype, model.file_of(part))
        writer.write(key, value)
        report(CONVERTING, writer.written, writer.bytes)


def _check_written(path: Path, layout: dict[str, tuple], report: OnProgress) -> None:
    """Read the finished file back: header and size, checksum, every key, its type and shape, and all finite."""
    size = file_size(path)
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        report(CHECKING, min(done, size), size)

    try:
        check_integrity(path, count)
        file = SafetensorsFile(path)
        for part in dict.fromkeys(name.split(".", 1)[0] for name in layout):
            tensors = file.tensors(part + ".")  # part by part, to give back what was touched
            expected = {name: entry for name, entry in layout.items() if name.startswith(part + ".")}
            found = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
            if found != expected or not all(is_finite(value) for value in tensors.values()):
                raise ModelFileError(f"{path}: part {part!r} is not what was written.")
        report(CHECKING, size, size)
    except ModelFileError as error:
        raise OutputError(
            f"What was written does not read back as it should ({error}). The disk or the memory is failing; "
            "nothing was kept. Choose another disk."
        ) from error
