"""Labelled picture sheets: comparisons that can be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4
LABEL_HEIGHT = 18
BACKGROUND = (24, 24, 24)
INK = (235, 235, 235)
HOLE = (255, 0, 128)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], tile: int = 128, titles: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures uint8 [H,W,3] under column labels; each is fitted into a square of `tile` pixels.

    titles: a line of text above each row, or none.
    """
    title_height = LABEL_HEIGHT if titles else 0
    columns = len(labels)
    width = columns * (tile + GAP) + GAP
    height = LABEL_HEIGHT + len(rows) * (tile + GAP + title_height) + GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for column, label in enumerate(labels):
        draw.text((GAP + column * (tile + GAP), 2), label, fill=INK, font=font)
    y = LABEL_HEIGHT
    for index, row in enumerate(rows):
        if titles:
            draw.text((GAP, y + 2), titles[index], fill=INK, font=font)
            y += title_height
        for column, picture in enumerate(row):
            fitted = _fitted(picture, tile)
            x = GAP + column * (tile + GAP) + (tile - fitted.width) // 2
            sheet.paste(fitted, (x, y + (tile - fitted.height) // 2))
        y += tile + GAP
    return sheet


def show_mask(picture: np.ndarray, mask: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """The picture with its masked region tinted, uint8 [H,W,3]; mask float [H,W], 1 = repaint."""
    cover = strength * mask[..., None].astype(np.float32)
    return (picture * (1 - cover) + np.array(HOLE, np.float32) * cover).astype(np.uint8)


def _fitted(picture: np.ndarray, tile: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = tile / max(image.size)
    if scale == 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.NEAREST if scale > 1 and float(scale).is_integer() else Image.Resampling.LANCZOS
    return image.resize(size, resample)
