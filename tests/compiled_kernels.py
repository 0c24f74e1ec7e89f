"""For the tests of the CUDA C++ kernels: `csrc/cuda/build.py` as a module, a disassembler, exact inputs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import torch

_SCRIPT = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "build.py"
_spec = importlib.util.spec_from_file_location("cuda_build", _SCRIPT)
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


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


def integers(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Numbers from -2 to 2, whose sums of products are exact in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
