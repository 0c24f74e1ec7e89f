"""The buffers of a plan on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arena import plan_arena
from ..plan import Plan, View

if TYPE_CHECKING:
    from lgnet_fast.kernels.deep import DeepGroup
    from lgnet_fast.kernels.deep_exchange import State


class Memory:
    """The buffers of one shape: feature maps, input pictures, output pictures.

    They are created outside inference mode, because an inference tensor could not be written to later. Outgrown
    workspaces are kept, because another stream may still use them.
    """

    @torch.inference_mode(False)
    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        arena = plan_arena(plan)
        self.arena = torch.empty(arena.size, dtype=dtype, device=device)
        self.maps: dict[str, Tensor] = {}
        for name, b in plan.buffers.items():
            shape = (plan.batch, b.height, b.width, b.channels)
            begin = arena.offsets[name]
            count = plan.batch * b.height * b.width * b.channels
            self.maps[name] = self.arena[begin : begin + count].view(shape)
        size = (plan.batch, 3, plan.height, plan.width)
        stages = sum(step.merges for step in plan.steps)
        single: Any = {"dtype": torch.float32, "device": device}  # independent of the caller's defaults
        self.image = torch.zeros(size, **single)
        self.mask = torch.zeros(size[0], 1, *size[2:], **single)
        self.start = torch.zeros(size, **single)
        self.outputs = torch.empty(1 + stages, *size, **single)
        """The merged picture, then the raw picture of every stage."""
        self._partial = torch.empty(0, **single)
        self._outgrown: list[Tensor] = []
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)
        self.states: dict[DeepGroup, State] = {}
        """Of the groups whose launches use these buffers, one after another."""

    def take(self, image: Tensor, mask: Tensor, start: Tensor | None) -> None:
        """Copy the arguments of a call into the buffers."""
        self.image.copy_(image)
        self.mask.copy_(mask)
        if start is not None:
            self.start.copy_(start)

    def view(self, view: View) -> Tensor:
        """A view of a buffer as a tensor [B, H, W, C]."""
        return self.maps[view.buffer][..., view.offset : view.offset + view.channels]

    @torch.inference_mode(False)
    def partial(self, elements: int) -> Tensor:
        """A float32 workspace; references to earlier, smaller ones stay valid."""
        if self._partial.numel() < elements:
            grown = self._partial.new_empty(elements)
            self._outgrown.append(self._partial)
            self._partial = grown
        return self._partial

    def counters(self, blocks: int) -> Tensor:
        """int32 zeros, which kernels reset to zeros; references to earlier ones stay valid."""
        if self._counters.numel() < blocks:
            grown = torch.zeros(blocks, dtype=torch.int32, device=self._counters.device)
            self._outgrown.append(self._counters)
            self._counters = grown
        return self._counters

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        own = (self.arena, self.image, self.mask, self.start, self.outputs, self._partial, self._counters)
        states = sum(state.bytes for state in self.states.values())
        return states + sum(tensor.nbytes for tensor in (*own, *self._outgrown))


def least_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of :class:`Memory` before any workspace is added."""
    pictures = 3 + 1 + 3 + 3 * (1 + sum(step.merges for step in plan.steps))
    return plan_arena(plan).size * dtype.itemsize + 4 * pictures * plan.batch * plan.height * plan.width
