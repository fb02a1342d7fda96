"""The shape an artist asks to keep: depth conditions of the network or of pictures, how strictly, and zoomed in."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mimicbrush_core import images
from mimicbrush_core.depth import drawn_map, fitted_depth_pictures
from mimicbrush_core.editing import EditSettings, edit_window
from mimicbrush_core.errors import ArgumentError, Cancelled, PictureError
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.systems.mimicbrush import MimicBrush

SIZE = 128
MAP = 112  # side of the network's maps
QUICK = EditSettings(steps=2)
SQUARES = [(112, 112), (64, 64), (300, 300)]
SHAPES = [*SQUARES, (300, 200), (150, 300), (61, 90), (90, 61)]
"""(height, width): as large as the network's input, smaller and larger, square, landscape and portrait."""


@pytest.fixture(scope="module")
def model():
    return MimicBrush.load()


@pytest.fixture(scope="module")
def example():
    return EXAMPLES[0].render(SIZE)


@pytest.fixture(scope="module")
def reference(model, example):
    return model.encode_reference(example[2])


@pytest.fixture
def smooth(model):
    """A model whose depth network sees a broad hill, nearest 3.0, right of and above the middle of any square."""
    hilly = MimicBrush(model.modules, model.config)
    hilly.estimate_depth = lambda square: 3.0 * hill(MAP, MAP)[None]
    return hilly


@pytest.fixture
def looks(model):
    """(model, what its depth network looks at): the squares, in the order they were asked for."""
    seen, watched = [], MimicBrush(model.modules, model.config)

    def look(square):
        seen.append(square)
        return model.estimate_depth(square)

    watched.estimate_depth = look
    return watched, seen


def picture(height, width):
    return images.resize_lanczos(EXAMPLES[0].render(256)[0], (height, width))


def hill(height, width):
    """A smooth depth picture [height,width] in 0..1 whose top is a pixel of 1."""
    y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
    values = torch.exp(-4 * ((y[:, None] - 0.4) ** 2 + (x[None] - 0.6) ** 2))
    return values / values.max()


def box_mask(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), np.float32)
    mask[top:bottom, left:right] = 1
    return mask


def as_float(picture):
    return torch.from_numpy(picture)[None].float() / 255


# -------------------- depth pictures, out and in again


@pytest.mark.parametrize("height, width", SHAPES)
def test_the_depth_used_reads_back_as_the_same_maps(model, smooth, height, width):
    """To the bit where no resizing is needed. Where it is, twice bilinear: a smooth map is off by what a straight
    line between neighbours misses of a curve; the real one is blurred at the edges of things only.
    """
    source = picture(height, width)
    for one, mean, largest in ((smooth, 0.002, 0.01), (model, 0.004, 0.1)):
        used = one.depth_condition([source])
        assert used.drawn is None and torch.equal(used.maps, one.estimate_depth(images.pad_to_square(source, 255)))
        pictures = used.as_pictures()
        assert pictures.shape == (1, height, width) and pictures.min() >= 0 and pictures.max() <= 1
        again = one.depth_condition([source], pictures)
        off = (again.maps - used.maps).abs() / used.nearest
        if (height, width) == (MAP, MAP):
            assert off.max() < 1e-6
        assert off.mean() < mean and off.max() < largest


@pytest.mark.parametrize("height, width", SHAPES)
def test_a_drawn_depth_comes_out_as_it_was_drawn(smooth, height, width):
    drawn = hill(width, height).T[None].contiguous()
    used = smooth.depth_condition([picture(height, width)], drawn)
    assert torch.equal(used.drawn, drawn)
    off = (used.as_pictures() - drawn).abs()
    # At the edge to the padding, two of the map's pixels (6 of the picture's) show some of either.
    assert off[:, 6:-6, 6:-6].max() < 0.002
    if height == width:
        assert off.max() < 0.01
    again = smooth.depth_condition([picture(height, width)], used.as_pictures())
    assert (again.maps - used.maps).abs().mean() < 0.002 * 3


def test_white_is_the_nearest_that_the_network_sees_and_black_is_0(smooth):
    white, black = (torch.full((1, 80, 80), value) for value in (1.0, 0.0))
    used = smooth.depth_condition([picture(80, 80)], white)
    assert used.nearest.tolist() == [3.0] and torch.allclose(used.maps, torch.tensor(3.0))
    assert not smooth.depth_condition([picture(80, 80)], black).maps.any()


