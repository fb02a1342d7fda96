"""Looking inside an edit: the arithmetic, what is kept of a run, pixel frames, points, and the drawings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mimicbrush_core import inspection
from mimicbrush_core.acceleration import Acceleration
from mimicbrush_core.attention import ReferenceReading, blend_and_share, blend_by_merging, reading_blocks
from mimicbrush_core.editing import EditSettings
from mimicbrush_core.errors import ArgumentError, PictureError
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.inspection import (
    ALL,
    BLOCKS,
    COARSE,
    FINE,
    MAX_POINTS,
    MIDDLE,
    ReadingRecorder,
    chosen_blocks,
    inspect_edit,
    marked_points,
    reference_masses,
    spread_points,
)
from mimicbrush_core.inspection_pictures import (
    HEAT,
    LEAST_SIDE,
    PANEL_SIDE,
    draw_looks,
    draw_reliance,
    heat_colors,
    point_colors,
)
from mimicbrush_core.masks import CropWindow, whole_picture
from mimicbrush_core.references import Reference, ReferenceUse
from mimicbrush_core.systems.mimicbrush import MimicBrush

SIDE = 128
NOWHERE = torch.zeros(0, 2)


@pytest.fixture(scope="module")
def model():
    return MimicBrush.load()


@pytest.fixture(scope="module")
def example():
    """source [1,S,S,3], mask [1,S,S] as the nodes hand them over, and the reference uint8 [S,S,3]."""
    source, mask, reference = EXAMPLES[1].render(SIDE)
    return torch.from_numpy(source).float()[None] / 255, torch.from_numpy(mask)[None], reference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain_reference(height=SIDE, width=SIDE, region=None):
    """A reference that only inspection looks at: a picture, and perhaps a region [1,1,h,w]."""
    picture = random_picture(height, width)
    return Reference(torch.zeros(1, 4, 32, 32), torch.zeros(1, 1, 8), owner=None, region=region, picture=picture)


# --- the arithmetic ------------------------------------------------------------------------------------------


def joint_softmax(query, key, references):
    """By the definition, in float64: attention weights over own and reference keys, side by side."""
    scores = [query.double() @ key.double().mT / math.sqrt(query.shape[-1])]
    scores += [query.double() @ k.double().mT / math.sqrt(query.shape[-1]) + math.log(w) for k, _, w in references]
    return torch.cat(scores, -1).softmax(-1)


@pytest.mark.parametrize("weights", [(1.0,), (0.3,), (4.0, 0.5, 1.0)])
def test_share_and_masses_are_those_of_the_joint_softmax(weights):
    query, key, value = (draw(2, 3, 70, 8, seed=seed) for seed in range(3))
    references = [(1.5 * draw(2, 3, 40 + n, 8, seed=10 + n), draw(2, 3, 40 + n, 8), w) for n, w in enumerate(weights)]
    joint = joint_softmax(query, key, references)
    blended, share = blend_and_share(query, key, value, references)
    assert torch.equal(blended, blend_by_merging(query, key, value, references))
    assert share.dtype == torch.float32 and torch.allclose(share.double(), joint[..., 70:].sum(-1), atol=1e-6)

    masses = reference_masses(query[1], [(k[1], w) for k, _, w in references], share[1])
    start = 70
    for (ref_key, _, _), mass in zip(references, masses, strict=True):
        expected = joint[1, ..., start : start + ref_key.shape[2]].mean(0)
        assert torch.allclose(mass.double(), expected, atol=1e-6)
        start += ref_key.shape[2]


def test_the_share_stays_exact_in_half_precision():
    query, key, value, ref_key = (draw(1, 2, 30, 8, seed=seed).half() for seed in range(4))
    references = [(ref_key, value, 1.0)]
    share = blend_and_share(query, key, value, references)[1]
    expected = joint_softmax(query, key, references)[..., 30:].sum(-1)
    assert share.dtype == torch.float32 and torch.allclose(share.double(), expected, atol=2e-3)


# --- which blocks --------------------------------------------------------------------------------------------


def test_blocks_are_divided_by_the_grid_they_read_on(model, example):
    unet, seen = model.modules.unet, {}

    def note(block, query, references, share):
        seen[block] = query.shape[2]

    use = ReferenceUse(model.encode_reference(example[2]))
    model.edit_batch(*example[:2], [use], EditSettings(steps=1), observer=lambda progress, uses: note)
    finest = max(seen.values())
    assert set(chosen_blocks(unet, ALL)) == set(seen) == set(reading_blocks(unet))
    for choice, fits in ((FINE, 1), (MIDDLE, 4)):
        assert chosen_blocks(unet, choice) == [name for name, count in seen.items() if count * fits == finest]
    assert set(chosen_blocks(unet, COARSE)) == {name for name, count in seen.items() if count * 16 <= finest}


def test_the_levels_of_the_full_size_model():
    names = ["mid_block.a", *(f"up_blocks.{level}.b" for level in (1, 2, 3))]
    assert list(inspection._halvings(names).values()) == [3, 2, 1, 0]  # grids of 8, 16, 32 and 64 at 512 px


def test_unknown_and_missing_blocks_are_refused(model, monkeypatch):
    with pytest.raises(ArgumentError, match=r"blocks is 'deep'.*all, coarse, middle, fine"):
        chosen_blocks(model.modules.unet, "deep")
    monkeypatch.setattr(inspection, "reading_blocks", lambda unet: ["up_blocks.2.b"])
    with pytest.raises(ArgumentError, match="no coarse blocks"):
        chosen_blocks(None, COARSE)


# --- what is kept of a run -----------------------------------------------------------------------------------


def told(recorder, progress, share, block="one", reference=None, looks=None):
    """Let a recorder see one reading: of a share, the same for all queries, or with a key for every query."""
    reference = reference or plain_reference()
    watch = recorder(progress, [ReferenceUse(reference)])
    tokens = 4 if looks is None else len(looks)
    query, key = torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8)
    if looks is not None:  # query i is the same as key looks[i], and far from all others
        key = 50 * torch.eye(tokens)[None, None].repeat(1, 2, 1, 1)
        query = key[:, :, looks]
    if watch is not None:
        watch(block, query, [(key, key, 1.0)], torch.full((1, 2, tokens), float(share)))


def test_reliance_is_a_mean_over_the_steps_looked_at_and_the_blocks_chosen():
    recorder = ReadingRecorder(["one", "two"], NOWHERE, start=0.25, end=0.75)
    for progress, share in ((0.0, 1.0), (0.25, 0.2), (0.5, 0.6), (0.75, 1.0)):
        told(recorder, progress, share)
        told(recorder, progress, share / 2, block="two")
        told(recorder, progress, 1.0, block="not chosen")
    assert torch.allclose(recorder.reliance(8), torch.full((8, 8), 0.3))


def test_steps_that_read_nothing_count_as_none():
    recorder = ReadingRecorder(["one"], NOWHERE)
    told(recorder, 0.0, 0.8)
    assert recorder(0.5, []) is not None
    assert torch.allclose(recorder.reliance(8), torch.full((8, 8), 0.4))
    silent = ReadingRecorder(["one"], NOWHERE)
    silent(0.0, [])
    assert torch.equal(silent.reliance(8), torch.zeros(8, 8))


def test_only_sums_are_kept():
    recorder, reference = ReadingRecorder(["one"], torch.tensor([[0.5, 0.5]])), plain_reference()
    for step in range(5):
        told(recorder, step / 5, 0.5, reference=reference, looks=torch.arange(16))
    sums = recorder._sums["one"]
    assert sums.readings == 5 and sums.share.shape == (16,) and sums.looks[reference].shape == (1, 16)


@pytest.mark.parametrize("size", [(128, 128), (64, 128), (128, 40)])
def test_a_point_looks_where_its_query_finds_its_key(size):
    """Token i of an 8 x 8 grid has the key of token 63 - i: the picture is looked at turned by half."""
    reference = plain_reference(*size)
    source = whole_picture(100, 200)
    for point in ((60.0, 50.0), (110.0, 40.0), (100.5, 70.5)):
        recorder = ReadingRecorder(["one"], inspection._in_square([point], source))
        told(recorder, 0.0, 0.5, reference=reference, looks=torch.arange(63, -1, -1))
        [look] = inspection._looks(recorder, [point], [ReferenceUse(reference)], 32)
        side = max(size)
        turned = [1 - point[0] / 200, 1 - (point[1] + 50) / 200]  # in the square: 50 rows of padding above
        expected = turned[0] * side - (side - size[1]) // 2, turned[1] * side - (side - size[0]) // 2
        cell = side / 8
        inside = (min(max(expected[0], 0), size[1]), min(max(expected[1], 0), size[0]))
        assert abs(look.peak[0] - inside[0]) <= cell and abs(look.peak[1] - inside[1]) <= cell
        assert 0 < look.peak[0] < size[1] and 0 < look.peak[1] < size[0]
        assert look.share == pytest.approx(1) and look.heat.max() == 1 and look.point == point


def test_tokens_of_a_masked_reference_are_put_where_they_are():
    """Only the lower right quarter is offered: token 0 of what is read is at its corner."""
    region = torch.zeros(1, 1, 32, 32)
    region[..., 16:, 16:] = 1
    reference = plain_reference(region=region)
    assert reference.offered(64).tolist() == [row * 8 + column for row in range(4, 8) for column in range(4, 8)]
    recorder = ReadingRecorder(["one"], torch.tensor([[0.1, 0.1]]))
    watch = recorder(0.0, [ReferenceUse(reference)])
    key = 50 * torch.eye(64)[None, None, :16]
    query = torch.zeros(1, 1, 64, 64)
    query[..., 0, :] = key[..., 1, :]  # the second token that is offered
    watch("one", query, [(key, key, 1.0)], torch.full((1, 1, 64), 0.5))
    [look] = inspection._looks(recorder, [(13.0, 13.0)], [ReferenceUse(reference)], 32)
    assert abs(look.peak[0] - 5.5 * 16) <= 8 and abs(look.peak[1] - 4.5 * 16) <= 8


def test_a_point_is_given_to_the_reference_it_looks_at_most():
    first, second = plain_reference(), plain_reference(64, 128)
    recorder = ReadingRecorder(["one"], torch.tensor([[0.1, 0.1], [0.9, 0.9]]))
    watch = recorder(0.0, [ReferenceUse(first), ReferenceUse(second)])
    key = 50 * torch.eye(32)[None, None]
    query = torch.zeros(1, 1, 16, 32)
    query[0, 0, 0, 3], query[0, 0, 15, 16 + 9] = 50, 50
    watch("one", query, [(key[:, :, :16], None, 1.0), (key[:, :, 16:], None, 1.0)], torch.full((1, 1, 16), 0.5))
    looks = inspection._looks(recorder, [(1.0, 1.0), (2.0, 2.0)], [ReferenceUse(first), ReferenceUse(second)], 32)
    assert [look.reference for look in looks] == [first, second]
    assert all(look.share == pytest.approx(1) for look in looks)
    assert abs(looks[0].peak[0] - 112) <= 16 and abs(looks[0].peak[1] - 16) <= 16


# --- an edit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        EditSettings(steps=1),
        EditSettings(steps=3, guidance=2.0, zoom=True),
        EditSettings(steps=4, guidance=2.0, acceleration=Acceleration(0.0, 0.5, 2, 2)),
    ],
)
def test_looking_changes_no_bit(model, example, settings):
    source, mask, reference = example
    uses = [ReferenceUse(model.encode_reference(reference))]
    expected = model.edit_batch(source, mask, uses, settings)
    result = inspect_edit(model, source, mask, uses, settings, points=3)
    assert torch.equal(result.edit.pictures, expected.pictures) and torch.equal(result.edit.raw, expected.raw)
    assert result.reliance.shape == (SIDE, SIDE) and 0 < result.reliance.max() <= 1 and len(result.looks) == 3


def test_nothing_is_left_behind_in_the_model(model, example):
    reading = ReferenceReading(model.modules.unet)
    with reading:
        reading.observer = lambda *reading: None
    assert reading.observer is None
    processors = [block.attn1.processor for block in reading_blocks(model.modules.unet).values()]
    uses = [ReferenceUse(model.encode_reference(example[2]))]
    inspect_edit(model, *example[:2], uses, points=1)
    assert [block.attn1.processor for block in reading_blocks(model.modules.unet).values()] == processors


def test_more_weight_is_more_reliance(model, example):
    encoded = model.encode_reference(example[2])
    means = [
        float(inspect_edit(model, *example[:2], [ReferenceUse(encoded, weight)]).reliance.mean())
        for weight in (0.0, 0.05, 1.0, 10.0, 1e6)
    ]
    assert means == sorted(means) and means[0] == 0 and means[1] > 0 and means[-1] > 0.999


def test_only_the_rows_that_read_are_looked_at(model, example):
    """In the first step the latents are the same with and without guidance, so the reading is, too."""
    uses = [ReferenceUse(model.encode_reference(example[2]))]
    plain, guided = (
        inspect_edit(model, *example[:2], uses, EditSettings(steps=1, guidance=guidance), points=4)
        for guidance in (1.0, 3.0)
    )
    assert torch.allclose(plain.reliance, guided.reliance, atol=1e-5)
    assert [look.peak for look in plain.looks] == [look.peak for look in guided.looks]


def test_blocks_and_steps_are_chosen(model, example):
    uses = [ReferenceUse(model.encode_reference(example[2]))]

    def reliance(**place):
        return inspect_edit(model, *example[:2], uses, EditSettings(steps=2), **place).reliance

    parts = {choice: reliance(blocks=choice) for choice in BLOCKS}
    counts = {choice: len(chosen_blocks(model.modules.unet, choice)) for choice in BLOCKS}
    mean = sum(counts[choice] * parts[choice] for choice in (COARSE, MIDDLE, FINE)) / counts[ALL]
    assert torch.allclose(mean, parts[ALL], atol=1e-5) and not torch.allclose(parts[FINE], parts[COARSE], atol=1e-2)
    early, late = reliance(end=0.5), reliance(start=0.5)
    assert torch.allclose((early + late) / 2, parts[ALL], atol=1e-5) and not torch.allclose(early, late, atol=1e-3)


@pytest.mark.parametrize("zoom", [False, True])
def test_points_find_themselves_where_the_reference_shows_the_same(model, zoom):
    """A source that is wider than high, of which the reference is the part from column 40, row 6 on."""
    drawn, drawn_mask, _ = EXAMPLES[1].render(SIDE)
    source, mask = np.full((150, 220, 3), 90, np.uint8), np.zeros((150, 220), np.float32)
    source[10:138, 50:178], mask[10:138, 50:178] = drawn, drawn_mask
    uses = [ReferenceUse(model.encode_reference(source[6:, 40:185]))]
    batch = torch.from_numpy(source)[None] / 255, torch.from_numpy(mask)[None]
    settings = EditSettings(zoom=zoom, margin=0.05)
    result = inspect_edit(model, *batch, uses, settings, points=MAX_POINTS)
    assert (result.edit.window.width == 220) != zoom
    far = [math.dist(look.point, (look.peak[0] + 40, look.peak[1] + 6)) for look in result.looks]
    token = max(220 if not zoom else 0, 145) / 16  # of the finest grid, in pixels
    assert np.median(far) <= 1.5 * token and sum(one <= 2 * token for one in far) >= 0.7 * len(far), far


def test_a_masked_reference_is_looked_at_in_its_region_only(model, example):
    region = np.zeros((90, 70), np.float32)
    region[50:, 30:] = 1
    uses = [ReferenceUse(model.encode_reference(random_picture(90, 70), mask=region))]
    for look in inspect_edit(model, *example[:2], uses, points=5).looks:
        assert look.peak[0] > 26 and look.peak[1] > 46  # within half a token


def test_reliance_is_that_of_the_window(model, example):
    source, mask = example[0].repeat(1, 2, 3, 1), torch.zeros(1, 2 * SIDE, 3 * SIDE)
    mask[:, 150:180, 200:240] = 1
    uses = [ReferenceUse(model.encode_reference(example[2]))]
    result = inspect_edit(model, source, mask, uses, EditSettings(zoom=True, minimum=100), points=2)
    rows, columns = result.edit.window.slices
    inside = torch.zeros(mask.shape[1:], dtype=torch.bool)
    inside[rows, columns] = True
    assert (result.reliance[inside] > 0).all() and (result.reliance[~inside] == 0).all()
    assert all(200 <= look.point[0] < 240 and 150 <= look.point[1] < 180 for look in result.looks)


def test_of_a_batch_the_first_is_looked_at(model, example):
    source, mask, reference = example
    uses = [ReferenceUse(model.encode_reference(reference))]
    pictures = [random_picture(SIDE, SIDE, seed) for seed in range(3)]
    depth, own = (model.depth_condition(part) for part in (pictures, pictures[:1]))
    alone = inspect_edit(model, source, mask, uses, depth=own)
    batch = inspect_edit(model, torch.cat([source, 1 - source]), torch.cat([mask, 1 - mask]), uses, depth=depth)
    assert torch.equal(batch.edit.pictures, alone.edit.pictures) and torch.equal(batch.reliance, alone.reliance)


def test_what_would_show_nothing_is_refused_before_any_work(model, example, monkeypatch):
    monkeypatch.setattr(model, "sample", None)
    encoded = model.encode_reference(example[2])
    late = [ReferenceUse(encoded, start=0.5)]
    for place, message in (
        ({"start": 0.6}, "None of the 2 steps lies between start 0.6 and end 1"),
        ({"blocks": "deep"}, "blocks is 'deep'"),
        ({"points": 2, "end": 0.5}, "No reference is read in the steps looked at"),
        ({"points": [(5.0, 200.0)]}, r"The point \(5, 200\) lies outside of the window"),
    ):
        with pytest.raises(ArgumentError, match=message):
            inspect_edit(model, *example[:2], late, EditSettings(steps=2), **place)


def test_without_points_an_unread_reference_is_an_answer(model, example):
    uses = [ReferenceUse(model.encode_reference(example[2]), weight=0.0)]
    result = inspect_edit(model, *example[:2], uses)
    assert result.looks == [] and not result.reliance.any()


# --- points --------------------------------------------------------------------------------------------------


def ring(side=200):
    rows, columns = np.mgrid[:side, :side] - side / 2
    distance = np.hypot(rows, columns)
    return ((distance < 80) & (distance > 60)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 5, MAX_POINTS])
def test_points_are_spread_over_the_mask(count):
    mask = ring()
    points = spread_points(mask, count)
    assert points == spread_points(mask, count) and len(points) == count
    assert all(mask[int(y), int(x)] == 1 for x, y in points)
    assert points == sorted(points, key=lambda point: (point[1], point[0]))
    if count > 1:
        nearest = min(math.dist(a, b) for a in points for b in points if a != b)
        assert nearest > 0.5 * 2 * math.pi * 70 / count  # evenly: they would be that far apart on a circle


def test_a_small_mask_has_as_many_points_as_pixels():
    mask = np.zeros((40, 60), np.float32)
    mask[7, 9] = mask[7, 11] = mask[30, 50] = 1
    assert spread_points(mask, 8) == [(9.5, 7.5), (11.5, 7.5), (50.5, 30.5)]


def test_marks_are_one_point_per_spot():
    marks = np.zeros((60, 100), np.float32)
    marks[5:10, 5:10] = 1
    marks[20:41, 50] = marks[20:41, 70] = marks[40, 50:71] = 1  # a U: two arms that join below
    marks[50, 10] = marks[51, 11] = marks[52, 12] = 1  # connected by corners
    marks[0, 99] = 1
    first, second, arms, corners = marked_points(marks, 60, 100)
    assert first == (99.5, 0.5) and second == (7.5, 7.5) and corners == (11.5, 51.5)
    assert marks[int(arms[1]), int(arms[0])] == 1 and 20 <= arms[1] <= 41


def test_marks_that_do_not_serve_are_refused():
    marks = np.zeros((60, 100), np.float32)
    with pytest.raises(PictureError, match="mask of points is empty"):
        marked_points(marks, 60, 100)
    marks[::6, ::6] = 1
    with pytest.raises(ArgumentError, match=f"170 separate spots; at most {MAX_POINTS}"):
        marked_points(marks, 60, 100)
    with pytest.raises(PictureError, match="mask of points is 100 x 60 pixels, the picture 60 x 60"):
        marked_points(marks, 60, 60)


# --- drawings ------------------------------------------------------------------------------------------------


def test_heat_goes_from_dark_to_light():
    colors = heat_colors(np.linspace(0, 1, 50))
    assert np.array_equal(colors[0], HEAT[0]) and np.array_equal(colors[-1], HEAT[-1])
    assert (np.diff(colors @ [0.299, 0.587, 0.114]) > 0).all()


@pytest.mark.parametrize("size, drawn", [((128, 96), (512, 384)), ((700, 900), (700, 900))])
def test_the_heat_map_lies_over_the_window(size, drawn):
    picture = np.full((*size, 3), 128, np.uint8)
    window = CropWindow(size[1] // 2, 0, size[1] // 2, size[0])
    reliance = np.zeros(size, np.float32)
    reliance[:, size[1] // 2 :] = np.linspace(0.2, 0.7, size[0])[:, None]
    mask = np.zeros(size, np.float32)
    mask[size[0] // 2 - 9 : size[0] // 2 + 9, 5:25] = 1
    sheet = draw_reliance(picture, reliance, mask, window)
    assert sheet.shape[1] == drawn[1] and drawn[0] < sheet.shape[0] < 1.15 * drawn[0]  # the legend is below
    right = 3 * drawn[1] // 4
    light = sheet[:, right].astype(float) @ [0.299, 0.587, 0.114]
    assert light[2] < 60 and light[drawn[0] - 3] > 180
    assert (sheet[10, 10] == 128).all()  # beyond the window the picture is as it was
    outline = (sheet[: drawn[0]] == 235).all(-1)
    scale = drawn[0] / size[0]
    around = outline[int((size[0] // 2 - 12) * scale) : int((size[0] // 2 + 12) * scale), : int(28 * scale)]
    assert around.sum() > 60 * scale and outline.sum() == around.sum()


def test_a_flat_map_does_not_look_like_a_steep_one():
    picture, mask = np.zeros((512, 512, 3), np.uint8), np.zeros((512, 512), np.float32)
    flat = np.full(picture.shape[:2], 0.5, np.float32)
    flat[:256] += 0.01
    sheet = draw_reliance(picture, flat, mask, whole_picture(512, 512)).astype(int)
    assert abs(sheet[100, 100] - sheet[400, 100]).max() < 30


@pytest.fixture(scope="module")
def looks(model):
    """An inspection of a small wide picture, zoomed, with a tall reference and one that no point looks at."""
    source, mask, reference = EXAMPLES[0].render(SIDE)
    uses = [ReferenceUse(model.encode_reference(reference[:, 30:90])), ReferenceUse(plain_reference(), weight=0.0)]
    uses[1].reference.owner = model
    source, mask = source[10:100], mask[10:100]
    batch = torch.from_numpy(source)[None] / 255, torch.from_numpy(mask)[None]
    return inspect_edit(model, *batch, uses, EditSettings(zoom=True, margin=0.0, minimum=70), points=3), source, mask


def test_points_are_drawn_on_the_window_and_joined_with_the_reference(looks):
    result, source, mask = looks
    sheet = draw_looks(result, source, mask)
    window = result.edit.window
    scale = LEAST_SIDE / max(window.width, window.height)
    gap, radius = 12, 9
    left, right = round(window.width * scale), round(60 * LEAST_SIDE / 128)
    assert sheet.shape[1] == gap + left + 4 * gap + right + gap  # one reference only: the other is not looked at
    colors = point_colors(3)
    for look, color in zip(result.looks, colors, strict=True):
        x, y = gap + (look.point[0] - window.x) * scale, gap + (look.point[1] - window.y) * scale
        assert near(sheet, x, y, color, radius)
        x, y = gap + left + 4 * gap + look.peak[0] * LEAST_SIDE / 128, gap + look.peak[1] * LEAST_SIDE / 128
        assert near(sheet, x, y, color, radius)


def near(sheet, x, y, color, radius):
    """Whether a disc of this colour (with a number on it) is there."""
    part = sheet[round(y - radius) : round(y + radius), round(x - radius) : round(x + radius)].astype(int)
    return (abs(part - np.array(color)).max(-1) < 8).mean() > 0.25


def test_large_pictures_are_reduced(looks):
    result, source, mask = looks
    sheet = draw_looks(result, source, mask)
    large = source.repeat(20, 0).repeat(20, 1), mask.repeat(20, 0).repeat(20, 1)
    bigger = CropWindow(*(20 * value for value in vars(result.edit.window).values()))
    grown = replace(
        result,
        edit=replace(result.edit, window=bigger),
        looks=[replace(look, point=(20 * look.point[0], 20 * look.point[1])) for look in result.looks],
    )
    drawn = draw_looks(grown, *large)
    assert sheet.shape[0] < drawn.shape[0] <= PANEL_SIDE + 40


def test_each_reference_shows_its_own_points_only(looks):
    result, source, mask = looks
    references = [plain_reference(), plain_reference()]
    for reference in references:
        reference.picture[:] = 128
    heat = torch.zeros(16, 16)
    heat[8, 8] = 1
    pair = [
        replace(look, reference=reference, peak=(20.0, 20.0), heat=heat)
        for look, reference in zip(result.looks, references, strict=False)
    ]
    drawn = draw_looks(replace(result, looks=pair), source, mask)
    panels = drawn[12 : 12 + LEAST_SIDE, -2 * (LEAST_SIDE + 12) :]
    for index, color in enumerate(point_colors(2)):
        start = index * (LEAST_SIDE + 12)
        assert (panels[-10:, start : start + 50] == 128).all()
        middle = panels[LEAST_SIDE * 17 // 32, start + LEAST_SIDE * 17 // 32].astype(int)
        assert abs(middle - (0.3 * 128 + 0.7 * np.array(color))).max() <= 8
