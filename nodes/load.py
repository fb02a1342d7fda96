"""Load MimicBrush, and what all nodes that load a model share."""

from __future__ import annotations

import os

import folder_paths
import torch
from comfy_api.latest import io

from ..mimicbrush_core.checkpoints import embedded_model_path
from ..mimicbrush_core.modules import MIMICBRUSH, TITLES
from ..mimicbrush_core.repaint import Repainter
from ..mimicbrush_core.systems.mimicbrush import MimicBrush
from . import host
from .schema import MODEL, check_choice, schema

PRECISIONS = ["auto", "fp16", "bf16", "fp32"]


# --- what the nodes that load share ----------------------------------------------------------------------------


def embedded_name(system: str) -> str:
    """What the list calls the small model that comes with the pack."""
    return f"embedded: {TITLES[system]} small"


def model_names(system: str) -> list[str]:
    """What can be loaded: the files in the system's folder, then the embedded model."""
    return [*host.model_files(system), embedded_name(system)]


def model_input(system: str, origin: str = "made by Convert MimicBrush"):
    """origin: how a file of the system's folder came to be."""
    return io.Combo.Input(
        "model_name",
        options=model_names(system),
        tooltip=f"A .safetensors file in models/{host.FOLDERS[system]} ({origin}), or the small embedded model.",
    )


def precision_input(note: str = ""):
    """note: what its tooltip says beside."""
    return io.Combo.Input(
        "precision",
        options=PRECISIONS,
        default="auto",
        tooltip="auto: half precision where the graphics card is good at it, else fp32. fp16 halves the "
        "memory; bf16 is for cards that are faster in it; fp32 is the most exact." + note,
    )


def check_model_name(system: str, name: str | None, remedy: str) -> bool | str:
    """What `validate_inputs` answers: True, or what is wrong. remedy: how to get a file, up to where it lies."""
    # None: it comes over a wire and is not known yet.
    if name is None or name in model_names(system):
        return True
    return (
        f"There is no model {name!r} in models/{host.FOLDERS[system]}. {remedy}, press R, and choose it; or choose "
        f"{embedded_name(system)!r}."
    )


def converted_by_hand(system: str, what: str) -> str:
    """The remedy where the published files have to be fetched by hand; what: which, and from where."""
    return (
        f"Get {what}, put it into {folder_paths.models_dir}, give its name to Convert MimicBrush, which writes into "
        f"{host.model_folder(system)}"
    )


def fingerprint(system: str, name: str | None, *settings) -> tuple:
    """What is another once the file or a setting has changed."""
    if name is None:
        return ()  # it comes over a wire; the host looks at where it comes from
    state = os.stat(_path(system, name))
    return name, *settings, state.st_mtime_ns, state.st_size


def loaded(kind: type[Repainter], name: str, precision: str) -> Repainter:
    """The model of this name, in the main memory."""
    check_choice("precision", precision, PRECISIONS)
    # Weights made under inference mode could never be moved or changed outside of it.
    with torch.inference_mode(False):
        return kind.load(_path(kind.system, name), dtype=host.computing_dtype(precision))


def _path(system: str, name: str) -> str:
    return str(embedded_model_path(system)) if name == embedded_name(system) else host.model_path(system, name)


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
                model_input(MIMICBRUSH),
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
        folder = host.model_folder(MIMICBRUSH)
        remedy = f"Put the file into {folder} (Download MimicBrush and Convert MimicBrush make it there)"
        return check_model_name(MIMICBRUSH, model_name, remedy)

    @classmethod
    def fingerprint_inputs(cls, model_name, precision, **switches) -> tuple:
        return fingerprint(MIMICBRUSH, model_name, precision, *switches.items())

    @classmethod
    def execute(cls, model_name, precision, channels_last=False, vae_tiling=False, compiled=False) -> io.NodeOutput:
        model = loaded(MimicBrush, model_name, precision)
        with torch.inference_mode(False):  # as in `loaded`
            model.optimize(channels_last=channels_last, compiled=compiled, vae_tiling=vae_tiling)
        return io.NodeOutput(host.LoadedMimicBrush(model))
