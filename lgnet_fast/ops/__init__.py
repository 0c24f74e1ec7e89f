"""The fused operators, ``torch.ops.lgnet.*``: schemas, shapes, gradients, autocast, FLOPs and dispatch.

==========================================================  ==============================================
``cosine_attention(features, variant)``                     [B, C, H, W] -> attended features
``attention_block(features, weight, bias, variant)``        attention and the 1x1 combiner
``merge_concat(image, output, mask, tanh=False)``           -> [B, 4, H, W], the next stage's input
``merge(image, output, mask, tanh=False)``                  -> [B, 3, H, W], the merged picture
==========================================================  ==============================================

Each also takes ``backend="auto" | "eager" | "triton" | "cpp"``, and returns the dtype and device of its operands.

Attention is softmax attention over the H*W positions by cosine similarity (paper, eq. (10)), in the formulation
`variant`, "released" or "paper" (docs/model.md). `features` [B, C, H, W], `weight` [C, 2C, 1, 1] and `bias` [C] have
one dtype. The merges compute ``image * (1 - mask) + output * mask``: `image` and `output` are [B, 3, H, W], `mask` is
[B, 1, H, W], 1 = hole; with `tanh`, `output` is taken before its tanh.

Operands are dense, of a real floating dtype of 16 bits or more. In plain PyTorch the merges take several dtypes, and
return the one to which PyTorch promotes them. The fused backends need one dtype for all operands: "triton" float32,
float16 or bfloat16, "cpp" float32, float64 or bfloat16 (the merges float16 too). Errors, which name the argument:
TypeError for another dtype or layout; ValueError for another shape, device, variant or name of a backend;
BackendError where a backend that was asked for by name cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..reference.backends import Functions, provide

# Importing these registers the operators.
from . import attention, merge_concat  # noqa: F401
from .dispatch import calls, reset_calls
from .library import tag_compiled_graphs
from .registry import OPERATORS


@dataclass(frozen=True)
class Bound:
    """An operator with its backend, stored by name because PyTorch's operator objects cannot be pickled.

    While a model is exported (``torch.export``, ``torch.onnx.export``), "auto" is plain PyTorch, because the exported
    program must run without this package.
    """

    operator: str
    backend: str

    def __call__(self, *args: Any) -> Tensor:
        to_onnx = torch.onnx.is_in_onnx_export()
        if self.backend == "auto" and (to_onnx or torch.compiler.is_exporting()):
            return OPERATORS[self.operator].eager(*args)
        if to_onnx:
            raise BackendError(
                f"backend: {self.backend!r} has no ONNX form; call set_backend('auto') or set_backend('eager') first"
            )
        return getattr(torch.ops.lgnet, self.operator)(*args, backend=self.backend)


def functions(backend: str) -> Functions:
    """What ``set_backend`` injects: (cosine_attention, attention_block, merge, merge_concat) of the backend."""
    return (
        Bound("cosine_attention", backend),
        Bound("attention_block", backend),
        Bound("merge", backend),
        Bound("merge_concat", backend),
    )


provide(functions)
tag_compiled_graphs()

__all__ = ["OPERATORS", "Bound", "calls", "functions", "reset_calls"]
