"""`make test-machines`: the numerical tests on emulated other machines.

PyTorch's kernels and ours depend on the instruction sets of the processor and on the number of threads. Each row of
the table is one machine, emulated by environment variables, with the test files that depend on its settings. Rows are
not a product of all settings: each setting appears where it can show an error. Prints a line per row; the exit code
is 1 if a row failed. Instruction sets that this processor lacks are skipped.
Rows of one thread have one test process per core. `python tests/run_machines.py NAME ...` runs the rows whose names
contain one of NAME.

Tests that do not depend on the processor (processes, memory, files) are marked `once` and run in the first row only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lgnet_fast import native

ROOT = Path(__file__).resolve().parent.parent
# Plain PyTorch against stored vectors and against itself; then our kernels against plain PyTorch.
REFERENCE = (
    "conformance",
    "discriminator",
    "models",
    *(f"peers_{n}" for n in ("gconv", "madf", "medfe", "pen", "rfr")),
)
OPERATORS = ("ops", "cpp_kernels", "cpp_merge", "cpp_threads")
KERNELS = (
    *OPERATORS,
    "engine_cpu",
    *(f"engine_cpu_{n}" for n in ("attention", "bf16", "regions")),
    "engine",
    *(f"engine_{n}" for n in ("costs", "saved", "structure")),
    "model_executor",
    "operator_executor",
)
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
ISA, POOL = "LGNET_FAST_TEST_ISA", "LGNET_FAST_TEST_POOL"  # read by conftest.py

ONE = {"OMP_NUM_THREADS": "1"}

# name: (environment, files)
ROWS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "as is": ({}, REFERENCE + KERNELS),
    "1 thread": (ONE, REFERENCE + KERNELS),
    "4 threads": ({"OMP_NUM_THREADS": "4"}, KERNELS),
    "4 threads, no OpenMP": ({"OMP_NUM_THREADS": "4", POOL: "1"}, (*OPERATORS, "engine_cpu", "engine_cpu_regions")),
    "PyTorch AVX2, 1 thread": (AVX2 | ONE, REFERENCE + KERNELS),
    # Whole engines under several threads and under AVX2 are in the rows above.
    "PyTorch AVX2, 2 threads": (AVX2 | {"OMP_NUM_THREADS": "2"}, REFERENCE + OPERATORS),
    "PyTorch SSE4": (SSE | ONE, REFERENCE + KERNELS),
    "kernels portable": ({ISA: "portable"} | ONE, KERNELS),
    "kernels AVX2": ({ISA: "avx2"} | ONE, KERNELS),
    "kernels AVX-512": ({ISA: "avx512"} | ONE, KERNELS),
}
FIRST = next(iter(ROWS))
MARKS = "not gpu and not slow and not page"
# All rows together take about half an hour on two quiet cores.
SECONDS_PER_ROW = 900


def _processes(environment: dict[str, str]) -> int:
    """Test processes that have the cores to themselves with this row's threads; at most 4, for their memory."""
    threads = environment.get("OMP_NUM_THREADS")
    return 1 if threads is None else max(1, min(4, (os.cpu_count() or 1) // int(threads)))


def run(environment: dict[str, str], files: tuple[str, ...], marks: str) -> tuple[str, str]:
    """Outcome ("pass" or "FAIL") and pytest's last line or the end of its output."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", marks]
    command += [f"tests/test_{name}.py" for name in files]
    processes = _processes(environment)
    if processes > 1:
        command += ["-n", str(processes), "--dist", "loadfile"]
    try:
        # torch.compile keeps graphs with their vectors' width, but not under it.
        with tempfile.TemporaryDirectory() as graphs:
            own = os.environ | environment | {"TORCHINDUCTOR_CACHE_DIR": graphs}
            done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=SECONDS_PER_ROW)
    except subprocess.TimeoutExpired:
        return "FAIL", f"not done after {SECONDS_PER_ROW} s"
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode == 0 and re.search(r"\d+ passed", lines[-1]):
        return "pass", lines[-1]
    return "FAIL", (done.stdout + done.stderr)[-8000:]


def main(names: list[str]) -> int:
    rows = {row: what for row, what in ROWS.items() if not names or any(name in row for name in names)}
    if not rows:
        print(f"no row of {list(ROWS)} contains one of {names}", file=sys.stderr)
        return 2
    here, failed = native.library().isa_available(), 0
    for row, (environment, files) in rows.items():
        if environment.get(ISA, here[0]) not in here:
            print(f"skip  {row:24}        this processor has {', '.join(here)}", flush=True)
            continue
        start = time.perf_counter()
        outcome, text = run(environment, files, MARKS + ("" if row == FIRST else " and not once"))
        failed += outcome == "FAIL"
        print(f"{outcome}  {row:24} {time.perf_counter() - start:5.0f} s  {text}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
