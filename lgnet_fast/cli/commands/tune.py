"""`lgnet-fast tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..application import command
from ..errors import wrong_values
from ..options import Batch, Device, Json, Model, Size, height_and_width
from ..output import show


@command()
def tune(
    seconds: Annotated[float, typer.Option(min=1, help="Nothing new is begun after so many.")] = 60,
    model: Model = None,
    name: Annotated[
        str | None, typer.Option(help="A network as create_model takes it, with random weights, in place of --model.")
    ] = None,
    size: Size = "256x256",
    batch: Batch = 1,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Attention forward and backward as training launches them, in place of the steps; NVIDIA GPUs only.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Measure every step's kernels on this machine, and keep the fastest for later runs of this network and size.

    Each candidate is checked before it is timed. Prints what every step had, what it has now, and the gain. What is
    measured is kept at once (`lgnet-fast info` shows where), so that an interrupted run loses little.

    With --training, give the size of the crops, the batch and the dtype (of autocast, if used) of the training.

    Exit code: 0 measured, 2 it could not start.
    """
    from ... import cache
    from ...engine.devices import resolve_device, resolve_dtype
    from ...jobs.tune import render, tune_training
    from ...jobs.tune import tune as tune_steps
    from ...reference import LGNet, create_model
    from ...weights import bundled_path

    if name is not None and model is not None:
        raise typer.BadParameter("takes the place of --model; leave one of the two out", param_hint="--name")
    sides = height_and_width(size)
    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)

    def tell(text: str) -> None:
        typer.echo(text, err=True)

    if not cache.can_keep():
        place = cache.folder()
        reason = "there is no home folder" if place is None else f"no file can be written in {place}"
        tell(f"warning: nothing is kept for later runs: {reason}")
    with wrong_values(name="--name", size="--size"):
        network = LGNet.from_pretrained(model or bundled_path()) if name is None else create_model(name).eval()
        report = (tune_training if training else tune_steps)(network, sides, batch, target, kind, seconds, tell)
    show(report, json, render, lambda r: r.as_dict())
