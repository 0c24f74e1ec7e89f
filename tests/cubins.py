"""`csrc/cuda/build.py` as a module."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "build.py"
_spec = importlib.util.spec_from_file_location("cuda_build", _SCRIPT)
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
