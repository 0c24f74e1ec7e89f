"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from lgnet_fast import cache, native
from lgnet_fast.engine.cpu import path as cpu_path
from lgnet_fast.pipeline import Inpainter

from .pipeline_support import HOLE, BlurFill, noise, write_picture
from .support import instruction_sets

if TYPE_CHECKING:
    import httpx

collect_ignore = ["recipes"]  # parts of changed copies of the tree, see test_recipes.py


def share_the_cores(processes: int) -> None:
    """This test process and its children use their share of the threads, because several test processes run."""
    threads = max(1, torch.get_num_threads() // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


# Both variables are removed: in a pytest that a test starts, they would make pytest-benchmark measure nothing.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    share_the_cores(int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT")))


def pretend_to_have(isa: str) -> None:
    """Hide instruction sets faster than `isa`, as on an older processor (see run_machines.py)."""
    library = native.library()
    names, set_isa = library.isa_available(), library.set_isa
    if isa not in names:
        pytest.exit(f"LGNET_FAST_TEST_ISA: expected one of {names}, got {isa}", returncode=2)
    library.isa_available = lambda: names[: names.index(isa) + 1]
    library.set_isa = lambda name: set_isa(isa if name == "auto" else name)
    set_isa(isa)


if older := os.environ.get("LGNET_FAST_TEST_ISA"):
    pretend_to_have(older)


if os.environ.get("LGNET_FAST_TEST_POOL"):
    native.library().mark_forked()  # the kernels run on a pool of threads, as where PyTorch's OpenMP cannot be used


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow"):
            if not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: slow needs a reason")


# For the whole run, so that fixtures of a module and what follows a monkeypatch.undo() are covered too.
@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A separate cache folder for verdicts and choices of the tests; the user's is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.ENVIRONMENT, str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test, and nothing in memory."""
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_known", {})
    return tmp_path / "cache"


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """PyTorch's number of threads, and so that of the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels run with each instruction set of this processor."""
    native.library().set_isa(request.param)
    yield request.param
    native.library().set_isa("auto")


@pytest.fixture(scope="session", autouse=True)
def by_the_engine() -> Iterator[None]:
    """Always use the C++ kernels, also portable ones, without timing them against PyTorch (see test_cpu_path.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_path, "measured", lambda *args: (0.0, 1.0))
        yield


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> BlurFill:
    """Every Inpainter that is loaded gets this network."""
    model = BlurFill()

    def load(cls, model_path=None, device="auto", dtype="auto", backend="auto", **options):
        return cls(model, device, dtype, backend, **options)

    monkeypatch.setattr(Inpainter, "from_pretrained", classmethod(load))
    return model


@pytest.fixture
def case(fake: BlurFill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a picture a.png, a mask m.png and a folder in/ with a.png and b.jpg."""
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "a.png", noise(40, 60))
    write_picture(tmp_path / "m.png", HOLE.astype(np.uint8) * 255)
    write_picture(tmp_path / "in" / "a.png", noise(40, 60))
    write_picture(tmp_path / "in" / "b.jpg", noise(40, 60))
    return tmp_path


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Windows' rules for files in use, and its locks. What is refused is appended to the list."""
    from .windows_support import windows_rules

    return windows_rules(monkeypatch)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a live server with the bundled model; one for the tests of a file."""
    from .serve_support import LIMITS, live_server

    with live_server(LIMITS) as address:
        yield address


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[httpx.Client]:
    """A client of `server`."""
    import httpx

    with httpx.Client(base_url=server, timeout=120) as client:
        yield client


@pytest.fixture
def strict_float32() -> Iterator[None]:
    """Float32 products on a GPU in full precision, not in TF32."""
    # Not by monkeypatch, which restores by deleting the attribute; that fails on these objects.
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value
