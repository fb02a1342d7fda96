"""The recorded schemas of the nodes: what a real ComfyUI's /object_info says, in the fields all its versions share."""

import copy
import json
from pathlib import Path

from mimicbrush_core.modules import TITLES

RECORDED = Path(__file__).parent / "nodes" / "schemas.json"

SHARED_FIELDS = (
    "input",
    "input_order",
    "output",
    "output_name",
    "output_tooltips",
    "display_name",
    "category",
    "description",
    "output_node",
)

LOADERS = {
    "MimicBrushLoad": "mimicbrush",
    "MimicBrushLoadPaintByExample": "paint-by-example",
    "MimicBrushLoadMagicFixup": "magic-fixup",
    "MimicBrushLoadSmartBrush": "smartbrush",
}
"""Node -> the system whose models it loads."""


def embedded(system: str) -> str:
    """What a loader's list calls the small model that comes with the pack."""
    return f"embedded: {TITLES[system]} small"


EMBEDDED = embedded("mimicbrush")


def recorded() -> dict:
    return json.loads(RECORDED.read_text())


def record(object_info: dict) -> None:
    RECORDED.write_text(json.dumps(reduced(object_info), indent=1) + "\n")


def reduced(object_info: dict) -> dict:
    """{node id: shared fields} of the nodes of this pack, without the model files that happen to be on this disk."""
    nodes = {
        node_id: {field: info[field] for field in SHARED_FIELDS}
        for node_id, info in copy.deepcopy(object_info).items()
        if info["category"] == "MimicBrush" or node_id.startswith("MimicBrush")
    }
    for node, system in LOADERS.items():
        settings = nodes[node]["input"]["required"]["model_name"][1]
        settings["options"] = [name for name in settings["options"] if name == embedded(system)]
    return dict(sorted(nodes.items()))
