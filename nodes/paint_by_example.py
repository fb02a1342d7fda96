"""Load Paint by Example and Paint by Example."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from ..mimicbrush_core.editing import eight_bit_pictures
from ..mimicbrush_core.errors import PictureError
from ..mimicbrush_core.modules import PAINT_BY_EXAMPLE
from ..mimicbrush_core.sampling import PLMS, SCHEDULERS
from ..mimicbrush_core.systems.paint_by_example import EXEMPLAR_FITS, ExemplarSettings, PaintByExample
from . import host
from .load import PRECISIONS, file_state, precision_input
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

NO_FILE = "no file yet: see the help"
WEIGHTS_PAGE = "https://huggingface.co/Fantasy-Studio/Paint-by-Example"


class LoadPaintByExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushLoadPaintByExample",
            display_name="Load Paint by Example",
            description=(
                "Loads a model for Paint by Example from models/paint_by_example. It has to be fetched from its "
                "authors and converted once; there is no small model to try the node with."
            ),
            search_aliases=["mimicbrush", "paint by example", "exemplar", "reference inpainting"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.model_files(PAINT_BY_EXAMPLE) or [NO_FILE],
                    tooltip="A .safetensors file in models/paint_by_example (made by Convert MimicBrush).",
                ),
                precision_input(),
            ],
            outputs=[EXEMPLAR_MODEL.Output("model", display_name="model", tooltip="For Paint by Example.")],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        # None: it comes over a wire and is not known yet.
        if model_name is None or model_name in host.model_files(PAINT_BY_EXAMPLE):
            return True
        return (
            f"There is no model {model_name!r} in models/paint_by_example. Get the folders unet, vae and image_encoder "
            f"from {WEIGHTS_PAGE}, put them into a folder inside {folder_paths.models_dir}, give its name to Convert "
            f"MimicBrush, which writes into {host.model_folder(PAINT_BY_EXAMPLE)}, press R, and choose the file."
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, precision) -> tuple:
        if model_name is None:
            return ()  # it comes over a wire; the host looks at where it comes from
        return model_name, precision, *file_state(host.model_path(PAINT_BY_EXAMPLE, model_name))

    @classmethod
    def execute(cls, model_name, precision) -> io.NodeOutput:
        check_choice("precision", precision, PRECISIONS)
        path = host.model_path(PAINT_BY_EXAMPLE, model_name)
        # Weights made under inference mode could never be moved or changed outside of it.
        with torch.inference_mode(False):
            model = PaintByExample.load(path, dtype=host.computing_dtype(precision))
        return io.NodeOutput(host.LoadedModel(model))


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
                    own_steps="50",
                    own_guidance="5",
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
