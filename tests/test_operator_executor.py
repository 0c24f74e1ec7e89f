"""The engine of NVIDIA GPUs that cannot run our kernels: a plan by PyTorch's operators. On CPU tensors here."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lgnet_fast import BackendError, LGNet, create_model, optimize
from lgnet_fast.engine import making
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import graphs, operator_executor, verified
from lgnet_fast.engine.cuda import launches as cuda_launches
from lgnet_fast.engine.cuda.checks import LIMITS, check_steps, make_example
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.graph_executor import GraphExecutor
from lgnet_fast.engine.cuda.guarded import Guarded
from lgnet_fast.engine.cuda.operator_executor import OperatorExecutor
from lgnet_fast.engine.cuda.verdicts import Verdict
from lgnet_fast.engine.making import fast_executor_reason
from lgnet_fast.engine.model_executor import ModelExecutor
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.jobs import tune as tuning_module
from tests.engine_support import FakeGraph, FakePool, assert_same_pixels, narrow_model
from tests.support import assert_accurate, case
from tests.test_plan import NARROW, lively

CPU = torch.device("cpu")


def planned(model: LGNet, batch: int = 1) -> Plan:
    return build_plan(plan_stages(model.eval()), batch, 256, 256)


def inputs(batch: int = 1) -> tuple[Tensor, Tensor]:
    return case("gen256", batch, 256, 256, torch.float32)


# -- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lgnet", "lgnet_share", "lgnet_light", "C+G_att"])
def test_result_is_the_models(name: str) -> None:
    torch.manual_seed(0)
    widths = NARROW | ({"coarse_channels": 6} if name == "lgnet_share" else {})
    model = lively(create_model(name, **widths, backend="eager")).float()
    image, mask = inputs(2)
    executor = OperatorExecutor.of(planned(model, 2), torch.float32, device=CPU)
    for _ in range(2):
        result, raw = executor.run(image, mask)
        with torch.no_grad():
            expected = model.double()(image.double(), mask.double(), return_stages=True)
        assert_same_pixels(result, expected.merged[-1], mask)
        assert len(raw) == len(expected.raw)
        for ours, theirs in zip(raw, expected.raw):
            assert_accurate("raw", ours, theirs, roundings=2**13)
        known = (mask == 0).expand_as(image)
        assert torch.equal(result[known], image[known])
    assert executor.run(image, mask, stages=False)[1] == []


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs PyTorch 2.9, for fp32_precision")
@pytest.mark.parametrize("products", [False, True])
def test_tf32_of_convolutions_by_the_newer_switch(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older switch cannot be read then."""
    monkeypatch.setattr(operator_executor, "tf32_allowed", lambda: products)
    conv: Any = torch.backends.cudnn.conv
    executor = OperatorExecutor.of(planned(narrow_model()), torch.float32, device=CPU)
    before = conv.fp32_precision
    try:
        found = []
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            found.append(executor._precision())
    finally:
        conv.fp32_precision = before
    assert found == [(products, False), (products, products)]


