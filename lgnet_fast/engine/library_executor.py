"""A plan on a GPU whose steps, some or all, run by PyTorch's operators (cuDNN) over the same channels-last memory.

It takes over where a kernel does not compile, does not launch or is wrong. It always runs densely.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..reference.attention import attention_block
from .cuda_executor import CudaExecutor, Launch, Memory, activate_
from .executor import Regions, Result
from .plan import PICTURE, AttentionStep, Plan
from .regions import Rect

PAINT = "paint"
"""Name of what comes before a plan's first step: painting the hole, copying the picture."""


class LibraryExecutor(CudaExecutor):
    """Runs a plan as :class:`.cuda_executor.CudaExecutor` does, without the kernels of the steps (and :data:`PAINT`)
    that are ``by_library`` in its weights."""

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
        """The executor of a plan with weights whose `steps` run by PyTorch; None: all of them."""
        names = _all_steps(plan) if steps is None else frozenset(steps)
        return cls.of(plan, dtype, device=device, by_library=names, graphs=graphs)

    @classmethod
    def taking_over(cls, executor: CudaExecutor) -> LibraryExecutor:
        """All steps of another executor, with its weights unpacked, in its dtype; without a graph."""
        weights = executor.weights.all_by_library(executor.plan, _all_steps(executor.plan))
        return cls(executor.plan, weights, replace(executor.options, graphs=False, deep_rows=0))

    def run(self, image: Tensor, mask: Tensor, start: Tensor | None = None, regions: Regions | None = None) -> Result:
        """As there, everywhere."""
        return super().run(image, mask, start)

    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """One step's launches, everywhere."""
        return super().step_launches(memory, number)

    def _launches(self, memory: Memory, regions: Regions | None, painted: bool) -> list[Launch]:
        launches = super()._launches(memory, regions, painted)
        if PAINT in self.weights.by_library:
            launches[0] = functools.partial(_paint, memory, painted)
        return launches

    def _attend(self, memory: Memory, step: AttentionStep) -> None:
        if step.name not in self.weights.by_library:
            super()._attend(memory, step)
            return
        weights = self.weights.steps[step.name]
        features = memory.view(step.source).permute(0, 3, 1, 2)
        value = attention_block(features, weights.packed, weights.bias, step.variant)
        for store in step.stores:
            activate_(memory.view(store.view).permute(0, 3, 1, 2).copy_(value), store.activation)


def _all_steps(plan: Plan) -> frozenset[str]:
    return frozenset({PAINT, *(step.name for step in plan.steps)})


def _paint(memory: Memory, painted: bool) -> None:
    """What `kernels.conv.paint_forward` does."""
    start = memory.start if painted else torch.ones_like(memory.image)
    merged = memory.image * (1 - memory.mask) + start * memory.mask
    picture = memory.maps[PICTURE]
    picture[..., :3].copy_(merged.permute(0, 2, 3, 1))
    picture[..., 3:].copy_(memory.mask.permute(0, 2, 3, 1))
    memory.outputs[0].copy_(memory.image)
