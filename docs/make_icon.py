"""The pack's icon in the ComfyUI registry, drawn from nothing: an M whose left half is the reference, and whose right
half a brush repaints in its likeness. From the repository's root:

    python docs/make_icon.py        # writes docs/icon.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

FILE = Path(__file__).parent / "icon.png"
SIZE = 400  # px; the registry shows at most 800 x 400
FINE = 4  # drawn this many times larger, then reduced: smooth edges

NIGHT_TOP, NIGHT_BOTTOM = (58, 48, 96), (20, 20, 38)
CORAL, CREAM = (255, 122, 89), (255, 226, 178)
BRISTLES = (240, 92, 66)
UNPAINTED = (104, 98, 142)
FERRULE, HANDLE = (214, 218, 230), (92, 200, 196)

LETTER = [(88, 306), (88, 104), (200, 226), (312, 104), (312, 306)]
WIDTH = 66
RIGHT_LEG = 279  # x of its inner edge
PAINTED_TO = 206  # y on the right leg, where the brush is
STRIPE = 25  # px

BRUSH_TIP = (309, 236)
BRUSH_TOWARDS = (0.42, 0.907)  # the handle's direction, a unit vector
# From tip to handle: colour, and the outline as (distance from the tip, half the width there).
BRUSH = [
    (HANDLE, [(104, 17), (150, 19), (240, 12)]),
    (FERRULE, [(66, 22), (112, 18)]),
    (BRISTLES, [(0, 2), (14, 12), (34, 20), (68, 22)]),
]


def main() -> None:
    letter = stroke(LETTER, WIDTH)
    icon = night()
    icon.paste(UNPAINTED, mask=letter)
    icon.paste(stripes(), mask=ImageChops.multiply(letter, painted()))
    paint_brush(ImageDraw.Draw(icon))
    icon.putalpha(rounded_square())
    icon.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(FILE, optimize=True)


def canvas(mode: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new(mode, (SIZE * FINE, SIZE * FINE))
    return image, ImageDraw.Draw(image)


def fine(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x * FINE, y * FINE) for x, y in points]


def stroke(points: list[tuple[float, float]], width: int) -> Image.Image:
    """A mask of a line with round joints and ends."""
    mask, draw = canvas("L")
    draw.line(fine(points), fill=255, width=width * FINE)
    for x, y in fine(points):
        draw.circle((x, y), width * FINE / 2, fill=255)
    return mask


def night() -> Image.Image:
    down = np.linspace(0, 1, SIZE * FINE)[:, None, None]
    column = (1 - down) * NIGHT_TOP + down * NIGHT_BOTTOM
    return Image.fromarray(np.broadcast_to(column, (SIZE * FINE, SIZE * FINE, 3)).round().astype(np.uint8))


def stripes() -> Image.Image:
    """Diagonal stripes, mirrored at the middle: the right half mimics the left."""
    y, x = np.mgrid[0 : SIZE * FINE, 0 : SIZE * FINE] / FINE
    across = np.abs(x - SIZE / 2) + y
    coral = (across // STRIPE % 2 == 0)[..., None]
    return Image.fromarray(np.where(coral, CORAL, CREAM).astype(np.uint8))


def painted() -> Image.Image:
    """A mask of all but the right leg below the brush; the fresh paint ends in a round."""
    mask, draw = canvas("L")
    draw.rectangle((0, 0, RIGHT_LEG * FINE, SIZE * FINE), fill=255)
    draw.rectangle((0, 0, SIZE * FINE, PAINTED_TO * FINE), fill=255)
    draw.circle((LETTER[-1][0] * FINE, PAINTED_TO * FINE), WIDTH * FINE / 2, fill=255)
    return mask


def paint_brush(draw: ImageDraw.ImageDraw) -> None:
    (x, y), (dx, dy) = BRUSH_TIP, BRUSH_TOWARDS
    for colour, outline in BRUSH:
        sides = [*outline, *((along, -half) for along, half in reversed(outline))]
        corners = [(x + along * dx - half * dy, y + along * dy + half * dx) for along, half in sides]
        draw.polygon(fine(corners), fill=colour)


def rounded_square() -> Image.Image:
    mask, draw = canvas("L")
    draw.rounded_rectangle((0, 0, SIZE * FINE - 1, SIZE * FINE - 1), 84 * FINE, fill=255)
    return mask


if __name__ == "__main__":
    main()
