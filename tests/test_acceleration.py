"""What an edit may approximate: which work is left out, and what stays exact."""

import pytest
import torch

from mimicbrush_core.acceleration import EXACT, Acceleration, DeepFeatures
from mimicbrush_core.editing import EditSettings
from mimicbrush_core.errors import ArgumentError
from mimicbrush_core.references import ReferenceUse
from mimicbrush_core.sampling import initial_noise, make_scheduler
from mimicbrush_core.systems.mimicbrush import MimicBrush, SourceCondition

STEPS = 6


@pytest.fixture(scope="module")
def model():
    return MimicBrush.load()


@pytest.fixture
def reference(model):
    generator = torch.Generator().manual_seed(3)
    return model.encode_reference(
        torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy(), 64
    )


def sampled(model, reference, acceleration=EXACT, guidance=2.0):
    """Latents, and the batch size of each evaluation of the U-Net: whole ones, and those of the outermost blocks."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    condition = SourceCondition(mask, torch.zeros(1, 4, 16, 16), model.no_depth_feature((16, 16)))
    scheduler = make_scheduler(model.config["scheduler"], steps=STEPS)
    noise, whole, outer = initial_noise([1], (4, 16, 16)), [], []
    unet = model.modules.unet
    hooks = [
        unet.mid_block.register_forward_hook(lambda module, given, output: whole.append(len(output))),
        unet.conv_out.register_forward_hook(lambda module, given, output: outer.append(len(output))),
    ]
    try:
        latents = model.sample(
            condition, [ReferenceUse(reference)], noise, scheduler, guidance, acceleration=acceleration
        )
    finally:
        for hook in hooks:
            hook.remove()
    return latents, whole, outer


def test_nothing_is_approximated_unless_asked(model, reference):
    assert EditSettings().acceleration == EXACT
    latents, whole, outer = sampled(model, reference)
    assert whole == outer == [2] * STEPS and reference.features_computed == STEPS
    assert torch.equal(sampled(model, reference, Acceleration())[0], latents)


def test_guidance_acts_within_its_interval(model, reference):
    exact = sampled(model, reference)[0]
    some, whole, _ = sampled(model, reference, Acceleration(guidance_start=1 / 3, guidance_end=2 / 3))
    assert whole == [1, 1, 2, 2, 1, 1]
    assert torch.equal(sampled(model, reference, Acceleration(0.0, 0.0))[0], sampled(model, reference, guidance=1.0)[0])
    assert not torch.equal(some, exact)


def test_the_reference_is_looked_at_anew_every_k_steps(model, reference):
    exact = sampled(model, reference)[0]
    reference.clear()
    reference.features_computed = 0
    latents, whole, _ = sampled(model, reference, Acceleration(reference_every=4))
    assert reference.features_computed == 2 and whole == [2] * STEPS
    assert reference.missing(make_scheduler(model.config["scheduler"], steps=STEPS).timesteps.tolist()[4:5]) == []
    assert not torch.equal(latents, exact)


def test_deep_blocks_are_computed_every_k_steps(model, reference):
    exact = sampled(model, reference)[0]
    latents, whole, outer = sampled(model, reference, Acceleration(deep_every=3))
    assert whole == [2, 2] and outer == [2] * STEPS
    assert not torch.equal(latents, exact)


def test_going_on_from_deep_features_of_the_same_step_is_exact(model):
    """Only the blocks below the outermost are taken from before: where those are right, so is the whole."""
    unet = model.modules.unet
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 13, 16, 16, generator=generator)
    tokens = torch.randn(2, 65, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad(), DeepFeatures(unet) as deep:
        whole = unet(sample, torch.tensor(300), encoder_hidden_states=tokens).sample
        assert deep.serve(2) and deep.serve(1) and not deep.serve(4)
        assert torch.equal(deep.predict(sample, torch.tensor(300), tokens), whole)
        assert not torch.equal(deep.predict(sample * 2, torch.tensor(300), tokens), whole)
        assert (deep.predict(sample[1:], torch.tensor(300), tokens[1:]) - whole[1:]).abs().max() <= 1e-4
    assert not unet.up_blocks[-2]._forward_hooks


def test_deep_features_of_fewer_rows_do_not_serve(model, reference):
    """Guidance that sets in between needs both rows' deep features: they are computed when it does."""
    _, whole, outer = sampled(model, reference, Acceleration(guidance_start=0.5, deep_every=6))
    assert whole == [1, 2] and outer == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "wrong",
    [{"guidance_start": 0.6, "guidance_end": 0.5}, {"guidance_end": 1.1}, {"reference_every": 0}, {"deep_every": -1}],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        EditSettings(acceleration=Acceleration(**wrong)).check()
