"""`lgnet-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..application import command
from ..options import folder, refuse_file
from ..output import say


@command()
def demo(
    out: Annotated[Path, typer.Option("--output", "-o", parser=folder, help="Folder for the results.")] = Path(
        "demo_output"
    ),
) -> None:
    """Fill the bundled pictures with the bundled model; writes results and contact sheets.

    Exit code: 0 done, 2 it could not start.
    """
    from ...demo import run_demo
    from ...pipeline import Inpainter

    refuse_file("out", out)
    pipe = Inpainter.from_pretrained(None)
    say(f"ready after {pipe.warmup():.2f} s of warm-up")
    for item in run_demo(out, pipe):
        width, height = item.size
        say(f"{item.name}: {width}x{height} in {item.seconds:.2f} s -> {item.result}, {item.sheet}")
