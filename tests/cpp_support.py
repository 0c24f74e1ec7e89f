"""What the tests of the C++ kernels share: gradients by autograd, layouts, inputs of a merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "flipped batch", "expanded"]


def with_grads(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The function's result, and the gradients of its inputs for that of the result."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def views(tensor: Tensor) -> dict[str, Tensor]:
    """`LAYOUTS`: the tensor [B, C, H, W] with other strides, of equal values; expanded, of its first picture."""
    batch, channels, height, width = tensor.shape
    wide = torch.full((batch, channels + 3, height + 2, 2 * width), float("nan"), dtype=tensor.dtype)
    wide[:, 1 : 1 + channels, 1 : 1 + height, ::2] = tensor
    return {
        "contiguous": tensor.contiguous(),
        "channels_last": tensor.contiguous(memory_format=torch.channels_last),
        "sliced": wide[:, 1 : 1 + channels, 1 : 1 + height, ::2],
        "transposed": tensor.transpose(2, 3).contiguous().transpose(2, 3),
        "flipped batch": tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": tensor[:1].expand(tensor.shape),
    }


def merge_inputs(shape: tuple[int, int, int], dtype: torch.dtype, scale: float = 2.0) -> list[Tensor]:
    """An image, an output of the network, and a mask that is partly neither 0 nor 1; shape: batch, height, width."""
    batch, height, width = shape
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(batch, 3, height, width, generator=rng) * 2 - 1
    output = torch.randn(batch, 3, height, width, generator=rng) * scale
    mask = (torch.rand(batch, 1, height, width, generator=rng) > 0.5).float()
    mask = torch.where(torch.rand(mask.shape, generator=rng) > 0.8, torch.rand(mask.shape, generator=rng), mask)
    return [t.to(dtype) for t in (image, output, mask)]
