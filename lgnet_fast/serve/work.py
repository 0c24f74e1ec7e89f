"""The bounded queue of requests, and the worker of a device that batches their network passes."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..pipeline.inpainter import Inpainter
from .errors import BusyError, CancelledError, DrainingError, TimeLimitError

T = TypeVar("T")


@dataclass(frozen=True)
class _Pass:
    """One network run of a request: windows of one size."""

    key: tuple[Any, ...]
    run: Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
    images: np.ndarray
    holes: np.ndarray
    done: Future[list[np.ndarray]] = field(default_factory=Future)


class DeviceWorker:
    """A thread that runs the passes of one device one after the other. Waiting passes of one size run as one batch of
    2, 4, ... up to `batch` windows: powers of two, so that few batch sizes need a plan.

    `seen` is called with the number of windows of each run and its seconds.
    """

    def __init__(self, batch: int, seen: Callable[[int, float], None] = lambda windows, seconds: None) -> None:
        self._batch = batch
        self._seen = seen
        self._waiting: deque[_Pass] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="lgnet-device", daemon=True)
        self._thread.start()

    def run(
        self,
        key: tuple[Any, ...],
        run: Callable[[np.ndarray, np.ndarray], list[np.ndarray]],
        images: np.ndarray,
        holes: np.ndarray,
    ) -> list[np.ndarray]:
        """``run(images, holes)``, possibly in one batch with other calls of the same key and window size."""
        one = _Pass((*key, images.shape[1:]), run, images, holes)
        with self._changed:
            if self._closed:
                raise DrainingError("the server is shutting down")
            self._waiting.append(one)
            self._changed.notify()
        return one.done.result()

    def close(self) -> None:
        """End the thread after the waiting passes."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _next(self) -> list[_Pass]:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            first = self._waiting.popleft()
            alike = [one for one in self._waiting if one.key == first.key and len(one.images) == 1]
            count = 1
            if len(first.images) == 1:
                while count * 2 <= min(self._batch, 1 + len(alike)):
                    count *= 2
            chosen = [first, *alike[: count - 1]]
            for one in chosen[1:]:
                self._waiting.remove(one)
            return chosen

    def _work(self) -> None:
        while passes := self._next():
            start = time.perf_counter()
            try:
                images = np.concatenate([one.images for one in passes])
                holes = np.concatenate([one.holes for one in passes])
                outputs = passes[0].run(images, holes)
            except Exception as error:
                if len(passes) == 1:
                    passes[0].done.set_exception(error)
                    continue
                for one in passes:  # passes that fail in a batch, for example for lack of memory, may run alone
                    try:
                        one.done.set_result(one.run(one.images, one.holes))
                    except Exception as own:
                        one.done.set_exception(own)
                continue
            finally:
                self._seen(sum(len(one.images) for one in passes), time.perf_counter() - start)
            for number, one in enumerate(passes):
                part = slice(number, number + 1) if len(passes) > 1 else slice(None)
                one.done.set_result([output[part] for output in outputs])


class SharedInpainter(Inpainter):
    """An Inpainter whose network passes go through a :class:`DeviceWorker`; made by `over`."""

    worker: DeviceWorker

    @classmethod
    def over(cls, worker: DeviceWorker, model: str | None, **options: Any) -> SharedInpainter:
        """For a model folder or hub id (None: the bundled one); options of `Inpainter.from_pretrained`."""
        made = cls.from_pretrained(model, **options)
        assert isinstance(made, SharedInpainter)
        made.worker = worker
        return made

    def _run(self, model: Any, dtype: Any, images: np.ndarray, holes: np.ndarray, stages: bool) -> list[np.ndarray]:
        run = super()._run
        return self.worker.run(
            (id(model), dtype, stages),
            lambda images, holes: run(model, dtype, images, holes, stages),
            images,
            holes,
        )

    @property
    def backend(self) -> str:
        """The backend of the network, as text."""
        from ..engine import Engine

        way = "engine" if isinstance(self._model, Engine) else type(self._model).__name__
        return f"{way} on {self.device}, {str(self.dtype).removeprefix('torch.')}"


