"""The Typer application, and how a command is declared."""

from __future__ import annotations

import inspect
import re
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..version import __version__
from .errors import one_line_errors, plain_warnings
from .interrupts import interrupted
from .output import shown_waits

app = typer.Typer(
    name="lgnet-fast",
    help="LGNet image inpainting, made fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class _Command(TyperCommand):
    """A command that loads PyTorch when it runs, not for its help, and whose errors become one line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Typer keeps a docstring's line ends, which are those of another width than the terminal's.
        self.help = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.cleandoc(self.help or ""))

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors(self), plain_warnings(), shown_waits():
            # `import lgnet_fast` leaves them out for the command line.
            import_module("lgnet_fast.ops")
            if interrupted():
                raise KeyboardInterrupt
            return super().invoke(ctx)


command = partial(app.command, cls=_Command)
"""The decorator of a command's function, ``@command()`` or ``@command("name")``.

Parameters of the function are the fields of the command's dataclass of options, by the same names: an error "size:
expected ..." then shows the option's name, whatever that is.
"""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lgnet-fast {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LGNet image inpainting, made fast."""
