"""`lgnet-fast tune`: measure the kernels of every step, or of training, on this machine, and report the gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table

from .. import cache
from ..engine.build import build_plan, plan_stages
from ..engine.cpu import path as cpu_path
from ..engine.cpu import tuning as cpu_tuning
from ..engine.cuda import tuning as cuda_tuning
from ..engine.cuda import tuning_training as cuda_tuning_training
from ..engine.cuda.executor import CudaExecutor
from ..engine.cuda.measure import Timer, progress_of
from ..engine.cuda.verified import verified
from ..engine.making import fast_executor_reason
from ..engine.plan import Plan
from ..errors import BackendError
from ..reference.lgnet import LGNet, LocalGlobalRefinement


class Row(NamedTuple):
    """One step: its kernel without tuning, its kernel now, and the microseconds of both (NaN: not measured)."""

    step: str
    before: str
    before_us: float
    now: str
    now_us: float

    @property
    def gain(self) -> float:
        """Ratio of the time before to the time now; 1 where nothing was measured."""
        return self.before_us / self.now_us if self.now_us > 0 else 1.0


class Report(NamedTuple):
    """Results of tuning: every step, and milliseconds of a whole run before and now (None: not measured)."""

    key: cache.Key
    rows: tuple[Row, ...]
    before_ms: float | None
    now_ms: float | None
    runs: str

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [{n: None if v != v else v for n, v in row._asdict().items()} for row in self.rows]
        return {
            "key": asdict(self.key),
            "steps": rows,
            "before_ms": self.before_ms,
            "now_ms": self.now_ms,
            "runs": self.runs,
        }


def tune(
    model: LGNet | LocalGlobalRefinement,
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure the kernels of a model's steps on `device` in `dtype`, and keep the fastest.

    Args:
        model: with weights anywhere.
        size, batch: of the pictures; height and width multiples of 256.
        device, dtype: of the engine.
        seconds: no new measurement begins after this time.
        progress: called with lines of progress.

    Raises:
        BackendError: there is no executor for the device and dtype, so there is nothing to tune.
        ValueError: a size that is no multiple of 256.
    """
    _check_size(model, size)
    if device.type == "cuda":  # the kernels alone have choices, not PyTorch's operators in their place
        reason = CudaExecutor.unavailable_reason(device, dtype)
    else:
        reason = fast_executor_reason(device, dtype)
    if reason is not None:
        raise BackendError(f"there is nothing to tune: {reason}")
    with torch.inference_mode(False), torch.no_grad():
        plan = build_plan(plan_stages(model), batch, *size).to(device, torch.float32)
        if device.type == "cpu":
            found, path = cpu_path.tune(model, plan, dtype, seconds, progress)
            rows = tuple(
                Row(name, before, 1e3 * before_ms, now, 1e3 * now_ms)
                for name, before, before_ms, now, now_ms in cpu_tuning.gains(plan, dtype, found)
            )
            return Report(cpu_tuning.key(dtype), rows, found.model_ms, found.total_ms, str(path))
        measured = cuda_tuning.tune(plan, dtype, device, seconds, progress)
        rows = tuple(Row(*row) for row in cuda_tuning.gains(plan, dtype, device, measured))
        verdict = verified(model, plan, device, dtype)[1]
        key = cache.key_for(device, dtype)
        return Report(key, rows, measured.before_ms, measured.now_ms, str(verdict))


def tune_training(
    model: LGNet | LocalGlobalRefinement,
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure attention forward and backward at a model's sizes, and keep the fastest shapes for training.

    Args:
        model, size, batch: from which the sizes of the attention blocks follow; see :func:`tune`.
        device, dtype: in which training computes attention; float16 and bfloat16 under autocast.
        seconds, progress: see :func:`tune`.

    Raises:
        BackendError: the kernels cannot run on the device or in the dtype.
        ValueError: a size that is no multiple of 256.
    """
    _check_size(model, size)
    if device.type != "cuda":
        raise BackendError(f"there is nothing to tune for training: its kernels run on NVIDIA GPUs, not on {device}")
    reason = CudaExecutor.unavailable_reason(device, dtype)
    if reason is not None:
        raise BackendError(f"there is nothing to tune for training: {reason}")
    return training_report(build_plan(plan_stages(model), batch, *size), device, dtype, seconds, progress)


def training_report(
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    progress: Callable[[str], None],
    timer: Timer | None = None,
    tried: int | None = None,
) -> Report:
    """Measure attention forward and backward of a plan; see :func:`..engine.cuda.tuning_training.tune_training`."""
    blocks = cuda_tuning_training.blocks_of(plan, dtype, device)
    log = progress_of(progress)
    found = cuda_tuning_training.tune_training(blocks, dtype, device, seconds, log, timer, tried)
    rows = [
        Row(f"{one.step} {op}", _shape(result.default), result.default_us, _shape(result.shape), result.us)
        for one, measured in zip(blocks, found)
        for op, result in measured.operations.items()
    ]
    whole = [(one.before_us, one.now_us) for one in found if one.before_us is not None and one.now_us is not None]
    complete = bool(found) and len(whole) == len(found)
    before_ms, now_ms = (1e-3 * sum(times) for times in zip(*whole)) if complete else (None, None)
    return Report(cache.key_for(device, dtype), tuple(rows), before_ms, now_ms, "attention forward and backward")


def _shape(shape: tuple[int, ...]) -> str:
    m, n, warps, stages = shape
    return f"{m}x{n} w{warps} s{stages}"


def _check_size(model: LGNet | LocalGlobalRefinement, size: tuple[int, int]) -> None:
    if min(size) < 1 or size[0] % model.size_multiple or size[1] % model.size_multiple:
        raise ValueError(f"size: expected positive multiples of {model.size_multiple}, got {size[0]}x{size[1]}")


def render(report: Report) -> Group:
    """As a table for a terminal."""
    table = Table(title=f"{report.key.card}, {report.key.dtype}")
    for heading in ("step", "without tuning", "us", "measured", "us", "gain"):
        table.add_column(heading, overflow="fold")  # names of steps differ at their ends

    def us(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.1f}"

    for row in report.rows:
        table.add_row(
            row.step,
            row.before,
            us(row.before_us),
            row.now,
            us(row.now_us),
            "" if math.isnan(row.now_us) else f"{row.gain:.2f}x",
        )
    last = f"runs: {report.runs}"
    if report.before_ms and report.now_ms:
        whole = f"a run: {report.before_ms:.3f} ms without tuning, {report.now_ms:.3f} ms now"
        last = f"{whole} ({report.before_ms / report.now_ms:.2f}x)\n{last}"
    return Group(table, last)