class Job:
    """The work of one request: whether its client has left, and the duration of its phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._left: Exception | None = None
        self._mark = time.perf_counter()

    def leave(self, why: Exception) -> None:
        """Cancel the work: its next :meth:`check` raises `why`."""
        self._left = why

    def check(self) -> None:
        """Raise the error given to :meth:`leave`."""
        if self._left is not None:
            raise self._left

    def phase(self, name: str) -> None:
        """End a phase: the time since the end of the previous one belongs to it."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._mark
        self._mark = now
        self.check()

    @property
    def server_timing(self) -> str:
        """The phases as a Server-Timing header, in milliseconds."""
        return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in self.seconds.items())


class WorkQueue:
    """Runs the work of requests in threads, not in the event loop; at most `limit` of them wait or run.

    `seen` is called with the seconds of each phase.
    """

    def __init__(
        self,
        threads: int,
        limit: int,
        timeout: float,
        seen: Callable[[dict[str, float]], None] = lambda seconds: None,
    ) -> None:
        self._threads, self._limit, self._timeout, self._seen = threads, limit, timeout, seen
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lgnet-request")
        self._jobs: dict[Job, Future[Any]] = {}
        self._usual = 0.2
        self.draining = False

    @property
    def depth(self) -> int:
        """Number of requests that wait or run."""
        return len(self._jobs)

    def retry_after(self) -> int:
        """Estimated seconds until a place is free."""
        return max(1, math.ceil(self._usual * self.depth / self._threads))

    async def run(self, work: Callable[[Job], T], gone: Callable[[], Awaitable[bool]] | None = None) -> tuple[T, Job]:
        """Run ``work(job)`` in a thread. `gone` returns whether the client has left.

        Raises BusyError (no place), DrainingError, TimeLimitError, CancelledError (the client has left), and errors
        of `work`.
        """
        if self.draining:
            raise DrainingError("the server is shutting down", retry_after=5)
        if self.depth >= self._limit:
            raise BusyError(f"queue: all {self._limit} places are taken", retry_after=self.retry_after())
        job = Job()

        def begin() -> T:
            job.phase("queue")
            return work(job)

        future: Future[T] = self._pool.submit(begin)
        self._jobs[job] = future
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda done: _soon(loop, self._jobs.pop, job, None))
        waiting = asyncio.wrap_future(future)
        start = time.monotonic()
        try:
            while True:
                await asyncio.wait({waiting}, timeout=0.1)
                if waiting.done():
                    break
                if time.monotonic() - start > self._timeout:
                    raise self._left(
                        job, future, TimeLimitError(f"timeout: the request took more than {self._timeout:g} seconds")
                    )
                if gone is not None and await gone():
                    raise self._left(job, future, CancelledError("the client has left"))
        except asyncio.CancelledError:
            self._left(job, future, CancelledError("the server ended the request"))
            raise
        finally:
            if not waiting.done():
                waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        if future.cancelled():
            raise DrainingError("the server is shutting down", retry_after=5)
        result = waiting.result()
        spent = time.monotonic() - start
        self._usual += 0.1 * (spent - self._usual)
        self._seen(job.seconds)
        return result, job

    def drain(self) -> None:
        """Reject new and waiting work; running work continues."""
        self.draining = True
        for future in list(self._jobs.values()):
            future.cancel()

    def close(self) -> None:
        """End the threads after the running work."""
        self.drain()
        for job in list(self._jobs):
            job.leave(DrainingError("the server is shutting down"))
        self._pool.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _left(job: Job, future: Future[Any], why: Exception) -> Exception:
        job.leave(why)
        future.cancel()
        return why


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *arguments: Any) -> None:
    with suppress(RuntimeError):  # the event loop has ended
        loop.call_soon_threadsafe(call, *arguments)
