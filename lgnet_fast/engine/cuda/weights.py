"""Weights packed for the GPU kernels, shared by all executors of a network, and the choice of each step's kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..plan import AttentionStep, ConvStep, Plan, Step
from ..regions import Rect
from .graphs import event_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.cards import Card
    from lgnet_fast.kernels.compiled import CompiledTile
    from lgnet_fast.kernels.configs import Inference
    from lgnet_fast.kernels.conv import Conv
    from lgnet_fast.kernels.conv_configs import Tile, Work

    Choice: TypeAlias = Tile | CompiledTile | Literal["cudnn"]
    """The kernel that runs a convolution: a tile of one of our kernels, or PyTorch's convolution."""

Overlap: TypeAlias = Literal["none", "plain", "spread"]
"""Whether a launch starts, and fetches its weights, before the previous one ends (programmatic dependent launch).
"spread": and each multiprocessor holds one block of a kernel at a time (``kernels.cuda_driver.spread_blocks``)."""


def conv_of(step: ConvStep) -> Conv:
    """A convolution of the plan as the kernels describe it."""
    from lgnet_fast.kernels.conv import Conv

    g = step.geometry
    return Conv(
        step.source.channels, step.out_channels, g.kernel, g.stride, g.padding, g.transposed, g.reflect, step.merges
    )


def work_of(plan: Plan, step: ConvStep, rect: Rect | None = None) -> Work:
    """The matrix product of a rectangle (None: all) of a step."""
    out = plan.target(step)
    return conv_of(step).work(plan.batch, plan.source(step).size, out.size, out.everywhere if rect is None else rect)


def target_of(device: torch.device, dtype: torch.dtype) -> tuple[str, str, int]:
    """(kind of dtype, generation, multiprocessors): the keys of the kernels' tables."""
    from lgnet_fast.kernels.configs import config_kind, device_generation
    from lgnet_fast.kernels.launch import dot_precision

    return config_kind(dtype, dot_precision(dtype)), *device_generation(device)


def card_of(device: torch.device, dtype: torch.dtype) -> Card:
    """The GPU as the estimates take it."""
    from lgnet_fast.kernels.cards import card_with

    return card_with(*target_of(device, dtype)[1:])


@dataclass(frozen=True)
class Tuned:
    """Choices measured on this GPU (:mod:`.tuning`), which replace the shipped tables.

    Attributes:
        tiles: (dtype kind, rows, columns, taps, input channels) of a product -> its tile, or "cudnn".
        attention: (channels, positions, batch) -> block shapes.
        deep_rows: name of a plan (:attr:`..plan.Plan.name`) -> most rows of the layers that share a launch
            (:mod:`.deep_layers`).
        overlap: name of a plan -> how its launches overlap.
        chains: name of a plan -> the first steps of the other groups of convolutions that share a launch
            (:mod:`.chains`).
    """

    tiles: Mapping[tuple[Any, ...], Choice] = field(default_factory=dict)
    attention: Mapping[tuple[int, int, int], Inference] = field(default_factory=dict)
    deep_rows: Mapping[str, int] = field(default_factory=dict)
    overlap: Mapping[str, Overlap] = field(default_factory=dict)
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def tile(self, work: Work, kind: str) -> Choice | None:
        """The choice for a product; None where nothing was measured."""
        return self.tiles.get((kind, *work[:4]))

    def nearest_tile(self, work: Work, kind: str) -> Choice | None:
        """The choice for the product or, where it was not measured, for the one that differs least in its rows."""
        rows, *rest = work[:4]
        alike = [key for key in self.tiles if (key[0], *key[2:]) == (kind, *rest)]
        return self.tiles[min(alike, key=lambda key: abs(math.log(key[1] / rows)))] if alike else None

    def nearest_attention(self, channels: int, positions: int, batch: int) -> Inference | None:
        """The block shapes of the attention block with as many channels that differs least in its work."""
        alike = [key for key in self.attention if key[0] == channels]

        def distance(key: tuple[int, int, int]) -> float:
            return abs(math.log(key[1] / positions)) + abs(math.log(key[2] / batch))

        return self.attention[min(alike, key=distance)] if alike else None


@dataclass(frozen=True)
class StepWeights:
    """Weights of one step.

    Attributes:
        packed: for `kernels/conv.py` and `kernels/hopper.py`; of an attention block, the combiner.
        bias: float32, of an attention block in the dtype of the computation.
        plain: unpacked, where PyTorch may run the step.
        fragments: for `kernels/picture_conv.py`, where it can run the step.
    """

    packed: Tensor
    bias: Tensor
    plain: Tensor | None
    fragments: Tensor | None = None


