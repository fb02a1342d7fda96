"""What the nodes ask of ComfyUI: its model folders, its memory manager, its progress bar."""

from __future__ import annotations

import os
import time

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import ui
from PIL import Image

from ..mimicbrush_core.editing import Progress
from ..mimicbrush_core.errors import ArgumentError
from ..mimicbrush_core.modules import MAGIC_FIXUP, MIMICBRUSH, PAINT_BY_EXAMPLE, SMARTBRUSH
from ..mimicbrush_core.repaint import Repainter

FOLDERS = {
    MIMICBRUSH: "mimicbrush",
    PAINT_BY_EXAMPLE: "paint_by_example",
    MAGIC_FIXUP: "magic_fixup",
    SMARTBRUSH: "smartbrush",
}
"""System -> the folder inside models/ for its converted files."""

EXTENSION = ".safetensors"

PREVIEW_SIDE = 512
PREVIEW_SHARE = 0.1
"""Previews may take this share of the time, at most."""

# --- files ---------------------------------------------------------------------------------------------------


def register_model_folders() -> None:
    """Make FOLDERS known, beside what extra_model_paths.yaml gives; they list only safetensors files."""
    for name in FOLDERS.values():
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        folders, extensions = folder_paths.folder_names_and_paths[name]
        # A folder that only the yaml or the call above named has no extensions yet, which would list every file.
        folder_paths.folder_names_and_paths[name] = (folders, {*extensions, EXTENSION})


def model_files(system: str) -> list[str]:
    return folder_paths.get_filename_list(FOLDERS[system])


def model_folder(system: str) -> str:
    """Where new model files go."""
    return folder_paths.get_folder_paths(FOLDERS[system])[0]


def model_path(system: str, name: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDERS[system], name)


def release_folder(name: str) -> str:
    """A place for the files as published, beside the model folders so that its parts are not listed as models.

    `name` comes from a workflow and is not trusted: it must be one plain folder name.
    """
    if plain_name(name) in FOLDERS.values():
        raise ArgumentError(f"The folder {name!r} holds converted models. Choose another name for these files.")
    return os.path.join(folder_paths.models_dir, name)


def plain_name(name: str) -> str:
    """The name itself, if it is one plain file or folder name on every system."""
    if name.strip(". ") == "" or name != os.path.basename(name) or "\\" in name or ":" in name:
        raise ArgumentError(f"The name {name!r} must be one plain name, without a path.")
    return name


# --- memory --------------------------------------------------------------------------------------------------


PART_GROUPS = {
    MIMICBRUSH: {
        "pictures": ("vae", "depth_projector"),
        "image": ("image_encoder", "image_projection"),
        "depth": ("depth_network",),
        "unet": ("unet",),
        "reference": ("reference_unet",),
    },
    PAINT_BY_EXAMPLE: {"pictures": ("vae",), "image": ("exemplar_encoder",), "unet": ("unet",)},
    MAGIC_FIXUP: {"pictures": ("vae",), "unets": ("unet", "detail_extractor")},
    SMARTBRUSH: {"pictures": ("vae",), "text": ("text_encoder",), "unet": ("unet",)},
}
"""Which parts go to the device together: modules that are not the manager's own must be on it or off it, whole."""


class LoadedModel:
    """A model whose weights ComfyUI's memory manager moves."""

    def __init__(self, model: Repainter):
        self.model = model
        device = comfy.model_management.get_torch_device()
        self.offload_device = comfy.model_management.unet_offload_device()
        self.patchers = {
            group: WholePatcher(
                ModelParts({name: getattr(model.modules, name) for name in names}), device, self.offload_device
            )
            for group, names in PART_GROUPS[model.system].items()
        }

    def bring(self, *groups: str, size: int | None = None, pictures: int = 1):
        """The model, with these groups on the device together and room for the work on `pictures` of `size`."""
        comfy.model_management.load_models_gpu(
            [self.patchers[group] for group in groups],
            memory_required=working_memory(size or self.model.config["defaults"]["size"], pictures, self.model.dtype),
            force_full_load=True,
        )
        return self.model


