"""The opt-in accelerations the benchmarks know, one line of a table each.

`step --accelerate NAME` times those that one step of the U-Nets alone can show, `edit --accelerate NAME` all of them,
each beside the exact path; both say what it changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mimicbrush_core.acceleration import Acceleration
from mimicbrush_core.systems.mimicbrush import MimicBrush


@dataclass(frozen=True)
class OptIn:
    """settings: of `EditSettings`, for what changes the loop. prepare: changes a model of its own, for what changes
    how the networks run. in_step: whether one step of the U-Nets alone shows it."""

    settings: Mapping[str, object] = field(default_factory=dict)
    prepare: Callable[[MimicBrush], None] | None = None
    in_step: bool = False

    def applied(self, model: MimicBrush) -> MimicBrush:
        """The model itself, or a prepared copy with weights of its own."""
        if self.prepare is None:
            return model
        model = copy.deepcopy(model)
        self.prepare(model)
        return model


def _approximate(**values) -> OptIn:
    return OptIn({"acceleration": Acceleration(**values)})


def _optimize(**switches) -> OptIn:
    return OptIn(prepare=lambda model: model.optimize(**switches), in_step="vae_tiling" not in switches)


OPT_INS: dict[str, OptIn] = {
    "compiled": _optimize(compiled=True),
    "channels_last": _optimize(channels_last=True),
    "tiled_vae": _optimize(vae_tiling=True),
    "guidance_to_0.8": _approximate(guidance_end=0.8),
    "reference_every_2": _approximate(reference_every=2),
    "deep_every_2": _approximate(deep_every=2),
    "dpmpp_2m_20": OptIn({"scheduler": "dpmpp_2m", "steps": 20}),
}
