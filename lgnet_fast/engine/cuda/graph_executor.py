"""Running a plan on a GPU over one arena, the whole forward replayed as one CUDA graph, whatever runs its steps.

Feature maps are NHWC in the arena of :mod:`..arena`, in the dtype of the computation. Pictures are passed in and out
as float32, so that known pixels of the result are exactly those of the input.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lgnet_fast.kernels.results import Merge

from ... import forks
from ...ops.torch_state import is_capturing
from ..executor import Executor, Regions, Result
from ..plan import PICTURE, Plan
from ..recent import Recent
from ..regions import Rect
from .graphs import Pool, Program, event_of
from .launches import Launch, ends, ends_by_graphs, run_all
from .memory import Memory, least_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

GRAPHS_KEPT = 32
"""Graphs kept per shape, one for each set of rectangles."""


@dataclass(frozen=True)
class GraphOptions:
    """How steps are launched.

    Attributes:
        graphs: replay a CUDA graph.
    """

    graphs: bool = True


class Weights(Protocol):
    """Weights on a device, which the executors of all sizes of a network share."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def packed(self) -> torch.cuda.Event | None:
        """After the packing on the device; None where it is known to be done."""

    @property
    def bytes(self) -> int: ...


class GraphExecutor(Executor):
    """Runs a plan by the launches of its steps, on a GPU as one graph (on CPU tensors, for tests, one by one).

    Thread-safe: calls share their buffers, so they run one after another, in the order of arrival.

    Args:
        plan: dense; only its shapes are used.
        weights: of the plan's network.
        options: how launches are made.
    """

    def __init__(self, plan: Plan, weights: Weights, options: GraphOptions) -> None:
        self.weights, self.options = weights, options
        self.plan = plan.without_weights()
        self._lock = forks.Lock()
        self._own: Memory | None = None
        self._last = max((number for number, step in enumerate(plan.steps) if step.merges), default=-1)
        self._pool = self._graph_pool()
        if self.weights.packed is not None and not is_capturing(self.device):
            torch.cuda.current_stream(self.device).wait_event(self.weights.packed)
        self._done = event_of(self.device)
        # Nothing here refers to the executor itself: its memory is to be freed with the last reference, not by a
        # later garbage collection.
        self._programs: Recent[Program] = Recent(GRAPHS_KEPT, functools.partial(_before_drop, self._done))
        if self._done is not None:
            # Freed memory returns to the stream that allocated it, but the last run may still use it on another
            # stream.
            weakref.finalize(self, _let_finish, self._done, self.device).atexit = False

    @property
    def spread(self) -> bool:
        """See :func:`.graphs.capture`."""
        return False

    def precompile(self) -> None:
        """Compile the kernels of a dense run ahead, where there are any to compile."""

    @abstractmethod
    def _precision(self) -> object:
        """What a program keeps of the caller's settings: a change of them needs another graph."""

    @abstractmethod
    def _paint(self, memory: Memory, painted: bool) -> Launch:
        """The launch before the first step: the hole painted white or with the start, the picture copied."""

    @abstractmethod
    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """The launches of one step, in its rectangles (None: everywhere)."""

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    def resized(self, plan: Plan) -> Self:
        return type(self)(plan, self.weights, self.options)

    def without_graphs(self) -> Self:
        """An executor with the same weights and sizes that launches every kernel without a graph."""
        return type(self)(self.plan, self.weights, replace(self.options, graphs=False))

    # -- programs ------------------------------------------------------------------------------------------------

    def _graph_pool(self) -> Pool | None:
        """Memory that the graphs share; None: nothing is captured."""
        return Pool(self.device) if self.device.type == "cuda" and self.options.graphs else None

    @property
    def memory(self) -> Memory:
        """The buffers, allocated at first use."""
        if self._own is None:
            self._own = Memory(self.plan, self.dtype, self.device)
        return self._own

    @property
    def uses_graphs(self) -> bool:
        """Whether runs are captured."""
        return self._pool is not None

    @property
    def graph_reason(self) -> str | None:
        """Why a capture failed; None where none did."""
        return next((p.reason for p in self._programs.values() if self.uses_graphs and p.reason), None)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.weights.bytes

    @property
    def buffer_bytes(self) -> int:
        """See :attr:`..executor.Executor.buffer_bytes`; without the graphs' own memory, which is not known."""
        memory = self._own
        return least_bytes(self.plan, self.dtype) if memory is None else memory.bytes

    @property
    def held_bytes(self) -> int:
        memory = self._own
        return 0 if memory is None else memory.bytes

    def drop_buffers(self) -> None:
        """See :meth:`..executor.Executor.drop_buffers`; graphs are dropped too. Waits for the device."""
        with self._lock:
            if self._own is None or is_capturing(self.device):
                return
            if self._done is not None:
                self._done.synchronize()  # a run on any stream may still use them
            self._programs.clear()
            self._own = None
            if self._pool is not None:
                self._pool.renew()

    def holes_of(self, regions: Regions) -> tuple[Rect, ...]:
        """The rectangles of holes to which these regions belong."""
        return regions[self._last]

    def _program(self, memory: Memory, regions: Regions | None, painted: bool) -> Program:
        key = (self._precision(), painted, None if regions is None else self.holes_of(regions))

        def make() -> Program:
            launches = functools.partial(run_all, self._launches(memory, regions, painted))
            direct = 0 if regions is None else 1
            return Program(launches, self.device, self._pool, direct, spread=self.spread)

        return self._programs.get(key, make)

    def _launches(self, memory: Memory, regions: Regions | None, painted: bool) -> list[Launch]:
        launches = [self._paint(memory, painted)]
        for number in range(len(self.plan.steps)):
            launches += self.step_launches(memory, number, None if regions is None else regions[number])
        return launches

    def _merge_of(self, memory: Memory, number: int) -> Merge | None:
        """Where a step that ends a stage merges its picture; None for other steps."""
        if not self.plan.steps[number].merges:
            return None
        stage = sum(step.merges for step in self.plan.steps[: number + 1])
        last = number == self._last
        merged = memory.outputs[0] if last else memory.maps[PICTURE]
        return Merge(memory.image, memory.mask, memory.outputs[stage], merged, last)

    def launches(self, regions: Regions | None = None) -> list[Launch]:
        """The launches of a run in `regions` (None: dense), for callers that time or capture them."""
        return self._launches(self.memory, regions, False)

    def launches_by_step(self, painted: bool) -> list[tuple[str, Launch]]:
        """A dense run as (name of the step, its launches), with "paint" first; for checks between steps."""
        memory = self.memory
        steps = [(s.name, functools.partial(self._run_step, memory, n)) for n, s in enumerate(self.plan.steps)]
        return [("paint", self._paint(memory, painted)), *steps]

    def _run_step(self, memory: Memory, number: int) -> None:
        run_all(self.step_launches(memory, number))

    # -- running -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Exclusive use of the buffers: the lock orders host threads, the event orders streams."""
        with self._lock:
            if self._done is not None:
                torch.cuda.current_stream(self.device).wait_event(self._done)
            try:
                yield
            finally:
                if self._done is not None:
                    self._done.record(torch.cuda.current_stream(self.device))

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        """See :meth:`..executor.Executor.run`. Waits for the device only where it captures a graph.

        While the caller captures a graph, the launches become part of that graph and use separate buffers.
        """
        if not self.restricts:
            regions = None
        with torch.inference_mode(False), torch.no_grad():
            if is_capturing(self.device):
                return self._run_captured(image, mask, start, regions, stages)
            with self.turn():
                memory = self.memory
                program = self._program(memory, regions, start is not None)
                memory.take(image, mask, start)
                program()
                outputs = (memory.outputs if stages else memory.outputs[:1]).clone()
        return outputs[0], list(outputs[1:])

    def _run_captured(
        self, image: Tensor, mask: Tensor, start: Tensor | None, regions: Regions | None, stages: bool
    ) -> Result:
        """Launches for a graph of the caller. Our lock and event cannot order its replays, so the launches share only
        the weights with other calls."""
        memory = Memory(self.plan, self.dtype, self.device)
        memory.take(image, mask, start)
        run_all(self._launches(memory, regions, start is not None))
        return memory.outputs[0], list(memory.outputs[1:]) if stages else []

    def step_times(self, image: Tensor, mask: Tensor, regions: Regions | None = None, rounds: int = 5) -> list[float]:
        """Milliseconds of every step. Waits for the device.

        On a GPU with graphs: the difference between graphs of the first k and k + 1 steps, so that caches are in the
        state that the previous step leaves. Otherwise the time between the ends of two steps."""
        if not self.restricts:
            regions = None
        self.run(image, mask)  # every map holds finite numbers now
        with torch.inference_mode(False), torch.no_grad(), self.turn():
            parts = [[self._paint(self.memory, False)]]
            for number in range(len(self.plan.steps)):
                parts.append(self.step_launches(self.memory, number, None if regions is None else regions[number]))
            if self._pool is not None and self.device.type == "cuda":
                until = ends_by_graphs(parts, self.device, self._pool, self.spread, rounds)
            else:
                until = ends(parts, self.device, rounds)
        return [max(0.0, after - before) for before, after in itertools.pairwise(until)]


def _before_drop(done: torch.cuda.Event | None, program: Program) -> None:
    if program.graph is not None and done is not None:
        done.synchronize()  # a graph must not be destroyed while the device runs it


def _let_finish(done: torch.cuda.Event, device: torch.device) -> None:
    if not is_capturing(device):
        done.synchronize()
