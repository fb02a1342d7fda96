"""Pictures: from files and callers' arrays to checked arrays, from arrays to the models' tensors and back.

Inside this module a picture is `np.ndarray` uint8 `[H, W, 3]`; tensors are float32 `[B, C, H, W]`,
contiguous. The numbers follow the original `run_gradio3_demo.py` of MimicBrush (functions named in the
docstrings).
"""

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .errors import ArgumentError, PictureError
from .whole_file import whole_file

MAX_SIDE = 16384
MIN_SIDE = 8
WHITE, BLACK = 255, 0

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
DEPTH_MEAN = (0.485, 0.456, 0.406)
DEPTH_STD = (0.229, 0.224, 0.225)

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_DEEP_GREY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_MODE_NAMES = {
    "CMYK": "CMYK or YCCK print colours",
    "LAB": "Lab colours",
    "F": "floating-point values",
    "YCbCr": "YCbCr colours",
    "HSV": "HSV colours",
}
_EXIF_ORIENTATION = 0x0112
_EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's EXIF parser raises on damaged data.
_EXIF_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
)
_RANGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Picture:
    """A picture as read: `rgb` uint8 `[H, W, 3]` (not premultiplied), `alpha` uint8 `[H, W]` or None."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), Pillow's order."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def layer(self) -> np.ndarray:
        """The picture with its transparency, uint8 `[H, W, 4]`; opaque where it has none."""
        alpha = np.full_like(self.rgb[..., 0], 255) if self.alpha is None else self.alpha
        return np.dstack([self.rgb, alpha])

    def over_white(self) -> np.ndarray:
        """The picture laid on white by its alpha, uint8 `[H, W, 3]`; `rgb` itself if all is opaque."""
        if self.alpha is None or bool((self.alpha == 255).all()):
            return self.rgb
        # 255 * 255 + 127 still fits 16 bits, which keeps large pictures cheap.
        alpha = self.alpha[..., None].astype(np.uint16)
        mixed = self.rgb * alpha + 255 * (255 - alpha)
        return ((mixed + 127) // 255).astype(np.uint8)


# -------------------- reading files


def read_picture(path: str | os.PathLike, role: str = "source") -> Picture:
    """Read one still picture from a file, upright (EXIF orientation applied), as 8-bit RGB and alpha.

    Accepted: 1-bit, grey, grey + alpha, palette (also with transparency), RGB, RGBA, 16-bit grey (scaled by
    255/65535 and rounded) and 16-bit RGB(A) (reduced by Pillow). Sides of `MIN_SIDE` to `MAX_SIDE` pixels.
    Of an MPO file (the JPEG of many phones, with a second picture for depth or HDR) the main photo is read.

    Raises PictureError, naming the role and file, for a missing, empty, unreadable, damaged or truncated
    file, a folder, anything that is not a picture, animations and multi-page files, CMYK / Lab /
    floating-point pictures, and sides outside the limits (checked before decoding).
    """
    path = Path(path)
    _check_file(path, role)
    try:
        with Image.open(path) as image:
            _check_header(image, path, role)
            image.load()
            return _to_picture(_upright(image), path, role)
    except (PictureError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refusal(
            role,
            path,
            f"is too large to be opened safely ({error})",
            f"Scale it down to at most {MAX_SIDE} pixels a side.",
        ) from error
    except UnidentifiedImageError as error:
        raise _refusal(
            role, path, "is not a picture in a known format", "Give a PNG, JPEG, WebP, TIFF or BMP file."
        ) from error
    except PermissionError as error:
        raise _not_permitted(role, path) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise _refusal(
            role,
            path,
            f"is damaged or truncated ({type(error).__name__}: {error})",
            "Save or download it again.",
        ) from error


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """Read a mask from a file, float32 `[H, W]`, 0..1, 1 = repaint.

    Which channel counts: where the file has an alpha channel that is not the same everywhere (a painted
    layer), the alpha is the mask; otherwise the grey value (Rec. 601 luma) divided by 255 is, and a
    constant alpha is ignored. Reads and refuses the same files as `read_picture` (PictureError, role
    "mask"). (original: `run_local`, `convert("L")`; the gradio 4 demo: alpha of the drawn layer)
    """
    picture = read_picture(path, role="mask")
    if picture.alpha is not None and picture.alpha.min() != picture.alpha.max():
        values = picture.alpha
    else:
        values = np.asarray(Image.fromarray(picture.rgb).convert("L"))
    return values.astype(np.float32) / np.float32(255)


def _refusal(role: str, path: Path, found: str, remedy: str) -> PictureError:
    return PictureError(f"The {role} picture '{path}' {found}. {remedy}")


def _not_permitted(role: str, path: Path) -> PictureError:
    return _refusal(role, path, "may not be read by this user", "Change the file's permissions or copy it.")


def _check_file(path: Path, role: str) -> None:
    """Refuse what cannot hold a picture, before Pillow opens it (a pipe would block, a folder confuse)."""
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _refusal(role, path, "does not exist", "Check the path.") from error
    except PermissionError as error:
        raise _not_permitted(role, path) from error
    except (OSError, ValueError) as error:  # name too long, null character
        raise _refusal(role, path, f"cannot be opened ({error})", "Check the path.") from error
    if stat.S_ISDIR(info.st_mode):
        raise _refusal(role, path, "is a folder", "Give the path of one picture file.")
    if not stat.S_ISREG(info.st_mode):
        raise _refusal(role, path, "is not a regular file", "Give the path of one picture file.")
    if info.st_size == 0:
        raise _refusal(role, path, "is an empty file (0 bytes)", "Save or download it again.")


def _check_header(image: Image.Image, path: Path, role: str) -> None:
    """Refuse by what the header says, before any pixel is decoded."""
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise _refusal(role, path, f"is {width} x {height} pixels, more than {MAX_SIDE} on a side", "Scale it down.")
    if min(width, height) < MIN_SIDE:
        raise _refusal(
            role,
            path,
            f"is {width} x {height} pixels, less than {MIN_SIDE} on a side",
            "Use a larger picture.",
        )
    if image.mode not in _EIGHT_BIT_MODES + _DEEP_GREY_MODES:
        found = _MODE_NAMES.get(image.mode, f"the mode {image.mode}")
        raise _refusal(role, path, f"holds {found} (mode {image.mode})", "Save it as 8-bit RGB or grey.")
    # An MPO is a photo with a companion picture, not an animation: its first frame is the photo.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise _refusal(
            role,
            path,
            f"is animated or has several pages ({frames} frames)",
            "Save the frame that you mean as a still picture.",
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Unreadable EXIF data means upright: it is no reason to refuse the
    pixels."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _EXIF_ERRORS:
        orientation = 1
    method = _EXIF_TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)


def _to_picture(image: Image.Image, path: Path, role: str) -> Picture:
    if image.mode in _DEEP_GREY_MODES:
        return Picture(_reduce_deep_grey(np.asarray(image), path, role))
    palette_alpha = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info or palette_alpha:
        rgba = np.asarray(image.convert("RGBA"))
        return Picture(np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3]))
    return Picture(np.array(image.convert("RGB")))


def _reduce_deep_grey(values: np.ndarray, path: Path, role: str) -> np.ndarray:
    """0..65535 to 0..255 by rounding, as RGB. Pillow's own `convert` would clip everything above 255."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _refusal(
            role,
            path,
            f"has grey values from {low} to {high}, outside 16 bits (0 to 65535)",
            "Save it as 8-bit or 16-bit grey.",
        )
    # 65535 = 255 * 257, and 257 is odd, so this is exact rounding without ties.
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


