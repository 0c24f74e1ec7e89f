"""Compiles the kernels of every GPU without having it, and fails on kernels that could not run or would be slow.

    python bench/aot_report.py [--card H100] [--model lgnet] [--dtype float16] [--batch 1] [--processes 2]
                               [--triton 3.6.0] [--all]

The launches of the engine (dense, restricted) and of the operators are recorded for each card of kernels/cards.py and
compiled by two versions of Triton: the lowest supported one and the newest. Both are installed in folders under
.cache/aot. Compiled kernels stay there, so that an interrupted run can be continued. One line is printed for each
kernel with a violation (--all: for every kernel):

* more shared or tensor memory than the GPU has,
* matrix products that wait for each other (as many waits as products),
* in 16 bit: spills, local memory, loops that load or store values one by one,
* errors of the compiler.

Exit code 1 where there is any. float32 may spill: its products run without tensor cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lgnet_fast.kernels import LOWEST_TRITON

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "aot"
TRITONS = (".".join(map(str, (*LOWEST_TRITON, 0))), "newest")


def environment(version: str) -> dict[str, str]:
    """Environment variables with which Python finds this version of Triton first; installs it once."""
    folder = CACHE / f"triton-{version}"
    if not (folder / "triton").is_dir():
        wanted = ["--upgrade", "triton"] if version == "newest" else [f"triton=={version}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *wanted], check=True)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(CACHE / "kernels"), "OMP_NUM_THREADS": "1"}


def compile_here(arguments: argparse.Namespace) -> int:
    """Compile with the Triton of this process, print, and return the number of violations."""
    import lgnet_fast.kernels.aot as aot
    import triton
    from lgnet_fast.kernels.cards import CARDS

    begin = time.monotonic()
    cases = [
        case
        for name in arguments.card or CARDS
        for case in aot.card_cases(
            CARDS[name],
            arguments.dtype or tuple(aot.DTYPES),
            arguments.model or aot.MODELS,
            arguments.batch or (1, 16),
        )
    ]
    jobs = aot.jobs(cases)
    print(f"triton {triton.__version__}: {len(cases)} cases, {len(jobs)} kernels", flush=True)
    row = "{:<12} {:<9} {:<22} {:<44} {:<60} {:>7} {:>5} {:>6} {:>5}  {}".format
    print(row("card", "dtype", "kernel", "first launch", "config", "shared", "regs", "stack", "wgmma", ""))
    broken = 0
    for report in aot.compile_all(jobs, arguments.processes):
        violations = "; ".join(report.violations())
        broken += bool(violations)
        if violations or arguments.all:
            job = report.job
            numbers = report.shared, report.registers, report.stack, report.code.wgmma
            print(row(job.card.name, job.dtype, job.kernel, job.label, job.config, *numbers, violations), flush=True)
    seconds = time.monotonic() - begin
    print(f"triton {triton.__version__}: {len(jobs)} kernels, {broken} with violations, {seconds:.0f} s")
    return broken


def main(arguments: Sequence[str]) -> int:
    """Print the tables; return the exit code."""
    from lgnet_fast.kernels.cards import CARDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="append", choices=tuple(CARDS), help="default: all")
    parser.add_argument("--model", action="append", help="default: all sizes")
    parser.add_argument("--dtype", action="append", choices=("float16", "bfloat16", "float32", "tf32"))
    parser.add_argument("--batch", action="append", type=int, help="default: 1 and 16")
    parser.add_argument("--triton", action="append", metavar="VERSION", help='default: the lowest and "newest"')
    parser.add_argument("--here", action="store_true", help="with the Triton that is installed")
    parser.add_argument("--all", action="store_true", help="print every kernel")
    parser.add_argument("--processes", type=int, help="default: one a core")
    parsed = parser.parse_args(arguments)
    if parsed.here:
        return 1 if compile_here(parsed) else 0
    command = [sys.executable, __file__, "--here", *arguments]
    return max(
        subprocess.run(command, env=environment(version), check=False).returncode
        for version in parsed.triton or TRITONS
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
