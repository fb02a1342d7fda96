"""Magic Fixup: against numbers recorded from the original code, in every layout, and as a whole edit."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from recordings import GOLDEN, error, recorded_weights, recording
from safetensors.torch import load_file, save_file

from mimicbrush_core import images, masks
from mimicbrush_core.attention import DetailReading, transformer_blocks
from mimicbrush_core.checkpoints import embedded_model_path, open_model
from mimicbrush_core.coarse_edit import CoarseEdit, coarse_edit
from mimicbrush_core.convert import convert
from mimicbrush_core.encoders import decode_latents, encode_latents
from mimicbrush_core.errors import ArgumentError, Cancelled, ModelFileError, PictureError
from mimicbrush_core.hole_fill import fill_hole
from mimicbrush_core.modules import build_part, bundled_config
from mimicbrush_core.references import write_features
from mimicbrush_core.sampling import SeededDraws, denoise, last_steps, make_scheduler
from mimicbrush_core.systems.magic_fixup import (
    FixupCondition,
    FixupSettings,
    MagicFixup,
    changed_regions,
    prepare_coarse,
)
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.systems.paint_by_example import PaintByExample
from mimicbrush_core.verify import inspect

WEIGHTS = recorded_weights("magic_fixup")
"""In the layout of the original checkpoint, with the keys that are never used."""

golden = partial(recording, "magic_fixup")
META = json.loads((GOLDEN / "magic_fixup" / "meta.json").read_text())
FORWARD, LATENTS, LOSS, VAE = 5e-5, 5e-4, 1e-5, 1e-5
FILL_PSNR = 30
QUICK = FixupSettings(size=128, steps=2)  # where the tiny model, of one channel per group, still has 2 x 2
H, W = 72, 96


def tiny_config():
    """The recorded model's sizes in this project's configuration format."""
    config = bundled_config("magic_fixup")
    unet, vae = META["unet"]["diffusers"], META["vae"]
    return {
        **config,
        "name": "tiny",
        "unet": {
            **config["unet"],
            "block_out_channels": unet["block_out_channels"],
            "cross_attention_dim": unet["cross_attention_dim_synth"],
        },
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
    return MagicFixup.load(WEIGHTS, config=config)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def moved():
    """The region that was moved, float [H,W]."""
    mask = np.zeros((H, W), np.float32)
    mask[20:50, 10:40] = 1
    return mask


@pytest.fixture(scope="module")
def coarse(photo, moved):
    """The photo with a region moved to the right, uint8 [H,W,4]."""
    result = coarse_edit(as_batch(photo), torch.from_numpy(moved)[None], CoarseEdit(x=40))
    return (result.pictures[0] * 255).round().byte().numpy()


def as_batch(picture, count=1):
    return (torch.from_numpy(picture).float() / 255)[None].repeat(count, 1, 1, 1)


# -------------------- holes


def psnr(ours, recorded):
    return 10 * np.log10(255**2 / np.square(ours.astype(float) - recorded).mean())


def test_holes_are_filled_as_the_original_does():
    case = golden("hole_fill_small")
    hole = masks.grown(case["hole"].numpy() > 0, 3) > 0
    assert np.array_equal(hole, case["hole_dilated"].numpy() > 0)
    filled = fill_hole(case["image"].numpy(), hole)
    assert psnr(filled[hole], case["filled"].numpy()[hole]) >= FILL_PSNR
    assert np.array_equal(filled[~hole], case["image"].numpy()[~hole])


@pytest.fixture(scope="module")
def prepared():
    """The recorded coarse edit, prepared: filled uint8 [512,512,3], alpha uint8 [512,512]."""
    return prepare_coarse(golden("preprocess")["edit_rgba"].numpy(), 512)


def test_preparation_of_the_coarse_edit(prepared):
    case, (filled, alpha) = golden("preprocess"), prepared
    hole = masks.grown(alpha < 128, 3) > 0
    assert np.array_equal(hole, case["hole_dilated"].numpy() > 0)
    recorded = case["inpainted"].numpy()
    assert psnr(filled[hole], recorded[hole]) >= FILL_PSNR
    difference = filled[~hole].astype(int) - recorded[~hole]  # the original truncates where the core rounds
    assert difference.min() >= 0 and difference.max() <= 1
    known = torch.from_numpy(alpha).float()[None, None] / 255
    assert torch.equal(masks.soft_latent_mask(known, 8), case["mask_latent"])


def test_condition(model, coarse, photo):
    condition = model.encode(photo, coarse, 64)
    assert [tuple(one.shape) for one in vars(condition).values()] == [(1, 4, 8, 8), (1, 4, 8, 8), (1, 1, 8, 8)]
    vae, (filled, alpha) = model.modules.vae, prepare_coarse(coarse, 64)
    squashed = images.resize_bicubic(photo, 64)
    with torch.no_grad():
        assert torch.equal(condition.edit_latents, encode_latents(vae, images.to_model_range(filled)))
        assert torch.equal(condition.original_latents, encode_latents(vae, images.to_model_range(squashed)))
    assert condition.known.min() == 0 and condition.known.max() == 1
    assert condition.known[0, 0, :, :1].min() == 1  # left of what was moved
    # The hole, at rows 20..50 of 72 and columns 10..40 of 96, is 1..4 and 1..3 of the 8 cells.
    assert condition.known[0, 0, 3, 2] == 0 and alpha[26, 20] == 0


def test_a_hole_takes_the_colours_around_it():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :30] = (200, 10, 30)
    picture[:, 30:] = (20, 40, 220)
    hole = np.zeros((40, 60), bool)
    hole[5:15, 5:15] = hole[30:, 40:] = True  # the second at two borders of the picture
    spoiled = picture.copy()
    spoiled[hole] = 255
    assert np.array_equal(fill_hole(spoiled, hole), picture)
    assert spoiled[hole].min() == 255


def test_no_hole_and_nothing_but_a_hole():
    picture = np.full((20, 20, 3), 7, np.uint8)
    assert np.array_equal(fill_hole(picture, np.zeros((20, 20), bool)), picture)
    with pytest.raises(PictureError, match="nothing but a hole"):
        fill_hole(picture, np.ones((20, 20), bool))


# -------------------- the networks, the schedule, the run


def extracted(model, noised, z_ref, mask, timesteps):
    model_input = torch.cat([noised, z_ref, mask], dim=1)
    return write_features(model.modules.detail_extractor, model_input, timesteps, None, transformer_blocks)


def predicted(model, features, latents, z_coarse, mask, timesteps):
    with DetailReading(model.modules.unet) as reading:
        reading.features = features
        model_input = torch.cat([latents, z_coarse, mask], dim=1)
        return model.modules.unet(model_input, timesteps, encoder_hidden_states=None).sample


@torch.no_grad()
def test_forward(model):
    case, stats = golden("forward_64x64"), META["cases"]["forward_64x64"]["feature_stats"]
    features = extracted(model, case["noisy_ref"], case["z_ref"], case["mask"], case["t"])
    features_of = {name.removesuffix(".transformer_blocks.0"): value for name, value in features.items()}
    assert features_of.keys() == stats.keys()
    for name, expected in stats.items():
        assert list(features_of[name].shape) == expected["shape"]
        assert features_of[name].abs().sum().item() == pytest.approx(expected["abs_sum"], rel=FORWARD)
    for name in [name for name in case if name.startswith("feat.")]:
        assert error(features_of[name.removeprefix("feat.")], case[name]) <= FORWARD
    output = predicted(model, features, case["x_t"], case["z_coarse"], case["mask"], case["t"])
    assert error(output, case["eps"]) <= FORWARD


@pytest.mark.parametrize("name, strength", (("sample_s5", 1.0), ("sample_s5_start3", 0.6)))
def test_sampling_replayed(model, name, strength):
    case, infos = golden(name), []
    draws = [case["start_noise"][0]]
    for pair in zip(case["ref_noise"], case["step_noise"], strict=True):
        draws += pair
    scheduler = last_steps(make_scheduler(model.config["scheduler"], "ddim", 5), strength)
    condition = FixupCondition(case["z_coarse"], case["z_ref"], case["mask"])
    latents = model.sample(condition, lambda: draws.pop(0), scheduler, on_step=infos.append)
    assert not draws
    assert [info.timestep for info in infos] == case["t"].flatten().tolist()
    assert error(latents, case["final"]) <= LATENTS


@torch.no_grad()
def test_loss_of_training(model):
    """The objective's arithmetic: the noise schedule, noise as target, the condition kept or dropped."""
    case = golden("train_loss")
    alphas = load_file(WEIGHTS)["alphas_cumprod"][case["t"]][:, None, None, None]
    noisy, noised = (
        alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
        for clean, noise in ((case["z_target"], case["noise"]), (case["z_ref"], case["ref_noise"]))
    )
    for name, kept in (("loss_kept", 1), ("loss_dropped", 0)):
        features = extracted(model, noised, case["z_ref"], kept * case["mask"], case["t"])
        output = predicted(model, features, noisy, kept * case["z_coarse"], kept * case["mask"], case["t"])
        assert abs((output - case["noise"]).square().mean() - case[name]).item() <= LOSS


