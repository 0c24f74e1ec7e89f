"""The container's limit on processors, and the threads of the kernels under it."""

from __future__ import annotations

import pytest
import torch

from lgnet_fast import cpus, forks
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
def test_quota(tmp_path, own, files, expected):
    write_files(tmp_path, {"own": own, **{f"control/{name}": text for name, text in files.items()}})
    assert cpus.quota(tmp_path / "control", tmp_path / "own") == expected


def test_without_control_groups(tmp_path):
    assert cpus.quota(tmp_path, tmp_path / "none") is None


def test_kernels_take_no_more_threads_than_granted(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for granted, expected in ((None, 4), (2, 2), (8, 4)):
            monkeypatch.setattr(cpus, "granted", lambda granted=granted: granted)
            assert forks.kernel_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "inactive_file 50"}, 350),
        ("0::/a", {"memory.max": "max", "a/memory.max": "1000", "a/memory.current": "1200"}, 0),
        ("5:memory:/x", {"memory/x/memory.limit_in_bytes": "90", "memory/x/memory.usage_in_bytes": "50"}, 40),
        ("5:cpu:/x", {"memory/x/memory.limit_in_bytes": "90", "memory/x/memory.usage_in_bytes": "50"}, None),
        ("0::/", {"memory.max": "1000", "memory.current": "100", "memory.stat": "inactive_file damaged"}, 900),
        ("0::/", {}, None),
    ],
)
def test_memory_left(tmp_path, own, files, expected):
    write_files(tmp_path, {"own": own, **{f"control/{name}": text for name, text in files.items()}})
    assert cpus.memory_left(tmp_path / "control", tmp_path / "own") == expected
