"""Merging a network's output into the picture on the CPU; the arithmetic is in csrc/merge_concat.cpp.

Shapes: image and output [B, 3, H, W]; mask [B, 1, H, W], 1 = hole.
"""

from __future__ import annotations

from torch import Tensor

from ... import forks
from ...native import library, optional_arg, tensor_arg
from ..registry import like
from . import reason_against

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def can_run_merge(image: Tensor, output: Tensor, mask: Tensor) -> str | None:
    """None where the C++ merge can take these operands' device and dtype, else one sentence saying why not."""
    return reason_against(image=image, output=output, mask=mask)


def _forward(image: Tensor, output: Tensor, mask: Tensor, concat: bool, tanh: bool, out: Tensor | None) -> Tensor:
    result = like(image, 4 if concat else 3) if out is None else out
    library().merge_forward(
        tensor_arg(image, "image"),
        tensor_arg(output, "output"),
        tensor_arg(mask, "mask"),
        concat,
        tanh,
        tensor_arg(result, "out"),
        forks.kernel_threads(),
    )
    return result


def _backward(
    grad: Tensor, operands: tuple[Tensor, Tensor, Tensor], concat: bool, tanh: bool, needs: tuple[bool, bool, bool]
) -> Gradients:
    names = ("image", "output", "mask")
    grads = [like(tensor) if need else None for tensor, need in zip(operands, needs, strict=True)]
    library().merge_backward(
        tensor_arg(grad, "grad"),
        *(tensor_arg(tensor, name) for tensor, name in zip(operands, names, strict=True)),
        concat,
        tanh,
        *(optional_arg(tensor, f"grad_{name}") for tensor, name in zip(grads, names, strict=True)),
        forks.kernel_threads(),
    )
    return grads[0], grads[1], grads[2]


def merge_concat_forward(
    image: Tensor, output: Tensor, mask: Tensor, *, tanh: bool = False, out: Tensor | None = None
) -> Tensor:
    """``cat(image * (1 - mask) + o * mask, mask)`` [B, 4, H, W], o = output or tanh(output)."""
    return _forward(image, output, mask, True, tanh, out)


def merge_concat_backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    """Gradients of image, output and mask (those in ``needs``) from that of the four channels."""
    return _backward(grad, (image, output, mask), True, tanh, needs)


def merge_forward(
    image: Tensor, output: Tensor, mask: Tensor, *, tanh: bool = False, out: Tensor | None = None
) -> Tensor:
    """``image * (1 - mask) + o * mask`` [B, 3, H, W], o = output or tanh(output)."""
    return _forward(image, output, mask, False, tanh, out)


def merge_backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    """Gradients of image, output and mask (those in ``needs``) from that of the three channels."""
    return _backward(grad, (image, output, mask), False, tanh, needs)
