"""mask_tools.py: the change mask's colour differences, the background blend, and batches of both."""

import numpy as np
import pytest
import torch

from mimicbrush_core import masks
from mimicbrush_core.errors import ArgumentError, PictureError
from mimicbrush_core.mask_tools import (
    ChangeSettings,
    blended,
    change_mask,
    change_masks,
    color_difference,
    precise_masks,
)

H, W = 60, 80
HARD = ChangeSettings(threshold=5, clean_up=0, softness=0)


def noise(count, channels=3, seed=0):
    """Random pictures whose values lie on no 8-bit grid."""
    return torch.rand(count, H, W, channels, generator=torch.Generator().manual_seed(seed))


def boxes(*corners, side=24):
    """A mask with a white square at each (top, left); None: an empty one."""
    mask = torch.zeros(len(corners), H, W)
    for one, corner in zip(mask, corners, strict=True):
        if corner is not None:
            one[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = 1
    return mask


def repainted(picture, mask, shade=0.0):
    return torch.where(mask[..., None] == 1, torch.tensor(shade), picture)


GREY = torch.full((1, H, W, 3), 0.5)
BOX = boxes((20, 30))


# --- precision -----------------------------------------------------------------------------------------------


def test_each_mask_of_a_batch_has_its_own_ladder():
    mask = boxes((5, 5), None, (30, 40))
    coarser = precise_masks(mask, 4)
    assert coarser.dtype == torch.float32 and torch.equal(coarser, mask)  # a box is its own box
    ring = mask.clone()
    ring[:, 10:20, 10:20] = 0
    assert torch.equal(precise_masks(ring, 4)[0], mask[0]) and not precise_masks(ring, 4)[1].any()
    assert torch.equal(precise_masks(ring[0], 4), mask[:1])  # [H,W] is one mask
    assert precise_masks(ring, 2)[0].numpy() == pytest.approx(masks.precise_mask(ring[0].numpy(), 2))


@pytest.mark.parametrize(
    "mask", [torch.full((1, 8, 8), float("nan")), torch.full((1, 8, 8), 2.0), torch.ones(1, 1, 8, 8)]
)
def test_precision_refuses_what_is_no_mask(mask):
    with pytest.raises(PictureError, match="mask"):
        precise_masks(mask, 1)


# --- colour difference ---------------------------------------------------------------------------------------

# CIE L*a*b* (D65) of sRGB colours, as published tables give them
KNOWN = {
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (119, 119, 119): (50.03, 0.0, 0.0),
    (2, 2, 2): (0.55, 0.0, 0.0),  # in the linear part of the curve
}


def test_color_differences_are_distances_in_lab():
    colors, lab = np.array(list(KNOWN), np.uint8), np.array(list(KNOWN.values()))
    first, second = np.broadcast_arrays(colors[:, None], colors[None])
    difference = color_difference(first, second)
    assert difference.dtype == np.float32
    assert np.abs(difference - np.linalg.norm(lab[:, None] - lab[None], axis=-1)).max() < 0.05
    assert not difference.diagonal().any()


# --- change --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [ChangeSettings(), ChangeSettings(threshold=0, clean_up=0, softness=0)])
def test_equal_pictures_have_not_changed(settings):
    picture = noise(2)
    assert not change_masks(picture, picture.clone(), settings).any()


def test_what_was_repainted_is_found_and_little_around_it():
    change = change_masks(GREY, repainted(GREY, BOX), HARD)
    assert change.shape == (1, H, W) and change.dtype == torch.float32 and set(change.unique().tolist()) == {0.0, 1.0}
    assert (change >= BOX).all()
    assert (change[0] <= torch.from_numpy(masks.grown(BOX[0].numpy(), 5))).all()


@pytest.mark.parametrize("threshold, found", [(10, True), (12, False)])
def test_the_threshold_is_in_delta_e(threshold, found):
    """0.5 and 0.61 grey (8 bits: 128, 156) are 53.59 and 64.28 in L*: 10.7 apart."""
    after = repainted(GREY, BOX, 0.61)
    assert change_masks(GREY, after, ChangeSettings(threshold, 0, 0)).any() == found


def test_grain_is_no_change_but_a_repainted_region_in_it_is():
    grain = (noise(1) - 0.5) * 0.06
    change = change_masks(GREY, repainted(GREY, BOX) + grain, ChangeSettings())
    assert change[BOX == 1].mean() > 0.95
    assert not change[0, :10].any() and not change[0, :, :20].any()


def test_clean_up_removes_specks():
    after = GREY.clone()
    after[0, 40, 60:63] = 1.0
    assert change_masks(GREY, after, HARD).any()
    assert not change_masks(GREY, after, ChangeSettings(5, 4, 0)).any()


def test_softness_blurs_the_edge_and_nothing_else():
    hard, soft = (change_masks(GREY, repainted(GREY, BOX), ChangeSettings(5, 0, softness)) for softness in (0, 3))
    assert soft.min() >= 0 and soft.max() <= 1 and ((soft > 0.05) & (soft < 0.95)).sum() > 100
    assert torch.equal(soft[0, 32] > 0.5, hard[0, 32] > 0.5)  # away from the corners, which get round
    assert soft[0, 32, 42] == pytest.approx(1, abs=1e-3)


def test_only_what_is_within_the_mask_counts():
    after = repainted(GREY, boxes((5, 5)) + boxes((33, 50)))
    within = boxes((30, 45), side=30) * 0.5
    change = change_masks(GREY, after, HARD, within)
    assert change.max() == 0.5 and not change[within == 0].any()
    assert torch.equal(change, torch.minimum(change_masks(GREY, after, HARD), within))
    assert not change_masks(GREY, after, HARD, torch.zeros(1, H, W)).any()


def test_changes_of_a_batch_are_found_picture_by_picture():
    mask = boxes((5, 5), None, (30, 50))
    after = repainted(GREY.expand(3, -1, -1, -1), mask)
    together = change_masks(GREY, after, HARD)
    assert [bool(one.any()) for one in together] == [True, False, True]
    for index in range(3):
        assert torch.equal(together[index, None], change_masks(GREY, after[index, None], HARD))
    assert torch.equal(change_masks(after, GREY, HARD, within=mask), torch.minimum(together, mask))


def test_transparent_pictures_are_compared_on_white():
    shown = torch.cat([GREY, torch.zeros(1, H, W, 1)], dim=-1)
    assert not change_masks(shown, torch.ones(1, H, W, 3), HARD).any()


def test_one_picture_is_as_a_batch_of_one():
    before, after = (np.full((H, W, 3), shade, np.uint8) for shade in (128, 0))
    after[:, 20:] = 128
    assert np.array_equal(
        change_mask(before, after, HARD),
        change_masks(*(torch.from_numpy(one)[None] / 255 for one in (before, after)), HARD)[0],
    )


@pytest.mark.parametrize(
    "settings",
    [{"threshold": -1}, {"threshold": 101}, {"threshold": float("nan")}, {"clean_up": 65}, {"softness": -0.5}],
)
def test_settings_out_of_range_are_refused(settings):
    [name] = settings
    with pytest.raises(ArgumentError, match=f"{name} is .* between 0 and"):
        change_masks(GREY, GREY, ChangeSettings(**settings))


def test_pictures_that_do_not_fit_together_are_refused():
    with pytest.raises(PictureError, match=r"after is 80 x 40 pixels, before 80 x 60.*Scale or crop"):
        change_masks(GREY, GREY[:, :40])
    with pytest.raises(PictureError, match="2 before pictures, 3 after pictures"):
        change_masks(noise(2), noise(3))
    with pytest.raises(PictureError, match="mask is 80 x 40 pixels, the picture 80 x 60"):
        change_masks(GREY, GREY, within=torch.ones(1, 40, W))
    with pytest.raises(PictureError, match=r"after.*NaN"):
        change_masks(GREY, GREY * float("nan"))


# --- background ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("feather", [0, 1, 10])
@pytest.mark.parametrize("color_match", [0.0, 1.0])
def test_beyond_mask_and_feather_the_background_keeps_its_bits(channels, feather, color_match):
    background, edited = noise(2, channels), noise(2, 3, seed=1)
    kept = background.clone()
    pictures, alpha = blended(background, edited, BOX, feather, color_match)
    assert torch.equal(background, kept) and pictures.shape == background.shape
    outside = torch.from_numpy(masks.grown(BOX[0].numpy(), feather)) == 0
    assert torch.equal(pictures[:, outside], background[:, outside]) and not alpha[:, outside].any()
    inside = alpha[0] == 1
    assert inside.any() and (pictures[:, inside] != background[:, inside]).any()
    if color_match == 0:
        assert torch.equal(pictures[:, inside][..., :3], edited[:, inside])
    if channels == 4:
        assert (pictures[:, inside][..., 3] == 1).all()


def test_without_feather_the_mask_s_own_grey_is_the_opacity():
    mask = torch.linspace(0, 1, W).expand(1, H, W)
    pictures, alpha = blended(torch.zeros(1, H, W, 3), torch.ones(1, H, W, 3), mask, feather=0)
    assert (alpha - mask).abs().max() < 0.5 / 255 + 1e-6
    assert torch.allclose(pictures[..., 0], alpha, atol=1e-6)


def test_an_empty_mask_leaves_the_background():
    background = noise(1)
    pictures, alpha = blended(background, noise(1, seed=1), torch.zeros(1, H, W))
    assert torch.equal(pictures, background) and not alpha.any()


def test_color_match_takes_the_drift_off_the_edited_picture():
    background = noise(1) * 0.6 + 0.1
    drift = torch.tensor([0.1, -0.05, 0.0])
    edited = repainted(background, BOX, 0.5) + drift
    plain, half, whole = (blended(background, edited, BOX, 2, amount)[0] for amount in (0.0, 0.5, 1.0))
    center = 32, 42
    assert torch.allclose(plain[0][center], 0.5 + drift, atol=1e-6)
    assert torch.allclose(half[0][center], 0.5 + drift / 2, atol=1 / 255)
    assert torch.allclose(whole[0][center], torch.full((3,), 0.5), atol=1 / 255)


def test_one_background_takes_every_edit_of_a_batch():
    background, edited, mask = noise(1), noise(3, seed=1), boxes((5, 5), (10, 20), None)
    pictures, alpha = blended(background, edited, mask, 3, 1.0)
    for index in range(3):
        one, one_alpha = blended(background, edited[index, None], mask[index, None], 3, 1.0)
        assert torch.equal(pictures[index], one[0]) and torch.equal(alpha[index], one_alpha[0])
    assert torch.equal(pictures[2], background[0])


def test_an_edited_picture_s_transparency_does_not_count():
    edited = noise(1, 4, seed=1)
    assert torch.equal(blended(GREY, edited, BOX)[0], blended(GREY, edited[..., :3], BOX)[0])


def test_blends_that_cannot_be_made_are_refused():
    for given, found in (
        ((GREY, GREY[:, :, :40], BOX), "edited is 40 x 60 pixels, background 80 x 60"),
        ((GREY, GREY, BOX[:, :40]), "mask is 80 x 40 pixels, the picture 80 x 60"),
        ((noise(2), noise(3), BOX), "2 backgrounds, 3 edited pictures, 1 mask"),
        ((GREY, GREY * float("inf"), BOX), "edited picture contains NaN or infinite"),
        ((GREY[0], GREY, BOX), r"background has the shape \[60, 80, 3\].*Give pictures as"),
        ((GREY[..., :1], GREY, BOX), r"background has the shape \[1, 60, 80, 1\]"),
    ):
        with pytest.raises(PictureError, match=found):
            blended(*given)
    for settings, found in (({"feather": 257}, "feather is 257"), ({"color_match": 1.5}, "color_match is 1.5")):
        with pytest.raises(ArgumentError, match=found):
            blended(GREY, GREY, BOX, **settings)
