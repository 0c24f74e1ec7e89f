"""`lgnet::cosine_attention` and `lgnet::attention_block`.

The public operators pick a backend. Eager runs :mod:`lgnet_fast.reference.attention`, which autograd
differentiates. Fused backends go through an inner operator that also returns what its backward needs: the softmax's
row statistics [2, B, H*W] (maximum and sum, in the backend's own units: one number, their log-sum-exp, would lose the
sum where scores are large), and the attended features where a gradient will be asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forks
from ..reference import attention as reference
from .dispatch import launchers, record, run
from .registry import (
    LIBRARY,
    check,
    checked_float,
    composite,
    define,
    differentiable,
    flop_formula,
    implement,
    no_double_backward,
    vectorized,
)

_COSINE = define('cosine_attention(Tensor features, str variant="released", *, str backend="auto") -> Tensor')
_BLOCK = define(
    "attention_block(Tensor features, Tensor weight, Tensor bias, "
    'str variant="released", *, str backend="auto") -> Tensor'
)
_COSINE_FWD = define("_cosine_attention(Tensor features, str variant, str backend) -> (Tensor, Tensor)")
_COSINE_BWD = define(
    "_cosine_attention_backward(Tensor grad, Tensor features, Tensor attended, Tensor stats, "
    "str variant, str backend) -> Tensor"
)
_BLOCK_FWD = define(
    "_attention_block(Tensor features, Tensor weight, Tensor bias, str variant, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
_BLOCK_BWD = define(
    "_attention_block_backward(Tensor grad, Tensor features, Tensor attended, Tensor stats, Tensor weight, "
    "str variant, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)


def _check_features(features: Tensor, variant: str) -> None:
    forks.prepare()
    reference.check_variant(variant)
    checked_float("features", features)
    check(features.dim() == 4, "features", "[B, C, H, W]", list(features.shape))
    check(0 not in features.shape[1:], "features", "C, H and W of at least 1", list(features.shape))


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# -- public operators: pick a backend --------------------------------------------------------------------------


def _cosine_attention(features: Tensor, variant: str = "released", *, backend: str = "auto") -> Tensor:
    _check_features(features, variant)

    def fused(backend: str, features: Tensor) -> Tensor:
        return torch.ops.lgnet._cosine_attention(features, variant, backend)[0]

    def eager(features: Tensor) -> Tensor:
        return reference.cosine_attention(features, variant)

    return run("cosine_attention", backend, (features,), variant, fused, eager)


def _attention_block(
    features: Tensor, weight: Tensor, bias: Tensor, variant: str = "released", *, backend: str = "auto"
) -> Tensor:
    _check_features(features, variant)
    channels = features.shape[1]
    check(list(weight.shape) == [channels, 2 * channels, 1, 1], "weight", f"[{channels}, {2 * channels}, 1, 1]",
          list(weight.shape))  # fmt: skip
    check(list(bias.shape) == [channels], "bias", f"[{channels}]", list(bias.shape))

    def fused(backend: str, *tensors: Tensor) -> Tensor:
        return torch.ops.lgnet._attention_block(*tensors, variant, _wants_grad(*tensors), backend)[0]

    def eager(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.attention_block(features, weight, bias, variant)

    return run("attention_block", backend, (features, weight, bias), variant, fused, eager)


def _cast_cosine(device: str, features: Tensor, *rest: Any) -> tuple[Any, ...]:
    return (_lower(features, device), *rest)


def _cast_block(device: str, features: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Any, ...]:
    return (_lower(features, device), _lower(weight, device), _lower(bias, device), *rest)


def _lower(tensor: Tensor, device: str) -> Tensor:
    """Autocast's rule for matrix products; float64 stays, as it does there."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor


composite(_COSINE, _cosine_attention, _cast_cosine)
composite(_BLOCK, _attention_block, _cast_block)


# -- inner operators: fused kernels, fakes, gradients -----------------------------------------------------------


def _cosine_fwd(features: Tensor, variant: str, backend: str) -> tuple[Tensor, Tensor]:
    record("cosine_attention", backend)
    return launchers("cosine_attention", backend).attention_forward(features, variant)


def _cosine_bwd(
    grad: Tensor, features: Tensor, attended: Tensor, stats: Tensor, variant: str, backend: str
) -> Tensor:
    record("cosine_attention_backward", backend)
    return launchers("cosine_attention", backend).attention_backward(grad, features, attended, stats, variant)


