"""`mimicbrush train`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ..errors import ArgumentError
from .models import SYSTEMS
from .output import checked_output, save_picture

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

_FINETUNE_OPTIONS = _TRAINED_BY.keys() - {"videos", "frames", "stills", "workers"}
"""Arguments that ask for a fine-tuning; the others go with a preview, too."""


def add_train(commands) -> None:
    train = commands.add_parser("train", help="train the small model in stages, fine-tune a model, or train a LoRA")
    train.add_argument("--folder", help="checkpoints and logs")
    train.add_argument("--system", choices=SYSTEMS, help="whose model (default: the run's, else mimicbrush)")
    train.add_argument("--stage", help="one of the small model's stages, e.g. imitation_64; default: all in order")
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


def _train(arguments: argparse.Namespace) -> None:
    arguments.system = arguments.system or _trained_system(arguments)
    _check_trains(arguments)
    if arguments.preview:
        _preview(arguments)
        return
    if not arguments.folder:
        raise ArgumentError("Training needs a place for its checkpoints and logs: add --folder.")
    from ..training.extras import require

    require("accelerate", "Training")
    from ..training.trainer import part_from_others

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
    from ..training.run_notes import finetuned_system

    return (finetuned_system(Path(arguments.folder)) if arguments.folder else None) or SYSTEMS[0]


def _check_trains(arguments: argparse.Namespace) -> None:
    """Refuse by name what the system's training does not know, and what would not be looked at."""
    from ..modules import TITLES

    for name, systems in _TRAINED_BY.items():
        if arguments.system not in systems and getattr(arguments, name):
            raise ArgumentError(
                f"The training of {TITLES[arguments.system]} does not know --{name.replace('_', '-')}. Leave it out, "
                f"or choose another --system: {', '.join(systems)}."
            )
    if arguments.validation and not arguments.validate_every:
        raise ArgumentError(
            f"The held-out pictures of {arguments.validation} would never be judged: add --validate-every STEPS."
        )


def _train_stages(arguments: argparse.Namespace) -> None:
    if arguments.videos or arguments.frames or arguments.stills:
        raise ArgumentError(
            "The stages draw their own pairs. Use --videos, --frames and --stills with --preview, or to fine-tune: "
            "with --lora, --model, --from-sd15 or --random."
        )
    from accelerate import PartialState

    from ..training.recipe import RECIPES, run_stage

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
    from ..training.recipe import export

    print(f"Wrote {path} after {export(folder, path, system)} samples of its last stage.")


def _engine_changes(arguments: argparse.Namespace) -> dict:
    names = ("accumulate", "validate_every", "tensorboard")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _settings_changes(arguments: argparse.Namespace) -> dict:
    """What a fine-tuning's `TrainingSettings` are to have instead of the recipe's."""
    names = ("samples", "minutes", "batch", "lr", "precision")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return changes | _engine_changes(arguments) | ({} if arguments.ema is None else {"ema_decay": arguments.ema})


def _is_finetune(arguments: argparse.Namespace) -> bool:
    """Whether `train` is to fine-tune: by its options, or by what the run folder holds."""
    from ..training.run_notes import finetuned_system

    is_asked = any(getattr(arguments, name) for name in _FINETUNE_OPTIONS)
    return is_asked or finetuned_system(Path(arguments.folder)) == arguments.system


def _finetune(arguments: argparse.Namespace) -> None:
    from ..training.dataset import DataSettings, pairs_from_folders
    from ..training.finetune import FULL, LORA, Recipe, export, finetune
    from ..training.starts import StartingPoint

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
    from ..training.brush_start import BrushStart
    from ..training.segments import Segments, list_segment_folder
    from ..training.smartbrush_finetune import FULL, BrushRecipe, export_brush, finetune_brush

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
    from ..training.coco import list_coco
    from ..training.segments import list_segment_folder

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
    from ..training.dataset import DataSettings, pairs_from_folders
    from ..training.preview import preview_sheet

    output = checked_output(arguments.preview, arguments.overwrite)
    if arguments.system == "smartbrush":
        _preview_segments(arguments, output)
        return
    settings = DataSettings(size=256, seed=arguments.seed)
    pairs = pairs_from_folders(arguments.videos, arguments.frames, arguments.stills, settings)
    save_picture(output, preview_sheet(pairs))
    print(f"{len(pairs.clips)} clips and {len(pairs.stills)} stills. Look at {output}.")


def _preview_segments(arguments: argparse.Namespace, output: Path) -> None:
    from ..training.preview import segments_sheet
    from ..training.segments import Segments

    instances = _instances(arguments)
    save_picture(output, segments_sheet(Segments(instances, arguments.size or 256, arguments.seed)))
    print(f"{len(instances)} objects. Look at {output}.")
