"""Interleaved timing: A B C A B C ..., so that a noisy machine slows every contestant alike."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize(device: str) -> None:
    """Wait for the device to finish; nothing to wait for on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    contestants: Mapping[str, Callable[[], Any]], device: str, rounds: int = 12, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; each timed call ends synchronised.

    On a GPU one timed call is a run of launches, long enough (about 5 ms) to hide the clock and the launch latency.
    """
    repeats = {}
    for name, call in contestants.items():
        for _ in range(warmup):
            call()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        once = time.perf_counter() - start
        repeats[name] = max(1, int(5e-3 / once)) if device == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def summarize(seconds: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    """Medians and least times in ms; how many times longer each takes than `ours` (median of the rounds' ratios)."""
    return {
        "least_ms": {name: round(1e3 * min(s), 4) for name, s in seconds.items()},
        "median_ms": {name: round(1e3 * statistics.median(s), 4) for name, s in seconds.items()},
        "times_slower_than_ours": {
            name: round(statistics.median(a / b for a, b in zip(s, seconds[ours])), 3)
            for name, s in seconds.items()
            if name != ours
        },
    }


def environment() -> dict[str, Any]:
    """Device, versions, thread count and commit: what a figure means nothing without."""
    import triton

    info: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip(),
    }
    if torch.cuda.is_available():
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        info |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": driver.stdout.strip(),
        }
    return info
