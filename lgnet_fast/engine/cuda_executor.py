"""A plan on an NVIDIA GPU: Triton kernels over one block of memory, the whole forward replayed as one CUDA graph.

Each step is one launch of `kernels/conv.py` (two where its depth is split, one more for every further rectangle of a
restricted run) or the attention block. Feature maps are NHWC in the arena of :mod:`.arena`, in the dtype to compute
in; pictures come and go as float32, so known pixels of the result are those of the input.

A step runs through PyTorch's own convolution (cuDNN) where the tuner found that faster (kernels/conv_tables.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import plan_arena
from .graphs import Program, Recent, is_capturing
from .plan import PICTURE, Plan, Step, View
from .regions import Rect, join

if TYPE_CHECKING:
    from lgnet_fast.kernels.conv import Conv
    from lgnet_fast.kernels.conv_configs import Tile
    from lgnet_fast.kernels.hopper import HopperTile

logger = logging.getLogger("lgnet_fast")

GRAPHS_KEPT = 32
"""Graphs kept a shape, one a set of rectangles."""
BUCKET = 32
"""Rectangles of holes are rounded outward to multiples of this many pixels, so that few graphs serve many holes."""

# A restricted run must save this share of the multiplications, else the dense graph is taken.
_WORTHWHILE = 0.05

Launch = Callable[[], None]


def describe(step: Step) -> Conv:
    """A convolution of the plan as the kernels' own description."""
    from lgnet_fast.kernels.conv import Conv

    return Conv(
        step.source.channels,
        step.out_channels,
        step.kernel,
        step.stride,
        step.padding,
        step.kind == "deconv",
        step.reflect,
        step.merges,
    )


