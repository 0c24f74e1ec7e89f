"""The first run of a compiled kernel on a machine, in a process of its own.

A kernel that reads beyond its operands breaks the CUDA context of its process for good, and one that waits for what
never comes does not end. Neither may happen to the caller's program, so another process runs the kernel first.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from .processes import can_start, start

Check = Callable[[torch.device, torch.dtype], "str | None"]
"""Runs a kernel on a device in a dtype, and returns what is wrong with its results, or None."""

SECONDS = 120
"""Time that a trial may take, most of it for the import of PyTorch from a slow disk."""
_MARK = "lgnet_fast.trial "
"""Begins the lines of the answer, because other code may print too."""
_READY = "ready"


def try_apart(check: Check, device: int, dtype: torch.dtype) -> dict[str, Any] | None:
    """Run the `check`, a function of a module, in another process on CUDA device `device`.

    Returns:
        {"passed", "reason"}, where the reason says what is wrong, or how the process ended. None where nothing could
        be found out: no process can be started, it got no CUDA context, or too little memory.
    """
    if not can_start() or not torch.cuda.is_available():
        return None
    question = [check.__module__, check.__name__, device, str(dtype).removeprefix("torch.")]
    ended = f"its process did not end within {SECONDS} s"
    with start(__name__) as process:
        try:
            output = process.communicate(json.dumps(question).encode(), SECONDS)[0]
            ended = f"its process ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
    lines = output.decode(errors="replace").splitlines()
    ready, *answer = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)] or [""]
    if ready != _READY:
        return None
    found = None
    with contextlib.suppress(ValueError):
        found = json.loads(answer[0]) if answer else None
    if not isinstance(found, dict):
        return {"passed": False, "reason": ended}
    return None if found.get("memory") else {"passed": found.get("reason") is None, "reason": found.get("reason")}


def main() -> None:
    """The process: reads the question as JSON, writes "ready" once it has a CUDA context, then the answer."""
    from lgnet_fast.ops.torch_state import pass_on_out_of_memory

    module, name, index, dtype = json.load(sys.stdin)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    torch.cuda.synchronize(device)
    print(_MARK + _READY, flush=True)
    try:
        answer = {"reason": getattr(importlib.import_module(module), name)(device, getattr(torch, dtype))}
    except Exception as error:  # any error of the driver rules the kernel out
        try:
            pass_on_out_of_memory(error)
            answer = {"reason": f"{type(error).__name__}: {error}"}
        except torch.OutOfMemoryError:
            answer = {"memory": True}
    print(_MARK + json.dumps(answer), flush=True)
