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
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from . import __version__
from .errors import ArgumentError, Cancelled, MimicBrushError, ModelFileError, OutputError

logger = logging.getLogger(__name__)

DTYPES = ("auto", "fp32", "fp16", "bf16")

_REPAINTING = ("mimicbrush", "paint-by-example")
_SYSTEMS = (*_REPAINTING, "magic-fixup", "smartbrush")
"""As `modules` names them, which is too slow to import for --help; the default first."""

_MASK_AND_REFERENCE = {"mask": "a mask", "reference": "a reference"}
_NEEDED = {
    "mimicbrush": _MASK_AND_REFERENCE,
    "paint-by-example": _MASK_AND_REFERENCE,
    "magic-fixup": {"coarse": "a coarse edit (--coarse)"},
    "smartbrush": {"mask": "a mask", "text": "a text (--text)"},
}
"""System -> what `edit` cannot do without: the argument, and how messages call it."""

_OWN = {
    "weight": ("--weight", ("mimicbrush",)),
    "keep_shape": ("--keep-shape and --shape-strength", ("mimicbrush",)),
    "lora": ("--lora", ("mimicbrush",)),
    "depth": ("--depth", ("mimicbrush",)),
    "reference": ("a reference", _REPAINTING),
    "exemplar_fit": ("--exemplar-fit", ("paint-by-example",)),
    "paste_back": ("--paste-back", ("paint-by-example", "magic-fixup")),
    "coarse": ("--coarse", ("magic-fixup",)),
    "strength": ("--strength", ("magic-fixup",)),
    "eta": ("--eta", ("magic-fixup",)),
    "text": ("--text", ("smartbrush",)),
    "negative": ("--negative", ("smartbrush",)),
    "precision": ("--precision", ("smartbrush",)),
    "preserve_background": ("--whole-mask", ("smartbrush",)),
    "refine_from": ("--refine-from", ("smartbrush",)),
    "threshold": ("--threshold", ("smartbrush",)),
}
"""Argument of `edit` that not every system knows -> how messages call it, and the systems that do."""


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
        help="repaint the masked region of a picture like a reference, or make a coarse edit believable",
        description="Repaint the masked region of a picture like a reference, with MimicBrush or Paint by Example, or "
        "make a coarse edit of it believable, with Magic Fixup: with which, --system or the model file says.",
    )
    edit.add_argument("source", help="the picture to edit")
    edit.add_argument("mask", nargs="?", help="white where to repaint; the picture's size")
    edit.add_argument("reference", nargs="?", help="a picture that shows what it should look like; any size")
    edit.add_argument("-o", "--output", required=True, help="the edited picture, a .png that does not exist yet")
    edit.add_argument("--overwrite", action="store_true", help="replace existing output")
    edit.add_argument("--grid", metavar="FILE", help="also write a labelled comparison sheet (.png)")
    edit.add_argument("--system", choices=_SYSTEMS, help="without --model: whose embedded model (default: mimicbrush)")
    edit.add_argument(
        "--paste-back",
        action="store_const",
        const=True,
        default=argparse.SUPPRESS,
        help="with Paint by Example or Magic Fixup: keep all beyond mask and feather as it is (default: as published, "
        "all comes from the model); MimicBrush always does",
    )
    edit.add_argument("--lora", metavar="FILE", help="a LoRA of the imitative U-Net (.safetensors)")
    edit.add_argument("--lora-strength", type=float, default=1.0, metavar="S", help="0: not at all (%(default)s)")
    _add_model_options(edit)
    _add_edit_options(edit)
    _add_exemplar_options(edit)
    _add_fixup_options(edit)
    _add_brush_options(edit)
    edit.set_defaults(run=_edit)

    demo = commands.add_parser("demo", help="edit example pictures with the embedded model; needs no download")
    demo.add_argument("-o", "--output", default="mimicbrush-demo", help="folder for the pictures (%(default)s)")
    _add_model_options(demo)
    _add_edit_options(demo)
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train the small model in stages, fine-tune a model, or train a LoRA")
    train.add_argument("--folder", help="checkpoints and logs")
    train.add_argument("--system", choices=_SYSTEMS, help="whose model (default: the run's, else mimicbrush)")
    train.add_argument("--stage", help="one of the small model's stages, e.g. imitation; default: all, in their order")
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

    evaluate = commands.add_parser("evaluate", help="measure a model of any system on its held-out cases")
    evaluate.add_argument("-o", "--output", required=True, help="folder for the table, the sheet and the figures")
    evaluate.add_argument("--system", choices=_SYSTEMS, help="without --model: whose embedded model")
    evaluate.add_argument("--cases", type=int, default=200, help="cases per set (%(default)s)")
    evaluate.add_argument("--steps", type=int)
    evaluate.add_argument("--guidance", type=float)
    evaluate.add_argument("--hard", action="store_true", help="MimicBrush: pairs of any pose, light and background")
    _add_model_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    _add_download(commands)
    _add_verify(commands)
    _add_convert(commands)
    _add_selfcheck(commands)
    return parser


