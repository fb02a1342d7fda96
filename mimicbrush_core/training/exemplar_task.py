"""Learning Paint by Example, small: the object of a frame painted again from one token of what it looks like.

Yang et al., arXiv 2211.13227, section 3: the exemplar is cut out of a picture and strongly augmented, the mask is
looser than the object, and now and then the token is the learned one of "no exemplar". Here the exemplar is more
often cut out of the scene's other frame than out of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..encoders import encode_latents, encode_pictures
from ..evaluation.exemplars import exemplar_cases, object_crop
from ..images import clip_pixel_values, resize_bicubic, to_model_range
from ..masks import soft_latent_mask
from ..modules import ExemplarModules, resized
from ..systems.paint_by_example import PaintByExample
from .curriculum import Curriculum
from .hole_masks import loose_mask
from .objective import Denoising, error_inside, weighted_mean
from .scene_pool import ScenePool
from .scenes import CLIP_LIKE, FramePair, render_pair
from .trainer import Task, Validation
from .validation import judge

CLIP_GREY = (124, 116, 104)
"""CLIP's mean colour, which becomes 0: beyond a turned exemplar there is nothing."""


@dataclass(frozen=True)
class _Scene:
    """Two frames of one object. Row 0 is frame A, row 1 frame B."""

    pixels: np.ndarray  # uint8 [2,S,S,3]
    latents: Tensor  # [2,4,h,w]
    objects: np.ndarray  # bool [2,S,S]


@dataclass(frozen=True)
class _Sample:
    """What one training sample uses of its scene."""

    picture: Tensor  # [3,S,S] in [-1,1]
    keep: Tensor  # [1,S,S], 1 = keep
    clean: Tensor  # [4,h,w]
    exemplar: Tensor  # [3,s,s]: pixels for the image encoder
    timestep: int
    noise: Tensor  # [4,h,w]


def draw_exemplar(rng: np.random.Generator, picture: np.ndarray, thing: np.ndarray, size: int) -> np.ndarray:
    """An object cut out of its picture, mirrored and turned as the original does it: uint8 [size,size,3].

    picture uint8 [S,S,3], thing bool [S,S]; the cut is up to a 50th of the picture larger than the object's box.
    """
    crop = object_crop(picture, thing, int(rng.integers(0, 1 + len(picture) // 50)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    image = Image.fromarray(np.ascontiguousarray(crop))
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, fillcolor=CLIP_GREY)
    return resize_bicubic(np.asarray(image), size)


class LookTask(Task):
    """The exemplar encoder, before it has a U-Net to speak to: a small picture has to be read off its one token.

    The original begins with CLIP, which knows what things look like; ours learns that here.
    """

    name = "look"
    thumbnail = 16  # side in pixels of what is read off

    def __init__(self, modules: ExemplarModules, config: dict, seed: int, held: int = 1024, echo: int = 24):
        encoder = modules.exemplar_encoder
        width, size = config["unet"]["cross_attention_dim"], self.thumbnail
        self.reader = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 3 * size * size))
        self.encoder, self.seed, self.device = encoder, seed, encoder.uncond_vector.device
        self.learned = {"exemplar_encoder": encoder, "reader": self.reader.to(self.device)}
        self.exemplar_size = config["exemplar_encoder"]["image_size"]
        self.scenes = ScenePool(self._render, held, echo)

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        shown = [self._draw(*one) for one in zip(self.scenes.of(indices), indices, strict=True)]
        pixels = torch.cat([clip_pixel_values(picture, self.exemplar_size) for picture in shown])
        small = torch.cat([to_model_range(resize_bicubic(picture, self.thumbnail)) for picture in shown])
        read = self.reader(self.encoder(pixels.to(self.device))).float()
        error = F.mse_loss(read.flatten(1), small.flatten(1).to(self.device))
        return error, {"psnr": float(10 * torch.log10(4 / error.detach()))}

    def _draw(self, pair: FramePair, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, 3, index))
        frames = ((pair.source, pair.parts), (pair.reference, pair.reference_parts))
        picture, parts = frames[int(rng.integers(2))]
        return draw_exemplar(rng, picture, parts > 0, self.exemplar_size)

    def _render(self, numbers: dict[int, int]) -> list[FramePair]:
        return [render_pair(number, self.exemplar_size, CLIP_LIKE) for number in numbers]


