"""images.py: files and arrays in, tensors out. The recorded pictures of the original are the judge."""

import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimicbrush_core import images, masks
from mimicbrush_core.errors import ArgumentError, PictureError

GOLDEN = Path(__file__).parent / "golden" / "mimicbrush"
CASES = ("landscape", "portrait", "oddsquare")


def golden(name):
    with Image.open(GOLDEN / "images" / f"{name}.png") as image:
        return np.array(image)


def prep(case):
    return load_file(GOLDEN / f"prep_{case}.safetensors")


def source(case):
    return images.read_picture(GOLDEN / "images" / f"{case}_source.png").rgb


def padded(case, kind):
    picture = images.read_picture(GOLDEN / "images" / f"{case}_{kind}.png", role=kind)
    return images.pad_to_square(picture.rgb, 255)


def collage(case):
    hole = masks.binarize(images.read_mask(GOLDEN / "images" / f"{case}_mask.png"))
    return images.pad_to_square(images.cut_hole(source(case), hole), 255)


def levels(ours, theirs):
    """(largest difference, share of values that differ)"""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    return difference.max(), (difference > 0).mean()


# -------------------- recorded pictures


@pytest.mark.parametrize("case", CASES)
def test_padding_matches_the_original(case):
    for kind in ("source", "reference"):
        assert np.array_equal(padded(case, kind), golden(f"{case}_padded_{kind}"))


@pytest.mark.parametrize("case", CASES)
def test_collage_matches_the_original(case):
    assert np.array_equal(collage(case), golden(f"{case}_collage"))


@pytest.mark.parametrize("case", CASES)
def test_vae_inputs_match_the_original(case):
    recorded = prep(case)
    for square, name in ((collage(case), "masked_image_512"), (padded(case, "reference"), "reference_512")):
        resized = images.resize_lanczos(square, 512)
        assert np.array_equal(resized, golden(f"{case}_{name}"))
        tensor = images.to_model_range(resized)
        assert tensor.shape == (1, 3, 512, 512) and tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert torch.equal(tensor[0, :, 256], recorded[f"{name}_row256"])


