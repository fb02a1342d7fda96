"""A model of the smallest sizes that keep every layout, as an original release and as one file, to be spoiled."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mimicbrush_core.checkpoints import ORIGINAL_PART_NAMES, header_metadata, save_modules
from mimicbrush_core.modules import MODULES, build_modules, bundled_config, parts_of, random_part

CHECKPOINT = "mimicbrush/mimicbrush.bin"
VAE_FOLDER, VAE = "sd-vae-ft-mse", "sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
DEPTH = "depth_model/model.safetensors"
SINGLE = "model.safetensors"

UNET_KEY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def micro_config():
    return {
        **bundled_config("mimicbrush_sd15"),
        "name": "micro",
        "unet": {
            "sample_size": 8,
            "in_channels": 13,
            "out_channels": 4,
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
            "norm_num_groups": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "image_encoder": {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 4,
            "hidden_act": "gelu",
            "image_size": 28,
            "patch_size": 14,
            "layer_norm_eps": 1e-05,
        },
        "depth_projector": {"out_channels": 4, "block_out_channels": [4, 4]},
        "depth_network": {
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 8,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "neck_hidden_sizes": [4, 4, 8, 8],
            "fusion_hidden_size": 4,
            "head_hidden_size": 4,
        },
        "vae": {
            "class": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": [4, 4],
            "norm_num_groups": 2,
            "sample_size": 8,
            "scaling_factor": 0.18215,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        },
    }


def write_micro(folder: Path) -> dict:
    """Write the release and, beside its parts, the single file; returns the configuration."""
    config = micro_config()
    torch.manual_seed(0)
    modules = build_modules(config)
    for name in (CHECKPOINT, VAE, DEPTH):
        (folder / name).parent.mkdir(parents=True)
    parts = {
        original: {key: value.half() for key, value in getattr(modules, part).state_dict().items()}
        for part, original in ORIGINAL_PART_NAMES.items()
    }
    torch.save(parts, folder / CHECKPOINT)
    save_file(modules.vae.state_dict(), folder / VAE)
    stored = {key: value for key, value in config["vae"].items() if key != "class"}
    (folder / VAE_FOLDER / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **stored}))
    save_file(modules.depth_network.state_dict(), folder / DEPTH)
    save_modules(folder / SINGLE, modules, config, torch.float32)
    return config


def write_random(path: Path, config: dict) -> Path:
    """A model of any system with random weights, as one file; returns its path."""
    draw = torch.Generator().manual_seed(0)
    parts = {name: random_part(name, config, "cpu", torch.float32, draw) for name in parts_of(config)}
    save_modules(path, MODULES[config["system"]](**parts), config, torch.float32)
    return path


class World:
    """One spoilable copy of the micro model. marker: what planted code would create."""

    def __init__(self, folder: Path, config: dict, marker: Path):
        self.folder, self.config, self.marker = folder, config, marker

    def file(self, name: str) -> Path:
        return self.folder / name

    def parts(self) -> dict:
        return torch.load(self.file(CHECKPOINT), weights_only=True)

    def save_parts(self, parts, **how) -> None:
        torch.save(parts, self.file(CHECKPOINT), **how)

    def change_part(self, part: str, change) -> None:
        """change(state dict), in place."""
        parts = self.parts()
        change(parts[part])
        self.save_parts(parts)

    def change_tensors(self, name: str, change, config: dict | None = None) -> None:
        """change({key: tensor}) of a safetensors file; a single file keeps its header, or takes `config`."""
        tensors = load_file(self.file(name))
        change(tensors)
        metadata = header_metadata(config or self.config) if name == SINGLE else None
        save_file(tensors, self.file(name), metadata=metadata)

    def change_config(self, **changes) -> None:
        """Of the single file; None removes an entry."""
        config = {key: value for key, value in {**self.config, **changes}.items() if value is not None}
        self.change_tensors(SINGLE, lambda tensors: None, config)

    def change_header(self, change) -> None:
        """change(header dict) of the single file's safetensors header, the data left as it is."""
        header, data = split_header(self.file(SINGLE).read_bytes())
        change(header)
        text = json.dumps(header).encode()
        self.file(SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)

    def replace(self, name: str, content: bytes) -> None:
        self.file(name).write_bytes(content)

    def snapshot(self) -> dict:
        """{path: content} of everything around, to see that nothing was written."""
        found = {}
        for root, folders, names in os.walk(self.folder.parent):
            for name in (*folders, *names):
                path = os.path.join(root, name)
                found[path] = Path(path).read_bytes() if os.path.isfile(path) else None
        return found


def split_header(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
