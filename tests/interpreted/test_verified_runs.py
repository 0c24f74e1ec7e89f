"""Runs after the check: other holes and sizes, threads, lack of memory, what a run leaves behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import conv as conv_kernels
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lgnet_fast import cache
from lgnet_fast.engine import describe as describing
from lgnet_fast.engine.cuda import graph_executor, verified
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.guarded import Guarded
from lgnet_fast.engine.cuda.library_executor import LibraryExecutor
from lgnet_fast.engine.cuda.memory import Memory, least_bytes
from lgnet_fast.engine.cuda.weights import conv_of, unpack
from lgnet_fast.engine.describe import Peaks
from lgnet_fast.engine.plan import AttentionStep, Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.engine.torch_executor import TorchExecutor
from tests.interpreted.plans import tiny_plan
from tests.interpreted.verifying import (
    CPU,
    FAULTS,
    HALF,
    FakeGraph,
    Model,
    count,
    decide,
    executor_inputs,
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
    monkeypatch.setattr(graph_executor, "is_capturing", lambda device: True)
    monkeypatch.setattr(CudaExecutor, "turn", None)  # neither waits nor records
    assert torch.equal(executor.run(image, mask)[0], expected)
    assert FakeGraph.replays == replays
    assert torch.equal(executor.memory.arena, before)
