"""Depth Condition: what it keeps, the depth picture going out and coming back in, what is refused."""

import numpy as np
import pytest
import torch
from node_pictures import boxes, noise
from PIL import Image

H, W = 72, 96
SOURCE, MASK = noise(1, H, W), boxes(H, W, (20, 20), side=24)


@pytest.fixture
def depth_of(pack, model):
    """depth_of(source, **inputs) -> the node's outputs: depth and picture."""
    return lambda source, **inputs: pack.call("DepthCondition", **{"model": model, "source": source} | inputs)


@pytest.fixture
def edited(sample):
    return lambda depth, source=SOURCE, mask=MASK, **inputs: sample(source, mask, depth=depth, **inputs).image


@pytest.fixture
def errors(pack):
    return pack.core("errors")


def relative(condition):
    """The condition's maps as shares of the nearest the network saw."""
    return condition.maps / condition.nearest[:, None, None]


# --- strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zoom", [False, True])
def test_strength_zero_is_as_without_the_node(depth_of, edited, zoom):
    nothing = depth_of(SOURCE, strength=0.0).depth
    assert torch.equal(edited(nothing, zoom=zoom), edited(None, zoom=zoom))


def test_strength_counts(depth_of, edited):
    results = [edited(depth_of(SOURCE, strength=strength).depth, steps=2) for strength in (0.0, 0.5, 1.0)]
    for one, other in zip(results, results[1:], strict=False):
        assert not torch.equal(one, other)


