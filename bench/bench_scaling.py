"""How the cost grows with the picture's area, the batch and the hole; and the roofline of each step.

Slopes are fitted by least squares in log-log: cost = constant * size ** slope.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.bench_inference import model_of
from bench.timing import SMOKE
from lgnet_fast import optimize
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.describe import measure_peaks, traffic

NETWORK = "lgnet_demo" if SMOKE else "lgnet"
SIDES = (256, 512) if SMOKE else (256, 512, 768)
BATCHES = (1, 2) if SMOKE else (1, 2, 4, 8)
HOLES = (0.05, 0.5) if SMOKE else (0.01, 0.03, 0.06, 0.125, 0.25, 0.5, 0.75)
TOLERANCE = 2e-3


@pytest.fixture
def device() -> str:
    """The engine of the plan's steps; larger pictures and batches on a GPU are in bench_inference."""
    return "cpu"


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(NETWORK)


def slope(sizes: Any, costs: Any) -> dict[str, float | None]:
    """Slope of log(cost) over log(size), and its standard error (None for two points)."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
    gradient, offset = np.polyfit(x, y, 1)
    residual = float(((y - gradient * x - offset) ** 2).sum())
    error = (residual / (len(x) - 2) / ((x - x.mean()) ** 2).sum()) ** 0.5 if len(x) > 2 else None
    return {"slope": round(float(gradient), 3), "standard_error": None if error is None else round(float(error), 3)}


def picture(batch: int, side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((batch, 3, side, side), generator=generator) * 2 - 1
    mask = torch.zeros(batch, 1, side, side)
    mask[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    return image, mask


def eager(model: Any, image: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(image, mask)


def grow(
    contest: dict[str, list[tuple[int, Tensor, Tensor]]], runners: dict[str, Any], compete: Any, rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time every runner on its (size, image, mask); returns the summary, and the slope of each runner in size."""
    running: dict[str, Any] = {}
    results: dict[int, Any] = {}
    for name, cases in contest.items():
        for size, image, mask in cases:
            running[f"{name}_{size}"] = lambda run=runners[name], image=image, mask=mask: run(image, mask)
            result = running[f"{name}_{size}"]()
            assert (result - results.setdefault(size, result)).abs().max() < TOLERANCE, (name, size)
    first = f"ours_{contest['ours'][0][0]}"
    summary = compete(running, first, rounds=rounds, warmup=1, long_rounds=2)
    fits = {}
    for name, cases in contest.items():
        sizes = [size for size, _, _ in cases]
        fits[name] = slope(sizes, [summary["least_ms"][f"{name}_{size}"] for size in sizes])
    return summary, fits


def test_resolution(model: Any, compete: Any, benchmark: Any) -> None:
    """The slope in the length of the side: 2 is proportional to the area; attention's products have 4."""
    engine = optimize(model, device="cpu", dtype="float32", hole_aware=False)
    cases = {side: picture(1, side) for side in SIDES}
    contest = {
        "ours": [(side, *cases[side]) for side in SIDES],
        "eager": [(side, *cases[side]) for side in SIDES],
    }
    runners = {"ours": engine, "eager": lambda *pair: eager(model, *pair)}
    summary, fits = grow(contest, runners, compete, rounds=4)
    macs = [engine.plan.resized(1, side, side).total_macs() for side in SIDES]
    benchmark.extra_info.update(size="side", slopes=fits | {"multiply_accumulates": slope(SIDES, macs)})
    print(summary, benchmark.extra_info["slopes"])


def test_batch(model: Any, compete: Any, benchmark: Any) -> None:
    """The slope in the batch: 1 is proportional; below 1, a larger batch is cheaper per picture."""
    engine = optimize(model, device="cpu", dtype="float32", hole_aware=False)
    cases = {batch: picture(batch, 256) for batch in BATCHES}
    contest = {
        "ours": [(batch, *cases[batch]) for batch in BATCHES],
        "eager": [(batch, *cases[batch]) for batch in BATCHES[:3]],
    }
    runners = {"ours": engine, "eager": lambda *pair: eager(model, *pair)}
    summary, fits = grow(contest, runners, compete, rounds=5)
    benchmark.extra_info.update(size="batch", slopes=fits)
    print(summary, fits)


