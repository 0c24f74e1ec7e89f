"""Weights packed for the CPU's kernels, all in one block of memory that every executor of a network shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...native import library, packing, variant_arg
from ..plan import ConvStep, Plan, Step
from .kernels import NARROW, TILES, Choice, Group, Products, jobs_of

_ALIGNMENT = 64  # bytes

# Points of Winograd's F(m, r), without infinity; the transforms of the features are in csrc/conv_winograd.h.
_POINTS: dict[tuple[int, int], tuple[float, ...]] = {
    (2, 2): (0.0, 1.0),
    (2, 3): (0.0, 1.0, -1.0),
    (4, 2): (0.0, 0.75, -0.75, 1.5),
    (4, 3): (0.0, 0.75, -0.75, 1.5, -1.5),
}


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
class Packing:
    """Layout of packed weights, see csrc/conv.h.

    lanes: of a vector. panel: columns of a panel. pair: elements of a unit. slice: units of the depth in a slice.
    parts: 2 where a weight is the sum of two bf16; all low ones lie after all high ones.
    """

    lanes: int
    panel: int
    pair: int
    slice: int
    parts: int

    def columns(self, channels: int) -> int:
        return -(-channels // self.lanes) * self.lanes

    def depth(self, channels: int) -> int:
        return -(-channels // self.pair) * self.pair

    @classmethod
    def of(cls, products: Products) -> Packing:
        """The layout for the instruction set in use; no lanes for products of bf16 where it has none."""
        return cls(*packing(products))

    def bytes(self, elements: int) -> int:
        """Of `elements` packed weights."""
        return elements * 4 // self.pair * self.parts

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.pair == 2 else torch.float32

    def pack(self, into: Tensor, depth: int, channels: int, rows: Callable[[int, int, Tensor], object]) -> None:
        """Fill `into` with the layout [points][slices][panels][units][panel's columns][pair].

        One slice is packed at a time, so memory never holds a second copy of the weights.

        Args:
            into: of the packed dtype, [parts, points, rest].
            depth, channels: rows and columns of the weights; depth a multiple of the pair.
            rows: called as (begin, end, zeros [points, end - begin, channels]); writes these rows of the weights
                to the zeros.
        """
        points, columns, pair = into.shape[1], self.columns(channels), self.pair
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
                for high_or_low in into:
                    packed = high_or_low[:, written : written + count].view(part.shape).copy_(part)
                    if self.parts > 1:
                        part.sub_(packed)
                written += count


def _taps_first(step: ConvStep) -> Tensor:
    """The weight as [kernel rows, kernel columns, in, out]."""
    order = (2, 3, 0, 1) if step.geometry.transposed else (2, 3, 1, 0)
    return step.weight.permute(order).contiguous()


# Rows transformed at a time. Larger temporaries would come from fresh pages, and page faults dominate.
_TRANSFORMED_ROWS = 32


def _group_rows(weight: Tensor, group: Group, m: int, channels: int) -> Callable[[int, int, Tensor], None]:
    """The `rows` of :meth:`Packing.pack` for one group: the transformed weights U [points, depth, out].

    The transforms are computed in float64.

    Args:
        weight: [kernel rows, kernel columns, in, out].
        channels: rows of the depth for each start; those beyond the weight's input channels are zeros.
    """
    own = weight.shape[2]
    transform = torch.kron(_weight_transform(m, group.ry), _weight_transform(m, group.rx))

    def rows(begin: int, end: int, u: Tensor) -> None:
        for i, (ty, tx) in enumerate(group.taps):
            # The rows of start i that lie in [begin, end) and hold weights.
            last = min(end, i * channels + own)
            for row in range(max(begin, i * channels), last, _TRANSFORMED_ROWS):
                stop = min(last, row + _TRANSFORMED_ROWS)
                taps = torch.stack([weight[y, x, row - i * channels : stop - i * channels] for y in ty for x in tx])
                if m > 1:
                    taps = (transform @ taps.double().flatten(1)).view(-1, *taps.shape[1:])
                u[:, row - begin : stop - begin] = taps

    return rows


@dataclass(frozen=True)
class Placed:
    """Byte offsets of one step's weights (one of each group, in order) and bias."""

    weights: tuple[int, ...]
    bias: int


def _allocate(size: int) -> Tensor:
    data = torch.empty(size, dtype=torch.uint8, device="cpu")
    library().advise_large_pages(data.data_ptr(), size)  # before the first write: pages in use would stay small
    return data.zero_()


def _products(choice: Choice) -> Any:
    """What a step multiplies, for the extension."""
    return library().Products.__members__[choice.products]


def _parts(step: Step, choice: Choice) -> Iterator[tuple[int, int, Group | None]]:
    """(bytes, tile, group) of each packed weight of a step."""
    packing = Packing.of(choice.products)
    if not isinstance(step, ConvStep):
        yield library().attention_weight_bytes(step.out_channels, _products(choice)), 0, None
    elif choice.kernel == NARROW:
        kernel, channels = step.geometry.kernel, step.source.channels
        if channels % packing.pair:
            raise ValueError(f"choices: expected {NARROW} for the {channels} channels of {step.name}, got {choice}")
        elements = kernel * channels * packing.columns(3 * kernel + 1)
        yield packing.bytes(elements), 0, None
    else:
        m = TILES[choice.kernel]
        depth, columns = packing.depth(step.source.channels), packing.columns(step.out_channels)
        for job in jobs_of(step.geometry, m):
            for group in job.groups:
                elements = group.points(m) * len(group.starts) * depth * columns
                yield packing.bytes(elements), m, group


def _place(plan: Plan, choices: Mapping[str, Choice]) -> tuple[dict[str, Placed], int]:
    """The place of each step's weights, and the number of bytes in all."""
    placed: dict[str, Placed] = {}
    size = 0

    def take(count: int) -> int:
        nonlocal size
        begin = size
        size += -(-count // _ALIGNMENT) * _ALIGNMENT
        return begin

    for step in plan.steps:
        if step.weights_of != step.name:
            if choices[step.name].packed != choices[step.weights_of].packed:
                raise ValueError(f"choices: {step.name} has the weights of {step.weights_of} and needs its kernel")
            placed[step.name] = placed[step.weights_of]
            continue
        weights = tuple(take(count) for count, _, _ in _parts(step, choices[step.name]))
        placed[step.name] = Placed(weights, take(4 * (step.out_channels + 64)))
    return placed, size + _ALIGNMENT


@dataclass(frozen=True)
class CpuWeights:
    """A network's packed weights, for the instruction set that was in use.

    Attributes:
        dtype: float32, or bfloat16 for products of bf16 pairs.
        choices: step's name -> its kernel.
        chosen_by: the source of the choices: "model", "measurement" or "request".
        placed: step's name -> the place of its weights in `data`, or in its block of :attr:`apart`.
        data: uint8, aligned to 64 bytes.
        apart: step's name -> a separate block with its weights, for steps whose weights are not in `data`.
    """

    dtype: torch.dtype
    choices: Mapping[str, Choice]
    chosen_by: str
    placed: Mapping[str, Placed]
    data: Tensor
    apart: Mapping[str, Tensor] = field(default_factory=dict)

    def address(self, step: Step) -> int:
        """Address of the block that holds a step's weights."""
        return self.apart.get(step.name, self.data).data_ptr()

    def with_choices(self, plan: Plan, choices: Mapping[str, str]) -> CpuWeights:
        """The same weights with other choices. Steps whose choice needs another packing get separate blocks.

        Args:
            plan: with weights.
            choices: of some steps; steps that share weights need the same packing.
        """
        parsed = {**self.choices, **{name: Choice.parse(text) for name, text in choices.items()}}
        placed, apart = dict(self.placed), dict(self.apart)
        for step in plan.steps:
            owner = step.weights_of
            if parsed[step.name].packed != self.choices[step.name].packed:
                if owner == step.name:
                    one, size = _place(replace(plan, steps=(step,)), parsed)
                    placed[owner], apart[owner] = one[owner], _allocate(size)
                    _pack(step, parsed[owner], placed[owner], apart[owner])
                placed[step.name], apart[step.name] = placed[owner], apart[owner]
        return replace(self, choices=parsed, placed=placed, apart=apart)

    @classmethod
    def pack(
        cls, plan: Plan, dtype: torch.dtype, choices: Mapping[str, str], chosen_by: str = "request"
    ) -> CpuWeights:
        """Pack the weights of a plan, which are on the CPU.

        Raises:
            ValueError: a dtype or choice that does not fit.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        parsed = {name: Choice.parse(text) for name, text in choices.items()}
        placed, size = _place(plan, parsed)
        data = _allocate(size)
        for step in plan.steps:
            if step.weights_of == step.name:
                _pack(step, parsed[step.name], placed[step.name], data)
        return cls(dtype, parsed, chosen_by, placed, data)

    def state(self) -> dict[str, Any]:
        """What :meth:`from_state` needs besides the plan's shapes; its tensor shares memory with this object."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "choices": {name: str(choice) for name, choice in self.choices.items()},
            "chosen by": self.chosen_by,
            "isa": library().isa_name(),
            "data": self.data,
        }

    @classmethod
    def from_state(cls, plan: Plan, state: Mapping[str, Any]) -> CpuWeights:
        """The weights whose :meth:`state` was saved; `plan` needs no weights. Nothing is packed again.

        Raises:
            ValueError: they were packed for another instruction set, or for another network.
        """
        isa = library().isa_name()
        if state["isa"] != isa:
            raise ValueError(f"state: packed for {state['isa']}, this CPU runs {isa}")
        choices = {name: Choice.parse(text) for name, text in state["choices"].items()}
        if list(choices) != [step.name for step in plan.steps]:
            raise ValueError("state: packed for another network")
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        placed, size = _place(plan, choices)
        data: Tensor = state["data"]
        if data.numel() != size:
            raise ValueError(f"state: expected {size} bytes of weights for this network, got {data.numel()}")
        if data.data_ptr() % _ALIGNMENT or not data.is_contiguous():
            aligned = _allocate(size)
            aligned.copy_(data)
            data = aligned
        return cls(dtypes[state["dtype"]], choices, str(state["chosen by"]), placed, data)


def _pack(step: Step, choice: Choice, placed: Placed, data: Tensor) -> None:
    """Write one step's packed weights and bias to their place."""
    packing = Packing.of(choice.products)

    def room(offset: int, count: int, dtype: torch.dtype) -> Tensor:
        return data[offset : offset + count * dtype.itemsize].view(dtype)

    def packed(offset: int, points: int, size: int) -> Tensor:
        return data[offset : offset + size].view(packing.dtype).view(packing.parts, points, -1)

    room(placed.bias, step.bias.numel(), torch.float32).copy_(step.bias)
    if not isinstance(step, ConvStep):
        weight = step.weight.flatten().float()
        library().pack_attention_weight(
            weight.data_ptr(),
            step.out_channels,
            variant_arg(step.variant),
            _products(choice),
            data.data_ptr() + placed.weights[0],
        )
    elif choice.kernel == NARROW:
        # [kernel rows, in][column tap * 3 + out]
        taps = _taps_first(step).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        padded = taps.new_zeros(1, len(taps), 3 * step.geometry.kernel + 1)
        padded[0, :, :-1] = taps
        _, depth, channels = padded.shape
        into = packed(placed.weights[0], 1, packing.bytes(depth * packing.columns(channels)))
        packing.pack(into, depth, channels, lambda begin, end, u: u.copy_(padded[:, begin:end]))
    else:
        weight = _taps_first(step)
        for offset, (size, m, group) in zip(placed.weights, _parts(step, choice), strict=True):
            assert group is not None
            channels = packing.depth(step.source.channels)
            into = packed(offset, group.points(m), size)
            rows = _group_rows(weight, group, m, channels)
            packing.pack(into, len(group.starts) * channels, step.out_channels, rows)
