"""Memory that a device has left, and exceptions that say that it has none."""

from __future__ import annotations

import torch

from .. import limits


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, None where the system does not report them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return limits.memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of PyTorch, NumPy or the C++ extension says that memory could not be allocated."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # PyTorch's allocator for the CPU has no exception type of its own.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("allocate memory", "not enough memory")
    )
