"""`make bench BASE=REF`: the medians over rounds, and one run of two trees, small and once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
