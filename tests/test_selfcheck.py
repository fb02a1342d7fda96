"""The self-check: what it finds on good and on spoiled models, and that its report is whole and private."""

import base64
import dataclasses
import getpass
import hashlib
import io
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimicbrush_core import selfcheck
from mimicbrush_core.cli import main
from mimicbrush_core.errors import ArgumentError
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.selfcheck import check_model, model_files, random_model, to_html, without_names


@pytest.fixture(scope="module")
def small():
    return random_model("mimicbrush_small")


def checked(model, examples=EXAMPLES[:1], **options):
    return check_model(lambda: model, {}, "cpu", **{"steps": 1, "examples": examples} | options)


@pytest.fixture(scope="module")
def report(small):
    return checked(small, (EXAMPLES[0], EXAMPLES[3]))


def failed(report):
    return [check.name for check in report.checks if not check.passed]


def test_a_sound_model_passes(report):
    assert failed(report) == [] and report.passed
    assert len(report.checks) == 2 * 3 + 3
    assert [timing.example for timing in report.timings] == ["part", "texture"]
    assert all(value > 0 for timing in report.timings for value in dataclasses.astuple(timing)[1:])
    assert report.settings["size"] == 128 and report.settings["steps"] == 1


def test_the_memory_holds_at_least_the_weights(report, small):
    weights = sum(value.numel() * 4 for _, part in small.modules.items() for value in part.parameters())
    assert report.memory["weights"] * 2**30 == pytest.approx(weights, rel=0.01)
    assert report.memory["peak of the process"] > report.memory["weights"]


def test_random_weights_are_reproducible_and_finite(small):
    again = random_model("mimicbrush_small")
    for (_, one), (_, other) in zip(small.modules.items(), again.modules.items(), strict=True):
        for value, same in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert not value.is_meta and torch.isfinite(value).all() and torch.equal(value, same)


def test_the_real_configuration_is_known_and_halves_keep_the_depth_network_exact():
    model = random_model("mimicbrush_small", dtype=torch.float16)
    assert model.dtype == torch.float16 and model.modules.depth_network.dtype == torch.float32
    assert {path.name for path in selfcheck.Path(selfcheck.__file__).with_name("configs").glob("*sd15*")}


def test_another_size_is_used(small):
    assert checked(small, size=192).pictures[0][4].shape == (192, 192, 3)


@pytest.mark.parametrize("options", [{"steps": 0}, {"size": 0}, {"size": 100}, {"steps": 5000}])
def test_wrong_settings_are_refused(small, options):
    with pytest.raises(ArgumentError):
        checked(small, **options)


@pytest.fixture
def spoiled():
    return random_model("mimicbrush_small")


def test_nan_weights_are_found(spoiled):
    spoiled.modules.vae.decoder.layers[-1].bias.fill_(float("nan"))
    names = failed(checked(spoiled))
    assert "part: all values are finite" in names and "part: pixels beyond the feather are unchanged" not in names


def test_a_model_that_ignores_the_reference_is_found(spoiled, monkeypatch):
    original = type(spoiled).sample
    monkeypatch.setattr(
        type(spoiled),
        "sample",
        lambda self, condition, _, *rest, **more: original(self, condition, [], *rest, **more),
    )
    assert "weight 0 differs from weight 1" in failed(checked(spoiled))


def test_an_unconditional_row_that_sees_the_reference_is_found(spoiled, monkeypatch):
    shape = spoiled.unconditional_tokens().shape
    monkeypatch.setattr(type(spoiled), "unconditional_tokens", lambda self: self.leaked)
    spoiled.leaked = torch.zeros(shape)
    original = type(spoiled).sample

    def leaking(self, condition, references, noise, scheduler, guidance, **more):
        self.leaked = torch.full(shape, 3.0 if any(use.weight for use in references) else 0.0)
        return original(self, condition, references, noise, scheduler, guidance, **more)

    monkeypatch.setattr(type(spoiled), "sample", leaking)
    assert "the unconditional row does not see the reference" in failed(checked(spoiled))


def test_an_edit_that_differs_from_itself_is_found(spoiled, monkeypatch):
    counter = iter(range(1000))
    monkeypatch.setattr(
        selfcheck.images, "from_model_range", lambda _: np.full((1, 128, 128, 3), next(counter), np.uint8)
    )
    assert "the same seed twice gives the same picture" in failed(checked(spoiled))


