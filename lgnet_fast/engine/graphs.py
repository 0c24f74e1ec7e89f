"""CUDA graphs: a list of launches recorded once, and replayed by one call.

Capturing happens under a lock of the whole process (two captures at once disturb each other), on a stream of its own,
after a run on that stream, which compiles and loads every kernel. What cannot be captured is launched directly; the
caller's stream and the allocator are left as they were.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

logger = logging.getLogger("lgnet_fast")

_CAPTURE_LOCK = threading.Lock()
_RETRY_AFTER = (10, 100, 1000)
"""Calls between a failed capture and the next try."""


class CaptureError(Exception):
    """A list of launches ran, but could not be captured; `__cause__` is what torch or CUDA said."""


def capture(launches: Callable[[], None], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """Record what `launches` launches on `device`. The caller's stream is current again afterwards, whatever failed.

    Args:
        launches: called twice, first to warm up. It must neither wait for the device nor read from it.
        pool: memory for what it allocates, as ``torch.cuda.graph_pool_handle()`` gives.

    Raises:
        CaptureError: it runs, but cannot be captured, here or just now.
        Exception: whatever the first call of `launches` raises: it does not run at all.
    """
    with _CAPTURE_LOCK, torch.cuda.device(device):
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        try:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                launches()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads may allocate meanwhile
                with (
                    _uncollected(),
                    torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    launches()
            except Exception as error:
                _end_allocations(pool)
                raise CaptureError(error_text(error)) from error
        finally:
            # torch.cuda.graph leaves its own stream current where the end of the capture raises
            torch.cuda.set_stream(current)
    return graph


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: an object that waits for the device as it goes would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_allocations(pool: Any) -> None:
    """PyTorch's allocator serves a capture until its end, which a failed one may not have told it of."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with contextlib.suppress(Exception):  # it had been told, or never began
            end(torch.cuda.current_device(), pool)


def error_text(error: BaseException) -> str:
    """An exception in one line, after the one during whose handling it came (a failed capture hides the launch's)."""
    first = error.__cause__ or error.__context__
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text if first is None else f"{error_text(first)}; then {text}"


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured, by whomever."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Program:
    """Launches on fixed memory: directly for the first `direct` calls, then by graph where that is possible.

    A capture that fails is tried again after 10, 100 and 1000 more calls (another thread's synchronise can fail one),
    then no more. Not thread-safe: the owner of the memory holds its lock and orders the streams that calls come on.

    Args:
        launches: what :func:`capture` takes.
        device: where; graphs need "cuda".
        pool: see :func:`capture`; None: never capture.
        direct: calls without a graph, for work that may not come again.

    A call raises what `launches` raises.
    """

    def __init__(self, launches: Callable[[], None], device: torch.device, pool: Any = None, direct: int = 0) -> None:
        self._launches, self._device, self._pool = launches, device, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.reason: str | None = None if pool is not None else "graphs are switched off"
        """Why there is no graph; None where there is one, or none was tried yet."""
        self._waits = list(_RETRY_AFTER) if pool is not None else []
        self._wait = direct if pool is not None else -1

    def __call__(self) -> None:
        if self.graph is None and self._wait == 0:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._wait -= self._wait > 0
            self._launches()

    def _capture(self) -> None:
        try:
            self.graph = capture(self._launches, self._device, self._pool)
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
