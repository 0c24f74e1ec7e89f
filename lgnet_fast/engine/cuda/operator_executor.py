"""Running a plan on an NVIDIA GPU by PyTorch's operators (cuDNN) alone, in one CUDA graph: for GPUs without Triton.

That is Windows, a PyTorch whose Triton is too old, and GPUs before compute capability 8.0. Other than in the model
itself, BatchNorms are part of the convolutions, activations write where the next step reads, and the host launches
one graph instead of some 200 kernels. It always runs densely.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.torch_state import cudnn_tf32_allowed, tf32_allowed
from ..plan import AttentionStep, Plan, Step
from ..regions import Rect
from .graph_executor import GraphExecutor, GraphOptions
from .graphs import event_of
from .launches import Launch, attend_by_operators, convolve, paint_by_operators
from .memory import Memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OperatorWeights:
    """A network's weights on a device.

    Attributes:
        dtype, device: of the weights.
        steps: step's name -> (weight in channels last, bias).
        packed: event after the conversion on the device; None where it is known to be done.
    """

    dtype: torch.dtype
    device: torch.device
    steps: Mapping[str, tuple[Tensor, Tensor]]
    packed: torch.cuda.Event | None

    @classmethod
    def of(cls, plan: Plan, dtype: torch.dtype, device: torch.device) -> OperatorWeights:
        """Copies of a plan's weights."""

        def moved(step: Step) -> tuple[Tensor, Tensor]:
            weight = step.weight.detach().to(device, dtype, copy=True, memory_format=torch.channels_last)
            return weight, step.bias.detach().to(device, dtype, copy=True)

        with torch.inference_mode(False):
            own = {step.name: moved(step) for step in plan.steps if step.weights_of == step.name}
        steps = {step.name: own[step.weights_of] for step in plan.steps}
        return cls(dtype, device, steps, event_of(device))

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum({t.data_ptr(): t.nbytes for pair in self.steps.values() for t in pair}.values())


class OperatorExecutor(GraphExecutor):
    """A :class:`.graph_executor.GraphExecutor` by PyTorch's operators."""

    restricts = False
    weights: OperatorWeights

    @classmethod
    def of(
        cls, plan: Plan, dtype: torch.dtype = torch.float16, *, device: torch.device, graphs: bool = True
    ) -> OperatorExecutor:
        """The executor of a plan with weights.

        Args:
            plan: dense, with weights; only its shapes are kept.
            dtype: float32 (TF32 only where PyTorch's switch of matrix products allows it), float16 or bfloat16.
            device: where to run.
            graphs: see :class:`.graph_executor.GraphOptions`.
        """
        return cls(plan, OperatorWeights.of(plan, dtype, device), GraphOptions(graphs=graphs))

    @staticmethod
    def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this executor cannot run on `device` in `dtype`, in one sentence; None where it can."""
        if device.type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, not {device}"
        if torch.version.hip is not None:
            return "ROCm (the engine is written for NVIDIA GPUs)"
        return None if dtype in DTYPES else f"dtype {dtype} (float32, float16 and bfloat16 are supported)"

    @property
    def choices(self) -> dict[str, str]:
        """Step's name -> "cudnn" or "torch" (attention)."""
        return {step.name: "torch" if isinstance(step, AttentionStep) else "cudnn" for step in self.plan.steps}

    def _precision(self) -> tuple[bool, bool]:
        products = tf32_allowed()
        return products, products and cudnn_tf32_allowed()

    def _paint(self, memory: Memory, painted: bool) -> Launch:
        return functools.partial(paint_by_operators, memory, painted)

    def step_launches(self, memory: Memory, number: int, rects: tuple[Rect, ...] | None = None) -> list[Launch]:
        """The launch of one step, always dense."""
        step = self.plan.steps[number]
        weight, bias = self.weights.steps[step.name]
        if isinstance(step, AttentionStep):
            return [functools.partial(attend_by_operators, memory, step, weight, bias)]
        return [functools.partial(convolve, memory, step, weight, bias, self._merge_of(memory, number))]
