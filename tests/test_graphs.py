"""The state after captures, on an emulation of torch.cuda: streams, the allocator, retries."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import cuda_driver

from lgnet_fast.engine.cuda import graphs
from lgnet_fast.engine.cuda.graphs import CaptureError, Pool, Program, capture
from lgnet_fast.engine.cuda.launches import ends_by_graphs
from lgnet_fast.engine.cuda.measure import Timer
from lgnet_fast.ops.torch_state import is_capturing

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """Streams, and a graph that replays the launches of its capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.user = FakeStream("the user's")
        self.capturing: FakeGraph | None = None
        self.fail_begin: Exception | None = None
        self.fail_end: Exception | None = None
        self.handles = itertools.count(2)
        self.ended_pools: list[object] = []
        self.recording: set[object] = set()
        """Pools of captures that did not end, for PyTorch's allocator of page-locked memory."""
        self.random_captured = False
        """Whether PyTorch's random generator believes that a graph is being captured."""
        self.streams: list[FakeStream] = []
        """Of captures and warm-ups, each once."""
        self.made: dict[int, int] = {}
        """GPU's number -> how often a stream was asked for."""
        self.device = 0
        cuda = torch.cuda
        monkeypatch.setattr(graphs, "_streams", {})
        for name, value in {
            "Stream": self.new_stream,
            "Event": lambda enable_timing: FakeEvent(self),
            "current_stream": lambda device=None: self.current,
            "set_stream": self.set_stream,
            "stream": lambda stream: self.on(stream),
            "graph_pool_handle": lambda: (0, next(self.handles)),
            "synchronize": lambda *args: None,
            "empty_cache": lambda: None,
            "CUDAGraph": lambda **options: FakeGraph(self, **options),
            "device": self.on_device,
            "current_device": lambda: self.device,
            "is_current_stream_capturing": lambda: self.capturing is not None,
        }.items():
            monkeypatch.setattr(cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.ended_pools.append(pool), raising=False
        )

    def new_stream(self, index: int | None = None) -> FakeStream:
        if index is None:  # PyTorch 2.7 makes one that it never uses
            return FakeStream("unused", self.device)
        number = self.made[index] = self.made.get(index, 0) + 1
        if number > graphs._STREAMS:  # PyTorch's 33rd is the first again
            return [s for s in self.streams if s.device == index][(number - 1) % graphs._STREAMS]
        self.streams.append(FakeStream("warm-up" if number == 1 else f"capture {number - 1}", index))
        return self.streams[-1]

    @contextlib.contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream

    @contextlib.contextmanager
    def on(self, stream: FakeStream):
        before, self.current = self.current, stream
        yield
        self.current = before


class FakeStream:
    def __init__(self, name: str, device: int = 0) -> None:
        self.name, self.device = name, device
        self.waited_for: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)


class FakeEvent:
    """Notes the GPU that is current when it is recorded."""

    recorded_on: ClassVar[list[int]] = []

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        FakeEvent.recorded_on.append(self.cuda.device)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return 0.002


class FakeGraph:
    """`raw_cuda_graph` and `instantiate` work as PyTorch's do."""

    def __init__(self, cuda: FakeCuda, keep_graph: bool = False) -> None:
        self.cuda, self.kernels = cuda, list[Callable[[], None]]()
        self.kept, self.captured, self.ready = keep_graph, False, False
        self.pool: set[object] = set()

    def capture_begin(self, *pool: object, **options: object) -> None:
        if self.cuda.fail_begin is not None:
            raise self.cuda.fail_begin
        self.pool = set(pool)
        if self.cuda.recording & self.pool:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.cuda.recording |= self.pool
        self.cuda.capturing = self
        self.cuda.random_captured = True

    def capture_end(self) -> None:
        self.cuda.capturing = None
        if self.cuda.fail_end is not None:
            raise self.cuda.fail_end
        self.cuda.recording -= self.pool
        self.cuda.random_captured = False
        self.captured, self.ready = True, not self.kept

    def raw_cuda_graph(self) -> int:
        assert self.kept
        assert self.captured
        return id(self)

    def instantiate(self) -> None:
        self.ready = True

    def replay(self) -> None:
        assert self.ready
        for kernel in self.kernels:
            kernel()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


