"""The denoising loop, one for all systems, on diffusers' schedulers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from .errors import ArgumentError

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
"""Those for every noise schedule and spacing."""

PLMS = "plms"
"""The linear multistep of PNDM (arXiv 2202.09778), Paint by Example's own. It evaluates the second timestep twice."""

SPACINGS = ("leading", "trailing", "linspace", "karras")
"""How the timesteps are spread: diffusers' names; `karras` spreads the noise levels (arXiv 2206.00364, eq. 5)."""

MAX_STEPS = 500
"""More than that, and some schedulers round two steps to one timestep and fail."""


@dataclass(frozen=True)
class StepInfo:
    """What a caller learns after each step.

    step: 1..steps; timestep: the one just used; predicted_latents [B,4,h,w]: the picture as predicted now.
    """

    step: int
    steps: int
    timestep: float
    predicted_latents: Tensor


def make_scheduler(
    config: dict,
    name: str = "ddim",
    steps: int | None = None,
    spacing: str | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
):
    """A diffusers scheduler of the model's noise schedule, with its timesteps set.

    config: the model's scheduler settings (betas, spacing, prediction type).
    Exactly one of: steps, or an explicit descending list of timesteps (0..999), or of sigmas (as k-diffusion
    counts them, sqrt((1-a)/a), the last one being where the run ends, usually 0). Explicit lists run on
    Euler steps, which for `ddim` is the same update in sigma space.
    spacing: one of SPACINGS for `steps`; None = the model's own. `ddim` with `karras` runs on Euler steps, too.
    name: of SCHEDULERS, or PLMS, which knows no Karras spacing and no zero terminal SNR.

    Raises ArgumentError for an unknown name, a step count or list value out of range, a list that does not
    descend, what PLMS does not know, or a start in pure noise where the model predicts noise.
    """
    classes = {**SCHEDULERS, PLMS: PNDMScheduler}
    if name not in classes:
        raise ArgumentError(f"Unknown scheduler {name!r}. Choose one of: {', '.join(classes)}.")
    if sum(given is not None for given in (steps, timesteps, sigmas)) != 1:
        raise ArgumentError("Give exactly one of: steps, timesteps, sigmas.")
    if spacing is not None and spacing not in SPACINGS:
        raise ArgumentError(f"Unknown spacing {spacing!r}. Choose one of: {', '.join(SPACINGS)}.")
    if steps is not None:
        if not 1 <= steps <= MAX_STEPS:
            raise ArgumentError(f"steps is {steps}; it must be between 1 and {MAX_STEPS}.")
        if name == PLMS:
            _check_plms(config, spacing)
        scheduler = _build(*_spaced(classes[name], config, spacing))
        scheduler.set_timesteps(steps)
        _check_start(scheduler)
        if hasattr(scheduler, "set_begin_index"):
            # Left alone, it is looked up by the first timestep, and Karras spacing rounds the first two to the same.
            scheduler.set_begin_index(0)
        return scheduler

    if name not in ("ddim", "euler"):
        raise ArgumentError(
            f"An explicit list of timesteps or sigmas needs the scheduler 'ddim' or 'euler', not {name!r}."
        )
    listed = list(timesteps if timesteps is not None else sigmas)
    label = "timesteps" if timesteps is not None else "sigmas"
    if len(listed) < (1 if timesteps is not None else 2) or any(
        later >= earlier for earlier, later in pairwise(listed)
    ):
        raise ArgumentError(f"{label} must be a descending list, got {_shorten(listed)}.")
    largest = config["num_train_timesteps"] - 1 if timesteps is not None else math.inf
    outside = [value for value in listed if not 0 <= value <= largest or math.isinf(value)]
    if outside:
        raise ArgumentError(f"{label} holds {outside[0]}; each must be finite and from 0 to {largest}.")
    scheduler = _build(EulerDiscreteScheduler, config)
    scheduler.set_timesteps(**{label: listed})
    return scheduler


def _check_plms(config: dict, spacing: str | None) -> None:
    unknown = "Karras spacing" if spacing == "karras" else ""
    if config.get("rescale_betas_zero_snr"):
        unknown = "this model's noise schedule (zero terminal SNR)"
    if unknown:
        raise ArgumentError(f"The scheduler {PLMS!r} does not know {unknown}. Choose one of: {', '.join(SCHEDULERS)}.")


