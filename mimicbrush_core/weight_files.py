"""Weight files as they lie on the disk: what one is by its first bytes, its tensors, and writing one safely.

A file's name says nothing here: artists rename files, and failed downloads keep the right name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelFileError, OutputError, as_output_error
from .whole_file import unfinished_path

SAFETENSORS, ZIP_PICKLE, OLD_PICKLE = "safetensors", "zip pickle", "old pickle"
CHECKSUM_KEY = "sha256"
"""Header entry of the files written here: SHA-256 of the whole file with this entry's 64 digits set to '0'."""

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 512
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}

OnBytes = Callable[[int], None]
AGAIN = "Download or copy it again."

_NOT_WEIGHTS = (
    (
        rb"version https://git-lfs",
        "a git-LFS pointer (a few lines of text), not the file it stands for. Run "
        "`git lfs pull` in that repository, or download the file itself from its page",
    ),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)",
        "a web page: the download failed, or the page was saved instead of the file. Use the page's download button",
    ),
    (rb"(\xef\xbb\xbf)?\s*<", "XML or web text, probably the error message of a failed download. " + AGAIN),
    (rb"\s*[\[{]", "JSON text, probably a configuration or the error message of a download. " + AGAIN),
    (rb"GGUF", "a GGUF file (quantised for other programs). Get the .safetensors or the original"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", "a picture. Give the weight file"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|\xfd7zXZ", "a compressed archive. Unpack it first"),
    (
        rb"\x00{64}",
        "empty: it begins with zeros only, as a download that was reserved but never filled. " + AGAIN,
    ),
)
"""First bytes -> what the file is, and what to do."""


def file_format(path: str | os.PathLike) -> str:
    """SAFETENSORS, ZIP_PICKLE or OLD_PICKLE, by content. Raises ModelFileError for anything else."""
    path = Path(path)
    size, head = _size_and_head(path)
    if size == 0:
        raise ModelFileError(f"{path} is empty (0 bytes); a weight file was expected. {AGAIN}")
    if head.startswith(b"PK\x03\x04"):
        return ZIP_PICKLE
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return OLD_PICKLE
    if head[5:9] == b"\0\0\0{":  # eight bytes with the header's length, then the header
        return SAFETENSORS
    for pattern, meaning in _NOT_WEIGHTS:
        if re.match(pattern, head, re.DOTALL):
            raise ModelFileError(f"{path} is not a weight file: this is {meaning}.")
    raise ModelFileError(
        f"{path} is no weight file this program knows ({size} bytes, beginning with {head[:8].hex(' ')}); "
        f"expected a .safetensors file or a PyTorch pickle. It may be cut off or damaged. {AGAIN}"
    )


