"""What a weight file or folder is, by content; what is missing, what is wrong, and whether it can be used here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoints
from .checkpoints import DEPTH_FILES, METADATA_KEY, ORIGINAL_FILES, ORIGINAL_PART_NAMES, VAE_FILES
from .errors import ModelFileError
from .modules import MIMICBRUSH, parts_of
from .recognition import (
    CHECKPOINT,
    DEPTH,
    EXEMPLAR_FOLDER,
    MODEL,
    NOTHING,
    RELEASE,
    SINGLE_FILE,
    SINGLE_FILES,
    UNKNOWN_LICENCE,
    VAE,
    Kind,
    recognise,
)
from .weight_files import (
    SafetensorsFile,
    check_integrity,
    count_not_finite,
    file_format,
    file_sha256,
    file_size,
    is_finite,
    is_folder,
    read_metadata,
)

DEEP_BELOW_BYTES = 2_000_000_000
NAMED_KEYS = 20
"""Missing or damaged keys that are named one by one."""

LOCK_NAME = "mimicbrush.lock.json"

UNREADABLE = Kind("unreadable", "not readable as weights", NOTHING, UNKNOWN_LICENCE)
PIPELINE = Kind(
    "pipeline-folder",
    "Stable Diffusion, diffusers folder",
    NOTHING,
    "see its page; Stable Diffusion 1.x is under CreativeML OpenRAIL-M",
    "MimicBrush does not need it, but its VAE can be used: give its vae folder (--vae).",
)
NO_WEIGHTS = Kind("no-weights", "a folder without weights that could be recognised", NOTHING, UNKNOWN_LICENCE)


@dataclass(frozen=True)
class PartReport:
    """One network inside a file. precisions: {dtype: number of values}."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    precisions: dict[str, int]


@dataclass(frozen=True)
class FileReport:
    """What `inspect` found.

    kind, title: what it is, for programs and for people. use: "model", "vae", "depth" or "nothing".
    usable: it can be given to this program as that. format: safetensors, zip pickle, old pickle or folder.
    missing: keys or files. problems: everything that makes it unusable. notes: what else to know.
    sha256: {file: digits} where asked for. deep: every value was looked at. files: reports of a folder's files.
    """

    path: str
    kind: str
    title: str
    use: str
    usable: bool
    format: str
    bytes: int
    licence: str
    parts: tuple[PartReport, ...] = ()
    missing: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)
    deep: bool = False
    files: tuple[FileReport, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts) + sum(file.parameters for file in self.files)

    @property
    def precisions(self) -> dict[str, int]:
        """{dtype: number of values} over all parts and files."""
        total: dict[str, int] = {}
        for one in (*self.parts, *self.files):
            for name, count in one.precisions.items():
                total[name] = total.get(name, 0) + count
        return total

    def to_json(self) -> str:
        totals = {"parameters": self.parameters, "precisions": self.precisions}
        return json.dumps({**asdict(self), **totals}, indent=2, ensure_ascii=False)


def inspect(
    path: str | os.PathLike, *, deep: bool | None = None, hash: bool = False, config: dict | None = None
) -> FileReport:
    """Look at a weight file or a folder; raises nothing for what is wrong with it, the report says so.

    deep: read every value and compare stored checksums (default: for files below DEEP_BELOW_BYTES).
    hash: the SHA-256 of every weight file, compared with the lock file of `mimicbrush download` where there is one.
    config: for original files of other sizes than SD-1.5's.
    """
    inspection = _Inspection(deep, hash, config)
    try:
        folder = is_folder(path)
    except ModelFileError as error:
        return _unreadable(Path(path), error)
    return inspection.folder(Path(path)) if folder else inspection.file(Path(path))


def describe(report: FileReport) -> str:
    """The report as a table for people."""
    lines = [report.path, ""]
    for label, value in _rows(report):
        lines.append(f"  {label:<11} {value}")
    table = [
        (
            part.name,
            f"{part.parameters / 1e6:.1f} M",
            _precision(part.precisions),
            f"{part.bytes / 1e6:.1f} MB",
        )
        for part in report.parts
    ]
    if len(table) > 1:
        lines += ["", *_aligned([("part", "parameters", "precision", "size"), *table])]
    for file in report.files:
        lines += ["", *("  " + line for line in describe(file).splitlines())]
    return "\n".join(lines)


