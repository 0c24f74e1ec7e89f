"""Compile every csrc/cuda/*.cu to machine code in kernels/machine_code/, which the package ships.

    make cubin                                  (installs csrc/cuda/requirements.txt in a place of its own)
    python csrc/cuda/build.py [--output FOLDER] [NAME ...]

The compiler is NVRTC of CUDA 12.8: the first that knows every GPU below, and the machine code of a later CUDA is
rejected by drivers that PyTorch still supports. Each file contains the hash of its sources and options, so that a
test can detect one that was not built from them.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MACHINE_CODE = HERE.parents[1] / "kernels" / "machine_code"
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.cu")))
HOPPER = ("sm_90a",)
# GPUs of 8.x (Jetson Orin, 8.7, runs no other's code), 9.0, 10.x and 12.x, and PTX that the driver compiles for what
# comes later. It is PTX of 9.0, because code for 8.x does not wait for the kernel before it, which newer GPUs may let
# overlap.
EVERY = ("sm_80", "sm_87", "sm_90", "sm_100", "sm_120", "compute_90")
OPTIONS = ("--std=c++17", "--ptxas-options=-v")
TARGETS = {
    "deep": HOPPER, "hopper_attention": HOPPER, "hopper_chain": HOPPER, "hopper_conv": HOPPER, "picture_conv": EVERY,
}  # fmt: skip
REQUIREMENTS = (HERE / "requirements.txt").read_bytes()


def machine_code(name: str, target: str, folder: Path = MACHINE_CODE) -> Path:
    """Where the machine code of a source for one target lies."""
    return folder / f"{name}.{target}.{'ptx' if target.startswith('compute_') else 'cubin'}"


def source_hash(name: str) -> str:
    """SHA-256 of a source, the headers beside it that it needs, and the compiler and its options, in hex."""
    texts: dict[str, bytes] = {}
    needed = [f"{name}.cu"]
    while needed:
        file = needed.pop(0)
        if file not in texts:
            texts[file] = (HERE / file).read_bytes()
            needed += re.findall(r'^#include "([^"]+)"', texts[file].decode(), re.M)
    parts = texts.values()
    options = repr((OPTIONS, TARGETS[name])).encode()
    return hashlib.sha256(b"".join([*parts, options, REQUIREMENTS])).hexdigest()


def build(name: str, target: str, folder: Path) -> str:
    """Compile one source for one target into a folder; return the compiler's messages (registers, spills).

    Raises:
        RuntimeError: it does not compile, or registers spill.
    """
    import nvidia.cuda_runtime
    from cuda.bindings import nvrtc

    def call(function: str, *arguments: Any) -> Any:
        error, *values = getattr(nvrtc, function)(*arguments)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{function}: {error.name}")
        return values[0] if values else None

    def result(what: str) -> bytes:
        found = bytearray(call(f"nvrtcGet{what}Size", program))
        call(f"nvrtcGet{what}", program, found)
        return bytes(found)

    (headers,) = (Path(path) / "include" for path in nvidia.cuda_runtime.__path__)
    options = [
        f"--gpu-architecture={target}",
        *OPTIONS,
        f"--define-macro=LGNET_SOURCE={source_hash(name)}",
        *(f"--include-path={place}" for place in (HERE, headers)),
    ]
    source = HERE / f"{name}.cu"
    program = call("nvrtcCreateProgram", source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
    except RuntimeError as error:
        raise RuntimeError(f"{name} for {target}: {error}\n{result('ProgramLog').decode()}") from None
    said = result("ProgramLog").decode().rstrip("\0")
    if spilt := {int(count) for count in re.findall(r"(\d+) bytes spill", said)} - {0}:
        raise RuntimeError(f"{name} for {target}: registers spill to {max(spilt)} bytes of local memory\n{said}")
    folder.mkdir(parents=True, exist_ok=True)
    path = machine_code(name, target, folder)
    path.write_bytes(result(path.suffix[1:].upper()))
    return said


def main() -> None:
    """Compile the sources and print the compiler's messages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--output", type=Path, default=MACHINE_CODE)
    args = parser.parse_args()
    for name in args.names:
        for target in TARGETS[name]:
            print(f"{name} for {target}\n{build(name, target, args.output)}", file=sys.stderr)


if __name__ == "__main__":
    main()
