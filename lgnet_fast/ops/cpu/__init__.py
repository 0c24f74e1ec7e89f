"""Launchers of the C++ kernels, for tensors on the CPU: one file per operator, named as in `kernels/`.

They allocate results and call the extension with addresses, sizes and strides. Registration, autograd, the choice of
a backend and the checks of shapes are in :mod:`lgnet_fast.ops`. A direct call is safe: the extension checks every
size before it accesses memory. Inputs may have any strides and are never modified; results are contiguous, or
channels_last where the first operand is. csrc/attention.cpp and csrc/merge_concat.cpp state the formulas.
"""

from __future__ import annotations

from torch import Tensor

from ... import native


def reason_against(**tensors: Tensor | None) -> str | None:
    """Why the extension cannot take these operands (device, layout, dtype), or None. Absent operands are None."""
    reason = native.unavailable_reason()
    if reason is not None:
        return reason
    dtype = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        reason = native.reason_against(name, tensor)
        if reason is None and tensor.dtype != (dtype := dtype or tensor.dtype):
            reason = f"{name}: expected {dtype}, got {tensor.dtype}"
        if reason is not None:
            return reason
    return None
