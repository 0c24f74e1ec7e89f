"""`lgnet-fast holes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..application import command
from ..options import path
from ..output import say


@command()
def holes(
    masks: Annotated[Path, typer.Option("-m", "--masks", parser=path, help="A mask, or a folder of them.")],
    polarity: Annotated[str, typer.Option(help="The colour of the hole: white or black.")] = "white",
) -> None:
    """Print each mask's hole ratio and class."""
    from ...jobs.holes import HolesOptions
    from ...jobs.holes import holes as measured

    for file, ratio, index in measured(HolesOptions(masks, polarity)):
        say(f"{file}: {100 * ratio:.1f} %, class {'none' if index is None else index}")
