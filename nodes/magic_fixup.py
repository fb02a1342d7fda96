"""Load Magic Fixup and Magic Fixup."""

from __future__ import annotations

from comfy_api.latest import io

from ..mimicbrush_core.coarse_edit import with_holes
from ..mimicbrush_core.modules import MAGIC_FIXUP
from ..mimicbrush_core.systems.magic_fixup import FixupSettings, MagicFixup
from . import host
from .load import (
    check_model_name,
    converted_by_hand,
    embedded_name,
    fingerprint,
    loaded,
    model_input,
    precision_input,
)
from .sampler import (
    COUNT_UP,
    SAME_SEED,
    batch_inputs,
    edit_outputs,
    edit_settings,
    finish_inputs,
    output_of,
    setting_input,
    step_inputs,
    zoom_inputs,
)
from .schema import FIXUP_MODEL, check_choice, schema

WEIGHTS_PAGE = "https://huggingface.co/HadiZayer/MagicFixup"
EMBEDDED_LICENCE = "Apache-2.0"
UNKNOWN_LICENCE = "of whoever trained it: the file names none"


class LoadMagicFixup(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushLoadMagicFixup",
            display_name="Load Magic Fixup",
            description=(
                "Loads a model for Magic Fixup from models/magic_fixup. The released weights are under the Adobe "
                "Research License: non-commercial research only, not for client work; they are fetched only for those "
                "who accept it. The embedded model is ours (Apache-2.0) and needs no download: it knows drawn toy "
                "objects at 128 pixels and is there to try the workflows out."
            ),
            search_aliases=["mimicbrush", "magic fixup", "photo editing", "harmonize", "move object"],
            hidden=[io.Hidden.unique_id],
            inputs=[model_input(MAGIC_FIXUP), precision_input()],
            outputs=[
                FIXUP_MODEL.Output("model", display_name="model", tooltip="For Magic Fixup."),
                io.String.Output(
                    "licence", display_name="licence", tooltip="What the weights may be used for, as the file says."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        what = (
            f"the weights from {WEIGHTS_PAGE} (Adobe Research License: non-commercial research only; if you accept it, "
            "Download MimicBrush fetches them)"
        )
        return check_model_name(MAGIC_FIXUP, model_name, converted_by_hand(MAGIC_FIXUP, what))

    @classmethod
    def fingerprint_inputs(cls, model_name, precision) -> tuple:
        return fingerprint(MAGIC_FIXUP, model_name, precision)

    @classmethod
    def execute(cls, model_name, precision) -> io.NodeOutput:
        model = loaded(MagicFixup, model_name, precision)
        own = EMBEDDED_LICENCE if model_name == embedded_name(MAGIC_FIXUP) else UNKNOWN_LICENCE
        licence = model.config.get("licence", own)
        return io.NodeOutput(host.LoadedModel(model), licence, ui=host.shown_text(cls, f"Licence: {licence}"))


class MagicFixupNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushMagicFixup",
            display_name="Magic Fixup",
            description=(
                "Makes a coarse edit believable: what was moved keeps its look, holes are filled, edges, light and "
                "shadow follow the new layout. The released weights are for non-commercial research only."
            ),
            search_aliases=["mimicbrush", "harmonize", "move object", "fill hole", "coarse edit", "photo editing"],
            inputs=[
                FIXUP_MODEL.Input("model", tooltip="From Load Magic Fixup."),
                io.Image.Input(
                    "original",
                    tooltip="The picture before the coarse edit: its detail is read from here. A batch is edited "
                    "picture by picture.",
                ),
                io.Image.Input(
                    "coarse_edit",
                    tooltip="The image of Coarse Edit, or of another program: the original's size, transparent where "
                    "nothing is known. One for all originals, or one each; several for one original are variations.",
                ),
                *step_inputs("released: 50"),
                setting_input(
                    FixupSettings,
                    "strength",
                    step=0.01,
                    tooltip="The share of the steps that is made. 1: as published. Less: closer to the coarse edit, "
                    "and faster. The paper's start at 40 % is 0.6 or 0.4, depending on how it is read.",
                ),
                setting_input(
                    FixupSettings,
                    "eta",
                    tooltip="How much new noise each step adds. 1: as published. 0: none, for smoother pictures.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="The side in pixels of the square the model works at. 0: the model's own (released: 512), "
                    "which is best.",
                ),
                *zoom_inputs(
                    note=" A batch has one window around all its regions, so that a video does not jitter.",
                    around="region",
                ),
                io.Boolean.Input(
                    "paste_back",
                    default=False,
                    tooltip="Off: as published, all of the window is the model's answer: shadows may fall anywhere, "
                    "and detail is lost. On: beyond region and feather not one bit of the original changes.",
                ),
                *finish_inputs(
                    "Over how many pixels beyond the region the edit fades out, with paste_back.", around="region"
                ),
                *batch_inputs(),
                io.Mask.Input(
                    "hole",
                    optional=True,
                    tooltip="White: nothing is known there. For a coarse edit without transparency: the hole of Coarse "
                    "Edit.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="White: what zoom, paste_back and color_match are about. Without it: where the coarse edit "
                    "differs from the original.",
                ),
            ],
            outputs=edit_outputs("The believable picture."),
        )

    @classmethod
    def execute(
        cls, model: host.LoadedModel, original, coarse_edit, size, batch_seeds, hole=None, region=None, **inputs
    ) -> io.NodeOutput:
        check_choice("batch_seeds", batch_seeds, (SAME_SEED, COUNT_UP))
        settings = edit_settings(kind=FixupSettings, size=size or None, count_up=batch_seeds == COUNT_UP, **inputs)
        edits = coarse_edit if hole is None else with_holes(coarse_edit, hole)
        pictures = min(settings.at_once, max(len(original), len(edits)))
        fixer = model.bring("pictures", "unets", size=settings.size, pictures=pictures)
        return output_of(fixer.edit_batch(original, edits, settings, host.EditProgress(), mask=region))
