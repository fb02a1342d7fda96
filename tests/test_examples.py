"""The bundled examples: pictures, masks, and the little films made of them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mimicbrush_core.errors import ArgumentError
from mimicbrush_core.examples import EXAMPLES, TO_MOVE, TO_NAME, Example
from mimicbrush_core.training.scenes import HELD_OUT_SEED
from mimicbrush_core.training.shapes import draw_shape

SIZE = 128
FRAMES = 8
examples = pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])


@examples
def test_a_film_of_one_frame_is_the_picture(example):
    source, mask, reference = example.render(SIZE)
    sources, mask_list, clip_reference = example.render_clip(1, SIZE)
    assert sources.dtype == np.uint8 and mask_list.dtype == np.float32
    assert np.array_equal(sources, source[None]) and np.array_equal(mask_list, mask[None])
    assert np.array_equal(clip_reference, reference)


@examples
@pytest.mark.parametrize("frames", (2, FRAMES))
def test_films_have_the_pictures_shapes_values_and_reference(example, frames):
    sources, mask_list, reference = example.render_clip(frames, SIZE)
    assert sources.dtype == reference.dtype == np.uint8 and mask_list.dtype == np.float32
    assert sources.shape == (frames, SIZE, SIZE, 3) and mask_list.shape == (frames, SIZE, SIZE)
    assert set(np.unique(mask_list)) == {0, 1}
    source, mask, own_reference = example.render(SIZE)
    assert np.array_equal(reference, own_reference)
    assert np.array_equal(mask_list[0], mask), "the film begins with the object as in the picture"
    # Two different objects may stand before another background than one alone.
    same = slice(None) if example.kind != "between objects" else eroded(mask)
    assert np.array_equal(sources[0][same], source[same]), "in the same light"


def eroded(mask):
    """The pixels of a mask that are 3 or more from its edge, bool [S,S]: the mask was grown by 2."""
    return np.asarray(Image.fromarray(mask > 0).convert("L").filter(ImageFilter.MinFilter(7))) > 0


@examples
def test_films_are_the_same_each_time(example):
    for one, again in zip(example.render_clip(3, SIZE), example.render_clip(3, SIZE), strict=True):
        assert np.array_equal(one, again)


def objects_of(example):
    """Where the object is in each frame, bool [N,S,S], grown by some pixels."""
    return replace(example, kind="object").render_clip(FRAMES, SIZE)[1] > 0


@examples
def test_the_background_does_not_move_and_the_object_does(example):
    sources = example.render_clip(FRAMES, SIZE)[0]
    background = ~objects_of(example).any(axis=0)
    assert background.mean() > 0.2
    assert (sources[:, background] == sources[0, background]).all()
    for frame in range(FRAMES - 1):
        assert (sources[frame] != sources[frame + 1]).any(axis=-1).mean() > 0.05


@examples
def test_masks_follow_the_object(example):
    mask_list = example.render_clip(FRAMES, SIZE)[1] > 0
    objects = objects_of(example)
    for mask, where in zip(mask_list, objects, strict=True):
        assert mask.any() and not (mask & ~where).any()
    if example.kind == "object":
        assert np.array_equal(mask_list, objects)
    areas = mask_list.mean(axis=(1, 2))
    assert areas.max() < 1.5 * areas.min()
    # The same part of the same thing: its colours, wherever it has moved to, as the median of what is masked.
    sources = example.render_clip(FRAMES, SIZE)[0]
    colours = np.array([np.median(source[mask], axis=0) for source, mask in zip(sources, mask_list, strict=True)])
    assert np.ptp(colours, axis=0).max() < 25


def centre(mask):
    return np.argwhere(mask > 0).mean(axis=0)


def jumps(example):
    """How far the masks' centres leave a smooth path, in pixels: their largest second difference."""
    path = np.array([centre(mask) for mask in example.render_clip(FRAMES, SIZE)[1]])
    return np.abs(np.diff(path, 2, axis=0)).max()


def spike(example):
    """How much more, or less, changes from frame to frame than from the frame before: the largest ratio."""
    sources = example.render_clip(FRAMES, SIZE)[0].astype(int)
    changes = np.abs(np.diff(sources, axis=0)).mean(axis=(1, 2, 3))
    ratios = changes[1:] / changes[:-1]
    return max(ratios.max(), 1 / ratios.min())


@examples
def test_no_object_is_mirrored_on_its_way(example):
    # The films move by 1 or 2 pixels a frame, hardly faster or slower than the frame before. A mirrored object's
    # centre need not jump, but its picture does: see the films below.
    assert jumps(example) < 1 and spike(example) < 2


@pytest.mark.parametrize("seed", (900_007, 900_038, 900_080, 900_083))
def test_a_mirrored_object_would_be_noticed(seed):
    """In the films of these seeds it is mirrored on its way: they would not be fit for an example."""
    flipping = Example("flips", "An object that is mirrored on its way", "object", seed)
    assert jumps(flipping) > 1 and spike(flipping) > 3


# -------------------- what is one picture


def test_the_thing_to_move_has_room_and_throws_a_shadow_outside_its_mask():
    source, mask, moved = TO_MOVE.render(SIZE)
    assert source.shape == moved.shape == (SIZE, SIZE, 3) and set(np.unique(mask)) == {0, 1}
    assert 0.02 < mask.mean() < 0.4
    changed = (source.astype(int) - moved).any(axis=-1)
    assert (changed & (mask == 0)).mean() > mask.mean() / 2, "the thing elsewhere, and its shadow"
    assert np.array_equal(source, TO_MOVE.render(SIZE)[0])


def test_the_place_for_a_shape_is_where_it_is_not_and_the_title_says_which():
    source, mask, drawn = TO_NAME.render(SIZE)
    assert source.shape == drawn.shape == (SIZE, SIZE, 3) and set(np.unique(mask)) == {0, 1}
    assert np.array_equal(source[mask == 0], drawn[mask == 0]), "the mask has all of the shape"
    assert (source[eroded(mask)] != drawn[eroded(mask)]).any(axis=-1).mean() > 0.95, "and hardly more"
    assert draw_shape(HELD_OUT_SEED + TO_NAME.seed).look.caption in TO_NAME.title


@pytest.mark.parametrize("example", [TO_MOVE, TO_NAME], ids=["move", "shape"])
def test_what_is_one_picture_is_no_film(example):
    with pytest.raises(ArgumentError, match="one picture, not a film"):
        example.render_clip(2, SIZE)
