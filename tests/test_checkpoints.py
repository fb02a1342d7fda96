"""Files -> modules: both layouts, foreign key names, damage reported with file and key."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mimicbrush_core import keys
from mimicbrush_core.checkpoints import METADATA_KEY, embedded_model_path, load_modules, save_modules
from mimicbrush_core.errors import ModelFileError, OutputError
from mimicbrush_core.modules import bundled_config
from mimicbrush_core.systems.mimicbrush import MimicBrush

VAE_FILE = "diffusion_pytorch_model.safetensors"


def states(modules):
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def assert_equal_states(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.fixture
def folder(original_folder, tmp_path):
    """A copy of the release that a test may spoil."""
    return shutil.copytree(original_folder, tmp_path / "MimicBrush")


@pytest.fixture(scope="session")
def single_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_modules(path, model.modules, model.config, torch.float16)
    return path


@pytest.fixture
def vae_state(original_folder):
    return load_file(original_folder / "sd-vae-ft-mse" / VAE_FILE)


def refusal(path, config=None, **files):
    """The message with which loading is refused; it always names the file or folder."""
    with pytest.raises(ModelFileError) as caught:
        load_modules(path, config=config, **files)
    return str(caught.value)


# -------------------- loading what is right


def test_release_is_loaded_exactly(model, original_parts, vae_state):
    modules = model.modules
    for part, original in (
        ("unet", "unet"),
        ("reference_unet", "referencenet"),
        ("image_projection", "image_proj"),
        ("depth_projector", "depth_guider"),
    ):
        expected = {name: value.float() for name, value in original_parts[original].items()}
        assert_equal_states(getattr(modules, part).state_dict(), expected)
    assert_equal_states(modules.vae.state_dict(), {name: value.float() for name, value in vae_state.items()})
    for _, module in modules.items():
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())


@pytest.mark.parametrize("inside", ("", "mimicbrush", "mimicbrush/mimicbrush.bin"))
def test_ways_to_name_the_release(original_folder, config, model, inside):
    if inside == "mimicbrush":
        assert "no vae" in refusal(original_folder / inside, config)
        return
    modules, found = load_modules(original_folder / inside, config=config)
    assert_equal_states(states(modules), states(model.modules))
    assert found["unet"] == config["unet"] and found["vae"]["scaling_factor"] == 0.18215


def test_half_precision_keeps_the_depth_network_in_float32(original_folder, config):
    modules, _ = load_modules(original_folder, config=config, dtype=torch.float16)
    for part, module in modules.items():
        expected = torch.float32 if part == "depth_network" else torch.float16
        assert {parameter.dtype for parameter in module.parameters()} == {expected}, part


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_round_trip(model, tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    save_modules(path, model.modules, model.config, dtype)
    loaded = MimicBrush.load(path)
    # The recorded weights are exact in float16, so nothing may change either way.
    assert_equal_states(states(loaded.modules), states(model.modules))
    assert loaded.config == model.config
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_round_trip_of_weights_that_half_precision_cannot_hold(model, tmp_path):
    config = model.config
    projection = model.modules.image_projection
    exact = projection.projector.weight.detach().clone()
    try:
        projection.projector.weight.data += 1e-5 * torch.sin(torch.arange(exact.numel())).view_as(exact)
        changed = projection.projector.weight.detach().clone()
        for dtype in (torch.float32, torch.float16):
            save_modules(tmp_path / f"{dtype}.safetensors", model.modules, config, dtype)
    finally:
        projection.projector.weight.data.copy_(exact)
    full, half = (
        load_modules(tmp_path / f"{dtype}.safetensors")[0].image_projection.projector.weight
        for dtype in (torch.float32, torch.float16)
    )
    assert torch.equal(full, changed)
    assert not torch.equal(half, changed) and torch.allclose(half, changed, rtol=2**-11, atol=1e-7)


def test_a_loaded_single_file_predicts_the_same(model, single_file, golden_picture):
    loaded = MimicBrush.load(single_file)
    picture = golden_picture("landscape_reference")
    ours, theirs = (one.encode_reference(picture, size=64) for one in (loaded, model))
    assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(loaded.no_depth_map(), model.no_depth_map())


def test_saving_where_nothing_can_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        save_modules(tmp_path / "file" / "model.safetensors", model.modules, model.config, torch.float16)


def test_failed_saving_keeps_the_old_file(model, single_file, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    shutil.copy(single_file, path)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="no space left"):
        save_modules(path, model.modules, model.config, torch.float32)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


# -------------------- other people's key names


def to_single_file_names(state, levels=4):
    """diffusers' VAE names -> single-file names, written from the original's module tree."""
    result = {}
    for name, value in state.items():
        side, _, rest = name.partition(".")
        words = rest.split(".")
        if side not in ("encoder", "decoder"):
            result[name] = value
            continue
        if words[0] == "conv_norm_out":
            words[0] = "norm_out"
        elif words[0] == "mid_block" and words[1] == "resnets":
            words[:3] = ["mid", f"block_{int(words[2]) + 1}"]
        elif words[0] == "mid_block":
            parts = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            part = parts[words[3]]
            words = ["mid", "attn_1", part, words[-1]]
            if part != "norm" and value.ndim == 2:
                value = value[:, :, None, None]
        elif words[0] == "down_blocks":
            tail = ["block", *words[3:]] if words[2] == "resnets" else ["downsample", *words[4:]]
            words = ["down", words[1], *tail]
        elif words[0] == "up_blocks":
            tail = ["block", *words[3:]] if words[2] == "resnets" else ["upsample", *words[4:]]
            words = ["up", str(levels - 1 - int(words[1])), *tail]
        words = ["nin_shortcut" if word == "conv_shortcut" else word for word in words]
        result[".".join([side, *words])] = value
    return result


@pytest.fixture
def single_file_vae(vae_state, model):
    state = to_single_file_names(vae_state)
    assert "decoder.up.3.block.0.norm1.weight" in state
    back = convert_ldm_vae_checkpoint(dict(state), {**model.modules.vae.config})
    assert_equal_states(back, vae_state)
    return state


@pytest.mark.parametrize("layout", ("bare", "full checkpoint", "state_dict", "pickle"))
def test_single_file_vae(original_folder, config, model, single_file_vae, tmp_path, layout):
    path, state = tmp_path / "vae.safetensors", dict(single_file_vae)
    if layout == "full checkpoint":
        state = {f"first_stage_model.{name}": value for name, value in state.items()}
        state["model.diffusion_model.out.0.weight"] = torch.zeros(3)
        state["cond_stage_model.logit_scale"] = torch.zeros(1)
    if layout in ("bare", "full checkpoint"):
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": state} if layout == "state_dict" else state, path)
    modules, _ = load_modules(original_folder, vae=path, config=config)
    assert_equal_states(modules.vae.state_dict(), model.modules.vae.state_dict())


def test_vae_with_old_attention_names(folder, config, model, vae_state):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {
        re.sub(r"(attentions\.0\.)(to_[qkv]|to_out\.0)\.", lambda m: f"{m[1]}{old[m[2]]}.", name): value
        for name, value in vae_state.items()
    }
    assert len(renamed.keys() - vae_state.keys()) == 16
    save_file(renamed, folder / "sd-vae-ft-mse" / VAE_FILE)
    modules, _ = load_modules(folder, config=config)
    assert_equal_states(modules.vae.state_dict(), model.modules.vae.state_dict())


def test_vae_folder_with_a_pickle(folder, config, model, vae_state):
    (folder / "sd-vae-ft-mse" / VAE_FILE).unlink()
    torch.save(vae_state, folder / "sd-vae-ft-mse" / "diffusion_pytorch_model.bin")
    modules, _ = load_modules(folder, config=config)
    assert_equal_states(modules.vae.state_dict(), model.modules.vae.state_dict())


@pytest.mark.parametrize("names", ("4.x", "5.x"))
def test_depth_network_in_a_transformers_folder(original_folder, config, model, tmp_path, names):
    state = {}
    for name, value in model.modules.depth_network.state_dict().items():
        for old, new in (
            ("attention.query", "q_proj"),
            ("attention.key", "k_proj"),
            ("attention.value", "v_proj"),
            ("output.dense", "o_proj"),
        ):
            wanted, other = (old, new) if names == "4.x" else (new, old)
            name = name.replace(f".attention.{other}.", f".attention.{wanted}.")
        state[name] = value
    assert ("backbone.encoder.layer.0.attention.attention.query.bias" in state) == (names == "4.x")
    (tmp_path / "depth").mkdir()
    save_file(state, tmp_path / "depth" / "model.safetensors")
    modules, _ = load_modules(original_folder, depth=tmp_path / "depth", config=config)
    assert_equal_states(states(modules), states(model.modules))


@pytest.mark.parametrize("prefixed", (True, False))
def test_image_encoder_with_and_without_prefix(folder, config, model, original_parts, prefixed):
    encoder = {
        name if prefixed else name.removeprefix("vision_model."): value
        for name, value in original_parts["image_encoder"].items()
    }
    torch.save({**original_parts, "image_encoder": encoder}, folder / "mimicbrush" / "mimicbrush.bin")
    modules, _ = load_modules(folder, config=config)
    assert_equal_states(states(modules), states(model.modules))


def test_checkpoint_in_the_old_pickle_format(folder, config, model, original_parts):
    path = folder / "mimicbrush" / "mimicbrush.bin"
    torch.save(original_parts, path, _use_new_zipfile_serialization=False)
    modules, _ = load_modules(folder, config=config)
    assert_equal_states(states(modules), states(model.modules))


# -------------------- refusing what is wrong


def spoil(folder, original_parts, part, change):
    """Write mimicbrush.bin with one part changed in place by `change(state)`."""
    path = folder / "mimicbrush" / "mimicbrush.bin"
    state = dict(original_parts[part])
    change(state)
    torch.save({**original_parts, part: state}, path)
    return path


def test_missing_folder(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("gone", ("mimicbrush/mimicbrush.bin", "sd-vae-ft-mse", "depth_model"))
def test_missing_file_of_the_release(folder, config, gone):
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refusal(folder, config)
    assert str(folder) in message and gone in message


def test_missing_file_given_by_name(original_folder, config, tmp_path):
    for role in ("vae", "depth"):
        message = refusal(original_folder, config, **{role: tmp_path / "nowhere"})
        assert str(tmp_path / "nowhere") in message and role in message


def test_folder_without_weights(folder, config):
    (folder / "sd-vae-ft-mse" / VAE_FILE).unlink()
    message = refusal(folder, config)
    assert str(folder / "sd-vae-ft-mse") in message and VAE_FILE in message


@pytest.mark.parametrize("part", ("unet", "referencenet", "image_encoder", "image_proj", "depth_guider"))
def test_missing_part(folder, config, original_parts, part):
    path = folder / "mimicbrush" / "mimicbrush.bin"
    torch.save({name: state for name, state in original_parts.items() if name != part}, path)
    message = refusal(folder, config)
    assert str(path) in message and repr(part) in message


def test_part_that_is_not_a_state(folder, config, original_parts):
    path = folder / "mimicbrush" / "mimicbrush.bin"
    torch.save({**original_parts, "unet": torch.zeros(3)}, path)
    message = refusal(folder, config)
    assert str(path) in message and "'unet'" in message


@pytest.mark.parametrize(
    ("part", "key", "reported"),
    (
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", None),
        ("referencenet", "conv_in.weight", None),
        ("image_proj", "projector.bias", None),
        ("depth_guider", "blocks.5.weight", None),
        ("image_encoder", "vision_model.encoder.layers.1.mlp.fc1.weight", "encoder.layers.1.mlp.fc1.weight"),
    ),
)
def test_missing_extra_and_misshapen_keys(folder, config, original_parts, part, key, reported):
    reported = reported or key
    path = spoil(folder, original_parts, part, lambda state: state.pop(key))
    message = refusal(folder, config)
    assert str(path) in message and reported in message and "missing" in message

    if part not in ("unet", "image_encoder"):
        return
    spoil(folder, original_parts, part, lambda state: state.update({key + "_ema": torch.zeros(1)}))
    message = refusal(folder, config)
    assert str(path) in message and reported + "_ema" in message and "not expected" in message

    spoil(folder, original_parts, part, lambda state: state.update({key: torch.zeros(7, 7)}))
    message = refusal(folder, config)
    assert str(path) in message and reported in message and "[7, 7]" in message
    assert str(list(original_parts[part][key].shape)) in message


def test_a_value_that_is_not_a_tensor(folder, config, original_parts):
    path = spoil(folder, original_parts, "image_proj", lambda state: state.update({"projector.bias": 3}))
    message = refusal(folder, config)
    assert str(path) in message and "projector.bias" in message


def test_release_of_another_size(original_folder):
    message = refusal(original_folder)  # without a configuration it is taken for SD-1.5's sizes
    assert "mimicbrush.bin" in message and "another" in message


@pytest.mark.parametrize(
    "file",
    ("mimicbrush/mimicbrush.bin", f"sd-vae-ft-mse/{VAE_FILE}", "depth_model/depth_anything_vitb14.pth"),
)
@pytest.mark.parametrize("length", (0, -1000))
def test_truncated_files(folder, config, file, length):
    path = folder / file
    path.write_bytes(path.read_bytes()[:length])
    assert str(path) in refusal(folder, config)


@pytest.mark.parametrize("length", (0, 5, 1000, -1000))
def test_truncated_single_file(single_file, tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(single_file.read_bytes()[:length])
    assert str(path) in refusal(path)


def rewrite(single_file, path, tensors=None, **metadata):
    """A copy of a single-file model with other tensors or another header."""
    with safe_open(single_file, "pt") as file:
        header = {**file.metadata(), **metadata}
    save_file(load_file(single_file) if tensors is None else tensors, path, metadata=header)
    return path


def test_single_file_without_a_configuration(single_file, tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"unet.conv_in.weight": torch.zeros(3)}, path, metadata=metadata)
        message = refusal(path)
        assert str(path) in message and METADATA_KEY in message


def test_single_file_with_a_damaged_or_foreign_configuration(single_file, tmp_path):
    path = tmp_path / "other.safetensors"
    for text in ("{not json", "[]", json.dumps({"system": "mimicbrush"})):
        assert str(path) in refusal(rewrite(single_file, path, **{METADATA_KEY: text}))
    foreign = json.dumps({**bundled_config("mimicbrush_sd15"), "system": "brushnet"})
    message = refusal(rewrite(single_file, path, **{METADATA_KEY: foreign}))
    assert str(path) in message and "brushnet" in message


def test_single_file_with_wrong_keys(single_file, tmp_path):
    path, tensors = tmp_path / "other.safetensors", load_file(single_file)
    key = "vae.decoder.conv_in.weight"
    message = refusal(rewrite(single_file, path, {**tensors, "text_encoder.weight": torch.zeros(1)}))
    assert str(path) in message and "text_encoder.weight" in message
    message = refusal(rewrite(single_file, path, {**tensors, "vae.surplus": torch.zeros(1)}))
    assert str(path) in message and "surplus" in message
    message = refusal(rewrite(single_file, path, {**tensors, key: torch.zeros(2)}))
    assert str(path) in message and "decoder.conv_in.weight" in message and "[2]" in message
    tensors.pop(key)
    message = refusal(rewrite(single_file, path, tensors))
    assert str(path) in message and "decoder.conv_in.weight" in message and "'vae'" in message


class Harmful:
    """Creates a folder when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("how", ("zip", "old", "bare pickle"))
