"""The nodes. This package is the only one that knows ComfyUI; the work is done in `mimicbrush_core`."""

from comfy_api.latest import ComfyExtension, io

from .acceleration import AccelerationNode
from .coarse_edit import CoarseEditNode
from .depth import DepthConditionNode
from .examples import ExamplePictures
from .files import ConvertMimicBrush, DownloadMimicBrush
from .host import register_model_folders
from .inspection import Correspondence, ReferenceReliance
from .load import LoadMimicBrush
from .magic_fixup import LoadMagicFixup, MagicFixupNode
from .mask_tools import BackgroundBlend, ChangeMask, MaskPrecision
from .native import ImitativeModel
from .paint_by_example import LoadPaintByExample, PaintByExampleNode
from .reference import CombineReferences, EncodeReference
from .sampler import ImitativeSampler
from .smartbrush import LoadSmartBrush, SmartBrushNode

NODES: list[type[io.ComfyNode]] = [
    LoadMimicBrush,
    EncodeReference,
    CombineReferences,
    DepthConditionNode,
    ImitativeSampler,
    AccelerationNode,
    ImitativeModel,
    ReferenceReliance,
    Correspondence,
    LoadPaintByExample,
    PaintByExampleNode,
    LoadMagicFixup,
    MagicFixupNode,
    LoadSmartBrush,
    SmartBrushNode,
    MaskPrecision,
    ChangeMask,
    BackgroundBlend,
    CoarseEditNode,
    ExamplePictures,
    DownloadMimicBrush,
    ConvertMimicBrush,
]

register_model_folders()


class MimicBrushExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> MimicBrushExtension:
    return MimicBrushExtension()
