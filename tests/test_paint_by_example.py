"""Paint by Example: against numbers recorded from the original code, in every layout, and as a whole edit."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from recordings import GOLDEN, error, recorded_weights, recording
from safetensors.torch import load_file, save_file

from mimicbrush_core import images, keys, masks
from mimicbrush_core.checkpoints import METADATA_KEY, embedded_model_path, open_model
from mimicbrush_core.convert import convert
from mimicbrush_core.encoders import decode_latents
from mimicbrush_core.errors import ArgumentError, Cancelled, ModelFileError, PictureError
from mimicbrush_core.modules import build_part, bundled_config
from mimicbrush_core.sampling import initial_noise, make_scheduler
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.systems.paint_by_example import (
    EXEMPLAR_FITS,
    Exemplar,
    ExemplarSettings,
    PaintByExample,
    SourceCondition,
)
from mimicbrush_core.verify import inspect

WEIGHTS = recorded_weights("paint_by_example")
"""In the layout of the original checkpoint."""

golden = partial(recording, "paint_by_example")
META = json.loads((GOLDEN / "paint_by_example" / "meta.json").read_text())
ENCODER, FORWARD, LATENTS, VAE = 1e-6, 2e-5, 5e-4, 1e-5
GUIDANCE = 5.0
QUICK = ExemplarSettings(size=64, steps=2)


def tiny_config():
    """The recorded model's sizes in this project's configuration format."""
    config = bundled_config("paint_by_example")
    unet, vae = META["unet"], META["vae"]
    encoder = {key: META["clip_vision"][key] for key in config["exemplar_encoder"] if key != "mapper_layers"}
    return {
        **config,
        "name": "tiny",
        "defaults": {**config["defaults"], "size": 128},
        "unet": {
            **config["unet"],
            "block_out_channels": [unet["model_channels"] * factor for factor in unet["channel_mult"]],
            "cross_attention_dim": unet["context_dim"],
        },
        "exemplar_encoder": {**encoder, "mapper_layers": META["mapper_layers"]},
        "vae": {
            **config["vae"],
            "block_out_channels": [vae["ch"] * factor for factor in vae["ch_mult"]],
            "layers_per_block": vae["num_res_blocks"],
        },
    }


@pytest.fixture(scope="module")
def config():
    return tiny_config()


@pytest.fixture(scope="module")
def model(config):
    return PaintByExample.load(WEIGHTS, config=config)


@pytest.fixture(scope="module")
def recorded():
    """The recorded pictures and what the original made of them."""
    return golden("preprocess")


@pytest.fixture(scope="module")
def pictures(recorded):
    """(source uint8, mask float, exemplar uint8)"""
    return recorded["image"].numpy(), recorded["mask"].numpy().astype(np.float32) / 255, recorded["reference"].numpy()


# -------------------- conditions


@pytest.mark.parametrize("fit, name", (("stretch", "preprocess"), ("crop", "diffusers_pipeline")))
def test_token_of_the_exemplar(model, pictures, fit, name):
    token = model.encode_exemplar(pictures[2], fit).token
    expected = golden("conditioning")["cond"] if name == "preprocess" else golden(name)["context"][1:]
    assert error(token, expected) <= ENCODER


def test_stages_of_the_encoder(model, recorded):
    expected, encoder = golden("conditioning"), model.modules.exemplar_encoder
    pixels = images.clip_pixel_values(recorded["reference_224"].numpy())
    with torch.no_grad():
        pooled = encoder.model(pixel_values=pixels).pooler_output
        # Of the largest value: processors round differently (5 units in the last place on one with AVX-512).
        assert error(pooled, expected["pooled"]) <= ENCODER * expected["pooled"].abs().max()
        assert error(encoder.final_layer_norm(encoder.mapper(pooled[:, None])), expected["mapper_ln"]) <= ENCODER
    assert torch.equal(model.unconditional_token, expected["uncond"])


def test_preparation_is_exact(recorded, pictures):
    source, mask, exemplar = pictures
    assert torch.equal(images.to_model_range(source).half(), recorded["image_tensor"])
    stretched = EXEMPLAR_FITS["stretch"](exemplar, 224)
    assert np.array_equal(stretched, recorded["reference_224"].numpy())
    assert torch.equal(images.clip_pixel_values(stretched).half(), recorded["clip_pixel_values"])
    keep = masks.keep_mask(mask, 128)
    assert torch.equal(keep, recorded["mask_keep"])
    assert torch.equal(masks.soft_latent_mask(keep, 8), recorded["mask_latent_official"])


def test_source_condition(model, recorded, pictures):
    source, mask, _ = pictures
    condition = model.encode_source(source, mask)
    assert torch.equal(condition.keep, recorded["mask_latent_official"])
    assert error(condition.hole_latents, recorded["z_masked_mode"]) <= VAE
    drawn = model.encode_source(source, mask, noise=recorded["posterior_noise"], soft_edges=False)
    assert torch.equal(drawn.keep, recorded["mask_latent_diffusers"])
    assert error(drawn.hole_latents, recorded["z_masked"]) <= VAE
    assert torch.equal(drawn.channels(), torch.cat([drawn.hole_latents, drawn.keep], dim=1))


def test_half_masked_is_repainted():
    mask = np.full((64, 64), 127, np.float32) / 255
    assert masks.keep_mask(mask, 64).all()
    mask[:8] = np.float32(128) / 255
    assert masks.keep_mask(mask, 64)[0, 0].sum(dim=1).tolist() == [0] * 8 + [64] * 56


def test_padding_around_a_picture_is_kept(model):
    condition = model.encode_source(np.zeros((40, 128, 3), np.uint8), np.ones((40, 128), np.float32))
    rows = condition.keep[0, 0].mean(dim=1)
    assert rows[:5].min() == 1 and rows[6:10].max() == 0 and rows[11:].min() == 1


@pytest.mark.parametrize("fit", EXEMPLAR_FITS)
def test_exemplar_fits(fit):
    picture = np.zeros((60, 120, 3), np.uint8)
    picture[:, :30] = 255  # what the middle square leaves out
    values = images.clip_pixel_values(EXEMPLAR_FITS[fit](picture, 224))
    white = (values[0, 0] > 1.5).float()
    assert values.shape == (1, 3, 224, 224)
    share = {"stretch": 1 / 4, "crop": 0, "pad": 1 / 2 + 1 / 8}[fit]
    assert abs(white.mean() - share) < 0.02


# -------------------- the U-Net, the schedulers, the whole pipeline


def test_forward(model):
    case = golden("forward")
    with torch.no_grad():
        output = model.modules.unet(case["x"], case["t"], encoder_hidden_states=case["context"]).sample
    assert error(output, case["eps"]) <= FORWARD


def test_vae_decoding(model):
    case = golden("vae_decode")
    with torch.no_grad():
        assert error(decode_latents(model.modules.vae, case["latent"]), case["decoded"]) <= VAE
    # The original truncates where the core rounds.
    difference = model.decode(case["latent"])[0].astype(int) - case["image_uint8"].numpy()
    assert difference.min() >= 0 and difference.max() <= 1


def run(model, condition, exemplar, noise, name, steps):
    """Sampled latents, the reports, and of each evaluation the timestep, the rows [2,4,h,w] and the latents after."""
    scheduler, after, infos, rows = make_scheduler(model.config["scheduler"], name, steps), [], [], []
    original = scheduler.step

    def step(*arguments, **options):
        result = original(*arguments, **options)
        after.append(result[0])
        return result

    scheduler.step = step
    hook = model.modules.unet.register_forward_hook(lambda module, args, output: rows.append(output.sample))
    try:
        latents = model.sample(condition, exemplar, noise, scheduler, GUIDANCE, on_step=infos.append)
    finally:
        hook.remove()
    assert torch.equal(latents, after[-1])
    return latents, infos, torch.stack(rows), torch.stack(after)


def condition_of(case):
    return SourceCondition(case["z_masked"], case["mask_latent"])


def token_of(model, case):
    assert torch.equal(model.unconditional_token, case["uncond"])
    return Exemplar(case["cond"], model)


def guided(rows):
    return rows[:, :1] + GUIDANCE * (rows[:, 1:] - rows[:, :1])


def test_plms(model):
    case = golden("ldm_plms")
    latents, infos, rows, after = run(model, condition_of(case), token_of(model, case), case["x_T"], "plms", 5)
    assert [info.timestep for info in infos] == case["eval_t"].flatten().tolist()
    assert [(info.step, info.steps) for info in infos] == [(step, 6) for step in range(1, 7)]
    assert error(rows, case["eval_eps"]) <= LATENTS
    assert error(after[1:], case["step_x_prev"]) <= LATENTS  # the first is provisional
    assert error(latents, case["final"]) <= LATENTS

    # Seen on the way: the clean latents that each evaluation stands for, from where it was made.
    alphas = golden_alphas()[case["eval_t"].flatten()].view(-1, 1, 1, 1, 1)
    made_at = torch.cat([case["step_x"][:1], after[:1], case["step_x"][1:]])
    clean = (made_at - (1 - alphas).sqrt() * guided(case["eval_eps"])) / alphas.sqrt()
    seen = torch.stack([info.predicted_latents for info in infos])
    assert error(seen, clean) <= 1e-3 * clean.abs().max()


def golden_alphas():
    return load_file(WEIGHTS)["alphas_cumprod"]


def test_ddim(model):
    case = golden("ldm_ddim")
    latents, infos, rows, after = run(model, condition_of(case), token_of(model, case), case["x_T"], "ddim", 4)
    assert [info.timestep for info in infos] == case["eval_t"].flatten().tolist()
    assert error(rows, case["eval_eps"]) <= LATENTS
    assert error(after, case["step_x_prev"]) <= LATENTS and error(latents, case["final"]) <= LATENTS
    seen = torch.stack([info.predicted_latents for info in infos])
    assert error(seen, case["step_pred_x0"]) <= 1e-3 * case["step_pred_x0"].abs().max()


def test_diffusers_pipeline(model, recorded, pictures):
    """From the pictures to the picture, with the pipeline's draws, mask reduction and centre crop."""
    case, (source, mask, picture) = golden("diffusers_pipeline"), pictures
    mean, logvar = recorded["posterior_params"].chunk(2, dim=1)
    draw = (case["z_masked"] / 0.18215 - mean) / (0.5 * logvar).exp()
    condition = model.encode_source(source, mask, noise=draw, soft_edges=False)
    assert torch.equal(condition.keep, case["mask_latent"])
    assert error(condition.hole_latents, case["z_masked"]) <= VAE
    exemplar = model.encode_exemplar(picture, "crop")
    latents, infos, rows, after = run(model, condition, exemplar, case["latents0"], "plms", 5)
    assert [info.timestep for info in infos] == case["timesteps"].tolist()
    assert error(rows, case["noise_pred"]) <= LATENTS
    assert error(after[1:], case["latents_after_step"]) <= LATENTS
    assert error(latents, case["final"]) <= LATENTS
    difference = model.decode(latents) / 255 - case["image"].numpy()
    assert np.abs(difference).max() <= 0.5 / 255 + VAE


