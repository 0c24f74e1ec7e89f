"""`lgnet-fast train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..application import command
from ..output import say


@command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML or JSON file; configs/ has examples.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest checkpoint, if there is one.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.NAME=VALUE, put over the file's, e.g. optim.steps=100; repeatable."),
    ] = None,
) -> None:
    """Train a model.

    Over N processes: `accelerate launch --multi_gpu --num_processes N -m lgnet_fast train ...`; on CPUs the same,
    with --multi_gpu: with --cpu in its place accelerate starts one process only.

    Ctrl-C and SIGTERM end it after the current step, with a checkpoint.

    Exit code: 0 trained, 1 stopped by a signal, 2 it could not start or go on.
    """
    from ...training.config import load_config
    from ...training.trainer import train as run

    # model.factory and loss.features may name a module beside which the command is called: `python -m` finds it, a
    # script that an installation makes does not.
    sys.path.append(os.getcwd())
    model = run(load_config(config, change or []), resume)
    if model is None:
        raise typer.Exit(1)
    if os.environ.get("RANK", "0") == "0":
        say(f"model: {model}")