@pytest.mark.parametrize("height, width", [(150, 300), (300, 150)])
def test_the_padding_keeps_what_the_network_sees_there(smooth, height, width):
    used = smooth.depth_condition([picture(height, width)], torch.zeros(1, height, width))
    seen = smooth.estimate_depth(None)
    if height > width:  # the padding lies left and right
        used, seen = used.maps.transpose(1, 2), seen.transpose(1, 2)
    else:
        used = used.maps
    quarter = MAP // 4  # the padding: a quarter on each side
    assert not used[:, quarter + 1 : -quarter - 1].any()
    for rows in (slice(0, quarter - 1), slice(1 - quarter, None)):
        assert (used - seen)[:, rows].abs().max() < 0.02 * 3


def test_black_that_is_near_is_white_turned_round(smooth):
    source, drawn = picture(90, 60), torch.randint(0, 257, (1, 90, 60)) / 256  # 1 - x is exact
    near_is_white = smooth.depth_condition([source], drawn)
    near_is_black = smooth.depth_condition([source], 1 - drawn, near_is_white=False)
    assert torch.equal(near_is_black.maps, near_is_white.maps)
    assert torch.equal(near_is_black.drawn, near_is_white.drawn)
    assert not torch.equal(smooth.depth_condition([source], drawn, near_is_white=False).maps, near_is_white.maps)


@pytest.mark.parametrize("height, width", [(240, 320), (60, 80), (119, 160), (512, 680)])
def test_a_depth_picture_of_another_resolution_is_fitted(smooth, height, width):
    source = picture(120, 160)
    expected = smooth.depth_condition([source], hill(120, 160)[None])
    fitted = smooth.depth_condition([source], hill(height, width)[None])
    assert fitted.drawn.shape == (1, 120, 160)
    # Resizing a smooth picture; a row more or less of 120 shifts it by up to half a pixel.
    assert (fitted.drawn - expected.drawn).abs().max() < 0.02
    assert (fitted.maps - expected.maps).abs().max() < 0.02 * 3


@pytest.mark.parametrize("height, width", [(120, 120), (160, 120), (120, 164), (117, 160)])
def test_a_depth_picture_of_another_aspect_is_refused(model, height, width):
    with pytest.raises(PictureError, match=f"{width} x {height} pixels, the source 160 x 120"):
        model.depth_condition([picture(120, 160)], torch.ones(1, height, width))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01, 255.0])
def test_a_depth_picture_with_a_wrong_value_is_refused(model, value):
    drawn = torch.full((2, 64, 64), 0.5)
    drawn[1, 5, 7] = value
    with pytest.raises(PictureError, match=r"within 0 to 1"):
        model.depth_condition([picture(64, 64)], drawn)


def test_a_depth_picture_a_little_out_of_range_is_clipped():
    drawn = fitted_depth_pictures(torch.tensor([[[-0.0009, 1.0009]]]).expand(1, 8, 2), 8, 2)
    assert drawn.min() == 0 and drawn.max() == 1


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(model, example, strength):
    with pytest.raises(ArgumentError, match=f"strength is {strength}"):
        model.depth_condition([example[0]], strength=strength)


def test_a_black_picture_without_depth_does_no_harm(model):
    flat = MimicBrush(model.modules, model.config)
    flat.estimate_depth = lambda square: torch.zeros(1, MAP, MAP)
    used = flat.depth_condition([picture(64, 64)])
    assert used.as_pictures().isfinite().all() and not used.as_pictures().any()
    assert flat.depth_condition([picture(64, 64)], torch.ones(1, 64, 64)).maps.isfinite().all()


# -------------------- batches of depths


def test_one_picture_serves_many_depths_and_one_depth_many_pictures(model):
    pictures, drawn = [picture(64, 64), 255 - picture(64, 64)], torch.stack([hill(64, 64), 1 - hill(64, 64)])
    by_depth = model.depth_condition(pictures[:1], drawn)
    by_picture = model.depth_condition(pictures, drawn[:1])
    assert len(by_depth) == len(by_picture) == 2
    for index in range(2):
        alone = model.depth_condition(pictures[:1], drawn[index : index + 1])
        assert torch.equal(by_depth.maps[index], alone.maps[0])
        alone = model.depth_condition(pictures[index : index + 1], drawn[:1])
        assert torch.equal(by_picture.maps[index], alone.maps[0])
        assert by_picture.nearest[index] == alone.nearest[0]
    with pytest.raises(PictureError, match="2 sources, 3 depth pictures"):
        model.depth_condition(pictures, torch.ones(3, 64, 64))


