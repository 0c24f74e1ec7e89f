"""LGNet image inpainting, made fast.

    from lgnet_fast import Inpainter
    picture = Inpainter.from_pretrained(None)(picture, mask)

Importing registers the operators ``torch.ops.lgnet.*``; everything else loads at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ops
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
