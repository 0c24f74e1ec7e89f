"""`lgnet-fast verify`: repeat every check of the kernels and the engine on this machine, with errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from .. import cache
from ..engine.build import build_plan, plan_stages
from ..engine.cpu.executor import CpuExecutor
from ..engine.cpu.path import choose_path
from ..engine.cpu.tuning import kept
from ..engine.cuda.checks import judge, make_example
from ..engine.cuda.verdicts import Check
from ..engine.cuda.verified import recheck_steps, verified
from ..engine.making import fast_executor_reason
from ..engine.plan import AttentionStep, Plan
from ..ops import first_use
from ..ops.dispatch import CANDIDATES, reason_against
from ..ops.registry import OPERATORS
from ..reference.lgnet import LGNet, LocalGlobalRefinement

SIZE = 256


class Report(NamedTuple):
    """Results of `verify`: the checks in order, and the path that the network takes."""

    key: cache.Key
    checks: tuple[Check, ...]
    runs: str
    passed: bool
    """Whether all checks passed: every operator by its kernel, the network by the fastest path."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "key": asdict(self.key),
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "runs": self.runs,
            "passed": self.passed,
        }


def verify(
    model: LGNet | LocalGlobalRefinement,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[Check], None] = lambda check: None,
) -> Report:
    """Check the operators at the model's shapes, then the model's fast path, on `device` in `dtype`; on an NVIDIA GPU
    the verdicts replace those in the cache.

    Args:
        model: in any dtype, anywhere.
        device: where to check.
        dtype: to compute in.
        progress: called with every check as it is made.
    """
    key = cache.key_for(device, dtype)
    cache.drop(key, cache.VERDICTS)
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        progress(check)

    plan = build_plan(plan_stages(model), 1, SIZE, SIZE)
    for check in _operators(plan, device, dtype):
        add(check)
    reason = fast_executor_reason(device, dtype)
    if reason is not None:
        return Report(key, tuple(checks), f"the model itself, {reason}", all(c.passed for c in checks))
    plan = plan.to(device, torch.float32)
    if device.type == "cpu":
        executor = CpuExecutor.of(plan, dtype, kept(plan, dtype), "measurement")
        example = make_example(plan, device, dtype, isinstance(model, LocalGlobalRefinement))
        add(judge("engine", lambda image, mask, start: executor.run(image, mask, start, None)[0], example))
        path = choose_path(model, plan, dtype)
        return Report(key, tuple(checks), str(path), all(c.passed for c in checks))
    found, verdict = verified(model, plan, device, dtype, anew=True)
    for check in verdict.checks:
        add(check)
    for check in recheck_steps(found, verdict, plan, isinstance(model, LocalGlobalRefinement)):
        add(check)
    passed = verdict.runs == "graph" and all(c.passed for c in checks)
    return Report(key, tuple(checks), str(verdict), passed)


def _operators(plan: Plan, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Every operator that the model calls, with and without a gradient, by the backend that "auto" tries."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    cases: list[tuple[str, tuple[Tensor, ...], tuple[object, ...], str | None]] = []
    size = (plan.height, plan.width)
    image, output, mask = normal(1, 3, *size).tanh(), normal(1, 3, *size).tanh(), (normal(1, 1, *size) > 0).to(dtype)
    for op in ("merge", "merge_concat"):
        cases.append((op, (image, output, mask), (), None))
    for step in plan.steps:
        if isinstance(step, AttentionStep):
            source, channels = plan.buffers[step.source.buffer], step.out_channels
            weight = normal(channels, 2 * channels, 1, 1) / channels**0.5
            features = normal(1, channels, source.height, source.width)
            cases.append(("attention_block", (features, weight, normal(channels)), (step.variant,), step.variant))
    failed: set[first_use.Use] = set()  # a case that passes later does not replace their verdict
    for op, tensors, more, variant in cases:
        _, channels, height, width = tensors[0].shape
        shape = f", {height}x{width}x{channels}" if variant else ""
        function = getattr(torch.ops.lgnet, op)
        backend = CANDIDATES.get(device.type, "triton")
        reason = reason_against(op, backend, tensors)
        for gradient in (False, True):
            use = first_use.use_of(OPERATORS[op], tensors, variant, gradient)
            name = use.name + shape
            if reason is not None:
                yield Check(name, problem=f"{backend}: {reason}")
                continue
            fused, eager = (partial(_call, function, more, by) for by in (backend, "eager"))
            keep = backend == "triton" and use not in failed
            outcome = first_use.check(use, tensors, fused, eager, keep)
            if outcome.reason is not None:
                failed.add(use)
            yield Check(name, outcome.error, outcome.limit, outcome.reason)


def _call(function: Callable[..., Tensor], more: tuple[object, ...], backend: str, *tensors: Tensor) -> Tensor:
    return function(*tensors, *more, backend=backend)


def render(report: Report) -> Group:
    """As a table for a terminal."""
    key = report.key
    title = f"{key.card}, driver {key.driver}, torch {key.torch}, triton {key.triton}, {key.dtype}"
    table = Table("check", "error", "allowed", "result", title=title)
    for check in report.checks:
        figures = ["" if value is None else f"{value:.1e}" for value in (check.error, check.limit)]
        table.add_row(check.name, *figures, "passed" if check.passed else str(check.problem))
    return Group(table, f"runs: {report.runs}")
