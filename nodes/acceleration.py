"""Acceleration."""

from __future__ import annotations

from comfy_api.latest import io

from ..mimicbrush_core.acceleration import Acceleration
from .schema import ACCELERATION, schema


class AccelerationNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushAcceleration",
            display_name="Acceleration",
            description=(
                "Trades a little exactness for speed, for edits of many steps. As it is, it changes nothing: raise "
                "what you want, and compare the pictures of one seed."
            ),
            search_aliases=["mimicbrush", "faster", "speed", "deepcache", "guidance interval", "turbo"],
            inputs=[
                io.Float.Input(
                    "guidance_start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="From which share of the steps on guidance acts. A step without guidance takes about half "
                    "the time.",
                ),
                io.Float.Input(
                    "guidance_end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Until which share of the steps guidance acts. The last steps need it least: try 0.8.",
                ),
                io.Int.Input(
                    "reference_every",
                    default=1,
                    min=1,
                    max=10,
                    tooltip="Looks at the reference anew in every k-th step. Saves time in the first edit with a "
                    "reference, and memory in all. Try 2.",
                ),
                io.Int.Input(
                    "deep_every",
                    default=1,
                    min=1,
                    max=10,
                    tooltip="Computes the model's deep blocks in every k-th step and only the outermost in between. "
                    "The largest saving, and the largest change: try 2.",
                ),
            ],
            outputs=[
                ACCELERATION.Output("acceleration", display_name="acceleration", tooltip="For Imitative Sampler.")
            ],
        )

    @classmethod
    def execute(cls, guidance_start, guidance_end, reference_every, deep_every) -> io.NodeOutput:
        acceleration = Acceleration(guidance_start, guidance_end, reference_every, deep_every)
        acceleration.check()
        return io.NodeOutput(acceleration)
