"""Training of LGNet: masks, data, configuration, trainer. Needs ``pip install 'lgnet-fast[train]'`` to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from ..data.masks import HOLE_CLASSES, MaskFolder, generate_mask, hole_class, hole_ratio
    from ..errors import ConfigError, DataError, MissingExtraError, TrainingError
    from .config import TrainConfig, load_config
    from .trainer import Trainer

__getattr__, __dir__ = attach(
    __name__,
    {
        "HOLE_CLASSES": ".data.masks",
        "ConfigError": ".errors",
        "DataError": ".errors",
        "MaskFolder": ".data.masks",
        "MissingExtraError": ".errors",
        "TrainConfig": "config",
        "Trainer": "trainer",
        "TrainingError": ".errors",
        "generate_mask": ".data.masks",
        "hole_class": ".data.masks",
        "hole_ratio": ".data.masks",
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
