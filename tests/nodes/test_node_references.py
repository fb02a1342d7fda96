"""Encode Reference and Combine References: weights, spans, several references, their masks, what is computed once."""

import pytest
import torch
from node_pictures import boxes, noise
from node_schemas import EMBEDDED

H, W = 72, 96
SOURCE, MASK = noise(1, H, W), boxes(H, W, (20, 20))


@pytest.fixture
def encode(pack, model):
    """encode(picture, **inputs) -> what the REFERENCE wire carries."""
    return lambda picture, **inputs: (
        pack.call("EncodeReference", **{"model": model, "picture": picture} | inputs).reference
    )


@pytest.fixture
def edited(sample):
    """edited(reference, **inputs) -> the sampler's IMAGE."""
    return lambda reference, **inputs: sample(SOURCE, MASK, reference=reference, **inputs).image


@pytest.fixture
def combine(pack):
    return lambda *uses: (
        pack.call("CombineReferences", **{f"reference_{number}": one for number, one in enumerate(uses, 1)}).reference
    )


@pytest.fixture
def errors(pack):
    return pack.core("errors")


def features(uses):
    return [use.reference.features_computed for use in uses]


# --- the picture -------------------------------------------------------------------------------------------


def test_another_reference_makes_another_picture(encode, edited):
    one, other = (edited(encode(noise(1, 40, 40, seed=seed))) for seed in (1, 2))
    assert (one - other).abs().max() > 0.02


@pytest.mark.parametrize("height, width", [(8, 8), (30, 400), (300, 9)])
def test_a_reference_may_have_any_size_and_shape(encode, edited, height, width):
    assert edited(encode(noise(1, height, width))).isfinite().all()


def test_a_transparent_reference_is_seen_on_white(encode, edited):
    picture = noise(1, 40, 40, channels=4)
    picture[..., 3] = (picture[..., 3] > 0.5).float()
    white = torch.where(picture[..., 3:] == 1, picture[..., :3], torch.ones(()))
    assert torch.equal(edited(encode(picture)), edited(encode(white)))


def test_nan_is_refused(encode, errors):
    with pytest.raises(errors.PictureError, match=r"reference.*NaN"):
        encode(torch.full((1, 40, 40, 3), float("nan")))


@pytest.mark.parametrize("size, side", [(0, 128), (64, 64), (192, 192)])
def test_the_size_is_what_the_sampler_works_at(encode, edited, model, monkeypatch, size, side):
    decoded, decode = [], model.model.decode
    monkeypatch.setattr(model.model, "decode", lambda latents: decoded.append(decode(latents)) or decoded[-1])
    edited(encode(noise(1, 40, 40), size=size))
    assert decoded[-1].shape == (1, side, side, 3)


def test_a_size_the_model_cannot_work_at_is_refused(encode, errors):
    with pytest.raises(errors.ArgumentError, match="size is 100; this model needs a multiple of 16"):
        encode(noise(1, 40, 40), size=100)


# --- computed once -----------------------------------------------------------------------------------------


def test_edits_that_differ_in_the_seed_compute_the_features_once(encode, edited):
    reference = encode(noise(1, 40, 40))
    pictures = [edited(reference, seed=seed, steps=3) for seed in (1, 2)]
    assert features(reference) == [3]
    assert not torch.equal(*pictures)


def test_a_batch_computes_the_features_once(sample, encode):
    reference = encode(noise(1, 40, 40))
    sample(noise(3, H, W), MASK, reference=reference, steps=2, at_once=1)
    assert features(reference) == [2]


# --- weight and span ---------------------------------------------------------------------------------------


def test_weight_zero_is_as_if_there_were_no_reference(encode, edited):
    pictures = (noise(1, 40, 40, seed=seed) for seed in (1, 2))
    one, other = (encode(picture, weight=0.0) for picture in pictures)
    assert torch.equal(edited(one, steps=2), edited(other, steps=2))
    assert features(one) == [0]


def test_more_weight_leans_harder_on_the_reference(encode, edited):
    picture = noise(1, 40, 40, seed=1)
    none, some, usual, more = (edited(encode(picture, weight=weight)) for weight in (0.0, 0.5, 1.0, 4.0))
    for one, other in ((none, some), (some, usual), (usual, more)):
        assert (one - other).abs().max() > 1 / 255


@pytest.mark.parametrize("start, end, read", [(0, 1, 4), (0, 0.5, 2), (0.5, 1, 2), (0.25, 0.5, 1)])
def test_a_reference_is_read_between_start_and_end_only(encode, edited, start, end, read):
    reference = encode(noise(1, 40, 40), start=start, end=end)
    part, whole = edited(reference, steps=4), edited(encode(noise(1, 40, 40)), steps=4)
    assert features(reference) == [read]
    assert torch.equal(part, whole) == (read == 4)


@pytest.mark.parametrize("start, end", [(0.5, 0.5), (0.6, 0.4), (0.0, 0.0), (1.0, 1.0)])
def test_a_reference_that_would_never_be_read_is_refused(encode, errors, start, end):
    with pytest.raises(errors.ArgumentError, match=f"start is {start} and end is {end}.*Lower start"):
        encode(noise(1, 40, 40), start=start, end=end)


