"""One guided denoising step: the original loop's structure, the plain U-Net, and ours, timed in pairs.

    python -m benchmarks.step                    SD-1.5 sizes, 512 px, random weights
    python -m benchmarks.step --size 1024 --rounds 3
    python -m benchmarks.step --small            narrow U-Nets: does it run and agree, says nothing on speed
    python -m benchmarks.step --accelerate channels_last
    python -m benchmarks.step --check-golden     the yardstick against the original's recorded predictions

Only ratios mean anything: in each round every variant runs once, and ratios are taken within the round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    CLOCKS,
    DTYPES,
    SEED,
    Variant,
    argument_parser,
    deliver,
    markdown_table,
    model_config,
    on_cuda,
    random_part,
    ratios,
    spread,
    spread_text,
    started,
    time_rounds,
)
from benchmarks.opt_ins import OPT_INS
from mimicbrush_core import attention
from mimicbrush_core.attention import blend_by_two_calls, reading_blocks
from mimicbrush_core.modules import Modules, build_part
from mimicbrush_core.references import Reference, ReferenceUse, write_features
from mimicbrush_core.sampling import guide
from mimicbrush_core.systems.mimicbrush import MimicBrush, SourceCondition

ORIGINAL, PLAIN = "original", "plain"
FIRST_RUN, KNOWN, TWO_CALLS = "first run", "known reference", "two calls"
SAME_RESULT = (FIRST_RUN, KNOWN, TWO_CALLS)
"""The variants that must predict what the original predicts."""

GOALS = {
    512: {(FIRST_RUN, ORIGINAL): 0.58, (KNOWN, ORIGINAL): 0.40, (KNOWN, PLAIN): 1.08},
    1024: {(KNOWN, ORIGINAL): 0.37},
}
"""Largest acceptable time ratio by size, for the real model on a CPU."""

TIMESTEP, GUIDANCE = 501, 5.0
STEPS = 2
TIMESTEPS = (TIMESTEP + 1, TIMESTEP)  # the last is the one that is compared
IMAGE_TOKENS = 257
LATENT_FACTOR = 8
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Allowed difference of two guided predictions, relative to the largest value of the original's."""
TF32_TOLERANCE = 5e-3
"""The same for float32 on CUDA, whose convolutions round their inputs to TF32."""

GOLDEN_FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "mimicbrush"
GOLDEN_TIMESTEPS = (981, 501, 1)
GOLDEN_TOLERANCE = 2e-4


