"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"


def unfinished_path(path: Path) -> Path:
    """Where a file is written before it takes its place: in the same folder, so that it can be renamed."""
    return path.with_name(path.name + UNFINISHED)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path that is given; on leaving, what was written there takes the place of `path`.

    With an exception `path` stays as it was, and what was begun is removed. Raises OSError.
    """
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
