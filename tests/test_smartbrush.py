"""SmartBrush: its arithmetic against the paper's formulas (no reference code exists), its files, its words."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from mimicbrush_core import images, masks
from mimicbrush_core.checkpoints import METADATA_KEY, embedded_model_path, header_metadata, save_modules
from mimicbrush_core.convert import convert
from mimicbrush_core.encoders import encode_latents
from mimicbrush_core.errors import ArgumentError, Cancelled, ModelFileError, PictureError
from mimicbrush_core.modules import build_modules, build_part, bundled_config
from mimicbrush_core.sampling import guide, initial_noise, make_scheduler
from mimicbrush_core.systems.magic_fixup import MagicFixup
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.systems.paint_by_example import PaintByExample
from mimicbrush_core.systems.smartbrush import BrushSettings, SmartBrush
from mimicbrush_core.text import (
    END,
    START,
    ClipTokenizer,
    WordTokenizer,
    clip_vocabulary,
    encode_text,
    make_tokenizer,
    read_merges,
)
from mimicbrush_core.training.brush_start import initialise_from
from mimicbrush_core.verify import inspect

SIDE, CELLS = 64, 16  # of the model's square, in pixels and in latents
QUICK = BrushSettings(size=SIDE, steps=4, keep_prompt_mask=False)
TEXT = "a red disc"
SURE = 20.0  # a logit


@pytest.fixture(scope="module")
def config():
    return bundled_config("smartbrush_small")


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    modules = build_modules(config)
    for _, module in modules.items():
        module.requires_grad_(False)
    return SmartBrush(modules, config)


@pytest.fixture(scope="module")
def source():
    return np.random.default_rng(0).integers(0, 256, (72, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def mask(source):
    values = np.zeros(source.shape[:2], np.float32)
    values[20:52, 24:72] = 1
    return values


@contextmanager
def watched(model, mask_logits=None):
    """Records what the U-Net is given, [(input, class labels)]; mask_logits(step) replaces its own where given."""
    seen = []

    def before(_module, args, kwargs):
        seen.append((args[0].clone(), kwargs["class_labels"].clone()))

    def after(_module, _args, output):
        if mask_logits is not None:
            output.sample[:, 4:] = mask_logits(len(seen) - 1)
        return output

    hooks = [
        model.modules.unet.register_forward_pre_hook(before, with_kwargs=True),
        model.modules.unet.register_forward_hook(after),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def cells(rows, columns):
    """A mask [1,1,16,16] of latent cells."""
    values = torch.zeros(1, 1, CELLS, CELLS)
    values[..., rows, columns] = 1
    return values


def logits_of(values):
    return SURE * (2 * values - 1)


def run(model, condition, settings=QUICK, seeds=(0,), scheduler="ddim", on_step=None, negative=""):
    settings = model._completed(replace(settings, scheduler=scheduler), None)
    return model.sample(
        condition,
        model.encode_text(TEXT),
        model.encode_text(negative),
        initial_noise(seeds, (4, CELLS, CELLS)),
        make_scheduler(model.config["scheduler"], scheduler, settings.steps),
        settings,
        on_step=on_step,
    )


@pytest.fixture(scope="module")
def condition(model, source, mask):
    return model.encode_source(source, mask, SIDE)


# -------------------- inputs


def test_the_source_is_encoded_whole_and_every_touched_cell_is_masked(model):
    picture = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[np.arange(40), np.arange(40) + 10] = 1  # a line of one pixel, which other reductions lose
    condition = model.encode_source(picture, mask, SIDE)
    touched = mask.reshape(CELLS, 4, CELLS, 4).max(axis=(1, 3))
    assert np.array_equal(condition.mask[0, 0].numpy(), touched) and condition.mask.shape == (1, 1, CELLS, CELLS)
    assert torch.equal(condition.clean, encode_latents(model.modules.vae, images.to_model_range(picture)))


def test_a_picture_that_is_not_square_is_padded(model, source, condition):
    square = images.resize_lanczos(images.pad_to_square(source, 255), SIDE)
    assert torch.equal(condition.clean, encode_latents(model.modules.vae, images.to_model_range(square)))
    assert not condition.mask[..., :2, :].any() and not condition.mask[..., -2:, :].any()


# -------------------- the loop


@pytest.mark.parametrize("scheduler", ("ddim", "euler", "unipc", "dpmpp_2m"))
def test_outside_the_region_the_model_sees_the_clean_picture_at_every_step(model, condition, scheduler):
    inner = cells(slice(6, 9), slice(5, 9))
    with watched(model, lambda step: logits_of(inner)) as seen:
        painted = run(model, condition, scheduler=scheduler)
    assert len(seen) == 4
    for model_input, _ in seen:
        region = model_input[:1, 4:].bool().expand(-1, 4, -1, -1)
        assert torch.equal(model_input[:1, :4][~region], condition.clean[~region])
        assert not torch.isclose(model_input[:1, :4][region], condition.clean[region]).any()
    kept = painted.kept.bool().expand(-1, 4, -1, -1)
    assert torch.equal(painted.latents[~kept], condition.clean[~kept])
    assert not torch.isclose(painted.latents[kept], condition.clean[kept]).any()
    assert 0 < painted.kept.sum() < condition.mask.sum()


def test_it_starts_with_noise_in_the_mask(model, condition):
    with watched(model) as seen:
        run(model, condition)
    noise, inside = initial_noise([0], (4, CELLS, CELLS)), condition.mask.bool().expand(-1, 4, -1, -1)
    assert torch.equal(seen[0][0][:1, :4][inside], noise[inside])
    assert torch.equal(seen[0][0][:1, 4:], condition.mask)


def test_previews_show_the_clean_picture_outside(model, condition):
    infos = []
    run(model, condition, on_step=infos.append)
    outside = ~condition.mask.bool().expand(-1, 4, -1, -1)
    for info in infos:
        assert torch.equal(info.predicted_latents[outside], condition.clean[outside])


@pytest.mark.parametrize("changes", ({"refine_from": 1.0}, {"preserve_background": False}))
def test_without_refinement_the_region_is_the_mask(model, condition, changes):
    with watched(model, lambda step: logits_of(cells(7, 7))) as seen:
        painted = run(model, condition, replace(QUICK, **changes, precision=3))
    assert torch.equal(painted.kept, condition.mask) and not painted.disbelieved.any()
    for model_input, labels in seen:
        assert torch.equal(model_input[:1, 4:], condition.mask) and labels.tolist() == [3, 3]


def test_the_refined_mask_takes_over_as_an_exact_one(model, condition):
    inner = cells(slice(6, 8), slice(5, 7))
    with watched(model, lambda step: logits_of(inner)) as seen:
        painted = run(model, condition, replace(QUICK, refine_from=0.5, precision=3))
    grown = cells(slice(5, 9), slice(4, 8)) * condition.mask  # by one cell, inside the mask
    assert torch.equal(painted.kept, grown) and grown.sum() > inner.sum()
    # Steps count from 0: the third is the first that is not before one half of four.
    assert [labels.tolist() for _, labels in seen] == [[3, 3]] * 3 + [[0, 0]]
    told = [model_input[:1, 4:] for model_input, _ in seen]
    assert all(torch.equal(one, condition.mask) for one in told[:3]) and torch.equal(told[3], grown)


def test_the_given_mask_may_stay_what_the_model_is_told(model, condition):
    inner = cells(slice(6, 8), slice(5, 7))
    with watched(model, lambda step: logits_of(inner)) as seen:
        painted = run(model, condition, replace(QUICK, refine_from=0.0, precision=3, keep_prompt_mask=True))
    assert torch.equal(painted.kept, cells(slice(5, 9), slice(4, 8)) * condition.mask)
    for model_input, labels in seen:
        assert torch.equal(model_input[:1, 4:], condition.mask) and labels.tolist() == [3, 3]
    outside = ~painted.kept.bool().expand(-1, 4, -1, -1)
    assert torch.equal(seen[1][0][:1, :4][outside], condition.clean[outside])


def test_what_was_given_back_stays_the_backgrounds(model, condition):
    small, large = cells(slice(6, 8), slice(5, 7)), condition.mask
    with watched(model, lambda step: logits_of(small if step < 2 else large)):
        painted = run(model, condition, replace(QUICK, refine_from=0.0, keep_prompt_mask=True))
    assert torch.equal(painted.kept, cells(slice(5, 9), slice(4, 8)) * condition.mask)


def test_predictions_are_averaged_over_the_steps(model, condition):
    logits = (3.0, -1.0, -4.0, 0.5)
    with watched(model, lambda step: logits[step]):
        painted = run(model, condition, replace(QUICK, preserve_background=False))
    shares = torch.tensor(logits).sigmoid()
    expected = shares[0]
    for share in shares[1:]:
        expected = (expected + share) / 2
    inside = condition.mask.bool()
    assert torch.allclose(painted.predicted[inside], expected) and not painted.predicted[~inside].any()


def test_the_threshold_counts(model, condition):
    inner = cells(slice(6, 8), slice(5, 7))
    outcomes = {}
    for threshold in (0.6, 0.7):
        with watched(model, lambda step: torch.where(inner > 0, 0.65, -9.0).logit(eps=1e-6)):
            outcomes[threshold] = run(model, condition, replace(QUICK, threshold=threshold))
    assert not outcomes[0.6].disbelieved.any() and outcomes[0.6].kept.sum() < condition.mask.sum()
    assert outcomes[0.7].disbelieved.all()


@pytest.mark.parametrize("side, disbelieved", ((0, True), (1, True), (3, False)))
def test_a_predicted_mask_of_almost_nothing_is_not_believed(model, condition, side, disbelieved):
    whole = replace(condition, mask=torch.ones_like(condition.mask))
    inner = cells(slice(4, 4 + side), slice(4, 4 + side))  # grown to 9 or 25 cells of 256; 5 % are 12.8
    with watched(model, lambda step: logits_of(inner)) as seen:
        painted = run(model, whole, replace(QUICK, precision=4))
    assert painted.disbelieved.tolist() == [disbelieved]
    assert painted.kept.sum() == (256 if disbelieved else 25)
    assert seen[-1][1].tolist() == ([4, 4] if disbelieved else [0, 0])


def test_pictures_of_a_batch_are_refined_apart(model, condition):
    inner = cells(slice(6, 8), slice(5, 7))
    logits = torch.cat([logits_of(inner), logits_of(torch.zeros_like(inner))])
    with watched(model, lambda step: logits.repeat(2, 1, 1, 1)) as seen:
        painted = run(model, condition, seeds=(0, 1))
    assert painted.disbelieved.tolist() == [False, True]
    assert torch.equal(painted.kept[1:], condition.mask) and painted.kept[0].sum() == 16
    assert seen[-1][1].tolist() == [0, 2, 0, 2]


def test_guidance_is_of_the_noise_and_not_of_the_mask(model, condition):
    outputs = []

    def after(_module, _args, output):
        output.sample[:1, 4:], output.sample[1:, 4:] = -SURE, 1.0  # without the text, with it
        outputs.append(output.sample.clone())

    infos, guidance = [], 4.0
    hook = model.modules.unet.register_forward_hook(after)
    try:
        settings = replace(QUICK, guidance=guidance, preserve_background=False)
        painted = run(model, condition, settings, on_step=infos.append)
    finally:
        hook.remove()
    inside = condition.mask.bool()
    assert torch.allclose(painted.predicted[inside], torch.tensor(1.0).sigmoid())
    # At the first step of zero terminal SNR the clean latents are what is predicted (v), with the sign turned.
    without, with_text = outputs[0][:, :4].chunk(2)
    expected = -guide(without, with_text, guidance)
    inside = inside.expand(-1, 4, -1, -1)
    assert torch.allclose(infos[0].predicted_latents[inside], expected[inside], atol=1e-5)


def test_guidance_1_evaluates_the_row_of_the_text_only(model, condition):
    for guidance, rows in ((1.0, 1), (2.0, 2)):
        with watched(model) as seen:
            run(model, condition, replace(QUICK, guidance=guidance))
        assert [len(labels) for _, labels in seen] == [rows] * 4


def test_a_seed_means_the_same_in_a_batch_as_alone(model, condition):
    together = run(model, condition, seeds=(3, 4)).latents
    for row, seed in enumerate((3, 4)):
        alone = run(model, condition, seeds=(seed,)).latents[0]
        assert (together[row] - alone).abs().max() <= 1e-4 * alone.abs().max()


# -------------------- the whole edit


def test_an_edit_stays_in_what_was_kept(model, source, mask):
    inner = cells(slice(6, 9), slice(5, 8))
    with watched(model, lambda step: logits_of(inner)):
        result = model.edit(source, mask, TEXT, replace(QUICK, feather=2))
    assert 0 < result.region.sum() < mask.sum() and not result.region[mask == 0].any()
    untouched = masks.feather_alpha(result.region, 2) == 0
    assert np.array_equal(result.picture[untouched], source[untouched])
    assert untouched[mask == 1].any() and (result.picture[result.region == 1] != source[result.region == 1]).any()
    assert result.warnings == () and result.settings.guidance == model.config["defaults"]["guidance"]


def test_predicted_mask_and_region_lie_where_the_picture_does(model, source):
    """96 x 72 pixels in a square of 96 x 96: a cell is 6 pixels, and two of 16 above and below are padding."""
    inner = cells(slice(3, 6), slice(1, 4))
    with watched(model, lambda step: logits_of(inner)):
        result = model.edit(source, np.ones(source.shape[:2], np.float32), TEXT, QUICK)
    expected = np.zeros(source.shape[:2], np.float32)
    expected[0:30, 0:30] = 1  # cells 2..6 by 0..4
    assert np.array_equal(result.region, expected)
    assert result.predicted[6 : 6 + 18, 6 : 6 + 18].min() > 0.2 and result.predicted[9:21, 9:21].min() > 0.9
    assert result.predicted[36:].max() < 0.01 and result.predicted[:, 36:].max() < 0.01
    assert result.predicted.dtype == result.region.dtype == np.float32


def test_a_mask_that_is_not_believed_warns(model, source, mask):
    with watched(model, lambda step: -SURE):
        result = model.edit(source, mask, TEXT, QUICK)
        batch = model.edit_batch(as_batch(source, 2), torch.from_numpy(mask)[None], TEXT, QUICK)
    assert len(result.warnings) == 1 and "threshold" in result.warnings[0]
    assert np.array_equal(result.region, mask)
    assert [warning[:10] for warning in batch.warnings] == ["Picture 1:", "Picture 2:"]


def as_batch(picture, count=1):
    return (torch.from_numpy(picture).float() / 255)[None].repeat(count, 1, 1, 1)


def test_a_batch_is_its_pictures(model, source, mask):
    inner = cells(slice(6, 9), slice(5, 8))
    sources = torch.cat([as_batch(source), as_batch(source), 1 - as_batch(source)])
    mask_batch = torch.from_numpy(np.stack([mask, np.zeros_like(mask), mask]))
    settings = replace(QUICK, count_up=True, seed=3)
    with watched(model, lambda step: logits_of(inner)):
        batch = model.edit_batch(sources, mask_batch, TEXT, settings)
        for index, one in ((0, source), (2, 255 - source)):
            alone = model.edit(one, mask, TEXT, replace(QUICK, seed=3 + index))
            assert np.abs(batch.raw[index].numpy() * 255 - alone.raw).max() <= 1.01
            assert torch.equal(batch.region[index], torch.from_numpy(alone.region))
            assert torch.allclose(batch.predicted[index], torch.from_numpy(alone.predicted))
    assert torch.equal(batch.pictures[1], sources[1])
    assert not (batch.region[1].any() or batch.predicted[1].any() or batch.alpha[1].any())


def test_zoom_leaves_the_rest(model):
    picture = np.random.default_rng(2).integers(0, 256, (200, 330, 3), dtype=np.uint8)
    mask = np.zeros((200, 330), np.float32)
    mask[150:170, 40:60] = 1
    result = model.edit(picture, mask, TEXT, replace(QUICK, zoom=True, minimum=48, feather=2))
    outside = np.ones(mask.shape, bool)
    outside[result.window.slices] = False
    assert result.window.width < 70 and np.array_equal(result.picture[outside], picture[outside])
    assert not (result.predicted[outside].any() or result.region[outside].any()) and result.predicted.any()


def test_text_negative_precision_and_seed_count(model, source, mask):
    settings = replace(QUICK, preserve_background=False)
    first = model.edit(source, mask, TEXT, settings).raw
    assert np.array_equal(first, model.edit(source, mask, model.encode_text(TEXT), settings).raw)
    for text, changes in (
        ("a blue star", {}),
        (TEXT, {"negative": "blue"}),
        (TEXT, {"precision": 0}),
        (TEXT, {"seed": 1}),
    ):
        assert not np.array_equal(first, model.edit(source, mask, text, replace(settings, **changes)).raw)


def test_progress_and_cancelling(model, source, mask):
    seen = []
    model.edit(source, mask, TEXT, QUICK, seen.append)
    assert [(one.done, one.total) for one in seen] == [(done, 4) for done in range(1, 5)]
    assert seen[-1].preview().shape == (SIDE, SIDE, 3)

    def cancel(progress):
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        model.edit(source, mask, TEXT, QUICK, cancel)


def test_half_precision_runs(source, mask, config):
    torch.manual_seed(0)
    modules = build_modules(config)
    for _, module in modules.items():
        module.to(torch.bfloat16)
    result = SmartBrush(modules, config).edit(source, mask, TEXT, QUICK)
    assert result.picture.shape == source.shape and result.predicted.dtype == np.float32


@pytest.mark.parametrize(
    "changes, words",
    (
        ({"precision": 5}, "precision is 5; it must be between 0 and 4"),
        ({"precision": 1.5}, "precision is 1.5; it must be a whole number"),
        ({"refine_from": 1.2}, "refine_from is 1.2"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"size": 100}, "multiple of 16"),
        ({"negative": "ugly"}, "does not know 'ugly'"),
    ),
)
def test_settings_that_do_not_fit(model, source, mask, changes, words):
    with pytest.raises(ArgumentError, match=words):
        model.edit(source, mask, TEXT, replace(QUICK, **changes))


def test_a_model_of_fewer_levels_says_so(source, mask, config):
    unet = {**config["unet"], "num_class_embeds": 3}
    coarse = SmartBrush(build_modules({**config, "unet": unet}), {**config, "unet": unet})
    with pytest.raises(ArgumentError, match="precision is 3; this model's coarsest level is 2"):
        coarse.edit(source, mask, TEXT, replace(QUICK, precision=3))


def test_inputs_that_do_not_fit(model, source, mask, config):
    with pytest.raises(PictureError, match="mask is empty"):
        model.edit(source, np.zeros_like(mask), TEXT, QUICK)
    other = SmartBrush(model.modules, config)
    with pytest.raises(ArgumentError, match="another model"):
        model.edit(source, mask, other.encode_text(TEXT), QUICK)


# -------------------- words


def test_words(config):
    tokenizer = make_tokenizer(config)
    ids = tokenizer(["A red, STRIPED disc!", "", "heart"])
    assert ids.dtype == torch.int64 and ids.shape == (3, 12)
    names = [*config["tokenizer"]["words"], START, END]
    assert [names[index] for index in ids[0]] == [START, "a", "red", "striped", "disc"] + [END] * 7
    assert [names[index] for index in ids[1]] == [START] + [END] * 11
    assert len(names) == config["text_encoder"]["vocab_size"] == tokenizer.size


def test_unknown_words_are_named(config):
    with pytest.raises(ArgumentError, match=r"not know 'crimson', 'dog'.*a, an, the.*dotted"):
        make_tokenizer(config)(["a red disc", "a crimson dog"])


def test_too_many_words_are_refused():
    tokenizer = WordTokenizer(["a"], 5)
    assert tokenizer(["a a a"]).tolist() == [[1, 0, 0, 0, 2]]
    with pytest.raises(ArgumentError, match="4 words; this model reads at most 3"):
        tokenizer(["a a a a"])


MERGES = ["r e", "re d</w>", "d i", "s c</w>", "di sc</w>", "a b</w>"]


def test_clip_tokens_follow_from_the_pairs(caplog):
    vocabulary = clip_vocabulary(MERGES)
    names = {index: token for token, index in vocabulary.items()}
    tokenizer = ClipTokenizer(MERGES, 8)
    ids = tokenizer(["Red  cab", "", "dis é"])
    assert ids.shape == (3, 8) and ids.dtype == torch.int64
    assert [names[index] for index in ids[0].tolist()] == [START, "red</w>", "c", "ab</w>", *[END] * 4]
    assert [names[index] for index in ids[1].tolist()] == [START, *[END] * 7]
    assert [names[index] for index in ids[2].tolist()] == [START, "di", "s</w>", "Ã", "©</w>", *[END] * 3]
    assert not caplog.records
    cut = tokenizer(["red " * 9])
    assert [names[index] for index in cut[0].tolist()] == [START, *["red</w>"] * 6, END]
    assert "11 tokens; the model reads the first 8" in caplog.text


def test_numbers_of_the_clip_vocabulary():
    """As published: `!` is 0, the word `a` 320, and 48894 pairs end at 49405."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pairs = [f"{first} {second}" for first in letters for second in letters]
    triples = [f"{first + second} {third}" for first in letters for second in letters for third in letters]
    vocabulary = clip_vocabulary((pairs + triples)[:48894])
    assert vocabulary["!"] == 0 and vocabulary["a</w>"] == 320
    assert (vocabulary[START], vocabulary[END]) == (49406, 49407)
    assert len(vocabulary) == bundled_config("smartbrush")["text_encoder"]["vocab_size"]


