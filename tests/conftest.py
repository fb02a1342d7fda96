"""What the tests share: the goldens as an original release on disk, and models loaded from it."""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from model_files import World, write_micro
from PIL import Image
from safetensors.torch import load_file

from mimicbrush_core.modules import bundled_config, drop_tail
from mimicbrush_core.systems.mimicbrush import MimicBrush

GOLDEN = Path(__file__).parent / "golden" / "mimicbrush"
ORIGINAL_CONFIG = json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The goldens were recorded with one thread; more would only add rounding noise."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """golden("step") -> the recorded tensors of one file."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_picture():
    """golden_picture("landscape_source") -> the recorded picture, uint8."""

    def read(name):
        with Image.open(GOLDEN / "images" / f"{name}.png") as image:
            return np.array(image)

    return read


@pytest.fixture(scope="session")
def golden_meta():
    return json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture(scope="session")
def original_parts():
    """{part of mimicbrush.bin: state dict}, float16 as recorded, with the int64 `position_ids`."""
    return split_parts(load_file(GOLDEN / "weights" / "mimicbrush_flat.safetensors"))


@pytest.fixture(scope="session")
def original_folder(tmp_path_factory, original_parts):
    """The folder of the original release. Read only: a test that spoils files copies it first."""
    folder = tmp_path_factory.mktemp("original") / "MimicBrush"
    (folder / "mimicbrush").mkdir(parents=True)
    torch.save(original_parts, folder / "mimicbrush" / "mimicbrush.bin")
    shutil.copytree(GOLDEN / "weights" / "sd-vae-ft-mse", folder / "sd-vae-ft-mse")
    (folder / "depth_model").mkdir()
    shutil.copy(GOLDEN / "weights" / "depth_anything_vitb14.pth", folder / "depth_model")
    return folder


@pytest.fixture(scope="session")
def config():
    return tiny_config()


@pytest.fixture(scope="session")
def model(original_folder, config):
    """The recorded model, loaded as a user would load the release."""
    return MimicBrush.load(original_folder, config=config)


@pytest.fixture(scope="session")
def alt_unets():
    """(imitative U-Net, reference U-Net) of the second recorded topology."""
    parts = split_parts(load_file(GOLDEN / "weights" / "alt_flat.safetensors"))
    unet = UNet2DConditionModel(**ORIGINAL_CONFIG["alt"]["unet"])
    reference_unet = UNet2DConditionModel(**ORIGINAL_CONFIG["alt"]["referencenet"])
    drop_tail(reference_unet)
    unet.load_state_dict({key: value.float() for key, value in parts["unet"].items()})
    reference_unet.load_state_dict({key: value.float() for key, value in parts["referencenet"].items()})
    return unet.eval().requires_grad_(False), reference_unet.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """(folder, configuration) of the micro model. Read only: a test that spoils files takes `world`."""
    folder = tmp_path_factory.mktemp("micro") / "MimicBrush"
    return folder, write_micro(folder)


@pytest.fixture
def world(micro, tmp_path):
    """A copy of the micro model, in a folder of its own: `World.snapshot` looks at all that lies beside it."""
    folder, config = micro
    return World(shutil.copytree(folder, tmp_path / "world" / "MimicBrush"), config, tmp_path / "executed")


def tiny_config():
    """The recorded model's sizes in this project's configuration format."""
    config = bundled_config("mimicbrush_sd15")
    encoder = {key: value for key, value in ORIGINAL_CONFIG["image_encoder"].items() if key != "class_"}
    encoder["num_hidden_layers"] -= 1  # ours counts the layers that are kept
    projector = ORIGINAL_CONFIG["depth_guider"]
    depth = ORIGINAL_CONFIG["depth_model"]
    return {
        **config,
        "scheduler": {**config["scheduler"], **ORIGINAL_CONFIG["scheduler"]},
        "unet": ORIGINAL_CONFIG["unet"],
        "image_encoder": encoder,
        "depth_projector": {
            "out_channels": projector["conditioning_embedding_channels"],
            "block_out_channels": projector["block_out_channels"],
        },
        "depth_network": {
            "image_size": depth["img_size"],
            "patch_size": depth["patch_size"],
            "hidden_size": depth["encoder_embed_dim"],
            "num_hidden_layers": depth["encoder_depth"],
            "num_attention_heads": depth["encoder_heads"],
            "neck_hidden_sizes": depth["out_channels"],
            "fusion_hidden_size": depth["features"],
            "head_hidden_size": depth["head_features_2"],
        },
        "vae": {"class": "AutoencoderKL", **ORIGINAL_CONFIG["vae"]},
    }


def split_parts(flat):
    """{"part.key": tensor} -> {"part": {"key": tensor}}"""
    parts = {}
    for name, tensor in flat.items():
        part, key = name.split(".", 1)
        parts.setdefault(part, {})[key] = tensor
    return parts
