"""Where a SmartBrush begins: from Stable Diffusion 1.5, its inpainting model, or another SmartBrush."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import (
    ENCODER_FILES,
    VAE_FILES,
    filled_part,
    load_modules,
    open_model,
    read_json,
    vae_config,
    vae_state,
    weight_file,
)
from ..errors import ArgumentError, ModelFileError
from ..keys import text_encoder_keys
from ..modules import SMARTBRUSH, BrushModules, bundled_config
from ..recognition import recognise
from ..text import MERGES_FILE, VOCABULARY_FILE, clip_vocabulary, read_merges
from ..weight_files import is_folder, read_tensors
from .starts import INPAINTING_CHANNELS, unet_file, unet_state, widened

FOLDERS = ("unet", "text_encoder", "tokenizer", "vae")
"""What is taken of a pipeline folder in diffusers layout."""

_BASES = {4: "U-Net of Stable Diffusion 1.5", INPAINTING_CHANNELS: "inpainting model"}
"""Input channels of a base's U-Net -> what it is."""


@dataclass(frozen=True)
class BrushStart:
    """What to begin with, one of: model, a SmartBrush file; sd15, inpainting: pipeline folders in diffusers layout.

    config: for a base of other sizes than SD-1.5's.
    """

    model: str | None = None
    sd15: str | None = None
    inpainting: str | None = None
    config: dict | None = None

    def note(self) -> dict:
        """As JSON, to begin from the same again, from whatever folder."""
        note = {name: str(Path(path).absolute()) for name, path in self._given().items()}
        return note if self.config is None else {**note, "config": self.config}

    def check(self) -> None:
        """Raise ArgumentError unless there is one beginning."""
        if len(self._given()) != 1:
            raise ArgumentError(
                "Begin from one of: Stable Diffusion 1.5 (--from-sd15), its inpainting model (--from-inpainting), a "
                f"SmartBrush (--model). Given: {', '.join(self._given()) or 'none'}."
            )

    def size(self) -> int:
        """The side in pixels that the model is made for. Raises ModelFileError."""
        if self.model is not None:
            return open_model(self.model, system=SMARTBRUSH).config["defaults"]["size"]
        return (self.config or bundled_config("smartbrush"))["defaults"]["size"]

    def load(self) -> tuple[BrushModules, dict]:
        """The modules on the CPU in float32, frozen, and their configuration.

        Raises ArgumentError: not one beginning; ModelFileError: a file does not fit.
        """
        self.check()
        if self.model is not None:
            return load_modules(self.model, system=SMARTBRUSH)
        if self.sd15 is not None:
            return initialise_from(self.sd15, self.config, channels=4)
        return initialise_from(self.inpainting, self.config, channels=INPAINTING_CHANNELS)

    def _given(self) -> dict[str, str]:
        paths = {"model": self.model, "sd15": self.sd15, "inpainting": self.inpainting}
        return {name: path for name, path in paths.items() if path is not None}


def initialise_from(
    base: str | Path, config: dict | None = None, channels: int | None = None
) -> tuple[BrushModules, dict]:
    """The modules on the CPU in float32, frozen, and their configuration, with the tokenizer in it.

    base: the pipeline folder of Stable Diffusion 1.5 or of its inpainting model. config: for other sizes. channels:
    input channels that its U-Net must have, 4 or 9; None: either. Raises ModelFileError: something is missing or does
    not fit.
    """
    base = Path(base)
    missing = [name for name in FOLDERS if not (is_folder(base) and (base / name).is_dir())]
    if missing:
        raise ModelFileError(
            f"{base} is no pipeline folder of Stable Diffusion 1.5: {', '.join(missing)} not found. Give the folder "
            f"that holds {', '.join(FOLDERS)}."
        )
    config = config or bundled_config("smartbrush")
    config = {
        **config,
        "name": "SmartBrush from Stable Diffusion 1.5",
        "vae": vae_config(base / "vae", config["vae"]),
        "tokenizer": {**config["tokenizer"], "merges": _merges(base / "tokenizer")},
    }
    files = {
        "unet": unet_file(base),
        "text_encoder": weight_file(base / "text_encoder", ENCODER_FILES),
        "vae": weight_file(base / "vae", VAE_FILES),
    }
    states = {
        "unet": lambda like: brush_unet_state(_unet_of(files["unet"], channels), like, files["unet"]),
        "text_encoder": lambda like: text_encoder_keys(read_tensors(files["text_encoder"]), like),
        "vae": lambda like: vae_state(files["vae"], config["vae"]),
    }
    parts = {part: filled_part(part, config, files[part], states[part], torch.float32) for part in files}
    return BrushModules(**parts), config


def _unet_of(path: Path, channels: int | None) -> Mapping[str, Tensor]:
    return read_tensors(path) if channels is None else unet_state(path, channels, _BASES[channels])


def brush_unet_state(state: Mapping[str, Tensor], like: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Stable Diffusion's U-Net, or its inpainting model's, with an input for the mask, an output for it, and precision.

    like: what SmartBrush's has. The weights of the mask are the inpainting model's, else zero, as are those of the
    predicted mask and of the precision: it begins as the base it is made of, and predicts a mask of 0.5 everywhere.
    """
    if not isinstance(state.get("conv_in.weight"), Tensor) or not {"conv_out.weight", "conv_out.bias"} <= state.keys():
        raise ModelFileError(
            f"{path} is {recognise(state).title}; a U-Net of Stable Diffusion 1.5 in diffusers layout was expected."
        )
    known, inputs = state["conv_in.weight"], like["conv_in.weight"].shape[1]
    if known.shape[1] not in (inputs - 1, INPAINTING_CHANNELS):
        raise ModelFileError(
            f"{path} is a U-Net with {known.shape[1]} input channels; Stable Diffusion 1.5 has {inputs - 1}, its "
            f"inpainting model {INPAINTING_CHANNELS}."
        )
    return {
        **state,
        "conv_in.weight": widened(known[:, :inputs], inputs),  # latents and mask come first in the inpainting model
        "conv_out.weight": _with_silent_row(state["conv_out.weight"]),
        "conv_out.bias": _with_silent_row(state["conv_out.bias"]),
        "class_embedding.weight": known.new_zeros(like["class_embedding.weight"].shape),
    }


def _with_silent_row(values: Tensor) -> Tensor:
    """One output more [out+1,...], always 0."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])


def _merges(folder: Path) -> list[str]:
    """The pairs of a CLIP tokenizer, from which its vocabulary follows; ModelFileError where it does not."""
    merges, vocabulary = read_merges(folder / MERGES_FILE), folder / VOCABULARY_FILE
    if vocabulary.is_file() and read_json(vocabulary) != clip_vocabulary(merges):
        raise ModelFileError(f"{vocabulary} does not belong to {MERGES_FILE} beside it, as CLIP's tokenizer makes it.")
    return merges