def test_encoded_text_is_the_last_hidden_state(model, config):
    ids = make_tokenizer(config)([TEXT])
    expected = model.modules.text_encoder(input_ids=ids, output_hidden_states=True)
    tokens = encode_text(model.modules.text_encoder, ids)
    assert torch.equal(tokens, expected.last_hidden_state) and tokens.shape == (1, 12, 64)
    assert torch.equal(model.encode_text(TEXT).tokens, tokens)


# -------------------- files


@pytest.fixture(scope="module")
def single_file(tmp_path_factory, model, config):
    path = tmp_path_factory.mktemp("smartbrush") / "brush.safetensors"
    save_modules(path, model.modules, config, torch.float32)
    return path


def refusal(path, **options):
    with pytest.raises(ModelFileError) as caught:
        SmartBrush.load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def rewritten(single_file, path, **changes):
    config = {**bundled_config("smartbrush_small"), **changes}
    save_file(load_file(single_file), path, metadata=header_metadata(config))
    return path


def test_one_file_is_enough(single_file, model, source, mask):
    loaded = SmartBrush.load(single_file)
    assert np.array_equal(loaded.edit(source, mask, TEXT, QUICK).raw, model.edit(source, mask, TEXT, QUICK).raw)


def test_the_clip_tokenizer_travels_in_the_file(tmp_path, config):
    size = len(clip_vocabulary(MERGES))
    config = {
        **config,
        "tokenizer": {"kind": "clip", "length": 12, "merges": MERGES},
        "text_encoder": {**config["text_encoder"], "vocab_size": size},
    }
    path = tmp_path / "brush.safetensors"
    save_modules(path, build_modules(config), config, torch.float32)
    first, second = (SmartBrush.load(path).encode_text(text).tokens for text in ("red disc", "Red  disc"))
    assert torch.equal(first, second) and first.shape == (1, 12, 64)


