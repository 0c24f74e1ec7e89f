"""Running a plan on a GPU with some or all steps by PyTorch's operators (cuDNN), on the same channels-last buffers.

It is used where a kernel does not compile, does not launch or is wrong. It always runs densely.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..reference.attention import attention_block
from .cuda_executor import CudaExecutor
from .cuda_launches import Launch, activate_
from .cuda_memory import Memory
from .cuda_weights import StepWeights
from .executor import Regions, Result
from .plan import PICTURE, AttentionStep, Plan
from .regions import Rect

PAINT = "paint"
"""Name of the work before the first step of a plan: painting the hole, copying the picture."""


class LibraryExecutor(CudaExecutor):
    """A :class:`.cuda_executor.CudaExecutor` that runs the steps named in ``by_library`` of its weights (and
    :data:`PAINT`, if named) by PyTorch's operators."""

    restricts = False

    @classmethod
    def of_steps(
        cls,
        plan: Plan,
        dtype: torch.dtype = torch.float16,
        *,
        device: torch.device | None = None,
        steps: Iterable[str] | None = None,
        graphs: bool = True,
    ) -> LibraryExecutor:
        """An executor of a plan with weights that runs `steps` (None: all) by PyTorch."""
        names = _all_steps(plan) if steps is None else frozenset(steps)
        return cls.of(plan, dtype, device=device, by_library=names, graphs=graphs)

    @classmethod
    def taking_over(cls, executor: CudaExecutor) -> LibraryExecutor:
        """An executor that runs all steps of another one by PyTorch, in the same dtype, without a graph."""
        weights = executor.weights.all_by_library(executor.plan, _all_steps(executor.plan))
        return cls(executor.plan, weights, replace(executor.options, graphs=False, deep_rows=0, overlap="none"))

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        """See :meth:`.executor.Executor.run`; always dense."""
        return super().run(image, mask, start, stages=stages)

    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """The launches of one step, always dense."""
        return super().step_launches(memory, number)

    def _launches(self, memory: Memory, regions: Regions | None, painted: bool) -> list[Launch]:
        launches = super()._launches(memory, regions, painted)
        if PAINT in self.weights.by_library:
            launches[0] = functools.partial(_paint, memory, painted)
        return launches

    def _attention(self, memory: Memory, step: AttentionStep, rects: tuple[Rect, ...] | None) -> Launch:
        if step.name not in self.weights.by_library:
            return super()._attention(memory, step, rects)
        return functools.partial(_attend, memory, step, self.weights.steps[step.name])


def _all_steps(plan: Plan) -> frozenset[str]:
    return frozenset({PAINT, *(step.name for step in plan.steps)})


def _attend(memory: Memory, step: AttentionStep, weights: StepWeights) -> None:
    """The attention block by the reference."""
    features = memory.view(step.source).permute(0, 3, 1, 2)
    value = attention_block(features, weights.packed, weights.bias, step.variant)
    for store in step.stores:
        activate_(memory.view(store.view).permute(0, 3, 1, 2).copy_(value), store.activation)


def _paint(memory: Memory, painted: bool) -> None:
    """The same as `kernels.conv.paint_forward`."""
    start = memory.start if painted else torch.ones_like(memory.image)
    merged = memory.image * (1 - memory.mask) + start * memory.mask
    picture = memory.maps[PICTURE]
    picture[..., :3].copy_(merged.permute(0, 2, 3, 1))
    picture[..., 3:].copy_(memory.mask.permute(0, 2, 3, 1))
    memory.outputs[0].copy_(memory.image)
