"""Batches, soft masks, reference regions, colour match, progress and cancelling of whole edits, on the embedded model.

One picture more or less in a batch changes the order of sums: what is equal then is equal within ROUNDING.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mimicbrush_core import editing, images, masks
from mimicbrush_core.attention import reading_blocks
from mimicbrush_core.editing import EditSettings
from mimicbrush_core.errors import ArgumentError, Cancelled, PictureError
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.references import Reference, ReferenceUse, _tokens_in
from mimicbrush_core.systems.mimicbrush import MimicBrush

SIZE = 128
QUICK = EditSettings(steps=2)
ROUNDING = 1.01 / 255
"""One level of 8 bits: truncated instead of rounded, or a sum in another order."""


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
def fresh(model, example):
    """A reference of which nothing is known yet."""
    return model.encode_reference(example[2])


@pytest.fixture
def small(model, example):
    """The same for edits of half the size, which are quicker."""
    return model.encode_reference(example[2], size=SIZE // 2)


@pytest.fixture(scope="module")
def film():
    """Five pictures float [5,S,S,3]; one mask for each, the third empty."""
    sources, mask_list, _ = EXAMPLES[0].render_clip(5, SIZE)
    mask_list[2] = 0
    return as_float(sources), torch.from_numpy(mask_list)


@pytest.fixture
def rows_seen(model):
    """The batch sizes that the U-Net is called with."""
    rows = []
    hook = model.modules.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


def as_float(pictures):
    pictures = torch.from_numpy(np.ascontiguousarray(pictures))
    return (pictures if pictures.ndim == 4 else pictures[None]).float() / 255


def as_mask(mask):
    return torch.from_numpy(mask)[None]


def box_mask(height, width, top, left, bottom, right, value=1.0):
    mask = np.zeros((height, width), np.float32)
    mask[top:bottom, left:right] = value
    return mask


def soft_mask(size=SIZE):
    """A hole, a rim that is half masked, and far around it a skirt too faint to be repainted."""
    mask = box_mask(size, size, 30, 36, 90, 100, value=0.3)
    mask[44:76, 50:86] = 0.7
    mask[50:70, 56:80] = 1
    return mask


# -------------------- one picture, and a batch of one


@pytest.mark.parametrize("height, width", [(128, 128), (97, 150)])
@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, zoom=True, minimum=32, feather=3, color_match=1.0)])
def test_a_batch_of_one_is_the_single_edit(model, example, reference, height, width, settings):
    source = images.resize_lanczos(example[0], (height, width))
    mask = box_mask(height, width, 30, 40, 60, 75)
    alone = model.edit(source, mask, reference, settings)
    batch = model.edit_batch(as_float(source), as_mask(mask), reference, settings)
    assert batch.window == alone.window and batch.settings == alone.settings
    assert torch.equal(batch.raw[0], as_float(alone.raw)[0])
    assert np.array_equal(batch.alpha[0].numpy(), alone.alpha / np.float32(255))
    assert (batch.pictures - as_float(alone.picture)).abs().max() <= ROUNDING  # truncated there, not rounded here
    untouched = batch.alpha == 0
    assert torch.equal(batch.pictures[untouched], as_float(source)[untouched])


def test_the_settings_in_use_are_reported(model, example):
    defaults = model.config["defaults"]
    batch = model.edit_batch(as_float(example[0]), as_mask(example[1]), example[2], EditSettings(seed=5))
    assert batch.settings == EditSettings(seed=5, **defaults)


def test_the_size_is_that_of_the_encoded_reference(model, example):
    source, mask, picture = example
    small = model.encode_reference(picture, size=64)
    for given in (small, ReferenceUse(small), [ReferenceUse(small)]):
        assert model.size_of(given) == 64
        assert model.edit(source, mask, given, QUICK).settings.size == 64
    for given in (picture, [], ()):
        assert model.size_of(given) is None
    assert model.edit(source, mask, [], QUICK).settings.size == model.config["defaults"]["size"]


def test_a_references_own_weight_counts_and_not_the_settings(model, example, reference):
    source, mask, _ = example
    nothing = model.edit(source, mask, reference, replace(QUICK, weight=0.0)).raw
    assert np.array_equal(model.edit(source, mask, [], QUICK).raw, nothing)
    assert np.array_equal(model.edit(source, mask, ReferenceUse(reference, 0.0), QUICK).raw, nothing)
    read = model.edit(source, mask, ReferenceUse(reference), replace(QUICK, weight=0.0)).raw
    assert not np.array_equal(read, nothing)
    assert np.array_equal(read, model.edit(source, mask, reference, QUICK).raw)


# -------------------- soft masks


def test_without_a_feather_alpha_is_the_mask(model, example, reference):
    source, mask = as_float(example[0]), soft_mask()
    batch = model.edit_batch(source, as_mask(mask), reference, replace(QUICK, feather=0))
    alpha = torch.from_numpy(np.rint(mask * 255) / np.float32(255))
    assert torch.equal(batch.alpha[0], alpha)
    mixed = batch.raw * alpha[..., None] + source * (1 - alpha[..., None])
    assert torch.allclose(batch.pictures, mixed, atol=1e-6)  # single precision
    faint = (alpha > 0) & (alpha < 0.5)
    assert (batch.pictures - source)[0][faint].abs().max() > 10 / 255, "what is faint blends, too"


def test_faint_values_do_not_enlarge_the_hole(model, example, reference):
    source, mask = as_float(example[0]), soft_mask()
    hard = masks.binarize(mask).astype(np.float32)
    soft, binary = (model.edit_batch(source, as_mask(one), reference, QUICK) for one in (mask, hard))
    assert torch.equal(soft.raw, binary.raw)
    assert (soft.alpha > 0).sum() > (binary.alpha > 0).sum()
    conditions = [model.encode_source(example[0], one) for one in (mask, hard)]
    assert torch.equal(conditions[0].channels(), conditions[1].channels())


@pytest.mark.parametrize("feather", [0, 3, 10])
def test_the_zoom_window_holds_everything_that_soft_masks_touch(feather):
    random = np.random.default_rng(5)
    for _ in range(50):
        mask_list = []
        for _ in range(random.integers(1, 4)):
            top, left = random.integers(20, 180, 2)
            mask = box_mask(200, 220, top, left, top + 9, left + 30, value=random.choice([1, 0.3, 0.51 / 255]))
            mask[random.integers(0, 200), random.integers(0, 220)] = 0.002
            mask_list.append(mask)
        window = editing.edit_window(mask_list, EditSettings(zoom=True, margin=0, minimum=1, feather=feather))
        inside = np.zeros((200, 220), bool)
        inside[window.slices] = True
        for mask in mask_list:
            assert not masks.feather_alpha(mask, feather, soft=True)[~inside].any()


def test_the_zoom_window_leaves_out_what_is_too_faint_to_be_seen():
    mask = box_mask(200, 200, 90, 90, 110, 110)
    settings = EditSettings(zoom=True, minimum=1)
    expected = editing.edit_window([mask], settings)
    assert editing.edit_window([np.maximum(mask, np.float32(0.49 / 255))], settings) == expected
    assert editing.edit_window([mask], replace(settings, zoom=False)) == masks.whole_picture(200, 200)


def test_a_film_has_one_window(model, film, reference):
    settings = replace(QUICK, zoom=True, minimum=1, margin=0.0, feather=0)
    together = model.edit_batch(*film, reference, settings)
    first, last = (editing.edit_window([mask.numpy()], settings) for mask in film[1][[0, 4]])
    assert first != last
    rows, columns = together.window.slices
    assert film[1][:, rows, columns].sum() == film[1].sum()
    assert together.raw.shape == (5, together.window.height, together.window.width, 3)


# -------------------- batches


def test_roles_of_one_or_n_make_n_pictures():
    assert editing.batch_size({"source": 1, "mask": 1}) == 1
    assert editing.batch_size({"source": 1, "mask": 3, "depth": 1}) == 3
    assert editing.batch_size({"source": 3, "mask": 3}) == 3
    assert editing.repeated("a", 3) == ["a"] * 3
    assert editing.repeated("abc", 3) == list("abc")
    with pytest.raises(PictureError, match=r"3 sources, 2 masks, 1 depth\."):
        editing.batch_size({"source": 3, "mask": 2, "depth": 1})


@pytest.mark.parametrize("sources, mask_count", [(1, 3), (3, 1), (3, 3)])
def test_what_is_given_once_serves_all(model, film, reference, sources, mask_count):
    picked = [0, 3, 4]
    pictures, mask_list = film[0][picked[:sources]], film[1][picked[:mask_count]]
    batch = model.edit_batch(pictures, mask_list, reference, QUICK)
    assert batch.pictures.shape == (3, SIZE, SIZE, 3) and batch.alpha.shape == (3, SIZE, SIZE)
    for index in range(3):
        source, mask = pictures[index % sources], mask_list[index % mask_count]
        alone = model.edit_batch(source[None], mask[None], reference, QUICK)
        assert torch.equal(batch.alpha[index], alone.alpha[0])
        assert (batch.pictures[index] - alone.pictures[0]).abs().max() <= ROUNDING


def test_a_mask_without_a_batch_is_one_mask(model, film, reference):
    pictures, mask = film[0][:2], film[1][0]
    expected = model.edit_batch(pictures, mask[None], reference, QUICK).pictures
    assert torch.equal(model.edit_batch(pictures, mask, reference, QUICK).pictures, expected)


def test_pictures_with_empty_masks_come_back_bit_for_bit(model, film, reference, rows_seen):
    pictures, mask_list = film[0] + 1e-4, film[1].clone()  # values that 8 bits do not hold
    mask_list[2, 10:90, 10:90] = 0.5  # 128 of 255 is not above the threshold: faint, but nothing to repaint
    batch = model.edit_batch(pictures, mask_list, reference, replace(QUICK, guidance=1.0))
    assert torch.equal(batch.pictures[2], pictures[2]) and not batch.alpha[2].any()
    assert torch.equal(batch.raw[2], as_float(images.picture_from_array(film[0][2], "source"))[0])
    assert rows_seen == [4, 4], "and they are not sampled"
    for index in (0, 1, 3, 4):
        assert not torch.equal(batch.pictures[index], pictures[index])


def test_values_beyond_white_stay_where_nothing_is_edited(model, example, reference):
    source = as_float(example[0]) * 3 - 0.5
    batch = model.edit_batch(source, as_mask(example[1]), reference, QUICK)
    assert batch.pictures.max() > 1 and batch.pictures.min() < 0
    assert torch.equal(batch.pictures[batch.alpha == 0], source[batch.alpha == 0])
    clipped = model.edit_batch(source.clamp(0, 1), as_mask(example[1]), reference, QUICK)
    assert torch.equal(batch.raw, clipped.raw)


def test_transparency_opens_with_the_edit(model, example, reference):
    rgb, mask = as_float(example[0]), soft_mask()
    source = torch.cat([rgb, torch.full((1, SIZE, SIZE, 1), 0.25)], dim=3)
    batch = model.edit_batch(source, as_mask(mask), reference, QUICK)
    assert batch.pictures.shape == (1, SIZE, SIZE, 4)
    assert torch.equal(batch.pictures[batch.alpha == 0], source[batch.alpha == 0])
    assert torch.allclose(batch.pictures[..., 3], 0.25 + 0.75 * batch.alpha, atol=1e-6)
    alpha = batch.alpha[..., None]
    assert torch.allclose(batch.pictures[..., :3], batch.raw * alpha + rgb * (1 - alpha), atol=1e-6)
    on_white = as_float(images.picture_from_array(source[0], "source"))
    assert torch.equal(batch.raw, model.edit_batch(on_white, as_mask(mask), reference, QUICK).raw)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_how_many_are_worked_on_together_changes_nothing(model, film, reference, rows_seen, at_once):
    settings = replace(QUICK, guidance=1.0, count_up=True)
    together = model.edit_batch(*film, reference, settings)
    assert rows_seen == [4, 4]
    chunked = model.edit_batch(*film, reference, replace(settings, at_once=at_once))
    assert rows_seen[2:] == {1: [1] * 8, 2: [2] * 4, 3: [3, 3, 1, 1]}[at_once]
    assert (chunked.pictures - together.pictures).abs().max() <= ROUNDING
    assert torch.equal(chunked.alpha, together.alpha)


def test_seeds_count_up_by_the_pictures_place(model, film, reference):
    pictures, mask_list = film[0][:1], film[1][[0, 2, 0]]  # the empty picture has its seed, too
    same = model.edit_batch(pictures, mask_list, reference, replace(QUICK, seed=7))
    assert torch.equal(same.pictures[0], same.pictures[2])
    up = model.edit_batch(pictures, mask_list, reference, replace(QUICK, seed=7, count_up=True))
    for index in (0, 2):
        alone = model.edit_batch(pictures, mask_list[:1], reference, replace(QUICK, seed=7 + index))
        assert (up.pictures[index] - alone.pictures[0]).abs().max() <= ROUNDING
    assert (up.pictures[0] - up.pictures[2]).abs().max() > 10 * ROUNDING


def test_seeds_of_a_batch():
    assert EditSettings(seed=5).seeds(3) == [5, 5, 5]
    assert EditSettings(seed=5, count_up=True).seeds(3) == [5, 6, 7]
    assert EditSettings(seed=2**63 - 1, count_up=True).seeds(2) == [2**63 - 1, 0]


def test_references_are_written_once_for_a_batch(model, film, fresh):
    model.edit_batch(*film, fresh, replace(QUICK, at_once=1))
    assert fresh.features_computed == 2


# -------------------- what is refused


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("seed", (-1, 2**63)),
        ("guidance", (-0.1, 100.1, float("nan"))),
        ("weight", (-0.1, 10.1)),
        ("keep_shape", (-0.1, 1.1, float("nan"))),
        ("margin", (-0.1, 10.1)),
        ("minimum", (0, images.MAX_SIDE + 1)),
        ("feather", (-1, 257)),
        ("color_match", (-0.1, 1.1, float("nan"))),
        ("at_once", (0, 1025)),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name, wrong):
    EditSettings().check()
    for value in wrong:
        with pytest.raises(ArgumentError, match=f"^{name} is {value}; it must be between"):
            EditSettings(**{name: value}).check()


def spoilt(mask, index, value):
    mask = mask.clone()
    mask[index, 0, 0] = value
    return mask


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda sources, mask: (sources[:3], mask[:2]), "3 sources, 2 masks"),
        (lambda sources, mask: (sources[:2], mask[:3]), "2 sources, 3 masks"),
        (lambda sources, mask: (sources, mask * 0), "mask is empty"),
        (lambda sources, mask: (sources, mask[:, :64]), "128 x 64 pixels, the picture 128 x 128"),
        (lambda sources, mask: (sources, spoilt(mask, 2, torch.nan)), "mask contains NaN"),
        (lambda sources, mask: (sources, spoilt(mask, 2, 1.5)), "mask has values"),
        (lambda sources, mask: (sources, mask[..., None]), "mask has the shape"),
        (lambda sources, mask: (sources[0], mask), "batch, height, width, channels"),
        (lambda sources, mask: (spoilt(sources, 4, torch.nan), mask), "source picture contains NaN"),
        (lambda sources, mask: (sources[..., :2], mask), "source picture has the shape"),
    ],
)
def test_batches_that_do_not_fit_are_refused(model, film, fresh, change, message):
    with pytest.raises(PictureError, match=message):
        model.edit_batch(*change(*film), fresh, QUICK)
    assert fresh.features_computed == 0


@pytest.mark.parametrize("changes", [{"spacing": "cosine"}, {"steps": 0}, {"at_once": 0}, {"color_match": 2.0}])
def test_settings_are_refused_before_any_work(model, film, fresh, changes):
    with pytest.raises(ArgumentError, match=next(iter(changes))):
        model.edit_batch(*film, fresh, replace(QUICK, **changes))
    assert fresh.features_computed == 0


def test_the_spacing_of_the_settings_is_used(model, example, reference):
    source, mask, _ = example
    settings = EditSettings(steps=3)
    own = model.config["scheduler"]["timestep_spacing"]
    assert own == "trailing"
    expected = model.edit(source, mask, reference, settings).raw
    assert np.array_equal(model.edit(source, mask, reference, replace(settings, spacing=own)).raw, expected)
    for spacing in ("leading", "linspace", "karras"):
        assert not np.array_equal(model.edit(source, mask, reference, replace(settings, spacing=spacing)).raw, expected)


# -------------------- a region of the reference


def test_nothing_outside_the_reference_mask_can_show(model, example):
    source, mask, picture = example
    region = box_mask(SIZE, SIZE, 30, 20, 90, 100)
    changed = np.where(masks.binarize(region)[..., None], picture, 255 - picture)
    one, two = (model.encode_reference(one, mask=region) for one in (picture, changed))
    for name in ("latents", "tokens", "region"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    expected = model.edit(source, mask, one, QUICK).raw
    assert np.array_equal(model.edit(source, mask, two, QUICK).raw, expected)
    plain = model.edit(source, mask, picture, QUICK).raw
    assert not np.array_equal(model.edit(source, mask, changed, QUICK).raw, plain), "without a mask it shows"
    assert not np.array_equal(plain, expected)


def test_a_soft_reference_mask_counts_from_the_threshold_on(model, example):
    hard = box_mask(SIZE, SIZE, 30, 20, 90, 100)
    soft = np.where(hard > 0, np.float32(129 / 255), np.float32(128 / 255))
    one, two = (model.encode_reference(example[2], mask=mask) for mask in (hard, soft))
    for name in ("latents", "tokens", "region"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_what_is_inside_the_reference_mask_shows(model, example):
    source, mask, picture = example
    region = box_mask(SIZE, SIZE, 30, 20, 90, 100)
    inside = picture.copy()
    inside[40:80, 30:90] = 255 - inside[40:80, 30:90]
    one, two = (model.edit(source, mask, model.encode_reference(p, mask=region), QUICK).raw for p in (picture, inside))
    assert not np.array_equal(one, two)


def test_the_reader_is_not_offered_the_white_outside(model, example):
    """Not white alone: what lies outside is not among the tokens at all."""
    region = box_mask(SIZE, SIZE, 32, 0, 96, 64)  # in whole tokens at each level, of up to 32 pixels
    part = model.encode_reference(example[2], mask=region)
    white = np.where(region[..., None] > 0, example[2], np.uint8(255))
    whole = model.encode_reference(white)
    assert torch.equal(part.latents, whole.latents) and torch.equal(part.tokens, whole.tokens)
    unet = model.modules.reference_unet
    for name, bank in whole.banks_at(unet, 500.0).items():
        step = SIZE // int(bank.shape[1] ** 0.5)
        inside = torch.from_numpy(region[::step, ::step])
        assert torch.equal(part.banks_at(unet, 500.0)[name], bank[:, inside.flatten() > 0])


def test_a_full_reference_mask_of_a_square_picture_is_none(model, example):
    source, mask, picture = example
    full = model.encode_reference(picture, mask=np.ones((SIZE, SIZE), np.float32))
    assert np.array_equal(model.edit(source, mask, full, QUICK).raw, model.edit(source, mask, picture, QUICK).raw)


@pytest.mark.parametrize("size", [64, 256, 600])
@pytest.mark.parametrize("side", [1, 4])
def test_a_tiny_reference_mask_offers_a_few_tokens_at_each_level(model, size, side):
    picture = images.resize_lanczos(EXAMPLES[0].render(256)[2], size)
    mask = box_mask(size, size, size // 3, size // 2, size // 3 + side, size // 2 + side)
    reference = model.encode_reference(picture, mask=mask)
    for bank in reference.banks_at(model.modules.reference_unet, 500.0).values():
        # At 64 pixels the mask is up to 3 x 3 cells large, and never more than that.
        assert 1 <= bank.shape[1] <= 9


def test_a_reference_mask_of_another_shape_than_square(model):
    picture = images.resize_lanczos(EXAMPLES[0].render(256)[2], (60, 120))
    mask = box_mask(60, 120, 0, 60, 60, 120)  # the right half; padded to 120 x 120, rows 30..90
    region = model.encode_reference(picture, mask=mask).region
    expected = torch.zeros(32, 32)
    expected[8:24, 16:] = 1
    assert torch.equal(region[0, 0].round(), expected)
    assert _tokens_in(region, 16).tolist() == [6, 7, 10, 11]


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.zeros((SIZE, SIZE), np.float32), "The reference mask is empty"),
        (np.full((SIZE, SIZE), 0.5, np.float32), "The reference mask is empty: its largest value is 128"),
        (np.ones((SIZE, 64), np.float32), "The reference mask is 64 x 128 pixels, the picture 128 x 128"),
        (np.full((SIZE, SIZE), np.nan, np.float32), "The reference mask contains NaN"),
        (np.full((SIZE, SIZE), 255, np.float32), "The reference mask has values"),
    ],
)
def test_wrong_reference_masks_are_refused_by_name(model, example, mask, message):
    with pytest.raises(PictureError, match=message):
        model.encode_reference(example[2], mask=mask)


# -------------------- colour match


@pytest.fixture
def drift(model, example):
    """drift(shift) -> a model that answers with the source, its colours shifted, and rubbish in the hole."""

    def make(shift):
        drifting = MimicBrush(model.modules, model.config)
        answer = np.clip(source().astype(int) + shift, 0, 255).astype(np.uint8)
        answer[60:80, 60:80] = 128
        drifting.decode = lambda latents: answer[None].repeat(len(latents), 0)
        return drifting

    return make


def source():
    """Noise with room for shifts of up to 40 in both directions."""
    return np.random.default_rng(2).integers(40, 216, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("shift", [(12, -30, 5), (-40, 0, 40)])
@pytest.mark.parametrize("strength, left", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_a_shift_of_colour_is_taken_off_by_strength(drift, shift, strength, left):
    model = drift(shift)
    reference = model.encode_reference(source())
    mask = box_mask(SIZE, SIZE, 60, 60, 80, 80)
    settings = replace(QUICK, color_match=strength)
    alone = model.edit(source(), mask, reference, settings).raw
    batch = model.edit_batch(as_float(source()), as_mask(mask), reference, settings).raw
    assert torch.equal(batch, as_float(alone))
    outside = mask == 0
    remaining = alone[outside].astype(int) - source()[outside]
    assert np.abs(remaining - left * np.array(shift)).max() <= 1
    painted = alone[70, 70].astype(int) - 128  # what is in the hole moves along
    assert np.abs(painted + (1 - left) * np.array(shift)).max() <= 1


def test_colours_are_not_matched_without_a_ring(drift):
    model = drift((20, 20, 20))
    reference = model.encode_reference(source())
    everything = np.ones((SIZE, SIZE), np.float32)
    plain, matched = (
        model.edit(source(), everything, reference, replace(QUICK, color_match=strength)).raw for strength in (0, 1)
    )
    assert np.array_equal(plain, matched)


def test_the_ring_lies_outside_the_faintest_of_the_mask():
    raw, part = np.full((64, 64, 3), 100, np.uint8), np.full((64, 64, 3), 130, np.uint8)
    mask = box_mask(64, 64, 20, 20, 44, 44, value=0.01)  # 24 of these pixels' surroundings of 2 are within
    mask[30:34, 30:34] = 1
    part[mask > 0] = 0  # the source's object, which is to be repainted
    settings = EditSettings(color_match=1.0, feather=2)
    assert (editing.color_matched(raw, part, mask, settings) == 130).all()


def test_colours_beyond_white_are_clipped_and_not_wrapped():
    raw, part = np.full((32, 32, 3), 100, np.uint8), np.full((32, 32, 3), 130, np.uint8)
    raw[10:20, 10:20], mask = 250, box_mask(32, 32, 10, 10, 20, 20)
    matched = editing.color_matched(raw, part, mask, EditSettings(color_match=1.0))
    assert matched.dtype == np.uint8 and (matched[10:20, 10:20] == 255).all() and (matched[:8] == 130).all()


# -------------------- progress and cancelling


def progress_of(model, film, reference, settings, **options):
    seen = []
    model.edit_batch(*film, reference, settings, seen.append, **options)
    return seen


def assert_sound(seen):
    done, totals = [one.done for one in seen], {one.total for one in seen}
    assert done == sorted(done), "progress goes back"
    assert len(totals) == 1 and done[-1] == totals.pop(), "it ends at the total"
    assert [one.preview is None for one in seen] == [one.stage == "reference" for one in seen]


def size_of_one(model, reference):
    """Bytes of one timestep's features."""
    banks = reference.banks_at(model.modules.reference_unet, 1.0)
    return sum(bank.numel() * bank.element_size() for bank in banks.values())


