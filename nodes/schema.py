"""What all nodes share in their schemas: category, own types; fields an older host does not know are left out."""

from dataclasses import fields

from comfy_api.latest import io

from ..mimicbrush_core.errors import ArgumentError

CATEGORY = "MimicBrush"

MODEL = io.Custom("MIMICBRUSH_MODEL")  # host.LoadedMimicBrush
EXEMPLAR_MODEL = io.Custom("PAINT_BY_EXAMPLE_MODEL")  # host.LoadedModel of a PaintByExample
BRUSH_MODEL = io.Custom("SMARTBRUSH_MODEL")  # host.LoadedModel of a SmartBrush
FIXUP_MODEL = io.Custom("MAGIC_FIXUP_MODEL")  # host.LoadedModel of a MagicFixup
REFERENCE = io.Custom("MIMICBRUSH_REFERENCE")  # list of mimicbrush_core.references.ReferenceUse
ACCELERATION = io.Custom("MIMICBRUSH_ACCELERATION")  # mimicbrush_core.acceleration.Acceleration
DEPTH = io.Custom("MIMICBRUSH_DEPTH")  # mimicbrush_core.depth.DepthCondition


def schema(**settings) -> io.Schema:
    """A schema in the pack's category, without the fields this host does not know (`search_aliases` came in 0.11)."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{"category": CATEGORY} | {name: value for name, value in settings.items() if name in known})


def check_choice(name: str, value: object, options) -> None:
    """Refuse what is none of a list's options: ComfyUI 0.3.64 does not, and no version does for what a wire brings."""
    if value not in options:
        raise ArgumentError(f"{name} is {value!r}; it must be one of: {', '.join(options)}.")