def test_converted_and_recognised(single_file, tmp_path):
    path = convert(single_file, tmp_path / "half.safetensors")
    assert all(value.dtype == torch.float16 for value in load_file(path).values())
    for one in (single_file, path):
        report = inspect(one)
        assert (report.kind, report.use, report.usable) == ("smartbrush", "model", True), report.problems
        assert "SmartBrush" in report.title and "no public weights" in " ".join(report.notes)
        assert [part.name for part in report.parts] == ["unet", "text_encoder", "vae"]
    assert "nobody has published" in inspect(path).licence


def test_the_embedded_model_paints_what_it_is_told_and_gives_the_background_back():
    path = embedded_model_path("smartbrush")
    assert path.stat().st_size <= 6_000_000
    picture, mask = np.full((128, 128, 3), (60, 90, 160), np.uint8), np.zeros((128, 128), np.float32)
    mask[24:104, 24:104] = 1
    means = {}
    for colour in ("red", "yellow"):
        result = SmartBrush.load().edit(picture, mask, f"a {colour} plain star", BrushSettings(precision=4))
        means[colour] = result.picture[result.predicted > 0.9].mean(axis=0)
        assert 0.1 < result.region.sum() / mask.sum() < 0.95 and result.warnings == ()
    assert means["red"][0] > 120 > means["red"][1] and means["yellow"][:2].min() > 120 > means["yellow"][2]