def file_size(path: str | os.PathLike) -> int:
    """Bytes of a regular file that can be reached; ModelFileError names what stands in the way."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise ModelFileError(_unreachable(path, error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise ModelFileError(f"{path} is a folder; a weight file was expected. Name the file inside it.")
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{path} is not an ordinary file but a pipe or device; a weight file was expected.")
    return status.st_size


def is_folder(path: str | os.PathLike) -> bool:
    """Whether this is a folder that can be looked into; ModelFileError if it cannot be reached at all."""
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return False
        os.listdir(path)
        return True
    except (OSError, ValueError) as error:
        raise ModelFileError(_unreachable(path, error)) from error


def _size_and_head(path: Path) -> tuple[int, bytes]:
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            return size, file.read(HEAD_BYTES)
    except OSError as error:
        raise ModelFileError(_unreachable(path, error)) from error


def _unreachable(path, error: Exception) -> str:
    code = getattr(error, "errno", None)
    if code == errno.ENOENT and os.path.islink(path):
        return f"{path} is a link to {os.readlink(path)}, which does not exist. Restore that file or {AGAIN.lower()}"
    if code in (errno.ENOENT, errno.ENOTDIR):
        return f"There is no file at {path}. Check the path."
    if code in (errno.EACCES, errno.EPERM):
        return f"{path} may not be read ({error.strerror}). Give yourself permission to read it and its folders."
    if code == errno.ELOOP:
        return f"{path} cannot be opened: its symbolic links go in a circle. Remove the link and name the file itself."
    return f"{path!r} cannot be opened ({getattr(error, 'strerror', None) or error}). Check the path and the disk."


# --- reading -----------------------------------------------------------------------------------------------


def read_tensors(path: str | os.PathLike) -> dict:
    """The tensors of a safetensors file, or what a pickle holds.

    Memory-mapped: a tensor costs memory when it is touched. Pickles in the format before torch 1.6 cannot be
    mapped and are read whole. Nothing inside a pickle is ever executed (`weights_only=True`).

    Raises ModelFileError: not a weight file, cut off, damaged, or a pickle that asks for code.
    """
    path = Path(path)
    kind = file_format(path)
    if kind == SAFETENSORS:
        return SafetensorsFile(path).tensors()
    if kind == ZIP_PICKLE:
        _check_zip(path)
    try:
        loaded = _load_pickle(path, mappable=kind == ZIP_PICKLE)
    except Exception as error:  # unpicklers raise nearly anything on damaged input
        raise ModelFileError(_unloadable(path, error)) from error
    if not isinstance(loaded, dict):
        raise ModelFileError(
            f"{path} holds a {type(loaded).__name__}; a dictionary of tensors was expected. It is not a model file."
        )
    return loaded


def _load_pickle(path: Path, mappable: bool) -> object:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    with open(path, "rb") as file:  # newer torch goes by this name and would read it as what it is not
        return torch.load(file, map_location="cpu", weights_only=True)


def pickle_mentions(path: str | os.PathLike, text: str) -> bool:
    """Whether the pickle inside a zip holds `text`, e.g. in a key; nothing of it is run.

    Raises ModelFileError: the zip is cut off, or not PyTorch's.
    """
    _check_zip(Path(path))
    try:
        with zipfile.ZipFile(path) as archive:
            records = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(text.encode() in archive.read(name) for name in records)
    except (zipfile.BadZipFile, OSError, zlib.error):  # reading it will say what is wrong
        return False


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The free entries of a safetensors header; empty for pickles."""
    return _header(Path(path)).get("__metadata__") or {} if file_format(path) == SAFETENSORS else {}


