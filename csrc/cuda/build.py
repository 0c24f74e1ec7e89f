"""Compile every csrc/cuda/*.cu to kernels/*.cubin, which the package ships; needs nvcc 12.8 or newer.

    python csrc/cuda/build.py [--nvcc nvcc] [--output kernels] [NAME ...]

Each cubin contains the hash of its sources, so that a test can detect one that was not built from them.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUBINS = HERE.parents[1] / "kernels"
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.cu")))


def source_hash(name: str) -> str:
    """SHA-256 of a source and of the headers beside it that it includes, as 64 hexadecimal digits."""
    text = (HERE / f"{name}.cu").read_bytes()
    headers = re.findall(rb'^#include "([^"]+)"', text, re.M)
    return hashlib.sha256(
        b"".join([text, *((HERE / header.decode()).read_bytes() for header in headers)])
    ).hexdigest()


def build(name: str, output: Path, nvcc: str = "nvcc") -> str:
    """Compile one source; return the messages of nvcc and ptxas (registers, spills).

    Raises:
        subprocess.CalledProcessError: it does not compile; `stderr` holds the errors.
    """
    target = ["-cubin", "-gencode=arch=compute_90a,code=sm_90a"]
    options = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-DLGNET_SOURCE={source_hash(name)}"]
    command = [nvcc, *target, *options, "-o", str(output), str(HERE / f"{name}.cu")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> int:
    """Compile the sources and print the compiler's messages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--output", type=Path, default=CUBINS)
    args = parser.parse_args()
    for name in args.names:
        try:
            print(build(name, args.output / f"{name}.cubin", args.nvcc), file=sys.stderr)
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
