"""How few steps of each solver come how close to the 50-step DDIM result, from the same seed.

    python -m benchmarks.solvers                 the embedded model
    python -m benchmarks.solvers --weights MODEL --device cuda --dtype float16
    python -m benchmarks.solvers --small         few steps: does it run

Only a trained model makes an honest chart: the prediction of random weights has nothing to do with the noise in their
input, so what a solver would follow there is no denoising. The embedded model is trained, but small, on v-prediction
with a zero terminal SNR, and at a guidance of 1.2; the order of the solvers may be another with other weights, so give
yours. Distance: root mean square of the latents' difference under the mask, over that of the 50-step result; median
over the bundled examples.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import product

from torch import Tensor

from benchmarks.common import argument_parser, at_least_one, deliver, markdown_table, spread, started, whole_model
from mimicbrush_core.examples import EXAMPLES
from mimicbrush_core.references import ReferenceUse
from mimicbrush_core.sampling import SCHEDULERS, SPACINGS, initial_noise, make_scheduler
from mimicbrush_core.systems.mimicbrush import MimicBrush

YARDSTICK_STEPS, CONVERGED_STEPS = 50, 200
STEP_COUNTS = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50)
WITHIN = (0.2, 0.1, 0.05, 0.03)


class Scene:
    """One edit of a bundled example, sampled in many ways from the same noise."""

    def __init__(self, model: MimicBrush, example, guidance: float | None):
        source, mask, reference = example.render()
        self.model = model
        self.guidance = model.config["defaults"]["guidance"] if guidance is None else guidance
        self.condition = model.encode_source(source, mask)
        self.uses = [ReferenceUse(model.encode_reference(reference))]
        self.masked = self.condition.mask.expand_as(self.condition.hole_latents).cpu() > 0.5  # [1,4,h,w]
        self.yardstick = self.latents("ddim", None, YARDSTICK_STEPS)

    def latents(self, solver: str, spacing: str | None, steps: int, seed: int = 0) -> Tensor:
        """Those under the mask, [n]."""
        scheduler = make_scheduler(self.model.config["scheduler"], solver, steps, spacing)
        noise = initial_noise([seed], tuple(self.condition.hole_latents.shape[1:]))
        return self.model.sample(self.condition, self.uses, noise, scheduler, self.guidance).cpu()[self.masked]

    def distance(self, *way, **named) -> float:
        """Of `latents(*way)` to the yardstick."""
        return relative_distance(self.latents(*way, **named), self.yardstick)


def relative_distance(found: Tensor, yardstick: Tensor) -> float:
    """Root mean square of the difference, over the yardstick's."""
    return ((found - yardstick).square().mean() / yardstick.square().mean()).sqrt().item()


def curves(scenes: Sequence[Scene], spacings: Sequence[str], step_counts: Sequence[int]) -> list[dict]:
    """One record for each solver, spacing and number of steps."""
    return [
        {
            "solver": solver,
            "spacing": spacing,
            "steps": steps,
            "distance": spread([scene.distance(solver, spacing, steps) for scene in scenes]),
        }
        for solver, spacing, steps in product(SCHEDULERS, spacings, step_counts)
    ]


def fewest(points: Sequence[dict], solver: str, spacing: str, within: float) -> int | None:
    """The smallest number of steps from which on all measured ones are so close; None if even the most are not."""
    mine = sorted(
        (p["steps"], p["distance"]["median"]) for p in points if (p["solver"], p["spacing"]) == (solver, spacing)
    )
    found = None
    for steps, distance in reversed(mine):
        if not distance <= within:  # nor NaN
            break
        found = steps
    return found


def make_table(points: Sequence[dict], scale: dict[str, float]) -> str:
    ways = dict.fromkeys((point["solver"], point["spacing"]) for point in points)
    rows = [
        [f"{solver}, {spacing}", *(fewest(points, solver, spacing, w) or "-" for w in WITHIN)]
        for solver, spacing in ways
    ]
    table = markdown_table(["fewest steps within", *(f"{within:.0%}" for within in WITHIN)], rows)
    return table + "\n\n" + markdown_table(["for scale", "distance"], [[n, f"{d:.3f}"] for n, d in scale.items()])


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = argument_parser("solvers", __doc__)
    parser.add_argument("--weights", metavar="MODEL", help="a model file or folder (default: the embedded model)")
    parser.add_argument("--guidance", type=float, help="the model's own")
    parser.add_argument("--steps", type=at_least_one, nargs="+", default=STEP_COUNTS)
    parser.add_argument("--spacings", nargs="+", choices=SPACINGS, default=SPACINGS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    small, chosen.small = chosen.small, not chosen.weights  # here, a model without weights would be no model
    model = whole_model(chosen)
    facts = started(chosen, model.config["defaults"]["size"])
    facts["model"] = model.config["name"]
    own_spacing = model.config["scheduler"]["timestep_spacing"]
    examples, step_counts, spacings = EXAMPLES, chosen.steps, chosen.spacings
    if small:
        examples, step_counts, spacings = EXAMPLES[:1], (1, 2), (own_spacing,)

    scenes = [Scene(model, example, chosen.guidance) for example in examples]
    points = curves(scenes, spacings, step_counts)
    converged = CONVERGED_STEPS if not small else YARDSTICK_STEPS + 1
    scale = {
        f"DDIM with {converged} steps": spread([s.distance("ddim", None, converged) for s in scenes])["median"],
        "another seed": spread([s.distance("ddim", None, YARDSTICK_STEPS, seed=1) for s in scenes])["median"],
    }
    deliver(chosen, facts, make_table(points, scale), points=points, scale=scale, own_spacing=own_spacing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
