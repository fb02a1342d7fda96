"""Imitative Model in a real ComfyUI: what its own samplers make of it is what the core's sampler makes.

Run with the Python of a ComfyUI installation (it needs pytest beside ComfyUI's requirements and ours):

    COMFYUI_PATH=/path/to/ComfyUI python -m pytest tests/host/test_native_model.py
"""

import gc
import importlib
import importlib.util
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_files import micro_config

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH is not set: no ComfyUI to test the pack in", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PACK = "pack_under_test"
EMBEDDED, NARROW = "embedded", "narrow SD-1.5"
EXAMPLE = "A part of one thing, in the look of another thing's"
EXACT, ROUNDED_SIGMAS = 1e-4, 5e-3

# --- the host and the pack -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host():
    """ComfyUI, imported on the CPU; its `nodes` comes before the pack's folder of that name."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True
    names = ("nodes", "comfy.sample", "comfy.samplers", "comfy.model_management", "comfy.lora", "comfy.sd")
    yield SimpleNamespace(**{name.replace("comfy.", ""): importlib.import_module(name) for name in names})
    sys.path.remove(os.environ["COMFYUI_PATH"])


@pytest.fixture(scope="module")
def pack(host):
    """part(name): a module of the pack, imported as ComfyUI does it."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])
    yield lambda name: importlib.import_module(f"{PACK}.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == PACK]:
        del sys.modules[name]


def narrow_config(pack):
    """SD-1.5's layout, 32 groups and 8 heads in a tenth of its width, and the micro model's other parts."""
    config = pack("mimicbrush_core.modules").bundled_config("mimicbrush_sd15")
    micro = micro_config()
    unet = {**config["unet"], "block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 16}
    vae = {**config["vae"], "block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
    parts = {name: micro[name] for name in ("image_encoder", "depth_network")}
    parts["depth_projector"] = {"out_channels": 4, "block_out_channels": [4, 4, 8, 8]}
    return {**config, **parts, "unet": unet, "vae": vae, "defaults": {**config["defaults"], "size": 128}}


@pytest.fixture(scope="module")
def models(pack):
    """{name: LoadedMimicBrush}: the embedded model, and a random one."""
    modules, brush = pack("mimicbrush_core.modules"), pack("mimicbrush_core.systems.mimicbrush").MimicBrush
    config = narrow_config(pack)
    torch.manual_seed(0)
    built = modules.build_modules(config)
    for name in ("unet", "reference_unet", "depth_projector", "depth_network"):
        generator = torch.Generator().manual_seed(1)
        setattr(built, name, modules.random_part(name, config, "cpu", torch.float32, generator, bias=0.1))
    loaded = pack("nodes.host").LoadedMimicBrush
    return {EMBEDDED: loaded(brush.load()), NARROW: loaded(brush(built, config))}


@pytest.fixture(params=[EMBEDDED, NARROW])
def loaded(request, models):
    return models[request.param]


@pytest.fixture(scope="module")
def example(pack):
    """(source, mask, reference) as nodes get them; not square."""
    node = pack("nodes.examples").ExamplePictures
    source, mask, reference = node.execute(EXAMPLE, 128, 1).args
    return source[:, :112], mask[:, :112], reference


def encoded(pack, loaded, picture, size=0, mask=None, **use):
    node = pack("nodes.reference").EncodeReference
    return replace(node.execute(loaded, picture, 1.0, 0.0, 1.0, size, mask).args[0][0], **use)


class Edit:
    """One edit, through ComfyUI's samplers and through the core's."""

    def __init__(self, host, pack, loaded, source, mask, uses, depth=None):
        self.host, self.pack, self.loaded, self.uses = host, pack, loaded, uses
        with torch.inference_mode():  # as the host runs nodes
            self.outputs = pack("nodes.native").ImitativeModel.execute(loaded, source, mask, uses, depth).args
        self.model, self.positive, self.negative, self.empty, self.source_latent, self.vae = self.outputs
        self.condition, _ = pack("mimicbrush_core.bridge").source_conditions(
            loaded.model, source, mask, loaded.model.size_of(uses), depth
        )
        self.noise = torch.randn(self.empty["samples"].shape, generator=torch.Generator().manual_seed(3))

    def sigmas(self, steps, scheduler="simple"):
        return self.host.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), scheduler, steps)

    def by_host(self, steps=4, sampler="euler", scheduler="simple", cfg=3.0, model=None, positive=None, denoise=None):
        """Latents as they go between nodes."""
        sampling = self.sigmas(steps, scheduler)
        latent = self.empty
        if denoise is not None:
            sampling, latent = sampling[-int(steps * denoise) - 1 :], self.source_latent
        with torch.inference_mode():
            return self.host.sample.sample_custom(
                *(model or self.model, self.noise, cfg, self.host.samplers.sampler_object(sampler), sampling),
                *(positive or self.positive, self.negative, latent["samples"]),
                disable_pbar=True,
                seed=0,
            )

    def by_core(self, steps=4, name=None, cfg=3.0, uses=None):
        """Latents in the same scale; name: a scheduler of the core's own timesteps, else Euler on the host's sigmas."""
        brush = self.loaded.bring("unet", "reference")
        make = self.pack("mimicbrush_core.sampling").make_scheduler
        how = {"steps": steps} if name else {"sigmas": self.sigmas(steps).tolist()}
        scheduler = make(brush.config["scheduler"], name or "euler", **how)
        latents = brush.sample(self.condition, self.uses if uses is None else uses, self.noise, scheduler, cfg)
        return latents / brush.modules.vae.config.scaling_factor


@pytest.fixture
def edit(host, pack, example):
    """edit(loaded, *uses, depth=None): of the example."""
    source, mask, _ = example
    return lambda loaded, *uses, depth=None: Edit(host, pack, loaded, source, mask, list(uses), depth)


def error(ours, expected):
    assert ours.shape == expected.shape
    return float((ours - expected).norm() / expected.norm())


# --- the same numbers ----------------------------------------------------------------------------------------


def test_one_reference(pack, loaded, example, edit):
    one = edit(loaded, encoded(pack, loaded, example[2]))
    assert error(one.by_host(), one.by_core()) < EXACT
    assert error(one.by_host(cfg=1.0), one.by_core(cfg=1.0)) < EXACT
    assert error(one.by_host(), one.by_core(uses=[])) > 0.01  # the reference matters


def test_weights_several_references_regions_and_depth(pack, loaded, example, edit):
    source, _, picture = example
    region = torch.zeros(1, 128, 128)
    region[:, 20:90, 30:100] = 1
    part = encoded(pack, loaded, picture, mask=region, weight=1.5)
    other = encoded(pack, loaded, picture.flip(2), weight=0.6)
    depth = pack("nodes.depth").DepthConditionNode.execute(loaded, source, 0.7, "near is white").args[0]
    several = edit(loaded, part, other, depth=depth)
    ours = several.by_host()
    assert error(ours, several.by_core()) < EXACT
    assert error(ours, several.by_core(uses=[replace(part, weight=1.0), other])) > 10 * EXACT
    without = edit(loaded, part, other)
    assert error(without.by_host(), without.by_core()) < EXACT
    beside, beside_without = (one.positive[0][1]["mimicbrush_beside"] for one in (several, without))
    assert torch.equal(beside, several.condition.channels())
    assert torch.equal(beside[:, :5], beside_without[:, :5]) and not torch.equal(beside, beside_without)


@pytest.mark.parametrize("steps", [4, 5])
def test_start_and_end(pack, loaded, example, edit, steps):
    early = encoded(pack, loaded, example[2], end=0.5)
    late = encoded(pack, loaded, example[2].flip(2), start=0.25, end=0.75)
    ranged = edit(loaded, early, late)
    assert [entry[1]["start_percent"] for entry in ranged.positive] == [0.0, 0.25, 0.5, 0.75]
    ours = ranged.by_host(steps)
    assert error(ours, ranged.by_core(steps)) < EXACT
    assert error(ours, ranged.by_core(steps, uses=[replace(early, end=1.0), late])) > 10 * EXACT


def test_a_batch(host, pack, models, example):
    source, mask, picture = example
    loaded = models[EMBEDDED]
    batch = Edit(
        *(host, pack, loaded, torch.cat([source, source.flip(2)]), torch.cat([mask, mask.flip(2)])),
        [encoded(pack, loaded, picture)],
    )
    assert len(batch.empty["samples"]) == 2
    assert error(batch.by_host(), batch.by_core()) < EXACT


def test_conditionings_that_read_different_references_run_together(pack, loaded, example, edit):
    one = edit(loaded, encoded(pack, loaded, example[2]))
    other = edit(loaded, encoded(pack, loaded, example[2].flip(2)))
    # In one step the result is the guided prediction itself: n + 3 (p - n).
    last = {"steps": 4, "denoise": 0.25}
    positive, negative = (each.by_host(**last, cfg=1.0, model=one.model) for each in (one, other))
    assert error(positive, negative) > 10 * EXACT
    one.negative = other.positive
    assert error(one.by_host(**last, cfg=3.0), negative + 3 * (positive - negative)) < EXACT


def test_the_host_s_own_timesteps_are_those_of_the_models(pack, models, example, edit):
    narrow = edit(models[NARROW], encoded(pack, models[NARROW], example[2], size=64))
    assert error(narrow.by_host(50, "ddim", "ddim_uniform"), narrow.by_core(50, "ddim")) < ROUNDED_SIGMAS
    small = edit(models[EMBEDDED], encoded(pack, models[EMBEDDED], example[2]))
    for steps in (1, 4):
        assert error(small.by_host(steps, "ddim", "simple"), small.by_core(steps, "ddim")) < ROUNDED_SIGMAS


def test_weight_0_is_no_reference(pack, loaded, example, edit):
    none = edit(loaded, encoded(pack, loaded, example[2], weight=0.0))
    assert torch.equal(none.by_host(cfg=1.0), none.by_host(cfg=1.0, positive=none.negative))
    assert error(none.by_host(), none.by_core(uses=[])) < EXACT


def test_the_ksampler_node_gives_the_imitative_sampler_s_picture(host, pack, models, example):
    """The same seed is the same noise."""
    loaded, (source, mask, picture) = models[EMBEDDED], example
    native, sampler = pack("nodes.native").ImitativeModel, pack("nodes.sampler").ImitativeSampler
    with torch.inference_mode():
        uses = [encoded(pack, loaded, picture)]
        model, positive, negative, latent, _, vae = native.execute(loaded, source, mask, uses).args
        sampled = host.nodes.KSampler().sample(model, 7, 2, 1.2, "ddim", "simple", positive, negative, latent)[0]
        [ours] = host.nodes.VAEDecode().decode(vae, sampled)
        own = ("model's own", "model's own", False, 0.5, 10, 0.0, "same for all", 4)
        raw = sampler.execute(loaded, source, mask, uses, 7, 2, 1.2, *own).args[1]
    assert ours.shape == (1, 128, 128, 3) and raw.shape == (1, 112, 128, 3)
    assert (ours[:, 8:120] - raw).abs().max() <= 2 / 255


# --- what the host does with it ------------------------------------------------------------------------------


def test_a_denoise_below_1_keeps_some_of_the_source(pack, loaded, example, edit):
    one = edit(loaded, encoded(pack, loaded, example[2]))
    source = one.source_latent["samples"]
    assert source.shape == one.empty["samples"].shape and not one.empty["samples"].any()
    distances = [error(one.by_host(8, denoise=denoise), source) for denoise in (0.25, 0.5, 0.75)]
    assert 0 < distances[0] < distances[1] < distances[2]


def patches(host):
    """{name: what the stock node makes of a model}."""
    listed = {
        "FreeU_V2": ("freelunch", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
        "PerturbedAttentionGuidance": ("pag", {"scale": 3.0}),
        "RescaleCFG": ("model_advanced", {"multiplier": 0.7}),
        "TomePatchModel": ("tomesd", {"ratio": 0.3}),
        "HyperTile": ("hypertile", {"tile_size": 32, "swap_size": 1, "max_depth": 3, "scale_depth": False}),
    }
    for name, (module, settings) in listed.items():
        node = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
        run = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
        yield name, lambda model, run=run, settings=settings: first(run(model, **settings))


def first(result):
    return getattr(result, "args", result)[0]


def test_model_patches_run_and_repeat(host, pack, models, loaded, example, edit):
    one = edit(loaded, encoded(pack, loaded, example[2]))
    plain = one.by_host(2)
    # ToMe merges at full size only, where the embedded model has no attention.
    idle = {"TomePatchModel"} if loaded is models[EMBEDDED] else set()
    for name, patch in patches(host):
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            results.append(one.by_host(2, model=patch(one.model)))
        assert torch.equal(*results) and results[0].isfinite().all(), name
        if name not in idle:
            assert error(results[0], plain) > EXACT, name
    assert torch.equal(one.by_host(2), plain)


def test_the_tiles_of_a_row_read_what_the_row_reads(host, pack):
    """As HyperTile cuts: the queries of each row into 3 tiles, keys and values not at all."""
    torch.manual_seed(0)
    attention = SimpleNamespace(to_k=torch.nn.Linear(8, 8), to_v=torch.nn.Linear(8, 8))
    features = pack("mimicbrush_core.attention").ReferenceFeatures({"block": torch.randn(1, 5, 8)})
    query, key, value = torch.randn(6, 4, 8), torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    reading, plain = (
        pack("nodes.native_model").ReadingAttention("block", attention, rows) for rows in ([[], [features]], [[], []])
    )
    options = {"n_heads": 2, "attn_precision": None}
    with torch.inference_mode():
        changed = (reading(query, key, value, options) != plain(query, key, value, options)).flatten(1).any(dim=1)
    assert changed.tolist() == [False] * 3 + [True] * 3


def lora_for(loaded):
    """A random LoRA of rank 2 for every self-attention, as the core's trainer names its layers."""
    generator, weights = torch.Generator().manual_seed(5), {}
    for name, weight in loaded.model.modules.unet.named_parameters():
        if ".attn1.to_" in name and name.endswith("weight"):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            weights[f"{key}.lora_up.weight"] = torch.randn(len(weight), 2, generator=generator)
            weights[f"{key}.lora_down.weight"] = 0.1 * torch.randn(2, weight.shape[1], generator=generator)
            weights[f"{key}.alpha"] = torch.tensor(2.0)
    return weights


def with_lora(host, model, weights, strength):
    return host.sd.load_lora_for_models(model, None, weights, strength, 0)[0]


def test_a_lora_changes_the_result_and_leaves_no_trace(host, pack, loaded, example, edit):
    one = edit(loaded, encoded(pack, loaded, example[2]))
    unet, weights = loaded.model.modules.unet, lora_for(loaded)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in unet.named_parameters()}
    plain = one.by_host(2)
    assert error(one.by_host(2, model=with_lora(host, one.model, weights, 1.0)), plain) > 0.01
    for name, weight in unet.named_parameters():  # while the LoRA is in
        assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])
    assert torch.equal(one.by_host(2, model=with_lora(host, one.model, weights, 0.0)), plain)
    assert torch.equal(one.by_host(2), plain)
    for name, weight in unet.named_parameters():
        assert torch.equal(weight, before[name][1])


