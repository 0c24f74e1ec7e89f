"""Exceptions of the public API. Each also derives from the built-in exception that fits."""

from __future__ import annotations


class LGNetError(Exception):
    """Base of every error that lgnet_fast raises on purpose."""


class InvalidImageError(LGNetError, ValueError):
    """A picture that cannot be read, or whose shape, mode or range is not accepted."""


class InvalidMaskError(LGNetError, ValueError):
    """A mask that cannot be read, or that does not fit its picture."""


class WeightsError(LGNetError, ValueError):
    """Weights that are missing, malformed, unsafe to load, or of the wrong shape."""


class BackendError(LGNetError, RuntimeError):
    """A device, dtype or backend that was asked for by name and cannot run; the text says why."""


class OutOfMemoryError(LGNetError, MemoryError):
    """The estimate before a run, or the run itself, exceeds the available memory."""
