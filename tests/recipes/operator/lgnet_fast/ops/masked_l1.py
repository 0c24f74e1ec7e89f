"""`lgnet::masked_l1`: the training's valid and hole term (:func:`lgnet_fast.reference.losses.masked_l1`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .library import register
from .registry import Operator, checked_float, unexpected, widest


def _check(output: Tensor, target: Tensor, weight: Tensor) -> None:
    for name, tensor in (("output", output), ("target", target), ("weight", weight)):
        checked_float(name, tensor)
    if output.dim() != 4 or output.numel() == 0:
        raise unexpected("output", "[B, C, H, W], not empty", list(output.shape))
    if target.shape != output.shape:
        raise unexpected("target", f"{list(output.shape)} as output", list(target.shape))
    expected = (output.shape[0], 1, *output.shape[2:])
    if weight.shape != expected:
        raise unexpected("weight", f"{list(expected)} to fit output", list(weight.shape))


def _eager(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    from ..reference.losses import masked_l1  # not at the top: it imports networks, which not every user needs

    return masked_l1(output, target, weight)


def _wide(output: Tensor) -> torch.dtype:
    return torch.promote_types(output.dtype, torch.float32)


def _result(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return output.new_empty((), dtype=_wide(output))


def _sums(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return output.new_empty((output.shape[0], 2), dtype=_wide(output))


def _forward(kernels: ModuleType, output: Tensor, target: Tensor, weight: Tensor, save: bool) -> Any:
    return kernels.masked_l1_forward(output, target, weight)


def _backward(
    kernels: ModuleType,
    grad: Tensor,
    operands: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    options: tuple[Any, ...],
    needs: tuple[bool, ...],
) -> Any:
    return kernels.masked_l1_backward(grad, *operands, *saved, needs=needs)


def _flops(shape: torch.Size) -> tuple[int, int]:
    return 0, 0  # like torch's own counter, which counts no pointwise work


register(
    Operator(
        name="masked_l1",
        schema="Tensor output, Tensor target, Tensor weight",
        checks=_check,
        eager=_eager,
        backends={"triton": "lgnet_fast.kernels.masked_l1", "cpp": "lgnet_fast.ops.cpu.masked_l1"},
        can_run="can_run_masked_l1",
        forward=_forward,
        backward=_backward,
        flops=_flops,
        result=_result,
        saves={"sums": _sums},
        autocast=widest,
        batched=0,
        example=((1, 3, 256, 256), (1, 3, 256, 256), (1, 1, 256, 256)),
    )
)
