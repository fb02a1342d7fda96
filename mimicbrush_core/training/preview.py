"""A sheet to look at before training: pairs, masks, and what each was drawn from."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image

from ..images import cut_hole
from ..sheets import contact_sheet
from .dataset import SampleNotes, TrainingPairs
from .samples import TrainingSample


def preview_sheet(pairs: TrainingPairs, indices: Iterable[int] = range(12), tile: int = 256) -> Image.Image:
    """One row per sample: source, reference, masked source; above it its kind, mask, SSIM and origin."""
    rows, titles = [], []
    for index in indices:
        sample, notes = pairs.draw(index)
        rows.append([sample.source, sample.reference, cut_hole(sample.source, sample.mask)])
        titles.append(_title(sample, notes))
    return contact_sheet(rows, ["source", "reference", "masked source"], tile, titles)


def _title(sample: TrainingSample, notes: SampleNotes) -> str:
    pieces = [f"{sample.index}: {sample.kind}", f"mask: {notes.mask_kind}, {sample.mask.mean():.0%}"]
    if notes.matches is not None:
        pieces.append(f"{notes.matches} matched features")
    if notes.similarity is not None:
        pieces.append(f"SSIM {notes.similarity:.2f}")
    return ", ".join([*pieces, notes.origin])
