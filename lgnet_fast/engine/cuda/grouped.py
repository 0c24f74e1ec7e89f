"""What groups of consecutive steps that run in one launch (:mod:`.deep_layers`, :mod:`.chains`) have in common: the
steps, their weights, and a check of their results on noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..plan import ConvStep, Plan, Step, View
from ..regions import Rect
from ..torch_executor import ACTIVATIONS
from .measure import excessive_error
from .weights import conv_of

if TYPE_CHECKING:
    from lgnet_fast.kernels.deep_shapes import DeepLayer


class LayerWeights(Protocol):
    """Weights of one step: packed for the Triton kernels, and the float32 bias."""

    @property
    def packed(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor: ...


def layer_of(plan: Plan, step: ConvStep) -> DeepLayer:
    """A convolution of the plan as the description that the kernel takes."""
    from lgnet_fast.kernels.deep_shapes import DeepLayer

    return DeepLayer(conv_of(step), plan.batch, plan.source(step).size, plan.target(step).size)


def steps_at(plan: Plan, first: int, count: int) -> list[ConvStep]:
    """Consecutive convolutions of a plan."""
    return [step for step in plan.steps[first : first + count] if isinstance(step, ConvStep)]


def noise_maps(plan: Plan, steps: Sequence[Step], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Every map that the steps read or write, filled with noise; none shares memory with another."""
    generator = torch.Generator("cpu").manual_seed(7)
    views = [view for step in steps for view in (step.source, step.residual, *(s.view for s in step.stores))]
    names = dict.fromkeys(view.buffer for view in views if view is not None)
    maps = {}
    for name in names:
        b = plan.buffers[name]
        shape = (plan.batch, b.height, b.width, b.channels)
        maps[name] = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)
    return maps


def view_of(maps: Mapping[str, Tensor], view: View) -> Tensor:
    """[B, H, W, C] of some channels."""
    return maps[view.buffer][..., view.offset : view.offset + view.channels]


def step_errors(
    plan: Plan, steps: Sequence[ConvStep], weights: Mapping[str, LayerWeights], maps: Mapping[str, Tensor]
) -> list[tuple[ConvStep, Tensor, Tensor]]:
    """(step, stored, expected) of every store. Expected: the step by PyTorch in float32, on its source in `maps`."""
    from lgnet_fast.kernels.deep_shapes import reference

    found = []
    for step in steps:
        own = weights[step.name]
        value = reference(layer_of(plan, step), view_of(maps, step.source), own.packed, own.bias)
        if step.residual is not None:
            value += view_of(maps, step.residual)
        for store in step.stores:
            exact = ACTIVATIONS[store.activation](value)
            found.append((step, view_of(maps, store.view).float(), exact))
    return found


def wrong_step(
    plan: Plan,
    steps: Sequence[ConvStep],
    weights: Mapping[str, LayerWeights],
    maps: Mapping[str, Tensor],
    rects: Sequence[Rect] | None = None,
) -> str | None:
    """The first step whose stores in `maps` are wrong, and its error, or None. Waits for the device.

    rects: of each step, the part that is compared; None: everywhere.
    """
    where = {} if rects is None else {step.name: rect for step, rect in zip(steps, rects)}
    for step, stored, exact in step_errors(plan, steps, weights, maps):
        dtype = maps[step.source.buffer].dtype
        if (rect := where.get(step.name)) is not None:
            stored, exact = (one[:, rect.top : rect.bottom, rect.left : rect.right] for one in (stored, exact))
        if (error := excessive_error(stored, exact, dtype)) is not None:
            return f"{step.name}: relative error {error:.1e}"
    return None
