"""What systems do differently with files: locks, renames, true names.

Windows neither renames nor deletes a file that is open, and locks parts of files (`msvcrt`); the others lock whole
files (`fcntl`). macOS ignores the case of names, and keeps the spelling in which a path was given.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import tempfile
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # all others
    msvcrt = None  # type: ignore[assignment]

CLOSED_ONLY = fcntl is None
"""Whether only closed files can be renamed and deleted."""

LOCK_FILE = ".lock"
"""Name of a file that is locked in place of its folder."""

# The byte that stands for a whole file on Windows. Nothing is there, because a locked byte cannot be read; the
# positions of `msvcrt.locking` have 31 bits.
_LOCKED_BYTE = 1 << 30
# Windows' error of a file that is mapped.
_USER_MAPPED = 1224
# Seconds between attempts on Windows, where scanners of new files, and other processes, hold one for a moment.
_WAITS = (0.01, 0.05, 0.2, 0.5)


def lock(file: IO[Any] | int, wait: bool = False, of_process: bool = False) -> bool | None:
    """Lock an open file, or its descriptor, against other openings on this host, until it is closed.

    wait: until no other holds it. of_process: processes that inherit the file do not hold the lock, and closing any
    other opening of the file in this process releases it (POSIX's rule).

    Returns True; False where another holds it, or it is not granted; None where the file system has no locks.
    """
    if fcntl is not None:
        call = fcntl.lockf if of_process else fcntl.flock
        return _outcome(lambda: call(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)))
    if msvcrt is None:
        return None
    descriptor = file if isinstance(file, int) else file.fileno()
    while (locked := _outcome(lambda: _at_locked_byte(descriptor, msvcrt.LK_NBLCK))) is False and wait:
        time.sleep(_WAITS[0])
    return locked


def unlock(descriptor: int) -> None:
    """Release the :func:`lock` of a descriptor; a child that was forked meanwhile would keep it."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    elif msvcrt is not None:
        _at_locked_byte(descriptor, msvcrt.LK_UNLCK)


@contextlib.contextmanager
def lockable(folder: Path) -> Iterator[int]:
    """A descriptor for :func:`lock` that stands for a folder: its own, or on Windows that of a file in it, which is
    removed by the last process that has it open."""
    if fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
    else:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        if fcntl is None:
            with contextlib.suppress(OSError):
                os.unlink(folder / LOCK_FILE)


def is_locked(path: Path) -> bool | None:
    """Whether a live process of this host holds the :func:`lock` of a file; None where that cannot be known."""
    try:
        with open(path, "rb") as file:
            if fcntl is not None:
                free = _outcome(lambda: fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB))
            else:
                free = lock(file)
                for seconds in _WAITS:  # this question itself holds the lock for a moment there
                    if free is not False:
                        break
                    time.sleep(seconds)
                    free = lock(file)
    except OSError:
        return None
    return None if free is None else not free


def _outcome(take: Callable[[], Any]) -> bool | None:
    try:
        take()
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _at_locked_byte(descriptor: int, what: int) -> None:
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, what, 1)  # type: ignore[attr-defined, unused-ignore]
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)


def replace(old: str | Path, new: str | Path) -> None:
    """``os.replace`` of a closed file; on Windows with some patience."""
    for seconds in _WAITS if CLOSED_ONLY else ():
        try:
            os.replace(old, new)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(old, new)


def is_in_use(error: OSError) -> bool:
    """Whether a file was neither replaced nor removed because it is open or mapped, which Windows alone refuses."""
    if not CLOSED_ONLY:
        return False
    return isinstance(error, PermissionError) or getattr(error, "winerror", None) == _USER_MAPPED


def remove(path: Path) -> None:
    """Remove a file if it is there; on Windows one that is open or mapped stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if not is_in_use(error):
            raise


def check_writable(folder: Path, content: bytes = b"") -> None:
    """Write a file in a folder, and remove it. Raises OSError."""
    if os.name != "nt":
        with tempfile.TemporaryFile(dir=folder) as file:  # it has no name on most systems
            file.write(content)
        return
    # There `tempfile` takes a folder without the right to write for one in which its names are taken, and tries
    # billions of them.
    trial = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(trial, "xb") as file:
            file.write(content)
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


def real_path(path: str | Path) -> Path:
    """The file or folder that a path leads to through links, by its true name as far as it exists.

    `Path.resolve` raises RuntimeError for links in a circle.
    """
    real = Path(os.path.realpath(path))
    if sys.platform != "darwin" or fcntl is None:
        return real
    there = next((one for one in (real, *real.parents) if os.path.lexists(one)), real)
    try:
        descriptor = os.open(there, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return real
    try:
        name = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))  # type: ignore[attr-defined, unused-ignore]
    except OSError:
        return real
    finally:
        os.close(descriptor)
    return Path(os.fsdecode(name.rstrip(b"\0"))) / real.relative_to(there)


def is_link(path: Path) -> bool:
    """Whether a path is a symbolic link, or what Windows has for folders, a junction."""
    if path.is_symlink():
        return True
    try:
        tag = getattr(os.lstat(path), "st_reparse_tag", 0)
    except OSError:
        return False
    return bool(tag) and tag == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)


def composed(path: str | Path) -> str:
    """A path with composed characters: macOS hands out "e" and an accent where other systems have one character."""
    return unicodedata.normalize("NFC", str(path))


def folded(path: str | Path) -> str:
    """A path as file systems see it that ignore case and how accents are written."""
    return composed(composed(path).casefold())
