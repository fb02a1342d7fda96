"""The help pages' pictures of what each setting does, made with the embedded model. From the repository's root, with
this package installed (`pip install -e .`, or PYTHONPATH=.):

    python docs/make_effects.py        # writes web/docs/images/*.jpg and workflows/look_inside_an_edit.jpg

Run it again when the embedded model changes. Example sets, seed 0, the model's own settings; in each sheet only the
named setting varies.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mimicbrush_core.checkpoints import embedded_model_path
from mimicbrush_core.coarse_edit import CUT, DUPLICATE, FLIP_LEFT_RIGHT, MOVE, CoarseEdit, coarse_edit, over_checker
from mimicbrush_core.editing import EditSettings
from mimicbrush_core.examples import EXAMPLES, TO_NAME
from mimicbrush_core.images import pad_to_square, resize_bilinear, resize_lanczos
from mimicbrush_core.inspection import COARSE, FINE, Inspection, inspect_edit
from mimicbrush_core.inspection_pictures import LEAST_SIDE, draw_looks, draw_reliance
from mimicbrush_core.mask_tools import ChangeSettings, blended, change_mask
from mimicbrush_core.masks import MAX_PRECISION_LEVEL, precise_mask
from mimicbrush_core.references import ReferenceUse
from mimicbrush_core.sheets import BACKGROUND, INK, show_mask
from mimicbrush_core.systems.mimicbrush import MimicBrush
from mimicbrush_core.systems.smartbrush import BrushSettings, SmartBrush

FOLDER = Path(__file__).parents[1] / "web" / "docs" / "images"
TEMPLATES = Path(__file__).parents[1] / "workflows"
MAX_BYTES = 40_000
THUMBNAIL_SIDE = 512

COLUMNS = 2  # the help is a narrow column at the side of the screen
TILE = 256
GAP = 6
LABEL_HEIGHT = 30
FONT = ImageFont.load_default(size=22)

EXAMPLE = {example.name: example for example in EXAMPLES}
WORDS = "an orange plain star"
SLOPPY = 3  # the level of a mask that only hints at its shape
WALL = (44, 56, 80)
DIM = 0.45

Panel = tuple[str, np.ndarray]


# --- sheets --------------------------------------------------------------------------------------------------


def sheet(panels: list[Panel], tile: int) -> Image.Image:
    """Labelled pictures, two in a row; the labels are names and values of inputs, which no language changes."""
    rows = -(-len(panels) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * (tile + GAP) + GAP, rows * (tile + LABEL_HEIGHT) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for index, (label, content) in enumerate(panels):
        x, y = GAP + index % COLUMNS * (tile + GAP), index // COLUMNS * (tile + LABEL_HEIGHT)
        draw.text((x + 2, y + LABEL_HEIGHT / 2), label, fill=INK, font=FONT, anchor="lm")
        picture.paste(Image.fromarray(resize_bilinear(content, tile, tile)), (x, y + LABEL_HEIGHT))
    return picture


def write(name: str, panels: list[Panel], tile: int = TILE) -> None:
    save(name, sheet(panels, tile))


def save(name: str, picture: Image.Image, folder: Path = FOLDER) -> None:
    """FOLDER/NAME.jpg, in the best quality that is small enough."""
    for quality in (88, 80, 72, 64, 56, 48):
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=quality, optimize=True)
        if data.tell() <= MAX_BYTES:
            break
    else:
        raise SystemExit(f"{name}.jpg has {data.tell()} bytes at quality {quality}; {MAX_BYTES} are allowed.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jpg").write_bytes(data.getvalue())


def series(name: str, values: list[float], result: Callable[[float], np.ndarray]) -> list[Panel]:
    return [(f"{name} {value:g}", result(value)) for value in values]


def given(source: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> list[Panel]:
    return [("source, mask", show_mask(source, mask)), ("reference", reference)]


# --- the settings --------------------------------------------------------------------------------------------


def of_reference(model: MimicBrush) -> dict[str, list[Panel]]:
    source, mask, reference = EXAMPLE["object"].render()
    encoded = model.encode_reference(reference)

    def weighted(weight: float) -> np.ndarray:
        return model.edit(source, mask, ReferenceUse(encoded, weight)).picture

    def offered(part: np.ndarray) -> list[Panel]:
        result = model.edit(source, mask, model.encode_reference(reference, mask=part)).picture
        return [("picture, mask", show_mask(reference, part)), ("image", result)]

    left = np.zeros(reference.shape[:2], np.float32)
    left[:, : left.shape[1] // 2] = 1
    return {
        "weight": given(source, mask, reference) + series("weight", [0, 0.5, 1, 2], weighted),
        "reference_mask": [("picture", reference), ("image", weighted(1)), *offered(left), *offered(1 - left)],
        "combined": combined(model),
    }


def combined(model: MimicBrush) -> list[Panel]:
    source, mask, first = EXAMPLE["other"].render()
    second = EXAMPLE["part"].render()[2]
    one, two = (model.encode_reference(picture) for picture in (first, second))

    def result(*weights: float) -> np.ndarray:
        return model.edit(source, mask, [ReferenceUse(one, weights[0]), ReferenceUse(two, weights[1])]).picture

    return [
        ("reference_1", first),
        ("reference_2", second),
        ("weights 1, 0", result(1, 0)),
        ("weights 0, 1", result(0, 1)),
        ("weights 1, 1", result(1, 1)),
        ("weights 1, 0.5", result(1, 0.5)),
    ]


def of_sampler(model: MimicBrush) -> dict[str, list[Panel]]:
    source, mask, reference = EXAMPLE["object"].render()
    encoded = model.encode_reference(reference)
    settings = EditSettings()

    def edited(**changes) -> np.ndarray:
        return model.edit(source, mask, encoded, replace(settings, **changes)).picture

    row = int(mask[:, mask.any(axis=0).argmax()].argmax())  # of the mask's leftmost pixel
    corner = slice(max(0, row - 64), max(0, row - 64) + 128), slice(0, 128)

    def feathered(pixels: int) -> list[Panel]:
        result = model.edit(source, mask, encoded, replace(settings, feather=pixels))
        alpha = result.alpha[corner][..., None].repeat(3, axis=-1)
        return [(f"feather {pixels}", result.picture[corner]), ("blend mask", alpha)]

    top = given(source, mask, reference)
    return {
        "guidance": top + series("guidance", [1, 2, 4, 8], lambda value: edited(guidance=float(value))),
        "feather": [panel for pixels in (0, 10, 40) for panel in feathered(pixels)],
        "color_match": color_match(model),
        "zoom": zoomed(model),
    }


def color_match(model: MimicBrush) -> list[Panel]:
    """A source in dim light, which the model does not know: its answer comes out too bright."""
    source, mask, reference = EXAMPLE["texture"].render()
    source = (source * DIM).astype(np.uint8)
    encoded = model.encode_reference(reference)

    def matched(amount: float) -> np.ndarray:
        return model.edit(source, mask, encoded, EditSettings(color_match=amount, feather=0)).picture

    return [("source, mask", show_mask(source, mask)), *series("color_match", [0, 0.5, 1], matched)]


def zoomed(model: MimicBrush) -> list[Panel]:
    """A small region of a large picture; the results are shown cut to the window that zoom works on."""
    small, small_mask, reference = EXAMPLE["other"].render(192)
    source = np.broadcast_to(np.array(WALL, np.uint8), (768, 768, 3)).copy()
    mask = np.zeros(source.shape[:2], np.float32)
    place = slice(480, 480 + len(small)), slice(500, 500 + len(small))
    source[place], mask[place] = small, small_mask
    encoded = model.encode_reference(reference)
    off, on = (model.edit(source, mask, encoded, EditSettings(zoom=zoom)) for zoom in (False, True))
    part = on.window.slices
    panels = [("source, mask", show_mask(source, mask)), ("reference", reference)]
    return [*panels, ("zoom off (cut)", off.picture[part]), ("zoom on (cut)", on.picture[part])]


def of_depth(model: MimicBrush) -> dict[str, list[Panel]]:
    source, mask, reference = EXAMPLE["texture"].render()
    encoded = model.encode_reference(reference)

    def kept(strength: float) -> np.ndarray:
        depth = model.depth_condition([source], strength=strength)
        return model.edit(source, mask, encoded, depth=depth).picture

    seen = model.depth_condition([source]).as_pictures()[0].cpu().numpy()
    panels = [*given(source, mask, reference), *series("strength", [0, 0.5, 1], kept), ("depth picture", grey(seen))]
    return {"depth_strength": panels}


# --- looking inside ------------------------------------------------------------------------------------------


def of_inspection(model: MimicBrush) -> dict[str, list[Panel]]:
    source, mask, reference = EXAMPLE["part"].render()

    def heat(blocks: str) -> np.ndarray:
        drawn = drawn_reliance("part", inspected(model, "part", blocks=blocks))
        return resize_lanczos(pad_to_square(drawn, BACKGROUND[0]), TILE)

    return {
        "reliance": given(source, mask, reference) + [(f"blocks {blocks}", heat(blocks)) for blocks in (COARSE, FINE)]
    }


def correspondence(model: MimicBrush) -> Image.Image:
    """Two edits with where their points look, one below the other."""
    drawn = [drawn_looks(name, inspected(model, name, points=6)) for name in ("object", "texture")]
    return widened(np.concatenate(drawn), COLUMNS * (TILE + GAP) + GAP)


def inspection_thumbnail(model: MimicBrush) -> Image.Image:
    """The template's: the edit and its reliance above, the correspondence below."""
    inspection = inspected(model, "object", points=6, blocks=FINE)
    half = THUMBNAIL_SIDE // 2
    above = [eight_bits(inspection.edit.pictures), drawn_reliance("object", inspection)[:LEAST_SIDE]]
    thumbnail = Image.new("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE), BACKGROUND)
    for index, picture in enumerate(above):
        thumbnail.paste(Image.fromarray(resize_lanczos(picture, half)), (index * half, 0))
    thumbnail.paste(widened(drawn_looks("object", inspection), THUMBNAIL_SIDE), (0, half))
    return thumbnail


def drawn_reliance(name: str, inspection: Inspection) -> np.ndarray:
    picture, mask = eight_bits(inspection.edit.pictures), EXAMPLE[name].render()[1]
    return draw_reliance(picture, inspection.reliance.numpy(), mask, inspection.edit.window)


def drawn_looks(name: str, inspection: Inspection) -> np.ndarray:
    return draw_looks(inspection, eight_bits(inspection.edit.pictures), EXAMPLE[name].render()[1])


def widened(picture: np.ndarray, width: int) -> Image.Image:
    """In another width, in its own proportions."""
    height = round(picture.shape[0] * width / picture.shape[1])
    return Image.fromarray(resize_lanczos(picture, (height, width)))


def inspected(model: MimicBrush, name: str, **place) -> Inspection:
    source, mask, reference = EXAMPLE[name].render()
    use = ReferenceUse(model.encode_reference(reference))
    return inspect_edit(model, batch(source), torch.from_numpy(mask)[None], [use], **place)


# --- the mask tools ------------------------------------------------------------------------------------------


def of_masks(model: MimicBrush) -> dict[str, list[Panel]]:
    """A box around the object is repainted; the change mask finds what of it differs, and only that is kept."""
    source, mask, reference = EXAMPLE["object"].render()
    encoded = model.encode_reference(reference)

    def edited(level: int) -> np.ndarray:
        return model.edit(source, precise_mask(mask, level), encoded, EditSettings(feather=2)).picture

    def at_level(level: int) -> list[Panel]:
        return [(f"level {level}", show_mask(source, precise_mask(mask, level))), ("image", edited(level))]

    after = edited(MAX_PRECISION_LEVEL)
    clear = ChangeSettings(threshold=16, clean_up=8)

    def change(**settings) -> np.ndarray:
        return grey(change_mask(source, after, replace(clear, **settings)))

    changed = change_mask(source, after, clear)
    image = blended(batch(source), batch(after), torch.from_numpy(changed)[None], feather=2)[0]
    pair = [("before", source), ("after", after)]
    return {
        "level": [panel for level in (0, 2, MAX_PRECISION_LEVEL) for panel in at_level(level)],
        "threshold": pair + series("threshold", [4, 10, 16, 22], lambda value: change(threshold=value)),
        "clean_up": series("clean_up", [0, 4, 8, 16], lambda value: change(clean_up=int(value))),
        "softness": series("softness", [0, 6], lambda value: change(softness=value)),
        "blend": [("background", source), ("edited", after), ("mask", grey(changed)), ("image", eight_bits(image))],
    }


def of_coarse_edit() -> dict[str, list[Panel]]:
    source, mask, _ = EXAMPLE["object"].render()

    def edited(**settings) -> np.ndarray:
        result = coarse_edit(batch(source), torch.from_numpy(mask)[None], CoarseEdit(**settings))
        return eight_bits(over_checker(result.pictures))

    place = {"x": 40, "y": -30, "scale": 0.7}
    modes = [(f"mode {mode}", edited(mode=mode, **place)) for mode in (MOVE, DUPLICATE, CUT)]
    turned = [
        ("x 60, y 20", edited(x=60, y=20)),
        ("scale 0.6", edited(scale=0.6)),
        ("rotation 30", edited(rotation=30)),
        (f"flip {FLIP_LEFT_RIGHT}", edited(flip=FLIP_LEFT_RIGHT)),
    ]
    return {
        "mode": [("source, mask", show_mask(source, mask)), *modes],
        "transform": turned,
    }


def of_smartbrush() -> dict[str, list[Panel]]:
    """A sloppy mask, of which the model is told more or less; and a box, with and without what it leaves over."""
    model = SmartBrush.load()
    source, outline, _ = TO_NAME.render()
    sloppy, box = (precise_mask(outline, level) for level in (SLOPPY, MAX_PRECISION_LEVEL))

    def meant(level: float) -> np.ndarray:
        return model.edit(source, sloppy, WORDS, BrushSettings(precision=int(level))).picture

    off, on = (
        model.edit(source, box, WORDS, BrushSettings(precision=MAX_PRECISION_LEVEL, preserve_background=kept))
        for kept in (False, True)
    )
    levels = series("mask_precision", list(range(MAX_PRECISION_LEVEL + 1)), meant)
    return {
        "smartbrush_precision": [("source, mask", show_mask(source, sloppy)), *levels],
        "smartbrush_background": [
            ("off", off.picture),
            ("on", on.picture),
            ("predicted mask", grey(on.predicted)),
            ("repainted mask", grey(on.region)),
        ],
    }


def batch(picture: np.ndarray) -> torch.Tensor:
    """uint8 [H,W,3] as the nodes hand it over: float [1,H,W,3]."""
    return torch.from_numpy(picture).float()[None] / 255


def eight_bits(pictures: torch.Tensor) -> np.ndarray:
    """The first of float [B,H,W,3], uint8 [H,W,3]."""
    return np.rint(pictures[0].numpy() * 255).astype(np.uint8)


def grey(mask: np.ndarray) -> np.ndarray:
    """A mask float [H,W] to look at: uint8 [H,W,3]."""
    return np.rint(mask * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)


def examples() -> list[Panel]:
    panels = []
    for number, example in enumerate(EXAMPLES, 1):
        (_, shown), (_, reference) = given(*example.render())
        panels += [(f"{number}: source, mask", shown), (f"{number}: reference", reference)]
    return panels


def main() -> None:
    model = MimicBrush.load(embedded_model_path())
    with_model = (of_reference, of_sampler, of_depth, of_inspection, of_masks)
    for name, panels in [entry for sheets in with_model for entry in sheets(model).items()]:
        write(name, panels)
    save("correspondence", correspondence(model))
    save("look_inside_an_edit", inspection_thumbnail(model), TEMPLATES)
    for name, panels in [entry for sheets in (of_coarse_edit, of_smartbrush) for entry in sheets().items()]:
        write(name, panels)
    write("examples", examples(), tile=160)


if __name__ == "__main__":
    main()
