"""What commands print: results on standard output, and on stderr what they wait for."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from ..errors import LGNetError


class OutputError(LGNetError):
    """Standard output cannot be written: a full disk."""


def say(text: object) -> None:
    """Print one text. Raises OutputError."""
    with _written():
        typer.echo(text)


def show(
    value: Any, as_json: bool, render: Callable[[Any], Any], plain: Callable[[Any], Any] = lambda value: value
) -> None:
    """Print `value` as JSON, or as the rich table that `render` makes of it. Raises OutputError."""
    if as_json:
        say(json.dumps(plain(value), indent=2))
    else:
        draw(render(value))


def draw(table: Any, width: int | None = None, piped: int | None = None) -> None:
    """Print one of rich's tables. Raises OutputError.

    `width` in columns; None: of the terminal or COLUMNS, else, in a file or a pipe, `piped`; None: 80.
    """
    from rich.console import Console

    console = Console(width=width)
    if piped is not None and not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = piped
    with _written():
        console.print(table)


class _Waits(logging.Handler):
    """Prints each text as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # nobody reads it
            typer.echo(record.getMessage(), err=True)


@contextmanager
def shown_waits() -> Iterator[None]:
    """Show what takes long at the first use on a GPU, such as compiling kernels, which other programs log at INFO."""
    waits, handler = logging.getLogger("lgnet_fast.waits"), _Waits()
    level = waits.level
    waits.addHandler(handler)
    waits.setLevel(logging.INFO)
    try:
        yield
    finally:
        waits.removeHandler(handler)
        waits.setLevel(level)


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as cause:
        if os.name == "nt" and cause.errno == errno.EINVAL:  # its word for a pipe that nobody reads
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from cause
        raise OutputError(f"standard output: {cause}") from cause
