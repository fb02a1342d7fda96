"""The recipe's data: pairs, augmentation, matched features, masks; and a sample depends on its number only."""

import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mimicbrush_core.cli import main
from mimicbrush_core.errors import ArgumentError, PictureError
from mimicbrush_core.training import augmentation, dataset, frames, hole_masks, pair_selection, preview
from mimicbrush_core.training.augmentation import Jitter, augment, draw_warp, is_mirrored, jitter_colours
from mimicbrush_core.training.dataset import DataSettings, TrainingPairs, pairs_from_folders, sample_loader, share_of
from mimicbrush_core.training.frames import (
    Clip,
    Still,
    Unreadable,
    list_frame_folders,
    list_stills,
    list_videos,
    opened,
)
from mimicbrush_core.training.pair_selection import SSIM_BOUNDS, find_pair, similarity
from mimicbrush_core.training.scenes import CLIP_LIKE, HELD_OUT_SEED, Difficulty, render_pair

cv2 = pytest.importorskip("cv2")
av = pytest.importorskip("av")

SMALL = DataSettings(size=32)


def texture(seed, height=64, width=None, blob=4):
    """A picture full of features: coloured noise with blobs of some pixels."""
    width = width or height
    noise = np.random.default_rng(seed).integers(0, 256, (height // blob, width // blob, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def pan(seed=0, count=24, step=3, side=64):
    """A camera that moves along a wide picture, which has coarse structure and fine."""
    size = side, 2 * side + count * step
    scene = (texture(seed, *size, blob=16) * 0.6 + texture(seed + 100, *size, blob=4) * 0.4).astype(np.uint8)
    return [scene[:, k * step : k * step + side + side // 2] for k in range(count)]


def write_video(path, pictures, rotation=0, container=None, codec="mpeg4", **options):
    with av.open(str(path), "w", format=container, options=options) as film:
        stream = film.add_stream(codec, rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.bit_rate, stream.codec_context.gop_size = "yuv420p", 4_000_000, 6
        if rotation:
            stream.set_display_rotation(rotation)
        for picture in pictures:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        film.mux(stream.encode())
    return path


def write_pictures(folder, pictures, name="{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / name.format(number))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """videos, frames and stills: small, readable, usable."""
    root = tmp_path_factory.mktemp("material")
    (root / "videos").mkdir()
    for number in range(2):
        write_video(root / "videos" / f"{number}.mp4", pan(number))
    write_pictures(root / "frames" / "a", pan(7))
    write_pictures(root / "stills", [texture(number) for number in range(3)])
    return {name: [root / name] for name in ("videos", "frames", "stills")}


def same(a, b):
    return (
        (a.index, a.kind) == (b.index, b.kind)
        and np.array_equal(a.source, b.source)
        and np.array_equal(a.reference, b.reference)
        and np.array_equal(a.mask, b.mask)
    )


# --- augmentation: geometry --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_at_strength_zero_nothing_changes(seed):
    picture = texture(seed)
    result, warp = augment(np.random.default_rng(seed), picture, 64, strength=0.0)
    assert np.array_equal(result, picture)
    assert np.allclose(warp, np.eye(3), atol=1e-12)


def test_the_same_generator_gives_the_same_and_another_something_else():
    picture = texture(0)
    first, again, other = (augment(np.random.default_rng(seed), picture, 64)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_points_and_labels_move_as_pixels_move():
    """A dot is found in the warped picture where the warped point says; the segment around it moves along."""
    rows, columns = np.mgrid[:240, :240] + 0.5
    checked = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x, y = point = rng.uniform(0.3, 0.7, 2)
        distance = np.hypot(columns - 240 * x, rows - 240 * y)
        picture = np.repeat((255 * np.exp(-((distance / 9) ** 2))).astype(np.uint8)[..., None], 3, 2)
        warp = draw_warp(rng)
        (u, v) = augmentation.warp_points(point[None], warp)[0]
        if not (0.2 < u < 0.8 and 0.2 < v < 0.8):
            continue
        shown = augmentation.warp_picture(picture, warp, 120).astype(float)[..., 0]
        labels = augmentation.warp_labels((distance < 9).astype(np.int32) * 70_000, warp, 120)
        assert set(np.unique(labels)) == {0, 70_000}
        for weight in (shown**2, (labels > 0).astype(float)):
            middle = [(weight * axis[:120, :120]).sum() / weight.sum() / 120 for axis in (columns, rows)]
            assert np.abs(np.array(middle) - (u, v)).max() < 0.01, seed
        checked += 1
    assert checked > 20


def test_only_what_is_inside_the_picture_is_shown():
    white = np.full((50, 50, 3), 255, np.uint8)
    corners = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1.0]])
    for seed in range(200):
        warp = draw_warp(np.random.default_rng(seed))
        moved = corners @ warp.T
        moved = moved[:, :2] / moved[:, 2:]
        assert moved.min() > -1e-9 and moved.max() < 1 + 1e-9
        assert augmentation.warp_picture(white, warp, 24).min() == 255


def warp_figures(strength):
    """Of 400 warps: flipped, degrees, sides shown, projective terms, corners' farthest reach in x and y."""
    warps = [draw_warp(np.random.default_rng(seed), strength) for seed in range(400)]
    upright = [warp @ np.diag([-1, 1, 1]) if is_mirrored(warp) else warp for warp in warps]
    return {
        "flipped": np.mean([is_mirrored(warp) for warp in warps]),
        "degrees": np.degrees([np.arctan2(warp[1, 0] - warp[0, 1], warp[0, 0] + warp[1, 1]) for warp in upright]),
        "side": np.array([abs(np.linalg.det(warp[:2, :2])) ** 0.5 for warp in warps]),
        "stretch": np.array([np.hypot(*warp[:2, 0]) / np.hypot(*warp[:2, 1]) for warp in upright]),
        "projection": np.array([np.abs(warp[2, :2]).max() for warp in warps]),
    }


def test_a_full_warp_flips_turns_scales_stretches_and_projects():
    full, half = warp_figures(1.0), warp_figures(0.5)
    assert abs(full["flipped"] - 0.5) < 3 * (0.25 / 400) ** 0.5
    assert abs(half["flipped"] - 0.25) < 3 * (0.19 / 400) ** 0.5
    assert 14 < full["degrees"].std() < 22 and abs(full["degrees"].mean()) < 3  # +-30 degrees, evenly: 17.3
    assert np.quantile(full["side"], 0.9) - np.quantile(full["side"], 0.1) > 0.2
    assert np.quantile(full["stretch"], 0.95) > 1.15 and np.quantile(full["stretch"], 0.05) < 0.87
    assert np.median(full["projection"]) > 0.1
    for figure in ("degrees", "stretch", "projection"):
        assert half[figure].std() < 0.7 * full[figure].std()


def test_a_large_picture_is_shown_without_aliasing():
    fine = np.zeros((256, 256, 3), np.uint8)
    fine[:, 1::4] = fine[:, 2::4] = 255  # even grey at a quarter of the size, but every sampled place is white
    shown = augmentation.warp_picture(fine, np.eye(3), 64)
    assert shown.min() > 110 and shown.max() < 145


# --- augmentation: colour ----------------------------------------------------------------------------------


def test_each_colour_change_does_what_its_name_says():
    picture = texture(1).clip(60, 180)
    grey = picture @ np.array([0.299, 0.587, 0.114])
    assert np.array_equal(jitter_colours(picture, Jitter()), picture)
    assert np.abs(jitter_colours(picture, Jitter(brightness=1.2)) - 1.2 * picture).max() <= 1
    flat = jitter_colours(picture, Jitter(contrast=0.0))
    assert np.ptp(flat) <= 1 and abs(flat.mean() - grey.mean()) < 1
    assert np.abs(jitter_colours(picture, Jitter(saturation=0.0)) - grey[..., None]).max() <= 1
    turned = jitter_colours(picture, Jitter(hue=0.06)).astype(float)
    assert np.abs(turned @ np.array([0.299, 0.587, 0.114]) - grey).max() < 2
    assert np.abs(turned - picture).max() > 10
    neutral = np.full((4, 4, 3), 90, np.uint8)
    assert np.abs(jitter_colours(neutral, Jitter(hue=0.3)).astype(int) - 90).max() <= 1


def test_jitter_spans_its_ranges_and_scales_with_the_strength():
    drawn = [augmentation.draw_jitter(np.random.default_rng(seed)) for seed in range(300)]
    for name, limit in (("brightness", 0.3), ("contrast", 0.3), ("saturation", 0.3), ("hue", 0.06)):
        values = np.array([getattr(jitter, name) for jitter in drawn]) - (name != "hue")
        assert 0.9 * limit < values.max() <= limit and -limit <= values.min() < -0.9 * limit, name
    weak = [augmentation.draw_jitter(np.random.default_rng(seed), 0.1).brightness - 1 for seed in range(300)]
    assert np.abs(weak).max() <= 0.03


def test_source_and_reference_are_augmented_independently(monkeypatch):
    """Of a still picture both show the same; their flips, turns and colours have nothing to do with each other."""
    warps, jitters = [], []
    own_warp, own_jitter = augmentation.draw_warp, augmentation.draw_jitter
    monkeypatch.setattr(augmentation, "draw_warp", lambda *given: warps.append(own_warp(*given)) or warps[-1])
    monkeypatch.setattr(augmentation, "draw_jitter", lambda *given: jitters.append(own_jitter(*given)) or jitters[-1])
    pairs = TrainingPairs(settings=SMALL)
    picture = texture(0, 32)
    for index in range(150):
        pairs._augmented(index, "still", frames.Path("x"), picture, picture, None, None)
    turns = np.array([np.arctan2(warp[1, 0], warp[0, 0]) for warp in warps]).reshape(150, 2)
    flips = np.array([is_mirrored(warp) for warp in warps]).reshape(150, 2)
    light = np.array([jitter.brightness for jitter in jitters]).reshape(150, 2)
    assert abs((flips[:, 0] == flips[:, 1]).mean() - 0.5) < 3 * (0.25 / 150) ** 0.5
    for values in (turns, light):
        assert abs(np.corrcoef(values.T)[0, 1]) < 3 / 150**0.5


# --- matched features --------------------------------------------------------------------------------------


def matches(source, reference, mirrored=False):
    return len(dataset.shared_features(source, reference, mirrored))


def test_a_warped_picture_shares_features_and_an_unrelated_one_does_not():
    for seed in range(4):
        source, warp = augment(np.random.default_rng(seed), texture(seed, 160), 128)
        reference, other = augment(np.random.default_rng(seed + 50), texture(seed, 160), 128)
        stranger, _ = augment(np.random.default_rng(seed + 50), texture(seed + 9, 160), 128)
        assert matches(source, reference, is_mirrored(warp) != is_mirrored(other)) > 60
        assert matches(source, stranger) <= 6


def test_a_flip_does_not_hide_what_is_shared():
    source, reference = texture(3, 128), np.ascontiguousarray(texture(3, 128)[:, ::-1])
    assert matches(source, reference, mirrored=True) > 100
    assert matches(source, reference, mirrored=False) < 20


def test_matches_lie_where_the_pictures_agree():
    source, reference = texture(4, 128), texture(4, 128)
    reference[:, :64] = texture(5, 128)[:, :64]
    points = dataset.shared_features(source, reference)
    assert len(points) > 50 and (points[:, 0] > 56).mean() > 0.97


def test_plain_pictures_share_nothing():
    plain = np.full((64, 64, 3), 120, np.uint8)
    assert matches(plain, plain) == matches(texture(0), plain) == matches(plain, texture(0)) == 0


def test_one_match_marks_its_own_pixel():
    marked = dataset.marked_pixels(np.array([[10.4, 3.2], [63.9, 0.0]], np.float32), 64)
    assert marked.sum() == 2 and marked[3, 10] and marked[0, 63]


def test_a_repeated_pattern_does_not_match_many_to_one():
    checks = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((16, 16))).astype(np.uint8)
    picture = np.repeat(checks[..., None] * 200 + 20, 3, 2)
    single = np.full((128, 128, 3), 20, np.uint8)
    single[40:88, 40:88] = picture[:48, :48]
    features = len(cv2.SIFT_create().detect(cv2.cvtColor(single, cv2.COLOR_RGB2GRAY), None))
    assert matches(picture, single) <= features


# --- masks -------------------------------------------------------------------------------------------------


def test_cells_with_matched_features_are_masked_with_three_quarters_and_others_with_half(tmp_path, monkeypatch):
    """The whole way from a picture: left full of features, right plain."""
    own, known = dataset.shared_features, {}

    def found_once(*given):
        key = tuple(np.asarray(value).tobytes() for value in given)
        known[key] = known[key] if key in known else own(*given)
        return known[key]

    monkeypatch.setattr(dataset, "shared_features", found_once)
    picture = np.full((96, 96, 3), 128, np.uint8)
    picture[:, :48] = texture(0, 96, blob=3)[:, :48]
    write_pictures(tmp_path, [picture])
    pairs = TrainingPairs((), list_stills([tmp_path]), DataSettings(size=96, strength=0.0, strokes_share=0.0))
    masks = np.stack([pairs[index].mask for index in range(500)])
    # 5 to 8 independent cells of each mask on average lie in these strips: 3 standard errors are 0.03
    assert masks[:, :, :28].mean() == pytest.approx(0.75, abs=0.03)
    assert masks[:, :, 74:].mean() == pytest.approx(0.5, abs=0.03)
    assert all(pairs.draw(index)[1].mask_kind == "grid" for index in range(3))


def test_a_real_pair_is_matched_after_its_augmentation(tmp_path):
    """The features are those of the pictures as the trainer gets them, flipped back where the flips differ."""
    write_pictures(tmp_path, pan(side=128))
    pairs = pairs_from_folders(frames=[tmp_path], settings=DataSettings(size=96, strokes_share=0.0))
    purposes = dataset._SOURCE, dataset._REFERENCE
    by_flip = {False: [], True: []}
    for index in range(24):
        first, second = (is_mirrored(draw_warp(pairs._generator(index, purpose))) for purpose in purposes)
        by_flip[first != second].append(pairs.draw(index)[1].matches)
    assert min(np.median(counts) for counts in by_flip.values()) >= 10, by_flip


def test_grids_have_three_to_ten_cells_a_side():
    nothing = np.zeros((120, 120), bool)
    counts = np.zeros(13, int)
    for seed in range(500):
        mask = hole_masks.grid_mask(np.random.default_rng(seed), nothing)
        borders = set(np.flatnonzero((mask[1:] != mask[:-1]).any(1)) + 1)
        borders |= set(np.flatnonzero((mask[:, 1:] != mask[:, :-1]).any(0)) + 1)
        fits = [n for n in range(1, 13) if borders <= {round(120 * k / n) for k in range(n + 1)}]
        counts[fits[0] if fits else 12] += 1
    assert counts[:3].sum() <= 10 and counts[11:].sum() == 0
    assert counts[3:11].min() > 500 / 8 / 2


def test_a_mask_from_files_is_never_empty(monkeypatch):
    monkeypatch.setattr(dataset, "grid_mask", lambda rng, matched: rng.random(matched.shape) < 1e-4)
    for seed in range(50):
        assert dataset._grid(np.random.default_rng(seed), np.zeros((32, 32), bool)).any()


def test_segment_masks_cover_whole_segments_that_are_neither_tiny_nor_nearly_everything():
    labels = np.zeros((64, 64), np.int32)
    labels[:, :40] = 9  # 62 %
    labels[5:25, 45:60], labels[35:60, 45:60], labels[0, 63] = 70_000, 3, 4
    chosen = set()
    for seed in range(40):
        mask = hole_masks.segment_mask(np.random.default_rng(seed), labels)
        covered = {value for value in (9, 70_000, 3, 4) if mask[labels == value].all()}
        assert mask[:, :43].sum() == 0 and mask.any()
        assert all(mask[labels == value].mean() in (0, 1) for value in (70_000, 3))
        chosen |= {tuple(sorted(covered & {70_000, 3}))}
    assert chosen == {(3,), (70_000,), (3, 70_000)}
    assert hole_masks.segment_mask(np.random.default_rng(0), np.zeros((64, 64), np.int32)) is None


def write_segmented(folder, side=120):
    """A red square on blue, as photograph and as palette picture."""
    picture = np.zeros((side, side + 40, 3), np.uint8) + np.array([30, 40, 160], np.uint8)
    picture[40:80, 60:100] = (170, 40, 40)
    write_pictures(folder, [picture], "thing{}.png")
    labels = Image.new("P", (side + 40, side))
    labels.putpalette([0, 0, 0, 200, 10, 10])
    labels.paste(1, (60, 40, 100, 80))
    labels.save(folder / "thing0.seg.png")
    return folder


def test_segments_follow_the_augmentation_of_the_source(tmp_path):
    stills = list_stills([write_segmented(tmp_path)])
    assert len(stills) == 1 and stills[0].segmentation is not None
    pairs = TrainingPairs((), stills, DataSettings(size=128, strokes_share=0.0))
    seen = 0
    for index in range(20):
        sample, notes = pairs.draw(index)
        red = sample.source[..., 0] > sample.source[..., 2]
        if notes.mask_kind == "segments":
            seen += 1
            assert (sample.mask & red).sum() / (sample.mask | red).sum() > 0.75
    assert seen > 12


def test_strokes_take_their_share_and_are_never_empty(folders, monkeypatch):
    monkeypatch.setattr(dataset, "shared_features", lambda *given: np.zeros((0, 2), np.float32))
    pairs = pairs_from_folders(stills=folders["stills"], settings=SMALL)
    kinds = [pairs.draw(index)[1].mask_kind for index in range(300)]
    assert abs(kinds.count("strokes") / 300 - 0.2) < 3 * (0.16 / 300) ** 0.5
    always = TrainingPairs((), pairs.stills, replace(SMALL, strokes_share=1.0))
    masks = [always[index].mask for index in range(40)]
    assert all(mask.any() and not mask.all() for mask in masks)
    assert np.std([mask.mean() for mask in masks]) > 0.05


# --- pair selection ----------------------------------------------------------------------------------------


def ignore(path, reason):
    raise AssertionError(f"{path}: {reason}")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """By name: one that stands still but for its noise, one of unrelated frames, a slow and a fast pan."""
    root = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0)
    still = [(texture(1, blob=16) + noise.integers(0, 4, (64, 64, 3))).clip(0, 255).astype(np.uint8) for _ in range(6)]
    write_pictures(root / "static", still)
    write_pictures(root / "cuts", [texture(seed, blob=8) for seed in range(30, 36)])
    write_pictures(root / "slow", pan(2, count=60, step=1))
    write_pictures(root / "fast", pan(3, count=20, step=6))
    return {clip.path.name: clip for clip in list_frame_folders([root])}


def test_pairs_that_are_too_alike_or_too_different_are_dropped(clips):
    chosen = [find_pair(np.random.default_rng(seed), list(clips.values()), ignore) for seed in range(30)]
    assert {pair.path.name for pair in chosen} == {"slow", "fast"}
    for pair in chosen:
        assert SSIM_BOUNDS[0] <= similarity(pair.source, pair.reference) == pair.similarity <= SSIM_BOUNDS[1]


def test_each_bound_does_its_part(clips):
    static, cuts = ([clips[name]] for name in ("static", "cuts"))
    with pytest.raises(PictureError, match="too alike"):
        find_pair(np.random.default_rng(0), static, ignore)
    with pytest.raises(PictureError, match=r"0 are too alike .*[1-9][0-9]* too different"):
        find_pair(np.random.default_rng(0), cuts, ignore)
    assert find_pair(np.random.default_rng(0), static, ignore, (0.2, 1.0)).similarity > 0.9
    assert find_pair(np.random.default_rng(0), cuts, ignore, (-1.0, 0.9)).similarity < 0.2


def test_tries_are_bounded(clips, monkeypatch):
    firsts, values, own = [], [], pair_selection._pair_of
    monkeypatch.setattr(pair_selection, "similarity", lambda a, b: values.append(1) or 0.99)
    monkeypatch.setattr(pair_selection, "_pair_of", lambda *given: firsts.append(1) or own(*given))
    with pytest.raises(PictureError, match="usable"):
        find_pair(np.random.default_rng(0), [clips["slow"], clips["fast"]], ignore)
    assert len(firsts) == 50 and len(values) <= 50 * pair_selection.TRIES


def test_a_pair_depends_on_the_generator_only(clips):
    pairs = [find_pair(np.random.default_rng(seed), list(clips.values()), ignore) for seed in (5, 5, 6)]
    assert np.array_equal(pairs[0].reference, pairs[1].reference)
    assert not np.array_equal(pairs[0].reference, pairs[2].reference)


def test_the_bounds_fit_scenes_as_measured():
    scenes = [render_pair(seed, 64, CLIP_LIKE) for seed in range(60)]
    low, high = SSIM_BOUNDS
    one_clip = np.array([similarity(scene.source, scene.reference) for scene in scenes])
    strangers = np.array([similarity(a.source, b.source) for a, b in zip(scenes, scenes[1:], strict=False)])
    noise = np.random.default_rng(0).integers(-4, 5, (64, 64, 3))
    unmoved = np.array([similarity(s.source, (s.source + noise).clip(0, 255).astype(np.uint8)) for s in scenes[:10]])
    assert ((low <= one_clip) & (one_clip <= high)).mean() >= 0.75
    assert (strangers < low).mean() >= 0.9
    assert (unmoved > high).all()


def test_both_frames_of_a_wide_clip_show_the_same_window():
    wide = texture(0, 64, 160)
    for place in (0.0, 0.3, 1.0):
        assert np.array_equal(frames.square_window(wide, place), wide[:, round(96 * place) :][:, :64])
    film = frames.OpenClip(9, 5, lambda number: wide)
    for seed in range(5):
        pair = pair_selection._pair_of(np.random.default_rng(seed), film, frames.Path("x"), (-1.0, 1.1), [])
        assert np.array_equal(pair.source, pair.reference)


# --- files -------------------------------------------------------------------------------------------------


def test_listing_is_sorted_deep_and_leaves_out_what_is_hidden(tmp_path):
    for name in ("b/10.png", "b/9.png", "a/1.jpg", "._junk.png", ".cache/x.png", "note.txt", "a/1.seg.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    stills = list_stills([tmp_path])
    assert [still.path.relative_to(tmp_path).as_posix() for still in stills] == ["a/1.jpg", "b/9.png", "b/10.png"]
    assert stills[0].segmentation == tmp_path / "a" / "1.seg.png" and stills[1].segmentation is None
    (tmp_path / "a" / "2.jpg").touch()
    (tmp_path / "a" / "1.seg.png").unlink()
    clips = list_frame_folders([tmp_path])
    assert [clip.path.name for clip in clips] == ["a", "b"]
    assert [path.name for path in clips[1].frames] == ["9.png", "10.png"]


def test_folders_without_anything_usable_are_refused(tmp_path):
    for listing in (list_videos, list_frame_folders, list_stills):
        with pytest.raises(ArgumentError, match="does not exist"):
            listing([tmp_path / "nowhere"])
        with pytest.raises(ArgumentError, match="holds no"):
            listing([tmp_path])
    Image.new("RGB", (32, 32)).save(tmp_path / "only.png")
    with pytest.raises(ArgumentError, match="two frames"):
        list_frame_folders([tmp_path])


def grey_film(count=30):
    return [np.full((48, 64, 3), 20 + 7 * number, np.uint8) for number in range(count)]


@pytest.mark.parametrize("options", [{"name": "a.mp4"}, {"name": "a.mkv", "live": "1"}, {"name": "a.avi"}])
def test_any_frame_of_a_video_is_found_in_any_order(tmp_path, options):
    """Also of a file that does not say how long it is, as browsers record."""
    path = write_video(tmp_path / options.pop("name"), grey_film(), **options)
    with opened(Clip(path)) as film:
        assert abs(film.frames - 30) <= 1
        for number in (17, 3, 28, 0, 12):
            assert abs(film.read(number).mean() - (20 + 7 * number)) < 3, number
        assert film.longest_gap == 100


def test_only_the_frames_from_the_last_key_frame_on_are_decoded(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_film())
    decoded = []

    class Counting:
        def __init__(self, container):
            self.container, self.streams, self.duration = container, container.streams, container.duration
            self.seek = container.seek

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    with av.open(str(path)) as container:
        film = frames._open_video(Counting(container))
        assert len(decoded) == 1  # how the stream is to be decoded may be said there only
        film.read(26)
        assert len(decoded) <= 1 + 6


def test_a_video_filmed_sideways_is_turned_upright(tmp_path):
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24] = 255
    path = write_video(tmp_path / "a.mp4", [stored] * 3, rotation=90)
    with opened(Clip(path)) as film:
        shown = film.read(1)
    assert shown.shape == (64, 48, 3)
    assert shown[:, :20].mean() > 240 and shown[:, 28:].mean() < 15  # turned to the left: the top is at the left


def test_damaged_files_are_passed_over_with_one_warning_each(tmp_path, folders, caplog):
    good = write_video(tmp_path / "c_good.mp4", pan())
    (tmp_path / "a_noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "b_cut.mp4").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "d_empty.mp4").touch()
    write_video(tmp_path / "e_single.mp4", pan(count=1))
    pairs = pairs_from_folders(videos=[tmp_path], settings=SMALL)
    with caplog.at_level(logging.WARNING):
        notes = [pairs.draw(index)[1] for index in range(40)]
    assert {note.origin for note in notes} == {"c_good.mp4"}
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 4
    for name in ("a_noise", "b_cut", "d_empty", "e_single"):
        assert sum(name in message for message in warned) == 1
    for path in tmp_path.glob("[!c]*.mp4"):
        assert path.name != "c_good.mp4"
    good.unlink()
    with pytest.raises(PictureError, match=r"None of the 4 training files could be read.*mp4"):
        pairs_from_folders(videos=[tmp_path], settings=SMALL)[0]


def test_damaged_stills_are_passed_over_too(tmp_path, caplog):
    write_pictures(tmp_path, [texture(0), texture(1)])
    (tmp_path / "0.png").write_bytes(b"no picture")
    Image.new("L", (9, 9)).save(tmp_path / "1.seg.png")  # does not fit its picture
    write_pictures(tmp_path, [texture(2)], "good{}.png")
    pairs = pairs_from_folders(stills=[tmp_path], settings=SMALL)
    assert {pairs.draw(index)[1].origin for index in range(12)} == {"good0.png"}
    assert len(caplog.records) == 2
    (tmp_path / "good0.png").unlink()
    with pytest.raises(PictureError, match="could be read"):
        pairs_from_folders(stills=[tmp_path], settings=SMALL)[0]


def test_a_mistake_in_the_code_is_no_damaged_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_film(4))
    with pytest.raises(ZeroDivisionError), opened(Clip(path)):
        raise ZeroDivisionError
    with pytest.raises(ArgumentError), opened(Clip(path)):
        raise ArgumentError("a ValueError of our own")
    with pytest.raises(Unreadable), opened(Clip(tmp_path / "missing.mp4")):
        pass


def test_black_and_transparent_belong_to_no_segment(tmp_path):
    Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / "a.jpg")
    labels = np.zeros((10, 20, 4), np.uint8)
    labels[:, :5] = (1, 2, 3, 255)
    labels[:, 5:9] = (7, 7, 7, 0)
    labels[:, 9:] = (0, 0, 0, 255)
    Image.fromarray(labels).save(tmp_path / "a.seg.png")
    _, found = frames.read_still(Still(tmp_path / "a.jpg", tmp_path / "a.seg.png"))
    assert found.dtype == np.int32 and (found[:, :5] == 0x010203).all() and (found[:, 5:] == 0).all()


@pytest.mark.parametrize("module", ["av", "cv2"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, folders, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentError, match=r"mimicbrush\[train\]"):
        pairs_from_folders(**folders)
    assert TrainingPairs(settings=SMALL)[0].kind == "drawn"  # needs none of them


# --- the stream --------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(folders):
    return pairs_from_folders(**folders, settings=DataSettings(size=32, seed=3, drawn_share=0.2))


def test_videos_and_stills_are_mixed_seventy_to_thirty(folders):
    pairs = pairs_from_folders(**folders)
    kinds = [pairs._kind(index) for index in range(4000)]
    assert abs(kinds.count("still") / 4000 - 0.3) < 3 * (0.21 / 4000) ** 0.5
    assert kinds.count("video") + kinds.count("still") == 4000


def test_drawn_pairs_take_their_share_and_leave_the_mixture_of_the_others(mixed):
    kinds = [mixed._kind(index) for index in range(4000)]
    assert abs(kinds.count("drawn") / 4000 - 0.2) < 3 * (0.16 / 4000) ** 0.5
    assert abs(kinds.count("still") / (kinds.count("still") + kinds.count("video")) - 0.3) < 0.03
    assert {mixed[index].kind for index in range(12)} == {"drawn", "still", "video"}
    assert all(mixed[index].kind == kinds[index] for index in range(6))


def test_a_single_kind_is_all_there_is(folders):
    assert {pairs_from_folders(videos=folders["videos"])._kind(i) for i in range(50)} == {"video"}
    assert {pairs_from_folders(stills=folders["stills"])._kind(i) for i in range(50)} == {"still"}
    assert {TrainingPairs()._kind(i) for i in range(50)} == {"drawn"}


def test_samples_are_as_the_trainer_expects_them(mixed):
    for index in range(8):
        sample = mixed[index]
        assert sample.index == index and sample.mask.dtype == bool and sample.mask.shape == (32, 32)
        for picture in (sample.source, sample.reference):
            assert picture.dtype == np.uint8 and picture.shape == (32, 32, 3) and picture.flags.c_contiguous
        assert sample.mask.any()


def test_a_sample_depends_on_seed_and_number_only(mixed, folders):
    alone = mixed[9]
    for index in (4, 2, 11):
        mixed[index]
    again = pairs_from_folders(**folders, settings=mixed.settings)[9]
    assert same(alone, mixed[9]) and same(alone, again)
    other = pairs_from_folders(**folders, settings=replace(mixed.settings, seed=4))
    assert sum(np.array_equal(mixed[index].mask, other[index].mask) for index in range(6)) == 0
    assert sum(np.array_equal(mixed[index].source, mixed[index + 1].source) for index in range(6)) == 0


def test_workers_draw_what_one_process_draws(mixed, tmp_path, folders):
    """Also where a worker meets a damaged file: what it warned of is known to all."""
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    clips = list_videos([tmp_path, *folders["videos"]])
    pairs = TrainingPairs(clips, mixed.stills, mixed.settings)
    plain = [sample for batch in sample_loader(pairs, range(10, 22), 3) for sample in batch]
    fresh = TrainingPairs(clips, mixed.stills, mixed.settings)
    batches = list(sample_loader(fresh, range(10, 22), 3, workers=2))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    parallel = [sample for batch in batches for sample in batch]
    assert [sample.index for sample in plain] == list(range(10, 22))
    assert all(same(a, b) for a, b in zip(plain, parallel, strict=True))
    assert bool(fresh._warned[0]) and fresh._warned.sum() == 1


def test_opencv_has_no_threads_when_workers_are_forked(folders):
    """A forked worker would wait for them for ever (seen; not every time)."""
    cv2.setNumThreads(2)
    pairs_from_folders(stills=folders["stills"], settings=SMALL)
    assert cv2.getNumThreads() == 1
    cv2.setNumThreads(2)
    matches(texture(0), texture(1))
    assert cv2.getNumThreads() == 1


def test_processes_share_what_one_would_draw():
    """Step by step: the batches of all ranks together are the large batch of a single process."""
    ranks = [list(share_of(6, 30, rank, 3)) for rank in range(3)]
    for step in range(4):
        together = sorted(index for rank in ranks for index in rank[2 * step : 2 * step + 2])
        assert together == list(share_of(6, 30))[6 * step : 6 * step + 6]
    with pytest.raises(ArgumentError, match="Rank 3 of 3"):
        share_of(0, 9, 3, 3)


def test_a_resumed_stream_goes_on_where_it_stopped(mixed):
    whole = [s for batch in sample_loader(mixed, share_of(0, 12), 2) for s in batch]
    rest = [s for batch in sample_loader(mixed, share_of(6, 12), 2) for s in batch]
    assert all(same(a, b) for a, b in zip(whole[6:], rest, strict=True))


def test_the_stream_is_lazy():
    """The indices of a long run are gone through as they are needed."""

    class Counting:
        taken = 0

        def __iter__(self):
            for index in share_of(0, 10**9):
                Counting.taken += 1
                assert index < 100
                yield index

    loader = sample_loader(TrainingPairs(settings=SMALL), Counting(), 2, workers=1, prefetch_factor=1)
    assert [sample.index for sample in next(iter(loader))] == [0, 1]
    assert Counting.taken <= 6


def test_difficulty_and_strength_may_grow_with_the_samples(monkeypatch, folders):
    growing = DataSettings(size=64, difficulty=lambda index: Difficulty(0, 0, 0, 0.3) if index < 5 else CLIP_LIKE)
    drawn = TrainingPairs(settings=growing)
    assert np.array_equal(drawn[4].source, drawn[4].reference)
    assert not np.array_equal(drawn[5].source, drawn[5].reference)
    stills = list_stills(folders["stills"])
    growing = DataSettings(size=64, strength=lambda index: float(index >= 5))
    pairs = TrainingPairs((), stills, growing)
    assert np.array_equal(pairs[4].source, pairs[4].reference)
    assert not np.array_equal(pairs[5].source, pairs[5].reference)


def test_held_out_scenes_are_never_drawn(monkeypatch):
    seeds = []
    own = dataset.render_pair
    monkeypatch.setattr(dataset, "render_pair", lambda seed, *rest: seeds.append(seed) or own(seed, *rest))
    for index in range(60):
        TrainingPairs(settings=replace(SMALL, seed=index % 3))[index]
    assert max(seeds) < HELD_OUT_SEED and max(seeds) > HELD_OUT_SEED // 2 and len(set(seeds)) == 60


@pytest.mark.parametrize(
    "wrong", [{"stills_share": 1.2}, {"strength": -0.1}, {"size": 4}, {"seed": -1}, {"ssim_bounds": (0.9, 0.2)}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ArgumentError):
        DataSettings(**wrong)


# --- the preview -------------------------------------------------------------------------------------------


def test_the_preview_shows_pairs_holes_and_what_they_are(folders):
    pairs = pairs_from_folders(**folders, settings=DataSettings(size=64, seed=1))
    sheet = np.asarray(preview.preview_sheet(pairs, range(2), tile=64))
    assert sheet.shape[1] == 3 * (64 + 4) + 4
    sample, _ = pairs.draw(0)
    top = 18 + 18
    assert np.array_equal(sheet[top : top + 64, 4:68], sample.source)
    assert np.array_equal(sheet[top : top + 64, 72:136], sample.reference)
    assert (sheet[top : top + 64, 140:204][sample.mask] == 0).all()
    title = preview._title(*pairs.draw(next(i for i in range(9) if pairs._kind(i) == "video")))
    assert "video" in title and "SSIM 0." in title and "mask:" in title


def test_the_command_draws_a_sheet_and_refuses_what_it_cannot_do(tmp_path, folders, capsys):
    sheet = tmp_path / "sheet.png"
    files = ["--videos", *map(str, folders["videos"]), "--stills", *map(str, folders["stills"])]
    assert main(["train", "--preview", str(sheet), "--seed", "2", *files]) == 0
    first = sheet.read_bytes()
    assert main(["train", "--preview", str(sheet), *files]) == 5 and sheet.read_bytes() == first
    assert main(["train", "--preview", str(sheet), "--overwrite", "--seed", "2", *files]) == 0
    assert sheet.read_bytes() == first
    assert main(["train", "--preview", str(tmp_path / "b.png"), "--frames", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["train"]) == 2 and "--folder" in capsys.readouterr().err
