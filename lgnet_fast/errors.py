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
    """The estimate before a run, or the run itself, exceeds the available memory, of the host or of the GPU.

    `Inpainter` raises it for both. `Engine` raises it for the host's memory, before it allocates buffers; where a
    GPU's memory does not suffice, its error is PyTorch's own ``torch.OutOfMemoryError``.
    """


class UsageError(LGNetError, ValueError):
    """Options of a command that contradict each other or the existing files.

    The text begins with the names of the fields, "size: expected ...", and names others in backquotes; the command
    line replaces them by the names of the options.
    """


class JobError(LGNetError, RuntimeError):
    """A job cannot run: another run of it is active, or its journal cannot be written."""


class ConfigError(LGNetError, ValueError):
    """A training configuration that cannot be read, or a value in it that cannot be used."""


class DataError(LGNetError, ValueError):
    """Pictures or masks for training or evaluation that are missing or unreadable."""


class TrainingError(LGNetError, RuntimeError):
    """Training that had to stop: a loss that is not finite, or a checkpoint that cannot be written or read."""


class MissingExtraError(LGNetError, ImportError):
    """A required package that is not installed; the text names the extra."""
