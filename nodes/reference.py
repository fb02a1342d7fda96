"""Encode Reference and Combine References."""

from __future__ import annotations

from comfy_api.latest import io

from ..mimicbrush_core.editing import batch_size, eight_bit_pictures, mask_arrays, repeated
from ..mimicbrush_core.errors import ArgumentError
from ..mimicbrush_core.references import ReferenceUse, combined
from .host import LoadedMimicBrush, stop_if_interrupted
from .schema import MODEL, REFERENCE, schema


class EncodeReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushEncodeReference",
            display_name="Encode Reference",
            description=(
                "Prepares the picture to imitate. No mask is needed: the model finds the part that belongs into the "
                "hole. Its features are computed once and kept for further edits."
            ),
            search_aliases=["mimicbrush", "reference image", "reference encode", "imitate"],
            inputs=[
                MODEL.Input("model", tooltip="From Load MimicBrush."),
                io.Image.Input(
                    "picture",
                    tooltip="What the repainted region shall look like; any size and shape. The pictures of a batch "
                    "become several references that are read together.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the reference counts. 1: as the model was trained. 0: as if there were no "
                    "reference. Above 1: leans on it harder. Between several references it shares them out.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which share of the steps on the reference is read. The first steps decide the "
                    "layout.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Until which share of the steps the reference is read. Ending early leaves fine detail "
                    "to the model.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="The side in pixels of the square the model works at; the sampler follows. 0: the "
                    "model's own (512, the embedded model 128), which is best.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: the part of the reference to imitate. The rest is hidden from the model. "
                    "Without it, the whole picture is offered.",
                ),
            ],
            outputs=[REFERENCE.Output("reference", display_name="reference", tooltip="For Imitative Sampler.")],
        )

    @classmethod
    def execute(cls, model: LoadedMimicBrush, picture, weight, start, end, size, mask=None) -> io.NodeOutput:
        if start >= end:
            raise ArgumentError(f"start is {start} and end is {end}: the reference would never be read. Lower start.")
        pictures = eight_bit_pictures(picture, "reference")
        masks = [None] if mask is None else mask_arrays(mask)
        count = batch_size({"reference": len(pictures), "reference mask": len(masks)})
        constants = () if model.model.knows_constants else ("depth",)  # which need the depth network, once
        brush = model.bring("image", "pictures", *constants)
        brush.compute_constants()
        uses = []
        for one, region in zip(repeated(pictures, count), repeated(masks, count), strict=True):
            stop_if_interrupted()
            reference = brush.encode_reference(one, size or None, mask=region)
            # The memory manager does not know of the features: they wait where it lets weights wait.
            reference.store_device = model.offload_device
            uses.append(ReferenceUse(reference, weight, start, end))
        return io.NodeOutput(uses)


class CombineReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushCombineReferences",
            display_name="Combine References",
            description="Reads several references together. Each keeps its own weight, start and end; chain for more.",
            search_aliases=["mimicbrush", "several references", "multiple references", "merge references"],
            inputs=[
                REFERENCE.Input("reference_1", tooltip="From Encode Reference."),
                REFERENCE.Input("reference_2", tooltip="From Encode Reference, with the same model and size."),
                REFERENCE.Input("reference_3", optional=True, tooltip="One more."),
                REFERENCE.Input("reference_4", optional=True, tooltip="One more."),
            ],
            outputs=[REFERENCE.Output("reference", display_name="reference", tooltip="All of them together.")],
        )

    @classmethod
    def execute(cls, reference_1, reference_2, reference_3=None, reference_4=None) -> io.NodeOutput:
        given = (reference_1, reference_2, reference_3, reference_4)
        return io.NodeOutput(combined([use for uses in given if uses is not None for use in uses]))