def test_loss_of_training(model):
    """The objective's arithmetic: noise schedule, order of the channels, noise as target, either token."""
    case = golden("train_loss")
    alphas = golden_alphas()[case["t"]][:, None, None, None]
    noisy = alphas.sqrt() * case["z_target"] + (1 - alphas).sqrt() * case["noise"]
    beside = SourceCondition(case["z_masked"], case["mask"]).channels()
    for name in ("cond", "uncond"):
        with torch.no_grad():
            predicted = model.modules.unet(
                torch.cat([noisy, beside], dim=1), case["t"], encoder_hidden_states=case[name].expand(2, -1, -1)
            ).sample
        loss = (predicted - case["noise"]).square().mean()
        assert abs(loss - case[f"loss_{name}"]).item() <= FORWARD


def test_schedule_is_the_recorded_one(model):
    alphas = make_scheduler(model.config["scheduler"], "plms", 5).alphas_cumprod
    assert torch.allclose(alphas, golden_alphas(), rtol=1e-6, atol=0)


def test_fifty_steps_of_plms(model):
    timesteps = make_scheduler(model.config["scheduler"], "plms", 50).timesteps.tolist()
    assert timesteps[:4] == [981, 961, 961, 941] and timesteps[-1] == 1 and len(timesteps) == 51


