"""Reading a reference: merged into self-attention (MimicBrush), or as all of cross-attention (Magic Fixup).

The imitative U-Net's middle and upper self-attentions look at the picture's own tokens and at the
reference's tokens. With `o_s, l_s` the attention output and log-sum-exp over the picture's own tokens and
`o_r, l_r` over the reference's, the original's blend is

    0.5 * Attn(q, [self; ref]) + 0.5 * Attn(q, self)  =  o_s + 0.5 * sigmoid(l_r - l_s) * (o_r - o_s)

so nothing is attended to twice. A reference's *weight* w is a shift of its log-sum-exp, `l_r + log w`:
w = 1 is the original, w = 0 is as if there were no reference, and several references merge by the same rule.

Source: MimicBrush (arXiv 2406.07547) and the released `ReferenceNet_attention.py`, whose 0.5/0.5 blend of
joint and plain attention (`ratio`) the paper does not mention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

JOINT_SHARE = 0.5
"""How much of the joint attention enters the blend; hard-wired in the original (`ratio = 0.5`)."""


@dataclass(frozen=True)
class ReferenceFeatures:
    """What one reference offers at one timestep.

    banks: self-attention inputs of the reference U-Net by block name, each [1 or B, M, C].
    weight: 0 = not read, 1 = as trained; larger leans harder on the reference.
    """

    banks: dict[str, Tensor]
    weight: float = 1.0


def transformer_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """All transformer blocks by name, in order of execution; a reader is paired with the writer of the same name."""
    blocks = {name: module for name, module in unet.named_modules() if hasattr(module, "attn1")}
    # The middle block is registered after the upper blocks but runs before them.
    paths = ("down_blocks", "mid_block", "up_blocks")
    return dict(sorted(blocks.items(), key=lambda item: paths.index(item[0].split(".")[0])))


def reading_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks that write and read MimicBrush's reference features, by name, in order of execution.

    They are all blocks of the middle and of the upper path ("midup" in the original).
    """
    return {name: block for name, block in transformer_blocks(unet).items() if not name.startswith("down_blocks.")}


# --- attention that also returns its log-sum-exp ---------------------------------------------------------


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention and the log-sum-exp of its scaled scores.

    query [B,H,N,D], key and value [B,H,M,D]  ->  output [B,H,N,D], log-sum-exp [B,H,N] in float32.
    Not differentiable through the log-sum-exp: the fused kernels do not offer it (see `blend_by_two_calls`).
    """
    kernel = _lse_kernel(query)
    return kernel(query, key, value)


def _lse_kernel(query: Tensor):
    """The one place that chooses a kernel: fused where the device has one, plain otherwise."""
    if query.device.type == "cpu":
        return _cpu_kernel
    if query.device.type == "cuda" and torch.version.hip is None:
        half = query.dtype in (torch.float16, torch.bfloat16)
        if half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
            return _cuda_flash_kernel
        if query.shape[-1] % 8 == 0:
            return _cuda_efficient_kernel
    return plain_attention_with_lse


def _cpu_kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def _cuda_flash_kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]


def _cuda_efficient_kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    return output, lse[..., : query.shape[2]]  # the kernel pads the query axis to its tile size


def plain_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, queries_at_once: int = 1024
) -> tuple[Tensor, Tensor]:
    """The same numbers from matmul and softmax, some queries at a time; for devices without a fused kernel."""
    scale = 1.0 / math.sqrt(query.shape[-1])
    outputs, lses = [], []
    for some in query.split(queries_at_once, dim=2):
        scores = (some @ key.transpose(-1, -2)).float() * scale  # [B,H,n,M]
        lse = torch.logsumexp(scores, dim=-1)  # [B,H,n]
        outputs.append(torch.exp(scores - lse[..., None]).to(value.dtype) @ value)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


# --- merging self and reference ----------------------------------------------------------------------------


def blend_by_merging(
    query: Tensor, key: Tensor, value: Tensor, references: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """Self-attention blended with references, each attended to once (inference).

    query, key, value [B,H,N,D]; references: (key [B,H,M,D], value [B,H,M,D], weight > 0) each.
    Returns [B,H,N,D].
    """
    return blend_and_share(query, key, value, references)[0]


def blend_and_share(
    query: Tensor, key: Tensor, value: Tensor, references: Sequence[tuple[Tensor, Tensor, float]]
) -> tuple[Tensor, Tensor]:
    """`blend_by_merging`, and the part of the joint attention's mass that is on the references, [B,H,N] in float32."""
    own, own_lse = attention_with_lse(query, key, value)
    merged, merged_lse = None, None
    for ref_key, ref_value, weight in references:
        out, lse = attention_with_lse(query, ref_key, ref_value)
        lse = lse + math.log(weight)
        if merged is None:
            merged, merged_lse = out, lse
        else:
            merged = _mixed(merged, out, _share(lse, merged_lse))
            merged_lse = torch.logaddexp(merged_lse, lse)
    share = _share(merged_lse, own_lse)
    return _mixed(own, merged, share, JOINT_SHARE), share


def _share(lse: Tensor, other_lse: Tensor) -> Tensor:
    """The part of the joint softmax's mass on the first of two key sets, [B,H,N]."""
    return torch.sigmoid(lse - other_lse)