class Work:
    """Launches one kernel, which counts its runs."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.launched, self.ran = cuda, 0, 0
        self.streams: list[str] = []

    def __call__(self) -> None:
        self.launched += 1
        self.streams.append(self.cuda.current.name)
        if self.cuda.capturing is not None:
            self.cuda.capturing.kernels.append(self.kernel)
        else:
            self.kernel()

    def kernel(self) -> None:
        self.ran += 1


def test_a_capture_warms_up_on_a_stream_of_its_own_and_replays(cuda: FakeCuda) -> None:
    work = Work(cuda)
    program = Program(work, DEVICE, Pool(DEVICE))
    for _ in range(3):
        program()
    assert (work.launched, work.ran) == (2, 4)
    assert work.streams == ["warm-up", "capture 1"]
    assert (program.reason, cuda.current, gc.isenabled()) == (None, cuda.user, True)


@pytest.mark.parametrize("where", ["fail_begin", "fail_end"])
def test_a_failed_capture_leaves_the_callers_stream_and_tells_the_allocator(cuda: FakeCuda, where: str) -> None:
    setattr(cuda, where, RuntimeError("CUDA error: operation failed due to a previous error during capture"))
    work, pool = Work(cuda), Pool(DEVICE)
    handle = pool.handle
    with pytest.raises(CaptureError, match="previous error during capture"):
        capture(work, DEVICE, pool)
    assert cuda.current is cuda.user
    assert cuda.ended_pools == [handle]
    assert gc.isenabled()
    program = Program(work, DEVICE, pool)
    program()
    assert cuda.current is cuda.user
    assert work.streams[-1] == "the user's"


def test_the_reason_names_what_failed_first(cuda: FakeCuda) -> None:
    cuda.fail_end = RuntimeError("capture invalidated")

    def launches() -> None:
        if cuda.capturing is not None:
            raise KeyError("a launch")

    with pytest.raises(CaptureError, match="KeyError: 'a launch'; then RuntimeError: capture invalidated"):
        capture(launches, DEVICE, Pool(DEVICE))
    assert cuda.current is cuda.user


def test_failed_captures_are_tried_again_a_few_times(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    cuda.fail_end = RuntimeError("another thread synchronised")
    work = Work(cuda)
    program = Program(work, DEVICE, Pool(DEVICE), direct=1)
    tries: list[int] = []
    original = graphs.capture
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, logger="lgnet_fast"):
        patch.setattr(graphs, "capture", lambda *args: (tries.append(calls), original(*args))[1])
        for calls in range(1300):  # noqa: B007
            program()
    assert tries == [1, 11, 111, 1111]
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO", "INFO", "INFO"]
    assert "another thread synchronised" in caplog.records[0].message
    assert work.ran == 1300 + len(tries)
    assert "another thread synchronised" in (program.reason or "")


def test_a_later_capture_succeeds(cuda: FakeCuda) -> None:
    cuda.fail_end = RuntimeError("a moment's trouble")
    work, pool = Work(cuda), Pool(DEVICE)
    program = Program(work, DEVICE, pool)
    program()
    cuda.fail_end = None
    for _ in range(11):
        program()
    assert program.graph is not None
    assert program.reason is None
    launched = work.launched
    program()
    assert work.launched == launched
    other = Program(Work(cuda), DEVICE, pool)  # of the same executor
    other()
    assert other.graph is not None


class OutOfResources(Exception):
    """Triton's errors derive from Exception, not from RuntimeError."""


