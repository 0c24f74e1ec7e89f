"""Faults injected into the engine's kernels, launches and captures. Each must give the right picture, one warning and
a verdict; without faults the kernels and the graph must run."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import attention_inference as attention_kernels
from lgnet_fast.kernels import conv as conv_kernels
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from lgnet_fast import cache
from lgnet_fast.engine import checks, cuda_executor, graphs, verified
from lgnet_fast.engine import describe as describing
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.checks import check_steps, judge, make_example
from lgnet_fast.engine.cuda_executor import CudaExecutor
from lgnet_fast.engine.cuda_memory import Memory, least_bytes
from lgnet_fast.engine.cuda_weights import CudaWeights, conv_of, unpack
from lgnet_fast.engine.describe import Peaks
from lgnet_fast.engine.graphs import CaptureError
from lgnet_fast.engine.guarded import Guarded
from lgnet_fast.engine.library_executor import LibraryExecutor
from lgnet_fast.engine.plan import AttentionStep, Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.engine.verdicts import Verdict
from lgnet_fast.reference.variants import create_model
from tests.interpreted.plans import cast, small_plan, tiny_plan

CPU = torch.device("cpu")
HALF = torch.float16


class FakeGraph:
    """Replays by launching; counts."""

    replays = 0

    def __init__(self, launches: Callable[[], None]) -> None:
        self.launches = launches

    def replay(self) -> None:
        FakeGraph.replays += 1
        self.launches()


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


@pytest.fixture(autouse=True)
def machine(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and graphs on CPU tensors."""
    monkeypatch.setattr(CudaExecutor, "_graph_pool", lambda self: (0, 1) if self.options.graphs else None)
    monkeypatch.setattr(graphs, "capture", lambda launches, *args: FakeGraph(launches))
    monkeypatch.setattr(verified, "ModelExecutor", Model)
    FakeGraph.replays = Model.made = 0


@pytest.fixture
def plan() -> Plan:
    Model.plan = tiny_plan()
    return Model.plan


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


# -- after the check -------------------------------------------------------------------------------------------------


def test_other_holes_and_sizes_fall_back_when_they_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Model.plan = tiny_plan(48)
    executor = Guarded(CudaExecutor.of(plan, torch.float32))
    original = conv_kernels.conv_forward

    def only_dense(conv: Any, *args: Any, **options: Any) -> None:
        height, width = options["size"]
        if options["rect"] != (0, height, 0, width):
            raise OutOfResources(122880, 101376, "shared memory")
        original(conv, *args, **options)

    monkeypatch.setattr(conv_kernels, "conv_forward", only_dense)
    image, mask = executor_inputs(plan)
    mask = torch.zeros_like(mask)
    mask[..., 3:12, 5:14] = 1
    expected = TorchExecutor(plan).run(image, mask)[0]
    regions = [s.regions for s in plan.restricted([Rect(3, 12, 5, 14)]).steps]
    result = executor.run(image, mask, None, regions)[0]  # densely, as this hole comes for the first time
    assert not warnings(caplog)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    result = executor.run(image, mask, None, regions)[0]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    (warning,) = warnings(caplog)
    assert "not the hole alone" in warning
    assert "OutOfResources" in warning
    # now no launch works: first the graph is dropped, then the kernels
    caplog.clear()
    monkeypatch.setattr(conv_kernels, "conv_forward", FAULTS["out of resources"](original))
    monkeypatch.setattr(FakeGraph, "replay", FAULTS["runtime"](None))
    torch.testing.assert_close(executor.run(image, mask, None, regions)[0], expected, rtol=1e-4, atol=1e-5)
    assert isinstance(executor.executor, LibraryExecutor)
    assert [message.split(" (")[0] for message in warnings(caplog)] == [
        "from now on the engine, without a CUDA graph runs at this size",
        "from now on the engine's steps by PyTorch's operators run at this size",
    ]
    other = executor.resized(plan.resized(2, 16, 32))
    picture = executor_inputs(other.executor.plan)
    assert other.run(*picture)[0].isfinite().all()


