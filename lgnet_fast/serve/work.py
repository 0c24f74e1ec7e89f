"""The bounded queue of requests, and the worker of a device that batches their network passes."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..pipeline.inpainter import Inpainter
from .errors import BusyError, CancelledError, DrainingError, RequestError, TimeLimitError

T = TypeVar("T")

_ENDING, _COME_AGAIN = "the server is shutting down", 5
_own = threading.local()  # `job`: what a thread of the queue works on


@dataclass(frozen=True)
class _Pass:
    """One network run of a request: windows of one size. `job`: the work that asked for it, if the queue runs it."""

    key: tuple[Any, ...]
    run: Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
    images: np.ndarray
    holes: np.ndarray
    job: Job | None
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
        """``run(images, holes)``, possibly in one batch with other calls of the same key and window size.

        Raises DrainingError after `close`, the reason of a job that was left, and errors of `run`.
        """
        job: Job | None = getattr(_own, "job", None)
        if job is not None:
            job.check()
        one = _Pass((*key, images.shape[1:]), run, images, holes, job)
        with self._changed:
            if self._closed:
                raise DrainingError(_ENDING, retry_after=_COME_AGAIN)
            self._waiting.append(one)
            self._changed.notify()
        try:
            return one.done.result()
        finally:
            del one  # it refers to the error, which refers to this frame; see `_run`

    def close(self, limit: float | None = None) -> bool:
        """Refuse the waiting passes and end the thread after the one that runs. Returns whether it has ended.

        `limit`: seconds to wait for it, None: until it has ended.
        """
        with self._changed:
            self._closed = True
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for one in refused:
            one.done.set_exception(DrainingError(_ENDING, retry_after=_COME_AGAIN))
        self._thread.join(limit)
        return not self._thread.is_alive()

    def _next(self) -> list[_Pass]:
        with self._changed:
            self._drop_left()
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
                self._drop_left()
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

    def _drop_left(self) -> None:
        """Refuse the waiting passes of jobs whose answer nobody waits for."""
        for one in list(self._waiting):
            if one.job is not None and one.job.left is not None:
                self._waiting.remove(one)
                one.done.set_exception(copy.copy(one.job.left))

    def _work(self) -> None:
        while self._run(self._next()):
            pass

    def _run(self, passes: list[_Pass]) -> bool:
        """Run passes as one batch; False where there are none.

        An error refers to the frames that it has left, and a pass to its error. The list is emptied, because frames
        that refer to the pass would make a cycle, which keeps the arrays until a garbage collection.
        """
        if not passes:
            return False
        try:
            outputs = self._together(passes)
        except Exception as error:
            if len(passes) == 1:
                passes.pop().done.set_exception(error)
            while passes:  # what failed in a batch, for example for lack of memory, may run alone
                self._run([passes.pop(0)])
        else:
            for number, one in enumerate(passes):
                part = slice(number, number + 1) if len(passes) > 1 else slice(None)
                one.done.set_result([output[part] for output in outputs])
        return True

    def _together(self, passes: list[_Pass]) -> list[np.ndarray]:
        start = time.perf_counter()
        images = np.concatenate([one.images for one in passes])
        holes = np.concatenate([one.holes for one in passes])
        try:
            return passes[0].run(images, holes)
        finally:
            self._seen(len(images), time.perf_counter() - start)


class SharedInpainter(Inpainter):
    """An Inpainter whose network passes go through a :class:`DeviceWorker`; made by `over`."""

    worker: DeviceWorker

    @classmethod
    def over(cls, worker: DeviceWorker, model: str | None, **options: Any) -> SharedInpainter:
        """For a model folder or hub id (None: the bundled one); options of `Inpainter.from_pretrained`."""
        made = cls.from_pretrained(model, **options)
        assert isinstance(made, SharedInpainter)
        made.share(worker)
        return made

    def share(self, worker: DeviceWorker) -> None:
        """Let the worker run the network's passes from now on."""
        self.worker = worker
        self.schedule_passes(worker.run)

    @property
    def backend(self) -> str:
        """The backend of the network, as text."""
        return self._network.description


