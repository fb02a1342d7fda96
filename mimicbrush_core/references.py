"""Writing a reference: the features a reference U-Net offers at each timestep, kept and reused.

The reference U-Net runs on the *clean* (never noised) reference latents at the sampler's own timestep, with
the reference's image tokens. What is kept is the input of the middle and upper self-attentions (the output of
`norm1`); the imitative U-Net projects it with its own keys and values. The features depend on the reference
and the timestep only, not on noise, source, mask or guidance: one reference serves many edits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import reading_blocks
from .errors import ArgumentError
from .reuse import KeptTokens

DEFAULT_STORE_BYTES = 2 << 30
"""Bound of one reference's store: 50 timesteps at 512 px take 0.7 GB in float16, 1.4 GB in float32."""

SEEN = 0.5
"""A token of a masked reference is read when at least this share of its area is inside the mask."""


class _AllWritten(Exception):
    """Raised inside the reference U-Net once the last feature is written: nothing after it is needed."""


class _WritingProcessor:
    """Attention processor that notes its input and then computes as usual."""

    def __init__(self, name: str, banks: dict[str, Tensor], processor, last: bool):
        self.name = name
        self.banks = banks
        self.processor = processor
        self.last = last

    def __call__(self, attn, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        self.banks[self.name] = hidden_states  # [B,M,C], output of norm1
        if self.last:
            raise _AllWritten
        return self.processor(attn, hidden_states, *args, **kwargs)


def write_features(
    reference_unet: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    tokens: Tensor | None,
    blocks_of: Callable[[nn.Module], dict[str, nn.Module]] = reading_blocks,
) -> dict[str, Tensor]:
    """Run a reference U-Net and return the self-attention inputs of `blocks_of` it, by default the middle and upper.

    latents [B,C,h,w]: all input channels (MimicBrush: 4, clean and scaled); timesteps [B]; tokens [B,T,D] (within
    `KeptTokens` [1,T,D] serve all), None for a U-Net without cross-attention  ->  {block name: [B,M,C]}. Inputs are
    cast to the U-Net's precision. The U-Net stops after its last bank, so its tail (24 tensors for SD-1.5) is never
    used.
    """
    dtype = next(reference_unet.parameters()).dtype
    tokens = None if tokens is None else tokens.to(dtype)
    blocks = blocks_of(reference_unet)
    last_name = list(blocks)[-1]
    own_processors = {name: block.attn1.processor for name, block in blocks.items()}
    banks: dict[str, Tensor] = {}
    try:
        for name, block in blocks.items():
            block.attn1.set_processor(_WritingProcessor(name, banks, own_processors[name], last=name == last_name))
        reference_unet(latents.to(dtype), timesteps, encoder_hidden_states=tokens)
    except _AllWritten:
        pass
    finally:
        for name, block in blocks.items():
            block.attn1.set_processor(own_processors[name])
    return banks


@dataclass(eq=False)
class Reference:
    """One encoded reference picture and a bounded store of its features.

    latents [1,4,h,w] clean and scaled; tokens [1,T,D]; owner: the model that encoded it.
    region [1,1,h,w] 0..1: only tokens inside are offered to the reader; None: all of them.
    picture uint8 [H,W,3]: what was encoded, to be looked at; what lies beyond the region is white.
    store_bytes: the store's bound. What does not fit is computed again when it is asked for.
    store_device: where features wait to be read; None: where they are computed. A host that counts what is on the
    graphics card keeps them in its own memory, from where a step's (14 MB in float16 at 512 px) are sent ahead of it.
    """

    latents: Tensor
    tokens: Tensor
    owner: object
    region: Tensor | None = None
    picture: np.ndarray | None = field(default=None, repr=False)
    store_bytes: int = DEFAULT_STORE_BYTES
    store_device: torch.device | None = None
    features_computed: int = field(default=0, init=False)
    _store: dict[float, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def prepare(
        self,
        reference_unet: nn.Module,
        timesteps: Sequence[float],
        *,
        at_once: int = 4,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Compute the features of all `timesteps` not yet known, some at once, as far as the store holds them.

        Features of timesteps outside this schedule make room first. on_batch(count) is called after each batch
        with the number it wrote and may raise to cancel.
        """
        wanted = [float(t) for t in timesteps]
        missing = self.missing(wanted)
        if not missing:
            return
        tokens = self._tokens_for(reference_unet)
        with KeptTokens(reference_unet):
            for start in range(0, len(missing), at_once):
                batch = missing[start : start + at_once]
                known = next(iter(self._store.values()), {})  # all timesteps' features are equally large
                if not self._make_room(_size_of(known), keep=wanted):
                    return
                banks = self._write(reference_unet, batch, tokens)
                for row, timestep in enumerate(batch):
                    # A copy, so that dropping one timestep's features frees its memory.
                    one = {name: self._copy(bank[row : row + 1]) for name, bank in banks.items()}
                    if not self._make_room(_size_of(one), keep=wanted):
                        return
                    self._store[timestep] = one
                if on_batch is not None:
                    on_batch(len(batch))

    def missing(self, timesteps: Sequence[float]) -> list[float]:
        """Those of `timesteps` whose features are not known, each once."""
        return [t for t in dict.fromkeys(map(float, timesteps)) if t not in self._store]

    def banks_at(self, reference_unet: nn.Module, timestep: float) -> dict[str, Tensor]:
        """The features of one timestep, {block name: [1,M,C]}: from the store, or computed now."""
        known = self._store.get(float(timestep))
        if known is not None:
            return known
        return self._write(reference_unet, [float(timestep)], self._tokens_for(reference_unet))

    def offered(self, count: int) -> Tensor:
        """Which tokens the reader is offered, of a grid of `count`: their indices, row by row."""
        return torch.arange(count) if self.region is None else _tokens_in(self.region, count)

    def clear(self) -> None:
        """Let all features go; they are computed again when needed."""
        self._store.clear()

    @property
    def stored_bytes(self) -> int:
        return sum(_size_of(banks) for banks in self._store.values())

    def _tokens_for(self, reference_unet: nn.Module) -> Tensor:
        parameter = next(reference_unet.parameters())
        return self.tokens.to(parameter.device, parameter.dtype)

    def _write(self, reference_unet: nn.Module, timesteps: Sequence[float], tokens: Tensor) -> dict[str, Tensor]:
        count, device = len(timesteps), tokens.device
        self.features_computed += count
        with torch.no_grad():
            banks = write_features(
                reference_unet,
                self.latents.to(device).expand(count, -1, -1, -1),
                torch.tensor(timesteps, dtype=torch.float32, device=device),
                tokens,
            )
        if self.region is None:
            return banks
        return {name: bank[:, _tokens_in(self.region, bank.shape[1]).to(device)] for name, bank in banks.items()}

    def _copy(self, bank: Tensor) -> Tensor:
        """A copy where the store is; in pinned memory where a graphics card is to read it from the host's."""
        device = self.store_device or bank.device
        pinned = bank.device.type == "cuda" and device.type == "cpu"
        return torch.empty(bank.shape, dtype=bank.dtype, device=device, pin_memory=pinned).copy_(bank)

    def _make_room(self, size: int, keep: Sequence[float]) -> bool:
        """Whether `size` more bytes fit, after dropping (oldest first) what the schedule does not use."""
        dispensable = [t for t in self._store if t not in keep]
        while self.stored_bytes + size > self.store_bytes and dispensable:
            del self._store[dispensable.pop(0)]
        return self.stored_bytes + size <= self.store_bytes


@dataclass(frozen=True)
class ReferenceUse:
    """How an edit reads one reference.

    weight: 0 = not at all, 1 = as trained; larger leans harder on it. start, end: the share of the steps, 0..1,
    between which it is read: 0 is the first step (pure noise, where the layout is decided), 1 the last.
    """

    reference: Reference
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def active(self, step: int, steps: int) -> bool:
        """Whether it is read in step 0..steps-1."""
        return self.weight > 0 and self.start <= step / steps < self.end


def combined(uses: list[ReferenceUse]) -> list[ReferenceUse]:
    """References to be read together; raises ArgumentError where they are of different models or sizes."""
    first = uses[0].reference
    for use in uses[1:]:
        if use.reference.owner is not first.owner:
            raise ArgumentError("The references were encoded by different models. Encode all of them with one model.")
        if use.reference.latents.shape != first.latents.shape:
            raise ArgumentError("The references were encoded for different sizes. Give all of them the same size.")
    return uses


def _tokens_in(region: Tensor, count: int) -> Tensor:
    """Indices of the `count` tokens (a grid of the latents' aspect, row by row) that lie in a region [1,1,h,w]."""
    height, width = region.shape[-2:]
    shrink = math.isqrt(height * width // count)  # each level of the U-Net halves the latents
    covered = F.avg_pool2d(region, shrink).flatten()
    # A region smaller than a token still counts where it covers most.
    return torch.nonzero(covered >= min(SEEN, float(covered.max()))).flatten()


def _size_of(banks: dict[str, Tensor]) -> int:
    return sum(bank.numel() * bank.element_size() for bank in banks.values())
