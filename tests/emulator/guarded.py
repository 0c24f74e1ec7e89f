"""Tensors between two pages that no one may touch, so that an access outside of them ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A contiguous copy that ends (`at_end`), or begins, at a forbidden page. Its memory is never freed."""
    size = tensor.numel() * tensor.element_size()
    inner = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + mmap.PAGESIZE + inner):
        if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE + (inner - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)
