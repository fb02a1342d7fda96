"""Key names of foreign checkpoints -> key names of the modules built here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]


def image_encoder_keys(state: Mapping[str, Tensor], layers: int, like: Mapping[str, Tensor]) -> State:
    """CLIP vision weights, original layout -> `like`, the encoder without its last layer.

    Left out because never used: layer number `layers` (the last), the final LayerNorm, the projection, and the
    `position_ids` buffer of transformers 4.25. The `vision_model.` prefix is given or taken as `like` has it.
    """
    unused = ("post_layernorm.", "visual_projection.", f"encoder.layers.{layers}.", "embeddings.position_ids")
    used = {key: value for key, value in state.items() if not key.removeprefix(_VISION_MODEL).startswith(unused)}
    return vision_model_keys(used, like)


_VISION_MODEL = "vision_model."


def vision_model_keys(state: Mapping[str, Tensor], like: Mapping[str, Tensor], root: str = "") -> State:
    """A CLIP vision model under `root`: transformers' inner level `vision_model.`, gone in 5.x, as `like` has it."""
    return _with_level(state, like, root, _VISION_MODEL)


def text_encoder_keys(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """A CLIP text model: transformers' inner level `text_model.`, gone in 5.x, as `like` has it.

    Left out: the `position_ids` buffer of transformers 4.25.
    """
    stored = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids")}
    return _with_level(stored, like, "", _TEXT_MODEL)


_TEXT_MODEL = "text_model."


def _with_level(state: Mapping[str, Tensor], like: Mapping[str, Tensor], root: str, level: str) -> State:
    """What is under `root`: one level of names more or less, as `like` has it."""
    inner = root + level
    wanted = inner if any(key.startswith(inner) for key in like) else root
    return {
        wanted + key.removeprefix(root).removeprefix(level) if key.startswith(root) else key: value
        for key, value in state.items()
    }


def other_transformers_keys(part: str, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """A part as another version of transformers named it -> the names of `like`; other parts are as they were."""
    if part == "depth_network":
        return transformers_depth_keys(state, like)
    if part == "image_encoder":
        return vision_model_keys(state, like)
    if part == "exemplar_encoder":
        return exemplar_encoder_keys(state, like)
    if part == "text_encoder":
        return text_encoder_keys(state, like)
    return dict(state)


def is_official_depth_anything(state: Mapping[str, Tensor]) -> bool:
    return "pretrained.cls_token" in state


def depth_anything_keys(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Depth Anything v1, official layout (`pretrained.*`, `depth_head.*`) -> transformers' class.

    transformers renamed DINOv2's attention in 5.x; `like` (the built module's state) tells which names it has.
    """
    new_names = any(".attention.q_proj." in key for key in like)
    query_key_value = (
        ("attention.q_proj", "attention.k_proj", "attention.v_proj")
        if new_names
        else ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    )
    output = "attention.o_proj" if new_names else "attention.output.dense"
    result: State = {}
    for key, value in state.items():
        qkv = re.fullmatch(r"pretrained\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key)
        if qkv:
            for name, part in zip(query_key_value, value.chunk(3, dim=0), strict=True):
                result[f"backbone.encoder.layer.{qkv[1]}.{name}.{qkv[2]}"] = part
            continue
        for pattern, replacement in _DEPTH_RULES:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                key = renamed
                break
        result[_reverse_fusion_order(key).replace("ATTENTION_OUTPUT", output)] = value
    return result


def transformers_depth_keys(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Depth Anything as transformers stores it, under its 4.x or 5.x attention names -> those of `like`."""
    new_names = any(".attention.q_proj." in key for key in like)
    result = {}
    for key, value in state.items():
        for old, new in _DEPTH_ATTENTION_NAMES:
            key = key.replace(old, new) if new_names else key.replace(new, old)
        result[key] = value
    return result


_DEPTH_ATTENTION_NAMES = [
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
]


_BLOCK = r"^pretrained\.blocks\.(\d+)\."
_LAYER = r"backbone.encoder.layer.\1."
_DEPTH_RULES = [
    (r"^pretrained\.(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    (r"^pretrained\.pos_embed$", r"backbone.embeddings.position_embeddings"),
    (r"^pretrained\.patch_embed\.proj\.", r"backbone.embeddings.patch_embeddings.projection."),
    (_BLOCK + r"(norm[12]|mlp\.fc[12])\.", _LAYER + r"\2."),
    (_BLOCK + r"attn\.proj\.", _LAYER + r"ATTENTION_OUTPUT."),
    (_BLOCK + r"ls([12])\.gamma$", _LAYER + r"layer_scale\2.lambda1"),
    (r"^pretrained\.norm\.", r"backbone.layernorm."),
    (r"^depth_head\.projects\.(\d)\.", r"neck.reassemble_stage.layers.\1.projection."),
    (r"^depth_head\.resize_layers\.(\d)\.", r"neck.reassemble_stage.layers.\1.resize."),
    (r"^depth_head\.scratch\.output_conv1\.", r"head.conv1."),
    (r"^depth_head\.scratch\.output_conv2\.0\.", r"head.conv2."),
    (r"^depth_head\.scratch\.output_conv2\.2\.", r"head.conv3."),
]


def _reverse_fusion_order(key: str) -> str:
    """`refinenet1..4` and `layer1..4_rn`: counted from one, and the fusion layers from the other end."""
    match = re.fullmatch(r"depth_head\.scratch\.layer([1-4])_rn\.weight", key)
    if match:
        return f"neck.convs.{int(match[1]) - 1}.weight"
    match = re.fullmatch(r"depth_head\.scratch\.refinenet([1-4])\.(.*)", key)
    if match is None:
        return key
    rest = match[2].replace("out_conv.", "projection.")
    rest = re.sub(r"^resConfUnit([12])\.conv([12])\.", r"residual_layer\1.convolution\2.", rest)
    return f"neck.fusion_stage.layers.{4 - int(match[1])}.{rest}"


def is_ldm_vae(state: Mapping[str, Tensor]) -> bool:
    """Whether these are single-file (Stable Diffusion) VAE names rather than diffusers'."""
    return any(key.removeprefix(_LDM_VAE_PREFIX).startswith("encoder.down.") for key in state)


_LDM_VAE_PREFIX = "first_stage_model."


def ldm_vae_keys(state: Mapping[str, Tensor], levels: int) -> State:
    """Single-file VAE, with or without `first_stage_model.` -> diffusers' AutoencoderKL.

    levels: the number of resolutions (4 for SD-1.5); the decoder counts them from the other end.
    """
    rules = [
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"^encoder\.down\.(\d)\.block\.(\d)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"^decoder\.up\.(\d)\.block\.(\d)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets.{m[2]}."),
        (r"^decoder\.up\.(\d)\.upsample\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
    ]
    result: State = {}
    whole_model = any(key.startswith(_LDM_VAE_PREFIX) for key in state)
    for key, value in state.items():
        if whole_model and not key.startswith(_LDM_VAE_PREFIX):
            continue  # the U-Net and text encoder of a full checkpoint
        key = key.removeprefix(_LDM_VAE_PREFIX)
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if ".attentions.0.to_" in key and value.ndim == 4:  # 1x1 convolutions there, linear layers here
            value = value[:, :, 0, 0]
        result[key] = value
    return {key: value for key, value in result.items() if key.startswith(_VAE_PARTS)}


_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def modern_vae_keys(state: Mapping[str, Tensor]) -> State:
    """diffusers' VAE attention under its old names (query, key, value, proj_attn) -> today's."""
    renames = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return {
        re.sub(
            r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}{renames[m[2]]}.",
            key,
        ): value
        for key, value in state.items()
    }


# --- LDM checkpoints: one file with the networks of the original code under one prefix each ----------------------


LDM_UNET_PREFIX = "model.diffusion_model."


def ldm_unet_keys(state: Mapping[str, Tensor], layers_per_block: int, prefix: str = LDM_UNET_PREFIX) -> State:
    """The U-Net under `prefix` of an LDM checkpoint -> diffusers' UNet2DConditionModel.

    LDM numbers its blocks through: after the first convolution, on the way down each level has `layers_per_block`
    blocks and one that halves the size, on the way up one block more and the doubling in the last of them.
    """
    result: State = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        for pattern, replacement in _LDM_UNET_RULES:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^input_blocks\.(\d+)\.(.*)", lambda m: _down(int(m[1]) - 1, m[2], layers_per_block), key)
        key = re.sub(r"^output_blocks\.(\d+)\.(.*)", lambda m: _up(int(m[1]), m[2], layers_per_block), key)
        result[key] = value
    return result


_LDM_UNET_RULES = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]


def _down(index: int, rest: str, layers: int) -> str:
    """rest: `0.` a residual block or (`op`) the halving, `1.` attention."""
    level, layer = divmod(index, layers + 1)
    module, _, name = rest.partition(".")
    if layer == layers:
        return f"down_blocks.{level}.downsamplers.0.{name.replace('op.', 'conv.')}"
    return f"down_blocks.{level}.{('resnets', 'attentions')[int(module)]}.{layer}.{name}"


def _up(index: int, rest: str, layers: int) -> str:
    """rest: `0.` a residual block, then attention where the level has it, then the doubling (`conv`)."""
    level, layer = divmod(index, layers + 1)
    module, _, name = rest.partition(".")
    if name.startswith("conv."):
        return f"up_blocks.{level}.upsamplers.0.{name}"
    return f"up_blocks.{level}.{('resnets', 'attentions')[int(module)]}.{layer}.{name}"


LDM_EXTRACTOR_PREFIX = "model.reference_model."
"""What the keys of Magic Fixup's detail extractor begin with, and no other system's."""


def synthesizer_keys(state: Mapping[str, Tensor], layers_per_block: int) -> State:
    """Magic Fixup's synthesizer, of its LDM checkpoint -> UNet2DConditionModel.

    Its third attention, to the details, takes the place of the second, to a text it never reads; `merge_attentions`
    is never run.
    """
    return {
        key.replace(".attn3.", ".attn2."): value
        for key, value in ldm_unet_keys(state, layers_per_block).items()
        if ".merge_attentions" not in key and ".attn2." not in key
    }


def detail_extractor_keys(state: Mapping[str, Tensor], layers_per_block: int, like: Mapping[str, Tensor]) -> State:
    """Magic Fixup's detail extractor, of its LDM checkpoint -> `like`.

    It has all that the synthesizer has, and what `like` lacks of that is never run: the attentions to anything but
    itself, and what follows the last feature.
    """
    mapped = ldm_unet_keys(state, layers_per_block, LDM_EXTRACTOR_PREFIX)
    return {key: value for key, value in mapped.items() if key in like}


def is_ldm_unet(state: Mapping[str, Tensor]) -> bool:
    """Whether a U-Net lies here under LDM's names rather than diffusers'."""
    return any(key.startswith(LDM_UNET_PREFIX) for key in state)


def exemplar_encoder_keys(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Paint by Example's image encoder, of its LDM checkpoint, of the published folder or of here -> `like`."""
    if "learnable_vector" in state:
        state = _ldm_exemplar_encoder(state)
    return vision_model_keys(
        {key: value for key, value in state.items() if not key.endswith(".embeddings.position_ids")}, like, "model."
    )


def _ldm_exemplar_encoder(state: Mapping[str, Tensor]) -> State:
    result: State = {}
    for key, value in state.items():
        qkv = re.fullmatch(r"cond_stage_model\.mapper\.resblocks\.(\d+)\.attn\.c_qkv\.(weight|bias)", key)
        if qkv:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[f"mapper.blocks.{qkv[1]}.attn1.to_{name}.{qkv[2]}"] = part
            continue
        for pattern, replacement in _LDM_EXEMPLAR_RULES:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                result[renamed] = value
                break
    return result


_MAPPER_BLOCK = r"^cond_stage_model\.mapper\.resblocks\.(\d+)\."
_LDM_EXEMPLAR_RULES = [
    (r"^cond_stage_model\.transformer\.", "model."),
    (_MAPPER_BLOCK + r"attn\.c_proj\.", r"mapper.blocks.\1.attn1.to_out.0."),
    (_MAPPER_BLOCK + r"ln_1\.", r"mapper.blocks.\1.norm1."),
    (_MAPPER_BLOCK + r"ln_2\.", r"mapper.blocks.\1.norm3."),
    (_MAPPER_BLOCK + r"mlp\.c_fc\.", r"mapper.blocks.\1.ff.net.0.proj."),
    (_MAPPER_BLOCK + r"mlp\.c_proj\.", r"mapper.blocks.\1.ff.net.2."),
    (r"^cond_stage_model\.final_ln\.", "final_layer_norm."),
    (r"^proj_out\.", "proj_out."),
    (r"^learnable_vector$", "uncond_vector"),
]
"""What no rule names belongs to another network of the file, or to its training."""