def bucket(holes: Sequence[Rect], height: int, width: int) -> tuple[Rect, ...]:
    """Rectangles rounded outward to multiples of BUCKET, within height x width."""
    return join(
        Rect(
            r.top // BUCKET * BUCKET,
            min(height, -(-r.bottom // BUCKET) * BUCKET),
            r.left // BUCKET * BUCKET,
            min(width, -(-r.right // BUCKET) * BUCKET),
        )
        for r in holes
    )


@dataclass(frozen=True)
class _Weights:
    """Of one step: packed for the kernels (or the combiner), the bias, and unpacked where cuDNN may run it."""

    packed: Tensor
    bias: Tensor
    plain: Tensor | None


class Memory:
    """What one shape's runs read and write: every feature map, pictures in, pictures out.

    Made outside inference mode, whatever mode the caller is in: an inference tensor could not be written to later.
    """

    @torch.inference_mode(False)
    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        arena = plan_arena(plan)
        self.arena = torch.empty(arena.size, dtype=dtype, device=device)
        self.maps: dict[str, Tensor] = {}
        for name, b in plan.buffers.items():
            shape = (plan.batch, b.height, b.width, b.channels)
            begin = arena.offsets[name]
            count = plan.batch * b.height * b.width * b.channels
            self.maps[name] = self.arena[begin : begin + count].view(shape)
        size = (plan.batch, 3, plan.height, plan.width)
        stages = sum(step.merges for step in plan.steps)
        single: Any = {"dtype": torch.float32, "device": device}  # whatever the caller's defaults are
        self.image = torch.zeros(size, **single)
        self.mask = torch.zeros(size[0], 1, *size[2:], **single)
        self.start = torch.zeros(size, **single)
        self.outputs = torch.empty(1 + stages, *size, **single)
        """The merged picture, then every stage's raw one."""
        self._partial = torch.empty(0, **single)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    def take(self, image: Tensor, mask: Tensor, start: Tensor | None) -> None:
        """Copy a call's arguments in."""
        self.image.copy_(image)
        self.mask.copy_(mask)
        if start is not None:
            self.start.copy_(start)

    def view(self, view: View) -> Tensor:
        """[B, H, W, C] of some channels."""
        return self.maps[view.buffer][..., view.offset : view.offset + view.channels]

    @torch.inference_mode(False)
    def partial(self, elements: int) -> Tensor:
        """A float32 workspace; earlier ones stay valid for those who hold them."""
        if self._partial.numel() < elements:
            self._partial = self._partial.new_empty(elements)
        return self._partial

    def counters(self, blocks: int) -> Tensor:
        """int32 zeros, which kernels leave as zeros; earlier ones stay valid too."""
        if self._counters.numel() < blocks:
            self._counters = torch.zeros(blocks, dtype=torch.int32, device=self._counters.device)
        return self._counters


class CudaExecutor:
    """Runs a plan on an NVIDIA GPU (or, where Triton runs interpreted, on CPU tensors without graphs).

    Thread-safe: calls share their memory, so they take turns, in the order in which they come.

    Args:
        plan: dense, with weights; nothing of it is kept but its shapes.
        dtype: float32 (tf32 as ``torch.backends.cuda.matmul.allow_tf32`` says), float16 or bfloat16.
        device: where to run; None: where the weights are.
        choices: step name -> tile of the kernels, or "cudnn" (in dense runs); others by table and estimate.
        graphs: replay by CUDA graph.
        overlap: let a step's launch start, and fetch its weights, while the one before still runs (Hopper and newer).
        clone_outputs: return copies. Else results are overwritten by the next call.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype = torch.float16,
        *,
        device: torch.device | None = None,
        choices: Mapping[str, Tile | HopperTile | Literal["cudnn"]] | None = None,
        graphs: bool = True,
        overlap: bool = False,
        clone_outputs: bool = True,
    ) -> None:
        self.dtype = dtype
        self.device = plan.steps[0].weight.device if device is None else torch.device(device)
        if (reason := self.unavailable_reason(self.device, dtype)) is not None:
            raise RuntimeError(reason)
        self._chosen = dict(choices or {})
        self._graphs, self._clone = graphs, clone_outputs
        self._overlap = overlap
        if overlap and (reason := self._overlap_reason()) is not None:
            raise RuntimeError(f"overlap: {reason}")
        with torch.inference_mode(False):
            packed = {s.name: self._pack(plan, s) for s in plan.steps if s.weights_of == s.name}
            self._weights = {step.name: packed[step.weights_of] for step in plan.steps}
        self._packed = self._event()
        self._build(plan.without_weights())

    @staticmethod
    def unavailable_reason(device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
        """Why this executor cannot run there, in one sentence; None where it can."""
        from lgnet_fast import kernels

        if (reason := kernels.missing()) is not None:
            return reason
        from lgnet_fast.kernels.conv import CAPABILITY
        from lgnet_fast.kernels.launch import device_reason

        return device_reason(torch.empty(0, dtype=dtype, device=device), CAPABILITY)

    def _overlap_reason(self) -> str | None:
        from lgnet_fast.kernels.conv import can_overlap

        return can_overlap(self.device)

    def resized(self, plan: Plan) -> CudaExecutor:
        """The same packed weights for another batch or size."""
        other = type(self).__new__(type(self))
        other.dtype, other.device, other._chosen = self.dtype, self.device, self._chosen
        other._graphs, other._clone, other._weights = self._graphs, self._clone, self._weights
        other._overlap, other._packed = self._overlap, self._packed
        other._build(plan.without_weights())
        return other

    def without_graphs(self) -> CudaExecutor:
        """The same weights and sizes, every kernel launched by itself."""
        other = self.resized(self.plan)
        other._graphs, other._pool = False, None
        return other

    # -- weights and choices -------------------------------------------------------------------------------------

    def _pack(self, plan: Plan, step: Step) -> _Weights:
        if step.kind == "attention":
            return _Weights(self._moved(step.weight), self._moved(step.bias), None)
        conv = describe(step)
        plain = None
        if self._prefers_cudnn(plan, step):
            plain = self._moved(step.weight).contiguous(memory_format=torch.channels_last)
        bias = step.bias.detach().to(self.device, torch.float32)
        return _Weights(self._moved(conv.pack(step.weight.detach())), bias, plain)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype).contiguous()

    def _work(self, plan: Plan, step: Step, rect: Rect | None = None) -> Any:
        source, out = plan.buffers[step.source.buffer], plan.buffers[step.stores[0].view.buffer]
        sizes = (source.height, source.width), (out.height, out.width)
        return describe(step).work(plan.batch, *sizes, out.everywhere if rect is None else rect)

    def _target(self) -> tuple[str, str, int]:
        from lgnet_fast.kernels.configs import config_kind, device_generation
        from lgnet_fast.kernels.launch import dot_precision

        return config_kind(self.dtype, dot_precision(self.dtype)), *device_generation(self.device)

    def _prefers_cudnn(self, plan: Plan, step: Step) -> bool:
        from lgnet_fast.kernels.conv_configs import is_tuned_cudnn

        if step.name in self._chosen:
            return self._chosen[step.name] == "cudnn"
        kind, generation, _ = self._target()
        return is_tuned_cudnn(self._work(plan, step), kind, generation)

    def tile(self, step: Step, rect: Rect | None = None) -> Tile:
        """Block shapes that a step's rectangle (None: all of it) runs with."""
        from lgnet_fast.kernels.conv_configs import Tile, pick_tile

        choice = self._chosen.get(step.name)
        if isinstance(choice, Tile):
            return choice
        return pick_tile(self._work(self.plan, step, rect), *self._target())

    def _hopper_tile(self, step: Step, rect: Rect | None = None) -> HopperTile | None:
        """The tile of `kernels/hopper.py` for a step's rectangle; None where it runs by `kernels/conv.py`."""
        from lgnet_fast.kernels.hopper import HopperTile, pick

        choice = self._chosen.get(step.name)
        if choice is not None:
            return choice if isinstance(choice, HopperTile) else None
        return pick(describe(step), self._work(self.plan, step, rect), self.dtype, self.device)

    @property
    def choices(self) -> dict[str, str]:
        """Step name -> what runs it in a dense run: "cudnn", "attention", "hopper PIXELSxCHANNELS/cluster", or
        BLOCK_MxBLOCK_NxBLOCK_K/splits."""
        names = {}
        for step in self.plan.steps:
            if step.kind == "attention" or self._weights[step.name].plain is not None:
                names[step.name] = "attention" if step.kind == "attention" else "cudnn"
            elif (hopper_tile := self._hopper_tile(step)) is not None:
                names[step.name] = f"hopper 8x{hopper_tile.tile_h}x64/{hopper_tile.cluster}"
            else:
                tile = self.tile(step)
                names[step.name] = (
                    f"{tile.block_m}x{tile.block_n}x{tile.block_k}/{tile.splits}{'f' if tile.fused else ''}"
                )
        return names

    # -- programs ------------------------------------------------------------------------------------------------

    def _build(self, plan: Plan) -> None:
        self.plan = plan
        self._dense_macs = plan.total_macs()
        self._lock = threading.Lock()
        self._own: Memory | None = None
        self._regions: Recent[tuple[tuple[Rect, ...], ...] | None] = Recent(4 * GRAPHS_KEPT)
        self._programs: Recent[Program] = Recent(GRAPHS_KEPT, self._drop)
        self._last = max((number for number, step in enumerate(plan.steps) if step.merges), default=-1)
        on_gpu = self.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_gpu and self._graphs else None
        self._done: torch.cuda.Event | None = None
        if on_gpu:
            if self._packed is not None and not is_capturing(self.device):
                torch.cuda.current_stream(self.device).wait_event(self._packed)
            self._done = done = self._event()
            # Memory goes back to the stream it was made on; the last run may still use it on another one.
            weakref.finalize(self, _let_finish, done, self.device).atexit = False

    def _event(self) -> torch.cuda.Event | None:
        """What has been launched on the current stream so far."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        if not is_capturing(self.device):
            event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def memory(self) -> Memory:
        """Allocated when it is first needed."""
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
        tensors = [t for w in self._weights.values() for t in (w.packed, w.bias, w.plain) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _drop(self, program: Program) -> None:
        # a graph must not go while the device runs it
        if program.graph is not None and self._done is not None:
            self._done.synchronize()

    def bucket_of(self, regions: Sequence[tuple[Rect, ...]]) -> tuple[Rect, ...]:
        """What holes share a graph with these, whose rectangles every step has."""
        return bucket(regions[self._last], self.plan.height, self.plan.width)

    def _bucketed(self, regions: Sequence[tuple[Rect, ...]] | None) -> tuple[tuple[Rect, ...], ...] | None:
        """Every step's rectangles for the bucket of these; None where the dense graph is no dearer."""
        if regions is None:
            return None
        holes = self.bucket_of(regions)

        def make() -> tuple[tuple[Rect, ...], ...] | None:
            plan = self.plan.restricted(holes)
            if plan.total_macs() > (1 - _WORTHWHILE) * self._dense_macs:
                return None
            return tuple(step.regions for step in plan.steps)

        return self._regions.get(holes, make)

    def _program(self, memory: Memory, regions: tuple[tuple[Rect, ...], ...] | None, painted: bool) -> Program:
        kind, _, _ = self._target()
        key = (kind, painted, None if regions is None else regions[self._last])

        def make() -> Program:
            launches = functools.partial(_run_all, self._launches(memory, regions, painted))
            return Program(launches, self.device, self._pool, direct=0 if regions is None else 1)

        return self._programs.get(key, make)

    def _launches(self, memory: Memory, regions: tuple[tuple[Rect, ...], ...] | None, painted: bool) -> list[Launch]:
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
                self._overlap,
            )
        ]
        for number in range(len(self.plan.steps)):
            launches += self.step_launches(memory, number, None if regions is None else regions[number])
        return launches

    def launches_by_step(self, painted: bool) -> list[tuple[str, Launch]]:
        """A dense run as (step's name, its launches), "paint" before the first step; for checks in between."""
        memory = self.memory
        paint = self._launches(memory, None, painted)[0]
        steps = [(s.name, functools.partial(self._run_step, memory, n)) for n, s in enumerate(self.plan.steps)]
        return [("paint", paint), *steps]

    def _run_step(self, memory: Memory, number: int) -> None:
        _run_all(self.step_launches(memory, number))

    def precompile(self) -> None:
        """Compile the kernels of a dense run in several processes; what fails there fails again at its launch."""
        if self.device.type != "cuda":
            return
        from lgnet_fast.kernels.launch import record
        from lgnet_fast.kernels.precompile import compile_all

        with record() as launches:
            _run_all(self._launches(self.memory, None, False))

        def tell(done: int, total: int) -> None:
            if done in (1, total) or done % 10 == 0:
                logger.info("compiling the engine's kernels: %d of %d", done, total)

        for failure in compile_all(launches, self.device.index or 0, tell):
            logger.info("not compiled ahead: %s", failure)

    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """One step's launches, in its rectangles (None: everywhere)."""
        from lgnet_fast.kernels.conv import Merge

        step = self.plan.steps[number]
        merge = None
        if step.merges:
            stage = sum(s.merges for s in self.plan.steps[: number + 1])
            last = number == self._last
            merged = memory.outputs[0] if last else memory.maps[PICTURE]
            merge = Merge(memory.image, memory.mask, memory.outputs[stage], merged, last)
        if step.kind == "attention":
            return [] if rects == () else [functools.partial(self._attend, memory, step)]
        if rects is None and self._weights[step.name].plain is not None:
            return [functools.partial(self._convolve, memory, step, merge)]
        return [self._conv_launch(memory, step, rect, merge) for rect in (step.regions if rects is None else rects)]

    def _conv_launch(self, memory: Memory, step: Step, rect: Rect, merge: Any) -> Launch:
        from lgnet_fast.kernels import conv, hopper
        from lgnet_fast.kernels.conv_configs import programs

        out = self.plan.buffers[step.stores[0].view.buffer]
        weights = self._weights[step.name]
        stores = () if step.merges else tuple(conv.Store(memory.view(s.view), s.activation) for s in step.stores)
        operands = describe(step), memory.view(step.source), weights.packed, weights.bias, stores
        where: dict[str, Any] = {
            "size": (out.height, out.width),
            "rect": rect,
            "residual": None if step.residual is None else memory.view(step.residual),
            "overlap": self._overlap,
        }
        if (hopper_tile := self._hopper_tile(step, rect)) is not None:
            return functools.partial(hopper.hopper_forward, *operands, hopper_tile, **where)
        tile = self.tile(step, rect)
        work = self._work(self.plan, step, rect)
        return functools.partial(
            conv.conv_forward,
            *operands,
            tile,
            **where,
            merge=merge,
            partial=memory.partial(tile.splits * work.all_rows * work.columns) if tile.splits > 1 else None,
            counters=memory.counters(programs(work, tile) // tile.splits) if tile.fused else None,
        )

    def _attend(self, memory: Memory, step: Step) -> None:
        """The attention block; in a restricted run too it fills its whole map."""
        from lgnet_fast.kernels.attention_inference import attention_block_inference

        assert step.variant is not None
        weights = self._weights[step.name]
        features = memory.view(step.source).permute(0, 3, 1, 2)
        for store in step.stores:
            out = memory.view(store.view).permute(0, 3, 1, 2)
            attention_block_inference(
                features,
                weights.packed,
                weights.bias,
                step.variant,
                out=out,
                activation=store.activation,
                overlap=self._overlap,
            )

    def _convolve(self, memory: Memory, step: Step, merge: Any) -> None:
        """A dense step by PyTorch's own convolution."""
        weights = self._weights[step.name]
        assert weights.plain is not None
        x = memory.view(step.source).permute(0, 3, 1, 2)
        bias = weights.bias.to(self.dtype)
        if step.kind == "deconv":
            value = F.conv_transpose2d(x, weights.plain, bias, step.stride, step.padding, step.output_padding)
        elif step.reflect:
            value = F.conv2d(F.pad(x, [step.padding] * 4, mode="reflect"), weights.plain, bias, step.stride)
        else:
            value = F.conv2d(x, weights.plain, bias, step.stride, step.padding)
        if step.residual is not None:
            value = value + memory.view(step.residual).permute(0, 3, 1, 2)
        if merge is None:
            for store in step.stores:
                out = memory.view(store.view).permute(0, 3, 1, 2)
                _activate_(out.copy_(value), store.activation)
            return
        torch.tanh(value.float(), out=merge.raw)
        merged = merge.image * (1 - merge.mask) + merge.raw * merge.mask
        if merge.last:
            merge.merged.copy_(merged)
        else:
            merge.merged[..., :3].copy_(merged.permute(0, 2, 3, 1))

    # -- running -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """This shape's memory is ours: on the host by the lock, on the device by an event of the last call."""
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
        regions: Sequence[tuple[Rect, ...]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`.engine.Executor`. Does not wait for the device, but where a graph is captured.

        Where the caller captures a graph of his own, the launches become part of it, on memory of its own.
        """
        with torch.inference_mode(False), torch.no_grad():
            if is_capturing(self.device):
                return self._run_captured(image, mask, start, regions)
            with self._turn():
                memory = self.memory
                program = self._program(memory, self._bucketed(regions), start is not None)
                memory.take(image, mask, start)
                program()
                outputs = memory.outputs.clone() if self._clone else memory.outputs
        return outputs[0], list(outputs[1:])

    def _run_captured(
        self, image: Tensor, mask: Tensor, start: Tensor | None, regions: Sequence[tuple[Rect, ...]] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Launches for somebody else's graph, whose replays no lock or event of ours could order: they share nothing
        with other calls but the weights."""
        with self._lock:
            bucketed = self._bucketed(regions)
        memory = Memory(self.plan, self.dtype, self.device)
        memory.take(image, mask, start)
        _run_all(self._launches(memory, bucketed, start is not None))
        return memory.outputs[0], list(memory.outputs[1:])

    def step_times(
        self, image: Tensor, mask: Tensor, regions: Sequence[tuple[Rect, ...]] | None = None, replays: int = 20
    ) -> list[float]:
        """Milliseconds of every step, the mean of `replays` replays of a graph of its own; waits for the device."""
        self.run(image, mask)  # every map holds numbers now
        times = []
        with torch.inference_mode(False), torch.no_grad(), self._turn():
            for number in range(len(self.plan.steps)):
                launches = self.step_launches(self.memory, number, None if regions is None else regions[number])
                program = Program(functools.partial(_run_all, launches), self.device, self._pool)
                program()
                self._wait()
                begin = time.perf_counter()
                for _ in range(replays):
                    program()
                self._wait()
                times.append(1e3 * (time.perf_counter() - begin) / replays)
        return times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _let_finish(done: torch.cuda.Event | None, device: torch.device) -> None:
    if done is not None and not is_capturing(device):
        done.synchronize()


def _run_all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


def _activate_(x: Tensor, activation: str) -> None:
    if activation == "relu":
        x.relu_()
    elif activation == "leaky_relu":
        F.leaky_relu_(x, 0.2)
