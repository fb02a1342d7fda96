"""Muon for weight matrices and convolutions, AdamW for the rest, behind one interface."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# First and last layers and embeddings see raw inputs and outputs; orthogonalised steps do not suit them.
_ADAM_NAMES = ("conv_in", "conv_out", "embedding", "position", "head.", "projector")


class MuonAdamW:
    """Orthogonalised momentum (Muon) for inner matrices, AdamW for everything else.

    torch's Muon takes matrices only, so a convolution [out,in,k,k] is given to it as a view [out,in*k*k] that
    shares the weight's storage.

    lr: Muon's rate in AdamW units (`match_rms_adamw`); adam_lr: AdamW's own.
    """

    def __init__(self, modules: Iterable[nn.Module], lr: float, adam_lr: float):
        self._weights: list[nn.Parameter] = []
        self._views: list[nn.Parameter] = []
        others = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.ndim < 2 or any(part in name for part in _ADAM_NAMES):
                    others.append(parameter)
                else:
                    self._weights.append(parameter)
                    self._views.append(nn.Parameter(parameter.detach().flatten(1)))
        self.parameters = self._weights + others
        self._muon = torch.optim.Muon(
            self._views, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self._base_rates = (lr, adam_lr)

    def step(self, rate: float) -> float:
        """One update at `rate` x the base learning rates; returns the gradient norm before clipping to 1."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, base in zip((self._muon, self._adam), self._base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        for weight, view in zip(self._weights, self._views, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        return float(norm)

    def state_dict(self) -> dict[str, dict]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


class Ema:
    """Exponential moving average of parameters, with a warm-up so that early averages follow quickly."""

    def __init__(self, parameters: dict[str, Tensor], decay: float = 0.999):
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in parameters.items():
            self.values[name].lerp_(value.detach(), 1 - decay)
