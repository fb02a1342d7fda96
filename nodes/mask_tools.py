"""Mask Precision, Change Mask and Background Blend: they need no model and serve every system."""

from __future__ import annotations

from comfy_api.latest import io

from ..mimicbrush_core import mask_tools
from ..mimicbrush_core.masks import MAX_PRECISION_LEVEL
from .schema import schema


class MaskPrecision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushMaskPrecision",
            display_name="Mask Precision",
            description=(
                "Takes the shape of a mask less literally, from its exact silhouette to its bounding box: room for a "
                "new thing of another shape. Each level contains the one before."
            ),
            search_aliases=["mimicbrush", "grow mask", "expand mask", "bounding box", "loosen mask", "smartbrush"],
            inputs=[
                io.Mask.Input(
                    "mask",
                    tooltip="White: repaint. The masks of a batch are treated one by one; an empty one stays so.",
                ),
                io.Int.Input(
                    "level",
                    default=2,
                    min=0,
                    max=MAX_PRECISION_LEVEL,
                    tooltip="0: the exact silhouette. 1, 2, 3: rounder and rounder. 4: the bounding box.",
                ),
            ],
            outputs=[
                io.Mask.Output("coarser", display_name="mask", tooltip="White: repaint. At least what was white.")
            ],
        )

    @classmethod
    def execute(cls, mask, level) -> io.NodeOutput:
        return io.NodeOutput(mask_tools.precise_masks(mask, level))


class ChangeMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = mask_tools.ChangeSettings()
        return schema(
            node_id="MimicBrushChangeMask",
            display_name="Change Mask",
            description=(
                "A mask of what an edit really changed, estimated from the difference of two pictures. No model "
                "predicts it: a new thing that looks like what it covers does not count as a change."
            ),
            search_aliases=["mimicbrush", "difference mask", "compare images", "diff", "what changed"],
            inputs=[
                io.Image.Input("before", tooltip="The picture before the edit."),
                io.Image.Input(
                    "after",
                    tooltip="The edited picture, in the same size. Of batches, one serves all or each has its own.",
                ),
                io.Float.Input(
                    "threshold",
                    default=default.threshold,
                    min=0.0,
                    max=mask_tools.MAX_THRESHOLD,
                    step=0.5,
                    tooltip="Colour differences up to this do not count (Delta E: about 2 is just visible side by "
                    "side, black to white is 100). Higher: only what changed clearly.",
                ),
                io.Int.Input(
                    "clean_up",
                    default=default.clean_up,
                    min=0,
                    max=mask_tools.MAX_CLEAN_UP,
                    tooltip="Removes spots and closes gaps up to about twice this many pixels across. 0: none.",
                ),
                io.Float.Input(
                    "softness",
                    default=default.softness,
                    min=0.0,
                    max=mask_tools.MAX_SOFTNESS,
                    step=0.5,
                    tooltip="How far the mask's edge is blurred, in pixels. 0: a hard edge.",
                ),
                io.Mask.Input(
                    "within", optional=True, tooltip="What changed outside this mask does not count: your own mask."
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "change",
                    display_name="estimated change",
                    tooltip="White: changed. Estimated from the difference, not predicted. Equal pictures: all black.",
                )
            ],
        )

    @classmethod
    def execute(cls, before, after, threshold, clean_up, softness, within=None) -> io.NodeOutput:
        settings = mask_tools.ChangeSettings(threshold, clean_up, softness)
        return io.NodeOutput(mask_tools.change_masks(before, after, settings, within))


class BackgroundBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushBackgroundBlend",
            display_name="Background Blend",
            description=(
                "Puts the masked region of an edited picture, from whatever made it, over the original background. "
                "Beyond mask and feather not one bit of the background changes."
            ),
            search_aliases=["mimicbrush", "paste back", "composite", "keep background", "restore background", "blend"],
            inputs=[
                io.Image.Input("background", tooltip="The picture to keep: the one before the edit."),
                io.Image.Input(
                    "edited",
                    tooltip="The picture to take the masked region from, in the same size. Of batches, one serves all "
                    "or each has its own.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White: taken from the edited picture. Grey edges blend softly. With an empty mask the "
                    "background stays as it is.",
                ),
                io.Int.Input(
                    "feather",
                    default=10,
                    min=0,
                    max=mask_tools.MAX_FEATHER,
                    tooltip="Over how many pixels beyond the mask the region fades out. 0: the mask as it is.",
                ),
                io.Float.Input(
                    "color_match",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Takes this much of the colour difference just outside the mask off the edited picture: "
                    "for unpasted pictures whose colours drifted.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The background with the region on it."),
                io.Mask.Output(
                    "blend", display_name="blend mask", tooltip="How much of the edited picture each pixel took."
                ),
            ],
        )

    @classmethod
    def execute(cls, background, edited, mask, feather, color_match) -> io.NodeOutput:
        return io.NodeOutput(*mask_tools.blended(background, edited, mask, feather, color_match))
