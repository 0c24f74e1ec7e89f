"""`make bench BASE=REF`: compares this tree's speed-ups with those of another commit, on this machine.

    python -m bench.compare REF [--modules attention merge_concat] [--rounds 3]

REF is checked out into a temporary worktree, with its extension built. In every round each tree runs its benches; in
every second round this tree is first. Compared is how many times longer the rivals take than our contestants, as with
a stored run (:mod:`bench.regression`): the rivals are the same code in both trees, so their ratio to ours does not
depend on the load of the machine. The exit code is 1 if the median over the rounds fell by more than allowed.
Benches, contestants and rivals that only one tree has are left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.regression import Bench, Change, compare, read_results
from bench.timing import ROOT
from lgnet_fast.errors import LGNetError

MODULES = ("attention", "inference", "merge_concat")
"""The default modules: operators and the whole network."""

Run = dict[str, dict[str, Bench]]
"""Name of a results file -> bench -> figures."""

_WHERE = "import lgnet_fast, lgnet_fast.kernels as k; print(lgnet_fast.__file__); print(k.__file__)"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise LGNetError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _environment(tree: Path) -> dict[str, str]:
    # Before the finder of an editable install, which would find this tree's package.
    return {**os.environ, "PYTHONPATH": str(tree)}


@contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """A worktree of `ref` with the extension built in place; removed at the end.

    Raises:
        LGNetError: no such commit, or its extension cannot be built.
    """
    commit = _git("rev-parse", "--verify", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="lgnet_fast_base_") as folder:
        tree = Path(folder).resolve() / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            # An installation maps lgnet_fast.kernels to kernels/; without one Python looks for it in the package.
            if not (tree / "lgnet_fast" / "kernels").exists():
                (tree / "lgnet_fast" / "kernels").symlink_to(tree / "kernels", target_is_directory=True)
            _build(tree, commit)
            found = subprocess.run(
                [sys.executable, "-c", _WHERE], cwd=tree, env=_environment(tree), capture_output=True, text=True
            )
            if found.returncode or any(not line.startswith(str(tree)) for line in found.stdout.splitlines()):
                raise LGNetError(
                    f"{ref}: its package cannot be imported: {found.stdout}{found.stderr.strip()[-500:]}"
                )
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _build(tree: Path, commit: str) -> None:
    """Build the tree's extension, or copy this tree's binary if both have the same sources."""
    built = list((ROOT / "lgnet_fast").glob("_C*.so"))
    if built and not _git("diff", "--name-only", commit, "--", "csrc", "setup.py"):
        for file in built:
            shutil.copy(file, tree / "lgnet_fast")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise LGNetError(f"the extension of {commit} cannot be built: {done.stderr.strip()[-500:]}")


def _file(module: str) -> str:
    return f"bench/bench_{module}.py"


def run_benches(tree: Path, modules: Sequence[str], results: Path) -> Run:
    """Run the benches of a tree; returns its figures by results file. Modules that it lacks are left out.

    Raises:
        LGNetError: a bench failed.
    """
    files = [_file(module) for module in modules if (tree / _file(module)).is_file()]
    if not files:  # without a file pytest would run the tests
        return {}
    stored = results / "stored"  # an empty folder, so that nothing is compared with bench/results or written there
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["--bench-results", str(stored), "--bench-run", str(results / "run")]
    done = subprocess.run(command, cwd=tree, env=_environment(tree), capture_output=True, text=True)
    if done.returncode:
        raise LGNetError(f"the benches of {tree} failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return {file.stem: read_results(file.read_text())["benches"] for file in (results / "run").glob("*.json")}


def over_rounds(rounds: Sequence[tuple[Run, Run]]) -> list[Change]:
    """One change for every contestant of ours: medians over rounds of (base, here)."""
    found: dict[tuple[str, str, str], list[Change]] = {}
    for base, here in rounds:
        for stem in sorted(base.keys() & here.keys()):
            for change in compare(base[stem], here[stem]):
                found.setdefault((stem, change.bench, change.contestant), []).append(change)
    return [
        replace(
            changes[0],
            now=statistics.median(change.now for change in changes),
            ratio=statistics.median(change.ratio for change in changes),
            allowed=statistics.median(change.allowed for change in changes),
            moved=any(change.moved for change in changes),
        )
        for changes in found.values()
    ]


def compare_with(ref: str, modules: Sequence[str] = MODULES, rounds: int = 3) -> list[Change]:
    """Compare this tree with `ref`; returns the change of each of our contestants. Prints a line per run."""
    taken: list[tuple[Run, Run]] = []
    with checked_out(ref) as base, tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            trees = {"base": base, "here": ROOT}
            figures: dict[str, Run] = {}
            for name in sorted(trees, reverse=number % 2 == 1):
                print(f"round {number + 1} of {rounds}: {name}", flush=True)
                figures[name] = run_benches(trees[name], modules, Path(folder, f"{number}_{name}"))
            taken.append((figures["base"], figures["here"]))
    return over_rounds(taken)


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", help="a commit, a branch, a tag")
    parser.add_argument("--modules", nargs="+", default=MODULES, metavar="MODULE", help="of bench/bench_MODULE.py")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {args.rounds}")
    for module in args.modules:
        if not (ROOT / _file(module)).is_file():
            parser.error(f"--modules: expected names of bench/bench_MODULE.py, got {module}")
    try:
        changes = compare_with(args.ref, args.modules, args.rounds)
        if not changes:
            raise LGNetError(f"{args.ref} and this tree have no bench with rivals in common: nothing is compared")
    except LGNetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for change in changes:
        shown = f"{change.now:.2f}x over the rivals, {change.ratio - 1:+.1%}"
        print(f"{change.bench} {change.contestant}: {shown}: {change.verdict}")
    failed = sum(change.failed for change in changes)
    print(f"{len(changes)} compared with {args.ref}, {failed} got slower")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