def test_every_operator_is_called_with_the_engines_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own convolutions are in TF32 by default, which the check of the engine does not pass."""
    inside: list[torch.dtype] = []
    calls: list[bool] = []

    @contextlib.contextmanager
    def spied(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        inside.append(dtype)
        yield
        inside.clear()

    def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: (calls.append(inside == [torch.float32]), function(*args))[1]

    monkeypatch.setattr(cuda_launches, "engine_float32", spied)
    for name in ("convolution", "attention_block"):
        monkeypatch.setattr(cuda_launches, name, noted(getattr(cuda_launches, name)))
    plan = planned(narrow_model())
    OperatorExecutor.of(plan, torch.float32, device=CPU).run(*inputs())
    assert calls == [True] * len(plan.steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_step_in_16_bit(dtype: torch.dtype) -> None:
    plan = planned(narrow_model())
    executor = OperatorExecutor.of(plan, dtype, device=CPU)
    checks = check_steps(executor, plan, make_example(plan, CPU, dtype))
    assert [check.name for check in checks] == ["paint", *(step.name for step in plan.steps)]
    assert [str(check) for check in checks if not check.passed] == []


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_store_that_is_not_written_fails_the_check_of_its_step(left_out: int) -> None:
    plan = planned(narrow_model())
    number = next(n for n, step in enumerate(plan.steps) if len(step.stores) == 2)
    steps = list(plan.steps)
    steps[number] = replace(steps[number], stores=(steps[number].stores[1 - left_out],))
    executor = OperatorExecutor.of(replace(plan, steps=tuple(steps)), torch.float32, device=CPU)
    checks = check_steps(executor, plan, make_example(plan, CPU, torch.float32))
    assert [check.name for check in checks if not check.passed] == [steps[number].name]


def test_a_start_and_another_size() -> None:
    plan = planned(narrow_model())
    executor = OperatorExecutor.of(plan, torch.float32, device=CPU)
    wide = plan.resized(2, 256, 512)
    image, mask = case("gen256", 2, 256, 512, torch.float32)
    start = image.flip(3)
    result, _ = executor.resized(wide).run(image, mask, start)
    expected, _ = TorchExecutor(plan.to(CPU, torch.float64)).resized(wide).run(image, mask, start)
    assert_same_pixels(result, expected, mask)
    assert executor.resized(wide).weights is executor.weights


def test_weights_are_copies_and_counted_once() -> None:
    torch.manual_seed(0)
    shared = lively(create_model("lgnet_share", **NARROW | {"coarse_channels": 6}, backend="eager")).float()
    plan = planned(shared)
    executor = OperatorExecutor.of(plan, torch.float32, device=CPU)
    own = [step for step in plan.steps if step.weights_of == step.name]
    assert len(own) < len(plan.steps)
    assert executor.packed_bytes == 4 * sum(step.weight.numel() + step.bias.numel() for step in own)
    addresses = {step.weight.data_ptr() for step in plan.steps} | {step.bias.data_ptr() for step in plan.steps}
    assert not addresses & {t.data_ptr() for pair in executor.weights.steps.values() for t in pair}


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
def test_activations_keep_nan_and_write_views(activation: str) -> None:
    x = torch.tensor([[-2.0, 3.0, torch.nan, -torch.inf]])
    wide = torch.full((1, 8), 7.0)
    cuda_launches.activate_into(wide[:, 2:6], x, activation)
    slope = {"relu": 0.0, "leaky_relu": 0.2, "none": 1.0}[activation]
    expected = torch.tensor([[-2.0 * slope, 3.0, torch.nan, -torch.inf if slope else 0.0]])
    torch.testing.assert_close(wide[:, 2:6], expected, equal_nan=True)
    assert (wide[:, [0, 1, 6, 7]] == 7).all()


def test_neither_triton_nor_the_kernels_are_imported() -> None:
    code = """
import sys
sys.modules["triton"] = None  # an import raises ImportError
import torch
from lgnet_fast import create_model
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda.guarded import Guarded
from lgnet_fast.engine.cuda.verified import verified
from lgnet_fast.engine.cuda.operator_executor import OperatorExecutor

model = create_model("lgnet_demo").eval()
plan = build_plan(plan_stages(model), 1, 256, 256)
executor, verdict = verified(model, plan, torch.device("cpu"), torch.float32, graphs=False)
assert isinstance(executor, Guarded) and isinstance(executor.executor, OperatorExecutor)
assert set(executor.choices.values()) == {"cudnn", "torch"}
print(verdict.runs, sorted(name for name in sys.modules if name.startswith("lgnet_fast.kernels.")))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[0] == "direct ['lgnet_fast.kernels.results']"


# -- choice and fallbacks --------------------------------------------------------------------------------------------


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphExecutor, "_graph_pool", lambda self: FakePool() if self.options.graphs else None)
    monkeypatch.setattr(graphs, "capture", lambda launches, *args: FakeGraph(launches))
    monkeypatch.setattr(FakeGraph, "replays", 0)