def test_threads_whose_restricted_runs_fail_together_keep_the_graph(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A dense run in the same executor is the next path of both."""
    executor = Guarded(CudaExecutor.of(plan, torch.float32))
    image, mask = executor_inputs(plan)
    expected = executor.run(image, mask)[0]
    regions = [s.regions for s in plan.restricted([Rect(3, 9, 5, 10)]).steps]
    executor.run(image, mask, None, regions)
    original = CudaExecutor._launches

    def only_dense(self: CudaExecutor, memory: Memory, regions: Any, painted: bool) -> Any:
        if regions is not None:
            executor._dense_only = True  # another thread has failed just before
            raise OutOfResources(122880, 101376, "shared memory")
        return original(self, memory, regions, painted)

    monkeypatch.setattr(CudaExecutor, "_launches", only_dense)
    assert torch.equal(executor.run(image, mask, None, regions)[0], expected)
    assert executor.executor.uses_graphs
    assert not warnings(caplog)


def test_the_plan_is_described_with_the_cards_own_peaks(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table uses the executor's device, and its floor the bytes that the executor stores."""
    executor = Guarded(CudaExecutor.of(plan, HALF))
    image = torch.zeros(1, 3, 16, 16)
    times = executor.step_times(image, image[:, :1], rounds=1)
    assert len(times) == len(plan.steps)
    # as on a GPU whose peaks were measured so
    monkeypatch.setattr(describing, "measure_gpu_peaks", lambda *args: Peaks(1e12, 0.0, 1e9))
    monkeypatch.setattr(describing.torch, "zeros", lambda *shape, **options: image)
    monkeypatch.setattr(Guarded, "device", torch.device("cuda", 0))
    monkeypatch.setattr(Guarded, "step_times", lambda *args: [1.0] * len(plan.steps))
    table = describing.describe(executor, plan, 5)
    floors = [cell for cell in table.columns[-1].cells]
    step = plan.steps[0]
    expected = max(plan.macs(step) / 1e12, describing.traffic(plan, step) / 2 / 1e9) / 1e-3
    assert floors[0] == f"{expected:.0%}"


def executor_inputs(plan: Plan) -> tuple[Tensor, Tensor]:
    image, mask, _ = checks.example_input(plan, CPU, False)
    return image, mask


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("90 GiB"), RuntimeError("Triton Error [CUDA]: out of memory")], ids=type
)
def test_out_of_memory_is_the_callers_matter(plan: Plan, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Guarded(CudaExecutor.of(plan, HALF))
    monkeypatch.setattr(conv_kernels, "conv_forward", raises(lambda: error)(None))
    with pytest.raises(torch.OutOfMemoryError):
        executor.run(*executor_inputs(plan))
    assert type(executor.executor) is CudaExecutor
    with pytest.raises(torch.OutOfMemoryError):
        decide(plan)
    assert list(cache.entries(cache.VERDICTS)) == []


class Allocator:
    """Memory for feature maps: those of the checks and of the executors, in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit, self.live, self.peak = float("inf"), 0, 0
        maps, init = TorchExecutor.buffers_after, Memory.__init__

        def of_check(executor: TorchExecutor, *args: Any, **options: Any) -> dict[str, Tensor]:
            found = maps(executor, *args, **options)
            self.take(found.values())
            return found

        def of_executor(memory: Memory, *args: Any) -> None:
            init(memory, *args)
            self.take([memory.arena])

        monkeypatch.setattr(TorchExecutor, "buffers_after", of_check)
        monkeypatch.setattr(Memory, "__init__", of_executor)
        # as on a GPU, where the kernels are compiled for the executor's memory
        monkeypatch.setattr(CudaExecutor, "precompile", lambda executor: executor.memory)

    def take(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.live += tensor.nbytes
            weakref.finalize(tensor, self.give, tensor.nbytes)
        if self.live > self.limit:
            raise torch.OutOfMemoryError(f"{self.live} bytes of {self.limit}")
        self.peak = max(self.peak, self.live)

    def give(self, count: int) -> None:
        self.live -= count


def kept_sizes() -> list[str]:
    return sorted(entry.name.split(", ")[-1] for entry in cache.entries(cache.VERDICTS))


def test_a_batch_whose_check_finds_no_memory_is_checked_by_one_picture(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the check of the batch has left an exception, and the executor has allocated its buffers."""
    batch = TorchExecutor(plan).resized(plan.resized(4, 16, 16)).plan
    memory = Allocator(monkeypatch)
    decide(plan, anew=True)
    peak, buffers = memory.peak, least_bytes(batch, HALF)
    cache.drop(cache.key_for(CPU, HALF), cache.VERDICTS)
    gc.collect()
    memory.limit = max(peak, buffers) + peak // 4
    assert memory.live == 0
    tried = count(monkeypatch, verified, "make_example")
    with caplog.at_level(logging.INFO, "lgnet_fast"):
        executor, verdict = decide(batch)
    assert sum("one picture is checked" in message for message in caplog.messages) == 1
    assert not warnings(caplog)
    assert verdict.runs == "graph"
    assert tried == [2]
    assert kept_sizes() == ["1x16x16"]
    assert memory.live == 0  # the first run allocates
    image, mask = executor_inputs(batch)
    result = executor.run(image, mask)[0]
    assert executor.executor.uses_graphs

    # a later process finds the verdict for one picture, and keeps none for the batch
    del executor
    monkeypatch.setattr(cache, "_known", {})
    assert decide(batch)[1] == verdict
    assert tried == [3]
    assert kept_sizes() == ["1x16x16"]
    # one with more memory checks the batch
    memory.limit = float("inf")
    monkeypatch.setattr(cache, "_known", {})
    assert decide(batch)[1].runs == "graph"
    assert tried == [4]
    assert kept_sizes() == ["1x16x16", "4x16x16"]
    torch.testing.assert_close(result, TorchExecutor(batch).run(image, mask)[0], rtol=0, atol=2e-2)

    memory.limit = peak // 8
    with pytest.raises(torch.OutOfMemoryError):
        decide(batch, anew=True)


def test_a_run_without_memory_leaves_none_allocated(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the check, which is then repeated: a garbage collection may come later."""
    batch = TorchExecutor(plan).resized(plan.resized(2, 16, 16)).plan
    executor = Guarded(CudaExecutor.of(plan, HALF, graphs=False))
    original = conv_kernels.conv_forward
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def limited(conv: Any, source: Tensor, *args: Any, **options: Any) -> None:
        alive.append(any(one() is not None for one in seen))
        taken = torch.empty(1000)
        if len(source) > 1 or not alive[:-1]:
            seen.append(weakref.ref(taken))
            raise torch.OutOfMemoryError("90 GiB")
        original(conv, source, *args, **options)

    monkeypatch.setattr(conv_kernels, "conv_forward", limited)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            executor.run(*executor_inputs(plan))
        assert seen[0]() is None
        assert decide(batch)[1].runs == "graph"
        assert len(seen) == 2
        assert not any(alive)
    finally:
        gc.enable()


def test_weights_unpacked_are_those_that_were_packed(plan: Plan) -> None:
    for step in plan.steps:
        if not isinstance(step, AttentionStep):
            packed = conv_of(step).pack(step.weight)
            assert torch.equal(unpack(step, packed), step.weight), step.name


def test_a_run_inside_inference_mode_spoils_nothing(plan: Plan) -> None:
    """Memory, packed weights and partial sums made there could not be written to outside."""
    image, mask = executor_inputs(plan)
    with torch.inference_mode():
        executor = CudaExecutor.of(plan, torch.float32, graphs=False)
        first = executor.run(image.clone(), mask)[0]
    assert torch.equal(executor.run(image, mask)[0], first)
    memory = executor.memory
    assert not any(x.is_inference() for x in (memory.arena, memory.image, memory.outputs, memory._partial))
    assert not any(w.packed.is_inference() or w.bias.is_inference() for w in executor.weights.steps.values())


def test_a_caller_who_captures_gets_launches_on_memory_of_their_own(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = CudaExecutor.of(plan, torch.float32)
    image, mask = executor_inputs(plan)
    expected = executor.run(image, mask)[0]
    before = executor.memory.arena.clone()
    replays = FakeGraph.replays
    monkeypatch.setattr(cuda_executor, "is_capturing", lambda device: True)
    monkeypatch.setattr(CudaExecutor, "_turn", None)  # neither waits nor records
    assert torch.equal(executor.run(image, mask)[0], expected)
    assert FakeGraph.replays == replays
    assert torch.equal(executor.memory.arena, before)
