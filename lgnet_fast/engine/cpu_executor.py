"""A plan on the CPU, by one call into ``lgnet_fast._C`` (csrc/program.cpp).

Here the steps are brought to the one form that csrc/conv.h describes (output phases, input phases, taps), a kernel is
chosen for each, and weights are packed for it, all into one block of memory.

========== ============================================================================================
kernel     what it computes
========== ============================================================================================
direct     patches times weights
winograd2  F(2x2, rxr) tiles of every phase: 1.78 times fewer multiplications for 2x2 taps, 2.25 for 3x3
winograd4  F(4x4, rxr) tiles: 2.56 times fewer for 2x2 taps, 4 for 3x3; the transformed weights are 6.25 and 4
           times larger
narrow     a stage's last step (3 channels), with tanh and merge
attention  the attention block
========== ============================================================================================

With ``dtype=torch.bfloat16`` products are of bf16 pairs with float32 sums where the CPU has them and where that is
faster; feature maps stay float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import forks
from ..ops.cpp import _arg, _library, unavailable_reason
from .arena import plan_arena
from .plan import PICTURE, Plan, Step, View
from .regions import Rect, conv_input, deconv_input

_ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2}
_NO_TENSOR = (0,) * 10
_ALIGNMENT = 64  # bytes

# Points of Winograd's F(m, r), infinity left out; csrc/conv_kernels.h has the transforms of the features.
_POINTS: dict[tuple[int, int], tuple[float, ...]] = {
    (2, 2): (0.0, 1.0),
    (2, 3): (0.0, 1.0, -1.0),
    (4, 2): (0.0, 0.75, -0.75, 1.5),
    (4, 3): (0.0, 0.75, -0.75, 1.5, -1.5),
}


@dataclass(frozen=True)
class _Phase:
    """Along one axis, output s * i + `out` sums kernel taps `taps` of sources step * i + start, then every stride."""

    out: int
    start: int
    stride: int
    taps: tuple[int, ...]


def _phases(step: Step) -> list[_Phase]:
    k, s, p = step.kernel, step.stride, step.padding
    if step.kind == "conv":
        return [_Phase(0, a - p, s, tuple(range(a, k, s))) for a in range(min(s, k))]
    phases = []
    for out in range(s):
        taps = tuple(t for t in reversed(range(k)) if (out + p - t) % s == 0)
        phases.append(_Phase(out, (out + p - taps[0]) // s, 1, taps))
    return phases


@dataclass(frozen=True)
class _Group:
    """One product of the kernel; `taps` are (row, column) taps of each start, in the order of the depth."""

    ry: int
    rx: int
    starts: tuple[tuple[int, int], ...]
    taps: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def points(self, m: int) -> int:
        return (m + self.ry - 1) * (m + self.rx - 1)


@dataclass(frozen=True)
class _Job:
    oy: int
    ox: int
    groups: tuple[_Group, ...]


def _jobs(step: Step, m: int) -> list[_Job]:
    """The products of one convolution, with tiles of m x m outputs (1: patches)."""
    phases = _phases(step)
    jobs = []
    outs = sorted({phase.out for phase in phases})
    for oy, ox in product(outs, outs):
        pairs = [(y, x) for y in phases if y.out == oy for x in phases if x.out == ox]
        if m == 1:
            single = sorted(
                ((y.start + i * y.stride, x.start + j * x.stride), ((ty,), (tx,)))
                for y, x in pairs
                for i, ty in enumerate(y.taps)
                for j, tx in enumerate(x.taps)
            )
            groups = [_Group(1, 1, tuple(s for s, _ in single), tuple(t for _, t in single))]
        else:
            groups = []
            for ry, rx in sorted({(len(y.taps), len(x.taps)) for y, x in pairs}, reverse=True):
                same = [(y, x) for y, x in pairs if (len(y.taps), len(x.taps)) == (ry, rx)]
                starts = tuple((y.start, x.start) for y, x in same)
                groups.append(_Group(ry, rx, starts, tuple((y.taps, x.taps) for y, x in same)))
        jobs.append(_Job(oy, ox, tuple(groups)))
    return jobs


def _weight_transform(m: int, r: int) -> Tensor:
    """G [m + r - 1, r] of F(m, r), float64."""
    if r == 1:
        return torch.ones(m, 1, dtype=torch.float64, device="cpu")
    points = _POINTS[m, r]
    rows = []
    for p, a in enumerate(points):
        divisor = 1.0
        for q, b in enumerate(points):
            if q != p:
                divisor *= a - b
        rows.append([a**j / divisor for j in range(r)])
    rows.append([0.0] * (r - 1) + [1.0])
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class _Packing:
    """Vector lanes, columns of a panel, elements in a unit, units in a slice of depth; see csrc/conv.h."""

    lanes: int
    panel: int
    pair: int
    slice: int

    def columns(self, channels: int) -> int:
        return -(-channels // self.lanes) * self.lanes

    def depth(self, channels: int) -> int:
        return -(-channels // self.pair) * self.pair

    @property
    def element_bytes(self) -> int:
        return 4 // self.pair

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.pair == 2 else torch.float32

    def pack(self, into: Tensor, depth: int, channels: int, rows: Callable[[int, int, Tensor], object]) -> None:
        """Fill `into`, flat: [points][slices][panels][units][panel's columns][pair].

        A slice at a time, so that no second copy of the weights is ever in memory.

        Args:
            into: of the packed dtype, [points, rest].
            depth, channels: rows and columns of the weights; depth a multiple of the pair.
            rows: (begin, end, zeros [points, end - begin, channels]) -> puts those rows of the weights there.
        """
        points, columns, pair = into.shape[0], self.columns(channels), self.pair
        full = columns // self.panel * self.panel
        scratch = torch.empty(points * min(depth, self.slice * pair) * columns, dtype=torch.float32, device="cpu")
        written = 0
        for begin in range(0, depth, self.slice * pair):
            end = min(depth, begin + self.slice * pair)
            some = scratch[: points * (end - begin) * columns].view(points, end - begin, columns).zero_()
            rows(begin, end, some[:, :, :channels])
            units = some.view(points, -1, pair, columns).transpose(2, 3)
            panels = units[:, :, :full].unflatten(2, (-1, self.panel)).transpose(1, 2)
            for part in (panels, units[:, :, full:]):
                count = part[0].numel()
                into[:, written : written + count].view(part.shape).copy_(part)
                written += count


def _taps_first(step: Step) -> Tensor:
    """The weight as [kernel rows, kernel columns, in, out]."""
    order = (2, 3, 1, 0) if step.kind == "conv" else (2, 3, 0, 1)
    return step.weight.permute(order).contiguous()


# Rows that are transformed at a time: more would need new memory, which the system gives slowly.
_TRANSFORMED_ROWS = 32


def _group_rows(weight: Tensor, group: _Group, m: int, channels: int) -> Callable[[int, int, Tensor], None]:
    """What :meth:`_Packing.pack` asks for U of one group, [points, depth, out]; transforms are computed in float64.

    Args:
        weight: [kernel rows, kernel columns, in, out].
        channels: rows of each start, zeros after the weight's own.
    """
    own = weight.shape[2]
    transform = torch.kron(_weight_transform(m, group.ry), _weight_transform(m, group.rx))

    def rows(begin: int, end: int, u: Tensor) -> None:
        for i, (ty, tx) in enumerate(group.taps):
            # Of start i, as far as its rows are asked for and are weights at all.
            last = min(end, i * channels + own)
            for row in range(max(begin, i * channels), last, _TRANSFORMED_ROWS):
                stop = min(last, row + _TRANSFORMED_ROWS)
                taps = torch.stack([weight[y, x, row - i * channels : stop - i * channels] for y in ty for x in tx])
                if m > 1:
                    taps = (transform @ taps.double().flatten(1)).view(-1, *taps.shape[1:])
                u[:, row - begin : stop - begin] = taps

    return rows


_KERNELS = {"direct": 1, "winograd2": 2, "winograd4": 4}
PAIRS = "/bf16"
"""At the end of a kernel's name: with products of bf16 pairs."""


def candidates(step: Step) -> list[str]:
    """Kernels that can run a step, the plainest first."""
    if step.kind == "attention":
        return ["attention"]
    if step.merges:
        return ["narrow"]
    # Transforms work on vectors of channels; few channels, or many taps, are better off as patches.
    few_taps = all(len(phase.taps) <= 3 for phase in _phases(step))
    return list(_KERNELS) if few_taps and step.source.buffer != PICTURE else ["direct"]


# Rates of the cost model, of one core: multiply-accumulates, bytes of weights and bytes of V and M a second. Only
# their ratios matter, and those differ little between CPUs. Weights count a little more than reading them takes, as
# memory has its price.
_MACS_PER_SECOND = 1.1e11
_WEIGHT_BYTES_PER_SECOND = 1.5e10
_SCRATCH_BYTES_PER_SECOND = 2.5e10
# Packed weights may take this many times the bytes of the network's own in float32 (LGNet then stays within 1.3 times
# its weights and 150 MB, everything included), or this many bytes more, which small networks may as well have.
_WEIGHT_BUDGET = 1.44
_WEIGHT_SLACK_BYTES = 128 << 20


@dataclass(frozen=True)
class _Cost:
    seconds: float
    weight_bytes: int


def _cost(step: Step, kernel: str, pairs: bool, batch: int, height: int, width: int) -> _Cost:
    """Estimated cost of a convolution with `kernel` for outputs [batch, height, width]."""
    m = _KERNELS[kernel]
    out_step = step.stride if step.kind == "deconv" else 1
    tiles = batch * -(-height // (out_step * m)) * -(-width // (out_step * m))
    bytes_each = 2 if pairs else 4
    seconds, weight_bytes = 0.0, 0
    for job in _jobs(step, m):
        for group in job.groups:
            points, depth = group.points(m), len(group.starts) * step.source.channels
            weight_bytes += bytes_each * points * depth * step.out_channels
            seconds += points * tiles * depth * step.out_channels / (_MACS_PER_SECOND * (2 if pairs else 1))
            # V and M are written and read once each.
            seconds += 2 * points * tiles * (bytes_each * depth + 4 * step.out_channels) / _SCRATCH_BYTES_PER_SECOND
    return _Cost(seconds + weight_bytes / _WEIGHT_BYTES_PER_SECOND, weight_bytes)


def choose_kernels(plan: Plan, dtype: torch.dtype) -> dict[str, str]:
    """A kernel for every step: the least estimated time whose packed weights keep to the budget.

    F(4x4) is not taken with bf16 products: its transforms blow their rounding up (LGNet's error grows 1.6 times, with
    F(2x2) 1.15 times).
    """
    pairs = dtype == torch.bfloat16 and _library().packing(True)[0] > 0
    owners = [step for step in plan.steps if step.weights_of == step.name]
    users = Counter(step.weights_of for step in plan.steps)
    options: dict[str, dict[str, _Cost]] = {}
    chosen: dict[str, str] = {}
    for step in owners:
        kernels = [k for k in candidates(step) if not (pairs and k == "winograd4")]
        chosen[step.name] = kernels[0]
        if len(kernels) > 1:
            out = plan.buffers[step.stores[0].view.buffer]
            costs = {k: _cost(step, k, pairs, plan.batch, out.height, out.width) for k in kernels}
            options[step.name] = costs
            chosen[step.name] = min(costs, key=lambda k: costs[k].seconds)
    # Too many bytes: change the kernel that loses the least time a byte, until they fit.
    plain = sum(4 * step.weight.numel() for step in owners if step.name in options)
    excess = sum(costs[chosen[name]].weight_bytes for name, costs in options.items())
    excess -= max(round(_WEIGHT_BUDGET * plain), plain + _WEIGHT_SLACK_BYTES)
    while excess > 0:
        changes = []
        for name, costs in options.items():
            now = costs[chosen[name]]
            for kernel, cost in costs.items():
                if (saved := now.weight_bytes - cost.weight_bytes) > 0:
                    changes.append((users[name] * (cost.seconds - now.seconds) / saved, name, kernel, saved))
        if not changes:
            break
        _, name, kernel, saved = min(changes)
        chosen[name] = kernel
        excess -= saved
    return {
        step.name: (kernel := chosen[step.weights_of]) + (PAIRS if pairs and kernel != "narrow" else "")
        for step in plan.steps
    }


def _read(plan: Plan, step: Step, region: Rect) -> Rect:
    """What `region` of a step's output reads of its source."""
    source = plan.buffers[step.source.buffer]
    size = (source.height, source.width)
    if step.kind == "attention":
        return source.everywhere
    if step.kind == "conv":
        return conv_input(region, size, step.kernel, step.stride, step.padding, step.reflect)
    return deconv_input(region, size, step.kernel, step.stride, step.padding)


@dataclass(frozen=True)
class _Placed:
    """Byte offsets of one step's weights (one of each group, in order) and bias."""

    weights: tuple[int, ...]
    bias: int


class CpuExecutor:
    """Runs a plan on the CPU. Thread-safe: calls share the weights, and each has its own buffers.

    Args:
        plan: dense, with weights, on the CPU; nothing of it is kept but its shapes.
        dtype: float32, or bfloat16 for products of bf16 pairs.
        choices: step name -> kernel, as :attr:`choices` has it; None: by estimated time.
    """

    def __init__(
        self, plan: Plan, dtype: torch.dtype = torch.float32, choices: Mapping[str, str] | None = None
    ) -> None:
        if (reason := self.unavailable_reason()) is not None:
            raise RuntimeError(reason)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        self.dtype = dtype
        self.choices = dict(choices) if choices is not None else choose_kernels(plan, dtype)
        self._packings = {pairs: _Packing(*_library().packing(pairs)) for pairs in (False, True)}
        self._placed, size = self._place(plan)
        self._data = self._allocate(size)
        for step in plan.steps:
            if step.weights_of == step.name:
                self._pack(step)
        self.release_free_memory()
        self._build(plan.without_weights())

    @staticmethod
    def unavailable_reason() -> str | None:
        """Why this executor cannot run here, in one sentence; None where it can."""
        return unavailable_reason()

    # -- packed weights ------------------------------------------------------------------------------------------

    @staticmethod
    def _allocate(size: int) -> Tensor:
        data = torch.empty(size, dtype=torch.uint8, device="cpu")
        _library().advise_large_pages(data.data_ptr(), size)  # before they are touched: pages in use stay small
        return data.zero_()

    def _kernel(self, step: Step) -> tuple[str, _Packing]:
        kernel, _, pairs = self.choices[step.name].partition("/")
        return kernel, self._packings[bool(pairs) and kernel in _KERNELS]

    def _weights(self, step: Step) -> Iterator[tuple[int, int, _Group | None]]:
        """(bytes, tile, group) of each packed weight of a step."""
        kernel, packing = self._kernel(step)
        if kernel == "attention":
            yield 4 * step.weight.numel(), 0, None
        elif kernel == "narrow":
            yield 4 * step.kernel * step.source.channels * packing.columns(3 * step.kernel + 1), 0, None
        else:
            m = _KERNELS[kernel]
            depth, columns = packing.depth(step.source.channels), packing.columns(step.out_channels)
            for job in _jobs(step, m):
                for group in job.groups:
                    elements = group.points(m) * len(group.starts) * depth * columns
                    yield elements * packing.element_bytes, m, group

    def _place(self, plan: Plan) -> tuple[dict[str, _Placed], int]:
        placed: dict[str, _Placed] = {}
        size = 0

        def take(count: int) -> int:
            nonlocal size
            begin = size
            size += -(-count // _ALIGNMENT) * _ALIGNMENT
            return begin

        for step in plan.steps:
            if step.weights_of != step.name:
                if self.choices[step.name] != self.choices[step.weights_of]:
                    raise ValueError(
                        f"choices: {step.name} has the weights of {step.weights_of} and needs its kernel"
                    )
                placed[step.name] = placed[step.weights_of]
                continue
            weights = tuple(take(count) for count, _, _ in self._weights(step))
            placed[step.name] = _Placed(weights, take(4 * (step.out_channels + 64)))
        return placed, size + _ALIGNMENT

    def _pack(self, step: Step) -> None:
        kernel, packing = self._kernel(step)
        placed = self._placed[step.name]

        def room(offset: int, count: int, dtype: torch.dtype) -> Tensor:
            return self._data[offset : offset + count * dtype.itemsize].view(dtype)

        room(placed.bias, step.bias.numel(), torch.float32).copy_(step.bias)
        if kernel == "attention":
            room(placed.weights[0], step.weight.numel(), torch.float32).copy_(step.weight.flatten())
        elif kernel == "narrow":
            # [kernel rows][in][column tap * 3 + out]
            taps = _taps_first(step).permute(0, 2, 1, 3).flatten(2)
            padded = taps.new_zeros(*taps.shape[:2], 3 * step.kernel + 1)
            padded[:, :, :-1] = taps
            points, depth, channels = padded.shape
            count = points * depth * packing.columns(channels)
            into = room(placed.weights[0], count, torch.float32).view(points, -1)
            packing.pack(into, depth, channels, lambda begin, end, u: u.copy_(padded[:, begin:end]))
        else:
            weight = _taps_first(step)
            for offset, (size, m, group) in zip(placed.weights, self._weights(step), strict=True):
                assert group is not None
                channels = packing.depth(step.source.channels)
                into = room(offset, size // packing.element_bytes, packing.dtype).view(group.points(m), -1)
                rows = _group_rows(weight, group, m, channels)
                packing.pack(into, len(group.starts) * channels, step.out_channels, rows)

    @property
    def packed_bytes(self) -> int:
        """Size of the packed weights."""
        return self._data.numel()

    @property
    def workspace_bytes(self) -> int:
        """Memory that finished calls keep for the next ones: buffers and scratch, of as many calls as ran at once."""
        return self._program.workspace_bytes()

    @property
    def state(self) -> dict[str, Any]:
        """What :meth:`from_state` needs beside the plan's shapes; the tensor is the executor's own memory."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "choices": dict(self.choices),
            "isa": _library().isa_name(),
            "data": self._data,
        }

    @classmethod
    def from_state(cls, plan: Plan, state: Mapping[str, Any]) -> CpuExecutor:
        """The executor whose :attr:`state` was saved; `plan` needs no weights. Nothing is packed again.

        Raises:
            ValueError: it was packed for another instruction set, or for another network.
        """
        if (reason := cls.unavailable_reason()) is not None:
            raise RuntimeError(reason)
        isa = _library().isa_name()
        if state["isa"] != isa:
            raise ValueError(f"state: packed for {state['isa']}, this CPU runs {isa}")
        executor = cls.__new__(cls)
        executor.dtype = getattr(torch, state["dtype"])
        executor.choices = dict(state["choices"])
        if list(executor.choices) != [step.name for step in plan.steps]:
            raise ValueError("state: packed for another network")
        executor._packings = {pairs: _Packing(*_library().packing(pairs)) for pairs in (False, True)}
        executor._placed, size = executor._place(plan)
        data: Tensor = state["data"]
        if data.numel() != size:
            raise ValueError(f"state: expected {size} bytes of weights for this network, got {data.numel()}")
        if data.data_ptr() % _ALIGNMENT or not data.is_contiguous():
            aligned = cls._allocate(size)
            aligned.copy_(data)
            data = aligned
        executor._data = data
        executor._build(plan)
        return executor

    def resized(self, plan: Plan) -> CpuExecutor:
        """The same packed weights and kernels for another batch or size."""
        other = type(self).__new__(type(self))
        other.dtype, other.choices = self.dtype, self.choices
        other._packings, other._placed, other._data = self._packings, self._placed, self._data
        other._build(plan.without_weights())
        return other

    def release_free_memory(self) -> None:
        """Give back to the system what the allocator keeps of memory that nobody uses any more."""
        _library().release_free_memory()

    # -- program -------------------------------------------------------------------------------------------------

    def _build(self, plan: Plan) -> None:
        self.plan = plan
        arena = plan_arena(plan)
        self._program = _library().Program(
            plan.batch,
            plan.height,
            plan.width,
            arena.size,
            arena.offsets[PICTURE],
            [self._specify(step, arena.offsets) for step in plan.steps],
        )

    def _specify(self, step: Step, offsets: Mapping[str, int]) -> Any:
        library = _library()
        plan = self.plan
        kernel, _ = self._kernel(step)
        placed = self._placed[step.name]
        base = self._data.data_ptr()

        def target(view: View, activation: str) -> Any:
            buffer = plan.buffers[view.buffer]
            return library.TargetSpec(offsets[view.buffer] + view.offset, buffer.channels, _ACTIVATIONS[activation])

        source, out = plan.buffers[step.source.buffer], plan.buffers[step.stores[0].view.buffer]
        spec = {"attention": library.AttentionStep, "narrow": library.LastStep}.get(kernel, library.ConvStep)()
        spec.source = library.MapSpec(
            offsets[source.name] + step.source.offset,
            source.height,
            source.width,
            source.channels,
            step.source.channels,
        )
        spec.out_height, spec.out_width = out.height, out.width
        # A stage's last step applies its tanh itself.
        spec.targets = [target(s.view, "none" if step.merges else s.activation) for s in step.stores]
        spec.weight, spec.bias = base + placed.weights[0], base + placed.bias
        spec.regions = self._regions(step, step.regions)
        if kernel == "attention":
            spec.bf16 = self.choices[step.name].endswith(PAIRS)
            spec.released = step.variant == "released"
        elif kernel == "narrow":
            spec.reflect = step.reflect
            spec.kernel, spec.stride, spec.padding = step.kernel, step.stride, step.padding
            spec.transposed = step.kind == "deconv"
        else:
            spec.bf16 = self.choices[step.name].endswith(PAIRS)
            spec.reflect, spec.out_channels = step.reflect, step.out_channels
            if step.residual is not None:
                spec.residual = target(step.residual, "none")
            spec.tile = _KERNELS[kernel]
            spec.in_step, spec.out_step = (step.stride, 1) if step.kind == "conv" else (1, step.stride)
            offsets_of_groups = iter(placed.weights)
            spec.jobs = [
                library.Job(
                    job.oy,
                    job.ox,
                    [
                        library.Group(g.ry, g.rx, g.starts, next(offsets_of_groups) - placed.weights[0])
                        for g in job.groups
                    ],
                )
                for job in _jobs(step, spec.tile)
            ]
        return spec

    def _regions(self, step: Step, rects: Sequence[Rect], sample: int = -1) -> list[Any]:
        return [_library().Region(tuple(r), tuple(_read(self.plan, step, r)), sample) for r in rects]

    # -- running -------------------------------------------------------------------------------------------------

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Sequence[Sequence[Rect]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`.engine.Executor`."""
        result, raw, _ = self._run(image, mask, start, self._listed(regions))
        return result, raw

    def run_each(
        self, image: Tensor, mask: Tensor, start: Tensor | None, regions: Sequence[Sequence[Sequence[Rect]] | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Like :meth:`run`, with regions of its own for each sample."""
        lists: list[list[Any]] = [[] for _ in self.plan.steps]
        for sample, own in enumerate(regions):
            for number, step in enumerate(self.plan.steps):
                lists[number] += self._regions(step, step.regions if own is None else own[number], sample)
        result, raw, _ = self._run(image, mask, start, lists)
        return result, raw

    def step_times(self, image: Tensor, mask: Tensor, regions: Sequence[Sequence[Rect]] | None = None) -> list[float]:
        """Milliseconds of every step in one run."""
        return self._run(image, mask, None, self._listed(regions))[2]

    def _listed(self, regions: Sequence[Sequence[Rect]] | None) -> list[list[Any]]:
        """Regions of all samples alike, as the program takes them."""
        if regions is None:
            return []
        return [self._regions(step, rects) for step, rects in zip(self.plan.steps, regions, strict=True)]

    def _run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None,
        regions: Sequence[Sequence[Any]],
        poison: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[float]]:
        """`poison` starts from buffers full of NaN, so that reading what was not computed shows."""
        plan = self.plan
        image, mask = image.detach().float(), mask.detach().float()
        start = None if start is None else start.detach().float()
        out = torch.empty(plan.batch, 3, plan.height, plan.width, dtype=torch.float32, device="cpu")
        raw = [torch.empty_like(out) for step in plan.steps if step.merges]
        times = self._program.run(
            _arg(image),
            _arg(mask),
            _NO_TENSOR if start is None else _arg(start),
            _arg(out),
            [_arg(r) for r in raw],
            regions,
            forks.kernel_threads(),
            poison,
        )
        return out, raw, times