def test_launches_that_raise_are_not_taken_for_a_failed_capture(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    def launches() -> None:
        raise OutOfResources("shared memory")

    program = Program(launches, DEVICE, Pool(DEVICE))
    with pytest.raises(OutOfResources):
        program()
    assert not caplog.records
    assert (program.graph, program.reason, cuda.current) == (None, None, cuda.user)


def test_errors_of_triton_during_the_capture_are_failed_captures(cuda: FakeCuda) -> None:
    work = Work(cuda)

    def launches() -> None:
        if cuda.capturing is not None:
            raise OutOfResources("shared memory")
        work()

    program = Program(launches, DEVICE, Pool(DEVICE))
    program()
    assert "OutOfResources" in (program.reason or "")
    assert work.ran == 2  # the warm-up, and the launches in the graph's place


def test_blocks_are_spread_before_the_graph_is_instantiated(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    spread: list[tuple[int, int, bool]] = []

    def spread_blocks(graph: int, device: int) -> int:
        spread.append((graph, device, program.graph is None))
        return 1

    monkeypatch.setattr(cuda_driver, "spread_blocks", spread_blocks)
    work = Work(cuda)
    program = Program(work, DEVICE, Pool(DEVICE), spread=True)
    for _ in range(3):
        program()
    assert (work.launched, work.ran, program.reason) == (2, 4, None)
    assert spread == [(id(program.graph), 0, True)]


def test_a_graph_whose_blocks_cannot_be_spread_is_a_failed_capture(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread_blocks(graph: int, device: int) -> int:
        raise RuntimeError("cuGraphKernelNodeSetParams_v2: invalid argument (1)")

    monkeypatch.setattr(cuda_driver, "spread_blocks", spread_blocks)
    work = Work(cuda)
    program = Program(work, DEVICE, Pool(DEVICE), spread=True)
    program()
    assert "invalid argument" in (program.reason or "")
    assert (program.graph, work.ran, cuda.current) == (None, 2, cuda.user)


def test_each_owner_of_graphs_has_a_stream(cuda: FakeCuda) -> None:
    """Its graphs hold the address of the stream's workspace of cuBLAS, which graphs that are replayed at the same
    time must not share. Graphs of one owner share memory, which PyTorch's allocator gives to one stream only."""
    pools = [Pool(DEVICE) for _ in range(graphs._STREAMS - 1)]
    works = [Work(cuda) for _ in (0, 0, 1)]
    for work, number in zip(works, (0, 0, 1), strict=True):
        capture(work, DEVICE, pools[number])
    assert [work.streams for work in works] == [["warm-up", "capture 1"]] * 2 + [["warm-up", "capture 2"]]
    assert {pool.stream.name for pool in pools} == {f"capture {n}" for n in range(1, graphs._STREAMS)}
    pools += [Pool(DEVICE), Pool(torch.device("cuda", 1))]
    assert [(p.stream.name, p.stream.device) for p in pools[-2:]] == [("capture 1", 0), ("capture 1", 1)]
    graph = capture(Work(cuda), DEVICE, pools.pop(4))
    assert Pool(DEVICE).stream.name == "capture 2"  # as the second: the graph of the fifth is alive
    del graph
    assert Pool(DEVICE).stream.name == "capture 5"


def test_random_numbers_work_after_a_failed_capture(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [RuntimeError("capture invalidated")]
    end = FakeGraph.capture_end

    def once(graph: FakeGraph) -> None:
        cuda.fail_end = failures.pop() if failures else None
        end(graph)

    monkeypatch.setattr(FakeGraph, "capture_end", once)
    with pytest.raises(CaptureError):
        capture(Work(cuda), DEVICE, Pool(DEVICE))
    assert not cuda.random_captured
    assert (cuda.current, cuda.capturing) == (cuda.user, None)


def test_a_graph_after_one_that_was_captured_in_inference_mode(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of a program allocates the seed that every capture writes."""
    with torch.inference_mode():
        seed = torch.zeros(1)
    begin = FakeGraph.capture_begin

    def capture_begin(graph: FakeGraph, *args: object, **options: object) -> None:
        seed.fill_(1)
        begin(graph, *args, **options)

    monkeypatch.setattr(FakeGraph, "capture_begin", capture_begin)
    modes: list[bool] = []
    capture(lambda: modes.append(torch.is_inference_mode_enabled()), DEVICE, Pool(DEVICE))
    assert modes == [False, False]
    assert (cuda.current, cuda.capturing, gc.isenabled()) == (cuda.user, None, True)


@pytest.mark.parametrize("where", ["fail_begin", "fail_end"])
def test_an_interrupted_capture_leaves_no_capture_mode(cuda: FakeCuda, where: str) -> None:
    """A notebook goes on after it."""
    setattr(cuda, where, KeyboardInterrupt())
    pool = Pool(DEVICE)
    handle = pool.handle
    program = Program(Work(cuda), DEVICE, pool)
    with pytest.raises(KeyboardInterrupt):
        program()
    assert cuda.current is cuda.user
    assert cuda.ended_pools == [handle]
    assert gc.isenabled()
    setattr(cuda, where, None)
    program()
    assert program.graph is not None


def test_a_launch_that_raises_is_ordered_before_what_the_caller_launches_next(cuda: FakeCuda) -> None:
    def launches() -> None:
        raise OutOfResources("shared memory")

    with pytest.raises(OutOfResources):
        capture(launches, DEVICE, Pool(DEVICE))
    assert [stream.name for stream in cuda.user.waited_for] == ["warm-up"]


def test_times_are_taken_on_the_measured_gpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the program's current one is another."""
    monkeypatch.setattr(FakeEvent, "recorded_on", [])
    second = torch.device("cuda", 1)
    assert Timer(second).time([Work(cuda)]) == pytest.approx(2.0)
    assert ends_by_graphs([[Work(cuda)]], second, Pool(second), False, 1) == pytest.approx([0.0005])
    assert set(FakeEvent.recorded_on) == {1}
    assert cuda.device == 0


def test_capturing_is_noticed(cuda: FakeCuda) -> None:
    assert not is_capturing(DEVICE)
    cuda.capturing = FakeGraph(cuda)
    assert is_capturing(DEVICE)
    assert not is_capturing(torch.device("cpu"))


def test_cached_memory_is_returned_between_captures(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[tuple[bool, int | None]] = []

    def empty_cache() -> None:
        emptied.append((graphs._CAPTURE_LOCK.locked(), cuda.device))
        if len(emptied) > 1:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")  # of another library's capture

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    for _ in range(2):
        graphs.free_cached(torch.device("cuda", 1))
    graphs.free_cached(torch.device("cpu"))
    assert emptied == [(True, 1), (True, 1)]
    assert (cuda.device, graphs._CAPTURE_LOCK.locked()) == (0, False)