@pytest.mark.parametrize("file", ("mimicbrush/mimicbrush.bin", "depth_model/depth_anything_vitb14.pth"))
def test_code_in_a_pickle_is_never_executed(folder, config, tmp_path, file, how):
    path, marker = folder / file, tmp_path / "executed"
    content = {"unet": Harmful(str(marker)), "pretrained.cls_token": torch.zeros(1)}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(content["unet"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    assert str(path) in refusal(folder, config)
    assert not marker.exists()
    pickle.loads(pickle.dumps(content["unet"]))
    assert marker.exists(), "the marker itself works"


@pytest.mark.parametrize("version", ["4.x", "5.x"])
def test_a_file_written_beside_another_transformers_loads(tmp_path, version):
    """transformers renamed DINOv2's attention, and dropped CLIP's `vision_model.` in places."""
    renamed = {}
    with safe_open(embedded_model_path(), "pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118  (a handle, not a dict)
            new = name
            for old_name, new_name in keys._DEPTH_ATTENTION_NAMES:
                pair = (old_name, new_name) if version == "5.x" else (new_name, old_name)
                new = new.replace(*pair) if name.startswith("depth_network.") else new
            if name.startswith("image_encoder."):
                bare = name.replace("image_encoder.vision_model.", "image_encoder.")
                new = bare if version == "5.x" else bare.replace("image_encoder.", "image_encoder.vision_model.")
            renamed[new] = file.get_tensor(name)
    path = tmp_path / "renamed.safetensors"
    save_file(renamed, path, metadata)
    assert_equal_states(states(load_modules(path)[0]), states(load_modules(embedded_model_path())[0]))