def _block_fwd(
    features: Tensor, weight: Tensor, bias: Tensor, variant: str, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    record("attention_block", backend)
    out, attended, stats = launchers("attention_block", backend).attention_block_forward(
        features, weight, bias, variant, save_attended=save
    )
    if not save:
        return out, features.new_empty(0), features.new_empty(0)
    return out, attended, stats


def _block_bwd(
    grad: Tensor,
    features: Tensor,
    attended: Tensor,
    stats: Tensor,
    weight: Tensor,
    variant: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    record("attention_block_backward", backend)
    grads = launchers("attention_block", backend).attention_block_backward(
        grad, features, attended, stats, weight, variant, needs=tuple(needs)
    )
    # An operator's schema has no optional results: an empty tensor stands for a gradient nobody asked for.
    a, b, c = (features.new_empty(0) if g is None else g for g in grads)
    return a, b, c


implement(_COSINE_FWD, _cosine_fwd)
implement(_COSINE_BWD, _cosine_bwd)
implement(_BLOCK_FWD, _block_fwd)
implement(_BLOCK_BWD, _block_bwd)


def _like(features: Tensor) -> Tensor:
    """What the launchers allocate for a map of the shape of `features`."""
    channels_last = features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(features, memory_format=memory_format)


def _fake_stats(features: Tensor) -> Tensor:
    batch, _, height, width = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty((2, batch, height * width), dtype=dtype)


@torch.library.register_fake(_COSINE_FWD, lib=LIBRARY)
def _(features: Tensor, variant: str, backend: str) -> tuple[Tensor, Tensor]:
    return _like(features), _fake_stats(features)


@torch.library.register_fake(_COSINE_BWD, lib=LIBRARY)
def _(grad: Tensor, features: Tensor, attended: Tensor, stats: Tensor, variant: str, backend: str) -> Tensor:
    return _like(features)


@torch.library.register_fake(_BLOCK_FWD, lib=LIBRARY)
def _(
    features: Tensor, weight: Tensor, bias: Tensor, variant: str, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if not save:
        return _like(features), features.new_empty(0), features.new_empty(0)
    return _like(features), _like(features), _fake_stats(features)


@torch.library.register_fake(_BLOCK_BWD, lib=LIBRARY)
def _(
    grad: Tensor,
    features: Tensor,
    attended: Tensor,
    stats: Tensor,
    weight: Tensor,
    variant: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    empty = features.new_empty(0)
    channels = features.shape[1]
    return (
        _like(features) if needs[0] else empty,
        features.new_empty((channels, 2 * channels, 1, 1)) if needs[1] else empty,
        features.new_empty(channels) if needs[2] else empty,
    )


def _cosine_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, ctx.variant, ctx.backend = inputs
    ctx.save_for_backward(features, *output)


def _cosine_grad(ctx: Any, grad: Tensor, grad_stats: Tensor) -> tuple[Tensor, None, None]:
    features, attended, stats = ctx.saved_tensors
    out = torch.ops.lgnet._cosine_attention_backward(grad, features, attended, stats, ctx.variant, ctx.backend)
    return out, None, None


def _block_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, weight, _, ctx.variant, _, ctx.backend = inputs
    ctx.save_for_backward(features, weight, *output[1:])


def _block_grad(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    features, weight, attended, stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.lgnet._attention_block_backward(
        grad, features, attended, stats, weight, ctx.variant, needs, ctx.backend
    )
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


differentiable(_COSINE_FWD, _cosine_grad, _cosine_setup)
differentiable(_BLOCK_FWD, _block_grad, _block_setup)
no_double_backward(_COSINE_BWD)
no_double_backward(_BLOCK_BWD)
vectorized(_COSINE, 1)
vectorized(_BLOCK, 1)
for _name in (_COSINE_FWD, _BLOCK_FWD, _COSINE_BWD, _BLOCK_BWD):
    vectorized(_name, 1, apart=True)  # the statistics are [2, B, H*W]


# -- FLOPs (two a multiply-accumulate) ---------------------------------------------------------------------------


def _attention_flops(shape: torch.Size, products: int) -> int:
    """`products` matrix products of N x N x C a sample."""
    batch, channels, height, width = shape
    return products * 2 * batch * (height * width) ** 2 * channels


def _combiner_flops(shape: torch.Size) -> int:
    batch, channels, height, width = shape
    return 2 * batch * height * width * 2 * channels * channels


@flop_formula(torch.ops.lgnet._cosine_attention)
def _(features_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _attention_flops(features_shape, 2)  # scores, weighted sum


@flop_formula(torch.ops.lgnet._cosine_attention_backward)
def _(grad_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _attention_flops(grad_shape, 5)  # scores again, dP, dQ, dK, dV


@flop_formula(torch.ops.lgnet._attention_block)
def _(features_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _attention_flops(features_shape, 2) + _combiner_flops(features_shape)


@flop_formula(torch.ops.lgnet._attention_block_backward)
def _(grad_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _attention_flops(grad_shape, 5) + 2 * _combiner_flops(grad_shape)
