"""Consecutive convolutions of a plan that run in one launch of `kernels/hopper_chain.py`: NetL's residual blocks, and
the U-Nets' steps before and after the deep layers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ...ops.torch_state import pass_on_out_of_memory
from ..executor import Regions
from ..plan import ConvStep, Plan, Step, View
from ..regions import Rect
from .grouped import LayerWeights, layer_of, noise_maps, steps_at, view_of, wrong_step
from .weights import conv_of, work_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.cards import Card
    from lgnet_fast.kernels.conv_configs import Cost
    from lgnet_fast.kernels.hopper_chain import Chain, ChainStep
    from lgnet_fast.kernels.hopper_shapes import HopperTile

logger = logging.getLogger("lgnet_fast")

_CORNER = 32
"""Most rows and columns of the part of a map that is checked where the blocks of whole maps do not fit."""


def runs(plan: Plan, card: Card) -> list[range]:
    """Groups of two or more consecutive steps that the kernel can compute in one launch, in some rectangles. Steps of
    few outputs belong to none: most are deep layers (:mod:`.deep_layers`), and tiles of the others are few."""
    found, begin = [], 0
    for end in range(len(plan.steps) + 1):
        fitting = end < len(plan.steps) and _can_join(plan, plan.steps[end])
        if not fitting or not _joins(plan, begin, end, card):
            if end - begin > 1:
                found.append(range(begin, end))
            begin = end if fitting else end + 1
    return found


def _can_join(plan: Plan, step: Step) -> bool:
    """Whether the kernel can compute a step that has enough outputs."""
    from lgnet_fast.kernels.deep_shapes import MAX_ROWS
    from lgnet_fast.kernels.hopper_shapes import unsupported

    return isinstance(step, ConvStep) and unsupported(conv_of(step)) is None and layer_of(plan, step).rows > MAX_ROWS


def _joins(plan: Plan, first: int, number: int, card: Card) -> bool:
    """Whether a step may join the group that begins at `first`.

    In a dense run the blocks of all its steps must fit on the GPU at once, or those of none, because one that does
    not fit keeps the others from sharing a launch. Where one pads by reflection, all must be alike. A thread reads as
    residual what itself has stored, so a residual that the group stores must be a view that a step like this one
    stores.
    """
    from lgnet_fast.kernels.hopper_chain import MAX_LAYERS, alike, fits

    if number - first == MAX_LAYERS:
        return False
    steps = steps_at(plan, first, number - first)
    (step,) = steps_at(plan, number, 1)
    own = shape_of(plan, step, plan.target(step).everywhere)
    others = [shape_of(plan, other, plan.target(other).everywhere) for other in steps]
    if others and fits(own, plan.batch, card) != fits(others[0], plan.batch, card):
        return False
    same = [alike(other, own) for other in others]
    if any(conv_of(other).reflect for other in (*steps, step)) and not all(same):
        return False
    residual = step.residual
    return residual is None or all(
        is_alike and store.view == residual
        for other, is_alike in zip(steps, same)
        for store in other.stores
        if store.view.buffer == residual.buffer
    )


def shape_of(plan: Plan, step: ConvStep, rect: Rect) -> ChainStep:
    """A step in a rectangle as the description that the kernel takes."""
    from lgnet_fast.kernels.hopper_chain import ChainStep

    return ChainStep(conv_of(step), plan.source(step).size, plan.target(step).size, rect)


def rectangles(plan: Plan, numbers: range, regions: Regions | None) -> tuple[Rect, ...] | None:
    """The rectangle of each step of a group; None where a step has several of them, or none."""
    own = [plan.steps[number].regions if regions is None else regions[number] for number in numbers]
    return tuple(rects[0] for rects in own) if all(len(rects) == 1 for rects in own) else None


def tiles(
    plan: Plan, numbers: range, rects: Sequence[Rect], card: Card
) -> tuple[tuple[tuple[HopperTile, ...], tuple[Cost, ...]], ...]:
    """The tiles of a group's steps that gain for their rectangles by estimate, the fastest first, each with the costs
    of the steps."""
    from lgnet_fast.kernels.hopper_chain import ranked_chains, seconds

    steps = steps_at(plan, numbers.start, len(numbers))
    alone = sum(_seconds_alone(plan, step, rect, card) for step, rect in zip(steps, rects))
    found = ranked_chains(tuple(shape_of(plan, *one) for one in zip(steps, rects)), plan.batch, card)
    return tuple(one for one in found if seconds(one[1]) < alone)


def _seconds_alone(plan: Plan, step: ConvStep, rect: Rect, card: Card) -> float:
    """The estimate of a step's own launch, by the kernel of :mod:`lgnet_fast.kernels.hopper` or Triton's."""
    from lgnet_fast.kernels.conv_configs import estimate, pick_tile
    from lgnet_fast.kernels.hopper_shapes import ranked

    work, target = work_of(plan, step, rect), ("half", card.generation, card.num_sms)
    by_triton = estimate(work, pick_tile(work, *target), *target)
    best = ranked(conv_of(step), plan.batch, plan.source(step).size, plan.target(step).size, tuple(rect), card)[:1]
    return min([by_triton, *(cost.seconds for _, cost in best)])


def gains(plan: Plan, numbers: range, card: Card) -> bool:
    """Whether a group gains in a dense run, by estimate."""
    everywhere = [plan.target(step).everywhere for step in steps_at(plan, numbers.start, len(numbers))]
    return bool(tiles(plan, numbers, everywhere, card))


def make_chain(
    plan: Plan,
    numbers: range,
    weights: Mapping[str, LayerWeights],
    view: Callable[[View], Tensor],
    rects: Sequence[Rect],
    tiles: Sequence[HopperTile],
    clocks: Tensor | None = None,
) -> Chain:
    """The launch of a group of steps in their rectangles, each in tiles of its own, on maps given by `view`. clocks:
    see `Chain`."""
    from lgnet_fast.kernels.hopper_chain import Chain, ChainLayer
    from lgnet_fast.kernels.results import Store

    layers = []
    for step, rect in zip(steps_at(plan, numbers.start, len(numbers)), rects):
        own = weights[step.name]
        stores = tuple(Store(view(s.view), s.activation) for s in step.stores)
        residual = None if step.residual is None else view(step.residual)
        layers.append(ChainLayer(conv_of(step), view(step.source), own.packed, own.bias, stores, rect, residual))
    return Chain(layers, tiles, clocks)


def fitting_chain(
    plan: Plan,
    numbers: range,
    weights: Mapping[str, LayerWeights],
    view: Callable[[View], Tensor],
    regions: Regions | None,
    card: Card,
) -> Chain | None:
    """The launch of a group in the fastest tiles whose blocks run on the GPU at the same time; None where the steps
    are launched one by one."""
    rects = rectangles(plan, numbers, regions) or ()
    for found, _ in tiles(plan, numbers, rects, card) if rects else ():
        chain = make_chain(plan, numbers, weights, view, rects, found)
        if chain.fits():
            return chain
    return None


def checked_runs(
    plan: Plan, weights: Mapping[str, LayerWeights], card: Card, wanted: Container[str] | None = None
) -> list[range]:
    """The groups of :func:`runs` that have passed: each runs once. Those that fail or are wrong are left out.

    A group runs everywhere or, where its blocks are too many, in a corner: in holes they may be few.

    Args:
        plan, weights, card: as above.
        wanted: names of the first steps of the groups that are; None: all.
    """
    from lgnet_fast.kernels.hopper_chain import reason_against

    passed = []
    for numbers in runs(plan, card):
        steps = steps_at(plan, numbers.start, len(numbers))
        if wanted is not None and steps[0].name not in wanted:
            continue
        whole, packed = [plan.target(step).everywhere for step in steps], weights[steps[0].name].packed
        corner = [Rect(0, min(one.bottom, _CORNER), 0, min(one.right, _CORNER)) for one in whole]
        where = next((rects for rects in (whole, corner) if tiles(plan, numbers, rects, card)), None)
        if where is None:
            continue
        if (reason := reason_against(packed.device, packed.dtype)) is not None:
            logger.info("%s and after are launched one by one: %s", steps[0].name, reason)
        elif (problem := _problem(plan, numbers, weights, where, card)) is not None:
            logger.warning("%s and after are launched one by one: %s", steps[0].name, problem)
        else:
            passed.append(numbers)
    return passed


def _problem(
    plan: Plan, numbers: range, weights: Mapping[str, LayerWeights], rects: Sequence[Rect], card: Card
) -> str | None:
    """What is wrong with a group on noise, each step computed in its rectangle; or None. Waits for the device."""
    steps = steps_at(plan, numbers.start, len(numbers))
    packed = weights[steps[0].name].packed
    maps = noise_maps(plan, steps, packed.dtype, packed.device)
    own = dict(zip(numbers, rects))
    regions = [(own[number],) if number in own else () for number in range(len(plan.steps))]
    try:
        chain = fitting_chain(plan, numbers, weights, functools.partial(view_of, maps), regions, card)
        if chain is None:
            return "its blocks do not fit on the GPU at the same time"
        chain.launch()
    except RuntimeError as refusal:
        pass_on_out_of_memory(refusal)
        return str(refusal)
    return wrong_step(plan, steps, weights, maps, rects)
