"""A training step of LGNet: time and peak memory of the fused path against eager and compiled forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.conftest import marked_device
from bench.training_step import DTYPES, FORMS, GRAPHS, Memory, Step, make_step, memory_of
from lgnet_fast import ops
from lgnet_fast.ops.cpu.attention import slower_attention
from lgnet_fast.ops.torch_state import has_fast_bfloat16
from lgnet_fast.training.graphed import DIRECT

device = pytest.fixture(marked_device)


def measured_memory(form: str, dtype: str, batch: int, device: str) -> Memory:
    """Peak memory of one step; on a CPU measured in a separate process."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return memory_of(form, DTYPES[dtype], batch, device)
    command = [sys.executable, "-m", "bench.training_step", form, dtype, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def captured(step: Step) -> bool:
    """Run a step until its graphs are captured, before the clock starts; False: it runs without them."""
    for _ in range(DIRECT):
        step.run()
    return step.graphed is not None and step.graphed.uses_graphs


def compare(
    compete: Any, benchmark: Any, device: str, dtype: str, batch: int, forms: Sequence[str], measured: Sequence[str]
) -> None:
    """Time a step in `forms`, and the peak memory of those `measured`."""
    if device == "cpu" and (reason := slower_attention(torch.empty(1, dtype=DTYPES[dtype]))) is not None:
        pytest.skip(reason)
    if device == "cpu" and dtype == "bf16" and not has_fast_bfloat16():
        pytest.skip("PyTorch's convolutions in bfloat16 would take hours here")
    steps = {form: make_step(form, DTYPES[dtype], batch, device) for form in forms}
    ops.reset_calls()
    first = {form: step.run() for form, step in steps.items()}
    fused = 3 * sum(form in ("ours", GRAPHS) for form in forms)
    assert ops.calls()["attention_block", "triton" if device == "cuda" else "cpp"] == fused
    # Same weights, same batch: the first losses agree up to rounding.
    tolerance = 2e-3 if dtype == "fp32" else 0.1
    for form in forms:
        assert first[form]["G"].item() == pytest.approx(first["released"]["G"].item(), rel=tolerance), form
    graphs = {form: captured(step) for form, step in steps.items() if step.graphed is not None}
    summary = compete({form: step.run for form, step in steps.items()}, "ours", warmup=1, long_rounds=3)
    steps.clear()
    peaks = {form: round(measured_memory(form, dtype, batch, device).step / 1e6, 1) for form in measured}
    report: dict[str, Any] = {"batch": batch, "peak_mb": peaks}
    if graphs:
        report["graphs"] = graphs
    if peaks:
        report["peak_of_released"] = round(peaks["ours"] / peaks["released"], 3)
        assert report["peak_of_released"] < 0.75
    benchmark.extra_info.update(report)
    print(dtype, batch, summary, report)


EAGER = [form for form in FORMS if form != "compiled"]
"""On a CPU torch.compile takes minutes, so it is compared with --bench-full only."""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_step(dtype: str, compete: Any, benchmark: Any) -> None:
    compare(compete, benchmark, "cpu", dtype, 2, EAGER, ("released", "ours") if dtype == "fp32" else ())


@pytest.mark.full
def test_training_step_compiled(compete: Any, benchmark: Any) -> None:
    compare(compete, benchmark, "cpu", "fp32", 2, FORMS, EAGER)


@pytest.mark.full
def test_training_step_batch_4(compete: Any, benchmark: Any) -> None:
    """The paper's batch, and the largest that fits this machine's memory, estimated from the peaks of 2 and 4."""
    compare(compete, benchmark, "cpu", "fp32", 4, EAGER, EAGER)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    largest = {}
    for form in EAGER:
        two = measured_memory(form, "fp32", 2, "cpu")
        a_picture = (1e6 * benchmark.extra_info["peak_mb"][form] - two.step) / 2
        assert a_picture > 0
        largest[form] = int((memory - two.standing - two.step) / a_picture) + 2
    assert largest["ours"] > largest["released"]
    benchmark.extra_info.update(memory_gb=round(memory / 1e9, 1), largest_batch=largest)
    print(largest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("batch", [4, 32])
def test_training_step_gpu(batch: int, compete: Any, benchmark: Any) -> None:
    """The paper's batch, and one that fills a large GPU."""
    compare(compete, benchmark, "cuda", "bf16", batch, (*FORMS, GRAPHS), FORMS)