# --- the depth picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(72, 96), (97, 61), (128, 128)])
def test_the_picture_is_a_picture_of_the_source_s_size(depth_of, height, width):
    picture = depth_of(noise(2, height, width)).picture
    assert picture.shape == (2, height, width, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0
    assert torch.equal(picture[..., 0], picture[..., 1]) and picture.is_contiguous()


def through_8_bits(picture, folder):
    """Saved as PNG and read again, as SaveImage and LoadImage do it."""
    Image.fromarray((picture[0] * 255).clamp(0, 255).to(torch.uint8).numpy()).save(folder / "depth.png")
    return torch.from_numpy(np.asarray(Image.open(folder / "depth.png"))).float()[None] / 255


@pytest.mark.parametrize("height, width", [(72, 96), (97, 61), (128, 128)])
@pytest.mark.parametrize("png", [False, True])
def test_the_picture_read_back_gives_the_same_condition(depth_of, edited, tmp_path, height, width, png):
    """Of maps from 0 to 1: what two resizings blur, up to 0.022 at edges; 8 bits, truncated, add 0.003."""
    source, mask = noise(1, height, width), boxes(height, width, (20, 20), side=24)
    first = depth_of(source)
    picture = through_8_bits(first.picture, tmp_path) if png else first.picture
    again = depth_of(source, depth_picture=picture).depth
    difference = (relative(first.depth) - relative(again)).abs()
    assert difference.max() < 0.03 and difference.mean() < 0.003
    one, other = (edited(depth, source, mask) for depth in (first.depth, again))
    assert (one - other).abs().max() < 3 / 255


def test_a_depth_picture_counts(depth_of, edited):
    flat, ramp = torch.full((1, H, W, 3), 0.5), torch.linspace(0, 1, W).expand(1, H, W)[..., None].repeat(1, 1, 1, 3)
    results = [edited(depth_of(SOURCE, depth_picture=drawn).depth) for drawn in (flat, ramp)]
    results.append(edited(depth_of(SOURCE).depth))
    for index, one in enumerate(results):
        assert all((one - other).abs().max() > 1 / 255 for other in results[:index])


def test_a_depth_picture_counts_in_the_window_of_a_zoom_too(depth_of, edited):
    source, mask = noise(1, 200, 200), boxes(200, 200, (90, 90), side=20)
    near_left = torch.linspace(1, 0, 200).expand(1, 200, 200)[..., None].repeat(1, 1, 1, 3)
    one, other = (
        edited(depth_of(source, depth_picture=drawn).depth, source, mask, zoom=True)
        for drawn in (near_left, near_left.flip(2))
    )
    assert (one - other).abs().max() > 1 / 255


def test_the_inverted_picture_read_as_near_is_black_is_the_same(depth_of):
    drawn = noise(1, H, W, seed=3)[..., :1].repeat(1, 1, 1, 3)
    white = depth_of(SOURCE, depth_picture=drawn).depth
    black = depth_of(SOURCE, depth_picture=1 - drawn, depth_reads="near is black").depth
    assert torch.allclose(relative(white), relative(black), atol=1e-6)
    assert not torch.allclose(relative(white), relative(depth_of(SOURCE, depth_picture=1 - drawn).depth), atol=0.1)


def test_how_it_reads_only_counts_with_a_picture(depth_of):
    white, black = (depth_of(SOURCE, depth_reads=f"near is {colour}").depth for colour in ("white", "black"))
    assert torch.equal(white.maps, black.maps)


@pytest.mark.parametrize("scale", [0.5, 2])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_depth_picture_may_have_another_size_and_other_channels(depth_of, scale, channels):
    smooth = torch.linspace(0, 1, W).expand(H, W)[None, None]
    scaled = torch.nn.functional.interpolate(smooth, scale_factor=scale, mode="bilinear")[0, :, :, :, None]
    grey = scaled.repeat(1, 1, 1, min(channels, 3))
    picture = torch.cat([grey, torch.rand_like(scaled)], dim=-1) if channels == 4 else grey
    given = depth_of(SOURCE, depth_picture=picture).depth
    same_size = depth_of(SOURCE, depth_picture=smooth[0, :, :, :, None].repeat(1, 1, 1, 3)).depth
    assert torch.allclose(relative(given), relative(same_size), atol=0.02)


# --- batches -----------------------------------------------------------------------------------------------


def test_one_depth_serves_all_frames_and_several_serve_one_each(depth_of, sample):
    sources = noise(3, H, W)
    one = sample(sources, MASK, depth=depth_of(sources[1:2]).depth).image
    each = sample(sources, MASK, depth=depth_of(sources).depth, at_once=2).image
    assert torch.equal(one[1], sample(sources[1:2], MASK, depth=depth_of(sources[1:2]).depth).image[0])
    for index in range(3):
        alone = sample(sources[index, None], MASK, depth=depth_of(sources[index, None]).depth).image[0]
        assert (each[index] - alone).abs().max() < 1 / 255 + 1e-6
    assert not torch.equal(one[0], each[0])


def test_depth_pictures_are_one_for_all_or_one_each(depth_of, errors):
    drawn = noise(3, H, W, seed=3)
    assert len(depth_of(SOURCE, depth_picture=drawn).depth) == 3
    assert len(depth_of(noise(3, H, W), depth_picture=drawn[:1]).depth) == 3
    with pytest.raises(errors.PictureError, match="2 sources, 3 depth pictures"):
        depth_of(noise(2, H, W), depth_picture=drawn)


def test_depths_that_do_not_fit_the_batch_are_refused(depth_of, sample, errors):
    with pytest.raises(errors.PictureError, match="3 sources, 1 mask, 2 depth"):
        sample(noise(3, H, W), MASK, depth=depth_of(noise(2, H, W)).depth)


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_depth_of_another_picture_size_is_refused(depth_of, edited, errors):
    with pytest.raises(errors.ArgumentError, match=f"depth was made for a picture of 64 x 48 .*source is {W} x {H}"):
        edited(depth_of(noise(1, 48, 64)).depth)


def test_a_depth_picture_of_another_shape_is_refused(depth_of, errors):
    with pytest.raises(errors.PictureError, match=f"depth picture is {H} x {W} pixels, the source {W} x {H}"):
        depth_of(SOURCE, depth_picture=noise(1, W, H))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 3.0])
def test_a_depth_picture_that_is_none_is_refused(depth_of, errors, value):
    drawn = noise(1, H, W)
    drawn[0, 3, 3] = value
    with pytest.raises(errors.PictureError, match=r"depth picture has values.*0 to 1"):
        depth_of(SOURCE, depth_picture=drawn)


def test_nan_in_the_source_is_refused(depth_of, errors):
    with pytest.raises(errors.PictureError, match=r"source.*NaN"):
        depth_of(torch.full((1, H, W, 3), float("nan")))


def test_a_reading_that_does_not_exist_is_refused(depth_of, errors):
    """ComfyUI 0.3.64 does not check choices, and what comes over a wire no version checks."""
    with pytest.raises(errors.ArgumentError, match="magic"):
        depth_of(SOURCE, depth_picture=noise(1, H, W), depth_reads="magic")


def test_a_source_that_is_black_under_the_mask_has_no_shape_to_keep(depth_of, edited, errors):
    """Some frontends save what was masked as black."""
    holed = torch.where(MASK[..., None] == 1, torch.zeros(()), SOURCE)
    with pytest.raises(errors.PictureError, match=r"pure black under the mask.*before it was masked"):
        edited(depth_of(holed).depth, holed)
    for harmless in (depth_of(holed, strength=0.0), depth_of(holed, depth_picture=noise(1, H, W)), depth_of(SOURCE)):
        edited(harmless.depth, holed)