# -------------------- callers' arrays


def picture_from_array(array: np.ndarray | torch.Tensor, role: str) -> np.ndarray:
    """Check a caller's picture and return it as uint8 `[H, W, 3]`; a transparent one is laid on white.

    `array` and errors: as for `layer_from_array`.
    """
    layer = layer_from_array(array, role)
    return Picture(layer[..., :3], layer[..., 3]).over_white().copy()


def layer_from_array(array: np.ndarray | torch.Tensor, role: str) -> np.ndarray:
    """Check a caller's picture and return it with its transparency as uint8 `[H, W, 4]`, opaque where it has none.

    `array`: NumPy array or tensor, uint8 0..255 or floating point 0..1 (off by at most 1e-3, then clipped;
    rounded to 8 bits), shaped `[H, W, 3]`, `[H, W, 4]`, `[H, W, 1]` or `[H, W]` (grey).
    Raises PictureError for another type, dtype or shape, NaN or infinity, values out of range, and sides
    outside `MIN_SIDE`..`MAX_SIDE`.
    """
    values = _as_numpy(array, role)
    _check_array_shape(values, role)
    values = _to_eight_bits(values, role)
    if values.ndim == 2:
        values = values[..., None]
    if values.shape[2] == 1:
        values = np.repeat(values, 3, axis=2)
    if values.shape[2] == 3:
        values = np.concatenate([values, np.full_like(values[..., :1], 255)], axis=2)
    return np.array(values, order="C")


