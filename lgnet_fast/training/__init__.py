"""Training of LGNet: masks, data, configuration, trainer. Needs ``pip install "lgnet_fast[train]"`` to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .config import TrainConfig, load_config
    from .errors import ConfigError, DataError, MissingExtraError, TrainingError
    from .masks import HOLE_CLASSES, MaskFolder, generate_mask, hole_class, hole_ratio
    from .trainer import Trainer

__getattr__, __dir__ = attach(
    __name__,
    {
        "HOLE_CLASSES": "masks",
        "ConfigError": "errors",
        "DataError": "errors",
        "MaskFolder": "masks",
        "MissingExtraError": "errors",
        "TrainConfig": "config",
        "Trainer": "trainer",
        "TrainingError": "errors",
        "generate_mask": "masks",
        "hole_class": "masks",
        "hole_ratio": "masks",
        "load_config": "config",
    },
)

__all__ = [
    "HOLE_CLASSES",
    "ConfigError",
    "DataError",
    "MaskFolder",
    "MissingExtraError",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "generate_mask",
    "hole_class",
    "hole_ratio",
    "load_config",
]
