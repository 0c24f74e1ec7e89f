"""Running a plan on an NVIDIA GPU: Triton kernels over one arena, the whole forward replayed as one CUDA graph.

Each step is one launch of `kernels/conv.py` (two with split depth, one more for every further rectangle of a
restricted run) or the attention block. Where the tuner measured them as faster, a step uses a compiled kernel
(`kernels/hopper.py`, `kernels/picture_conv.py`) or PyTorch's convolution (cuDNN, kernels/conv_tables.py), and the
deep layers of a dense run share a launch (:mod:`.deep`). Feature maps are NHWC in the arena of :mod:`.arena`, in the
dtype of the computation. Pictures are passed in and out as float32, so that known pixels of the result are exactly
those of the input.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import forks
from ..ops.first_use import is_capturing
from .cpu_tuning import entry_name
from .cuda_launches import Launch, attend, convolve, ends, ends_by_graphs, run_all
from .cuda_memory import Memory, least_bytes
from .cuda_weights import CudaWeights, Tuned, conv_of, event_of, target_of, work_of
from .deep import group_launch, make_groups
from .executor import Executor, Regions, Result
from .graphs import Program
from .plan import PICTURE, AttentionStep, ConvStep, Plan, Step
from .recent import Recent
from .regions import Rect

if TYPE_CHECKING:
    from typing_extensions import Self

    from lgnet_fast.kernels.compiled import CompiledTile
    from lgnet_fast.kernels.conv_configs import Tile
    from lgnet_fast.kernels.deep import DeepGroup

    from .cuda_weights import Choice, Overlap

logger = logging.getLogger("lgnet_fast")

GRAPHS_KEPT = 32
"""Graphs kept per shape, one for each set of rectangles."""


@dataclass(frozen=True)
class CudaOptions:
    """How kernels are launched.

    Attributes:
        graphs: replay a CUDA graph.
        overlap: how launches overlap (Hopper and newer); None: as measured, else not at all.
        clone_outputs: return copies; otherwise the next call overwrites the results.
        deep_rows: consecutive steps of at most this many outputs per phase share a launch where they can (Hopper,
            dense runs); 0: none; None: as measured, else none.
    """

    graphs: bool = True
    overlap: Overlap | None = None
    clone_outputs: bool = True
    deep_rows: int | None = None


class CudaExecutor(Executor):
    """Runs a plan on an NVIDIA GPU (or, where Triton runs interpreted, on CPU tensors without graphs).

    Thread-safe: calls share their buffers, so they run one after another, in the order of arrival.

    Args:
        plan: dense; only its shapes are used.
        weights: of the plan's network.
        options: how launches are made.
    """

    granularity = 32  # coarse, so that few graphs serve many holes
    # A launch in a graph takes 2.8 us on an H100, which does 3.6e14 multiply-accumulates a second (by the difference
    # between a 16x16 hole and a dense run).
    region_macs = 1e9

    def __init__(self, plan: Plan, weights: CudaWeights, options: CudaOptions = CudaOptions()) -> None:
        if (reason := self.unavailable_reason(weights.device, weights.dtype)) is not None:
            raise RuntimeError(reason)
        self.weights, self.options = weights, options
        if options.overlap not in (None, "none") and (reason := self._overlap_reason()) is not None:
            raise RuntimeError(f"overlap: {reason}")
        self.plan = plan.without_weights()
        self._lock = forks.Lock()
        self._own: Memory | None = None
        self._groups: dict[int, DeepGroup] | None = None
        self._last = max((number for number, step in enumerate(plan.steps) if step.merges), default=-1)
        self._pool = self._graph_pool()
        if weights.packed is not None and not is_capturing(self.device):
            torch.cuda.current_stream(self.device).wait_event(weights.packed)
        self._done = event_of(self.device)
        # Nothing here refers to the executor itself: its memory is to be freed with the last reference, not by a
        # later garbage collection.
        self._programs: Recent[Program] = Recent(GRAPHS_KEPT, functools.partial(_before_drop, self._done))
        if self._done is not None:
            # Freed memory returns to the stream that allocated it, but the last run may still use it on another
            # stream.
            weakref.finalize(self, _let_finish, self._done, self.device).atexit = False

    @classmethod
    def of(
        cls,
        plan: Plan,
        dtype: torch.dtype = torch.float16,
        *,
        device: torch.device | None = None,
        choices: Mapping[str, Choice] | None = None,
        tuned: Tuned | None = None,
        by_library: frozenset[str] = frozenset(),
        **options: Any,
    ) -> Self:
        """The executor of a plan with weights.

        Args:
            plan: dense, with weights; only its shapes are kept.
            dtype: float32 (tf32 as ``torch.backends.cuda.matmul.allow_tf32`` says), float16 or bfloat16.
            device: where to run; None: where the weights are.
            choices, tuned, by_library: see :class:`.cuda_weights.CudaWeights`.
            options: of :class:`CudaOptions`.
        """
        device = plan.steps[0].weight.device if device is None else torch.device(device)
        if (reason := cls.unavailable_reason(device, dtype)) is not None:
            raise RuntimeError(reason)
        weights = CudaWeights.pack(plan, dtype, device=device, choices=choices, tuned=tuned, by_library=by_library)
        return cls(plan, weights, CudaOptions(**options))

    @staticmethod
    def unavailable_reason(device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
        """Why this executor cannot run on `device` in `dtype`, in one sentence; None where it can."""
        from lgnet_fast import kernels

        if (reason := kernels.missing()) is not None:
            return reason
        from lgnet_fast.kernels.conv import CAPABILITY
        from lgnet_fast.kernels.launch import device_reason

        return device_reason(torch.empty(0, dtype=dtype, device=device), CAPABILITY)

    def _overlap_reason(self) -> str | None:
        from lgnet_fast.kernels.conv import can_overlap

        return can_overlap(self.device)

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

    # -- choices -------------------------------------------------------------------------------------------------

    def tile(self, step: ConvStep, rect: Rect | None = None) -> Tile:
        """The tile for a rectangle (None: all) of a step."""
        from lgnet_fast.kernels.conv_configs import Tile, pick_tile

        target = target_of(self.device, self.dtype)
        work = work_of(self.plan, step, rect)
        for choice in (self.weights.chosen.get(step.name), self.weights.tuned.tile(work, target[0])):
            if isinstance(choice, Tile):
                return choice
        return pick_tile(work, *target)

    def _compiled_tile(self, step: ConvStep, rect: Rect | None = None) -> CompiledTile | None:
        """The tile of a compiled kernel for a rectangle of a step; None where `kernels/conv.py` runs it."""
        from lgnet_fast.kernels.compiled import as_compiled, usable
        from lgnet_fast.kernels.hopper import HopperTile

        choice = self.weights.chosen.get(step.name)
        if choice is not None:
            return as_compiled(choice)
        kind, _, _ = target_of(self.device, self.dtype)
        measured = as_compiled(self.weights.tuned.tile(work_of(self.plan, step, rect), kind))
        if measured is None or not usable(measured, conv_of(step), self.dtype, self.device):
            return None
        # a step with the same product may have a residual, which these kernels do not add
        return measured if isinstance(measured, HopperTile) or step.residual is None else None

    @property
    def choices(self) -> dict[str, str]:
        """Step's name -> what runs it in a dense run: "cudnn", "attention", "deep" (in one launch with others),
        "hopper PIXELSxCHANNELS/cluster xWARPGROUPS", "picture COLUMNSxROWS", or BLOCK_MxBLOCK_NxBLOCK_K/splits.
        "launches": how they overlap, if they do."""
        choices = {step.name: self._choice(step) for step in self.plan.steps}
        for first, group in self._deep_groups().items():
            choices.update((step.name, "deep") for step in self.plan.steps[first : first + len(group.layers)])
        if self.overlap != "none":
            choices["launches"] = f"overlap, {self.overlap}"
        return choices

    @functools.cached_property
    def overlap(self) -> Overlap:
        """How the launches overlap."""
        if self.options.overlap is not None:
            return self.options.overlap
        measured = self.weights.tuned.overlap
        return measured.get(entry_name(self.plan), "none") if measured else "none"

    @property
    def chosen_by(self) -> str:
        tuned = self.weights.tuned
        measured = tuned.tiles or tuned.attention or tuned.deep_rows or tuned.overlap
        return "measurement, else table and estimate" if measured else "table and estimate"

    def _choice(self, step: Step) -> str:
        if isinstance(step, AttentionStep):
            return "torch" if step.name in self.weights.by_library else "attention"
        if self.weights.steps[step.name].plain is not None:
            return "cudnn"
        if (compiled_tile := self._compiled_tile(step)) is not None:
            return compiled_tile.label
        return self.tile(step).label

    # -- programs ------------------------------------------------------------------------------------------------

    def _graph_pool(self) -> Any:
        """Memory pool that the graphs share; None: nothing is captured."""
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" and self.options.graphs else None

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
        """See :attr:`.executor.Executor.buffer_bytes`; without the graphs' own memory, which is not known."""
        memory = self._own
        return least_bytes(self.plan, self.dtype) if memory is None else memory.bytes

    def drop_buffers(self) -> None:
        """See :meth:`.executor.Executor.drop_buffers`; graphs are dropped too. Waits for the device."""
        with self._lock:
            if self._own is None or is_capturing(self.device):
                return
            if self._done is not None:
                self._done.synchronize()  # a run on any stream may still use them
            self._programs.clear()
            self._own = None
            # PyTorch takes no graph into a pool whose graphs are all gone
            self._pool = None if self._pool is None else self._graph_pool()

    def holes_of(self, regions: Regions) -> tuple[Rect, ...]:
        """The rectangles of holes to which these regions belong."""
        return regions[self._last]

    def _program(self, memory: Memory, regions: Regions | None, painted: bool) -> Program:
        kind, _, _ = target_of(self.device, self.dtype)
        key = (kind, painted, None if regions is None else self.holes_of(regions))

        def make() -> Program:
            launches = functools.partial(run_all, self._launches(memory, regions, painted))
            direct = 0 if regions is None else 1
            return Program(launches, self.device, self._pool, direct, spread=self.overlap == "spread")

        return self._programs.get(key, make)

    def _launches(self, memory: Memory, regions: Regions | None, painted: bool) -> list[Launch]:
        from lgnet_fast.kernels.conv import paint_forward

        start = memory.start if painted else None
        launches: list[Launch] = [
            functools.partial(
                paint_forward,
                memory.image,
                memory.mask,
                start,
                memory.maps[PICTURE],
                memory.outputs[0],
                self.overlap != "none",
            )
        ]
        groups = {} if regions is not None else self._deep_groups()
        number = 0
        while number < len(self.plan.steps):
            if number in groups:
                launches.append(group_launch(self.plan, number, groups[number], memory.view)[0])
                number += len(groups[number].layers)
            else:
                launches += self.step_launches(memory, number, None if regions is None else regions[number])
                number += 1
        return launches

    def _deep_groups(self) -> dict[int, DeepGroup]:
        """First step -> the group of steps that runs in one launch from there (see :mod:`.deep`)."""
        from lgnet_fast.kernels.launch import is_recording

        can_check = self.device.type == "cuda" and not is_capturing(self.device) and not is_recording()
        if self._groups is None and can_check:
            rows = self.options.deep_rows
            if rows is None:
                rows = self.weights.tuned.deep_rows.get(entry_name(self.plan), 0)
            weights = self.weights
            with torch.inference_mode(False), torch.no_grad():
                self._groups = make_groups(self.plan, weights.steps, weights.deep, rows) if rows else {}
        return self._groups or {}

    @property
    def shares_launches(self) -> bool:
        """Whether some steps of a dense run share a launch."""
        return bool(self._deep_groups())

    def launches(self, regions: Regions | None = None) -> list[Launch]:
        """The launches of a run in `regions` (None: dense), for callers that time or capture them."""
        return self._launches(self.memory, regions, False)

    def launches_by_step(self, painted: bool) -> list[tuple[str, Launch]]:
        """A dense run as (name of the step, its launches), with "paint" first; for checks between steps."""
        memory = self.memory
        paint = self._launches(memory, None, painted)[0]
        steps = [(s.name, functools.partial(self._run_step, memory, n)) for n, s in enumerate(self.plan.steps)]
        return [("paint", paint), *steps]

    def _run_step(self, memory: Memory, number: int) -> None:
        run_all(self.step_launches(memory, number))

    def precompile(self) -> None:
        """Compile the kernels of a dense run in several processes. A failure is reported by the launch itself."""
        if self.device.type != "cuda":
            return
        from lgnet_fast.kernels.launch import record
        from lgnet_fast.kernels.precompile import compile_all

        own = self._launches(self.memory, None, False)  # first, because some kernels are run once to check them
        with record() as launches:
            run_all(own)

        def tell(done: int, total: int) -> None:
            if done in (1, total) or done % 10 == 0:
                logger.info("compiling the engine's kernels: %d of %d", done, total)

        for failure in compile_all(launches, self.device.index or 0, tell):
            logger.info("not compiled ahead: %s", failure)

    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """The launches of one step, in its rectangles (None: everywhere)."""
        from lgnet_fast.kernels.conv import Merge

        step = self.plan.steps[number]
        merge = None
        if step.merges:
            stage = sum(s.merges for s in self.plan.steps[: number + 1])
            last = number == self._last
            merged = memory.outputs[0] if last else memory.maps[PICTURE]
            merge = Merge(memory.image, memory.mask, memory.outputs[stage], merged, last)
        if isinstance(step, AttentionStep):
            return [] if rects == () else [self._attention(memory, step, rects)]
        if rects is None and self.weights.steps[step.name].plain is not None:
            return [functools.partial(convolve, memory, step, self.weights.steps[step.name], merge)]
        return [self._conv_launch(memory, step, rect, merge) for rect in (step.regions if rects is None else rects)]

    def _conv_launch(self, memory: Memory, step: ConvStep, rect: Rect, merge: Any) -> Launch:
        from lgnet_fast.kernels import conv, hopper, picture_conv
        from lgnet_fast.kernels.conv_configs import programs
        from lgnet_fast.kernels.hopper import HopperTile

        weights = self.weights.steps[step.name]
        stores = () if step.merges else tuple(conv.Store(memory.view(s.view), s.activation) for s in step.stores)
        source = memory.view(step.source)
        where: dict[str, Any] = {
            "size": self.plan.target(step).size,
            "rect": rect,
            "overlap": self.overlap != "none",
        }
        compiled_tile = self._compiled_tile(step, rect)
        if compiled_tile is not None and not isinstance(compiled_tile, HopperTile):
            assert weights.fragments is not None
            operands = conv_of(step), source, weights.fragments, weights.bias, stores
            return functools.partial(picture_conv.picture_forward, *operands, compiled_tile, **where, merge=merge)
        where["residual"] = None if step.residual is None else memory.view(step.residual)
        operands = conv_of(step), source, weights.packed, weights.bias, stores
        if compiled_tile is not None:
            return functools.partial(hopper.hopper_forward, *operands, compiled_tile, **where)
        tile = self.tile(step, rect)
        work = work_of(self.plan, step, rect)
        return functools.partial(
            conv.conv_forward,
            *operands,
            tile,
            **where,
            merge=merge,
            partial=memory.partial(tile.splits * work.all_rows * work.columns) if tile.splits > 1 else None,
            counters=memory.counters(programs(work, tile) // tile.splits) if tile.fused else None,
        )

    def _attention(self, memory: Memory, step: AttentionStep, rects: tuple[Rect, ...] | None) -> Launch:
        """The launch of the attention block, for all rows of the map that meet the rectangles (None: all rows)."""
        weights = self.weights.steps[step.name]
        features = memory.view(step.source).permute(0, 3, 1, 2)
        shape = (step.out_channels, features.shape[2] * features.shape[3], self.plan.batch)
        stores = [(memory.view(store.view).permute(0, 3, 1, 2), store.activation) for store in step.stores]
        tuned = self.weights.tuned.attention.get(shape)
        band = (min(r.top for r in rects), max(r.bottom for r in rects)) if rects else None
        return functools.partial(attend, features, weights, step.variant, stores, tuned, self.overlap != "none", band)

    # -- running -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
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
        """See :meth:`.executor.Executor.run`. Waits for the device only where it captures a graph.

        While the caller captures a graph, the launches become part of that graph and use separate buffers.
        """
        with torch.inference_mode(False), torch.no_grad():
            if is_capturing(self.device):
                return self._run_captured(image, mask, start, regions, stages)
            with self._turn():
                memory = self.memory
                program = self._program(memory, regions, start is not None)
                memory.take(image, mask, start)
                program()
                outputs = memory.outputs if stages else memory.outputs[:1]
                if self.options.clone_outputs:
                    outputs = outputs.clone()
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
        self.run(image, mask)  # every map holds finite numbers now
        with torch.inference_mode(False), torch.no_grad(), self._turn():
            parts = [self._launches(self.memory, regions, False)[:1]]
            for number in range(len(self.plan.steps)):
                parts.append(self.step_launches(self.memory, number, None if regions is None else regions[number]))
            if self.uses_graphs and self.device.type == "cuda":
                until = ends_by_graphs(parts, self.device, self._pool, self.overlap == "spread", rounds)
            else:
                until = ends(parts, self.device, rounds)
        return [max(0.0, after - before) for before, after in itertools.pairwise(until)]


def _before_drop(done: torch.cuda.Event | None, program: Program) -> None:
    if program.graph is not None and done is not None:
        done.synchronize()  # a graph must not be destroyed while the device runs it


def _let_finish(done: torch.cuda.Event | None, device: torch.device) -> None:
    if done is not None and not is_capturing(device):
        done.synchronize()
