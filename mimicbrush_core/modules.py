"""Configuration -> modules: the networks each system consists of, on stock diffusers/transformers classes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from importlib.resources import files

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)

from .attention import reading_blocks, transformer_blocks
from .depth import DepthProjector
from .encoders import ImageProjection
from .errors import ModelFileError
from .exemplar_encoder import ExemplarEncoder


class Parts:
    """The networks of one model. Field names are the part names of a single-file checkpoint."""

    def items(self) -> list[tuple[str, nn.Module]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass
class Modules(Parts):
    """The networks of one MimicBrush."""

    unet: nn.Module  # imitative U-Net, 13 input channels
    reference_unet: nn.Module  # 4 input channels, without what follows its last bank
    image_encoder: nn.Module  # CLIP vision model without its last layer
    image_projection: nn.Module
    depth_projector: nn.Module
    vae: nn.Module
    depth_network: nn.Module  # Depth Anything; stays float32


@dataclass
class ExemplarModules(Parts):
    """The networks of one Paint by Example."""

    unet: nn.Module  # 9 input channels
    exemplar_encoder: nn.Module
    vae: nn.Module


@dataclass
class FixupModules(Parts):
    """The networks of one Magic Fixup."""

    unet: nn.Module  # synthesizer, 9 input channels; its cross-attentions are as wide as their blocks
    detail_extractor: nn.Module  # 9 input channels, no cross-attentions, without what follows its last bank
    vae: nn.Module


@dataclass
class BrushModules(Parts):
    """The networks of one SmartBrush."""

    unet: nn.Module  # 5 input channels, 5 output channels; its class embedding is of the mask's precision
    text_encoder: nn.Module
    vae: nn.Module


MIMICBRUSH, PAINT_BY_EXAMPLE = "mimicbrush", "paint-by-example"
MAGIC_FIXUP, SMARTBRUSH = "magic-fixup", "smartbrush"
"""Systems, as a configuration's `system` names them."""

TITLES = {
    MIMICBRUSH: "MimicBrush",
    PAINT_BY_EXAMPLE: "Paint by Example",
    MAGIC_FIXUP: "Magic Fixup",
    SMARTBRUSH: "SmartBrush",
}

MODULES: dict[str, type[Parts]] = {
    MIMICBRUSH: Modules,
    PAINT_BY_EXAMPLE: ExemplarModules,
    MAGIC_FIXUP: FixupModules,
    SMARTBRUSH: BrushModules,
}
PUBLISHED_CONFIG = {
    MIMICBRUSH: "mimicbrush_sd15",
    PAINT_BY_EXAMPLE: "paint_by_example",
    MAGIC_FIXUP: "magic_fixup",
    SMARTBRUSH: "smartbrush",
}
"""System -> the bundled configuration of the published model; nobody published SmartBrush's: of one of that size."""


def parts_of(config: dict) -> tuple[str, ...]:
    """The names of the networks that the system of a configuration consists of."""
    return tuple(field.name for field in fields(MODULES[config["system"]]))


PART_NAMES = parts_of({"system": MIMICBRUSH})


def bundled_config(name: str) -> dict:
    """One of the configurations shipped with the package: the name of a file in `configs`."""
    return json.loads(files(__package__).joinpath("configs", f"{name}.json").read_text())


def small_name(system: str) -> str:
    """What the embedded model's configuration and file are called."""
    return f"{system.replace('-', '_')}_small"


def resized(config: dict, size: int) -> dict:
    """A configuration for pictures of `size` pixels."""
    return {**config, "defaults": {**config["defaults"], "size": size}}


def build_modules(config: dict) -> Parts:
    """All networks of `config` with fresh weights (or on the device of a surrounding `torch.device`)."""
    return MODULES[config["system"]](**{name: build_part(name, config) for name in parts_of(config)})


def build_part(name: str, config: dict) -> nn.Module:
    """One network of a configuration, in evaluation mode."""
    return _BUILDERS[name](config).eval()


def random_part(
    name: str,
    config: dict,
    device: str,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    bias: float = 0.0,
) -> nn.Module:
    """One network with random weights, frozen; each is allocated once, in its final place.

    generator: on `device`; None for "meta", where nothing is drawn. bias: how far biases may be from 0.
    """
    with torch.device("meta"):
        module = build_part(name, config)
    weights = {
        key: _random_weight(key, torch.empty(weight.shape, dtype=dtype, device=device), generator, bias)
        for key, weight in module.named_parameters()
    }
    module.load_state_dict(weights, assign=True)
    restore_buffers(module, device)
    return module.requires_grad_(False)


def _random_weight(key: str, weight: Tensor, generator: torch.Generator | None, bias: float) -> Tensor:
    if weight.ndim > 1:  # unit gain in every layer, so that attention is not uniform
        bound = math.sqrt(3 / math.prod(weight.shape[1:]))
        return weight.uniform_(-bound, bound, generator=generator)
    if not key.endswith("bias"):  # gains of norms and of residual branches
        return weight.fill_(1.0)
    return weight.uniform_(-bias, bias, generator=generator) if bias else weight.zero_()


