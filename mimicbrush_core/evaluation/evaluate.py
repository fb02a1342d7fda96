"""A model's answers to the held-out cases: with the right reference, with a wrong one, with none.

Answers are judged as decoded, before anything is pasted, at the model's own size; beside them stands the
autoencoder's rendering of the truth, the best that any sampler could hope for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from ..encoders import encode_pictures
from ..errors import ArgumentError
from ..modules import MIMICBRUSH, PAINT_BY_EXAMPLE
from ..references import Reference, ReferenceUse, write_features
from ..repaint import Repainter
from ..sampling import initial_noise
from ..systems.mimicbrush import MimicBrush, SourceCondition
from ..systems.paint_by_example import PaintByExample
from ..training.scenes import CLIP_LIKE, Difficulty
from .exemplars import exemplar_cases, exemplar_latents
from .metrics import masked_psnr, ssim
from .track import CASES, SETS, Case, check_count, check_sets, drawn_by_lot, held_out_cases

KINDS = ("right", "wrong", "none", "autoencoder")
"""What a case is answered with: its own reference, another's, nothing; and the autoencoder's bound."""

PICTURED = 6
"""From each set the pictures of this many cases are kept for a sheet."""


@dataclass(frozen=True)
class Score:
    """Over the masked pixels: psnr in dB, at most `metrics.PSNR_CAP`; ssim -1..1."""

    psnr: float
    ssim: float


@dataclass(frozen=True)
class Outcome:
    """One case answered. pictures: uint8 [S,S,3] for each of `KINDS`; scores: theirs."""

    case: Case
    pictures: dict[str, np.ndarray]
    scores: dict[str, Score]


@dataclass
class Results:
    """What an evaluation found, and under which settings.

    model: its name. size: side of the pictures in pixels; steps, guidance, scheduler: as sampled.
    to_picture: which cases of each set are pictured. scores: by set, one dictionary (`KINDS` -> Score) per case in
    order. pictured: by set, the outcomes of `to_picture`.
    """

    model: str
    size: int
    steps: int
    guidance: float
    scheduler: str
    to_picture: frozenset[int] = frozenset(range(PICTURED))
    scores: dict[str, list[dict[str, Score]]] = field(default_factory=dict)
    pictured: dict[str, list[Outcome]] = field(default_factory=dict)

    def values(self, set_name: str, kind: str, metric: str = "psnr") -> np.ndarray:
        """All cases' numbers of one kind (of `KINDS`) and metric ("psnr" or "ssim"), float64 [n]."""
        return np.array([getattr(scores[kind], metric) for scores in self.scores[set_name]], np.float64)

    def differences(self, set_name: str, kind: str, metric: str = "psnr") -> np.ndarray:
        """Right minus `kind`, case by case, float64 [n]."""
        return self.values(set_name, "right", metric) - self.values(set_name, kind, metric)

    def add(self, outcome: Outcome) -> None:
        """Take in the next case of its set."""
        name = outcome.case.set_name
        self.scores.setdefault(name, []).append(outcome.scores)
        if outcome.case.index in self.to_picture:
            self.pictured.setdefault(name, []).append(outcome)


def evaluate(
    model: MimicBrush,
    sets: Sequence[str] = SETS,
    n: int = CASES,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
    on_case: Callable[[Outcome], None] | None = None,
    difficulty: Difficulty = CLIP_LIKE,
) -> Results:
    """Answer and judge the first n cases (1..200) of each set of `track.SETS`.

    steps, guidance: None = the model's defaults. batch: cases at a time; the U-Net then sees up to 4 x batch
    rows, and the results do not depend on it. on_case: called after each case, in order; may raise to cancel.
    difficulty: how far the pairs' frames are apart.
    Depth is not given and noise has the case's index as its seed, the same for all three answers.
    """
    check_sets(sets, n)
    if batch < 1:
        raise ArgumentError(f"batch is {batch}; at least one case must be answered at a time.")
    results = replace(started(model, steps, guidance), to_picture=drawn_by_lot(n, PICTURED))
    for set_name in sets:
        add_judged(model, held_out_cases(set_name, n, results.size, difficulty), results, batch, on_case)
    return results


def evaluate_exemplars(
    model: PaintByExample,
    n: int = CASES,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
    on_case: Callable[[Outcome], None] | None = None,
) -> Results:
    """Answer and judge the first n cases of `exemplars.exemplar_cases`, as `evaluate` does."""
    check_count(n)
    results = replace(started(model, steps, guidance), to_picture=drawn_by_lot(n, 2 * PICTURED))
    add_judged(model, exemplar_cases(n, results.size), results, batch, on_case)
    return results


def started(model: Repainter, steps: int | None = None, guidance: float | None = None) -> Results:
    """Results of no case yet; steps, guidance: None = the model's defaults."""
    defaults = model.config["defaults"]
    return Results(
        model=model.config.get("name", ""),
        size=defaults["size"],
        steps=defaults["steps"] if steps is None else steps,
        guidance=defaults["guidance"] if guidance is None else guidance,
        scheduler=defaults["scheduler"],
    )