class Job:
    """The work of one request: why it was left (None: it was not), and the duration of its phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.left: Exception | None = None
        self._mark = time.perf_counter()

    def leave(self, why: Exception) -> None:
        """Cancel the work: its next :meth:`check` raises a copy of `why`.

        `why` itself refers to frames that refer to this job: a cycle, which would keep the bytes of the request and
        the picture until a garbage collection.
        """
        self.left = copy.copy(why)

    def check(self) -> None:
        """Raise the error given to :meth:`leave`."""
        if self.left is not None:
            raise copy.copy(self.left)

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
        self._jobs: dict[Job, Future[Any] | None] = {}  # None: it waits for its turn
        self._usual = 0.2
        self.draining = False

    @property
    def depth(self) -> int:
        """Number of requests that wait or run."""
        return len(self._jobs)

    def retry_after(self) -> int:
        """Estimated seconds until a place is free."""
        return max(1, math.ceil(self._usual * self.depth / self._threads))

    async def run(
        self,
        work: Callable[[Job], T],
        gone: Callable[[], Awaitable[bool]] | None = None,
        turn: asyncio.Lock | None = None,
    ) -> tuple[T, Job]:
        """Run ``work(job)`` in a thread. `gone` returns whether the client has left.

        `turn`: held until the work has ended, also if nobody waits for it any more. Waiting for it takes a place and
        time as all waiting does, but no thread.

        Raises BusyError (no place), DrainingError, TimeLimitError, CancelledError (the client has left), and errors
        of `work`.
        """
        if self.draining:
            raise DrainingError(_ENDING, retry_after=_COME_AGAIN)
        if self.depth >= self._limit:
            raise BusyError(f"queue: all {self._limit} places are taken", retry_after=self.retry_after())
        job, start = Job(), time.monotonic()
        self._jobs[job] = None
        if turn is not None:
            await self._take(turn, job, start, gone)
        waiting = self._started(work, job, turn)
        try:
            await self._watch(waiting, job, start, gone)
            if waiting.cancelled():
                raise DrainingError(_ENDING, retry_after=_COME_AGAIN)
            result = waiting.result()
        finally:
            waiting.cancel()  # no effect on work that is done; work that runs ends at its next check
            del waiting  # it refers to the error, which refers to this frame; see `Job.leave`
        spent = time.monotonic() - start
        self._usual += 0.1 * (spent - self._usual)
        self._seen(job.seconds)
        return result, job

    def drain(self) -> None:
        """Reject new and waiting work; running work continues."""
        self.draining = True
        for job, future in list(self._jobs.items()):
            if future is None:
                job.leave(DrainingError(_ENDING, retry_after=_COME_AGAIN))
            else:
                future.cancel()

    def give_up(self) -> None:
        """Answer running work with a DrainingError, too. Its threads end at their next check."""
        self.drain()
        for job in list(self._jobs):
            job.leave(DrainingError(_ENDING, retry_after=_COME_AGAIN))

    def close(self, limit: float | None = None) -> bool:
        """Give up running work and end the threads. Returns whether all work has ended.

        `limit`: seconds to wait for it, None: until it has ended.
        """
        self.give_up()
        running = [future for future in list(self._jobs.values()) if future is not None]
        self._pool.shutdown(wait=False, cancel_futures=True)
        return not wait(running, limit).not_done

    # -- parts -------------------------------------------------------------------------------------------------

    async def _take(
        self, turn: asyncio.Lock, job: Job, start: float, gone: Callable[[], Awaitable[bool]] | None
    ) -> None:
        taking = asyncio.ensure_future(turn.acquire())
        try:
            await self._watch(taking, job, start, gone)
            job.check()
        except BaseException:
            del self._jobs[job]
            if not taking.cancel():  # it was taken in the meantime
                turn.release()
            raise

    def _started(self, work: Callable[[Job], T], job: Job, turn: asyncio.Lock | None) -> asyncio.Future[T]:
        def begin() -> T:
            _own.job = job
            try:
                job.phase("queue")
                return work(job)
            finally:
                _own.job = None

        def end() -> None:
            self._jobs.pop(job, None)
            if turn is not None:
                turn.release()

        future: Future[T] = self._pool.submit(begin)
        self._jobs[job] = future
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda done: _soon(loop, end))
        return asyncio.wrap_future(future)

    async def _watch(
        self, waiting: asyncio.Future[Any], job: Job, start: float, gone: Callable[[], Awaitable[bool]] | None
    ) -> None:
        """Wait until it is done. Else the job is left, for the reason that is raised."""
        try:
            while True:
                left = start + self._timeout - time.monotonic()
                await asyncio.wait({waiting}, timeout=min(0.1, max(0.0, left)))
                if waiting.done():
                    return
                job.check()
                if left <= 0:
                    raise TimeLimitError(f"timeout: the request took more than {self._timeout:g} seconds (--timeout)")
                if gone is not None and await gone():
                    raise CancelledError("the client has left")
        except RequestError as why:
            job.leave(why)
            raise
        except asyncio.CancelledError:
            job.leave(CancelledError("the server ended the request"))
            raise


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *arguments: Any) -> None:
    with suppress(RuntimeError):  # the event loop has ended
        loop.call_soon_threadsafe(call, *arguments)
