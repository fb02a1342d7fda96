"""A stand-in for the few things of ComfyUI that `nodes/` imports. It is NOT ComfyUI and has none of its code.

It was written from how a running host behaves, so that the nodes can be tested where no ComfyUI is installed:

* schemas are recorded in the form of the host's /object_info; tests/host compares the same record with real hosts;
* `Pack.call` runs a node as the host does: a new prompt's values, `validate_inputs` first, then `execute` under
  `torch.inference_mode()`;
* the memory manager is as greedy as a real one may be: whatever was not asked for in the last `load_models_gpu` is
  away, and using it raises `NotOnDevice`, as a graphics card would;
* progress bars and the texts of running nodes keep what they were told, and the interrupt flag raises once and is
  cleared, as in the host.

What it does not do: queue, cache, link checking, list inputs, real devices and partial loading, the web server, saving.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import posixpath
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

ROOT = Path(__file__).parents[2]
"""The folder of the pack."""

# --- schemas ---------------------------------------------------------------------------------------------------

COMMON = {"tooltip", "optional", "display_name", "lazy"}
NUMBERS = COMMON | {"default", "min", "max", "step", "display_mode"}
SETTINGS = {
    "IMAGE": COMMON,
    "MASK": COMMON,
    "INT": NUMBERS | {"control_after_generate"},
    "FLOAT": NUMBERS | {"round"},
    "BOOLEAN": COMMON | {"default", "label_on", "label_off"},
    "STRING": COMMON | {"default", "multiline", "placeholder"},
    "COMBO": COMMON | {"default", "options", "multiselect"},
}
"""The settings an input takes; a type that is not listed is a pack's own and takes the common ones."""

ALWAYS_TOLD = {"COMBO": {"multiselect": False}, "STRING": {"multiline": False}}
"""What /object_info says of an input although the node did not."""

