"""Acceleration and the switches of Load MimicBrush: what was asked for reaches the model, and nothing else changes."""

import pytest
import torch
from node_pictures import boxes, noise
from node_schemas import EMBEDDED

H, W, STEPS = 72, 96, 4
SOURCE, MASK = noise(1, H, W), boxes(H, W, (20, 20))


@pytest.fixture
def fresh(pack, model):
    """fresh(): the same reference, nothing of its features computed yet."""
    return lambda: pack.call("EncodeReference", model=model, picture=noise(1, 40, 40)).reference


@pytest.fixture
def edited(pack, sample, fresh):
    """edited(**inputs of Acceleration) -> (picture, features computed); without inputs, the node is not connected."""

    def run(**inputs):
        reference = fresh()
        connected = {"acceleration": pack.call("Acceleration", **inputs).acceleration} if inputs else {}
        picture = sample(SOURCE, MASK, reference=reference, steps=STEPS, guidance=2.0, **connected).image
        return picture, reference[0].reference.features_computed

    return run


# --- the node ----------------------------------------------------------------------------------------------


def test_the_node_gives_what_was_asked_for(pack):
    core = pack.core("acceleration")
    asked = {"guidance_start": 0.2, "guidance_end": 0.8, "reference_every": 3, "deep_every": 2}
    assert pack.call("Acceleration", **asked).acceleration == core.Acceleration(**asked)
    assert pack.call("Acceleration").acceleration == core.EXACT


def test_an_end_before_the_start_is_refused(pack):
    with pytest.raises(pack.core("errors").ArgumentError, match=r"guidance_start is 0\.6 .* 0\.5; .* the start first"):
        pack.call("Acceleration", guidance_start=0.6, guidance_end=0.5)


# --- the sampler -------------------------------------------------------------------------------------------


def test_the_sampler_looks_at_the_reference_less_often(edited):
    exact, features = edited()
    seldom, fewer = edited(reference_every=2)
    assert (features, fewer) == (STEPS, STEPS // 2)
    assert not torch.equal(seldom, exact)


@pytest.mark.parametrize("change", [{"guidance_start": 0.5}, {"guidance_end": 0.5}, {"deep_every": 2}])
def test_every_setting_reaches_the_model(edited, change):
    exact, features = edited()
    changed, as_many = edited(**change)
    assert as_many == features and not torch.equal(changed, exact)


def test_unless_asked_not_one_bit_changes(pack, edited, model, fresh):
    """Neither without the node nor with the node as it is; compared with the core called without an acceleration."""
    settings, reference = pack.core("editing").EditSettings(steps=STEPS, guidance=2.0), fresh()
    brush = model.bring("pictures", "unet", "reference")
    with torch.inference_mode():
        expected = brush.edit_batch(SOURCE, MASK, reference, settings).pictures
    assert torch.equal(edited()[0], expected)
    assert torch.equal(edited(deep_every=1)[0], expected)


# --- Load MimicBrush ---------------------------------------------------------------------------------------


def laid_out_channels_last(unet):
    """Whether all weights of its 3x3 convolutions are."""
    weights = [weight for weight in unet.parameters() if weight.ndim == 4 and weight.shape[-1] > 1]
    assert weights
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("channels_last, compiled", [(False, False), (True, False), (False, True)])
def test_the_switches_reach_the_loaded_model(pack, channels_last, compiled):
    modules = pack.call("Load", model_name=EMBEDDED, channels_last=channels_last, compiled=compiled).model.model.modules
    for unet in (modules.unet, modules.reference_unet):
        assert laid_out_channels_last(unet) == channels_last
        blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
        assert blocks and {block._compiled_call_impl is not None for block in blocks} == {compiled}


def test_a_vae_without_tiles_is_named(pack):
    with pytest.raises(pack.core("errors").ArgumentError, match="vae_tiling"):
        pack.call("Load", model_name=EMBEDDED, vae_tiling=True)


def test_a_prompt_of_before_the_switches_loads_the_model_as_it_was(pack):
    modules = pack.call("Load", model_name=EMBEDDED).model.model.modules  # optional: not in the prompt
    assert not laid_out_channels_last(modules.unet) and not modules.vae.use_tiling


def test_a_switch_makes_another_model_of_the_same_file(pack):
    fingerprint = pack.nodes["MimicBrushLoad"].fingerprint_inputs
    told = [
        fingerprint(model_name=EMBEDDED, precision="fp32", channels_last=channels_last, vae_tiling=vae_tiling)
        for channels_last, vae_tiling in [(False, False), (True, False), (False, True), (False, False)]
    ]
    assert len(set(told)) == 3 and told[0] == told[3]
