"""Compiling launches in several processes at once, into Triton's own cache on disk.

Compiling LGNet's fifty kernels one after another takes half a minute, so several processes share the work. Each
creates a CUDA context and calls ``JITFunction.warmup`` with stand-ins for the tensors, because only dtype and
alignment matter. The caller's process then finds every kernel on disk. The processes run this module.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgnet_fast import limits

from . import processes
from .launch import OPTIONS, Launch, map_leaves, specialisation


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor: the properties that Triton specialises on. Not a tuple, which Triton would unpack."""

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

    def stand_in(value: Any) -> Any:
        return Pointer(value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, Tensor) else value

    args = tuple(map_leaves(value, stand_in) for value in launch.args)
    return Task(launch.kernel.__module__, launch.kernel.__name__, launch.grid, args, tuple(launch.meta.items()))


def distinct(launches: Sequence[Launch]) -> list[Task]:
    """The tasks of `launches`, one for each kernel that has to be compiled."""
    found: dict[tuple[Any, ...], Task] = {}
    for launch in launches:
        key = (launch.kernel, *launch.meta.items(), *specialisation(launch.kernel, launch.args))
        found.setdefault(key, task(launch))
    return list(found.values())


def _compile(work: Task) -> str | None:
    """Compile one kernel for the current device; why it failed, or None."""
    try:
        kernel = getattr(importlib.import_module(work.module), work.kernel)
        kernel.warmup(*work.args, grid=work.grid, **dict(work.meta), **OPTIONS)
    except Exception as error:  # the caller's launch meets the same error and reports it
        return f"{work.kernel}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def workers(tasks: int) -> int:
    """Number of processes to start, by usable cores and free memory (of a container: granted), and by tasks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, limits.granted() or cores)
    room = limits.memory()
    memory = cores if room is None else room // processes.HOST_BYTES
    # a worker takes seconds to start, a kernel about one second to compile
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
    if torch.cuda.is_available():
        count = min(count, torch.cuda.mem_get_info(device)[0] // 2 // processes.CONTEXT_BYTES)
    if count < 2 or not processes.can_start():
        return []  # the launches of the caller compile them
    failures: list[str] = []
    done = 0
    lock = threading.Lock()

    def share(number: int) -> None:
        nonlocal done
        own = tasks[number::count]
        answers = 0
        with processes.start(__name__) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                pickle.dump((device, own), process.stdin)
                process.stdin.close()
            except OSError as error:  # the process ended at once, for which Windows has another number
                if error.errno not in (errno.EPIPE, errno.EINVAL):
                    raise
            for line in process.stdout:
                failure = json.loads(line)
                answers += 1
                with lock:
                    done += 1
                    if failure is not None:
                        failures.append(failure)
                    if progress is not None:
                        progress(done, len(tasks))
        if answers < len(own):
            with lock:
                failures.append(f"a compiling process ended with status {process.returncode}")

    threads = [threading.Thread(target=share, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def main() -> None:
    """A compiling process: reads (device, tasks), pickled, from its input; writes one line of JSON for each task."""
    device, tasks = pickle.load(sys.stdin.buffer)
    torch.cuda.set_device(device)
    for work in tasks:
        print(json.dumps(_compile(work)), flush=True)
