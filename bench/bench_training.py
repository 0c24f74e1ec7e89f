"""A training step of LGNet: time and peak memory of the fused path against eager and compiled forms."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.training_step import DTYPES, FORMS, make_step, peak_bytes
from lgnet_fast import ops


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return "cuda" if request.node.get_closest_marker("gpu") else "cpu"


def peak_megabytes(form: str, dtype: str, batch: int, device: str) -> float:
    """Of one step beyond parameters, gradients and optimiser state; measured in a process of its own."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return peak_bytes(form, DTYPES[dtype], batch, device) / 1e6
    command = [sys.executable, "-m", "bench.training_step", form, dtype, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / 1e6


def compare(
    compete: Any, benchmark: Any, device: str, dtype: str, batch: int, forms: Sequence[str], measured: Sequence[str]
) -> None:
    """Time a step in `forms`, and the peak memory of those `measured`."""
    steps = {form: make_step(form, DTYPES[dtype], batch, device) for form in forms}
    ops.reset_calls()
    first = {form: step.run() for form, step in steps.items()}
    assert ops.calls()["attention_block", "triton" if device == "cuda" else "cpp"] == 3
    # Same weights, same batch: the first losses agree but for rounding.
    tolerance = 2e-3 if dtype == "fp32" else 0.1
    for form in forms:
        assert first[form]["G"].item() == pytest.approx(first["released"]["G"].item(), rel=tolerance), form
    summary = compete({form: step.run for form, step in steps.items()}, "ours", warmup=1, long_rounds=3)
    steps.clear()
    peaks = {form: round(peak_megabytes(form, dtype, batch, device), 1) for form in measured}
    report: dict[str, Any] = {"batch": batch, "peak_mb": peaks}
    if peaks:
        report["peak_of_released"] = round(peaks["ours"] / peaks["released"], 3)
        assert report["peak_of_released"] < 0.75
    benchmark.extra_info.update(report)
    print(dtype, batch, summary, report)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_step(dtype: str, compete: Any, benchmark: Any) -> None:
    """On a CPU torch.compile takes minutes, so it is compared once."""
    full = dtype == "fp32"
    eager = [form for form in FORMS if form != "compiled"]
    compare(compete, benchmark, "cpu", dtype, 2, FORMS if full else eager, eager if full else ())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("batch", [4, 32])
def test_training_step_gpu(batch: int, compete: Any, benchmark: Any) -> None:
    """The paper's batch, and one that fills a large GPU."""
    compare(compete, benchmark, "cuda", "bf16", batch, FORMS, FORMS)
