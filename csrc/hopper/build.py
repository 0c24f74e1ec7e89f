"""Compile csrc/hopper/conv.cu to kernels/hopper_conv.cubin, which the package ships; needs nvcc 12.8 or newer.

    python csrc/hopper/build.py [--nvcc nvcc] [--output kernels/hopper_conv.cubin]

The machine code carries the hash of its sources, so that tests notice when it is not theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUBIN = HERE.parents[1] / "kernels" / "hopper_conv.cubin"


def source_hash() -> str:
    """SHA-256 of the sources, as 64 hexadecimal digits."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in ("conv.cu", "wgmma.cuh"))).hexdigest()


def build(output: Path, nvcc: str = "nvcc") -> str:
    """Compile; what nvcc and ptxas say about it (registers, spills).

    Raises:
        subprocess.CalledProcessError: it does not compile; `stderr` says why.
    """
    target = ["-cubin", "-gencode=arch=compute_90a,code=sm_90a"]
    options = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-DLGNET_SOURCE={source_hash()}"]
    command = [nvcc, *target, *options, "-o", str(output), str(HERE / "conv.cu")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> int:
    """Compile and print what the compiler says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--output", type=Path, default=CUBIN)
    args = parser.parse_args()
    try:
        print(build(args.output, args.nvcc), file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
