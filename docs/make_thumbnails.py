"""The thumbnails of the templates, composed of what a run of each of them showed. From the repository's root, with
this package installed (`pip install -e .`, or PYTHONPATH=.):

    python docs/make_thumbnails.py RESULTS        # writes workflows/*.jpg

Run each of tests/api_prompts/*.json in ComfyUI before, and keep the pictures of its preview nodes as
RESULTS/TEMPLATE/NODE_*.png: NODE is the preview's id, a batch goes by the order of the names. Two templates are not
made here: look_inside_an_edit (make_effects.py draws it), and fix_another_generator, a screenshot, as it needs a
checkpoint of another model. Run it again when the embedded model changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from make_effects import TEMPLATES, THUMBNAIL_SIDE, save
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mimicbrush_core.sheets import BACKGROUND

GAP = 4
FONT = ImageFont.load_default(size=17)
LABEL_HEIGHT = 26
LABEL_INSET = 8
LABEL_BACK = (0, 0, 0, 170)
OUTLINE = 4

# The preview node of each tile.
FOUR_TILES = {
    "first_edit": {"source": 3, "mask": 6, "reference": 4, "result": 10},
    "texture_transfer_with_depth": {"source": 3, "reference": 4, "depth": 10, "result": 12},
    "several_references": {"source": 3, "first reference": 4, "second reference": 6, "result": 14},
    "ksampler_bridge": {"source": 3, "reference": 4, "KSampler": 17, "result": 16},
    "paint_by_example": {"source": 3, "mask": 6, "exemplar": 8, "result": 11},
    "mimicbrush_and_paint_by_example": {"source": 3, "exemplar": 11, "MimicBrush": 15, "Paint by Example": 16},
    "magic_fixup": {"original": 3, "mask": 5, "coarse edit": 6, "result": 9},
    "smartbrush": {"background": 3, "mask": 5, "taken literally": 10, "taken loosely": 12},
    "mask_tools": {"coarser mask": 9, "edited": 13, "what changed": 16, "result": 18},
}
FILM = {"frames": 3, "masks": 6, "edited": 10}
FILM_FRAMES = (0, 3, 7)  # of eight
SEEDS = 11
ZOOM = (12, 14, 15)  # result, window, raw answer

Tile = tuple[Image.Image, str]


def shown(folder: Path, node: int, index: int = 0) -> Image.Image:
    """What preview NODE of a run showed; INDEX counts a batch. A missing picture is a FileNotFoundError."""
    files = sorted(folder.glob(f"{node}_*.png"))
    if index >= len(files):
        raise FileNotFoundError(f"{folder} has {len(files)} pictures of node {node}; number {index + 1} is needed.")
    return Image.open(files[index]).convert("RGB")


def tile(content: Tile, size: tuple[int, int]) -> Image.Image:
    """A picture cut to SIZE (width, height) about its centre, with its label in the lower left corner."""
    picture, label = content
    picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    if label:
        draw = ImageDraw.Draw(picture, "RGBA")
        bottom = size[1] - LABEL_INSET
        box = (LABEL_INSET, bottom - LABEL_HEIGHT, 3 * LABEL_INSET + draw.textlength(label, FONT), bottom)
        draw.rounded_rectangle(box, LABEL_INSET, fill=LABEL_BACK)
        draw.text((2 * LABEL_INSET, bottom - LABEL_HEIGHT / 2), label, fill="white", font=FONT, anchor="lm")
    return picture


def thumbnail(rows: list[list[Tile]]) -> Image.Image:
    """A square of tiles: all rows are of one height, the tiles of a row share its width."""
    picture = Image.new("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE), BACKGROUND)
    height = shared(len(rows))
    for y, row in enumerate(rows):
        width = shared(len(row))
        for x, content in enumerate(row):
            picture.paste(tile(content, (width, height)), (x * (width + GAP), y * (height + GAP)))
    return picture


def shared(parts: int) -> int:
    """The length of each of PARTS beside each other, px."""
    return (THUMBNAIL_SIDE - GAP * (parts - 1)) // parts


def four_tiles(folder: Path, nodes: dict[str, int]) -> list[list[Tile]]:
    tiles = [(shown(folder, node), label) for label, node in nodes.items()]
    return [tiles[:2], tiles[2:]]


def film(folder: Path) -> list[list[Tile]]:
    return [
        [(shown(folder, node, frame), label if frame == FILM_FRAMES[0] else "") for frame in FILM_FRAMES]
        for label, node in FILM.items()
    ]


def seeds(folder: Path) -> list[list[Tile]]:
    tiles = [(shown(folder, SEEDS, seed), f"seed {seed}") for seed in range(4)]
    return [tiles[:2], tiles[2:]]


def zoomed(folder: Path) -> list[list[Tile]]:
    """The upper part of the large result with its window's outline; below it the window and what the model painted."""
    result, window, raw = (shown(folder, node) for node in ZOOM)
    left, top = place_of(window, result)
    corner = left + window.width - 1, top + window.height - 1
    ImageDraw.Draw(result).rectangle((left, top, *corner), outline="white", width=OUTLINE)
    upper = result.crop((0, 0, result.width, result.width * shared(2) // THUMBNAIL_SIDE))
    return [[(upper, "result and its window")], [(window, "window"), (raw, "raw answer")]]


def place_of(part: Image.Image, whole: Image.Image) -> tuple[int, int]:
    """Where PART was cut out of WHOLE: (left, top), px. ValueError if it is not found exactly once."""
    sought, pixels = np.asarray(part), np.asarray(whole)
    views = np.lib.stride_tricks.sliding_window_view(pixels, sought.shape)[:, :, 0]
    some = (slice(None, None, 16),) * 2  # enough to tell places apart
    same = [(x, y) for y, x in np.ndindex(views.shape[:2]) if (views[y, x][some] == sought[some]).all()]
    if len(same) != 1:
        raise ValueError(f"The part was found {len(same)} times in the picture.")
    return same[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Composes the templates' thumbnails.")
    parser.add_argument("results", type=Path, help="a folder for each template, with its runs' pictures NODE_*.png")
    results = parser.parse_args().results
    rows = {name: four_tiles(results / name, nodes) for name, nodes in FOUR_TILES.items()}
    for name, make in {"video_frames": film, "variations_over_seeds": seeds, "small_region_with_zoom": zoomed}.items():
        rows[name] = make(results / name)
    for name, tiles in rows.items():
        save(name, thumbnail(tiles), TEMPLATES)


if __name__ == "__main__":
    main()
