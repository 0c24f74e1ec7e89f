"""`make gpu RESULTS=dir MINUTES=8`: checks and benchmarks on this machine's NVIDIA GPU, the most informative first.

=========  =================================================================================================
build      in place, without the C++ extension, which GPUs do not need
contact    every step of the engine against float32, the graph and each step timed (bench/gpu_contact.py)
tests      those marked `gpu`, in parallel where pytest-xdist is installed; failures in RESULTS as they come, then a
           junit file
tuning     tiles of convolutions and attention, then the engine beside eager PyTorch and torch.compile
benches    the benches' GPU cases, ours before the rivals; that with torch.compile, bench_inference, is the last part
extension  the C++ extension, if there is a compiler
cores      the CPU's engine on 1, 2, 4, ... threads, beside OpenVINO where that is installed
=========  =================================================================================================

Each part has a share of MINUTES, and what the parts before have left of theirs; a part that takes longer is stopped,
and the others still run. Figures are written to RESULTS (bench/results by default) at once, those of each bench to
RESULTS/run, so that a killed run keeps its measurements. Uses the current Python and no network. Without an NVIDIA
GPU it prints so and exits 0.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ("bench_attention", "bench_training", "bench_table4", "bench_pipeline", "bench_merge_concat")
LONGEST = "bench_inference"
"""The last bench: its torch.compile takes minutes, and gets what the parts before have left."""
# Of the whole time; the benches share the rest.
SHARES = {"build": 0.06, "contact": 0.17, "tests": 0.25, "tuning": 0.25, "extension": 0.06, "cores": 0.05}
GRACE_S = 5.0
"""Seconds that a part has to end in, once its time is over."""


def parts(results: Path, minutes: float) -> list[tuple[str, float, list[str]]]:
    """(name, seconds it may take, command) in the order in which they run."""
    seconds, python = 60 * minutes, sys.executable
    contact = [python, "bench/gpu_contact.py", str(results)]
    pytest = [python, "-m", "pytest", "-m", "gpu", "-q"]
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") is not None else []
    limit = ["--timeout", "120"] if find_spec("pytest_timeout") is not None else []
    junit = [f"--junitxml={results / 'gpu_tests.xml'}", "--tb=short", "-rf"]
    junit += ["-p", "bench.failures", "--failures", str(results / "gpu_failures.jsonl")]
    stored = ["--bench-results", str(results), "--bench-run", str(results / "run")]
    tuning = SHARES["tuning"] * minutes
    pip = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    # Others need packages that a machine with a GPU may lack, and collecting them takes half a minute.
    files = sorted((ROOT / "tests").glob("test_*.py"))
    tests = [f"tests/{file.name}" for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]
    rest = seconds * (1 - sum(SHARES.values())) / len((*BENCHES, LONGEST))

    def bench(name: str) -> tuple[str, float, list[str]]:
        return name, rest, [*pytest, f"bench/{name}.py", "-s", *stored]

    return [
        ("build", SHARES["build"] * seconds, pip),
        ("contact", SHARES["contact"] * seconds, [*contact, "--sections", "compile,buffers,graph,steps,calls"]),
        ("tests", SHARES["tests"] * seconds, [*pytest, *tests, *workers, *limit, *junit]),
        (
            "tuning",
            SHARES["tuning"] * seconds,
            [*contact, "--sections", "attention,convs,peers", "--minutes", f"{0.6 * tuning:.2f}"],
        ),
        *map(bench, BENCHES),
        ("extension", SHARES["extension"] * seconds, [python, "setup.py", "--quiet", "build_ext", "--inplace"]),
        (
            "cores",
            SHARES["cores"] * seconds,
            [python, "-m", "pytest", "-q", "bench/bench_cores.py::test_threads", "-s", *stored],
        ),
        bench(LONGEST),
    ]


def run(name: str, seconds: float, command: list[str]) -> bool:
    """Run `command` from the repository root for at most `seconds`; whether it succeeded."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "LGNET_FAST_NO_EXTENSION": "" if name == "extension" else "1",
    }
    with spawn(command, env=environment) as process:
        try:
            status = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            end(process)
            status = f"cut off after {seconds:.0f} s"
        except BaseException:
            process.kill()
            raise
    print(f"== {name}: exit status {status}, {time.perf_counter() - start:.0f} s", flush=True)
    return status == "0"


def spawn(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """A process that can be interrupted, also where a shell has started this one in the background.

    Such a shell lets SIGINT be ignored, and processes inherit that.
    """
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=interruptible, **options)


def end(process: subprocess.Popen[Any]) -> None:
    """Interrupt a process, which lets pytest write what it knows, and kill it where it goes on."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


def run_all(planned: Sequence[tuple[str, float, list[str]]]) -> bool:
    """Run every part, also after one that failed; whether all succeeded."""
    succeeded, left = True, 0.0
    for name, seconds, command in planned:
        begin = time.perf_counter()
        succeeded &= run(name, seconds + left, command)
        left = max(0.0, left + seconds - (time.perf_counter() - begin))
    return succeeded


def main() -> int:
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    if find_spec("torch") is None or find_spec("triton") is None:
        print(f"{sys.executable} has no PyTorch or no Triton: nothing to run. Try make gpu PYTHON=python3")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing to run.")
        return 0
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, results in {results}"
    )
    return 0 if run_all(parts(results, args.minutes)) else 1


if __name__ == "__main__":
    sys.exit(main())
