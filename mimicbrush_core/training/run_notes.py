"""What a fine-tuning began with, kept beside its checkpoint, so that it goes on with nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import ArgumentError, ModelFileError, as_output_error
from ..modules import MIMICBRUSH, SMARTBRUSH
from ..whole_file import whole_file

RUN_NAMES = {MIMICBRUSH: "finetune", SMARTBRUSH: "smartbrush"}
"""System -> the name of its fine-tuning's files."""


def finetuned_system(run_folder: Path) -> str | None:
    """The system that is fine-tuned in a run folder, if one is."""
    return next((system for system, name in RUN_NAMES.items() if _path(run_folder, name).exists()), None)


def remember(run_folder: Path, name: str, settings: dict) -> None:
    """Keep what a run begins with, as JSON. Raises OutputError."""
    path = _path(run_folder, name)
    with as_output_error(f"write to the folder {run_folder}", "Choose another one."):
        run_folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=1))


def recalled(run_folder: Path, name: str) -> dict:
    """What `remember` kept. Raises ModelFileError."""
    path = _path(run_folder, name)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}). Begin the run again in a new folder.") from error


def check_continues(run_folder: Path, name: str, settings: dict) -> None:
    """Raise ArgumentError where the folder has a checkpoint that began with something else."""
    if not (run_folder / f"{name}.pt").exists():
        return
    before, now = recalled(run_folder, name), json.loads(json.dumps(settings))
    for key in now.keys() | before.keys():
        if before.get(key) != now.get(key):
            raise ArgumentError(
                f"The run in {run_folder} began with {key} {before.get(key)}, not {now.get(key)}. Go on with the same "
                "settings, or use another folder."
            )


def _path(run_folder: Path, name: str) -> Path:
    return run_folder / f"{name}.json"
