"""Runs the CUDA C++ kernels of csrc/cuda/ on the CPU, without a GPU and without CUDA: see emulated.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_COMPILER = shutil.which(os.environ.get("CXX", "g++"))
UNAVAILABLE = (
    None if sys.platform == "linux" and _COMPILER is not None else "the emulator needs Linux and a C++ compiler"
)


class TensorMap(ctypes.Structure):
    """`CUtensorMap` of emulated.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
        ("box", ctypes.c_int64 * 4),
    ]


def tensor_map(tensor: Tensor, sizes: list[int], strides: list[int], box: list[int]) -> TensorMap:
    """In place of `hopper.tensor_map`."""
    rank = len(sizes)
    four = ctypes.c_int64 * 4
    ones = [1] * (4 - rank)
    return TensorMap(tensor.data_ptr(), rank, four(*sizes, *ones), four(2, *strides), four(*box, *ones))


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    """Compile NAME.cpp into .cache/emulator, unless it is there already."""
    sources = [*HERE.glob("*.h"), HERE / "__init__.py", HERE / f"{name}.cpp", *(ROOT / "csrc" / "cuda").glob("*.cu*")]
    text = b"".join(path.read_bytes() for path in sorted(sources))
    folder = ROOT / ".cache" / "emulator"
    library = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:  # several processes may compile it
            made = Path(place) / library.name
            # Fibers jump between stacks, which the checks of _FORTIFY_SOURCE forbid. CUDA has no strict aliasing.
            options = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-shared", "-fPIC", "-w"]
            options += ["-DLGNET_EMULATED", "-DLGNET_SOURCE=emulated"]
            command = [str(_COMPILER), *options, f"-I{HERE}", str(HERE / f"{name}.cpp"), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, library)
    loaded = ctypes.CDLL(str(library))
    loaded.lgnet_emulate.restype = ctypes.c_char_p
    loaded.lgnet_copied.restype = ctypes.c_int64
    return loaded


def copied(source: str, block: int) -> int:
    """Bytes that a block of the last launch copied from global memory, other than boxes of tensor maps."""
    return int(_library(source).lgnet_copied(block))


def launch(
    source: str,
    kernel: str,
    grid: int,
    addresses: Sequence[ctypes.c_void_p],
    *,
    threads: int,
    shared_bytes: int,
    cluster: int = 1,
    cooperative: bool = False,
    seed: int = 0,
) -> None:
    """Run a kernel of `source`.cu as `Kernel.launch` does on a GPU; `seed` chooses the order of events.

    Raises:
        RuntimeError: the kernel would hang, access memory that it does not own, or break a rule of the hardware.
    """
    assert 0 <= seed < 2**31
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    error = _library(source).lgnet_emulate(
        kernel.encode(), grid, cluster, threads, shared_bytes, cooperative, ctypes.c_uint64(seed), parameters
    )
    if error is not None:
        raise RuntimeError(f"{kernel}: {error.decode()}")


class EmulatedKernel:
    """In place of `cuda_driver.Kernel`; `seed` is a class attribute that tests change."""

    seed = 0
    held = 132  # blocks
    launched: ClassVar[list[str]] = []

    def __init__(self, source: str, name: str, *, overlap: bool = False, **options: Any) -> None:
        self.source, self.name, self.options = source, name, options

    def blocks_at_once(self) -> int:
        return self.held

    def launch(self, grid: int, addresses: Sequence[ctypes.c_void_p]) -> None:
        launch(self.source, self.name, grid, addresses, seed=self.seed, **self.options)
        self.launched.append(self.name)


def install(monkeypatch: pytest.MonkeyPatch, *launchers: ModuleType) -> type[EmulatedKernel]:
    """The launchers start kernels on the emulator. Returns the class, whose `launched` has the kernels' names."""
    for module in launchers:
        monkeypatch.setattr(module, "Kernel", EmulatedKernel)
        if hasattr(module, "tensor_map"):
            monkeypatch.setattr(module, "tensor_map", tensor_map)
    monkeypatch.setattr(EmulatedKernel, "launched", [])
    monkeypatch.setattr(EmulatedKernel, "seed", 0)
    return EmulatedKernel


__all__ = ["UNAVAILABLE", "EmulatedKernel", "TensorMap", "copied", "install", "launch", "tensor_map"]