def _as_numpy(array: np.ndarray | torch.Tensor, role: str) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        # NumPy knows no bfloat16; float32 holds every half-precision value.
        return (array.float() if array.is_floating_point() else array).numpy()
    if isinstance(array, np.ndarray):
        return array
    raise PictureError(f"The {role} picture is a {type(array).__name__}. Give a NumPy array or a torch tensor.")


def _check_array_shape(values: np.ndarray, role: str) -> None:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        hint = ""
        if values.ndim == 3 and values.shape[0] in (1, 3, 4):
            hint = " (it looks like channels first)"
        elif values.ndim == 4:
            hint = " (it looks like a batch)"
        raise PictureError(
            f"The {role} picture has the shape {list(values.shape)}{hint}. "
            "Give one picture as [height, width, 3], [height, width, 4] or [height, width]."
        )
    height, width = values.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise PictureError(
            f"The {role} picture is {width} x {height} pixels. Give one with sides of {MIN_SIDE} to {MAX_SIDE} pixels."
        )


def _to_eight_bits(values: np.ndarray, role: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise PictureError(
            f"The {role} picture has the data type {values.dtype}. "
            "Give uint8 values of 0 to 255 or floating-point values of 0 to 1."
        )
    low, high = float(values.min()), float(values.max())  # NaN and infinity survive min and max
    if not (np.isfinite(low) and np.isfinite(high)):
        raise PictureError(f"The {role} picture contains NaN or infinite values. Check the step that produced it.")
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        raise PictureError(
            f"The {role} picture has values from {low:.4g} to {high:.4g}. "
            "Floating-point pictures must lie within 0 to 1."
        )
    scaled = values.astype(np.float32) * np.float32(255)
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


# -------------------- squares, holes and resizing


def pad_to_square(array: np.ndarray, fill: float) -> np.ndarray:
    """Pad a picture `[H, W, 3]` or mask `[H, W]` with `fill` to a square of its long side; a new array.

    The picture starts (long - short) // 2 from the top or left, so an odd rest goes to the bottom or right.
    Pictures are padded with 255, masks with 0. (original: `pad_img_to_square`)
    """
    height, width = array.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, *array.shape[2:]), fill, dtype=array.dtype)
    square[top : top + height, left : left + width] = array
    return square


