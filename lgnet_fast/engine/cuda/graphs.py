"""CUDA graphs: a list of launches captured once and replayed by one call.

A capture holds a lock of the whole process, because concurrent captures disturb each other. It uses a separate
stream, after a warm-up run on another one, which compiles and loads every kernel. Launches that cannot be captured
are made directly; the caller's stream, the allocator and the random generator are restored.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...ops.torch_state import is_capturing, one_line

logger = logging.getLogger("lgnet_fast")

_CAPTURE_LOCK = threading.Lock()
_RETRY_AFTER = (10, 100, 1000)
"""Numbers of calls between a failed capture and the next attempt."""
_STREAMS = 32
"""PyTorch's streams of a GPU; a further one is one of these again."""


class Pool:
    """Memory that the graphs of one owner share, and the stream on which they are captured.

    An owner replays its graphs one after another. PyTorch keeps a workspace of cuBLAS for each stream, whose address
    is part of every graph captured there. Graphs of two owners, replayed at the same time, must not share it; and
    PyTorch 2.13 frees the workspace with any graph captured on its stream, although others use it
    (https://github.com/pytorch/pytorch/issues/193402). Therefore each owner has a stream, as far as there are enough,
    on which nothing runs but captures: the workspace is part of the owner's memory, which remains as long as one of
    its graphs.

    Args:
        device: an NVIDIA GPU.

    Attributes:
        handle: the memory, as ``torch.cuda.graph_pool_handle()`` gives it.
        stream: for captures. PyTorch's allocator gives memory to the stream that used it before, so the graphs of an
            owner share memory only on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            index = torch.cuda.current_device()
        with _CAPTURE_LOCK:
            self.stream = _streams_of(index).take(self)
        self.renew()

    def renew(self) -> None:
        """Other memory for later captures. PyTorch takes no graph into memory whose graphs are all gone, nor into
        that of a failed capture: its allocator of page-locked memory (2.11) takes the capture for one that goes on.
        """
        self.handle = torch.cuda.graph_pool_handle()


class _Streams:
    """The streams of a GPU for captures and their warm-ups."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.warm_up = torch.cuda.Stream(index)
        self._pools: dict[torch.cuda.Stream, weakref.WeakSet[Pool]] = {}

    def take(self, pool: Pool) -> torch.cuda.Stream:
        """The stream of the fewest living pools, which is used by none where possible."""
        if all(self._pools.values()) and len(self._pools) < _STREAMS - 1:
            new = torch.cuda.Stream(self._index)
            if new != self.warm_up:
                self._pools.setdefault(new, weakref.WeakSet())
        stream, pools = min(self._pools.items(), key=lambda item: len(item[1]))
        pools.add(pool)
        return stream


_streams: dict[int, _Streams] = {}
"""GPU's number -> its streams."""


def _streams_of(index: int) -> _Streams:
    if index not in _streams:
        _streams[index] = _Streams(index)
    return _streams[index]


class CaptureError(Exception):
    """The launches ran but could not be captured; `__cause__` is the error of torch or CUDA."""


def capture(
    launches: Callable[[], None],
    device: torch.device,
    pool: Pool,
    spread: bool = False,
    warm_up: Callable[[], None] | None = None,
) -> torch.cuda.CUDAGraph:
    """Capture the launches of `launches` on `device`. The caller's stream is restored, also on failure.

    Args:
        launches: called to warm up, and again. It must neither wait for the device nor read from it.
        pool: memory for what it allocates, and the stream; its memory is renewed after a failure.
        spread: a multiprocessor holds one block of a kernel at a time where all fit so, see
            ``kernels.cuda_driver.spread_blocks``.
        warm_up: called instead of the first call of `launches`.

    Raises:
        CaptureError: `launches` runs, but could not be captured.
        Exception: any error of the warm-up.
    """
    with _CAPTURE_LOCK, torch.cuda.device(device):
        current = torch.cuda.current_stream(device)
        first = _streams_of(torch.cuda.current_device()).warm_up
        try:
            first.wait_stream(current)
            try:
                with torch.cuda.stream(first):
                    (launches if warm_up is None else warm_up)()
            finally:  # launches before one that raises may still use the memory
                current.wait_stream(first)
            graph = torch.cuda.CUDAGraph(keep_graph=True) if spread else torch.cuda.CUDAGraph()
            graph.own_pool = pool  # type: ignore[attr-defined]  # whose stream no other pool gets while it is alive
            try:
                with _uncollected(), contextlib.ExitStack() as end:
                    end.push(_begun(graph, pool))
                    launches()
                if spread:
                    _spread(graph)
            except BaseException as error:  # an interrupt too: the program, such as a notebook, may go on after it
                reason = error_text(error)
                _end_allocations(pool.handle)
                pool.renew()
                _end_random_capture(pool.stream)
                if not isinstance(error, Exception):
                    raise
                raise CaptureError(reason) from error
        finally:
            # where the end of the capture raises, torch.cuda.graph leaves its stream current
            torch.cuda.set_stream(current)
    return graph


