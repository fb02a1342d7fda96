"""Imitative Sampler: what is kept to the last bit, what is repainted, batches, seeds, the window."""

import pytest
import torch
from node_pictures import boxes, noise

H, W = 72, 96
ONE_STEP_OF_8_BITS = 1 / 255 + 1e-6
CORNERS = [(8, 8), (40, 60), (30, 30)]


@pytest.fixture
def refusal(pack):
    return pack.core("errors").PictureError


def bits(pictures):
    """The values as they lie in memory: equal floats may differ (0.0 and -0.0), NaNs are never equal."""
    return pictures.contiguous().view(torch.int32)


def same_bits(one, other, where=None):
    where = torch.ones(one.shape[:3], dtype=torch.bool) if where is None else where
    return torch.equal(bits(one)[where], bits(other)[where])


# --- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sources, masks", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_each_picture_of_a_batch_comes_out_as_it_would_alone(sample, sources, masks):
    source, mask = noise(sources, H, W), boxes(H, W, *CORNERS[:masks])
    together = sample(source, mask, seed=5, at_once=2)
    count = max(sources, masks)
    assert together.image.shape == (count, H, W, 3)
    assert together.raw.shape == (count, H, W, 3) and together.blend.shape == (count, H, W)
    for index in range(count):
        one, its_mask = source[index % sources][None], mask[index % masks][None]
        alone = sample(one, its_mask, seed=5)
        assert torch.equal(together.blend[index], alone.blend[0])
        assert (together.image[index] - alone.image[0]).abs().max() <= ONE_STEP_OF_8_BITS
        assert (together.image[index] - one[0])[its_mask[0] == 1].abs().mean() > 0.05


def test_a_mask_without_a_batch_is_one_mask(sample):
    mask = boxes(H, W, (20, 20))
    assert same_bits(sample(noise(2, H, W), mask[0]).image, sample(noise(2, H, W), mask).image)


@pytest.mark.parametrize("sources, masks", [(2, 3), (3, 2)])
def test_batches_that_do_not_fit_are_refused(sample, refusal, sources, masks):
    with pytest.raises(refusal, match=f"{sources} sources, {masks} masks.*either one .* or as many"):
        sample(noise(sources, H, W), boxes(H, W, *CORNERS[:masks]))


def test_the_seeds_of_a_batch_are_one_or_count_up(sample):
    source, mask = noise(1, H, W).expand(3, -1, -1, -1), boxes(H, W, (20, 20))
    calm = sample(source, mask, seed=11, batch_seeds="same for all", at_once=2).image
    assert (calm - calm[:1]).abs().max() <= ONE_STEP_OF_8_BITS
    varied = sample(source, mask, seed=11, batch_seeds="count up", at_once=2).image
    for index in range(3):
        alone = sample(source[:1], mask, seed=11 + index).image[0]
        assert (varied[index] - alone).abs().max() <= ONE_STEP_OF_8_BITS
        assert (varied[index] - varied[index - 1]).abs().max() > 3 * ONE_STEP_OF_8_BITS


def test_the_largest_seed_counts_on(sample):
    sample(noise(2, H, W), boxes(H, W, (20, 20)), seed=2**63 - 1, batch_seeds="count up")


def test_the_same_inputs_give_the_same_bits_and_another_seed_another_picture(sample):
    source, mask = noise(1, H, W), boxes(H, W, (20, 20))
    first, again, other = (sample(source, mask, seed=seed, steps=3).image for seed in (1, 1, 2))
    assert same_bits(first, again)
    assert (first - other).abs().max() > 0.02


# --- what is kept ------------------------------------------------------------------------------------------


def test_frames_without_a_mask_come_back_as_they_were(sample):
    source, mask = noise(4, H, W), boxes(H, W, (8, 8), None, (30, 30), None)
    mask[3] = 128 / 255  # grey all over, but nothing above half: not a region to repaint
    result = sample(source, mask)
    for kept in (1, 3):
        assert same_bits(result.image[kept, None], source[kept, None]) and result.blend[kept].max() == 0
        assert (result.raw[kept] - source[kept]).abs().max() <= 0.5 / 255 + 1e-6
    for edited in (0, 2):
        assert result.blend[edited].max() == 1 and not torch.equal(result.image[edited], source[edited])