class SafetensorsFile:
    """A safetensors file whose header is sound and fits the file's size; it is parsed once, here.

    path: what `file_format` calls SAFETENSORS. metadata: the header's free entries; names: of the tensors.
    Raises ModelFileError: cut off or damaged.
    """

    def __init__(self, path: Path):
        header = _header(path)
        self.path = path
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.names = list(header)
        _check_extent(path, header)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Those whose name begins with `prefix`, memory-mapped.

        Mapped anew by each call: what was touched goes back to the system with the last of them.
        """
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in self.names if name.startswith(prefix)}
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{self.path}: its safetensors header is damaged ({error}). {AGAIN}") from error


def _check_extent(path: Path, entries: Mapping[str, dict]) -> None:
    """Raises ModelFileError unless the file ends where its last tensor does. entries: {tensor name: header entry}."""
    try:
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if not isinstance(end, int):
            raise TypeError(f"data_offsets {end!r}")
    except (KeyError, IndexError, TypeError) as error:
        raise ModelFileError(
            f"{path}: its safetensors header is damaged; every entry should have a dtype, a shape and "
            f"data_offsets ({type(error).__name__}: {error}). {AGAIN}"
        ) from error
    expected, given = _data_start(path) + end, file_size(path)
    if given < expected:
        raise ModelFileError(
            f"{path} is cut off: {given} bytes, expected {expected} by its header. The download or copy was "
            f"not finished. {AGAIN}"
        )
    if given > expected:
        raise ModelFileError(
            f"{path} has {given - expected} bytes too many: {given}, expected {expected} by its header. It "
            f"is damaged or two files were joined. {AGAIN}"
        )


def _data_start(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _header(path: Path) -> dict:
    size, length = file_size(path), _data_start(path) - 8
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ModelFileError(
            f"{path}: its safetensors header should be {length} bytes, but the file has {size}. It is cut "
            f"off, or its first bytes are damaged. {AGAIN}"
        )
    with open(path, "rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__} instead of an object")
        metadata = header.get("__metadata__") or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds something else than texts")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ModelFileError(f"{path}: its safetensors header is not valid JSON ({error}). {AGAIN}") from error
    return header


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelFileError(
            f"{path} is cut off or damaged: it begins as a PyTorch file, but its table of contents is "
            f"missing ({error}). {AGAIN}"
        ) from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise ModelFileError(
            f"{path} is a zip archive, but not of PyTorch: it holds {', '.join(names[:4])}. Unpack it and "
            "give the weight file inside."
        )


def _unloadable(path: Path, error: Exception) -> str:
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return (
            f"{path} is a pickle that asks to run code ({code[1]}); nothing of it was run. Expected: tensors "
            "and containers only. Get the .safetensors version of this file. If it comes from a stranger, "
            "delete it."
        )
    first_line = str(error).partition("\n")[0][:200]
    return (
        f"{path} cannot be read as weights ({type(error).__name__}: {first_line}). It may be cut off or "
        f"damaged, or hold something else than tensors. {AGAIN}"
    )


# --- integrity ---------------------------------------------------------------------------------------------


def file_sha256(path: str | os.PathLike, on_bytes: OnBytes | None = None) -> str:
    """SHA-256 of a file as hexadecimal digits; `on_bytes` gets the size of each piece read."""
    digest = hashlib.sha256()
    file_size(path)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
    except OSError as error:
        raise ModelFileError(_unreachable(path, error)) from error
    return digest.hexdigest()


def check_integrity(path: str | os.PathLike, on_bytes: OnBytes | None = None) -> bool:
    """Compare the content with the checksums stored in the file; False if it has none.

    Zip pickles have a CRC per tensor, the files written here a SHA-256. Other safetensors files and old pickles
    have none: a flipped bit that leaves a finite number is found there only by the hash of the whole file.

    Raises ModelFileError naming the damaged record.
    """
    path, kind = Path(path), file_format(path)
    if kind == ZIP_PICKLE:
        return _check_crc(path, on_bytes or (lambda count: None))
    if kind == SAFETENSORS and CHECKSUM_KEY in read_metadata(path):
        _check_own_checksum(path, read_metadata(path)[CHECKSUM_KEY], on_bytes or (lambda count: None))
        return True
    return False


def sha256_and_check(path: str | os.PathLike, on_bytes: OnBytes | None = None) -> str:
    """`file_sha256` and `check_integrity` in one reading: these files are large and disks are slow."""
    path, kind = Path(path), file_format(path)
    if kind != ZIP_PICKLE:
        check_integrity(path)
        return file_sha256(path, on_bytes)
    digest = hashlib.sha256()
    _check_crc(path, on_bytes or (lambda count: None), digest.update)
    return digest.hexdigest()


def _check_crc(path: Path, on_bytes: OnBytes, on_chunk: Callable[[bytes], None] = lambda chunk: None) -> bool:
    """Whether there are checksums, all of which match. on_chunk: gets the whole file from its beginning to its end."""
    records = _records(path)
    position, checked = 0, bool(records)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            on_chunk(chunk)
            while records and records[0].start < position + len(chunk):
                record = records[0]
                record.update(chunk[max(0, record.start - position) : record.end - position])
                if record.end > position + len(chunk):
                    break
                if record.crc != record.expected:
                    raise ModelFileError(
                        f"{path} is damaged: record {record.name!r} has the checksum {record.crc:08x}, expected "
                        f"{record.expected:08x} by the file's table of contents. {AGAIN}"
                    )
                records.popleft()
            position += len(chunk)
            on_bytes(len(chunk))
    if records:
        raise ModelFileError(f"{path} is cut off: record {records[0].name!r} goes beyond its {position} bytes. {AGAIN}")
    return checked


@dataclass
class _Record:
    """The bytes start..end of a zip archive, and the CRC of those read so far."""

    name: str
    start: int
    end: int
    expected: int
    crc: int = 0

    def update(self, content: bytes) -> None:
        self.crc = zlib.crc32(content, self.crc)


def _records(path: Path) -> deque[_Record]:
    """The records of a PyTorch zip in their order; those without a checksum (torch can be told so) left out."""
    _check_zip(path)
    records = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if info.CRC == 0 or info.file_size == 0 or info.compress_type != zipfile.ZIP_STORED:
                continue
            file.seek(info.header_offset + 26)  # the local header's last two fields: lengths of name and padding
            name, padding = (int.from_bytes(file.read(2), "little") for _ in range(2))
            start = info.header_offset + 30 + name + padding
            records.append(_Record(info.filename, start, start + info.file_size, info.CRC))
    return deque(sorted(records, key=lambda record: record.start))


def _check_own_checksum(path: Path, expected: str, on_bytes: OnBytes) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        header = file.read(_data_start(path))
        digest.update(header.replace(expected.encode(), b"0" * len(expected), 1))
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    if digest.hexdigest() != expected:
        raise ModelFileError(
            f"{path} is damaged: its content has SHA-256 {digest.hexdigest()}, expected {expected} by its "
            "header. Convert or download it again."
        )


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, in one pass and without a copy."""
    if value.numel() == 0 or not value.is_floating_point():
        return True
    try:
        low, high = value.aminmax()  # NaN spreads into both
    except (RuntimeError, NotImplementedError):  # 8-bit floats
        low, high = value.float().aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def count_not_finite(value: Tensor) -> tuple[int, int]:
    """(number of NaN, number of infinities)."""
    value = value if value.element_size() > 1 else value.float()
    return int(value.isnan().sum()), int(value.isinf().sum())


