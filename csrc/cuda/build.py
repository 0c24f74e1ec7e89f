"""Compile every csrc/cuda/*.cu to machine code in kernels/, which the package ships; needs nvcc 12.8 or newer.

    python csrc/cuda/build.py [--nvcc nvcc] [--output kernels] [NAME ...]

Sources for Hopper become a .cubin, those for several generations of GPUs a .fatbin. Each contains the hash of its
sources, so that a test can detect one that was not built from them.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.cu")))
HOPPER = ("-cubin", "-gencode=arch=compute_90a,code=sm_90a")
# Desktop and server GPUs of 8.x, 9.0, 10.x and 12.x, and PTX that the driver compiles for what comes later. It is PTX
# of 9.0, because code for 8.x does not wait for the kernel before it, which newer GPUs may let overlap.
EVERY = (
    "-fatbin",
    *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100, 120)),
    "-gencode=arch=compute_90,code=compute_90",
)
TARGETS = {"deep": HOPPER, "hopper_conv": HOPPER, "picture_conv": EVERY}


def machine_code(name: str, folder: Path = KERNELS) -> Path:
    """Where the machine code of a source lies."""
    return folder / f"{name}.{TARGETS[name][0].lstrip('-')}"


def source_hash(name: str) -> str:
    """SHA-256 of a source and of the headers beside it that it includes, as 64 hexadecimal digits."""
    text = (HERE / f"{name}.cu").read_bytes()
    headers = re.findall(rb'^#include "([^"]+)"', text, re.M)
    return hashlib.sha256(
        b"".join([text, *((HERE / header.decode()).read_bytes() for header in headers)])
    ).hexdigest()


def build(name: str, folder: Path, nvcc: str = "nvcc") -> str:
    """Compile one source into a folder; return the messages of nvcc and ptxas (registers, spills).

    Raises:
        subprocess.CalledProcessError: it does not compile; `stderr` holds the errors.
    """
    options = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-DLGNET_SOURCE={source_hash(name)}"]
    command = [nvcc, *TARGETS[name], *options, "-o", str(machine_code(name, folder)), str(HERE / f"{name}.cu")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> int:
    """Compile the sources and print the compiler's messages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--output", type=Path, default=KERNELS)
    args = parser.parse_args()
    for name in args.names:
        try:
            print(build(name, args.output, args.nvcc), file=sys.stderr)
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