def test_looking_at_pictures_is_counted_and_may_be_cancelled(looks):
    model, seen = looks
    calls = []

    def count(done, total):
        calls.append((done, total, len(seen)))
        if len(calls) == 5:
            raise Cancelled("stop")

    pictures = [picture(64, 64)] * 3
    model.depth_condition(pictures, on_picture=count)
    assert calls == [(0, 3, 0), (1, 3, 1), (2, 3, 2)]
    with pytest.raises(Cancelled):
        model.depth_condition(pictures, on_picture=count)
    assert len(seen) == 3 + 1


def test_each_picture_of_a_batch_keeps_its_own_depth(model, reference):
    pictures = [one.render(SIZE)[0] for one in EXAMPLES[:3]]
    sources = torch.cat([as_float(one) for one in pictures])
    mask = box_mask(SIZE, SIZE, 30, 30, 90, 90)
    depth = model.depth_condition(pictures)
    together = model.edit_batch(sources, torch.from_numpy(mask), reference, QUICK, depth=depth)
    for index, source in enumerate(pictures):
        alone = model.edit(source, mask, reference, QUICK, depth=model.depth_condition([source]))
        difference = (together.raw[index] * 255).round().int() - torch.from_numpy(alone.raw).int()
        assert difference.abs().max() <= 1  # sums in another order
    with pytest.raises(PictureError, match="2 sources, 1 mask, 3 depth"):
        model.edit_batch(sources[:2], torch.from_numpy(mask), reference, QUICK, depth=depth)


def test_a_batch_may_come_from_its_depths_alone(model, example, reference):
    source, mask, _ = example
    depth = model.depth_condition([source], torch.stack([hill(SIZE, SIZE), 1 - hill(SIZE, SIZE)]))
    batch = model.edit_batch(as_float(source), torch.from_numpy(mask), reference, QUICK, depth=depth)
    assert len(batch.pictures) == 2 and not torch.equal(batch.raw[0], batch.raw[1])


# -------------------- how strictly


def test_the_strength_goes_from_no_depth_to_the_depth_along_a_straight_line(model, example):
    source, mask, _ = example
    none, full = (model.encode_source(source, mask, keep_shape=strength).depth for strength in (0.0, 1.0))
    assert (none - full).abs().max() > 0.01 * none.abs().max()
    for strength in (0.5, 0.25):
        between = model.encode_source(source, mask, keep_shape=strength).depth
        assert torch.equal(between, torch.lerp(none, full, strength))
    latent_size = tuple(none.shape[-2:])
    assert torch.equal(none, model.modules.depth_projector(model.no_depth_map(), latent_size))
    assert torch.equal(full, model.modules.depth_projector(model.estimate_depth(source), latent_size))


@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_sources_own_depth_is_the_settings_keep_shape(model, example, reference, strength, zoom):
    source, mask = example[0], box_mask(SIZE, SIZE, 50, 40, 80, 70)
    settings = replace(QUICK, zoom=zoom, minimum=64, margin=0.2)
    kept = model.edit(source, mask, reference, replace(settings, keep_shape=strength)).raw
    depth = model.depth_condition([source], strength=strength)
    assert np.array_equal(model.edit(source, mask, reference, settings, depth=depth).raw, kept)
    plain = model.edit(source, mask, reference, settings).raw
    assert np.array_equal(kept, plain) == (strength == 0)


def test_a_depth_goes_before_the_settings_keep_shape(model, example, reference):
    source, mask, _ = example
    plain = model.edit(source, mask, reference, QUICK).raw
    off = model.depth_condition([source], strength=0.0)
    kept = model.edit(source, mask, reference, replace(QUICK, keep_shape=1.0), depth=off).raw
    assert np.array_equal(kept, plain)


def test_another_pictures_shape_can_be_kept(model, example, reference):
    source, mask, _ = example
    other = EXAMPLES[1].render(SIZE)[0]
    own, others = (
        model.edit(source, mask, reference, QUICK, depth=model.depth_condition([one])).raw for one in (source, other)
    )
    assert not np.array_equal(own, others)


@pytest.mark.parametrize("height, width", [(128, 96), (64, 64), (256, 256)])
def test_a_depth_of_a_picture_of_another_size_is_refused(model, example, reference, height, width):
    source, mask, _ = example
    depth = model.depth_condition([picture(height, width)])
    with pytest.raises(ArgumentError, match=f"picture of {width} x {height} pixels, the source is 128 x 128"):
        model.edit(source, mask, reference, QUICK, depth=depth)
    with pytest.raises(ArgumentError, match="Make it from a picture of that size"):
        model.edit_batch(as_float(source), torch.from_numpy(mask), reference, QUICK, depth=depth)


