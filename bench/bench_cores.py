"""The engine on more cores: more threads in one process, and processes of one thread beside each other.

`make gpu` runs the first too, because machines with GPUs have many cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.bench_inference import MODELS, inputs, model_of
from bench.inference_peers import onnx_file, openvino
from bench.timing import ROOT
from lgnet_fast import LGNet, forks, optimize
from lgnet_fast.engine.cpu.executor import CpuExecutor

CHILD = f"""
import sys
import torch
from bench.bench_inference import inputs, model_of
from lgnet_fast import optimize

run, pair = optimize(model_of("{MODELS[0]}"), dtype="float32", hole_aware=False), inputs(128)
for line in sys.stdin:
    print(float(run(*pair).sum()), flush=True)
"""


@pytest.fixture
def device() -> str:
    return "cpu"


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return sorted({most, *(2**i for i in range(most.bit_length()))})


def rivals(model: LGNet, image: Tensor, mask: Tensor, counts: Iterable[int]) -> dict[str, Callable[[], Tensor]]:
    """OpenVINO on each number of threads, where it and the package that exports are installed."""
    if not (find_spec("openvino") and find_spec("onnx")):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        file = onnx_file(model, image, mask, Path(folder))
        return {f"openvino_{count}_threads": partial(openvino(file, "f32", count), image, mask) for count in counts}


def test_threads(compete: Any, benchmark: Any) -> None:
    """1, 2, 4, ... threads up to all; `times_slower_than_ours` of one thread is the speed-up of all of them."""
    if (reason := CpuExecutor.unavailable_reason()) is not None:
        pytest.skip(reason)
    most = forks.kernel_threads()
    if most == 1:
        pytest.skip("one thread is all there is")
    counts = thread_counts(most)
    image, mask = inputs(128)
    model = model_of(MODELS[0])
    running: dict[str, Callable[[], Any]] = {}
    try:
        for count in counts:
            torch.set_num_threads(count)
            engine = optimize(model, dtype=torch.float32, hole_aware=False)

            def run(engine: Any = engine, count: int = count) -> Any:
                torch.set_num_threads(count)
                return engine(image, mask)

            running["ours" if count == most else f"ours_{count}_threads"] = run
        running |= rivals(model, image, mask, counts)
        results = [run() for run in running.values()]
        assert all((result - results[0]).abs().max() < 1e-3 for result in results)
        summary = compete(running, "ours", rounds=8)
    finally:
        torch.set_num_threads(most)
    least = summary["least_ms"]
    benchmark.extra_info["speed_up"] = {
        count: round(least["ours_1_threads"] / least["ours" if count == most else f"ours_{count}_threads"], 3)
        for count in counts
    }
    if "openvino_1_threads" in least:
        benchmark.extra_info["speed_up_of_openvino"] = {
            count: round(least["openvino_1_threads"] / least[f"openvino_{count}_threads"], 3) for count in counts
        }
    print(summary, benchmark.extra_info["speed_up"])


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """One process of one thread per core; each runs the network once for every line on its input."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    made = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(min(forks.kernel_threads(), 8))
    ]
    yield made
    for child in made:
        child.communicate()
        assert child.returncode == 0


def test_processes(children: list[subprocess.Popen[str]], compete: Any, benchmark: Any) -> None:
    """How much longer a process takes when all run at once than when it runs alone."""

    def run(some: list[subprocess.Popen[str]]) -> list[float]:
        for child in some:
            assert child.stdin is not None
            print(file=child.stdin, flush=True)
        return [float(child.stdout.readline()) for child in some if child.stdout is not None]

    assert len(set(run(children))) == 1  # loads the networks; all processes compute the same bits
    summary = compete({"ours": lambda: run(children[:1]), "ours_together": lambda: run(children)}, "ours", rounds=8)
    together = summary["least_ms"]["ours_together"]
    benchmark.extra_info["of_one_alone"] = round(summary["least_ms"]["ours"] / together, 3)
    benchmark.extra_info["processes"] = len(children)
    print(summary, benchmark.extra_info["of_one_alone"])
