"""The core's own exceptions. Every message names what was given, what was expected and what to do.

The command line maps each class to an exit code (`exit_code`); a host passes the message on unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MimicBrushError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class ArgumentError(MimicBrushError, ValueError):
    """A setting is unknown, out of range, or does not fit the other settings."""

    exit_code = 2


class PictureError(MimicBrushError):
    """A source, reference, mask or depth picture cannot be used."""

    exit_code = 3


class ModelFileError(MimicBrushError):
    """A weight file or model folder is missing, damaged, or of another system."""

    exit_code = 4


class OutputError(MimicBrushError):
    """The result cannot be written where it was asked for."""

    exit_code = 5


class DownloadError(MimicBrushError):
    """A file cannot be fetched, or what came is not what was published."""

    exit_code = 6


class Cancelled(MimicBrushError):
    """The run was cancelled by its caller; nothing was written."""

    exit_code = 130


@contextmanager
def as_output_error(action: str, remedy: str = "") -> Iterator[None]:
    """Turns an OSError into an OutputError: "Cannot <action>: <the system's reason>. <remedy>"."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"Cannot {action}: {error.strerror or error}. {remedy}".rstrip()) from error
