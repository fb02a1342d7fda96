"""What is learned, one class each: the autoencoder, the depth network, and imitation itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..depth import estimate_depth, no_depth_map
from ..encoders import encode_latents, encode_pictures
from ..evaluation.track import SETS, held_out_cases
from ..images import clip_pixel_values, depth_pixel_values, to_model_range
from ..modules import Modules, resized
from ..systems.mimicbrush import MimicBrush
from .correspondence import draw_points
from .curriculum import Curriculum
from .hole_masks import draw_mask, part_mask
from .objective import Batch, LossTerms, Objective
from .scene_pool import ScenePool
from .scenes import FramePair, render_between_objects, render_pair, render_textured_scene
from .trainer import Task, Validation
from .validation import judge

TERMS = LossTerms(outside=0.1, matching=0.1)
"""Of the embedded model's loss, where a stage has no others."""


class AutoencoderTask(Task):
    """Pictures through the latents and back: squared error on random crops.

    Some crops carry black holes, as masked pictures do. The latents get a little noise, so that the decoder
    forgives small errors of the sampler, and are drawn to zero mean and unit spread.
    """

    name = "autoencoder"
    latent_noise = 0.05

    def __init__(self, modules: Modules, seed: int, size: int = 128, crop: int = 64):
        self.vae = modules.vae
        self.learned = {"vae": modules.vae}
        self.seed, self.size, self.crop = seed, size, crop

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        device = next(self.vae.parameters()).device
        crops = torch.cat([self._crops(index) for index in indices]).to(device)
        latents = self.vae.encode(crops).latents.float()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        decoded = self.vae.decode(latents + self.latent_noise * latents.detach().std() * noise).sample
        error = F.mse_loss(decoded.float(), crops)
        mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        drift = mean.square().mean() + (spread - 1).square().mean()
        return error + 1e-3 * drift, {"psnr": float(10 * torch.log10(4 / error.detach()))}

    def _crops(self, index: int) -> Tensor:
        """A crop of each frame of one scene, [2,3,crop,crop] in [-1,1]."""
        rng = np.random.default_rng((self.seed, 1, index))
        render = render_textured_scene if rng.random() < 0.2 else render_pair
        pair = render(index, self.size)
        crops = []
        for frame in (pair.source, pair.reference):
            top, left = rng.integers(0, self.size - self.crop + 1, 2)
            piece = frame[top : top + self.crop, left : left + self.crop].copy()
            if rng.random() < 0.25:
                y, x = rng.integers(0, self.crop - 8, 2)
                height, width = rng.integers(8, self.crop, 2)
                piece[y : y + height, x : x + width] = 0
            crops.append(to_model_range(piece))
        return torch.cat(crops)


class DepthTask(Task):
    """Relative inverse depth of a frame, as the scene knows it."""

    name = "depth"

    def __init__(self, modules: Modules, seed: int, size: int = 128):
        self.network = modules.depth_network
        self.learned = {"depth_network": modules.depth_network}
        self.seed, self.size = seed, size
        self.input_size = modules.depth_network.config.backbone_config.image_size

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        device = next(self.network.parameters()).device
        pixels, depths = [], []
        for index in indices:
            rng = np.random.default_rng((self.seed, 2, index))
            pair = (render_textured_scene if rng.random() < 0.2 else render_pair)(index, self.size)
            second = rng.random() < 0.5
            frame, depth = (pair.reference, pair.reference_depth) if second else (pair.source, pair.depth)
            pixels.append(depth_pixel_values(frame, self.input_size))
            depths.append(torch.from_numpy(np.ascontiguousarray(depth))[None, None])
        predicted = self.network(pixel_values=torch.cat(pixels).to(device)).predicted_depth.float()
        wanted = F.interpolate(torch.cat(depths).to(device), size=predicted.shape[-2:], mode="bilinear")[:, 0]
        error = F.mse_loss(predicted, wanted)
        return error, {"rmse": float(error.detach().sqrt())}


@dataclass(frozen=True)
class _Scene:
    """One rendered and encoded scene. Row 0 is the source as rendered, row 1 the reference."""

    pixels: Tensor  # uint8 [2,3,S,S]
    truths: Tensor  # [2,4,h,w] latents to be learned; differ from `latents` between objects
    latents: Tensor  # [2,4,h,w]
    true_pixels: Tensor  # uint8 [2,3,S,S], of the truths
    clip_pixels: Tensor  # [2,3,s,s]
    depths: Tensor  # [2,d,d]
    parts: np.ndarray  # uint8 [2,S,S]
    masked_part: int  # between objects: the part to repaint; 0 for pairs, which work both ways
    moved: np.ndarray  # [2,3,3] the object's pixels in each frame to those in the other


