"""Faults injected into the engine's kernels, launches and captures. Each must give the right picture, one warning and
a verdict; without faults the kernels and the graph must run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import attention_inference as attention_kernels
from lgnet_fast.kernels import conv as conv_kernels
from lgnet_fast.kernels import picture_conv
from lgnet_fast.kernels.picture_conv import PictureTile

from lgnet_fast import cache
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import checks, graphs, verified
from lgnet_fast.engine.cuda.checks import check_steps, judge, make_example
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.graphs import CaptureError
from lgnet_fast.engine.cuda.measure import product_key
from lgnet_fast.engine.cuda.memory import Memory
from lgnet_fast.engine.cuda.verdicts import Verdict
from lgnet_fast.engine.cuda.weights import CudaWeights, Tuned, work_of
from lgnet_fast.engine.plan import AttentionStep, ConvStep, Plan
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.reference.variants import create_model
from tests import emulator
from tests.interpreted.plans import cast, picture_plan, small_plan, tiny_plan
from tests.interpreted.verifying import (
    CPU,
    FAULTS,
    HALF,
    FakeGraph,
    Model,
    assert_right,
    count,
    decide,
    gives,
    graphs_on_the_cpu,
    raises,
    warnings,
)


@pytest.fixture(autouse=True)
def machine(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_on_the_cpu(monkeypatch)


@pytest.fixture
def plan() -> Plan:
    Model.plan = tiny_plan()
    return Model.plan


# -- without a fault -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_and_graph_run_where_the_check_passes(
    plan: Plan, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor, verdict = decide(plan, dtype)
    assert (verdict.runs, verdict.reason) == ("graph", None)
    assert [c.name for c in verdict.checks] == ["graph"]
    convolutions = count(monkeypatch, conv_kernels, "conv_forward")
    attentions = count(monkeypatch, attention_kernels, "attention_block_inference")
    before = FakeGraph.replays
    assert_right(plan, executor, dtype)
    assert FakeGraph.replays == before + 1
    assert attentions == [1]
    # a graph keeps the original launchers, so this counts launches that are looked up at each call
    assert convolutions[0] in (0, len(plan.steps) - 1)
    assert type(executor.executor) is CudaExecutor
    assert set(executor.choices.values()) & {"cudnn", "torch"} == set()
    assert not warnings(caplog)


@pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))
def test_what_the_first_use_measures_is_checked_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right kernels for the picture pass; a wrong one fails the check, and is named."""
    tiles = {"p.stem": PictureTile(4, 32), "p.out": PictureTile(3, 32), "q.e1": PictureTile(4, 32)}
    launched: list[str] = []
    monkeypatch.setattr(emulator.EmulatedKernel, "launched", launched)
    monkeypatch.setattr(picture_conv, "Kernel", emulator.EmulatedKernel)
    monkeypatch.setattr(picture_conv, "reason_against", lambda device, dtype: None)
    plan = Model.plan = cast(picture_plan(), torch.float32)
    steps = {s.name: s for s in plan.steps if isinstance(s, ConvStep)}
    tuned = Tuned({product_key(work_of(plan, steps[name]), "half"): tile for name, tile in tiles.items()})
    monkeypatch.setattr(verified.first_use, "at_first_use", lambda *args: tuned)
    executor, verdict = decide(plan)
    assert (verdict.runs, verdict.reason) == ("graph", None)
    assert {name for name, choice in executor.choices.items() if choice.startswith("picture")} == tiles.keys()
    launched.clear()
    executor.executor.drop_buffers()  # the graph has kept its launches
    assert_right(plan, executor)
    assert len(launched) == 3
    monkeypatch.setattr(picture_conv, "picture_forward", FAULTS["zeros"](picture_conv.picture_forward))
    verdict = decide(plan, anew=True)[1]
    assert (verdict.runs, set(verdict.steps)) == ("library", tiles.keys())


