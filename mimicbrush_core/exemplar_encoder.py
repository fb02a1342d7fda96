"""Paint by Example's image encoder: a picture -> one cross-attention token.

Yang et al., "Paint by Example: Exemplar-based Image Editing with Diffusion Models", CVPR 2023, arXiv 2211.13227. The
one token, of CLIP's class token, is the paper's bottleneck: it tells what the exemplar shows, not its pixels.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class ExemplarEncoder(nn.Module):
    """CLIP vision tower -> class token -> mapper -> norm -> projection; names as in the published `image_encoder`.

    vision: settings of `CLIPVisionConfig`. mapper_layers: blocks of the mapper; output_dim: of the token.
    uncond_vector [1,1,output_dim]: the learned token of "no exemplar", used as it is.
    """

    def __init__(self, vision: dict, mapper_layers: int, output_dim: int):
        super().__init__()
        width = vision["hidden_size"]
        self.model = CLIPVisionModel(CLIPVisionConfig(**vision))
        self.mapper = Mapper(width, mapper_layers)
        self.final_layer_norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, output_dim)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, output_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B,3,s,s], normalised as CLIP's input -> [B,1,output_dim]."""
        class_token = self.model(pixel_values=pixel_values).pooler_output[:, None]
        return self.proj_out(self.final_layer_norm(self.mapper(class_token)))


class Mapper(nn.Module):
    """Transformer blocks of one head over a sequence of one token.

    Attention to one token passes its value on, whatever query and key are; they are kept for the layout of the files.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 1, width, activation_fn="gelu", attention_bias=True) for _ in range(layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,1,width] -> [B,1,width]."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens
