"""Packages that only training needs: the extra `mimicbrush[train]`, never a requirement of the node pack."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import ArgumentError

_PACKAGES = {"av": "av (PyAV)", "cv2": "opencv-python-headless"}


def require(module: str, purpose: str) -> ModuleType:
    """The imported `module`, or an ArgumentError that says what it is needed for and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module, module)
        raise ArgumentError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}). "
            "Install the training extra: pip install 'mimicbrush[train]'."
        ) from error
