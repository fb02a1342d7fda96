"""Where training pairs come from: videos, folders of frames, and still pictures with their segmentation maps.

Listing is sorted, so that a number means the same clip on every machine that holds the same files. Nothing is
decoded before it is drawn, and of a video only what lies between a key frame and the drawn one.

What cannot be read raises Unreadable; whoever draws goes on to the next clip (`pair_selection`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ArgumentError, PictureError
from ..images import read_picture
from .extras import require

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".gif")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SEGMENTATION_ENDING = ".seg.png"

LONGEST_GAP_SECONDS = 10.0
"""Two frames of one clip are at most that far apart: beyond, a long video hardly shows the same things."""
LONGEST_GAP_FRAMES = 250
"""The same for folders of frames, whose rate is not known (10 s at 25 frames a second)."""


class Unreadable(Exception):
    """A file cannot give what was drawn from it; the message says why. Never reaches a user as it is."""


@dataclass(frozen=True)
class Clip:
    """One moving scene: a video file, or (`frames` given) a folder with its pictures in order."""

    path: Path
    frames: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Still:
    """A picture, and the segmentation map beside it (name.jpg, name.seg.png) if there is one."""

    path: Path
    segmentation: Path | None = None


@dataclass(frozen=True)
class OpenClip:
    """frames: how many there are (of a video: by its length and rate); longest_gap: between two drawn ones;
    read: frame number -> picture uint8 [H,W,3], upright."""

    frames: int
    longest_gap: int
    read: Callable[[int], np.ndarray]


# --- listing -----------------------------------------------------------------------------------------------


def list_videos(folders: Sequence[Path]) -> list[Clip]:
    """All videos in the folders and below, sorted; a video file itself may be given too."""
    return [Clip(path) for folder in folders for path in _files(folder, VIDEO_ENDINGS, "videos")]


def list_frame_folders(folders: Sequence[Path]) -> list[Clip]:
    """All folders, given or below, that hold at least two pictures: each is a clip, its frames in natural order."""
    clips = []
    for folder in folders:
        by_parent: dict[Path, list[Path]] = {}
        for path in _files(folder, PICTURE_ENDINGS, "frames"):
            by_parent.setdefault(path.parent, []).append(path)
        found = [Clip(parent, tuple(paths)) for parent, paths in by_parent.items() if len(paths) > 1]
        if not found:
            raise ArgumentError(f"No folder in {folder} holds two frames. Give one sub-folder of frames per clip.")
        clips += found
    return clips


def list_stills(folders: Sequence[Path]) -> list[Still]:
    """All pictures in the folders and below, sorted, each with its segmentation map where there is one."""
    stills = []
    for folder in folders:
        for path in _files(folder, PICTURE_ENDINGS, "pictures"):
            if not path.name.endswith(SEGMENTATION_ENDING):
                beside = path.with_suffix(SEGMENTATION_ENDING)
                stills.append(Still(path, beside if beside.is_file() else None))
    return stills


def _files(folder: Path, endings: Sequence[str], what: str) -> list[Path]:
    """Files below a folder with one of the endings, sorted; hidden ones (also of macOS, "._name") are left out."""
    folder = Path(folder)
    if folder.is_file() and folder.suffix.lower() in endings:
        return [folder]
    if not folder.is_dir():
        raise ArgumentError(f"The folder of {what} {folder} does not exist or is no folder. Check the path.")
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if not found:
        raise ArgumentError(f"The folder {folder} holds no {what} (looked for {', '.join(endings)}).")
    return sorted(found, key=lambda path: _natural(path.relative_to(folder)))


def _natural(path: Path) -> tuple:
    """A key that puts frame 10 after frame 9."""
    text = path.as_posix()
    return [(piece.isdigit(), int(piece) if piece.isdigit() else piece) for piece in re.split(r"([0-9]+)", text)], text


# --- reading -----------------------------------------------------------------------------------------------


@contextmanager
def opened(clip: Clip) -> Iterator[OpenClip]:
    """The clip ready to be read; Unreadable for a file that is no video, is damaged, or has fewer than two frames."""
    if clip.frames:
        yield OpenClip(len(clip.frames), LONGEST_GAP_FRAMES, lambda number: _read_still(clip.frames[number]))
        return
    av = require("av", "Reading videos")
    try:
        with av.open(str(clip.path), metadata_errors="ignore") as container:
            yield _open_video(container)
    except (av.FFmpegError, OSError) as error:
        raise Unreadable(str(error)) from error


def _open_video(container) -> OpenClip:
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise Unreadable("there is no video in it that can be decoded")
    stream.codec_context.thread_count = 1  # the data workers are the parallelism
    # Some streams tell at their start only how they are to be decoded (x264's 4:4:4): always begin there, then seek.
    if next(container.decode(stream), None) is None:
        raise Unreadable("there is no frame in it")
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    frames = round(_length(container, stream) * rate)
    if frames < 2:
        raise Unreadable("it has fewer than two frames")
    longest_gap = max(1, int(LONGEST_GAP_SECONDS * rate))
    return OpenClip(frames, longest_gap, lambda number: _read_video_frame(container, stream, number / rate))


def _length(container, stream) -> float:
    """Seconds; where neither stream nor container says it (as browsers record), the packets' times do."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / 1e6
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    return float((max(ends) - (stream.start_time or 0)) * stream.time_base) if ends else 0.0


def _read_video_frame(container, stream, seconds: float) -> np.ndarray:
    """The first frame that is shown at or after a time from the video's start, or the last there is."""
    wanted = (stream.start_time or 0) + round(seconds / stream.time_base)
    container.seek(wanted, stream=stream)
    found = None
    for frame in container.decode(stream):
        found = frame
        if frame.pts is None or frame.pts >= wanted:
            break
    if found is None or found.is_corrupt:
        raise Unreadable(f"its frame at {seconds:.2f} s cannot be decoded")
    # Phones store what they film sideways, and how to turn it.
    quarter_turns = round(found.rotation / 90)
    return np.ascontiguousarray(np.rot90(found.to_ndarray(format="rgb24"), quarter_turns))


def read_still(still: Still) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture uint8 [H,W,3] (laid on white where transparent), and its labels int32 [H,W] or None.

    Every colour of the segmentation map is a segment (its label is the colour as one number); black, index 0 of
    the usual palettes, and what is transparent belongs to none (label 0).
    """
    picture = _read_still(still.path)
    if still.segmentation is None:
        return picture, None
    try:
        drawn = read_picture(still.segmentation, "segmentation")
    except PictureError as error:
        raise Unreadable(str(error)) from error
    if drawn.rgb.shape != picture.shape:
        raise Unreadable(
            f"its segmentation map {still.segmentation.name} is {drawn.size[0]} x {drawn.size[1]} pixels, "
            f"the picture {picture.shape[1]} x {picture.shape[0]}"
        )
    labels = drawn.rgb.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    if drawn.alpha is not None:
        labels[drawn.alpha == 0] = 0
    return picture, labels


def _read_still(path: Path) -> np.ndarray:
    try:
        return read_picture(path, "training").over_white()
    except PictureError as error:
        raise Unreadable(str(error)) from error


def square_window(array: np.ndarray, place: float) -> np.ndarray:
    """The largest square of a picture or map [H,W,...], a copy; place 0..1 is where along the long side."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = round(place * (height - side)), round(place * (width - side))
    return array[top : top + side, left : left + side].copy()
