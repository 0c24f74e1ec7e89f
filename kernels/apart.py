"""Calling a function in another process, for kernels that have not run on a machine yet.

A kernel that reads beyond its operands breaks the CUDA context of its process for good, and one that waits for what
never comes does not end. Neither may happen to the caller's program.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lgnet_fast import cache, limits

from .processes import CONTEXT_BYTES, HOST_BYTES, can_start, start

SECONDS = 120
"""Time that a call may take."""
LOADING_SECONDS = 180
"""Time that the process may take, after the import of PyTorch, to import the function and to get a CUDA context."""
_BACKSTOP_SECONDS = 600
"""Time after which a process that cannot end itself is ended, whatever it waits for."""
NO_CONTEXT = "its process got no CUDA context"
"""The problem of a process that ends before it can call the function, as on a GPU in exclusive mode."""
_MARK = "lgnet_fast.apart "
"""Begins the lines of the answer, because other code may print too."""
_READY = "ready"
_LATE, _FAILED = 1, 3
"""Exit statuses: of a process that `faulthandler` ends, and of one that an exception ends."""
_ENDED_BY_OTHERS = {-int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGKILL") if hasattr(signal, name)}


inside = False
"""Whether this is such a process, which starts no other one."""


class Outcome(NamedTuple):
    """What a function returned, or `problem`: its exception, or how the process ended."""

    value: Any
    problem: str | None = None


def unavailable(device: torch.device) -> str | None:
    """Why no other process is started for a GPU now, or None."""
    if not can_start():
        return "this program cannot start Python"
    if not torch.cuda.is_available():
        return "there is no GPU"
    room = limits.memory()
    if room is not None and room < HOST_BYTES:
        return f"another process may need {HOST_BYTES >> 30} GiB of host memory"
    if torch.cuda.mem_get_info(device)[0] < 2 * CONTEXT_BYTES:
        return f"another process needs {2 * CONTEXT_BYTES >> 20} MiB of the GPU's memory"
    return None


def call_apart(
    function: Callable[..., Any], device: torch.device, dtype: torch.dtype, *arguments: Any
) -> Outcome | None:
    """``function(device, dtype, *arguments)`` in another process.

    Args:
        function: of a module, which the other process imports; returns what JSON can hold.
        device: a GPU.
        dtype: of the computation.
        arguments: can be pickled.

    Returns:
        None where nothing could be found out now: no process could be started (see :func:`unavailable`), it got too
        little memory or another GPU, or something else ended it.
    """
    if inside or unavailable(device) is not None:
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    key = cache.key_for(device, dtype)
    question = pickle.dumps((function.__module__, function.__name__, key, device.index, dtype, arguments))
    try:
        process = start(__name__, alone=True)
    except OSError:
        return None
    try:
        output, status = process.communicate(question, _BACKSTOP_SECONDS)[0], process.returncode
    except subprocess.TimeoutExpired as late:
        output, status = late.output or b"", _LATE
    finally:
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be waiting in the driver
                process.wait(10)
    return _outcome(output.decode(errors="replace").splitlines(), status)


def _outcome(lines: list[str], status: int) -> Outcome | None:
    """What a process found out, by the lines that it printed and by its exit status."""
    ready, *answers = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)] or [""]
    if status in _ENDED_BY_OTHERS or (ready != _READY and status == 0):
        return None
    if ready != _READY:
        return Outcome(None, NO_CONTEXT)
    with contextlib.suppress(ValueError):
        for answer in map(json.loads, answers):
            return None if answer.get("memory") else Outcome(answer.get("value"), answer.get("problem"))
    late = f"did not end within {SECONDS} s" if status == _LATE else f"ended with status {status}"
    return Outcome(None, f"its process {late}")


def main() -> None:
    """The process: reads the pickled question, writes "ready" once it can call the function, then the answer."""
    global inside
    inside = True
    status = _FAILED
    try:
        status = _answer()
        sys.stdout.flush()
    finally:
        os._exit(status)  # because leaving a broken CUDA context may not end


def _answer() -> int:
    """Print the answer; the exit status."""
    from lgnet_fast.ops.torch_state import pass_on_out_of_memory

    faulthandler.dump_traceback_later(LOADING_SECONDS, exit=True)
    module, name, key, index, dtype, arguments = pickle.load(sys.stdin.buffer)
    function = getattr(importlib.import_module(module), name)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    torch.cuda.synchronize(device)
    if cache.key_for(device, dtype) != key:  # the program has changed what decides which GPUs are visible
        return 0
    print(_MARK + _READY, flush=True)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        value = function(device, dtype, *arguments)
        torch.cuda.synchronize(device)  # raises what a launch has broken
        answer = {"value": value}
    except Exception as error:  # any error of the driver rules a kernel out
        try:
            pass_on_out_of_memory(error)
            answer = {"problem": f"{type(error).__name__}: {error}"}
        except (torch.OutOfMemoryError, MemoryError):
            answer = {"memory": True}
    print(_MARK + json.dumps(answer))
    return 0