def test_each_system_refuses_the_other_by_name(single_file):
    assert "is MimicBrush; SmartBrush was expected" in refusal(embedded_model_path())
    for system in (MimicBrush, PaintByExample, MagicFixup):
        with pytest.raises(ModelFileError, match=r"is SmartBrush; .* was expected"):
            system.load(single_file)


def test_what_is_no_smartbrush_is_refused(tmp_path, single_file):
    assert "nobody has published weights" in refusal(tmp_path)
    path = tmp_path / "unet.safetensors"
    tensors = load_file(single_file)
    save_file({key.removeprefix("unet."): value for key, value in tensors.items() if key.startswith("unet.")}, path)
    assert "U-Net of SmartBrush" in refusal(path) and not inspect(path).usable
    save_file(tensors, path)
    assert "SmartBrush tensors without the configuration" in refusal(path) and METADATA_KEY in refusal(path)


@pytest.mark.parametrize(
    "tokenizer, words",
    (
        ({"kind": "clip", "length": 12}, "does not describe its tokenizer.*merges"),
        ({"kind": "clip", "length": 12, "merges": ["r e d"]}, "'r e d' is no pair"),
        ({"kind": "clip", "length": 12, "merges": ["re d"]}, "'re d' is no pair"),
        ({"kind": "clip", "length": 12, "merges": [3]}, "does not describe its tokenizer"),
        ({"kind": "words", "length": 12}, "does not describe its tokenizer.*words"),
        ({"kind": "words", "words": 3, "length": 12}, "does not describe its tokenizer"),
        ({"kind": "words", "words": ["a"], "length": "12"}, "does not describe its tokenizer"),
        ({"kind": "bytes"}, "tokenizer 'bytes'; known: words, clip"),
        ({"kind": []}, "tokenizer .*; known: words, clip"),
        ({"kind": "words", "words": ["a"], "length": 13}, "gives 13 of 3 tokens.*reads 12 of 33"),
        ({"kind": "words", "words": [str(i) for i in range(32)], "length": 12}, "gives 12 of 34 tokens"),
    ),
)
def test_a_file_without_its_tokenizer_is_refused(single_file, tmp_path, tokenizer, words):
    path = rewritten(single_file, tmp_path / "brush.safetensors", tokenizer=tokenizer)
    with pytest.raises(ModelFileError, match=words):
        SmartBrush.load(path)
    assert not inspect(path).usable and str(path) in inspect(path).problems[0]


