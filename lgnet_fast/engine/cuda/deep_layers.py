"""Groups of steps of a plan that run in one launch of `kernels/deep.py`, checked before they are used."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...ops.torch_state import pass_on_out_of_memory
from ..executor import Regions
from ..plan import ConvStep, Plan, Step, View
from .grouped import LayerWeights, layer_of, noise_maps, steps_at, view_of, wrong_step

if TYPE_CHECKING:
    from lgnet_fast.kernels.deep import DeepGroup
    from lgnet_fast.kernels.deep_exchange import State

logger = logging.getLogger("lgnet_fast")


def runs(plan: Plan, rows: int) -> list[range]:
    """Groups of two or more consecutive steps that the kernel can compute in one launch, with at most `rows` outputs
    per phase."""
    from lgnet_fast.kernels.deep_shapes import unsupported

    def fits(step: Step) -> bool:
        if not isinstance(step, ConvStep) or step.residual is not None:
            return False
        layer = layer_of(plan, step)
        return layer.rows <= rows and unsupported(layer) is None

    found, begin = [], 0
    for end in range(len(plan.steps) + 1):
        fitting = end < len(plan.steps) and fits(plan.steps[end])
        if not fitting or not _reads_whole(plan, range(begin, end), plan.steps[end].source):
            if end - begin > 1:
                found.append(range(begin, end))
            begin = end if fitting else end + 1
    return found


def _reads_whole(plan: Plan, numbers: range, source: View) -> bool:
    """Whether the steps of a group store a view wholly, the last of them some of it, and none of them reads it; of a
    group without steps always."""
    steps = steps_at(plan, numbers.start, len(numbers))
    if not steps:
        return True
    stored = [s.view for step in steps for s in step.stores if s.view.buffer == source.buffer]
    channels = [channel for view in stored for channel in range(view.offset, view.offset + view.channels)]
    return (
        sorted(channels) == list(range(source.offset, source.offset + source.channels))
        and any(store.view in stored for store in steps[-1].stores)
        and not any(step.source.buffer == source.buffer for step in steps)
    )


def make_group(
    plan: Plan,
    numbers: Sequence[int],
    weights: Mapping[str, LayerWeights],
    packs: dict[tuple[str, Any], Tensor],
    cluster: int,
    clusters: int,
    **options: Any,
) -> DeepGroup | str:
    """Consecutive steps as one launch, or why the kernel cannot run them.

    Args:
        plan: the plan.
        numbers: of the steps in the plan.
        weights: step's name -> its weights.
        packs: (step, split) -> weights in the kernel's order, kept for other plans with the same weights.
        cluster: thread blocks per cluster.
        clusters: that fit on the GPU at once.
        options: of :class:`lgnet_fast.kernels.deep.DeepGroup`.
    """
    from lgnet_fast.kernels import deep, deep_shapes

    steps = steps_at(plan, numbers[0], len(numbers))
    layers = [layer_of(plan, step) for step in steps]
    shares = deep_shapes.plan_splits(layers, cluster, clusters)
    if isinstance(shares, str):
        return shares
    keys = [(step.weights_of, share._replace(shift=0)) for step, share in zip(steps, shares)]
    for key, step, layer, share in zip(keys, steps, layers, shares):
        if key not in packs:
            packs[key] = deep_shapes.pack(layer, weights[step.name].packed, share)
    biases = [weights[step.name].bias for step in steps]
    return deep.DeepGroup(layers, shares, [packs[key] for key in keys], biases, **options)


def make_groups(
    plan: Plan,
    weights: Mapping[str, LayerWeights],
    packs: dict[tuple[str, Any], Tensor],
    rows: int,
) -> dict[int, DeepGroup]:
    """First step -> the group that begins there. Each group runs once; those that fail or are wrong are left out."""
    from lgnet_fast.kernels import deep, deep_shapes

    found = runs(plan, rows)
    if not found:
        return {}
    packed = weights[plan.steps[found[0][0]].name].packed
    if (reason := deep.unavailable(packed.device, packed.dtype)) is not None:
        logger.info("deep layers are launched one by one: %s", reason)
        return {}
    held = deep.held_clusters(packed.device, packed.dtype)
    groups = {}
    for numbers in found:
        steps = steps_at(plan, numbers[0], len(numbers))
        best = deep_shapes.best_cluster([layer_of(plan, step) for step in steps], held)
        group = best if isinstance(best, str) else make_group(plan, numbers, weights, packs, *best)
        problem = group if isinstance(group, str) else wrong_group(plan, numbers[0], group, weights)
        if isinstance(group, str) or problem is not None:
            logger.warning("%s and after are launched one by one: %s", plan.steps[numbers[0]].name, problem)
        else:
            groups[numbers[0]] = group
    return groups


def applies(plan: Plan, numbers: range, regions: Regions) -> bool:
    """Whether a group may run in a restricted run: some of its steps do, and what they read from others is whole.

    The group computes its own steps everywhere, which takes no longer, because it is bound by reading weights.
    """
    if not any(regions[number] for number in numbers):
        return False
    read = {plan.steps[number].source.buffer for number in numbers}
    earlier = [n for n in range(numbers.start) if read & {store.view.buffer for store in plan.steps[n].stores}]
    return all(regions[n] == (plan.target(plan.steps[n]).everywhere,) for n in earlier)


def group_launch(
    plan: Plan,
    first: int,
    group: DeepGroup,
    view: Callable[[View], Tensor],
    states: dict[DeepGroup, State] | None = None,
    times: Tensor | None = None,
    only: int | None = None,
) -> tuple[Callable[[], None], State]:
    """The launch of a group that begins at step `first`, on maps given by `view`, and its state.

    Args:
        plan, first, group, view: as above.
        states: of groups on these maps, whose launches run one after another; None: the launch gets its own. Launches
            keep a reference to theirs.
        times, only: see :meth:`lgnet_fast.kernels.deep.DeepGroup.program`.
    """
    from lgnet_fast.kernels.results import Store

    steps = plan.steps[first : first + len(group.layers)]
    stores = [[Store(view(s.view), s.activation) for s in step.stores] for step in steps]
    states = {} if states is None else states
    if group not in states:
        states[group] = group.new_state()
    state = states[group]
    program = group.program([view(step.source) for step in steps], stores, state, times, only)
    return functools.partial(_launch, group, program, state), state


def _launch(group: DeepGroup, program: Any, state: State) -> None:
    del state  # an argument only so that the launch keeps a reference to it
    group.launch(program)


def wrong_group(plan: Plan, first: int, group: DeepGroup, weights: Mapping[str, LayerWeights]) -> str | None:
    """The first wrong step of a group on noise and its error, or None. Waits for the device."""
    steps = steps_at(plan, first, len(group.layers))
    maps = noise_maps(plan, steps, group.dtype, group.weights[0].device)
    try:
        launch, state = group_launch(plan, first, group, functools.partial(view_of, maps))
        launch()
        if (problem := state.error()) is not None:
            return problem
    except (RuntimeError, ValueError) as refusal:
        pass_on_out_of_memory(refusal)
        return str(refusal)
    return wrong_step(plan, steps, weights, maps)
