"""A plan as a table: what each step does, costs and takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from .plan import Plan, Step

_ELEMENT = 4
"""Bytes of a feature or weight, for the traffic column; executors may store less."""


def traffic(plan: Plan, step: Step) -> int:
    """Bytes a step has to move at least: its source, its results and its weights, float32, once each."""
    source = plan.buffers[step.source.buffer]
    out = plan.buffers[step.stores[0].view.buffer]
    share = sum(r.area for r in step.regions) / (out.height * out.width)
    read = source.height * source.width * step.source.channels * (1 if step.kind == "attention" else share)
    written = out.height * out.width * step.out_channels * share * len(step.stores)
    return round(_ELEMENT * (plan.batch * (read + written) + step.weight.numel()))


def describe(executor: Any, plan: Plan, rounds: int) -> Table:
    """The table that :meth:`.engine.Engine.describe` returns.

    Args:
        executor: of the plan's sizes; where it has ``step_times(image, mask, regions)`` and ``choices``, the kernel
            and the least time of `rounds` runs are shown.
        plan: dense or restricted.
        rounds: at least 1.
    """
    measure: Callable[..., list[float]] | None = getattr(executor, "step_times", None)
    choices = getattr(executor, "choices", {})
    times: list[float] | None = None
    if measure is not None:
        image = torch.zeros(plan.batch, 3, plan.height, plan.width)
        mask = torch.ones_like(image[:, :1])
        runs = [measure(image, mask, [s.regions for s in plan.steps]) for _ in range(rounds)]
        times = [min(column) for column in zip(*runs, strict=True)]
    table = Table(title=f"{plan.batch} x 3 x {plan.height} x {plan.width}" + (", restricted" if plan.holes else ""))
    for name in ("step", "kind", "input", "output", "GFLOP", "MB", "kernel", "ms", "GFLOP/s"):
        table.add_column(name, justify="left" if name in ("step", "kind", "kernel") else "right")
    for number, step in enumerate(plan.steps):
        source, out = plan.buffers[step.source.buffer], plan.buffers[step.stores[0].view.buffer]
        gflop = 2e-9 * plan.macs(step)
        kind = step.kind if step.kind == "attention" else f"{step.kind} {step.kernel}x{step.kernel}/{step.stride}"
        row = [
            step.name,
            kind,
            f"{step.source.channels}x{source.height}x{source.width}",
            f"{step.out_channels}x{out.height}x{out.width}",
            f"{gflop:.3f}",
            f"{traffic(plan, step) / 1e6:.1f}",
            choices.get(step.name, "torch"),
        ]
        if times is not None:
            row += [f"{times[number]:.3f}", f"{1e3 * gflop / times[number]:.0f}" if times[number] > 0 else ""]
        table.add_row(*row)
    total = ["total", "", "", "", f"{2e-9 * plan.total_macs():.3f}", "", ""]
    if times is not None:
        total += [f"{sum(times):.2f}", f"{2e-6 * plan.total_macs() / sum(times):.0f}"]
    table.add_section()
    table.add_row(*total)
    return table