def test_the_names_of_other_transformers_fit(single_file, tmp_path, model, config):
    """transformers 4 has a level `text_model.` that 5 has not."""
    outer, inner = "text_encoder.", "text_encoder.text_model."
    bare = {key.replace(inner, outer): value for key, value in load_file(single_file).items()}
    named = {key.replace(outer, inner): value for key, value in bare.items()}
    named[inner + "embeddings.position_ids"] = torch.arange(12)[None].float()  # as transformers 4.25 wrote it
    path = tmp_path / "brush.safetensors"
    for tensors in (named, bare):
        save_file(tensors, path, metadata=header_metadata(config))
        assert torch.equal(SmartBrush.load(path).encode_text(TEXT).tokens, model.encode_text(TEXT).tokens)


@pytest.mark.parametrize("name", ("smartbrush", "smartbrush_small"))
def test_bundled_configurations(name):
    config = bundled_config(name)
    unet = config["unet"]
    assert (unet["in_channels"], unet["out_channels"]) == (5, 5)
    assert unet["num_class_embeds"] == masks.MAX_PRECISION_LEVEL + 1
    assert unet["cross_attention_dim"] == config["text_encoder"]["hidden_size"]
    assert config["tokenizer"]["length"] == config["text_encoder"]["max_position_embeddings"]
    assert config["scheduler"]["beta_schedule"] == "scaled_linear"


