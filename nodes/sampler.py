"""Imitative Sampler."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io

from ..mimicbrush_core.acceleration import EXACT
from ..mimicbrush_core.editing import BatchResult, EditSettings, RepaintSettings
from ..mimicbrush_core.sampling import MAX_STEPS, SCHEDULERS, SPACINGS
from ..mimicbrush_core.systems.mimicbrush import MimicBrush
from .host import EditProgress, LoadedMimicBrush
from .schema import ACCELERATION, DEPTH, MODEL, REFERENCE, check_choice, schema

MODELS_OWN = "model's own"
SAME_SEED, COUNT_UP = "same for all", "count up"


# --- what the nodes that sample share --------------------------------------------------------------------------


def picture_inputs() -> list:
    """What is edited."""
    return [
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
    ]


def step_inputs(own_steps: str) -> list:
    """Which noise, and how many steps; own_steps: the defaults of the models."""
    return [
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
            tooltip=f"More steps, finer detail, longer wait. 0: the model's own ({own_steps}).",
        ),
    ]


def sampling_inputs(
    guide: str = "reference",
    own_steps: str = "MimicBrush 50, embedded 1",
    own_guidance: str = "MimicBrush 5, embedded 1.2",
    samplers: Sequence[str] = tuple(SCHEDULERS),
    published: bool = True,
) -> list:
    """How the steps are made.

    guide: what the model is guided by. own_steps, own_guidance: the defaults of its models. samplers: its own first,
    as published or not.
    """
    own = f"{samplers[0]}, as published" if published else samplers[0]
    return [
        *step_inputs(own_steps),
        io.Float.Input(
            "guidance",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip=f"How strongly the {guide} is insisted on; too high burns the colours. 1: only what the "
            f"model sees. 0: the model's own ({own_guidance}).",
        ),
        io.Combo.Input(
            "sampler",
            options=[MODELS_OWN, *samplers],
            default=MODELS_OWN,
            tooltip=f"model's own: {own}. dpmpp_2m and unipc need fewer steps for the same.",
        ),
        io.Combo.Input(
            "scheduler",
            options=[MODELS_OWN, *SPACINGS],
            default=MODELS_OWN,
            tooltip="How the steps are spread over the noise levels. model's own: as it was trained for.",
        ),
    ]


def setting_input(kind: type[RepaintSettings], name: str, tooltip: str, step: float = 0.05):
    """A number of a system's settings, with its default and its limits."""
    low, high = kind.LIMITS[name]
    return io.Float.Input(name, default=getattr(kind, name), min=low, max=high, step=step, tooltip=tooltip)


def zoom_inputs(note: str = "", around: str = "mask") -> list:
    """note: what zoom's tooltip says beside. around: the input that says where."""
    return [
        io.Boolean.Input(
            "zoom",
            default=False,
            tooltip=f"Work on a window around the {around} at the model's full resolution: for small regions of "
            "large pictures." + note,
        ),
        io.Float.Input(
            "zoom_margin",
            default=0.5,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip=f"How much around the {around} the window shows on each side, relative to the {around}'s longer "
            "side. More margin: more context, less resolution.",
        ),
    ]


def finish_inputs(
    feather: str = "Over how many pixels beyond the mask the edit fades out. 10: as published.", around: str = "mask"
) -> list:
    """How the edit is put back into the picture; feather: its tooltip. around: the input that says where."""
    return [
        io.Int.Input("feather", default=10, min=0, max=256, tooltip=feather),
        io.Float.Input(
            "color_match",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip=f"Takes this much of the colour difference just outside the {around} off the edit: against a "
            "visible seam.",
        ),
    ]


def batch_inputs() -> list:
    """How the pictures of a batch are worked on."""
    return [
        io.Combo.Input(
            "batch_seeds",
            options=[SAME_SEED, COUNT_UP],
            default=SAME_SEED,
            tooltip="In a batch: the same noise for all pictures (calm videos), or seed, seed + 1, ... (variations).",
        ),
        io.Int.Input(
            "at_once",
            default=4,
            min=1,
            max=64,
            tooltip="How many pictures of a batch are worked on together. Less needs less memory.",
        ),
    ]


