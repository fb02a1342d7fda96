"""Coarse Edit."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..mimicbrush_core import coarse_edit as coarse
from ..mimicbrush_core.images import MAX_SIDE
from .schema import schema


class CoarseEditNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        low, high = coarse.SCALES
        return schema(
            node_id="MimicBrushCoarseEdit",
            display_name="Coarse Edit",
            description=(
                "Moves, scales, turns, mirrors, copies or cuts out the masked region: the rough layout that a model "
                "then makes believable. Where nothing is left, the picture becomes transparent; the preview shows "
                "these holes as a checkerboard."
            ),
            search_aliases=["mimicbrush", "move object", "cut and paste", "transform region", "layout", "magic fixup"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "source",
                    tooltip="The picture to edit. The image of another Coarse Edit moves one more region. A batch is "
                    "edited picture by picture.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White: the region. The picture's size; one for all pictures of a batch, or one each. "
                    "Soft edges stay soft. A frame whose mask is empty stays as it is.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(coarse.MODES),
                    default=coarse.MOVE,
                    tooltip="move: leaves a hole where the region was. duplicate: keeps it there, too. cut: only "
                    "leaves the hole.",
                ),
                io.Int.Input(
                    "x", default=0, min=-MAX_SIDE, max=MAX_SIDE, tooltip="Pixels to the right; negative: to the left."
                ),
                io.Int.Input("y", default=0, min=-MAX_SIDE, max=MAX_SIDE, tooltip="Pixels down; negative: up."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=low,
                    max=high,
                    step=0.05,
                    tooltip="Larger or smaller, about the centre of the region. 1: as it is.",
                ),
                io.Float.Input(
                    "rotation",
                    default=0.0,
                    min=-360.0,
                    max=360.0,
                    step=1.0,
                    tooltip="Degrees clockwise, about the centre of the region.",
                ),
                io.Combo.Input(
                    "flip",
                    options=list(coarse.FLIPS),
                    default=coarse.NO_FLIP,
                    tooltip="Mirrors the region about its centre, before it is turned: left-right or top-bottom.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", display_name="image", tooltip="The layout with transparency: holes are see-through."
                ),
                io.Mask.Output("hole", display_name="hole", tooltip="White: uncovered, nothing is known there."),
                io.Mask.Output("moved", display_name="moved region", tooltip="White: where the region is now."),
            ],
        )

    @classmethod
    def execute(cls, source, mask, mode, x, y, scale, rotation, flip) -> io.NodeOutput:
        edit = coarse.CoarseEdit(mode, x, y, scale, rotation, flip)
        result = coarse.coarse_edit(source, mask, edit)
        preview = ui.PreviewImage(coarse.over_checker(result.pictures), cls=cls)
        return io.NodeOutput(result.pictures, result.holes, result.moved, ui=preview)