@pytest.mark.parametrize("fitting", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("at_once", [2, 4])
def test_progress_is_sound_however_much_is_stored(model, film, small, fitting, at_once):
    settings = EditSettings(steps=6, at_once=at_once)
    small.store_bytes = fitting * size_of_one(model, small)
    seen = progress_of(model, film, small, settings)
    assert_sound(seen)
    assert seen[-1].total == 6 + 6 * (4 // at_once)
    assert_sound(progress_of(model, film, small, settings))


def test_features_that_are_known_are_not_counted(model, film, fresh):
    settings = EditSettings(steps=3)
    first = progress_of(model, film, fresh, settings)
    again = progress_of(model, film, fresh, settings)
    assert_sound(first)
    assert_sound(again)
    assert (first[-1].total, again[-1].total) == (6, 3)
    assert {one.stage for one in again} == {"sampling"}


def test_progress_counts_each_references_own_steps(model, film, fresh, example):
    other = model.encode_reference(example[0])
    uses = [ReferenceUse(fresh, end=0.5), ReferenceUse(other, start=0.25), ReferenceUse(fresh, 0.5)]
    seen = progress_of(model, film, uses, EditSettings(steps=4, at_once=2))
    assert_sound(seen)
    assert seen[-1].total == 4 + 3 + 2 * 4
    assert (fresh.features_computed, other.features_computed) == (4, 3)


@pytest.mark.parametrize("fitting", [0, 1, 2, 3])
def test_progress_is_sound_for_one_reference_in_two_ranges_and_a_small_store(model, film, small, fitting):
    small.store_bytes = fitting * size_of_one(model, small)
    uses = [ReferenceUse(small, end=0.5), ReferenceUse(small, 0.5, start=0.5)]
    assert_sound(progress_of(model, film, uses, EditSettings(steps=4, at_once=2)))


def test_previews_show_the_picture_being_made(model, film, reference):
    seen = progress_of(model, film, reference, replace(QUICK, at_once=2))
    assert seen[-1].preview().shape == (SIZE, SIZE, 3) and seen[-1].preview().dtype == np.uint8


def test_cancelling_in_a_later_chunk_leaves_the_model_as_it_was(model, film, fresh):
    expected = model.edit_batch(*film, fresh, replace(QUICK, at_once=2)).pictures
    networks = model.modules.unet, model.modules.reference_unet
    before = [network.attn_processors for network in networks]
    inside = []

    def cancel(progress):
        inside.append([block.attn1.processor for block in reading_blocks(model.modules.unet).values()])
        if progress.done == 3:  # of 4: two steps for each of two chunks
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        model.edit_batch(*film, fresh, replace(QUICK, at_once=2), cancel)
    assert len(inside) == 3 and not {*inside[-1]} & {*before[0].values()}, "it was cancelled while patched"
    assert [network.attn_processors for network in networks] == before
    assert torch.equal(model.edit_batch(*film, fresh, replace(QUICK, at_once=2)).pictures, expected)


def test_a_reference_of_another_model_is_refused_in_a_batch(model, film, fresh):
    stranger = Reference(fresh.latents, fresh.tokens, owner=object())
    with pytest.raises(ArgumentError, match="another model"):
        model.edit_batch(*film, [ReferenceUse(fresh), ReferenceUse(stranger)], QUICK)
