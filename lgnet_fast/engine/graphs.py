"""CUDA graphs: a list of launches recorded once, and replayed by one call.

Capturing happens under a lock of the whole process (two captures at once disturb each other), on a stream of its own,
after a run on that stream, which compiles and loads every kernel. What cannot be captured is launched directly.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

logger = logging.getLogger("lgnet_fast")

_CAPTURE_LOCK = threading.Lock()

T = TypeVar("T")


class Recent(Generic[T]):
    """At most `limit` values by key; the least recently used goes first, through `drop`."""

    def __init__(self, limit: int, drop: Callable[[T], None] = lambda value: None) -> None:
        self.limit, self._drop = limit, drop
        self._values: OrderedDict[object, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def values(self) -> list[T]:
        """The least recently used first."""
        return list(self._values.values())

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value of `key`, made where there is none."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        if len(self._values) > self.limit:
            self._drop(self._values.popitem(last=False)[1])
        return value


def capture(launches: Callable[[], None], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """Record what `launches` launches on `device`.

    Args:
        launches: called twice, first to warm up. It must neither wait for the device nor read from it.
        pool: memory for what it allocates, as ``torch.cuda.graph_pool_handle()`` gives.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    with _CAPTURE_LOCK, torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            launches()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            launches()
    return graph


class Program:
    """Launches on fixed memory: directly for the first `direct` calls, then by graph where that is possible.

    Not thread-safe: the owner of the memory holds its lock and orders the streams that calls come on.

    Args:
        launches: what :func:`capture` takes.
        device: where; graphs need "cuda".
        pool: see :func:`capture`; None: never capture.
        direct: calls without a graph, for work that may not come again.
    """

    def __init__(self, launches: Callable[[], None], device: torch.device, pool: Any = None, direct: int = 0) -> None:
        self._launches, self._device, self._pool, self._direct = launches, device, pool, direct
        self.graph: torch.cuda.CUDAGraph | None = None
        self.reason: str | None = None if pool is not None else "graphs are switched off"

    def __call__(self) -> None:
        if self.graph is None and self.reason is None:
            if self._direct > 0:
                self._direct -= 1
            else:
                self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._launches()

    def _capture(self) -> None:
        try:
            self.graph = capture(self._launches, self._device, self._pool)
        except RuntimeError as error:
            self.reason = f"{type(error).__name__}: {error}"
            logger.warning("no CUDA graph, kernels are launched one by one (%s)", self.reason)
