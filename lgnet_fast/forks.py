"""After ``fork()``: PyTorch's threads stay in the parent, and a child that counts on them waits forever.

A child that uses this package runs PyTorch on one thread (as PyTorch's own DataLoader workers do) and the C++ kernels
on as many as before: they start threads of their own there.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import weakref
from types import TracebackType

import torch

logger = logging.getLogger("lgnet_fast")


def _started_by_fork() -> bool:
    """Whether `multiprocessing` forked this process, perhaps before this module was there to notice."""
    if multiprocessing.parent_process() is None:
        return False
    own = getattr(multiprocessing.current_process(), "_start_method", None)
    return (own or multiprocessing.get_start_method(allow_none=True)) == "fork"


_forked = _started_by_fork()
_kernel_threads: int | None = None


def forked() -> bool:
    """Whether this process is a fork of one that may have used PyTorch's threads."""
    return _forked


def prepare() -> None:
    """Begin of every public call that runs PyTorch: in a forked child, has it run on one thread from now on."""
    global _kernel_threads
    if _forked and torch.get_num_threads() > 1:
        _kernel_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        logger.warning(
            "this process is a fork, PyTorch's threads are in its parent: PyTorch runs on 1 thread here, "
            "the C++ kernels on %d; start workers by spawn to have all threads",
            _kernel_threads,
        )


def kernel_threads() -> int:
    """Threads for the C++ kernels: PyTorch's, or what those were before :func:`prepare` lowered them."""
    own = torch.get_num_threads()
    return _kernel_threads if _forked and _kernel_threads is not None and own == 1 else own


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """A lock that is free in a forked child, whichever thread of the parent held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def _in_child() -> None:
    global _forked
    _forked = True
    for lock in list(_locks):
        lock._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
