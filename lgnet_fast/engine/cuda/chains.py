"""Consecutive convolutions of a plan that run in one launch of `kernels/hopper_chain.py`: NetL's residual blocks."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...ops.torch_state import pass_on_out_of_memory
from ..executor import Regions
from ..plan import ConvStep, Plan, Step, View
from ..regions import Rect
from .grouped import LayerWeights, noise_maps, steps_at, view_of, wrong_step
from .weights import conv_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.cards import Card
    from lgnet_fast.kernels.conv_configs import Cost
    from lgnet_fast.kernels.hopper_chain import Chain
    from lgnet_fast.kernels.hopper_shapes import HopperTile

logger = logging.getLogger("lgnet_fast")

_CORNER = 32
"""Height and width of the part that is checked where the blocks of a whole map do not fit."""


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


def tiles(plan: Plan, numbers: range, rects: tuple[Rect, ...], card: Card) -> tuple[tuple[HopperTile, Cost], ...]:
    """The tiles that gain for a group's rectangles by estimate, the fastest first, and the cost of each launch."""
    from lgnet_fast.kernels.hopper_chain import ranked_chains

    (first,) = steps_at(plan, numbers.start, 1)
    return ranked_chains(conv_of(first), plan.batch, plan.source(first).size, rects, card)


def gains(plan: Plan, numbers: range, card: Card) -> bool:
    """Whether a group gains in a dense run, by estimate."""
    rects = rectangles(plan, numbers, None)
    return rects is not None and bool(tiles(plan, numbers, rects, card))


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


def fitting_chain(
    plan: Plan,
    numbers: range,
    weights: Mapping[str, LayerWeights],
    view: Callable[[View], Tensor],
    regions: Regions | None,
    card: Card,
) -> Chain | None:
    """The launch of a group in the fastest tile whose blocks run on the GPU at the same time; None where the steps
    are launched one by one."""
    rects = rectangles(plan, numbers, regions) or ()
    for tile, _ in tiles(plan, numbers, rects, card) if rects else ():
        chain = make_chain(plan, numbers, weights, view, rects, tile)
        if chain.fits():
            return chain
    return None


def checked_runs(plan: Plan, weights: Mapping[str, LayerWeights], card: Card) -> list[range]:
    """The groups of :func:`runs` that have passed: each runs once. Those that fail or are wrong are left out.

    A group runs everywhere or, where its blocks are too many, in a corner: in holes they may be few.
    """
    from lgnet_fast.kernels.hopper_chain import reason_against

    passed = []
    for numbers in runs(plan):
        (first,) = steps_at(plan, numbers.start, 1)
        whole, packed = plan.target(first).everywhere, weights[first.name].packed
        corner = Rect(0, min(whole.bottom, _CORNER), 0, min(whole.right, _CORNER))
        where = next((one for one in (whole, corner) if tiles(plan, numbers, len(numbers) * (one,), card)), None)
        if where is None:
            continue
        if (reason := reason_against(packed.device, packed.dtype)) is not None:
            logger.info("%s and after are launched one by one: %s", first.name, reason)
        elif (problem := _problem(plan, numbers, weights, where, card)) is not None:
            logger.warning("%s and after are launched one by one: %s", first.name, problem)
        else:
            passed.append(numbers)
    return passed


def _problem(plan: Plan, numbers: range, weights: Mapping[str, LayerWeights], rect: Rect, card: Card) -> str | None:
    """What is wrong with a group on noise, each step computed in `rect`; or None. Waits for the device."""
    steps = steps_at(plan, numbers.start, len(numbers))
    packed = weights[steps[0].name].packed
    maps = noise_maps(plan, steps, packed.dtype, packed.device)
    regions = [() if number not in numbers else (rect,) for number in range(len(plan.steps))]
    try:
        chain = fitting_chain(plan, numbers, weights, functools.partial(view_of, maps), regions, card)
        if chain is None:
            return "its blocks do not fit on the GPU at the same time"
        chain.launch()
    except RuntimeError as refusal:
        pass_on_out_of_memory(refusal)
        return str(refusal)
    return wrong_step(plan, steps, weights, maps, rect)
