"""Load SmartBrush and SmartBrush."""

from __future__ import annotations

from comfy_api.latest import io

from ..mimicbrush_core.masks import MAX_PRECISION_LEVEL
from ..mimicbrush_core.modules import SMARTBRUSH
from ..mimicbrush_core.systems.smartbrush import BrushSettings, SmartBrush
from . import host
from .load import check_model_name, fingerprint, loaded, model_input, precision_input
from .sampler import (
    COUNT_UP,
    SAME_SEED,
    batch_inputs,
    edit_outputs,
    edit_settings,
    finish_inputs,
    output_values,
    picture_inputs,
    sampling_inputs,
    setting_input,
    zoom_inputs,
)
from .schema import BRUSH_MODEL, check_choice, schema


class LoadSmartBrush(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushLoadSmartBrush",
            display_name="Load SmartBrush",
            description=(
                "Loads a SmartBrush model from models/smartbrush. Nobody has published weights for it: a file comes "
                "from one's own training. The embedded model needs no download: it knows a few drawn shapes and the "
                "words for them at 128 pixels and is there to try the workflows out."
            ),
            search_aliases=["mimicbrush", "smart brush", "text inpainting", "shape guided", "object inpainting"],
            inputs=[
                model_input(SMARTBRUSH, origin="written by mimicbrush train"),
                precision_input(),
            ],
            outputs=[BRUSH_MODEL.Output("model", display_name="model", tooltip="For SmartBrush.")],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        remedy = (
            "SmartBrush has no public weights. Train with `mimicbrush train --system smartbrush`, put the file into "
            f"{host.model_folder(SMARTBRUSH)}"
        )
        return check_model_name(SMARTBRUSH, model_name, remedy)

    @classmethod
    def fingerprint_inputs(cls, model_name, precision) -> tuple:
        return fingerprint(SMARTBRUSH, model_name, precision)

    @classmethod
    def execute(cls, model_name, precision) -> io.NodeOutput:
        return io.NodeOutput(host.LoadedModel(loaded(SmartBrush, model_name, precision)))


def _region_inputs() -> list:
    """How much of the mask is repainted."""
    return [
        io.Boolean.Input(
            "preserve_background",
            default=BrushSettings.preserve_background,
            tooltip="On: what lies inside the mask but beside the new thing is given back to the background, as the "
            "model predicts it. Off: all of the mask is repainted.",
        ),
        setting_input(
            BrushSettings,
            "refine_from",
            tooltip="After which share of the steps the predicted mask takes over, with preserve_background. 1: never.",
        ),
        setting_input(
            BrushSettings,
            "threshold",
            tooltip="What counts as the new thing in the predicted mask, with preserve_background. Lower: more is "
            "repainted.",
        ),
    ]


class SmartBrushNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushSmartBrush",
            display_name="SmartBrush",
            description=(
                "Paints what a text says into the masked region, as exactly in its shape as you want, and gives the "
                "background around the new thing back."
            ),
            search_aliases=["mimicbrush", "smart brush", "text inpainting", "shape guided", "object inpainting"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                BRUSH_MODEL.Input("model", tooltip="From Load SmartBrush."),
                *picture_inputs(),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="What to paint into the mask, e.g. a red striped disc. The embedded model knows a few "
                    "words for colours, shapes and patterns; others are named in an error.",
                ),
                io.String.Input(
                    "negative_text",
                    multiline=True,
                    default="",
                    tooltip="What the picture should not show. May stay empty.",
                ),
                io.Int.Input(
                    "mask_precision",
                    default=BrushSettings().precision,
                    min=0,
                    max=MAX_PRECISION_LEVEL,
                    tooltip="How literally the mask's shape is meant. 0: the exact silhouette of the new thing. 2: a "
                    "sloppy brush. 4: a box around it. The mask itself stays as it is: Mask Precision makes coarser "
                    "ones.",
                ),
                *sampling_inputs(
                    guide="text", own_steps="full size: 50", own_guidance="full size: 7.5", published=False
                ),
                *_region_inputs(),
                *zoom_inputs(note=" A batch has one window around all its masks, so that a video does not jitter."),
                io.Boolean.Input(
                    "paste_back",
                    default=True,
                    tooltip="On: beyond what was repainted and its feather not one bit of the source changes. Off: all "
                    "of the window is the model's answer and loses detail.",
                ),
                *finish_inputs("Over how many pixels beyond what was repainted the edit fades out, with paste_back."),
                *batch_inputs(),
            ],
            outputs=[
                *edit_outputs("The edited picture."),
                io.Mask.Output(
                    "predicted",
                    display_name="predicted mask",
                    tooltip="The new thing's own shape as the model sees it, inside the mask.",
                ),
                io.Mask.Output(
                    "repainted",
                    display_name="repainted mask",
                    tooltip="What of the mask was repainted. The rest was given back to the background.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: host.LoadedModel, source, mask, text, negative_text, mask_precision, batch_seeds, at_once, **inputs
    ) -> io.NodeOutput:
        check_choice("batch_seeds", batch_seeds, (SAME_SEED, COUNT_UP))
        settings = edit_settings(
            kind=BrushSettings,
            negative=negative_text,
            precision=mask_precision,
            count_up=batch_seeds == COUNT_UP,
            at_once=at_once,
            **inputs,
        )
        brush = model.bring("pictures", "text", "unet", pictures=min(at_once, max(len(source), len(mask))))
        result = brush.edit_batch(source, mask, text, settings, host.EditProgress())
        told = host.shown_text(cls, "\n".join(result.warnings)) if result.warnings else None
        return io.NodeOutput(*output_values(result), result.predicted, result.region, ui=told)
