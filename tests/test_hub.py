"""Downloads against a server on this machine: nothing here reaches the real network."""

import hashlib
import http.server
import json
import shutil
import socket
import socketserver
import threading
from collections import namedtuple

import pytest

from mimicbrush_core import hub
from mimicbrush_core.cli import main
from mimicbrush_core.errors import ArgumentError, DownloadError, ModelFileError, OutputError
from mimicbrush_core.modules import TITLES, bundled_config

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
BIN, CONFIG = "mimicbrush/mimicbrush.bin", "sd-vae-ft-mse/config.json"
VAE, DEPTH = "sd-vae-ft-mse/diffusion_pytorch_model.bin", "depth_model/depth_anything_vitb14.pth"
OUTPUT, MODEL, DOWNLOAD, CANCELLED = 5, 4, 6, 130


class FakeHub:
    """What the server holds and how it misbehaves."""

    def __init__(self):
        self.branch = COMMIT
        self.commits = {
            COMMIT: {
                BIN: bytes(range(256)) * 20_000,  # 5 MB: several chunks
                CONFIG: b'{"scaling_factor": 0.18215}',
                VAE: b"vae" * 1000,
                DEPTH: b"depth" * 1000,
                "image_encoder/pytorch_model.bin": b"not needed",
            }
        }
        self.commits[OTHER_COMMIT] = self.commits[COMMIT] | {CONFIG: b"{}"}
        self.extra_entries = []
        self.ranges = True
        self.cuts = []  # bytes after which the next payload answers break off
        self.statuses = []  # of the next answers, instead of the content
        self.payload = {}  # name -> other content than what the list says
        self.content_type = "application/octet-stream"
        self.list_content = None
        self.redirect_to = None
        self.requests = []  # (kind, name or revision, Range, Authorization)

    def listing(self, commit):
        entries = []
        for name, content in self.commits[commit].items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
            if not name.endswith(".json"):
                entry["blobId"] = "0" * 40
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return json.dumps({"id": hub.REPOSITORY, "sha": commit, "siblings": entries + self.extra_entries}).encode()

    def payloads(self):
        return [name for kind, name, *_ in self.requests if kind == "file"]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        fake, path = self.server.fake, self.path.split("?")[0]
        api, files = f"/api/models/{hub.REPOSITORY}/revision/", f"/{hub.REPOSITORY}/resolve/"
        credentials = (self.headers.get("Range"), self.headers.get("Authorization"))
        kind = "list" if path.startswith(api) else "file"
        rest = path.removeprefix(api).removeprefix(files)
        revision, _, name = rest.partition("/")
        fake.requests.append((kind, name or revision, *credentials))
        if fake.statuses:
            status = fake.statuses.pop(0)
            if status != 200:
                return self.answer(status, b"<html>no</html>", "text/html", {"Retry-After": "0"})
        commit = fake.branch if revision == "main" else revision
        if commit not in fake.commits:
            return self.answer(404, b"no", "text/plain")
        if kind == "list":
            return self.answer(200, fake.list_content or fake.listing(commit), "application/json")
        if fake.redirect_to and not path.startswith("/cdn"):
            self.send_response(302)
            self.send_header("Location", fake.redirect_to + path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = fake.payload.get(name, fake.commits[commit].get(name))
        if content is None:
            return self.answer(404, b"no", "text/plain")
        return self.send_file(fake, content)

    def send_file(self, fake, content):
        asked = self.headers.get("Range")
        headers, status, body = {}, 200, content
        if asked and fake.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.answer(416, b"", "text/plain")
            status, body = 206, content[start:]
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = fake.cuts.pop(0) if fake.cuts else None
        return self.answer(status, body, fake.content_type, headers, cut)

    def answer(self, status, body, content_type, headers=None, cut=None):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if cut is not None:
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # without the slow look-up of this machine's name

    def handle_error(self, request, client_address):
        pass  # a client that goes away in the middle is what some tests are about


def serve(fake):
    server = Server(("127.0.0.1", 0), Handler)
    server.fake, server.server_port = fake, server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def fake(monkeypatch):
    """A hub on this machine that HF_ENDPOINT points to."""
    fake = FakeHub()
    server = serve(fake)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(hub, "BACKOFF_SECONDS", 0.0)
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "Mimic Brüsh"


def fetch(folder, on_progress=None, **options):
    plan = hub.plan_download(folder, **options)
    hub.download(plan, on_progress)
    return plan


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_complete(folder, fake, commit=COMMIT):
    found = contents(folder)
    lock = json.loads(found.pop(hub.LOCK_NAME))
    assert found == {name: fake.commits[commit][name] for name in (BIN, CONFIG, VAE, DEPTH)}
    assert lock["revision"] == commit and lock["repository"] == hub.REPOSITORY
    assert lock["files"][BIN]["digest"] == sha256(found[BIN])
    assert lock["files"][CONFIG] == {"size": 27, "kind": "git-blob", "digest": git_blob(found[CONFIG])}


# --- what works --------------------------------------------------------------------------------------------


def test_a_full_download_is_verified_and_locked(fake, folder):
    seen = []
    plan = fetch(folder, seen.append)
    assert [file.name for file in plan.missing] == [BIN, CONFIG, VAE, DEPTH]
    assert_complete(folder, fake)
    last = {(p.name, p.stage): (p.done, p.total) for p in seen}
    assert last[BIN, "download"] == last[BIN, "check"] == (5_120_000, 5_120_000)


def test_the_branch_is_resolved_once_and_files_are_asked_for_at_the_commit(fake, folder):
    plan = hub.plan_download(folder)
    fake.branch = OTHER_COMMIT
    hub.download(plan)
    assert_complete(folder, fake, COMMIT)


def test_planning_writes_nothing(fake, folder):
    plan = hub.plan_download(folder)
    assert plan.bytes_to_fetch == sum(file.size for file in plan.files) and not folder.exists()


def test_a_safetensors_vae_is_preferred_where_it_is_published(fake, folder):
    better = VAE.replace(".bin", ".safetensors")
    fake.commits[COMMIT][better] = b"safe"
    assert [file.name for file in fetch(folder).files] == [BIN, CONFIG, better, DEPTH]


def test_complete_files_cost_no_request_and_work_offline(fake, folder, monkeypatch):
    fetch(folder)
    fake.requests.clear()
    assert fetch(folder).missing == () and fake.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(folder).missing == ()


def test_files_put_there_by_hand_are_verified_and_locked(fake, folder):
    for name in (BIN, CONFIG, VAE, DEPTH):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(fake.commits[COMMIT][name])
    fetch(folder)
    assert fake.payloads() == []
    assert_complete(folder, fake)


def test_a_lost_file_is_fetched_again_at_the_locked_commit(fake, folder):
    fetch(folder)
    (folder / CONFIG).unlink()
    fake.branch = OTHER_COMMIT
    fetch(folder)
    assert_complete(folder, fake, COMMIT)


def test_single_files_and_a_revision_can_be_chosen(fake, folder):
    fetch(folder, names=[CONFIG], revision=OTHER_COMMIT)
    assert set(contents(folder)) == {CONFIG, hub.LOCK_NAME} and (folder / CONFIG).read_bytes() == b"{}"
    fetch(folder, names=["image_encoder/pytorch_model.bin"])
    lock = json.loads((folder / hub.LOCK_NAME).read_text())
    assert lock["revision"] == OTHER_COMMIT
    assert set(lock["files"]) == {CONFIG, "image_encoder/pytorch_model.bin"}


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(fake, folder, monkeypatch):
    cdn_files = FakeHub()
    cdn = serve(cdn_files)
    try:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        fake.redirect_to = f"http://127.0.0.1:{cdn.server_port}"
        fetch(folder)
    finally:
        cdn.shutdown()
        cdn.server_close()
    assert_complete(folder, fake)
    assert {request[3] for request in fake.requests} == {"Bearer hf_secret"}
    assert len(cdn_files.requests) == 4 and {request[3] for request in cdn_files.requests} == {None}


# --- what breaks off ---------------------------------------------------------------------------------------


def test_a_cut_connection_goes_on_where_it_stopped(fake, folder):
    fake.cuts = [2_000_000, 100]
    fetch(folder)
    assert_complete(folder, fake)
    ranges = [request[2] for request in fake.requests if request[1] == BIN]
    assert ranges == [None, "bytes=2000000-", "bytes=2000100-"]


def test_a_server_without_ranges_starts_again(fake, folder):
    fake.cuts, fake.ranges = [2_000_000], False
    fetch(folder)
    assert_complete(folder, fake)


def test_it_gives_up_after_some_tries_keeps_the_part_and_goes_on_later(fake, folder):
    fake.cuts = [1_500_000] + [0] * hub.ATTEMPTS
    with pytest.raises(DownloadError, match=f"(?s)after {hub.ATTEMPTS} tries.*run the same command again"):
        fetch(folder)
    assert (folder / (BIN + ".part")).stat().st_size == 1_500_000 and not (folder / BIN).exists()
    fake.cuts, seen = [], []
    fetch(folder, seen.append)
    assert_complete(folder, fake)
    assert seen[0].done == 1_500_000


def test_many_cuts_are_no_reason_to_give_up_while_something_arrives(fake, folder):
    fake.commits[COMMIT][BIN] = bytes(12 << 20)
    fake.cuts = [hub.CHUNK_BYTES] * 10
    fetch(folder)
    assert_complete(folder, fake)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(fake, folder, status):
    fake.statuses = [status, status, 200, status]
    fetch(folder)
    assert_complete(folder, fake)


def test_a_part_that_is_too_long_or_complete_is_handled(fake, folder):
    (folder / "mimicbrush").mkdir(parents=True)
    (folder / (BIN + ".part")).write_bytes(bytes(6_000_000))
    (folder / "sd-vae-ft-mse").mkdir()
    (folder / (VAE + ".part")).write_bytes(fake.commits[COMMIT][VAE])
    fetch(folder)
    assert_complete(folder, fake)
    assert VAE not in fake.payloads()


def test_an_interruption_keeps_the_part(fake, folder):
    def interrupt(progress):
        if progress.done >= 3 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(folder, interrupt)
    kept = (folder / (BIN + ".part")).stat().st_size
    assert kept == 3 << 20
    fetch(folder)
    assert_complete(folder, fake)
    assert ("file", BIN, f"bytes={kept}-", None) in fake.requests


# --- what is wrong -----------------------------------------------------------------------------------------


def test_a_wrong_hash_is_an_error_and_leaves_no_file(fake, folder):
    fake.payload[BIN] = bytes(5_120_000)
    with pytest.raises(DownloadError) as error:
        fetch(folder)
    assert sha256(bytes(5_120_000)) in str(error.value) and sha256(fake.commits[COMMIT][BIN]) in str(error.value)
    assert set(contents(folder)) == {hub.LOCK_NAME}
    fake.payload.clear()
    fetch(folder)
    assert_complete(folder, fake)


def test_a_stale_part_is_found_out(fake, folder):
    (folder / "mimicbrush").mkdir(parents=True)
    (folder / (BIN + ".part")).write_bytes(bytes(1_000_000))
    with pytest.raises(DownloadError, match="It was removed"):
        fetch(folder)
    fetch(folder)
    assert_complete(folder, fake)


def test_a_file_of_another_size_is_refused_before_anything_is_written(fake, folder):
    fake.payload[BIN] = b"short"
    with pytest.raises(DownloadError, match="5 bytes on the server; the file list says 5120000"):
        fetch(folder)
    assert set(contents(folder)) == {hub.LOCK_NAME}


def test_hashes_that_changed_after_the_lock_are_an_error_naming_both(fake, folder):
    fetch(folder)
    (folder / CONFIG).unlink()
    old = fake.commits[COMMIT][BIN]
    fake.commits[COMMIT][BIN] = b"rewritten"
    with pytest.raises(DownloadError) as error:
        fetch(folder)
    assert sha256(old) in str(error.value) and sha256(b"rewritten") in str(error.value)
    assert BIN in str(error.value) and hub.LOCK_NAME in str(error.value)


def test_a_file_that_went_away_after_the_lock_is_an_error(fake, folder):
    fetch(folder)
    (folder / DEPTH).unlink()
    del fake.commits[COMMIT][DEPTH]
    with pytest.raises(DownloadError, match=f"{DEPTH} is gone"):
        fetch(folder)


def test_another_revision_than_the_locked_one_needs_another_folder(fake, folder):
    fetch(folder)
    with pytest.raises(DownloadError, match=f"(?s){COMMIT}.*{OTHER_COMMIT}.*another folder"):
        fetch(folder, revision=OTHER_COMMIT)
    assert_complete(folder, fake)


def test_a_file_of_the_users_is_never_overwritten(fake, folder):
    fetch(folder)
    mine = bytearray(fake.commits[COMMIT][BIN])
    mine[1000] ^= 1
    (folder / BIN).write_bytes(mine)
    with pytest.raises(ModelFileError, match=f"(?s){sha256(mine)}.*move"):
        fetch(folder)
    (folder / BIN).write_bytes(b"mine")
    with pytest.raises(ModelFileError, match="4 bytes"):
        fetch(folder)
    assert (folder / BIN).read_bytes() == b"mine"


@pytest.mark.parametrize("lock", ["", "[]", '{"format": 9}', '{"format": 1, "revision": "main", "files": {}}'])
def test_an_unusable_lock_file_is_an_error(fake, folder, lock):
    folder.mkdir()
    (folder / hub.LOCK_NAME).write_text(lock)
    with pytest.raises(ModelFileError, match="not a usable lock file"):
        fetch(folder)


BAD_NAMES = [
    "../evil",
    "/etc/evil",
    "a/../../evil",
    "a//b",
    "..\\evil",
    "C:evil",
    "a/./b",
    "evil\n",
    "x/",
    "",
    "a/...",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_malicious_names_are_refused_wherever_they_come_from(fake, folder, name):
    fake.extra_entries = [{"rfilename": name, "size": 4, "lfs": {"sha256": sha256(b"evil"), "size": 4}}]
    with pytest.raises(ArgumentError, match="not a file name"):
        fetch(folder, names=[name])
    fetch(folder, names=[CONFIG])
    assert set(contents(folder.parent)) == {f"{folder.name}/{CONFIG}", f"{folder.name}/{hub.LOCK_NAME}"}
    lock = json.loads((folder / hub.LOCK_NAME).read_text())
    lock["files"][name] = lock["files"].pop(CONFIG)
    (folder / hub.LOCK_NAME).write_text(json.dumps(lock))
    with pytest.raises(ModelFileError, match="lock file"):
        fetch(folder)


@pytest.mark.parametrize("change", [{"size": -1}, {"size": "7"}, {"blobId": "x"}, {"blobId": None}, {"size": True}])
def test_an_entry_without_a_usable_hash_or_size_is_no_file(fake, folder, change):
    listing = json.loads(fake.listing(COMMIT))
    next(entry for entry in listing["siblings"] if entry["rfilename"] == CONFIG).update(change)
    fake.list_content = json.dumps(listing).encode()
    with pytest.raises(DownloadError, match=f"no file {CONFIG}"):
        fetch(folder)


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b"[]", b"{}", b'{"sha": "main", "siblings": []}'])
def test_a_login_page_instead_of_the_list_is_an_error(fake, folder, content):
    fake.list_content = content
    with pytest.raises(DownloadError, match="did not answer with a file list"):
        fetch(folder)
    assert not folder.exists()


