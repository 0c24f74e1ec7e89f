"""Interleaved timing: A B C A B C ..., so that a noisy machine slows every contestant alike.

The ratio of two contestants is the median over the rounds of the ratio within a round. A disturbance of one round, or
a lasting slow-down of the machine, does not change it. Its spread is half the interquartile range over the median.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

SMOKE = bool(os.environ.get("LGNET_BENCH_SMOKE"))
"""Run every bench small and once, to test that it runs; the figures mean nothing."""

LONG_CALL_S = 1.0
"""Calls of at least this many seconds get one warm-up and at most `long_rounds` rounds."""
MIN_RUN_S = 5e-3
"""Shortest duration of one timed run of calls, so that the cost of clock and call is negligible."""
TARGET_STANDARD_ERROR = 0.025
"""No rounds are added once the standard error of the ratios is below this."""
MIN_CONTEST_S = 1.0
"""Shortest duration of a contest: short calls get more rounds, so that a single disturbance does not decide."""
MAX_CONTEST_S = 30.0
"""No rounds are added to a contest after this many seconds, so that the whole suite ends within 15 minutes."""

PACKAGES = ("triton", "openvino", "onnxruntime", "ncnn", "MNN")
"""Packages beside PyTorch whose code contestants run."""

clock = time.perf_counter
"""Clock in seconds. Tests replace it by the process's CPU time, to be independent of the machine's load."""

Rounds = list[dict[str, float]]


def copy_rate() -> float:
    """Copy bandwidth of all threads beyond the caches: GB read and written a second, the best of three.

    The host of a virtual machine moves its cores: at times they share a cache and one memory controller, at times
    each has a separate one. In the second state copies are twice as fast, but data passes between the cores more
    slowly, and ratios shift by 10 % and more without a change of the code. This figure distinguishes the two
    states best.
    """
    source, target = _copied()
    return round(max(2e-9 * source.nbytes / seconds(lambda: target.copy_(source), "cpu") for _ in range(3)), 1)


@cache
def _copied() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1 << 25), torch.zeros(1 << 25)


def keep_freed_memory() -> None:
    """Let the C library reuse memory that was freed instead of giving it back to the system (glibc; else nothing).

    By default every large tensor is made of new pages, which the system must zero. That slows contestants that
    allocate, by an amount that changes from minute to minute. It is also the fairer comparison, because a
    long-running server reuses its memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h's M_TRIM_THRESHOLD, M_MMAP_MAX
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


def synchronize(device: str) -> None:
    """Wait for the device to finish; does nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds of one call: the mean of `repeats` in a row. The device is idle before and after."""
    synchronize(device)
    start = clock()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (clock() - start) / repeats


def interleave(
    contestants: Mapping[str, Callable[[], Any]],
    device: str,
    rounds: int = 12,
    warmup: int = 3,
    long_rounds: int = 4,
) -> Rounds:
    """Seconds of every contestant in every round.

    Args:
        contestants: each has been called before, so that nothing is compiled here.
        device: "cpu" or "cuda".
        rounds: least number of rounds. More are run until the contest has taken :data:`MIN_CONTEST_S`; up to as many
            again until the ratios are known to :data:`TARGET_STANDARD_ERROR`, but not beyond :data:`MAX_CONTEST_S`.
            1 is exactly one.
        warmup: calls before the rounds; one for calls of a second and more.
        long_rounds: number of rounds, evenly spread, in which calls of a second and more take part.

    Returns:
        For each round: contestant -> seconds per call.
    """
    if SMOKE:
        rounds, warmup, long_rounds = 2, 1, 1
    once = {}
    for name, call in contestants.items():
        for _ in range(max(1, warmup)):
            once[name] = seconds(call, device)
            if once[name] > LONG_CALL_S:
                break
    all_long = min(once.values()) > LONG_CALL_S
    if all_long:
        rounds = min(rounds, long_rounds)
    repeats = {name: max(1, round(MIN_RUN_S / s)) for name, s in once.items()}
    taken: Rounds = []
    start = clock()

    def worth_another() -> bool:
        if SMOKE or rounds == 1 or all_long:
            return False
        return clock() < start + MIN_CONTEST_S or (
            len(taken) < 2 * rounds and clock() < start + MAX_CONTEST_S and not _steady(taken)
        )

    while len(taken) < rounds or worth_another():
        number = len(taken)
        joins = number < rounds and number * long_rounds % rounds < long_rounds
        taken.append(
            {
                name: seconds(call, device, repeats[name])
                for name, call in contestants.items()
                if once[name] <= LONG_CALL_S or joins
            }
        )
    return taken


def _steady(rounds: Rounds) -> bool:
    """Whether the ratios to the first contestant that is in every round have small standard errors."""
    names = [name for name in rounds[0] if all(name in taken for taken in rounds)]
    for name in names[1:]:
        ratios = [taken[name] / taken[names[0]] for taken in rounds]
        # Of a median: 1.253 deviations / sqrt(n); half the middle half's width is 0.6745 deviations.
        if 1.253 / 0.6745 * spread(ratios) / len(ratios) ** 0.5 > TARGET_STANDARD_ERROR:
            return False
    return True


def spread(values: list[float]) -> float:
    """Half the width of the middle half, over the median; 0 for one value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def summarize(rounds: Rounds, ours: str) -> dict[str, Any]:
    """Figures of every contestant: least and median time in ms, and how many times longer it takes than `ours`, which
    is the median of the rounds' ratios, with the spread of these ratios."""
    names = list(dict.fromkeys(name for taken in rounds for name in taken))
    times = {name: [taken[name] for taken in rounds if name in taken] for name in names}
    ratios = {
        name: [taken[name] / taken[ours] for taken in rounds if name in taken and ours in taken]
        for name in names
        if name != ours
    }
    return {
        "least_ms": {name: round(1e3 * min(s), 4) for name, s in times.items()},
        "median_ms": {name: round(1e3 * statistics.median(s), 4) for name, s in times.items()},
        "times_slower_than_ours": {name: round(statistics.median(r), 3) for name, r in ratios.items()},
        "spread": {name: round(spread(r), 4) for name, r in ratios.items()},
        "ours": ours,
        "rounds": len(rounds),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def environment() -> dict[str, Any]:
    """Versions, thread count, commit and date, which every figure needs. No host name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    info: dict[str, Any] = {
        "torch": torch.__version__,
        **versions,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        info |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }
    return info
