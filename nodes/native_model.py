"""A loaded MimicBrush as ComfyUI's own MODEL, CONDITIONING and VAE, for its stock samplers, LoRA loaders and patches.

The imitative U-Net runs as ComfyUI's own U-Net, from the same weights. Everything that makes it a MimicBrush comes in
by the conditioning: the channels beside the latents, the tokens, and which references are read (`Reading`); so
positive and negative differ as they do for any other model, and conditionings of several nodes can be combined.

Who holds the weights: off the device they lie in memory once, the tensors the MimicBrush was loaded into, and ComfyUI's
U-Net and diffusers' have each its own Parameters over them. On the device each has a copy while it is there, moved by
its own patcher; they are two models to the memory manager, and it sends one away when the other needs the room. Shared
Parameters would be moved under the feet of the one that did not ask for it, as the manager keeps its books per model; a
LoRA replaces the Parameters of ComfyUI's U-Net only. The reference U-Net and the VAE are the loaded model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ..mimicbrush_core.attention import ReferenceFeatures, blend_by_merging, reading_blocks, split_heads
from ..mimicbrush_core.bridge import (
    check_references,
    latent_colors,
    reading_spans,
    source_conditions,
    span_tokens,
)
from ..mimicbrush_core.depth import DepthCondition
from ..mimicbrush_core.encoders import decode_latents, encode_latents
from ..mimicbrush_core.errors import ArgumentError
from ..mimicbrush_core.examples import EXAMPLES
from ..mimicbrush_core.references import ReferenceUse
from ..mimicbrush_core.systems.mimicbrush import MimicBrush
from .host import HomingPatcher, LoadedMimicBrush, stop_if_interrupted

BESIDE, READING = "mimicbrush_beside", "mimicbrush_reading"
"""What a conditioning of this model carries: the channels beside the latents [B,9,h,w], and a `Reading`."""

KNOWN_BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear"}
"""diffusers' names of noise schedules -> ComfyUI's."""

KNOWN_PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}
SD15_SCALING = 0.18215  # of the latents that ComfyUI's own previews are made for

# --- reading references --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """What a conditioning's rows read: the references, and the network that writes their features."""

    uses: tuple[ReferenceUse, ...]
    reference_unet: nn.Module

    def features(self, timestep: float) -> list[ReferenceFeatures]:
        """What they offer at a timestep; kept in the references' own stores for the next run."""
        found = []
        for use in self.uses:
            stop_if_interrupted()
            use.reference.prepare(self.reference_unet, [timestep])
            banks = use.reference.banks_at(self.reference_unet, timestep)
            found.append(ReferenceFeatures(banks, use.weight))
        return found


class ReadingCondition(comfy.conds.CONDRegular):
    """What each row of a batch reads, a list of `Reading`; rows that read different references run together."""

    def process_cond(self, batch_size, **_unused):
        return self._copy_with(self.cond * batch_size)

    def can_concat(self, _other) -> bool:
        return True

    def concat(self, others) -> list[Reading]:
        return [reading for one in (self, *others) for reading in one.cond]

    def size(self) -> list[int]:
        return [len(self.cond)]


class ReadingUNet(UNetModel):
    """ComfyUI's U-Net, whose middle and upper self-attentions read references.

    reading_attentions: {the block as ComfyUI counts it: (its name in diffusers, its self-attention)}; set by
    `build_native`.
    """

    reading_attentions: dict[tuple[str, int], tuple[str, nn.Module]]

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **given):
        options = transformer_options if transformer_options is not None else {}
        rows = given.pop(READING, [])
        features = {reading: reading.features(float(timesteps[rows.index(reading)])) for reading in dict.fromkeys(rows)}
        if any(features.values()):
            options = self._with_reading(options, [features[reading] for reading in rows])
        return super().forward(x, timesteps, context, y, control, options, **given)

    def _with_reading(self, options: dict, rows: list[list[ReferenceFeatures]]) -> dict:
        """The options of one call, with reading wherever no other patch (such as PAG's) replaces the attention."""
        replaced = options.get("patches_replace", {})
        reading = {
            block: ReadingAttention(name, attention, rows)
            for block, (name, attention) in self.reading_attentions.items()
        }
        return {**options, "patches_replace": {**replaced, "attn1": {**reading, **replaced.get("attn1", {})}}}


