"""What all nodes share in their schemas: category, own types; fields an older host does not know are left out."""

from dataclasses import fields

from comfy_api.latest import io

CATEGORY = "MimicBrush"

MODEL = io.Custom("MIMICBRUSH_MODEL")  # host.LoadedMimicBrush
REFERENCE = io.Custom("MIMICBRUSH_REFERENCE")  # list of mimicbrush_core.references.ReferenceUse
DEPTH = io.Custom("MIMICBRUSH_DEPTH")  # mimicbrush_core.depth.DepthCondition


def schema(**settings) -> io.Schema:
    """A schema in the pack's category, without the fields this host does not know (`search_aliases` came in 0.11)."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{"category": CATEGORY} | {name: value for name, value in settings.items() if name in known})
