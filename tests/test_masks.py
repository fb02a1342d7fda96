"""masks.py: mask arithmetic, precision, zoom windows, paste-back and the seam's colours. The recorded pictures of the
original are the judge."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimicbrush_core import images, masks
from mimicbrush_core.errors import ArgumentError, PictureError

GOLDEN = Path(__file__).parent / "golden" / "mimicbrush"
CASES = ("landscape", "portrait", "oddsquare")


def golden(name):
    with Image.open(GOLDEN / "images" / f"{name}.png") as image:
        return np.array(image)


def mask_of(case):
    return images.read_mask(GOLDEN / "images" / f"{case}_mask.png")


def box_mask(height, width, top, left, box_height, box_width):
    mask = np.zeros((height, width), np.float32)
    mask[top : top + box_height, left : left + box_width] = 1
    return mask


def random_box(random, height, width):
    top, left = int(random.integers(0, height)), int(random.integers(0, width))
    return top, left, int(random.integers(1, height - top + 1)), int(random.integers(1, width - left + 1))


# -------------------- recorded pictures


@pytest.mark.parametrize("case", CASES)
def test_model_and_latent_masks_match_the_original(case):
    model_mask = masks.mask_for_model(mask_of(case), 512)
    assert model_mask.dtype == np.float32 and np.array_equal(model_mask * 255, golden(f"{case}_mask_512"))
    latent = masks.latent_mask(model_mask, 8)
    assert latent.dtype == torch.float32 and latent.is_contiguous()
    assert torch.equal(latent, load_file(GOLDEN / f"prep_{case}.safetensors")["mask_latent_64"].float())


@pytest.mark.parametrize("case", CASES)
def test_feather_and_paste_back_match_the_original(case):
    alpha = masks.feather_alpha(mask_of(case))
    assert np.array_equal(alpha, golden(f"{case}_post_mask_alpha"))
    source, expected = golden(f"{case}_source"), golden(f"{case}_post_result")
    pasted = masks.paste_back(golden(f"{case}_post_cropped_pred"), source, alpha)
    assert np.array_equal(pasted, expected)
    height, width = source.shape[:2]
    side = max(height, width)
    square = images.resize_bilinear(golden(f"{case}_stub_prediction"), side, side)
    prediction = images.crop_padding(square, height, width)
    difference = np.abs(masks.paste_back(prediction, source, alpha).astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert not difference[alpha == 0].any()


@pytest.mark.parametrize(("case", "pipe"), [("landscape", "pipe_s5_shape"), ("portrait", "pipe_s20_noshape")])
def test_the_alpha_covers_every_change_of_the_whole_run(case, pipe):
    alpha = masks.feather_alpha(mask_of(case))
    changed = (golden(f"{pipe}_run_local_result") != golden(f"{case}_source")).any(axis=2)
    assert changed.any() and not changed[alpha == 0].any()


def test_benchmark_masks_and_result_match_the_original():
    """run_inference_benchmark.py scales the mask first, but pastes by the original, un-binarised mask,
    rounded."""
    scaled = images.resize_bilinear(golden("landscape_mask"), 384, 512) / np.float32(255)
    model_mask = masks.mask_for_model(scaled, 512)
    assert (model_mask * 255 != golden("bench_landscape_mask_512")).sum() <= 2
    recorded = load_file(GOLDEN / "prep_bench_landscape.safetensors")["mask_latent_64"].float()
    assert torch.equal(masks.latent_mask(model_mask, 8), recorded)
    alpha = masks.binomial_blur(golden("landscape_mask"), 10)
    result, source = golden("landscape_post_cropped_pred") / 255, golden("landscape_source") / 255
    pasted = np.rint(masks.paste_back_float(result, source, alpha) * 255)
    assert np.array_equal(pasted, golden("bench_landscape_result"))


# -------------------- threshold, checks


def test_the_threshold_is_128_exclusive():
    values = np.arange(256, dtype=np.float32).reshape(16, 16) / np.float32(255)
    assert np.array_equal(masks.binarize(values).ravel(), np.arange(256) > 128)
    assert masks.binarize(np.full((8, 8), 128.6 / 255, np.float32)).all()


def test_good_masks_pass():
    masks.check_mask(box_mask(10, 20, 3, 3, 1, 1), 10, 20)
    masks.check_mask(np.full((8, 8), 129 / 255, np.float32), 8, 8)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (np.ones((20, 10), np.float32), "10 x 20 pixels, the picture 20 x 10"),
        (np.ones((10, 20, 1), np.float32), "shape"),
        (np.where(np.eye(10, 20) > 0, np.nan, 1).astype(np.float32), "NaN"),
        (np.zeros((10, 20), np.float32), "empty.* 0 of 255.*above 128"),
        (np.full((10, 20), 128 / 255, np.float32), "empty.* 128 of 255.*above 128"),
        (np.full((10, 20), 255, np.uint8), "within 0 to 1"),
        (np.full((10, 20), -0.5, np.float32), "within 0 to 1"),
        (np.full((10, 20), np.inf, np.float32), "within 0 to 1"),
    ],
)
def test_bad_masks_are_refused(mask, found):
    with pytest.raises(PictureError, match=found):
        masks.check_mask(mask, 10, 20)


def test_masks_for_models_are_binary_and_padded_with_black():
    model_mask = masks.mask_for_model(np.ones((20, 40), np.float32), 64)
    assert set(np.unique(model_mask)) == {0.0, 1.0}
    assert model_mask[16:48].all() and not model_mask[:15].any() and not model_mask[49:].any()


def test_latent_masks_take_the_top_left_pixel():
    mask = np.zeros((16, 24), np.float32)
    mask[8, 16] = mask[1, 1] = 1
    latent = masks.latent_mask(mask, 8)
    assert latent.tolist() == [[[[0, 0, 0], [0, 0, 1]]]]
    with pytest.raises(ArgumentError, match="24 x 16"):
        masks.latent_mask(mask, 5)


@pytest.mark.parametrize(
    ("check", "mask", "found"),
    [
        (masks.check_mask_values, np.full((8, 8), 2, np.float32), "The reference mask has values"),
        (masks.check_mask_values, np.full((8, 8), np.nan, np.float32), "The reference mask contains NaN"),
        (masks.check_mask_values, np.ones((1, 8, 8), np.float32), "The reference mask has the shape"),
        (masks.check_not_empty, np.full((2, 8, 8), 0.5, np.float32), "The reference mask is empty.* 128 of 255"),
    ],
)
def test_single_checks_name_the_role(check, mask, found):
    with pytest.raises(PictureError, match=found):
        check(mask, "reference mask")


def test_values_and_emptiness_are_checked_apart():
    masks.check_mask_values(np.zeros((8, 8), np.float32))
    masks.check_not_empty(np.stack([np.zeros((8, 8)), box_mask(8, 8, 7, 7, 1, 1)]))


# -------------------- coverage of latent cells


def test_latent_coverage_is_the_share_of_each_cell():
    mask = np.zeros((64, 64), np.float32)
    mask[8:16, 16:24] = 1  # a whole cell
    mask[24:32, 32:36] = 1  # the left half of one
    mask[40:42, 48:50] = 1  # 2 x 2 of 8 x 8 pixels
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., 1, 2], expected[..., 3, 4], expected[..., 5, 6] = 1, 0.5, 4 / 64
    assert torch.equal(masks.latent_coverage(mask, 64, 8), expected)


def test_a_whole_mask_covers_the_picture_and_not_its_padding():
    assert torch.equal(masks.latent_coverage(np.ones((40, 40), np.float32), 64, 8), torch.ones(1, 1, 8, 8))
    landscape = masks.latent_coverage(np.ones((32, 64), np.float32), 64, 8)
    assert torch.equal(landscape[0, 0].sum(1), torch.tensor([0.0, 0, 8, 8, 8, 8, 0, 0]))


@pytest.mark.parametrize("side", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [64, 300, 1000])
def test_a_tiny_mask_covers_something_and_only_near_itself(size, side):
    mask = box_mask(size, size, size // 4, size // 2, side, side)
    covered = torch.nonzero(masks.latent_coverage(mask, 64, 8)[0, 0]).tolist()
    first, last = (np.array([size // 4, size // 2]) + offset for offset in (0, side - 1))
    assert covered
    for cell in covered:  # LANCZOS may reach into the neighbouring cell
        assert (first * 8 // size - 1 <= cell).all() and (cell <= last * 8 // size + 1).all()


# -------------------- precision


def slow_gaussian(values, sigma):
    """The definition, as a double loop of shifts over a padded picture."""
    radius = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(values.astype(np.float64), radius, mode="edge")
    height, width = values.shape
    rows = sum(w * padded[at : at + height] for at, w in enumerate(weights))
    return sum(w * rows[:, at : at + width] for at, w in enumerate(weights))


@pytest.mark.parametrize("sigma", [0.4, 2, 7.5])
@pytest.mark.parametrize("shape", [(30, 41), (5, 3), (1, 9)])
def test_gaussian_blur_equals_the_definition(shape, sigma):
    values = np.random.default_rng(8).random(shape).astype(np.float32)
    blurred = masks.gaussian_blur(values, sigma)
    assert blurred.dtype == np.float32 and np.abs(blurred - slow_gaussian(values, sigma)).max() < 1e-6


def random_mask(random):
    """One to four boxes and specks, sometimes with soft values, as artists and segmenters leave them."""
    height, width = (int(v) for v in random.integers(20, 120, 2))
    mask = np.zeros((height, width), np.float32)
    for _ in range(int(random.integers(1, 5))):
        top, left, box_height, box_width = random_box(random, height, width)
        if random.random() < 0.5:
            box_height, box_width = min(box_height, 3), min(box_width, 3)
        mask[top : top + box_height, left : left + box_width] = 1
    if random.random() < 0.3:
        mask = masks.gaussian_blur(mask, 2).clip(0, 1)
    return mask


def test_every_precision_contains_the_finer_ones_from_the_silhouette_to_the_box():
    random = np.random.default_rng(12)
    for _ in range(150):
        mask = random_mask(random)
        kept = mask.copy()
        ladder = [masks.precise_mask(mask, level) for level in range(5)]
        assert np.array_equal(mask, kept) and all(one.dtype == np.float32 for one in ladder)
        assert np.array_equal(ladder[0], mask) and ladder[0] is not mask
        for finer, coarser in zip(ladder[:-1], ladder[1:], strict=True):
            assert (coarser >= finer).all() and coarser.max() <= 1
        rows, columns = (np.flatnonzero((mask > 0.5 / 255).any(axis)) for axis in (1, 0))
        box = np.zeros(mask.shape, bool)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert (ladder[4][box] == 1).all() and np.array_equal(ladder[4][~box], mask[~box])


@pytest.mark.parametrize(("side", "sigmas"), [(512, (6, 14, 30)), (128, (1.5, 3.5, 7.5))])
def test_the_levels_between_are_what_the_blurs_lift_above_a_tenth(side, sigmas):
    """An ellipse with a leg, on a picture of `side` x 1.5 side."""
    y, x = np.mgrid[:side, : side * 3 // 2] / side
    mask = ((x - 0.7) ** 2 / 0.3**2 + (y - 0.4) ** 2 / 0.2**2 < 1) | ((abs(x - 0.6) < 0.02) & (y > 0.4) & (y < 0.9))
    mask = mask.astype(np.float32)
    box = masks.precise_mask(mask, 4) == 1
    expected = mask > 0
    for level, sigma in enumerate(sigmas, 1):
        blurred = slow_gaussian(mask, sigma)
        expected |= (blurred > 0.1) & box
        unclear = abs(blurred - 0.1) < 1e-6
        assert np.array_equal((masks.precise_mask(mask, level) == 1)[~unclear], expected[~unclear])
        assert 1.05 * mask.sum() < expected.sum() < box.sum()


def test_a_speck_that_a_wide_blur_loses_keeps_its_surroundings():
    mask = box_mask(512, 512, 100, 100, 8, 8)
    mask[400:404, 400:404] = mask[104:108, 404:408] = 1
    narrow, wide = (masks.precise_mask(mask, level) for level in (1, 3))
    assert narrow[110, 104] == 1 == wide[110, 104] and mask[110, 104] == 0
    assert slow_gaussian(mask, 30)[110, 104] < 0.1


def test_precision_keeps_soft_values_and_leaves_an_empty_mask_empty():
    mask = box_mask(64, 64, 20, 20, 20, 20) * np.float32(0.05)  # too faint for the blur to lift
    assert np.array_equal(masks.precise_mask(mask, 3), mask)
    assert masks.precise_mask(mask, 4)[20:40, 20:40].min() == 1
    dust = np.full((16, 16), 0.4 / 255, np.float32)
    for level in range(5):
        assert np.array_equal(masks.precise_mask(dust, level), dust)


@pytest.mark.parametrize("level", [-1, 5, 1.5, True, None])
def test_a_precision_that_does_not_exist_is_refused(level):
    with pytest.raises(ArgumentError, match=r"level is .* whole number from 0 .*silhouette.* to 4 .*bounding box"):
        masks.precise_mask(np.ones((16, 16), np.float32), level)


# -------------------- cleaning up


@pytest.mark.parametrize("pixels", [2, 5])
def test_clean_up_removes_spots_and_gaps_of_twice_its_pixels_and_keeps_larger_ones(pixels):
    mask = box_mask(200, 200, 100, 0, 100, 200)
    small, large = 2 * pixels, 4 * pixels
    mask[30 : 30 + small, 30 : 30 + small] = mask[30 : 30 + large, 100 : 100 + large] = 1
    mask[150 : 150 + small, 30 : 30 + small] = mask[150 : 150 + large, 100 : 100 + large] = 0
    cleaned = masks.cleaned(mask, pixels)
    assert cleaned.dtype == bool
    assert not cleaned[20:60, 20:60].any() and cleaned[140:180, 20:60].all()
    assert cleaned[30 + large // 2, 100 + large // 2] and not cleaned[150 + large // 2, 100 + large // 2]
    assert np.array_equal(cleaned[:, 180:], mask[:, 180:] > 0), "a straight edge stays where it is"


def test_clean_up_of_nothing_changes_nothing():
    mask = np.random.default_rng(2).random((20, 30)) > 0.5
    assert np.array_equal(masks.cleaned(mask, 0), mask)


# -------------------- feather


def slow_blur(values, passes):
    """The definition, pixel by pixel shifted: no window, no shortcuts."""
    values = values.astype(np.int64)
    height, width = values.shape
    for _ in range(passes):
        around = np.pad(values, 1, mode="reflect")
        total = np.zeros_like(values)
        for dy, wy in enumerate((1, 2, 1)):
            for dx, wx in enumerate((1, 2, 1)):
                total += wy * wx * around[dy : dy + height, dx : dx + width]
        values = (total + 8) >> 4
    return values


def test_feather_equals_the_definition_everywhere():
    random = np.random.default_rng(3)
    for _ in range(60):
        height, width = (int(v) for v in random.integers(8, 60, 2))
        mask = box_mask(height, width, *random_box(random, height, width))
        mask[random.random((height, width)) < 0.02 * random.integers(0, 2)] = 1
        feather = int(random.integers(0, 14))
        alpha = masks.feather_alpha(mask, feather)
        assert alpha.dtype == np.uint8 and alpha.shape == mask.shape
        assert np.array_equal(alpha, slow_blur(mask * 255, feather))


@pytest.mark.parametrize("feather", [0, 1, 2, 10, 25])
def test_feather_is_zero_beyond_its_reach(feather):
    alpha = masks.feather_alpha(box_mask(120, 120, 50, 40, 15, 30), feather)
    outside = np.ones((120, 120), bool)
    outside[50 - feather : 65 + feather, 40 - feather : 70 + feather] = False
    assert not alpha[outside].any()
    if feather == 0:
        assert set(np.unique(alpha)) == {0, 255}


def test_feather_refuses_nonsense_and_leaves_the_mask_alone():
    mask = box_mask(8, 8, 2, 2, 3, 3)
    kept = mask.copy()
    masks.feather_alpha(mask)
    assert np.array_equal(mask, kept)
    assert not masks.feather_alpha(np.zeros((8, 8), np.float32)).any()
    for feather in (-1, 1.5, True, "3"):
        with pytest.raises(ArgumentError, match="feather"):
            masks.feather_alpha(mask, feather)


@pytest.mark.parametrize("feather", [0, 1, 10])
def test_a_soft_feather_of_a_binary_mask_is_the_hard_one(feather):
    mask = box_mask(60, 40, 20, 12, 9, 14)
    assert np.array_equal(masks.feather_alpha(mask, feather, soft=True), masks.feather_alpha(mask, feather))


def test_a_soft_feather_blurs_the_masks_own_values():
    mask = np.random.default_rng(6).random((40, 30)).astype(np.float32)
    values = np.rint(mask * 255).astype(np.uint8)
    assert np.array_equal(masks.feather_alpha(mask, 0, soft=True), values)
    assert np.array_equal(masks.feather_alpha(mask, 5, soft=True), slow_blur(values, 5))
    beyond = np.array([[-0.001, 1.001, 0.4, 0.002]], np.float32)  # within the tolerance of 1e-3
    assert masks.feather_alpha(beyond, 0, soft=True).tolist() == [[0, 255, 102, 1]]


def test_feather_of_large_pictures_is_fast():
    started = time.process_time()
    masks.feather_alpha(box_mask(2160, 3840, 900, 1600, 300, 300))
    assert time.process_time() - started < 2


# -------------------- paste-back


def test_paste_back_truncates_and_keeps_the_source():
    random = np.random.default_rng(7)
    result, source = (random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    alpha = random.integers(0, 256, (64, 64), dtype=np.uint8)
    alpha[:20], alpha[20:30] = 0, 255
    kept = source.copy()
    pasted = masks.paste_back(result, source, alpha)
    share = alpha[..., None] / 255
    assert np.array_equal(pasted, (result * share + source * (1 - share)).astype(np.uint8))
    assert np.array_equal(pasted[:20], source[:20]) and np.array_equal(pasted[20:30], result[20:30])
    assert np.array_equal(source, kept) and pasted is not source


def test_paste_back_refuses_other_sizes():
    picture, alpha = np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9), np.uint8)
    with pytest.raises(ArgumentError, match="do not fit"):
        masks.paste_back(picture[:, :8], picture, alpha)
    with pytest.raises(ArgumentError, match="do not fit"):
        masks.paste_back(picture, picture, alpha[:, :8])


@pytest.mark.parametrize("shape", [(16, 16, 3), (2, 16, 16, 3), (2, 3, 16, 16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_paste_back_of_floats(shape, dtype):
    generator = torch.Generator().manual_seed(4)
    result, source = (torch.rand(shape, generator=generator).to(dtype) for _ in range(2))
    alpha = masks.feather_alpha(box_mask(16, 16, 5, 5, 6, 6), 2)
    outside, inside = torch.from_numpy(alpha == 0), torch.from_numpy(alpha == 255)
    result[..., outside, :] = float("nan")
    pasted = masks.paste_back_float(result, source, alpha)
    assert pasted.dtype == dtype and pasted.shape == shape
    assert torch.equal(pasted[..., outside, :], source[..., outside, :])
    assert inside.any() and torch.equal(pasted[..., inside, :], result[..., inside, :])
    share = torch.from_numpy(alpha / 255)[..., None]
    mixed = result.double() * share + source.double() * (1 - share)
    expected = torch.where(share == 0, source.double(), mixed)
    assert torch.allclose(pasted.double(), expected, atol=2e-3 if dtype == torch.float16 else 1e-6)
    as_arrays = masks.paste_back_float(result.numpy(), source.numpy(), alpha)
    assert isinstance(as_arrays, np.ndarray) and np.array_equal(as_arrays, pasted.numpy())


def test_paste_back_of_floats_takes_an_alpha_per_picture():
    result, source = torch.ones(2, 8, 8, 3), torch.zeros(8, 8, 3)
    alpha = torch.zeros(2, 8, 8, dtype=torch.uint8)
    alpha[1, 2:4] = 255
    pasted = masks.paste_back_float(result, source, alpha)
    assert not pasted[0].any() and torch.equal(pasted[1, :, :, 0], (alpha[1] == 255).float())


# -------------------- crop windows


def test_a_window_around_two_and_one_seen_from_another():
    first, second = masks.CropWindow(10, 40, 5, 6), masks.CropWindow(2, 44, 9, 1)
    around = first.joined(second)
    assert around == second.joined(first) == masks.CropWindow(2, 40, 13, 6)
    assert first.within(around) == masks.CropWindow(8, 0, 5, 6)


def test_whole_picture():
    window = masks.whole_picture(30, 40)
    assert window == masks.CropWindow(0, 0, 40, 30)
    assert np.zeros((30, 40, 3))[window.slices].shape == (30, 40, 3)


def test_zoom_windows_hold_their_promises():
    random = np.random.default_rng(9)
    squares = cut = 0
    for _ in range(600):
        height, width = (int(v) for v in random.integers(8, 300, 2))
        top, left, box_height, box_width = random_box(random, height, width)
        if random.random() < 0.6:
            box_height, box_width = min(box_height, 20), min(box_width, 20)
        mask = box_mask(height, width, top, left, box_height, box_width)
        margin, minimum = float(random.choice([0, 0.25, 0.5, 2])), int(random.choice([1, 16, 64, 128]))
        feather = int(random.choice([0, 3, 10]))
        window = masks.zoom_window(mask, margin, minimum, feather)

        assert window.x >= 0 and window.y >= 0
        assert window.x + window.width <= width and window.y + window.height <= height
        assert mask[window.slices].sum() == mask.sum(), "the whole mask is inside"
        longest = max(box_height, box_width)
        side = max(int(np.ceil(longest * (1 + 2 * margin))), longest + 2 * (feather + 1), minimum)
        assert (window.width, window.height) == (min(side, width), min(side, height))
        alpha = masks.feather_alpha(mask, feather)
        assert alpha[window.slices].astype(int).sum() == alpha.astype(int).sum(), "no feather is cut off"
        for start, length, first, size, limit in (
            (left, box_width, window.x, window.width, width),
            (top, box_height, window.y, window.height, height),
        ):
            before, after = start - first, first + size - start - length
            centred = abs(before - after) <= 1
            assert centred or first == 0 or first + size == limit, "shifted only by the picture's border"
        squares += window.width == window.height
        cut += window.width != window.height
    assert squares > 100 and cut > 100


def test_zoom_window_of_a_small_mask():
    mask = box_mask(1000, 1000, 500, 400, 100, 60)
    assert masks.zoom_window(mask) == masks.CropWindow(400 - 70, 500 - 50, 200, 200)
    assert masks.zoom_window(mask, margin=0) == masks.CropWindow(400 - 34, 500 - 14, 128, 128)
    assert masks.zoom_window(mask, margin=0, minimum=1) == masks.CropWindow(400 - 31, 500 - 11, 122, 122)
    corner = box_mask(1000, 1000, 990, 0, 10, 10)
    assert masks.zoom_window(corner) == masks.CropWindow(0, 1000 - 128, 128, 128)


def test_zoom_window_ignores_what_is_not_masked():
    mask = box_mask(1000, 1000, 500, 400, 100, 60)
    mask[0, 0] = 128 / 255
    assert masks.zoom_window(mask) == masks.CropWindow(330, 450, 200, 200)


def test_zoom_window_refuses_nonsense():
    mask = box_mask(64, 64, 20, 20, 8, 8)
    with pytest.raises(PictureError, match="empty"):
        masks.zoom_window(mask * 0)
    bad = (("margin", -0.1), ("margin", np.nan), ("margin", np.inf), ("minimum", 0), ("feather", -1))
    for name, value in bad:
        with pytest.raises(ArgumentError, match=str(value)):
            masks.zoom_window(mask, **{name: value})


# -------------------- colours at the seam


def drifted(source, shift):
    return (source.astype(int) + shift).astype(np.uint8)


@pytest.fixture
def seam():
    """(source, hole): the source leaves room for shifts of up to 50."""
    source = np.random.default_rng(11).integers(50, 206, (60, 80, 3), dtype=np.uint8)
    return source, box_mask(60, 80, 20, 30, 15, 20) > 0


def test_a_shift_of_colour_is_found_per_channel(seam):
    source, hole = seam
    offset = masks.seam_offset(drifted(source, (7, -20, 0)), source, hole, 5)
    assert offset.dtype == np.float32 and offset.tolist() == [-7, 20, 0]


def test_only_the_ring_around_the_hole_counts(seam):
    source, hole = seam
    ring = np.zeros_like(hole)
    ring[20 - 5 : 35 + 5, 30 - 5 : 50 + 5] = True
    ring &= ~hole
    result = np.where(ring[..., None], drifted(source, 12), drifted(source, -40))
    assert masks.seam_offset(result, source, hole, 5).tolist() == [-12] * 3
    # Nearly half of a wider ring lies beyond, and more than half of a much wider one.
    assert masks.seam_offset(result, source, hole, 15).tolist() == [40] * 3


def test_a_few_outliers_do_not_move_the_offset(seam):
    source, hole = seam
    result = drifted(source, 9)
    result[10:60, 45:55] = 255  # an object that the model saw differently, across the ring
    assert masks.seam_offset(result, source, hole, 4).tolist() == [-9] * 3


def test_a_hole_without_a_ring_has_no_offset(seam):
    source, hole = seam
    result = drifted(source, 30)
    assert masks.seam_offset(result, source, np.ones_like(hole), 5).tolist() == [0] * 3
    assert masks.seam_offset(result, source, np.zeros_like(hole), 5).tolist() == [0] * 3
    assert masks.seam_offset(result, source, hole, 0).tolist() == [0] * 3


def test_a_hole_at_the_border_has_the_ring_that_is_left(seam):
    source, _ = seam
    corner = box_mask(60, 80, 0, 0, 60, 79) > 0
    assert masks.seam_offset(drifted(source, 5), source, corner, 14).tolist() == [-5] * 3
