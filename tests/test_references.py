"""Writing references: what is kept, what is computed, what is restored."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from mimicbrush_core.attention import reading_blocks
from mimicbrush_core.errors import Cancelled
from mimicbrush_core.modules import drop_tail
from mimicbrush_core.references import Reference, write_features

TIMESTEPS = [981.0, 741.0, 501.0, 261.0, 1.0]


@pytest.fixture
def unet(alt_unets):
    return alt_unets[1]


@pytest.fixture
def reference(golden):
    step = golden("alt_step")
    latents = step["in.reference_latents"][:, :, :16, :24].contiguous()
    return Reference(latents, step["in.cond_embeds"], owner=None)


@pytest.fixture
def size_of_one(reference, unet):
    return sum(bank.numel() * 4 for bank in write_at(unet, reference, 1.0).values())


def write_at(unet, reference, timestep):
    with torch.no_grad():
        return write_features(unet, reference.latents, torch.tensor([timestep]), reference.tokens)


def processors(unet):
    return {name: block.attn1.processor for name, block in reading_blocks(unet).items()}


def assert_same(banks, expected, tolerance=1e-4):
    assert list(banks) == list(expected)
    for name, bank in banks.items():
        assert bank.shape == expected[name].shape
        assert (bank - expected[name]).abs().max() <= tolerance, name


def test_banks_are_the_inputs_of_self_attention(unet, reference):
    banks = write_at(unet, reference, 501.0)
    for name, block in reading_blocks(unet).items():
        assert banks[name].shape == (1, banks[name].shape[1], block.norm1.normalized_shape[0])
    assert banks["mid_block.attentions.0.transformer_blocks.0"].shape[1] == 2 * 3


def test_the_tail_is_never_used(alt_unets, reference):
    settings = {key: value for key, value in alt_unets[1].config.items() if not key.startswith("_")}
    whole = UNet2DConditionModel(**settings).eval()
    known = alt_unets[1].state_dict()
    for name, parameter in whole.state_dict().items():
        parameter.copy_(known[name] if name in known else torch.full_like(parameter, torch.nan))
    assert len(whole.state_dict()) - len(known) == 24
    assert_same(write_at(whole, reference, 741.0), write_at(alt_unets[1], reference, 741.0), tolerance=0)
    drop_tail(whole)
    assert whole.state_dict().keys() == known.keys()
    assert_same(write_at(whole, reference, 741.0), write_at(alt_unets[1], reference, 741.0), tolerance=0)


def test_processors_come_back(unet, reference):
    own = processors(unet)
    write_at(unet, reference, 1.0)
    assert processors(unet) == own
    with pytest.raises(RuntimeError), torch.no_grad():
        write_features(unet, reference.latents, torch.tensor([1.0]), reference.tokens[..., :-1])
    assert processors(unet) == own


@pytest.mark.parametrize("at_once", (1, 2, 4))
def test_computed_in_batches_equals_computed_singly(unet, reference, at_once):
    reference.prepare(unet, TIMESTEPS, at_once=at_once)
    assert reference.features_computed == len(TIMESTEPS)
    for timestep in TIMESTEPS:
        assert_same(reference.banks_at(unet, timestep), write_at(unet, reference, timestep))
    assert reference.features_computed == len(TIMESTEPS)


def test_features_are_reused(unet, reference):
    reference.prepare(unet, TIMESTEPS)
    reference.prepare(unet, torch.tensor(TIMESTEPS).tolist())
    first = reference.banks_at(unet, torch.tensor(981))
    assert first is reference.banks_at(unet, 981)
    assert reference.features_computed == len(TIMESTEPS)
    reference.prepare(unet, [*TIMESTEPS, 301.0])
    assert reference.features_computed == len(TIMESTEPS) + 1
    reference.banks_at(unet, 302)
    assert reference.features_computed == len(TIMESTEPS) + 2
    reference.clear()
    assert reference.stored_bytes == 0
    reference.banks_at(unet, 981)
    assert reference.features_computed == len(TIMESTEPS) + 3


def test_progress_counts_what_is_missing(unet, reference):
    calls = []
    reference.prepare(unet, TIMESTEPS[:2])
    reference.prepare(unet, TIMESTEPS, at_once=2, on_batch=calls.append)
    assert calls == [2, 1]


@pytest.mark.parametrize("fitting", (0, 1, 2.5, 5))
def test_the_store_stays_within_its_bound(unet, reference, size_of_one, fitting):
    reference.store_bytes = int(fitting * size_of_one)
    sizes = []
    schedules = (TIMESTEPS, [901.0, 741.0, 11.0], TIMESTEPS[::-1])
    for schedule in schedules:
        reference.prepare(unet, schedule, at_once=2, on_batch=lambda *_: sizes.append(reference.stored_bytes))
        sizes.append(reference.stored_bytes)
        for timestep in schedule:
            reference.banks_at(unet, timestep)
            sizes.append(reference.stored_bytes)
    assert max(sizes) <= reference.store_bytes
    assert reference.stored_bytes == int(fitting) * size_of_one


def test_stored_features_own_their_memory(unet, reference):
    reference.prepare(unet, TIMESTEPS)
    for timestep in TIMESTEPS:
        for bank in reference.banks_at(unet, timestep).values():
            assert bank.untyped_storage().nbytes() == bank.numel() * bank.element_size()
            assert not bank.requires_grad


def test_what_does_not_fit_is_computed_when_asked_for(unet, reference, size_of_one):
    reference.store_bytes = 2 * size_of_one
    reference.prepare(unet, TIMESTEPS, at_once=1)
    for timestep in TIMESTEPS:
        assert_same(reference.banks_at(unet, timestep), write_at(unet, reference, timestep))


def test_features_of_another_schedule_make_room(unet, reference, size_of_one):
    reference.store_bytes = 3 * size_of_one
    reference.prepare(unet, [900, 800, 700])
    reference.prepare(unet, [800, 600, 500])
    computed = reference.features_computed
    for timestep in (800, 600, 500):
        reference.banks_at(unet, timestep)
    assert reference.features_computed == computed == 5
    reference.banks_at(unet, 900)
    assert reference.features_computed == computed + 1


def test_cancelling_between_batches(unet, reference):
    own = processors(unet)

    def cancel(count):
        if reference.features_computed == 4:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        reference.prepare(unet, TIMESTEPS, at_once=2, on_batch=cancel)
    assert processors(unet) == own
    assert reference.features_computed == 4
    reference.prepare(unet, TIMESTEPS)
    assert reference.features_computed == 5
    assert_same(reference.banks_at(unet, 981), write_at(unet, reference, 981.0))


def test_nothing_is_computed_for_a_store_that_is_full(unet, reference, size_of_one):
    reference.store_bytes = 2 * size_of_one
    reference.prepare(unet, TIMESTEPS, at_once=2)
    computed = reference.features_computed
    reference.prepare(unet, TIMESTEPS, at_once=2)
    assert reference.features_computed == computed == 2
