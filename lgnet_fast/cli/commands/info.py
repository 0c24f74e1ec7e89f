"""`lgnet-fast info`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..application import command
from ..errors import wrong_values
from ..options import Json
from ..output import draw, show


@command()
def info(
    json: Json = False,
    plan: Annotated[str | None, typer.Option(help="Print the engine's plan of this model, measured here.")] = None,
) -> None:
    """Print versions, devices, and which backends run here, or why not.

    Exit code: 0 done, 2 it could not start.
    """
    from ...info import collect, render

    if plan is None:
        show(collect(), json, render)
        return
    if json:
        raise typer.BadParameter("is without effect on --plan, a table; leave it out", param_hint="--json")
    from ...engine import optimize
    from ...reference import create_model

    with wrong_values(name="--plan"):
        model = create_model(plan)
    draw(optimize(model, device="cpu").describe(), width=140)
