"""MimicBrush against numbers recorded from the original code. The tolerances are the recording's own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from mimicbrush_core import images
from mimicbrush_core.encoders import decode_latents, encode_latents
from mimicbrush_core.modules import PART_NAMES, Modules, build_part, bundled_config, drop_tail
from mimicbrush_core.references import Reference, ReferenceUse
from mimicbrush_core.sampling import make_scheduler
from mimicbrush_core.systems.mimicbrush import EditSettings, MimicBrush, SourceCondition

GOLDEN = Path(__file__).parent / "golden" / "mimicbrush"
BANKS, NOISE_PRED, STEP, TRAJECTORY, TOKENS, VAE, DEPTH = 5e-4, 2e-4, 1e-4, 2e-4, 5e-5, 1e-4, 1e-4
GUIDANCE = 5.0


def error(ours, recorded):
    assert ours.shape == recorded.shape and ours.dtype == recorded.dtype
    return (ours - recorded).abs().max().item()


def read_mask(golden_picture, case):
    return golden_picture(f"{case}_mask").astype(np.float32) / 255


def recording(scheduler):
    """The list into which `scheduler.step` puts (model output, latents after the step) from now on."""
    steps, original = [], scheduler.step

    def step(output, timestep, latents, **options):
        result = original(output, timestep, latents, **options)
        steps.append((output, result[0]))
        return result

    scheduler.step = step
    return steps


# -------------------- one step, from recorded conditions


@pytest.fixture
def alt_model(alt_unets, config):
    unet, reference_unet = alt_unets
    unused = {name: torch.nn.Identity() for name in PART_NAMES}
    modules = Modules(**{**unused, "unet": unet, "reference_unet": reference_unet})
    return MimicBrush(modules, config)


def one_step(model, recorded, timestep, monkeypatch):
    """Sample a single step of the 50 and return what passed: U-Net inputs, rows, guided output, latents."""
    monkeypatch.setattr(model, "_unconditional", recorded["in.uncond_embeds"])
    scheduler = make_scheduler(model.config["scheduler"], "ddim", 50)
    scheduler.timesteps = scheduler.timesteps[scheduler.timesteps == timestep]
    assert len(scheduler.timesteps) == 1
    steps = recording(scheduler)
    condition = SourceCondition(recorded["in.mask"], recorded["in.masked_image_latents"], recorded["in.depth_feature"])
    reference = Reference(recorded["in.reference_latents"], recorded["in.cond_embeds"], owner=model)
    calls = []
    hook = model.modules.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output.sample)), with_kwargs=True
    )
    try:
        model.sample(condition, [ReferenceUse(reference, 1.0)], recorded["in.latents"], scheduler, GUIDANCE)
    finally:
        hook.remove()
    assert len(calls) == 1
    args, kwargs, rows = calls[0]
    return {
        "args": args,
        "kwargs": kwargs,
        "rows": rows,
        "guided": steps[0][0],
        "latents": steps[0][1],
        "banks": reference.banks_at(model.modules.reference_unet, timestep),
    }


def check_one_step(model, recorded, timestep, names, monkeypatch):
    found = one_step(model, recorded, timestep, monkeypatch)
    prefix = f"t{timestep}."
    assert list(found["banks"]) == names
    for index, name in enumerate(names):
        bank = recorded.get(f"{prefix}bank{index}.cond")
        if bank is not None:
            assert error(found["banks"][name], bank) <= BANKS, name

    rows = found["rows"]
    for row in range(2):
        assert error(rows[row], recorded[prefix + "noise_pred"][row]) <= NOISE_PRED
    with torch.no_grad():
        plain = model.modules.unet(*found["args"], **found["kwargs"]).sample
    assert torch.equal(rows[0], plain[0])
    assert not torch.allclose(rows[1], plain[1], atol=100 * NOISE_PRED)
    assert error(plain, recorded[prefix + "noise_pred_plain"]) <= NOISE_PRED

    for ours, name in (("guided", "noise_pred_guided"), ("latents", "ddim_prev_sample")):
        expected = recorded[prefix + name]
        assert error(found[ours], expected) <= STEP * expected.abs().max(), name


@pytest.mark.parametrize("timestep", (981, 501, 1))
def test_one_step(model, golden, golden_meta, monkeypatch, timestep):
    check_one_step(model, golden("step"), timestep, golden_meta["bank_pairs"], monkeypatch)


def test_one_step_of_another_topology_and_a_picture_that_is_not_square(alt_model, golden, golden_meta, monkeypatch):
    check_one_step(alt_model, golden("alt_step"), 741, golden_meta["alt_bank_pairs"], monkeypatch)


# -------------------- conditions


def test_reference_tokens(model, golden, golden_picture):
    for case, name in (("landscape", "clip"), ("portrait", "pipe_s20_noshape")):
        expected = golden(name)["cond_embeds"]
        tokens = model.encode_reference(golden_picture(f"{case}_reference"), size=64).tokens
        assert error(tokens, expected) <= TOKENS, case


def test_unconditional_tokens(model, golden):
    assert error(model.unconditional_tokens(), golden("clip")["uncond_embeds"]) <= TOKENS


def test_image_encoder_ends_with_the_last_but_one_layer(model, golden, golden_picture):
    recorded = golden("clip")
    pixels = images.clip_pixel_values(golden_picture("landscape_clip_224"))
    for values, name in ((pixels, "hidden_minus2"), (torch.zeros_like(pixels), "hidden_minus2_zero")):
        with torch.no_grad():
            output = model.modules.image_encoder(pixel_values=values, output_hidden_states=True)
        assert error(output.hidden_states[-1], recorded[name]) <= TOKENS, name


def test_vae_encoding(model, golden):
    recorded, vae = golden("vae"), model.modules.vae
    scale = vae.config.scaling_factor
    mean, std = recorded["mean"], torch.exp(0.5 * recorded["logvar"])
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert error(encode_latents(vae, recorded["image"]) / scale, mean) <= VAE
        ours_std = (encode_latents(vae, recorded["image"], torch.ones_like(mean)) / scale) - mean
        assert error(ours_std, std) <= VAE
        assert error(encode_latents(vae, recorded["image"], noise) / scale, mean + std * noise) <= VAE
        strided = recorded["image"].contiguous(memory_format=torch.channels_last)
        assert error(encode_latents(vae, strided) / scale, mean) <= VAE


def test_vae_decoding(model, golden):
    recorded, vae = golden("vae"), model.modules.vae
    with torch.no_grad():
        decoded = decode_latents(vae, recorded["mean"] * vae.config.scaling_factor)
    assert error(decoded, recorded["decoded_from_mean"]) <= VAE


def check_depth_map(depth_map, recorded, prefix, stride):
    assert error(depth_map[:, ::stride, ::stride], recorded[f"{prefix}.depth_map_every{stride}"]) <= DEPTH
    statistics = torch.stack([depth_map.mean(), depth_map.std(), depth_map.min(), depth_map.max()])
    assert error(statistics, recorded[f"{prefix}.depth_map_stats"]) <= DEPTH


def test_depth_of_a_picture(model, golden, golden_picture):
    # The picture after the original's own resize: ours is off by one level in 0.02 % of the values.
    recorded = golden("depth")
    depth_map = model.estimate_depth(golden_picture("landscape_depth_resized_uint8"))
    check_depth_map(depth_map, recorded, "shape", 4)
    with torch.no_grad():
        feature = model.modules.depth_projector(depth_map, (64, 64))
    assert error(feature, recorded["shape.depth_feature"]) <= DEPTH


def test_no_depth_is_the_answer_to_zeros_and_not_zero(model, golden):
    recorded = golden("depth")
    check_depth_map(model.no_depth_map(), recorded, "zero", 8)
    with torch.no_grad():
        feature = model.modules.depth_projector(model.no_depth_map(), (64, 64))
    assert error(feature, recorded["zero.depth_feature"]) <= DEPTH


# -------------------- schedule


def test_scheduler_tables(config, golden):
    recorded = golden("scheduler")
    for steps in (5, 7, 12, 20, 50):
        scheduler = make_scheduler(config["scheduler"], "ddim", steps)
        assert torch.equal(scheduler.timesteps, recorded[f"timesteps_{steps}"])
        for ours, name in (
            (scheduler.alphas_cumprod, "alphas_cumprod"),
            (scheduler.final_alpha_cumprod[None], "final_alpha_cumprod"),
        ):
            assert torch.allclose(ours, recorded[name], rtol=1e-6, atol=0)
        assert scheduler.init_noise_sigma == recorded["init_noise_sigma"].item()


def test_bundled_schedule_is_the_recorded_one(config):
    assert config["scheduler"] == bundled_config("mimicbrush_sd15")["scheduler"]


# -------------------- checkpoint keys


@pytest.fixture(scope="module")
def checkpoint_shapes():
    """{part: {key: shape}} of the original's mimicbrush.bin."""
    return json.loads((GOLDEN / "checkpoint_keys.json").read_text())


