"""Load, Download and Convert: which files they find, which names they refuse, what they leave on the disk."""

import os
import shutil
import sys

import pytest
import test_hub
import torch
from host_double import NODE_ID, ROOT, Host, InterruptProcessingException, InvalidPrompt, installed, loaded_pack
from model_files import CHECKPOINT, DEPTH, SINGLE, VAE, VAE_FOLDER
from node_pictures import boxes, noise
from node_schemas import EMBEDDED

PATHS = ["../x", "a/b", "/x", "a\\b", "", ".", ".."]
"""Names that are no plain names."""


@pytest.fixture
def models(host):
    """models/mimicbrush, where Load looks; emptied after each test."""
    folder = host.models / "mimicbrush"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def errors(pack):
    return pack.core("errors")


@pytest.fixture
def mine(models, micro):
    """models/mimicbrush/mine.safetensors, the smallest model."""
    return shutil.copy(micro[0] / SINGLE, models / "mine.safetensors")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_names(pack):
    return pack.object_info()["MimicBrushLoad"]["input"]["required"]["model_name"][1]["options"]


# --- Load --------------------------------------------------------------------------------------------------


def test_load_lists_safetensors_files_and_the_embedded_model(pack, models):
    (models / "sub").mkdir()
    for name in ("b.safetensors", "a.SAFETENSORS", "sub/c.safetensors", "notes.txt", "d.ckpt", "e.safetensors.part"):
        (models / name).write_bytes(b"")
    assert model_names(pack) == ["a.SAFETENSORS", "b.safetensors", "sub/c.safetensors", EMBEDDED]


def test_a_folder_of_extra_model_paths_is_kept_and_lists_no_other_files_either(tmp_path):
    extra = tmp_path / "big disk"
    extra.mkdir()
    for name in ("there.safetensors", "readme.txt"):
        (extra / name).write_bytes(b"")
    with installed(Host(tmp_path / "models")):
        sys.modules["folder_paths"].add_model_folder_path("mimicbrush", str(extra))
        with loaded_pack(ROOT) as pack:
            assert model_names(pack) == ["there.safetensors", EMBEDDED]
            (tmp_path / "models" / "mimicbrush").mkdir(parents=True)
            (tmp_path / "models" / "mimicbrush" / "here.safetensors").write_bytes(b"")
            assert model_names(pack) == ["here.safetensors", "there.safetensors", EMBEDDED]


def test_a_user_s_file_is_loaded_and_edits_like_any_other(pack, models):
    (models / "sub").mkdir()
    shutil.copy(pack.core("checkpoints").embedded_model_path(), models / "sub" / "mine.safetensors")
    pictures = []
    for name in ("sub/mine.safetensors", EMBEDDED):
        model = pack.call("Load", model_name=name, precision="fp32").model
        reference = pack.call("EncodeReference", model=model, picture=noise(1, 40, 40)).reference
        given = {"model": model, "reference": reference, "source": noise(1, 48, 64), "mask": boxes(48, 64, (9, 9))}
        pictures.append(pack.call("Sampler", **given).image)
    assert torch.equal(*pictures)