@dataclass(frozen=True)
class StepInputs:
    """Everything one step reads, batch 1. All [1,C,h,w]; tokens [1,T,D]."""

    latents: Tensor
    mask: Tensor
    hole_latents: Tensor
    depth: Tensor
    reference_latents: Tensor
    tokens: Tensor
    unconditional_tokens: Tensor

    def model_input(self, dtype: torch.dtype) -> Tensor:
        """Both guidance halves, [2,13,h,w]."""
        one = torch.cat([self.latents, self.mask, self.hole_latents, self.depth], dim=1)
        return one.to(dtype).repeat(2, 1, 1, 1)

    def both_tokens(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([self.unconditional_tokens, self.tokens]).to(dtype)


def random_inputs(config: dict, size: int, device: str) -> StepInputs:
    """Fixed random inputs for pictures of `size` pixels; drawn on the CPU, the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    side = size // LATENT_FACTOR
    draw = lambda *shape: torch.randn(1, *shape, generator=generator).to(device)  # noqa: E731
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 : side // 2, side // 4 : side // 2] = 1
    width = config["unet"]["cross_attention_dim"]
    return StepInputs(
        latents=draw(4, side, side),
        mask=mask.to(device),
        hole_latents=draw(4, side, side),
        depth=draw(4, side, side),
        reference_latents=draw(4, side, side),
        tokens=draw(IMAGE_TOKENS, width),
        unconditional_tokens=draw(IMAGE_TOKENS, width),
    )


# --- the yardstick: the original loop's structure -----------------------------------------------------------


class OriginalReading:
    """Self-attention of one reading block as the original computes it, on diffusers' own processor.

    Both rows attend jointly, with queries for the reference's tokens too, which are sliced away; both rows
    attend plainly for the 0.5/0.5 blend after `to_out`; the unconditional row (the first half of the batch)
    attends plainly once more and overwrites its blend.
    """

    def __init__(self, bank: Tensor):
        self.bank = bank  # [B,M,C]
        self.plain = AttnProcessor2_0()

    def __call__(self, attn, hidden_states: Tensor, *_unused, **_unused_too) -> Tensor:
        batch, count, _ = hidden_states.shape
        joint = self.plain(attn, torch.cat([hidden_states, self.bank], dim=1))[:, :count]
        raw = self.plain(attn, hidden_states)
        blended = 0.5 * joint + 0.5 * raw
        blended[: batch // 2] = self.plain(attn, hidden_states[: batch // 2])
        return blended


@torch.no_grad()
def original_prediction(unet: nn.Module, reference_unet: nn.Module, inputs: StepInputs, timestep: float) -> Tensor:
    """The noise predictions [2,4,h,w] (unconditional first) by the original's structure.

    The reference U-Net runs on both rows in every step. Like the original's it has no tail after its last
    bank, but the last block's attention, whose projections are cut off, still runs on the bare tokens: the
    original's counted 1196 GFLOP of attention include it.
    """
    dtype = unet.dtype
    tokens = inputs.both_tokens(dtype)
    banks = write_features(
        reference_unet,
        inputs.reference_latents.to(dtype).repeat(2, 1, 1, 1),
        torch.full((2,), float(timestep), device=tokens.device),
        tokens,
    )
    blocks = reading_blocks(unet)
    last_name, last_block = list(blocks.items())[-1]
    bare = banks[last_name].unflatten(-1, (last_block.attn1.heads, -1)).transpose(1, 2)  # [B,H,M,D]
    F.scaled_dot_product_attention(bare, bare, bare)

    own_processors = {name: block.attn1.processor for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.attn1.set_processor(OriginalReading(banks[name]))
        return unet(inputs.model_input(dtype), timestep, encoder_hidden_states=tokens).sample
    finally:
        for name, block in blocks.items():
            block.attn1.set_processor(own_processors[name])


def golden_errors(folder: Path = GOLDEN_FOLDER) -> dict[int, float]:
    """Largest difference of `original_prediction` to the original's recorded predictions, by timestep."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "weights" / "mimicbrush_flat.safetensors")
    golden = load_file(folder / "step.safetensors")

    def network(part: str, prefix: str) -> nn.Module:
        mine = {key: value.float() for key, value in weights.items() if key.startswith(prefix)}
        module = build_part(part, config)
        module.load_state_dict({key.removeprefix(prefix): value for key, value in mine.items()})
        return module

    unet, reference_unet = network("unet", "unet."), network("reference_unet", "referencenet.")
    inputs = StepInputs(
        latents=golden["in.latents"],
        mask=golden["in.mask"],
        hole_latents=golden["in.masked_image_latents"],
        depth=golden["in.depth_feature"],
        reference_latents=golden["in.reference_latents"],
        tokens=golden["in.cond_embeds"],
        unconditional_tokens=golden["in.uncond_embeds"],
    )
    errors = {}
    for timestep in GOLDEN_TIMESTEPS:
        prediction = original_prediction(unet, reference_unet, inputs, timestep)
        errors[timestep] = (prediction - golden[f"t{timestep}.noise_pred"]).abs().max().item()
    return errors


# --- the variants ------------------------------------------------------------------------------------------


class StepModel(MimicBrush):
    """Two U-Nets alone, enough for `MimicBrush.sample`; the tokens of "no reference" are given."""

    def __init__(self, config: dict, device: str, dtype: torch.dtype, unconditional_tokens: Tensor):
        unets = [random_part(name, config, device, dtype) for name in ("unet", "reference_unet")]
        unused = [nn.Identity() for _ in range(5)]
        super().__init__(Modules(*unets, *unused), config)
        self._given_tokens = unconditional_tokens

    def unconditional_tokens(self) -> Tensor:
        return self._given_tokens


class PredictionOnly:
    """Stands in for a scheduler: the latents stay, until the last step gives its guided prediction instead."""

    init_noise_sigma = 1.0

    def __init__(self, *timesteps: int):
        self.timesteps = torch.tensor(timesteps)

    def scale_model_input(self, latents: Tensor, _timestep) -> Tensor:
        return latents

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor, **_unused) -> tuple[Tensor]:
        return (output if timestep == self.timesteps[-1] else latents,)


