"""The networks in plain PyTorch: the reference for all faster code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .cascade import Stages
    from .lgnet import CASCADES, LGNet, LocalGlobalRefinement
    from .networks import LocalNet, UNet
    from .variants import create_model, list_models

# Lazy, because the operators import the attention and merge functions and need nothing else from here.
__getattr__, __dir__ = attach(
    __name__,
    {
        "CASCADES": "lgnet",
        "LGNet": "lgnet",
        "LocalGlobalRefinement": "lgnet",
        "LocalNet": "networks",
        "Stages": "cascade",
        "UNet": "networks",
        "create_model": "variants",
        "list_models": "variants",
    },
)

__all__ = [
    "CASCADES",
    "LGNet",
    "LocalGlobalRefinement",
    "LocalNet",
    "Stages",
    "UNet",
    "create_model",
    "list_models",
]