def test_a_missing_file_is_named_with_the_folder_and_the_remedy(pack, models):
    with pytest.raises(InvalidPrompt) as error:
        pack.call("Load", model_name="gone.safetensors")
    for said in ("gone.safetensors", str(models), "Download MimicBrush", "Convert MimicBrush", "press R", EMBEDDED):
        assert said in str(error.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors", "/secret.safetensors"])
def test_names_that_lead_out_of_the_folder_are_refused(pack, models, micro, name):
    secret = shutil.copy(micro[0] / SINGLE, models.parent / "secret.safetensors")
    for one in (name, str(secret)):
        with pytest.raises(InvalidPrompt):
            pack.call("Load", model_name=one)
        with pytest.raises(FileNotFoundError):  # neither do the functions behind the check find it
            pack.nodes["MimicBrushLoad"].fingerprint_inputs(one, "auto")
        with pytest.raises(FileNotFoundError):
            pack.nodes["MimicBrushLoad"].execute(one, "auto")


def test_a_model_name_that_comes_over_a_wire_is_checked_when_it_is_known(pack, errors):
    """Hosts give None for it while they check a prompt, and when they ask whether a node has changed."""
    load = pack.nodes["MimicBrushLoad"]
    assert load.validate_inputs(None) is True
    assert load.fingerprint_inputs(None, "auto") == load.fingerprint_inputs(None, "auto")


def test_a_file_that_changed_is_loaded_again(pack, mine):
    def fingerprint():
        return pack.nodes["MimicBrushLoad"].fingerprint_inputs("mine.safetensors", "auto")

    before = fingerprint()
    assert fingerprint() == before
    os.utime(mine, ns=(1, 1))
    touched = fingerprint()
    assert touched != before
    with open(mine, "ab") as file:
        file.write(b"more")
    os.utime(mine, ns=(1, 1))
    assert fingerprint() != touched


@pytest.mark.parametrize(
    "precision, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_a_precision_s_name_is_the_weights_type(pack, mine, precision, dtype):
    modules = pack.call("Load", model_name="mine.safetensors", precision=precision).model.model.modules
    assert next(modules.unet.parameters()).dtype == dtype
    assert next(modules.depth_network.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "fp16, bf16, dtype",
    [
        (True, True, torch.float16),
        (True, False, torch.float16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_auto_takes_what_the_device_is_good_at(pack, monkeypatch, fp16, bf16, dtype):
    manager = sys.modules["comfy.model_management"]
    monkeypatch.setattr(manager, "should_use_fp16", lambda device: fp16)
    monkeypatch.setattr(manager, "should_use_bf16", lambda device: bf16)
    assert pack.part("host").computing_dtype("auto") == dtype


def test_a_precision_that_does_not_exist_is_refused(pack, errors):
    """ComfyUI 0.3.64 does not check choices, and what comes over a wire no version checks."""
    with pytest.raises(errors.ArgumentError, match="fp8"):
        pack.call("Load", model_name=EMBEDDED, precision="fp8")


def test_weights_can_be_moved_outside_of_inference_mode(pack):
    model = pack.call("Load", model_name=EMBEDDED).model
    assert not any(value.is_inference() for _, module in model.model.modules.items() for value in module.parameters())


def test_a_file_that_is_no_model_is_named(pack, models, errors):
    (models / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(errors.ModelFileError, match=r"broken\.safetensors"):
        pack.call("Load", model_name="broken.safetensors")


# --- Convert -----------------------------------------------------------------------------------------------


@pytest.fixture
def release(pack, host, micro, monkeypatch):
    """models/mimicbrush_release: a tiny model as its authors publish theirs."""
    folder, config = micro
    release = host.models / "mimicbrush_release"
    for name in (CHECKPOINT, VAE, f"{VAE_FOLDER}/config.json", DEPTH):
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, release / name)
    monkeypatch.setattr(pack.core("checkpoints"), "bundled_config", lambda _: config)
    return release


@pytest.mark.parametrize("name", ["mimicbrush", "mimicbrush.safetensors"])
def test_convert_makes_a_file_that_load_lists_under_the_name_it_gives(pack, host, release, name):
    result = pack.call("Convert", name=name)
    assert result.model_name == "mimicbrush.safetensors" == model_names(pack)[0]
    assert set(contents(host.models / "mimicbrush")) == {"mimicbrush.safetensors"}
    assert str(host.models / "mimicbrush" / "mimicbrush.safetensors") in result.ui.text and "Press R" in result.ui.text
    model = pack.call("Load", model_name=result.model_name, precision="fp16").model.model
    assert model.config["precision"] == "fp16" and model.config["name"] == "micro"


def test_convert_shows_each_stage_from_the_start_to_the_end(pack, host, release):
    pack.call("Convert")
    assert len(host.bars) == 3  # hashing, converting, checking
    for bar in host.bars:
        assert bar.values == sorted(bar.values) and bar.updates[-1][0] == bar.updates[-1][1] > 0


def test_convert_does_not_overwrite(pack, host, release, errors):
    (host.models / "mimicbrush").mkdir()
    (host.models / "mimicbrush" / "mine.safetensors").write_bytes(b"precious")
    with pytest.raises(errors.OutputError, match=r"exists already\. Choose another name"):
        pack.call("Convert", name="mine")
    assert contents(host.models / "mimicbrush") == {"mine.safetensors": b"precious"}


def test_convert_s_message_does_not_speak_of_the_command_line(pack, host, release, errors):
    pack.call("Convert")
    with pytest.raises(errors.OutputError) as error:
        pack.call("Convert")
    assert "--" not in str(error.value)


@pytest.mark.parametrize("name", PATHS)
def test_convert_refuses_names_that_are_paths(pack, host, release, errors, name):
    before = contents(host.models)
    with pytest.raises(errors.MimicBrushError, match="plain"):
        pack.call("Convert", name=name)
    with pytest.raises((errors.MimicBrushError, ValueError), match="plain"):
        pack.call("Convert", release=name)
    assert contents(host.models) == before


def test_a_missing_release_is_named(pack, host, errors):
    with pytest.raises(errors.ModelFileError, match=str(host.models / "mimicbrush_release")):
        pack.call("Convert")
    assert contents(host.models) == {}


def test_a_cancelled_conversion_leaves_nothing(pack, host, release):
    host.on_update = lambda bar: host.interrupt() if len(host.bars) == 2 else None
    with pytest.raises(InterruptProcessingException):
        pack.call("Convert")
    assert not list((host.models / "mimicbrush").iterdir())
    host.reset()
    assert pack.call("Convert").model_name == "mimicbrush.safetensors"


# --- Download ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(pack, monkeypatch):
    """A hub on this machine, as in the tests of the core's downloads."""
    fake = test_hub.FakeHub()
    server = test_hub.serve(fake)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(pack.core("hub"), "BACKOFF_SECONDS", 0.0)
    yield fake
    server.shutdown()
    server.server_close()


FETCHED = {test_hub.BIN, test_hub.CONFIG, test_hub.VAE, test_hub.DEPTH}


def test_by_default_download_only_shows_what_it_would_fetch(pack, host, hub):
    result = pack.call("Download")
    assert result.release == "mimicbrush_release"
    for said in (*FETCHED, test_hub.COMMIT, "5.1 MB", str(host.models / "mimicbrush_release")):
        assert said in result.ui.text
    assert hub.payloads() == [] and not host.models.exists()


def test_download_fetches_into_a_folder_of_its_own(pack, host, hub):
    result = pack.call("Download", action="download", folder="weights")
    assert result.release == "weights" and "Complete and verified" in result.ui.text
    found = contents(host.models)
    assert {name for name in found if not name.endswith(".lock.json")} == {f"weights/{name}" for name in FETCHED}
    assert found[f"weights/{test_hub.BIN}"] == hub.commits[test_hub.COMMIT][test_hub.BIN]
    assert model_names(pack) == [EMBEDDED]  # its parts are not offered as models
    assert "Nothing to fetch" in pack.call("Download", folder="weights").ui.text


def test_download_shows_bytes(pack, host, hub):
    pack.call("Download", action="download")
    assert len(host.bars) >= len(FETCHED)
    for bar in host.bars:
        assert bar.values == sorted(bar.values) and bar.updates[-1][0] == bar.updates[-1][1]


def test_a_cancelled_download_goes_on_where_it_stopped(pack, host, hub):
    host.on_update = lambda bar: host.interrupt() if bar.values[-1] >= 2 << 20 else None
    with pytest.raises(InterruptProcessingException):
        pack.call("Download", action="download")
    part = (host.models / "mimicbrush_release" / (test_hub.BIN + ".part")).stat().st_size
    assert 2 << 20 <= part < 5_120_000
    host.reset()
    pack.call("Download", action="download")
    assert ("file", test_hub.BIN, f"bytes={part}-", None) in hub.requests


TERMS = "Licence of Some: research only"
ACCEPTED = "I accept: non-commercial research only"


@pytest.fixture
def restricted(pack, hub, monkeypatch):
    """Magic Fixup's release, on the hub of these tests: one large file, of any name."""
    release = pack.core("hub").Release(test_hub.hub.REPOSITORY, terms=TERMS)
    monkeypatch.setitem(pack.part("files").RELEASED, "Magic Fixup", release)
    hub.commits[test_hub.COMMIT] = {"model-final.ckpt": b"weights" * 1000, "config.json": b"{}"}
    return {"weights": "Magic Fixup", "folder": "fixup"}


def test_what_the_nodes_say_is_on_the_node_and_in_the_history(pack, host, hub, release):
    for call in (lambda: pack.call("Download", folder="weights"), lambda: pack.call("Convert")):
        host.texts.clear()
        assert host.texts == [(NODE_ID, call().ui.text)]


def test_restricted_weights_are_shown_with_their_licence(pack, host, hub, restricted):
    shown = pack.call("Download", **restricted).ui.text
    assert TERMS in shown and "model-final.ckpt" in shown
    assert hub.payloads() == [] and not host.models.exists()


def test_restricted_weights_are_fetched_only_for_those_who_accept_the_licence(pack, host, hub, errors, restricted):
    for given in ({}, {"licence": "not accepted"}):
        with pytest.raises(errors.ArgumentError, match=rf"{TERMS}.*Nothing was fetched"):
            pack.call("Download", action="download", **restricted, **given)
    assert hub.payloads() == [] and not host.models.exists()
    result = pack.call("Download", action="download", **restricted, licence=ACCEPTED)
    assert result.release == "fixup" and "Complete and verified" in result.ui.text
    assert (host.models / "fixup" / "model-final.ckpt").read_bytes() == b"weights" * 1000


@pytest.mark.parametrize("name", ["weights", "licence"])
def test_a_choice_that_does_not_exist_is_refused(pack, hub, errors, name):
    with pytest.raises(errors.ArgumentError, match="magic"):
        pack.call("Download", action="download", **{name: "magic"})
    assert hub.requests == []


@pytest.mark.parametrize("name", PATHS)
def test_download_refuses_folders_that_are_paths(pack, host, hub, errors, name):
    with pytest.raises((errors.MimicBrushError, ValueError), match="plain"):
        pack.call("Download", action="download", folder=name)
    assert hub.requests == [] and not host.models.exists()


def test_offline_says_how_to_do_it_by_hand(pack, host, hub, errors, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(errors.DownloadError, match="By hand"):
        pack.call("Download", action="download")
    assert hub.requests == []


def test_download_s_message_does_not_speak_of_the_command_line(pack, host, hub, errors, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(errors.DownloadError) as error:
        pack.call("Download", action="download")
    assert "--" not in str(error.value) and "command" not in str(error.value)


@pytest.mark.parametrize("node", ["MimicBrushDownload", "MimicBrushConvert"])
def test_what_the_disk_may_have_changed_is_never_answered_from_the_cache(pack, node):
    inputs = [one.id for one in pack.nodes[node].define_schema().inputs]
    state = pack.nodes[node].fingerprint_inputs(**dict.fromkeys(inputs, "x"))
    assert state != state