def condition_inputs() -> list:
    """What may be left away."""
    return [
        DEPTH.Input("depth", optional=True, tooltip="From Depth Condition: keeps the shape under the mask."),
        ACCELERATION.Input(
            "acceleration",
            optional=True,
            tooltip="From Acceleration: faster, a little other. Without it nothing is approximated.",
        ),
    ]


def edit_outputs(image: str = "The edited picture, pasted back.") -> list:
    """What `output_values` gives; image: that output's tooltip."""
    return [
        io.Image.Output("image", display_name="image", tooltip=image),
        io.Image.Output("raw", display_name="raw", tooltip="The model's whole answer for the window."),
        io.Mask.Output("blend", display_name="blend mask", tooltip="How much of the edit each pixel took."),
        io.Int.Output("x", display_name="x", tooltip="Left edge of the window in the source."),
        io.Int.Output("y", display_name="y", tooltip="Upper edge of the window in the source."),
        io.Int.Output("width", display_name="width", tooltip="Width of the window."),
        io.Int.Output("height", display_name="height", tooltip="Height of the window."),
    ]


def output_values(result: BatchResult) -> tuple:
    """What `edit_outputs` announces."""
    window = result.window
    return result.pictures, result.raw, result.alpha, window.x, window.y, window.width, window.height


def output_of(result: BatchResult) -> io.NodeOutput:
    return io.NodeOutput(*output_values(result))


def edit_settings(
    seed,
    steps,
    zoom,
    zoom_margin,
    guidance=0.0,
    sampler=MODELS_OWN,
    scheduler=MODELS_OWN,
    kind: type[RepaintSettings] = EditSettings,
    **others,
) -> RepaintSettings:
    """The settings of these inputs; others: further fields of `kind`."""
    return kind(
        seed=seed,
        steps=steps or None,
        guidance=guidance or None,
        scheduler=None if sampler == MODELS_OWN else sampler,
        spacing=None if scheduler == MODELS_OWN else scheduler,
        zoom=zoom,
        margin=zoom_margin,
        **others,
    )


def brought(model: LoadedMimicBrush, reference, depth, zoom: bool, pictures: int) -> MimicBrush:
    """The model, with what an edit of so many pictures at once needs on the device."""
    groups = ("pictures", "unet", "reference", *(("depth",) if depth is not None and zoom else ()))
    return model.bring(*groups, size=model.model.size_of(reference), pictures=pictures)


# --- the node --------------------------------------------------------------------------------------------------


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
                *picture_inputs(),
                REFERENCE.Input("reference", tooltip="From Encode Reference or Combine References."),
                *sampling_inputs(),
                *zoom_inputs(note=" A batch has one window around all its masks, so that a video does not jitter."),
                *finish_inputs(),
                *batch_inputs(),
                *condition_inputs(),
            ],
            outputs=edit_outputs(),
        )

    @classmethod
    def execute(
        cls, model: LoadedMimicBrush, source, mask, reference, seed, steps, guidance, sampler, scheduler, zoom,
        zoom_margin, feather, color_match, batch_seeds, at_once, depth=None, acceleration=EXACT,
    ) -> io.NodeOutput:  # fmt: skip
        check_choice("batch_seeds", batch_seeds, (SAME_SEED, COUNT_UP))
        settings = edit_settings(
            seed=seed,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            scheduler=scheduler,
            zoom=zoom,
            zoom_margin=zoom_margin,
            acceleration=acceleration,
            feather=feather,
            color_match=color_match,
            count_up=batch_seeds == COUNT_UP,
            at_once=at_once,
        )
        brush = brought(model, reference, depth, zoom, pictures=min(at_once, max(len(source), len(mask))))
        return output_of(brush.edit_batch(source, mask, reference, settings, EditProgress(), depth=depth))
