"""Cosine-similarity softmax attention in plain PyTorch: the reference for all fused kernels.

Two formulations exist (paper, eq. (10), and the authors' released network); on features ``F`` of shape
[C, N] with N = H*W positions:

=========  ==========================================  ==========================
           released                                    paper
=========  ==========================================  ==========================
key        (F + 1e-7) / ||F + 1e-7||                   F / max(||F||, 1e-12)
query      3x3 zero-padded box sum of F                the key
value      the key                                     F
combiner   Conv1x1 over cat(attended, F)               Conv1x1 over cat(F, attended)
=========  ==========================================  ==========================

The released network takes the box sum on the N x N score map, over query positions. That is linear in the
query, so it commutes with the dot product and is applied to F here: the block becomes plain attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS = ("released", "paper")

AttentionFn = Callable[[Tensor, str], Tensor]
AttentionBlockFn = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def check_variant(variant: str) -> str:
    """Return `variant` if it names a formulation, else raise ValueError."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    return variant


def query_key_value(features: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of `features`.

    Args:
        features: [B, C, H, W], any real floating dtype.
        variant: "released" or "paper".

    Returns:
        q, k, v, each [B, C, H, W]; k has unit norm over C.
    """
    if check_variant(variant) == "released":
        shifted = features + 1e-7
        key = shifted / torch.linalg.vector_norm(shifted, dim=1, keepdim=True)
        query = F.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=True) * 9.0
        return query, key, key
    key = F.normalize(features, dim=1, eps=1e-12)
    return key, key, features


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 1, H*W, C], the layout of scaled_dot_product_attention.

    Contiguous, because for strided views PyTorch's CPU kernel stores all N x N scores.
    """
    return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


def cosine_attention(features: Tensor, variant: str = "released") -> Tensor:
    """softmax(Q K^T) V over the positions of a feature map, without scale (paper, eq. (10); docs/model.md).

    Args:
        features: [B, C, H, W].
        variant: "released" or "paper".

    Returns:
        attended features, [B, C, H, W], in the dtype of `features`.
    """
    q, k, v = query_key_value(features, variant)
    attended = F.scaled_dot_product_attention(_rows(q), _rows(k), _rows(v), scale=1.0)
    return attended.squeeze(1).transpose(1, 2).reshape(features.shape)


def attention_weights(features: Tensor, variant: str = "released") -> Tensor:
    """The softmax weights, [B, N, N], row = query. For inspection only: N x N numbers per sample."""
    q, k, _ = query_key_value(features, variant)
    return torch.softmax(_rows(q).squeeze(1) @ _rows(k).squeeze(1).transpose(1, 2), dim=-1)


def attention_block(features: Tensor, weight: Tensor, bias: Tensor, variant: str = "released") -> Tensor:
    """Attention and its 1x1 combiner.

    Args:
        features: [B, C, H, W].
        weight: [C, 2C, 1, 1]; input columns are (attended, F) for "released", (F, attended) for "paper".
        bias: [C].
        variant: "released" or "paper".

    Returns:
        [B, C, H, W].
    """
    return F.conv2d(joined(cosine_attention(features, variant), features, variant), weight, bias)


def joined(attended: Tensor, features: Tensor, variant: str) -> Tensor:
    """The combiner's input, [B, 2C, H, W]."""
    return torch.cat((attended, features) if variant == "released" else (features, attended), dim=1)


def computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer's class is `kind`, or one of its sub-classes that compute the same from other weights.

    What was added to the layer itself (hooks, another `forward`) is not looked at: what of that is harmless depends
    on whether its weights are read once or its call is replaced.
    """
    same = isinstance(layer, kind) and type(layer).forward is kind.forward
    if issubclass(kind, nn.Conv2d):
        same = same and getattr(type(layer), "_conv_forward", None) is nn.Conv2d._conv_forward
    return same


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of `layer` computes ``conv2d(x, layer.weight, layer.bias)`` and nothing else."""
    return (
        computes_as(layer, nn.Conv2d)
        and "forward" not in layer.__dict__
        and layer.bias is not None
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        and not layer._backward_pre_hooks
        and not layer._backward_hooks
    )


class AttentionBlock(nn.Module):
    """Attention block of NetG.

    `attend` and `run` are the injected functions: :func:`cosine_attention` and :func:`attention_block`, or fused
    ones. Where the combiner has hooks (pruning, sharding) or is a layer of another class (LoRA, quantised), `attend`
    runs, then the combiner.
    """

    def __init__(self, channels: int, variant: str = "released") -> None:
        super().__init__()
        self.variant = check_variant(variant)
        self.channels = channels
        self.combiner = nn.Conv2d(2 * channels, channels, kernel_size=1)
        self.attend: AttentionFn = cosine_attention
        self.run: AttentionBlockFn = attention_block

    def forward(self, features: Tensor) -> Tensor:
        combiner = self.combiner
        if _is_plain(combiner):
            assert combiner.bias is not None
            return self.run(features, combiner.weight, combiner.bias, self.variant)
        combined: Tensor = combiner(joined(self.attend(features, self.variant), features, self.variant))
        return combined

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}"
