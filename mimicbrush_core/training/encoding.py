"""Training samples -> what the loss needs of them: latents, depth, image tokens; on the fly, or once to disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..depth import estimate_depth
from ..encoders import encode_latents, image_tokens
from ..errors import ArgumentError, as_output_error
from ..images import clip_pixel_values, cut_hole, depth_pixel_values, to_model_range
from ..masks import latent_mask
from ..modules import Modules
from ..systems.mimicbrush import MimicBrush
from ..whole_file import whole_file
from .samples import TrainingSample


@dataclass(frozen=True)
class EncodedSample:
    """What one sample's loss is computed from, for any noise and timestep.

    clean, hole, reference [4,h,w]: latents of the source, of the source with its black hole, of the reference; the
    posterior's mode, never noised. mask [1,h,w]: 1 = cut out. depth [s,s]: of the source *without* the hole, in the
    network's raw range; None where it was not asked for. image: the reference's pixels for the image encoder
    [3,s,s], or what it made of them [T,E].
    """

    clean: Tensor
    hole: Tensor
    reference: Tensor
    mask: Tensor
    depth: Tensor | None
    image: Tensor


@dataclass(frozen=True)
class Constants:
    """Of the weights: no_depth [1,s,s], the map of "no depth"; no_image, the image of "no reference", as
    `EncodedSample.image` with a row in front."""

    no_depth: Tensor
    no_image: Tensor


class SampleEncoder:
    """Encodes samples as `systems.mimicbrush` prepares an edit's inputs.

    pixels: keep the reference's pixels, for an image encoder that is trained; else run it here, once.
    """

    def __init__(self, modules: Modules, config: dict, pixels: bool = False):
        self._modules, self._pixels = modules, pixels
        self._model = MimicBrush(modules, config)
        self._clip_size = config["image_encoder"]["image_size"]
        self._depth_size = config["depth_network"]["image_size"]

    @property
    def device(self) -> torch.device:
        return self._modules.vae.device

    @property
    def latent_factor(self) -> int:
        """Picture pixels per latent."""
        return self._model.latent_factor

    @torch.no_grad()
    def constants(self) -> Constants:
        zeros = torch.zeros(1, 3, self._clip_size, self._clip_size)
        with self._exactly():
            return Constants(self._model.no_depth_map(), self._images(zeros))

    @torch.no_grad()
    def encode(
        self, samples: Sequence[TrainingSample], with_depth: Sequence[bool] | None = None
    ) -> list[EncodedSample]:
        """Encode samples of one size. with_depth: of which the depth is wanted; default: of all."""
        with_depth = with_depth or [True] * len(samples)
        self._check(samples)
        with self._exactly():
            clean = self._latents([sample.source for sample in samples])
            hole = self._latents([cut_hole(sample.source, sample.mask) for sample in samples])
            reference = self._latents([sample.reference for sample in samples])
            pixels = [clip_pixel_values(sample.reference, self._clip_size) for sample in samples]
            image = self._images(torch.cat(pixels))
            depths = self._depths([s.source for s, wanted in zip(samples, with_depth, strict=True) if wanted])
        rest = iter(depths)
        encoded = []
        for row, sample in enumerate(samples):
            mask = latent_mask(sample.mask, self.latent_factor)[0].to(self.device)
            depth = next(rest) if with_depth[row] else None
            encoded.append(EncodedSample(clean[row], hole[row], reference[row], mask, depth, image[row]))
        return encoded

    def _exactly(self):
        """What is learned is not to be rounded by the forward pass's precision."""
        return torch.autocast(self.device.type, enabled=False)

    def _latents(self, pictures: list) -> Tensor:
        vae = self._modules.vae
        pixels = torch.cat([to_model_range(picture) for picture in pictures])
        return encode_latents(vae, pixels.to(vae.device, vae.dtype)).float()

    def _images(self, pixels: Tensor) -> Tensor:
        if self._pixels:
            return pixels.to(self.device)
        return image_tokens(self._modules.image_encoder, nn.Identity(), pixels).float()

    def _depths(self, pictures: list) -> Tensor:
        if not pictures:
            return torch.empty(0)
        pixels = torch.cat([depth_pixel_values(picture, self._depth_size) for picture in pictures])
        return estimate_depth(self._modules.depth_network, pixels.to(self.device)).float()

    def _check(self, samples: Sequence[TrainingSample]) -> None:
        for sample in samples:
            height, width = sample.source.shape[:2]
            if height != width or height % self._model.size_multiple or sample.reference.shape != sample.source.shape:
                raise ArgumentError(
                    f"A sample has a source of {width} x {height} and a reference of {sample.reference.shape[1]} x "
                    f"{sample.reference.shape[0]} pixels; both must be squares of one size, a multiple of "
                    f"{self._model.size_multiple}."
                )


class PreparedSamples:
    """Samples encoded once, on disk, one file each: training then needs neither VAE, image encoder nor depth network.

    Training sample i uses file i % count, with noise, timestep and drops of its own. A preparation that was killed
    goes on where it was.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = json.loads((folder / "prepared.json").read_text())["count"]

    @classmethod
    def write(
        cls, folder: Path, dataset, count: int, encoder: SampleEncoder, note: dict, on_sample: Callable | None = None
    ) -> PreparedSamples:
        """Encode dataset[0..count-1]. note: what they were made of; on_sample(done): after each one.

        Raises ArgumentError where the folder holds samples made of something else, OutputError.
        """
        manifest = {"count": count, **note}
        with as_output_error(f"write prepared samples to {folder}", "Choose another folder or free some space."):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "prepared.json"
            if path.exists() and json.loads(path.read_text()) != manifest:
                raise ArgumentError(
                    f"{folder} holds samples prepared with other settings or data. Remove it, or use another folder."
                )
            path.write_text(json.dumps(manifest))
            _save(folder / "constants.safetensors", encoder.constants())
            for index in range(count):
                if not cls._path(folder, index).exists():
                    _save(cls._path(folder, index), encoder.encode([dataset[index]])[0])
                if on_sample is not None:
                    on_sample(index + 1)
        return cls(folder)

    @staticmethod
    def _path(folder: Path, index: int) -> Path:
        return folder / f"{index:07d}.safetensors"

    def constants(self) -> Constants:
        return Constants(**load_file(self.folder / "constants.safetensors"))

    def __getitem__(self, index: int) -> EncodedSample:
        return EncodedSample(**load_file(self._path(self.folder, index % self.count)))


def _save(path: Path, sample: EncodedSample | Constants) -> None:
    """Whole or not at all."""
    tensors = {field.name: getattr(sample, field.name).cpu().contiguous() for field in fields(sample)}
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished)
