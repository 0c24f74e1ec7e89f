"""Support for ``fork()``: PyTorch's threads exist in the parent only, and a child that waits for them hangs.

In a forked child this package runs PyTorch on one thread, as PyTorch's DataLoader workers do. The C++ kernels keep
their number of threads: they start a pool of new ones in the child.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import weakref
from types import TracebackType

import torch

from . import limits

logger = logging.getLogger("lgnet_fast")


def _started_by_fork() -> bool:
    """Whether `multiprocessing` forked this process, perhaps before this module was imported."""
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
    """Called first by every public function that runs PyTorch: sets one thread in a forked child."""
    global _kernel_threads
    if _forked and torch.get_num_threads() > 1:
        _kernel_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        logger.warning(
            "this process is a fork, PyTorch's threads are in its parent: PyTorch runs on 1 thread here, "
            "the C++ kernels on %d; start workers by spawn to have all threads",
            _kernel_threads,
        )


def program_threads() -> int:
    """Threads of this program: PyTorch's number before :func:`prepare` lowered it, at most the container's quota."""
    own = torch.get_num_threads()
    if _forked and _kernel_threads is not None and own == 1:
        own = _kernel_threads
    return min(own, limits.granted() or own)


def kernel_threads() -> int:
    """Threads for the C++ kernels: the program's, at most the processors that the calling thread has left."""
    own = program_threads()
    return min(own, limits.narrowed() or own)


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
