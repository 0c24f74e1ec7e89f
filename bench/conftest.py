"""Shared by all benches: the device, the contest, results by machine class, and the verdict at the end.

pytest bench/                 compares with bench/results, stores new results there; fails if something got slower
pytest bench/ --bench-store   stores all results, with which later runs are then compared
pytest bench/ --bench-full    also benches that take several minutes each
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import regression
from bench.regression import Bench, Change
from bench.timing import LONG_CALL_S, SMOKE, copy_rate, environment, interleave, keep_freed_memory, summarize

_RUN = pytest.StashKey[dict[str, dict[str, Bench]]]()
_CHANGES = pytest.StashKey[list[Change]]()
_NOTES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lgnet_fast", "results by machine class")
    group.addoption(
        "--bench-results",
        metavar="DIR",
        type=Path,
        help="stored results to compare with, and where new ones go (default: bench/results; none in smoke runs)",
    )
    group.addoption(
        "--bench-run", metavar="DIR", type=Path, help="write this run's own results here too, each as it comes"
    )
    group.addoption("--bench-store", action="store_true", help="store this run instead of comparing it")
    group.addoption("--bench-full", action="store_true", help="also the benches that take several minutes each")


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    run: dict[str, dict[str, Bench]] = defaultdict(dict)
    config.stash[_RUN] = run
    config.stash[_CHANGES], config.stash[_NOTES] = [], []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--bench-full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes several minutes: --bench-full"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lgnet_fast"] = environment()
    machine_info.pop("node", None)  # left out, because the name of a host says nothing about its speed


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return request.param


@pytest.fixture(autouse=True)
def own_compilations() -> None:
    """Each bench compiles anew. Where torch.compile has compiled the same function for other sizes, it makes kernels
    of variable sizes, which are slower; after eight compilations it runs the function eagerly."""
    torch.compiler.reset()


def marked_device(request: pytest.FixtureRequest) -> str:
    """The device of a test by its mark, for ``device = pytest.fixture(marked_device)`` in a bench's module."""
    return "cuda" if request.node.get_closest_marker("gpu") else "cpu"


@pytest.fixture
def compete(benchmark: Any, device: str) -> Callable[..., dict[str, Any]]:
    """``compete(contestants, ours)``: time all of them interleaved and record ratios; then time `ours` separately by
    pytest-benchmark, so that its ``--benchmark-*`` options work. Contestants must have run once before."""

    def run(
        contestants: Mapping[str, Callable[[], Any]],
        ours: str,
        rounds: int = 12,
        warmup: int = 3,
        long_rounds: int = 4,
    ) -> dict[str, Any]:
        if benchmark.disabled:
            rounds, warmup, long_rounds = 1, 1, 1
        rates = [copy_rate()] if device == "cpu" else []
        summary = summarize(interleave(contestants, device, rounds, warmup, long_rounds), ours)
        if rates:
            summary["copy_gb_s"] = [*rates, copy_rate()]
        benchmark.extra_info.update(summary, device=device)

        def timed() -> None:
            contestants[ours]()
            if device == "cuda":
                torch.cuda.synchronize()

        long = SMOKE or 1e-3 * summary["median_ms"][ours] > LONG_CALL_S
        benchmark.pedantic(timed, rounds=1 if long else min(rounds, 10), warmup_rounds=0 if long else 1)
        return summary

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Store the figures of a bench that passed."""
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "call" and report.passed and benchmark is not None and not benchmark.disabled:
        figures = benchmark.extra_info
        if "times_slower_than_ours" in figures:
            stem = f"{regression.machine_class(figures['device'])}_{item.path.stem.removeprefix('bench_')}"
            info = environment()
            stamp = {key: info[key] for key in ("commit", "date")}
            benches = item.config.stash[_RUN][stem]
            benches[item.name] = dict(figures) | stamp
            if own := item.config.getoption("--bench-run"):  # at once, for a run that is killed
                regression.write_results(own / f"{stem}.json", benches, info)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    run, folder = config.stash[_RUN], config.getoption("--bench-results")
    if not run or (SMOKE and folder is None):
        return
    changes, notes = regression.compare_or_store(run, folder or regression.RESULTS, config.getoption("--bench-store"))
    config.stash[_CHANGES][:], config.stash[_NOTES][:] = changes, notes
    if exitstatus == pytest.ExitCode.OK and any(change.failed for change in changes):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[_RUN]
    if not run:
        return
    write = terminalreporter.write_line
    terminalreporter.section("lgnet_fast: times slower than ours, in this run")
    for stem, benches in run.items():
        write(stem)
        for name, bench in benches.items():
            ours = bench["ours"]
            ratios = ", ".join(f"{rival} {t:.2f}" for rival, t in sorted(regression.rivals(bench).items()))
            spread = regression.bench_spread(bench)
            write(f"  {name}: {ours} {bench['median_ms'][ours]:.3g} ms; {ratios} (+-{spread:.0%})")
    changes = config.stash[_CHANGES]
    if changes:
        terminalreporter.section("lgnet_fast: speed-up over the rivals, beside the stored run's")
    for change in changes:
        line = f"  {change.bench} {change.contestant}: {change.now:.2f}x, {change.ratio - 1:+.1%}: {change.verdict}"
        write(line, red=change.failed)
    for note in config.stash[_NOTES]:
        write(note)
    failed = sum(change.failed for change in changes)
    if failed:
        write(
            f"{failed} of {len(changes)} got slower. If that is meant, or the machine changed: "
            "pytest bench --bench-store",
            red=True,
        )