@pytest.mark.parametrize("feather", [0, 3, 10])
def test_beyond_the_blend_not_one_bit_changes(sample, feather):
    source = noise(2, H, W) * 1.6 - 0.3  # some values lie beyond 0..1
    source[:, 0, 0], source[:, 0, 1] = -0.0, 1e-40
    given = source.clone()
    mask = boxes(H, W, (20, 20), (40, 60))
    result = sample(source, mask, feather=feather)
    outside = result.blend == 0
    assert same_bits(result.image, given, outside)
    assert same_bits(source, given)  # the host keeps its inputs for other nodes
    reach = torch.nn.functional.max_pool2d(mask, 2 * feather + 1, stride=1, padding=feather)
    assert outside[reach == 0].all() and not outside[mask == 1].any()
    if feather == 0:
        assert torch.equal(result.blend, mask)
    else:
        assert not outside[reach > mask].all()


def test_transparency_is_kept_outside_and_opened_inside(sample):
    source = noise(1, H, W, channels=4)
    source[..., 3] *= 0.5
    mask = boxes(H, W, (20, 20))
    result = sample(source, mask)
    assert result.image.shape == (1, H, W, 4) and result.raw.shape == (1, H, W, 3)
    assert same_bits(result.image, source, result.blend == 0)
    assert (result.image[..., 3][result.blend == 1] == 1).all()
    border = (result.blend > 0) & (result.blend < 1)
    assert (result.image[..., 3] > source[..., 3])[border].all()


def test_inside_the_blend_is_the_model_s_answer(sample):
    source, mask = noise(1, H, W), boxes(H, W, (20, 20))
    result = sample(source, mask)
    inside = result.blend == 1
    assert inside.any() and same_bits(result.image, result.raw, inside)


def test_a_soft_mask_blends_softly(sample):
    source, mask = noise(1, H, W), boxes(H, W, (20, 20), side=30)
    mask[0, 20:50, 20:50] = torch.linspace(0.1, 1, 30)  # a ramp from left to right
    result = sample(source, mask, feather=0)
    assert torch.allclose(result.blend, (mask * 255).round() / 255)
    weight = result.blend[..., None]
    assert torch.allclose(result.image, source + weight * (result.raw - source), atol=1e-6)


# --- what is refused ---------------------------------------------------------------------------------------


def test_an_empty_mask_is_refused_and_says_what_to_do(sample, refusal):
    for mask in (torch.zeros(1, H, W), torch.zeros(3, H, W), torch.full((1, H, W), 128 / 255)):
        with pytest.raises(refusal, match=r"mask is empty.*Paint the region to repaint in white"):
            sample(noise(1, H, W), mask)


def test_the_mask_of_a_picture_without_transparency_is_called_empty_not_too_small(sample, refusal):
    load_image_gives = torch.zeros(1, 64, 64)
    with pytest.raises(refusal, match="mask is empty"):
        sample(noise(1, H, W), load_image_gives)


def test_a_mask_of_another_size_is_refused(sample, refusal):
    with pytest.raises(refusal, match=f"mask is {W + 8} x {H} pixels, the picture {W} x {H}"):
        sample(noise(1, H, W), boxes(H, W + 8, (20, 20)))


@pytest.mark.parametrize("role, index", [("source", 0), ("source", 1), ("mask", 0), ("mask", 1)])
def test_nan_is_refused(sample, refusal, role, index):
    given = {"source": noise(2, H, W), "mask": boxes(H, W, (20, 20), (30, 30))}
    given[role][index, 3, 3] = float("nan")
    with pytest.raises(refusal, match=f"The {role}.* NaN"):
        sample(**given)


@pytest.mark.parametrize("values", [-0.5, 1.5, float("inf")])
def test_a_mask_beyond_its_range_is_refused(sample, refusal, values):
    mask = boxes(H, W, (20, 20))
    mask[0, 3, 3] = values
    with pytest.raises(refusal, match="mask has values"):
        sample(noise(1, H, W), mask)


# --- the window --------------------------------------------------------------------------------------------


def test_without_zoom_the_window_is_the_whole_picture(sample):
    result = sample(noise(1, H, W), boxes(H, W, (20, 20)))
    assert (result.x, result.y, result.width, result.height) == (0, 0, W, H)


