"""The released weights from their authors' repository, fetched on request only, verified and resumable.

Plain HTTPS through the standard library instead of `huggingface_hub`: which of its major versions is
installed is decided by other packages beside this one, and its download interface, its HTTP library and its
storage back end differ between them. The two addresses used here have been the same through all of them:

    /api/models/<repository>/revision/<revision>?blobs=true    commit, sizes, SHA-256 (LFS) or git blob ids
    /<repository>/resolve/<commit>/<file>                      the file, with HTTP ranges, by way of a CDN

The first download notes the commit and all hashes in a lock file beside the weights; later ones keep to it.
Honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the usual proxy variables, all read when a download is asked
for.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote, urlsplit

from . import __version__
from .errors import ArgumentError, DownloadError, ModelFileError, OutputError, as_output_error
from .whole_file import whole_file

REPOSITORY = "xichenhku/MimicBrush"
MIRROR_PAGE = "https://www.modelscope.cn/models/xichen/MimicBrush"
FIXUP_REPOSITORY = "HadiZayer/MagicFixup"
FIXUP_TERMS = "Adobe Research License: non-commercial research only"
PUBLIC_ENDPOINT = "https://huggingface.co"
BRANCH = "main"
LOCK_NAME = "mimicbrush.lock.json"
LOCK_FORMAT = 1

NEEDED = (
    ("mimicbrush/mimicbrush.bin",),
    ("sd-vae-ft-mse/config.json",),
    ("sd-vae-ft-mse/diffusion_pytorch_model.safetensors", "sd-vae-ft-mse/diffusion_pytorch_model.bin"),
    ("depth_model/depth_anything_vitb14.pth",),
)
"""What the model is loaded from (`checkpoints.ORIGINAL_FILES`), relative to the folder; of each group the
first file that is published. The repository's image_encoder/ is not needed: mimicbrush.bin holds that one."""


@dataclass(frozen=True)
class Release:
    """What its authors published.

    needed: of each group the first file that is published; none where the names are not known here: all files that
        the hub keeps as large ones. mirror: another page with the same files. terms: the licence that has to be
        accepted before anything is fetched, where it is not enough to show it.
    """

    repository: str
    needed: tuple[tuple[str, ...], ...] = ()
    mirror: str = ""
    terms: str = ""


MIMICBRUSH_RELEASE = Release(REPOSITORY, NEEDED, MIRROR_PAGE)
RELEASES = {"mimicbrush": MIMICBRUSH_RELEASE, "magic-fixup": Release(FIXUP_REPOSITORY, terms=FIXUP_TERMS)}
"""System, as `modules` names it -> what of it can be fetched."""

CHUNK_BYTES = 1 << 20
METADATA_BYTES = 32 << 20
SPARE_BYTES = 64 << 20
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 6
"""Tries in a row that bring less than one chunk, before a download gives up."""
BACKOFF_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0

SHA256, GIT_BLOB = "sha256", "git-blob"
_DIGEST_LENGTHS = {SHA256: 64, GIT_BLOB: 40}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """One published file. kind: "sha256" of the content, or "git-blob", its SHA-1 as git counts it."""

    name: str
    size: int
    kind: str
    digest: str


@dataclass(frozen=True)
class Plan:
    """What a download will do. files: all that are wanted; missing: those not yet complete in the folder."""

    folder: Path
    release: Release
    revision: str
    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]

    @property
    def bytes_to_fetch(self) -> int:
        return sum(max(0, file.size - _size_of(_part(self.folder, file))) for file in self.missing)


@dataclass(frozen=True)
class Progress:
    """stage: "download" or "check" (the hash of a file on the disk); done, total: bytes of this file."""

    name: str
    stage: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


