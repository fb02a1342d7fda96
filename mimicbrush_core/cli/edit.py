"""`mimicbrush edit` and `demo`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from .. import __version__
from ..errors import ArgumentError
from .models import REPAINTING, SYSTEMS, add_model_options, load_any, load_mimicbrush, system_of
from .output import checked_output, comparison, make_folder, save_picture

logger = logging.getLogger(__name__)

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
    "reference": ("a reference", REPAINTING),
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


def add_edit(commands) -> None:
    edit = commands.add_parser(
        "edit",
        help="repaint the masked region of a picture like a reference or by words, or make a coarse edit believable",
        description="Repaint the masked region of a picture: like a reference, with MimicBrush or Paint by Example, or "
        "by words, with SmartBrush. Or make a coarse edit of it believable, with Magic Fixup. With which, --system or "
        "the model file says.",
    )
    edit.add_argument("source", help="the picture to edit")
    edit.add_argument("mask", nargs="?", help="white where to repaint; the picture's size")
    edit.add_argument("reference", nargs="?", help="a picture that shows what it should look like; any size")
    edit.add_argument("-o", "--output", required=True, help="the edited picture, a .png that does not exist yet")
    edit.add_argument("--overwrite", action="store_true", help="replace existing output")
    edit.add_argument("--grid", metavar="FILE", help="also write a labelled comparison sheet (.png)")
    edit.add_argument("--system", choices=SYSTEMS, help="without --model: whose embedded model (default: mimicbrush)")
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
    add_model_options(edit)
    _add_edit_options(edit)
    _add_exemplar_options(edit)
    _add_fixup_options(edit)
    _add_brush_options(edit)
    edit.set_defaults(run=_edit)


def add_demo(commands) -> None:
    demo = commands.add_parser("demo", help="edit example pictures with the embedded model; needs no download")
    demo.add_argument("-o", "--output", default="mimicbrush-demo", help="folder for the pictures (%(default)s)")
    add_model_options(demo)
    _add_edit_options(demo)
    demo.set_defaults(run=_demo)


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


def _edit(arguments: argparse.Namespace) -> None:
    from ..images import restore_alpha

    outputs = [checked_output(arguments.output, arguments.overwrite)]
    if arguments.grid:
        outputs.append(checked_output(arguments.grid, arguments.overwrite))
    system = system_of(arguments)
    _check_fits(arguments, system)
    pictures = _read_pictures(arguments)

    model, settings_type = load_any(arguments, system)
    lora = None
    if arguments.lora:
        from ..lora import load_lora

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
    save_picture(outputs[0], restore_alpha(pictures["source"], result.picture, result.alpha), metadata)
    if arguments.grid:
        save_picture(outputs[1], comparison([{**_shown(pictures), "result": result.picture}], ["edit"]), metadata)


def _check_fits(arguments: argparse.Namespace, system: str) -> None:
    """Refuse what is missing for an edit with this system, and what it does not know."""
    from ..modules import TITLES

    for name, called in _NEEDED[system].items():
        if getattr(arguments, name, None) is None:
            raise ArgumentError(f"The model is {TITLES[system]}, which needs {called}. Add it.")
    for name, (called, systems) in _OWN.items():
        if system not in systems and getattr(arguments, name, None) is not None:
            raise ArgumentError(f"The model is {TITLES[system]}, which does not know {called}. Leave it out.")


def _read_pictures(arguments: argparse.Namespace) -> dict:
    """What was given of source, mask, reference and coarse edit, as they were read."""
    from ..images import read_mask, read_picture
    from ..masks import check_mask

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
    from ..coarse_edit import layer_over_checker
    from ..sheets import show_mask

    shown = {"source": pictures["source"].over_white()}
    if "mask" in pictures:
        shown["mask"] = show_mask(shown["source"], pictures["mask"])
    if "reference" in pictures:
        shown["reference"] = pictures["reference"].over_white()
    if "coarse edit" in pictures:
        shown["coarse edit"] = layer_over_checker(pictures["coarse edit"].layer())
    return shown


def _demo(arguments: argparse.Namespace) -> None:
    from ..editing import EditSettings
    from ..examples import EXAMPLES
    from ..sheets import show_mask

    folder = Path(arguments.output)
    make_folder(folder)
    model = load_mimicbrush(arguments)
    rows, titles = [], []
    for example in EXAMPLES:
        source, mask, reference = example.render()
        for name, picture in (("source", source), ("mask", mask), ("reference", reference)):
            save_picture(folder / f"{example.name}-{name}.png", picture)
        settings = _settings(arguments, EditSettings, keep_shape=float(example.keep_shape))
        result = _run_edit(partial(model.edit, source, mask, reference, settings), example.title)
        save_picture(folder / f"{example.name}-result.png", result.picture, {"settings": asdict(result.settings)})
        tinted = show_mask(source, mask)
        rows.append({"source": source, "mask": tinted, "reference": reference, "result": result.picture})
        titles.append(example.title)
    save_picture(folder / "demo.png", comparison(rows, titles))
    print(f"Look at {folder / 'demo.png'}; the pictures beside it can be edited again with `mimicbrush edit`.")
    if model.config.get("limits"):
        print(f"About this model: {model.config['limits']}")


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