def make_variants(model: StepModel, inputs: StepInputs, accelerations: Sequence[str] = ()) -> dict[str, Variant]:
    """All variants on the same modules and inputs. Ours are `MimicBrush.sample`, nothing rebuilt.

    Each returns the guided prediction [1,4,h,w] at `TIMESTEP`. Ours runs `STEPS` steps, because what it does once for
    an edit is not a step's: with 50 of them a step's share of that is smaller still.
    """
    unet, reference_unet = model.modules.unet, model.modules.reference_unet
    reference = Reference(inputs.reference_latents.to(unet.dtype), inputs.tokens.to(unet.dtype), owner=model)
    condition = SourceCondition(inputs.mask, inputs.hole_latents, inputs.depth)
    scheduler = PredictionOnly(*TIMESTEPS)

    def original() -> Tensor:
        return guide(*original_prediction(unet, reference_unet, inputs, TIMESTEP).float().chunk(2), GUIDANCE)

    @torch.no_grad()
    def plain() -> Tensor:
        tokens = inputs.both_tokens(unet.dtype)
        output = unet(inputs.model_input(unet.dtype), TIMESTEP, encoder_hidden_states=tokens).sample
        return guide(*output.float().chunk(2), GUIDANCE)

    def ours(model: StepModel = model, reference: Reference = reference) -> Tensor:
        return model.sample(condition, [ReferenceUse(reference, 1.0)], inputs.latents, scheduler, GUIDANCE)

    def by_two_calls() -> Tensor:
        with mock.patch.object(attention, "blend_by_merging", blend_by_two_calls):
            return ours()

    def know() -> None:
        reference.prepare(reference_unet, TIMESTEPS)

    def accelerated(name: str) -> Variant:
        prepared = OPT_INS[name].applied(model)
        own = Reference(reference.latents, reference.tokens, owner=prepared)
        return Variant(
            lambda: ours(prepared, own),
            before=lambda: own.prepare(prepared.modules.reference_unet, TIMESTEPS),
            steps=STEPS,
        )

    return {
        ORIGINAL: Variant(original),
        PLAIN: Variant(plain),
        FIRST_RUN: Variant(ours, before=reference.clear, steps=STEPS),
        KNOWN: Variant(ours, before=know, steps=STEPS),
        TWO_CALLS: Variant(by_two_calls, before=know, steps=STEPS),
    } | {name: accelerated(name) for name in accelerations}


# --- count, compare, time ----------------------------------------------------------------------------------


def count_flops(config: dict, size: int) -> dict[str, int]:
    """Floating-point operations of one step of each variant, counted on meta tensors."""
    inputs = random_inputs(config, size, "meta")
    model = StepModel(config, "meta", torch.float32, inputs.unconditional_tokens)
    counts = {}
    for name, variant in make_variants(model, inputs).items():
        variant.before()
        with FlopCounterMode(display=False) as counter:
            variant.run()
        counts[name] = counter.get_total_flops() // variant.steps
    return counts


def differences(variants: dict[str, Variant]) -> dict[str, float]:
    """Largest difference to the original's guided prediction, relative to its largest value."""
    predictions = {}
    for name, variant in variants.items():
        variant.before()
        predictions[name] = variant.run().cpu()
    expected = predictions[ORIGINAL]
    scale = expected.abs().max()
    return {
        name: ((prediction - expected).abs().max() / scale).item()
        for name, prediction in predictions.items()
        if name != ORIGINAL
    }


# --- report ------------------------------------------------------------------------------------------------


def make_table(flops: dict[str, int], seconds: dict[str, list[float]], goals: dict) -> str:
    """Counted and measured ratios to both yardsticks, side by side."""
    header = ["one step", "TFLOP"]
    for yardstick in (ORIGINAL, PLAIN):
        header += [f"counted / {yardstick}", f"measured / {yardstick} (min..max)", "goal"]
    rows = []
    for name, taken in seconds.items():
        cells = [cell for yardstick in (ORIGINAL, PLAIN) for cell in _cells(flops, seconds, goals, name, yardstick)]
        rows.append([name, f"{flops[name] / 1e12:.4f}" if name in flops else "", *cells, f"{median(taken):.3f}"])
    return markdown_table([*header, "median s"], rows)


