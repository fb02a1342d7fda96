"""The pack in a real ComfyUI: a server is started with it, and asked over HTTP as its frontend asks.

Run with the Python of a ComfyUI installation (it needs pytest beside ComfyUI's requirements and ours):

    COMFYUI_PATH=/path/to/ComfyUI python -m pytest tests/host

MIMICBRUSH_RECORD_SCHEMAS=1 writes tests/nodes/schemas.json anew instead of comparing with it.
"""

import copy
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import test_hub
from node_schemas import EMBEDDED, record, recorded, reduced
from PIL import Image

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH is not set: no ComfyUI to test the pack in", allow_module_level=True)

COMFYUI = Path(os.environ["COMFYUI_PATH"]).resolve()
ROOT = Path(__file__).parents[2]
PACK_FOLDER = "weird name-1"
API_PROMPTS = sorted((ROOT / "tests" / "api_prompts").glob("*.json"))
PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp")

START_SECONDS = 300
RUN_SECONDS = 300


class Server:
    """A running ComfyUI whose folders are all in `base`."""

    def __init__(self, base: Path, endpoint: str):
        self.base, self.log_file = base, base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        with open(self.log_file, "wb") as log:
            command = [*comfyui_command(base), "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
            self.process = subprocess.Popen(
                command, cwd=COMFYUI, env=comfyui_environment(endpoint), stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ComfyUI ended with {self.process.returncode}:\n{self.log[-5000:]}"
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise AssertionError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.log[-5000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # -- HTTP

    def fetch(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.fetch(path))

    def post(self, path: str, body: dict) -> dict:
        """The answer; of a refusal its body, too."""
        try:
            return json.loads(self.fetch(path, body) or b"{}")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    # -- prompts

    def queue(self, prompt: dict) -> str:
        answer = self.post("/prompt", {"prompt": prompt})
        assert "prompt_id" in answer and not answer["node_errors"], json.dumps(answer, indent=1)[:4000]
        return answer["prompt_id"]

    def finished(self, prompt_id: str) -> "Run":
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return Run(self, history[prompt_id])
            assert self.process.poll() is None, f"ComfyUI ended:\n{self.log[-5000:]}"
            time.sleep(0.1)
        raise AssertionError(f"The prompt did not end within {RUN_SECONDS} s:\n{self.log[-5000:]}")

    def run(self, prompt: dict) -> "Run":
        return self.finished(self.queue(prompt))

    def succeeded(self, prompt: dict) -> "Run":
        run = self.run(prompt)
        assert run.status == "success", run.error or self.log[-5000:]
        return run


class Run:
    """How a prompt went, from its entry in the history."""

    def __init__(self, server: Server, entry: dict):
        self.server, self.entry = server, entry
        self.messages = dict(entry["status"]["messages"])

    @property
    def status(self) -> str:
        return "interrupted" if "execution_interrupted" in self.messages else self.entry["status"]["status_str"]

    @property
    def cached(self) -> set[str]:
        """The nodes that were not run again."""
        return set(self.messages["execution_cached"]["nodes"])

    @property
    def error(self) -> str:
        return self.messages.get("execution_error", {}).get("exception_message", "")

    def pictures(self, node: str) -> list[np.ndarray]:
        """What a PreviewImage or SaveImage shows."""
        pictures = []
        for shown in self.entry["outputs"][node]["images"]:
            file = self.server.fetch("/view?" + urllib.parse.urlencode(shown))
            with Image.open(io.BytesIO(file)) as picture:
                pictures.append(np.array(picture))
        return pictures


def comfyui_command(base: Path) -> list[str]:
    return [
        *(sys.executable, "main.py", "--cpu", "--disable-api-nodes"),
        *("--base-directory", str(base), "--database-url", "sqlite:///:memory:"),
    ]


def comfyui_environment(endpoint: str = "http://127.0.0.1:9") -> dict[str, str]:
    """One thread, sleeping when idle: more are slower for small models on a busy machine. The only hub to download
    from is `endpoint`."""
    calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONIOENCODING": "utf-8"}
    closed_off = {"HF_ENDPOINT": endpoint, "no_proxy": "127.0.0.1,localhost"}
    in_the_way = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")  # set by tests/conftest.py, or by the user
    kept = {name: value for name, value in os.environ.items() if name not in in_the_way}
    return {**kept, **calm, **closed_off}


@pytest.fixture(scope="module")
def hub():
    """A hub on this machine, as in the tests of the core's downloads."""
    server = test_hub.serve(test_hub.FakeHub())
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, hub):
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "input", "output", "models", "user"):
        (base / folder).mkdir()
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    for picture in (ROOT / "tests" / "api_prompts").glob("*"):
        if picture.suffix in PICTURE_FILES:
            (base / "input" / picture.name).write_bytes(picture.read_bytes())
    server = Server(base, f"http://127.0.0.1:{hub.server_port}")
    try:
        server.wait_until_it_answers()
        yield server
    finally:
        server.stop()


# --- prompts -----------------------------------------------------------------------------------------------


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


SAMPLER_SETTINGS = {
    "steps": 2,
    "guidance": 0.0,
    "sampler": "model's own",
    "scheduler": "model's own",
    "zoom": False,
    "zoom_margin": 0.5,
    "feather": 10,
    "color_match": 0.0,
    "batch_seeds": "same for all",
    "at_once": 4,
}


EDITED = {"MimicBrushSampler": "source", "MimicBrushPaintByExample": "source", "MimicBrushMagicFixup": "original"}
"""Node that edits -> its input of the picture that is edited."""


def example_title() -> str:
    return recorded()["MimicBrushExamplePictures"]["input"]["required"]["example"][1]["options"][0]


def edit_prompt(seed: int = 0, size: int = 0, **sampler) -> dict:
    """Example pictures, edited with the embedded model; the result, the blend mask and the source are shown."""
    wires = {"model": ["load", 0], "source": ["example", 0], "mask": ["example", 1], "reference": ["encode", 0]}
    return {
        "load": node("MimicBrushLoad", model_name=EMBEDDED, precision="auto"),
        "example": node("MimicBrushExamplePictures", example=example_title(), size=128, frames=1),
        "encode": node(
            "MimicBrushEncodeReference",
            **{"model": ["load", 0], "picture": ["example", 2], "weight": 1.0, "start": 0.0, "end": 1.0, "size": size},
        ),
        "sample": node("MimicBrushSampler", **wires, seed=seed, **SAMPLER_SETTINGS | sampler),
        "result": node("PreviewImage", images=["sample", 0]),
        "blend as picture": node("MaskToImage", mask=["sample", 2]),
        "blend": node("PreviewImage", images=["blend as picture", 0]),
        "source": node("PreviewImage", images=["example", 0]),
    }


def watched(prompt: dict) -> tuple[dict, list[tuple[str, str]]]:
    """The prompt with what goes into and comes out of each sampler shown: the prompt, [(source, result)]."""
    prompt, pairs = copy.deepcopy(prompt), []
    for sampler in [name for name, one in prompt.items() if one["class_type"] in EDITED]:
        before, after = f"{sampler} before", f"{sampler} after"
        edited = EDITED[prompt[sampler]["class_type"]]
        prompt[before] = node("PreviewImage", images=prompt[sampler]["inputs"][edited])
        prompt[after] = node("PreviewImage", images=[sampler, 0])
        pairs.append((before, after))
    return prompt, pairs


# --- starting ----------------------------------------------------------------------------------------------


def failed_imports(log: str) -> set[str]:
    return set(re.findall(r"\(IMPORT FAILED\)[: ]*(.+)", log)) | set(re.findall(r"Cannot import (.+?) module", log))


def test_the_pack_is_imported_and_nothing_else_fails_for_it(server):
    assert re.search(rf"seconds: .*{PACK_FOLDER}", server.log), server.log[-3000:]
    failed = failed_imports(server.log)
    assert not [name for name in failed if PACK_FOLDER in name], server.log[-5000:]
    if failed:  # nodes of ComfyUI's own that fail without the pack as well are none of its business
        bare = server.base / "bare"
        (bare / "custom_nodes").mkdir(parents=True)
        command = [*comfyui_command(bare), "--quick-test-for-ci"]
        without = subprocess.run(command, cwd=COMFYUI, env=comfyui_environment(), capture_output=True, text=True)
        assert failed <= failed_imports(without.stdout + without.stderr)


def test_importing_left_the_host_s_own_modules_alone(server):
    assert "MimicBrushSampler" in server.get("/object_info/MimicBrushSampler")
    assert "KSampler" in server.get("/object_info/KSampler")  # of ComfyUI's own `nodes`, the name of our folder


def test_the_nodes_are_what_the_record_says(server):
    info = server.get("/object_info")
    if os.environ.get("MIMICBRUSH_RECORD_SCHEMAS"):
        record(info)
    assert reduced(info) == recorded()
    assert {one["python_module"] for name, one in info.items() if name.startswith("MimicBrush")} == {
        f"custom_nodes.{PACK_FOLDER}"
    }


# --- running -----------------------------------------------------------------------------------------------


def test_an_edit_changes_what_is_masked_and_nothing_else(server):
    run = server.succeeded(edit_prompt())
    [source], [result], [blend] = run.pictures("source"), run.pictures("result"), run.pictures("blend")
    assert source.shape == result.shape == (128, 128, 3)
    outside, inside = blend[..., 0] == 0, blend[..., 0] == 255
    assert inside.any() and np.array_equal(result[outside], source[outside])
    assert np.abs(result[inside].astype(int) - source[inside]).mean() > 1


def test_there_are_api_prompts():
    assert API_PROMPTS, "tests/api_prompts holds no prompts"


@pytest.mark.parametrize("file", API_PROMPTS, ids=lambda file: file.stem)
def test_the_api_prompts_run(server, file):
    prompt, pairs = watched(json.loads(file.read_text()))
    run = server.succeeded(prompt)
    for before, after in pairs:
        sources, results = run.pictures(before), run.pictures(after)
        assert len(results) >= len(sources)
        for index, result in enumerate(results):
            source = sources[index % len(sources)]
            assert result.shape == source.shape
            assert (result != source).any()


def test_another_seed_answers_the_reference_from_the_cache(server):
    first = server.succeeded(edit_prompt(seed=100))
    other = server.succeeded(edit_prompt(seed=101))
    assert {"load", "example", "encode"} <= other.cached and "sample" not in other.cached
    assert not np.array_equal(first.pictures("result")[0], other.pictures("result")[0])


def test_an_interrupt_ends_a_long_run_within_a_few_steps(server):
    server.succeeded(edit_prompt(seed=1, size=256))  # now only the sampler has to run
    began = time.monotonic()
    server.succeeded(edit_prompt(seed=2, size=256, steps=10))
    ten_steps = time.monotonic() - began

    prompt_id = server.queue(edit_prompt(seed=3, size=256, steps=200))
    time.sleep(1 + ten_steps / 4)  # it is under way, and far from done
    assert len(server.get("/queue")["queue_running"]) == 1
    pressed = time.monotonic()
    server.fetch("/interrupt", {})
    run = server.finished(prompt_id)
    assert run.status == "interrupted"
    assert time.monotonic() - pressed < 1 + ten_steps
    assert run.messages["execution_interrupted"]["node_id"] == "sample"

    again = server.succeeded(edit_prompt(seed=2, size=256, steps=10, feather=11))
    assert again.status == "success" and "sample" not in again.cached


def test_after_everything_was_freed_the_same_comes_out(server):
    before = server.succeeded(edit_prompt(seed=7)).pictures("result")[0]
    server.fetch("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)  # the flags are looked at between prompts, about once a second
    run = server.succeeded(edit_prompt(seed=7))
    assert "load" not in run.cached and "encode" not in run.cached
    assert np.array_equal(run.pictures("result")[0], before)


def test_download_shows_its_plan_then_fetches_and_is_never_answered_from_the_cache(server, hub):
    def texts(action):
        prompt = {"download": node("MimicBrushDownload", action=action, folder="release")}
        return "".join(server.succeeded(prompt).entry["outputs"]["download"]["text"])

    show, fetch = recorded()["MimicBrushDownload"]["input"]["required"]["action"][1]["options"]
    plan = texts(show)
    assert test_hub.BIN in plan and test_hub.COMMIT in plan and str(server.base / "models" / "release") in plan
    assert hub.fake.payloads() == []
    assert "Complete and verified" in texts(fetch)
    fetched = server.base / "models" / "release" / test_hub.BIN
    assert fetched.stat().st_size == 5_120_000
    assert "Nothing to fetch" in texts(show)
    fetched.unlink()
    assert test_hub.BIN in texts(show)


# --- what goes wrong ---------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_named_with_the_remedy_and_the_rest_runs(server):
    prompt = edit_prompt(seed=8)
    prompt["load"]["inputs"]["model_name"] = "gone.safetensors"
    answer = server.post("/prompt", {"prompt": prompt})
    [error] = answer["node_errors"]["load"]["errors"]
    for said in ("gone.safetensors", str(server.base / "models" / "mimicbrush"), "Download MimicBrush", "press R"):
        assert said in error["details"]
    run = server.finished(answer["prompt_id"])
    assert run.status == "success" and run.pictures("source") and "result" not in run.entry["outputs"]


def test_an_empty_mask_is_told_in_our_words(server):
    prompt = edit_prompt(seed=9)
    prompt["nothing"] = node("SolidMask", value=0.0, width=64, height=64)
    prompt["sample"]["inputs"]["mask"] = ["nothing", 0]
    run = server.run(prompt)
    assert run.status == "error" and "mask is empty" in run.error and "Paint the region" in run.error


@pytest.mark.parametrize("name, option", [("load", "precision"), ("sample", "sampler"), ("sample", "batch_seeds")])
def test_an_option_that_does_not_exist_never_runs(server, name, option):
    """Newer hosts refuse to queue it; ComfyUI 0.3.64 leaves it to the node."""
    prompt = edit_prompt(seed=10)
    prompt[name]["inputs"][option] = "magic"
    answer = server.post("/prompt", {"prompt": prompt})
    if not answer["node_errors"]:
        run = server.finished(answer["prompt_id"])
        assert run.status == "error" and "magic" in run.error


def test_a_model_in_the_folder_is_listed_after_a_refresh_and_runs(server):
    folder = server.base / "models" / "mimicbrush"
    folder.mkdir(exist_ok=True)
    (folder / "mine.safetensors").write_bytes(
        (ROOT / "mimicbrush_core" / "assets" / "mimicbrush_small.safetensors").read_bytes()
    )
    (folder / "notes.txt").write_text("no model")
    [options] = [
        info["input"]["required"]["model_name"][1]["options"]
        for info in server.get("/object_info/MimicBrushLoad").values()
    ]
    assert options == ["mine.safetensors", EMBEDDED]
    prompt = edit_prompt(seed=7)
    prompt["load"]["inputs"]["model_name"] = "mine.safetensors"
    mine, embedded = server.succeeded(prompt), server.succeeded(edit_prompt(seed=7))
    assert np.array_equal(mine.pictures("result")[0], embedded.pictures("result")[0])


def test_the_server_met_nothing_unexpected(server):
    """Last in this module: what the runs above left in the log."""
    errors = re.findall(r"^(\w*(?:Error|Exception)\b.*)", server.log, re.MULTILINE)
    expected = ("PictureError", "ArgumentError", "InterruptProcessingException")
    assert [line for line in errors if not any(name in line for name in expected)] == []
