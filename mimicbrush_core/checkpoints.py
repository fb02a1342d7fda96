"""Files -> modules. Safetensors, or pickles with `weights_only=True`; nothing else is ever loaded.

These layouts are read:

* of every system one `.safetensors` file that holds every part and, in its header, the configuration;
* of MimicBrush the original release: `mimicbrush.bin` plus a VAE and Depth Anything in files of their own. Nothing
  else of it is needed: the base U-Nets are overwritten by `mimicbrush.bin`;
* of Paint by Example the published diffusers folder, and the original checkpoint;
* of Magic Fixup the original checkpoint.

Nobody has published a SmartBrush: its single files come from this project's training.

The configurations of published models are bundled here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from . import keys
from .errors import ArgumentError, ModelFileError
from .modules import (
    MAGIC_FIXUP,
    MIMICBRUSH,
    MODULES,
    PAINT_BY_EXAMPLE,
    PUBLISHED_CONFIG,
    SMARTBRUSH,
    TITLES,
    Parts,
    build_part,
    bundled_config,
    parts_of,
    restore_buffers,
    small_name,
)
from .recognition import (
    DEPTH,
    EXEMPLAR_CHECKPOINT,
    EXEMPLAR_ENCODER,
    FIXUP_CHECKPOINT,
    SD_INPAINT_UNET,
    UNKNOWN,
    VAE,
    Kind,
    recognise,
    unwrapped,
)
from .text import make_tokenizer
from .weight_files import (
    AGAIN,
    SAFETENSORS,
    ZIP_PICKLE,
    SafetensorsFile,
    SafetensorsWriter,
    check_integrity,
    file_format,
    file_size,
    is_finite,
    is_folder,
    pickle_mentions,
    read_tensors,
)

METADATA_KEY = "mimicbrush"

ORIGINAL_PART_NAMES = {
    "unet": "unet",
    "reference_unet": "referencenet",
    "image_encoder": "image_encoder",
    "image_projection": "image_proj",
    "depth_projector": "depth_guider",
}
"""Our part names -> the keys of `mimicbrush.bin`."""

ORIGINAL_FILES = {
    "checkpoint": ("mimicbrush/mimicbrush.bin", "mimicbrush.bin"),
    "vae": ("sd-vae-ft-mse", "vae"),
    "depth": ("depth_model/depth_anything_vitb14.pth", "depth_anything_vitb14.pth", "depth_model"),
}
"""Where the release keeps its parts, relative to the folder; the first that exists is taken."""

VAE_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
UNET_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
ENCODER_FILES = ("model.safetensors", "pytorch_model.bin")
DEPTH_FILES = ("model.safetensors",)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

CONFIG_VERSION = 1
CONFIG_SECTIONS = {
    MIMICBRUSH: ("unet", "image_encoder", "depth_projector", "depth_network", "vae", "scheduler", "defaults"),
    PAINT_BY_EXAMPLE: ("unet", "exemplar_encoder", "vae", "scheduler", "defaults"),
    MAGIC_FIXUP: ("unet", "vae", "scheduler", "defaults"),
    SMARTBRUSH: ("unet", "text_encoder", "tokenizer", "vae", "scheduler", "defaults"),
}

EXEMPLAR_FOLDERS = {
    "unet": ("unet", UNET_FILES),
    "exemplar_encoder": ("image_encoder", ENCODER_FILES),
    "vae": ("vae", VAE_FILES),
}
"""Part of Paint by Example -> its folder in the diffusers layout, and the weight file in there."""

PICKLED_CHECKPOINTS = {
    keys.LDM_EXTRACTOR_PREFIX: FIXUP_CHECKPOINT,  # which has such a mapper, too
    "cond_stage_model.mapper.": EXEMPLAR_CHECKPOINT,
}
"""What keys of a checkpoint begin with -> what it is, the first that fits."""

EXEMPLAR_SOURCE = (
    "The original checkpoint of Paint by Example keeps the state of its training, which needs code. Take "
    "model.safetensors or the diffusers folder from Fantasy-Studio/Paint-by-Example on Hugging Face (refs/pr/3): the "
    "same weights without it."
)


def embedded_model_path(system: str = MIMICBRUSH) -> Path:
    """The small model of a system that is shipped inside the package."""
    return Path(str(files(__package__).joinpath("assets", f"{small_name(system)}.safetensors")))


def load_modules(
    path: str | os.PathLike,
    *,
    vae: str | os.PathLike | None = None,
    depth: str | os.PathLike | None = None,
    config: dict | None = None,
    dtype: torch.dtype = torch.float32,
    system: str = MIMICBRUSH,
) -> tuple[Parts, dict]:
    """Load a model on the CPU; returns its modules (the depth network always float32) and configuration.

    path: a single-file model; `mimicbrush.bin`, or the folder of the original release; the diffusers folder or the
        original checkpoint of Paint by Example; the original checkpoint of Magic Fixup (or the folder it is alone in).
    vae, depth: files or folders to use instead of the release's own: a diffusers VAE folder or a single-file
        SD-1.5 VAE; an official Depth Anything file or a transformers folder.
    config: for original files of other sizes than SD-1.5's.
    system: what it has to be, a key of `modules.MODULES`.

    Raises ModelFileError naming the file, the key, what was found and what was expected.
    """
    source = open_model(path, vae=vae, depth=depth, config=config, system=system)
    source.check_integrity()
    modules = {part: _filled(part, source, dtype) for part in parts_of(source.config)}
    return MODULES[system](**modules), source.config


def save_modules(
    path: str | os.PathLike,
    modules: Parts,
    config: dict,
    dtype: torch.dtype,
    depth_dtype: torch.dtype | None = None,
) -> None:
    """Write one file that loads without any other, as `SafetensorsWriter` does: whole, or not at all.

    depth_dtype: of the depth network; default: as the rest.
    """
    dtypes = {part: dtype for part, _ in modules.items()} | {"depth_network": depth_dtype or dtype}
    # Larger elements first, as the format's readers want them aligned.
    parts = sorted(modules.items(), key=lambda item: -dtypes[item[0]].itemsize)
    tensors = {f"{part}.{name}": value for part, module in parts for name, value in module.state_dict().items()}
    layout = {name: (dtypes[name.split(".", 1)[0]], tuple(value.shape)) for name, value in tensors.items()}
    with SafetensorsWriter(path, layout, header_metadata(config)) as writer:
        for name, value in tensors.items():
            writer.write(name, value.detach().to("cpu", layout[name][0]))
        writer.finish()


def header_metadata(config: dict) -> dict[str, str]:
    """The header entries of a single-file model."""
    return {METADATA_KEY: json.dumps(config), "format": "pt"}


def open_model(
    path: str | os.PathLike, *, vae=None, depth=None, config: dict | None = None, system: str | None = None
) -> Source:
    """The files of a model, found and recognised; no weights are read yet. Arguments as for `load_modules`.

    system: None takes any.
    """
    path = _checkpoint_inside(Path(path))
    file = SafetensorsFile(path) if not is_folder(path) and file_format(path) == SAFETENSORS else None
    if file is not None and METADATA_KEY in file.metadata:
        source = SingleFile(file)
    elif is_exemplar(path):
        source = ExemplarFiles(path, vae, config)
    elif is_fixup(path):
        source = FixupFiles(path, vae, config)
    elif file is not None:
        source = SingleFile(file)  # which says what else it is
    elif system in (None, MIMICBRUSH):
        source = OriginalFiles(path, vae, depth, config)
    else:
        raise ModelFileError(
            f"{path} is no {TITLES[system]}: {_EXPECTED[system]} or a converted file was expected. `mimicbrush "
            "verify` tells what this is."
        )
    if depth is not None and isinstance(source, CheckpointFiles):
        found = TITLES[source.config["system"]]
        raise ArgumentError(f"{path} is {found}, which knows no depth. Leave the depth network out.")
    if system not in (None, source.config["system"]):
        found = TITLES[source.config["system"]]
        raise ModelFileError(f"{path} is {found}; {TITLES[system]} was expected. Choose another file.")
    return source


_EXPECTED = {
    PAINT_BY_EXAMPLE: "its diffusers folder (with unet, vae and image_encoder), its original checkpoint",
    MAGIC_FIXUP: "its original checkpoint",
    SMARTBRUSH: "a file of its training (nobody has published weights)",
}


def config_for(system: str, given: dict | None) -> dict:
    """The configuration `given` for files of this system, or the published model's."""
    return given if given and given["system"] == system else bundled_config(PUBLISHED_CONFIG[system])


