"""Pictures with a masked object and words for it, from the artist's own folder or a data set of instances.

A segment is a function of the seed and its number: which instance it shows, where it is cropped, whether it is
mirrored, and which of its two texts goes with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ArgumentError, PictureError
from ..images import read_mask, resize_lanczos
from ..masks import THRESHOLD, binarize, bounding_box
from .frames import PICTURE_ENDINGS, Still, Unreadable, list_stills, read_still
from .pair_selection import first_of

logger = logging.getLogger(__name__)

SMALLEST_SHARE, LARGEST_SHARE = 0.02, 0.6
"""Objects that cover less or more of their picture are left out."""

_CONTEXT = 1.2  # a crop's side is at least that many times the object's longest
_KEY = 0x5E6  # first number of this module's random streams
_SIDES = {"left", "right"}  # what is said of them is not true of the mirrored picture


@dataclass(frozen=True)
class Segment:
    """picture uint8 [S,S,3]; mask bool [S,S]: the object's own pixels, never empty; text: what it is."""

    picture: np.ndarray
    mask: np.ndarray
    text: str


@dataclass(frozen=True)
class Instance:
    """A masked object of a picture file, not read yet.

    read_mask() -> bool [H,W] of the picture's size; may raise Unreadable. label: its class; caption: a phrase for it.
    """

    path: Path
    read_mask: Callable[[], np.ndarray]
    label: str
    caption: str | None = None


class Segments:
    """Segments of `size` pixels by their number, without end, drawn from instances.

    Raises ArgumentError where there is no instance; while drawing, PictureError where none can be read. Those that
    cannot are passed over, with one warning for each file.
    """

    def __init__(self, instances: Sequence[Instance], size: int, seed: int = 0):
        if not instances:
            raise ArgumentError(
                f"There is no object to learn from: none covers {SMALLEST_SHARE:.0%} to {LARGEST_SHARE:.0%} of its "
                "picture and fits into a square of it."
            )
        self.instances, self.size, self.seed = tuple(instances), size, seed
        self._warned: set[Path] = set()

    def __call__(self, number: int) -> Segment:
        rng = np.random.default_rng((self.seed, _KEY, number))
        instance, picture, mask = first_of(rng, self.instances, _read, self._warn, limit=1)
        picture, mask = _cropped(rng, picture, mask, self.size)
        described = instance.caption is not None and rng.random() < 0.5
        text = instance.caption if described else instance.label
        if rng.random() < 0.5 and not _SIDES & set(text.lower().split()):
            picture, mask = np.ascontiguousarray(picture[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
        return Segment(picture, mask, text)

    def _warn(self, path: Path, reason: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("%s is passed over in training: %s", path, reason)


def is_fit(area: float, longest: float, height: int, width: int) -> bool:
    """Whether an object of `area` pixels, its box `longest` at most, is worth learning in a picture of that size."""
    return SMALLEST_SHARE <= area / (height * width) <= LARGEST_SHARE and longest <= min(height, width)


def list_segment_folder(folder: Path) -> list[Instance]:
    """The objects of a folder with `image/NAME.*`, `mask/NAME.png` (white = the object) and `text/NAME.txt`.

    A text's first line is the object's class, its second, if there is one, a caption. Every mask is read once, to
    leave out what is too small or too large. Raises ArgumentError for a folder or file that is missing or empty,
    PictureError for a mask that cannot be read.
    """
    folder = Path(folder)
    instances = []
    for still in list_stills([folder / "image"]):
        name = still.path.relative_to(folder / "image")
        label, caption = _texts(_beside(folder / "text" / name, (".txt",)))
        mask = _MaskFile(_beside(folder / "mask" / name, PICTURE_ENDINGS))
        hole = mask()
        if hole.any() and is_fit(hole.sum(), _longest(hole), *hole.shape):
            instances.append(Instance(still.path, mask, label, caption))
        else:
            logger.info("%s is left out: its object covers %.1f %% of it", still.path, 100 * hole.mean())
    return instances


@dataclass(frozen=True)
class _MaskFile:
    path: Path

    def __call__(self) -> np.ndarray:
        return binarize(read_mask(self.path))


def _beside(path: Path, endings: Sequence[str]) -> Path:
    """The file of that name with one of the endings. Raises ArgumentError."""
    for ending in endings:
        if path.with_suffix(ending).is_file():
            return path.with_suffix(ending)
    raise ArgumentError(
        f"There is no {path.with_suffix(endings[0])}. Give each picture in `image` a mask and a text of its name."
    )


def _texts(path: Path) -> tuple[str, str | None]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ArgumentError(f"{path} is empty. Write what the picture's object is in its first line.")
    return lines[0], lines[1] if len(lines) > 1 else None


def _read(instance: Instance) -> tuple[Instance, np.ndarray, np.ndarray]:
    """An instance, its picture uint8 [H,W,3] and mask bool [H,W]. Raises Unreadable."""
    picture, _ = read_still(Still(instance.path))
    try:
        mask = instance.read_mask()
    except PictureError as error:
        raise Unreadable(str(error)) from error
    if mask.shape != picture.shape[:2]:
        raise Unreadable(
            f"its mask is {mask.shape[1]} x {mask.shape[0]} pixels, the picture {picture.shape[1]} x {picture.shape[0]}"
        )
    if not mask.any() or not is_fit(mask.sum(), _longest(mask), *mask.shape):
        raise Unreadable(f"the mask of its object {instance.label!r} covers {mask.mean():.1%} of it, or is too long")
    return instance, picture, mask


def _longest(mask: np.ndarray) -> int:
    box = bounding_box(mask)
    return max(box.width, box.height)


def _cropped(
    rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A random square around the whole object, uint8 [size,size,3] and bool [size,size]."""
    height, width = mask.shape
    box, short = bounding_box(mask), min(height, width)
    side = int(rng.integers(min(short, math.ceil(_CONTEXT * max(box.width, box.height))), short + 1))
    top, left = _start(rng, box.y, box.height, side, height), _start(rng, box.x, box.width, side, width)
    window = slice(top, top + side), slice(left, left + side)
    small = resize_lanczos(mask[window].astype(np.uint8) * np.uint8(255), size) > THRESHOLD
    return resize_lanczos(np.ascontiguousarray(picture[window]), size), small


def _start(rng: np.random.Generator, first: int, length: int, side: int, limit: int) -> int:
    """Where a stretch of `side` begins that holds first .. first + length and lies within 0..limit."""
    return int(rng.integers(max(0, first + length - side), min(first, limit - side) + 1))
