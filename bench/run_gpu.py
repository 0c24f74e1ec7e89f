"""`make gpu`: build in place, run the tests marked `gpu`, then the benches; JSON to bench/results/<GPU>_<bench>.json.

A GPU that has results there is compared with them, and getting slower fails; another's are stored.

Uses the Python it is run with, and no network. Without an NVIDIA GPU it says so and exits 0.
"""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The whole run fits in eight minutes; what does not is cut off, and the rest still runs.
SECONDS = {
    "build": 70,
    "tests": 130,
    "bench_inference": 80,
    "bench_attention": 70,
    "bench_training": 50,
    "bench_table4": 40,
    "bench_pipeline": 25,
    "bench_merge_concat": 15,
}


def run(name: str, *command: str) -> bool:
    """Run `command` from the repository root within its share of the time; whether it succeeded."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=SECONDS[name]).returncode
    except subprocess.TimeoutExpired:
        code = f"cut off after {SECONDS[name]} s"
    print(f"== {name}: exit status {code}, {time.perf_counter() - start:.0f} s", flush=True)
    return code == 0


def main() -> int:
    if find_spec("torch") is None or find_spec("triton") is None:
        print(f"{sys.executable} has no PyTorch or no Triton: nothing to run. Try make gpu PYTHON=python3")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing to run.")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    python = sys.executable
    pip = (python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    if not run("build", *pip, "-e", "."):
        return 1
    fine = run("tests", python, "-m", "pytest", "-m", "gpu", "tests", "-q", "--maxfail=20")
    for bench in (name for name in SECONDS if name.startswith("bench_")):
        fine &= run(bench, python, "-m", "pytest", f"bench/{bench}.py", "-m", "gpu", "-q", "-s", *sys.argv[1:])
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
