"""Processors and memory that this process may use, within the limits of a container."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def quota(control: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Processors that Linux' control groups grant this process, rounded up; None without a limit.

    `own` lists the groups as ``number:controllers:path``, `control` is where they are mounted; version 2 has a file
    ``cpu.max``, version 1 two files in the tree of the controller "cpu". Limits of all groups above hold too.
    """
    limits = [limit for group in _groups("cpu", control, own) if (limit := _limit(group)) is not None]
    return max(1, math.ceil(min(limits))) if limits else None


def memory_left(control: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process may still take under the limits of its control groups; None without a limit.

    Pages of files that were not used lately count as free, because Linux drops them before it refuses memory.
    """
    rooms = [room for group in _groups("memory", control, own) if (room := _memory_room(group)) is not None]
    return min(rooms, default=None)


def _groups(controller: str, control: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's groups that may limit a controller, from the root inwards."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = control / controller if controllers else control
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield root.joinpath(*parts[:depth])


def _memory_room(group: Path) -> int | None:
    for limit, used, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            room = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        try:
            pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
            room += next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == droppable), 0)
        except (OSError, ValueError):
            pass
        return max(0, room)
    return None


def _limit(group: Path) -> float | None:
    """Processors of one group: its microseconds of processor time in each period."""
    try:
        spent, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            spent = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        microseconds, each = int(spent), int(period)
    except ValueError:  # "max"
        return None
    return microseconds / each if microseconds > 0 and each > 0 else None


granted = cache(quota)
"""The limit as this process found it first."""
