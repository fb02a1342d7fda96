"""One denoising step of each system at the published sizes, beside a plain inpainting step.

    python -m benchmarks.systems                 SD-1.5 sizes, 512 px: counted
    python -m benchmarks.systems --time          and timed, one system after the other, on random weights (8 GB)
    python -m benchmarks.systems --small         the embedded models' sizes: does it run

The unit is one plain step (a 9-channel SD-1.5 inpainting U-Net with text, both guidance rows, batch 1). Counted:
floating-point operations by torch's counter, on tensors without content. Timed: in each round beside a plain step.
Each system runs as its edit runs it: MimicBrush with a reference that is new, and so written in the step, or known.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    CLOCKS,
    DTYPES,
    SEED,
    Variant,
    argument_parser,
    deliver,
    markdown_table,
    random_part,
    ratios,
    spread,
    spread_text,
    started,
    time_rounds,
)
from mimicbrush_core.modules import MODULES, PUBLISHED_CONFIG, TITLES, bundled_config, parts_of, small_name
from mimicbrush_core.references import Reference, ReferenceUse
from mimicbrush_core.repaint import Repainter
from mimicbrush_core.sampling import make_scheduler
from mimicbrush_core.systems import magic_fixup, mimicbrush, paint_by_example, smartbrush

PLAIN = "plain"
GUIDANCE = 5.0
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Setting:
    """Where and how large. side: of the latents."""

    device: str
    dtype: torch.dtype
    side: int

    def draw(self, *shape: int) -> Tensor:
        """Random latents or tokens [1,*shape]; drawn on the CPU, the same on every device."""
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(SEED)).to(self.device)

    def latents(self, channels: int = 4) -> Tensor:
        return self.draw(channels, self.side, self.side)

    def mask(self) -> Tensor:
        mask = torch.zeros(1, 1, self.side, self.side)
        mask[..., self.side // 4 : self.side // 2, self.side // 4 : self.side // 2] = 1
        return mask.to(self.device)


def random_model(kind: type[Repainter], setting: Setting, small: bool) -> Repainter:
    name = small_name(kind.system) if small else PUBLISHED_CONFIG[kind.system]
    config = bundled_config(name)
    if "tokenizer" in config:  # no word is read here, and CLIP's own vocabulary does not ship
        config["tokenizer"] = bundled_config(small_name(kind.system))["tokenizer"]
    parts = {part: random_part(part, config, setting.device, setting.dtype) for part in parts_of(config)}
    return kind(MODULES[kind.system](**parts), config)


def ddim(model: Repainter):
    return make_scheduler(model.config["scheduler"], "ddim", 1)


# --- one step of each ------------------------------------------------------------------------------------------


def mimicbrush_step(model: mimicbrush.MimicBrush, setting: Setting, known: bool) -> Variant:
    config = model.config
    tokens = setting.draw(
        257 if config["unet"]["cross_attention_dim"] == 768 else 65, config["unet"]["cross_attention_dim"]
    )
    reference = Reference(setting.latents().to(model.dtype), tokens.to(model.dtype), owner=model)
    condition = mimicbrush.SourceCondition(setting.mask(), setting.latents(), setting.latents())
    scheduler = ddim(model)

    def bring_about() -> None:
        if known:
            reference.prepare(model.modules.reference_unet, scheduler.timesteps.tolist())
        else:
            reference.clear()

    uses = [ReferenceUse(reference)]
    return Variant(lambda: model.sample(condition, uses, setting.latents(), scheduler, GUIDANCE), before=bring_about)


def paint_by_example_step(model: paint_by_example.PaintByExample, setting: Setting) -> Variant:
    condition = paint_by_example.SourceCondition(setting.latents(), setting.mask())
    exemplar = paint_by_example.Exemplar(setting.draw(1, model.config["unet"]["cross_attention_dim"]), model)
    return Variant(lambda: model.sample(condition, exemplar, setting.latents(), ddim(model), GUIDANCE))


def magic_fixup_step(model: magic_fixup.MagicFixup, setting: Setting) -> Variant:
    condition = magic_fixup.FixupCondition(setting.latents(), setting.latents(), setting.mask())
    return Variant(lambda: model.sample(condition, setting.latents, ddim(model)))


def smartbrush_step(model: smartbrush.SmartBrush, setting: Setting) -> Variant:
    condition = smartbrush.BrushCondition(setting.latents(), setting.mask())
    text = smartbrush.EncodedText(setting.draw(TEXT_TOKENS, model.config["unet"]["cross_attention_dim"]), model)
    settings = smartbrush.BrushSettings(guidance=GUIDANCE)
    return Variant(lambda: model.sample(condition, text, text, setting.latents(), ddim(model), settings))


@dataclass(frozen=True)
class Measured:
    """A row of the table: a system's step, and what is particular about it."""

    kind: type[Repainter]
    make: Callable[[Repainter, Setting], Variant]
    note: str = ""

    @property
    def title(self) -> str:
        return f"{TITLES[self.kind.system]}{self.note}"


