"""Recordings of the original Paint by Example and Magic Fixup."""

import functools
import lzma
import tempfile
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
_UNPACKED = tempfile.TemporaryDirectory()  # removed when Python ends


def recording(system, name):
    """The arrays of one file, by name."""
    with np.load(GOLDEN / system / f"{name}.npz") as packed:
        return {key: torch.from_numpy(packed[key]) for key in packed.files}


@functools.cache
def recorded_weights(system):
    """The file of the recorded model's weights, unpacked. Read only."""
    path = Path(_UNPACKED.name) / system / "weights.safetensors"
    path.parent.mkdir()
    path.write_bytes(lzma.decompress((GOLDEN / system / "weights.safetensors.xz").read_bytes()))
    return path


def error(ours, recorded):
    """The largest difference of two tensors that must be alike in shape and type."""
    assert ours.shape == recorded.shape and ours.dtype == recorded.dtype
    return (ours - recorded).abs().max().item()
