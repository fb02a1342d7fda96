"""LoRA on the imitative U-Net: the file format that ComfyUI's stock loaders read, and applying one here.

A file holds, for each adapted layer, `lora_unet_<name in the diffusers U-Net, dots as underscores>` with
`.lora_down.weight` [r,in], `.lora_up.weight` [out,r] and `.alpha`; the layer's weight becomes
W + strength * alpha / r * up @ down. (ComfyUI: `comfy/lora.py`, `model_lora_keys_unet`)

Here a LoRA runs as a side branch and never touches a weight: so removing it, or strength 0, leaves the model bit for
bit as it was, at any precision, in any order of several LoRAs, without a copy of the weights; and a half-precision
model does not lose the small differences to the rounding of a sum. The price is two thin products per layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError, ModelFileError
from .modules import Modules
from .recognition import LORA, recognise
from .weight_files import SafetensorsWriter, read_tensors

PREFIX = "lora_unet_"
_TEXT_PREFIXES = ("lora_te",)  # of text encoders, which MimicBrush does not have
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


@dataclass(frozen=True)
class LoraLayer:
    """One layer's low-rank difference, alpha / r * up @ down.

    down [r,in] (of a convolution [r,in,k,k]), up [out,r] ([out,r,1,1]); r is the rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


def lora_key(layer_name: str) -> str:
    """The layer's name in the U-Net -> its key in a file, without the ending."""
    return PREFIX + layer_name.replace(".", "_")


def write_lora(
    path: str | os.PathLike, layers: Mapping[str, LoraLayer], note: dict | None = None, dtype=torch.float16
) -> None:
    """Write a LoRA, {layer name in the U-Net: its difference}: whole, or not at all. note: for the file's header."""
    # larger elements first, as the format's readers want them aligned
    tensors = {lora_key(name) + _ALPHA: torch.tensor(layer.alpha) for name, layer in layers.items()}
    for name, layer in layers.items():
        tensors[lora_key(name) + _DOWN] = layer.down.detach().to("cpu", dtype)
        tensors[lora_key(name) + _UP] = layer.up.detach().to("cpu", dtype)
    ranks = {len(layer.down) for layer in layers.values()}
    header = {
        "format": "pt",
        "mimicbrush_lora": json.dumps(note or {}),
        # What other programs show of a LoRA: the names of kohya's trainer.
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(next(iter(layers.values())).alpha),
    }
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with SafetensorsWriter(path, layout, header) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
        writer.finish()


def read_lora(path: str | os.PathLike) -> dict[str, LoraLayer]:
    """The layers of a LoRA file by their keys without the ending. Raises ModelFileError: not a LoRA, or damaged."""
    tensors = read_tensors(path)
    kind = recognise(tensors)
    if kind is not LORA:
        raise ModelFileError(f"{path} is {kind.title}, not a LoRA. Choose a LoRA file of a Stable Diffusion 1.5 U-Net.")
    names = sorted({key.split(".", 1)[0] for key in tensors if not key.startswith(_TEXT_PREFIXES)})
    layers = {}
    for name in names:
        down, up = tensors.get(name + _DOWN), tensors.get(name + _UP)
        extra = [key for key in tensors if key.split(".", 1)[0] == name and not key.endswith((_DOWN, _UP, _ALPHA))]
        if down is None or up is None or extra:
            raise ModelFileError(
                f"{path}: layer {name!r} is not a plain LoRA of lora_down, lora_up and alpha"
                f"{f' (it has {extra[0]!r})' if extra else ''}. LyCORIS, DoRA and other kinds cannot be used here."
            )
        alpha = tensors.get(name + _ALPHA)
        layers[name] = LoraLayer(down, up, float(alpha) if alpha is not None else float(len(down)))
    if not layers:
        raise ModelFileError(f"{path} changes the text encoder only, which MimicBrush does not have.")
    return layers


def load_lora(modules: Modules, path: str | os.PathLike, strength: float = 1.0) -> AppliedLora:
    """Apply a LoRA file to the imitative U-Net, beside others that may be there.

    Raises ModelFileError: not a LoRA, or of another U-Net.
    """
    targets = {lora_key(name): module for name, module in modules.unet.named_modules() if _adaptable(module)}
    branches = []
    for key, layer in read_lora(path).items():
        if key not in targets:
            raise ModelFileError(
                f"{path}: layer {key!r} is not in this model's U-Net. The LoRA is of another system, or of a U-Net of "
                "another size."
            )
        _check_shapes(Path(path), key, layer, targets[key])
        branches.append(_Branch(targets[key], layer))
    return AppliedLora(branches, strength)


class AppliedLora:
    """A LoRA on a U-Net. strength: may be changed at any time; 0 is as if it were not there.

    Usable as a context manager: leaving it removes the LoRA.
    """

    def __init__(self, branches: list[_Branch], strength: float):
        self._branches = branches
        self._strength = 0.0
        self.strength = strength

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not -10 <= value <= 10:
            raise ArgumentError(f"The LoRA strength is {value}; it must be between -10 and 10.")
        self._strength = float(value)
        for branch in self._branches:
            branch.set(self._strength)

    def remove(self) -> None:
        self.strength = 0.0

    def __enter__(self) -> AppliedLora:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


class _Branch:
    """The side branch of one layer: a hook on its output, there only while the strength is not 0."""

    def __init__(self, module: nn.Module, layer: LoraLayer):
        self._module, self._scale = module, layer.scale
        self._down, self._up = layer.down, layer.up
        self._factor = 0.0
        self._hook = None

    def set(self, strength: float) -> None:
        self._factor = strength * self._scale
        if strength and self._hook is None:
            self._hook = self._module.register_forward_hook(self._add)
        elif not strength and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if (self._down.device, self._down.dtype) != (x.device, x.dtype):  # the model was moved: once, not each call
            self._down, self._up = self._down.to(x), self._up.to(x)
        if isinstance(module, nn.Linear):
            change = F.linear(F.linear(x, self._down.flatten(1)), self._up.flatten(1))
        else:
            thin = F.conv2d(x, self._down, None, module.stride, module.padding, module.dilation)
            change = F.conv2d(thin, self._up)
        return output + self._factor * change


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _check_shapes(path: Path, key: str, layer: LoraLayer, module: nn.Module) -> None:
    weight, down, up = module.weight, layer.down, layer.up
    rank = len(down)
    if isinstance(module, nn.Linear):
        fits = down.flatten(1).shape == (rank, weight.shape[1]) and up.flatten(1).shape == (len(weight), rank)
    else:
        fits = down.shape == (rank, *weight.shape[1:]) and up.shape == (len(weight), rank, 1, 1)
    if not fits:
        raise ModelFileError(
            f"{path}: layer {key!r} is of shapes {list(down.shape)} and {list(up.shape)}; the U-Net's weight is "
            f"{list(weight.shape)}. The LoRA is of a U-Net of another size."
        )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ModelFileError(f"{path}: layer {key!r} holds NaN or infinite values. The file is damaged.")
