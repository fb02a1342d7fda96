"""Try a model on this machine: load it, edit the bundled examples, time, measure, check, write one report.

The report is one HTML file with its pictures inside. It is made to be sent to strangers: facts of the
machine, figures and hashes are in it; names of users, hosts, files and folders are not.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import html
import io
import json
import logging
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from . import __version__, images, masks
from .checkpoints import ORIGINAL_FILES, embedded_model_path
from .encoders import decode_latents
from .errors import ArgumentError, MimicBrushError, OutputError
from .examples import EXAMPLES, Example
from .modules import PART_NAMES, Modules, bundled_config, random_part
from .references import Reference, ReferenceUse
from .sampling import initial_noise, make_scheduler
from .sheets import show_mask
from .systems.mimicbrush import EditSettings, MimicBrush, SourceCondition
from .whole_file import whole_file

REPORT_NAME = "selfcheck.html"
SEED = 20240611
FEATHER = 10
CHECK_STEPS = 4
"""Steps of the edits that are made only to be compared."""
WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
TILE = 256

EXACT_SHARE = 1e-4
"""How far two ways to the same latents may differ, relative to their spread, in float32."""
HALF_SHARE = 5e-2
DEVICE_LEVELS = 2
"""How far the same edit may differ from itself on an accelerator, in levels of 255."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Timing:
    """Seconds of one example's stages; sampling: all steps."""

    example: str
    source: float
    reference: float
    features: float
    sampling: float
    decoding: float


@dataclass
class SelfCheck:
    """All that the report says. pictures: (title, source, mask, reference, result), as in `Example`."""

    machine: dict[str, str]
    model: dict[str, str]
    files: dict[str, str]
    settings: dict[str, object]
    load_seconds: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    pictures: list[tuple] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


def check_model(
    make: Callable[[], MimicBrush],
    files: Mapping[str, Path],
    device: str,
    *,
    size: int | None = None,
    steps: int | None = None,
    examples: Sequence[Example] = EXAMPLES,
    on_stage: Callable[[str], None] | None = None,
) -> SelfCheck:
    """Load a model by `make()` and try it.

    files: what it is made of, {role: file} as of `model_files`; they are hashed.
    device: where make() puts it.
    size, steps: default to the model's. An error while editing becomes a failed check, so that there is a
    report; an error while loading is raised, as are wrong settings (ArgumentError).
    """
    if size is not None and size < 1:
        raise ArgumentError(f"size is {size}; it must be positive.")
    say = on_stage or (lambda stage: None)
    clock = _Clock(device)
    say("Loading the model.")
    model = make()
    load_seconds = clock.lap()
    defaults = model.config["defaults"]
    settings = {
        "size": defaults["size"] if size is None else size,
        "steps": defaults["steps"] if steps is None else steps,
        "seed": SEED,
        "guidance": defaults["guidance"],
        "scheduler": defaults["scheduler"],
    }
    make_scheduler(model.config["scheduler"], settings["scheduler"], settings["steps"])  # raises for wrong steps
    report = SelfCheck(machine_facts(device), _model_facts(model), {}, settings, load_seconds)
    for example in examples:
        say(f"Editing: {example.title}.")
        _guarded(
            report,
            f"example {example.name!r}",
            lambda example=example: _try_example(model, example, report, clock),
        )
    say("Comparing edits.")
    _guarded(report, "comparisons", lambda: _compare(model, examples[0], report))
    report.memory = {"weights": _weight_bytes(model.modules) / 2**30, **clock.memory()}
    if files:
        say("Hashing the files.")
        report.files = {role: _sha256(path) for role, path in files.items()}
    return report


def model_files(model=None, vae=None, depth=None) -> dict[str, Path]:
    """The files that loading reads, by role: names of files may be private, roles are not.

    model, vae, depth: as `checkpoints.load_modules` takes them. What does not exist is left to the
    loader's error.
    """
    path = Path(model) if model else embedded_model_path()
    if path.is_file() and path.suffix == ".safetensors":
        return {"model": path}
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "mimicbrush" else path.parent
    given = {"checkpoint": path if path.is_file() else None, "vae": vae, "depth": depth}
    found: dict[str, Path] = {}
    for role, candidates in ORIGINAL_FILES.items():
        inside = [folder / candidate for candidate in candidates if (folder / candidate).exists()]
        place = Path(given[role]) if given[role] else inside[0] if inside else None
        if place is not None:
            found.update(_files_of(role, place))
    return found


