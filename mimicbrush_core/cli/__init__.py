"""The command line: `mimicbrush edit | demo | train | evaluate | download | verify | convert | selfcheck`.

Exit codes: 0 done, 2 a wrong setting, 3 a picture, 4 a model file, 5 the output, 6 a download, 130 cancelled;
1 a selfcheck that failed.
"""

from __future__ import annotations

import argparse
import logging
import sys

from .. import __version__
from ..errors import Cancelled, MimicBrushError
from .edit import add_demo, add_edit
from .files import add_convert, add_download, add_verify
from .judge import add_evaluate, add_selfcheck
from .train import add_train


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    try:
        arguments.run(arguments)
        return 0
    except MimicBrushError as error:
        print(f"mimicbrush: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mimicbrush: cancelled, nothing was written", file=sys.stderr)
        return Cancelled.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mimicbrush", description="Edit pictures by imitating a reference.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_edit, add_demo, add_train, add_evaluate, add_download, add_verify, add_convert, add_selfcheck):
        add(commands)
    return parser
