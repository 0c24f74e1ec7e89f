"""LGNet image inpainting, made fast.

    from lgnet_fast import Inpainter
    picture = Inpainter.from_pretrained(None)(picture, mask)

Importing registers the operators ``torch.ops.lgnet.*``; everything else loads at first use.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from .errors import (
    BackendError,
    InvalidImageError,
    InvalidMaskError,
    LGNetError,
    OutOfMemoryError,
    WeightsError,
)
from .lazy import attach
from .version import __version__

if TYPE_CHECKING:
    from .engine import Engine, load_engine, optimize
    from .pipeline import Inpainter
    from .reference import LGNet, LocalGlobalRefinement, create_model, list_models
    from .serve import Session


def _starts_the_command_line() -> bool:
    """Whether Python imports this package to run ``lgnet-fast`` or ``python -m lgnet_fast``."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # until Python has found the module
        return ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:])
    return os.path.basename(program) in ("lgnet-fast", "lgnet-fast.exe") and program in sys.orig_argv


# The command line registers the operators when a command runs (cli/application.py): --help does not wait for PyTorch,
# and Ctrl-C while PyTorch loads ends it without a traceback.
if not _starts_the_command_line():
    from . import ops

__getattr__, __dir__ = attach(
    __name__,
    {
        "Engine": "engine",
        "Inpainter": "pipeline",
        "LGNet": "reference",
        "LocalGlobalRefinement": "reference",
        "Session": "serve",
        "create_model": "reference",
        "list_models": "reference",
        "load_engine": "engine",
        "optimize": "engine",
    },
)

__all__ = [
    "BackendError",
    "Engine",
    "Inpainter",
    "InvalidImageError",
    "InvalidMaskError",
    "LGNet",
    "LGNetError",
    "LocalGlobalRefinement",
    "OutOfMemoryError",
    "Session",
    "WeightsError",
    "__version__",
    "create_model",
    "list_models",
    "load_engine",
    "ops",
    "optimize",
]