@torch.no_grad()
def test_vae(model):
    case, vae = golden("vae"), model.modules.vae
    assert error(encode_latents(vae, case["image"]), case["latent_mode"]) <= VAE
    assert error(decode_latents(vae, case["latent_mode"]), case["decoded"]) <= VAE


def test_schedule_is_the_recorded_one(model):
    scheduler = make_scheduler(model.config["scheduler"], "ddim", 50)
    recorded = load_file(WEIGHTS)["alphas_cumprod"]
    assert torch.allclose(scheduler.alphas_cumprod[:982], recorded[:982], rtol=2e-6, atol=0)
    assert scheduler.alphas_cumprod[999] == 0
    assert scheduler.timesteps[[0, 1, -1]].tolist() == [981, 961, 1] and len(scheduler.timesteps) == 50


@pytest.mark.parametrize("steps, spacing", ((500, None), (10, "trailing"), (10, "linspace")))
def test_a_start_in_pure_noise_is_refused(model, steps, spacing):
    with pytest.raises(ArgumentError, match=r"timestep 999.*'leading'"):
        make_scheduler(model.config["scheduler"], "ddim", steps, spacing)


@pytest.mark.parametrize("share, timesteps", ((1.0, [801, 601, 401, 201, 1]), (0.4, [201, 1]), (0.01, [1])))
def test_last_steps(model, share, timesteps):
    scheduler = last_steps(make_scheduler(model.config["scheduler"], "ddim", 5), share)
    assert scheduler.timesteps.tolist() == timesteps