def restore_buffers(module: nn.Module, device: str = "cpu") -> None:
    """Recreate what a checkpoint does not hold: position indices, the only such buffer of these networks.

    For a module that was built on the meta device and then given its weights. Raises ModelFileError for a
    buffer of unknown content.
    """
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name != "position_ids":
                raise ModelFileError(f"{type(owner).__name__} has an unknown buffer {name!r} in this transformers.")
            owner.register_buffer(name, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)


def _build_unet(config: dict) -> nn.Module:
    return UNet2DConditionModel(**config["unet"])


def _build_reference_unet(config: dict) -> nn.Module:
    unet = UNet2DConditionModel(**{**config["unet"], "in_channels": 4})
    drop_tail(unet)
    return unet


def _build_detail_extractor(config: dict) -> nn.Module:
    unet = UNet2DConditionModel(**config["unet"])
    drop_tail(unet)
    for block in transformer_blocks(unet).values():
        block.attn2 = block.norm2 = None  # a block without cross-attention, which diffusers has no setting for
    return unet


def drop_tail(reference_unet: nn.Module) -> None:
    """Remove what follows the last bank, in place; for SD-1.5 exactly the 24 tensors the original omits.

    The writer stops the forward pass before any of it would run (`references.write_features`).
    """
    last_name, last_block = list(reading_blocks(reference_unet).items())[-1]
    # e.g. up_blocks.3.attentions.2.transformer_blocks.0
    _, up_index, _, attention_index, *_ = last_name.split(".")
    up_block = reference_unet.up_blocks[int(up_index)]
    up_block.attentions[int(attention_index)].proj_out = nn.Identity()
    for part in ("to_q", "to_k", "to_v", "to_out"):
        setattr(last_block.attn1, part, nn.Identity())
    for part in ("attn2", "norm2", "norm3", "ff"):
        setattr(last_block, part, nn.Identity())
    up_block.upsamplers = None
    reference_unet.up_blocks = reference_unet.up_blocks[: int(up_index) + 1]
    reference_unet.conv_norm_out = nn.Identity()
    reference_unet.conv_out = nn.Identity()


def _build_image_encoder(config: dict) -> nn.Module:
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**config["image_encoder"]))
    # The tokens are taken before the final LayerNorm and the projection: neither is ever used.
    encoder.visual_projection = nn.Identity()
    vision_model(encoder).post_layernorm = nn.Identity()
    return encoder


def vision_model(encoder: nn.Module) -> nn.Module:
    """The vision transformer inside CLIPVisionModelWithProjection, wherever this transformers keeps it."""
    return getattr(encoder, "vision_model", encoder)


def _build_exemplar_encoder(config: dict) -> nn.Module:
    vision = dict(config["exemplar_encoder"])
    mapper_layers = vision.pop("mapper_layers")
    return ExemplarEncoder(vision, mapper_layers, config["unet"]["cross_attention_dim"])


def _build_text_encoder(config: dict) -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))


def _build_image_projection(config: dict) -> nn.Module:
    return ImageProjection(config["image_encoder"]["hidden_size"], config["unet"]["cross_attention_dim"])


def _build_depth_projector(config: dict) -> nn.Module:
    return DepthProjector(**config["depth_projector"])


def _build_depth_network(config: dict) -> nn.Module:
    settings = config["depth_network"]
    layers = settings["num_hidden_layers"]
    backbone = Dinov2Config(
        hidden_size=settings["hidden_size"],
        num_hidden_layers=layers,
        num_attention_heads=settings["num_attention_heads"],
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        out_indices=list(range(layers - 3, layers + 1)),  # the last four layers
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=settings["patch_size"],
            reassemble_factors=[4, 2, 1, 0.5],
            reassemble_hidden_size=settings["hidden_size"],
            neck_hidden_sizes=settings["neck_hidden_sizes"],
            fusion_hidden_size=settings["fusion_hidden_size"],
            head_hidden_size=settings["head_hidden_size"],
            depth_estimation_type="relative",
        )
    )


def _build_vae(config: dict) -> nn.Module:
    settings = dict(config["vae"])
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    name = settings.pop("class")
    if name not in classes:
        raise ModelFileError(f"The configuration asks for the VAE class {name!r}; known: {', '.join(classes)}.")
    return classes[name](**settings)


_BUILDERS = {
    "unet": _build_unet,
    "reference_unet": _build_reference_unet,
    "detail_extractor": _build_detail_extractor,
    "image_encoder": _build_image_encoder,
    "exemplar_encoder": _build_exemplar_encoder,
    "text_encoder": _build_text_encoder,
    "image_projection": _build_image_projection,
    "depth_projector": _build_depth_projector,
    "vae": _build_vae,
    "depth_network": _build_depth_network,
}