# --- several -----------------------------------------------------------------------------------------------


def test_the_pictures_of_a_batch_are_several_references(encode, edited, combine):
    pictures = noise(3, 40, 40)
    together = encode(pictures, weight=0.7)
    assert len(together) == 3 and [use.weight for use in together] == [0.7] * 3
    singly = combine(*(encode(picture[None], weight=0.7) for picture in pictures))
    assert torch.equal(edited(together, steps=2), edited(singly, steps=2))


def test_every_combined_reference_counts(encode, edited, combine):
    uses = [encode(noise(1, 40, 40, seed=seed)) for seed in range(4)]
    results = [edited(combine(*uses[:count])) for count in (2, 3, 4)]
    results.append(edited(uses[0]))
    for index, one in enumerate(results):
        assert all((one - other).abs().max() > 1 / 255 for other in results[:index])


def test_combining_keeps_each_one_s_weight_and_span(encode, edited, combine):
    one, silent = encode(noise(1, 40, 40, seed=1)), encode(noise(1, 40, 40, seed=2), weight=0.0)
    assert torch.equal(edited(combine(one, silent), steps=2), edited(one, steps=2))
    late = encode(noise(1, 40, 40, seed=2), start=0.5)
    edited(combine(one, late), steps=4)
    assert features(late) == [2]


def test_combining_does_not_change_what_came_in(encode, combine):
    one, other = encode(noise(1, 40, 40)), encode(noise(2, 40, 40))
    assert len(combine(one, other)) == 3 and (len(one), len(other)) == (1, 2)


def test_references_of_different_sizes_are_refused(encode, edited, combine, errors):
    small, large = encode(noise(1, 40, 40), size=64), encode(noise(1, 40, 40), size=128)
    for pair in ((small, large), (large, small)):
        with pytest.raises(errors.ArgumentError, match=r"(?s)size"):
            edited(combine(*pair))


def test_a_reference_of_another_model_is_refused(pack, edited, errors):
    other = pack.call("Load", model_name=EMBEDDED, precision="fp32").model
    reference = pack.call("EncodeReference", model=other, picture=noise(1, 40, 40)).reference
    with pytest.raises(errors.ArgumentError, match=r"encoded by another model\. Encode it again"):
        edited(reference)


# --- masks on the reference --------------------------------------------------------------------------------


def test_what_lies_outside_the_reference_mask_cannot_show(encode, edited):
    picture, mask = noise(1, 64, 64), boxes(64, 64, (16, 16), side=32)
    changed = torch.where(mask[..., None] == 1, picture, noise(1, 64, 64, seed=9))
    one, other = (edited(encode(each, mask=mask), steps=2, guidance=3.0) for each in (picture, changed))
    assert torch.equal(one, other)
    assert not torch.equal(edited(encode(picture), steps=2), edited(encode(changed), steps=2))


def test_what_lies_inside_the_reference_mask_shows(encode, edited):
    picture, mask = noise(1, 64, 64), boxes(64, 64, (16, 16), side=32)
    changed = torch.where(mask[..., None] == 1, noise(1, 64, 64, seed=9), picture)
    one, other, whole = (
        edited(encode(picture, mask=mask)),
        edited(encode(changed, mask=mask)),
        edited(encode(picture)),
    )
    assert (one - other).abs().max() > 1 / 255 and (one - whole).abs().max() > 1 / 255


def test_what_is_hidden_is_not_offered_as_white_either(encode, edited):
    picture, mask = noise(1, 64, 64), boxes(64, 64, (16, 16), side=32)
    whitened = torch.where(mask[..., None] == 1, picture, torch.ones(()))
    assert not torch.equal(edited(encode(picture, mask=mask)), edited(encode(whitened)))


def test_a_tiny_reference_mask_still_counts(encode, edited):
    mask = boxes(64, 64, (30, 30), side=3)
    one, other = (edited(encode(noise(1, 64, 64, seed=seed), mask=mask)) for seed in (1, 2))
    assert one.isfinite().all() and not torch.equal(one, other)


def test_one_picture_with_several_masks_is_several_references(encode):
    assert len(encode(noise(1, 64, 64), mask=boxes(64, 64, (0, 0), (30, 30)))) == 2


def test_a_mask_without_a_batch_is_one_mask(encode, edited):
    """As some packs give it, and as the sampler takes it."""
    picture, mask = noise(1, 64, 64), boxes(64, 64, (16, 16), side=32)
    assert torch.equal(edited(encode(picture, mask=mask[0])), edited(encode(picture, mask=mask)))


def test_reference_masks_that_do_not_fit_are_refused(encode, errors):
    with pytest.raises(errors.PictureError, match="3 references, 2 reference masks"):
        encode(noise(3, 64, 64), mask=boxes(64, 64, (0, 0), (30, 30)))
    with pytest.raises(errors.PictureError, match="reference mask is 64 x 72 pixels, the picture 64 x 64"):
        encode(noise(1, 64, 64), mask=boxes(72, 64, (0, 0)))
    with pytest.raises(errors.PictureError, match="reference mask is empty"):
        encode(noise(1, 64, 64), mask=torch.zeros(1, 64, 64))