def crop_padding(array_square: np.ndarray, height: int, width: int) -> np.ndarray:
    """Undo `pad_to_square`: the `[height, width, ...]` part (a view) of a `[L, L, ...]` array, L the long
    side.

    Raises ArgumentError where the array is not of that size. (original: `crop_padding_and_resize`)
    """
    side = max(height, width)
    if array_square.shape[:2] != (side, side):
        raise ArgumentError(
            f"To crop to {width} x {height}, a square of {side} x {side} is needed, not "
            f"{array_square.shape[1]} x {array_square.shape[0]}; resize it first."
        )
    top, left = (side - height) // 2, (side - width) // 2
    return array_square[top : top + height, left : left + width]


def cut_hole(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of `rgb` uint8 `[H, W, 3]` that is black (0) where the binary `mask` `[H, W]` is set.

    Done at the picture's own resolution, before any resize, because the models were trained so: black, not
    grey, and ringing at the hole's border. `mask`: bool, or a float mask that holds only 0 and 1. Raises
    ArgumentError for a soft mask (see `masks.binarize`) and for another size. (original: `collage_region`)
    """
    if mask.shape != rgb.shape[:2]:
        raise ArgumentError(
            f"The mask's shape {list(mask.shape)} is not the picture's {list(rgb.shape[:2])}. Resize one of them."
        )
    hole = mask == 1
    if not np.array_equal(hole, mask):
        raise ArgumentError("The hole needs a mask of only 0 and 1; pass masks.binarize(mask).")
    collage = rgb.copy()
    collage[hole] = 0
    return collage


def resize_lanczos(rgb: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` or `[H, W]` to a square of `size`, or to (height, width), with Pillow's 8-bit
    LANCZOS (antialiased). (original: diffusers' image processors, `resize`)
    """
    height, width = (size, size) if isinstance(size, int) else size
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS))