def _cells(flops: dict, seconds: dict, goals: dict, name: str, yardstick: str) -> tuple[str, str, str]:
    if name == yardstick:
        return "1", "1", ""
    measured = spread(ratios(seconds, name, yardstick))
    goal = goals.get((name, yardstick))
    met = "" if goal is None else f"{goal:.2f} {'met' if measured['median'] <= goal else 'missed'}"
    return f"{flops[name] / flops[yardstick]:.3f}" if name in flops else "", spread_text(measured), met


def all_ratios(flops: dict[str, int], seconds: dict[str, list[float]]) -> dict[str, dict]:
    """The same as plain data: {"variant / yardstick": counted, median, min, max, rounds}; no count, if accelerated."""
    return {
        f"{name} / {yardstick}": {
            "counted": flops[name] / flops[yardstick] if name in flops else None,
            **spread(ratios(seconds, name, yardstick)),
            "rounds": ratios(seconds, name, yardstick),
        }
        for yardstick in (ORIGINAL, PLAIN)
        for name in seconds
        if name != yardstick
    }


def check_golden(folder: Path) -> bool:
    """Print how far the yardstick is from the original's recorded predictions."""
    errors = golden_errors(folder)
    for timestep, error in errors.items():
        print(f"golden t={timestep}: largest difference {error:.1e} (allowed {GOLDEN_TOLERANCE:.0e})")
    return max(errors.values()) <= GOLDEN_TOLERANCE


def check_agreement(difference: dict[str, float], tolerance: float) -> bool:
    """Print the differences; the reference must matter by far more than what is allowed."""
    print(f"guided prediction against {ORIGINAL!r}, relative; allowed {tolerance:.0e}")
    for name, value in difference.items():
        note = "   (no reference: what a wrong reading could differ by)" if name == PLAIN else ""
        print(f"  {name:16} {value:.1e}{note}")
    same = [value for name, value in difference.items() if name in SAME_RESULT]
    return max(same) <= tolerance < difference[PLAIN] / 2


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser("step", __doc__, rounds=5)
    in_a_step = [name for name, one in OPT_INS.items() if one.in_step]
    parser.add_argument("--accelerate", nargs="+", choices=in_a_step, default=[], metavar="NAME", help=str(in_a_step))
    parser.add_argument(
        "--without", nargs="+", choices=(FIRST_RUN, TWO_CALLS), default=[], metavar="NAME", help="leave these out"
    )
    parser.add_argument(
        "--check-golden",
        type=Path,
        nargs="?",
        const=GOLDEN_FOLDER,
        metavar="FOLDER",
        help="only compare the yardstick with the original's recorded predictions",
    )
    chosen = parser.parse_args(arguments)
    chosen.size = chosen.size or (256 if chosen.small else 512)
    if chosen.size % 64:
        parser.error(f"--size is {chosen.size}; it must be a multiple of 64")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where two sides that must agree do not. Missing a goal is not an error."""
    chosen = parse_arguments(arguments)
    if chosen.check_golden:
        return 0 if check_golden(chosen.check_golden) else 1

    config, dtype = model_config(chosen.small), DTYPES[chosen.dtype]
    facts = started(chosen, chosen.size)
    facts["channels"] = str(tuple(config["unet"]["block_out_channels"]))

    flops = count_flops(config, chosen.size)
    inputs = random_inputs(config, chosen.size, chosen.device)
    model = StepModel(config, chosen.device, dtype, inputs.unconditional_tokens)
    variants = make_variants(model, inputs, chosen.accelerate)
    variants = {name: variant for name, variant in variants.items() if name not in chosen.without}

    rounded = on_cuda(chosen.device) and dtype == torch.float32
    difference = differences(variants)  # this also warms every variant up
    if not check_agreement(difference, TF32_TOLERANCE if rounded else TOLERANCES[dtype]):
        print("The variants do not agree; there is nothing to time.")
        return 1

    seconds = time_rounds(variants, chosen.rounds, chosen.device, CLOCKS[chosen.clock])
    goals = GOALS.get(chosen.size, {}) if chosen.device == "cpu" and not chosen.small else {}
    table = make_table(flops, seconds, goals)
    found = {"flops": flops, "difference": difference, "seconds": seconds, "ratios": all_ratios(flops, seconds)}
    deliver(chosen, facts, table, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
