"""The fused operators, ``torch.ops.lgnet.*``: schemas, shapes, gradients, autocast, FLOPs and dispatch.

==========================================================  ==============================================
``cosine_attention(features, variant)``                     [B, C, H, W] -> attended features
``attention_block(features, weight, bias, variant)``        attention and the 1x1 combiner
``merge_concat(image, output, mask, tanh=False)``           -> [B, 4, H, W], the next stage's input
``merge(image, output, mask, tanh=False)``                  -> [B, 3, H, W], the merged picture
==========================================================  ==============================================

Each also takes ``backend="auto" | "eager" | "triton" | "cpp"``.
"""

from __future__ import annotations

from functools import partial

import torch

from ..reference.attention import AttentionBlockFn
from ..reference.merge import MergeFn

# Importing the first two registers the operators; the third notices forks from now on, and loads no library yet.
from . import attention, cpp, merge_concat  # noqa: F401
from .dispatch import calls, reset_calls


def functions(backend: str) -> tuple[AttentionBlockFn, MergeFn, MergeFn]:
    """(attention_block, merge, merge_concat) with the backend bound: what ``set_backend`` injects."""
    ops = torch.ops.lgnet
    return (
        partial(ops.attention_block, backend=backend),
        partial(ops.merge, backend=backend),
        partial(ops.merge_concat, backend=backend),
    )


__all__ = ["calls", "functions", "reset_calls"]
