"""Other processes that run a module of this package: for compiling (`precompile`), and for faults (`apart`).

A pool of `multiprocessing` would import the caller's program again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HOST_BYTES = 2 << 30
"""Host memory that one process may need."""
CONTEXT_BYTES = 600 << 20
"""GPU memory that the CUDA context of one process takes."""


def can_start() -> bool:
    """Whether ``sys.executable`` is Python. A frozen program, or one that embeds Python, would start itself again."""
    name = Path(sys.executable or "").stem.lower()
    return not getattr(sys, "frozen", False) and name.startswith(("python", "pypy"))


def start(module: str, alone: bool = False) -> subprocess.Popen[bytes]:
    """A process that calls ``main()`` of a module; its input and output are pipes, its errors are dropped.

    Args:
        module: its name, importable with this process's ``sys.path``.
        alone: signals to the caller's process group, such as Ctrl-C in a terminal, do not reach it.

    Raises:
        OSError: the system starts none.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path if isinstance(path, str)),
        "PYTHONSAFEPATH": "1",  # else Python puts the current folder first, and a `torch.py` there would be imported
    }
    return subprocess.Popen(
        [sys.executable, "-c", f"from {module} import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=alone,  # ignored on Windows
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )
