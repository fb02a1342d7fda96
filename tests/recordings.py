"""Recordings of the original Paint by Example and Magic Fixup."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def recording(system, name):
    """The arrays of one file, by name."""
    with np.load(GOLDEN / system / f"{name}.npz") as packed:
        return {key: torch.from_numpy(packed[key]) for key in packed.files}


def error(ours, recorded):
    """The largest difference of two tensors that must be alike in shape and type."""
    assert ours.shape == recorded.shape and ours.dtype == recorded.dtype
    return (ours - recorded).abs().max().item()
