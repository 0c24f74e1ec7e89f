"""`lgnet-fast flops`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..application import command
from ..checkout import from_checkout
from ..errors import wrong_values
from ..options import Batch, Json, Size, height_and_width
from ..output import show


@command()
def flops(
    model: Annotated[str, typer.Option(help="A name as create_model takes it.")] = "lgnet",
    size: Size = "256x256",
    batch: Batch = 1,
    peers: Annotated[
        bool, typer.Option("--peers", help="The paper's whole Table IV and X_LG instead; in a checkout only.")
    ] = False,
    json: Json = False,
) -> None:
    """Print parameters and FLOPs, by the paper's rule and true, stage by stage, beside the paper's own figures.

    Exit code: 0 done, 2 it could not start.
    """
    from ...counting import count, render

    if peers:
        if (model, size, batch) != ("lgnet", "256x256", 1):
            raise typer.BadParameter(
                "Table IV has its own models at 256x256, batch 1; leave --model, --size and --batch out",
                param_hint="--peers",
            )
        complexity = from_checkout("bench.complexity")
        show(complexity.rows(), json, complexity.render, complexity.as_dict)
        return
    sides = height_and_width(size)
    with wrong_values(name="--model", size="--size"):
        report = count(model, sides, batch)
    show(report, json, render, lambda r: r.as_dict())