# -------------------- zoomed in


def zoomed_map(model, depth, mask, settings):
    """What an edit takes as the depth of its window, and that window."""
    window = edit_window([mask], settings)
    taken, encode = [], model.encode_source
    model.encode_source = lambda *args, **options: taken.append(options["depth_map"]) or encode(*args, **options)
    model.edit(depth.pictures[0], mask, model.encode_reference(depth.pictures[0], 64), settings, depth=depth)
    return taken[0], window


ZOOM = EditSettings(steps=1, zoom=True, minimum=32, margin=0.5, feather=1)
SPOT = box_mask(200, 240, 120, 150, 150, 175)


def test_the_network_looks_at_the_window_itself(looks):
    model, seen = looks
    source = picture(200, 240)
    depth = model.depth_condition([source])
    used, window = zoomed_map(model, depth, SPOT, ZOOM)
    part = source[window.slices]
    assert part.shape == (60, 60, 3)
    assert len(seen) == 2 and np.array_equal(seen[1], part)
    assert torch.equal(used, model.estimate_depth(part))


def test_without_zoom_the_network_looks_once(looks):
    model, seen = looks
    depth = model.depth_condition([picture(200, 240)])
    used, _ = zoomed_map(model, depth, SPOT, replace(ZOOM, zoom=False))
    assert len(seen) == 1 and torch.equal(used, depth.maps)


def test_a_drawn_depth_is_cut_to_the_window_and_keeps_the_whole_pictures_scale(smooth):
    drawn = hill(200, 240)[None]
    depth = smooth.depth_condition([picture(200, 240)], drawn)
    used, window = zoomed_map(smooth, depth, SPOT, ZOOM)
    assert used.shape == (1, MAP, MAP)
    part = drawn[:, window.y : window.y + window.height, window.x : window.x + window.width]
    back = torch.nn.functional.adaptive_avg_pool2d(used, part.shape[1:])
    assert (back / 3.0 - part).abs().max() < 0.02  # smoothly resized there and back
    assert torch.equal(used, drawn_map(part[0], smooth.estimate_depth(None), 3.0))


def test_strength_0_looks_at_nothing(looks):
    model, seen = looks
    depth = model.depth_condition([picture(200, 240)], strength=0.0)
    used, _ = zoomed_map(model, depth, SPOT, ZOOM)
    assert used is None and len(seen) == 1


# -------------------- a picture that was saved with its mask cut out


def holed(mask):
    return images.cut_hole(picture(SIZE, SIZE), mask)


def test_a_black_hole_has_no_shape_to_keep(model, reference):
    mask = box_mask(SIZE, SIZE, 40, 40, 80, 80)
    source = holed(mask)
    with pytest.raises(PictureError, match="pure black under the mask"):
        model.edit(source, mask, reference, QUICK, depth=model.depth_condition([source]))
    source[60, 60] = (0, 1, 0)
    model.edit(source, mask, reference, QUICK, depth=model.depth_condition([source]))


def test_a_black_hole_is_found_in_any_picture_of_a_batch(model, reference):
    mask = torch.from_numpy(np.stack([box_mask(SIZE, SIZE, 40, 40, 80, 80)] * 3))
    mask[1] = 0  # nothing is repainted there
    sources = [picture(SIZE, SIZE), np.zeros((SIZE, SIZE, 3), np.uint8), holed(mask[2].numpy())]
    batch = torch.cat([as_float(source) for source in sources])
    with pytest.raises(PictureError, match="pure black under the mask"):
        model.edit_batch(batch, mask, reference, QUICK, depth=model.depth_condition(sources))
    model.edit_batch(batch[:2], mask[:2], reference, QUICK, depth=model.depth_condition(sources[:2]))


def test_a_black_hole_does_not_matter_where_it_is_not_looked_at(model, reference):
    mask = box_mask(SIZE, SIZE, 40, 40, 80, 80)
    source = holed(mask)
    off = model.depth_condition([source], strength=0.0)
    drawn = model.depth_condition([source], hill(SIZE, SIZE)[None])
    whole = model.depth_condition([picture(SIZE, SIZE)])
    for depth in (off, drawn, whole):
        model.edit(source, mask, reference, QUICK, depth=depth)
