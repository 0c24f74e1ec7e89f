"""The accuracy rule of the kernel tests, and the eager results that it compares with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lgnet_fast.kernels.launch import is_interpreted
from torch import Tensor

from lgnet_fast.reference.attention import attention_block, cosine_attention
from lgnet_fast.reference.merge import merge, merge_concat

VARIANTS = ("released", "paper")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    """The same normal numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def assert_accurate(name: str, actual: Tensor, exact: Tensor, eager: Tensor, terms: float = 0.0) -> None:
    """Error against float64 at most twice that of eager PyTorch in the same dtype, plus the dtype's eps.

    Where the exact value overflows the dtype nothing is compared; where only eager does, eight roundings are allowed.
    `terms`: size of the terms whose roundings count, where they cancel to something much smaller.
    """
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, eager {eager.dtype}"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)}, exact {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    info = torch.finfo(actual.dtype)
    factor, eps = 2.0, info.eps
    if actual.dtype == torch.float32:
        # eager sums in another order, sometimes luckily: a few roundings of slack
        eps *= 4
    if actual.dtype == torch.bfloat16 and is_interpreted():
        # the interpreter truncates to bfloat16 instead of rounding
        factor, eps = 4.0, 2 * eps
    representable = exact.abs() < info.max / 4
    error = torch.where(representable, (actual.double() - exact).abs(), 0.0).max().item()
    scale = max(terms, torch.where(representable, exact.abs(), 0.0).max().item())
    comparable = representable & eager.isfinite()
    eager_error = torch.where(comparable, (eager.double() - exact).abs(), 0.0).max().item()
    if not torch.equal(comparable, representable):
        eps *= 8
    bound = factor * eager_error + eps * scale + 1e-30
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (eager {eager_error:.3e}, scale {scale:.3e})"


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