@pytest.mark.parametrize("case", CASES)
def test_clip_pixels_match_the_original(case):
    pixels = images.clip_pixel_values(padded(case, "reference"))
    assert pixels.shape == (1, 3, 224, 224) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels[0, :, 112], prep(case)["clip_pixel_values_row112"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.OPENAI_MEAN, images.OPENAI_STD))
    levels_224 = ((pixels * std + mean) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(levels_224, golden(f"{case}_clip_224"))


@pytest.mark.parametrize("case", CASES)
def test_depth_pixels_match_the_original(case):
    pixels, recorded = images.depth_pixel_values(padded(case, "source")), prep(case)
    assert pixels.shape == (1, 3, 518, 518) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    restored = pixels[0].permute(1, 2, 0).double().numpy() * 255 * images.DEPTH_STD + images.DEPTH_MEAN
    resized = restored.round().astype(np.uint8)
    worst, share = levels(resized, golden(f"{case}_depth_resized_uint8"))
    assert worst <= 1 and share < 2e-4
    one_level = 1.001 / 255 / min(images.DEPTH_STD)
    difference = (pixels[:, :, 200:264, 100:196] - recorded["depth_image_crop"]).abs()
    assert difference.max() <= one_level and (difference > 1e-6).float().mean() < 2e-4
    stats = torch.stack([pixels.mean(), pixels.std(), pixels.min(), pixels.max()])
    assert torch.allclose(stats, recorded["depth_image_stats"], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_cropped_prediction_matches_the_original(case):
    height, width = source(case).shape[:2]
    side = max(height, width)
    square = images.resize_bilinear(golden(f"{case}_stub_prediction"), side, side)
    worst, share = levels(images.crop_padding(square, height, width), golden(f"{case}_post_cropped_pred"))
    assert worst == share == 0


def test_benchmark_recipe_matches_the_original():
    """run_inference_benchmark.py first scales everything to a long side of 512 with plain bilinear."""
    rgb = images.resize_bilinear(golden("landscape_source"), int(300 * 512 / 400), 512)
    reference = images.resize_bilinear(golden("landscape_reference"), int(256 * 512 / 320), 512)
    hole = masks.binarize(images.resize_bilinear(golden("landscape_mask"), 384, 512) / np.float32(255))

    assert levels(images.pad_to_square(reference, 255), golden("bench_landscape_padded_reference"))[0] <= 1
    recorded_hole = golden("bench_landscape_mask") > 0
    flipped = images.pad_to_square(hole, False) != recorded_hole
    assert flipped.sum() <= 2
    ours = images.pad_to_square(images.cut_hole(rgb, hole), 255)
    assert levels(ours[~flipped], golden("bench_landscape_collage")[~flipped])[0] <= 1
    pixels = images.depth_pixel_values(images.pad_to_square(rgb, 255))
    two_levels = 2.001 / 255 / min(images.DEPTH_STD)  # one of the first resize, which the second sharpens
    difference = (pixels[:, :, 200:264, 100:196] - prep("bench_landscape")["depth_image_crop"]).abs()
    assert difference.max() <= two_levels and difference.mean() < 1e-3


# -------------------- refused picture files


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width, height):
    """A PNG that announces a size but holds a few bytes of pixels only."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_file(header, b"\0" * 64)


def png_file(header, rows):
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


def noise(height=64, width=48, channels=3):
    return np.random.default_rng(5).integers(0, 256, (height, width, channels), dtype=np.uint8)


def make_missing(path):
    return path / "nowhere.png"


def make_under_a_file(path):
    (path / "file").write_bytes(b"x")
    return path / "file" / "a.png"


def make_bad_name(path):
    return path / "a\0b.png"


def make_folder(path):
    return path


def make_pipe(path):
    os.mkfifo(path / "pipe.png")
    return path / "pipe.png"


def write(path, name, content):
    (path / name).write_bytes(content)
    return path / name


def make_empty(path):
    return write(path, "empty.png", b"")


def make_text(path):
    return write(path, "text.png", b"not a picture at all, just words\n" * 20)


def make_truncated(suffix, keep):
    def make(path):
        whole = path / f"whole{suffix}"
        Image.fromarray(noise(200, 200)).save(whole)
        content = whole.read_bytes()
        return write(path, f"cut{suffix}", content[: int(len(content) * keep)])

    return make


def make_wrong_checksum(path):
    whole = path / "whole.png"
    Image.fromarray(noise()).save(whole)
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 255
    return write(path, "flipped.png", bytes(content))


def make_animation(name):
    def make(path):
        frames = [Image.fromarray(np.full((32, 32, 3), v, np.uint8)) for v in (0, 100, 200)]
        frames[0].save(path / name, save_all=True, append_images=frames[1:])
        return path / name

    return make


def make_mode(mode, name):
    def make(path):
        Image.new(mode, (32, 32)).save(path / name)
        return path / name

    return make


def make_size(width, height):
    def make(path):
        Image.new("L", (width, height)).save(path / "size.png")
        return path / "size.png"

    return make


def make_header(width, height):
    return lambda path: write(path, "header.png", png_header(width, height))


def make_deep_integers(path):
    Image.fromarray(np.full((32, 32), 70000, np.int32)).save(path / "deep.tif")
    return path / "deep.tif"


def make_unreadable(path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    Image.fromarray(noise()).save(path / "locked.png")
    (path / "locked.png").chmod(0)
    return path / "locked.png"


BAD_FILES = {
    "missing": (make_missing, "does not exist"),
    "under a file": (make_under_a_file, "does not exist"),
    "null in the name": (make_bad_name, "cannot be opened"),
    "folder": (make_folder, "is a folder"),
    "pipe": (make_pipe, "not a regular file"),
    "empty": (make_empty, "empty file"),
    "text": (make_text, "not a picture"),
    "truncated png": (make_truncated(".png", 0.6), "damaged or truncated"),
    "truncated jpeg": (make_truncated(".jpg", 0.6), "damaged or truncated"),
    "truncated webp": (make_truncated(".webp", 0.6), "damaged or truncated|not a picture"),
    "wrong checksum": (make_wrong_checksum, "damaged or truncated"),
    "animated gif": (make_animation("a.gif"), "animated or has several pages \\(3 frames"),
    "animated png": (make_animation("a.png"), "animated or has several pages \\(3 frames"),
    "multi-page tiff": (make_animation("a.tif"), "animated or has several pages \\(3 frames"),
    "cmyk jpeg": (make_mode("CMYK", "a.jpg"), "CMYK"),
    "lab tiff": (make_mode("LAB", "a.tif"), "Lab colours"),
    "float tiff": (make_mode("F", "a.tif"), "floating-point"),
    "32-bit grey": (make_deep_integers, "70000 to 70000"),
    "1 x 1": (make_size(1, 1), "1 x 1 pixels, less than 8"),
    "7 x 8": (make_size(7, 8), "7 x 8 pixels, less than 8"),
    "20000 x 10": (make_size(20000, 10), "20000 x 10 pixels, more than 16384"),
    "16385 x 8": (make_size(16385, 8), "16385 x 8 pixels, more than 16384"),
    "bomb": (make_header(60000, 60000), "too large"),
    "bomb within the side limit": (make_header(16000, 16000), "too large"),
    "unreadable": (make_unreadable, "may not be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(name, tmp_path):
    make, found = BAD_FILES[name]
    path = make(tmp_path)
    with pytest.raises(PictureError, match=found) as caught:
        images.read_picture(path, "reference")
    message = str(caught.value)
    assert message.startswith(f"The reference picture '{path}' ")
    assert re.search(r"\. (Check|Give|Save|Scale|Use|Change) [^.]+\.$", message), "a remedy follows"
    with pytest.raises(PictureError, match="The mask picture .*" + found):
        images.read_mask(path)


def test_a_bomb_warning_turned_into_an_error_is_refused(tmp_path):
    path = write(tmp_path, "large.png", png_header(12000, 12000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError, match="too large"):
            images.read_picture(path)


def test_a_picture_over_the_side_limit_is_not_decoded(tmp_path):
    with pytest.raises(PictureError, match="more than 16384"):
        images.read_picture(write(tmp_path, "wide.png", png_header(16385, 100)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tif", ".bmp", ".webp"])
def test_damaged_files_raise_nothing_else(suffix, tmp_path):
    """Cut anywhere or with flipped bytes, a file is read or refused, never anything else."""
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(noise(24, 24)).save(whole)
    content = whole.read_bytes()
    random = np.random.default_rng(11)
    for trial in range(60):
        damaged = bytearray(content)
        if trial % 2:
            damaged = damaged[: random.integers(1, len(content))]
        else:
            for place in random.integers(0, min(len(content), 300), 4):
                damaged[place] = random.integers(0, 256)
        path = write(tmp_path, f"damaged{suffix}", bytes(damaged))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture = images.read_picture(path)
        except PictureError:
            continue
        assert picture.rgb.dtype == np.uint8 and picture.rgb.shape[2] == 3


# -------------------- odd but good files


def test_plain_rgb_is_read_exactly(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    picture = images.read_picture(str(tmp_path / "a.png"))
    assert np.array_equal(picture.rgb, noise()) and picture.alpha is None and picture.size == (48, 64)
    assert picture.over_white() is picture.rgb
    picture.rgb[0, 0] = 0  # a writable copy, not Pillow's buffer


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_not_clipped(suffix, tmp_path):
    ramp = np.linspace(0, 65535, 256 * 16).round().astype(np.uint16).reshape(16, 256)
    Image.fromarray(ramp).save(tmp_path / f"ramp{suffix}")
    rgb = images.read_picture(tmp_path / f"ramp{suffix}").rgb
    assert rgb[0, 0, 0] == 0 and rgb[-1, -1, 0] == 255
    assert (np.diff(rgb[..., 0].ravel().astype(int)) >= 0).all()
    assert np.array_equal(rgb[..., 1], np.rint(ramp * (255 / 65535)).astype(np.uint8))
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def test_16_bit_grey_of_either_byte_order(tmp_path):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    expected = np.rint(values * (255 / 65535))
    for mode, dtype in (("I;16", "<u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (64, 64), values.astype(dtype).tobytes())
        assert np.array_equal(images._to_picture(image, Path("a"), "source").rgb[..., 0], expected)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tif")  # mode I, within 16 bits
    assert np.array_equal(images.read_picture(tmp_path / "a.tif").rgb[..., 0], expected)


def test_16_bit_rgb_is_reduced(tmp_path):
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in noise(16, 16))
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    path = write(tmp_path, "deep.png", png_file(header, rows))
    assert np.array_equal(images.read_picture(path).rgb, noise(16, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    rgb = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    upright = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.swapaxes(0, 1),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(rgb),
    }[orientation]
    assert np.array_equal(images.read_picture(tmp_path / "a.png").rgb, upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_the_picture(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert np.array_equal(images.read_picture(tmp_path / "a.png").rgb, noise())


def test_mpo_photos_are_read(tmp_path):
    first, second = (Image.fromarray(np.full((32, 32, 3), v, np.uint8)) for v in (40, 200))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert np.abs(images.read_picture(tmp_path / "a.jpg").rgb.astype(int) - 40).max() <= 1


def save_grey_alpha(values, path):
    Image.merge("LA", [Image.fromarray(values[..., channel].copy()) for channel in (0, 1)]).save(path)


def test_grey_with_alpha(tmp_path):
    values = noise(16, 16, 2)
    save_grey_alpha(values, tmp_path / "a.png")
    picture = images.read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.rgb, np.repeat(values[..., :1], 3, axis=2))
    assert np.array_equal(picture.alpha, values[..., 1])


@pytest.mark.parametrize("transparent", [1, bytes([255, 0, 128])])
def test_palette_with_transparency(transparent, tmp_path):
    image = Image.frombytes("P", (16, 16), bytes([0, 1] * 8 + [2, 0] * 8) * 8)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=transparent)
    picture = images.read_picture(tmp_path / "a.png")
    third = 255 if transparent == 1 else 128
    assert picture.rgb[:2, :2].tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 0, 0]]]
    assert picture.alpha[:2, :2].tolist() == [[255, 0], [third, 255]]
    blue = [127, 127, 255] if third == 128 else [0, 0, 255]
    assert picture.over_white()[:2, :2].tolist() == [[[255, 0, 0], [255, 255, 255]], [blue, [255, 0, 0]]]


def test_one_bit_and_plain_palette(tmp_path):
    bits = np.indices((16, 16)).sum(0) % 2 == 0
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert np.array_equal(images.read_picture(tmp_path / "bits.png").rgb[..., 1], bits * 255)
    Image.fromarray(bits.astype(np.uint8) * 255).convert("P").save(tmp_path / "palette.gif")
    picture = images.read_picture(tmp_path / "palette.gif")
    assert np.array_equal(picture.rgb[..., 1], bits * 255) and picture.alpha is None


def test_over_white_rounds():
    rgb, alpha = noise(64, 64), noise(64, 64, 1)[..., 0]
    share = alpha[..., None] / 255
    expected = np.rint(rgb * share + 255 * (1 - share))
    assert np.array_equal(images.Picture(rgb, alpha).over_white(), expected)


# -------------------- masks


def test_grey_masks_are_read(tmp_path):
    values = noise(16, 16, 1)[..., 0]
    Image.fromarray(values).save(tmp_path / "m.png")
    mask = images.read_mask(tmp_path / "m.png")
    assert mask.dtype == np.float32 and np.array_equal(mask, values / np.float32(255))


def test_colour_masks_are_read_as_luma(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "m.png")
    expected = np.asarray(Image.fromarray(noise()).convert("L"))
    assert np.array_equal(np.rint(images.read_mask(tmp_path / "m.png") * 255), expected)


def test_a_painted_layers_alpha_is_the_mask(tmp_path):
    layer = np.zeros((16, 16, 4), np.uint8)  # black paint: its grey value would be an empty mask
    layer[4:9, 5:11, 3] = 255
    Image.fromarray(layer).save(tmp_path / "m.png")
    assert np.array_equal(images.read_mask(tmp_path / "m.png"), layer[..., 3] / np.float32(255))


@pytest.mark.parametrize("constant", [0, 77, 255])
def test_a_constant_alpha_is_ignored(constant, tmp_path):
    values = np.full((16, 16, 2), constant, np.uint8)
    values[..., 0] = noise(16, 16, 1)[..., 0]
    save_grey_alpha(values, tmp_path / "m.png")
    assert np.array_equal(images.read_mask(tmp_path / "m.png"), values[..., 0] / np.float32(255))


# -------------------- callers' arrays


def test_arrays_of_every_allowed_kind():
    rgb = noise(16, 24)
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    opaque = np.dstack([rgb, np.full((16, 24), 255, np.uint8)])
    clear = np.dstack([rgb, np.zeros((16, 24), np.uint8)])
    as_float = rgb / np.float32(255)
    good = [
        (rgb, rgb),
        (as_float, rgb),
        (as_float.astype(np.float64), rgb),
        (torch.from_numpy(as_float), rgb),
        (torch.from_numpy(rgb), rgb),
        (rgb[..., 0], grey),
        (rgb[..., :1], grey),
        (as_float[..., 0], grey),
        (opaque, rgb),
        (opaque / np.float32(255), rgb),
        (clear, np.full_like(rgb, 255)),
        (torch.from_numpy(as_float).requires_grad_(), rgb),
        (np.asfortranarray(rgb), rgb),
    ]
    for given, expected in good:
        kept = given.detach().numpy().copy() if isinstance(given, torch.Tensor) else given.copy()
        checked = images.picture_from_array(given, "source")
        assert checked.dtype == np.uint8 and checked.flags.c_contiguous and np.array_equal(checked, expected)
        checked[:] = 0
        assert np.array_equal(given.detach().numpy() if isinstance(given, torch.Tensor) else given, kept)


def test_float_arrays_are_rounded_and_slightly_clipped():
    values = np.full((8, 8, 3), 0.4999 / 255 + 10 / 255, np.float32)
    values[0], values[1], values[2] = 10.501 / 255, -0.0009, 1.0009
    checked = images.picture_from_array(values, "source")
    assert [int(checked[row, 0, 0]) for row in range(4)] == [11, 0, 255, 10]
    half = torch.full((8, 8, 3), 0.5, dtype=torch.bfloat16)
    assert (images.picture_from_array(half, "source") == 128).all()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (np.full((8, 8, 3), np.nan, np.float32), "NaN"),
        (np.where(np.eye(8)[..., None] > 0, np.nan, np.zeros((8, 8, 3))), "NaN"),
        (np.full((8, 8, 3), np.inf), "NaN or infinite"),
        (torch.full((8, 8, 3), float("nan")), "NaN"),
        (np.full((8, 8, 3), 1.0011), "values from"),
        (np.full((8, 8, 3), -0.0011), "values from"),
        (noise(8, 8).astype(np.float32), "values from"),
        (np.zeros((3, 8, 8), np.float32), "channels first"),
        (np.zeros((1, 8, 8, 3), np.float32), "batch"),
        (np.zeros((8, 8, 2), np.float32), "shape"),
        (np.zeros(8, np.float32), "shape"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.zeros((8, 8, 3), bool), "bool"),
        (np.zeros((8, 7, 3), np.uint8), "7 x 8"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0"),
        (np.zeros((8, 16385), np.uint8), "16385 x 8"),
        ([[0]], "list"),
        (None, "NoneType"),
    ],
)
def test_bad_arrays_are_refused(given, found):
    with pytest.raises(PictureError, match=f"The reference picture .*{found}"):
        images.picture_from_array(given, "reference")


# -------------------- geometry and ranges


@pytest.mark.parametrize(("height", "width"), [(9, 20), (20, 9), (8, 8), (11, 8)])
def test_padding_and_its_removal(height, width):
    rgb, side = noise(height, width), max(height, width)
    square = images.pad_to_square(rgb, 255)
    assert square.shape == (side, side, 3) and square.dtype == np.uint8
    assert np.array_equal(images.crop_padding(square, height, width), rgb)
    top, left = (side - height) // 2, (side - width) // 2
    assert np.array_equal(square[top : top + height, left : left + width], rgb)
    assert int((square != 255).any(axis=2).sum()) <= height * width
    mask = np.ones((height, width), np.float32)
    assert images.pad_to_square(mask, 0).sum() == height * width
    square[:] = 0  # a new array, also for a square picture
    assert rgb.any()


def test_crop_padding_refuses_another_size():
    with pytest.raises(ArgumentError, match="20 x 20"):
        images.crop_padding(np.zeros((21, 21, 3), np.uint8), 20, 10)


def test_cut_hole():
    rgb = noise(16, 16) | 1
    hole = np.zeros((16, 16), bool)
    hole[3:5, 6:9] = True
    expected = np.where(hole[..., None], 0, rgb)
    assert np.array_equal(images.cut_hole(rgb, hole), expected)
    assert np.array_equal(images.cut_hole(rgb, hole.astype(np.float32)), expected)
    assert rgb.all(), "the source stays as it was"
    with pytest.raises(ArgumentError, match="binarize"):
        images.cut_hole(rgb, hole * np.float32(0.7))
    with pytest.raises(ArgumentError, match="shape"):
        images.cut_hole(rgb, hole[1:])


def test_resizing_keeps_sizes_and_identity():
    rgb = noise(16, 24)
    assert images.resize_lanczos(rgb, (10, 12)).shape == (10, 12, 3)
    assert images.resize_lanczos(rgb[..., 0], 9).shape == (9, 9)
    assert images.resize_bilinear(rgb, 10, 12).shape == (10, 12, 3)
    assert np.array_equal(images.resize_bilinear(rgb, 16, 24), rgb)
    enlarged = images.resize_bilinear(rgb, 32, 48)
    assert np.array_equal(images.resize_bilinear(rgb[..., 0], 32, 48), enlarged[..., 0])


def test_model_range_round_trip():
    rgb = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = images.to_model_range(rgb)
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(images.from_model_range(tensor), rgb[None])
    wild = torch.tensor([-7.0, 2.0, 10.6 / 127.5 - 1]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert images.from_model_range(wild.half())[:, 0, 0, 0].tolist() == [0, 255, 11]


def test_clip_pixels_of_a_wide_picture_come_from_its_centre():
    rgb = noise(32, 64)
    wide = images.clip_pixel_values(rgb, image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(wide[0] * 255, torch.from_numpy(rgb[:, 16:48].transpose(2, 0, 1)).float())


def test_depth_pixels_need_a_square():
    with pytest.raises(ArgumentError, match="square"):
        images.depth_pixel_values(noise(16, 24))
    assert images.depth_pixel_values(noise(16, 16), size=28).shape == (1, 3, 28, 28)
