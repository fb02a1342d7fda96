"""Paint by Example on held-out cases: does the region take the exemplar's look?

The scenes are those of the track's set "objects"; the exemplar is the object cut out of the other frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..masks import bounding_box
from ..sampling import initial_noise
from ..systems.paint_by_example import Exemplar, PaintByExample, SourceCondition
from ..training.hole_masks import loose_mask
from ..training.scenes import CLIP_LIKE, FramePair, render_pair
from .track import CASES, Case, scene_seed

SET = "objects"
"""The set of the track whose scenes are used."""


def exemplar_cases(n: int = CASES, size: int = 128) -> Iterator[Case]:
    """The first n cases, as pictures of size x size pixels; `reference` is the exemplar, of any shape.

    The mask is one of those the model learns from, drawn by the case's index. A case's wrong exemplar is the very
    array that is the next case's own.
    """
    pair, exemplar = _draw(0, size)
    for index in range(n):
        following, wrong = _draw((index + 1) % CASES, size)
        mask = loose_mask(np.random.default_rng((scene_seed(SET, index), 1)), pair.parts > 0)
        yield Case(SET, index, scene_seed(SET, index), pair.source, mask, exemplar, wrong, pair.source)
        pair, exemplar = following, wrong


def object_crop(picture: np.ndarray, thing: np.ndarray, room: int = 1) -> np.ndarray:
    """What an artist gives as an exemplar: the box of an object bool [S,S], with `room` pixels around it."""
    return picture[bounding_box(thing).grown(room, *thing.shape).slices]


def exemplar_latents(model: PaintByExample, cases: Sequence[Case], steps: int, guidance: float) -> dict[str, Tensor]:
    """Latents [B,4,h,w] of the answers with the right, a wrong and no exemplar."""
    condition = SourceCondition.of([model.encode_source(case.source, case.mask.astype(np.float32)) for case in cases])
    noise = initial_noise([case.index for case in cases], tuple(condition.hole_latents.shape[1:]))

    def sample(token: Tensor) -> Tensor:
        scheduler = model.own_scheduler(steps)
        return model.sample(condition, Exemplar(token, model), noise, scheduler, guidance)

    def tokens(pictures: Sequence[np.ndarray]) -> Tensor:
        return torch.cat([model.encode_exemplar(picture).token for picture in pictures])

    return {
        "right": sample(tokens([case.reference for case in cases])),
        "wrong": sample(tokens([case.wrong_reference for case in cases])),
        "none": sample(model.unconditional_token),
    }


def _draw(index: int, size: int) -> tuple[FramePair, np.ndarray]:
    """A scene and the exemplar that its other frame gives."""
    pair = render_pair(scene_seed(SET, index), size, CLIP_LIKE)
    return pair, object_crop(pair.reference, pair.reference_parts > 0)