@pytest.mark.parametrize("channels", [3, 4])
def test_zoom_makes_one_window_and_says_where_it_is(sample, channels):
    source = noise(2, 220, 300, channels=channels)
    mask = boxes(220, 300, (70, 120), (110, 170), side=24)
    result = sample(source, mask, zoom=True, zoom_margin=0.5)
    assert [type(one) for one in (result.x, result.y, result.width, result.height)] == [int] * 4
    assert result.x > 0 and result.y > 0 and result.x + result.width < 300 and result.y + result.height < 220
    assert result.raw.shape == (2, result.height, result.width, 3)
    window = (slice(None), slice(result.y, result.y + result.height), slice(result.x, result.x + result.width))
    blend = result.blend[window]
    assert blend.count_nonzero() == result.blend.count_nonzero()  # nothing of the edit lies beyond it
    inside = blend == 1
    assert inside[0].any() and inside[1].any()
    assert torch.equal(result.image[window][..., :3][inside], result.raw[inside])
    # Around all masks of the batch (64 high, 74 wide) with the margin on each side, as a square.
    assert (result.width, result.height) == (148, 148)
    assert abs(result.x + 74 - (120 + 194) / 2) <= 1 and abs(result.y + 74 - (70 + 134) / 2) <= 1


def test_zoom_shows_the_model_more_of_a_small_region(sample):
    source, mask = noise(1, 256, 256), boxes(256, 256, (100, 100))
    far, near = (sample(source, mask, zoom=zoom) for zoom in (False, True))
    assert near.width == 128 and far.width == 256
    assert (far.image - near.image).abs().max() > 0.02
    assert same_bits(near.image, source, near.blend == 0)


def test_a_wider_margin_makes_a_wider_window(sample):
    source, mask = noise(1, 300, 300), boxes(300, 300, (120, 120), side=50)
    widths = [sample(source, mask, zoom=True, zoom_margin=margin).width for margin in (0.5, 1.0, 2.0)]
    assert widths == [128, 150, 250]


# --- colours -----------------------------------------------------------------------------------------------


def test_color_match_takes_a_drift_of_colour_off(sample, model, monkeypatch):
    source, mask = (noise(1, 128, 128) * 0.5 + 0.25).mul(255).round() / 255, boxes(128, 128, (40, 40), side=30)
    drift = torch.tensor([20, -10, 5]) / 255
    drifted = ((source[0] + drift) * 255).round().to(torch.uint8).numpy()
    monkeypatch.setattr(model.model, "decode", lambda latents: drifted[None])
    for share in (0.0, 0.5, 1.0):
        result = sample(source, mask, color_match=share)
        left = (result.image - source)[result.blend == 1].mean(dim=0)
        assert torch.allclose(left, drift * (1 - share), atol=0.6 / 255)
        assert same_bits(result.image, source, result.blend == 0)


# --- settings ----------------------------------------------------------------------------------------------


def test_zero_means_the_model_s_own(sample, model):
    source, mask = noise(1, H, W), boxes(H, W, (20, 20))
    own = model.model.config["defaults"]
    stated = {"steps": own["steps"], "guidance": own["guidance"], "sampler": own["scheduler"]}
    assert same_bits(sample(source, mask).image, sample(source, mask, **stated).image)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3},
        {"guidance": 4.0},
        {"guidance": 2.0},
        {"steps": 3, "scheduler": "linspace", "sampler": "unipc"},
        {"scheduler": "leading"},
    ],
)
def test_settings_reach_the_model(sample, change):
    source, mask = noise(1, H, W), boxes(H, W, (20, 20))
    plain = {"steps": 3, "scheduler": "linspace"} if "sampler" in change else {}
    assert (sample(source, mask, **plain).image - sample(source, mask, **change).image).abs().max() > 0.01


@pytest.mark.parametrize("name", ["sampler", "scheduler", "batch_seeds"])
def test_an_option_that_does_not_exist_is_refused(pack, sample, name):
    """ComfyUI 0.3.64 does not check choices, and what comes over a wire no version checks."""
    with pytest.raises(pack.core("errors").ArgumentError, match="magic"):
        sample(noise(1, H, W), boxes(H, W, (20, 20)), **{name: "magic"})


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("scheduler", ["model's own", "leading", "trailing", "linspace", "karras"])
def test_every_sampler_runs_with_every_scheduler(sample, sampler, scheduler):
    result = sample(noise(1, H, W), boxes(H, W, (20, 20)), steps=2, sampler=sampler, scheduler=scheduler)
    assert result.raw.isfinite().all() and result.raw.std() > 0.01
