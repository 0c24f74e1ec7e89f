"""Modules of the repository that the installed package does not have."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ..errors import LGNetError

ROOT = Path(__file__).resolve().parents[2]


def from_checkout(module: str) -> Any:
    """Import a module of the repository. Raises LGNetError: this is no checkout."""
    if not (ROOT / "bench" / "__init__.py").is_file():
        raise LGNetError(
            f"{module} is in the repository, not in the installed package: "
            "run this in a checkout after `pip install -e .`"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(module)