def _add_data_options(train: argparse.ArgumentParser) -> None:
    data = train.add_argument_group("data", "out of one's own files (default: procedural pairs)")
    folders = {
        "videos": "folders of videos",
        "frames": "folders with a folder of frames per clip",
        "stills": "folders of pictures, with segmentation maps (name.seg.png) or without",
    }
    for name, content in folders.items():
        data.add_argument(f"--{name}", nargs="+", type=Path, default=[], metavar="DIR", help=content)
    brush = train.add_argument_group("data for SmartBrush", "objects with masks and words, in one of two forms")
    brush.add_argument("--segments", type=Path, metavar="DIR", help="a folder with image/, mask/ and text/")
    brush.add_argument("--coco", type=Path, metavar="JSON", help="instances in COCO's format, with --pictures")
    brush.add_argument("--pictures", type=Path, metavar="DIR", help="the pictures that --coco names")
    brush.add_argument("--captions", type=Path, metavar="JSON", help="phrases for some of its objects: {id: phrase}")
    data.add_argument("--preview", metavar="FILE", help="draw a sheet (.png) of pairs and masks, and stop")
    data.add_argument("--overwrite", action="store_true", help="replace an existing sheet")


def _add_finetune_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--accumulate", type=int, help="passes that one step's batch is divided into: saves memory")
    train.add_argument("--validate-every", type=int, metavar="STEPS", help="judge on held-out pairs (default: never)")
    train.add_argument("--tensorboard", action="store_const", const=True, help="also log for TensorBoard")
    start = train.add_argument_group("beginning", "fine-tune instead of training in stages; see docs/training.md")
    start.add_argument("--model", help="a MimicBrush (with --lora alone: the embedded one) or SmartBrush to go on from")
    start.add_argument("--from-sd15", metavar="UNET", help="Stable Diffusion 1.5, diffusers folder (or U-Net file)")
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
    tuning.add_argument(
        "--validation",
        type=Path,
        metavar="DIR",
        help="held-out pictures for --validate-every, in a folder as for --stills, or for SmartBrush --segments",
    )


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
    download.add_argument("--system", default="mimicbrush", choices=("mimicbrush", "magic-fixup"), help="(%(default)s)")
    download.add_argument("--into", help="folder for the files (default: MimicBrush or MagicFixup)")
    download.add_argument("--revision", help="branch, tag or commit (default: the lock file's)")
    download.add_argument("--file", action="append", default=[], help="only this file; repeatable")
    download.add_argument("--yes", action="store_true", help="do not ask before the download")
    download.add_argument(
        "--accept-licence",
        action="store_true",
        help="I have read the licence and accept it; needed for Magic Fixup: non-commercial research only",
    )
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


