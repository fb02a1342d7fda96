"""Example Pictures."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..mimicbrush_core.examples import EXAMPLES, TO_MOVE, TO_NAME
from .schema import check_choice, schema

TITLES = {example.title: example for example in (*EXAMPLES, TO_MOVE, TO_NAME)}


class ExamplePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushExamplePictures",
            display_name="Example Pictures",
            description=(
                "Source, mask and reference to try the nodes with, drawn on the spot: nothing is downloaded. They are "
                "of the kind the embedded model knows, but it never saw these."
            ),
            search_aliases=["mimicbrush", "example", "test images", "demo"],
            inputs=[
                io.Combo.Input(
                    "example",
                    options=list(TITLES),
                    tooltip="Which set. The last two are for Magic Fixup and SmartBrush, the others for what imitates.",
                ),
                io.Int.Input("size", default=256, min=64, max=1024, step=64, tooltip="Side of the pictures in pixels."),
                io.Int.Input(
                    "frames",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="More than 1: the source and its mask become a little film, in which the object moves. The "
                    "last two sets have none.",
                ),
            ],
            outputs=[
                io.Image.Output("source", display_name="source", tooltip="The picture(s) to edit."),
                io.Mask.Output("mask", display_name="mask", tooltip="White: repaint."),
                io.Image.Output("reference", display_name="reference", tooltip="The picture to imitate."),
            ],
        )

    @classmethod
    def execute(cls, example, size, frames) -> io.NodeOutput:
        check_choice("example", example, TITLES)
        pictures, masks, reference = TITLES[example].render_clip(frames, size)
        return io.NodeOutput(_image(pictures), torch.from_numpy(masks), _image(reference[None]))


def _image(pictures) -> torch.Tensor:
    """uint8 [B,H,W,3] -> the host's float32 0..1."""
    return torch.from_numpy(pictures).float() / 255
