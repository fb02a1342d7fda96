"""Reference Reliance and Correspondence: looking inside an edit."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..mimicbrush_core.editing import eight_bit_pictures, mask_arrays
from ..mimicbrush_core.inspection import ALL, BLOCKS, MAX_POINTS, Inspection, inspect_edit, marked_points
from ..mimicbrush_core.inspection_pictures import draw_looks, draw_reliance
from .host import EditProgress, LoadedMimicBrush
from .sampler import brought, condition_inputs, edit_settings, sampling_inputs, zoom_inputs
from .schema import MODEL, REFERENCE, check_choice, schema


def _edit_inputs() -> list:
    """What is edited, and how: as in Imitative Sampler, with the same result."""
    return [
        MODEL.Input("model", tooltip="From Load MimicBrush."),
        io.Image.Input("source", tooltip="The picture to edit, any size. Of a batch, only the first is looked at."),
        io.Mask.Input("mask", tooltip="White: repaint. The picture's size. Of a batch, only the first is looked at."),
        REFERENCE.Input("reference", tooltip="From Encode Reference or Combine References."),
        *sampling_inputs(),
        *zoom_inputs(),
    ]


def _place_inputs() -> list:
    """Where in the model and when in the run is looked at."""
    return [
        io.Combo.Input(
            "blocks",
            options=list(BLOCKS),
            default=ALL,
            tooltip="Which blocks of the model are looked at, by how finely they see the picture. coarse: what belongs "
            "where. fine: patterns and edges. all: the mean of all.",
        ),
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="From which share of the steps on is looked at. The first steps decide the layout.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Until which share of the steps is looked at. The last steps make fine detail.",
        ),
    ]


class ReferenceReliance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushReliance",
            display_name="Reference Reliance",
            description=(
                "Makes the edit and shows how much each pixel leaned on the reference: what part of all that the "
                "model looked at there was the reference."
            ),
            search_aliases=["mimicbrush", "attention map", "heat map", "explain", "inspect", "debug"],
            inputs=[*_edit_inputs(), *_place_inputs(), *condition_inputs()],
            outputs=[
                io.Image.Output(
                    "overlay",
                    display_name="overlay",
                    tooltip="The edit under a heat map; the legend below it gives the range. Small pictures are "
                    "enlarged.",
                ),
                io.Mask.Output(
                    "reliance",
                    display_name="reliance",
                    tooltip="White: only the reference was looked at. Black: not at all, or beyond the zoom window.",
                ),
                io.Image.Output("image", display_name="image", tooltip="The edited picture, pasted back."),
            ],
        )

    @classmethod
    def execute(cls, model: LoadedMimicBrush, source, mask, reference, **inputs) -> io.NodeOutput:
        inspection = _inspected(model, source, mask, reference, **inputs)
        [picture], [mask_array] = eight_bit_pictures(inspection.edit.pictures, "edit"), mask_arrays(mask[:1])
        overlay = draw_reliance(picture, inspection.reliance.numpy(), mask_array, inspection.edit.window)
        return io.NodeOutput(_image(overlay), inspection.reliance[None], inspection.edit.pictures)


class Correspondence(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushCorrespondence",
            display_name="Correspondence",
            description=(
                "Makes the edit and shows where in the reference points of the masked region looked: numbered points, "
                "lines and tinted patches on both pictures."
            ),
            search_aliases=["mimicbrush", "attention map", "matching", "explain", "inspect", "debug"],
            inputs=[
                *_edit_inputs(),
                io.Int.Input(
                    "points",
                    default=6,
                    min=1,
                    max=MAX_POINTS,
                    tooltip="How many points are spread evenly over the mask. Not used where marks are given.",
                ),
                *_place_inputs(),
                io.Mask.Input(
                    "marks",
                    optional=True,
                    tooltip=f"Your own points: one for each separate white dot, at most {MAX_POINTS}. The picture's "
                    "size.",
                ),
                *condition_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    "drawing",
                    display_name="drawing",
                    tooltip="The edit, or its zoom window, beside the references that the points looked at most.",
                ),
                io.Image.Output("image", display_name="image", tooltip="The edited picture, pasted back."),
            ],
        )

    @classmethod
    def execute(cls, model: LoadedMimicBrush, source, mask, reference, points, marks=None, **inputs) -> io.NodeOutput:
        if marks is not None:
            points = marked_points(mask_arrays(marks)[0], *source.shape[1:3])
        inspection = _inspected(model, source, mask, reference, points=points, **inputs)
        [picture], [mask_array] = eight_bit_pictures(inspection.edit.pictures, "edit"), mask_arrays(mask[:1])
        return io.NodeOutput(_image(draw_looks(inspection, picture, mask_array)), inspection.edit.pictures)


def _inspected(
    model: LoadedMimicBrush, source, mask, reference, *, blocks, start, end, points=0, depth=None, zoom, **sampling
) -> Inspection:
    check_choice("blocks", blocks, BLOCKS)
    settings = edit_settings(zoom=zoom, **sampling)
    brush = brought(model, reference, depth, zoom, pictures=1)
    return inspect_edit(
        brush, source, mask, reference, settings, EditProgress(),
        depth=depth, blocks=blocks, start=start, end=end, points=points,
    )  # fmt: skip


def _image(picture: np.ndarray) -> torch.Tensor:
    """uint8 [H,W,3] -> the host's float32 0..1."""
    return torch.from_numpy(picture.copy()).float()[None] / 255
