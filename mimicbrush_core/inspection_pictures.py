"""What `inspection` found, drawn: a heat map over the picture, and points joined with where they look.

Small pictures are drawn enlarged, so that numbers and lines can be read; lines and letters grow with large ones.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import masks
from .inspection import Inspection, Look, Point, in_frame
from .sheets import BACKGROUND, INK

LEAST_SIDE = 512
"""The longer side of a drawn picture has at least this many pixels."""

PANEL_SIDE = 768
"""The longer side of each picture beside another has at most this many pixels."""

HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)
"""From little to much, evenly spaced: dark to light, so that it can be read without colours, too."""

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
HEAT_OPACITY = 0.6
TINT = 0.7
SMOOTHING = 3  # lines are drawn this much larger and reduced
LEAST_RANGE = 0.1
"""The legend spans at least this much, so that chance differences do not look like large ones."""


# --- reliance ------------------------------------------------------------------------------------------------


def draw_reliance(picture: np.ndarray, reliance: np.ndarray, mask: np.ndarray, window: masks.CropWindow) -> np.ndarray:
    """A heat map over a picture, uint8 [h,w,3], with the mask's outline and a legend below it.

    picture uint8 [H,W,3]; reliance float [H,W] in 0..1, known in `window`; mask float [H,W], 1 = repaint. The colours
    span what occurs in the window.
    """
    known = reliance[window.slices]
    low, high = _range(float(known.min()), float(known.max()))
    shown = picture.astype(np.float32)
    grey = shown[window.slices] @ LUMINANCE
    heat = heat_colors((known - low) / (high - low))
    shown[window.slices] = (1 - HEAT_OPACITY) * grey[..., None] + HEAT_OPACITY * heat
    canvas = _outlined(_fitted(np.rint(shown).astype(np.uint8), most=None), mask)
    return np.asarray(_with_legend(canvas, low, high))


def heat_colors(values: np.ndarray) -> np.ndarray:
    """0..1 [...] as colours of `HEAT`, float32 [...,3] in 0..255."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, stops, HEAT[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)


def _range(low: float, high: float) -> tuple[float, float]:
    """The span of the legend within 0..1: low..high, or wider about its middle."""
    lack = max(0.0, LEAST_RANGE - (high - low)) / 2
    low = min(max(0.0, low - lack), 1 - LEAST_RANGE)
    return low, max(high + lack, low + LEAST_RANGE)


def _with_legend(picture: Image.Image, low: float, high: float) -> Image.Image:
    unit = _unit(picture)
    font, gap = _font(20 * unit), round(10 * unit)
    height = round(42 * unit)
    sheet = Image.new("RGB", (picture.width, picture.height + height), BACKGROUND)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    middle = picture.height + height / 2
    texts = [f"{100 * value:.0f} %" for value in (low, high)]
    left = gap + draw.textlength(texts[0], font=font) + gap
    right = picture.width - gap - draw.textlength(texts[1], font=font) - gap
    draw.text((gap, middle), texts[0], fill=INK, font=font, anchor="lm")
    draw.text((picture.width - gap, middle), texts[1], fill=INK, font=font, anchor="rm")
    ramp = heat_colors(np.linspace(0, 1, max(2, round(right - left)))[None]).repeat(max(1, height - 2 * gap), axis=0)
    sheet.paste(Image.fromarray(np.rint(ramp).astype(np.uint8)), (round(left), picture.height + gap))
    return sheet


# --- looks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """A picture on the sheet.

    corner: its upper left on the sheet; origin: the pixel of its frame that is there; scale: sheet pixels per pixel.
    """

    image: Image.Image
    corner: Point
    origin: Point
    scale: float

    def place(self, point: Point) -> Point:
        """Where a point of the frame is on the sheet."""
        return (
            self.corner[0] + (point[0] - self.origin[0]) * self.scale,
            self.corner[1] + (point[1] - self.origin[1]) * self.scale,
        )


def draw_looks(inspection: Inspection, picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Points of a picture joined with where they look, uint8 [h,w,3]: the edit's window, and each reference looked at.

    picture uint8 [H,W,3]: the source or the edit; mask float [H,W], 1 = repaint. Each point has its number and its
    colour; the places in the reference that it sees most of are tinted with it.
    """
    window, looks = inspection.edit.window, inspection.looks
    colors = point_colors(len(looks))
    part = _fitted(picture[window.slices])
    unit = _unit(part)
    gap = round(12 * unit)
    source = _Panel(_outlined(part, mask[window.slices]), (gap, gap), (window.x, window.y), part.width / window.width)
    panels, x = {}, gap + part.width + 4 * gap
    for reference in dict.fromkeys(look.reference for look in looks):
        image = _fitted(reference.picture)
        for look, color in zip(looks, colors, strict=True):
            if look.reference is reference:
                image = _tinted(image, look, color)
        panels[reference] = _Panel(image, (x, gap), (0, 0), image.width / reference.picture.shape[1])
        x += image.width + gap
    everything = (source, *panels.values())
    sheet = Image.new("RGB", (x, max(panel.image.height for panel in everything) + 2 * gap), BACKGROUND)
    for panel in everything:
        sheet.paste(panel.image, panel.corner)
    ends = [(source.place(look.point), panels[look.reference].place(look.peak)) for look in looks]
    return np.asarray(_joined(sheet, ends, colors, unit))


