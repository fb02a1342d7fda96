"""Ways to be faster that change the picture a little. All are off by default; docs/performance.md has their cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .errors import ArgumentError


@dataclass(frozen=True)
class Acceleration:
    """What an edit may approximate.

    guidance_start, guidance_end: the share of the steps, 0..1, between which guidance acts; in the others only the
        conditional row is computed (Kynkäänniemi et al., arXiv 2404.07724).
    reference_every: the reference is looked at anew in every k-th step; the steps between read what was seen then.
    deep_every: the U-Net's deep blocks are computed in every k-th step; between, only its outermost ones are, over
        the deep features of then (DeepCache, Ma et al., arXiv 2312.00858).
    """

    guidance_start: float = 0.0
    guidance_end: float = 1.0
    reference_every: int = 1
    deep_every: int = 1

    def check(self) -> None:
        """Raise ArgumentError for what cannot be."""
        if not 0 <= self.guidance_start <= self.guidance_end <= 1:
            raise ArgumentError(
                f"guidance_start is {self.guidance_start} and guidance_end {self.guidance_end}; they must lie between "
                "0 and 1, the start first."
            )
        for name in ("reference_every", "deep_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be at least 1 (every step).")

    def guided(self, step: int, steps: int) -> bool:
        """Whether guidance acts in step 0..steps-1."""
        return self.guidance_start <= step / steps < self.guidance_end

    def reference_step(self, step: int) -> int:
        """The step whose reference features are read in `step`."""
        return step - step % self.reference_every

    def deep(self, step: int) -> bool:
        """Whether the deep blocks are computed in `step`."""
        return step % self.deep_every == 0


EXACT = Acceleration()


class DeepFeatures:
    """While entered, keeps what the blocks below the outermost of `unet` gave last, and can go on from there."""

    def __init__(self, unet: nn.Module):
        self._unet = unet
        self._deep: Tensor | None = None  # [B,C,h,w], into the last upper block

    def __enter__(self) -> DeepFeatures:
        self._hook = self._unet.up_blocks[-2].register_forward_hook(self._keep)
        return self

    def __exit__(self, *exc_info) -> None:
        self._hook.remove()
        self._deep = None

    def _keep(self, _module, _inputs, output: Tensor) -> None:
        self._deep = output

    def serve(self, rows: int) -> bool:
        """Whether deep features of at least as many rows are kept; of more, the last (conditional) ones serve."""
        return self._deep is not None and len(self._deep) >= rows

    def predict(self, sample: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """What `unet` predicts for `sample` [B,C,h,w] over the kept deep features: its outermost blocks only."""
        unet, first, last = self._unet, self._unet.down_blocks[0], self._unet.up_blocks[-1]
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        hidden = unet.conv_in(sample)
        skips = (hidden, *_run(first, tokens, hidden_states=hidden, temb=embedding)[1])[: len(last.resnets)]
        deep = self._deep[-len(sample) :]
        hidden = _run(last, tokens, hidden_states=deep, temb=embedding, res_hidden_states_tuple=skips)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def _run(block: nn.Module, tokens: Tensor, **inputs):
    """A block of the U-Net, which is given the tokens only where it has attention."""
    if getattr(block, "attentions", None):
        inputs["encoder_hidden_states"] = tokens
    return block(**inputs)