def test_an_error_becomes_a_failed_check_and_a_report(spoiled, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError(f"out of memory in {Path.home()}/secret/model.bin")

    monkeypatch.setattr(type(spoiled), "sample", out_of_memory)
    report = checked(spoiled)
    assert failed(report) == ["example 'part' runs", "comparisons runs"]
    assert "out of memory" in report.checks[0].detail and "secret" not in to_html(report)


# --- the report --------------------------------------------------------------------------------------------


def test_the_report_is_one_file_with_its_pictures_inside(report):
    page = to_html(report)
    assert "All checks passed" in page and page.count("<tr><td class='passed'>") == len(report.checks)
    assert not re.search(r"(src|href)='(?!data:)", page)
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 2 * 4
    last = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[3]))))
    assert np.array_equal(last, report.pictures[0][4])
    figures = json.loads(re.search(r"id='figures'>(.*?)</script>", page, re.DOTALL)[1])
    assert figures["passed"] is True and len(figures["timings"]) == 2 and figures["machine"]["torch"]


def test_text_in_the_report_is_escaped(report):
    strange = dataclasses.replace(report, model={"name": "</script><b>&"})
    page = to_html(strange)
    assert "</script><b>" not in page and "&lt;/script&gt;" in page


def test_the_report_names_no_user_host_or_path(report):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", to_html(report))
    for name in (socket.gethostname(), str(Path.home()), str(Path.cwd()), f" {getpass.getuser()} "):
        assert name not in text


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("cannot open /home/ada/My/model.bin: no", "cannot open (path): no"),
        (r"cannot open C:\Users\ada\model.bin", "cannot open (path)"),
        ("on lovelace-pc by ada", "on (name) by (name)"),
        ("1/2 and bf16/fp32 stay, adapter too", "1/2 and bf16/fp32 stay, adapter too"),
    ],
)
def test_names_and_paths_are_taken_out(monkeypatch, text, cleaned):
    monkeypatch.setattr(selfcheck, "_private_names", lambda: ["lovelace-pc", "ada"])
    assert without_names(text) == cleaned


# --- files and the command ---------------------------------------------------------------------------------


def test_files_are_known_by_their_roles(original_folder, tmp_path):
    files = model_files(original_folder)
    assert set(files) == {"checkpoint", "vae (json)", "vae (safetensors)", "depth"}
    assert model_files(original_folder / "mimicbrush" / "mimicbrush.bin") == files
    single = tmp_path / "ada's model.safetensors"
    single.write_bytes(b"x")
    assert model_files(single) == {"model": single}
    assert set(model_files(original_folder, vae=single)) == {"checkpoint", "vae", "depth"}
    assert model_files(tmp_path / "nothing") == {}


def test_files_are_hashed(small, tmp_path):
    file = tmp_path / "private.bin"
    file.write_bytes(b"weights")
    report = check_model(lambda: small, {"checkpoint": file}, "cpu", steps=1, examples=EXAMPLES[:1])
    assert report.files == {"checkpoint": hashlib.sha256(b"weights").hexdigest()}
    assert report.files["checkpoint"] in to_html(report) and "private" not in to_html(report)


@pytest.fixture
def one_example(monkeypatch):
    monkeypatch.setattr(
        selfcheck.check_model,
        "__kwdefaults__",
        selfcheck.check_model.__kwdefaults__ | {"examples": EXAMPLES[:1]},
    )


def test_the_command_writes_the_report(one_example, tmp_path, capsys):
    folder = tmp_path / "check"
    assert main(["selfcheck", "--random", "small", "--steps", "1", "--device", "cpu", "-o", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["selfcheck.html"]
    assert "passed  weight 0 differs" in capsys.readouterr().out


def test_the_command_ends_with_an_error_when_a_check_fails(one_example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "_apart", lambda *_: float("nan"))
    arguments = ["selfcheck", "--random", "small", "--steps", "1", "--device", "cpu", "-o", str(tmp_path)]
    assert main(arguments) == 1
    assert "2 of 6 checks failed" in capsys.readouterr().err
    assert "Some checks failed" in (tmp_path / "selfcheck.html").read_text()


def test_a_missing_model_is_a_model_error(tmp_path, capsys):
    assert main(["selfcheck", "--model", str(tmp_path / "nothing"), "-o", str(tmp_path), "--device", "cpu"]) == 4
    assert "nothing" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_an_output_error(one_example, tmp_path):
    (tmp_path / "selfcheck.html").mkdir()
    arguments = ["selfcheck", "--random", "small", "--steps", "1", "--device", "cpu", "-o", str(tmp_path)]
    assert main(arguments) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["selfcheck.html"]
