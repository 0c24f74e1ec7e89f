"""Consecutive convolutions of a plan that run in one launch of `kernels/hopper_chain.py`: NetL's residual blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..executor import Regions
from ..plan import ConvStep, Plan, Step, View
from ..regions import Rect
from .deep_layers import LayerWeights, steps_at
from .weights import conv_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.cards import Card
    from lgnet_fast.kernels.conv_configs import Cost
    from lgnet_fast.kernels.hopper_chain import Chain
    from lgnet_fast.kernels.hopper_shapes import HopperTile


def runs(plan: Plan) -> list[range]:
    """Groups of two or more consecutive steps with the same convolution, on maps of one size."""
    from lgnet_fast.kernels.hopper_chain import MAX_LAYERS

    def kind(step: Step) -> Any:
        if not isinstance(step, ConvStep) or step.merges or plan.source(step).size != plan.target(step).size:
            return None
        return conv_of(step), plan.source(step).size

    found, begin = [], 0
    for same, alike in itertools.groupby(plan.steps, kind):
        end = begin + len(list(alike))
        while same is not None and begin < end:
            count = 1
            while begin + count < end and count < MAX_LAYERS and _joins(plan, begin, begin + count):
                count += 1
            if count > 1:
                found.append(range(begin, begin + count))
            begin += count
        begin = end
    return found


def _joins(plan: Plan, first: int, number: int) -> bool:
    """Whether a step may join the group that begins at `first`: a thread reads as residual what itself has stored, so
    a residual that the group stores must be one of its views."""
    residual = plan.steps[number].residual
    stored = [store.view for step in plan.steps[first:number] for store in step.stores]
    return residual is None or all(view == residual for view in stored if view.buffer == residual.buffer)


def rectangles(plan: Plan, numbers: range, regions: Regions | None) -> tuple[Rect, ...] | None:
    """The rectangle of each step of a group; None where a step has several of them, or none."""
    own = [plan.steps[number].regions if regions is None else regions[number] for number in numbers]
    return tuple(rects[0] for rects in own) if all(len(rects) == 1 for rects in own) else None


def best_tile(plan: Plan, numbers: range, rects: tuple[Rect, ...], card: Card) -> tuple[HopperTile, Cost] | None:
    """The tile for a group's rectangles, and the launch's cost; None where the kernel cannot compute the group."""
    from lgnet_fast.kernels import hopper_chain

    (first,) = steps_at(plan, numbers.start, 1)
    return hopper_chain.best_tile(conv_of(first), plan.batch, plan.source(first).size, rects, card)


def make_chain(
    plan: Plan,
    numbers: range,
    weights: Mapping[str, LayerWeights],
    view: Callable[[View], Tensor],
    rects: Sequence[Rect],
    tile: HopperTile,
    clocks: Tensor | None = None,
) -> Chain:
    """The launch of a group of steps in their rectangles, on maps given by `view`. clocks: see `Chain`."""
    from lgnet_fast.kernels.hopper_chain import Chain, ChainLayer
    from lgnet_fast.kernels.results import Store

    steps = steps_at(plan, numbers.start, len(numbers))
    layers = []
    for step, rect in zip(steps, rects):
        own = weights[step.name]
        stores = tuple(Store(view(s.view), s.activation) for s in step.stores)
        residual = None if step.residual is None else view(step.residual)
        layers.append(ChainLayer(view(step.source), own.packed, own.bias, stores, rect, residual))
    return Chain(conv_of(steps[0]), layers, tile, clocks)
