"""Objects of data sets in COCO's format (Lin et al., arXiv 1405.0312; https://cocodataset.org/#format-data).

An annotation's region is a list of polygons, or runs of pixels column by column: as numbers, or packed as COCO's own
programs pack them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..errors import ArgumentError
from .frames import Unreadable
from .segments import Instance, is_fit

_FINER = 4  # polygons are drawn that much larger: Pillow also paints every pixel that an edge touches


def list_coco(annotations: Path, pictures: Path, captions: Path | None = None) -> list[Instance]:
    """The single objects (no crowds) of an `instances_*.json` that are neither too small nor too large.

    pictures: the folder of the picture files. captions: JSON of one phrase per annotation, {annotation id: phrase}.
    Nothing is decoded yet. Raises ArgumentError for a file that is missing or not of this format.
    """
    content, phrases = _read_json(annotations), {} if captions is None else _read_phrases(captions)
    try:
        images = {image["id"]: image for image in content["images"]}
        classes = {category["id"]: category["name"] for category in content["categories"]}
        return [
            _instance(annotation, images[annotation["image_id"]], classes, phrases, Path(pictures))
            for annotation in content["annotations"]
            if not annotation.get("iscrowd") and _is_fit(annotation, images[annotation["image_id"]])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{annotations} does not have the format of COCO's instances ({type(error).__name__}: {error}). Expected "
            "are images, categories and annotations with their segmentation, area and bbox."
        ) from error


def decode_region(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """An annotation's region as bool [height,width]: polygons, or runs as a list or packed. Raises Unreadable."""
    if isinstance(segmentation, list):
        return _fill_polygons(segmentation, height, width)
    runs = segmentation.get("counts")
    runs = unpack_runs(runs) if isinstance(runs, (str, bytes)) else runs
    if segmentation.get("size") != [height, width] or not isinstance(runs, list) or sum(runs) != height * width:
        raise Unreadable(f"the runs of its region do not cover {width} x {height} pixels")
    values = np.arange(len(runs)) % 2 == 1  # the first run is outside
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def unpack_runs(packed: str | bytes) -> list[int]:
    """Lengths of runs out of COCO's packed text. Raises Unreadable.

    Each number is spelt in digits of 5 bits, the lowest first, a sixth bit saying that more follow; from the fourth
    on it is the difference to the number two before. (original: pycocotools, `rleFrString`)
    """
    digits = [code - 48 for code in (packed.encode("ascii") if isinstance(packed, str) else packed)]
    runs: list[int] = []
    value = shift = 0
    for digit in digits:
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift or any(run < 0 for run in runs):
        raise Unreadable("the runs of its region are damaged")
    return runs


@dataclass(frozen=True)
class _Region:
    segmentation: list | dict
    height: int
    width: int

    def __call__(self) -> np.ndarray:
        return decode_region(self.segmentation, self.height, self.width)


def _instance(annotation: dict, image: dict, classes: dict, phrases: dict, pictures: Path) -> Instance:
    region = _Region(annotation["segmentation"], image["height"], image["width"])
    caption = phrases.get(str(annotation["id"]))
    return Instance(pictures / image["file_name"], region, classes[annotation["category_id"]], caption)


def _is_fit(annotation: dict, image: dict) -> bool:
    return is_fit(annotation["area"], max(annotation["bbox"][2:]), image["height"], image["width"])


def _fill_polygons(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    if not all(isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0 for one in polygons):
        raise Unreadable("a polygon of its region is not a list of three or more x, y")
    finer = Image.new("L", (width * _FINER, height * _FINER))
    draw = ImageDraw.Draw(finer)
    for polygon in polygons:
        draw.polygon([_FINER * value - 0.5 for value in polygon], fill=1)  # Pillow counts from the pixels' middles
    cells = np.asarray(finer).reshape(height, _FINER, width, _FINER)
    return cells.sum(axis=(1, 3)) * 2 >= _FINER**2


def _read_phrases(path: Path) -> dict[str, str]:
    phrases = _read_json(path)
    if not all(isinstance(phrase, str) for phrase in phrases.values()):
        raise ArgumentError(
            f"{path} does not hold one phrase for each annotation ({{annotation id: phrase}}). COCO's own captions are "
            "of whole pictures, and of no use here."
        )
    return phrases


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read as JSON ({error}). Check the path.") from error
    if not isinstance(content, dict):
        raise ArgumentError(f"{path} holds a {type(content).__name__}; an object ({{...}}) was expected.")
    return content