@pytest.mark.parametrize(
    ("part", "original"),
    (
        ("unet", "unet"),
        ("reference_unet", "referencenet"),
        ("image_projection", "image_proj"),
        ("depth_projector", "depth_guider"),
    ),
)
def test_modules_have_exactly_the_keys_of_the_original(config, checkpoint_shapes, part, original):
    state = build_part(part, config).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == checkpoint_shapes[original]


def test_image_encoder_drops_only_what_is_never_used(model, checkpoint_shapes):
    ours = {key.removeprefix("vision_model.") for key in model.modules.image_encoder.state_dict()}
    theirs = {key.removeprefix("vision_model.") for key in checkpoint_shapes["image_encoder"]}
    unused = ("encoder.layers.2.", "post_layernorm.", "visual_projection.", "embeddings.position_ids")
    assert ours == {key for key in theirs if not key.startswith(unused)}
    assert len(theirs - ours) == 16 + 2 + 1 + 1


def test_reference_unet_lacks_exactly_the_original_tail(config, golden_meta):
    for settings in (config["unet"], bundled_config("mimicbrush_sd15")["unet"]):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**{**settings, "in_channels": 4})
            whole = set(unet.state_dict())
            drop_tail(unet)
        assert sorted(whole - set(unet.state_dict())) == golden_meta["referencenet_missing_vs_unet"]
        assert len(golden_meta["referencenet_missing_vs_unet"]) == 24


