"""Number of processors that this process may use, within the limit of a container."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path


def quota(control: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Processors that Linux' control groups grant this process, rounded up; None without a limit.

    `own` lists the groups as ``number:controllers:path``, `control` is where they are mounted; version 2 has a file
    ``cpu.max``, version 1 two files in the tree of the controller "cpu". Limits of all groups above hold too.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = control if not controllers else control / "cpu"
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            limit = _limit(root.joinpath(*parts[:depth]))
            if limit is not None:
                limits.append(limit)
    return max(1, math.ceil(min(limits))) if limits else None


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
