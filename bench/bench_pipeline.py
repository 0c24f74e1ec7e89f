"""Whole pictures, 8-bit in, 8-bit out, by `Inpainter`: every strategy and size, hole-aware and dense, and eager.

"ours" is the default `Inpainter`, which computes each layer only where a hole depends on it; "ours_dense" computes
everywhere; "eager" is the reference in plain PyTorch behind the same `Inpainter`, from 1024 pixels on only where it
takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest

from bench.bench_inference import model_of
from bench.timing import SMOKE
from lgnet_fast import Inpainter, optimize
from lgnet_fast.ops.torch_state import strict_float32

CASES = [
    (256, "full"),
    (512, "full"),
    (1024, "crop"),
    (1024, "tile"),
    (2048, "crop"),
    (2048, "tile"),
]
if SMOKE:
    CASES = [(256, "full"), (512, "crop")]
NETWORK = "lgnet_demo" if SMOKE else "lgnet"
# Eager's time is proportional to the network's pixels; two passes of these cases would take a minute.
WITHOUT_EAGER = [(1024, "tile"), (2048, "tile")]


def picture(side: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth colourful picture uint8 [side, side, 3] and its hole bool [side, side]: two scratches and a box, which
    have the same size in pixels from 512 on, like real blemishes."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((3, 1), (1, 4), (5, 2))]
    noise = np.random.default_rng(0).normal(0, 8, (side, side, 3))
    levels = np.clip(128 + 80 * np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)
    hole = np.zeros((side, side), dtype=bool)
    unit = min(side, 512) // 16
    at = side // 4
    hole[at : at + 4 * unit, at : at + unit // 4] = True
    hole[at : at + unit // 4, at : at + 4 * unit] = True
    box = 3 * side // 5
    hole[box : box + 2 * unit, box : box + 3 * unit] = True
    return levels, hole


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, dict[str, Inpainter]]]:
    """Pipelines by device, made once and freed with the module."""
    pipelines: dict[str, dict[str, Inpainter]] = {}
    yield pipelines
    pipelines.clear()


@pytest.fixture
def pipes(made: dict[str, dict[str, Inpainter]], device: str) -> dict[str, Inpainter]:
    """Contestants in float32."""
    if device not in made:
        model = model_of(NETWORK)
        options: dict[str, Any] = {"device": device, "dtype": "float32"}
        dense = optimize(model, device=device, dtype="float32", hole_aware=False)
        made[device] = {
            "ours": Inpainter(model, **options),
            "eager": Inpainter(model, backend="eager", **options),
            "ours_dense": Inpainter(dense, **options),
        }
    return made[device]


@pytest.mark.parametrize(("side", "strategy"), CASES, ids=lambda value: str(value))
def test_pipeline(
    side: int, strategy: str, device: str, pipes: dict[str, Inpainter], compete: Any, benchmark: Any
) -> None:
    levels, hole = picture(side)
    running = {
        name: partial(pipe, levels, hole, strategy=strategy)
        for name, pipe in pipes.items()
        if name != "eager" or device == "cuda" or (side, strategy) not in WITHOUT_EAGER
    }
    # On a GPU eager convolutions use TF32 by default, which changes some levels.
    with strict_float32() if device == "cuda" else nullcontext():
        results = {name: call() for name, call in running.items()}
    for name, result in results.items():
        assert result.shape == levels.shape
        assert np.array_equal(result[~hole], levels[~hole]), name  # known pixels are unchanged
        assert not np.array_equal(result[hole], levels[hole]), name
        difference = np.abs(result[hole].astype(int) - results["ours"][hole])
        # Hole-aware, dense and eager give one picture, except for float32's rounding at the boundary of two levels.
        assert difference.max() <= 1, name
        assert (difference == 0).mean() > 0.99, name
    summary = compete(running, "ours", rounds=8 if side < 1024 else 4, warmup=1, long_rounds=2)
    inpainted = pipes["ours"].inpaint(levels, hole, strategy=strategy)
    benchmark.extra_info.update(
        side=side,
        strategy=strategy,
        hole_ratio=round(inpainted.hole_ratio, 4),
        passes=inpainted.passes,
        megapixels_a_second=round(1e-3 * side**2 / summary["least_ms"]["ours"], 2),
    )
    print(side, strategy, summary)
