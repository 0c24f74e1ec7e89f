"""Attention and its 1x1 combiner on the CPU; the formulas are in csrc/attention.cpp.

Shapes: features [B, C, H, W]; weight [C, 2C, 1, 1] with input columns (attended, F) for ``variant="released"`` and
(F, attended) for ``"paper"``; bias [C]; stats [2, B, H*W], see :func:`attention_forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import forks
from ...native import isa_name, library, optional_arg, tensor_arg, variant_arg
from ..registry import like
from . import reason_against


def can_run_attention(features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> str | None:
    """None where the C++ attention can take these operands' device and dtype, else one sentence saying why not."""
    reason = reason_against(features=features, weight=weight, bias=bias)
    if reason is None and features.dtype == torch.float16:
        return "features: expected float32, bfloat16 or float64, got float16 (scores overflow its range)"
    return reason


def slower_attention(features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> str | None:
    """Why plain PyTorch computes attention faster than the C++ kernels, in one sentence; None where it does not.

    Without vector instructions the kernels take five to fifteen times as long. It is no measurement, so that all
    processes choose the same.
    """
    if isa_name() == "portable":
        return "the extension has portable kernels only, and PyTorch is faster"
    if features.dtype == torch.float64:
        return "float64 has no vector kernels, and PyTorch is faster"
    return None


def _forward(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    variant: str,
    out: Tensor | None,
    attended: Tensor | None,
) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    batch, _, height, width = features.shape
    stats = torch.empty((2, batch, height * width), dtype=dtype, device="cpu")
    weight = None if weight is None else weight.flatten(1)
    library().attention_forward(
        tensor_arg(features, "features"),
        optional_arg(weight, "weight"),
        optional_arg(bias, "bias"),
        variant_arg(variant),
        optional_arg(out, "out"),
        optional_arg(attended, "attended"),
        tensor_arg(stats, "stats"),
        forks.kernel_threads(),
    )
    return stats


def attention_forward(features: Tensor, variant: str, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attended features [B, C, H, W] in the features' dtype, and stats, the softmax's row statistics.

    Stats are [2, B, H*W], float32 (float64 for float64). With scores S in units of log 2 they are m, between the
    maximum less 8 and the maximum of S (0 in "paper"), and the sum of exp2(S - m).
    """
    attended = like(features) if out is None else out
    return attended, _forward(features, None, None, variant, None, attended)


def attention_backward(
    grad_attended: Tensor, features: Tensor, attended: Tensor, stats: Tensor, variant: str
) -> Tensor:
    """Gradient of the features, from that of ``attended`` and the results of ``attention_forward``."""
    grad = like(features)
    stats = stats.contiguous()  # bound to a name, because the call has the address alone
    library().attention_backward(
        tensor_arg(grad_attended, "grad_attended"),
        tensor_arg(features, "features"),
        tensor_arg(attended, "attended"),
        tensor_arg(stats, "stats"),
        variant_arg(variant),
        tensor_arg(grad, "grad_features"),
        forks.kernel_threads(),
    )
    return grad


def attention_block_forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    variant: str,
    *,
    out: Tensor | None = None,
    save_attended: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Block output [B, C, H, W], the attended features if ``save_attended`` (for the backward), and stats."""
    result = like(features) if out is None else out
    attended = like(features) if save_attended else None
    return result, attended, _forward(features, weight, bias, variant, result, attended)


def attention_block_backward(
    grad_out: Tensor,
    features: Tensor,
    attended: Tensor,
    stats: Tensor,
    weight: Tensor,
    variant: str,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of features, weight and bias (those in ``needs``)."""
    batch, channels, height, width = features.shape
    # The gradients of the 1x1 convolution are plain matrix products, which torch computes fast.
    grad = grad_out.reshape(batch, channels, height * width)
    flat_weight = weight.detach().reshape(channels, 2 * channels)
    weight_a, weight_f = flat_weight.split(channels, dim=1)
    if variant == "paper":
        weight_a, weight_f = weight_f, weight_a
    grad_features = grad_weight = grad_bias = None
    if needs[0]:
        grad_attended = torch.matmul(weight_a.t(), grad).view(features.shape)
        grad_features = attention_backward(grad_attended, features, attended, stats, variant)
        grad_features += torch.matmul(weight_f.t(), grad).view(features.shape)
    if needs[1]:

        def columns(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).reshape(channels, batch * height * width)

        grad_columns = columns(grad_out)
        parts = [grad_columns @ columns(attended).t(), grad_columns @ columns(features).t()]
        if variant == "paper":
            parts.reverse()
        grad_weight = torch.cat(parts, dim=1).view(weight.shape)
    if needs[2]:
        grad_bias = grad.sum(dim=(0, 2))
    return grad_features, grad_weight, grad_bias
