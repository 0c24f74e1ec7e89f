"""`lgnet-fast verify`."""

from __future__ import annotations

import typer

from ..application import command
from ..options import Device, Dtype, Json, Model
from ..output import show


@command()
def verify(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Check every kernel and the engine on this machine against plain PyTorch, anew, and print each error.

    On an NVIDIA GPU the verdicts are kept (`lgnet-fast info` shows them), and decide what later runs take.

    Exit code: 0 all as it should be, 1 something failed and something slower runs in its place, 2 it could not start.
    """
    from ...engine.devices import resolve_device, resolve_dtype
    from ...jobs.verify import render
    from ...jobs.verify import verify as run_checks
    from ...reference import LGNet
    from ...weights import bundled_path

    target = resolve_device(device)
    network = LGNet.from_pretrained(model or bundled_path())
    report = run_checks(network, target, resolve_dtype(dtype, target))
    show(report, json, render, lambda r: r.as_dict())
    raise typer.Exit(0 if report.passed else 1)
