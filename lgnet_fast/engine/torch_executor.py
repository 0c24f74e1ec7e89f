"""A plan in plain PyTorch: slow, the reference for the other executors.

Buffers start as NaN and only the regions of a step are computed, so a region that is too small gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.attention import joined, query_key_value
from .executor import Executor, Regions, Result
from .geometry import Geometry
from .plan import LEAKY_SLOPE, PICTURE, AttentionStep, ConvStep, Plan, Step
from .regions import Rect


def convolution(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A whole (transposed) convolution by PyTorch's operators, [B, C, H, W]."""
    g = geometry
    if g.transposed:
        return F.conv_transpose2d(x, weight, bias, g.stride, g.padding, g.output_padding)
    if g.reflect:
        return F.conv2d(F.pad(x, [g.padding] * 4, mode="reflect"), weight, bias, g.stride)
    return F.conv2d(x, weight, bias, g.stride, g.padding)


class TorchExecutor(Executor):
    """Runs a plan; computes in the dtype and on the device of the plan's weights."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def device(self) -> torch.device:
        return self.plan.steps[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.plan.steps[0].weight.dtype

    def resized(self, plan: Plan) -> TorchExecutor:
        steps = tuple(
            replace(new, weight=old.weight, bias=old.bias)
            for new, old in zip(plan.steps, self.plan.steps, strict=True)
        )
        return TorchExecutor(replace(plan, steps=steps))

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        """See :meth:`.executor.Executor.run`; results are in the dtype of the weights."""
        buffers = self.buffers_after(image, mask, start, regions)
        raw = [buffers[s.stores[0].view.buffer] for s in self.plan.steps if s.merges and stages]
        return buffers[PICTURE][:, :3], raw

    def buffers_after(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
    ) -> dict[str, Tensor]:
        """Every buffer after the last step, [B, C, H, W] each; NaN where no value was computed."""
        plan = self.plan
        weight = plan.steps[0].weight
        image, mask = image.to(weight), mask.to(weight)
        buffers = {
            name: image.new_full((plan.batch, b.channels, b.height, b.width), torch.nan)
            for name, b in plan.buffers.items()
        }
        painted = torch.ones_like(image) if start is None else start.to(weight)
        buffers[PICTURE][:] = torch.cat((image * (1 - mask) + painted * mask, mask), dim=1)
        for number, step in enumerate(plan.steps):
            source = buffers[step.source.buffer][:, step.source.offset :][:, : step.source.channels]
            for region in step.regions if regions is None else regions[number]:
                _store(step, region, _value(step, region, source), buffers, image, mask)
        return buffers


def _value(step: Step, region: Rect, source: Tensor) -> Tensor:
    if isinstance(step, AttentionStep):
        return _attention(step, region, source)
    return _transposed(step, region, source) if step.geometry.transposed else _convolution(step, region, source)


def _convolution(step: ConvStep, region: Rect, source: Tensor) -> Tensor:
    size = (source.shape[2], source.shape[3])
    k, s, p = step.geometry.kernel, step.geometry.stride, step.geometry.padding
    read = step.geometry.reads(region, size)
    indices = []
    for start, stop, length in ((region.top, region.bottom, size[0]), (region.left, region.right, size[1])):
        index = torch.arange(start * s - p, (stop - 1) * s - p + k, device=source.device)
        if step.geometry.reflect:
            index = index.abs()
            index = torch.where(index >= length, 2 * (length - 1) - index, index)
        indices.append(index)
    rows, columns = indices
    inside = ((rows >= 0) & (rows < size[0]))[:, None] & ((columns >= 0) & (columns < size[1]))
    assert rows.clamp(0, size[0] - 1).min() >= read.top
    assert rows.clamp(0, size[0] - 1).max() < read.bottom
    patch = source[:, :, rows.clamp(0, size[0] - 1)][..., columns.clamp(0, size[1] - 1)]
    return F.conv2d(torch.where(inside, patch, 0.0), step.weight, step.bias, stride=s)


def _transposed(step: ConvStep, region: Rect, source: Tensor) -> Tensor:
    g = step.geometry
    read = g.reads(region, (source.shape[2], source.shape[3]))
    patch = source[:, :, read.top : read.bottom, read.left : read.right]
    # Without padding, output 0 of this is output read * stride - padding of the whole map.
    spread = F.conv_transpose2d(patch, step.weight, stride=g.stride, output_padding=g.output_padding)
    top = region.top - (read.top * g.stride - g.padding)
    left = region.left - (read.left * g.stride - g.padding)
    height, width = region.bottom - region.top, region.right - region.left
    return spread[:, :, top : top + height, left : left + width] + step.bias[:, None, None]


def _attention(step: AttentionStep, region: Rect, source: Tensor) -> Tensor:
    query, key, value = query_key_value(source, step.variant)
    rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
    here = source[:, :, rows, columns]
    q, k, v = (
        x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for x in (query[:, :, rows, columns], key, value)
    )
    attended = F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1).transpose(1, 2).reshape(here.shape)
    return F.conv2d(joined(attended, here, step.variant), step.weight, step.bias)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, LEAKY_SLOPE),
    "tanh": torch.tanh,
}
"""The activations of plans in plain PyTorch."""


def _store(step: Step, region: Rect, value: Tensor, buffers: dict[str, Tensor], image: Tensor, mask: Tensor) -> None:
    rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
    if step.residual is not None:
        view = step.residual
        value = value + buffers[view.buffer][:, view.offset :, rows, columns][:, : view.channels]
    for store in step.stores:
        view = store.view
        target = buffers[view.buffer][:, view.offset : view.offset + view.channels, rows, columns]
        target.copy_(ACTIVATIONS[store.activation](value))
    if step.merges:
        m = mask[:, :, rows, columns]
        merged = image[:, :, rows, columns] * (1 - m) + torch.tanh(value) * m
        buffers[PICTURE][:, :3, rows, columns] = merged
