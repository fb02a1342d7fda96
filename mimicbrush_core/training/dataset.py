"""The stream of training samples: sample i is a function of the seed and i, and of nothing else.

Not of the number of workers or processes, of the order of asking, or of what was drawn before. So a run resumes by
asking for the next index, and two processes draw what one would have drawn. Everything random of a sample comes from
generators keyed by (seed, i, purpose).

Kinds and their shares (arXiv 2406.07547, section 3.3): 70 % pairs of video frames, 30 % still pictures paired with
themselves, both augmented strongly and each side on its own; and, if wanted, procedural pairs beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import ArgumentError
from .augmentation import augment, is_mirrored, warp_labels
from .extras import require
from .frames import Clip, Still, list_frame_folders, list_stills, list_videos, read_still, square_window
from .hole_masks import draw_mask, grid_mask, segment_mask, stroke_mask
from .matching import marked_pixels, opencv, shared_features
from .pair_selection import SSIM_BOUNDS, find_pair, first_of
from .samples import TrainingSample
from .scenes import CLIP_LIKE, HELD_OUT_SEED, Difficulty, render_pair

logger = logging.getLogger(__name__)

_KIND, _PAIR, _SOURCE, _REFERENCE, _MASK = range(5)  # the purposes of a sample's generators


@dataclass(frozen=True)
class DataSettings:
    """What is drawn, and how.

    size: side of the pictures. seed: another one, other samples.
    stills_share: of the samples from files, where there are both clips and stills.
    drawn_share: procedural pairs, of all samples; without any files all are.
    strokes_share: free-form strokes instead of grids and segments, of the samples from files. The paper has none of
    them, but it is what artists paint.
    strength: of the augmentation, 0..1; difficulty: of procedural pairs. Either may be a function of the sample's
    index, so that they grow with the samples seen.
    ssim_bounds: see `pair_selection`.
    """

    size: int = 512
    seed: int = 0
    stills_share: float = 0.3
    drawn_share: float = 0.0
    strokes_share: float = 0.2
    strength: float | Callable[[int], float] = 1.0
    difficulty: Difficulty | Callable[[int], Difficulty] = CLIP_LIKE
    ssim_bounds: tuple[float, float] = SSIM_BOUNDS

    def __post_init__(self) -> None:
        if self.size < 16 or self.seed < 0:
            raise ArgumentError(f"Size {self.size} and seed {self.seed} were given; 16 and 0 are the least.")
        shares = {name: getattr(self, name) for name in ("stills_share", "drawn_share", "strokes_share")}
        for name, value in {**shares, "strength": 0.0 if callable(self.strength) else self.strength}.items():
            if not 0 <= value <= 1:
                raise ArgumentError(f"The setting {name} is {value}. Choose a number from 0 to 1.")
        low, high = self.ssim_bounds
        if not -1 <= low < high <= 1:
            raise ArgumentError(f"The SSIM bounds are {low} and {high}. Choose two rising numbers from -1 to 1.")


@dataclass(frozen=True)
class SampleNotes:
    """Where a sample came from, for people: the file or class, the kind of mask, and the frames' SSIM (None: not
    two frames), the number of features that source and reference share (None: not looked for)."""

    origin: str
    mask_kind: str
    similarity: float | None = None
    matches: int | None = None


class TrainingPairs(Dataset):
    """Samples by their global index, without end.

    Raises ArgumentError where the files need a package of the extra `train` that is missing; while drawing,
    PictureError where no file can be read or no pair is usable. Unreadable files are passed over, with one warning
    each.
    """

    def __init__(self, clips: Sequence[Clip] = (), stills: Sequence[Still] = (), settings: DataSettings | None = None):
        self.clips, self.stills = tuple(clips), tuple(stills)
        self.settings = settings or DataSettings()
        if any(not clip.frames for clip in self.clips):
            require("av", "Reading videos")
        if self.clips or self.stills:
            opencv()
        paths = [item.path for item in (*self.clips, *self.stills)]
        self._numbers = {path: number for number, path in enumerate(paths)}
        # In shared memory: whichever data worker meets a damaged file first warns for all of them.
        self._warned = torch.zeros(max(1, len(paths)), dtype=torch.bool).share_memory_()

    def __getitem__(self, index: int) -> TrainingSample:
        return self.draw(index)[0]

    def draw(self, index: int) -> tuple[TrainingSample, SampleNotes]:
        """The sample with this number, and notes about it for people."""
        kind = self._kind(index)
        if kind == "drawn":
            return self._draw_procedural(index)
        return self._draw_video(index) if kind == "video" else self._draw_still(index)

    def _kind(self, index: int) -> str:
        among_all, among_files = self._generator(index, _KIND).random(2)
        if not (self.clips or self.stills) or among_all < self.settings.drawn_share:
            return "drawn"
        if self.clips and self.stills:
            return "still" if among_files < self.settings.stills_share else "video"
        return "video" if self.clips else "still"

    def _draw_procedural(self, index: int) -> tuple[TrainingSample, SampleNotes]:
        """Not augmented: pose and light are the scene's own, as far apart as the difficulty says."""
        scene = int(self._generator(index, _PAIR).integers(HELD_OUT_SEED))
        pair = render_pair(scene, self.settings.size, _at(self.settings.difficulty, index))
        mask = draw_mask(self._generator(index, _MASK), pair.parts)
        sample = TrainingSample(index, pair.source, pair.reference, mask, "drawn")
        return sample, SampleNotes(pair.class_name, "scene")

    def _draw_video(self, index: int) -> tuple[TrainingSample, SampleNotes]:
        pair = find_pair(self._generator(index, _PAIR), self.clips, self._warn, self.settings.ssim_bounds)
        return self._augmented(index, "video", pair.path, pair.source, pair.reference, None, pair.similarity)

    def _draw_still(self, index: int) -> tuple[TrainingSample, SampleNotes]:
        """A picture paired with itself: only the augmentation makes the two differ."""
        rng = self._generator(index, _PAIR)
        still, (picture, labels) = first_of(
            rng, self.stills, lambda still: (still, read_still(still)), self._warn, limit=1
        )
        place = rng.random()
        picture = square_window(picture, place)
        labels = None if labels is None else square_window(labels, place)
        return self._augmented(index, "still", still.path, picture, picture, labels, None)

    def _augmented(
        self,
        index: int,
        kind: str,
        path: Path,
        source: np.ndarray,
        reference: np.ndarray,
        labels: np.ndarray | None,
        similarity: float | None,
    ) -> tuple[TrainingSample, SampleNotes]:
        """Source and reference augmented, each by its own generator, and the mask that fits what they then show."""
        size, strength = self.settings.size, _at(self.settings.strength, index)
        source, warp = augment(self._generator(index, _SOURCE), source, size, strength)
        reference, other_warp = augment(self._generator(index, _REFERENCE), reference, size, strength)
        rng, mask, matches = self._generator(index, _MASK), None, None
        if rng.random() < self.settings.strokes_share:
            mask_kind, mask = "strokes", stroke_mask(rng, size)
        elif labels is not None:
            mask_kind, mask = "segments", segment_mask(rng, warp_labels(labels, warp, size))
        if mask is None:
            points = shared_features(source, reference, is_mirrored(warp) != is_mirrored(other_warp))
            mask_kind, mask, matches = "grid", _grid(rng, marked_pixels(points, size)), len(points)
        notes = SampleNotes(path.name, mask_kind, similarity, matches)
        return TrainingSample(index, source, reference, mask, kind), notes

    def _generator(self, index: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, index, purpose))

    def _warn(self, path: Path, reason: str) -> None:
        number = self._numbers[path]
        if not self._warned[number]:
            self._warned[number] = True
            logger.warning("%s is passed over in training: %s", path, reason)


