"""Imitative Model."""

from __future__ import annotations

from comfy_api.latest import io

from .host import LoadedMimicBrush
from .schema import DEPTH, MODEL, REFERENCE, schema


class ImitativeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushImitativeModel",
            display_name="Imitative Model",
            description=(
                "The same edit for ComfyUI's own samplers: KSampler, LoRA loaders, previews, model patches and VAE "
                "Decode work with it as with any other model."
            ),
            search_aliases=["mimicbrush", "ksampler", "native model", "lora", "reference inpainting"],
            inputs=[
                MODEL.Input("model", tooltip="From Load MimicBrush."),
                io.Image.Input(
                    "source",
                    tooltip="The picture to edit, any size: padded to a square and resized to the model's. A batch "
                    "becomes a batch of latents.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White: repaint. The picture's size; one for all pictures of a batch, or one each. Only "
                    "pixels above half are repainted by the model.",
                ),
                REFERENCE.Input(
                    "reference",
                    tooltip="From Encode Reference or Combine References. Its start and end are shares of the whole "
                    "way from noise to picture, so they hold when the steps are divided among samplers.",
                ),
                DEPTH.Input("depth", optional=True, tooltip="From Depth Condition: keeps the shape under the mask."),
            ],
            outputs=[
                io.Model.Output(
                    "native_model", display_name="native model", tooltip="For KSampler, LoRA loaders and model patches."
                ),
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="For the sampler: with the reference. It has no prompt.",
                ),
                io.Conditioning.Output(
                    "negative", display_name="negative", tooltip="For the sampler: without the reference."
                ),
                io.Latent.Output(
                    "empty_latent",
                    display_name="empty latent",
                    tooltip="The usual start, with denoise 1: from noise alone, like Imitative Sampler.",
                ),
                io.Latent.Output(
                    "source_latent",
                    display_name="source latent",
                    tooltip="For a denoise below 1: starts from what is under the mask and changes it less.",
                ),
                io.Vae.Output(
                    "vae", display_name="VAE", tooltip="For VAE Decode, which gives the model's whole square picture."
                ),
            ],
        )

    @classmethod
    def execute(cls, model: LoadedMimicBrush, source, mask, reference, depth=None) -> io.NodeOutput:
        # Only here: it builds on the host's inner parts, and no other node must fail if those change.
        from .native_model import native_parts

        parts = native_parts(model, source, mask, reference, depth)
        return io.NodeOutput(
            parts.model, parts.positive, parts.negative, parts.empty_latent, parts.source_latent, parts.vae
        )