def test_the_full_size_is_that_of_stable_diffusion():
    with torch.device("meta"):
        config = bundled_config("smartbrush")
        unet, text = build_part("unet", config), build_part("text_encoder", config)
    extra = 320 * 9 + (320 * 9 + 1) + 5 * 1280  # the mask's input, its output, the precision
    assert sum(value.numel() for value in unet.parameters()) == 859_520_964 + extra
    assert sum(value.numel() for value in text.parameters()) == 123_060_480


def test_the_small_model_begins_with_the_embedded_autoencoder():
    assert bundled_config("smartbrush_small")["vae"] == bundled_config("mimicbrush_small")["vae"]


# -------------------- where it begins


def small_sizes():
    config = bundled_config("smartbrush")
    small = bundled_config("smartbrush_small")["unet"]
    sizes = ("block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups", "sample_size")
    unet = {**config["unet"], **{key: small[key] for key in sizes}, "cross_attention_dim": 16}
    unet |= {key: small[key] for key in ("down_block_types", "up_block_types")}
    text = {**config["text_encoder"], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": len(clip_vocabulary(MERGES))}
    vae = {**config["vae"], "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return {**config, "unet": unet, "text_encoder": text, "vae": vae}


def write_base(folder, config, channels):
    """A pipeline folder of Stable Diffusion (4 input channels) or of its inpainting model (9); its U-Net."""
    torch.manual_seed(channels)
    base = {key: value for key, value in config["unet"].items() if key != "num_class_embeds"}
    unet = UNet2DConditionModel(**{**base, "in_channels": channels, "out_channels": 4}).eval()
    unet.save_pretrained(folder / "unet")
    CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).save_pretrained(folder / "text_encoder")
    AutoencoderKL(**{key: value for key, value in config["vae"].items() if key != "class"}).save_pretrained(
        folder / "vae"
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(clip_vocabulary(MERGES)))
    return unet


@pytest.mark.parametrize("channels", (4, 9))
def test_it_begins_as_its_base_at_every_precision(tmp_path, channels):
    config = small_sizes()
    base = write_base(tmp_path, config, channels)
    modules, started = initialise_from(tmp_path, config)
    generator = torch.Generator().manual_seed(0)
    latents, tokens = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 16)))
    mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
    # The inpainting model reads latents, mask, latents of the masked picture: these last are what is left out.
    base_input = latents if channels == 4 else torch.cat([latents, mask, torch.zeros(1, 4, 8, 8)], dim=1)
    with torch.no_grad():
        expected = base(base_input, 500, encoder_hidden_states=tokens).sample
        for level in range(masks.MAX_PRECISION_LEVEL + 1):
            output = modules.unet(
                torch.cat([latents, mask], dim=1), 500, tokens, class_labels=torch.tensor([level])
            ).sample
            assert torch.allclose(output[:, :4], expected, atol=1e-5)
            assert torch.equal(output[:, 4:].sigmoid(), torch.full((1, 1, 8, 8), 0.5))
        if channels == 9:
            other = modules.unet(
                torch.cat([latents, 1 - mask], dim=1), 500, tokens, class_labels=torch.tensor([0])
            ).sample
            assert not torch.allclose(other[:, :4], expected, atol=1e-3), "the mask is read from the first step on"
    assert started["tokenizer"]["merges"] == MERGES and started["vae"]["class"] == "AutoencoderKL"
    path = tmp_path / "begun.safetensors"
    save_modules(path, modules, started, torch.float32)
    assert SmartBrush.load(path).encode_text("a red disc").tokens.shape == (1, 77, 16)


def spoil_vocabulary(folder):
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 0}))


def spoil_merges(folder):
    (folder / "tokenizer" / "merges.txt").write_text("one two three\n")


def spoil_unet(folder):
    save_file({"x": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.safetensors")


def spoil_channels(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**state, "conv_in.weight": torch.zeros(32, 13, 3, 3)}, path)


@pytest.mark.parametrize(
    "spoil, words",
    (
        (lambda folder: (folder / "tokenizer").rename(folder / "elsewhere"), "tokenizer not found"),
        (spoil_vocabulary, "vocab.json does not belong to merges.txt"),
        (spoil_merges, r"no merges\.txt: 'one two three' is no pair"),
        (spoil_unet, "unknown weights; a U-Net of Stable Diffusion 1.5"),
        (spoil_channels, "13 input channels; Stable Diffusion 1.5 has 4, its inpainting model 9"),
    ),
)
def test_a_base_that_does_not_fit_is_refused(tmp_path, spoil, words):
    config = small_sizes()
    write_base(tmp_path, config, 4)
    spoil(tmp_path)
    with pytest.raises(ModelFileError, match=words):
        initialise_from(tmp_path, config)


def test_merges_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelFileError, match="not readable"):
        read_merges(tmp_path / "merges.txt")
