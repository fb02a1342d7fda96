"""What a set of weights is, by its key names and shapes: one of the systems here, a relative, or something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .keys import LDM_EXTRACTOR_PREFIX
from .modules import MAGIC_FIXUP, MIMICBRUSH, MODULES, PAINT_BY_EXAMPLE, SMARTBRUSH, parts_of

OPENRAIL = "CreativeML OpenRAIL-M where it is the published one; fine-tunes may add terms: see docs/licences.md"
UNKNOWN_LICENCE = "unknown; see where the file comes from"

MODEL, VAE, DEPTH, NOTHING = "model", "vae", "depth", "nothing"


@dataclass(frozen=True)
class Kind:
    """name: for programs. title: for people. use: MODEL, VAE, DEPTH or NOTHING, what it can be here.

    hint: what to do with it. licence: of the weights, as far as the content can tell.
    """

    name: str
    title: str
    use: str
    licence: str
    hint: str = ""


def _mimicbrush(name: str, title: str, use: str = MODEL, hint: str = "") -> Kind:
    licence = (
        "published in an Apache-2.0 repository, derived from Stable Diffusion 1.5 (CreativeML OpenRAIL-M): "
        "see docs/licences.md"
    )
    return Kind(name, title, use, licence, hint)


_PART_HINT = "It is one part of a model; give mimicbrush.bin, its folder or a converted file."
SINGLE_FILE = _mimicbrush("mimicbrush", "MimicBrush, converted to one file")
CHECKPOINT = _mimicbrush(
    "mimicbrush-original",
    "MimicBrush, original checkpoint (mimicbrush.bin)",
    MODEL,
    "It needs a VAE and Depth Anything beside it, or --vae and --depth.",
)
RELEASE = _mimicbrush("mimicbrush-release", "MimicBrush, folder of the original release")
UNET_PART = _mimicbrush("mimicbrush-unet", "imitative U-Net of MimicBrush (13 channels)", NOTHING, _PART_HINT)
REFERENCE_PART = _mimicbrush("mimicbrush-referencenet", "ReferenceNet of MimicBrush", NOTHING, _PART_HINT)
GUIDER_PART = _mimicbrush("mimicbrush-depth-guider", "depth projector of MimicBrush", NOTHING, _PART_HINT)
PROJECTION_PART = _mimicbrush("mimicbrush-image-proj", "image projection of MimicBrush", NOTHING, _PART_HINT)


def _exemplar(name: str, title: str, use: str = MODEL, hint: str = "") -> Kind:
    return Kind(name, title, use, "CreativeML OpenRAIL-M by its page: see docs/licences.md", hint)


EXEMPLAR_FILE = _exemplar("paint-by-example", "Paint by Example, converted to one file")
EXEMPLAR_CHECKPOINT = _exemplar("paint-by-example-original", "Paint by Example, original checkpoint")
EXEMPLAR_FOLDER = _exemplar("paint-by-example-folder", "Paint by Example, diffusers folder")
EXEMPLAR_ENCODER = _exemplar(
    "paint-by-example-image-encoder",
    "image encoder of Paint by Example",
    NOTHING,
    "It is one part of a model; give the folder that has unet, vae and image_encoder, or a converted file.",
)


def _fixup(name: str, title: str, use: str = MODEL, hint: str = "") -> Kind:
    return Kind(name, title, use, "Adobe Research License: non-commercial research only; see docs/licences.md", hint)


FIXUP_FILE = _fixup("magic-fixup", "Magic Fixup, converted to one file")
FIXUP_CHECKPOINT = _fixup("magic-fixup-original", "Magic Fixup, original checkpoint")


def _brush(name: str, title: str, use: str = MODEL, hint: str = "") -> Kind:
    return Kind(name, title, use, "of whoever trained it; nobody has published any weights: see docs/licences.md", hint)


BRUSH_FILE = _brush(
    "smartbrush",
    "SmartBrush, in one file",
    MODEL,
    "SmartBrush has no public weights: these come from someone's own training, e.g. `mimicbrush train`.",
)
BRUSH_UNET = _brush(
    "smartbrush-unet",
    "U-Net of SmartBrush (5 channels)",
    NOTHING,
    "It is one part of a model; give the whole file, as `mimicbrush train` writes it.",
)

_HEADER_HINT = "Another program saved it again and dropped the header. Convert the original files again."
_HEADERLESS_TITLE = "{} tensors without the configuration in the header"
HEADERLESS = {
    MIMICBRUSH: _mimicbrush("mimicbrush-headerless", _HEADERLESS_TITLE.format("MimicBrush"), NOTHING, _HEADER_HINT),
    PAINT_BY_EXAMPLE: _exemplar(
        "paint-by-example-headerless", _HEADERLESS_TITLE.format("Paint by Example"), NOTHING, _HEADER_HINT
    ),
    MAGIC_FIXUP: _fixup("magic-fixup-headerless", _HEADERLESS_TITLE.format("Magic Fixup"), NOTHING, _HEADER_HINT),
    SMARTBRUSH: _brush("smartbrush-headerless", _HEADERLESS_TITLE.format("SmartBrush"), NOTHING, _HEADER_HINT),
}
"""System -> its converted file, saved again by another program."""

SINGLE_FILES = {
    MIMICBRUSH: SINGLE_FILE,
    PAINT_BY_EXAMPLE: EXEMPLAR_FILE,
    MAGIC_FIXUP: FIXUP_FILE,
    SMARTBRUSH: BRUSH_FILE,
}
"""System -> what its converted file is."""

_VAE_LICENCE = "as the Stable Diffusion 1.x it is of (CreativeML OpenRAIL-M); sd-vae-ft-mse: MIT; see docs/licences.md"
DIFFUSERS_VAE = Kind("vae-diffusers", "VAE of Stable Diffusion 1.x, diffusers layout", VAE, _VAE_LICENCE)
LDM_VAE = Kind("vae-single-file", "VAE of Stable Diffusion 1.x, single-file layout", VAE, _VAE_LICENCE)
OTHER_VAE = Kind(
    "vae-other",
    "VAE of another system ({channels} latent channels)",
    NOTHING,
    UNKNOWN_LICENCE,
    "MimicBrush needs Stable Diffusion 1.x's VAE with 4 latent channels, e.g. sd-vae-ft-mse.",
)
TINY_VAE = Kind(
    "vae-tiny", "tiny autoencoder (TAESD)", NOTHING, UNKNOWN_LICENCE, "Use the full VAE, e.g. sd-vae-ft-mse."
)

_SD_HINT = "MimicBrush does not need it, but its VAE can be used (--vae)."
SD = Kind("stable-diffusion", "Stable Diffusion 1.x checkpoint", VAE, OPENRAIL, _SD_HINT)
SD_INPAINT = Kind("stable-diffusion-inpainting", "Stable Diffusion 1.x inpainting checkpoint", VAE, OPENRAIL, _SD_HINT)
SD2 = Kind("stable-diffusion-2", "Stable Diffusion 2.x checkpoint", VAE, OPENRAIL, _SD_HINT)
SDXL = Kind(
    "sdxl",
    "Stable Diffusion XL checkpoint",
    NOTHING,
    UNKNOWN_LICENCE,
    "MimicBrush is built on Stable Diffusion 1.5; neither this nor its VAE fits. Use e.g. sd-vae-ft-mse.",
)
SD_UNET = Kind("unet", "U-Net of Stable Diffusion (4 channels)", NOTHING, OPENRAIL, "MimicBrush brings its own U-Nets.")
SD_INPAINT_UNET = Kind(
    "unet-inpainting",
    "U-Net of Stable Diffusion inpainting or Paint by Example (9 channels)",
    NOTHING,
    OPENRAIL,
    "MimicBrush brings its own U-Nets. Of Paint by Example give the whole folder.",
)
DEPTH_OFFICIAL = Kind(
    "depth-anything",
    "Depth Anything {size}, official layout",
    DEPTH,
    "v1: Apache-2.0; v2: Apache-2.0 for S, non-commercial (CC-BY-NC-4.0) for B, L and G: see docs/licences.md",
    "v1 and v2 have the same keys and shapes: MimicBrush needs v1, and only the file's hash or its source tells.",
)
DEPTH_TRANSFORMERS = Kind(
    "depth-anything-transformers",
    "Depth Anything {size}, transformers layout",
    DEPTH,
    DEPTH_OFFICIAL.licence,
    "The config.json beside it tells v1 from v2: MimicBrush needs v1.",
)
CLIP_VISION = Kind(
    "clip-vision",
    "CLIP vision encoder",
    NOTHING,
    "MIT for OpenAI's and OpenCLIP's: see docs/licences.md",
    "mimicbrush.bin holds the encoder MimicBrush uses; this file is not needed.",
)
CLIP_TEXT = Kind("clip-text", "text encoder", NOTHING, UNKNOWN_LICENCE, "MimicBrush reads no text; not needed.")
LORA = Kind("lora", "LoRA", NOTHING, UNKNOWN_LICENCE, "A LoRA is not a model: use it with `mimicbrush edit --lora`.")
CONTROLNET = Kind("controlnet", "ControlNet", NOTHING, UNKNOWN_LICENCE, "MimicBrush does not use ControlNets.")
IP_ADAPTER = Kind("ip-adapter", "IP-Adapter", NOTHING, UNKNOWN_LICENCE, "MimicBrush does not use IP-Adapters.")
OTHER_DIFFUSION = Kind(
    "other-diffusion",
    "transformer diffusion model (Flux, SD3 or a relative)",
    NOTHING,
    UNKNOWN_LICENCE,
    "MimicBrush is built on Stable Diffusion 1.5; this does not fit.",
)
UNKNOWN = Kind("unknown", "unknown weights", NOTHING, UNKNOWN_LICENCE, "Check where the file comes from.")

_DEPTH_SIZES = {384: "S (small)", 768: "B (base)", 1024: "L (large)", 1536: "G (giant)"}


def recognise(content: Mapping) -> Kind:
    """What these weights are. content: {key: tensor}, or {part: {key: tensor}} as original checkpoints nest it."""
    parts = {name for name, value in content.items() if isinstance(value, Mapping)}
    if parts & {"referencenet", "depth_guider"} or {"unet", "image_encoder"} <= parts:
        return CHECKPOINT
    if "ip_adapter" in parts:
        return IP_ADAPTER
    state = unwrapped(content)
    for rule in (_system_of, _add_on_of, _depth_of, _vae_of, _unet_of, _encoder_of):
        kind = rule(state)
        if kind:
            return kind
    return UNKNOWN


def unwrapped(content: Mapping) -> dict:
    """The state dict itself: out of a `state_dict` wrapper, without DeepSpeed's prefix."""
    inner = content.get("state_dict", content)
    inner = inner if isinstance(inner, Mapping) else content
    return {str(key).removeprefix("_forward_module."): value for key, value in inner.items()}


