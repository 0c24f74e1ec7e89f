"""The choice between the C++ executor and plain PyTorch on a CPU: the faster one, the same in every process.

The vectorised kernels of the executor were faster wherever they were measured. Its portable kernels (for other
processors, and compilers without GCC's extensions) may be slower, because PyTorch's libraries may have vectorised
kernels there. So both are timed once, stage by stage on one 256x256 picture, and the answer is kept in the user's
cache folder. Where nothing can be kept, PyTorch replaces portable kernels without a measurement: processes that each
measured might choose differently, and their pictures would differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import cache
from ...native import isa_name
from ...reference.lgnet import LGNet, LocalGlobalRefinement
from ..model_executor import ModelExecutor
from ..plan import Plan, Step
from . import tuning as cpu_tuning
from .executor import CpuExecutor

PORTABLE = "portable"
"""Name of the instruction set whose kernels may be slower than PyTorch's."""
SECONDS = 6.0
"""Longest duration of the measurement, where its cheapest stage takes no longer."""
_SIDE = 256


class Path(NamedTuple):
    """What runs a network on this CPU, and why."""

    runs: Literal["engine", "eager"]
    reason: str

    @classmethod
    def from_dict(cls, value: Any) -> Path | None:
        """From the form in the cache; None where `value` has another form."""
        try:
            return cls(value["runs"], str(value["reason"])) if value["runs"] in ("engine", "eager") else None
        except (TypeError, KeyError):
            return None

    def __str__(self) -> str:
        return f"{'the C++ executor' if self.runs == 'engine' else 'plain PyTorch'} ({self.reason})"


def entry_name(plan: Plan) -> str:
    """Name of the answer within its key of the cache."""
    return f"path {plan.digest}"


def choose_path(
    model: LGNet | LocalGlobalRefinement,
    plan: Plan,
    dtype: torch.dtype,
    compare: Callable[[LGNet | LocalGlobalRefinement, Plan, torch.dtype], tuple[float, float]] | None = None,
) -> Path:
    """Choose the executor or PyTorch.

    Args:
        model: with weights on the CPU.
        plan: of the model, with float32 weights on the CPU.
        dtype: float32 or bfloat16.
        compare: (model, plan, dtype) -> seconds of the C++ executor and of PyTorch; None: :func:`measured`.
    """
    name = entry_name(plan)
    kept = Path.from_dict(cache.get(cpu_tuning.key(dtype), cache.CHOICES, name))
    if kept is not None:
        return kept
    if isa_name() != PORTABLE:
        return Path("engine", f"kernels for {isa_name()}")
    if not cache.can_keep():
        return Path("eager", "portable kernels, and no measurement can be kept")
    return keep_path(plan, dtype, *(compare or measured)(model, plan, dtype))


def keep_path(plan: Plan, dtype: torch.dtype, engine: float, eager: float) -> Path:
    """The faster one of two measurements in seconds, unless another process has kept an answer before."""
    mine = _faster(engine, eager)
    kept = cache.put_first(cpu_tuning.key(dtype), cache.CHOICES, entry_name(plan), mine._asdict())
    return Path.from_dict(kept) or mine


def _faster(engine: float, eager: float) -> Path:
    reason = f"{1e3 * engine:.0f} ms by the C++ executor, {1e3 * eager:.0f} ms by PyTorch"
    return Path("engine" if engine <= eager else "eager", reason)


def measured(
    model: LGNet | LocalGlobalRefinement,
    plan: Plan,
    dtype: torch.dtype,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds of the C++ executor and of PyTorch for the same stages of a model, each the faster of two runs.

    Stages are timed one by one, the cheapest first, until the next one is expected to end after `seconds`. Their
    weights are those of the plan, because folding takes longer than the runs.
    """
    begin = clock()
    device = torch.device("cpu")
    networks = ModelExecutor(model, device, dtype, "eager").networks
    stages: list[tuple[int, int, Plan, Callable[[Tensor], Tensor]]] = []
    for own, network in zip(_stages(plan), networks, strict=True):
        stages.append((own.total_macs(), len(stages), own, network))
    # All is hole, which the executor paints white for the first stage that it has.
    image = torch.ones(1, 3, _SIDE, _SIDE, device="cpu", dtype=torch.float32)
    mask = torch.ones_like(image[:, :1])
    picture = torch.cat((image, mask), dim=1).to(dtype)
    total = [0.0, 0.0]
    spent, done = 0.0, 0
    for macs, _, own, network in sorted(stages, key=lambda stage: stage[:2]):
        if done and clock() - begin + spent * macs / done > seconds:
            break
        started = clock()
        executor = CpuExecutor.of(own, dtype)
        total[0] += _seconds(partial(executor.run, image, mask), clock)
        total[1] += _seconds(partial(network, picture), clock)
        spent += clock() - started
        done += macs
    return total[0], total[1]


def _stages(plan: Plan) -> list[Plan]:
    """Each stage of a plan as a plan of one picture of 256x256."""
    small = plan.resized(1, _SIDE, _SIDE)
    stages: list[Plan] = []
    steps: list[Step] = []
    for step in small.steps:
        steps.append(replace(step, weights_of=step.name))  # another stage may have the same
        if step.merges:
            stages.append(replace(small, steps=tuple(steps)))
            steps = []
    return stages


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the faster of two calls."""
    times = []
    for _ in range(2):
        begin = clock()
        call()
        times.append(clock() - begin)
    return min(times)


def tune(
    model: LGNet | LocalGlobalRefinement,
    plan: Plan,
    dtype: torch.dtype,
    seconds: float = cpu_tuning.SECONDS,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[cpu_tuning.Measured, Path]:
    """Measure the kernels of every step, then the whole run and PyTorch's, and keep both answers.

    Args:
        model, plan, dtype: see :func:`choose_path`; the plan has float32 weights.
        seconds, progress: see :func:`.tuning.tune`.
    """
    found = cpu_tuning.tune(plan, dtype, seconds, progress)
    executor = ModelExecutor(model, torch.device("cpu"), dtype, "eager")
    image = torch.zeros(plan.batch, 3, plan.height, plan.width, dtype=torch.float32, device="cpu")
    eager = _seconds(partial(executor.run, image, torch.ones_like(image[:, :1])), time.perf_counter)
    progress(f"PyTorch, a run of {1e3 * eager:.1f} ms")
    engine = 1e-3 * (found.total_ms or 0.0)
    cache.put(cpu_tuning.key(dtype), cache.CHOICES, entry_name(plan), _faster(engine, eager)._asdict())
    return found, _faster(engine, eager)