class LoadedMimicBrush(LoadedModel):
    """What a MIMICBRUSH_MODEL wire carries.

    native: ComfyUI's own MODEL of the same weights (`native_model`), made when it is first asked for.
    """

    native: comfy.model_patcher.ModelPatcher | None = None


class ModelParts(torch.nn.Module):
    """A plain module around models whose own `device` cannot be set, as the manager needs to."""

    def __init__(self, parts: dict[str, torch.nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.home = home_of(self)


def home_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Where a module's weights are now, by name."""
    return {name: weight.data for name, weight in module.named_parameters()}


class HomingPatcher(comfy.model_patcher.ModelPatcher):
    """Brings weights from the device back to where they came from, `model.home`, instead of into a new copy.

    So two modules of one home can be moved each by its own patcher: what one has on the device, LoRAs included, never
    reaches the other, and off the device both have the same weights in memory, once. What the manager only takes down
    in part (`partially_unload`) is a copy until the rest follows: newer hosts pin it in place right away.
    """

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            super().unpatch_model(None, True)  # what a LoRA changed gives way first, by the manager's own books
            for name, weight in self.model.named_parameters():
                home = self.model.home.get(name)  # none for what another pack put into the model
                if home is not None and home.device == device_to:
                    weight.data = home
        super().unpatch_model(device_to, unpatch_weights)


class WholePatcher(HomingPatcher):
    """Moves a module whole or not at all: only layers that are the manager's own work while they are away."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        super().load(device_to, 0, force_patch_weights, full_load=True)

    def partially_unload(self, *args, **kwargs) -> int:
        return 0  # bytes freed; the manager then unloads all of it


def working_memory(size: int, pictures: int, dtype: torch.dtype) -> int:
    """Bytes beside the weights, generously: the VAE's decoder (one picture), or the U-Net's rows if they need more."""
    item = torch.finfo(dtype).bits // 8
    decoder = 2200 * size * size * item
    rows = 2 * pictures * 5000 * (size // 8) ** 2 * item
    return max(decoder, rows)


def computing_dtype(precision: str) -> torch.dtype:
    """The type of a precision's name; auto: fp16 or bf16 where the device is good at it, else fp32."""
    named = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if precision in named:
        return named[precision]
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32


# --- progress ------------------------------------------------------------------------------------------------


def stop_if_interrupted() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


class EditProgress:
    """Shows an edit's progress and previews on the running node, and ends it when the user cancels."""

    def __init__(self):
        self._bar: ProgressBar | None = None
        self._next_preview = 0.0

    def __call__(self, progress: Progress) -> None:
        stop_if_interrupted()
        if self._bar is None:
            self._bar = ProgressBar(progress.total)
        self._bar.update_absolute(progress.done, progress.total, self._preview(progress))

    def _preview(self, progress: Progress):
        started = time.monotonic()
        if progress.preview is None or started < self._next_preview:
            return None
        picture = Image.fromarray(progress.preview())
        taken = time.monotonic() - started
        self._next_preview = started + taken / PREVIEW_SHARE
        return "JPEG", picture, PREVIEW_SIDE


class TaskProgress:
    """Shows how much of a task is done (bytes, pictures); a new bar for each file or stage. Ends it on cancel."""

    def __init__(self):
        self._bar: ProgressBar | None = None
        self._what: object = None

    def __call__(self, what: object, done: int, total: int) -> None:
        stop_if_interrupted()
        if what != self._what:
            self._bar, self._what = ProgressBar(max(1, total)), what
        self._bar.update_absolute(done, max(1, total))


def shown_text(node: type, text: str) -> ui.PreviewText:
    """A text on the running node, and in the history. node: the class; its schema asks for the hidden `unique_id`.

    Frontends show the texts in a node's `ui` on few nodes of their own, but what is sent as progress on any.
    """
    from server import PromptServer  # only here: it brings the whole web server, which the pack loads without

    PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
    return ui.PreviewText(text)