# --- weights -------------------------------------------------------------------------------------------------


def pointers(module):
    return sorted(weight.data_ptr() for weight in module.parameters())


def test_the_weights_are_there_once(pack, loaded, example, edit):
    one = edit(loaded, encoded(pack, loaded, example[2]))
    unet, native = loaded.model.modules.unet, one.model.model
    assert pointers(native) == pointers(unet)
    assert not {id(weight) for weight in native.parameters()} & {id(weight) for weight in unet.parameters()}
    assert edit(loaded, *one.uses).model.model is native  # nor built twice
    assert one.positive[0][1]["additional_models"] == [loaded.patchers["reference"]]


def test_what_was_away_comes_home(host, pack, loaded, example, edit):
    """To the device and back is a copy; both patchers then find the memory they came from."""
    one = edit(loaded, encoded(pack, loaded, example[2]))
    before = one.by_host(2)
    home = pointers(loaded.model.modules.unet)
    for patcher in (one.model, loaded.patchers["unet"]):
        host.model_management.load_models_gpu([patcher])
        for weight in patcher.model.parameters():
            weight.data = weight.data.clone()
        assert not set(pointers(patcher.model)) & set(home)
        with torch.inference_mode():
            host.model_management.unload_all_models()
        assert pointers(patcher.model) == home
    assert torch.equal(one.by_host(2), before)


