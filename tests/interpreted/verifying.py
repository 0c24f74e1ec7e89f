"""What the tests of verified engines share: graphs on the CPU, a model, faults, and judgements."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from lgnet_fast.engine.cuda import checks, graphs, verified
from lgnet_fast.engine.cuda.checks import judge, make_example
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.verdicts import Verdict
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.torch_executor import TorchExecutor
from tests.engine_support import FakeGraph, FakePool
from tests.interpreted.plans import cast

CPU = torch.device("cpu")

HALF = torch.float16


class Model:
    """The plan in plain PyTorch, which replaces the model for a plan without one."""

    plan: Plan
    made = 0

    def __init__(self, model: object, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> None:
        Model.made += 1
        self.dtype = dtype

    def run(
        self, image: Tensor, mask: Tensor, start: Tensor | None = None, regions: Any = None
    ) -> tuple[Tensor, Any]:
        raw = TorchExecutor(cast(Model.plan, self.dtype)).run(image, mask, start)[1]
        return image * (1 - mask) + raw[-1].float() * mask, raw


def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on CPU tensors, and Model in place of the model. With an empty cache of its own, for each test."""
    monkeypatch.setattr(CudaExecutor, "_graph_pool", lambda self: FakePool() if self.options.graphs else None)
    monkeypatch.setattr(graphs, "capture", lambda launches, *args: FakeGraph(launches))
    monkeypatch.setattr(verified, "ModelExecutor", Model)
    FakeGraph.replays = Model.made = 0


def decide(plan: Plan, dtype: torch.dtype = HALF, **options: Any) -> tuple[Any, Verdict]:
    return verified.verified(None, plan, CPU, dtype, **options)  # type: ignore[arg-type]


def assert_right(plan: Plan, executor: Any, dtype: torch.dtype = HALF) -> None:
    example = make_example(plan, CPU, dtype)
    check = judge("user", lambda *args: executor.run(*args)[0], example)
    assert check.passed, str(check)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    calls = [0]
    original = getattr(module, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return original(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def gives(result: Tensor) -> checks.Runner:
    return lambda *args: result


def raises(error: Callable[[], Exception]) -> Callable[[Any], Any]:
    def fault(original: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            raise error()

        return launch

    return fault


def writes(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """The right result, changed afterwards in every store."""

    def fault(original: Any) -> Any:
        def launch(conv: Any, source: Any, weight: Any, bias: Any, stores: Any, *args: Any, **options: Any) -> None:
            original(conv, source, weight, bias, stores, *args, **options)
            merge = options.get("merge")
            for target in [s.view for s in stores] if merge is None else [merge.raw, merge.merged]:
                target.copy_(change(target.clone()))

        return launch

    return fault


FAULTS = {
    "out of resources": raises(lambda: OutOfResources(122880, 101376, "shared memory")),
    "compilation": raises(lambda: CompilationError("", None, "ptxas said no")),
    "runtime": raises(lambda: RuntimeError("CUDA error: invalid argument")),
    "zeros": writes(torch.zeros_like),
    "nan": writes(lambda x: torch.full_like(x, torch.nan)),
    "shifted": writes(lambda x: x.roll(1, dims=2)),
}


def executor_inputs(plan: Plan) -> tuple[Tensor, Tensor]:
    image, mask, _ = checks.example_input(plan, CPU, False)
    return image, mask