@pytest.mark.parametrize("eta", (0.0, 0.6, 1.0))
def test_eta(model, eta):
    """One step as arXiv 2010.02502 writes it (eq. 12 and 16)."""
    scheduler = last_steps(make_scheduler(model.config["scheduler"], "ddim", 5), 0.4)
    start, output, noise = (torch.randn(2, 4, 8, 8) for _ in range(3))
    after = []
    original = scheduler.step
    scheduler.step = lambda *given, **named: after.append(original(*given, **named)) or after[-1]
    denoise(lambda latents, timestep: output, start, scheduler, eta=eta, draw=lambda: noise)
    now, then = scheduler.alphas_cumprod[201], scheduler.alphas_cumprod[1]
    sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    clean = (start - (1 - now).sqrt() * output) / now.sqrt()
    expected = then.sqrt() * clean + (1 - then - sigma**2).sqrt() * output + sigma * noise
    assert torch.allclose(after[0][0], expected, atol=1e-5)


def test_eta_is_ddims(model):
    scheduler = make_scheduler(model.config["scheduler"], "euler", 2)
    with pytest.raises(ArgumentError, match=r"eta is 1\.0.*ddim"):
        denoise(lambda latents, timestep: latents, torch.zeros(1, 4, 8, 8), scheduler, eta=1.0)


def test_seeded_draws_go_on_and_do_not_depend_on_the_batch():
    together, alone = SeededDraws([3, 4], (4, 8, 8)), SeededDraws([4], (4, 8, 8))
    first, second = together(), together()
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert torch.equal(first[1:], alone()) and torch.equal(second[1:], alone())


@torch.no_grad()
def test_reading_is_undone(model):
    unet = model.modules.unet
    with pytest.raises(Cancelled), DetailReading(unet) as reading:
        assert all(block.attn2._forward_pre_hooks for block in transformer_blocks(unet).values())
        reading.features = {"some": torch.zeros(1)}
        raise Cancelled("stop")
    assert not any(block.attn2._forward_pre_hooks for block in transformer_blocks(unet).values())
    assert not reading.features