def _has(state: Mapping, *prefixes: str) -> bool:
    """Whether each prefix begins some key."""
    return all(any(key.startswith(prefix) for key in state) for prefix in prefixes)


def _side(state: Mapping, key: str, axis: int) -> int | None:
    shape = getattr(state.get(key), "shape", ())
    return int(shape[axis]) if len(shape) > axis else None


def _system_of(state: Mapping) -> Kind | None:
    for system in MODULES:
        parts = parts_of({"system": system})
        if {key.split(".")[0] for key in state} <= set(parts) and _has(state, *(f"{part}." for part in parts[:2])):
            return HEADERLESS[system]
    if _has(state, LDM_EXTRACTOR_PREFIX):
        return FIXUP_CHECKPOINT
    if _has(state, "cond_stage_model.mapper."):
        return EXEMPLAR_CHECKPOINT
    if "uncond_vector" in state:
        return EXEMPLAR_ENCODER
    if _has(state, "conditioner.embedders."):
        return SDXL
    if _has(state, "model.diffusion_model.double_blocks.") or _has(state, "double_blocks.", "single_blocks."):
        return OTHER_DIFFUSION
    if _has(state, "model.diffusion_model.joint_blocks.") or _has(state, "transformer_blocks.0.norm1_context."):
        return OTHER_DIFFUSION
    if _has(state, "model.diffusion_model."):
        return _checkpoint_of(state)
    return None