def add_judged(
    model: Repainter,
    cases: Iterable[Case],
    results: Results,
    batch: int,
    on_case: Callable[[Outcome], None] | None = None,
) -> None:
    """Answer and judge cases, `batch` at a time, and add them to `results`."""
    remaining = iter(cases)
    while some := list(islice(remaining, batch)):
        for outcome in _judged(some, answer(model, some, results.steps, results.guidance)):
            results.add(outcome)
            if on_case is not None:
                on_case(outcome)


def answer(model: Repainter, cases: Sequence[Case], steps: int, guidance: float) -> dict[str, np.ndarray]:
    """The model's unpasted pictures of B cases of its own size: {kind of `KINDS`: uint8 [B,S,S,3]}."""
    latents = _ANSWERERS[model.system](model, cases, steps, guidance)
    latents["autoencoder"] = encode_pictures(model.modules.vae, [case.truth for case in cases])
    return {kind: model.decode(latents[kind]) for kind in KINDS}


def _imitations(model: MimicBrush, cases: Sequence[Case], steps: int, guidance: float) -> dict[str, Tensor]:
    """Latents [B,4,h,w] of the answers with the right, a wrong and no reference."""
    condition = _conditions(model, cases)
    noise = initial_noise([case.index for case in cases], tuple(condition.hole_latents.shape[1:]))

    def sample(copies: int, references: list) -> Tensor:
        scheduler = model.own_scheduler(steps)
        repeated = _repeated(condition, copies)
        return model.sample(repeated, references, noise.repeat(copies, 1, 1, 1), scheduler, guidance)

    # Right and wrong go together: most pictures serve as both, and each is written once.
    wanted = [case.reference for case in cases] + [case.wrong_reference for case in cases]
    right, wrong = sample(2, [ReferenceUse(_PictureReferences.encode(model, wanted), 1.0)]).chunk(2)
    return {"right": right, "wrong": wrong, "none": sample(1, [])}


_ANSWERERS = {MIMICBRUSH: _imitations, PAINT_BY_EXAMPLE: exemplar_latents}


def score(picture: np.ndarray, case: Case) -> Score:
    """Judge an answer uint8 [S,S,3] against the case's truth, within its mask."""
    return Score(masked_psnr(picture, case.truth, case.mask), ssim(picture, case.truth, case.mask))


def _judged(cases: Sequence[Case], answers: dict[str, np.ndarray]) -> Iterator[Outcome]:
    for row, case in enumerate(cases):
        pictures = {kind: answers[kind][row].copy() for kind in KINDS}  # a view would keep the whole batch
        yield Outcome(case, pictures, {kind: score(picture, case) for kind, picture in pictures.items()})


# --- many cases at once ------------------------------------------------------------------------------------


def _conditions(model: MimicBrush, cases: Sequence[Case]) -> SourceCondition:
    return SourceCondition.of([model.encode_source(case.source, case.mask.astype(np.float32)) for case in cases])


def _repeated(condition: SourceCondition, copies: int) -> SourceCondition:
    tensors = (condition.mask, condition.hole_latents, condition.depth)
    return SourceCondition(*(tensor.repeat(copies, 1, 1, 1) for tensor in tensors))


@dataclass(eq=False)
class _PictureReferences(Reference):
    """A reference of its own for every row of a batch, for use with `MimicBrush.sample`.

    latents [R,4,h,w] of R different pictures; tokens [B,T,D] and rows [B]: the row's tokens and its picture's
    number. Features are written when a step asks for them, each picture once, and not kept.
    """

    rows: Tensor | None = None
    picture_tokens: Tensor | None = None  # [R,T,D]

    @classmethod
    def encode(cls, model: MimicBrush, pictures: Sequence[np.ndarray]) -> _PictureReferences:
        """One reference per row from pictures uint8 [H,W,3]; an array given twice is encoded once."""
        different = list({id(picture): picture for picture in pictures}.values())
        numbers = {id(picture): number for number, picture in enumerate(different)}
        rows = torch.tensor([numbers[id(picture)] for picture in pictures], device=model.device)
        encoded = [model.encode_reference(picture) for picture in different]
        tokens = torch.cat([one.tokens for one in encoded])
        latents = torch.cat([one.latents for one in encoded])
        return cls(latents, tokens[rows], owner=model, rows=rows, picture_tokens=tokens)

    def prepare(self, reference_unet: nn.Module, timesteps: Sequence[float], **_unused) -> None:
        """Nothing is written ahead: every timestep is asked for once."""

    def banks_at(self, reference_unet: nn.Module, timestep: float) -> dict[str, Tensor]:
        """The features of one timestep, {block name: [B,M,C]}."""
        timesteps = torch.full((len(self.latents),), float(timestep), device=self.latents.device)
        with torch.no_grad():
            banks = write_features(reference_unet, self.latents, timesteps, self.picture_tokens)
        return {name: bank[self.rows] for name, bank in banks.items()}
