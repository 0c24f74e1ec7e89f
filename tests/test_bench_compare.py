"""`make bench BASE=REF`: the medians over rounds, and one run of two trees, small and once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

import bench.compare
from bench.compare import over_rounds
from bench.timing import ROOT


def run_with(ours: float, rival: float, spread: float = 0.0) -> dict[str, dict[str, dict[str, object]]]:
    bench = {
        "median_ms": {"ours": ours, "eager": rival},
        "times_slower_than_ours": {"eager": rival / ours},
        "spread": {"eager": spread},
        "ours": "ours",
    }
    return {"cpu_attention": {"test_forward": bench}}


def test_one_disturbed_round_does_not_decide():
    rounds = [(run_with(1.0, 3.0), run_with(1.0, 3.0)) for _ in range(2)]
    rounds.append((run_with(1.0, 3.0), run_with(2.0, 3.0)))
    (change,) = over_rounds(rounds)
    assert (change.ratio, change.failed) == (1.0, False)


def test_slower_in_most_rounds_fails():
    rounds = [(run_with(1.0, 3.0), run_with(1.2, 3.0)) for _ in range(3)]
    (change,) = over_rounds(rounds)
    assert change.ratio == pytest.approx(1 / 1.2)
    assert change.failed


def test_a_slower_machine_changes_nothing():
    (change,) = over_rounds([(run_with(1.0, 3.0), run_with(2.0, 6.0))])
    assert change.ratio == 1.0


def test_noise_is_allowed_for():
    (change,) = over_rounds([(run_with(1.0, 3.0, spread=0.15), run_with(1.2, 3.0, spread=0.15))])
    assert change.allowed == pytest.approx(0.3)
    assert not change.failed


def test_what_one_tree_lacks_is_left_out():
    other = {"cpu_attention": {"test_new": run_with(1.0, 3.0)["cpu_attention"]["test_forward"]}}
    assert over_rounds([(run_with(1.0, 3.0), other), (run_with(1.0, 3.0), {})]) == []


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LGNET_BENCH_SMOKE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.compare", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_module_that_is_none_is_refused():
    done = compare("HEAD", "--modules", "attention", "atention")
    assert done.returncode == 2
    assert done.stderr.endswith("error: --modules: expected names of bench/bench_MODULE.py, got atention\n")


def test_nothing_to_compare_is_an_error(tmp_path, monkeypatch, capsys):
    """The other tree lacks the module: pytest is not run without a file, and the comparison does not pass."""

    def ran(tree, modules, results):
        return run_benches(tmp_path, modules, results) if tree == tmp_path else run_with(1.0, 3.0)

    run_benches = bench.compare.run_benches
    monkeypatch.setattr(bench.compare, "checked_out", lambda ref: contextlib.nullcontext(tmp_path))
    monkeypatch.setattr(bench.compare, "run_benches", ran)
    monkeypatch.setattr(sys, "argv", ["compare", "HEAD", "--modules", "attention", "--rounds", "1"])
    assert bench.compare.main() == 2
    expected = "error: HEAD and this tree have no bench with rivals in common: nothing is compared\n"
    assert capsys.readouterr().err == expected


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")


@needs_git
def test_no_such_commit():
    done = compare("no-such-commit")
    assert done.returncode == 2
    assert done.stderr.startswith("error: git rev-parse")
    assert "Traceback" not in done.stderr


@needs_git
@pytest.mark.slow(reason="builds the extension of another commit and runs benches of two trees")
def test_two_trees():
    pytest.importorskip("pytest_benchmark")
    done = compare("HEAD", "--modules", "merge_concat", "--rounds", "1")
    # The figures of a smoke run are meaningless, so both verdicts are allowed.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "test_merge_concat" in done.stdout
    assert " compared with HEAD, " in done.stdout
    trees = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True)
    assert "lgnet_fast_base_" not in trees.stdout
