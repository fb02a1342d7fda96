"""Depth Condition."""

from __future__ import annotations

from comfy_api.latest import io

from ..mimicbrush_core.editing import eight_bit_pictures
from .host import LoadedMimicBrush, TaskProgress
from .schema import DEPTH, MODEL, check_choice, schema

NEAR = ["near is white", "near is black"]


class DepthConditionNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushDepthCondition",
            display_name="Depth Condition",
            description=(
                "Keeps the shape under the mask by its depth, so that only the material changes (texture transfer). "
                "The depth is what the model's own network sees in the source, or a depth picture of yours."
            ),
            search_aliases=["mimicbrush", "keep shape", "texture transfer", "depth anything", "depth lock"],
            inputs=[
                MODEL.Input("model", tooltip="From Load MimicBrush."),
                io.Image.Input(
                    "source",
                    tooltip="The picture whose shapes are kept: the sampler's source, or the same picture before it "
                    "was damaged. It must show the shape under the mask, not a hole.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="1: the shape is kept as well as the model can. 0: as without this node.",
                ),
                io.Combo.Input(
                    "depth_reads",
                    options=NEAR,
                    default=NEAR[0],
                    tooltip="How your depth picture is painted. Only counts when one is connected.",
                ),
                io.Image.Input(
                    "depth_picture",
                    optional=True,
                    tooltip="Your own depth, any size of the source's shape. White (1.0) stands for the nearest the "
                    "network sees in the source, black (0.0) for infinitely far.",
                ),
            ],
            outputs=[
                DEPTH.Output("depth", display_name="depth", tooltip="For Imitative Sampler."),
                io.Image.Output(
                    "picture",
                    display_name="depth picture",
                    tooltip="The depth that is used, white is near. Connected as depth_picture (near is white) it "
                    "gives the same condition again.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: LoadedMimicBrush, source, strength, depth_reads, depth_picture=None) -> io.NodeOutput:
        check_choice("depth_reads", depth_reads, NEAR)
        progress = TaskProgress()
        depth = model.bring("depth").depth_condition(
            eight_bit_pictures(source, "source"),
            None if depth_picture is None else depth_picture[..., :3].mean(dim=-1),
            near_is_white=depth_reads == NEAR[0],
            strength=strength,
            on_picture=lambda done, total: progress("depth", done, total),
        )
        return io.NodeOutput(depth, depth.as_pictures()[..., None].expand(-1, -1, -1, 3).cpu().contiguous())