def _checkpoint_of(state: Mapping) -> Kind:
    channels = _side(state, "model.diffusion_model.input_blocks.0.0.weight", 1)
    if not _has(state, "first_stage_model."):
        return SD_INPAINT_UNET if channels == 9 else SD_UNET
    if _has(state, "cond_stage_model.model."):
        return SD2
    return SD_INPAINT if channels == 9 else SD


def _add_on_of(state: Mapping) -> Kind | None:
    if any(".lora_" in key or key.startswith("lora_") or key.endswith(".hada_w1_a") for key in state):
        return LORA
    if _has(state, "control_model.") or _has(state, "controlnet_cond_embedding.") or _has(state, "input_hint_block."):
        return CONTROLNET
    if _has(state, "ip_adapter."):
        return IP_ADAPTER
    return None


def _depth_of(state: Mapping) -> Kind | None:
    if "pretrained.cls_token" in state and _has(state, "depth_head."):
        return sized(DEPTH_OFFICIAL, _side(state, "pretrained.cls_token", 2))
    if "backbone.embeddings.cls_token" in state and _has(state, "neck.", "head."):
        return sized(DEPTH_TRANSFORMERS, _side(state, "backbone.embeddings.cls_token", 2))
    return None


def sized(kind: Kind, width: int | None) -> Kind:
    """A depth network's kind with its size in the title."""
    size = _DEPTH_SIZES.get(width, f"of width {width}")
    return Kind(kind.name, kind.title.format(size=size), kind.use, kind.licence, kind.hint)