def _begun(graph: torch.cuda.CUDAGraph, pool: Pool) -> torch.cuda.graph:
    """A capture that has begun.

    Its begin writes tensors of PyTorch's random generator. Those are inference tensors where the program's first
    graph was captured in inference mode, and can then be written in it only.
    """

    def begin() -> torch.cuda.graph:
        # thread_local: other threads may allocate meanwhile
        recording = torch.cuda.graph(graph, pool.handle, pool.stream, capture_error_mode="thread_local")
        recording.__enter__()
        return recording

    try:
        return begin()
    except RuntimeError as error:
        if "inference tensor" not in str(error):
            raise
        with torch.inference_mode():
            return begin()


def _spread(graph: torch.cuda.CUDAGraph) -> None:
    """Change a captured graph for `capture(..., spread=True)`, and instantiate it."""
    from lgnet_fast.kernels.cuda_driver import spread_blocks

    spread_blocks(graph.raw_cuda_graph(), torch.cuda.current_device())
    graph.instantiate()


def free_cached(device: torch.device) -> None:
    """Return memory that PyTorch's allocator caches to the driver, which loads kernels and graphs into it.

    Not during a capture, for which the allocator would raise an internal error.
    """
    if device.type == "cuda":
        with _CAPTURE_LOCK, contextlib.suppress(RuntimeError), torch.cuda.device(device):
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Disable garbage collection: a destructor that waits for the device would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_allocations(handle: Any) -> None:
    """End the capture mode of PyTorch's allocator, which a failed capture may leave on."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with contextlib.suppress(Exception):  # the mode had ended, or had not begun
            end(torch.cuda.current_device(), handle)


def _end_random_capture(stream: torch.cuda.Stream) -> None:
    """End the capture mode of PyTorch's random generator by a capture that succeeds.

    Some versions of PyTorch leave it on where a capture fails. The program's next random number on this GPU raises
    "Offset increment outside graph capture encountered unexpectedly".
    """
    with (
        contextlib.suppress(Exception),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device="cuda", dtype=torch.float32)  # a graph without a node gives a warning


def event_of(device: torch.device) -> torch.cuda.Event | None:
    """An event after all launches so far on the current stream."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    if not is_capturing(device):
        event.record(torch.cuda.current_stream(device))
    return event


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call's work on the current stream of an NVIDIA GPU, after which it waits."""
    with torch.cuda.device(device):  # an event is recorded on the current GPU
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def error_text(error: BaseException) -> str:
    """An exception in one line, preceded by its context: a failed capture hides the error of the launch."""
    first = error.__cause__ or error.__context__
    return one_line(error) if first is None else f"{error_text(first)}; then {one_line(error)}"


class Program:
    """Launches on fixed memory: directly for the first `direct` calls, then by graph where that is possible.

    A failed capture is tried again after 10, 100 and 1000 more calls, because a synchronisation by another thread can
    cause it, then no more. Not thread-safe: the owner of the memory must hold its lock and order the streams of
    calls.

    Args:
        launches: see :func:`capture`.
        device: of the launches; graphs need "cuda".
        pool: see :func:`capture`; None: never capture.
        direct: number of calls without a graph, for work that may not be repeated.
        spread: see :func:`capture`.

    A call raises what `launches` raises.
    """

    def __init__(
        self,
        launches: Callable[[], None],
        device: torch.device,
        pool: Pool | None = None,
        direct: int = 0,
        spread: bool = False,
    ) -> None:
        self._launches, self._device, self._pool, self._spread = launches, device, pool, spread
        self.graph: torch.cuda.CUDAGraph | None = None
        self.reason: str | None = None if pool is not None else "graphs are switched off"
        """Why the capture failed; None where there is a graph, or no capture was tried yet."""
        self._waits = list(_RETRY_AFTER) if pool is not None else []
        self._wait = direct if pool is not None else -1

    def __call__(self) -> None:
        if self.graph is None and self._wait == 0 and self._pool is not None:
            self._capture(self._pool)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._wait -= self._wait > 0
            self._launches()

    def _capture(self, pool: Pool) -> None:
        try:
            self.graph = capture(self._launches, self._device, pool, self._spread)
        except CaptureError as error:
            first = self.reason is None
            self.reason = str(error)
            self._wait = self._waits.pop(0) if self._waits else -1
            logger.log(
                logging.WARNING if first else logging.INFO,
                "no CUDA graph, kernels are launched one by one%s (%s)",
                f"; tried again after {self._wait} calls" if self._wait > 0 else "",
                self.reason,
            )
        else:
            self.reason = None