@dataclass(frozen=True)
class ReadingAttention:
    """Stands in for one block's self-attention in one call of the U-Net.

    rows: for each row of the batch the references it reads; the rows that read none come out as without it.
    """

    name: str
    attention: nn.Module
    rows: list[list[ReferenceFeatures]]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """query, key, value [B,N,C], projected -> [B,N,C], before the output's projection."""
        if len(key) != len(query):  # HyperTile cuts only the queries into tiles; the host's attention does this, too
            key, value = (tokens.reshape(len(query), -1, tokens.shape[-1]) for tokens in (key, value))
        output = torch.empty_like(query)
        tiles = len(query) // len(self.rows)
        for features in {id(row): row for row in self.rows}.values():
            chosen = [index for index in range(len(query)) if self.rows[index // tiles] is features]
            attend = self._read if features else _plain_attention
            output[chosen] = attend(*(tokens[chosen] for tokens in (query, key, value)), options, features)
        return output

    def _read(self, query: Tensor, key: Tensor, value: Tensor, options: dict, features: list) -> Tensor:
        heads = options["n_heads"]
        references = [self._key_and_value(one, query, heads) for one in features]
        blended = blend_by_merging(*(split_heads(tokens, heads) for tokens in (query, key, value)), references)
        return blended.transpose(1, 2).flatten(2).to(query.dtype)

    def _key_and_value(self, features: ReferenceFeatures, like: Tensor, heads: int) -> tuple[Tensor, Tensor, float]:
        """A reference's tokens by the reader's projections, LoRAs included."""
        bank = features.banks[self.name].to(like)
        key, value = (
            split_heads(project(bank), heads).expand(len(like), -1, -1, -1)
            for project in (self.attention.to_k, self.attention.to_v)
        )
        return key, value, features.weight


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, options: dict, _features: list) -> Tensor:
    """The host's own, of the rows that read nothing."""
    return optimized_attention(
        query, key, value, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
    )


# --- the model -----------------------------------------------------------------------------------------------


class NativeMimicBrush(comfy.model_base.BaseModel):
    """ComfyUI's frame around the U-Net. home: the weights off the device, by this module's names."""

    def concat_cond(self, **given) -> Tensor:
        """The channels beside the latents [B,9,h,w]."""
        if BESIDE not in given:
            raise ArgumentError("This model needs positive and negative from the Imitative Model node.")
        beside, noise = given[BESIDE], given["noise"]
        if beside.shape[-2:] != noise.shape[-2:]:
            raise ArgumentError(
                f"The latent is {noise.shape[-1]} x {noise.shape[-2]}, the conditioning {beside.shape[-1]} x "
                f"{beside.shape[-2]}. Take both from the same Imitative Model."
            )
        return comfy.utils.resize_to_batch_size(beside.to(given["device"]), len(noise))

    def extra_conds(self, **given) -> dict:
        conditions = super().extra_conds(**given)
        conditions[READING] = ReadingCondition([given[READING]])
        return conditions


class NativeConfig(comfy.supported_models.SD15):
    """What ComfyUI wants to know of a model before it is built."""

    unet_extra_config: ClassVar[dict] = {}  # the stock one has eight heads whatever the model

    def __init__(self, brush: MimicBrush, latent_format: comfy.latent_formats.LatentFormat):
        super().__init__(native_unet_config(brush.config["unet"]))
        self.latent_format = latent_format
        self.sampling_settings = sampling_settings(brush.config["scheduler"])
        device = comfy.model_management.get_torch_device()
        manual_cast = comfy.model_management.unet_manual_cast(brush.dtype, device, self.supported_inference_dtypes)
        self.set_inference_dtype(brush.dtype, manual_cast)
        operations = comfy.ops.pick_operations(brush.dtype, manual_cast)
        self.custom_operations = with_norm_groups(operations, brush.config["unet"]["norm_num_groups"])


def with_norm_groups(operations: type, groups: int) -> type:
    """ComfyUI's operations for a U-Net of any number of norm groups; its own asks for 32 wherever it has one."""

    class GroupNorm(operations.GroupNorm):
        def __init__(self, num_groups, num_channels, **given):
            super().__init__(groups, num_channels, **given)

    return type(operations.__name__, (operations,), {"GroupNorm": GroupNorm})


def native_unet_config(config: dict) -> dict:
    """A diffusers U-Net's configuration as ComfyUI describes it; raises ArgumentError for what its U-Net cannot be."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    if any(width % widths[0] for width in widths):
        raise ArgumentError(
            "ComfyUI's own U-Net has widths that are multiples of the first; this model's are "
            f"{', '.join(map(str, widths))}. Use the Imitative Sampler."
        )
    down = [int(kind.startswith("CrossAttn")) for kind in config["down_block_types"]]
    up = [int(kind.startswith("CrossAttn")) for kind in reversed(config["up_block_types"])]  # the finest level first
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        **_heads(config["attention_head_dim"], widths),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "legacy": False,
    }


def _heads(heads: int | list[int], widths: list[int]) -> dict:
    """How attention is divided. heads: of all levels or of each; diffusers calls it a head's width, by an old mistake.

    ComfyUI's U-Net has as many heads everywhere, or as wide ones; raises ArgumentError for others.
    """
    if isinstance(heads, int):
        return {"num_heads": heads, "num_head_channels": -1}
    head_widths = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(head_widths) > 1:
        raise ArgumentError(
            f"ComfyUI's own U-Net has attention heads of one width; this model's have {sorted(head_widths)}. Use the "
            "Imitative Sampler."
        )
    return {"num_heads": -1, "num_head_channels": head_widths.pop()}


def sampling_settings(scheduler: dict) -> dict:
    """A diffusers scheduler's noise schedule as ComfyUI describes it; raises ArgumentError for one it does not have."""
    return {
        "beta_schedule": _known(KNOWN_BETAS, scheduler["beta_schedule"]),
        "linear_start": scheduler["beta_start"],
        "linear_end": scheduler["beta_end"],
        "timesteps": scheduler["num_train_timesteps"],
        "zsnr": scheduler.get("rescale_betas_zero_snr", False),
    }


def _known(names: dict, name: str):
    if name not in names:
        raise ArgumentError(f"ComfyUI has no {name!r} for models of this kind. Use the Imitative Sampler.")
    return names[name]


def build_native(loaded: LoadedMimicBrush) -> HomingPatcher:
    """ComfyUI's MODEL of a loaded MimicBrush. Needs the VAE on the device, for the previews' colours."""
    brush = loaded.model
    config = NativeConfig(brush, latent_format_of(brush))
    kind = _known(KNOWN_PREDICTIONS, brush.config["scheduler"]["prediction_type"])
    model = NativeMimicBrush(config, kind, device=torch.device("meta"), unet_model=ReadingUNet)
    native_names = comfy.utils.unet_to_diffusers(config.unet_config)
    home = loaded.patchers["unet"].model.home
    weights = {native_names[name.removeprefix("unet.")]: weight for name, weight in home.items()}
    model.diffusion_model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()
    model.home = {f"diffusion_model.{name}": weight for name, weight in weights.items()}
    model.diffusion_model.reading_attentions = dict(
        _native_attention(model.diffusion_model, name, native_names) for name in reading_blocks(brush.modules.unet)
    )
    patcher = loaded.patchers["unet"]
    model.device = patcher.offload_device
    return HomingPatcher(model, patcher.load_device, patcher.offload_device)


def _native_attention(unet: UNetModel, name: str, native_names: dict) -> tuple[tuple[str, int], tuple[str, nn.Module]]:
    """(the block as ComfyUI counts it, (its name in diffusers, its self-attention))."""
    path = native_names[f"{name}.norm1.weight"].removesuffix(".norm1.weight")
    part, index = path.split(".")[:2]  # "output_blocks.3.1.transformer_blocks.0", "middle_block.1.transformer_blocks.0"
    block = ("middle", 0) if part == "middle_block" else ("output", int(index))
    return block, (name, unet.get_submodule(path).attn1)


def latent_format_of(brush: MimicBrush) -> comfy.latent_formats.LatentFormat:
    """How ComfyUI scales the latents and previews them."""
    scaling = brush.modules.vae.config.scaling_factor
    if scaling == SD15_SCALING:
        return comfy.latent_formats.SD15()
    latent_format = comfy.latent_formats.LatentFormat()
    latent_format.scale_factor = scaling
    latent_format.spacial_downscale_ratio = brush.latent_factor
    colors = latent_colors(brush, [example.render()[0] for example in EXAMPLES], brush.config["defaults"]["size"])
    *latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = colors.tolist()
    return latent_format


# --- the pictures --------------------------------------------------------------------------------------------


class NativeVAE:
    """The model's VAE with what stock nodes ask of one; its latents are unscaled, as ComfyUI's are between nodes."""

    def __init__(self, loaded: LoadedMimicBrush):
        self._loaded = loaded
        self.downscale_ratio = self.upscale_ratio = loaded.model.latent_factor
        self.latent_channels, self.output_channels, self.latent_dim = 4, 3, 2

    def throw_exception_if_invalid(self) -> None:
        """There is always one."""

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def temporal_compression_decode(self) -> None:
        """None: it is no video VAE."""

    def decode(self, samples: Tensor, **_unused) -> Tensor:
        """Latents [B,4,h,w] -> pictures [B,H,W,3] in 0..1."""
        vae = self._bring(max(samples.shape[-2:]) * self.upscale_ratio)
        return torch.cat([self._decode_one(vae, one) for one in samples.split(1)]).movedim(1, -1)  # memory

    def decode_tiled(self, samples: Tensor, tile_x=64, tile_y=64, overlap=16, **_unused) -> Tensor:
        """As `decode`, tile by tile; sizes in latents."""
        vae = self._bring(max(tile_x, tile_y) * self.upscale_ratio)
        pictures = comfy.utils.tiled_scale(
            samples, lambda tile: self._decode_one(vae, tile), tile_x, tile_y, overlap, self.upscale_ratio, 3
        )
        return pictures.movedim(1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures [B,H,W,3] in 0..1 -> latents [B,4,h,w]; what is beyond a whole latent is cut off on both sides."""
        planes = self._cropped(pixels)
        vae = self._bring(max(planes.shape[-2:]))
        return torch.cat([self._encode_one(vae, one) for one in planes.split(1)])

    def encode_tiled(self, pixels: Tensor, tile_x=512, tile_y=512, overlap=64, **_unused) -> Tensor:
        """As `encode`, tile by tile; sizes in pixels."""
        vae = self._bring(max(tile_x, tile_y))
        return comfy.utils.tiled_scale(
            self._cropped(pixels),
            lambda tile: self._encode_one(vae, tile),
            *(tile_x, tile_y, overlap, 1 / self.downscale_ratio, self.latent_channels),
        )

    def get_sd(self) -> dict[str, Tensor]:
        return self._loaded.model.modules.vae.state_dict()

    def _bring(self, size: int) -> nn.Module:
        return self._loaded.bring("pictures", size=size).modules.vae

    def _cropped(self, pixels: Tensor) -> Tensor:
        height, width = (length - length % self.downscale_ratio for length in pixels.shape[1:3])
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return pixels[:, top : top + height, left : left + width, :3].movedim(-1, 1)

    @staticmethod
    @torch.no_grad()
    def _decode_one(vae: nn.Module, samples: Tensor) -> Tensor:
        scaled = (samples * vae.config.scaling_factor).to(vae.device, vae.dtype)
        pictures = (decode_latents(vae, scaled).float() / 2 + 0.5).clamp(0, 1)
        return pictures.to(comfy.model_management.intermediate_device())

    @staticmethod
    @torch.no_grad()
    def _encode_one(vae: nn.Module, planes: Tensor) -> Tensor:
        latents = encode_latents(vae, (planes * 2 - 1).to(vae.device, vae.dtype)).float()
        return (latents / vae.config.scaling_factor).to(comfy.model_management.intermediate_device())


# --- all of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NativeParts:
    """What the Imitative Model node gives, in ComfyUI's own forms."""

    model: HomingPatcher
    positive: list
    negative: list
    empty_latent: dict
    source_latent: dict
    vae: NativeVAE


def native_parts(
    loaded: LoadedMimicBrush,
    source: Tensor,
    mask: Tensor,
    references: list[ReferenceUse],
    depth: DepthCondition | None = None,
) -> NativeParts:
    """An edit in ComfyUI's own forms.

    source float [B,H,W,3 or 4] in 0..1, mask float [B,H,W], 1 = repaint. The latents are of the model's square: the
    source padded to a square and resized, as the Imitative Sampler does it. Raises PictureError or ArgumentError.
    """
    brush = loaded.model
    check_references(brush, references)
    size = brush.size_of(references)
    constants = () if brush.knows_constants else ("image", "depth")
    loaded.bring("pictures", *constants, size=size)
    brush.compute_constants()
    condition, source_latents = source_conditions(brush, source, mask, size, depth)
    # Pictures are encoded under the host's inference mode; weights that are made in it could not be moved outside.
    if loaded.native is None:
        with torch.inference_mode(False):
            loaded.native = build_native(loaded)
    beside = condition.channels().cpu()
    latents = source_latents.cpu() / brush.modules.vae.config.scaling_factor
    return NativeParts(
        model=loaded.native.clone(),
        positive=_positive(loaded, references, beside),
        negative=[[brush.unconditional_tokens().cpu(), {BESIDE: beside, READING: _reading(loaded, ())}]],
        empty_latent={"samples": torch.zeros_like(latents)},
        source_latent={"samples": latents},
        vae=NativeVAE(loaded),
    )


def _positive(loaded: LoadedMimicBrush, references: list[ReferenceUse], beside: Tensor) -> list:
    """One entry for each stretch of the run in which the same references are read.

    A reference's start and end become the host's own share of the run (`ConditioningSetTimestepRange`), counted in
    timesteps: so they hold through runs that are split or begin late, and for any sampler's in-between steps. Where
    the timesteps are evenly spread they are the same steps as the Imitative Sampler's.
    """
    entries = []
    for span in reading_spans(references):
        values = {BESIDE: beside, READING: _reading(loaded, span.uses)}
        if span.uses:
            values["additional_models"] = [loaded.patchers["reference"]]
        if span.start > 0 or span.end < 1:
            values |= {"start_percent": span.start, "end_percent": span.end}
        entries.append([span_tokens(loaded.model, span).cpu(), values])
    return entries


def _reading(loaded: LoadedMimicBrush, uses: tuple[ReferenceUse, ...]) -> Reading:
    return Reading(uses, loaded.model.modules.reference_unet)