ROWS = (
    Measured(mimicbrush.MimicBrush, lambda model, setting: mimicbrush_step(model, setting, False), ", new reference"),
    Measured(mimicbrush.MimicBrush, lambda model, setting: mimicbrush_step(model, setting, True), ", known reference"),
    Measured(paint_by_example.PaintByExample, paint_by_example_step),
    Measured(magic_fixup.MagicFixup, magic_fixup_step),
    Measured(smartbrush.SmartBrush, smartbrush_step),
)


def plain_step(setting: Setting, small: bool) -> Variant:
    """Both rows of a plain inpainting U-Net, as wide as Paint by Example's."""
    system = paint_by_example.PaintByExample.system
    name = small_name(system) if small else PUBLISHED_CONFIG[system]
    config = bundled_config(name)
    unet = random_part("unet", config, setting.device, setting.dtype)
    model_input = setting.latents(9).to(setting.dtype).repeat(2, 1, 1, 1)
    tokens = setting.draw(TEXT_TOKENS, config["unet"]["cross_attention_dim"]).to(setting.dtype).repeat(2, 1, 1)

    @torch.no_grad()
    def run() -> Tensor:
        return unet(model_input, 500, encoder_hidden_states=tokens).sample

    return Variant(run)


# --- counting and timing ----------------------------------------------------------------------------------------


def flops_of(variant: Variant) -> int:
    variant.run()  # what a model computes once and keeps, such as the tokens of "no reference"
    variant.before()
    with FlopCounterMode(display=False) as counter:
        variant.run()
    return counter.get_total_flops()


def counted(small: bool, side: int) -> dict[str, float]:
    """Each row's operations in plain steps."""
    setting = Setting("meta", torch.float32, side)
    plain = flops_of(plain_step(setting, small))
    return {row.title: flops_of(row.make(random_model(row.kind, setting, small), setting)) / plain for row in ROWS}


def timed(chosen: Namespace, side: int) -> dict[str, list[float]]:
    """Each row's time over that of a plain step, by round; one system's weights at a time."""
    setting = Setting(chosen.device, DTYPES[chosen.dtype], side)
    plain, found = plain_step(setting, chosen.small), {}
    for row in ROWS:
        variants = {PLAIN: plain, row.title: row.make(random_model(row.kind, setting, chosen.small), setting)}
        for variant in variants.values():  # warm-up
            variant.before()
            variant.run()
        seconds = time_rounds(variants, chosen.rounds, chosen.device, CLOCKS[chosen.clock])
        found[row.title] = ratios(seconds, row.title, PLAIN)
    return found


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = argument_parser("systems", __doc__, rounds=3)
    parser.add_argument("--time", action="store_true", help="time the steps, too")
    chosen = parser.parse_args(arguments)
    chosen.size = chosen.size or (128 if chosen.small else 512)
    if chosen.size % 64:
        parser.error(f"--size is {chosen.size}; it must be a multiple of 64")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    side = chosen.size // (4 if chosen.small else 8)
    facts = started(chosen, chosen.size)
    counts = counted(chosen.small, side)
    times = timed(chosen, side) if chosen.time or chosen.small else {}
    measured = {title: spread(values) for title, values in times.items()}
    rows = [
        [title, f"{count:.3f}", spread_text(measured[title]) if title in measured else ""]
        for title, count in counts.items()
    ]
    table = markdown_table(["a step of", "counted, plain steps", "measured (min..max)"], rows)
    deliver(chosen, facts, table, counted=counts, measured=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
