"""Where a SmartBrush begins: from Stable Diffusion 1.5 or its inpainting model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import ENCODER_FILES, VAE_FILES, filled_part, read_json, vae_config, vae_state, weight_file
from ..errors import ModelFileError
from ..keys import text_encoder_keys
from ..modules import BrushModules, bundled_config
from ..recognition import recognise
from ..text import MERGES_FILE, VOCABULARY_FILE, clip_vocabulary, read_merges
from ..weight_files import is_folder, read_tensors
from .starts import INPAINTING_CHANNELS, unet_file, widened

FOLDERS = ("unet", "text_encoder", "tokenizer", "vae")
"""What is taken of a pipeline folder in diffusers layout."""


def initialise_from(base: str | Path, config: dict | None = None) -> tuple[BrushModules, dict]:
    """The modules on the CPU in float32, frozen, and their configuration, with the tokenizer in it.

    base: the pipeline folder of Stable Diffusion 1.5 or of its inpainting model. config: for other sizes.
    Raises ModelFileError: something is missing or does not fit.
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
        "unet": lambda like: brush_unet_state(read_tensors(files["unet"]), like, files["unet"]),
        "text_encoder": lambda like: text_encoder_keys(read_tensors(files["text_encoder"]), like),
        "vae": lambda like: vae_state(files["vae"], config["vae"]),
    }
    parts = {part: filled_part(part, config, files[part], states[part], torch.float32) for part in files}
    return BrushModules(**parts), config


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
