"""The whole edit on the embedded model: what is kept, what is repainted, sizes, seeds, cancelling."""

import numpy as np
import pytest
import torch

from mimicbrush_core.attention import reading_blocks
from mimicbrush_core.errors import ArgumentError, Cancelled, PictureError
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.images import Picture, restore_alpha
from mimicbrush_core.references import ReferenceUse
from mimicbrush_core.sampling import initial_noise, make_scheduler
from mimicbrush_core.systems.mimicbrush import EditSettings, MimicBrush

QUICK = EditSettings(steps=2)


@pytest.fixture(scope="module")
def model():
    return MimicBrush.load()


@pytest.fixture(scope="module")
def example():
    return EXAMPLES[0].render(128)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box_mask(height, width, box):
    mask = np.zeros((height, width), np.float32)
    top, bottom, left, right = box
    mask[top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize("height, width", [(128, 128), (97, 61), (61, 200), (8, 8), (300, 310)])
@pytest.mark.parametrize("zoom", [False, True])
def test_any_size_keeps_every_pixel_beyond_the_feather(model, height, width, zoom):
    source = picture(height, width)
    mask = box_mask(height, width, (height // 2, height // 2 + 3, width // 2, width // 2 + 3))
    settings = EditSettings(steps=1, feather=2, zoom=zoom, minimum=32)
    result = model.edit(source, mask, picture(50, 33, seed=1), settings)
    assert result.picture.shape == source.shape
    far = np.ones((height, width), bool)
    far[max(0, height // 2 - 2) : height // 2 + 5, max(0, width // 2 - 2) : width // 2 + 5] = False
    assert np.array_equal(result.picture[far], source[far])
    assert (result.picture[mask > 0] != source[mask > 0]).any()


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(model, example):
    first, again = (model.edit(*example, QUICK).picture for _ in range(2))
    other = model.edit(*example, EditSettings(steps=2, seed=1)).picture
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_seed_means_the_same_in_a_batch_as_alone(model, example):
    source, mask, reference = example
    condition = model.encode_source(source, mask)
    encoded = model.encode_reference(reference)

    def sample(seeds):
        scheduler = make_scheduler(model.config["scheduler"], "ddim", 2)
        noise = initial_noise(seeds, tuple(condition.hole_latents.shape[1:]))
        return model.sample(condition, [ReferenceUse(encoded, 1.0)], noise, scheduler, 2.0)

    together = sample([3, 4])
    for row, seed in enumerate((3, 4)):
        alone = sample([seed])[0]
        assert torch.allclose(together[row], alone, atol=1e-4 * float(alone.abs().max()))


def test_an_encoded_reference_is_computed_once_for_many_edits(model, example):
    source, mask, reference = example
    encoded = model.encode_reference(reference)
    for seed in range(3):
        model.edit(source, mask, encoded, EditSettings(steps=2, seed=seed))
    assert encoded.features_computed == 2


def test_weight_zero_is_as_if_there_were_no_reference(model, example):
    source, mask, reference = example
    nothing = EditSettings(steps=2, weight=0.0)
    one, two = (model.edit(source, mask, r, nothing).picture for r in (reference, picture(40, 40)))
    assert np.array_equal(one, two)


def test_keeping_the_shape_changes_the_result(model, example):
    plain = model.edit(*example, QUICK).picture
    shaped = model.edit(*example, EditSettings(steps=2, keep_shape=True)).picture
    assert not np.array_equal(plain, shaped)


def test_a_reference_is_refused_by_another_model_and_another_size(model, example):
    source, mask, reference = example
    encoded = model.encode_reference(reference, size=64)
    with pytest.raises(ArgumentError, match="same size"):
        model.edit(source, mask, encoded, EditSettings(steps=2, size=128))
    other = MimicBrush(model.modules, model.config)
    with pytest.raises(ArgumentError, match="another model"):
        model.edit(source, mask, other.encode_reference(reference), QUICK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_close_to_single(model, example, dtype):
    half = MimicBrush.load(dtype=dtype)
    exact, rounded = model.edit(*example, QUICK).raw, half.edit(*example, QUICK).raw
    assert np.abs(exact.astype(int) - rounded).mean() < 6


@pytest.mark.parametrize("stage", ["reference", "sampling"])
def test_cancelling_leaves_no_hooks_and_no_features(model, example, stage):
    source, mask, reference = example
    before = model.edit(*example, QUICK).picture
    encoded = model.encode_reference(reference)

    def cancel(progress):
        if progress.stage == stage:
            raise Cancelled("stop")

    def processors(unet):
        return [block.attn1.processor for block in reading_blocks(unet).values()]

    nets = (model.modules.unet, model.modules.reference_unet)
    expected = [processors(unet) for unet in nets]
    with pytest.raises(Cancelled):
        model.edit(source, mask, encoded, QUICK, cancel)
    assert [processors(unet) for unet in nets] == expected
    assert np.array_equal(model.edit(*example, QUICK).picture, before)


def test_progress_counts_every_step_and_previews(model, example):
    seen, shapes = [], set()

    def note(progress):
        seen.append((progress.stage, progress.done, progress.total))
        if progress.preview is not None:
            shapes.add(progress.preview().shape)

    model.edit(*example, EditSettings(steps=3), note)
    assert seen == [("reference", 3, 6)] + [("sampling", n, 6) for n in (4, 5, 6)]
    assert shapes == {(128, 128, 3)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scheduler": "magic"}, "magic.*ddim"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": -1.0}, "guidance"),
        ({"size": 100}, "multiple of 16"),
        ({"weight": -0.1}, "weight"),
        ({"seed": -1}, "seed"),
        ({"feather": -1}, "feather"),
    ],
)
def test_wrong_settings_are_refused(model, example, changes, message):
    with pytest.raises(ArgumentError, match=message):
        model.edit(*example, EditSettings(**changes))


def test_wrong_pictures_are_refused(model, example):
    source, mask, reference = example
    with pytest.raises(PictureError, match="NaN"):
        model.edit(np.full((64, 64, 3), np.nan, np.float32), mask[:64, :64], reference, QUICK)
    with pytest.raises(PictureError, match="64 x 64"):
        model.edit(source, mask[:64, :64], reference, QUICK)
    with pytest.raises(PictureError, match="empty"):
        model.edit(source, np.zeros_like(mask), reference, QUICK)


def test_transparency_is_kept_beyond_the_edit_and_opened_inside():
    rgb, alpha = picture(4, 4), np.zeros((4, 4), np.uint8)
    blend = np.zeros((4, 4), np.uint8)
    blend[0, 0], blend[0, 1] = 255, 100
    edited = np.full_like(rgb, 7)
    result = restore_alpha(Picture(rgb, alpha), edited, blend)
    assert np.array_equal(result[1:, :, :3], rgb[1:])
    assert result[0, 0].tolist() == [7, 7, 7, 255]
    assert result[0, 1, 3] == 100
    assert result[1:, :, 3].max() == 0
    assert restore_alpha(Picture(rgb), edited, blend) is edited
