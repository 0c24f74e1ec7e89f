"""The masked l1 loss on the CPU; the arithmetic is in csrc/masked_l1.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import forks
from ...native import library, optional_arg, tensor_arg
from ..registry import like
from . import reason_against

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def can_run_masked_l1(output: Tensor, target: Tensor, weight: Tensor) -> str | None:
    """None where the C++ loss can take these operands' device and dtype, else one sentence saying why not."""
    return reason_against(output=output, target=target, weight=weight)


def masked_l1_forward(output: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and sums [B, 2] of each sample: of ``|(output - target) * weight|``, and of the weight."""
    sums = torch.empty((output.shape[0], 2), dtype=torch.promote_types(output.dtype, torch.float32), device="cpu")
    library().masked_l1_forward(
        tensor_arg(output, "output"),
        tensor_arg(target, "target"),
        tensor_arg(weight, "weight"),
        tensor_arg(sums[None, None], "sums"),
        forks.kernel_threads(),
    )
    return (sums[:, 0] / (output.shape[1] * sums[:, 1] + 1e-12)).mean(), sums


def masked_l1_backward(
    grad: Tensor,
    output: Tensor,
    target: Tensor,
    weight: Tensor,
    sums: Tensor,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    """Gradients of output, target and weight (those in ``needs``) from that of the loss."""
    operands, names = (output, target, weight), ("output", "target", "weight")
    grads = [like(tensor) if need else None for tensor, need in zip(operands, needs, strict=True)]
    library().masked_l1_backward(
        float(grad),
        *(tensor_arg(tensor, name) for tensor, name in zip(operands, names, strict=True)),
        tensor_arg(sums.contiguous()[None, None], "sums"),
        *(optional_arg(tensor, f"grad_{name}") for tensor, name in zip(grads, names, strict=True)),
        forks.kernel_threads(),
    )
    return grads[0], grads[1], grads[2]
