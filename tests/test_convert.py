"""Converting: the same numbers out of one file, and the old state or the finished file however it ends."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_files import CHECKPOINT, DEPTH, SINGLE, UNET_KEY, VAE, VAE_FOLDER, flip
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mimicbrush_core import weight_files
from mimicbrush_core.checkpoints import METADATA_KEY, load_modules, save_modules
from mimicbrush_core.cli import main
from mimicbrush_core.convert import CHECKING, CONVERTING, HASHING, convert
from mimicbrush_core.errors import ArgumentError, Cancelled, ModelFileError, OutputError
from mimicbrush_core.systems.mimicbrush import EditSettings, MimicBrush
from mimicbrush_core.verify import inspect
from mimicbrush_core.weight_files import CHECKSUM_KEY, SafetensorsWriter, check_integrity, file_sha256

OLD = b"what was there before"


@pytest.fixture
def output(tmp_path):
    """In a folder of its own, so that whatever is left there is seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.safetensors"


def states(modules):
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def assert_same_weights(one, other):
    one, other = states(one), states(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# -------------------- the numbers


@pytest.fixture(scope="module")
def inexact_folder(original_folder, config, tmp_path_factory):
    """The recorded model with weights that neither half precision can hold."""
    folder = shutil.copytree(original_folder, tmp_path_factory.mktemp("inexact") / "MimicBrush")
    parts = torch.load(folder / CHECKPOINT, weights_only=True)
    for state in parts.values():
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = value.float() * (1 + 1e-5)
    torch.save(parts, folder / CHECKPOINT)
    return folder


def test_fp32_gives_bit_for_bit_the_original_s_picture(inexact_folder, config, golden_picture, output):
    convert(inexact_folder, output, precision="fp32", config=config)
    original, converted = MimicBrush.load(inexact_folder, config=config), MimicBrush.load(output)
    assert_same_weights(original.modules, converted.modules)
    source, reference = golden_picture("landscape_source"), golden_picture("landscape_reference")
    mask = torch.zeros(source.shape[:2]).numpy()
    mask[20:60, 30:90] = 1
    settings = EditSettings(size=64, steps=2, keep_shape=True)
    ours, theirs = (one.edit(source, mask, reference, settings) for one in (converted, original))
    assert (ours.raw == theirs.raw).all() and (ours.picture == theirs.picture).all()
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize(("precision", "dtype"), (("fp16", torch.float16), ("bf16", torch.bfloat16)))
def test_half_precision_gives_what_the_original_gives_in_it(inexact_folder, config, output, precision, dtype):
    convert(inexact_folder, output, precision=precision, config=config)
    ours, _ = load_modules(output, dtype=dtype)
    theirs, _ = load_modules(inexact_folder, config=config, dtype=dtype)
    assert_same_weights(ours, theirs)  # the depth network among them, in float32
    kept = {value.dtype for name, value in load_file(output).items() if name.startswith("depth_network.")}
    others = {value.dtype for name, value in load_file(output).items() if not name.startswith("depth_network.")}
    assert kept == {torch.float32} and others == {dtype}


def test_header_says_what_it_is_and_where_it_comes_from(world, output):
    convert(world.folder, output, precision="bf16", config=world.config)
    config = json.loads(header_of(output)[METADATA_KEY])
    assert config["system"] == "mimicbrush" and config["version"] == 1 and config["precision"] == "bf16"
    assert config["converter"].startswith("mimicbrush ") and config["unet"] == world.config["unet"]
    for role, name in (("checkpoint", CHECKPOINT), ("vae", VAE), ("depth", DEPTH)):
        file = world.file(name)
        assert config["origin"][role] == {
            "name": file.name,
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
    report = inspect(output)
    assert report.usable and any(file_sha256(world.file(VAE)) in note for note in report.notes)


def test_a_single_file_is_converted_again_and_remembers(world, output):
    convert(world.folder, output, precision="fp32", config=world.config)
    again = output.with_name("again.safetensors")
    convert(output, again, precision="fp16")
    origin = json.loads(header_of(again)[METADATA_KEY])["origin"]
    assert origin["model"]["sha256"] == file_sha256(output)
    assert origin["origin"]["checkpoint"]["name"] == "mimicbrush.bin"
    ours, theirs = (
        load_modules(again)[0],
        load_modules(world.folder, config=world.config, dtype=torch.float16)[0],
    )
    for name, value in states(ours).items():
        assert torch.equal(value, states(theirs)[name].float()), name


def test_other_vae_and_old_pickle(world, output):
    moved = shutil.move(world.file(VAE_FOLDER), world.folder.parent / "elsewhere")
    world.save_parts(world.parts(), _use_new_zipfile_serialization=False)
    convert(world.folder, output, precision="fp32", vae=moved, depth=world.file(DEPTH), config=world.config)
    ours, _ = load_modules(output)
    theirs, _ = load_modules(world.folder, vae=moved, config=world.config)
    assert_same_weights(ours, theirs)


def test_progress(world, output):
    steps = []
    convert(world.folder, output, config=world.config, on_progress=lambda *step: steps.append(step))
    assert list(dict.fromkeys(stage for stage, *_ in steps)) == [HASHING, CONVERTING, CHECKING]
    for wanted in (HASHING, CONVERTING, CHECKING):
        done = [(count, total) for stage, count, total in steps if stage == wanted]
        assert done == sorted(done) and len({total for _, total in done}) == 1
        assert 0.9 * done[-1][1] < done[-1][0] <= done[-1][1]


# -------------------- refusing


@pytest.mark.parametrize("value", (torch.nan, torch.inf, 70000.0))
def test_values_that_are_not_numbers_or_too_large(world, output, value):
    world.change_tensors(SINGLE, lambda tensors: tensors[f"unet.{UNET_KEY}"].view(-1)[3].fill_(value))
    with pytest.raises(ModelFileError, match=UNET_KEY):
        convert(world.file(SINGLE), output)
    assert os.listdir(output.parent) == []


def test_damage_that_only_checksums_show_is_not_converted(world, output):
    flip(world.file(SINGLE), -1)
    with pytest.raises(ModelFileError, match="SHA-256"):
        convert(world.file(SINGLE), output)
    assert os.listdir(output.parent) == []


def test_wrong_arguments(world, output):
    with pytest.raises(ArgumentError, match="fp8"):
        convert(world.file(SINGLE), output, precision="fp8")
    with pytest.raises(OutputError, match=r"\.safetensors"):
        convert(world.file(SINGLE), output.with_suffix(".bin"))
    with pytest.raises(OutputError, match="does not exist"):
        convert(world.file(SINGLE), output.parent / "missing" / "x.safetensors")
    output.write_bytes(OLD)
    with pytest.raises(OutputError, match="allow it to be overwritten"):
        convert(world.file(SINGLE), output)
    assert output.read_bytes() == OLD
    with pytest.raises(OutputError, match="what is to be converted"):
        convert(world.file(SINGLE), world.file(SINGLE), overwrite=True)
    source = world.file(SINGLE).rename(output.with_name(output.name + ".unfinished"))
    with pytest.raises(OutputError, match="what is to be converted"):
        convert(source, output, overwrite=True)
    assert inspect(source).usable
    folder = output.with_name("folder.safetensors")
    folder.mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        convert(source, folder, overwrite=True)


def test_too_little_space_is_seen_before_anything_is_written(world, output, monkeypatch):
    usage = shutil.disk_usage(output.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    output.write_bytes(OLD)
    with pytest.raises(OutputError, match="GB free"):
        convert(world.file(SINGLE), output, overwrite=True)
    assert output.read_bytes() == OLD and os.listdir(output.parent) == [output.name]


# -------------------- ending early


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", (0, 60_000, 100_000, 200_000))
@pytest.mark.parametrize("before", (None, OLD))
def test_full_disk(world, output, monkeypatch, room, before):
    if before:
        output.write_bytes(before)

    def limited(path, mode="r", **how):
        file = open(path, mode, **how)  # noqa: SIM115 (closed by its user)
        return FullDisk(file, room) if "x" in mode else file

    monkeypatch.setattr(weight_files, "open", limited, raising=False)
    with pytest.raises(OutputError, match="No space left"):
        convert(world.file(SINGLE), output, overwrite=True)
    assert_old_state(output, before)


def assert_old_state(output, before):
    assert os.listdir(output.parent) == ([output.name] if before else [])
    assert not before or output.read_bytes() == before


@pytest.mark.parametrize("stage", (HASHING, CONVERTING, CHECKING))
def test_cancelled(world, output, stage):
    output.write_bytes(OLD)

    def cancel(now, done, total):
        if now == stage and done > total / 2:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        convert(world.file(SINGLE), output, overwrite=True, on_progress=cancel)
    assert_old_state(output, OLD)


def test_what_does_not_read_back_is_not_kept(world, output, monkeypatch):
    real = os.fsync

    def damage(handle):
        os.pwrite(handle, b"\xff", 100_000)
        real(handle)

    monkeypatch.setattr(os, "fsync", damage)
    output.write_bytes(OLD)
    with pytest.raises(OutputError, match="does not read back"):
        convert(world.file(SINGLE), output, overwrite=True)
    assert_old_state(output, OLD)


def kill_at(point):
    """Die without any clean-up when `point` is reached; ("tensor", n), or a function of os before or after it ran."""
    what, when = point
    if what == "tensor":
        real, count = SafetensorsWriter.write, [0]

        def write(self, name, value):
            if count[0] == when:
                os._exit(9)
            count[0] += 1
            real(self, name, value)

        SafetensorsWriter.write = write
        return
    real = getattr(os, what)

    def call(*arguments):
        if when == "after":
            real(*arguments)
        os._exit(9)

    setattr(os, what, call)


POINTS = [
    ("tensor", 0),
    ("tensor", 1),
    ("tensor", 150),
    ("tensor", -1),
    ("fsync", "before"),
    ("fsync", "after"),
    ("replace", "before"),
    ("replace", "after"),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("before", (None, OLD), ids=("new", "old"))
@pytest.mark.parametrize("point", POINTS, ids=lambda point: "-".join(map(str, point)))
def test_killed_at_any_point(world, output, point, before):
    if before:
        output.write_bytes(before)
    if point == ("tensor", -1):
        point = ("tensor", len(load_file(world.file(SINGLE))) - 1)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        kill_at(point)
        convert(world.file(SINGLE), output, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    finished = point == ("replace", "after")
    if finished:
        assert inspect(output).usable and check_integrity(output)
    elif before:
        assert output.read_bytes() == before
    else:
        assert not output.exists()
    leftovers = {name for name in os.listdir(output.parent) if name != output.name}
    assert leftovers <= {output.name + ".unfinished"} and bool(leftovers) != finished
    if point[0] == "fsync":  # the next run cleans up, whatever lies there
        convert(world.file(SINGLE), output, overwrite=True)
        assert os.listdir(output.parent) == [output.name] and inspect(output).usable


SLOW = """
import sys, time
from mimicbrush_core.convert import convert
from mimicbrush_core.weight_files import SafetensorsWriter
real = SafetensorsWriter.write
def write(self, name, value):
    real(self, name, value)
    self._file.flush()
    time.sleep(0.05)
SafetensorsWriter.write = write
convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("how", ("SIGKILL", "SIGTERM"))
def test_killed_from_outside(world, output, how):
    output.write_bytes(OLD)
    unfinished = output.with_name(output.name + ".unfinished")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", SLOW, str(world.file(SINGLE)), str(output)]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            if unfinished.exists() and unfinished.stat().st_size > 90_000:
                break
            time.sleep(0.02)
        process.send_signal(getattr(signal, how))
        assert process.wait(60) != 0
    assert output.read_bytes() == OLD
    assert unfinished.exists()


def test_a_leftover_that_is_a_link_is_not_followed(world, output, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(OLD)
    output.with_name(output.name + ".unfinished").symlink_to(precious)
    convert(world.file(SINGLE), output)
    assert precious.read_bytes() == OLD and os.listdir(output.parent) == [output.name]


# -------------------- the writer


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64))
def test_the_library_reads_what_the_writer_writes(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    values = {
        "first": torch.arange(6).reshape(2, 3).to(dtype),
        "a name \u00fc \"'": torch.arange(5).to(dtype),
        "nothing": torch.zeros(0, 4, dtype=dtype),
        "scalar": torch.tensor(7, dtype=dtype),
        "turned": torch.arange(12).reshape(3, 4).to(dtype).T,
    }
    layout = {name: (dtype, value.shape) for name, value in values.items()}
    with SafetensorsWriter(path, layout, {"note": "text ü"}) as writer:
        for name, value in values.items():
            writer.write(name, value)
        writer.finish()
    assert path.stat().st_size == writer.bytes
    read = load_file(path)
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == dtype and torch.equal(read[name], value)
    metadata = header_of(path)
    assert metadata["note"] == "text ü" and len(metadata[CHECKSUM_KEY]) == 64 and check_integrity(path)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_the_writer_refuses_wrong_use(tmp_path):
    path = tmp_path / "a.safetensors"
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    for name, value in (("b", torch.zeros(3)), ("a", torch.zeros(3)), ("a", torch.zeros(2).half())):
        with pytest.raises(ValueError, match="is next"), SafetensorsWriter(path, layout, {}) as writer:
            writer.write(name, value)
    with pytest.raises(ValueError, match="not written"), SafetensorsWriter(path, layout, {}) as writer:
        writer.write("a", torch.zeros(2))
        writer.finish()
    with pytest.raises(ValueError, match="aligned"):
        SafetensorsWriter(path, {"a": (torch.float16, (1,)), "b": (torch.float32, (1,))}, {})
    assert os.listdir(tmp_path) == []


def test_files_of_the_library_s_own_writer_convert_as_well(world, output):
    """As written before there was a checksum, the embedded model among them."""
    with safe_open(world.file(SINGLE), "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != CHECKSUM_KEY}
    save_file(load_file(world.file(SINGLE)), world.file(SINGLE), metadata=metadata)
    assert not check_integrity(world.file(SINGLE))
    convert(world.file(SINGLE), output, precision="fp32")
    assert_same_weights(load_modules(output)[0], load_modules(world.file(SINGLE))[0])


def test_saving_a_model_uses_the_same_writer(world, output):
    modules, config = load_modules(world.file(SINGLE))
    save_modules(output, modules, config, torch.float16)
    assert check_integrity(output) and inspect(output).usable


def test_convert_command(world, output, capsys):
    assert main(["convert", str(world.file(SINGLE)), "-o", str(output), "--precision", "bf16"]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert main(["convert", str(world.file(SINGLE)), "-o", str(output)]) == 5
    assert main(["convert", str(world.file(SINGLE)), "-o", str(output), "--overwrite"]) == 0
    assert main(["convert", str(world.folder / "missing"), "-o", str(output), "--overwrite"]) == 4
    assert main(["verify", str(output)]) == 0
