"""The picture of docs/systems.md: what each system is given and what its embedded model makes of it. From the
repository's root, with this package installed (`pip install -e .`, or PYTHONPATH=.):

    python docs/make_systems.py        # writes docs/systems.jpg

Run it again when an embedded model changes. MimicBrush and Paint by Example get the same case; seed 0 and each model's
own settings throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mimicbrush_core.coarse_edit import layer_over_checker
from mimicbrush_core.evaluation.exemplars import object_crop
from mimicbrush_core.evaluation.fixups import collage
from mimicbrush_core.examples import EXAMPLE_SIZE, EXAMPLES, TO_MOVE, TO_NAME
from mimicbrush_core.masks import grown, precise_mask
from mimicbrush_core.sheets import BACKGROUND, INK, contact_sheet, show_mask
from mimicbrush_core.systems.magic_fixup import MagicFixup
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.systems.paint_by_example import ExemplarSettings, PaintByExample
from mimicbrush_core.systems.smartbrush import BrushSettings, SmartBrush
from mimicbrush_core.training.scenes import CLIP_LIKE, HELD_OUT_SEED, render_move, render_pair
from mimicbrush_core.training.shapes import draw_shape

PATH = Path(__file__).parent / "systems.jpg"
TILE = 256
COLUMNS = ("you have", "you give", "you get")
PRECISION = 3

Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def mimicbrush() -> Row:
    source, mask, reference = object_example().render()
    return show_mask(source, mask), reference, MimicBrush.load().edit(source, mask, reference).picture


def paint_by_example() -> Row:
    example = object_example()
    source, mask, _ = example.render()
    pair = render_pair(HELD_OUT_SEED + example.seed, EXAMPLE_SIZE, CLIP_LIKE)
    exemplar = object_crop(pair.reference, pair.reference_parts > 0)
    settings = ExemplarSettings(paste_back=True)
    return show_mask(source, mask), exemplar, PaintByExample.load().edit(source, mask, exemplar, settings).picture


def magic_fixup() -> Row:
    scene = render_move(HELD_OUT_SEED + TO_MOVE.seed, EXAMPLE_SIZE)
    coarse = collage(scene, rough=2)
    fixed = MagicFixup.load().edit(scene.original, coarse).picture
    return scene.original, layer_over_checker(coarse), fixed


def smartbrush() -> Row:
    scene = draw_shape(HELD_OUT_SEED + TO_NAME.seed, EXAMPLE_SIZE)
    mask = precise_mask(grown(scene.mask, 1).astype(np.float32), PRECISION)
    text = scene.look.caption
    painted = SmartBrush.load().edit(scene.background, mask, text, BrushSettings(precision=PRECISION))
    return show_mask(scene.background, mask), written(text), painted.picture


ROWS: dict[str, Callable[[], Row]] = {
    "MimicBrush: a picture that shows it somewhere, for a part or a whole": mimicbrush,
    "Paint by Example: a tight picture of a thing of its kind": paint_by_example,
    "Magic Fixup: your own rough layout": magic_fixup,
    f"SmartBrush: words, and how literally the mask is meant (here {PRECISION} of 4)": smartbrush,
}


def object_example():
    return next(example for example in EXAMPLES if example.name == "object")


def written(text: str) -> np.ndarray:
    """The words as a picture."""
    picture = Image.new("RGB", (TILE, TILE), BACKGROUND)
    font = ImageFont.load_default(size=22)
    ImageDraw.Draw(picture).text((TILE / 2, TILE / 2), f'"{text}"', fill=INK, font=font, anchor="mm")
    return np.asarray(picture)


def main() -> None:
    rows = [make() for make in ROWS.values()]
    contact_sheet(rows, COLUMNS, TILE, list(ROWS)).save(PATH, quality=80, optimize=True)


if __name__ == "__main__":
    main()
