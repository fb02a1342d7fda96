"""Writing references: what is kept, what is computed, what is restored; which steps and tokens are read."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from mimicbrush_core.attention import reading_blocks
from mimicbrush_core.errors import ArgumentError, Cancelled
from mimicbrush_core.modules import drop_tail
from mimicbrush_core.references import Reference, ReferenceUse, _tokens_in, combined, write_features

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


def test_a_timestep_named_twice_is_computed_once(unet, reference):
    # Karras spacing rounds neighbouring noise levels to the same timestep.
    reference.prepare(unet, [981.0, 981.0, 501.0, 1.0, 1.0])
    assert reference.features_computed == 3


# -------------------- steps in which a reference is read


@pytest.mark.parametrize(
    ("start", "end", "steps", "read"),
    (
        (0, 1, 4, [0, 1, 2, 3]),
        (0.5, 1, 4, [2, 3]),
        (0, 0.5, 4, [0, 1]),
        (0.25, 0.75, 4, [1, 2]),
        (0, 1e-9, 50, [0]),  # the first step is read by whatever begins at 0
        (0.98, 1, 50, [49]),  # and the last by whatever ends at 1
        (0.981, 1, 50, []),
        (0, 0.98, 50, list(range(49))),
        (0, 1, 1, [0]),
        (0, 0.1, 1, [0]),
        (0.1, 1, 1, []),
        (0.5, 0.5, 4, []),
        (0.75, 0.25, 4, []),
    ),
)
def test_a_range_is_a_share_of_the_steps(reference, start, end, steps, read):
    use = ReferenceUse(reference, 1.0, start, end)
    assert [step for step in range(steps) if use.active(step, steps)] == read
    nothing = ReferenceUse(reference, 0.0, start, end)
    assert not any(nothing.active(step, steps) for step in range(steps))


@pytest.mark.parametrize("cut", (0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9, 1.0))
def test_two_ranges_that_meet_leave_no_step_out_and_share_none(reference, cut):
    first, second = ReferenceUse(reference, end=cut), ReferenceUse(reference, start=cut)
    for steps in (1, 2, 3, 7, 10, 50):
        assert all(first.active(step, steps) != second.active(step, steps) for step in range(steps))


# -------------------- a region of a reference


def inside_by_definition(region, shrink):
    """Token by token: those whose cells are covered by half or more."""
    height, width = (side // shrink for side in region.shape[-2:])
    cells = [
        region[0, 0, row * shrink : (row + 1) * shrink, column * shrink : (column + 1) * shrink].mean()
        for row in range(height)
        for column in range(width)
    ]
    return [index for index, cell in enumerate(cells) if cell >= 0.5]


@pytest.mark.parametrize("shrink", (1, 2, 4))
def test_exactly_the_tokens_inside_a_region_are_taken_at_each_level(shrink):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
        region = torch.zeros(1, 1, 8, 12)
        region[..., top : top + 5, left : left + 7] = 1
        region[..., top, left : left + 7] = 0.75  # a cell that the mask covers in part
        expected = inside_by_definition(region, shrink)
        assert expected
        assert _tokens_in(region, 8 * 12 // shrink**2).tolist() == expected


def test_a_token_half_inside_is_taken_and_one_less_than_half_is_not():
    region = torch.zeros(1, 1, 4, 4)
    region[..., 0, 0], region[..., 0, 1] = 0.5, 0.499
    assert _tokens_in(region, 16).tolist() == [0]


def test_a_region_smaller_than_a_token_takes_the_token_that_it_covers_most():
    region = torch.zeros(1, 1, 8, 8)
    region[..., 5, 2], region[..., 0, 0] = 0.4, 0.3
    assert _tokens_in(region, 64).tolist() == [5 * 8 + 2]
    assert _tokens_in(region, 16).tolist() == [2 * 4 + 1]
    assert _tokens_in(region, 4).tolist() == [2]


def test_only_the_tokens_inside_are_kept_from_the_writing(unet, reference):
    whole = write_at(unet, reference, 501.0)
    region = torch.zeros(1, 1, 16, 24)
    region[..., 4:12, 8:20] = 1
    part = Reference(reference.latents, reference.tokens, owner=None, region=region)
    part.prepare(unet, [501.0])
    assert part.features_computed == 1
    for name, bank in part.banks_at(unet, 501.0).items():
        shrink = round((16 * 24 / whole[name].shape[1]) ** 0.5)
        assert torch.equal(bank, whole[name][:, inside_by_definition(region, shrink)])
    assert part.stored_bytes < sum(bank.numel() * 4 for bank in whole.values())


def test_a_region_of_everything_is_no_region(unet, reference):
    whole = write_at(unet, reference, 501.0)
    part = Reference(reference.latents, reference.tokens, owner=None, region=torch.ones(1, 1, 16, 24))
    assert_same(part.banks_at(unet, 501.0), whole, tolerance=0)


# -------------------- several references


def test_references_of_one_model_and_size_are_combined(reference):
    uses = [ReferenceUse(reference), ReferenceUse(Reference(-reference.latents, reference.tokens, owner=None), 0.5)]
    assert combined(uses) == uses
    assert combined(uses[:1]) == uses[:1]


def test_references_of_other_models_and_sizes_are_not_combined(reference):
    use = ReferenceUse(reference)
    stranger = ReferenceUse(Reference(reference.latents, reference.tokens, owner=object()))
    smaller = ReferenceUse(Reference(reference.latents[..., :8], reference.tokens, owner=None))
    for uses in ([use, stranger], [stranger, use], [use, use, stranger]):
        with pytest.raises(ArgumentError, match="different models"):
            combined(uses)
    for uses in ([use, smaller], [smaller, use], [use, use, smaller]):
        with pytest.raises(ArgumentError, match="different sizes"):
            combined(uses)


def test_features_wait_where_they_are_told_to(unet, reference):
    reference.prepare(unet, TIMESTEPS[:1])
    assert {bank.device.type for bank in reference.banks_at(unet, TIMESTEPS[0]).values()} == {"cpu"}
    reference.clear()
    reference.store_device = torch.device("meta")
    reference.prepare(unet, TIMESTEPS[:1])
    assert {bank.device.type for bank in reference.banks_at(unet, TIMESTEPS[0]).values()} == {"meta"}


def test_all_timesteps_share_the_tokens_keys_and_values(unet, reference):
    projected = []
    first = next(module for module in unet.modules() if hasattr(module, "attn2")).attn2.to_k
    hook = first.register_forward_hook(lambda module, given, output: projected.append(len(output)))
    reference.prepare(unet, TIMESTEPS, at_once=2)
    hook.remove()
    assert projected == [1]
