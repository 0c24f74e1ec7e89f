"""A training step of LGNet: time and peak memory of the fused path against eager and compiled forms."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.training_step import DTYPES, FORMS, make_step, peak_bytes
from lgnet_fast import ops


def peak_megabytes(form: str, dtype: str, batch: int, device: str) -> float:
    """Of one step beyond parameters, gradients and optimiser state; measured in a process of its own."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return peak_bytes(form, DTYPES[dtype], batch, device) / 1e6
    done = subprocess.run(
        [sys.executable, "-m", "bench.training_step", form, dtype, str(batch)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / 1e6


def compare(compete: Any, benchmark: Any, device: str, dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    steps = {form: make_step(form, DTYPES[dtype], batch, device) for form in FORMS}
    ops.reset_calls()
    first = {form: step.run() for form, step in steps.items()}
    fused = "triton" if device == "cuda" else "cpp"
    assert ops.calls()["attention_block", fused] == 3
    # Same weights, same batch: the first losses agree but for rounding.
    tolerance = 2e-3 if dtype == "fp32" else 0.1
    for form in FORMS:
        assert first[form]["G"].item() == pytest.approx(first["released"]["G"].item(), rel=tolerance), form
    summary = compete({form: step.run for form, step in steps.items()}, "ours", rounds)
    steps.clear()
    peaks = {form: round(peak_megabytes(form, dtype, batch, device), 1) for form in FORMS}
    report = {
        "batch": batch,
        "peak_mb": peaks,
        "peak_of_released": round(peaks["ours"] / peaks["released"], 3),
    }
    benchmark.extra_info.update(report)
    print(dtype, batch, summary, report)
    return summary


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_step(dtype: str, compete: Any, benchmark: Any) -> None:
    compare(compete, benchmark, "cpu", dtype, 2, rounds=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("batch", [4, 32])
def test_training_step_gpu(batch: int, compete: Any, benchmark: Any) -> None:
    """The paper's batch, and one that fills a large GPU."""
    compare(compete, benchmark, "cuda", "bf16", batch, rounds=8)
