"""A sheet to look at before training: pairs or segments, masks, and what each was drawn from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from ..images import cut_hole
from ..masks import precise_mask
from ..sheets import contact_sheet, show_mask
from .dataset import SampleNotes, TrainingPairs
from .samples import TrainingSample
from .segments import Segments

_SHOWN_LEVELS = (0, 2, 4)


def preview_sheet(pairs: TrainingPairs, indices: Iterable[int] = range(12), tile: int = 256) -> Image.Image:
    """One row per sample: source, reference, masked source; above it its kind, mask, SSIM and origin."""
    rows, titles = [], []
    for index in indices:
        sample, notes = pairs.draw(index)
        rows.append([sample.source, sample.reference, cut_hole(sample.source, sample.mask)])
        titles.append(_title(sample, notes))
    return contact_sheet(rows, ["source", "reference", "masked source"], tile, titles)


def segments_sheet(segments: Segments, numbers: Iterable[int] = range(12), tile: int = 256) -> Image.Image:
    """One row per segment: its picture, and its mask at the precisions 0, 2 and 4; above it its words."""
    rows, titles = [], []
    for number in numbers:
        segment = segments(number)
        ladder = [precise_mask(segment.mask.astype(np.float32), level) for level in _SHOWN_LEVELS]
        rows.append([segment.picture, *(show_mask(segment.picture, mask) for mask in ladder)])
        titles.append(f"{number}: {segment.text}, {segment.mask.mean():.0%}")
    return contact_sheet(rows, ["picture", *(f"precision {level}" for level in _SHOWN_LEVELS)], tile, titles)


def _title(sample: TrainingSample, notes: SampleNotes) -> str:
    pieces = [f"{sample.index}: {sample.kind}", f"mask: {notes.mask_kind}, {sample.mask.mean():.0%}"]
    if notes.matches is not None:
        pieces.append(f"{notes.matches} matched features")
    if notes.similarity is not None:
        pieces.append(f"SSIM {notes.similarity:.2f}")
    return ", ".join([*pieces, notes.origin])
