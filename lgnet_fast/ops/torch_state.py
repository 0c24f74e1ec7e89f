"""What PyTorch is doing on a GPU: capturing a graph, out of memory, products in TF32; what it is slow at on a CPU."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .. import forks

_switches_lock = forks.Lock()
_strict = threading.local()
"""`here`: whether this thread computes in full precision already."""


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of PyTorch, NumPy, a driver or the C++ extension says that memory could not be allocated.

    Only PyTorch's allocator for GPUs and Python itself have a type for it. On a full GPU, loading a kernel already
    fails, with "Triton Error [CUDA]: out of memory".
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = "out of memory|ALLOC(ATION)?_FAILED|allocate memory|not enough memory"
    return isinstance(error, Exception) and re.search(said, str(error)) is not None


def pass_on_out_of_memory(error: Exception) -> None:
    """Raise `error`, or torch.OutOfMemoryError from it, where it says that memory could not be allocated.

    That is no fault of a kernel.
    """
    try:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise error
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(one_line(error)) from error
    finally:
        # The exception's traceback refers to this frame. A reference back would keep the tensors of all its frames
        # until a garbage collection.
        del error


def has_fast_bfloat16() -> bool:
    """Whether PyTorch has convolutions in bfloat16 for this CPU that are not many times slower than those in float32.

    On AMD Zen 3 they take 135 times as long. oneDNN knows; PyTorch has no public name for this question.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def one_line(error: BaseException) -> str:
    """An exception's type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """Float32 products and convolutions on a GPU in full precision, not in TF32.

    The switches are the process's, so threads take turns: else one would restore what another had set.
    """
    if getattr(_strict, "here", False):
        yield
        return
    backends: Any = torch.backends
    strict: bool | str = False
    name = "allow_tf32"
    switches: tuple[Any, ...] = (backends.cuda.matmul, backends.cudnn)
    newer: tuple[Any, ...] = ()
    if hasattr(backends.cudnn, "conv"):  # from PyTorch 2.9 on
        newer = (backends.cuda.matmul, backends.cudnn.conv)
    with _switches_lock:
        precisions = [place.fp32_precision for place in newer]
        try:
            before: list[Any] = [getattr(switch, name) for switch in switches]
        except RuntimeError:  # raised where a program has also used the newer switches of TF32
            name, strict, switches, before = "fp32_precision", "ieee", newer, precisions
        try:
            for switch in switches:
                setattr(switch, name, strict)
            _strict.here = True
            yield
        finally:
            _strict.here = False
            for switch, value in zip(switches, before):
                setattr(switch, name, value)
            # allow_tf32 leaves "ieee" where "none" was, which follows torch.backends.fp32_precision.
            for place, precision in zip(newer, precisions):
                place.fp32_precision = precision


def tf32_allowed() -> bool:
    """Whether float32 matrix products may be computed in TF32."""
    products: Any = torch.backends.cuda.matmul
    return _is_tf32(products, products)


def cudnn_tf32_allowed() -> bool:
    """Whether float32 convolutions of cuDNN may be computed in TF32."""
    cudnn: Any = torch.backends.cudnn
    return _is_tf32(cudnn, getattr(cudnn, "conv", None))  # PyTorch before 2.9 has the older switch alone


def _is_tf32(backend: Any, place: Any) -> bool:
    """Whether a switch allows TF32; PyTorch refuses to read the older one where the one of `place` was set."""
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:
        return place.fp32_precision == "tf32"


def engine_float32(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """The context of an engine's calls of PyTorch's operators on a GPU: float32 is TF32 only where products may be.

    PyTorch's own convolutions are in TF32 by default.
    """
    if device.type != "cuda" or dtype != torch.float32 or tf32_allowed():
        return contextlib.nullcontext()
    return strict_float32()