# -------------------- layouts


def part_states(loaded):
    return {part: module.state_dict() for part, module in loaded.modules.items()}


def assert_same_weights(ours, expected):
    ours, expected = part_states(ours), part_states(expected)
    assert ours.keys() == expected.keys()
    for part, state in expected.items():
        assert ours[part].keys() == state.keys()
        assert all(torch.equal(ours[part][name], value) for name, value in state.items()), part


@pytest.fixture(scope="module")
def single_file(tmp_path_factory, config):
    return convert(WEIGHTS, tmp_path_factory.mktemp("single") / "fixup.safetensors", config=config, precision="fp32")


def test_names_of_the_parts():
    """Of the published size: square cross-attentions, and no weight in the extractor that is never used."""
    config = bundled_config("magic_fixup")
    with torch.device("meta"):
        unet, extractor = (build_part(part, config) for part in ("unet", "detail_extractor"))
    for name, block in transformer_blocks(unet).items():
        assert block.attn2.to_k.weight.shape[0] == block.attn2.to_k.weight.shape[1], name
    assert len(transformer_blocks(unet)) == 16
    assert transformer_blocks(extractor).keys() == transformer_blocks(unet).keys()
    names = extractor.state_dict().keys()
    assert names < unet.state_dict().keys()
    assert not any(".attn2." in name or "transformer_blocks.0.norm2." in name for name in names)
    last = "up_blocks.3.attentions.2."
    assert [name.removeprefix(last) for name in names if name.startswith(f"{last}transformer")] == [
        "transformer_blocks.0.norm1.weight",
        "transformer_blocks.0.norm1.bias",
    ]
    assert unet.conv_in.weight.shape == extractor.conv_in.weight.shape == (320, 9, 3, 3)


@pytest.mark.parametrize("prefix", ("", "_forward_module."))
@pytest.mark.parametrize("pickled, wrapped", ((False, False), (True, False), (True, True)))
def test_checkpoint_in_every_dress(tmp_path, model, config, prefix, pickled, wrapped):
    state = {prefix + name: value for name, value in load_file(WEIGHTS).items()}
    path = tmp_path / ("magic_fixup.ckpt" if pickled else "magic_fixup.safetensors")
    if pickled:
        torch.save({"state_dict": state} if wrapped else state, path)
    else:
        save_file(state, path)
    assert_same_weights(MagicFixup.load(path, config=config), model)


def test_checkpoint_alone_in_a_folder(tmp_path, model, config):
    folder = tmp_path / "release" / "as published"
    folder.mkdir(parents=True)
    save_file(load_file(WEIGHTS), folder / "some name.safetensors")
    (folder / "README.md").write_text("licence")
    assert_same_weights(MagicFixup.load(tmp_path / "release", config=config), model)
    (folder / "other.bin").write_bytes(b"weights")
    assert "is no Magic Fixup" in refusal(tmp_path / "release", config=config)


def test_another_vae(tmp_path, model, config):
    state = {key: torch.zeros_like(value) for key, value in model.modules.vae.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    loaded = MagicFixup.load(WEIGHTS, vae=tmp_path / "vae.safetensors", config=config)
    assert not any(value.any() for value in loaded.modules.vae.state_dict().values())


def test_converted_file(single_file, model, config):
    assert_same_weights(MagicFixup.load(single_file), model)
    header = open_model(single_file).config
    assert header["system"] == "magic-fixup" and header["unet"] == config["unet"]
    assert "non-commercial" in header["licence"]  # which has to travel with copies


def test_kinds(single_file, config):
    for path, kind in ((WEIGHTS, "magic-fixup-original"), (single_file, "magic-fixup")):
        report = inspect(path, config=config)
        assert (report.kind, report.use, report.usable) == (kind, "model", True), report.problems
        assert "Magic Fixup" in report.title and "non-commercial" in report.licence
    assert [part.name for part in inspect(single_file).parts] == ["unet", "detail_extractor", "vae"]
    assert not inspect(WEIGHTS).usable  # of another size than the published


# -------------------- refusals


def refusal(path, **options):
    with pytest.raises(ModelFileError) as caught:
        MagicFixup.load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


class Callback:
    """Stands for what a training framework pickles beside the weights."""


def test_a_pickle_that_needs_code_is_refused(tmp_path, config):
    # The published file has the mapper whose mention makes a pickle Paint by Example's.
    state = {"cond_stage_model.mapper.x": torch.zeros(1), **load_file(WEIGHTS)}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "callbacks": Callback()}, path)
    message = refusal(path, config=config)
    assert "pickle" in message and "nothing of it was run" in message and "Paint" not in message
    torch.save({"state_dict": state}, path)
    assert MagicFixup.load(path, config=config).config["system"] == "magic-fixup"


