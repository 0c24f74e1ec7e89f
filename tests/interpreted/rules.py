"""Inputs of the kernel tests, and the results of eager PyTorch for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgnet_fast.reference.attention import attention_block, cosine_attention
from lgnet_fast.reference.merge import merge, merge_concat

VARIANTS = ("released", "paper")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    """The same normal numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def _with_gradients(function, tensors: Sequence[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def attention_results(features: Tensor, variant: str, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Eager attended and dF."""
    return _with_gradients(lambda f: cosine_attention(f, variant), [features], grad, dtype)


def block_results(
    features: Tensor, weight: Tensor, bias: Tensor, variant: str, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Eager out, dF, dweight, dbias."""
    return _with_gradients(lambda f, w, b: attention_block(f, w, b, variant), [features, weight, bias], grad, dtype)


def merge_results(
    image: Tensor, output: Tensor, mask: Tensor, grad: Tensor, dtype: torch.dtype, *, concat: bool, tanh: bool
) -> list[Tensor]:
    """Eager merge, d_image, d_output, d_mask."""
    function = merge_concat if concat else merge
    return _with_gradients(
        lambda i, o, m: function(i, torch.tanh(o) if tanh else o, m), [image, output, mask], grad, dtype
    )