HIDDEN = {"unique_id": "UNIQUE_ID", "prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
"""What the host can tell a node beside its inputs."""

OUTPUT_NODES_HIDDEN = ("prompt", "extra_pnginfo")
NODE_ID = "7"
"""That of whatever node is run."""


class Input:
    """One input of a schema: its id, its type and the settings given for it."""

    def __init__(self, io_type: str, name: str, **settings):
        unknown = settings.keys() - SETTINGS.get(io_type, COMMON)
        if unknown:
            raise TypeError(f"an input of type {io_type} takes no {sorted(unknown)}")
        self.io_type, self.id, self.settings = io_type, name, settings

    @property
    def group(self) -> str:
        return "optional" if self.settings.get("optional") else "required"

    def info(self) -> list:
        told = {key: value for key, value in self.settings.items() if key != "optional"}
        return [self.io_type, ALWAYS_TOLD.get(self.io_type, {}) | told]


@dataclasses.dataclass
class Output:
    """One output of a schema."""

    io_type: str
    id: str
    display_name: str | None = None
    tooltip: str | None = None


class IoType:
    """What `io.Image`, `io.Int` or `io.Custom("X")` is: a maker of inputs and outputs."""

    def __init__(self, io_type: str):
        self.io_type = io_type

    def Input(self, name: str, **settings) -> Input:
        return Input(self.io_type, name, **settings)

    def Output(self, name: str, **settings) -> Output:
        return Output(self.io_type, name, **settings)


@dataclasses.dataclass
class OldSchema:
    """The schema of a host before 0.11, which knows no `search_aliases`."""

    node_id: str
    display_name: str = ""
    category: str = ""
    description: str = ""
    inputs: list[Input] = dataclasses.field(default_factory=list)
    outputs: list[Output] = dataclasses.field(default_factory=list)
    hidden: list[str] = dataclasses.field(default_factory=list)
    is_output_node: bool = False


@dataclasses.dataclass
class NewSchema(OldSchema):
    """The schema of a newer host."""

    search_aliases: list[str] = dataclasses.field(default_factory=list)


class ComfyNode:
    """The base of nodes; only a class to recognise them by."""


class ComfyExtension:
    """The base of what `comfy_entrypoint` gives."""


class NodeOutput:
    """What `execute` returns: the outputs in their order, and what the node shows."""

    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui


@dataclasses.dataclass
class PreviewText:
    """A text shown on the node."""

    text: str


@dataclasses.dataclass
class PreviewImage:
    """Pictures [B,H,W,3] shown on the node."""

    image: torch.Tensor
    cls: type | None = None


def object_info(node: type) -> dict:
    """A node as /object_info tells of it, in the fields this stand-in knows."""
    schema = node.define_schema()
    ids = [one.id for one in (*schema.inputs, *schema.outputs)]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{schema.node_id}: an id is there twice, of inputs and outputs: {ids}")
    inputs: dict[str, dict] = {"required": {}}
    for one in schema.inputs:
        inputs.setdefault(one.group, {})[one.id] = one.info()
    hidden = (*schema.hidden, *(OUTPUT_NODES_HIDDEN if schema.is_output_node else ()))
    if hidden:
        inputs["hidden"] = {name: [HIDDEN[name]] for name in hidden}
    info = {
        "input": inputs,
        "input_order": {group: list(members) for group, members in inputs.items()},
        "output": [one.io_type for one in schema.outputs],
        "output_name": [one.display_name or one.io_type for one in schema.outputs],
        "output_tooltips": [one.tooltip for one in schema.outputs],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "category": schema.category,
        "description": schema.description,
        "output_node": schema.is_output_node,
    }
    return json.loads(json.dumps(info))  # as it comes over the wire


# --- the host ---------------------------------------------------------------------------------------------------


class InterruptProcessingException(Exception):
    """The user pressed cancel."""


class NotOnDevice(Exception):
    """A module was used that was not brought: on a graphics card its weights would be somewhere else."""


class InvalidPrompt(Exception):
    """The host would not have queued this; the message is what the user reads."""


@dataclasses.dataclass
class Bar:
    """A progress bar: the values, totals and previews it was told."""

    updates: list[tuple[int, int, object]] = dataclasses.field(default_factory=list)

    @property
    def values(self) -> list[int]:
        return [value for value, _, _ in self.updates]

    @property
    def previews(self) -> list:
        return [preview for _, _, preview in self.updates if preview is not None]


@dataclasses.dataclass
class Load:
    """What the memory manager was asked for: these models together, room for the work, all of each or some."""

    models: list
    memory: int
    whole: bool


class Host:
    """The stand-in's state, and what tests look at and turn."""

    def __init__(self, models: Path, schema: type = NewSchema):
        self.models = models
        self.schema = schema
        self.reset()

    def reset(self) -> None:
        """Forget what a test left behind."""
        self.interrupted = False
        self.bars: list[Bar] = []
        self.loads: list[Load] = []
        self.texts: list[tuple[str, str]] = []
        self.on_update: Callable[[Bar], None] = lambda bar: None

    def interrupt(self) -> None:
        self.interrupted = True

    def raise_if_interrupted(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise InterruptProcessingException

    # -- the modules a pack imports

    def modules(self) -> dict[str, ModuleType]:
        comfy, comfy_api = _module("comfy", __path__=[]), _module("comfy_api", __path__=[])
        comfy.model_management = self._model_management()
        comfy.model_patcher = self._model_patcher()
        comfy.utils = self._utils()
        comfy_api.latest = self._latest()
        parts = (comfy, comfy.model_management, comfy.model_patcher, comfy.utils, comfy_api, comfy_api.latest)
        return {one.__name__: one for one in (*parts, self._folder_paths(), self._server())}

    def _latest(self) -> ModuleType:
        names = {"Image": "IMAGE", "Mask": "MASK"} | {
            name: name.upper()
            for name in ("Int", "Float", "Boolean", "String", "Combo", "Model", "Conditioning", "Latent", "Vae")
        }
        types = {name: IoType(io_type) for name, io_type in names.items()}
        types |= {"Custom": IoType, "Hidden": SimpleNamespace(**{name: name for name in HIDDEN})}
        io = SimpleNamespace(ComfyNode=ComfyNode, Schema=self.schema, NodeOutput=NodeOutput, **types)
        ui = SimpleNamespace(PreviewText=PreviewText, PreviewImage=PreviewImage)
        return _module("comfy_api.latest", io=io, ui=ui, ComfyExtension=ComfyExtension)

    def _model_management(self) -> ModuleType:
        def load_models_gpu(patchers, memory_required=0, force_full_load=False):
            self.loads.append(Load(list(patchers), memory_required, force_full_load))

        return _module(
            "comfy.model_management",
            InterruptProcessingException=InterruptProcessingException,
            throw_exception_if_processing_interrupted=self.raise_if_interrupted,
            load_models_gpu=load_models_gpu,
            get_torch_device=lambda: torch.device("cpu"),
            unet_offload_device=lambda: torch.device("cpu"),
            should_use_fp16=lambda device=None: False,
            should_use_bf16=lambda device=None: False,
        )

    def _model_patcher(self) -> ModuleType:
        host = self

        class ModelPatcher:
            def __init__(self, model, load_device, offload_device):
                self.model = model
                model.device = offload_device  # as the real one does: not every class allows that
                for module in model.modules():
                    # Without weights there is nothing to bring; older diffusers share one ReLU among all models.
                    if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                        module.register_forward_pre_hook(self._check)

            def _check(self, module, _inputs):
                if not (host.loads and self in host.loads[-1].models):
                    raise NotOnDevice(f"{type(module).__name__} is not on the device")

        return _module("comfy.model_patcher", ModelPatcher=ModelPatcher)

    def _utils(self) -> ModuleType:
        host = self

        class ProgressBar:
            def __init__(self, total, node_id=None):
                self.total, self.bar = total, Bar()
                host.bars.append(self.bar)

            def update_absolute(self, value, total=None, preview=None):
                self.total = self.total if total is None else total
                self.bar.updates.append((min(value, self.total), self.total, preview))
                host.on_update(self.bar)
                host.raise_if_interrupted()

        return _module("comfy.utils", ProgressBar=ProgressBar)

    def _server(self) -> ModuleType:
        def send_progress_text(text, node_id):
            self.texts.append((node_id, text))

        instance = SimpleNamespace(send_progress_text=send_progress_text)
        return _module("server", PromptServer=SimpleNamespace(instance=instance))

    def _folder_paths(self) -> ModuleType:
        known: dict[str, tuple[list[str], set[str]]] = {}

        def add_model_folder_path(name, folder, is_default=False):
            folders, _ = known.setdefault(name, ([], set()))
            if folder not in folders:
                folders.append(folder)

        def get_filename_list(name):
            folders, endings = known[name]
            found = {
                path.relative_to(folder).as_posix()
                for folder in folders
                for path in Path(folder).rglob("*")
                if path.is_file() and (not endings or path.suffix.lower() in endings)
            }
            return sorted(found)

        def get_full_path_or_raise(name, file):
            inside = posixpath.normpath("/" + file).lstrip("/")  # nothing leads out of the folder
            for folder in known[name][0]:
                if os.path.isfile(os.path.join(folder, inside)):
                    return os.path.join(folder, inside)
            raise FileNotFoundError(f"no {file!r} in the folder {name!r}")

        return _module(
            "folder_paths",
            models_dir=str(self.models),
            folder_names_and_paths=known,
            add_model_folder_path=add_model_folder_path,
            get_folder_paths=lambda name: list(known[name][0]),
            get_filename_list=get_filename_list,
            get_full_path_or_raise=get_full_path_or_raise,
        )


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


@contextmanager
def _swapped(modules: dict[str, ModuleType], hides: Callable[[str], bool]) -> Iterator[None]:
    """`modules` in place of all imported ones that `hides` names; afterwards everything is as before."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if hides(name)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if hides(name)]:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def installed(host: Host) -> Iterator[Host]:
    """`import comfy` and the like find the stand-in."""
    modules = host.modules()
    with _swapped(modules, lambda name: name in modules):
        yield host


# --- the pack ---------------------------------------------------------------------------------------------------


class Pack:
    """The pack as a host has imported it."""

    def __init__(self, module: ModuleType):
        self.module = module
        listed = _awaited(_awaited(module.comfy_entrypoint()).get_node_list())
        self.nodes = {node.define_schema().node_id: node for node in listed}

    def core(self, name: str) -> ModuleType:
        """A module of the pack's own `mimicbrush_core`: another one than the `mimicbrush_core` tests import."""
        return importlib.import_module(f"{self.module.__name__}.mimicbrush_core.{name}")

    def part(self, name: str) -> ModuleType:
        """A module of the pack's `nodes`."""
        return importlib.import_module(f"{self.module.__name__}.nodes.{name}")

    def object_info(self) -> dict:
        return {node_id: object_info(node) for node_id, node in self.nodes.items()}

    def call(self, name: str, /, **given) -> SimpleNamespace:
        """Run the node "MimicBrush<name>" with these inputs and else its defaults, as a new node has them.

        Returns its outputs by their ids, and what it shows as `ui`.
        """
        node = self.nodes["MimicBrush" + name]
        schema = node.define_schema()
        values = _as_prompted(schema, given)
        if hasattr(node, "validate_inputs"):
            wanted = inspect.signature(node.validate_inputs).parameters  # only what it asks for by name
            answer = node.validate_inputs(**{key: value for key, value in values.items() if key in wanted})
            if answer is not True:
                raise InvalidPrompt(str(answer))
        with torch.inference_mode():
            output = _running(node, schema).execute(**values)
        assert len(output.args) == len(schema.outputs)
        named = {one.id: value for one, value in zip(schema.outputs, output.args, strict=True)}
        return SimpleNamespace(**named, ui=output.ui)


def _running(node: type, schema: OldSchema) -> type:
    """A node's class as it is run: with what it asked to be told."""
    told = {"unique_id": NODE_ID} if "unique_id" in schema.hidden else {}
    return type(node.__name__, (node,), {"hidden": SimpleNamespace(**told)})


def _awaited(coroutine):
    """The result of a coroutine that waits for nothing. An event loop would open a socket of its own."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        return finished.value
    raise AssertionError("it waits for something")


def _as_prompted(schema: OldSchema, given: dict) -> dict:
    inputs = {one.id: one for one in schema.inputs}
    unknown = given.keys() - inputs.keys()
    assert not unknown, f"{schema.node_id} has no input {sorted(unknown)}"
    values = {}
    for name, one in inputs.items():
        if name in given:
            values[name] = given[name]
        elif one.group == "required":
            options = one.settings.get("options")
            values[name] = one.settings["default"] if "default" in one.settings else options[0]
    return values


@contextmanager
def loaded_pack(folder: Path) -> Iterator[Pack]:
    """The pack in `folder`, imported as the host does it: under its own path as a name, dots replaced."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    with _swapped({name: module}, lambda loaded: loaded == name or loaded.startswith(name + ".")):
        spec.loader.exec_module(module)
        yield Pack(module)