def _rows(report: FileReport) -> Iterator[tuple[str, str]]:
    yield "what", report.title
    yield "usable", f"yes, as {report.use}" if report.usable else "no"
    yield "format", report.format
    yield "size", f"{report.bytes / 1e6:,.1f} MB"
    if report.parameters:
        yield "parameters", f"{report.parameters / 1e6:,.1f} M, {_precision(report.precisions)}"
        yield "values", "every one was looked at" if report.deep else "not looked at (--deep does)"
    yield "licence", report.licence
    for name in report.missing:
        yield "missing", name
    for problem in report.problems:
        yield "wrong", problem
    for note in report.notes:
        yield "note", note
    for name, digits in report.sha256.items():
        yield "sha256", f"{digits}  {name}"


def _precision(counts: Mapping[str, int]) -> str:
    return " + ".join(sorted(counts, key=counts.get, reverse=True)) or "-"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _unreadable(path: Path, error: ModelFileError, format: str = "-", size: int = 0) -> FileReport:
    kind = UNREADABLE
    return FileReport(
        str(path), kind.name, kind.title, kind.use, False, format, size, kind.licence, problems=(str(error),)
    )


class _Inspection:
    """One call of `inspect` with its settings."""

    def __init__(self, deep: bool | None, hash: bool, config: dict | None):
        self._deep, self._hash, self._config = deep, hash, config

    # --- files ---------------------------------------------------------------------------------------------

    def file(self, path: Path, folder: Path | None = None) -> FileReport:
        """folder: where the file was found, if a folder was asked for; its config.json counts then."""
        size, format = 0, "-"
        try:
            size = file_size(path)
            format = file_format(path)
            content, metadata = checkpoints.read_content(path), read_metadata(path)
        except ModelFileError as error:
            return _unreadable(path, error, format, size)
        kind = _single_file(metadata) if METADATA_KEY in metadata else recognise(content)
        missing, problems = self._fit(kind, path, folder or path, content)
        deep = size < DEEP_BELOW_BYTES if self._deep is None else self._deep
        notes = [kind.hint] if kind.hint else []
        if deep:
            problems += _damage(path, content, notes)
        hashes, wrong = self._hashes(path)
        problems += wrong
        return FileReport(
            path=str(path),
            kind=kind.name,
            title=_title(kind, metadata),
            use=kind.use,
            usable=kind.use != NOTHING and not problems,
            format=format,
            bytes=size,
            licence=_licence(kind, metadata),
            parts=_parts(content, kind),
            missing=tuple(missing[:NAMED_KEYS]),
            problems=tuple(problems),
            notes=(*notes, *_origin_notes(metadata)),
            sha256=hashes,
            deep=deep,
        )

    def _fit(self, kind: Kind, path: Path, given: Path, content: Mapping) -> tuple[list[str], list[str]]:
        """(missing keys, problems) of a file that should be a model, a VAE or a depth network."""
        missing, problems = [], []
        try:
            for part, config, read in self._expected(kind, path, given, content):
                try:
                    like = checkpoints.empty_part(part, config, path).state_dict()
                    state = read(like)
                    missing += [f"{part}.{name}" for name in sorted(like.keys() - state.keys())]
                    checkpoints.check_fit(part, like, state, path)
                except ModelFileError as error:
                    problems.append(str(error))
        except ModelFileError as error:
            problems.append(str(error))
        return missing, problems

    def _expected(self, kind: Kind, path: Path, given: Path, content: Mapping):
        """(part, configuration, how to read its state) of each network this kind of file should hold."""
        config = checkpoints.config_for(MIMICBRUSH, self._config)
        if kind in SINGLE_FILES.values():
            source = checkpoints.SingleFile(SafetensorsFile(path))
            for part in parts_of(source.config):
                yield part, source.config, partial(source.state, part)
        elif kind is CHECKPOINT:
            for part in ORIGINAL_PART_NAMES:
                yield part, config, partial(_original_state, content, part, config, path)
        elif kind in checkpoints.CHECKPOINT_FILES:
            source = checkpoints.CHECKPOINT_FILES[kind](path, None, self._config)
            for part in parts_of(source.config):
                yield part, source.config, partial(source.state, part)
        elif kind.use == VAE:
            config = self._config or config
            config = {**config, "vae": checkpoints.vae_config(given, config["vae"])}
            yield "vae", config, lambda like: checkpoints.vae_state(path, config["vae"])
        elif kind.use == DEPTH:
            checkpoints.check_depth_config(given)
            yield "depth_network", config, lambda like: checkpoints.depth_state(path, like)

    def _hashes(self, path: Path) -> tuple[dict[str, str], list[str]]:
        if not self._hash:
            return {}, []
        try:
            found, expected = file_sha256(path), _locked_sha256(path)
        except ModelFileError as error:
            return {}, [str(error)]
        wrong = [f"{path} has SHA-256 {found}; expected {expected} by {LOCK_NAME}. Download it again."]
        return {path.name: found}, wrong if expected not in (None, found) else []

    # --- folders -------------------------------------------------------------------------------------------

    def folder(self, path: Path) -> FileReport:
        try:
            if checkpoints.is_exemplar(path):
                return self._exemplar(path)
        except ModelFileError as error:
            return _folder_report(path, PIPELINE, problems=(str(error),))
        if (path / "model_index.json").is_file():
            return self._pipeline(path)
        if any(checkpoints.first_existing(path, names) for names in ORIGINAL_FILES.values()):
            return self._release(path)
        try:
            return self.file(checkpoints.weight_file(path, VAE_FILES + DEPTH_FILES), path)
        except ModelFileError as error:
            return _folder_report(path, NO_WEIGHTS, problems=(str(error),))

    def _release(self, path: Path) -> FileReport:
        """The original release: each of its three roles found, and filled by a file of the right kind."""
        files, missing, problems = [], [], []
        names = {"checkpoint": (), "vae": VAE_FILES, "depth": DEPTH_FILES}
        uses = {"checkpoint": MODEL, "vae": VAE, "depth": DEPTH}
        for role, candidates in ORIGINAL_FILES.items():
            found = checkpoints.first_existing(path, candidates)
            if found is None:
                missing.append(f"{role}: {' or '.join(candidates)}")
                continue
            try:
                file = self.file(checkpoints.weight_file(found, names[role]), found)
            except ModelFileError as error:
                problems.append(str(error))
                continue
            files.append(file)
            wrong_kind = file.use != uses[role] or (role == "checkpoint" and file.kind != CHECKPOINT.name)
            if wrong_kind and not file.problems:
                problems.append(f"{file.path} is {file.title}; expected the {role}. {' '.join(file.notes)}")
            problems += file.problems
        if missing:
            problems.append(f"{path} is not complete: {'; '.join(missing)} not found. Download what is missing.")
        return _folder_report(path, RELEASE, files, missing, problems)

    def _exemplar(self, path: Path) -> FileReport:
        """Paint by Example's diffusers folder: each part found and of the right kind, name and shape."""
        try:
            source = checkpoints.ExemplarFiles(path, None, self._config)
        except ModelFileError as error:
            return _folder_report(path, EXEMPLAR_FOLDER, problems=(str(error),))
        files = [self.file(file, file.parent) for file in source.files.values()]
        problems = [problem for file in files for problem in file.problems]
        if not problems:
            for part in parts_of(source.config):
                try:
                    like = checkpoints.empty_part(part, source.config, source.file_of(part)).state_dict()
                    checkpoints.fitting_state(part, source, like)
                except ModelFileError as error:
                    problems.append(str(error))
        return _folder_report(path, EXEMPLAR_FOLDER, files, problems=problems)

    def _pipeline(self, path: Path) -> FileReport:
        name = checkpoints.read_json(path / "model_index.json").get("_class_name")
        files = [self.folder(path / "vae")] if (path / "vae").is_dir() else []
        notes = (PIPELINE.hint, f"Its model_index.json says {name}.")
        return _folder_report(path, PIPELINE, files, notes=notes)


