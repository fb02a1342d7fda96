"""Optimisers: Muon with AdamW for training from scratch, Adam for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import ArgumentError

OPTIMIZERS = ("muon", "adam")

# First and last layers and embeddings see raw inputs and outputs; orthogonalised steps do not suit them.
_ADAM_NAMES = ("conv_in", "conv_out", "embedding", "position", "head.", "projector")


def make_optimizer(name: str, modules: Iterable[nn.Module], lr: float, adam_lr: float) -> torch.optim.Optimizer:
    """The optimizer of `OPTIMIZERS` over all parameters that require gradients.

    lr: of "adam", or of Muon's matrices; adam_lr: of what Muon leaves to AdamW. Raises ArgumentError.
    """
    if name == "muon":
        return MuonAdamW(modules, lr, adam_lr)
    if name == "adam":
        parameters = [one for module in modules for one in module.parameters() if one.requires_grad]
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)  # without decay this is Adam
    raise ArgumentError(f"Unknown optimizer {name!r}. Choose one of: {', '.join(OPTIMIZERS)}.")


class MuonAdamW(torch.optim.Optimizer):
    """Orthogonalised momentum (Muon) for inner matrices, AdamW for everything else.

    torch's Muon takes matrices only, so a convolution [out,in,k,k] is given to it as a view [out,in*k*k] that
    shares the weight's storage. Two groups, the matrices and the others, each with a learning rate of its own.

    lr: Muon's rate in AdamW units (`match_rms_adamw`); adam_lr: AdamW's own.
    """

    def __init__(self, modules: Iterable[nn.Module], lr: float, adam_lr: float):
        self._weights: list[nn.Parameter] = []
        self._views: list[nn.Parameter] = []
        others = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.ndim < 2 or any(part in name for part in _ADAM_NAMES):
                    others.append(parameter)
                else:
                    self._weights.append(parameter)
                    self._views.append(nn.Parameter(parameter.detach().flatten(1)))
        self._muon = torch.optim.Muon(
            self._views, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        super().__init__([{"params": self._weights, "lr": lr}, {"params": others, "lr": adam_lr}], {})

    def step(self, closure=None) -> None:
        """One update at the groups' learning rates. closure: not supported."""
        for optimizer, group in zip((self._muon, self._adam), self.param_groups, strict=True):
            for own in optimizer.param_groups:
                own["lr"] = group["lr"]
        for weight, view in zip(self._weights, self._views, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adam.step()
        for view in self._views:
            view.grad = None

    def state_dict(self) -> dict[str, dict]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