def _vae_of(state: Mapping) -> Kind | None:
    bare = {key.removeprefix("first_stage_model."): value for key, value in state.items()}
    ldm = _has(bare, "encoder.down.", "decoder.up.")
    if ldm or _has(bare, "encoder.down_blocks.", "decoder.up_blocks."):
        channels = _side(bare, "decoder.conv_in.weight", 1)
        if channels not in (4, None):
            title = OTHER_VAE.title.format(channels=channels)
            return Kind(OTHER_VAE.name, title, OTHER_VAE.use, OTHER_VAE.licence, OTHER_VAE.hint)
        return LDM_VAE if ldm else DIFFUSERS_VAE
    if "encoder.layers.0.weight" in state and "decoder.layers.0.weight" in state:
        return TINY_VAE
    return None


def _unet_of(state: Mapping) -> Kind | None:
    if _has(state, "conv_in.", "down_blocks.", "mid_block."):
        channels = _side(state, "conv_in.weight", 1)
        if channels == 13:
            return UNET_PART
        if channels == 4 and "conv_out.weight" not in state:
            return REFERENCE_PART
        return {5: BRUSH_UNET, 9: SD_INPAINT_UNET}.get(channels, SD_UNET)
    if _has(state, "input_blocks.", "middle_block.", "output_blocks."):
        return SD_INPAINT_UNET if _side(state, "input_blocks.0.0.weight", 1) == 9 else SD_UNET
    if set(state) and _has(state, "conv_in.", "blocks.0.", "conv_out."):
        return GUIDER_PART
    if set(state) == {"projector.weight", "projector.bias"}:
        return PROJECTION_PART
    return None


def _encoder_of(state: Mapping) -> Kind | None:
    if _has(state, "vision_model.") or "embeddings.patch_embedding.weight" in state or _has(state, "visual."):
        return CLIP_VISION
    if _has(state, "text_model.") or _has(state, "cond_stage_model."):
        return CLIP_TEXT
    return None