def test_each_system_refuses_the_others_by_name(single_file, config):
    assert "is MimicBrush; Magic Fixup was expected" in refusal(embedded_model_path())
    assert "is Paint by Example; Magic Fixup was expected" in refusal(recorded_weights("paint_by_example"))
    for system, title in ((MimicBrush, "MimicBrush"), (PaintByExample, "Paint by Example")):
        for path in (WEIGHTS, single_file):
            with pytest.raises(ModelFileError, match=f"is Magic Fixup; {title} was expected"):
                system.load(path)


def test_what_is_neither_is_refused(tmp_path):
    assert "is no Magic Fixup: its original checkpoint or a converted file was expected" in refusal(tmp_path)
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet.lora_up.weight": torch.zeros(1)}, path)
    assert "LoRA" in refusal(path)


def test_depth_is_refused(config):
    with pytest.raises(ArgumentError, match="Magic Fixup, which knows no depth"):
        MagicFixup.load(WEIGHTS, depth=WEIGHTS, config=config)


def without(*words):
    return lambda state: {key: value for key, value in state.items() if not all(word in key for word in words)}


SPOILED = {
    "VAE missing": (without("first_stage_model."), ["'vae'", "missing"]),
    "detail missing": (without("reference_model.input_blocks.0.0.bias"), ["'detail_extractor'", "conv_in.bias"]),
    "third attention missing": (
        without("model.diffusion_model.middle_block.1", "attn3.to_k"),
        ["'unet'", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"],
    ),
    "wrong shape": (
        lambda state: {**state, "model.reference_model.input_blocks.0.0.bias": torch.zeros(3)},
        ["'detail_extractor'", "[3]", "[32]"],
    ),
    "NaN": (
        lambda state: {**state, "model.reference_model.input_blocks.0.0.bias": torch.full((32,), torch.nan)},
        ["32 NaN"],
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_checkpoint_is_refused(tmp_path, config, case):
    edit, words = SPOILED[case]
    path = tmp_path / "model.safetensors"
    save_file(edit(load_file(WEIGHTS)), path)
    message, report = refusal(path, config=config), inspect(path, config=config)
    assert not report.usable
    for word in words:
        assert word in message and word in " ".join(report.problems)


def test_a_converted_file_saved_again_is_refused(single_file, tmp_path):
    path = tmp_path / "again.safetensors"
    save_file(load_file(single_file), path)
    assert "Magic Fixup tensors without the configuration" in refusal(path)
    assert inspect(path).kind == "magic-fixup-headerless"


# -------------------- the whole edit


def test_defaults_are_the_originals():
    assert bundled_config("magic_fixup")["defaults"] == {
        "size": 512,
        "steps": 50,
        "guidance": 1.0,
        "scheduler": "ddim",
    }
    settings = FixupSettings()
    assert (settings.strength, settings.eta, settings.paste_back) == (1.0, 1.0, False)


def test_the_models_whole_picture_comes_back_in_the_photos_size(model, photo, coarse):
    result = model.edit(photo, coarse, QUICK)
    assert result.picture.shape == photo.shape and (result.alpha == 255).all()
    assert np.array_equal(result.picture, result.raw)
    assert (result.picture != photo).any(axis=-1).mean() > 0.9
    again = model.edit(photo / np.float32(255), coarse / np.float32(255), QUICK)
    assert np.array_equal(again.picture, result.picture)


def test_the_answer_is_not_padded_but_squashed(model):
    square = np.zeros((64, 64, 3), np.uint8)
    square[:32] = 200
    fitted = model._fitted(square, 40, 120)
    assert fitted.shape == (40, 120, 3)
    assert (fitted[:18] == 200).all() and not fitted[22:].any()


def test_pasting_back_keeps_the_original(model, photo, coarse, moved):
    changed = np.maximum(moved, np.roll(moved, 40, axis=1))
    settings = replace(QUICK, paste_back=True, feather=2)
    result = model.edit(photo, coarse, settings, mask=changed)
    untouched = masks.feather_alpha(changed, 2) == 0
    assert untouched.any() and np.array_equal(result.picture[untouched], photo[untouched])
    assert (result.picture[changed == 1] != photo[changed == 1]).any()


def test_without_a_mask_what_the_coarse_edit_changed_is_pasted_back(model, photo, coarse, moved):
    hole, place = moved == 1, np.roll(moved, 40, axis=1) == 1
    [region] = changed_regions([photo], [coarse])
    assert np.array_equal(region == 1, (coarse[..., 3] < 255) | (coarse[..., :3] != photo).any(axis=-1))
    assert (region[hole] == 1).all() and (region[place] == 1).mean() > 0.99 and not region[~hole & ~place].any()
    [faded] = changed_regions([photo], [np.dstack([photo, np.where(hole, np.uint8(254), np.uint8(255))])])
    assert np.array_equal(faded == 1, hole)  # its colours are still the photo's
    settings = replace(QUICK, paste_back=True, feather=2)
    alone = model.edit(photo, coarse, settings)
    assert np.array_equal(alone.picture, model.edit(photo, coarse, settings, mask=region).picture)
    untouched = alone.alpha == 0
    assert untouched.any() and np.array_equal(alone.picture[untouched], photo[untouched])
    photos = torch.cat([as_batch(photo), as_batch(coarse)[..., :3]])  # nothing was moved in the second
    opaque = as_batch(coarse)[..., :3]
    batch = model.edit_batch(photos, opaque, settings)
    assert batch.alpha[0].any() and not batch.alpha[1].any() and torch.equal(batch.pictures[1], photos[1])


def test_zoom_sees_the_window_only(model, photo, coarse, moved):
    settings = replace(QUICK, zoom=True, margin=0.1, minimum=16, feather=2)
    result = model.edit(photo, coarse, settings, mask=moved)
    assert result.window.width < W
    outside = np.ones((H, W), bool)
    outside[result.window.slices] = False
    assert np.array_equal(result.picture[outside], photo[outside])
    other = coarse.copy()
    other[outside] = 0
    assert np.array_equal(model.edit(photo, other, settings, mask=moved).picture, result.picture)


def test_everything_that_is_read_counts(model, photo, coarse):
    first = model.edit(photo, coarse, QUICK).raw
    assert np.array_equal(first, model.edit(photo, coarse, QUICK).raw)
    opaque = coarse.copy()
    opaque[..., 3] = 255
    for original, edit, settings in (
        (255 - photo, coarse, QUICK),
        (photo, opaque, QUICK),
        (photo, coarse[:, ::-1], QUICK),
        (photo, coarse, replace(QUICK, seed=1)),
        (photo, coarse, replace(QUICK, eta=0)),
        (photo, coarse, replace(QUICK, strength=0.5)),
    ):
        assert not np.array_equal(first, model.edit(original, edit, settings).raw)
    assert np.array_equal(model.edit(photo, opaque[..., :3], QUICK).raw, model.edit(photo, opaque, QUICK).raw)


def test_less_strength_starts_from_the_coarse_edit_with_less_noise(model, photo, coarse):
    seen = []
    hook = model.modules.unet.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        model.edit(photo, coarse, replace(QUICK, steps=20, strength=0.05, seed=5))
    finally:
        hook.remove()
    [(model_input, timestep)] = seen
    assert timestep == 1
    alpha = make_scheduler(model.config["scheduler"], "ddim", 20).alphas_cumprod[1]
    condition, noise = model.encode(photo, coarse, 128), SeededDraws([5], (4, 16, 16))()
    start = alpha.sqrt() * condition.edit_latents + (1 - alpha).sqrt() * noise
    assert torch.allclose(model_input[:, :4], start, atol=1e-6)
    assert torch.equal(model_input[:, 4:], torch.cat([condition.edit_latents, condition.known], dim=1))


def test_a_batch_is_its_pictures(model, photo, coarse):
    photos = torch.cat([as_batch(photo), 1 - as_batch(photo), as_batch(photo)])
    mask = torch.ones(3, H, W)
    mask[2] = 0
    settings = replace(QUICK, count_up=True, at_once=2, seed=3)
    batch = model.edit_batch(photos, as_batch(coarse), settings, mask=mask)
    for index, one in enumerate((photo, 255 - photo)):
        alone = model.edit(one, coarse, replace(QUICK, seed=3 + index))
        assert np.abs(batch.raw[index].numpy() * 255 - alone.raw).max() <= 1.01
    assert torch.equal(batch.pictures[2], photos[2]) and not batch.alpha[2].any()


def test_one_photo_serves_many_coarse_edits(model, photo, coarse):
    edits = torch.cat([as_batch(coarse), as_batch(np.ascontiguousarray(coarse[:, ::-1]))])
    batch = model.edit_batch(as_batch(photo), edits, QUICK)
    assert batch.pictures.shape == (2, H, W, 3)
    alone = model.edit(photo, coarse[:, ::-1], QUICK)
    assert np.abs(batch.raw[1].numpy() * 255 - alone.raw).max() <= 1.01


def test_progress_counts_every_step_and_shows_previews(model, photo, coarse):
    seen = []
    settings = replace(QUICK, steps=4, strength=0.5, at_once=1)
    model.edit_batch(as_batch(photo, 2), as_batch(coarse), settings, seen.append)
    assert [(one.stage, one.done, one.total) for one in seen] == [("sampling", done, 4) for done in range(1, 5)]
    assert seen[-1].preview().shape == (128, 128, 3)


def test_cancelling(model, photo, coarse):
    def cancel(progress):
        raise Cancelled("stop")

    before = model.edit(photo, coarse, QUICK).picture
    with pytest.raises(Cancelled):
        model.edit(photo, coarse, QUICK, cancel)
    assert np.array_equal(model.edit(photo, coarse, QUICK).picture, before)


def test_half_precision_runs(photo, coarse, config):
    model = MagicFixup.load(WEIGHTS, config=config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.edit(photo, coarse, QUICK).picture.shape == photo.shape


@pytest.mark.parametrize(
    "changes, words",
    (
        ({"scheduler": "euler"}, "'ddim'"),
        ({"spacing": "karras"}, "'ddim', without Karras"),
        ({"spacing": "trailing"}, "timestep 999"),
        ({"steps": 500}, "timestep 999"),
        ({"guidance": 5.0}, "guidance is 5.0"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"eta": 1.1}, "eta is 1.1"),
        ({"size": 100}, "multiple of 64"),
    ),
)
def test_settings_that_do_not_fit(model, photo, coarse, changes, words):
    with pytest.raises(ArgumentError, match=words):
        model.edit(photo, coarse, replace(QUICK, **changes))


def test_inputs_that_do_not_fit(model, photo, coarse):
    with pytest.raises(PictureError, match="coarse edit is 90 x 72 pixels, the original 96 x 72"):
        model.edit(photo, coarse[:, :90], QUICK, mask=np.ones((H, W), np.float32))
    with pytest.raises(PictureError, match="coarse edit picture"):
        model.edit(photo, coarse.astype(np.float32), QUICK)
    with pytest.raises(PictureError, match="nothing but a hole"):
        model.edit(photo, np.zeros_like(coarse), QUICK)
    with pytest.raises(PictureError, match="mask is empty"):
        model.edit(photo, coarse, QUICK, mask=np.zeros((H, W), np.float32))
    with pytest.raises(PictureError, match="2 sources, 1 mask, 3 coarse edits"):
        model.edit_batch(as_batch(photo, 2), as_batch(coarse, 3), QUICK, mask=torch.ones(1, H, W))
    with pytest.raises(PictureError, match="2 sources, 3 coarse edits"):
        model.edit_batch(as_batch(photo, 2), as_batch(coarse, 3), QUICK)
    with pytest.raises(PictureError, match="coarse edit is the original: nothing was moved"):
        model.edit(photo, photo, QUICK)
