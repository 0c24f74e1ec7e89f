"""The report of a run: a JSON file that is rewritten during the run; readers always find a complete one."""

from __future__ import annotations

import errno
import io
import os
import time
from pathlib import Path
from typing import Any

from ..pipeline.writing import (
    STANDARD_STREAM,
    is_stream,
    json_bytes,
    remove_leftovers,
    write_atomically,
    write_file,
    write_stream,
)

_INTERVAL = 2.0
# Largest share of the run's time for writing reports.
_SHARE = 0.05


class ReportFile:
    """A report that is written repeatedly.

    A file, or the file that a link points to, is replaced atomically. A pipe or a device, whose content cannot be
    replaced, is opened at once and written to at the end only.

    Raises OSError in the constructor where it could not be written: no such right, a folder, a name that is too long,
    a pipe that nobody reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: io.FileIO | None = None
        self._next = 0.0
        if path == STANDARD_STREAM:
            return
        if is_stream(path):
            # Non-blocking: do not wait for a reader.
            descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            if hasattr(os, "O_NONBLOCK"):
                os.set_blocking(descriptor, True)
            self._stream = os.fdopen(descriptor, "wb", buffering=0)
            return
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder", str(path))
        real = Path(os.path.realpath(path))
        if os.path.lexists(real) and not os.access(real, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if real.parent.exists() and not real.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "no folder", str(real.parent))
        real.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers([real.parent], of=real)
        # A trial write finds missing rights, full disks and read-only file systems.
        trial = real
        if not os.path.lexists(trial):
            write_atomically(trial, b"")
            trial.unlink()
        elif not os.access(real.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(real.parent))

    @property
    def due(self) -> bool:
        """Whether to write again: at most every 2 seconds, and for at most 5 % of the time."""
        replaceable = self._stream is None and self.path != STANDARD_STREAM
        return replaceable and time.monotonic() >= self._next

    def write(self, report: dict[str, Any]) -> None:
        """Replace the file by this version. Raises OSError."""
        start = time.monotonic()
        data = json_bytes(report)
        try:
            if self._stream is None:
                write_file(self.path, data)
            else:
                write_stream(self._stream, data)
        finally:
            end = time.monotonic()
            self._next = end + max(_INTERVAL, (end - start) / _SHARE)

    def close(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()
