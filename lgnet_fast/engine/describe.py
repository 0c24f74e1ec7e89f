"""A plan as a table: each step, its cost and its time, beside the least time that this machine needs for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import forks
from ..native import library
from .cpu.kernels import Choice, Products
from .cuda.graphs import elapsed_ms
from .executor import Executor
from .plan import AttentionStep, ConvStep, Plan, Step

if TYPE_CHECKING:
    from rich.table import Table

_ELEMENT = 4
"""Bytes per feature or weight in the traffic column; executors may store fewer."""


def traffic(plan: Plan, step: Step) -> int:
    """Least bytes that a step must move: source, results and weights, float32, once each."""
    source, out = plan.source(step), plan.target(step)
    share = sum(r.area for r in step.regions) / (out.height * out.width)
    read = source.height * source.width * step.source.channels * (1 if isinstance(step, AttentionStep) else share)
    written = out.height * out.width * step.out_channels * share * len(step.stores)
    return round(_ELEMENT * (plan.batch * (read + written) + step.weight.numel()))


class Peaks(NamedTuple):
    """Peak rates of this CPU on PyTorch's threads, or of a GPU.

    Multiply-accumulates per second in float32 (on a GPU: in the dtype of the computation) and of bfloat16 pairs (0
    without such products), and bytes per second of a copy, read and written."""

    macs: float
    pair_macs: float
    bytes: float

    def floor(self, macs: float, traffic: float, products: Products) -> float:
        """Least seconds of a step by its direct arithmetic and its least traffic. Winograd's transforms multiply
        less, so a step may be faster."""
        rate = {"float32": self.macs, "bf16": self.pair_macs, "bf16x3": self.pair_macs / 3}[products]
        return max(macs / rate, traffic / self.bytes)


def measure_peaks() -> Peaks:
    """Measure the peaks of the CPU: products that stay in registers, and a copy of 128 MB, larger than the caches.

    The best of ten, a fraction of a second in all. Needs the C++ extension. A large matrix product would measure its
    library, which can reach less than half of the machine's rate.
    """
    rounds, threads = 1_000_000, forks.kernel_threads()

    def best(call: Callable[[], float]) -> float:
        rates = []
        for _ in range(10):
            begin = time.perf_counter()
            amount = call()
            rates.append(amount / (time.perf_counter() - begin))
        return max(rates)

    source = torch.ones(1 << 25, dtype=torch.float32, device="cpu")
    target = torch.empty_like(source)
    return Peaks(
        macs=best(lambda: library().multiply_adds(False, rounds, threads)),
        pair_macs=best(lambda: library().multiply_adds(True, rounds, threads)),
        bytes=best(lambda: target.copy_(source).nbytes + source.nbytes),
    )


def measure_gpu_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure the peaks of a GPU: the best of ten products of 4096 x 4096 in `dtype`, and of ten copies of 256 MB."""
    with torch.cuda.device(device), torch.inference_mode():
        side = 4096
        a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        source = torch.ones(1 << 26, dtype=torch.float32, device=device)
        target = torch.empty_like(source)

        def best(call: Callable[[], object], amount: float) -> float:
            return max(1e3 * amount / elapsed_ms(call, device) for _ in range(10))

        macs = best(lambda: torch.mm(a, b), side**3)
        return Peaks(macs, 0.0, best(lambda: target.copy_(source), 2 * source.nbytes))


def describe(executor: Executor, plan: Plan, rounds: int) -> Table:
    """The table that :meth:`.engine.Engine.describe` returns.

    Args:
        executor: of the plan's sizes; where it can time its steps, the least time of `rounds` runs and its share of
            the floor (:class:`Peaks`) are shown.
        plan: dense or restricted.
        rounds: at least 1.
    """
    from rich.table import Table  # here, because it takes a fifth of the time to import an Inpainter

    on_gpu = executor.device.type == "cuda"
    image = torch.zeros(plan.batch, 3, plan.height, plan.width, dtype=torch.float32, device=executor.device)
    mask = torch.ones_like(image[:, :1])
    regions = None if plan.holes is None else [s.regions for s in plan.steps]
    times = executor.step_times(image, mask, regions, rounds)
    choices = executor.choices
    peaks = None
    if times is not None:
        peaks = measure_gpu_peaks(executor.device, executor.dtype) if on_gpu else measure_peaks()
    # a GPU's feature maps and weights are in the dtype that it computes in
    stored = executor.dtype.itemsize / _ELEMENT if on_gpu else 1.0
    floors = 0.0
    title = f"{plan.batch} x 3 x {plan.height} x {plan.width}" + (", restricted" if plan.holes else "")
    table = Table(title=title + (f"; kernels chosen by {executor.chosen_by}" if choices else ""))
    for name in ("step", "kind", "input", "output", "GFLOP", "MB", "kernel", "ms", "GFLOP/s", "floor"):
        table.add_column(name, justify="left" if name in ("step", "kind", "kernel") else "right")
    for number, step in enumerate(plan.steps):
        source, out = plan.source(step), plan.target(step)
        gflop = 2e-9 * plan.macs(step)
        kind = step.kind
        if isinstance(step, ConvStep):
            kind += f" {step.geometry.kernel}x{step.geometry.kernel}/{step.geometry.stride}"
        row = [
            step.name,
            kind,
            f"{step.source.channels}x{source.height}x{source.width}",
            f"{step.out_channels}x{out.height}x{out.width}",
            f"{gflop:.3f}",
            f"{traffic(plan, step) / 1e6:.1f}",
            choices.get(step.name, "torch"),
        ]
        if times is not None and peaks is not None:
            products: Products = "float32" if on_gpu or not choices else Choice.parse(choices[step.name]).products
            floor = 1e3 * peaks.floor(plan.macs(step), stored * traffic(plan, step), products)
            floors += floor
            row.append(f"{times[number]:.3f}")
            row += [f"{1e3 * gflop / times[number]:.0f}", f"{floor / times[number]:.0%}"] if times[number] > 0 else []
        table.add_row(*row)
    total = ["total", "", "", "", f"{2e-9 * plan.total_macs():.3f}", "", ""]
    if times is not None:
        total += [f"{sum(times):.2f}", f"{2e-6 * plan.total_macs() / sum(times):.0f}", f"{floors / sum(times):.0%}"]
    table.add_section()
    table.add_row(*total)
    return table
