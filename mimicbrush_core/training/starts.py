"""Where a training begins: from nothing, from Stable Diffusion 1.5 and its inpainting model, or from a MimicBrush."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints import (
    ENCODER_FILES,
    UNET_FILES,
    check_depth_config,
    depth_state,
    embedded_model_path,
    filled_part,
    load_modules,
    open_model,
    vae_config,
    vae_state,
    weight_file,
)
from ..errors import ArgumentError, ModelFileError
from ..keys import image_encoder_keys
from ..modules import Modules, build_modules, build_part, bundled_config
from ..recognition import CLIP_VISION, recognise
from ..weight_files import is_folder, read_tensors

INPAINTING_CHANNELS = 9
"""Of Stable Diffusion's inpainting U-Net: latents 4, mask 1, latents of the masked picture 4, in MimicBrush's order."""


_PATHS = ("model", "sd15", "inpainting", "image_encoder", "vae", "depth")


@dataclass(frozen=True)
class StartingPoint:
    """What to begin with; paths of files or folders.

    model: a MimicBrush as `checkpoints.load_modules` takes it, with vae and depth where they are not beside it; none
    of all: the embedded model.
    sd15 and inpainting: U-Nets in diffusers layout, a pipeline folder, its `unet` folder or the file; then
    image_encoder (CLIP ViT-H/14 vision, as IP-Adapter's), vae (default: the pipeline's own) and depth are needed, too.
    random: "sd15" or "small", random weights of that size.
    config: for files of other sizes than SD-1.5's.
    """

    model: str | None = None
    sd15: str | None = None
    inpainting: str | None = None
    image_encoder: str | None = None
    vae: str | None = None
    depth: str | None = None
    random: str | None = None
    config: dict | None = None

    def note(self) -> dict:
        """As JSON, to begin from the same again, from whatever folder."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: str(Path(v).absolute()) if key in _PATHS else v for key, v in given.items()}

    def size(self) -> int:
        """The side in pixels that the model is made for. Raises ModelFileError."""
        if self.config is None and self.random is None and self.sd15 is None and self.inpainting is None:
            return open_model(self.model or embedded_model_path(), vae=self.vae, depth=self.depth).config["defaults"][
                "size"
            ]
        config = self.config or bundled_config("mimicbrush_small" if self.random == "small" else "mimicbrush_sd15")
        return config["defaults"]["size"]

    def load(self, seed: int = 0) -> tuple[Modules, dict]:
        """The modules on the CPU in float32, frozen, and their configuration. seed: of what no file gives.

        Raises ArgumentError: these do not go together; ModelFileError: a file does not fit.
        """
        given = [self.model is not None, self.sd15 is not None or self.inpainting is not None, self.random is not None]
        if sum(given) > 1:
            raise ArgumentError("Begin from one of: a model, SD-1.5 with its inpainting model, or random weights.")
        if self.random is not None:
            return _random_modules(self.random, self.config, seed)
        if given[1]:
            return self._from_stable_diffusion(seed)
        path = self.model or embedded_model_path()
        return load_modules(path, vae=self.vae, depth=self.depth, config=self.config)

    def _from_stable_diffusion(self, seed: int) -> tuple[Modules, dict]:
        config = self.config or bundled_config("mimicbrush_sd15")
        vae = self.vae or _beside(self.inpainting, "vae") or _beside(self.sd15, "vae")
        needed = {
            "sd15": self.sd15,
            "inpainting": self.inpainting,
            "image_encoder": self.image_encoder,
            "vae": vae,
            "depth": self.depth,
        }
        missing = [name for name, path in needed.items() if path is None]
        if missing:
            raise ArgumentError(
                f"Beginning from Stable Diffusion needs {', '.join(needed)}; not given: {', '.join(missing)}."
            )
        config = {**config, "name": "MimicBrush from Stable Diffusion 1.5", "vae": vae_config(vae, config["vae"])}
        check_depth_config(self.depth)
        depth_file, vae_file = weight_file(self.depth, ENCODER_FILES), weight_file(vae, UNET_FILES)
        layers = config["image_encoder"]["num_hidden_layers"]
        torch.manual_seed(seed)
        parts = {
            "unet": _filled("unet", config, unet_file(self.inpainting), _imitative_state),
            "reference_unet": _filled("reference_unet", config, unet_file(self.sd15), _reference_state),
            "image_encoder": _filled(
                "image_encoder",
                config,
                weight_file(self.image_encoder, ENCODER_FILES),
                lambda path, like: image_encoder_keys(_encoder_state(path), layers, like),
            ),
            "vae": _filled("vae", config, vae_file, lambda path, like: vae_state(path, config["vae"])),
            "depth_network": _filled("depth_network", config, depth_file, depth_state),
            # Nothing has these: they begin at random.
            "image_projection": build_part("image_projection", config).requires_grad_(False),
            "depth_projector": build_part("depth_projector", config).requires_grad_(False),
        }
        return Modules(**parts), config


