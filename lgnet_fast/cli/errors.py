"""Errors of commands: one line on stderr and exit code 2, with names of options in place of fields."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import BackendError, JobError, LGNetError, MissingExtraError, UsageError, WeightsError
from .interrupts import interrupted

_ABOUT_OPTIONS = (UsageError, JobError, MissingExtraError, WeightsError, BackendError)
"""Errors whose first words may be names of fields."""


@contextmanager
def one_line_errors(command: Any) -> Iterator[None]:
    """Print errors that the user can correct as one line on stderr and exit with code 2, without a traceback.

    OSError is one of them: a full disk, missing rights, a name that is too long. `command`: click's object of the
    command; errors that name its parameters are shown with the names of the options.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of standard output has ended: click ends the command without a word
    except (LGNetError, OSError) as error:
        if interrupted():
            raise KeyboardInterrupt from None
        text = spelt(str(error), options_of(command)) if isinstance(error, _ABOUT_OPTIONS) else str(error)
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings as "warning: TEXT", because the lines of code that Python names are not the user's."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def options_of(command: Any) -> dict[str, str]:
    """{parameter: its option}, such as {"source": "--input"}, of click's object of a command; without arguments.

    Errors about "weights" are about the option --model, where there is one, else about the argument `source`, where
    there is one.
    """
    options = {one.name: max(one.opts, key=len) for one in command.params if one.param_type_name == "option"}
    if "--model" in options.values():
        return options | {"weights": "--model"}
    arguments = {one.name for one in command.params if one.param_type_name == "argument"}
    return options | ({"weights": "source"} if "source" in arguments else {})


def spelt(text: str, options: dict[str, str]) -> str:
    """A library's error with names of fields replaced by options: its first words, and words in backquotes."""
    text = re.sub(r"`(\w+)`", lambda found: options.get(found[1], found[0]), text)
    begin = re.match(r"(\w+(?:, \w+)*):", text)
    if begin is None:
        return text
    words = [options.get(word, word) for word in begin[1].split(", ")]
    return ", ".join(words) + text[begin.end(1) :]


@contextmanager
def wrong_values(**options: str) -> Iterator[None]:
    """Turn a library's ValueError about an argument into a usage error; `options`: the arguments -> their options."""
    try:
        yield
    except LGNetError:
        raise
    except ValueError as error:
        argument, _, expected = str(error).partition(": ")
        if argument in options:
            raise typer.BadParameter(expected, param_hint=options[argument]) from None
        raise typer.BadParameter(str(error)) from None