def _files_of(role: str, place: Path) -> dict[str, Path]:
    if place.is_file():
        return {role: place}
    inside = sorted(path for path in place.glob("*") if path.suffix in WEIGHT_FILES or path.name == "config.json")
    return {f"{role} ({path.suffix.lstrip('.')})": path for path in inside}


# --- random weights ----------------------------------------------------------------------------------------


def random_model(config_name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MimicBrush:
    """A model of a bundled configuration with random weights, each allocated once, in its final place."""
    config = bundled_config(config_name)
    config["name"] += ", random weights"
    generator = torch.Generator(device).manual_seed(SEED)
    dtypes = {"depth_network": torch.float32}  # as the loader keeps it
    parts = {name: random_part(name, config, device, dtypes.get(name, dtype), generator) for name in PART_NAMES}
    return MimicBrush(Modules(**parts), config)


# --- the trial ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """One example ready to be sampled."""

    source: np.ndarray
    mask: np.ndarray
    picture: np.ndarray
    condition: SourceCondition
    reference: Reference
    noise: Tensor


def _prepared(model: MimicBrush, example: Example, size: int) -> _Trial:
    source, mask, picture = example.render(size)
    condition = model.encode_source(source, mask, size, keep_shape=example.keep_shape)
    noise = initial_noise([SEED], tuple(condition.hole_latents.shape[1:]))
    return _Trial(source, mask, picture, condition, model.encode_reference(picture, size), noise)


@torch.no_grad()
def _try_example(model: MimicBrush, example: Example, report: SelfCheck, clock: _Clock) -> None:
    """Edit one example in timed stages; the same work as `MimicBrush.edit`, which `_compare` holds it to."""
    settings = report.settings
    source, mask, picture = example.render(settings["size"])
    scheduler = make_scheduler(model.config["scheduler"], settings["scheduler"], settings["steps"])
    model.unconditional_tokens()  # a constant of the weights, computed once: not part of an edit's time
    model.no_depth_map()

    clock.lap()
    condition = model.encode_source(source, mask, settings["size"], keep_shape=example.keep_shape)
    times = {"source": clock.lap()}
    reference = model.encode_reference(picture, settings["size"])
    times["reference"] = clock.lap()
    reference.prepare(model.modules.reference_unet, scheduler.timesteps.tolist())
    times["features"] = clock.lap()
    noise = initial_noise([SEED], tuple(condition.hole_latents.shape[1:]))
    latents = model.sample(condition, [ReferenceUse(reference, 1.0)], noise, scheduler, settings["guidance"])
    times["sampling"] = clock.lap()
    decoded = decode_latents(model.modules.vae, latents.to(model.dtype)).float()
    times["decoding"] = clock.lap()

    result = masks.paste_back(images.from_model_range(decoded)[0], source, masks.feather_alpha(mask, FEATHER))
    report.timings.append(Timing(example.name, **times))
    report.pictures.append((example.title, source, mask, picture, result))
    tensors = {
        "tokens": reference.tokens,
        "reference latents": reference.latents,
        "depth": condition.depth,
        "latents": latents,
        "decoded picture": decoded,
    }
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    report.checks += [
        Check(
            f"{example.name}: all values are finite",
            not broken,
            _listed(broken) or "tokens to decoded picture",
        ),
        _untouched(example, source, mask, result),
        _repainted(example, source, mask, result),
    ]


def _untouched(example: Example, source: np.ndarray, mask: np.ndarray, result: np.ndarray) -> Check:
    reach = torch.from_numpy(mask)[None, None]
    beyond = (F.max_pool2d(reach, 2 * FEATHER + 1, stride=1, padding=FEATHER)[0, 0] == 0).numpy()
    changed = int((result[beyond] != source[beyond]).any(axis=-1).sum())
    detail = f"{changed} of {int(beyond.sum())} pixels changed"
    return Check(
        f"{example.name}: pixels beyond the feather are unchanged",
        changed == 0 and bool(beyond.any()),
        detail,
    )


def _repainted(example: Example, source: np.ndarray, mask: np.ndarray, result: np.ndarray) -> Check:
    inside = result[mask == 1].astype(np.float32)
    spread, change = inside.std(), np.abs(inside - source[mask == 1]).mean()
    detail = f"spread {spread:.1f}, mean change {change:.1f} levels"
    return Check(f"{example.name}: the hole is painted, not flat", bool(spread > 0.5 and change > 0.5), detail)


@torch.no_grad()
def _compare(model: MimicBrush, example: Example, report: SelfCheck) -> None:
    """Short edits whose relations are known."""
    size, guidance = report.settings["size"], report.settings["guidance"]
    steps = min(report.settings["steps"], CHECK_STEPS)
    trial = _prepared(model, example, size)

    def sampled(references, guidance: float) -> Tensor:
        scheduler = make_scheduler(model.config["scheduler"], report.settings["scheduler"], steps)
        return model.sample(trial.condition, references, trial.noise, scheduler, guidance)

    with_reference = sampled([ReferenceUse(trial.reference, 1.0)], guidance)
    without = sampled([ReferenceUse(trial.reference, 0.0)], guidance)
    unconditional_row = sampled([ReferenceUse(trial.reference, 1.0)], 0.0)
    edited = model.edit(trial.source, trial.mask, trial.picture, EditSettings(SEED, steps, size=size, feather=FEATHER))
    report.checks += [
        _same_picture(model.decode(with_reference)[0], edited.raw, model.device.type),
        _weights_differ(with_reference, without),
        _rows_agree(unconditional_row, without, model.dtype),
    ]


def _same_picture(first: np.ndarray, second: np.ndarray, device: str) -> Check:
    apart = int(np.abs(first.astype(int) - second).max())
    allowed = 0 if device == "cpu" else DEVICE_LEVELS
    detail = f"largest difference {apart} of 255, {allowed} allowed"
    return Check("the same seed twice gives the same picture", apart <= allowed, detail)


def _weights_differ(one: Tensor, none: Tensor) -> Check:
    share = _apart(one, none)
    return Check("weight 0 differs from weight 1", share > 1e-3, f"{share:.2g} of the latents' spread")


def _rows_agree(row: Tensor, alone: Tensor, dtype: torch.dtype) -> Check:
    """With guidance 0 only the unconditional row counts: it must not have seen the reference."""
    share, allowed = _apart(row, alone), EXACT_SHARE if dtype == torch.float32 else HALF_SHARE
    detail = f"{share:.2g} of the latents' spread, {allowed:g} allowed"
    return Check("the unconditional row does not see the reference", share <= allowed, detail)


def _apart(first: Tensor, second: Tensor) -> float:
    """Mean difference relative to the spread; NaN (which fails every comparison) if one is not finite."""
    return float((first - second).abs().mean() / second.std())


def _guarded(report: SelfCheck, name: str, work: Callable[[], None]) -> None:
    try:
        work()
    except ArgumentError:
        raise  # the caller's size, not the model
    except (MimicBrushError, RuntimeError) as error:  # RuntimeError: torch's own, out of memory among them
        logger.info("%s ended with an error", name, exc_info=True)
        first_line = (str(error).splitlines() or [""])[0][:300]
        report.checks.append(Check(f"{name} runs", False, f"{type(error).__name__}: {without_names(first_line)}"))


def _listed(names: Sequence[str]) -> str:
    return f"not finite: {', '.join(names)}" if names else ""


# --- time and memory ---------------------------------------------------------------------------------------


class _Clock:
    """Wall time between laps, after the device has finished; the most memory seen."""

    def __init__(self, device: str):
        self._kind, self._device = torch.device(device).type, device
        self._mps_peak = 0
        if self._kind == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self._kind == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._kind == "mps":
            torch.mps.synchronize()
            self._mps_peak = max(self._mps_peak, torch.mps.current_allocated_memory())
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    def memory(self) -> dict[str, float]:
        """Peaks in GiB: of the process, and of the accelerator (on MPS the largest at the end of a stage)."""
        peaks = {}
        resident = process_peak_bytes()
        if resident is not None:
            peaks["peak of the process"] = resident / 2**30
        if self._kind == "cuda":
            peaks["peak on the GPU"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        elif self._kind == "mps":
            peaks["peak on the GPU"] = self._mps_peak / 2**30
        return peaks


def process_peak_bytes() -> int | None:
    """The most memory this process has had resident; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _weight_bytes(modules: Modules) -> int:
    tensors = [tensor for _, module in modules.items() for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- facts -------------------------------------------------------------------------------------------------


def machine_facts(device: str) -> dict[str, str]:
    """What has to be said beside any figure; nothing that names a person, a host or a place."""
    facts = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "device": device,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "mimicbrush": __version__,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {name: without_names(value) for name, value in facts.items()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _model_facts(model: MimicBrush) -> dict[str, str]:
    count = sum(weight.numel() for _, module in model.modules.items() for weight in module.parameters())
    return {
        "name": str(model.config["name"]),
        "precision": str(model.dtype).removeprefix("torch."),
        "weights": f"{count / 1e6:.1f} million",
    }


def without_names(text: str) -> str:
    """The text without this user's and host's name and without paths."""
    text = re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+[^\s/\\:'\"]*", "(path)", text)
    for name in _private_names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(name)", text)
    return text


def _private_names() -> list[str]:
    names = [socket.gethostname(), Path.home().name]
    try:
        names.append(getpass.getuser())
    except (OSError, KeyError, ImportError):  # no such user, e.g. in a container
        logger.debug("The user has no name here.")
    return [name for name in names if len(name) > 2]


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


# --- the report --------------------------------------------------------------------------------------------


def write_report(report: SelfCheck, path: Path) -> None:
    """Write the report as one HTML file: beside its place, then renamed. Raises OutputError."""
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(to_html(report), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"Cannot write the report {path}: {error.strerror or error}.") from error


def to_json(report: SelfCheck) -> str:
    """All figures, without the pictures."""
    figures = {name: value for name, value in vars(report).items() if name != "pictures"}
    return json.dumps({**figures, "passed": report.passed}, default=asdict, indent=1)


def to_html(report: SelfCheck) -> str:
    verdict = "All checks passed" if report.passed else "Some checks failed"
    model = report.model | {f"SHA-256 of {role}": value for role, value in report.files.items()}
    figures = to_json(report).replace("<", "\\u003c")  # nothing in it can end the script element
    return "\n".join([
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>mimicbrush selfcheck</title>",
        f"<style>{_STYLE}</style>",
        f"<h1>mimicbrush selfcheck: <span class='{_verdict(report.passed)}'>{verdict}</span></h1>",
        "<p>Made by <code>mimicbrush selfcheck</code>. No names of users, hosts, files or folders.</p>",
        "<h2>Checks</h2>", _checks_table(report.checks),
        "<h2>Pictures</h2>", *map(_picture_row, report.pictures),
        "<h2>Seconds</h2>", _timings_table(report),
        "<h2>Memory, GiB</h2>", _pairs({name: f"{value:.2f}" for name, value in report.memory.items()}),
        "<h2>Model</h2>", _pairs(model),
        "<h2>Settings</h2>", _pairs(report.settings),
        "<h2>Machine</h2>", _pairs(report.machine),
        f"<script type='application/json' id='figures'>{figures}</script></html>\n",
    ])  # fmt: skip


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em;color:#222;"
    "background:#fff}h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .4em}"
    "table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ddd;padding:.25em .8em;text-align:left;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}.passed{color:#17703a}.failed{color:#b00020;"
    "font-weight:bold}figure{display:inline-block;margin:0 8px 8px 0}figcaption{font-size:.85em;color:#555}"
    f"img{{width:{TILE}px;max-width:100%;display:block}}code{{word-break:break-all}}"
)


def _verdict(passed: bool) -> str:
    return "passed" if passed else "failed"


def _row(cells: Sequence[object], numbers: bool = False) -> str:
    kind = " class='n'" if numbers else ""
    first, *rest = (html.escape(str(cell)) for cell in cells)
    return f"<tr><td>{first}</td>" + "".join(f"<td{kind}>{cell}</td>" for cell in rest) + "</tr>"


def _pairs(values: Mapping[str, object]) -> str:
    return f"<table>{''.join(_row(pair) for pair in values.items())}</table>"


def _checks_table(checks: Sequence[Check]) -> str:
    rows = [
        f"<tr><td class='{_verdict(check.passed)}'>{_verdict(check.passed)}</td>"
        f"<td>{html.escape(check.name)}</td><td>{html.escape(check.detail)}</td></tr>"
        for check in checks
    ]
    return f"<table>{''.join(rows)}</table>"


def _timings_table(report: SelfCheck) -> str:
    names = ("source", "reference", "features", "sampling", "decoding")
    heads = (
        "example",
        "source encoded",
        "reference encoded",
        "reference features",
        "sampling",
        "decoding",
        "per step",
    )
    rows = []
    for timing in report.timings:
        seconds = [getattr(timing, name) for name in names] + [timing.sampling / report.settings["steps"]]
        rows.append(_row([timing.example, *(f"{value:.3f}" for value in seconds)], numbers=True))
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<p>Loading: {report.load_seconds:.1f}</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _picture_row(entry: tuple) -> str:
    title, source, mask, reference, result = entry
    pictures = {"source": source, "mask": show_mask(source, mask), "reference": reference, "result": result}
    figures = [
        f"<figure><img alt='{name}' src='{_data_address(picture)}'><figcaption>{name}</figcaption></figure>"
        for name, picture in pictures.items()
    ]
    return f"<p>{html.escape(title)}</p><div>{''.join(figures)}</div>"


def _data_address(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
