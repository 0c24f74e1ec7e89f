"""Writing files so that readers see the old one or the new one; pipes and devices are written to as they are."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STANDARD_STREAM = Path("-")
"""Standard input where an input is named, standard output where an output is."""


def json_bytes(value: Any) -> bytes:
    """`value` as a JSON file. A file name that is not UTF-8 keeps its bytes as lone surrogates, escaped."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe, a device or a socket, also through links: no file that could be replaced."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def write_file(path: Path, data: bytes) -> None:
    """`write_atomically`; a pipe or a device, or the standard output as "-", is written to instead."""
    if path == STANDARD_STREAM:
        sys.stdout.flush()
        write_stream(getattr(sys.stdout.buffer, "raw", sys.stdout.buffer), data)
    elif is_stream(path):
        with open(path, "wb", buffering=0) as stream:
            write_stream(stream, data)
    else:
        write_atomically(path, data)


def write_stream(stream: BinaryIO | io.RawIOBase, data: bytes) -> None:
    """Writes all of `data`, without a buffer, which would fail once more when the stream is closed."""
    rest = memoryview(data)
    while rest:
        written = stream.write(rest)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "the pipe takes no more")
        rest = rest[written:]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, flushes it to the disk, then renames: readers see the old file or the new one.

    Where `path` is a link, what it points to is replaced, and the link stays.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _open_temporary(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_prefix(path: Path) -> str:
    """How the names of the temporary files of `path` begin; after it come 32 hexadecimal digits and ".tmp"."""
    # Names are limited in bytes, and this one is longer than the file's own.
    return f".{os.fsdecode(os.fsencode(path.name)[:100])}."


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, locked while it is written, which tells it from the leftover of a killed process."""
    while True:
        temporary = path.parent / f"{temporary_prefix(path)}{uuid.uuid4().hex}.tmp"
        file = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        if fcntl is None:
            return temporary, file
        # Fails where it is being removed as a leftover, and on file systems without locks.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.exists():
            return temporary, file
        file.close()


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


def remove_leftovers(folders: Iterable[Path], age: float = 0.0, of: Path | None = None) -> None:
    """Deletes what killed processes left of `write_atomically` in these folders; files being written now stay.

    `age`: seconds since the last write that a leftover must have; for folders that other hosts write to, whose locks
    may not be seen here. `of`: only those of this file.
    """
    begin = "" if of is None else temporary_prefix(of)
    for folder in dict.fromkeys(folders):
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except OSError:  # not there yet
            continue
        found = [name for name in names if name.startswith(begin) and _TEMPORARY.fullmatch(name)]
        for temporary in (folder / name for name in found):
            if fcntl is None:
                continue
            try:
                if time.time() - temporary.stat().st_mtime < age:
                    continue
                with open(temporary, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    temporary.unlink(missing_ok=True)
            except OSError:  # locked by its writer, or not deletable by this user
                continue