def _grid(rng: np.random.Generator, matched: np.ndarray) -> np.ndarray:
    """A grid mask that is not empty (one in some thousands is, and would teach nothing)."""
    while True:
        mask = grid_mask(rng, matched)
        if mask.any():
            return mask


def _at(value, index: int):
    return value(index) if callable(value) else value


def pairs_from_folders(
    videos: Sequence[Path] = (),
    frames: Sequence[Path] = (),
    stills: Sequence[Path] = (),
    settings: DataSettings | None = None,
) -> TrainingPairs:
    """The samples that folders give: of videos, of frames (one sub-folder per clip), of still pictures.

    ArgumentError for a folder that does not exist or holds nothing of its kind.
    """
    return TrainingPairs(list_videos(videos) + list_frame_folders(frames), list_stills(stills), settings)


# --- feeding a trainer -------------------------------------------------------------------------------------


def share_of(start: int, stop: int, rank: int = 0, world: int = 1) -> range:
    """The indices of one of `world` processes: every world-th, so that one step of all of them together covers the
    same indices as one step of a single process with the batch `world` times as large."""
    if not 0 <= rank < world:
        raise ArgumentError(f"Rank {rank} of {world} processes does not exist; ranks are 0 to {world - 1}.")
    return range(start + rank, stop, world)


def sample_loader(pairs: TrainingPairs, indices: Iterable[int], batch: int, workers: int = 0, **options) -> DataLoader:
    """Batches (lists of TrainingSample) of the indices in their order, drawn by `workers` processes beside.

    `indices` is gone through lazily: a `range` to the end of a run costs nothing. options: of the DataLoader.
    """
    return DataLoader(pairs, batch, sampler=indices, num_workers=workers, collate_fn=list, **options)
