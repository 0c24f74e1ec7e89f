"""`lgnet-fast ...`: the command line. `commands/` has one file a command, named like it."""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

from ..lazy import attach
from . import interrupts

if TYPE_CHECKING:
    from .commands import app

__getattr__, __dir__ = attach(__name__, {"app": "commands"})

__all__ = ["app", "main"]


def main() -> None:
    """The console script: runs the command of `sys.argv` and ends the process with its exit code."""
    interrupts.listen()
    _print_any_text()
    try:
        from .commands import app

        app(windows_expand_args=False)  # a name with brackets is no pattern, and ~ no home
    except KeyboardInterrupt:
        sys.exit(interrupts.CODE)
    except Exception as error:
        if interrupts.interrupted():
            sys.exit(interrupts.CODE)
        if not isinstance(error, OSError):
            raise
        # Of the help or the version: what commands raise ends in errors.py.
        print(f"error: standard output: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        _drop_unwritable_output()


def _print_any_text() -> None:
    """Signs that the terminal lacks, and names that are not UTF-8, are printed escaped, not an error."""
    out = sys.stdout
    if isinstance(out, TextIOWrapper) and (out.errors == "strict" or codecs.lookup(out.encoding).name != "utf-8"):
        out.reconfigure(errors="backslashreplace")


def _drop_unwritable_output() -> None:
    """Forget what standard output does not take. Python would try once more at its end, and print a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        sys.stdout = None
