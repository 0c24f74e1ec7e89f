"""A container's limits on processors and memory, and the threads of the kernels under them."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from lgnet_fast import forks, limits
from tests.support import write_files


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "800000 100000"}, 3),
        ("0::/outside/the/namespace", {"cpu.max": "400000 100000"}, 4),
        ("3:cpu,cpuacct:/x\n0::/", {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/\n5:cpuset:/", {"cpu/cpu.cfs_quota_us": "100000"}, None),
        ("0::/", {"cpu.max": "damaged"}, None),
        ("0::/", {}, None),
    ],
)
def test_processors(tmp_path, own, files, expected):
    write_files(tmp_path, {"own": own, **{f"control/{name}": text for name, text in files.items()}})
    assert limits.processors(tmp_path / "control", tmp_path / "own") == expected


def test_groups_with_any_name(tmp_path):
    """A line that does not fit is no reason to fail: every call of a kernel asks for the quota."""
    write_files(tmp_path, {"control/cpu.max": "300000 100000", "own": ""})
    (tmp_path / "own").write_bytes(b"damaged\n7:\n0::/gr\xfc\xdfe\n")
    assert limits.processors(tmp_path / "control", tmp_path / "own") == 3
    assert limits.memory(tmp_path / "control", tmp_path / "own") is not None
    (tmp_path / "control" / "cpu.max").write_bytes(b"\xff")
    assert limits.processors(tmp_path / "control", tmp_path / "own") is None


def test_without_control_groups(tmp_path):
    assert limits.processors(tmp_path, tmp_path / "none") is None


def test_kernels_take_no_more_threads_than_granted(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for granted, expected in ((None, 4), (2, 2), (8, 4)):
            monkeypatch.setattr(limits, "granted", lambda granted=granted: granted)
            assert forks.kernel_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("first", "now", "environment", "expected"),
    [
        (4, 4, {}, 4),
        (4, 1, {}, 1),
        (4, 3, {}, 3),
        (4, 1, {"OMP_PROC_BIND": "false"}, 1),
        (4, 1, {"OMP_PROC_BIND": "close"}, 4),  # this thread is bound, others have processors of their own
        (4, 1, {"KMP_AFFINITY": "granularity=fine,compact,1,0"}, 4),
        (1, 1, {}, 4),  # bound before the import
        (None, None, {}, 4),
    ],
)
def test_kernels_take_no_more_threads_than_processors_that_are_left(first, now, environment, expected, monkeypatch):
    """Else threads that share a processor wait for each other: ten times the time of one thread."""
    before = torch.get_num_threads()
    for name in limits._BINDING:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(limits, "granted", lambda: None)
    monkeypatch.setattr(limits, "_allowed_first", first)
    monkeypatch.setattr(limits, "_allowed", lambda: now)
    try:
        torch.set_num_threads(4)
        assert forks.kernel_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_sandbox_that_does_not_tell_the_processors(monkeypatch):
    def denied(pid: int) -> set[int]:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", denied, raising=False)
    assert limits._allowed() is None
    assert limits.narrowed() is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no choice of processors here")
def test_a_thread_that_is_confined_to_one_processor(monkeypatch):
    for name in limits._BINDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(limits, "_allowed_first", 2)
    found = []

    def work():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread
        found.append(limits.narrowed())

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert found == [1]


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "inactive_file 50"}, 350),
        ("0::/a", {"memory.max": "max", "a/memory.max": "1000", "a/memory.current": "1200"}, 0),
        (
            "0::/a",
            {"memory.max": "500", "memory.current": "100", "a/memory.max": "950", "a/memory.current": "9"},
            400,
        ),
        ("5:memory:/x", {"memory/x/memory.limit_in_bytes": "90", "memory/x/memory.usage_in_bytes": "50"}, 40),
        (
            "5:memory:/",
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 250\n",
            },
            350,
        ),
        ("5:cpu:/x", {"memory/x/memory.limit_in_bytes": "90", "memory/x/memory.usage_in_bytes": "50"}, 5000),
        ("0::/", {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 7\ninactive_file 300\n"}, 400),
        ("0::/", {"memory.max": "1000", "memory.current": "100", "memory.stat": "inactive_file damaged"}, 900),
        ("0::/", {"memory.max": "9000", "memory.current": "100"}, 5000),
        ("0::/", {"memory.max": "max", "memory.current": "900"}, 5000),
        ("0::/", {}, 5000),
    ],
)
def test_memory(tmp_path, monkeypatch, own, files, expected):
    write_files(tmp_path, {"own": own, **{f"control/{name}": text for name, text in files.items()}})
    monkeypatch.setattr(limits, "_system_room", lambda: 5000)
    assert limits.memory(tmp_path / "control", tmp_path / "own") == expected


def test_memory_of_this_machine():
    room = limits.memory()
    assert room is None or 2**20 < room < 2**50


def test_memory_is_not_known_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_system_room", lambda: None)
    assert limits.memory(tmp_path, tmp_path / "none") is None
