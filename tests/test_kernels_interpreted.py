"""Runs tests/interpreted in separate processes, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


def start(files: list[Path]) -> subprocess.Popen[str]:
    """Pytest over some files, on one thread."""
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_kernels_in_the_interpreter() -> None:
    """In two processes, because the interpreter uses one core."""
    files = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"), key=lambda file: -file.stat().st_size)
    count = min(2, os.cpu_count() or 1)
    runs = [start(files[first::count]) for first in range(count)]
    for run, output in [(run, run.communicate()[0]) for run in runs]:
        assert run.returncode == 0, output[-8000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed is not None, output[-2000:]
        assert int(passed[1]) > 0
        assert "skipped" not in output