def _mixed(first: Tensor, second: Tensor, share: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` * `share` [B,H,N] of the second output, the rest of the first; both [B,H,N,D]."""
    return torch.lerp(first, second, scale * share[..., None].to(first.dtype))


def blend_by_two_calls(
    query: Tensor, key: Tensor, value: Tensor, references: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """The same blend from a plain and a joint attention; differentiable, so training uses it."""
    own = F.scaled_dot_product_attention(query, key, value)
    keys = torch.cat([key, *(ref_key for ref_key, _, _ in references)], dim=2)
    values = torch.cat([value, *(ref_value for _, ref_value, _ in references)], dim=2)
    joint = F.scaled_dot_product_attention(query, keys, values, attn_mask=_weight_bias(key, references))
    return torch.lerp(own, joint, JOINT_SHARE)


def _weight_bias(key: Tensor, references: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor | None:
    """log(weight) for every key token, [1,1,1,N+M...]; None when all weights are 1."""
    if all(weight == 1.0 for _, _, weight in references):
        return None
    parts = [key.new_zeros(key.shape[2])]
    parts += [key.new_full((ref_key.shape[2],), math.log(weight)) for ref_key, _, weight in references]
    return torch.cat(parts)[None, None, None]


# --- patching a U-Net --------------------------------------------------------------------------------------


ReadingObserver = Callable[[str, Tensor, Sequence[tuple[Tensor, Tensor, float]], Tensor], None]
"""observer(block name, query [B,H,N,D], references, share [B,H,N]): the reading rows' queries, the references as
`blend_by_merging` takes them, and the part of the joint attention's mass that is on them, in float32."""


class ReferenceReading:
    """While entered, the middle and upper self-attentions of `unet` read `references`.

    references: replaced by the caller before each step; empty (or all of weight 0) means plain attention.
    reading_rows: how many of the batch's *last* rows read (the conditional ones); None = all. The other rows
        stay bit-identical to the unpatched U-Net.
    observer: told of every reading, if there is one; replaced by the caller before each step. Not told in training.

    Leaving the context, by whatever way, puts the U-Net's own processors back and lets the features go.
    """

    def __init__(self, unet: nn.Module):
        self._blocks = reading_blocks(unet)
        self._processors = {}
        self.references: Sequence[ReferenceFeatures] = ()
        self.reading_rows: int | None = None
        self.observer: ReadingObserver | None = None

    def __enter__(self) -> ReferenceReading:
        for name, block in self._blocks.items():
            self._processors[name] = block.attn1.processor
            block.attn1.set_processor(_ReadingProcessor(name, self))
        return self

    def __exit__(self, *exc_info) -> None:
        for name, processor in self._processors.items():
            self._blocks[name].attn1.set_processor(processor)
        self._processors.clear()
        self.references = ()
        self.observer = None


class _ReadingProcessor:
    """Attention processor of one reading block: diffusers' `AttnProcessor2_0` plus the reference."""

    def __init__(self, name: str, reading: ReferenceReading):
        self.name = name
        self.reading = reading

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states=None, **_unused) -> Tensor:
        # hidden_states [B,N,C] is the output of the block's norm1.
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key = split_heads(attn.to_k(hidden_states), attn.heads)
        value = split_heads(attn.to_v(hidden_states), attn.heads)

        batch = hidden_states.shape[0]
        plain_rows = 0 if self.reading.reading_rows is None else batch - self.reading.reading_rows
        references = self._keys_and_values(attn, batch - plain_rows, hidden_states)
        if not references:
            output = F.scaled_dot_product_attention(query, key, value)
        else:
            parts = [self._blend(query[plain_rows:], key[plain_rows:], value[plain_rows:], references)]
            if plain_rows:
                plain = query[:plain_rows], key[:plain_rows], value[:plain_rows]
                parts.insert(0, F.scaled_dot_product_attention(*plain))
            output = torch.cat(parts) if len(parts) > 1 else parts[0]

        return finish(attn, output, hidden_states.dtype)

    def _blend(self, query: Tensor, key: Tensor, value: Tensor, references) -> Tensor:
        if torch.is_grad_enabled():  # the fused kernels give no gradient through the log-sum-exp
            return blend_by_two_calls(query, key, value, references)
        if self.reading.observer is None:
            return blend_by_merging(query, key, value, references)
        output, share = blend_and_share(query, key, value, references)
        self.reading.observer(self.name, query, references, share)
        return output

    def _keys_and_values(self, attn, rows: int, like: Tensor) -> list[tuple[Tensor, Tensor, float]]:
        """Keys and values of every reference that counts, by the *reader's* projections."""
        result = []
        for reference in self.reading.references:
            if reference.weight == 0:
                continue
            bank = reference.banks[self.name].to(like.device, like.dtype, non_blocking=True)  # [1 or B, M, C]
            key = split_heads(attn.to_k(bank), attn.heads).expand(rows, -1, -1, -1)
            value = split_heads(attn.to_v(bank), attn.heads).expand(rows, -1, -1, -1)
            result.append((key, value, reference.weight))
        return result


class DetailReading:
    """While entered, all cross-attentions of `unet` look at `features` instead of at tokens (Magic Fixup).

    features: {block name: [B,N,C]} of the detail extractor, replaced by the caller before each step; the reader
        projects them with its own keys and values.

    Leaving the context, by whatever way, takes the hooks off and lets the features go.
    """

    def __init__(self, unet: nn.Module):
        self._blocks = transformer_blocks(unet)
        self._hooks: list = []
        self.features: dict[str, Tensor] = {}

    def __enter__(self) -> DetailReading:
        for name, block in self._blocks.items():
            look = partial(self._look, name)
            self._hooks.append(block.attn2.register_forward_pre_hook(look, with_kwargs=True))
        return self

    def __exit__(self, *exc_info) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self.features = {}

    def _look(self, name: str, _attention, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        return arguments, {**named, "encoder_hidden_states": self.features[name]}


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B,N,C] -> [B,heads,N,C/heads]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def finish(attn, output: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention's output by head [B,heads,N,C/heads], through its last projection: [B,N,C]."""
    return attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2).to(dtype)))