class ExemplarTask(Task):
    """Repaint a loosely masked object with what an exemplar shows.

    Learned: U-Net and exemplar encoder. Loss: the model's own prediction target (v or epsilon) on the clean
    latents, weighted towards the hole (the original weights nothing: ours is to learn from fewer samples).
    """

    drop_exemplar = 0.2  # of the steps, whole, as the original drops whole batches
    own_frame = 0.3  # share of exemplars that come from the source itself
    outside_weight = 0.1
    validation_cases = 16

    def __init__(
        self,
        modules: ExemplarModules,
        config: dict,
        seed: int,
        size: int | None = None,
        curriculum: Curriculum | None = None,
        held: int = 1024,
        echo: int = 6,
    ):
        """size: of the pictures; default: the model's. held, echo: as for `ScenePool`."""
        self.modules, self.seed = modules, seed
        self.learned = {"unet": modules.unet, "exemplar_encoder": modules.exemplar_encoder}
        self.size = size or config["defaults"]["size"]
        self.name = f"exemplar_{self.size}"
        self.config = resized(config, self.size)
        self.exemplar_size = config["exemplar_encoder"]["image_size"]
        self.curriculum = curriculum or Curriculum(identity=0, full=20_000)
        self.device = modules.unet.device
        self.denoising = Denoising(config["scheduler"], self.device)
        self.scenes = ScenePool(self._render, held, echo)

    def loss(self, step: int, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        samples = [self._draw(*one) for one in zip(self.scenes.of(indices), indices, strict=True)]
        dropped = np.random.default_rng((self.seed, 4, step)).random() < self.drop_exemplar
        clean, noise = self._gather(samples, "clean"), self._gather(samples, "noise")
        timesteps = torch.tensor([sample.timestep for sample in samples], device=self.device)
        noisy = self.denoising.noised(clean, noise, timesteps)
        hole, keep = self._beside(samples)
        unet = self.modules.unet
        model_input = torch.cat([noisy, hole, keep], dim=1)  # [B,9,h,w], in the original's order
        tokens = self._tokens(samples, dropped).to(unet.dtype)  # [B,1,D]
        predicted = unet(model_input.to(unet.dtype), timesteps, encoder_hidden_states=tokens).sample.float()
        error = (predicted - self.denoising.target(clean, noise, timesteps)).square()
        seen = {"masked_none" if dropped else "masked_with": error_inside(error.detach(), 1 - keep)}
        return weighted_mean(error, self.outside_weight + 1 - keep), seen

    def validate(self) -> Validation:
        return judge(PaintByExample(self.modules, self.config), exemplar_cases(self.validation_cases, self.size))

    def _tokens(self, samples: Sequence[_Sample], dropped: bool) -> Tensor:
        encoder = self.modules.exemplar_encoder
        if dropped:
            return encoder.uncond_vector.expand(len(samples), -1, -1)
        return encoder(self._gather(samples, "exemplar"))

    @torch.no_grad()
    def _beside(self, samples: Sequence[_Sample]) -> tuple[Tensor, Tensor]:
        """Latents of the pictures with mid-grey holes [B,4,h,w], and what is kept [B,1,h,w]."""
        pictures, keep = self._gather(samples, "picture"), self._gather(samples, "keep")
        hole = encode_latents(self.modules.vae, pictures * keep).float()
        return hole, soft_latent_mask(keep, pictures.shape[-1] // hole.shape[-1])

    def _gather(self, samples: Sequence[_Sample], field: str) -> Tensor:
        return torch.stack([getattr(sample, field) for sample in samples]).to(self.device)

    # -- samples

    def _draw(self, scene: _Scene, index: int) -> _Sample:
        rng = np.random.default_rng((self.seed, 3, index))
        source = int(rng.integers(2))
        shown = source if rng.random() < self.own_frame else 1 - source
        mask = loose_mask(rng, scene.objects[source])
        clean = scene.latents[source]
        return _Sample(
            picture=to_model_range(scene.pixels[source])[0],
            keep=torch.from_numpy(~mask)[None].float(),
            clean=clean,
            exemplar=clip_pixel_values(
                draw_exemplar(rng, scene.pixels[shown], scene.objects[shown], self.exemplar_size), self.exemplar_size
            )[0],
            timestep=self.curriculum.draw_timestep(rng, index, len(self.denoising.alphas)),
            noise=torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)),
        )

    def _render(self, numbers: dict[int, int]) -> list[_Scene]:
        pairs = [render_pair(number, self.size, self.curriculum.difficulty(index)) for number, index in numbers.items()]
        frames = [frame for pair in pairs for frame in (pair.source, pair.reference)]
        latents = encode_pictures(self.modules.vae, frames).cpu()
        return [
            _Scene(
                np.stack([pair.source, pair.reference]),
                latents[2 * n : 2 * n + 2],
                np.stack([pair.parts > 0, pair.reference_parts > 0]),
            )
            for n, pair in enumerate(pairs)
        ]