def square_holes(ratio: float, side: int, count: int) -> Tensor:
    """A mask [1, 1, side, side] with `ratio` of its pixels hole: one centred square, or count x count of them."""
    mask = torch.zeros(1, 1, side, side)
    cell = side // count
    width = round(ratio**0.5 * cell)
    for row in range(count):
        for column in range(count):
            top, left = row * cell + (cell - width) // 2, column * cell + (cell - width) // 2
            mask[..., top : top + width, left : left + width] = 1
    return mask


def test_hole_ratio(model: Any, compete: Any, benchmark: Any) -> None:
    """Hole-aware against dense runs by hole ratio: one square (the best case), and 2 x 2 squares."""
    dense = optimize(model, device="cpu", dtype="float32", hole_aware=False)
    aware = optimize(model, device="cpu", dtype="float32")
    image = picture(1, 256)[0]
    running: dict[str, Any] = {"ours": lambda: dense(image, square_holes(1, 256, 1))}
    ratios = {}
    for kind, count in (("square", 1), ("squares", 2)):
        for ratio in HOLES:
            mask = square_holes(ratio, 256, count)
            name = f"ours_{kind}_{ratio}"
            running[name] = lambda mask=mask: aware(image, mask)
            ratios[name] = round(mask.mean().item(), 4)
            assert (running[name]() - dense(image, mask)).abs().max() < 1e-4, name
    running["eager"] = lambda: eager(model, image, square_holes(1, 256, 1))
    assert (running["eager"]() - running["ours"]()).abs().max() < TOLERANCE
    summary = compete(running, "ours", rounds=8)
    slower = summary["times_slower_than_ours"]
    faster = {name: round(1 / slower[name], 3) for name in ratios}
    benchmark.extra_info.update(hole_ratios=ratios, times_faster_than_dense=faster)
    print(summary, faster)


def test_roofline(model: Any, compete: Any, benchmark: Any) -> None:
    """Operations, bytes and milliseconds of every step of the plan, with the measured peaks of the machine."""
    plan = build_plan(plan_stages(model), 1, 256, 256)
    executor = CpuExecutor.of(plan, torch.float32)
    image, mask = picture(1, 256)
    running = {"ours": lambda: executor.run(image, mask)[0], "eager": lambda: eager(model, image, mask)}
    assert (running["ours"]() - running["eager"]()).abs().max() < TOLERANCE
    summary = compete(running, "ours", rounds=10)
    roofs = measure_peaks()
    peaks = {"gflops": round(2e-9 * roofs.macs, 1), "gigabytes_a_second": round(1e-9 * roofs.bytes, 2)}
    runs = [executor.step_times(image, mask, None, 1) for _ in range(2 if SMOKE else 10)]
    steps = [
        [step.name, round(2e-9 * plan.macs(step), 4), round(1e-6 * traffic(plan, step), 3), round(min(times), 4)]
        for step, times in zip(plan.steps, zip(*runs))
    ]
    benchmark.extra_info.update(peaks=peaks, columns=["step", "GFLOP", "MB", "ms"], steps=steps)
    assert sum(step[1] for step in steps) == pytest.approx(2e-9 * plan.total_macs(), rel=1e-2)
    # Steps can exceed the roof of float32: Winograd multiplies at most four times less, matrix tiles bf16 parts.
    # Other processes may slow the measurement of the roof, so the times of a smoke run are not checked.
    most = 2e-12 * max(4 * roofs.macs, roofs.pair_macs / 3)  # GFLOP in a millisecond
    assert SMOKE or all(gflop / ms < most for _, gflop, _, ms in steps if ms > 0.1)
    print(summary, peaks)
