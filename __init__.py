"""MimicBrush for ComfyUI: repaint a masked region so that it imitates a reference picture."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"  # the help pages; it holds no scripts

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