@dataclass(frozen=True)
class CudaWeights:
    """A network's weights on a GPU.

    Attributes:
        dtype, device: of the weights.
        chosen: step's name -> its tile, or "cudnn"; other steps by `tuned`, then by table and estimate.
        tuned: choices measured on this GPU.
        by_library: names of steps that always run by PyTorch's operators.
        steps: step's name -> its weights.
        packed: event after the packing on the device; None where it is known to be done.
        deep: weights in the order of `kernels/deep.py`, packed at first use.
    """

    dtype: torch.dtype
    device: torch.device
    chosen: Mapping[str, Choice]
    tuned: Tuned
    by_library: frozenset[str]
    steps: Mapping[str, StepWeights]
    packed: torch.cuda.Event | None
    deep: dict[tuple[str, Any], Tensor] = field(default_factory=dict)

    @classmethod
    def pack(
        cls,
        plan: Plan,
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        choices: Mapping[str, Choice] | None = None,
        tuned: Tuned | None = None,
        by_library: frozenset[str] = frozenset(),
    ) -> CudaWeights:
        """Pack the weights of a plan for `device` (None: the device of the plan's weights)."""
        from lgnet_fast.kernels.compiled_checks import DTYPES
        from lgnet_fast.kernels.picture_conv import pack as picture_pack
        from lgnet_fast.kernels.picture_conv import unsupported

        device = plan.steps[0].weight.device if device is None else torch.device(device)
        chosen, tuned = dict(choices or {}), tuned or Tuned()

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype).contiguous()

        def packed(step: Step) -> StepWeights:
            if isinstance(step, AttentionStep):
                return StepWeights(moved(step.weight), moved(step.bias), None)
            plain = None
            if step.name in by_library or _prefers_cudnn(plan, step, chosen, tuned, target):
                plain = moved(step.weight).contiguous(memory_format=torch.channels_last)
            conv, weight = conv_of(step), step.weight.detach()
            bias = step.bias.detach().to(device, torch.float32, copy=True)  # the model's may be at any address
            in_order = dtype in DTYPES and unsupported(conv) is None
            fragments = moved(picture_pack(conv, weight)) if in_order else None
            return StepWeights(moved(conv.pack(weight)), bias, plain, fragments)

        with torch.inference_mode(False):
            target = target_of(device, dtype)
            own = {s.name: packed(s) for s in plan.steps if s.weights_of == s.name}
        steps = {step.name: own[step.weights_of] for step in plan.steps}
        return cls(dtype, device, chosen, tuned, by_library, steps, event_of(device))

    def all_by_library(self, plan: Plan, names: frozenset[str]) -> CudaWeights:
        """The same weights for PyTorch's operators, unpacked."""
        with torch.inference_mode(False), torch.no_grad():
            own = {s.name: _unpacked(s, self.steps[s.name]) for s in plan.steps if s.weights_of == s.name}
        steps = {s.name: own[s.weights_of] for s in plan.steps}
        return replace(self, by_library=names, steps=steps, packed=event_of(self.device))

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        tensors = [t for w in self.steps.values() for t in (w.packed, w.bias, w.plain, w.fragments) if t is not None]
        return sum(t.numel() * t.element_size() for t in (*tensors, *self.deep.values()))


def _prefers_cudnn(
    plan: Plan,
    step: ConvStep,
    chosen: Mapping[str, Choice],
    tuned: Tuned,
    target: tuple[str, str, int],
) -> bool:
    from lgnet_fast.kernels.conv_configs import is_tuned_cudnn

    if step.name in chosen:
        return chosen[step.name] == "cudnn"
    work = work_of(plan, step)
    measured = tuned.tile(work, target[0])
    return is_tuned_cudnn(work, *target[:2]) if measured is None else measured == "cudnn"


def _unpacked(step: Step, weights: StepWeights) -> StepWeights:
    if isinstance(step, AttentionStep) or weights.plain is not None:
        return weights
    return replace(weights, plain=unpack(step, weights.packed))


def unpack(step: ConvStep, packed: Tensor) -> Tensor:
    """The weight of a (transposed) convolution, channels last: the inverse of `kernels.conv.Conv.pack`."""
    conv = conv_of(step)
    axis = conv.axis
    taps_first = packed.new_empty(conv.kernel, conv.kernel, conv.in_channels, conv.out_channels)
    blocks = iter(packed.view(-1, conv.in_channels, packed.shape[-1]))
    for phase_y, phase_x in itertools.product(range(axis.phases), repeat=2):
        for y, x in itertools.product(range(axis.taps[phase_y]), range(axis.taps[phase_x])):
            block = next(blocks)
            for shift_y, shift_x in itertools.product(range(axis.patch), repeat=2):
                tap_y = conv.kernel_tap(phase_y + shift_y, axis.origins[phase_y] + y)
                tap_x = conv.kernel_tap(phase_x + shift_x, axis.origins[phase_x] + x)
                if tap_y is not None and tap_x is not None:
                    column = (shift_y * axis.patch + shift_x) * 4
                    taps_first[tap_y, tap_x] = block[:, column : column + conv.out_channels]
    weight = taps_first.permute((2, 3, 0, 1) if conv.transposed else (3, 2, 0, 1))
    return weight.contiguous(memory_format=torch.channels_last)