# --- writing -----------------------------------------------------------------------------------------------


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, so that memory holds one of them at a time.

    The library's own writer wants all tensors at once. The format needs no more than this: eight bytes with the
    header's length, a JSON header padded with spaces to a multiple of eight, then the tensors without gaps.

        with SafetensorsWriter(path, layout, metadata) as writer:
            for name, value in ...:           # in the layout's order
                writer.write(name, value)
            writer.finish()

    What is written goes to `<path>.unfinished` in the same folder; a leftover of a killed run is removed.
    `finish` writes the checksum, waits for the disk and renames. Leaving the block in any other way removes the
    temporary file, so that `path` is either what it was or complete.

    layout: {name: (dtype, shape)}, with larger element sizes first: readers need aligned tensors.
    bytes: the size of the finished file; written: so far.
    Raises OutputError if it cannot be written, and beforehand if the disk has too little space.
    """

    def __init__(self, path: str | os.PathLike, layout: Mapping, metadata: Mapping[str, str]):
        self.path = Path(path)
        self.unfinished = unfinished_path(self.path)
        self._layout = list(layout.items())
        self._zero_header = _encode_header(layout, {CHECKSUM_KEY: "0" * 64, **metadata})
        self.bytes = len(self._zero_header) + sum(_byte_count(*entry) for entry in layout.values())
        self._digest = hashlib.sha256(self._zero_header)
        self._count = 0
        self.written = 0

    def __enter__(self) -> SafetensorsWriter:
        with self._writing():
            self.unfinished.unlink(missing_ok=True)
            self._check_space()
            self._file = open(self.unfinished, "xb")
        try:
            self._put(self._zero_header)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # what was buffered could not be written; the file goes anyway
            self._file.close()
        with suppress(OSError):
            self.unfinished.unlink(missing_ok=True)

    def write(self, name: str, value: Tensor) -> None:
        """The next tensor of the layout, on the CPU and in the layout's dtype and shape."""
        expected, (dtype, shape) = self._layout[self._count]
        if (name, value.dtype, tuple(value.shape)) != (expected, dtype, tuple(shape)):
            raise ValueError(f"{name} {value.dtype} {tuple(value.shape)}: {expected} {dtype} {tuple(shape)} is next")
        flat = value.detach().contiguous().reshape(-1)
        content = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""
        self._digest.update(content)
        self._put(content)
        self._count += 1

    def finish(self, check: Callable[[Path], None] | None = None) -> None:
        """Complete the file, have `check` look at it (it raises if something is wrong), and rename it."""
        if self._count != len(self._layout):
            raise ValueError(f"{len(self._layout) - self._count} tensors of the layout were not written")
        digits = self._digest.hexdigest().encode()
        with self._writing():
            self._file.seek(0)
            self._file.write(self._zero_header.replace(b"0" * 64, digits, 1))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if check:
            check(self.unfinished)
        with self._writing():
            os.replace(self.unfinished, self.path)
            _sync_folder(self.path.parent)

    def _put(self, content) -> None:
        with self._writing():
            self._file.write(content)
        self.written += len(content)

    def _writing(self) -> AbstractContextManager[None]:
        remedy = "Nothing was changed there; choose another place or free some space."
        return as_output_error(f"write the model to {self.path}", remedy)

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.bytes:
            raise OutputError(
                f"{self.path} needs {self.bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free. "
                "Free some space, choose another disk, or half the size with fp16."
            )


def _byte_count(dtype: torch.dtype, shape) -> int:
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count


def _encode_header(layout: Mapping, metadata: Mapping[str, str]) -> bytes:
    header: dict = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        if offset % dtype.itemsize:
            raise ValueError(f"{name} would not be aligned; larger element sizes come first")
        end = offset + _byte_count(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system knows how to."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        with suppress(OSError):  # some network disks cannot
            os.fsync(handle)
    finally:
        os.close(handle)