@pytest.mark.parametrize(
    "changes, spacing, words", (({}, "karras", "Karras"), ({"rescale_betas_zero_snr": True}, None, "zero terminal SNR"))
)
def test_what_plms_does_not_know_is_refused(model, changes, spacing, words):
    with pytest.raises(ArgumentError, match=f"plms.*{words}.*dpmpp_2m"):
        make_scheduler({**model.config["scheduler"], **changes}, "plms", 5, spacing)


@pytest.mark.parametrize("name", ("plms", "ddim", "euler", "dpmpp_2m", "unipc"))
def test_every_scheduler_runs(model, pictures, name):
    result = model.edit(*pictures, replace(QUICK, scheduler=name, paste_back=True))
    assert result.settings.scheduler == name
    assert (result.picture != pictures[0]).any()


# -------------------- layouts


def part_states(loaded):
    return {part: module.state_dict() for part, module in loaded.modules.items()}


def assert_same_weights(ours, expected):
    ours, expected = part_states(ours), part_states(expected)
    assert ours.keys() == expected.keys()
    for part, state in expected.items():
        assert ours[part].keys() == state.keys()
        assert all(torch.equal(ours[part][name], value) for name, value in state.items()), part


OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def published(part, state):
    """A part's state as the hub's files of 2022 name it."""
    if part == "vae":
        names = "|".join(map(re.escape, OLD_VAE_NAMES))
        pattern = rf"(attentions\.0\.)({names})\."
        return {re.sub(pattern, lambda m: f"{m[1]}{OLD_VAE_NAMES[m[2]]}.", key): value for key, value in state.items()}
    if part == "exemplar_encoder":
        renamed = {re.sub(r"^model\.(vision_model\.)?", "model.vision_model.", key): v for key, v in state.items()}
        return {**renamed, "model.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    return state


def write_folder(folder, model, pickled=False):
    """The hub's diffusers folder of a model."""
    names = {
        "unet": ("unet", "diffusion_pytorch_model"),
        "vae": ("vae", "diffusion_pytorch_model"),
        "exemplar_encoder": ("image_encoder", "pytorch_model" if pickled else "model"),
    }
    for part, state in part_states(model).items():
        inside, name = names[part]
        (folder / inside).mkdir(parents=True)
        state = {key: value.clone() for key, value in published(part, state).items()}
        if pickled:
            torch.save(state, folder / inside / f"{name}.bin")
        else:
            save_file(state, folder / inside / f"{name}.safetensors")
    vae = {key: value for key, value in model.config["vae"].items() if key not in ("class", "scaling_factor")}
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **vae}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PaintByExamplePipeline"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """Read only."""
    return write_folder(tmp_path_factory.mktemp("folder") / "pbe", model)


@pytest.fixture
def own_folder(tmp_path, model):
    return write_folder(tmp_path / "pbe", model)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("single") / "pbe.safetensors"
    return convert(WEIGHTS, path, config=config)


@pytest.mark.parametrize("network", ("unet", "vae"))
def test_key_mapping(network):
    expected = json.loads((GOLDEN / "paint_by_example" / f"keymap_{network}.json").read_text())
    state = load_file(WEIGHTS)
    ours = keys.ldm_unet_keys(state, layers_per_block=2) if network == "unet" else keys.ldm_vae_keys(state, levels=4)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name].flatten(), state[theirs].flatten()) for name, theirs in expected.items())


@pytest.mark.parametrize("level", ("", "vision_model."))
def test_either_transformers_spelling(model, level):
    state = model.modules.exemplar_encoder.state_dict()
    like = {re.sub(r"^model\.(vision_model\.)?", f"model.{level}", key): value for key, value in state.items()}
    for given in (state, published("exemplar_encoder", state), load_file(WEIGHTS)):
        assert keys.exemplar_encoder_keys(given, like).keys() == like.keys()
    assert keys.other_transformers_keys("exemplar_encoder", state, like).keys() == like.keys()


@pytest.mark.parametrize("size", ("tiny", "published"))
def test_names_of_the_parts(size, config):
    """What the published size has beyond the tiny one is more of the same: the layout is one."""
    config = config if size == "tiny" else bundled_config("paint_by_example")
    with torch.device("meta"):
        encoder = build_part("exemplar_encoder", config).state_dict()
        unet = build_part("unet", config).state_dict()
    assert len(encoder["proj_out.weight"]) == config["unet"]["cross_attention_dim"]
    assert encoder["uncond_vector"].shape == (1, 1, config["unet"]["cross_attention_dim"])
    assert len({key.split(".")[2] for key in encoder if key.startswith("mapper.blocks.")}) == 5
    # The recorded U-Net has no change of width between its first two levels.
    wider = {f"down_blocks.1.resnets.0.conv_shortcut.{name}" for name in ("weight", "bias")}
    expected = json.loads((GOLDEN / "paint_by_example" / "keymap_unet.json").read_text()).keys()
    assert unet.keys() == (expected if size == "tiny" else expected | wider)
    assert unet["conv_in.weight"].shape[1] == 9


def test_folder(folder, model, config):
    assert_same_weights(PaintByExample.load(folder, config=config), model)


def test_folder_of_pickles_without_an_index(tmp_path, model, config):
    folder = write_folder(tmp_path / "pbe", model, pickled=True)
    (folder / "model_index.json").unlink()
    assert_same_weights(PaintByExample.load(folder, config=config), model)


def test_checkpoint_as_a_plain_pickle(tmp_path, model, config):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(WEIGHTS), "epoch": 39}, path)
    assert_same_weights(PaintByExample.load(path, config=config), model)


def test_another_vae(tmp_path, folder, model, config):
    state = {key: torch.zeros_like(value) for key, value in model.modules.vae.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    for path in (WEIGHTS, folder):
        loaded = PaintByExample.load(path, vae=tmp_path / "vae.safetensors", config=config)
        assert not any(value.any() for value in loaded.modules.vae.state_dict().values())
        assert torch.equal(loaded.unconditional_token, model.unconditional_token)


@pytest.mark.parametrize("layout", ("folder", "checkpoint"))
def test_converted_file(layout, folder, tmp_path, model, config):
    source = folder if layout == "folder" else WEIGHTS
    path = convert(source, tmp_path / "pbe.safetensors", config=config, precision="fp32")
    assert_same_weights(PaintByExample.load(path), model)
    header = open_model(path).config
    assert header["system"] == "paint-by-example" and header["unet"] == config["unet"]
    assert set(header["origin"]) == ({"unet", "vae", "exemplar_encoder"} if layout == "folder" else {"checkpoint"})


def test_kinds(folder, single_file, config, tmp_path):
    for path, kind in (
        (folder, "paint-by-example-folder"),
        (WEIGHTS, "paint-by-example-original"),
        (single_file, "paint-by-example"),
    ):
        report = inspect(path, config=config)
        assert (report.kind, report.use, report.usable) == (kind, "model", True), report.problems
        assert "Paint by Example" in report.title and "OpenRAIL" in report.licence
    assert [part.name for part in inspect(single_file).parts] == ["unet", "exemplar_encoder", "vae"]
    assert inspect(folder / "image_encoder").kind == "paint-by-example-image-encoder"
    assert not inspect(WEIGHTS).usable  # of another size than the published


# -------------------- refusals


def refusal(path, **options):
    with pytest.raises(ModelFileError) as caught:
        PaintByExample.load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


class Callback:
    """Stands for what a training framework pickles beside the weights."""


def test_the_originals_pickle_is_refused_with_a_pointer(tmp_path, config):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(WEIGHTS), "callbacks": Callback()}, path)
    message = refusal(path, config=config)
    assert "pickle" in message and "nothing of it was run" in message
    assert "model.safetensors" in message and "Fantasy-Studio/Paint-by-Example" in message
    report = inspect(path, config=config)
    assert not report.usable and "model.safetensors" in report.problems[0]


def test_another_pickle_has_no_such_pointer(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "callbacks": Callback()}, path)
    assert "Fantasy-Studio" not in inspect(path).problems[0]
    assert "Paint by Example" in refusal(path)


def test_each_system_refuses_the_other_by_name(folder, single_file, config):
    assert "is MimicBrush; Paint by Example was expected" in refusal(embedded_model_path())
    for path in (folder, WEIGHTS, single_file):
        with pytest.raises(ModelFileError, match="is Paint by Example; MimicBrush was expected"):
            MimicBrush.load(path)


def test_a_release_of_mimicbrush_may_have_folders_of_that_name(world):
    for name in ("unet", "image_encoder", "vae"):
        world.file(name).mkdir()
    assert open_model(world.folder, config=world.config).config["system"] == "mimicbrush"
    assert inspect(world.folder, config=world.config).kind == "mimicbrush-release"


def test_what_is_neither_is_refused(tmp_path):
    assert "diffusers folder" in refusal(tmp_path)
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet.lora_up.weight": torch.zeros(1)}, path)
    assert "LoRA" in refusal(path)


def test_depth_is_refused(folder, config):
    with pytest.raises(ArgumentError, match="knows no depth"):
        PaintByExample.load(folder, depth=folder, config=config)


def test_an_incomplete_folder(own_folder, config):
    (own_folder / "image_encoder").rename(own_folder / "elsewhere")
    assert "image_encoder not found" in refusal(own_folder, config=config)
    report = inspect(own_folder, config=config)
    assert not report.usable and "image_encoder not found" in report.problems[0]


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def only_clip(state):
    state.clear()
    state["vision_model.post_layernorm.weight"] = torch.zeros(2)


UNET, ENCODER_FILE = "unet/diffusion_pytorch_model.safetensors", "image_encoder/model.safetensors"
FOLDER_CASES = {
    "CLIP alone": (ENCODER_FILE, only_clip, ["CLIP vision", "image_encoder of Paint by Example was expected"]),
    "other U-Net": (
        UNET,
        lambda state: state.update({"conv_in.weight": torch.zeros(32, 4, 3, 3)}),
        ["4 channels", "unet of Paint by Example was expected"],
    ),
    "key missing": (UNET, lambda state: state.pop("conv_out.bias"), ["conv_out.bias", "is missing"]),
    "wrong shape": (
        ENCODER_FILE,
        lambda state: state.update({"proj_out.bias": torch.zeros(3)}),
        ["proj_out.bias", "[3]", "[48]"],
    ),
    "NaN": (ENCODER_FILE, lambda state: state["uncond_vector"].fill_(torch.nan), ["uncond_vector", "48 NaN"]),
}


@pytest.mark.parametrize("case", FOLDER_CASES)
def test_a_spoiled_folder_is_refused(own_folder, config, case):
    name, edit, words = FOLDER_CASES[case]
    change(own_folder / name, edit)
    with pytest.raises(ModelFileError) as caught:
        PaintByExample.load(own_folder, config=config)
    report = inspect(own_folder, config=config)
    assert not report.usable
    for word in words:
        assert word in str(caught.value)
        assert word in " ".join(report.problems)


def test_a_checkpoint_without_a_part_is_refused(tmp_path, config):
    path = tmp_path / "model.safetensors"
    state = load_file(WEIGHTS)
    save_file({key: value for key, value in state.items() if not key.startswith("first_stage_model.")}, path)
    message = refusal(path, config=config)
    assert "'vae'" in message and "missing" in message
    assert not inspect(path, config=config).usable


def test_a_converted_file_saved_again_is_refused(single_file, tmp_path):
    path = tmp_path / "again.safetensors"
    save_file(load_file(single_file), path)
    message = refusal(path)
    assert "Paint by Example tensors without the configuration" in message and METADATA_KEY in message


# -------------------- the whole edit


def test_the_original_gives_back_the_models_picture(model, pictures):
    result = model.edit(*pictures, QUICK)
    assert np.array_equal(result.picture, result.raw) and (result.alpha == 255).all()
    assert (result.picture[pictures[1] == 0] != pictures[0][pictures[1] == 0]).any()


def test_pasting_back_keeps_what_is_beyond_the_feather(model, pictures):
    source, mask, exemplar = pictures
    result = model.edit(source, mask, exemplar, replace(QUICK, paste_back=True, feather=3))
    untouched = masks.feather_alpha(mask, 3) == 0
    assert untouched.any() and np.array_equal(result.picture[untouched], source[untouched])
    assert (result.picture[mask == 1] != source[mask == 1]).any()


@pytest.mark.parametrize("paste_back", (False, True))
def test_zoom_leaves_the_rest(model, paste_back):
    source = np.random.default_rng(0).integers(0, 256, (200, 330, 3), dtype=np.uint8)
    mask = np.zeros((200, 330), np.float32)
    mask[150:170, 40:60] = 1
    settings = replace(QUICK, zoom=True, minimum=48, paste_back=paste_back, feather=2)
    result = model.edit(source, mask, source[:50, :30], settings)
    outside = np.ones(mask.shape, bool)
    outside[result.window.slices] = False
    assert result.window.width == result.window.height < 70
    assert np.array_equal(result.picture[outside], source[outside]) and not result.alpha[outside].any()
    assert result.raw.shape == (result.window.height, result.window.width, 3)
    changed = (result.picture != source).any(axis=-1)[result.window.slices]
    assert changed.mean() > 0.9 if not paste_back else 0 < changed.mean() < 0.5


def test_defaults_are_the_originals(model, pictures):
    settings = model.edit(*pictures, ExemplarSettings(steps=1)).settings
    assert (settings.size, settings.guidance, settings.scheduler) == (128, 5.0, "plms")
    assert settings.exemplar_fit == "stretch" and not settings.paste_back
    assert bundled_config("paint_by_example")["defaults"] == {
        "size": 512,
        "steps": 50,
        "guidance": 5.0,
        "scheduler": "plms",
    }


def test_an_encoded_exemplar_is_the_picture(model, pictures):
    source, mask, picture = pictures
    for fit in EXEMPLAR_FITS:
        settings = replace(QUICK, exemplar_fit=fit)
        encoded = model.edit(source, mask, model.encode_exemplar(picture, fit), QUICK)
        assert np.array_equal(encoded.picture, model.edit(source, mask, picture, settings).picture)


def test_the_exemplar_and_the_seed_count(model, pictures):
    source, mask, picture = pictures
    first = model.edit(source, mask, picture, QUICK).raw
    assert np.array_equal(first, model.edit(source, mask, picture, QUICK).raw)
    assert not np.array_equal(first, model.edit(source, mask, 255 - picture, QUICK).raw)
    assert not np.array_equal(first, model.edit(source, mask, picture, replace(QUICK, seed=1)).raw)


def test_guidance_1_evaluates_the_conditional_row_only(model, pictures):
    rows = []
    hook = model.modules.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        model.edit(*pictures, replace(QUICK, guidance=1))
        model.edit(*pictures, replace(QUICK, guidance=2))
    finally:
        hook.remove()
    assert rows == [1] * 3 + [2] * 3


def as_batch(picture, count=1):
    return (torch.from_numpy(picture).float() / 255)[None].repeat(count, 1, 1, 1)


def test_a_batch_is_its_pictures(model, pictures):
    source, mask, picture = pictures
    sources = torch.cat([as_batch(source), 1 - as_batch(source), as_batch(source)])
    mask_batch = torch.from_numpy(np.stack([mask, mask, np.zeros_like(mask)]))
    settings = replace(QUICK, count_up=True, at_once=2, seed=3)
    batch = model.edit_batch(sources, mask_batch, picture, settings)
    for index, one in enumerate((source, 255 - source)):
        alone = model.edit(one, mask, picture, replace(QUICK, seed=3 + index))
        assert np.abs(batch.raw[index].numpy() * 255 - alone.raw).max() <= 1.01
    assert torch.equal(batch.pictures[2], sources[2]) and not batch.alpha[2].any()
    assert torch.equal(batch.pictures[0], batch.raw[0])


def test_progress_counts_every_evaluation_and_shows_previews(model, pictures):
    source, mask, picture = pictures
    seen = []
    settings = replace(QUICK, steps=3, at_once=1)
    model.edit_batch(as_batch(source, 2), torch.from_numpy(mask)[None], picture, settings, seen.append)
    assert [(one.stage, one.done, one.total) for one in seen] == [("sampling", done, 8) for done in range(1, 9)]
    preview = seen[-1].preview()
    assert preview.dtype == np.uint8 and preview.shape == (64, 64, 3)


def test_cancelling(model, pictures):
    def cancel(progress):
        if progress.done == 2:
            raise Cancelled("stop")

    before = model.edit(*pictures, QUICK).picture
    with pytest.raises(Cancelled):
        model.edit(*pictures, QUICK, cancel)
    assert np.array_equal(model.edit(*pictures, QUICK).picture, before)


def test_half_precision_runs(pictures, config):
    model = PaintByExample.load(WEIGHTS, config=config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.edit(*pictures, QUICK).picture.shape == pictures[0].shape


@pytest.mark.parametrize(
    "changes, words",
    (
        ({"exemplar_fit": "squash"}, "Unknown exemplar fit 'squash'.*stretch, crop, pad"),
        ({"size": 100}, "multiple of 64"),
        ({"scheduler": "heun"}, "heun.*plms"),
        ({"guidance": -1}, "guidance is -1"),
        ({"steps": 0}, "steps is 0"),
    ),
)
def test_settings_that_do_not_fit(model, pictures, changes, words):
    with pytest.raises(ArgumentError, match=words):
        model.edit(*pictures, replace(QUICK, **changes))


def test_inputs_that_do_not_fit(model, pictures):
    source, mask, picture = pictures
    with pytest.raises(PictureError, match="mask is empty"):
        model.edit(source, np.zeros_like(mask), picture, QUICK)
    with pytest.raises(PictureError, match="exemplar picture"):
        model.edit(source, mask, picture.astype(np.float32), QUICK)
    with pytest.raises(ArgumentError, match="Unknown exemplar fit"):
        model.encode_exemplar(picture, "squash")
    with pytest.raises(PictureError, match="2 sources, 3 masks"):
        model.edit_batch(as_batch(source, 2), torch.from_numpy(mask).repeat(3, 1, 1), picture, QUICK)
    other = PaintByExample(model.modules, model.config)
    with pytest.raises(ArgumentError, match="another model"):
        model.edit(source, mask, other.encode_exemplar(picture), QUICK)


def test_a_seed_means_the_same_noise_in_a_batch_as_alone(model, pictures):
    condition = model.encode_source(*pictures[:2], 64)
    exemplar = model.encode_exemplar(pictures[2])

    def sample(seeds):
        scheduler = make_scheduler(model.config["scheduler"], "plms", 2)
        return model.sample(condition, exemplar, initial_noise(seeds, (4, 8, 8)), scheduler, GUIDANCE)

    together = sample([3, 4])
    for row, seed in enumerate((3, 4)):
        alone = sample([seed])[0]
        assert (together[row] - alone).abs().max() <= 1e-4 * alone.abs().max()