def plan_download(
    folder: str | os.PathLike,
    *,
    names: Sequence[str] = (),
    revision: str | None = None,
    release: Release = MIMICBRUSH_RELEASE,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Find out what is to be fetched into `folder`; writes nothing.

    names: files of the repository instead of those the release needs. revision: branch, tag or commit (default:
    the lock file's, else the branch). Files that are there already are checked by their hash; if all are complete,
    nothing is asked of the network.

    Raises ArgumentError (names), ModelFileError (a file that is there is another one), OutputError (folder)
    or DownloadError.
    """
    folder, report = Path(folder), on_progress or (lambda progress: None)
    groups = tuple((_checked_name(name),) for name in names) or release.needed
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; a folder for the weights was expected. Choose another one.")
    locked_revision, locked = _read_lock(folder, release.repository)
    if revision is None or revision == locked_revision:
        files = _chosen(groups, locked)
        missing = None if files is None else _incomplete(folder, files, report)
        if missing == ():
            return Plan(folder, release, locked_revision, files, ())

    hub = _Hub(folder, release, [group[-1] for group in groups])
    commit, published = hub.listing(revision or locked_revision or BRANCH)
    _check_against_lock(folder, locked_revision, locked, commit, published)
    files = _chosen(groups, published)
    if files is None:
        absent = [group for group in groups if not any(name in published for name in group)]
        raise DownloadError(
            f"{release.repository} has no {'file ' + ' or '.join(absent[0]) if absent else 'weights'} at commit "
            f"{commit}. Check the name, or choose another --revision; the files are listed at "
            f"{PUBLIC_ENDPOINT}/{release.repository}/tree/{commit}."
        )
    return Plan(folder, release, commit, files, _incomplete(folder, files, report))


def download(plan: Plan, on_progress: OnProgress | None = None, accepted: str = "") -> None:
    """Fetch what the plan says is missing: into `<name>.part`, checked by hash, then renamed.

    accepted: the release's terms, word for word, where it has any; without them nothing is fetched (ArgumentError).
    May be interrupted at any time (also by an exception from `on_progress`) and called again: it goes on
    where it stopped. Raises DownloadError, or OutputError where the disk is full or cannot be written.
    """
    report = on_progress or (lambda progress: None)
    if plan.missing:
        _check_accepted(plan.release, accepted)
        hub = _Hub(plan.folder, plan.release, [file.name for file in plan.files])
        _check_space(plan)
    _write_lock(plan)
    for file in plan.missing:
        hub.fetch(file, plan.revision, report)


def _check_accepted(release: Release, accepted: str) -> None:
    if release.terms and accepted != release.terms:
        raise ArgumentError(
            f"{release.repository} is under the {release.terms}. Nothing was fetched: read the licence at "
            f"{PUBLIC_ENDPOINT}/{release.repository}, and say that you accept it if you do."
        )


def manual_steps(
    folder: Path, names: Sequence[str], release: Release = MIMICBRUSH_RELEASE, revision: str = BRANCH
) -> str:
    """How to get the files with a browser and where to put them."""
    page = f"{PUBLIC_ENDPOINT}/{release.repository}"
    mirror = f" (mirror: {release.mirror})" if release.mirror else ""
    if names:
        where = "or the addresses below, and put the files here, under exactly these names:"
    else:
        where = f"and put the weights into {folder}."
    lines = [f"By hand: on any machine open {page}/tree/{revision}{mirror}, {where}"]
    for name in names:
        lines.append(f"  {folder / name}\n    from {page}/resolve/{revision}/{quote(name)}")
    lines.append("Then download again where there is a network to have them verified, or use them as they are.")
    return "\n".join(lines)


# --- names and hashes --------------------------------------------------------------------------------------


def _checked_name(name: object) -> str:
    """A relative POSIX path that stays inside its folder on every system. Names are never trusted."""
    parts = name.split("/") if isinstance(name, str) else [""]
    harmless = all(
        part not in ("", ".", "..") and not re.search(r'[\x00-\x1f\\:*?"<>|]', part) and part[-1] not in ". "
        for part in parts
    )
    if not harmless:
        raise ArgumentError(
            f"{name!r} is not a file name inside the repository. Give one like {NEEDED[0][0]}: relative, "
            "with forward slashes, without '..'."
        )
    return name


def _digest(path: Path, kind: str, report: Callable[[int], None]) -> str:
    """The hash of a file on the disk; report(bytes done)."""
    if kind == SHA256:
        state = hashlib.sha256()
    else:
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
            done += len(chunk)
            report(done)
    return state.hexdigest()


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _part(folder: Path, file: RemoteFile) -> Path:
    path = folder / file.name
    return path.with_name(path.name + ".part")


def _chosen(groups: Sequence[Sequence[str]], available: dict[str, RemoteFile]) -> tuple[RemoteFile, ...] | None:
    """The first available file of each group, of no groups all large files; None where there is none."""
    if not groups:
        return tuple(file for file in available.values() if file.kind == SHA256) or None
    found = [next((available[name] for name in group if name in available), None) for group in groups]
    return None if None in found else tuple(found)


def _incomplete(folder: Path, files: Sequence[RemoteFile], report: OnProgress) -> tuple[RemoteFile, ...]:
    """The files that are not in the folder. Another file of such a name is the user's: never overwritten."""
    missing = []
    for file in files:
        path = folder / file.name
        if not path.exists():
            missing.append(file)
            continue
        if path.is_dir():
            raise ModelFileError(f"{path} is a folder; a file was expected there. Move it away.")
        size = path.stat().st_size
        if size != file.size:
            raise ModelFileError(
                f"{path} has {size} bytes; the published file has {file.size}. Move it away, then download again."
            )
        digest = _digest(path, file.kind, lambda done, file=file: report(Progress(file.name, "check", done, file.size)))
        if digest != file.digest:
            raise ModelFileError(
                f"{path} has the {file.kind} {digest}; expected {file.digest}. It is damaged or another "
                "file: move it away, then download again."
            )
    return tuple(missing)


# --- the lock file -----------------------------------------------------------------------------------------


def _read_lock(folder: Path, repository: str) -> tuple[str | None, dict[str, RemoteFile]]:
    path = folder / LOCK_NAME
    if not path.exists():
        return None, {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != LOCK_FORMAT:
            raise ValueError(f"format {stored['format']!r}, {LOCK_FORMAT} expected")
        revision = _checked_commit(stored["revision"])
        files = [_remote_file(name, **entry) for name, entry in stored["files"].items()]
        origin = stored["repository"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(
            f"{path} is not a usable lock file ({type(error).__name__}: {error}). Restore it, or delete it "
            "to trust what the repository publishes now."
        ) from error
    if origin != repository:
        raise ModelFileError(f"{path} is of the repository {origin!r}, not of {repository!r}. Use another folder.")
    return revision, {file.name: file for file in files}


def _write_lock(plan: Plan) -> None:
    """Note the commit and the hashes; files noted earlier stay."""
    _, files = _read_lock(plan.folder, plan.release.repository)
    if all(files.get(file.name) == file for file in plan.files):
        return
    files.update({file.name: file for file in plan.files})
    content = {
        "format": LOCK_FORMAT,
        "repository": plan.release.repository,
        "revision": plan.revision,
        "files": {
            name: {"size": file.size, "kind": file.kind, "digest": file.digest} for name, file in sorted(files.items())
        },
    }
    path = plan.folder / LOCK_NAME
    with as_output_error(f"write {path}", "Choose another folder."):
        plan.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_against_lock(folder: Path, locked_revision, locked, commit: str, published) -> None:
    """The hub must still say what it said at the first download."""
    if locked_revision is None:
        return
    path = folder / LOCK_NAME
    if commit != locked_revision:
        raise DownloadError(
            f"{path} holds the commit {locked_revision}; asked for was {commit}. Use another folder for it, "
            "or leave --revision away to go on with the first."
        )
    for name, file in locked.items():
        now = published.get(name)
        if now != file:
            found = "is gone" if now is None else f"has the {now.kind} {now.digest} and {now.size} bytes"
            raise DownloadError(
                f"{name} {found} at commit {commit}; {path} holds the {file.kind} {file.digest} and "
                f"{file.size} bytes. A commit's files do not change by themselves: do not use what is "
                "published now before you know why. To accept it, delete the lock file."
            )


# --- what the hub says -------------------------------------------------------------------------------------


def _checked_commit(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{40}", value):
        raise ValueError(f"{value!r} is not a commit")
    return value


def _remote_file(name: str, size: object, kind: object, digest: object) -> RemoteFile:
    """Raises ValueError for what is not a size and a hash, ArgumentError (a ValueError) for the name."""
    if type(size) is not int or size < 0:
        raise ValueError(f"{name}: {size!r} is not a size")
    length = _DIGEST_LENGTHS.get(kind, 0)
    if not length or not isinstance(digest, str) or not re.fullmatch(f"[0-9a-f]{{{length}}}", digest):
        raise ValueError(f"{name}: {kind!r} {digest!r} is not a hash")
    return RemoteFile(_checked_name(name), size, kind, digest)


def _published_file(entry: dict) -> RemoteFile:
    lfs = entry.get("lfs")
    if lfs:
        return _remote_file(entry["rfilename"], lfs["size"], SHA256, lfs["sha256"])
    return _remote_file(entry["rfilename"], entry["size"], GIT_BLOB, entry["blobId"])


def _parse_listing(content: bytes) -> tuple[str, dict[str, RemoteFile]]:
    """(commit, files by name). An entry that cannot be used is left out: only asked-for names count."""
    stored = json.loads(content)
    files = {}
    for entry in stored["siblings"]:
        try:
            file = _published_file(entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("Ignoring an entry of the file list: %s", error)
            continue
        files[file.name] = file
    return _checked_commit(stored["sha"]), files


# --- the network -------------------------------------------------------------------------------------------


class _Transient(Exception):
    """Worth another try. wait: seconds the server asked for."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class _Hub:
    """One session with the hub; its settings are read from the environment here, never at import."""

    def __init__(self, folder: Path, release: Release, names: Sequence[str]):
        self.folder = folder
        self.repository = release.repository
        self._steps = manual_steps(folder, names, release)
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
                raise DownloadError(f"{variable} is set, so nothing is downloaded. Unset it, or:\n{self._steps}")
        self._endpoint = _checked_address(os.environ.get("HF_ENDPOINT") or PUBLIC_ENDPOINT).rstrip("/")
        self._token = os.environ.get("HF_TOKEN", "").strip()
        self._opener = urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=_trust()))
        self._reached = False

    def listing(self, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """(commit, files by name) of a branch, tag or commit."""
        address = f"{self._endpoint}/api/models/{self.repository}/revision/{quote(revision, safe='')}?blobs=true"

        def ask() -> bytes:
            with self._open(address, f"revision {revision!r}") as response:
                return _read(response, METADATA_BYTES)

        content = self._persist(ask, "the file list")
        try:
            return _parse_listing(content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DownloadError(
                f"{self._endpoint} did not answer with a file list ({type(error).__name__}: {error}). "
                "Perhaps a login page or a proxy answered, or HF_ENDPOINT is no mirror of the hub. "
                f"Otherwise:\n{self._steps}"
            ) from error

    def fetch(self, file: RemoteFile, revision: str, report: OnProgress) -> None:
        """Bring one file into the folder, from where its .part ends."""
        path, part = self.folder / file.name, _part(self.folder, file)
        with as_output_error(f"create {path.parent}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        address = f"{self._endpoint}/{self.repository}/resolve/{revision}/{quote(file.name)}"
        furthest = _size_of(part)

        def gained() -> bool:
            nonlocal furthest
            before, furthest = furthest, max(furthest, _size_of(part))
            return furthest - before >= CHUNK_BYTES

        self._persist(lambda: self._receive(file, address, part, report), file.name, gained)
        digest = _digest(part, file.kind, lambda done: report(Progress(file.name, "check", done, file.size)))
        if digest != file.digest:
            part.unlink()
            raise DownloadError(
                f"{file.name} arrived with the {file.kind} {digest}; expected {file.digest}. It was removed. "
                "Run the same command again; if it happens again, something between here and the hub changes "
                "files."
            )
        with as_output_error(f"rename {part} to {path}"):
            os.replace(part, path)

    def _receive(self, file: RemoteFile, address: str, part: Path, report: OnProgress) -> None:
        """One try: append to the .part what the server sends."""
        offset = _size_of(part)
        if offset > file.size:
            part.unlink()
            offset = 0
        if offset == file.size and part.exists():
            return
        try:
            response = self._open(address, file.name, offset)
        except _RangeRefused as error:
            part.unlink(missing_ok=True)
            raise _Transient(f"the server cannot go on at byte {offset}") from error
        with response:
            done = _start_of_body(response, offset, file)
            with _opened(part, "ab" if done else "wb") as out:
                report(Progress(file.name, "download", done, file.size))
                while chunk := _read(response, min(CHUNK_BYTES, file.size - done)):
                    _write(out, chunk, part)
                    done += len(chunk)
                    report(Progress(file.name, "download", done, file.size))
        if done < file.size:
            raise _Transient(f"the connection ended after {done} of {file.size} bytes")

    def _open(self, address: str, what: str, offset: int = 0):
        request = urllib.request.Request(_checked_address(address))
        request.add_header("User-Agent", f"mimicbrush/{__version__}")
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        if self._token:  # unredirected: a token is never sent to the CDN
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            response = self._opener.open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            self._reached = True
            with error:
                raise self._refusal(error, what) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise self._unreachable(error) from error
        self._reached = True
        return response

    def _refusal(self, error: urllib.error.HTTPError, what: str) -> Exception:
        if error.code == 416:
            return _RangeRefused()
        if error.code in _TRANSIENT_STATUS:
            wait = error.headers.get("Retry-After", "")
            return _Transient(f"the server answered {error.code}", float(wait) if wait.isdigit() else None)
        where = f"{self.repository} on {urlsplit(self._endpoint).netloc}"
        if error.code == 404:
            return DownloadError(f"There is no {what} in {where} (404). Check --revision and --file.\n{self._steps}")
        advice = "Check HF_TOKEN, and that the page can be opened" if error.code in (401, 403) else "Try again later"
        return DownloadError(f"{where} refused {what} ({error.code}). {advice}. Otherwise:\n{self._steps}")

    def _unreachable(self, error: Exception) -> Exception:
        reason = getattr(error, "reason", error)
        host = urlsplit(self._endpoint).netloc
        if isinstance(reason, ssl.SSLCertVerificationError):
            return DownloadError(
                f"{host} could not prove its identity ({reason.verify_message}). Check the clock and the "
                "certificates of this machine; a proxy that reads along needs its certificate installed. "
                f"Otherwise:\n{self._steps}"
            )
        hopeless = isinstance(reason, (socket.gaierror, ConnectionRefusedError)) or not isinstance(reason, OSError)
        if hopeless and not self._reached:
            return DownloadError(f"Cannot reach {host} ({reason}): no network, or it is blocked.\n{self._steps}")
        return _Transient(f"{type(reason).__name__}: {reason}")

    def _persist(self, work: Callable, what: str, gained: Callable[[], bool] = lambda: False):
        """Do work until it succeeds; at most `ATTEMPTS` tries in a row that do not gain anything."""
        failures = 0
        while True:
            try:
                return work()
            except _Transient as error:
                failures = 1 if gained() else failures + 1
                if failures >= ATTEMPTS:
                    raise DownloadError(
                        f"Gave up on {what} after {failures} tries: {error}. What has arrived is kept: run "
                        f"the same command again to go on. Otherwise:\n{self._steps}"
                    ) from error
                wait = error.wait if error.wait is not None else BACKOFF_SECONDS * 2 ** (failures - 1)
                wait = min(wait, LONGEST_WAIT_SECONDS)
                logger.info("%s: %s; trying again in %.0f s", what, error, wait)
                time.sleep(wait)


class _RangeRefused(Exception):
    """Status 416: the .part is longer than what the server has, or it was cut strangely."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https only, and hands a token on to the same host only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = urllib.request.Request(_checked_address(newurl), headers=dict(req.headers))
        token = req.unredirected_hdrs.get("Authorization")
        if token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            new.add_unredirected_header("Authorization", token)
        return new

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not follow it


def _checked_address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme == "https" and parts.hostname:
        return address
    if parts.scheme == "http" and parts.hostname in _LOOPBACK:
        return address
    raise DownloadError(
        f"The address {parts.scheme}://{parts.hostname or ''} is not https. Weights are fetched over https "
        "only; check HF_ENDPOINT."
    )


@cache
def _trust() -> ssl.SSLContext:
    """The system's certificates, and certifi's where it is installed (Python for macOS comes without any)."""
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(certifi.where())
    return context


def _start_of_body(response, offset: int, file: RemoteFile) -> int:
    """The byte the answer starts at: `offset`, or 0 where the server ignored the range.

    Raises DownloadError if it is not this file at all.
    """
    kind = response.headers.get_content_type()
    if kind == "text/html":
        raise DownloadError(
            f"A web page came instead of {file.name}: perhaps a login page of the network. Open "
            f"{PUBLIC_ENDPOINT} in a browser, then run the same command again."
        )
    start, total = 0, response.headers.get("Content-Length")  # text, compared as such
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != offset:
            raise _Transient("the server sent another part than was asked for")
        start, total = offset, found[2]
    if total is not None and total != str(file.size):
        raise DownloadError(
            f"{file.name} has {total} bytes on the server; the file list says {file.size}. Try again later, "
            "or choose another --revision."
        )
    return start


def _read(response, size: int) -> bytes:
    try:
        return response.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise _Transient(f"{type(error).__name__}: {error}") from error


def _opened(part: Path, mode: str):
    with as_output_error(f"write {part}"):
        return part.open(mode)


def _write(out, chunk: bytes, part: Path) -> None:
    with as_output_error(f"write {part}", "What has arrived is kept: make room and run the same command again."):
        out.write(chunk)
        out.flush()


def _check_space(plan: Plan) -> None:
    """Refuse before the first byte what would not fit."""
    place = plan.folder.absolute()
    while not place.exists():
        place = place.parent
    needed, free = plan.bytes_to_fetch + SPARE_BYTES, shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{plan.folder} needs {needed / 1e9:.2f} GB of free space, {free / 1e9:.2f} GB are free. Make "
            "room, or choose another folder with --into."
        )
