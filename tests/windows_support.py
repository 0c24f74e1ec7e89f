"""Rules of Windows for files, on Linux: for the tests that the package obeys them, which ran on Linux only."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lgnet_fast import files
from lgnet_fast.pipeline import writing


def in_use(path: Any) -> bool:
    """Whether this process has a file open or mapped."""
    try:
        own = os.stat(path)
    except OSError:
        return False
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            other = os.stat(f"/proc/self/fd/{descriptor}")
        except OSError:  # of the listing itself
            continue
        if os.path.samestat(own, other):
            return True
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return any(line.endswith(f" {os.path.realpath(path)}") for line in lines)


class Locks:
    """A stand-in for `msvcrt`: locks of bytes, each held by one descriptor until it is closed or releases it."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        self.held: dict[tuple[int, int, int], int] = {}

    def locking(self, descriptor: int, what: int, count: int) -> None:
        assert count == 1
        status = os.fstat(descriptor)
        place = status.st_dev, status.st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if what == self.LK_UNLCK:
            del self.held[place]
            return
        holder = self.held.get(place, descriptor)  # the same number may be that of a later opening
        if holder != descriptor and self._is_open(holder, place):
            raise PermissionError(errno.EACCES, "Permission denied")
        self.held[place] = descriptor

    @staticmethod
    def _is_open(descriptor: int, place: tuple[int, int, int]) -> bool:
        try:
            status = os.fstat(descriptor)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == place[:2]


def windows_rules(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files in use are neither replaced nor removed, and locks are those of `msvcrt`. Returns what is refused."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("what a process has open is read from /proc")
    refused: list[str] = []

    def denied(*paths: Any) -> None:
        for path in paths:
            if in_use(path):
                refused.append(str(path))
                raise PermissionError(errno.EACCES, "used by another process", str(path))

    replace, unlink = os.replace, os.unlink

    def checked_replace(old: Any, new: Any) -> None:
        denied(old, new)
        replace(old, new)

    def checked_unlink(path: Any, **options: Any) -> None:
        if not options:  # with a folder's descriptor, as of `shutil.rmtree`
            denied(path)
        unlink(path, **options)

    for name, function in (("replace", checked_replace), ("unlink", checked_unlink), ("remove", checked_unlink)):
        monkeypatch.setattr(os, name, function)

    def unlink_path(path: Path, missing_ok: bool = False) -> None:
        try:
            checked_unlink(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    monkeypatch.setattr(Path, "unlink", unlink_path)  # which keeps a function of its own in Python 3.10
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", Locks())
    monkeypatch.setattr(files, "CLOSED_ONLY", True)
    monkeypatch.setattr(files, "_WAITS", (0.01, 0.01))
    monkeypatch.setattr(writing, "_LEAST_AGE", 60.0)
    return refused
