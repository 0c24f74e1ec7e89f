"""`lgnet::merge` and `lgnet::merge_concat`, optionally fused with the preceding tanh."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import merge as reference
from .library import register
from .registry import Operator, checked_float, like, unexpected, widest


def _check(image: Tensor, output: Tensor, mask: Tensor, tanh: bool) -> None:
    for name, tensor in (("image", image), ("output", output), ("mask", mask)):
        checked_float(name, tensor)
    if image.dim() != 4 or image.shape[1] != 3:
        raise unexpected("image", "[B, 3, H, W]", list(image.shape))
    if output.shape != image.shape:
        raise unexpected("output", f"{list(image.shape)} as image", list(output.shape))
    expected = (image.shape[0], 1, *image.shape[2:])
    if mask.shape != expected:
        raise unexpected("mask", f"{list(expected)} to fit image", list(mask.shape))


def _flops(shape: torch.Size) -> tuple[int, int]:
    return 0, 0  # torch's counter does not count pointwise work either


def _operator(name: str, planes: int) -> Operator:
    """The declaration of a merge whose result has `planes` channels."""
    plain: Callable[..., Tensor] = getattr(reference, name)

    def eager(image: Tensor, output: Tensor, mask: Tensor, tanh: bool = False) -> Tensor:
        return plain(image, torch.tanh(output) if tanh else output, mask)

    def result(image: Tensor, output: Tensor, mask: Tensor, tanh: bool) -> Tensor:
        return like(image, planes)

    def forward(kernels: ModuleType, image: Tensor, output: Tensor, mask: Tensor, tanh: bool, save: bool) -> Any:
        return (getattr(kernels, f"{name}_forward")(image, output, mask, tanh=tanh, out=like(image, planes)),)

    def backward(
        kernels: ModuleType,
        grad: Tensor,
        operands: tuple[Tensor, ...],
        saved: tuple[Tensor, ...],
        options: tuple[Any, ...],
        needs: tuple[bool, ...],
    ) -> Any:
        launch = getattr(kernels, f"{name}_backward")
        return launch(grad, *operands, tanh=options[0], needs=needs)

    return Operator(
        name=name,
        schema="Tensor image, Tensor output, Tensor mask, bool tanh=False",
        checks=_check,
        eager=eager,
        backends={"triton": "lgnet_fast.kernels.merge_concat", "cpp": "lgnet_fast.ops.cpu.merge_concat"},
        can_run="can_run_merge",
        forward=forward,
        backward=backward,
        flops=_flops,
        result=result,
        autocast=widest,
        batched=3,
        example=((1, 3, 256, 256), (1, 3, 256, 256), (1, 1, 256, 256)),
    )


register(_operator("merge_concat", 4))
register(_operator("merge", 3))