# -------------------- whole runs


PIPELINES = {"pipe_s5_shape": ("landscape", 5, 42, True), "pipe_s20_noshape": ("portrait", 20, 7, False)}
"""name: (case, steps, seed, keep_shape)"""


def draws(seed):
    """The original's draws: the reference's posterior, the initial noise, the holed picture's posterior."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(1, 4, 64, 64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", PIPELINES)
def test_encoded_pictures(model, golden, golden_picture, name):
    case, _, seed, keep_shape = PIPELINES[name]
    recorded, scale = golden(name), 0.18215
    reference_draw, _, hole_draw = draws(seed)
    reference = model.encode_reference(golden_picture(f"{case}_reference"), noise=reference_draw)
    assert error(reference.latents / scale, recorded["reference_latents"] / scale) <= VAE
    source, mask = golden_picture(f"{case}_source"), read_mask(golden_picture, case)
    condition = model.encode_source(source, mask, keep_shape=keep_shape, noise=hole_draw)
    assert error(condition.hole_latents / scale, recorded["masked_image_latents"] / scale) <= VAE
    assert torch.equal(condition.mask, recorded["mask_latent"])
    assert torch.equal(condition.channels()[:, :1], condition.mask)
    if not keep_shape:
        assert error(condition.depth, golden("depth")["zero.depth_feature"]) <= DEPTH


def run(model, golden, golden_picture, name):
    """A whole edit with the original's random draws; returns its inputs and each step's latents."""
    case, steps, seed, keep_shape = PIPELINES[name]
    reference_draw, noise, hole_draw = draws(seed)
    source, mask = golden_picture(f"{case}_source"), read_mask(golden_picture, case)
    reference = model.encode_reference(golden_picture(f"{case}_reference"), noise=reference_draw)
    condition = model.encode_source(source, mask, keep_shape=keep_shape, noise=hole_draw)
    if keep_shape:
        # The recorded resize of the picture, see test_depth_of_a_picture.
        depth_map = model.estimate_depth(golden_picture(f"{case}_depth_resized_uint8"))
        with torch.no_grad():
            condition = replace(condition, depth=model.modules.depth_projector(depth_map, (64, 64)))
    scheduler = make_scheduler(model.config["scheduler"], "ddim", steps)
    recorded_steps = recording(scheduler)
    infos = []
    latents = model.sample(condition, [ReferenceUse(reference, 1.0)], noise, scheduler, GUIDANCE, on_step=infos.append)
    assert [info.step for info in infos] == list(range(1, steps + 1))
    assert torch.equal(latents, recorded_steps[-1][1])
    return {
        "name": name,
        "recorded": golden(name),
        "reference": reference,
        "source": source,
        "mask": mask,
        "latents": [after for _, after in recorded_steps],
        "last": infos[-1],
    }


@pytest.fixture(scope="module")
def five_steps(model, golden, golden_picture):
    return run(model, golden, golden_picture, "pipe_s5_shape")


@pytest.fixture(scope="module")
def twenty_steps(model, golden, golden_picture):
    return run(model, golden, golden_picture, "pipe_s20_noshape")


RUNS = ("five_steps", "twenty_steps")


@pytest.fixture(params=RUNS, scope="module")
def finished(request):
    return request.getfixturevalue(request.param)


def test_trajectory(finished):
    recorded = finished["recorded"]
    kept = sorted(name for name in recorded if name.startswith("latents_after_step"))
    assert len(kept) >= 3 and int(kept[-1][-2:]) == len(finished["latents"]) - 1
    for name in kept:
        expected = recorded[name]
        ours = finished["latents"][int(name[-2:])]
        assert error(ours, expected) <= TRAJECTORY * expected.abs().max(), name


def test_last_prediction_is_close_to_the_result(finished):
    # The last step goes from t = 1 to t = 0, where hardly any noise is left.
    difference = (finished["last"].predicted_latents - finished["latents"][-1]).abs().max()
    assert 0 < difference < 0.2


def test_decoded_crop(model, finished):
    recorded = finished["recorded"]
    with torch.no_grad():
        decoded = decode_latents(model.modules.vae, finished["latents"][-1])
    assert error(decoded[:, :, 192:320, 192:320], recorded["decoded_crop_192_320"]) <= VAE
    assert error(torch.stack([decoded.mean(), decoded.std()]), recorded["decoded_stats"]) <= VAE


def test_picture(model, finished, golden_picture, monkeypatch):
    """The end of `edit`, with the run's latents in place of another sampling."""
    monkeypatch.setattr(model, "sample", lambda *args, **options: finished["latents"][-1])
    result = model.edit(finished["source"], finished["mask"], finished["reference"], EditSettings())
    expected = golden_picture(f"{finished['name']}_run_local_result")
    assert result.picture.shape == expected.shape == finished["source"].shape
    difference = np.abs(result.picture.astype(int) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 1e-3
    assert np.array_equal(result.picture[result.alpha == 0], finished["source"][result.alpha == 0])
    assert (result.picture[result.alpha == 255] != finished["source"][result.alpha == 255]).any()


def test_depth_is_of_the_picture_without_the_hole(model, golden_picture):
    source, mask = golden_picture("landscape_source"), read_mask(golden_picture, "landscape")
    condition = model.encode_source(source, mask, keep_shape=True)
    with torch.no_grad():
        depth_map = model.estimate_depth(golden_picture("landscape_padded_source"))
        expected = model.modules.depth_projector(depth_map, (64, 64))
    assert torch.equal(condition.depth, expected)