# --- single file -------------------------------------------------------------------------------------------


class SingleFile:
    """A converted model. files: {role: weight file}."""

    def __init__(self, file: SafetensorsFile):
        self._file = file
        self.config = _config_of(file)
        self.files = {"model": file.path}

    def file_of(self, part: str) -> Path:
        return self.files["model"]

    def check_integrity(self) -> None:
        """Nothing that would cost more than loading: `verify` compares the checksum of the whole file."""

    def close(self) -> None:
        """Nothing is kept open between parts."""

    def state(self, part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one part under the names of `like`, memory-mapped."""
        tensors = self._file.tensors(part + ".")
        state = {name.removeprefix(part + "."): value for name, value in tensors.items()}
        # A file may have been written beside another version of transformers than reads it.
        return keys.other_transformers_keys(part, state, like)


def _config_of(file: SafetensorsFile) -> dict:
    if METADATA_KEY not in file.metadata:
        kind = recognise(file.tensors())
        raise ModelFileError(
            f"{file.path} is a safetensors file without a {METADATA_KEY!r} entry in its header, so it is not a "
            f"model of this program: {_named(kind)} Give a converted file, or the folder of the original release."
        )
    config = _checked_config(file.metadata[METADATA_KEY], file.path)
    parts = parts_of(config)
    stray = [name for name in file.names if name.split(".", 1)[0] not in parts]
    if stray:
        raise ModelFileError(
            f"{file.path}: unexpected key {stray[0]!r} ({len(stray)} in all); keys begin with one of "
            f"{', '.join(parts)}. Convert or download the file again."
        )
    return config


def _checked_config(text: str, path: Path) -> dict:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path}: its {METADATA_KEY!r} header entry is not valid JSON ({error}). It is damaged. {AGAIN}"
        ) from error
    if not isinstance(config, dict):
        raise ModelFileError(
            f"{path}: its {METADATA_KEY!r} header entry is a {type(config).__name__}, expected an object. It "
            "is damaged."
        )
    if config.get("system") not in list(MODULES):  # which may be of any type in JSON, and not hashable
        raise ModelFileError(
            f"{path} holds the system {config.get('system')!r}; {' or '.join(map(repr, MODULES))} was expected. "
            "Update this program, or convert the original files again."
        )
    if config.get("version", 1) != CONFIG_VERSION:
        raise ModelFileError(
            f"{path} is written in version {config['version']!r} of the format; expected {CONFIG_VERSION}. "
            "Update this program, or convert the original files again."
        )
    sections = CONFIG_SECTIONS[config["system"]]
    for section in sections:
        if not isinstance(config.get(section), dict):
            raise ModelFileError(
                f"{path}: the configuration in its header has no {section!r}; expected are "
                f"{', '.join(sections)}. Convert or download the file again."
            )
    if "tokenizer" in sections:
        _check_tokenizer(config, path)
    return config


def _check_tokenizer(config: dict, path: Path) -> None:
    try:
        make_tokenizer(config)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


# --- the original release ----------------------------------------------------------------------------------


class PublishedFiles:
    """Files as published. files: {role: weight file}; config: the VAE folder's own merged in."""

    files: dict[str, Path]
    config: dict

    def check_integrity(self) -> None:
        """Compare the checksums inside the zip pickles: damaged weights load silently otherwise."""
        for path in self.files.values():
            if file_format(path) == ZIP_PICKLE:
                check_integrity(path)


class OriginalFiles(PublishedFiles):
    """MimicBrush's original release."""

    def __init__(self, path: Path, vae, depth, config: dict | None):
        checkpoint, vae, depth = _find_original(path, vae, depth)
        config = config_for(MIMICBRUSH, config)
        self.files = {
            "checkpoint": checkpoint,
            "vae": weight_file(vae, VAE_FILES),
            "depth": weight_file(depth, DEPTH_FILES),
        }
        self.config = {**config, "vae": vae_config(vae, config["vae"])}
        check_depth_config(depth)
        self._parts: dict | None = None

    def file_of(self, part: str) -> Path:
        return self.files[{"vae": "vae", "depth_network": "depth"}.get(part, "checkpoint")]

    def close(self) -> None:
        """Give what was touched of the mapped checkpoint back to the system; `state` opens it again."""
        if file_format(self.files["checkpoint"]) == ZIP_PICKLE:
            self._parts = None

    def state(self, part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one part under the names of `like`, memory-mapped where the format allows it."""
        path = self.file_of(part)
        if part == "vae":
            return vae_state(path, self.config["vae"])
        if part == "depth_network":
            return depth_state(path, like)
        if self._parts is None:
            self._parts = read_tensors(path)
        return original_state(self._parts, part, self.config, like, path)


def original_state(parts: Mapping, part: str, config: dict, like: Mapping, path: Path) -> dict[str, Tensor]:
    """One part of mimicbrush.bin under the names of `like`. parts: what the file holds."""
    original = ORIGINAL_PART_NAMES[part]
    state = parts.get(original)
    if isinstance(state, Mapping) and part == "image_encoder":
        return keys.image_encoder_keys(state, config["image_encoder"]["num_hidden_layers"], like)
    if isinstance(state, Mapping):
        return dict(state)
    raise ModelFileError(
        f"{path}: no part {original!r}; a MimicBrush checkpoint has "
        f"{', '.join(ORIGINAL_PART_NAMES.values())}, this one has "
        f"{', '.join(map(str, list(parts)[:8])) or 'nothing'}. {_named(recognise(parts))}"
    )


def _named(kind: Kind) -> str:
    return (
        f"it looks like {kind.title}. {kind.hint}" if kind is not UNKNOWN else "its keys are of no system known here."
    )


def _find_original(path: Path, vae, depth) -> tuple[Path, Path, Path]:
    if is_folder(path):
        folder, checkpoint = path, None
    else:
        folder, checkpoint = path.parent.parent if path.parent.name == "mimicbrush" else path.parent, path
    found = {"checkpoint": checkpoint, "vae": vae, "depth": depth}
    for role, candidates in ORIGINAL_FILES.items():
        found[role] = Path(found[role]) if found[role] is not None else first_existing(folder, candidates)
        if found[role] is None:
            raise ModelFileError(
                f"{folder} has no {role}: looked for {' and '.join(candidates)}. A MimicBrush folder holds "
                "mimicbrush/mimicbrush.bin, sd-vae-ft-mse/ and depth_model/depth_anything_vitb14.pth."
            )
        if not os.path.lexists(found[role]):
            raise ModelFileError(f"There is no {role} at {found[role]}. Check the path.")
    return found["checkpoint"], found["vae"], found["depth"]


# --- Paint by Example, Magic Fixup -------------------------------------------------------------------------


def is_exemplar(path: Path) -> bool:
    """Whether this is Paint by Example as published, by what it holds."""
    if is_folder(path):
        index = path / "model_index.json"
        if index.is_file() and read_json(index).get("_class_name") == "PaintByExamplePipeline":
            return True
        whole = all((path / folder).is_dir() for folder, _ in EXEMPLAR_FOLDERS.values())
        return whole and first_existing(path, ORIGINAL_FILES["checkpoint"]) is None
    return _checkpoint_kind(path) is EXEMPLAR_CHECKPOINT


def is_fixup(path: Path) -> bool:
    """Whether this is Magic Fixup as published, by what it holds."""
    return not is_folder(path) and _checkpoint_kind(path) is FIXUP_CHECKPOINT


def _checkpoint_inside(path: Path) -> Path:
    """The original checkpoint that is the only weight file of a folder, as a download leaves it; else the path."""
    if not is_folder(path):
        return path
    inside = [file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES]
    return inside[0] if len(inside) == 1 and _checkpoint_kind(inside[0]) in CHECKPOINT_FILES else path


def _checkpoint_kind(path: Path) -> Kind:
    """What a checkpoint is, without running anything of a pickle and without reading weights."""
    stored = file_format(path)
    if stored == SAFETENSORS:
        return recognise(read_tensors(path))
    mentioned = (kind for text, kind in PICKLED_CHECKPOINTS.items() if pickle_mentions(path, text))
    return next(mentioned, UNKNOWN) if stored == ZIP_PICKLE else UNKNOWN


class CheckpointFiles(PublishedFiles):
    """A published model all of whose parts are in one checkpoint, but for those with files of their own."""

    def _take_vae(self, vae) -> None:
        """A VAE of its own instead of the checkpoint's; None: leave it."""
        if vae is not None:
            self.files["vae"] = weight_file(vae, VAE_FILES)
            self.config = {**self.config, "vae": vae_config(vae, self.config["vae"])}

    def file_of(self, part: str) -> Path:
        return self.files[part if part in self.files else "checkpoint"]

    def close(self) -> None:
        """Nothing is kept open between parts."""


class ExemplarFiles(CheckpointFiles):
    """Paint by Example as published: the diffusers folder, with a file for each part, or the original checkpoint."""

    def __init__(self, path: Path, vae, config: dict | None):
        if is_folder(path):
            missing = [folder for folder, _ in EXEMPLAR_FOLDERS.values() if not os.path.lexists(path / folder)]
            if missing:
                raise ModelFileError(
                    f"{path} is not complete: {', '.join(missing)} not found. Paint by Example needs the folders unet, "
                    "vae and image_encoder. Download what is missing."
                )
            self.files = {part: weight_file(path / name, names) for part, (name, names) in EXEMPLAR_FOLDERS.items()}
            vae = vae or path / "vae"
        else:
            self.files = {"checkpoint": path}
        self.config = config_for(PAINT_BY_EXAMPLE, config)
        self._take_vae(vae)

    def state(self, part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one part under the names of `like`, memory-mapped where the format allows it."""
        path = self.file_of(part)
        return exemplar_state(read_content(path), part, self.config, like, path)


class FixupFiles(CheckpointFiles):
    """Magic Fixup as published: the original checkpoint."""

    def __init__(self, path: Path, vae, config: dict | None):
        self.files = {"checkpoint": path}
        self.config = config_for(MAGIC_FIXUP, config)
        self._take_vae(vae)

    def state(self, part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one part under the names of `like`, memory-mapped where the format allows it."""
        if part in self.files:
            return vae_state(self.files[part], self.config["vae"])
        state, layers = unwrapped(read_tensors(self.files["checkpoint"])), self.config["unet"]["layers_per_block"]
        if part == "unet":
            return keys.synthesizer_keys(state, layers)
        if part == "detail_extractor":
            return keys.detail_extractor_keys(state, layers, like)
        return _vae_keys(state, self.config["vae"])


CHECKPOINT_FILES = {EXEMPLAR_CHECKPOINT: ExemplarFiles, FIXUP_CHECKPOINT: FixupFiles}
"""What an original checkpoint is -> what reads it."""

Source = SingleFile | OriginalFiles | ExemplarFiles | FixupFiles
"""The files of a model in any layout."""


def read_content(path: Path) -> dict:
    """`read_tensors`; where it must refuse Paint by Example's own pickle, it says what to take instead."""
    try:
        return read_tensors(path)
    except ModelFileError as error:
        if file_format(path) == ZIP_PICKLE and _checkpoint_kind(path) is EXEMPLAR_CHECKPOINT:
            raise ModelFileError(f"{error} {EXEMPLAR_SOURCE}") from error
        raise


def exemplar_state(
    content: Mapping, part: str, config: dict, like: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """One part of Paint by Example under the names of `like`. content: what a file of either layout holds."""
    kind, state = recognise(content), unwrapped(content)
    fits = {
        "unet": kind is SD_INPAINT_UNET,
        "exemplar_encoder": kind is EXEMPLAR_ENCODER,
        "vae": kind.use == VAE,
    }
    if kind is not EXEMPLAR_CHECKPOINT and not fits[part]:
        folder = EXEMPLAR_FOLDERS[part][0]
        raise ModelFileError(f"{path} is {kind.title}; the {folder} of Paint by Example was expected. {kind.hint}")
    if part == "unet":
        ldm = keys.is_ldm_unet(state)
        return keys.ldm_unet_keys(state, config["unet"]["layers_per_block"]) if ldm else state
    if part == "vae":
        return _vae_keys(state, config["vae"])
    return keys.exemplar_encoder_keys(state, like)


# --- finding and reading files -----------------------------------------------------------------------------


def first_existing(folder: Path, candidates: tuple[str, ...]) -> Path | None:
    """The first of these names that is there, be it a broken link (whose own error says more)."""
    return next((folder / name for name in candidates if os.path.lexists(folder / name)), None)


def weight_file(path: str | os.PathLike, names: tuple[str, ...]) -> Path:
    """The file itself, or the weight file of a folder: one of `names`, or the only one there is."""
    path = Path(path)
    if not is_folder(path):
        return path
    named = first_existing(path, names)
    inside = [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
    if named is None and len(inside) != 1:
        raise ModelFileError(
            f"{path} has no weight file: looked for {' and '.join(names)}"
            + (f"; it has several others ({', '.join(file.name for file in inside)}). Name one." if inside else ".")
        )
    return named or inside[0]


def read_json(path: Path) -> dict:
    """A configuration beside weights; raises ModelFileError if it is anything but a JSON object."""
    file_size(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not readable JSON ({error}). {AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}; a JSON object was expected. {AGAIN}")
    return content


def vae_config(path: str | os.PathLike, expected: dict) -> dict:
    """The configuration of a VAE file or folder: the folder's own where it has one, else `expected`."""
    file = Path(path) / "config.json"
    if not is_folder(path) or not os.path.lexists(file):
        return expected
    stored = read_json(file)
    kind = stored.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ModelFileError(
            f"{file} describes a {kind}; AutoencoderKL was expected. Give the folder of a Stable Diffusion 1.x VAE."
        )
    own = {key: value for key, value in stored.items() if not key.startswith("_")}
    config = {"class": "AutoencoderKL", "scaling_factor": expected["scaling_factor"], **own}
    if config["scaling_factor"] != expected["scaling_factor"]:
        raise ModelFileError(
            f"{file}: key 'scaling_factor' is {config['scaling_factor']!r}; expected "
            f"{expected['scaling_factor']}. This is the VAE of another system (0.13025: Stable Diffusion "
            "XL). Give a Stable Diffusion 1.x VAE."
        )
    return config


def vae_state(path: Path, config: dict) -> dict[str, Tensor]:
    """A VAE's tensors under diffusers' names, out of any layout it comes in."""
    content = read_tensors(path)
    kind = recognise(content)
    if kind.use != VAE:
        raise ModelFileError(f"{path} is {kind.title}; a Stable Diffusion 1.x VAE was expected. {kind.hint}")
    return _vae_keys(unwrapped(content), config)


def _vae_keys(state: Mapping[str, Tensor], config: dict) -> dict[str, Tensor]:
    if keys.is_ldm_vae(state):
        return keys.ldm_vae_keys(state, levels=len(config["block_out_channels"]))
    return keys.modern_vae_keys(state)


def check_depth_config(path: str | os.PathLike) -> None:
    """Refuse a transformers folder whose weights would fit and give wrong depth: v2, or metric depth."""
    file = Path(path) / "config.json"
    if not is_folder(path) or not os.path.lexists(file):
        return
    stored = read_json(file)
    backbone = stored.get("backbone_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    kind, taken = stored.get("model_type", "depth_anything"), backbone.get("out_indices")
    if kind != "depth_anything":
        raise ModelFileError(
            f"{file} describes a {kind!r} model; 'depth_anything' was expected. Get Depth Anything v1."
        )
    if stored.get("depth_estimation_type", "relative") != "relative":
        raise ModelFileError(
            f"{file} describes metric depth; expected relative depth. Get Depth Anything v1, base size."
        )
    if isinstance(taken, list) and taken and taken != list(range(taken[-1] - 3, taken[-1] + 1)):
        raise ModelFileError(
            f"{file}: key 'out_indices' is {taken}; expected the last four layers. This is Depth Anything "
            "v2, whose weights fit but give another depth. Get Depth Anything v1, base size."
        )


def depth_state(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A depth network's tensors under the names of `like`, out of either layout."""
    content = read_tensors(path)
    kind = recognise(content)
    if kind.use != DEPTH:
        raise ModelFileError(
            f"{path} is {kind.title}; Depth Anything v1 (depth_anything_vitb14.pth) was expected. {kind.hint}"
        )
    state = unwrapped(content)
    official = keys.is_official_depth_anything(state)
    return keys.depth_anything_keys(state, like) if official else keys.transformers_depth_keys(state, like)


# --- filling a module --------------------------------------------------------------------------------------


def _filled(part: str, source: Source, dtype: torch.dtype) -> nn.Module:
    """The module of one part with its weights; each weight is copied once, none is allocated before."""
    if part == "depth_network":
        dtype = torch.float32  # as in the original; its ReLU'd range suffers in half precision
    return filled_part(part, source.config, source.file_of(part), lambda like: source.state(part, like), dtype)


def filled_part(
    part: str, config: dict, path: Path, stored: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], dtype
) -> nn.Module:
    """A frozen part with the weights of `path`; stored(like) -> its tensors under the names of `like`."""
    module = empty_part(part, config, path)
    like = module.state_dict()
    state = _fitting(part, like, stored(like), path)
    # One name at a time, so that no more than one weight exists twice.
    filled = {name: converted(part, name, state.pop(name), dtype, path) for name in list(state)}
    module.load_state_dict(filled, assign=True)
    restore_buffers(module)
    return module.requires_grad_(False)


def empty_part(part: str, config: dict, path: Path) -> nn.Module:
    """One network without memory behind its weights: what its state dict should look like."""
    try:
        with torch.device("meta"):
            return build_part(part, config)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ZeroDivisionError,
        RuntimeError,
    ) as error:
        raise ModelFileError(
            f"{path}: its configuration does not describe part {part!r} ({type(error).__name__}: {error}). {AGAIN}"
        ) from error


def fitting_state(part: str, source: Source, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of one part, exactly those of `like` in name and shape, else ModelFileError."""
    return _fitting(part, like, source.state(part, like), source.file_of(part))


def _fitting(part: str, like: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    check_fit(part, like, state, path)
    return {name: state[name] for name in like}


def converted(part: str, name: str, value: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """A copy of a stored weight in `dtype`; refuses NaN and infinity, stored or arising."""
    result = value.detach().to(dtype, copy=True)
    if is_finite(result):
        return result
    if is_finite(value):
        raise ModelFileError(
            f"{path}: in part {part!r}, key {name!r} has values up to {value.abs().max():.3g}; expected at "
            f"most {torch.finfo(dtype).max:.3g}, the largest number of {str(dtype).removeprefix('torch.')}. "
            "Use bf16 or fp32."
        )
    raise ModelFileError(
        f"{path}: in part {part!r}, key {name!r} holds {int(value.isnan().sum())} NaN and "
        f"{int(value.isinf().sum())} infinite of {value.numel()} values; expected finite numbers. The file "
        f"is damaged. {AGAIN}"
    )


def check_fit(part: str, like: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ModelFileError unless `state` has exactly the names and shapes of `like`, as plain floats."""
    missing, extra = like.keys() - state.keys(), state.keys() - like.keys()
    if missing or extra:
        first = sorted(missing or extra)[0]
        kind = "is missing" if missing else "is not expected"
        raise ModelFileError(
            f"{path}: in part {part!r}, key {first!r} {kind} ({len(missing)} missing, {len(extra)} "
            f"unexpected of {len(like)}). The file is of another model or damaged: `mimicbrush verify` tells "
            "what it is."
        )
    for name, value in like.items():
        if not isinstance(state[name], Tensor):
            raise ModelFileError(
                f"{path}: in part {part!r}, key {name!r} is a {type(state[name]).__name__}; expected a tensor."
            )
        if state[name].shape != value.shape:
            raise ModelFileError(
                f"{path}: in part {part!r}, key {name!r} has shape {list(state[name].shape)}; expected "
                f"{list(value.shape)}. The file is of a model of another size."
            )
        if not state[name].is_floating_point() or state[name].layout != torch.strided:
            raise ModelFileError(
                f"{path}: in part {part!r}, key {name!r} has dtype "
                f"{str(state[name].dtype).removeprefix('torch.')} "
                f"({str(state[name].layout).removeprefix('torch.')}); expected plain floating-point numbers. "
                "Quantised files cannot be used: get the fp16 or fp32 one."
            )
