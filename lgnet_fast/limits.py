"""Processors and memory that this process may use, within the limits of a container."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_CONTROL = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""
_OWN = Path("/proc/self/cgroup")
"""The groups of this process, as lines ``number:controllers:path``."""


def processors(control: Path = _CONTROL, own: Path = _OWN) -> int | None:
    """Processors of the control groups' quota, rounded up to a whole number; None without a limit.

    Version 2 has a file ``cpu.max``, version 1 two files in the tree of the controller "cpu".
    """
    limits = [limit for group in _groups("cpu", control, own) if (limit := _quota(group)) is not None]
    return max(1, math.ceil(min(limits))) if limits else None


granted = cache(processors)
"""The quota as this process found it first."""

_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Environment variables by which an OpenMP runtime binds each of its threads to a processor, this one too."""


def _allowed() -> int | None:
    """Processors on which this thread may run; None where the system does not say."""
    try:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    except OSError:  # a sandbox that forbids the call
        return None


_allowed_first = _allowed()


def narrowed() -> int | None:
    """Processors on which this thread may run, if it is fewer than when this module was imported; else None.

    PyTorch's number of threads stays as it was then, also where a container's manager or the program has taken
    processors away since, and OpenMP threads that share a processor wait for each other at every barrier. None where
    an OpenMP runtime binds its threads, because this thread's processor says nothing of the others' then.
    """
    now = _allowed()
    if now is None or _allowed_first is None or now >= _allowed_first:
        return None
    return None if any(os.environ.get(name, "false").lower() != "false" for name in _BINDING) else now


def memory(control: Path = _CONTROL, own: Path = _OWN) -> int | None:
    """Bytes of the host's memory that this process may still take; None where the system does not report them.

    In a container the machine's free memory is not the limit. Pages of files that were not used lately count as free,
    because Linux drops them before it refuses memory.
    """
    rooms = [_system_room(), *(_room(group) for group in _groups("memory", control, own))]
    return min((room for room in rooms if room is not None), default=None)


def _groups(controller: str, control: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's groups that may limit `controller`, with all groups above: their limits hold too."""
    try:
        lines = own.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = control / controller if controllers else control
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield root.joinpath(*parts[:depth])


def _quota(group: Path) -> float | None:
    """Processors of one group: its microseconds of processor time in each period."""
    try:
        spent, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            spent = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            return None
    try:
        microseconds, each = int(spent), int(period)
    except ValueError:  # "max"
        return None
    return microseconds / each if microseconds > 0 and each > 0 else None


def _room(group: Path) -> int | None:
    """Bytes left under one group's limit."""
    for limit, used, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            room = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return max(0, room + (_entry(group / "memory.stat", droppable) or 0))
    return None


def _entry(file: Path, name: str) -> int | None:
    """The number after `name` in a file of lines "name number" or "name: number kB"; None where there is none."""
    try:
        for line in file.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0].rstrip(":") == name:
                return int(words[1])
    except (OSError, ValueError):
        pass
    return None


def _system_room() -> int | None:
    """Bytes that the whole system has left."""
    available = _entry(Path("/proc/meminfo"), "MemAvailable")
    if available is not None:
        return available * 1024
    if sys.platform == "win32":
        return _windows_room()
    # macOS does not tell what is free; what there is at all bounds it.
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _windows_room() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", "c", "d", "e", "f", "g")),
        )

    status = Status(length=ctypes.sizeof(Status))
    found = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.available) if found else None
