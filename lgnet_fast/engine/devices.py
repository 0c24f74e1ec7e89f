"""Device and dtype by name, and the memory that a device has left.

An explicit choice that cannot run raises with the reason; only "auto" falls back.
"""

from __future__ import annotations

import contextlib

import torch

from .. import limits
from ..errors import BackendError

_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" (CUDA if there is a GPU, else CPU), "cpu", "cuda", "cuda:1", "mps", ... as a torch.device.

    Raises BackendError for a name torch does not know and for a device that is not there.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as cause:
        raise BackendError(f"device: expected 'auto', 'cpu', 'cuda', 'cuda:0' or the like, got {device!r}") from cause
    if resolved.type == "cpu":
        return torch.device("cpu")  # what tensors on "cpu:1" report
    if resolved.type == "meta":
        raise BackendError("device: expected one that computes, got 'meta'")
    if resolved.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise BackendError(f"device: {device} is not available: this PyTorch was built without CUDA")
        if not torch.cuda.is_available():
            raise BackendError(f"device: {device} is not available: no GPU or no driver was found")
        count = torch.cuda.device_count()
        if resolved.index is not None and resolved.index >= count:
            raise BackendError(f"device: {device} is not available: there are {count} CUDA devices, counted from 0")
        return torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)
    try:
        torch.zeros(1, device=resolved).add(1)
    except Exception as cause:  # every device type raises a different exception
        reason = str(cause).splitlines()[0].partition(". ")[0]  # PyTorch goes on with a list of all backends
        raise BackendError(f"device: {device} is not available: {reason}") from cause
    return resolved


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two devices are the same; "mps" and "xpu" equal "mps:0" and "xpu:0", which their tensors report."""
    return a.type == b.type and (a.index or 0) == (b.index or 0)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, None where the system does not report them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return limits.memory()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Disables the caller's autocast, which would replace an engine's dtype, also in the graphs that it keeps."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" (float16 on CUDA, float32 elsewhere), a torch.dtype or its name, as a floating torch.dtype.

    Raises BackendError for anything else.
    """
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, _ALIASES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise BackendError(f"dtype: expected 'auto', float16, bfloat16, float32 or float64, got {dtype!r}")
    if resolved == torch.float64 and device.type == "mps":
        raise BackendError("dtype: expected 'auto', float16, bfloat16 or float32 on MPS, which has no float64")
    return resolved