def _check_start(scheduler) -> None:
    """Under zero terminal SNR nothing of the picture is left at the last timestep: a noise says nothing there."""
    first = round(float(scheduler.timesteps[0]))
    if scheduler.config.prediction_type == "epsilon" and scheduler.alphas_cumprod[first] == 0:
        raise ArgumentError(
            f"These steps begin at timestep {first}, which is nothing but noise in this model's noise schedule (zero "
            "terminal SNR). Choose the spacing 'leading' and fewer than 500 steps."
        )


def _spaced(scheduler_class, config: dict, spacing: str | None) -> tuple[type, dict]:
    if spacing is None:
        return scheduler_class, config
    if spacing != "karras":
        return scheduler_class, {**config, "timestep_spacing": spacing}
    if scheduler_class is DDIMScheduler:
        scheduler_class = EulerDiscreteScheduler
    return scheduler_class, {**config, "use_karras_sigmas": True}


def _build(scheduler_class, config: dict):
    """Only the settings this class knows: one config serves all schedulers."""
    known = inspect.signature(scheduler_class.__init__).parameters
    settings = {"skip_prk_steps": True, **config}  # PNDM's multistep alone, without its Runge-Kutta start
    return scheduler_class(**{key: value for key, value in settings.items() if key in known})


def _shorten(values: list) -> str:
    return repr(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


Draw = Callable[[], Tensor]
"""draw() -> the next standard normal noise of a run, [B,4,h,w]: `SeededDraws`, or recorded ones again."""


class SeededDraws:
    """Standard normal noise, one seed per picture, each call [len(seeds), *shape] in float32 on the CPU.

    Drawn per picture and on the CPU, so a seed means the same noise on every device and in any batch.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]):
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape = shape

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=generator) for generator in self._generators])


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """The first of `SeededDraws`."""
    return SeededDraws(seeds, shape)()


def last_steps(scheduler: DDIMScheduler, share: float) -> DDIMScheduler:
    """The scheduler with the last `share`, 0..1, of its steps only, at least one: to start from noised latents."""
    count = max(1, round(share * len(scheduler.timesteps)))
    scheduler.timesteps = scheduler.timesteps[-count:]
    return scheduler


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    scheduler,
    on_step: Callable[[StepInfo], None] | None = None,
    *,
    eta: float = 0.0,
    draw: Draw | None = None,
) -> Tensor:
    """Run the scheduler from unit noise, or with DDIM from latents noised to its first timestep, to latents.

    predict(latents [B,4,h,w], timestep) -> the guided model output [B,4,h,w].
    on_step may raise to cancel; nothing is kept then.
    eta: 0..1, how much of the noise a step leaves is drawn anew by `draw`, after the prediction (arXiv 2010.02502,
        eq. 16); other than 0 with DDIM only.
    """
    if eta and not isinstance(scheduler, DDIMScheduler):
        raise ArgumentError(f"eta is {eta}, but only 'ddim' (without Karras spacing) can draw noise in its steps.")
    latents = noise * scheduler.init_noise_sigma
    steps = len(scheduler.timesteps)
    for index, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, timestep)
        output = predict(model_input, timestep)
        anew = {"eta": eta, "variance_noise": draw().to(latents)} if eta else {}
        latents = scheduler.step(output, timestep, latents, return_dict=False, **anew)[0]
        if on_step is not None:
            predicted = predicted_original(scheduler, output, timestep, model_input)
            on_step(StepInfo(index + 1, steps, float(timestep), predicted))
    return latents


def predicted_original(scheduler, output: Tensor, timestep: Tensor, model_input: Tensor) -> Tensor:
    """The clean latents a model output stands for, [B,4,h,w].

    model_input is in variance-preserving scale (`scale_model_input`), sqrt(a) x0 + sqrt(1-a) noise.
    """
    alpha = scheduler.alphas_cumprod[round(float(timestep))].to(model_input.device)
    noise_share = (1 - alpha).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return alpha.sqrt() * model_input - noise_share * output
    return (model_input - noise_share * output) / alpha.sqrt()


def guide(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: e_u + g (e_c - e_u)."""
    return unconditional + guidance * (conditional - unconditional)
