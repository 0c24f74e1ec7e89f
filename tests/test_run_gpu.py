"""Order and time shares of `make gpu`, its log, which is on disk even if the run is killed, and its tables."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lgnet_fast.kernels.tuned import Block, Measured, Training

from bench import bench_cores, gpu_contact, run_gpu, tune_attention
from lgnet_fast.engine.cpu.executor import CpuExecutor

LOGGING = """
import sys, time
from pathlib import Path
from bench.gpu_contact import Log
log = Log(Path(sys.argv[1]))
for number in range(3):
    log("steps", step=f"step {number}", us=1.5 * number)
print("measured", flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "contact.jsonl"
    command = [sys.executable, "-c", LOGGING, str(file)]
    with subprocess.Popen(command, cwd=run_gpu.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "measured" not in process.stdout.readline():
            pass
        process.kill()
    figures = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(f["section"], f["step"], f["us"]) for f in figures] == [
        ("steps", f"step {number}", 1.5 * number) for number in range(3)
    ]


FAILING = """
import time
from pathlib import Path

def test_a():
    assert 6 * 9 == 42

def test_b():
    Path(__file__).with_name("began").touch()
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="`make gpu` is for Linux")
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_failures_are_on_disk_before_the_run_ends(tmp_path: Path, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(FAILING)
    (tests,) = (command for name, _, command in run_gpu.parts(tmp_path / "new", 8.0) if name == "tests")
    own = tests[tests.index("-p") : tests.index("-p") + 4] + [part for part in tests if part.startswith("--junit")]
    assert own[1:3] == ["bench.failures", "--failures"]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, str(tmp_path / "test_some.py"), *own, *workers]
    file = tmp_path / "new" / "gpu_failures.jsonl"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        process = run_gpu.spawn(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        shown = ""
        while "assert (6 * 9) == 42" not in shown:  # as it comes
            line = process.stdout.readline()
            assert line, shown
            shown += line
        (failure,) = [json.loads(line) for line in file.read_text().splitlines()]
        while not (tmp_path / "began").exists():  # within a report pytest does not expect to be interrupted
            assert process.poll() is None
            time.sleep(0.01)
        run_gpu.end(process)
    assert failure["test"].endswith("::test_a")
    assert failure["when"] == "call"
    assert "assert (6 * 9) == 42" in failure["text"]
    if not workers:  # others are waited for, and take longer than `end` waits
        assert 'name="test_a"' in (tmp_path / "new" / "gpu_tests.xml").read_text()


BENCHES = """
import os, signal

def test_first(benchmark):
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(times_slower_than_ours={"eager": 2.0}, device="cpu", ours="ours")

def test_second(benchmark):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="`make gpu` is for Linux")
def test_a_bench_is_on_disk_when_it_ends(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "conftest.py").write_text("from bench.conftest import *\n")
    (tmp_path / "bench_some.py").write_text(BENCHES)
    (command,) = (
        command for name, _, command in run_gpu.parts(tmp_path / "results", 8.0) if name == "bench_training"
    )
    stored = command[command.index("--bench-results") :]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, str(tmp_path / "bench_some.py"), *stored]
    environment = {name: value for name, value in os.environ.items() if name != "LGNET_BENCH_SMOKE"}
    done = subprocess.run(command, cwd=run_gpu.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    (file,) = (tmp_path / "results" / "run").iterdir()
    assert file.name.endswith("_some.json")
    assert json.loads(file.read_text())["benches"]["test_first"]["times_slower_than_ours"] == {"eager": 2.0}


@pytest.mark.parametrize("minutes", [4.0, 8.0])
def test_parts_fit_the_minutes_and_correctness_comes_first(tmp_path: Path, minutes: float) -> None:
    parts = run_gpu.parts(tmp_path, minutes)
    first = ["build", "contact", "tests", "tuning"]
    assert [name for name, *_ in parts] == [*first, *run_gpu.BENCHES, "extension", "cores", "bench_inference"]
    assert sum(seconds for _, seconds, _ in parts) == pytest.approx(60 * minutes)
    for name, _, command in parts:
        assert (str(tmp_path) in " ".join(command)) == (name not in ("build", "extension")), name


def test_only_files_with_tests_for_gpus_are_collected(tmp_path: Path) -> None:
    """Others import what a machine with a GPU may not have."""
    (command,) = (command for name, _, command in run_gpu.parts(tmp_path, 8.0) if name == "tests")
    files = {part for part in command if part.startswith("tests")}
    assert {"tests/test_engine_cuda.py", "tests/test_kernels_gpu.py", "tests/test_training_graphed.py"} <= files
    assert not {"tests", "tests/test_cli.py", "tests/test_serve_api.py"} & files


def test_the_cpus_threads_are_1_2_4_8_and_16_on_a_machine_that_has_them() -> None:
    pytest.importorskip("pytest_benchmark")
    assert bench_cores.thread_counts(16) == [1, 2, 4, 8, 16]
    assert bench_cores.thread_counts(12) == [1, 2, 4, 8, 12]


@pytest.mark.slow(reason="a bench in a process of its own")
def test_the_cpus_threads_are_timed_beside_openvino(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    if (reason := CpuExecutor.unavailable_reason()) is not None:
        pytest.skip(reason)
    (command,) = (command for name, _, command in run_gpu.parts(tmp_path, 8.0) if name == "cores")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "LGNET_BENCH_SMOKE": "1"}
    done = subprocess.run(command, cwd=run_gpu.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "1 skipped" in done.stdout:
        pytest.skip("one processor is all there is")
    (file,) = (tmp_path / "run").iterdir()
    figures = json.loads(file.read_text())["benches"]["test_threads"]
    assert list(figures["speed_up"]) == ["1", "2"]
    others = {"openvino_1_threads", "openvino_2_threads"} if find_spec("openvino") and find_spec("onnx") else set()
    assert set(figures["least_ms"]) == {"ours", "ours_1_threads"} | others
    assert list(figures.get("speed_up_of_openvino", {})) == (["1", "2"] if others else [])


@pytest.mark.skipif(sys.platform == "win32", reason="`make gpu` is for Linux")
def test_a_part_that_hangs_is_cut_off_and_one_that_fails_is_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    assert not run_gpu.run("hangs", 0.5, [sys.executable, "-c", "import time; time.sleep(60)"])
    assert not run_gpu.run("fails", 60, [sys.executable, "-c", "raise SystemExit(3)"])
    assert run_gpu.run("works", 60, [sys.executable, "-c", "pass"])
    text = capfd.readouterr().out
    assert "hangs: exit status cut off after 0 s" in text
    assert "fails: exit status 3" in text


def test_a_part_gets_what_the_parts_before_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, limits = 0.0, []
    takes = {"short": 2.0, "long": 50.0, "last": 1.0}

    def run(name: str, seconds: float, command: list[str]) -> bool:
        nonlocal now
        limits.append(seconds)
        now += min(takes[name], seconds + 5)  # it has 5 s to end in
        return name != "long"

    monkeypatch.setattr(run_gpu, "run", run)
    monkeypatch.setattr(run_gpu.time, "perf_counter", lambda: now)
    assert not run_gpu.run_all([("short", 10.0, []), ("long", 20.0, []), ("last", 30.0, [])])
    assert limits == [10.0, 28.0, 30.0]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `measure` did, in order, in place of measuring it."""
    pytest.importorskip("triton")
    done: list[str] = []
    gpu = SimpleNamespace(name="A GPU", multi_processor_count=100, major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_contact, "model_and_plan", lambda model, batch: (model, f"plan {batch}"))
    monkeypatch.setattr("lgnet_fast.engine.cuda.executor.CudaExecutor.of", lambda *_, **__: None)
    monkeypatch.setattr(gpu_contact, "compile_dense", lambda *_: done.append("compile"))
    monkeypatch.setattr(gpu_contact, "check_buffers", lambda *_: done.append("buffers"))
    monkeypatch.setattr(gpu_contact, "time_graph", lambda *args: done.append(f"graph {args[-1]}"))
    monkeypatch.setattr("lgnet_fast.engine.cuda.first_use.at_first_use", lambda *_: "first use")
    monkeypatch.setattr(gpu_contact, "time_steps", lambda *args: done.append(f"steps {named(args[2])}"))
    monkeypatch.setattr(gpu_contact, "time_holes", lambda *args: done.append(f"holes {named(args[2])}"))
    monkeypatch.setattr(gpu_contact, "time_calls", lambda *_: done.append("calls"))
    monkeypatch.setattr(gpu_contact, "peers", lambda *_: done.append("peers"))
    monkeypatch.setattr("lgnet_fast.engine.cuda.tuning_attention.tune_attention", lambda *_: done.append("attention"))
    convolutions = "lgnet_fast.engine.cuda.tuning_convolutions"
    monkeypatch.setattr(f"{convolutions}.Contest", lambda *_: SimpleNamespace(candidates=print))
    monkeypatch.setattr(
        f"{convolutions}.tune_convolutions", lambda *args: done.append(f"convs {args[-2].keywords['tried']}")
    )
    return done


def named(tuned: Any) -> str:
    """Which choices a section was given: those of the first use, or those that were measured."""
    return tuned if isinstance(tuned, str) else "tuned"


def measured(results: Path, sections: str) -> tuple[int, list[dict[str, Any]]]:
    """The number of sections that failed, and the lines of the log."""
    options = {"model": "lgnet", "dtype": "float16", "batch": 4, "minutes": 1.0, "tried": 7}
    failed = gpu_contact.measure(argparse.Namespace(results=results, sections=sections, **options))
    lines = (results / "contact_lgnet_float16_b4.jsonl").read_text().splitlines()
    return failed, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            "compile,buffers,graph,steps,holes,calls,peers",
            [
                "compile",
                "buffers",
                "graph shipped",
                "graph first use",
                "steps first use",
                "holes first use",
                "calls",
                "peers",
            ],
        ),
        ("peers,convs", ["convs 7", "graph tuned", "steps tuned", "peers"]),
        ("attention", ["attention"]),
        ("attention,convs", ["attention", "convs 7", "graph tuned", "steps tuned"]),
    ],
)
def test_contact_measures_the_sections_in_a_fixed_order(
    tmp_path: Path, done: list[str], sections: str, expected: list[str]
) -> None:
    failed, (machine,) = measured(tmp_path, sections)
    assert (failed, done) == (0, expected)
    assert (machine["section"], machine["device"], machine["multiprocessors"]) == ("machine", "A GPU", 100)


def test_a_section_that_fails_is_noted_and_the_next_one_runs(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("a capture failed")

    monkeypatch.setattr(gpu_contact, "time_steps", fails)
    failed, (_, line) = measured(tmp_path, "graph,steps,holes")
    assert (failed, done) == (1, ["graph shipped", "graph first use", "holes first use"])
    assert (line["section"], line["failed"]) == ("steps", "RuntimeError: a capture failed")


def test_a_form_of_the_forward_that_cannot_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_form(plan: str, dtype: str, tuned: str, overlap: str, first: list[Any], log: Any) -> None:
        if overlap == "spread":
            raise RuntimeError("cuGraphKernelNodeSetParams_v2: invalid argument (1)")
        log(overlap=overlap)

    monkeypatch.setattr(gpu_contact, "time_form", time_form)
    gpu_contact.time_graph("plan", "dtype", "tuned", gpu_contact.Log(tmp_path / "log"), "shipped")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["overlap"], line["label"]) for line in lines] == [
        (overlap, "shipped") for overlap in ("none", "plain", "spread", "operators")
    ]
    assert ["invalid argument" in line.get("error", "") for line in lines] == [False, False, True, False]


def test_calls_are_timed_until_they_return_and_until_the_result_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, masks = [0.0], []

    def wait() -> None:
        clock[0] += 5e-4

    def engine(image: torch.Tensor, mask: torch.Tensor) -> None:
        clock[0] += 1e-4
        masks.append(int(mask.sum()))

    monkeypatch.setattr(
        gpu_contact, "picture", lambda batch: (torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256))
    )
    monkeypatch.setattr(gpu_contact.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr("lgnet_fast.optimize", lambda *_, **__: engine)
    plan = SimpleNamespace(batch=1, height=256, width=256)
    gpu_contact.time_calls(None, plan, torch.float16, gpu_contact.Log(tmp_path / "calls.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [line["side"] for line in lines] == [64, 128, None]
    assert list(dict.fromkeys(masks)) == [64**2, 128**2, 256**2]
    for line in lines:
        assert line["returns_us"] == pytest.approx(100, abs=0.2)
        assert line["ends_us"] == pytest.approx(600, abs=0.2)


def test_rows_of_attention_tables_hold_by_positions_and_the_last_for_all_smaller_batches() -> None:
    def trained(batch: int, **shapes: tuple[int, int, int, int]) -> Training:
        operations = {op: Measured(shape, 1.0, shape, 1.0) for op, shape in shapes.items()}
        return Training(Block("half", "released", 64, 1024, batch), operations)

    large, small = (128, 64, 8, 3), (64, 32, 4, 2)
    results = [trained(16, forward=large, rows=large), trained(1, forward=small)]
    assert tune_attention.rows_of(results, 32) == {
        "forward": ((4096, large), (0, small)),
        "rows": ((0, large),),
    }


@pytest.mark.parametrize(
    ("script", "known"), [("gpu", "compile, buffers,"), ("deep", "load, "), ("hopper", "known, ")]
)
def test_an_unknown_section_is_refused(tmp_path: Path, script: str, known: str) -> None:
    """Also where there is no GPU; it would measure nothing, and pass."""
    command = [sys.executable, f"bench/{script}_contact.py", str(tmp_path), "--sections", "clocks,step"]
    environment = {**os.environ, "PYTHONPATH": str(run_gpu.ROOT)}
    done = subprocess.run(command, cwd=run_gpu.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: argument --sections: expected names of {known}" in done.stderr
