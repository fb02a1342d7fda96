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
    Differentiable on the CPU only: elsewhere the fused kernels offer no gradient through the log-sum-exp (see
    `blend_by_two_calls`).
    """
    if query.device.type == "cpu" and torch.is_grad_enabled():
        return _CpuAttention.apply(query, key, value)
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


class _CpuAttention(torch.autograd.Function):
    """The CPU's kernel with a backward pass of our own, through the log-sum-exp too.

    torch's backward kernel is slow on few tokens, and most of a small model's time. This one is five matrix products
    and an exponential: with P the probabilities and l their log-sum-exp, of the output's gradient g and l's own h,

        dV = P^T g,   dS = P * (g V^T - (g . output - h)),   dQ = dS K,   dK = dS^T Q.

    What is subtracted from all scores of a query rides in the matrix products as two more columns against ones, its
    upper and its lower half, so that bfloat16 loses nothing where probabilities are large.
    """

    SCORES_AT_ONCE = 1 << 20  # those of a few heads stay in the processor's cache

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = _cpu_kernel(query, key, value)
        ctx.save_for_backward(query, key, value, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, output, lse = ctx.saved_tensors
        scale = 1.0 / math.sqrt(query.shape[-1])
        offset = (grad.float() * output.float()).sum(-1) - grad_lse  # [B,H,N]
        with torch.autocast("cpu", enabled=False):
            sides = (_less(query * scale, lse), _less(grad, offset), _and_ones(key), _and_ones(value), query, key, grad)
            at_once = max(1, _CpuAttention.SCORES_AT_ONCE // (query.shape[2] * key.shape[2]))
            pieces = zip(*(side.flatten(0, 1).split(at_once) for side in sides), strict=True)
            found = zip(*(_gradients(*piece) for piece in pieces), strict=True)
            d_query, d_key, d_value = (torch.cat(parts).unflatten(0, query.shape[:2]) for parts in found)
        return d_query.mul_(scale), d_key.mul_(scale), d_value


def _less(rows: Tensor, offset: Tensor) -> Tensor:
    """Rows [...,N,D] that lower each product with `_and_ones` by the row's offset [...,N]: [...,N,D+2]."""
    upper = -offset.to(rows.dtype)
    lower = (-offset - upper).to(rows.dtype)
    return torch.cat([rows, upper[..., None], lower[..., None]], dim=-1)


def _and_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 2)], dim=-1)


def _gradients(query_less, grad_less, key_ones, value_ones, query, key, grad) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some heads' queries, keys (both unscaled) and values; all [n,tokens,D]."""
    scores = torch.bmm(query_less, key_ones.transpose(1, 2)).exp_()  # the probabilities
    d_value = torch.bmm(scores.transpose(1, 2), grad)
    scores *= torch.bmm(grad_less, value_ones.transpose(1, 2))
    return torch.bmm(scores, key), torch.bmm(scores.transpose(1, 2), query), d_value


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
    """Self-attention blended with references, each attended to once (inference, and training on the CPU).

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
    """The same blend from a plain and a joint attention; differentiable on every device."""
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


ReadingObserver = Callable[[str, Tensor, Sequence[tuple[Tensor, Tensor, float]], Tensor | None], None]
"""observer(block name, query [B,H,N,D], references, share [B,H,N]): the reading rows' queries, the references as
`blend_by_merging` takes them, and the part of the joint attention's mass that is on them, in float32; None for that
where it is not known, in training on a graphics card."""


class ReferenceReading:
    """While entered, the middle and upper self-attentions of `unet` read `references`.

    references: replaced by the caller before each step; empty (or all of weight 0) means plain attention.
    reading_rows: how many of the batch's *last* rows read (the conditional ones); None = all. The other rows
        stay bit-identical to the unpatched U-Net.
    observer: told of every reading, if there is one; replaced by the caller before each step.

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
        share = None
        if torch.is_grad_enabled() and query.device.type != "cpu":
            output = blend_by_two_calls(query, key, value, references)
        elif self.reading.observer is None:
            return blend_by_merging(query, key, value, references)
        else:
            output, share = blend_and_share(query, key, value, references)
        if self.reading.observer is not None:
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


class CpuTrainingAttention:
    """While entered, the attentions of some U-Nets are computed by what learns fastest on a CPU.

    Leaving the context puts their own processors back. Enter it before `ReferenceReading`, which keeps what it finds.
    """

    def __init__(self, *unets: nn.Module):
        blocks = [block for unet in unets for block in transformer_blocks(unet).values()]
        layers = [layer for block in blocks for layer in (block.attn1, block.attn2)]
        self._layers = [layer for layer in layers if hasattr(layer, "set_processor")]  # some were dropped
        self._processors: list = []

    def __enter__(self) -> CpuTrainingAttention:
        self._processors = [layer.processor for layer in self._layers]
        for layer in self._layers:
            layer.set_processor(_plain_processor)
        return self

    def __exit__(self, *exc_info) -> None:
        for layer, processor in zip(self._layers, self._processors, strict=True):
            layer.set_processor(processor)
        self._processors = []


def _plain_processor(attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_unused) -> Tensor:
    """diffusers' `AttnProcessor2_0` for the attentions of a transformer block, [B,N,C]."""
    seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = (
        split_heads(project(tokens), attn.heads)
        for project, tokens in ((attn.to_q, hidden_states), (attn.to_k, seen), (attn.to_v, seen))
    )
    return finish(attn, attention_with_lse(query, key, value)[0], hidden_states.dtype)


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