def test_a_kept_verdict_saves_the_check(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decide(plan)[1]
    monkeypatch.setattr(cache, "_known", {})
    examples = count(monkeypatch, verified, "make_example")
    executor, verdict = decide(plan)
    assert examples == [0]
    assert verdict == first
    assert executor.executor.uses_graphs
    decide(plan, anew=True)
    assert examples == [1]


def test_a_moved_picture_fails(plan: Plan) -> None:
    """Also one that agrees with the known pixels."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        example = make_example(plan, CPU, dtype)
        assert example.limit <= checks.LIMITS[dtype]
        for axis in (2, 3):
            moved = example.exact.roll(1, dims=axis)
            assert judge("moved", gives(moved), example).problem == "it changes known pixels"
            pasted = torch.where(example.mask != 0, moved, example.image)
            assert "RMS error" in (judge("moved", gives(pasted), example).problem or "")
        right = torch.where(example.mask != 0, example.exact, example.image)
        assert judge("right", gives(right), example).passed


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_convolutions_that_fail_are_run_by_pytorch(
    plan: Plan, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(conv_kernels, "conv_forward", FAULTS[fault](conv_kernels.conv_forward))
    attentions = count(monkeypatch, attention_kernels, "attention_block_inference")
    executor, verdict = decide(plan)
    assert verdict.runs == "library"
    assert [c.name for c in verdict.checks[:2]] == ["graph", "direct"]
    assert set(verdict.steps) == {s.name for s in plan.steps if not isinstance(s, AttentionStep)}
    (warning,) = warnings(caplog)
    assert "cpu" in warning
    assert verdict.reason is not None
    assert verdict.reason in warning
    ran = attentions[0]
    assert_right(plan, executor)
    assert attentions[0] == ran + 1  # steps that do not fail still use their kernels
    (entry,) = cache.entries(cache.VERDICTS)
    assert Verdict.from_dict(entry.value) == verdict


def test_one_wrong_step_is_named_and_replaced(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only convolutions with a residual are wrong."""
    original, wrong = conv_kernels.conv_forward, FAULTS["shifted"](conv_kernels.conv_forward)

    def launch(conv: Any, *args: Any, **options: Any) -> None:
        (wrong if options.get("residual") is not None else original)(conv, *args, **options)

    monkeypatch.setattr(conv_kernels, "conv_forward", launch)
    executor, verdict = decide(plan)
    assert set(verdict.steps) == {s.name for s in plan.steps if s.residual is not None}
    assert verdict.steps == ("u.block",)
    assert "u.block: relative error" in warnings(caplog)[0]
    assert_right(plan, executor)
    by_library = {name for name, choice in executor.choices.items() if choice == "cudnn"}
    assert by_library == set(verdict.steps)


@pytest.mark.parametrize("part", ["attention", "paint"])
def test_attention_and_painting_have_replacements(plan: Plan, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = {
        "attention": (attention_kernels, "attention_block_inference"),
        "paint": (conv_kernels, "paint_forward"),
    }[part]
    monkeypatch.setattr(module, name, FAULTS["runtime"](getattr(module, name)))
    executor, verdict = decide(plan)
    assert verdict.runs == "library"
    assert verdict.steps == ({"attention": "u.attention", "paint": "paint"}[part],)
    assert_right(plan, executor)


def test_nothing_works_but_the_model(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CudaExecutor, "_launches", FAULTS["runtime"](None))
    executor, verdict = decide(plan)
    assert isinstance(executor, Model)
    assert verdict.runs == "model"
    assert verdict.checks[-1].passed
    assert len(warnings(caplog)) == 1
    assert_right(plan, executor)
    monkeypatch.setattr(cache, "_known", {})
    caplog.clear()
    assert isinstance(decide(plan)[0], Model)
    (again,) = warnings(caplog)
    assert "known from an earlier run" in again


@pytest.mark.parametrize("fault", ["none", "everything"])
def test_a_checks_work_is_bounded(plan: Plan, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs of few operations each, so that it takes less than two seconds: at most two in float32."""
    runs: list[torch.dtype] = []
    original = TorchExecutor.buffers_after

    def counted(self: TorchExecutor, *args: Any, **options: Any) -> Any:
        assert self.plan.total_macs() == plan.total_macs()
        runs.append(self.dtype)
        return original(self, *args, **options)

    monkeypatch.setattr(TorchExecutor, "buffers_after", counted)
    judged = count(monkeypatch, verified, "judge")
    if fault == "everything":
        monkeypatch.setattr(CudaExecutor, "_launches", FAULTS["runtime"](None))
    _, verdict = decide(plan)
    assert verdict.runs == ("model" if fault == "everything" else "graph")
    assert runs.count(torch.float32) <= (2 if fault == "everything" else 1)
    assert judged[0] <= (5 if fault == "everything" else 1)
    assert len(runs) + judged[0] <= 11


def test_a_large_plan_is_checked_on_one_picture() -> None:
    for name in ("lgnet", "lgnet_demo"):
        with torch.device("meta"):
            stages = plan_stages(create_model(name).eval())
        for batch, side, alone in (
            (1, 256, False),
            (16, 256, False),
            (1, 768, False),
            (20, 256, True),
            (2, 1024, True),
        ):
            checked = checks.checked_plan(build_plan(stages, batch, side, side))
            assert checked.total_macs() <= checks.MOST_MACS
            assert (checked.batch, checked.height, checked.width) == ((1, 256, 256) if alone else (batch, side, side))


def test_a_set_up_that_can_be_mended(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no kernel runs, one short sentence says why, and the next process checks again."""
    text = "Failed to find C compiler. Please specify via CC environment variable."
    with monkeypatch.context() as patch:
        for module, names in (
            (conv_kernels, ("conv_forward", "paint_forward")),
            (attention_kernels, ("attention_block_inference",)),
        ):
            for name in names:
                patch.setattr(module, name, raises(lambda: RuntimeError(text))(None))
        executor, verdict = decide(plan)
    assert (verdict.runs, verdict.steps, verdict.again) == ("library", (), True)
    assert verdict.reason == f"graph, direct, paint and {len(plan.steps)} more: RuntimeError: {text}"
    assert len(warnings(caplog)) == 1
    assert_right(plan, executor)
    monkeypatch.setattr(cache, "_known", {})
    assert decide(plan)[1].runs == "graph"


def test_an_engine_that_cannot_be_made(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaWeights, "pack", FAULTS["runtime"](None))
    executor, verdict = decide(plan)
    assert verdict.runs == "model"
    assert_right(plan, executor)


def test_graph_that_replays_wrongly(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take = Memory.take

    def forgetful(memory: Memory, *args: Any) -> None:
        take(memory, *args)
        memory.outputs.zero_()

    monkeypatch.setattr(Memory, "take", forgetful)
    monkeypatch.setattr(graphs, "capture", lambda launches, *args: FakeGraph(lambda: None))
    executor, verdict = decide(plan)
    assert verdict.runs == "direct"
    assert "graph:" in (verdict.reason or "")
    assert len(warnings(caplog)) == 1
    assert not executor.executor.uses_graphs
    assert_right(plan, executor)


def test_capture_that_fails(plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    good = graphs.capture

    def refuse(*args: Any) -> Any:
        raise CaptureError("RuntimeError: operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    executor, verdict = decide(plan)
    assert verdict.runs == "direct"
    assert "not permitted" in (verdict.reason or "")
    assert len(warnings(caplog)) == 1
    assert_right(plan, executor)
    # it counts as transient until it is repeated
    monkeypatch.setattr(graphs, "capture", good)
    monkeypatch.setattr(cache, "_known", {})
    assert decide(plan)[1].runs == "graph"


def test_a_spoilt_cache_means_a_check(plan: Plan, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(plan)
    for file in fresh_cache.iterdir():
        file.write_text('{"schema": 1')
    monkeypatch.setattr(cache, "_known", {})
    examples = count(monkeypatch, verified, "make_example")
    assert decide(plan)[1].runs == "graph"
    assert examples == [1]


def test_every_step_is_checked_by_itself() -> None:
    plan = cast(small_plan(side=16), torch.float32)  # of two stages
    executor = CudaExecutor.of(plan, HALF)
    checks = check_steps(executor, plan, make_example(plan, CPU, HALF))
    assert [c.name for c in checks] == ["paint", *(s.name for s in plan.steps)]
    assert all(c.passed for c in checks), [str(c) for c in checks]
    assert all(0 <= c.error < c.limit / 2 for c in checks if c.error is not None and c.limit is not None)
