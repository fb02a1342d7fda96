"""What another sampler is given: conditions, latents, tokens, and when which reference is read."""

import numpy as np
import pytest
import torch

from mimicbrush_core.bridge import (
    check_references,
    latent_colors,
    reading_spans,
    source_conditions,
    span_tokens,
)
from mimicbrush_core.errors import ArgumentError, PictureError
from mimicbrush_core.references import Reference, ReferenceUse
from mimicbrush_core.systems.mimicbrush import MimicBrush

SIZE = 64


@pytest.fixture(scope="module")
def brush():
    return MimicBrush.load()


def picture(seed, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tensor(*pictures):
    return torch.from_numpy(np.stack(pictures)).float() / 255


def box(height=40, width=56):
    mask = torch.zeros(1, height, width)
    mask[:, 10:30, 12:40] = 1
    return mask


def use(start=0.0, end=1.0, weight=1.0, tokens=0.0):
    reference = Reference(torch.zeros(1, 4, 2, 2), torch.full((1, 3, 5), tokens), owner=None)
    return ReferenceUse(reference, weight, start, end)


# --- references ----------------------------------------------------------------------------------------------


def test_one_reference_is_read_throughout():
    one = use()
    [span] = reading_spans([one])
    assert (span.start, span.end, span.uses) == (0.0, 1.0, (one,))


@pytest.mark.parametrize("steps", [4, 20, 50])
def test_spans_are_the_steps_of_each_reference(steps):
    uses = [use(end=0.5), use(start=0.25), use(start=0.1, end=0.75), use(weight=0.0)]
    spans = reading_spans(uses)
    assert (spans[0].start, spans[-1].end) == (0.0, 1.0)
    assert all(one.end == after.start for one, after in zip(spans, spans[1:], strict=False))
    for step in range(steps):
        [span] = [span for span in spans if span.start <= step / steps < span.end]
        assert span.uses == tuple(one for one in uses if one.active(step, steps))


def test_where_nothing_is_read_there_are_the_tokens_of_no_reference(brush):
    before, _ = reading_spans([use(start=0.5)])
    assert before.uses == () and torch.equal(span_tokens(brush, before), brush.unconditional_tokens())
    [never] = reading_spans([use(weight=0.0)])
    assert never.uses == ()


def test_tokens_stand_side_by_side(brush):
    [span] = reading_spans([use(tokens=1.0), use(tokens=2.0)])
    tokens = span_tokens(brush, span)
    assert tokens.shape == (1, 6, 5) and tokens[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_another_model_s_reference_is_refused(brush):
    own = ReferenceUse(brush.encode_reference(picture(1), SIZE))
    check_references(brush, [own])
    with pytest.raises(ArgumentError, match="another model"):
        check_references(brush, [own, use()])


# --- sources -------------------------------------------------------------------------------------------------


def test_conditions_and_latents_are_the_edit_s_own(brush):
    first, second = picture(1), picture(2)
    condition, latents = source_conditions(brush, tensor(first, second), box(), SIZE)
    mask = box()[0].numpy()
    for index, one in enumerate((first, second)):
        expected = brush.encode_source(one, mask, SIZE)
        assert torch.equal(condition.channels()[index], expected.channels()[0])
        whole = brush.encode_source(one, np.zeros_like(mask), SIZE).hole_latents  # the picture without a hole
        assert torch.equal(latents[index], whole[0]) and not torch.equal(whole, expected.hole_latents)


def test_the_shape_to_keep_is_each_picture_s(brush):
    pictures = [picture(1), picture(2)]
    depth = brush.depth_condition(pictures, strength=0.4)
    condition, _ = source_conditions(brush, tensor(*pictures), box(), SIZE, depth)
    for index, one in enumerate(pictures):
        depth_map = depth.maps[index : index + 1]
        expected = brush.encode_source(one, box()[0].numpy(), SIZE, keep_shape=0.4, depth_map=depth_map)
        assert torch.equal(condition.depth[index], expected.depth[0])


def test_what_does_not_fit_is_refused(brush):
    source = tensor(picture(1))
    with pytest.raises(PictureError, match="mask is empty"):
        source_conditions(brush, source, torch.zeros(1, 40, 56), SIZE)
    with pytest.raises(PictureError, match="2 sources, 3 masks"):
        source_conditions(brush, source.expand(2, -1, -1, -1), box().expand(3, -1, -1), SIZE)
    with pytest.raises(ArgumentError, match="picture of another size"):
        source_conditions(brush, source, box(), SIZE, brush.depth_condition([picture(1, 30, 30)]))
    holed = picture(1)
    holed[box()[0].numpy() > 0] = 0
    with pytest.raises(PictureError, match="pure black under the mask"):
        source_conditions(brush, source, box(), SIZE, brush.depth_condition([holed]))


# --- previews ------------------------------------------------------------------------------------------------


def test_latents_are_seen_in_the_picture_s_colours(brush):
    flat = [np.full((32, 32, 3), color, np.uint8) for color in ((200, 40, 40), (40, 200, 60), (60, 60, 220))]
    colors = latent_colors(brush, flat, SIZE)
    assert colors.shape == (5, 3)
    _, latents = source_conditions(brush, tensor(*flat), torch.ones(1, 32, 32), SIZE)
    seen = (latents.movedim(1, -1) @ colors[:4] + colors[4]).mean(dim=(1, 2))
    assert seen.argmax(dim=1).tolist() == [0, 1, 2]