def _random_modules(name: str, config: dict | None, seed: int) -> tuple[Modules, dict]:
    sizes = ("sd15", "small")
    if config is None and name not in sizes:
        raise ArgumentError(f"Unknown size {name!r} of random weights. Choose one of: {', '.join(sizes)}.")
    config = config or bundled_config(f"mimicbrush_{name}")
    torch.manual_seed(seed)
    modules = build_modules(config)
    for _, module in modules.items():
        module.requires_grad_(False)
    return modules, {**config, "name": "MimicBrush from nothing"}


def _beside(path: str | None, name: str) -> Path | None:
    """The folder `name` of a pipeline folder, if this is one that has it."""
    if path is None or not is_folder(path):
        return None
    folder = Path(path) / name
    return folder if folder.is_dir() else None


def unet_file(path: str | Path) -> Path:
    """The weight file of a U-Net: itself, or out of its folder or its pipeline's. Raises ModelFileError."""
    return weight_file(_beside(str(path), "unet") or path, UNET_FILES)


def _filled(part: str, config: dict, path: Path, state_of) -> nn.Module:
    """One network with the weights of a file. state_of(path, like) -> its tensors under the names of `like`."""
    return filled_part(part, config, path, lambda like: state_of(path, like), torch.float32)


def unet_state(path: Path, channels: int, name: str) -> dict[str, Tensor]:
    """The tensors of a U-Net in diffusers layout; ModelFileError unless it has that many input channels."""
    state = read_tensors(path)
    weight = state.get("conv_in.weight")
    if not isinstance(weight, Tensor):
        raise ModelFileError(
            f"{path} is {recognise(state).title}; a U-Net in diffusers layout was expected (`conv_in.weight`). Give "
            "the `unet` folder of a diffusers model."
        )
    if weight.shape[1] != channels:
        raise ModelFileError(
            f"{path} is a U-Net with {weight.shape[1]} input channels; the {name} has {channels}. Are the two "
            "exchanged?"
        )
    return state


def _imitative_state(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inpainting U-Net with zero weights for the channels it does not have (depth), so that it begins as it was."""
    state = unet_state(path, INPAINTING_CHANNELS, "inpainting model")
    return {**state, "conv_in.weight": widened(state["conv_in.weight"], like["conv_in.weight"].shape[1])}


def widened(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight [out,in,k,k] -> [out,channels,k,k], with zeros for the new channels at the end."""
    wide = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    wide[:, : weight.shape[1]] = weight
    return wide


def _reference_state(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stable Diffusion's U-Net without what follows its last bank."""
    state = unet_state(path, 4, "U-Net of Stable Diffusion 1.5")
    return {name: value for name, value in state.items() if name in like}


def _encoder_state(path: Path) -> dict[str, Tensor]:
    state = read_tensors(path)
    kind = recognise(state)
    if kind is not CLIP_VISION:
        raise ModelFileError(f"{path} is {kind.title}; a CLIP vision encoder (ViT-H/14) was expected.")
    return state