def point_colors(count: int) -> list[tuple[int, int, int]]:
    """As many colours that can be told apart: hues around the circle, every other one lighter."""
    tints = [colorsys.hls_to_rgb(index / max(1, count), 0.6 + 0.18 * (index % 2), 1.0) for index in range(count)]
    return [tuple(round(255 * channel) for channel in tint) for tint in tints]


def _tinted(image: Image.Image, look: Look, color: tuple[int, int, int]) -> Image.Image:
    """The picture of a reference, tinted where the point sees at least half as much of it as anywhere."""
    heat = in_frame(look.heat, image.height, image.width).numpy()
    cover = TINT * np.clip(2 * heat - 1, 0, 1)[..., None]
    return Image.fromarray(np.rint(np.asarray(image) * (1 - cover) + np.float32(color) * cover).astype(np.uint8))


def _joined(
    sheet: Image.Image, ends: list[tuple[Point, Point]], colors: list[tuple[int, int, int]], unit: float
) -> Image.Image:
    """Lines between the two ends of each point, and its number at both."""
    fine = SMOOTHING
    layer = Image.new("RGBA", (sheet.width * fine, sheet.height * fine))
    draw, font, radius = ImageDraw.Draw(layer), _font(13 * unit * fine), 9 * unit * fine
    scaled = [[(x * fine, y * fine) for x, y in pair] for pair in ends]
    for width, dark in ((4, True), (2, False)):  # a dark edge, so that a line is seen on every ground
        for pair, color in zip(scaled, colors, strict=True):
            draw.line(pair, fill=BACKGROUND if dark else color, width=round(width * unit * fine))
    for number, (pair, color) in enumerate(zip(scaled, colors, strict=True), 1):
        for x, y in pair:
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=color, outline=BACKGROUND, width=round(1.5 * unit * fine))
            draw.text((x, y), str(number), fill=_ink_on(color), font=font, anchor="mm")
    marks = layer.resize(sheet.size, Image.Resampling.BOX)
    return Image.alpha_composite(sheet.convert("RGBA"), marks).convert("RGB")


def _ink_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Dark on light colours, light on dark ones."""
    return BACKGROUND if np.dot(color, LUMINANCE) > 110 else INK


# --- both ----------------------------------------------------------------------------------------------------


def _fitted(picture: np.ndarray, most: int | None = PANEL_SIDE) -> Image.Image:
    """A picture with its longer side in LEAST_SIDE..most, in its own proportions."""
    image = Image.fromarray(picture)
    longer = max(image.size)
    wanted = max(longer, LEAST_SIDE) if most is None else min(max(longer, LEAST_SIDE), most)
    if wanted == longer:
        return image
    size = [max(1, round(length * wanted / longer)) for length in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def _outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with a line around a mask float [H,W] of its frame."""
    hole = Image.fromarray(masks.binarize(mask)).resize(image.size, Image.Resampling.NEAREST)
    inside = np.asarray(hole, np.float32)
    width = max(1, round(1.5 * _unit(image)))
    white, dark = masks.grown(inside, width) > 0, masks.grown(inside, 2 * width) > 0
    pixels = np.array(image)
    pixels[dark & ~white], pixels[white & (inside == 0)] = BACKGROUND, INK
    return Image.fromarray(pixels)


def _unit(image: Image.Image) -> float:
    """What lines and letters are measured in: a pixel of a picture of LEAST_SIDE."""
    return max(image.size) / LEAST_SIDE


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=round(size))
