"""Other processes that run a module of this package: for compiling (`precompile`), and for trials (`trial`).

A pool of `multiprocessing` would import the caller's program again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def can_start() -> bool:
    """Whether ``sys.executable`` is Python. A frozen program, or one that embeds Python, would start itself again."""
    name = Path(sys.executable or "").stem.lower()
    return not getattr(sys, "frozen", False) and name.startswith(("python", "pypy"))


def start(module: str) -> subprocess.Popen[bytes]:
    """A process that calls ``main()`` of a module; its input and output are pipes, its errors are dropped."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from {module} import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
