"""The benches run: everything small and once (LGNET_BENCH_SMOKE), results stored, and the report made of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import report
from bench.regression import read_results
from bench.timing import ROOT
from lgnet_fast import cli

pytest.importorskip("pytest_benchmark")

# bench_training takes whole training steps, bench_complexity measures nothing.
MODULES = ("attention", "inference", "merge_concat", "pipeline", "scaling")
BENCHES = {"attention": 4, "inference": 2, "merge_concat": 2, "pipeline": 2, "scaling": 4}


def run(folder: Path, *modules: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--bench-results", folder]
        + [f"bench/bench_{module}.py" for module in modules],
        cwd=ROOT,
        # One thread: on a busy machine, threads that wait for one another take many times as long.
        env={**os.environ, "LGNET_BENCH_SMOKE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no stored run of this machine class" in done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    run(folder, *MODULES)
    return folder


def test_results(results):
    files = {file.stem.split("_", 1)[1]: read_results(file.read_text()) for file in results.iterdir()}
    assert {module: len(content["benches"]) for module, content in files.items()} == BENCHES
    for content in files.values():
        assert content["environment"]["threads"] > 0
        for name, bench in content["benches"].items():
            ours = bench["ours"]
            assert bench["times_slower_than_ours"].keys() == bench["least_ms"].keys() - {ours}, name
            for contestant, least in bench["least_ms"].items():
                assert 0 < least <= bench["median_ms"][contestant], (name, contestant)
            assert min(bench["times_slower_than_ours"].values()) > 0, name
    scaling = files["scaling"]["benches"]
    # Slope in the side: between convolutions, which grow with the area, and attention, which grows with its square.
    assert 2 < scaling["test_resolution"]["slopes"]["multiply_accumulates"]["slope"] < 4
    roof = scaling["test_roofline"]
    assert roof["peaks"]["gflops"] > 1
    assert roof["peaks"]["gigabytes_a_second"] > 0.1
    steps = [dict(zip(roof["columns"], step)) for step in roof["steps"]]
    assert all(step["GFLOP"] > 0 and step["MB"] > 0 for step in steps)
    hole = scaling["test_hole_ratio"]
    assert hole["hole_ratios"].keys() == hole["times_faster_than_dense"].keys()
    assert hole["hole_ratios"]["ours_square_0.5"] == pytest.approx(0.5, abs=0.01)
    for name, bench in files["pipeline"]["benches"].items():
        assert f"{bench['side']}-{bench['strategy']}" in name
        assert 0 < bench["hole_ratio"] < 0.1


@pytest.mark.slow(reason="ten networks run; test_peers_*.py run the rivals, test_complexity.py makes the table")
def test_results_of_table4(tmp_path):
    run(tmp_path, "table4")
    (file,) = tmp_path.iterdir()
    table = read_results(file.read_text())["benches"]["test_table4[cpu]"]
    assert table["times_faster_than_eager"].keys() == {"LGNet_light"}


def test_report_of_them(results, tmp_path, monkeypatch):
    """The command makes a report of the measurements; test_report.py checks its content."""
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report.complexity, "rows", lambda: [])
    done = CliRunner().invoke(cli.app, ["bench", "--report", str(tmp_path), "--report-only"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").stat().st_size > 50_000
    text = (tmp_path / "report.md").read_text()
    for heading in ("The whole network", "Growth", "Roofline of the plan's steps"):
        assert f"## {heading}\n" in text
