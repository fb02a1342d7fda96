"""SmartBrush's recipe: what is noised, what is learned, shares of the samples; drawn shapes; COCO and folders."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mimicbrush_core.errors import ArgumentError, PictureError
from mimicbrush_core.evaluation import smartbrush as evaluation
from mimicbrush_core.evaluation.smartbrush import evaluate_brush
from mimicbrush_core.masks import MAX_PRECISION_LEVEL, grown, precise_mask
from mimicbrush_core.modules import build_modules, bundled_config
from mimicbrush_core.systems.smartbrush import SmartBrush
from mimicbrush_core.text import make_tokenizer
from mimicbrush_core.training import coco, segments, smartbrush_task
from mimicbrush_core.training.curriculum import Curriculum
from mimicbrush_core.training.dice import dice_loss
from mimicbrush_core.training.frames import Unreadable
from mimicbrush_core.training.scenes import HELD_OUT_SEED
from mimicbrush_core.training.segments import Segment, Segments, is_fit, list_segment_folder
from mimicbrush_core.training.shapes import COLOURS, FINISHES, SHAPES, Look, draw_shape, nearest_colour
from mimicbrush_core.training.smartbrush_task import (
    Shares,
    SmartBrushTask,
    Weights,
    small_task,
)
from mimicbrush_core.training.trainer import TrainingSettings, train

SIZE = 32


@pytest.fixture(scope="module")
def modules_and_config():
    torch.manual_seed(0)
    config = bundled_config("smartbrush_small")
    return build_modules(config), config


def shape_segment(number: int) -> Segment:
    scene = draw_shape(number, SIZE)
    return Segment(scene.picture, scene.mask, scene.text)


def brush_task(modules_and_config, **options) -> SmartBrushTask:
    return SmartBrushTask(*modules_and_config, shape_segment, seed=0, **options)


def drawn(task: SmartBrushTask, indices: range) -> list:
    scene = task._scenes.of([0])[0]
    return [task._draw(scene, index) for index in indices]


class Recorded:
    """Stands in for the U-Net: keeps what it was asked, answers with a fixed tensor."""

    def __init__(self, answer: torch.Tensor):
        self.answer, self.dtype, self.device = answer, torch.float32, torch.device("cpu")

    def __call__(self, sample, timesteps, encoder_hidden_states, class_labels):
        self.input, self.timesteps, self.levels = sample, timesteps, class_labels
        return type("Output", (), {"sample": self.answer})


def answered(modules_and_config, answer: torch.Tensor, **options) -> tuple[SmartBrushTask, Recorded]:
    modules, config = modules_and_config
    unet = Recorded(answer)
    return SmartBrushTask(replace(modules, unet=unet), config, shape_segment, seed=0, **options), unet


# --- the loss ----------------------------------------------------------------------------------------------


def test_the_worked_value_of_dice():
    logits = torch.tensor([[[[2.0, -1.0], [0.0, 3.0]]]])
    target = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    assert dice_loss(logits.sigmoid(), target).item() == pytest.approx(0.20328, abs=1e-5)


def test_dice_is_0_for_the_mask_itself_and_1_for_its_opposite():
    target = torch.zeros(2, 1, 4, 4)
    target[:, :, :2] = 1
    assert dice_loss(torch.stack([target[0], 1 - target[1]]), target).tolist() == pytest.approx([0, 1], abs=1e-4)
    assert dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).item() == 0


def test_outside_the_coarse_mask_the_network_sees_the_clean_latents_bit_for_bit(modules_and_config):
    task, unet = answered(modules_and_config, torch.zeros(8, 5, SIZE // 4, SIZE // 4))
    task.loss(0, list(range(8)))
    samples = [task._draw(*one) for one in zip(task._scenes.of(range(8)), range(8), strict=True)]
    clean, mask = torch.stack([s.clean for s in samples]), torch.stack([s.mask for s in samples])
    assert torch.equal(unet.input[:, 4:], mask)
    outside = (mask == 0).expand_as(clean)
    assert outside.any() and torch.equal(unet.input[:, :4][outside], clean[outside])
    assert not torch.isclose(unet.input[:, :4][~outside], clean[~outside]).any()
    assert unet.levels.tolist() == [int(sample.level) for sample in samples]


@pytest.mark.parametrize("region", smartbrush_task.LOSS_REGIONS)
def test_what_is_predicted_outside_the_mask_counts_only_with_the_full_region(modules_and_config, region):
    side = SIZE // 4
    weights = Weights(mask=0.0, region=region)
    task, unet = answered(modules_and_config, torch.zeros(2, 5, side, side), weights=weights, shares=Shares(whole=0))
    before = task.loss(0, [0, 1])[0]
    outside = (unet.input[:, 4:] == 0).float()
    assert outside.any()
    unet.answer = torch.cat([100 * outside.expand(-1, 4, -1, -1), outside], dim=1)
    after = task.loss(0, [0, 1])[0]
    assert (after == before) if region == "mask" else (after > before + 100)


def test_the_true_target_inside_the_mask_leaves_only_dice(modules_and_config):
    """The answer is v of the clean latents, computed here from its definition, and a mask logit of 0."""
    side = SIZE // 4
    task, unet = answered(modules_and_config, torch.zeros(4, 5, side, side), weights=Weights(mask=0.01))
    task.loss(0, list(range(4)))
    samples = [task._draw(*one) for one in zip(task._scenes.of(range(4)), range(4), strict=True)]
    clean, noise = torch.stack([s.clean for s in samples]), torch.stack([s.noise for s in samples])
    alpha = task.denoising.alphas[unet.timesteps][:, None, None, None]
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    unet.answer = torch.cat([velocity, torch.zeros(4, 1, side, side)], dim=1)
    loss, figures = task.loss(0, list(range(4)))
    dice = [
        float(s.has_object) * dice_loss(torch.full((1, 1, side, side), 0.5), s.target[None]).item() for s in samples
    ]
    assert figures["inside"] == pytest.approx(0, abs=1e-10)
    assert loss.item() == pytest.approx(0.01 * np.mean(dice), rel=1e-5)


def test_dice_is_off_for_text_to_image(modules_and_config):
    side, weights = SIZE // 4, Weights(mask=1.0)
    task, _ = answered(modules_and_config, torch.zeros(2, 5, side, side), weights=weights, shares=Shares(whole=1))
    loss, figures = task.loss(0, [0, 1])
    assert "dice" not in figures and loss.item() == pytest.approx(figures["inside"], rel=1e-5)


def test_a_configuration_that_predicts_noise_is_taught_the_noise(modules_and_config):
    modules, config = modules_and_config
    config = {**config, "scheduler": {**config["scheduler"], "prediction_type": "epsilon"}}
    side = SIZE // 4
    task, unet = answered((modules, config), torch.zeros(2, 5, side, side))
    samples = [task._draw(*one) for one in zip(task._scenes.of([0, 1]), [0, 1], strict=True)]
    unet.answer = torch.cat([torch.stack([s.noise for s in samples]), torch.zeros(2, 1, side, side)], dim=1)
    assert task.loss(0, [0, 1])[1]["inside"] == 0


def test_an_unknown_region_of_the_loss_is_refused():
    with pytest.raises(ArgumentError, match=r"'box'.*mask, full"):
        Weights(region="box")


# --- samples -----------------------------------------------------------------------------------------------


def test_a_fifth_is_text_to_image_with_the_whole_picture_as_its_mask(modules_and_config):
    samples = drawn(brush_task(modules_and_config), range(2000))
    whole = [sample for sample in samples if not sample.has_object]
    assert len(whole) / 2000 == pytest.approx(0.2, abs=0.03)
    assert all(sample.mask.all() and sample.level == MAX_PRECISION_LEVEL for sample in whole)
    assert not any(sample.mask.all() for sample in samples if sample.has_object)


def test_a_tenth_has_no_text_whatever_its_mask(modules_and_config):
    samples = drawn(brush_task(modules_and_config), range(3000))
    for has_object in (0, 1):
        some = [sample for sample in samples if sample.has_object == has_object]
        assert np.mean([sample.text == "" for sample in some]) == pytest.approx(0.1, abs=0.035)


def test_every_precision_comes_as_often(modules_and_config):
    samples = drawn(brush_task(modules_and_config, shares=Shares(whole=0)), range(2000))
    counts = np.bincount([int(sample.level) for sample in samples])
    assert len(counts) == MAX_PRECISION_LEVEL + 1
    assert counts / 2000 == pytest.approx(np.full(5, 0.2), abs=0.03)


def test_the_mask_holds_every_touched_cell_of_the_ladder_and_the_target_the_objects_share(modules_and_config):
    task = brush_task(modules_and_config, shares=Shares(whole=0))
    thing = task._scenes.of([0])[0].mask
    for sample in drawn(task, range(40)):
        coarse = precise_mask(thing.astype(np.float32), int(sample.level)).reshape(8, 4, 8, 4)
        assert np.array_equal(sample.mask[0].numpy(), coarse.max(axis=(1, 3)))
        assert sample.target[0].numpy() == pytest.approx(thing.reshape(8, 4, 8, 4).mean(axis=(1, 3)))


def test_timesteps_are_uniform_unless_a_curriculum_bends_them(modules_and_config):
    plain = [int(sample.timestep) for sample in drawn(brush_task(modules_and_config), range(2000))]
    assert min(plain) < 20 and max(plain) > 979 and np.mean(plain) == pytest.approx(499.5, abs=25)
    curriculum = Curriculum(identity=10_000, full=20_000)
    noisy = drawn(brush_task(modules_and_config, curriculum=curriculum), range(200))
    assert min(int(sample.timestep) for sample in noisy) >= 899


def test_a_sample_is_a_function_of_seed_and_index(modules_and_config):
    task, again = brush_task(modules_and_config, held=4, echo=2), brush_task(modules_and_config, held=4, echo=2)
    ahead = [task._draw(*one) for one in zip(task._scenes.of([0, 1, 2]), [0, 1, 2], strict=True)]
    alone = again._draw(again._scenes.of([2])[0], 2)
    for name in ("clean", "noise", "mask", "target", "timestep", "level"):
        assert torch.equal(getattr(ahead[2], name), getattr(alone, name)), name
    assert ahead[2].text == alone.text and not torch.equal(ahead[1].noise, alone.noise)


# --- learning ----------------------------------------------------------------------------------------------


def test_the_small_task_learns_the_text_encoder_too_and_the_large_one_does_not(modules_and_config):
    assert set(small_task(*modules_and_config, seed=0, size=64).learned) == {"unet", "text_encoder"}
    assert set(brush_task(modules_and_config).learned) == {"unet"}


def test_the_loss_reaches_every_parameter_of_the_small_task(modules_and_config):
    task = small_task(*modules_and_config, seed=0, size=SIZE)
    parameters = [p for module in task.learned.values() for p in module.requires_grad_(True).parameters()]
    loss, _ = task.loss(0, list(range(12)))
    gradients = torch.autograd.grad(loss, parameters)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_few_steps_by_the_trainer_lower_both_errors(modules_and_config, tmp_path):
    modules, config = modules_and_config
    torch.manual_seed(1)
    fresh = build_modules(config)
    fresh.vae = modules.vae
    task = SmartBrushTask(
        fresh, config, shape_segment, seed=0, train_text=True, weights=Weights(mask=1.0), held=16, echo=99
    )
    records = []
    settings = TrainingSettings(
        samples=480, batch=16, lr=4e-3, adam_lr=2e-3, warmup_steps=2, precision="fp32", log_every=6
    )
    train(task, tmp_path, settings, records.append)
    assert records[-1]["inside"] < 0.9 * records[0]["inside"]
    assert records[-1]["dice"] < records[0]["dice"] - 0.05
    assert (tmp_path / f"{task.name}.pt").exists()


# --- drawn shapes ------------------------------------------------------------------------------------------


def test_a_shape_has_the_colour_that_its_name_says():
    for number in range(150):
        scene = draw_shape(number)
        assert nearest_colour(scene.picture[scene.mask].mean(axis=0) / 255) == scene.look.colour


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_and_its_shade_have_that_name(name):
    assert [nearest_colour(colour) for colour in COLOURS[name]] == [name, name]


def test_only_the_shape_is_not_background():
    for number in range(40):
        scene = draw_shape(number)
        change = np.abs(scene.picture.astype(int) - scene.background).max(axis=-1)
        assert not change[~grown(scene.mask, 3)].any()  # antialiased edges reach over, sharp corners most
        assert np.median(change[scene.mask]) > 40


def test_shapes_cover_a_fit_share_of_their_picture():
    shares = [draw_shape(number).mask.mean() for number in range(300)]
    assert segments.SMALLEST_SHARE < min(shares) < 0.1 and 0.35 < max(shares) < segments.LARGEST_SHARE


def test_every_word_is_drawn_and_known_to_the_small_model():
    scenes = [draw_shape(number, 16) for number in range(400)]
    assert {scene.look.shape for scene in scenes} == set(SHAPES)
    assert {scene.look.colour for scene in scenes} == set(COLOURS)
    assert {scene.look.finish for scene in scenes} == set(FINISHES)
    tokens = make_tokenizer(bundled_config("smartbrush_small"))([scene.text for scene in scenes])
    assert len(tokens) == 400
    spoken = [scene.text == scene.look.caption for scene in scenes]
    assert np.mean(spoken) == pytest.approx(0.6, abs=0.07)


def test_the_phrases_of_a_look():
    look = Look("star", "orange", "dotted")
    assert [look.label, look.coloured, look.caption] == ["a star", "an orange star", "an orange dotted star"]


def test_a_scene_is_the_same_at_every_size():
    small, large = draw_shape(HELD_OUT_SEED + 5, 64), draw_shape(HELD_OUT_SEED + 5, 128)
    assert small.text == large.text
    shrunk = large.mask.reshape(64, 2, 64, 2).mean(axis=(1, 3)) >= 0.5
    assert (shrunk != small.mask).mean() < 0.02
    assert np.array_equal(small.picture, draw_shape(HELD_OUT_SEED + 5, 64).picture)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_no_seams_and_lies_within_its_bounds(name):
    """Sampled on its own grid: its inside is one piece, and as large as geometry says."""
    shape = SHAPES[name]()
    axis = np.linspace(-1.2, 1.2, 481, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    inside = shape.distance(x, y) < 0
    x0, y0, x1, y1 = shape.bounds
    assert not inside[(x < x0) | (x > x1) | (y < y0) | (y > y1)].any()
    area = inside.mean() * 2.4**2
    expected = {
        "disc": np.pi * 0.85**2,
        "square": 1.6**2,
        "triangle": 0.95 * 1.75,
        "star": 5 * 0.45 * np.sin(np.radians(36)),  # ten triangles of sides 1 and 0.45
        "cross": 4 * 0.95 * 0.33 * 2 - 4 * 0.33**2,
        "ring": np.pi * (0.92**2 - 0.44**2),
        "diamond": 2 * 0.66,
        "heart": 2.17,  # the two lobes above their tangent points, the triangle below
    }[name]
    assert area == pytest.approx(expected, rel=0.02)


# --- COCO --------------------------------------------------------------------------------------------------


def packed(runs: list[int]) -> str:
    """COCO's packing, written after its description: what `unpack_runs` undoes."""
    text = ""
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        while True:
            digit, value = value & 0x1F, value >> 5
            more = value != (-1 if digit & 0x10 else 0)
            text += chr(digit + (0x20 if more else 0) + 48)
            if not more:
                break
    return text


