"""What commands write: refused before any work is done where it could not be, and in words where it fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import OutputError


def checked_output(path: str, overwrite: bool) -> Path:
    """Refuse an output that could not be written, before any work is done."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise OutputError(f"The output {path} is not a .png file; only PNG keeps the picture exact.")
    if path.exists() and not overwrite:
        raise OutputError(f"The output {path} exists already. Choose another name, or add --overwrite.")
    if not path.parent.is_dir():
        raise OutputError(f"The output folder {path.parent} does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"The output folder {path.parent} cannot be written to. Choose another one.")
    return path


def make_folder(folder: Path) -> None:
    """Create a folder where there is none. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot create the folder {folder}: {error.strerror}. Choose another one.") from error


def save_picture(path: Path, picture, metadata: dict | None = None) -> None:
    """Write a picture uint8 [H,W,3 or 4] as PNG, with metadata as JSON in it. Raises OutputError."""
    from ..images import save_png

    try:
        save_png(path, picture, {"mimicbrush": json.dumps(metadata)} if metadata else {})
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error


def comparison(rows: list[dict], titles: list[str]):
    """A labelled sheet of rows {label: uint8 [H,W,3]}."""
    from ..sheets import contact_sheet

    return contact_sheet([list(row.values()) for row in rows], list(rows[0]), tile=256, titles=titles)
