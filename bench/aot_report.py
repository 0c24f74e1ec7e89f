"""Compiles every Triton configuration for GPUs that need not be here, and prints what each cubin uses.

    python bench/aot_report.py [--target sm_90] [--channels 128] [--dtype float16] [--processes 2]

Exit code 1 where a kernel does not compile, needs more shared or tensor memory than its GPU generation has, or spills
registers in 16 bit. float32 may spill: its products run without tensor cores, and the table says so.
"""

from __future__ import annotations

import argparse
import functools
import sys

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
WORKS = (
    ("float16", "released", 1),
    ("float16", "released", 16),
    ("float16", "paper", 16),
    ("bfloat16", "released", 16),
    ("float32", "released", 16),
    ("float32", "paper", 16),
    ("tf32", "released", 16),
)


def main() -> int:
    """Print the table; return the exit code."""
    from lgnet_fast.kernels import aot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--channels", type=int, choices=tuple(aot.NETWORK_SHAPES), action="append")
    parser.add_argument("--dtype", choices=tuple(aot.DTYPES), action="append")
    parser.add_argument("--processes", type=int)
    args = parser.parse_args()
    works = tuple(work for work in WORKS if args.dtype is None or work[0] in args.dtype)
    cases = functools.partial(
        aot.network_cases, args.target or TARGETS, works, args.channels or tuple(aot.NETWORK_SHAPES)
    )
    row = "{:<24} {:<7} {:<9} {:>4}  {:<26} {:<44} {:>7} {:>7} {:>5} {:>6} {:>5}  {}".format
    print(row("kernel", "target", "dtype", "C", "case", "config", "shared", "limit", "regs", "spills", "tmem", ""))
    violations = count = 0
    for report in aot.compile_all(cases, args.processes):
        count += 1
        violation = report.violation()
        violations += violation is not None
        print(
            row(
                report.kernel,
                report.target,
                report.dtype,
                report.channels,
                report.label,
                report.config,
                report.shared,
                aot.SHARED_MEMORY_LIMIT[report.target],
                report.registers,
                report.spill_bytes,
                report.tensor_memory,
                f"VIOLATION: {violation}" if violation else "",
            ),
            flush=True,
        )
    print(f"{count} kernels, {violations} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
