"""MimicBrush for ComfyUI: repaint a masked region so that it imitates a reference picture."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