def test_nothing_stays_when_the_host_lets_its_wires_go(host, pack, example, edit):
    with torch.inference_mode():
        loaded = pack("nodes.load").LoadMimicBrush.execute("embedded: MimicBrush small", "fp32").args[0]
    one = edit(loaded, encoded(pack, loaded, example[2]))
    one.by_host(1)
    gone = [weakref.ref(each) for each in (loaded, loaded.model, one.model.model)]
    host.model_management.unload_all_models()
    del loaded, one
    gc.collect()
    assert [each() for each in gone] == [None] * 3


@pytest.mark.parametrize("precision, allowed", [("bf16", 0.01), ("fp16", 1e-3)])
def test_half_precisions(host, pack, models, example, edit, precision, allowed):
    with torch.inference_mode():
        half = pack("nodes.load").LoadMimicBrush.execute("embedded: MimicBrush small", precision).args[0]
    ours, exact = (edit(loaded, encoded(pack, loaded, example[2])) for loaded in (half, models[EMBEDDED]))
    assert pointers(ours.model.model) == pointers(half.model.modules.unet)
    difference = ours.vae.decode(ours.by_host(2)) - exact.vae.decode(exact.by_host(2))
    assert 0 < difference.abs().mean() < allowed


def test_diffusers_parts_are_moved_whole(pack, loaded):
    patcher = loaded.patchers["reference"]
    patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    assert patcher.loaded_size() == patcher.model_size() and not patcher.model.model_lowvram
    assert patcher.partially_unload(torch.device("cpu"), 1) == 0
    assert patcher.loaded_size() == patcher.model_size()
    patcher.detach()
    assert patcher.loaded_size() == 0


