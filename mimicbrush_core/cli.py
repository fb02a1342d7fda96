"""The command line: `mimicbrush edit | demo | train | evaluate | download | verify | convert | selfcheck`.

Exit codes: 0 done, 2 a wrong setting, 3 a picture, 4 a model file, 5 the output, 6 a download, 130 cancelled;
1 a selfcheck that failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from . import __version__
from .errors import ArgumentError, Cancelled, MimicBrushError, ModelFileError, OutputError

DTYPES = ("auto", "fp32", "fp16", "bf16")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    try:
        arguments.run(arguments)
        return 0
    except MimicBrushError as error:
        print(f"mimicbrush: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mimicbrush: cancelled, nothing was written", file=sys.stderr)
        return Cancelled.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mimicbrush", description="Edit pictures by imitating a reference.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    edit = commands.add_parser(
        "edit",
        help="repaint the masked region of a picture like a reference",
        description="Repaint the masked region of a picture like a reference, with MimicBrush or Paint by Example: "
        "with which, the model file says.",
    )
    edit.add_argument("source", help="the picture to edit")
    edit.add_argument("mask", help="white where to repaint; the picture's size")
    edit.add_argument("reference", help="a picture that shows what it should look like; any size")
    edit.add_argument("-o", "--output", required=True, help="the edited picture, a .png that does not exist yet")
    edit.add_argument("--overwrite", action="store_true", help="replace existing output")
    edit.add_argument("--grid", metavar="FILE", help="also write a labelled comparison sheet (.png)")
    edit.add_argument("--lora", metavar="FILE", help="a LoRA of the imitative U-Net (.safetensors)")
    edit.add_argument("--lora-strength", type=float, default=1.0, metavar="S", help="0: not at all (%(default)s)")
    _add_model_options(edit)
    _add_edit_options(edit)
    _add_exemplar_options(edit)
    edit.set_defaults(run=_edit)

    demo = commands.add_parser("demo", help="edit example pictures with the embedded model; needs no download")
    demo.add_argument("-o", "--output", default="mimicbrush-demo", help="folder for the pictures (%(default)s)")
    _add_model_options(demo)
    _add_edit_options(demo)
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train the small model in stages, fine-tune a model, or train a LoRA")
    train.add_argument("--folder", help="checkpoints and logs")
    train.add_argument("--stage", help="autoencoder, depth or imitation; default: all, in this order")
    train.add_argument("--export", metavar="FILE", help="write what is learned so far as one model file, and stop")
    train.add_argument("--samples", type=int, help="where the run ends (default: as the shipped model)")
    train.add_argument("--minutes", type=float, help="stop after this time; call again to go on")
    train.add_argument("--batch", type=int, help="samples per step, over all processes")
    train.add_argument("--lr", type=float, help="learning rate (of the stages: of the matrices)")
    train.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="of the forward pass (default: bf16)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    _add_data_options(train)
    _add_finetune_options(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="measure a model on the held-out pairs")
    evaluate.add_argument("-o", "--output", required=True, help="folder for the table, the sheet and the figures")
    evaluate.add_argument("--cases", type=int, default=200, help="pairs per set (%(default)s)")
    evaluate.add_argument("--steps", type=int)
    evaluate.add_argument("--guidance", type=float)
    evaluate.add_argument("--hard", action="store_true", help="pairs of any pose, light and background")
    _add_model_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    _add_download(commands)
    _add_verify(commands)
    _add_convert(commands)
    _add_selfcheck(commands)
    return parser


def _add_data_options(train: argparse.ArgumentParser) -> None:
    data = train.add_argument_group("data", "pairs for training, out of one's own files (default: procedural pairs)")
    folders = {
        "videos": "folders of videos",
        "frames": "folders with a folder of frames per clip",
        "stills": "folders of pictures, with segmentation maps (name.seg.png) or without",
    }
    for name, content in folders.items():
        data.add_argument(f"--{name}", nargs="+", type=Path, default=[], metavar="DIR", help=content)
    data.add_argument("--preview", metavar="FILE", help="draw a sheet (.png) of pairs and masks, and stop")
    data.add_argument("--overwrite", action="store_true", help="replace an existing sheet")


def _add_finetune_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--accumulate", type=int, help="passes that one step's batch is divided into: saves memory")
    train.add_argument("--validate-every", type=int, metavar="STEPS", help="judge on held-out pairs (default: never)")
    train.add_argument("--tensorboard", action="store_const", const=True, help="also log for TensorBoard")
    start = train.add_argument_group("beginning", "fine-tune instead of training in stages; see docs/training.md")
    start.add_argument("--model", help="a MimicBrush file or folder (with --lora alone: the embedded model)")
    start.add_argument("--from-sd15", metavar="UNET", help="Stable Diffusion 1.5, diffusers folder or U-Net file")
    start.add_argument("--from-inpainting", metavar="UNET", help="its inpainting model, likewise")
    start.add_argument("--image-encoder", metavar="FILE", help="CLIP ViT-H/14 vision, with --from-sd15")
    start.add_argument("--vae", help="VAE file or folder, where it is not beside the model")
    start.add_argument("--depth", help="Depth Anything file or folder, where it is not beside the model")
    start.add_argument("--random", choices=("sd15", "small"), help="random weights of that size")
    tuning = train.add_argument_group("fine-tuning")
    tuning.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA of this rank and nothing else")
    tuning.add_argument("--lora-alpha", type=float, metavar="A", help="its scale is A / RANK (default: RANK)")
    tuning.add_argument("--parts", nargs="+", metavar="PART", help="what is trained (default: as in the paper)")
    tuning.add_argument("--size", type=int, help="side of the pictures (default: the model's)")
    tuning.add_argument("--ema", type=float, metavar="DECAY", help="of the averaged weights; 0: none")
    tuning.add_argument("--half-frozen", action="store_true", help="hold what is not trained in --precision")
    tuning.add_argument("--keep-activations", action="store_true", help="faster, but takes much more memory")
    tuning.add_argument("--prepare", type=int, default=0, metavar="N", help="encode N samples once, train on these")
    tuning.add_argument("--workers", type=int, default=0, help="processes that draw samples ahead (%(default)s)")
    tuning.add_argument("--validation", type=Path, metavar="DIR", help="held-out pictures for --validate-every")


def _add_verify(commands) -> None:
    verify = commands.add_parser("verify", help="say what a weight file or folder is, and whether it can be used")
    verify.add_argument("path", help="a weight file, or a folder with weights")
    verify.add_argument("--deep", action="store_true", default=None, help="read every value (default: below 2 GB)")
    verify.add_argument("--hash", action="store_true", help="show SHA-256, and compare it with the lock file")
    verify.add_argument("--json", action="store_true", help="print the report for programs")
    verify.set_defaults(run=_verify)


def _add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="turn original files into one .safetensors that loads by itself")
    convert.add_argument(
        "source",
        help="MimicBrush's folder or mimicbrush.bin; Paint by Example's diffusers folder or original checkpoint; "
        "or a single-file model",
    )
    convert.add_argument("-o", "--output", required=True, help="the .safetensors to write")
    convert.add_argument("--vae", help="VAE file or folder, where it is not in the source's folder")
    convert.add_argument("--depth", help="Depth Anything file or folder, where it is not in the source's folder")
    convert.add_argument("--precision", default="fp16", choices=("fp16", "bf16", "fp32"), help="(%(default)s)")
    convert.add_argument("--overwrite", action="store_true", help="replace existing output")
    convert.set_defaults(run=_convert)


def _add_download(commands) -> None:
    download = commands.add_parser("download", help="fetch the released weights, from their authors")
    download.add_argument("--into", default="MimicBrush", help="folder for the files (%(default)s)")
    download.add_argument("--revision", help="branch, tag or commit (default: the lock file's)")
    download.add_argument("--file", action="append", default=[], help="only this file; repeatable")
    download.add_argument("--yes", action="store_true", help="do not ask before the download")
    download.set_defaults(run=_download)


def _add_selfcheck(commands) -> None:
    check = commands.add_parser("selfcheck", help="try a model on this machine; writes one report to share")
    check.add_argument("-o", "--output", default="mimicbrush-selfcheck", help="folder (%(default)s)")
    check.add_argument("--size", type=int, help="side of the pictures (default: the model's)")
    check.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    check.add_argument(
        "--random",
        nargs="?",
        const="sd15",
        choices=("sd15", "small"),
        help="random weights instead of files: of the real model's size (10 GB in fp32), or small",
    )
    _add_model_options(check)
    check.set_defaults(run=_selfcheck)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a .safetensors model, or the original's folder (default: the embedded model)")
    parser.add_argument("--vae", help="VAE file or folder, where it is not in the model's folder")
    parser.add_argument("--depth", help="Depth Anything file or folder, where it is not in the model's folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: fp16 on CUDA, else fp32")


def _add_edit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="same seed, same picture, on every device (%(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="1 = off (default: the model's)")
    parser.add_argument("--scheduler", help="ddim, euler, dpmpp_2m, unipc or plms (default: the model's)")
    parser.add_argument("--spacing", help="of its timesteps: leading, trailing, linspace or karras")
    parser.add_argument("--size", type=int, help="side the model works at (default: the model's)")
    # What one system alone knows has no default here, but in its settings: so it is seen whether it was given.
    own = parser.add_argument_group("with MimicBrush", argument_default=argparse.SUPPRESS)
    own.add_argument("--weight", type=float, help="of the reference, 0 = none (1.0)")
    own.add_argument("--keep-shape", action="store_const", const=1.0, help="keep it, by its depth")
    own.add_argument("--shape-strength", dest="keep_shape", type=float, metavar="S", help="how strictly, 0 to 1")
    parser.add_argument("--zoom", action="store_true", help="edit a window around the mask at full resolution")
    parser.add_argument("--margin", type=float, default=0.5, help="border of that window, relative (%(default)s)")
    parser.add_argument("--feather", type=int, default=10, help="pixels the edit fades out over (%(default)s)")
    parser.add_argument("--color-match", type=float, default=0.0, help="match colours at the seam, 0 to 1")


def _add_exemplar_options(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("with Paint by Example", argument_default=argparse.SUPPRESS)
    own.add_argument("--exemplar-fit", help="stretch, crop or pad the reference to a square (stretch)")
    own.add_argument(
        "--paste-back",
        action="store_const",
        const=True,
        help="keep all beyond mask and feather as it is (default: as published, all comes from the model)",
    )


# --- commands ----------------------------------------------------------------------------------------------
# Heavy imports stay inside the commands, so that --help and wrong arguments answer at once.


def _edit(arguments: argparse.Namespace) -> None:
    from .images import read_mask, read_picture, restore_alpha
    from .masks import check_mask

    outputs = [_checked_output(arguments.output, arguments.overwrite)]
    if arguments.grid:
        outputs.append(_checked_output(arguments.grid, arguments.overwrite))
    source = read_picture(arguments.source, "source")
    reference = read_picture(arguments.reference, "reference").over_white()
    mask = read_mask(arguments.mask)
    check_mask(mask, *source.rgb.shape[:2])

    model, settings_type = _load_any(arguments)
    lora = None
    if arguments.lora:
        from .lora import load_lora

        load_lora(model.modules, arguments.lora, arguments.lora_strength)
        lora = {"file": Path(arguments.lora).name, "strength": arguments.lora_strength}
    result = _run_edit(model, source.over_white(), mask, reference, _settings(arguments, settings_type))
    metadata = {
        "settings": asdict(result.settings),
        **({"lora": lora} if lora else {}),
        "model": model.config["name"],
        "window": asdict(result.window),
        "version": __version__,
    }
    _save(outputs[0], restore_alpha(source, result.picture, result.alpha), metadata)
    if arguments.grid:
        _save(outputs[1], _comparison([(source.over_white(), mask, reference, result)], ["edit"]), metadata)


def _demo(arguments: argparse.Namespace) -> None:
    from .editing import EditSettings
    from .examples import EXAMPLES

    folder = Path(arguments.output)
    _make_folder(folder)
    model = _load(arguments)
    rows, titles = [], []
    for example in EXAMPLES:
        source, mask, reference = example.render()
        for name, picture in (("source", source), ("mask", mask), ("reference", reference)):
            _save(folder / f"{example.name}-{name}.png", picture)
        settings = _settings(arguments, EditSettings, keep_shape=float(example.keep_shape))
        result = _run_edit(model, source, mask, reference, settings, example.title)
        _save(folder / f"{example.name}-result.png", result.picture, {"settings": asdict(result.settings)})
        rows.append((source, mask, reference, result))
        titles.append(example.title)
    _save(folder / "demo.png", _comparison(rows, titles))
    print(f"Look at {folder / 'demo.png'}; the pictures beside it can be edited again with `mimicbrush edit`.")
    if model.config.get("limits"):
        print(f"About this model: {model.config['limits']}")


def _train(arguments: argparse.Namespace) -> None:
    if arguments.preview:
        _preview(arguments)
        return
    if not arguments.folder:
        raise ArgumentError("Training needs a place for its checkpoints and logs: add --folder.")
    from .training.extras import require

    require("accelerate", "Training")
    from .training.trainer import part_from_others

    try:
        if _is_finetune(arguments):
            _finetune(arguments)
        else:
            _train_stages(arguments)
    finally:
        part_from_others()


def _train_stages(arguments: argparse.Namespace) -> None:
    if arguments.videos or arguments.frames or arguments.stills:
        raise ArgumentError(
            "The stages draw their own pairs. Use --videos, --frames and --stills with --preview, or to fine-tune: "
            "with --lora, --model, --from-sd15 or --random."
        )
    from accelerate import PartialState

    from .training.recipe import STAGES, run_stage

    folder = Path(arguments.folder)
    if arguments.export:
        _export(folder, Path(arguments.export))
        return
    for stage in [arguments.stage] if arguments.stage else STAGES:
        run_stage(
            stage,
            folder,
            seed=arguments.seed,
            device=arguments.device,
            on_log=lambda record, stage=stage: print(stage, json.dumps(record), flush=True),
            samples=arguments.samples,
            minutes=arguments.minutes,
            batch=arguments.batch,
            lr=arguments.lr,
            precision=arguments.precision,
            **_engine_changes(arguments),
        )
    if not arguments.stage and PartialState().is_main_process:
        _export(folder, folder / "model.safetensors")


def _export(folder: Path, path: Path) -> None:
    from .training.recipe import export

    print(f"Wrote {path} after {export(folder, path)} samples of imitation.")


def _engine_changes(arguments: argparse.Namespace) -> dict:
    names = ("accumulate", "validate_every", "tensorboard")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


_FINETUNE_OPTIONS = (
    *("model", "from_sd15", "from_inpainting", "image_encoder", "vae", "depth", "random"),
    *("lora", "lora_alpha", "parts", "size", "ema", "half_frozen", "keep_activations", "prepare", "validation"),
)


def _is_finetune(arguments: argparse.Namespace) -> bool:
    """Whether `train` is to fine-tune: by its options, or by what the run folder holds."""
    from .training.finetune import is_finetune

    return any(getattr(arguments, name) for name in _FINETUNE_OPTIONS) or is_finetune(Path(arguments.folder))


def _finetune(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from .training.dataset import DataSettings, pairs_from_folders
    from .training.finetune import FULL, LORA, Recipe, export, finetune
    from .training.starts import StartingPoint

    folder = Path(arguments.folder)
    if arguments.export:
        print(f"Wrote {arguments.export} after {export(folder, Path(arguments.export))} samples.")
        return
    start = StartingPoint(
        model=arguments.model,
        sd15=arguments.from_sd15,
        inpainting=arguments.from_inpainting,
        image_encoder=arguments.image_encoder,
        vae=arguments.vae,
        depth=arguments.depth,
        random=arguments.random,
    )
    recipe = Recipe(
        lora_rank=arguments.lora or 0,
        lora_alpha=arguments.lora_alpha,
        gradient_checkpointing=not arguments.keep_activations,
        half_frozen=arguments.half_frozen,
        **({"train": tuple(arguments.parts)} if arguments.parts else {}),
    )
    names = ("samples", "minutes", "batch", "lr", "precision")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    changes |= _engine_changes(arguments) | ({} if arguments.ema is None else {"ema_decay": arguments.ema})
    data = DataSettings(size=arguments.size or start.size(), seed=arguments.seed)
    held_out = []
    if arguments.validation:
        pairs = pairs_from_folders(stills=[arguments.validation], settings=data)
        held_out = [pairs[index] for index in range(min(4, len(pairs.stills)))]
    finetune(
        folder,
        start,
        pairs_from_folders(arguments.videos, arguments.frames, arguments.stills, data),
        recipe,
        replace(LORA if recipe.lora_rank else FULL, **changes),
        seed=arguments.seed,
        device=arguments.device,
        prepare=arguments.prepare,
        workers=arguments.workers,
        held_out=held_out,
        on_log=lambda record: print(json.dumps(record), flush=True),
    )
    if recipe.lora_rank:
        print(f"The LoRA: {folder / 'lora.safetensors'}. Try it with `mimicbrush edit --lora`, or in ComfyUI.")
    else:
        print(f"Write what is learned as one file: `mimicbrush train --folder {folder} --export FILE`.")


def _preview(arguments: argparse.Namespace) -> None:
    from .training.dataset import DataSettings, pairs_from_folders
    from .training.preview import preview_sheet

    output = _checked_output(arguments.preview, arguments.overwrite)
    settings = DataSettings(size=256, seed=arguments.seed)
    pairs = pairs_from_folders(arguments.videos, arguments.frames, arguments.stills, settings)
    _save(output, preview_sheet(pairs))
    print(f"{len(pairs.clips)} clips and {len(pairs.stills)} stills. Look at {output}.")


def _evaluate(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .evaluation.evaluate import SETS, evaluate
    from .evaluation.report import card_table, sheet, to_json
    from .training.scenes import CLIP_LIKE, FULL_DIFFICULTY

    folder = Path(arguments.output)
    _make_folder(folder)
    model = _load(arguments)
    with tqdm(total=len(SETS) * arguments.cases, unit="pair") as bar:
        results = evaluate(
            model,
            SETS,
            arguments.cases,
            arguments.steps,
            arguments.guidance,
            on_case=lambda _: bar.update(),
            difficulty=FULL_DIFFICULTY if arguments.hard else CLIP_LIKE,
        )
    (folder / "table.md").write_text(card_table(results))
    (folder / "figures.json").write_text(to_json(results))
    sheet(results).save(folder / "sheet.png")
    print(card_table(results))


def _download(arguments: argparse.Namespace) -> None:
    from .hub import download, plan_download

    try:
        with _transfer_bars() as show:
            plan = plan_download(arguments.into, names=arguments.file, revision=arguments.revision, on_progress=show)
        if plan.missing:
            print(f"{plan.repository} at commit {plan.revision}:")
            for file in plan.missing:
                print(f"  {file.size / 1e6:10.1f} MB  {file.name}")
            print("These files have licences of their own: see docs/licences.md and the repository's page.")
            if not arguments.yes:
                _ask(f"Fetch {plan.bytes_to_fetch / 1e9:.2f} GB into {plan.folder}?")
        with _transfer_bars() as show:
            download(plan, show)
    except KeyboardInterrupt as error:
        raise Cancelled("interrupted. What arrived is kept: run the same command again to go on.") from error
    print(f"{plan.folder} is complete and verified. Use it with --model {plan.folder}")


def _verify(arguments: argparse.Namespace) -> None:
    from .verify import describe, inspect

    report = inspect(arguments.path, deep=arguments.deep, hash=arguments.hash)
    print(report.to_json() if arguments.json else describe(report))
    if not report.usable:
        reason = report.problems[0] if report.problems else f"it is {report.title}. {' '.join(report.notes[:1])}"
        raise ModelFileError(f"{arguments.path} cannot be used here: {reason}")


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert
    from .hub import Progress

    with _transfer_bars() as show:
        output = convert(
            arguments.source,
            arguments.output,
            vae=arguments.vae,
            depth=arguments.depth,
            precision=arguments.precision,
            overwrite=arguments.overwrite,
            on_progress=lambda *step: show(Progress(Path(arguments.output).name, *step)),
        )
    print(f"Wrote {output} ({output.stat().st_size / 1e9:.2f} GB), checked. It loads without any other file.")


def _selfcheck(arguments: argparse.Namespace) -> None:
    from .selfcheck import REPORT_NAME, check_model, model_files, random_model, write_report

    folder = Path(arguments.output)
    _make_folder(folder)
    device, dtype = _device_and_dtype(arguments)
    if arguments.random:
        files = {}
        make = lambda: random_model(f"mimicbrush_{arguments.random}", device, dtype)  # noqa: E731
    else:
        files = model_files(arguments.model, arguments.vae, arguments.depth)
        make = lambda: _load(arguments)  # noqa: E731
    report = check_model(
        make,
        files,
        device,
        size=arguments.size,
        steps=arguments.steps,
        on_stage=lambda stage: print(stage, flush=True),
    )
    write_report(report, folder / REPORT_NAME)
    for check in report.checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    print(f"The report to share: {folder / REPORT_NAME}")
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        raise MimicBrushError(f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}.")


# --- pieces ------------------------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace):
    from .systems.mimicbrush import MimicBrush

    device, dtype = _device_and_dtype(arguments)
    return MimicBrush.load(arguments.model, device=device, dtype=dtype, vae=arguments.vae, depth=arguments.depth)


_OWN_OPTIONS = {
    "mimicbrush": {
        "weight": "--weight",
        "keep_shape": "--keep-shape and --shape-strength",
        "lora": "--lora",
        "depth": "--depth",
    },
    "paint-by-example": {"exemplar_fit": "--exemplar-fit", "paste_back": "--paste-back"},
}
"""System -> what of `edit` applies to it alone: the argument, and the options that give it."""


def _load_any(arguments: argparse.Namespace):
    """(the model, the class of its settings), of the system whose model file is given."""
    from .checkpoints import open_model
    from .editing import EditSettings
    from .modules import MIMICBRUSH, PAINT_BY_EXAMPLE, TITLES
    from .systems.paint_by_example import ExemplarSettings, PaintByExample

    files = {"vae": arguments.vae, "depth": arguments.depth}
    system = open_model(arguments.model, **files).config["system"] if arguments.model else MIMICBRUSH
    for other in _OWN_OPTIONS.keys() - {system}:
        for name, options in _OWN_OPTIONS[other].items():
            if getattr(arguments, name, None) is not None:
                raise ArgumentError(f"The model is {TITLES[system]}, which does not know {options}. Leave it out.")
    if system != PAINT_BY_EXAMPLE:
        return _load(arguments), EditSettings
    device, dtype = _device_and_dtype(arguments)
    return PaintByExample.load(arguments.model, device=device, dtype=dtype, vae=arguments.vae), ExemplarSettings


def _device_and_dtype(arguments: argparse.Namespace):
    import torch

    device = _device(arguments.device)
    half = device.startswith("cuda")
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return device, names.get(arguments.dtype, torch.float16 if half else torch.float32)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ArgumentError(f"Unknown device {name!r}. Use auto, cpu, cuda, cuda:N or mps.") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False):
        raise ArgumentError(f"The device {name!r} is not available on this machine. Use cpu, or auto.")
    return name


def _settings(arguments: argparse.Namespace, kind: type, **defaults):
    """Settings of this class; defaults: where the arguments say nothing."""
    names = {field.name for field in fields(kind)} & vars(arguments).keys()
    return kind(**defaults | {name: getattr(arguments, name) for name in names})


def _run_edit(model, source, mask, reference, settings, title: str = "edit"):
    """One edit with a progress bar."""
    from tqdm import tqdm

    with tqdm(leave=False) as bar:

        def show(progress) -> None:
            bar.total = progress.total
            bar.set_description(f"{title}: {progress.stage}", refresh=False)
            bar.update(progress.done - bar.n)

        return model.edit(source, mask, reference, settings, show)


@contextmanager
def _transfer_bars():
    """Gives a function that shows a transfer's progress: one bar per file and stage."""
    from tqdm import tqdm

    bars: dict[tuple[str, str], tqdm] = {}

    def show(progress) -> None:
        key = (progress.name, progress.stage)
        if key not in bars:
            description = f"{progress.name}: {progress.stage}"
            bars[key] = tqdm(total=progress.total, desc=description, unit="B", unit_scale=True, leave=False)
        bars[key].update(progress.done - bars[key].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _ask(question: str) -> None:
    """Raises Cancelled unless the user agrees; ArgumentError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ArgumentError("A download has to be agreed to, and there is no terminal to ask on. Add --yes.")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise Cancelled("not agreed to; nothing was written.")


def _comparison(rows, titles):
    from .sheets import contact_sheet, show_mask

    pictures = [
        [source, show_mask(source, mask), reference, result.picture] for source, mask, reference, result in rows
    ]
    return contact_sheet(pictures, ["source", "mask", "reference", "result"], tile=256, titles=titles)


def _checked_output(path: str, overwrite: bool) -> Path:
    """Refuse an output that could not be written, before any work is done."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise OutputError(f"The output {path} is not a .png file; only PNG keeps the picture exact.")
    if path.exists() and not overwrite:
        raise OutputError(f"The output {path} exists already. Choose another name, or add --overwrite.")
    if not path.parent.is_dir():
        raise OutputError(f"The output folder {path.parent} does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"The output folder {path.parent} cannot be written to. Choose another one.")
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot create the folder {folder}: {error.strerror}. Choose another one.") from error


def _save(path: Path, picture, metadata: dict | None = None) -> None:
    from .images import save_png

    try:
        save_png(path, picture, {"mimicbrush": json.dumps(metadata)} if metadata else {})
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error
