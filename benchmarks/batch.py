"""What a picture costs in a batch of N with one reference, beside N edits of their own.

    python -m benchmarks.batch                   random weights of SD-1.5 sizes, 512 px, 2 steps, up to 4 pictures
    python -m benchmarks.batch --small           the embedded model with its own settings
    python -m benchmarks.batch --device cuda --dtype float16 --steps 20 --counts 1 4 8 16

Every picture has a mask of its own. `separate` encodes the reference for each picture; `one reference` gives all edits
the same encoded one; the batches take so many pictures at once and encode it once, too.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.common import (
    CLOCKS,
    MIB,
    SEED,
    Variant,
    argument_parser,
    at_least_one,
    deliver,
    markdown_table,
    random_pictures,
    ratios,
    spread,
    spread_text,
    square_mask,
    started,
    time_rounds,
    whole_model,
)
from benchmarks.edit import peak_memory, reset_peak_memory
from mimicbrush_core.systems.mimicbrush import EditSettings, MimicBrush

SEPARATE, ONE_REFERENCE = "separate", "one reference"
AT_ONCE = (1, 4, 8)


class BatchRuns:
    """The ways to edit `count` pictures, each a function that returns them uint8 [count,S,S,3]."""

    def __init__(self, model: MimicBrush, count: int, size: int, steps: int | None, at_once: Sequence[int]):
        self.model, self.count, self.size = model, count, size
        *sources, self.reference_picture = random_pictures(count + 1, size)
        self.sources = np.stack(sources)
        self.mask_list = np.stack([square_mask(size, shift=index * size // (4 * count)) for index in range(count)])
        self.steps = steps
        self.ways: dict[str, Callable[[], np.ndarray]] = {SEPARATE: self.separate, ONE_REFERENCE: self.one_reference}
        self.ways |= {f"{size} at once": lambda size=size: self.batch(size) for size in at_once if size <= count}

    def settings(self, **values) -> EditSettings:
        return EditSettings(seed=SEED, size=self.size, steps=self.steps, **values)

    def separate(self) -> np.ndarray:
        return self._edits(self.reference_picture)

    def one_reference(self) -> np.ndarray:
        return self._edits(self.model.encode_reference(self.reference_picture, self.size))

    def _edits(self, reference) -> np.ndarray:
        pairs = zip(self.sources, self.mask_list, strict=True)
        return np.stack([self.model.edit(*pair, reference, self.settings()).picture for pair in pairs])

    def batch(self, at_once: int) -> np.ndarray:
        sources, mask_list = torch.from_numpy(self.sources).float() / 255, torch.from_numpy(self.mask_list)
        result = self.model.edit_batch(sources, mask_list, self.reference_picture, self.settings(at_once=at_once))
        return (result.pictures * 255).round().byte().numpy()


def measure(runs: BatchRuns, chosen: Namespace) -> list[dict]:
    """One record per way: seconds a picture, their ratio to separate edits, what the pictures differ from theirs by."""
    runs.model.compute_constants()
    pictures, peaks = {}, {}
    for name, way in runs.ways.items():  # this also warms up
        reset_peak_memory(chosen.device)
        pictures[name] = way()
        peaks[name] = peak_memory(chosen.device)
    variants = {name: Variant(way) for name, way in runs.ways.items()}
    seconds = time_rounds(variants, chosen.rounds, chosen.device, CLOCKS[chosen.clock])
    return [
        {
            "pictures": runs.count,
            "way": name,
            "seconds": spread([taken / runs.count for taken in seconds[name]]),
            "ratio": spread(ratios(seconds, name, SEPARATE)),
            "levels": int(np.abs(pictures[name].astype(int) - pictures[SEPARATE]).max()),
            "peak": peaks[name],
        }
        for name in runs.ways
    ]


def make_table(found: Sequence[dict]) -> str:
    header = ["pictures", "way", "seconds a picture (min..max)", "of separate", "levels of 255 off", "peak MiB"]
    rows = [
        [
            one["pictures"],
            one["way"],
            spread_text(one["seconds"]),
            spread_text(one["ratio"]),
            one["levels"],
            "" if one["peak"] is None else f"{one['peak'] / MIB:.0f}",
        ]
        for one in found
    ]
    return markdown_table(header, rows)


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = argument_parser("batch", __doc__, rounds=3)
    parser.add_argument("--counts", type=at_least_one, nargs="+", help="pictures: 1 2 4; small: 1 2 4 8")
    parser.add_argument("--at-once", type=at_least_one, nargs="+", default=AT_ONCE)
    parser.add_argument("--steps", type=at_least_one, help="2; small: the model's own")
    parser.add_argument("--weights", metavar="MODEL", help="a model file or folder instead of random weights")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    model = whole_model(chosen)
    size = chosen.size or model.config["defaults"]["size"]
    counts = chosen.counts or ([1, 2, 4, 8] if chosen.small else [1, 2, 4])
    steps = chosen.steps or (None if chosen.small else 2)
    facts = started(chosen, size)
    facts["steps"] = steps or model.config["defaults"]["steps"]

    found = []
    for count in counts:
        found += measure(BatchRuns(model, count, size, steps, chosen.at_once), chosen)
    deliver(chosen, facts, make_table(found), batches=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
