"""Steps of contextual attention (Yu et al., "Generative Image Inpainting with Contextual Attention", CVPR 2018) that
PEN and GConv share.

The patches of a feature map are the kernels of two operations. A convolution of the map with them scores every
position against every patch. After a softmax, a transposed convolution with them pastes the patches. Pictures are
computed one by one, because each has other kernels. L = H*W positions, row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTMAX_SCALE = 10
"""Factor of the scores, which are cosines times the norm of the position's patch."""
_SMALLEST_NORM = 1e-4


def patches(x: Tensor, size: int, stride: int = 1) -> Tensor:
    """[1, C, H, W] -> zero-padded patches around every stride-th position, [H*W / stride**2, C, size, size]."""
    columns = F.unfold(x, size, padding=(size - stride) // 2, stride=stride)
    return columns[0].t().reshape(-1, x.shape[1], size, size)


def scores(x: Tensor, size: int) -> Tensor:
    """[1, C, H, W] -> [1, L, H, W]: products of every position's patch with all L patches, scaled to norm 1."""
    kernels = patches(x, size)
    norms = torch.linalg.vector_norm(kernels, dim=(1, 2, 3), keepdim=True)
    return F.conv2d(x, kernels / norms.clamp_min(_SMALLEST_NORM), padding=size // 2)


def known_patches(mask: Tensor, size: int) -> Tensor:
    """Mask [1, 1, H, W], 1 = hole -> [1, L, 1, 1]: 1 where the zero-padded patch has no hole pixel, else 0."""
    share = F.avg_pool2d(mask, size, stride=1, padding=size // 2)
    return (share == 0).to(mask.dtype).reshape(1, -1, 1, 1)


def attention_weights(scores: Tensor, known: Tensor) -> Tensor:
    """[1, L, H, W] and [1, L, 1, 1] -> softmax over the L patches of each position, 0 for patches with hole pixels.

    Such a patch counts in the denominator with score 0, as in the originals.
    """
    return torch.softmax(SOFTMAX_SCALE * (scores * known), dim=1) * known


def paste(weights: Tensor, source: Tensor) -> Tensor:
    """Weights [1, L, H, W] of the 4x4 patches of `source` [1, C, 2H, 2W] -> their weighted sum, shape of `source`."""
    return F.conv_transpose2d(weights, patches(source, 4, stride=2), stride=2, padding=1) / 4