def _original_state(content: Mapping, part: str, config: dict, path: Path, like: Mapping) -> dict[str, Tensor]:
    return checkpoints.original_state(content, part, config, like, path)


def _folder_report(path: Path, kind: Kind, files=(), missing=(), problems=(), notes=()) -> FileReport:
    return FileReport(
        path=str(path),
        kind=kind.name,
        title=kind.title,
        use=kind.use,
        usable=kind.use != NOTHING and not problems,
        format="folder",
        bytes=sum(file.bytes for file in files),
        licence=kind.licence,
        missing=tuple(missing),
        problems=tuple(problems),
        notes=tuple(notes),
        sha256={name: digits for file in files for name, digits in file.sha256.items()},
        deep=bool(files) and all(file.deep for file in files),
        files=tuple(files),
    )


def _tensors(content: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, with its path as its name."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _parts(content: Mapping, kind: Kind) -> tuple[PartReport, ...]:
    """The networks of a model file one by one; any other file as a whole."""
    groups: dict[str, list[Tensor]] = {}
    for name, value in _tensors(content):
        groups.setdefault(name.split(".", 1)[0] if kind.use == MODEL else "all", []).append(value)
    return tuple(_part(name, values) for name, values in groups.items())


def _part(name: str, values: list[Tensor]) -> PartReport:
    precisions: dict[str, int] = {}
    for value in values:
        dtype = str(value.dtype).removeprefix("torch.")
        precisions[dtype] = precisions.get(dtype, 0) + value.numel()
    size = sum(value.numel() * value.element_size() for value in values)
    return PartReport(name, len(values), sum(precisions.values()), size, precisions)


def _damage(path: Path, content: Mapping, notes: list[str]) -> list[str]:
    """What reading every value finds: checksums that do not match, NaN and infinities."""
    problems = []
    try:
        if not check_integrity(path):
            notes.append(
                "This file has no checksums inside. A flipped bit that leaves a finite number is found by "
                "its SHA-256 only (--hash): compare it with the one on the page it comes from, or in the "
                "lock file."
            )
    except ModelFileError as error:
        problems.append(str(error))
    bad = [name for name, value in _tensors(content) if not _looks_finite(value)]
    values = dict(_tensors(content))
    for name in bad[:NAMED_KEYS]:
        nan, infinite = count_not_finite(values[name])
        problems.append(
            f"{path}: key {name!r} holds {nan} NaN and {infinite} infinite of {values[name].numel()} values; "
            "expected finite numbers. Download or convert it again."
        )
    if len(bad) > NAMED_KEYS:
        problems.append(f"{path}: {len(bad) - NAMED_KEYS} more keys hold NaN or infinities.")
    return problems


def _looks_finite(value: Tensor) -> bool:
    return value.layout != torch.strided or is_finite(value)


def _header_config(metadata: Mapping[str, str]) -> dict:
    try:
        config = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _single_file(metadata: Mapping[str, str]) -> Kind:
    """What a converted file is, by the system its header names; loading it refuses a system that is none."""
    return SINGLE_FILES.get(str(_header_config(metadata).get("system")), SINGLE_FILE)


def _title(kind: Kind, metadata: Mapping[str, str]) -> str:
    config = _header_config(metadata)
    if kind not in SINGLE_FILES.values():
        return kind.title
    if config.get("system") not in list(SINGLE_FILES):
        return f"a converted model of the system {config.get('system')!r}"
    return f"{kind.title}: {config.get('name', 'without a name')}"


def _licence(kind: Kind, metadata: Mapping[str, str]) -> str:
    """A converted file that was not made from the release was trained by someone: here, or elsewhere."""
    if kind in SINGLE_FILES.values() and "origin" not in _header_config(metadata):
        return "of whoever trained it; the model embedded in this package: Apache-2.0 (docs/licences.md)"
    return kind.licence


def _origin_notes(metadata: Mapping[str, str]) -> list[str]:
    origin = _header_config(metadata).get("origin")
    entries = origin.items() if isinstance(origin, dict) else ()
    return [
        f"made from {entry.get('name')} ({role}), {entry.get('bytes')} bytes, SHA-256 {entry.get('sha256')}"
        for role, entry in entries
        if isinstance(entry, dict) and "sha256" in entry
    ]


def _locked_sha256(path: Path) -> str | None:
    """What the lock file of `mimicbrush download` says about this file, in its folder or one above."""
    absolute = Path(os.path.abspath(path))
    for folder in list(absolute.parents)[:3]:
        lock = folder / LOCK_NAME
        if not lock.is_file():
            continue
        files = checkpoints.read_json(lock).get("files")
        entry = files.get(absolute.relative_to(folder).as_posix()) if isinstance(files, dict) else None
        if isinstance(entry, dict) and entry.get("kind") == "sha256":
            return entry.get("digest")
    return None
