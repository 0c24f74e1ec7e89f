"""What can go wrong in training, each with a text that says what to change."""

from __future__ import annotations

from ..errors import LGNetError


class ConfigError(LGNetError, ValueError):
    """A training configuration that cannot be read, or a value in it that cannot be used."""


class DataError(LGNetError, ValueError):
    """Pictures or masks for training that are missing or unreadable."""


class TrainingError(LGNetError, RuntimeError):
    """Training that had to stop: a loss that is not finite, or a checkpoint that cannot be written or read."""


class MissingExtraError(LGNetError, ImportError):
    """A package that training needs and that is not installed; the text names the extra."""
