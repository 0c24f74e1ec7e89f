"""The commands: a file each, named like the command. A file that is added here is a command, listed after these."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..application import app

ORDER = ("run", "eval", "train", "convert", "info", "verify", "tune", "flops", "bench", "demo", "serve")
"""The order in --help: what most users need comes first."""

_files = sorted(module.name for module in iter_modules(__path__))
for _name in (*ORDER, *(name for name in _files if name not in ORDER)):
    import_module(f"{__name__}.{_name}")

__all__ = ["ORDER", "app"]
