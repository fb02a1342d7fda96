"""Load Paint by Example and Paint by Example."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..mimicbrush_core.editing import eight_bit_pictures
from ..mimicbrush_core.errors import PictureError
from ..mimicbrush_core.modules import PAINT_BY_EXAMPLE
from ..mimicbrush_core.sampling import PLMS, SCHEDULERS
from ..mimicbrush_core.systems.paint_by_example import EXEMPLAR_FITS, ExemplarSettings, PaintByExample
from . import host
from .load import check_model_name, converted_by_hand, fingerprint, loaded, model_input, precision_input
from .sampler import (
    COUNT_UP,
    SAME_SEED,
    batch_inputs,
    edit_outputs,
    edit_settings,
    finish_inputs,
    output_of,
    picture_inputs,
    sampling_inputs,
    zoom_inputs,
)
from .schema import EXEMPLAR_MODEL, check_choice, schema

WEIGHTS_PAGE = "https://huggingface.co/Fantasy-Studio/Paint-by-Example"


class LoadPaintByExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushLoadPaintByExample",
            display_name="Load Paint by Example",
            description=(
                "Loads a model for Paint by Example from models/paint_by_example. The embedded model needs no "
                "download: it knows drawn toy objects at 128 pixels and is there to try the workflows out. The "
                "released one has to be fetched from its authors and converted once."
            ),
            search_aliases=["mimicbrush", "paint by example", "exemplar", "reference inpainting"],
            inputs=[
                model_input(PAINT_BY_EXAMPLE),
                precision_input(),
            ],
            outputs=[EXEMPLAR_MODEL.Output("model", display_name="model", tooltip="For Paint by Example.")],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        what = f"a folder with unet, vae and image_encoder from {WEIGHTS_PAGE}"
        return check_model_name(PAINT_BY_EXAMPLE, model_name, converted_by_hand(PAINT_BY_EXAMPLE, what))

    @classmethod
    def fingerprint_inputs(cls, model_name, precision) -> tuple:
        return fingerprint(PAINT_BY_EXAMPLE, model_name, precision)

    @classmethod
    def execute(cls, model_name, precision) -> io.NodeOutput:
        return io.NodeOutput(host.LoadedModel(loaded(PaintByExample, model_name, precision)))


class PaintByExampleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushPaintByExample",
            display_name="Paint by Example",
            description=(
                "Repaints the masked region of the source with the object that the exemplar shows, and pastes it "
                "back. The object comes out as its kind, in a pose that fits the scene, not as its exact self."
            ),
            search_aliases=["mimicbrush", "exemplar", "inpaint with reference", "repaint", "reference inpainting"],
            inputs=[
                EXEMPLAR_MODEL.Input("model", tooltip="From Load Paint by Example."),
                *picture_inputs(),
                io.Image.Input(
                    "exemplar",
                    tooltip="One picture of the object, cropped tightly to it; any size and shape.",
                ),
                *sampling_inputs(
                    guide="exemplar",
                    own_steps="released: 50",
                    own_guidance="released: 5",
                    samplers=[PLMS, *SCHEDULERS],
                ),
                io.Combo.Input(
                    "exemplar_fit",
                    options=list(EXEMPLAR_FITS),
                    default="stretch",
                    tooltip="How the exemplar becomes the square that the model looks at. stretch: squashed, as "
                    "published and trained. crop: its middle. pad: whole, on white.",
                ),
                *zoom_inputs(note=" A batch has one window around all its masks, so that a video does not jitter."),
                io.Boolean.Input(
                    "paste_back",
                    default=True,
                    tooltip="On: beyond mask and feather not one bit of the source changes. Off: as published, all of "
                    "the window is the model's answer and loses detail.",
                ),
                *finish_inputs("Over how many pixels beyond the mask the edit fades out, with paste_back."),
                *batch_inputs(),
            ],
            outputs=edit_outputs("The edited picture."),
        )

    @classmethod
    def execute(
        cls, model: host.LoadedModel, source, mask, exemplar, at_once, batch_seeds, exemplar_fit, **inputs
    ) -> io.NodeOutput:
        check_choice("exemplar_fit", exemplar_fit, EXEMPLAR_FITS)
        check_choice("batch_seeds", batch_seeds, (SAME_SEED, COUNT_UP))
        settings = edit_settings(kind=ExemplarSettings, count_up=batch_seeds == COUNT_UP, at_once=at_once, **inputs)
        encoded = model.bring("image").encode_exemplar(_one_picture(exemplar), exemplar_fit)
        painter = model.bring("pictures", "unet", pictures=min(at_once, max(len(source), len(mask))))
        return output_of(painter.edit_batch(source, mask, encoded, settings, host.EditProgress()))


def _one_picture(exemplar: torch.Tensor):
    """uint8 [H,W,3] of a batch of one."""
    pictures = eight_bit_pictures(exemplar, "exemplar")
    if len(pictures) != 1:
        raise PictureError(
            f"The exemplar is a batch of {len(pictures)} pictures; Paint by Example looks at one. Choose one of them, "
            "e.g. with ImageFromBatch."
        )
    return pictures[0]
