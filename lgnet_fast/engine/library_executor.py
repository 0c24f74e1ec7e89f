"""A plan on a GPU whose steps, some or all, run by PyTorch's operators (cuDNN) over the same channels-last memory.

It takes over where a kernel does not compile, does not launch or is wrong. It always runs densely.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reference.attention import attention_block
from .cuda_executor import CudaExecutor, Launch, Memory, _activate_, _Weights, describe
from .plan import PICTURE, Plan, Step
from .regions import Rect

if TYPE_CHECKING:
    from lgnet_fast.kernels.deep import DeepGroup

PAINT = "paint"
"""Name of what comes before a plan's first step: painting the hole, copying the picture."""


class LibraryExecutor(CudaExecutor):
    """Runs a plan as :class:`.cuda_executor.CudaExecutor` does, without the kernels of some steps.

    Args:
        plan, dtype, device, graphs: as there.
        steps: names of the steps that run by PyTorch, :data:`PAINT` included; None: all of them.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype = torch.float16,
        *,
        device: torch.device | None = None,
        steps: Iterable[str] | None = None,
        graphs: bool = True,
    ) -> None:
        self._by_library = _all_steps(plan) if steps is None else frozenset(steps)
        super().__init__(plan, dtype, device=device, graphs=graphs)

    @classmethod
    def taking_over(cls, executor: CudaExecutor) -> LibraryExecutor:
        """All steps of another executor, with its weights unpacked, in its dtype; without a graph."""
        other = cls.__new__(cls)
        other._by_library = _all_steps(executor.plan)
        for name in ("dtype", "device", "_chosen", "_clone", "_overlap", "_packed"):
            setattr(other, name, getattr(executor, name))
        other._graphs = False
        with torch.inference_mode(False), torch.no_grad():
            own = {
                step.name: _unpacked(step, executor._weights[step.name])
                for step in executor.plan.steps
                if step.weights_of == step.name
            }
        other._weights = {step.name: own[step.weights_of] for step in executor.plan.steps}
        other._build(executor.plan)
        return other

    def resized(self, plan: Plan) -> LibraryExecutor:
        """The same weights for another batch or size."""
        other = super().resized(plan)
        assert isinstance(other, LibraryExecutor)
        other._by_library = self._by_library
        return other

    @property
    def choices(self) -> dict[str, str]:
        """As :attr:`.cuda_executor.CudaExecutor.choices`, "torch" where attention runs without its kernels."""
        both = {s.name for s in self.plan.steps if s.kind == "attention"} & self._by_library
        return super().choices | dict.fromkeys(both, "torch")

    def _prefers_cudnn(self, plan: Plan, step: Step) -> bool:
        return step.name in self._by_library or super()._prefers_cudnn(plan, step)

    def _bucketed(self, regions: Sequence[tuple[Rect, ...]] | None) -> None:
        return None

    def _deep_groups(self) -> dict[int, DeepGroup]:
        return {}

    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """One step's launches, everywhere."""
        return super().step_launches(memory, number)

    def _launches(self, memory: Memory, regions: tuple[tuple[Rect, ...], ...] | None, painted: bool) -> list[Launch]:
        launches = super()._launches(memory, regions, painted)
        if PAINT in self._by_library:
            launches[0] = functools.partial(_paint, memory, painted)
        return launches

    def _attend(self, memory: Memory, step: Step) -> None:
        if step.name not in self._by_library:
            super()._attend(memory, step)
            return
        assert step.variant is not None
        weights = self._weights[step.name]
        features = memory.view(step.source).permute(0, 3, 1, 2)
        value = attention_block(features, weights.packed, weights.bias, step.variant)
        for store in step.stores:
            _activate_(memory.view(store.view).permute(0, 3, 1, 2).copy_(value), store.activation)


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


def _unpacked(step: Step, weights: _Weights) -> _Weights:
    if step.kind == "attention" or weights.plain is not None:
        return weights
    return _Weights(weights.packed, weights.bias, unpack(step, weights.packed))


def unpack(step: Step, packed: Tensor) -> Tensor:
    """The weight of a (transposed) convolution, channels last, from what `kernels.conv.Conv.pack` made of it."""
    conv = describe(step)
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
