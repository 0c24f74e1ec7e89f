"""For the tests of the CUDA C++ kernels: `csrc/cuda/build.py` as a module, structures, machine code, exact inputs."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import emulator

_SCRIPT = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "build.py"
_spec = importlib.util.spec_from_file_location("cuda_build", _SCRIPT)
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


_KINDS = {
    ctypes.c_void_p: "*",
    ctypes.c_int32: "int32_t",
    ctypes.c_int64: "int64_t",
    ctypes.c_uint32: "uint32_t",
}


hopper_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU here"
)


def fields_in_cpp(path: Path, name: str) -> list[tuple[str, int, str]]:
    """Name, length (1: no array) and kind ("*": a pointer) of the fields of a structure, which come before its
    functions."""
    body = re.search(rf"struct {name} \{{(.*?)(\}};|__device__)", path.read_text(), re.S).group(1)
    fields = []
    for declaration in re.sub(r"//[^\n]*", "", body).split(";"):
        kind, _, names = declaration.strip().removeprefix("const ").partition(" ")
        for one in names.split(","):
            bare, _, length = one.strip().partition("[")
            fields.append((bare, int(length.rstrip("]") or 1), "*" if kind.endswith("*") else kind))
    return [field for field in fields if field[0]]


def fields_in_python(structure: type[ctypes.Structure]) -> list[tuple[str, int, str]]:
    """The same of a structure of ctypes."""
    fields = []
    for name, kind, *_ in structure._fields_:
        is_array = issubclass(kind, ctypes.Array)
        element = kind._type_ if is_array else kind
        fields.append((name, kind._length_ if is_array else 1, _KINDS.get(element, element.__name__)))
    return fields


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit, or the one that Triton's wheel carries."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return shutil.which("nvdisasm")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(carried) if carried.is_file() else None)


def instructions(source: str, target: str) -> dict[str, str]:
    """Name -> instructions of each kernel in the machine code of a source for a target."""
    command = [disassembler(), "-c", str(build.machine_code(source, target))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(lgnet_\w+):$", said, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def emulate_fault(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, right: str, wrong: str) -> None:
    """The emulator runs a copy of the sources in `folder`, with `wrong` in place of `right` in the file `name`."""
    for part in ("csrc/cuda", "tests/emulator"):
        shutil.copytree(emulator.ROOT / part, folder / part)
    source = folder / "csrc" / "cuda" / name
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(emulator, "ROOT", folder)
    monkeypatch.setattr(emulator, "HERE", folder / "tests" / "emulator")
    monkeypatch.setattr(emulator, "_library", functools.cache(emulator._library.__wrapped__))


def integers(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Numbers from -2 to 2, whose sums of products are exact in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