def resize_bicubic(rgb: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """As `resize_lanczos`, with Pillow's 8-bit BICUBIC."""
    height, width = (size, size) if isinstance(size, int) else size
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def resize_bilinear(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` or `[H, W]` to `[height, width, ...]`: plain bilinear, no antialiasing.

    Bit-exact with cv2.resize INTER_LINEAR on uint8, whose fixed-point arithmetic this repeats.
    """
    rows, row_weights = _bilinear_taps(rgb.shape[0], height)
    columns, column_weights = _bilinear_taps(rgb.shape[1], width)
    values = rgb.reshape(*rgb.shape[:2], -1).astype(np.int32)
    across = sum(values[:, at] * weight[:, None] for at, weight in zip(columns, column_weights, strict=True))
    # 22 fractional bits in all, dropped in three places as cv2 does.
    down = sum((across[at] >> 4) * weight[:, None, None] >> 16 for at, weight in zip(rows, row_weights, strict=True))
    return ((down + 2) >> 2).astype(np.uint8).reshape(height, width, *rgb.shape[2:])


def _bilinear_taps(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Per target pixel its two source pixels and their weights times 2048, both int32 `[2, target]`."""
    position = ((np.arange(target) + 0.5) * (length / target) - 0.5).clip(0, length - 1).astype(np.float32)
    near = np.floor(position).astype(np.int32)
    share = position - near
    weights = np.rint(np.stack([1 - share, share]) * 2048).astype(np.int32)
    return np.stack([near, np.minimum(near + 1, length - 1)]), weights


def _resize_bicubic_cv2(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """cv2's half-pixel-centred INTER_CUBIC on uint8 `[H, W, 3]`, computed in float32, rounded and clamped."""
    planes = _to_planes(rgb)
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


# -------------------- models' tensors


def to_model_range(rgb: np.ndarray) -> torch.Tensor:
    """uint8 `[H, W, 3]` to the VAE's input: float32 `[1, 3, H, W]`, 2 * x / 255 - 1, contiguous."""
    return 2 * (_to_planes(rgb) / 255) - 1


def from_model_range(tensor: torch.Tensor) -> np.ndarray:
    """The VAE's output `[B, 3, H, W]`, -1..1 (clamped), to uint8 `[B, H, W, 3]`, rounded."""
    values = (tensor.detach().float() / 2 + 0.5).clamp(0, 1) * 255
    return values.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def clip_pixel_values(
    rgb_square: np.ndarray,
    image_size: int = 224,
    mean: tuple[float, float, float] = OPENAI_MEAN,
    std: tuple[float, float, float] = OPENAI_STD,
) -> torch.Tensor:
    """uint8 `[H, W, 3]` to the CLIP vision tower's input, float32 `[1, 3, image_size, image_size]`.

    Pillow BICUBIC on 8 bits until the shortest edge is `image_size`, centre crop, / 255, (x - mean) / std.
    Not torch's bicubic, which has another kernel and no antialiasing. (original: transformers'
    `CLIPImageProcessor` with its defaults)
    """
    height, width = rgb_square.shape[:2]
    short = min(height, width)
    height, width = int(image_size * height / short), int(image_size * width / short)
    resized = resize_bicubic(rgb_square, (height, width))
    top, left = (height - image_size) // 2, (width - image_size) // 2
    crop = resized[top : top + image_size, left : left + image_size]
    return (_to_planes(crop) / 255 - _per_channel(mean)) / _per_channel(std)


def depth_pixel_values(rgb_square: np.ndarray, size: int = 518) -> torch.Tensor:
    """uint8 square `[L, L, 3]` to Depth Anything's input as MimicBrush feeds it, float32 `[1, 3, size,
    size]`.

    The original normalises values of 0..255 with a mean and std meant for 0..1 and divides by 255
    afterwards, so that the mean is hardly subtracted; the model was trained with that, so it is kept. The
    resize stands for cv2 INTER_CUBIC on uint8 (one level off in 0.02 % of the values). Raises ArgumentError
    for a picture that is not square. (original: `run_gradio3_demo.infer_single`, the Depth Anything
    transform)
    """
    if rgb_square.shape[0] != rgb_square.shape[1]:
        raise ArgumentError(
            f"The depth input must be square, not {rgb_square.shape[1]} x {rgb_square.shape[0]}; pad it first."
        )
    resized = _resize_bicubic_cv2(rgb_square, size, size)
    # float64 until the division by 255, as NumPy does it in the original
    values = (resized.astype(np.float64) - np.array(DEPTH_MEAN)) / np.array(DEPTH_STD)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None].contiguous() / 255


def _to_planes(rgb: np.ndarray) -> torch.Tensor:
    """uint8 `[H, W, 3]` -> float32 `[1, 3, H, W]`, contiguous (channels-last strides cost precision on the
    CPU)."""
    return torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1)[None].contiguous()


def _per_channel(values: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


# -------------------- results


def restore_alpha(source: Picture, edited: np.ndarray, blend: np.ndarray) -> np.ndarray:
    """Give an edited picture uint8 `[H, W, 3]` the source's transparency back: `[H, W, 3]` or `[H, W, 4]`.

    `blend` uint8 `[H, W]` is how much of the edit each pixel took. Where it took none, colour and alpha are the
    source's own, also under full transparency; where it took some, the picture gets that much more opaque.
    """
    if source.alpha is None:
        return edited
    rgb = np.where(blend[..., None] == 0, source.rgb, edited)
    opacity = source.alpha + (255 - source.alpha.astype(np.uint16)) * blend // 255
    return np.dstack([rgb, opacity.astype(np.uint8)])


def save_png(path: str | os.PathLike, picture: np.ndarray | Image.Image, text: dict[str, str]) -> None:
    """Write a PNG with text entries: beside its place first, then renamed in one step, so that a failure leaves
    what was there.

    picture: uint8 `[H, W]`, `[H, W, 3]` or `[H, W, 4]`, float `[H, W]` in 0..1, or a Pillow image.
    Raises OSError.
    """
    path = Path(path)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            picture = np.rint(picture * 255).astype(np.uint8)
        picture = Image.fromarray(picture)
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with whole_file(path) as unfinished:
        picture.save(unfinished, format="PNG", pnginfo=info)
