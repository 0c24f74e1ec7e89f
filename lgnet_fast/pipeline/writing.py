"""Writing files atomically: readers see the old file or the new one. Pipes and devices are written to directly."""

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

from .. import files

STANDARD_STREAM = Path("-")
"""The name of standard input, for an input, and of standard output, for an output."""


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


def is_any_stream(path: Path) -> bool:
    """Whether `path` is the standard input or output ("-"), or :func:`is_stream`."""
    return path == STANDARD_STREAM or is_stream(path)


def write_file(path: Path, data: bytes) -> None:
    """`write_atomically`; but a pipe, a device or the standard output ("-") is written to directly."""
    if path == STANDARD_STREAM:
        sys.stdout.flush()
        write_stream(getattr(sys.stdout.buffer, "raw", sys.stdout.buffer), data)
    elif is_stream(path):
        with open(path, "wb", buffering=0) as stream:
            write_stream(stream, data)
    else:
        write_atomically(path, data)


def write_stream(stream: BinaryIO | io.RawIOBase, data: bytes) -> None:
    """Write all of `data` without a buffer, because a buffer would raise again when the stream is closed."""
    rest = memoryview(data)
    while rest:
        written = stream.write(rest)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "the pipe takes no more")
        rest = rest[written:]


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename: readers see the old file or the new one.

    Where `path` is a link, its target is replaced, and the link stays.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _open_temporary(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if not files.CLOSED_ONLY:  # while it is locked, nobody takes it for a leftover
                files.replace(temporary, path)
        if files.CLOSED_ONLY:
            files.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # which would hide the first one
            temporary.unlink(missing_ok=True)
        # On a full disk, `write` names no file. An error without a number would lose its text by it.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def temporary_prefix(path: Path) -> str:
    """Prefix of the names of temporary files of `path`; 32 hexadecimal digits and ".tmp" follow."""
    # Names are limited in bytes, and this one is longer than that of the file.
    name = path.name
    while len(os.fsencode(name)) > 100:
        name = name[:-1]
    return f".{name}."


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, locked while it is written; leftovers of killed processes are not locked."""
    while True:
        temporary = path.parent / f"{temporary_prefix(path)}{uuid.uuid4().hex}.tmp"
        file = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        files.lock(file)  # fails where it is being removed as a leftover, and on file systems without locks
        if temporary.exists():
            return temporary, file
        file.close()


# Seconds. Where files are renamed after they were closed, nothing keeps them between the two.
_LEAST_AGE = 60.0 if files.CLOSED_ONLY else 0.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


def remove_leftovers(folders: Iterable[Path], age: float = 0.0, of: Path | None = None) -> None:
    """Delete temporary files of `write_atomically` that killed processes left in these folders.

    `age`: least seconds since the last write; needed in folders that other hosts write to, because their locks may
    not be visible. `of`: only temporary files of this file.
    """
    begin = "" if of is None else temporary_prefix(of)
    for folder in dict.fromkeys(folders):
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except OSError:  # the folder does not exist yet
            continue
        found = [name for name in names if name.startswith(begin) and _TEMPORARY.fullmatch(name)]
        for temporary in (folder / name for name in found):
            with contextlib.suppress(OSError):  # not deletable by this user, or open, where that keeps it
                if time.time() - temporary.stat().st_mtime < max(age, _LEAST_AGE):
                    continue
                if files.CLOSED_ONLY:
                    temporary.unlink()
                    continue
                with open(temporary, "rb") as file:
                    if files.lock(file):
                        temporary.unlink(missing_ok=True)
