"""`lgnet::cosine_attention` and `lgnet::attention_block`.

Saved for the backward: the row statistics of the softmax [2, B, H*W] and the attended features. The statistics are
maximum and sum, in units of the backend; the log-sum-exp alone would lose the sum where scores are large.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import attention as reference
from .library import register
from .registry import Operator, checked_float, like, unexpected

_BACKENDS = {"triton": "lgnet_fast.kernels.attention", "cpp": "lgnet_fast.ops.cpu.attention"}


def _check_attention(features: Tensor, variant: str) -> None:
    reference.check_variant(variant)
    checked_float("features", features)
    if features.dim() != 4:
        raise unexpected("features", "[B, C, H, W]", list(features.shape))
    if 0 in features.shape[1:]:
        raise unexpected("features", "C, H and W of at least 1", list(features.shape))


def _check_block(features: Tensor, weight: Tensor, bias: Tensor, variant: str) -> None:
    _check_attention(features, variant)
    channels = features.shape[1]
    expected = (channels, 2 * channels, 1, 1)
    if weight.shape != expected:
        raise unexpected("weight", str(list(expected)), list(weight.shape))
    if bias.shape != (channels,):
        raise unexpected("bias", f"[{channels}]", list(bias.shape))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != features.dtype:
            raise TypeError(f"{name}: expected dtype {features.dtype} as features, got {tensor.dtype}")


def _stats(features: Tensor, *others: Any) -> Tensor:
    batch, _, height, width = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty((2, batch, height * width), dtype=dtype)


def _map(features: Tensor, *others: Any) -> Tensor:
    return like(features)


def _attention_flops(shape: torch.Size) -> tuple[int, int]:
    """Forward: scores, weighted sum. Backward: scores again, dP, dQ, dK, dV. Each takes N x N x C per sample."""
    batch, channels, height, width = shape
    product = 2 * batch * (height * width) ** 2 * channels
    return 2 * product, 5 * product


def _block_flops(shape: torch.Size) -> tuple[int, int]:
    batch, channels, height, width = shape
    forward, backward = _attention_flops(shape)
    combiner = 2 * batch * height * width * 2 * channels * channels
    return forward + combiner, backward + 2 * combiner


# -- launchers ---------------------------------------------------------------------------------------------------


def _attention_forward(kernels: ModuleType, features: Tensor, variant: str, save: bool) -> Any:
    return kernels.attention_forward(features, variant, out=like(features))


def _attention_backward(
    kernels: ModuleType,
    grad: Tensor,
    operands: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    options: tuple[Any, ...],
    needs: tuple[bool, ...],
) -> Any:
    return (kernels.attention_backward(grad, *operands, *saved, *options),)


def _block_forward(
    kernels: ModuleType, features: Tensor, weight: Tensor, bias: Tensor, variant: str, save: bool
) -> Any:
    out = like(features)  # in the layout of the fake, which torch.compile relies on
    return kernels.attention_block_forward(features, weight, bias, variant, out=out, save_attended=save)


def _block_backward(
    kernels: ModuleType,
    grad: Tensor,
    operands: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    options: tuple[Any, ...],
    needs: tuple[bool, ...],
) -> Any:
    features, weight, _ = operands
    return kernels.attention_block_backward(grad, features, *saved, weight, *options, needs=needs)


register(
    Operator(
        name="cosine_attention",
        schema='Tensor features, str variant="released"',
        checks=_check_attention,
        eager=reference.cosine_attention,
        backends=_BACKENDS,
        can_run="can_run_attention",
        forward=_attention_forward,
        backward=_attention_backward,
        flops=_attention_flops,
        result=_map,
        saves={"stats": _stats},
        saves_result=True,
        by_channels=True,
        slower="slower_attention",
        example=((1, 128, 64, 64),),
    )
)
register(
    Operator(
        name="attention_block",
        schema='Tensor features, Tensor weight, Tensor bias, str variant="released"',
        checks=_check_block,
        eager=reference.attention_block,
        backends=_BACKENDS,
        can_run="can_run_attention",
        forward=_block_forward,
        backward=_block_backward,
        flops=_block_flops,
        result=_map,
        saves={"attended": _map, "stats": _stats},
        by_channels=True,
        slower="slower_attention",
        example=((1, 128, 64, 64), (128, 256, 1, 1), (128,)),
    )
)
