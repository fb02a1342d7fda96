"""Mask Precision, Change Mask, Background Blend and Coarse Edit as nodes: that each setting arrives, and batches."""

import pytest
import torch
from node_pictures import boxes, noise

H, W = 72, 96
SOURCE, EDITED = noise(1, H, W), noise(1, H, W, seed=1)
MASK = boxes(H, W, (20, 30))


@pytest.fixture
def errors(pack):
    return pack.core("errors")


def ring():
    mask = MASK.clone()
    mask[:, 24:32, 34:42] = 0
    return mask


# --- Mask Precision ------------------------------------------------------------------------------------------


def test_precision_goes_from_the_silhouette_to_the_box(pack):
    levels = [pack.call("MaskPrecision", mask=ring(), level=level).coarser for level in range(5)]
    assert torch.equal(levels[0], ring()) and torch.equal(levels[4], MASK)
    for finer, coarser in zip(levels[:-1], levels[1:], strict=True):
        assert (coarser >= finer).all() and coarser.shape == (1, H, W)
    assert torch.equal(pack.call("MaskPrecision", mask=ring()).coarser, levels[2])  # as a new node has it


def test_precision_takes_batches_with_empty_frames(pack):
    masks = torch.cat([ring(), torch.zeros(1, H, W)])
    coarser = pack.call("MaskPrecision", mask=masks, level=4).coarser
    assert torch.equal(coarser[0], MASK[0]) and not coarser[1].any()


def test_a_level_that_a_wire_brings_is_checked(pack, errors):
    with pytest.raises(errors.ArgumentError, match="level is 7"):
        pack.call("MaskPrecision", mask=MASK, level=7)


# --- Change Mask ---------------------------------------------------------------------------------------------


@pytest.fixture
def change(pack):
    after = torch.where(MASK[..., None] == 1, torch.zeros(()), torch.full((1, H, W, 3), 0.5))
    before = torch.full((1, H, W, 3), 0.5)
    return lambda **inputs: pack.call("ChangeMask", **{"before": before, "after": after} | inputs).change


def test_a_change_is_found_where_it_is(change):
    found = change()
    assert found.shape == (1, H, W) and found[MASK == 1].mean() > 0.85 and found[MASK == 0].mean() < 0.1


def test_equal_pictures_have_not_changed(change):
    assert not change(before=SOURCE, after=SOURCE).any()


@pytest.mark.parametrize("setting", [{"threshold": 60.0}, {"clean_up": 30}, {"softness": 9.0}])
def test_each_setting_of_the_change_mask_counts(change, setting):
    assert not torch.equal(change(**setting), change())


def test_only_what_is_within_counts(change):
    half = MASK.clone()
    half[:, :28] = 0
    assert not change(within=half)[:, :28].any() and change(within=half).any()


def test_pictures_of_two_sizes_are_refused(change, errors):
    with pytest.raises(errors.PictureError, match="Scale or crop"):
        change(before=noise(1, H, W - 1))


# --- Background Blend ----------------------------------------------------------------------------------------


@pytest.fixture
def blend(pack):
    given = {"background": SOURCE, "edited": EDITED, "mask": MASK}
    return lambda **inputs: pack.call("BackgroundBlend", **given | inputs)


def test_beyond_the_blend_mask_the_background_keeps_its_bits(blend):
    result = blend()
    outside = result.blend == 0
    assert torch.equal(result.image[outside], SOURCE[outside])
    assert torch.equal(result.image[result.blend == 1], EDITED[result.blend == 1])


@pytest.mark.parametrize("setting", [{"feather": 3}, {"color_match": 1.0}])
def test_each_setting_of_the_blend_counts(blend, setting):
    background = torch.full((1, H, W, 3), 0.5)
    given = {"background": background, "edited": background * 1.2}
    assert not torch.equal(blend(**given, **setting).image, blend(**given).image)


def test_the_blend_of_a_change_mask_gives_the_sampler_s_edit_back(pack, sample, blend):
    """The chain of the template: what the sampler changed clearly is kept, the rest of its mask is the source again."""
    edited = sample(SOURCE, MASK, feather=2).image
    change = pack.call("ChangeMask", before=SOURCE, after=edited, within=MASK, threshold=1.0).change
    result = blend(edited=edited, mask=change, feather=0)
    assert change.any() and torch.equal(result.image[MASK == 0], SOURCE[MASK == 0])
    assert torch.equal(result.image[result.blend == 1], edited[result.blend == 1]) and (result.blend == 1).any()


# --- Coarse Edit ---------------------------------------------------------------------------------------------


@pytest.fixture
def edit(pack):
    return lambda **inputs: pack.call("CoarseEdit", **{"source": SOURCE, "mask": MASK} | inputs)


def test_a_new_node_changes_nothing(edit):
    result = edit()
    assert torch.equal(result.image[..., :3], SOURCE) and not result.hole.any() and torch.equal(result.moved, MASK)


def test_a_move_arrives_in_all_outputs_and_in_the_preview(edit):
    result = edit(x=30, y=-10)
    assert result.image.shape == (1, H, W, 4)
    assert torch.equal(result.hole, MASK) and torch.equal(result.moved, boxes(H, W, (10, 60)))
    shown = result.ui.image
    assert shown.shape == (1, H, W, 3)
    assert torch.equal(shown[MASK == 0], result.image[MASK == 0][:, :3]) and len(shown[MASK == 1].unique()) == 2


@pytest.mark.parametrize(
    "setting",
    [{"mode": "duplicate", "x": 9}, {"mode": "cut"}, {"scale": 0.5}, {"rotation": 30.0}, {"flip": "left-right"}],
)
def test_each_setting_of_the_coarse_edit_counts(edit, setting):
    assert not torch.equal(edit(**setting).image, edit().image)
    if "mode" in setting:
        assert not torch.equal(edit(**setting).hole, edit(**setting | {"mode": "move"}).hole)


def test_frames_may_share_a_mask_or_have_their_own(edit):
    frames = noise(3, H, W)
    one = edit(source=frames, x=30)
    each = edit(source=frames, mask=boxes(H, W, (20, 30), None, (40, 10)), x=30)
    assert torch.equal(one.image[0], each.image[0]) and one.hole.shape == (3, H, W)
    assert torch.equal(each.image[1, ..., :3], frames[1])


def test_choices_that_do_not_exist_and_empty_masks_are_refused(edit, errors):
    for name in ("mode", "flip"):
        with pytest.raises(errors.ArgumentError, match=f"{name} is 'magic'"):
            edit(**{name: "magic"})
    with pytest.raises(errors.PictureError, match="mask is empty"):
        edit(mask=MASK * 0)