def runs_of(mask: np.ndarray) -> list[int]:
    columns = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns, [2]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


def test_runs_go_down_the_columns_and_begin_outside():
    mask = coco.decode_region({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert mask.tolist() == [[False, True, False], [True, False, False]]


def test_a_known_packed_text():
    # The fourth number on are differences; 'b0' is 18 = 0b10010, which needs a second digit to be positive.
    assert coco.unpack_runs("05000b0") == [0, 5, 0, 5, 0, 5 + 18]


@pytest.mark.parametrize("seed", range(5))
def test_packed_runs_and_plain_ones_are_the_same_region(seed):
    mask = np.random.default_rng(seed).random((37, 53)) < 0.02 * 4**seed / 4
    mask[5:30, 10:40] |= seed % 2 == 0  # long runs, whose differences are negative and have several digits
    runs = runs_of(mask)
    assert coco.unpack_runs(packed(runs)) == runs
    size = list(mask.shape)
    for counts in (runs, packed(runs), packed(runs).encode()):
        assert np.array_equal(coco.decode_region({"size": size, "counts": counts}, *size), mask)


@pytest.mark.parametrize("region", [{"size": [4, 4], "counts": [3, 4]}, {"size": [2, 8], "counts": [8, 8]}, [[1, 2]]])
def test_a_region_that_does_not_fit_is_unreadable(region):
    with pytest.raises(Unreadable):
        coco.decode_region(region, 4, 4)


@pytest.mark.parametrize("text", ["0e", "0O"])
def test_packed_runs_that_end_early_or_are_negative_are_unreadable(text):
    with pytest.raises(Unreadable, match="damaged"):
        coco.unpack_runs(text)


def test_polygons_cover_the_pixels_whose_middles_they_hold():
    two = [[5, 5, 15, 5, 15, 15, 5, 15], [18.0, 2.0, 20.0, 2.0, 20.0, 3.0, 18.0, 3.0]]
    mask = coco.decode_region(two, 20, 30)
    expected = np.zeros((20, 30), bool)
    expected[5:15, 5:15] = expected[2:3, 18:20] = True
    assert np.array_equal(mask, expected)


@pytest.fixture
def coco_files(tmp_path):
    """Two pictures: one with a fit object as polygon and one as runs, a crowd and a tiny object; one is missing."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "pictures" / "one.png")
    mask = np.zeros((60, 80), bool)
    mask[20:50, 40:60] = True
    polygon = [[10, 10, 34, 10, 34, 40, 10, 40]]
    annotations = [
        {"id": 7, "image_id": 1, "category_id": 3, "segmentation": polygon, "area": 720, "bbox": [10, 10, 24, 30]},
        {
            "id": 8,
            "image_id": 1,
            "category_id": 4,
            "segmentation": {"size": [60, 80], "counts": packed(runs_of(mask))},
            "area": 600,
            "bbox": [40, 20, 20, 30],
            "iscrowd": 0,
        },
        {"id": 9, "image_id": 1, "category_id": 3, "segmentation": polygon, "area": 90, "bbox": [1, 1, 9, 10]},
        {
            "id": 10,
            "image_id": 1,
            "category_id": 3,
            "segmentation": {"size": [60, 80], "counts": [2400, 2400]},
            "area": 2400,
            "bbox": [40, 0, 40, 60],
            "iscrowd": 1,
        },
    ]
    content = {
        "images": [{"id": 1, "file_name": "one.png", "height": 60, "width": 80}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 4, "name": "traffic light"}],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "captions.json").write_text(json.dumps({"8": "an old traffic light"}))
    return tmp_path


def test_coco_gives_single_objects_of_a_fit_size_with_their_captions(coco_files):
    found = coco.list_coco(coco_files / "instances.json", coco_files / "pictures", coco_files / "captions.json")
    assert [(one.label, one.caption) for one in found] == [("dog", None), ("traffic light", "an old traffic light")]
    assert [one.read_mask().sum() for one in found] == [720, 600]
    assert coco.list_coco(coco_files / "instances.json", coco_files / "pictures")[1].caption is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": 3, "categories": [], "annotations": []}', "{"])
def test_what_is_not_cocos_format_is_refused_by_name(tmp_path, content):
    (tmp_path / "wrong.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"wrong\.json"):
        coco.list_coco(tmp_path / "wrong.json", tmp_path)


def test_a_missing_annotation_file_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"none\.json"):
        coco.list_coco(tmp_path / "none.json", tmp_path)


# --- segments ----------------------------------------------------------------------------------------------


def coco_segments(folder, **options) -> Segments:
    instances = coco.list_coco(folder / "instances.json", folder / "pictures", folder / "captions.json")
    return Segments(instances, size=48, **options)


def test_a_segment_is_a_function_of_seed_and_number(coco_files):
    first, second = coco_segments(coco_files), coco_segments(coco_files)
    ahead = [first(number) for number in range(6)]
    alone = second(5)
    assert np.array_equal(alone.picture, ahead[5].picture) and np.array_equal(alone.mask, ahead[5].mask)
    assert alone.text == ahead[5].text
    assert not np.array_equal(coco_segments(coco_files, seed=1)(5).picture, alone.picture)


def test_crops_hold_the_whole_object_and_differ(coco_files):
    """A dog of 24 x 30 in squares of 36 to 60, scaled to 48: its proportions stay, its size and place do not."""
    dogs = [one for one in map(coco_segments(coco_files), range(60)) if one.text == "dog"]
    boxes = []
    for dog in dogs:
        assert dog.picture.shape == (48, 48, 3) and dog.picture.dtype == np.uint8 and dog.mask.dtype == bool
        rows, columns = np.flatnonzero(dog.mask.any(axis=1)), np.flatnonzero(dog.mask.any(axis=0))
        boxes.append((rows[0], columns[0], len(rows), len(columns)))
        assert dog.mask.mean() == pytest.approx(len(rows) * len(columns) / 48**2, rel=0.05)  # round corners
        assert len(rows) / len(columns) == pytest.approx(30 / 24, rel=0.12)
    heights = [height for _, _, height, _ in boxes]
    assert min(heights) == pytest.approx(24, abs=2) and max(heights) == pytest.approx(40, abs=2)
    assert len(set(boxes)) > 10


def test_half_of_the_texts_are_captions_where_there_are_any(coco_files):
    texts = [coco_segments(coco_files)(number).text for number in range(400)]
    assert np.mean([text == "dog" for text in texts]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([text == "an old traffic light" for text in texts]) == pytest.approx(0.25, abs=0.07)


def test_half_are_mirrored_but_never_what_says_left_or_right(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 255
    mask = np.zeros((64, 64), bool)
    mask[20:44, 8:20] = True
    Image.fromarray(picture).save(tmp_path / "a.png")

    def mirrored(label: str) -> float:
        instance = segments.Instance(tmp_path / "a.png", lambda: mask, label)
        found = [Segments([instance], size=32)(number) for number in range(100)]
        assert all(one.picture[one.mask].max() < 5 for one in found)  # the mask goes with the picture: there it is dark
        return np.mean([one.picture[:, 0].mean() > one.picture[:, -1].mean() for one in found])

    assert mirrored("a bar") == pytest.approx(0.5, abs=0.15)
    assert mirrored("the bar on the left") == 0


def test_an_unreadable_picture_is_passed_over_with_one_warning(coco_files, caplog):
    instances = coco.list_coco(coco_files / "instances.json", coco_files / "pictures")
    missing = replace(instances[0], path=coco_files / "pictures" / "gone.png")
    found = [Segments([missing, instances[1]], size=32)(number).text for number in range(5)]
    assert found == ["traffic light"] * 5
    one = Segments([missing, instances[1]], size=32)
    caplog.clear()
    for number in range(10):
        one(number)
    assert sum("gone.png" in record.message for record in caplog.records) == 1
    with pytest.raises(PictureError, match="could be read"):
        Segments([missing], size=32)(0)


def test_a_mask_of_another_size_or_share_is_unreadable(coco_files, caplog):
    instance = coco.list_coco(coco_files / "instances.json", coco_files / "pictures")[0]
    for mask, reason in ((np.ones((8, 8), bool), "8 x 8"), (np.ones((60, 80), bool), "100.0%")):
        with pytest.raises(PictureError, match=reason):
            Segments([replace(instance, read_mask=lambda mask=mask: mask)], size=32)(0)


def test_no_instance_at_all_is_refused():
    with pytest.raises(ArgumentError, match="2% to 60%"):
        Segments([], size=32)


@pytest.mark.parametrize(
    ("area", "longest", "fit"),
    [(99, 10, False), (100, 10, True), (3000, 50, True), (3001, 50, False), (500, 51, False)],
)
def test_objects_of_2_to_60_percent_that_fit_a_square_are_fit(area, longest, fit):
    assert is_fit(area, longest, 50, 100) is fit


@pytest.fixture
def folder(tmp_path):
    for name in ("image", "mask", "text"):
        (tmp_path / name / "deeper").mkdir(parents=True)
    mask = np.zeros((40, 50), np.uint8)
    mask[5:25, 10:40] = 255
    for name in ("deeper/cup", "speck"):
        Image.new("RGB", (50, 40), "white").save(tmp_path / "image" / f"{name}.png")
        Image.fromarray(mask if name != "speck" else mask // 255 * np.eye(40, 50, dtype=np.uint8) * 255).save(
            tmp_path / "mask" / f"{name}.png"
        )
        (tmp_path / "text" / f"{name}.txt").write_text("cup\n\na cup with a rim\n")
    return tmp_path


def test_a_folder_gives_its_fit_objects_with_label_and_caption(folder):
    (found,) = list_segment_folder(folder)
    assert (found.label, found.caption) == ("cup", "a cup with a rim")
    assert found.read_mask().sum() == 600
    assert Segments([found], size=32)(0).mask.any()


@pytest.mark.parametrize(("name", "message"), [("mask/deeper/cup.png", "cup"), ("text/deeper/cup.txt", "cup.txt")])
def test_a_folder_with_a_missing_file_is_refused_by_its_name(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(ArgumentError, match=message):
        list_segment_folder(folder)


def test_a_text_that_says_nothing_is_refused(folder):
    (folder / "text" / "speck.txt").write_text("\n")
    with pytest.raises(ArgumentError, match=r"speck\.txt is empty"):
        list_segment_folder(folder)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="image"):
        list_segment_folder(tmp_path)


# --- evaluation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(modules_and_config) -> SmartBrush:
    modules, config = modules_and_config
    return SmartBrush(modules, {**config, "defaults": {**config["defaults"], "size": 64}})


@pytest.fixture(scope="module")
def results(model):
    return evaluate_brush(model, n=3, steps=2, guidance=2.0)


def case_of(index: int) -> evaluation.BrushCase:
    return list(evaluation.held_out_shapes(index + 1, 64))[index]


def test_cases_are_beyond_what_is_learned_from():
    for index in (0, 3):
        assert np.array_equal(case_of(index).scene.picture, draw_shape(HELD_OUT_SEED + index, 64).picture)


def test_the_mask_given_is_the_ladders():
    case = case_of(0)
    areas = [case.mask(kind).sum() for kind in (evaluation.EXACT, evaluation.SLOPPY, evaluation.BOX)]
    assert areas[0] == case.scene.mask.sum() and areas == sorted(set(areas))
    assert np.array_equal(case.mask(evaluation.KEPT), case.mask(evaluation.BOX))


def test_the_true_picture_is_judged_well_and_the_background_alone_badly():
    for index in range(10):
        case = case_of(index)
        cells = case.scene.mask.reshape(16, 4, 16, 4).mean(axis=(1, 3)).astype(np.float32)
        truth = evaluation.judged(case.scene.picture, case, evaluation.EXACT, cells)
        assert min(truth.given, truth.silhouette) > 0.8 and truth.colour == 1
        assert truth.dice_silhouette < 0.2 and truth.background < 3  # soft edges never agree wholly
        nothing = evaluation.judged(case.scene.background, case, evaluation.EXACT, None)
        assert (nothing.given, nothing.colour, nothing.background) == (0, 0, 0)
        assert np.isnan(nothing.dice_painted)


def test_a_full_box_fills_the_mask_given_and_not_the_silhouette():
    case = case_of(1)
    filled = np.where(case.mask(evaluation.BOX)[..., None] > 0, 255 - case.scene.background, case.scene.background)
    score = evaluation.judged(filled.astype(np.uint8), case, evaluation.BOX, None)
    assert score.given > 0.95 and score.silhouette < 0.8 and score.background > 50


def test_overlap_of_known_regions():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[1:3] = True, True
    assert evaluation.overlap(a, b) == pytest.approx(4 / 12)
    assert evaluation.overlap(np.zeros((4, 4), bool), np.zeros((4, 4), bool)) == 0


def test_an_evaluation_has_every_kind_and_does_not_depend_on_the_batch(model, results):
    assert [set(scores) for scores in results.scores] == [{*evaluation.KINDS, evaluation.BOUND}] * 3
    again = evaluate_brush(model, n=3, steps=2, guidance=2.0, batch=2)
    for kind in evaluation.KINDS:
        for figure in ("given", "silhouette", "background", "dice_painted"):
            assert again.values(kind, figure) == pytest.approx(results.values(kind, figure), abs=2e-2)


def test_only_the_kept_background_is_given_back(model, monkeypatch):
    seen = []
    original = model.sample
    monkeypatch.setattr(model, "sample", lambda *given, **named: seen.append(given[-1]) or original(*given, **named))
    evaluate_brush(model, n=1, steps=2)
    assert [(one.precision, one.preserve_background) for one in seen] == [(0, False), (2, False), (4, False), (4, True)]
    assert {one.guidance for one in seen} == {model.config["defaults"]["guidance"]}


def test_the_report_has_a_row_for_each_mask_and_a_sheet_of_the_pictured(results):
    table = evaluation.brush_table(results)
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[2:] == [*evaluation.KINDS, evaluation.BOUND]
    assert "3 held-out cases" in table and "2 steps" in table and "nan" not in table
    assert [outcome.case.index for outcome in results.pictured] == [0, 1, 2]
    assert evaluation.brush_sheet(results).width == 4 + 7 * (128 + 4)
    figures = evaluation.brush_figures(results)
    expected = np.mean([scores[evaluation.BOX].given for scores in results.scores])
    assert figures["box: given"] == pytest.approx(expected)


@pytest.mark.parametrize("n", [0, 201])
def test_a_number_of_cases_that_there_are_not_is_refused(model, n):
    with pytest.raises(ArgumentError, match="200"):
        evaluate_brush(model, n)


def test_the_small_task_is_validated_on_its_own_size_and_others_not_at_all(modules_and_config, monkeypatch):
    monkeypatch.setattr(smartbrush_task, "_VALIDATION_CASES", 1)
    modules, config = modules_and_config
    config = {**config, "defaults": {**config["defaults"], "steps": 1}}
    found = small_task(modules, config, seed=0, size=64).validate()
    assert "exact silhouette: given" in found.figures and found.sheet is not None
    assert brush_task(modules_and_config).validate() is None