# --- pictures ------------------------------------------------------------------------------------------------


def test_the_vae_is_the_core_s(pack, loaded, example, edit):
    one = edit(loaded, encoded(pack, loaded, example[2]))
    latents = one.source_latent["samples"]
    pictures = one.vae.decode(latents)
    scaled = latents * loaded.model.modules.vae.config.scaling_factor
    expected = torch.from_numpy(loaded.bring("pictures").decode(scaled)).float() / 255
    assert pictures.shape == expected.shape and (pictures - expected).abs().max() <= 0.5 / 255 + 1e-6
    again = one.vae.encode(expected)
    assert again.shape == latents.shape
    factor, side = loaded.model.latent_factor, expected.shape[1]
    odd = one.vae.encode(torch.nn.functional.pad(expected, (0, 0, 2, 1)))  # 3 columns more than fit
    assert odd.shape == again.shape and factor > 3
    assert error(one.vae.decode_tiled(latents, side // factor, side // factor, 0), pictures) < EXACT
    assert error(one.vae.encode_tiled(expected, side, side, 0), again) < EXACT
    assert one.vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2).shape == pictures.shape


def test_previews_show_the_picture(pack, models, example, edit):
    one = edit(models[EMBEDDED], encoded(pack, models[EMBEDDED], example[2]))
    previewer = importlib.import_module("latent_preview").Latent2RGBPreviewer
    format = one.model.model.latent_format
    shown = previewer(format.latent_rgb_factors, format.latent_rgb_factors_bias)
    preview = shown.decode_latent_to_preview(one.source_latent["samples"])
    picture = one.vae.decode(one.source_latent["samples"]).movedim(-1, 1)
    small = torch.nn.functional.interpolate(picture, preview.size[::-1], mode="area")[0].movedim(0, -1)
    seen = torch.frombuffer(bytearray(preview.tobytes()), dtype=torch.uint8).view(small.shape) / 255
    assert (seen - small).abs().mean() < (small - small.mean((0, 1))).abs().mean() / 3


# --- what is refused -----------------------------------------------------------------------------------------


def refusal(pack):
    return pack("mimicbrush_core.errors").ArgumentError


def test_other_conditionings_and_sizes_are_refused(host, pack, models, example, edit):
    one = edit(models[EMBEDDED], encoded(pack, models[EMBEDDED], example[2]))
    with pytest.raises(refusal(pack), match="from the Imitative Model node"):
        one.by_host(1, positive=[[one.positive[0][0], {}]])
    one.empty, one.noise = {"samples": torch.zeros(1, 4, 16, 16)}, torch.zeros(1, 4, 16, 16)
    with pytest.raises(refusal(pack), match=r"16 x 16.*32 x 32"):
        one.by_host(1)


def test_another_model_s_reference_is_refused(pack, models, example, edit):
    with pytest.raises(refusal(pack), match="another model"):
        edit(models[EMBEDDED], encoded(pack, models[NARROW], example[2]))


@pytest.mark.parametrize("change", [{"attention_head_dim": [1, 2, 4, 8]}, {"block_out_channels": [64, 96, 128, 128]}])
def test_a_u_net_that_comfyui_cannot_build_is_refused(pack, change):
    with pytest.raises(refusal(pack), match="Use the Imitative Sampler"):
        pack("nodes.native_model").native_unet_config({**narrow_config(pack)["unet"], **change})


def test_a_noise_schedule_that_comfyui_does_not_have_is_refused(pack):
    scheduler = {**narrow_config(pack)["scheduler"], "beta_schedule": "squaredcos_cap_v2"}
    with pytest.raises(refusal(pack), match=r"no 'squaredcos_cap_v2'.*Use the Imitative Sampler"):
        pack("nodes.native_model").sampling_settings(scheduler)