def test_a_web_page_instead_of_a_file_is_an_error(fake, folder):
    fake.content_type = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="A web page came instead"):
        fetch(folder)
    assert set(contents(folder)) == {hub.LOCK_NAME}


def test_what_does_not_exist_is_said(fake, folder):
    with pytest.raises(DownloadError, match=r"no revision 'nowhere'.*404"):
        fetch(folder, revision="nowhere")
    with pytest.raises(DownloadError, match=r"no file nothing\.bin"):
        fetch(folder, names=["nothing.bin"])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_token_and_the_manual_steps(fake, folder, status):
    fake.statuses = [status]
    with pytest.raises(DownloadError, match=r"(?s)HF_TOKEN.*By hand"):
        fetch(folder)


def assert_manual_steps(error, folder):
    message = str(error.value)
    assert f"https://huggingface.co/{hub.REPOSITORY}/tree/main" in message and hub.MIRROR_PAGE in message
    for name in (BIN, CONFIG, VAE, DEPTH):
        assert str(folder / name) in message


def test_offline_says_what_to_do_by_hand(fake, folder, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(DownloadError, match="Cannot reach") as error:
        fetch(folder)
    assert_manual_steps(error, folder)


def test_the_offline_switch_is_obeyed(fake, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set") as error:
        fetch(folder)
    assert_manual_steps(error, folder)
    assert fake.requests == []


@pytest.mark.parametrize("endpoint", ["http://huggingface.co", "ftp://127.0.0.1", "file:///etc", "huggingface.co"])
def test_only_https_is_used(fake, folder, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(DownloadError, match="not https"):
        fetch(folder)


@pytest.mark.parametrize("target", ["http://example.org", "file:///etc/passwd"])
def test_a_redirect_away_from_https_is_not_followed(fake, folder, target):
    fake.redirect_to = target
    with pytest.raises(DownloadError, match=r"not https|refused .* \(302\)"):  # urllib itself refuses file:
        fetch(folder)


# --- the disk ----------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(fake, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 60_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"0.07 GB of free space, 0.06 GB are free"):
        fetch(folder)
    assert fake.payloads() == [] and not folder.exists()


def test_a_disk_that_fills_up_keeps_what_arrived(fake, folder, monkeypatch):
    def full(out, chunk, part, real=hub._write):
        if part.stat().st_size >= 2 << 20:
            return real(_FullDisk(), chunk, part)
        return real(out, chunk, part)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"No space left.*kept"):
        patch.setattr(hub, "_write", full)
        fetch(folder)
    assert (folder / (BIN + ".part")).stat().st_size == 2 << 20
    fetch(folder)
    assert_complete(folder, fake)


class _FullDisk:
    def write(self, _):
        raise OSError(28, "No space left on device")


def test_a_folder_that_is_a_file_is_refused(fake, folder):
    folder.write_text("precious")
    with pytest.raises(OutputError, match="is a file"):
        fetch(folder)
    assert folder.read_text() == "precious"


# --- a release whose file names are not known, and whose licence has to be accepted --------------------------

TERMS = "Licence of Some: research only"
UNNAMED = hub.Release(hub.REPOSITORY, terms=TERMS)


@pytest.fixture
def weights(fake):
    """A repository of one large file, as its authors may call it."""
    content = b"weights" * 1000
    fake.commits[COMMIT] = {"some_folder/model-final.ckpt": content, "config.json": b"{}"}
    return content


def test_nothing_is_fetched_before_the_terms_are_accepted_word_for_word(fake, folder, weights):
    plan = hub.plan_download(folder, release=UNNAMED)
    for accepted in ("", "yes", TERMS.lower()):
        with pytest.raises(ArgumentError, match=rf"{TERMS}.*Nothing was fetched.*accept"):
            hub.download(plan, accepted=accepted)
    assert fake.payloads() == [] and not folder.exists()
    hub.download(plan, accepted=TERMS)
    assert contents(folder)["some_folder/model-final.ckpt"] == weights


def test_all_large_files_are_wanted_where_no_name_is_known(fake, folder, weights):
    plan = hub.plan_download(folder, release=UNNAMED)
    assert [file.name for file in plan.missing] == ["some_folder/model-final.ckpt"]
    hub.download(plan, accepted=TERMS)
    requests = len(fake.requests)
    again = hub.plan_download(folder, release=UNNAMED)  # the lock file knows what it was
    assert again.missing == () and again.files == plan.files and len(fake.requests) == requests
    hub.download(again)  # what is there needs no further word


def test_a_repository_without_large_files_is_said_to_have_none(fake, folder):
    fake.commits[COMMIT] = {"config.json": b"{}"}
    with pytest.raises(DownloadError, match="has no weights at commit"):
        hub.plan_download(folder, release=UNNAMED)


def test_by_hand_without_names(fake, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError) as error:
        hub.plan_download(folder, release=UNNAMED)
    message = str(error.value)
    assert f"https://huggingface.co/{hub.REPOSITORY}/tree/main, and put the weights into {folder}." in message
    assert hub.MIRROR_PAGE not in message


def test_another_release_needs_another_folder(fake, folder):
    fetch(folder)
    with pytest.raises(ModelFileError, match="Use another folder"):
        hub.plan_download(folder, release=hub.RELEASES["magic-fixup"])


def test_the_releases_are_of_systems_and_the_terms_those_of_the_configuration():
    assert hub.RELEASES.keys() <= TITLES.keys()
    fixup = hub.RELEASES["magic-fixup"]
    assert fixup.terms == bundled_config("magic_fixup")["licence"]
    assert [release.repository for release in hub.RELEASES.values()] == ["xichenhku/MimicBrush", "HadiZayer/MagicFixup"]


def test_the_command_wants_the_licence_accepted(fake, folder, weights, monkeypatch, capsys):
    monkeypatch.setitem(hub.RELEASES, "magic-fixup", UNNAMED)
    command = ["download", "--system", "magic-fixup", "--into", str(folder), "--yes"]
    assert main(command) == 2
    assert TERMS in (said := capsys.readouterr().err) and "--accept-licence" in said
    assert fake.payloads() == [] and not folder.exists()
    assert main([*command, "--accept-licence"]) == 0
    assert contents(folder)["some_folder/model-final.ckpt"] == weights


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_downloads_and_says_what_to_do_next(fake, folder, capsys):
    assert main(["download", "--into", str(folder), "--yes"]) == 0
    assert_complete(folder, fake)
    said = capsys.readouterr().out
    assert COMMIT in said and "--model" in said and "licences.md" in said
    assert main(["download", "--into", str(folder)]) == 0
    assert "complete" in capsys.readouterr().out


def test_the_command_asks_first(fake, folder, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "n")
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert main(["download", "--into", str(folder)]) == CANCELLED
    assert not folder.exists() and fake.payloads() == []
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert main(["download", "--into", str(folder), "--file", CONFIG]) == 0


def test_without_a_terminal_the_command_wants_yes(fake, folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", type("Pipe", (), {"isatty": lambda self: False})())
    assert main(["download", "--into", str(folder)]) == 2
    assert "--yes" in capsys.readouterr().err and not folder.exists()


def test_an_interrupted_command_says_that_it_can_go_on(fake, folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "_write", interrupt)
        assert main(["download", "--into", str(folder), "--yes"]) == CANCELLED
    assert "same command" in capsys.readouterr().err
    assert main(["download", "--into", str(folder), "--yes"]) == 0
    assert_complete(folder, fake)


def test_the_command_maps_errors_to_exit_codes(fake, folder, monkeypatch):
    assert main(["download", "--into", str(folder), "--yes", "--revision", "nowhere"]) == DOWNLOAD
    folder.write_text("precious")
    assert main(["download", "--into", str(folder), "--yes"]) == OUTPUT