def _add_fixup_options(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("with Magic Fixup", argument_default=argparse.SUPPRESS)
    own.add_argument("--coarse", metavar="FILE", help="the coarse edit (.png), transparent where nothing is known")
    own.add_argument("--strength", type=float, metavar="S", help="share of the steps; less: closer to it (1.0)")
    own.add_argument("--eta", type=float, metavar="E", help="how much new noise each step adds, 0 to 1 (1.0)")


def _add_brush_options(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("with SmartBrush", argument_default=argparse.SUPPRESS)
    own.add_argument("--text", help="what to paint into the mask")
    own.add_argument("--negative", metavar="TEXT", help="what the picture should not show")
    own.add_argument("--precision", type=int, metavar="P", help="the mask: 0 the exact silhouette, 4 a box (2)")
    own.add_argument(
        "--whole-mask",
        dest="preserve_background",
        action="store_const",
        const=False,
        help="repaint all of the mask; otherwise the background beside the new thing is given back",
    )
    own.add_argument("--refine-from", type=float, metavar="F", help="after which share of the steps it is (0.4)")
    own.add_argument("--threshold", type=float, metavar="T", help="what counts as the new thing, 0 to 1 (0.5)")


# --- commands ----------------------------------------------------------------------------------------------
# Heavy imports stay inside the commands, so that --help and wrong arguments answer at once.


def _edit(arguments: argparse.Namespace) -> None:
    from .images import restore_alpha

    outputs = [_checked_output(arguments.output, arguments.overwrite)]
    if arguments.grid:
        outputs.append(_checked_output(arguments.grid, arguments.overwrite))
    system = _system_of(arguments)
    _check_fits(arguments, system)
    pictures = _read_pictures(arguments)

    model, settings_type = _load_any(arguments, system)
    lora = None
    if arguments.lora:
        from .lora import load_lora

        load_lora(model.modules, arguments.lora, arguments.lora_strength)
        lora = {"file": Path(arguments.lora).name, "strength": arguments.lora_strength}
    text = getattr(arguments, "text", None)
    result = _run_edit(_edit_of(model, pictures, text, _settings(arguments, settings_type)))
    for warning in getattr(result, "warnings", ()):
        logger.warning("%s", warning)
    metadata = {
        "settings": asdict(result.settings),
        **({"text": text} if text is not None else {}),
        **({"lora": lora} if lora else {}),
        "model": model.config["name"],
        "window": asdict(result.window),
        "version": __version__,
    }
    _save(outputs[0], restore_alpha(pictures["source"], result.picture, result.alpha), metadata)
    if arguments.grid:
        _save(outputs[1], _comparison([{**_shown(pictures), "result": result.picture}], ["edit"]), metadata)


def _read_pictures(arguments: argparse.Namespace) -> dict:
    """What was given of source, mask, reference and coarse edit, as they were read."""
    from .images import read_mask, read_picture
    from .masks import check_mask

    pictures = {"source": read_picture(arguments.source, "source")}
    if arguments.reference:
        pictures["reference"] = read_picture(arguments.reference, "reference")
    if arguments.mask:
        pictures["mask"] = read_mask(arguments.mask)
        check_mask(pictures["mask"], *pictures["source"].rgb.shape[:2])
    if "coarse" in arguments:
        pictures["coarse edit"] = read_picture(arguments.coarse, "coarse edit")
    return pictures


def _edit_of(model, pictures: dict, text: str | None, settings) -> Callable:
    """The model's edit of these pictures; it takes `on_progress`."""
    source = pictures["source"].over_white()
    if "coarse edit" in pictures:
        layer = pictures["coarse edit"].layer()
        return partial(model.edit, source, layer, settings, mask=pictures.get("mask"))
    if text is not None:
        return partial(model.edit, source, pictures["mask"], text, settings)
    return partial(model.edit, source, pictures["mask"], pictures["reference"].over_white(), settings)


def _shown(pictures: dict) -> dict:
    """The pictures as a sheet shows them, by their labels."""
    import numpy as np
    import torch

    from .coarse_edit import over_checker
    from .sheets import show_mask

    shown = {"source": pictures["source"].over_white()}
    if "mask" in pictures:
        shown["mask"] = show_mask(shown["source"], pictures["mask"])
    if "reference" in pictures:
        shown["reference"] = pictures["reference"].over_white()
    if "coarse edit" in pictures:
        layer = torch.from_numpy(pictures["coarse edit"].layer()[None]).float() / 255
        shown["coarse edit"] = (over_checker(layer)[0].numpy() * 255).round().astype(np.uint8)
    return shown


def _demo(arguments: argparse.Namespace) -> None:
    from .editing import EditSettings
    from .examples import EXAMPLES
    from .sheets import show_mask

    folder = Path(arguments.output)
    _make_folder(folder)
    model = _load(arguments)
    rows, titles = [], []
    for example in EXAMPLES:
        source, mask, reference = example.render()
        for name, picture in (("source", source), ("mask", mask), ("reference", reference)):
            _save(folder / f"{example.name}-{name}.png", picture)
        settings = _settings(arguments, EditSettings, keep_shape=float(example.keep_shape))
        result = _run_edit(partial(model.edit, source, mask, reference, settings), example.title)
        _save(folder / f"{example.name}-result.png", result.picture, {"settings": asdict(result.settings)})
        tinted = show_mask(source, mask)
        rows.append({"source": source, "mask": tinted, "reference": reference, "result": result.picture})
        titles.append(example.title)
    _save(folder / "demo.png", _comparison(rows, titles))
    print(f"Look at {folder / 'demo.png'}; the pictures beside it can be edited again with `mimicbrush edit`.")
    if model.config.get("limits"):
        print(f"About this model: {model.config['limits']}")


_FINETUNED = ("mimicbrush", "smartbrush")
_TRAINED_BY = {
    **dict.fromkeys(("videos", "frames", "stills"), ("mimicbrush",)),
    **dict.fromkeys(("image_encoder", "vae", "depth", "random"), ("mimicbrush",)),
    **dict.fromkeys(("lora", "lora_alpha", "parts", "prepare"), ("mimicbrush",)),
    **dict.fromkeys(("segments", "coco", "pictures", "captions"), ("smartbrush",)),
    **dict.fromkeys(("model", "from_sd15", "from_inpainting"), _FINETUNED),
    **dict.fromkeys(("size", "ema", "half_frozen", "keep_activations", "workers", "validation"), _FINETUNED),
}
"""Argument of `train` that not every system knows -> the systems that do."""


def _train(arguments: argparse.Namespace) -> None:
    arguments.system = arguments.system or _trained_system(arguments)
    _check_trains(arguments)
    if arguments.preview:
        _preview(arguments)
        return
    if not arguments.folder:
        raise ArgumentError("Training needs a place for its checkpoints and logs: add --folder.")
    from .training.extras import require

    require("accelerate", "Training")
    from .training.trainer import part_from_others

    try:
        if not _is_finetune(arguments):
            _train_stages(arguments)
        elif arguments.stage:
            raise ArgumentError("--stage is of the small model, the other options are of a fine-tuning. Leave one out.")
        elif arguments.system == "smartbrush":
            _finetune_brush(arguments)
        else:
            _finetune(arguments)
    finally:
        part_from_others()


def _trained_system(arguments: argparse.Namespace) -> str:
    """That of the run in the folder; the default for a new one."""
    from .training.run_notes import finetuned_system

    return (finetuned_system(Path(arguments.folder)) if arguments.folder else None) or _SYSTEMS[0]


def _check_trains(arguments: argparse.Namespace) -> None:
    """Refuse by name what the system's training does not know."""
    from .modules import TITLES

    for name, systems in _TRAINED_BY.items():
        if arguments.system not in systems and getattr(arguments, name):
            raise ArgumentError(
                f"The training of {TITLES[arguments.system]} does not know --{name.replace('_', '-')}. Leave it out, "
                f"or choose another --system: {', '.join(systems)}."
            )


def _train_stages(arguments: argparse.Namespace) -> None:
    if arguments.videos or arguments.frames or arguments.stills:
        raise ArgumentError(
            "The stages draw their own pairs. Use --videos, --frames and --stills with --preview, or to fine-tune: "
            "with --lora, --model, --from-sd15 or --random."
        )
    from accelerate import PartialState

    from .training.recipe import RECIPES, run_stage

    folder = Path(arguments.folder)
    if arguments.export:
        _export(folder, Path(arguments.export), arguments.system)
        return
    for stage in [arguments.stage] if arguments.stage else RECIPES[arguments.system]:
        run_stage(
            stage,
            folder,
            system=arguments.system,
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
        _export(folder, folder / "model.safetensors", arguments.system)


def _export(folder: Path, path: Path, system: str) -> None:
    from .training.recipe import export

    print(f"Wrote {path} after {export(folder, path, system)} samples of its last stage.")


def _engine_changes(arguments: argparse.Namespace) -> dict:
    names = ("accumulate", "validate_every", "tensorboard")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _settings_changes(arguments: argparse.Namespace) -> dict:
    """What a fine-tuning's `TrainingSettings` are to have instead of the recipe's."""
    names = ("samples", "minutes", "batch", "lr", "precision")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return changes | _engine_changes(arguments) | ({} if arguments.ema is None else {"ema_decay": arguments.ema})


_FINETUNE_OPTIONS = (
    *("model", "from_sd15", "from_inpainting", "image_encoder", "vae", "depth", "random"),
    *("lora", "lora_alpha", "parts", "size", "ema", "half_frozen", "keep_activations", "prepare", "validation"),
    *("segments", "coco", "pictures", "captions"),
)


def _is_finetune(arguments: argparse.Namespace) -> bool:
    """Whether `train` is to fine-tune: by its options, or by what the run folder holds."""
    from .training.run_notes import finetuned_system

    is_asked = any(getattr(arguments, name) for name in _FINETUNE_OPTIONS)
    return is_asked or finetuned_system(Path(arguments.folder)) == arguments.system


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
        replace(LORA if recipe.lora_rank else FULL, **_settings_changes(arguments)),
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


def _finetune_brush(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from .training.brush_start import BrushStart
    from .training.segments import Segments, list_segment_folder
    from .training.smartbrush_finetune import FULL, BrushRecipe, export_brush, finetune_brush

    folder = Path(arguments.folder)
    if arguments.export:
        print(f"Wrote {arguments.export} after {export_brush(folder, Path(arguments.export))} samples.")
        return
    start = BrushStart(model=arguments.model, sd15=arguments.from_sd15, inpainting=arguments.from_inpainting)
    start.check()
    instances, size = _instances(arguments), arguments.size or start.size()
    held_out = list_segment_folder(arguments.validation)[:4] if arguments.validation else []
    finetune_brush(
        folder,
        start,
        Segments(instances, size, arguments.seed),
        BrushRecipe(gradient_checkpointing=not arguments.keep_activations, half_frozen=arguments.half_frozen),
        replace(FULL, **_settings_changes(arguments)),
        seed=arguments.seed,
        device=arguments.device,
        workers=arguments.workers,
        held_out=[Segments([one], size)(0) for one in held_out],
        on_log=lambda record: print(json.dumps(record), flush=True),
    )
    print(f"The model: {folder / 'model.safetensors'}. Try it with `mimicbrush edit --model`, or in ComfyUI.")


def _instances(arguments: argparse.Namespace) -> list:
    """The masked objects of a folder, or of a data set in COCO's format."""
    from .training.coco import list_coco
    from .training.segments import list_segment_folder

    if bool(arguments.segments) == bool(arguments.coco):
        raise ArgumentError(
            "SmartBrush learns from objects with masks and words: give one of --segments, and --coco with --pictures."
        )
    if arguments.segments:
        if arguments.pictures or arguments.captions:
            raise ArgumentError("--pictures and --captions go with --coco, not with --segments. Leave them out.")
        return list_segment_folder(arguments.segments)
    if not arguments.pictures:
        raise ArgumentError("--coco needs the folder of its pictures: add --pictures.")
    return list_coco(arguments.coco, arguments.pictures, arguments.captions)


def _preview(arguments: argparse.Namespace) -> None:
    from .training.dataset import DataSettings, pairs_from_folders
    from .training.preview import preview_sheet

    output = _checked_output(arguments.preview, arguments.overwrite)
    if arguments.system == "smartbrush":
        _preview_segments(arguments, output)
        return
    settings = DataSettings(size=256, seed=arguments.seed)
    pairs = pairs_from_folders(arguments.videos, arguments.frames, arguments.stills, settings)
    _save(output, preview_sheet(pairs))
    print(f"{len(pairs.clips)} clips and {len(pairs.stills)} stills. Look at {output}.")


def _preview_segments(arguments: argparse.Namespace, output: Path) -> None:
    from .training.preview import segments_sheet
    from .training.segments import Segments

    instances = _instances(arguments)
    _save(output, segments_sheet(Segments(instances, arguments.size or 256, arguments.seed)))
    print(f"{len(instances)} objects. Look at {output}.")


def _evaluate(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .evaluation.reports import report_on, sets_of

    folder = Path(arguments.output)
    _make_folder(folder)
    model, _ = _load_any(arguments, _system_of(arguments))
    with tqdm(total=len(sets_of(model.system)) * arguments.cases, unit="case") as bar:
        report = report_on(
            model,
            arguments.cases,
            arguments.steps,
            arguments.guidance,
            arguments.hard,
            on_case=lambda _: bar.update(),
        )
    (folder / "table.md").write_text(report.table)
    (folder / "figures.json").write_text(report.figures)
    report.sheet.save(folder / "sheet.png")
    print(report.table)


def _download(arguments: argparse.Namespace) -> None:
    from .hub import RELEASES, download, plan_download

    release = RELEASES[arguments.system]
    folder = arguments.into or release.repository.split("/")[1]
    chosen = {"names": arguments.file, "revision": arguments.revision, "release": release}
    try:
        with _transfer_bars() as show:
            plan = plan_download(folder, **chosen, on_progress=show)
        if plan.missing:
            print(f"{release.repository} at commit {plan.revision}:")
            for file in plan.missing:
                print(f"  {file.size / 1e6:10.1f} MB  {file.name}")
            print("These files have licences of their own: see docs/licences.md and the repository's page.")
            if release.terms and not arguments.accept_licence:
                raise ArgumentError(
                    f"{release.terms}. Add --accept-licence if you have read the licence and accept it."
                )
            if not arguments.yes:
                _ask(f"Fetch {plan.bytes_to_fetch / 1e9:.2f} GB into {plan.folder}?")
        with _transfer_bars() as show:
            download(plan, show, accepted=release.terms if arguments.accept_licence else "")
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


def _system_of(arguments: argparse.Namespace) -> str:
    """That of the model file; without one, the system asked for."""
    from .checkpoints import open_model

    if not arguments.model:
        return arguments.system or _SYSTEMS[0]
    files = {"vae": arguments.vae, "depth": arguments.depth}
    return open_model(arguments.model, **files, system=arguments.system).config["system"]


def _check_fits(arguments: argparse.Namespace, system: str) -> None:
    """Refuse what is missing for an edit with this system, and what it does not know."""
    from .modules import TITLES

    for name, called in _NEEDED[system].items():
        if getattr(arguments, name, None) is None:
            raise ArgumentError(f"The model is {TITLES[system]}, which needs {called}. Add it.")
    for name, (called, systems) in _OWN.items():
        if system not in systems and getattr(arguments, name, None) is not None:
            raise ArgumentError(f"The model is {TITLES[system]}, which does not know {called}. Leave it out.")


def _load_any(arguments: argparse.Namespace, system: str):
    """(the model, the class of its settings)."""
    from .editing import EditSettings
    from .systems.magic_fixup import FixupSettings, MagicFixup
    from .systems.mimicbrush import MimicBrush
    from .systems.paint_by_example import ExemplarSettings, PaintByExample
    from .systems.smartbrush import BrushSettings, SmartBrush

    kind, settings = {
        "mimicbrush": (MimicBrush, EditSettings),
        "paint-by-example": (PaintByExample, ExemplarSettings),
        "magic-fixup": (MagicFixup, FixupSettings),
        "smartbrush": (SmartBrush, BrushSettings),
    }[system]
    device, dtype = _device_and_dtype(arguments)
    return kind.load(arguments.model, device=device, dtype=dtype, vae=arguments.vae, depth=arguments.depth), settings


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


def _run_edit(edit: Callable, title: str = "edit"):
    """One edit with a progress bar."""
    from tqdm import tqdm

    with tqdm(leave=False) as bar:

        def show(progress) -> None:
            bar.total = progress.total
            bar.set_description(f"{title}: {progress.stage}", refresh=False)
            bar.update(progress.done - bar.n)

        return edit(on_progress=show)


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


def _comparison(rows: list[dict], titles: list[str]):
    """A labelled sheet of rows {label: uint8 [H,W,3]}."""
    from .sheets import contact_sheet

    return contact_sheet([list(row.values()) for row in rows], list(rows[0]), tile=256, titles=titles)


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
