"""Running a plan on a GPU with some or all steps by PyTorch's operators (cuDNN), on the same channels-last buffers.

It is used where a kernel does not compile, does not launch or is wrong. It always runs densely.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import torch

from ..plan import AttentionStep, Plan
from ..regions import Rect
from .executor import CudaExecutor
from .launches import Launch, attend_by_operators, paint_by_operators
from .memory import Memory

PAINT = "paint"
"""Name of the work before the first step of a plan: painting the hole, copying the picture."""


class LibraryExecutor(CudaExecutor):
    """A :class:`.executor.CudaExecutor` that runs the steps named in ``by_library`` of its weights (and
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
    ) -> LibraryExecutor:
        """An executor of a plan with weights that runs `steps` (None: all) by PyTorch."""
        names = _all_steps(plan) if steps is None else frozenset(steps)
        return cls.of(plan, dtype, device=device, by_library=names)

    @classmethod
    def taking_over(cls, executor: CudaExecutor) -> LibraryExecutor:
        """An executor that runs all steps of another one by PyTorch, in the same dtype, without a graph."""
        weights = executor.weights.all_by_library(executor.plan, _all_steps(executor.plan))
        return cls(
            executor.plan, weights, replace(executor.options, graphs=False, deep_rows=0, chains=False, overlap="none")
        )

    def _paint(self, memory: Memory, painted: bool) -> Launch:
        if PAINT not in self.weights.by_library:
            return super()._paint(memory, painted)
        return functools.partial(paint_by_operators, memory, painted)

    def _attention(self, memory: Memory, step: AttentionStep, rects: tuple[Rect, ...] | None) -> Launch:
        if step.name not in self.weights.by_library:
            return super()._attention(memory, step, rects)
        weights = self.weights.steps[step.name]
        return functools.partial(attend_by_operators, memory, step, weights.packed, weights.bias)


def _all_steps(plan: Plan) -> frozenset[str]:
    return frozenset({PAINT, *(step.name for step in plan.steps)})
