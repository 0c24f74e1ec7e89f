"""Launches compiled in other processes: which are distinct, what is sent, and errors.

Without a GPU every compiling process fails at once, which the caller must handle.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import precompile, processes
from lgnet_fast.kernels.configs import assume_generation
from lgnet_fast.kernels.conv import Conv, conv_forward
from lgnet_fast.kernels.conv_configs import Tile
from lgnet_fast.kernels.launch import Launch, map_leaves, record, specialisation
from lgnet_fast.kernels.results import Store

from lgnet_fast.engine.cuda.executor import CudaExecutor

CONV = Conv(32, 64, 3, 1, 1, False, False, False)


def launches(rect: tuple[int, int, int, int], dtype: torch.dtype = torch.float16) -> list[Launch]:
    source = torch.empty(1, 16, 16, 32, dtype=dtype)
    out = torch.empty(1, 16, 16, 64, dtype=dtype)
    with assume_generation("sm_90"), record() as recorded:
        conv_forward(
            CONV, source, torch.empty(288, 64, dtype=dtype), torch.empty(64), (Store(out, "relu"),),
            Tile(64, 64, 32, 1, 4, 3), size=(16, 16), rect=rect,
        )  # fmt: skip
    return recorded


def test_rectangles_share_a_kernel_and_dtypes_do_not() -> None:
    """Grid integers are not specialised: 1, 16 and 7 rows give one kernel."""
    rects = [(0, 16, 0, 16), (0, 1, 0, 16), (3, 10, 5, 6)]
    same = [launch for rect in rects for launch in launches(rect)]
    assert len(same) == 3
    assert len(precompile.distinct(same)) == 1
    assert len(precompile.distinct([*same, *launches(rects[0], torch.bfloat16)])) == 2


def test_tasks_travel_without_their_tensors() -> None:
    (task,) = precompile.distinct(launches((0, 16, 0, 16)))
    assert pickle.loads(pickle.dumps(task)) == task
    leaves: list[object] = []
    for argument in task.args:
        map_leaves(argument, leaves.append)
    assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    pointers = [leaf for leaf in leaves if isinstance(leaf, precompile.Pointer)]
    assert len(pointers) == 4  # source, weight, bias, out
    assert {p.dtype for p in pointers} == {torch.float16, torch.float32}
    assert all(p.data_ptr() % 16 == 0 for p in pointers if p.aligned)
    assert precompile.Pointer(torch.float16, False).data_ptr() % 16 != 0


def test_a_containers_share_of_the_processors_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setattr(precompile.limits, "granted", lambda: None)
    monkeypatch.setattr(precompile.limits, "memory", lambda: None)
    assert precompile.workers(1000) == 64
    monkeypatch.setattr(precompile.limits, "granted", lambda: 2)
    assert precompile.workers(1000) == 2


def test_a_containers_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setattr(precompile.limits, "granted", lambda: None)
    monkeypatch.setattr(precompile.limits, "memory", lambda: 3 * processes.HOST_BYTES)
    assert precompile.workers(1000) == 3


@pytest.mark.parametrize(
    ("executable", "frozen", "expected"),
    [
        ("/usr/bin/python3.11", False, True),
        ("/env/Scripts/pythonw.exe", False, True),
        ("/opt/app/python", True, False),
        ("/opt/editor", False, False),
        ("", False, False),
        (None, False, False),
    ],
)
def test_only_python_is_started(
    monkeypatch: pytest.MonkeyPatch, executable: str | None, frozen: bool, expected: bool
) -> None:
    """A frozen program would start itself again, and that one itself."""
    monkeypatch.setattr(precompile, "workers", lambda tasks: 2)
    monkeypatch.setattr(precompile.sys, "executable", executable)
    monkeypatch.setattr(precompile.sys, "frozen", frozen, raising=False)
    assert processes.can_start() == expected
    if not expected:
        monkeypatch.setattr(precompile.torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(processes.subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
        assert precompile.compile_all(launches((0, 16, 0, 16)), 0) == []


def test_what_tuples_hold_decides_too() -> None:
    """As Triton does it: tensors by dtype and alignment, integers by being 1 or a multiple of 16, None by itself."""

    class Pair(NamedTuple):
        pointer: object
        stride: object

    def key(pointer: object, stride: object) -> list[object]:
        return specialisation(
            SimpleNamespace(params=[SimpleNamespace(do_not_specialize=True)]), (Pair(pointer, stride),)
        )

    half = torch.empty(32, dtype=torch.float16)
    same = key(half, 32)
    assert same == key(torch.empty(64, dtype=torch.float16), 48)
    others = [(half.bfloat16(), 32), (half[1:], 32), (half, 33), (half, 1), (half, None), (None, 32), (half, 2**31)]
    assert all(key(*other) != same for other in others)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU nothing can be compiled for one")
def test_processes_that_cannot_start_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "workers", lambda tasks: 2)
    failures = precompile.compile_all([*launches((0, 16, 0, 16)), *launches((0, 16, 0, 16), torch.bfloat16)], 0)
    assert len(failures) == 2
    assert all("ended with status 1" in failure for failure in failures)


@pytest.mark.parametrize("home", ["missing", "there"])
def test_kernels_have_a_folder_without_a_home(tmp_path, home):
    """A file stands for a home folder that cannot be written, also by root."""
    pytest.importorskip("triton", minversion="3.5")
    folder = tmp_path / "home"
    if home == "there":
        folder.mkdir()
    else:
        folder.write_text("")
    program = """
import os
import triton
import lgnet_fast.kernels.launch
print(triton.knobs.cache.dir, os.access(triton.knobs.cache.dir, os.W_OK))
"""
    environment = {**os.environ, "HOME": str(folder), "USERPROFILE": str(folder)}
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        environment.pop(name, None)
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    used, writable = printed.rsplit(maxsplit=1)
    assert writable == "True"
    assert (Path(used) == folder / ".triton" / "cache") == (home == "there")
    assert Path(used).exists() == (home == "there")  # a temporary one goes with the process


def test_an_engine_tells_how_far_its_compilation_is(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def compile_all(launches: Any, device: int, progress: Any) -> list[str]:
        for done in range(1, 26):
            progress(done, 25)
        return []

    monkeypatch.setattr(precompile, "compile_all", compile_all)
    engine: Any = SimpleNamespace(device=torch.device("cuda", 0), memory=None, _launches=lambda *_: [])
    with caplog.at_level(logging.INFO, logger="lgnet_fast.waits"):
        CudaExecutor.precompile(engine)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("lgnet_fast.waits", f"compiling the engine's kernels: {done} of 25") for done in (1, 10, 20, 25)
    ]
