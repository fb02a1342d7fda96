"""Imitative Sampler."""

from __future__ import annotations

from comfy_api.latest import io

from ..mimicbrush_core.editing import EditSettings
from ..mimicbrush_core.sampling import MAX_STEPS, SCHEDULERS, SPACINGS
from .host import EditProgress, LoadedMimicBrush
from .schema import DEPTH, MODEL, REFERENCE, check_choice, schema

MODELS_OWN = "model's own"
SAME_SEED, COUNT_UP = "same for all", "count up"


class ImitativeSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushSampler",
            display_name="Imitative Sampler",
            description=(
                "Repaints the masked region of the source so that it imitates the reference, and pastes it back. "
                "Beyond mask and feather not one bit of the source changes."
            ),
            search_aliases=["mimicbrush", "imitate", "inpaint with reference", "repaint", "reference inpainting"],
            inputs=[
                MODEL.Input("model", tooltip="From Load MimicBrush."),
                io.Image.Input(
                    "source",
                    tooltip="The picture to edit, any size. A batch is edited picture by picture (video frames).",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White: repaint. The picture's size; one for all pictures of a batch, or one each. Grey "
                    "edges blend softly; only pixels above half are repainted by the model. A frame whose mask is "
                    "empty stays as it is.",
                ),
                REFERENCE.Input("reference", tooltip="From Encode Reference or Combine References."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Another seed, another variation; the same seed gives the same picture on every device.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MAX_STEPS,
                    tooltip="More steps, finer detail, longer wait. 0: the model's own (MimicBrush 50, embedded 1).",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the reference is insisted on; too high burns the colours. 1: only what the "
                    "model sees. 0: the model's own (MimicBrush 5, embedded 1.2).",
                ),
                io.Combo.Input(
                    "sampler",
                    options=[MODELS_OWN, *SCHEDULERS],
                    default=MODELS_OWN,
                    tooltip="model's own: ddim, as published. dpmpp_2m and unipc need fewer steps for the same.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[MODELS_OWN, *SPACINGS],
                    default=MODELS_OWN,
                    tooltip="How the steps are spread over the noise levels. model's own: as it was trained for.",
                ),
                io.Boolean.Input(
                    "zoom",
                    default=False,
                    tooltip="Work on a window around the mask at the model's full resolution: for small regions of "
                    "large pictures. A batch has one window around all its masks, so that a video does not jitter.",
                ),
                io.Float.Input(
                    "zoom_margin",
                    default=0.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much around the mask the window shows on each side, relative to the mask's longer "
                    "side. More margin: more context, less resolution.",
                ),
                io.Int.Input(
                    "feather",
                    default=10,
                    min=0,
                    max=256,
                    tooltip="Over how many pixels beyond the mask the edit fades out. 10: as published.",
                ),
                io.Float.Input(
                    "color_match",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Takes this much of the colour difference just outside the mask off the edit: against a "
                    "visible seam.",
                ),
                io.Combo.Input(
                    "batch_seeds",
                    options=[SAME_SEED, COUNT_UP],
                    default=SAME_SEED,
                    tooltip="In a batch: the same noise for all pictures (calm videos), or seed, seed + 1, ... "
                    "(variations).",
                ),
                io.Int.Input(
                    "at_once",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many pictures of a batch are worked on together. Less needs less memory.",
                ),
                DEPTH.Input("depth", optional=True, tooltip="From Depth Condition: keeps the shape under the mask."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The edited picture, pasted back."),
                io.Image.Output("raw", display_name="raw", tooltip="The model's whole answer for the window."),
                io.Mask.Output("blend", display_name="blend mask", tooltip="How much of the edit each pixel took."),
                io.Int.Output("x", display_name="x", tooltip="Left edge of the window in the source."),
                io.Int.Output("y", display_name="y", tooltip="Upper edge of the window in the source."),
                io.Int.Output("width", display_name="width", tooltip="Width of the window."),
                io.Int.Output("height", display_name="height", tooltip="Height of the window."),
            ],
        )

    @classmethod
    def execute(
        cls, model: LoadedMimicBrush, source, mask, reference, seed, steps, guidance, sampler, scheduler, zoom,
        zoom_margin, feather, color_match, batch_seeds, at_once, depth=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_choice("batch_seeds", batch_seeds, (SAME_SEED, COUNT_UP))
        settings = EditSettings(
            seed=seed,
            steps=steps or None,
            guidance=guidance or None,
            scheduler=None if sampler == MODELS_OWN else sampler,
            spacing=None if scheduler == MODELS_OWN else scheduler,
            zoom=zoom,
            margin=zoom_margin,
            feather=feather,
            color_match=color_match,
            count_up=batch_seeds == COUNT_UP,
            at_once=at_once,
        )
        groups = ("pictures", "unets", "depth") if depth is not None and zoom else ("pictures", "unets")
        pictures = min(at_once, max(len(source), len(mask)))
        brush = model.bring(*groups, size=model.model.size_of(reference), pictures=pictures)
        result = brush.edit_batch(source, mask, reference, settings, EditProgress(), depth=depth)
        window = result.window
        return io.NodeOutput(result.pictures, result.raw, result.alpha, window.x, window.y, window.width, window.height)
