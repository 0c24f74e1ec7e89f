"""Other ways to compute the attention block: the contestants of bench_attention.py.

Every form takes (features [B, C, H, W], weight [C, 2C, 1, 1], bias [C]) and returns [B, C, H, W]; released variant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lgnet_fast.reference.attention import attention_block, query_key_value

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def score_map(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The released network's form: the box sum runs over the N x N score map."""
    batch, _, height, width = features.shape
    n = height * width
    _, key, _ = query_key_value(features, "released")
    k = key.flatten(2)
    scores = torch.bmm(k.transpose(1, 2), features.flatten(2))  # [B, keys, queries]
    box = F.avg_pool2d(scores.view(batch, n, height, width), 3, 1, 1, count_include_pad=True) * 9
    attended = torch.bmm(k, box.view(batch, n, n).softmax(dim=1)).view_as(features)
    return F.conv2d(torch.cat((attended, features), dim=1), weight, bias)


def matmul(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Box sum on the features, then plain matrix products with a stored score matrix."""
    query, key, _ = query_key_value(features, "released")
    k = key.flatten(2)
    weights = torch.bmm(query.flatten(2).transpose(1, 2), k).softmax(dim=-1)
    attended = torch.bmm(k, weights.transpose(1, 2)).view_as(features)
    return F.conv2d(torch.cat((attended, features), dim=1), weight, bias)


def sdpa(backend: SDPBackend) -> Form:
    """The reference's form on one of PyTorch's scaled_dot_product_attention kernels."""

    def run(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention_block(features, weight, bias, "released")

    return run


def flex() -> Form:
    """FlexAttention, compiled, with the block's scale of one."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)

    def rows(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()

    def run(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (rows(x) for x in query_key_value(features, "released"))
        attended = compiled(q, k, v, scale=1.0).squeeze(1).transpose(1, 2).reshape(features.shape)
        return F.conv2d(torch.cat((attended, features), dim=1), weight, bias)

    return run


def forms() -> dict[str, Form]:
    """Every contestant by name; some cannot run on every device, dtype or head size."""
    return {
        "score_map": score_map,
        "matmul": matmul,
        **{f"sdpa_{b.name.removesuffix('_ATTENTION').lower()}": sdpa(b) for b in SDPA_BACKENDS},
        "flex": flex(),
        "compiled": torch.compile(attention_block, mode="max-autotune-no-cudagraphs"),
    }


SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