def decide(model: LGNet, plan: Plan) -> tuple[Any, Verdict]:
    return verified.verified(model, plan, CPU, torch.float32, anew=True)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_it_runs_as_a_graph_where_our_kernels_cannot(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lgnet_fast")
    model = narrow_model()
    plan = planned(model)
    executor, verdict = decide(model, plan)
    assert (verdict.runs, verdict.reason) == ("graph", None)
    assert [check.name for check in verdict.checks] == ["graph"]
    assert isinstance(executor, Guarded)
    assert isinstance(executor.executor, OperatorExecutor)
    assert not executor.restricts
    before = FakeGraph.replays
    image, mask = inputs()
    regions = [(plan.target(step).everywhere,) for step in plan.steps]
    result, _ = executor.run(image, mask, regions=regions)
    assert FakeGraph.replays == before + 1
    with torch.no_grad():
        expected = model.double()(image.double(), mask.double())
    assert_same_pixels(result, expected, mask)
    assert not warnings(caplog)
    assert any(message.startswith("the engine runs by PyTorch's operators: ") for message in caplog.messages)


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_a_wrong_picture_leaves_the_model(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    original = operator_executor.convolve

    def wrong(memory: Any, step: Any, weight: Tensor, bias: Tensor, merge: Any) -> None:
        original(memory, step, weight, bias + 0.5, merge)

    strict: list[tuple[torch.device, torch.dtype]] = []

    def spied(*asked: Any) -> Any:
        strict.append(asked)
        return contextlib.nullcontext()

    monkeypatch.setattr(verified, "engine_float32", spied)
    monkeypatch.setattr(operator_executor, "convolve", wrong)
    model = narrow_model()
    executor, verdict = decide(model, planned(model))
    assert strict == [(CPU, torch.float32)]  # so that a model in TF32, PyTorch's default, is checked only once
    assert isinstance(executor, ModelExecutor)
    assert verdict.runs == "model"
    assert [(check.name, check.passed) for check in verdict.checks] == [
        ("graph", False),
        ("direct", False),
        ("model", True),
    ]
    (warning,) = warnings(caplog)
    assert warning.startswith("the model itself in eager PyTorch (graph, direct: RMS error in the hole ")


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_a_failed_capture_leaves_the_launches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(launches: Callable[[], None], *args: object) -> None:
        launches()
        raise graphs.CaptureError("no graphs today")

    monkeypatch.setattr(graphs, "capture", fails)
    model = narrow_model()
    executor, verdict = decide(model, planned(model))
    assert (verdict.runs, verdict.reason) == ("direct", "no graphs today")
    assert isinstance(executor.executor, OperatorExecutor)
    (warning,) = warnings(caplog)
    assert "no graphs today" in warning


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_an_error_at_another_size_ends_the_graphs_then_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor = Guarded(OperatorExecutor.of(planned(narrow_model()), torch.float32, device=CPU))
    image, mask = inputs()
    expected = executor.run(image, mask)[0]

    def raises(*args: object) -> None:
        raise RuntimeError("no graph of this size")

    monkeypatch.setattr(FakeGraph, "replay", raises)
    assert torch.equal(executor.run(image, mask)[0], expected)
    (warning,) = warnings(caplog)
    assert warning.startswith("from now on the engine, without a CUDA graph runs at this size")
    monkeypatch.setattr(cuda_launches, "convolution", raises)
    with pytest.raises(RuntimeError, match="no graph of this size"):
        executor.run(image, mask)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_nvidia_gpus_have_a_fast_executor_in_every_state_of_triton(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(CudaExecutor, "unavailable_reason", staticmethod(lambda *args: "no Triton"))
    assert fast_executor_reason(card, dtype) is None
    assert "float64" in (fast_executor_reason(card, torch.float64) or "")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in (fast_executor_reason(card, dtype) or "")


def test_there_is_nothing_to_tune(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reason = "Triton is not installed"
    monkeypatch.setattr(CudaExecutor, "unavailable_reason", staticmethod(lambda *args: reason))
    model, card = narrow_model(), torch.device("cuda", 0)
    with pytest.raises(BackendError, match=f"nothing to tune: {reason}"):
        tuning_module.tune(model, (256, 256), 1, card, torch.float16, 1.0)
    monkeypatch.setattr(making, "fast_executor_reason", lambda *args: None)
    monkeypatch.setattr(making, "resolve_device", torch.device)
    monkeypatch.setattr(making, "verified", lambda model, *args: (ModelExecutor(model, *args[1:]), None))
    optimize(model, device="meta", dtype="float16", tune=1)
    assert warnings(caplog) == [f"kernels are not tuned: {reason}"]