@dataclass(frozen=True)
class _Sample:
    """What one training sample uses of its scene."""

    scene: _Scene
    source: int  # row
    reference: int  # row
    mask: np.ndarray  # bool [S,S]
    timestep: int
    noise: np.ndarray  # float32 [4,h,w]
    with_depth: bool
    points: np.ndarray  # float32 [P,5], where the reading is to look


class ImitationTask(Task):
    """The paper's self-supervised recipe: repaint the hole of one frame by looking at the other.

    Learned: both U-Nets, image encoder, projections. Loss: the model's own prediction target (v or epsilon) on
    the *clean* latents, weighted towards the hole. Depth is dropped for half of the samples, the reference
    for a tenth of the steps (then tokens are unconditional and nothing is read).
    """

    drop_reference = 0.1
    drop_depth = 0.5
    validation_cases = 16  # of each set

    def __init__(
        self,
        modules: Modules,
        config: dict,
        seed: int,
        name: str = "imitation",
        size: int | None = None,
        curriculum: Curriculum | None = None,
        terms: LossTerms | None = None,
        scenes: int = 1024,
        echo: int = 6,
    ):
        """name: of the run's files. size: side of the pictures; None: the model's. terms: of the loss; None: `TERMS`.
        scenes: how many are held at a time; echo: how often each is used before new ones are rendered.
        """
        self.size = size or config["defaults"]["size"]
        self.name = name
        self.modules, self.config = modules, resized(config, self.size)
        self.learned = {
            "unet": modules.unet,
            "reference_unet": modules.reference_unet,
            "image_encoder": modules.image_encoder,
            "image_projection": modules.image_projection,
            "depth_projector": modules.depth_projector,
        }
        self.seed = seed
        self.curriculum = curriculum or Curriculum()
        self.clip_size = config["image_encoder"]["image_size"]
        self.depth_size = config["depth_network"]["image_size"]
        self.device = next(modules.unet.parameters()).device
        self.scenes = ScenePool(self._render, scenes, echo)
        with torch.no_grad():
            no_depth = no_depth_map(modules.depth_network, self.depth_size)
        no_image = torch.zeros(1, 3, self.clip_size, self.clip_size)
        self.objective = Objective(modules, config["scheduler"], no_depth, no_image, terms or TERMS)
        self.timesteps = len(self.objective.denoising.alphas)

    # -- one step

    def computing(self) -> AbstractContextManager:
        return self.objective.computing()

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        dropped = np.random.default_rng((self.seed, 4, step)).random() < self.drop_reference
        return self.objective.loss(self._batch(self._draw(indices), with_reference=not dropped))

    def validate(self) -> Validation:
        cases = chain.from_iterable(held_out_cases(name, self.validation_cases, self.size) for name in SETS)
        return judge(MimicBrush(self.modules, self.config), cases)

    def _batch(self, samples: list[_Sample], with_reference: bool) -> Batch:
        clean = self._gather(samples, lambda s: s.scene.truths[s.source])  # [B,4,h,w]
        pixels = self._gather(samples, lambda s: s.scene.pixels[s.source])  # [B,3,S,S]
        mask = self._gather(samples, lambda s: torch.from_numpy(s.mask))[:, None]  # [B,1,S,S]
        reference = self._gather(samples, lambda s: s.scene.latents[s.reference])
        image = self._gather(samples, lambda s: s.scene.clip_pixels[s.reference])
        factor = mask.shape[-1] // clean.shape[-1]
        readers = len(samples) if with_reference else 0
        return Batch(
            clean=clean,
            mask=mask[..., ::factor, ::factor].float(),
            hole=self._hole_latents(pixels, mask),
            depths=[s.scene.depths[s.source].to(self.device) if s.with_depth else None for s in samples],
            noise=self._gather(samples, lambda s: torch.from_numpy(s.noise)),
            timesteps=torch.tensor([s.timestep for s in samples], device=self.device),
            reference=reference[:readers],
            image=image[:readers],
            points=self._gather(samples, lambda s: torch.from_numpy(s.points))[:readers],
            picture=_model_range(self._gather(samples, lambda s: s.scene.true_pixels[s.source])),
            picture_mask=mask.float(),
        )

    @torch.no_grad()
    def _hole_latents(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Latents of the sources with black holes, [B,4,h,w]."""
        picture = torch.where(mask, -1.0, _model_range(pixels))
        return encode_latents(self.modules.vae, picture).float()

    def _gather(self, samples: list[_Sample], pick) -> Tensor:
        return torch.stack([pick(sample) for sample in samples]).to(self.device)

    # -- samples

    def _draw(self, indices: list[int]) -> list[_Sample]:
        """The samples with these global indices: scenes rendered once, everything else drawn afresh."""
        return [self._draw_sample(scene, i) for scene, i in zip(self.scenes.of(indices), indices, strict=True)]

    def _draw_sample(self, scene: _Scene, index: int) -> _Sample:
        rng = np.random.default_rng((self.seed, 3, index))
        source = 0 if scene.masked_part else int(rng.integers(2))
        parts = scene.parts[source]
        if scene.masked_part:
            mask = part_mask(parts, scene.masked_part, grow=int(rng.integers(0, 4)))
        else:
            mask = draw_mask(rng, parts, self.curriculum.masks)
        timestep = self.curriculum.draw_timestep(rng, index, self.timesteps)
        noise = rng.standard_normal(scene.latents.shape[1:], dtype=np.float32)
        with_depth = rng.random() >= self.drop_depth
        points = draw_points(rng, mask, parts, scene.parts[1 - source], scene.moved[source])
        return _Sample(scene, source, 1 - source, mask, timestep, noise, with_depth, points)

    @torch.no_grad()
    def _render(self, numbers: dict[int, int]) -> list[_Scene]:
        """Render and encode scenes; numbers: {scene number: index of the first sample that uses it}."""
        first = self.curriculum.first_scene
        drawn = [self._render_one(first + number, index) for number, index in numbers.items()]
        modules, pairs = self.modules, [pair for pair, _ in drawn]
        frames = [frame for pair in pairs for frame in (pair.source, pair.reference)]
        latents = self._encode(frames)
        pixels = _stacked(frames)
        truths, true_pixels = latents.clone(), pixels.clone()
        between = [n for n, (_, part) in enumerate(drawn) if part]
        if between:
            sources, pictures = [2 * n for n in between], [pairs[n].truth for n in between]
            truths[sources], true_pixels[sources] = self._encode(pictures), _stacked(pictures)
        depth_pixels = torch.cat([depth_pixel_values(frame, self.depth_size) for frame in frames])
        depths = estimate_depth(modules.depth_network, depth_pixels.to(self.device)).float().cpu()
        clip_pixels = torch.cat([clip_pixel_values(frame, self.clip_size) for frame in frames])
        scenes = []
        for n, (pair, masked_part) in enumerate(drawn):
            rows = slice(2 * n, 2 * n + 2)
            parts, moved = np.stack([pair.parts, pair.reference_parts]), np.array(pair.moved)
            scenes.append(
                _Scene(
                    pixels[rows],
                    truths[rows],
                    latents[rows],
                    true_pixels[rows],
                    clip_pixels[rows],
                    depths[rows],
                    parts,
                    masked_part,
                    np.stack([moved, np.linalg.inv(moved)]),
                )
            )
        return scenes

    def _render_one(self, number: int, index: int) -> tuple[FramePair, int]:
        """A pair and, between objects, the part to be repainted (else 0)."""
        kind = np.random.default_rng((self.seed, 5, number)).random()
        progress, difficulty = self.curriculum.progress(index), self.curriculum.difficulty(index)
        if kind < self.curriculum.between_objects * progress:
            return render_between_objects(number, self.size, difficulty)
        if kind > 1 - self.curriculum.textured_scenes:
            return render_textured_scene(number, self.size, replace(difficulty, texture=1.0)), 0
        return render_pair(number, self.size, difficulty), 0

    def _encode(self, frames: list[np.ndarray]) -> Tensor:
        return encode_pictures(self.modules.vae, frames).cpu()


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    """Pictures uint8 [S,S,3] as uint8 [N,3,S,S]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _model_range(pixels: Tensor) -> Tensor:
    """Pixels uint8 as float32 in -1..1."""
    return pixels.float() / 127.5 - 1
