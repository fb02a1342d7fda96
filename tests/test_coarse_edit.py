"""coarse_edit.py: regions moved, scaled, turned, mirrored, copied and cut out, and the holes they leave."""

import math

import numpy as np
import pytest
import torch

from mimicbrush_core import masks
from mimicbrush_core.coarse_edit import CUT, DUPLICATE, FLIPS, MODES, CoarseEdit, coarse_edit, over_checker, with_holes
from mimicbrush_core.errors import ArgumentError, PictureError

H, W = 48, 64


def noise(count=1, channels=3, seed=0):
    """Random pictures whose values lie on no 8-bit grid."""
    return torch.rand(count, H, W, channels, generator=torch.Generator().manual_seed(seed))


def box(top, left, height=12, width=16):
    mask = torch.zeros(1, H, W)
    mask[0, top : top + height, left : left + width] = 1
    return mask


def blob(seed=3, soft=False):
    """A random region with holes in it; its box has even sides."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, H, W)
    mask[0, 14:34, 20:44] = (torch.rand(20, 24, generator=random) > 0.4).float()
    mask[0, 14, 20] = mask[0, 33, 43] = 1
    return mask * (0.2 + 0.8 * torch.rand(1, H, W, generator=random)) if soft else mask


def edited(source, mask, **edit):
    return coarse_edit(source, mask, CoarseEdit(**edit))


SOURCE = noise()
SOFT = [pytest.param(False, id="hard"), pytest.param(True, id="soft")]


# --- nothing changes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("edit", [{}, {"mode": DUPLICATE}, {"rotation": 360}, {"rotation": -720}])
def test_an_edit_that_changes_nothing_gives_the_source_bit_for_bit(edit, soft):
    mask = blob(soft=soft)
    result = edited(SOURCE, mask, **edit)
    assert torch.equal(result.pictures[..., :3], SOURCE) and (result.pictures[..., 3] == 1).all()
    assert not result.holes.any()
    assert torch.equal(result.moved, mask)


@pytest.mark.parametrize("soft", SOFT)
def test_a_transparent_source_stays_what_it_is(soft):
    source = noise(channels=4)
    source[..., 3] = (source[..., 3] - 0.2).clamp(0, 1)  # some of it has a colour and cannot be seen
    result = edited(source, blob(soft=soft))
    seen = source[..., 3] > 0
    assert torch.equal(result.pictures[..., 3], source[..., 3]) and torch.equal(result.pictures[seen], source[seen])
    untouched = blob(soft=soft) == 0
    assert (untouched & ~seen).any() and torch.equal(result.pictures[untouched], source[untouched])


@pytest.mark.parametrize("edit", [{"flip": "left-right"}, {"flip": "top-bottom"}, {"rotation": 180}])
@pytest.mark.parametrize("soft", SOFT)
def test_twice_mirrored_or_turned_half_is_where_it_was(edit, soft):
    mask = blob(soft=soft)
    once = edited(SOURCE, mask, mode=DUPLICATE, **edit)
    twice = edited(once.pictures, once.moved, mode=DUPLICATE, **edit)
    assert torch.equal(twice.moved, mask)
    region = mask > 0.999
    assert torch.equal(twice.pictures[region][:, :3], SOURCE[region])


@pytest.mark.parametrize("height, width", [(11, 16), (12, 15), (1, 1)])
def test_flips_of_any_box_land_pixel_on_pixel(height, width):
    mask = box(9, 13, height, width)
    result = edited(SOURCE, mask, flip="left-right")
    rows, columns = slice(9, 9 + height), slice(13, 13 + width)
    assert torch.equal(result.pictures[0, rows, columns, :3], SOURCE[0, rows, columns].flip(1))
    assert not result.holes.any() and torch.equal(result.moved, mask)


# --- moves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x, y", [(5, 0), (0, -7), (-9, 4), (-30, -20), (40, 40)])
def test_a_move_shifts_the_pixels_and_uncovers_exactly_what_nothing_covers(x, y):
    mask = blob()
    result = edited(SOURCE, mask, x=x, y=y)
    rows, columns = torch.nonzero(mask[0], as_tuple=True)
    inside = (rows + y >= 0) & (rows + y < H) & (columns + x >= 0) & (columns + x < W)
    moved = torch.zeros(1, H, W)
    moved[0, rows[inside] + y, columns[inside] + x] = 1
    expected = SOURCE.clone()
    hole = (mask == 1) & (moved == 0)
    expected[hole] = 0
    expected[0, rows[inside] + y, columns[inside] + x] = SOURCE[0, rows[inside], columns[inside]]
    assert torch.equal(result.moved, moved)
    assert torch.equal(result.holes, hole.float()) and torch.equal(result.pictures[..., 3], 1 - hole.float())
    assert torch.equal(result.pictures[..., :3], expected)


def test_a_copy_leaves_no_hole_and_a_cut_only_one():
    mask = box(10, 10)
    copy, cut = (edited(SOURCE, mask, mode=mode, x=30, y=20) for mode in (DUPLICATE, CUT))
    assert not copy.holes.any()
    assert torch.equal(copy.pictures[0, 10:22, 10:26, :3], SOURCE[0, 10:22, 10:26])
    assert torch.equal(copy.pictures[0, 30:42, 40:56, :3], SOURCE[0, 10:22, 10:26])
    assert torch.equal(cut.holes, mask) and not cut.moved.any()
    kept = mask == 0
    assert torch.equal(cut.pictures[kept][:, :3], SOURCE[kept]) and not cut.pictures[mask == 1].any()


def test_what_leaves_the_picture_is_gone():
    result = edited(SOURCE, box(10, 10), x=1000)
    assert not result.moved.any() and torch.equal(result.holes, box(10, 10))


def test_a_soft_edge_that_moves_mixes_and_the_one_it_leaves_is_see_through():
    mask = box(10, 10) * 0.25
    mask[0, 10:22, 12:24] = 1
    result = edited(SOURCE, mask, x=30)
    assert torch.allclose(result.holes, mask)
    assert torch.equal(result.pictures[0, 15, 10, :3], SOURCE[0, 15, 10])  # a colour is not darkened by its opacity
    mixed = 0.25 * SOURCE[0, 15, 10] + 0.75 * SOURCE[0, 15, 40]
    assert torch.allclose(result.pictures[0, 15, 40, :3], mixed) and result.pictures[0, 15, 40, 3] == 1


def test_several_regions_are_moved_one_after_the_other():
    first, second = box(2, 2), box(30, 40)
    once = edited(SOURCE, first, y=20)
    twice = edited(once.pictures, second, x=-34, y=-28)  # over most of the hole that the first left
    assert torch.equal(twice.holes, second + first * (1 - twice.moved)) and twice.holes.max() == 1
    assert torch.equal(twice.pictures[0, 22:34, 2:18, :3], SOURCE[0, 2:14, 2:18])
    assert torch.equal(twice.pictures[0, 2:14, 6:22, :3], SOURCE[0, 30:42, 40:56])


# --- sizes and angles ----------------------------------------------------------------------------------------


def test_quarter_turns_are_clockwise_and_land_pixel_on_pixel():
    mask = box(10, 20, 12, 16)  # centre 28, 16: becomes 16 high, 12 wide
    result = edited(SOURCE, mask, rotation=90)
    part = SOURCE[0, 10:22, 20:36]
    assert torch.equal(result.pictures[0, 8:24, 22:34, :3], torch.rot90(part, -1, (0, 1)))
    assert torch.equal(result.moved, box(8, 22, 16, 12))
    assert torch.equal(edited(SOURCE, mask, rotation=-270).pictures, result.pictures)
    half = edited(SOURCE, mask, rotation=180)
    assert torch.equal(half.pictures[0, 10:22, 20:36, :3], part.flip(0, 1))


def test_flips_come_before_turns():
    both = edited(SOURCE, box(10, 20, 14, 14), flip="left-right", rotation=90)
    part = SOURCE[0, 10:24, 20:34].flip(1)
    assert torch.equal(both.pictures[0, 10:24, 20:34, :3], torch.rot90(part, -1, (0, 1)))


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.7, 1.5, 2.0])
def test_the_covered_area_grows_with_the_square_of_the_scale(scale):
    result = edited(SOURCE, box(18, 24, 12, 16), mode=DUPLICATE, scale=scale)
    assert result.moved.sum() == pytest.approx(12 * 16 * scale**2, rel=0.03)
    rows, columns = (np.flatnonzero(result.moved[0].numpy().any(axis)) for axis in (1, 0))
    assert (rows[0] + rows[-1] + 1) / 2 == 24 and (columns[0] + columns[-1] + 1) / 2 == 32


@pytest.mark.parametrize("angle", [17, 45, -120])
def test_a_turn_keeps_area_and_centre(angle):
    mask = box(18, 24, 12, 16)
    result = edited(SOURCE, mask, mode=DUPLICATE, rotation=angle)
    y, x = np.mgrid[:H, :W] + 0.5
    coverage = result.moved[0].double().numpy()
    assert coverage.sum() == pytest.approx(12 * 16, rel=0.01)
    assert (coverage * x).sum() / coverage.sum() == pytest.approx(32)
    assert (coverage * y).sum() / coverage.sum() == pytest.approx(24)


def test_a_turn_moves_every_point_as_the_angle_says():
    source = torch.zeros(1, H, W, 3)
    source[0, 20:23, 44:47] = 1  # right of the centre 32.5, 24.5: at 45.5, 21.5
    result = edited(source, box(10, 18, 29, 29), rotation=30)
    y, x = np.mgrid[:H, :W] + 0.5
    light = (result.pictures[0, ..., 0] * result.pictures[0, ..., 3]).double().numpy()
    right, down = 45.5 - 32.5, 21.5 - 24.5
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    assert (light * x).sum() / light.sum() == pytest.approx(32.5 + right * cos - down * sin, abs=0.05)
    assert (light * y).sum() / light.sum() == pytest.approx(24.5 + right * sin + down * cos, abs=0.05)


@pytest.mark.parametrize("scale", [0.3, 0.77, 1.0, 2.3])
@pytest.mark.parametrize("rotation", [0, 33])
@pytest.mark.parametrize("soft", SOFT)
def test_resampling_brings_no_fringe_of_another_colour(scale, rotation, soft):
    """A region of one bright colour in a dark picture: each pixel is the mix of both that its coverage says."""
    mask = blob(soft=soft)
    dark, bright = torch.tensor([0.1, 0.2, 0.05]), torch.tensor([0.9, 0.6, 0.8])
    source = torch.where(mask[..., None] > 0, bright, dark)
    result = edited(source, mask, scale=scale, rotation=rotation, y=9)
    fresh = (result.moved > 0) & (mask == 0)
    cover = result.moved[fresh][:, None]
    pixel_on_pixel = scale == 1 and rotation == 0 and not soft
    assert fresh.any() and ((cover > 0.05) & (cover < 0.95)).any() != pixel_on_pixel
    assert torch.allclose(result.pictures[fresh][:, :3], cover * bright + (1 - cover) * dark, atol=1e-5)
    alone = (result.moved > 0) & (mask == 1) & (result.holes > 0)  # over a hole it keeps its pure colour
    assert torch.allclose(result.pictures[alone][:, :3], bright.expand(int(alone.sum()), 3), atol=1e-5)
    assert torch.allclose(result.holes, (mask - result.moved).clamp(min=0), atol=1e-6)


def test_shrinking_averages_instead_of_picking():
    result = edited(SOURCE, box(8, 16, 32, 32), mode=DUPLICATE, scale=0.25)
    blocks = SOURCE[0, 8:40, 16:48].reshape(8, 4, 8, 4, 3).mean(dim=(1, 3))
    assert torch.equal(result.moved, box(20, 28, 8, 8))
    assert torch.allclose(result.pictures[0, 20:28, 28:36, :3], blocks, atol=1e-6)


# --- batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [{"x": 7}, {"rotation": 20, "scale": 1.2}])
def test_batches_are_edited_picture_by_picture(edit):
    sources, mask = noise(3), torch.cat([box(5, 5), torch.zeros(1, H, W), blob()])
    together = edited(sources, mask, **edit)
    for index in (0, 2):
        alone = edited(sources[index, None], mask[index, None], **edit)
        assert torch.equal(together.pictures[index], alone.pictures[0])
        assert torch.equal(together.moved[index], alone.moved[0])
    assert torch.equal(together.pictures[1, ..., :3], sources[1]) and not together.holes[1].any()
    assert len(edited(sources, mask[:1], **edit).pictures) == len(edited(sources[:1], mask, **edit).pictures) == 3


def test_the_source_is_left_alone_and_any_float_will_do():
    source = noise(channels=4)
    kept = source.clone()
    edited(source, box(5, 5), x=9)
    assert torch.equal(source, kept)
    assert edited(SOURCE.half(), box(5, 5), x=9).pictures.dtype == torch.float32


def test_it_runs_where_the_host_runs_it():
    with torch.inference_mode():
        assert torch.equal(edited(SOURCE + 0, box(5, 5) + 0, x=9).holes, edited(SOURCE, box(5, 5), x=9).holes)


# --- the preview ---------------------------------------------------------------------------------------------


def test_the_checkerboard_shows_through_holes_only():
    result = edited(SOURCE, box(10, 10, 20, 30), mode=CUT)
    shown = over_checker(result.pictures)
    hole = result.holes == 1
    assert torch.equal(shown[~hole], SOURCE[~hole])
    assert len(shown[hole].unique()) == 2
    square = 4  # pixels, of a picture this small
    for down, right in ((square, 0), (0, square)):
        assert shown[0, 12, 12, 0] != shown[0, 12 + down, 12 + right, 0]
    assert shown[0, 12, 12, 0] == shown[0, 12 + square, 12 + square, 0] == shown[0, 15, 15, 0]


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit, found",
    [
        ({"mode": "magic"}, f"mode is 'magic'; it must be one of: {', '.join(MODES)}"),
        ({"flip": "magic"}, f"flip is 'magic'; it must be one of: {', '.join(FLIPS)}"),
        ({"scale": 0}, "scale is 0; it must be between 0.05 and 10"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"rotation": float("inf")}, "rotation is inf"),
        ({"x": 16385}, "x is 16385; it must be between -16384 and 16384"),
    ],
)
def test_edits_that_do_not_exist_are_refused(edit, found):
    with pytest.raises(ArgumentError, match=found):
        edited(SOURCE, box(5, 5), **edit)


@pytest.mark.parametrize(
    "source, mask, found",
    [
        (SOURCE, torch.zeros(1, H, W), "mask is empty"),
        (SOURCE, torch.ones(1, H, W - 1), f"mask is {W - 1} x {H} pixels, the picture {W} x {H}"),
        (SOURCE, torch.full((1, H, W), 2.0), "within 0 to 1"),
        (noise(2), box(5, 5).expand(3, -1, -1), "2 sources, 3 masks"),
        (SOURCE * float("nan"), box(5, 5), "source contains NaN"),
        (SOURCE[..., :2], box(5, 5), "source has the shape"),
    ],
)
def test_pictures_and_masks_that_cannot_be_used_are_refused(source, mask, found):
    with pytest.raises(PictureError, match=found):
        edited(source, mask, x=3)


def test_the_largest_scale_stays_inside_the_picture():
    result = edited(SOURCE, box(20, 20, 8, 8), scale=10)
    assert (result.moved == 1).sum() > 0.9 * H * W and not result.holes.any()


def test_the_region_is_what_is_visible_of_the_mask():
    dust = torch.full((1, H, W), 0.4 / 255)
    region = torch.maximum(dust, box(10, 10))
    assert torch.equal(edited(SOURCE, region, x=20).moved, edited(SOURCE, box(10, 10), x=20).moved)
    assert dust.max() < masks.VISIBLE


# -------------------- holes given beside a picture


def test_a_hole_beside_an_opaque_picture_gives_the_layout_back():
    result = edited(SOURCE, box(10, 10), x=20)
    assert torch.equal(with_holes(result.pictures[..., :3], result.holes), result.pictures)
    assert torch.equal(with_holes(result.pictures, result.holes), result.pictures)  # the same hole twice


def test_holes_add_up_and_every_picture_has_its_own():
    known = torch.full((2, H, W), 0.75)
    known[1, :5] = 0
    layers = torch.cat([noise(2), known[..., None]], dim=-1)
    holes = torch.zeros(1, H, W)
    holes[:, 3:8] = 0.5
    result = with_holes(layers, holes)
    assert torch.equal(result[..., :3], layers[..., :3])
    assert torch.equal(result[..., 3], known.minimum(1 - holes))
    assert len(with_holes(SOURCE, torch.zeros(3, H, W))) == 3


@pytest.mark.parametrize(
    "pictures, holes, found",
    [
        (SOURCE, torch.ones(1, H, W - 1), f"hole is {W - 1} x {H} pixels, the picture {W} x {H}"),
        (SOURCE, torch.full((1, H, W), 2.0), "hole has values .* within 0 to 1"),
        (noise(2), torch.zeros(3, H, W), "2 coarse edits, 3 holes"),
        (SOURCE[..., :2], torch.zeros(1, H, W), "coarse edit has the shape"),
    ],
)
def test_holes_that_cannot_be_used_are_refused(pictures, holes, found):
    with pytest.raises(PictureError, match=found):
        with_holes(pictures, holes)
