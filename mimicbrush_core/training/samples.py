"""What a training sample is: the interface between the data and the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TrainingSample:
    """One imitation task: repaint `mask` of `source` by looking at `reference`. The target is the source itself.

    index: global number of the sample; with the seed it determines everything else.
    source, reference: uint8 [S,S,3], augmented.
    mask: bool [S,S], True = repaint; never empty.
    kind: "video" (two frames of one clip), "still" (a picture twice) or "drawn" (a procedural pair).
    """

    index: int
    source: np.ndarray
    reference: np.ndarray
    mask: np.ndarray
    kind: str
