"""Merging a network's output into the known picture, in plain PyTorch (docs/model.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MergeFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def merge(image: Tensor, output: Tensor, mask: Tensor) -> Tensor:
    """``image * (1 - mask) + output * mask``: known pixels from `image`, the hole from `output`.

    Args:
        image, output: [B, 3, H, W] in [-1, 1].
        mask: [B, 1, H, W], 1 = hole.

    Returns:
        [B, 3, H, W].
    """
    return image * (1 - mask) + output * mask


def merge_concat(image: Tensor, output: Tensor, mask: Tensor) -> Tensor:
    """The next stage's input, ``cat(merge(image, output, mask), mask)``: [B, 4, H, W]."""
    return torch.cat((merge(image, output, mask), mask), dim=1)
