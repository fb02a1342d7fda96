"""Work of a guided step that need not be done twice. The results stay what they were, bit for bit on a CPU.

* The image tokens do not change over the steps: their cross-attention keys and values are computed once (`KeptTokens`).
* The two rows of guidance differ in their tokens only: before the first cross-attention they are equal, and the first
  self-attention, a costly one, is computed for one of them (`SharedStart`).

Both patch a U-Net while entered and put back what they found, by whatever way they are left. For inference only.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import finish, split_heads


class KeptTokens:
    """While entered, cross-attentions of `unet` keep the keys and values of the tokens they saw last.

    Tokens are recognised by being the same tensor. There may be fewer rows of tokens than of the batch: each then
    serves as many rows in a row.
    """

    def __init__(self, unet: nn.Module):
        self._unet = unet
        self._processors: list[tuple[nn.Module, object]] = []

    def __enter__(self) -> KeptTokens:
        for block in self._unet.modules():
            attention = getattr(block, "attn2", None)
            if hasattr(attention, "processor"):
                self._processors.append((attention, attention.processor))
                attention.set_processor(_KeptTokensProcessor())
        return self

    def __exit__(self, *exc_info) -> None:
        while self._processors:
            attention, processor = self._processors.pop()
            attention.set_processor(processor)


class _KeptTokensProcessor:
    """Attention processor of one cross-attention: diffusers' `AttnProcessor2_0` with kept keys and values."""

    def __init__(self):
        self._tokens: Tensor | None = None

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, **_unused) -> Tensor:
        batch = len(hidden_states)  # hidden_states [B,N,C], tokens [1 or some of B,T,D]
        if self._tokens is not encoder_hidden_states:
            self._tokens = encoder_hidden_states
            self._key = split_heads(attn.to_k(encoder_hidden_states), attn.heads)
            self._value = split_heads(attn.to_v(encoder_hidden_states), attn.heads)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        output = F.scaled_dot_product_attention(query, _rows(self._key, batch), _rows(self._value, batch))
        return finish(attn, output, hidden_states.dtype)


def _rows(kept: Tensor, batch: int) -> Tensor:
    """Each kept row for as many rows of the batch."""
    if len(kept) == 1:
        return kept.expand(batch, -1, -1, -1)
    return kept.repeat_interleave(batch // len(kept), dim=0)


class SharedStart:
    """While entered and `on`, the two halves of the batch are equal before the first cross-attention: one is computed.

    on: set by the caller before each step; true only where the halves differ in nothing but their tokens.
    """

    def __init__(self, unet: nn.Module):
        self._unet = unet
        self._hooks: list = []
        self.on = False

    def __enter__(self) -> SharedStart:
        for module in shared_modules(self._unet):
            self._hooks.append(module.register_forward_pre_hook(self._halve))
            self._hooks.append(module.register_forward_hook(self._double))
        return self

    def __exit__(self, *exc_info) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _halve(self, _module, inputs: tuple) -> tuple | None:
        if not self.on:
            return None
        return tuple(one[: len(one) // 2] if isinstance(one, Tensor) else one for one in inputs)

    def _double(self, _module, _inputs, output: Tensor) -> Tensor | None:
        return output.repeat(2, *[1] * (output.ndim - 1)) if self.on else None


def shared_modules(unet: nn.Module) -> tuple[nn.Module, ...]:
    """The first self-attention of `unet` and the projection before it: most of what it does before its tokens enter.

    Convolutions of more than a pixel are left alone: in another batch size they may round in another way.
    """
    first = next(block for block in unet.down_blocks if getattr(block, "attentions", None)).attentions[0]
    return first.proj_in, first.transformer_blocks[0].attn1
