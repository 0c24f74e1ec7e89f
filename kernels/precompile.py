"""Compiling launches in several processes at once, into Triton's own cache on disk.

Compiling LGNet's fifty kernels one after another takes half a minute; a pool of processes shares it out. Each worker
makes a CUDA context of its own, calls ``JITFunction.warmup`` with stand-ins for the tensors (dtype and alignment are
all that decides), and the caller's process then finds every kernel on disk.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import OPTIONS, Launch

WORKER_BYTES = 2 << 30
"""Host memory that one compiling process may need."""


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor: what Triton specialises a kernel on. No tuple: Triton takes one for several arguments."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        """An address of the same alignment."""
        return 16 if self.aligned else 2


class Task(NamedTuple):
    """A launch that can be sent to another process."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: tuple[tuple[str, Any], ...]


def task(launch: Launch) -> Task:
    """`launch` without its tensors."""
    args = tuple(Pointer(a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else a for a in launch.args)
    return Task(launch.kernel.__module__, launch.kernel.__name__, launch.grid, args, tuple(launch.meta.items()))


def _key(task: Task, kernel: Any) -> tuple[Any, ...]:
    """Equal for launches of one compiled kernel."""
    args = []
    for parameter, value in zip(kernel.params, task.args, strict=False):
        if isinstance(value, int) and not isinstance(value, bool):
            value = "int" if parameter.do_not_specialize else (value == 1, value % 16 == 0)
        args.append(value)
    return (task.module, task.kernel, tuple(args), task.meta)


def distinct(launches: Sequence[Launch]) -> list[Task]:
    """The tasks of `launches`, one for each kernel that has to be compiled."""
    found: dict[tuple[Any, ...], Task] = {}
    for launch in launches:
        one = task(launch)
        found.setdefault(_key(one, launch.kernel), one)
    return list(found.values())


def _compile(job: tuple[Task, int]) -> str | None:
    work, device = job
    try:
        torch.cuda.set_device(device)
        kernel = getattr(importlib.import_module(work.module), work.kernel)
        kernel.warmup(*work.args, grid=work.grid, **dict(work.meta), **OPTIONS)
    except Exception as error:  # whatever it is, the caller's own launch will meet it again and report it
        return f"{work.kernel}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def workers(tasks: int) -> int:
    """Processes worth starting: by cores this process may use, free memory, and work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // WORKER_BYTES
    except (AttributeError, OSError, ValueError):
        memory = cores
    # a worker takes seconds to start, a kernel about one to compile
    return max(1, min(cores, memory, tasks // 4))


def compile_all(
    launches: Sequence[Launch], device: int, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Compile what `launches` would launch on CUDA device `device`; returns one sentence for each failure.

    Args:
        launches: as ``launch.record`` gives them.
        device: index of the GPU.
        progress: called with (kernels done, kernels in all).
    """
    tasks = distinct(launches)
    count = workers(len(tasks))
    if count < 2:
        return []  # the caller's own launches compile them
    failures = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        results = pool.map(_compile, [(one, device) for one in tasks])
        for number, failure in enumerate(results, 1):
            if failure is not None:
                failures.append(failure)
            if progress is not None:
                progress(number, len(tasks))
    return failures
