"""Load MimicBrush."""

from __future__ import annotations

import os

import torch
from comfy_api.latest import io

from ..mimicbrush_core.checkpoints import embedded_model_path
from ..mimicbrush_core.modules import MIMICBRUSH
from ..mimicbrush_core.systems.mimicbrush import MimicBrush
from . import host
from .schema import MODEL, check_choice, schema

EMBEDDED = "embedded: MimicBrush small"
PRECISIONS = ["auto", "fp16", "bf16", "fp32"]


# --- what the nodes that load share ----------------------------------------------------------------------------


def precision_input(note: str = ""):
    """note: what its tooltip says beside."""
    return io.Combo.Input(
        "precision",
        options=PRECISIONS,
        default="auto",
        tooltip="auto: half precision where the graphics card is good at it, else fp32. fp16 halves the "
        "memory; bf16 is for cards that are faster in it; fp32 is the most exact." + note,
    )


def file_state(path: str) -> tuple:
    """What is another once the file has changed."""
    state = os.stat(path)
    return state.st_mtime_ns, state.st_size


# --- the node --------------------------------------------------------------------------------------------------


class LoadMimicBrush(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushLoad",
            display_name="Load MimicBrush",
            description=(
                "Loads a MimicBrush model from models/mimicbrush. The embedded model needs no download: it knows drawn "
                "toy objects at 128 pixels and is there to try the workflows out."
            ),
            search_aliases=["mimicbrush", "reference imitation", "imitation model", "load mimic brush"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[*host.model_files(MIMICBRUSH), EMBEDDED],
                    tooltip="A .safetensors file in models/mimicbrush (made by Convert MimicBrush), or the small "
                    "embedded model.",
                ),
                precision_input(note=" The depth network always computes in fp32."),
                io.Boolean.Input(
                    "channels_last",
                    default=False,
                    optional=True,
                    tooltip="Lays the weights out as many graphics cards compute faster with. Changes the last bits.",
                ),
                io.Boolean.Input(
                    "vae_tiling",
                    default=False,
                    optional=True,
                    tooltip="Encodes and decodes in overlapping tiles where the model works above 512 pixels: for "
                    "little memory. Changes colours very slightly.",
                ),
                io.Boolean.Input(
                    "compiled",
                    default=False,
                    optional=True,
                    tooltip="Compiles the model's blocks (torch.compile): the first edit at each size waits for it, "
                    "the next are faster. Needs a working compiler; changes the last bits.",
                ),
            ],
            outputs=[
                MODEL.Output(
                    "model",
                    display_name="model",
                    tooltip="For Encode Reference, Depth Condition and Imitative Sampler.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        # None: it comes over a wire and is not known yet.
        if model_name is None or model_name == EMBEDDED or model_name in host.model_files(MIMICBRUSH):
            return True
        folder = host.model_folder(MIMICBRUSH)
        return (
            f"There is no model {model_name!r} in models/mimicbrush. Put the file into {folder} (Download MimicBrush "
            f"and Convert MimicBrush make it there), press R, and choose it; or choose {EMBEDDED!r}."
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, precision, **switches) -> tuple:
        if model_name is None:
            return ()  # it comes over a wire; the host looks at where it comes from
        return model_name, precision, *switches.items(), *file_state(_path(model_name))

    @classmethod
    def execute(cls, model_name, precision, channels_last=False, vae_tiling=False, compiled=False) -> io.NodeOutput:
        check_choice("precision", precision, PRECISIONS)
        # Weights made under inference mode could never be moved or changed outside of it.
        with torch.inference_mode(False):
            model = MimicBrush.load(_path(model_name), dtype=host.computing_dtype(precision))
            model.optimize(channels_last=channels_last, compiled=compiled, vae_tiling=vae_tiling)
        return io.NodeOutput(host.LoadedMimicBrush(model))


def _path(model_name: str) -> str:
    return str(embedded_model_path()) if model_name == EMBEDDED else host.model_path(MIMICBRUSH, model_name)
