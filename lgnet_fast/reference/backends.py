"""Registry of the fused operators for networks, which do not import them: the reference stays plain PyTorch.

:mod:`lgnet_fast.ops` registers its functions here when it is imported, as ``import lgnet_fast`` does.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import AttentionBlockFn, AttentionFn, attention_block, cosine_attention
from .merge import MergeFn, merge, merge_concat

Functions = tuple[AttentionFn, AttentionBlockFn, MergeFn, MergeFn]
"""(cosine_attention, attention_block, merge, merge_concat)."""

BACKENDS = ("auto", "eager", "triton", "cpp")

_fused: list[Callable[[str], Functions]] = []


def provide(functions: Callable[[str], Functions]) -> None:
    """Register `functions(backend)`, which makes the operators of every backend except "eager"."""
    _fused[:] = [functions]


def functions(backend: str) -> Functions:
    """The operators with `backend` bound; plain PyTorch for "eager".

    Raises:
        ValueError: `backend` is none of BACKENDS.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "eager":
        return cosine_attention, attention_block, merge, merge_concat
    return _fused[0](backend)
