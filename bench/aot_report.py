"""Compiles the kernels of every GPU without having it, and fails on kernels that could not run or would be slow.

    python bench/aot_report.py [--card H100] [--model lgnet] [--dtype float16] [--batch 1] [--processes 2]
                               [--triton 3.6.0] [--shard 1/8] [--count] [--all] [--anew] [--store]

The launches of the engine (dense, restricted) and of the operators are recorded for each card of kernels/cards.py and
compiled by two versions of Triton: 3.6.0, that of the timed GPU, and the newest. Both are installed in folders under
.cache/aot. The reports of the compiled kernels are kept there too (verdicts-VERSION.jsonl), under a hash of the
kernel's code and specialisation, so that an interrupted run can be continued and a later one compiles only what has
changed (--anew: everything). --shard I/N compiles part I of N, the same kernels on every machine; the files of
several machines are joined by appending one to the other. Reports of other runs come with the repository
(bench/results/aot_triton-VERSION.jsonl.xz); --store writes there what is known of the selected kernels. --count
compiles nothing and prints how many kernels there are. --twins is a quick look: a kernel in bfloat16 is left out if
the same kernel in float16 (its twin) is selected too, is far from the limits and does not use wgmma. One line is
printed for each kernel with a violation (--all: for every kernel):

* more shared or tensor memory than the GPU has,
* matrix products that wait for each other (as many waits as products),
* in 16 bit: spills, local memory, loops that load or store values one by one,
* errors of the compiler.

Exit code 1 where there is any. float32 may spill: its products run without tensor cores.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lgnet_fast.kernels.aot import Job, Report

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "aot"
STORED = ROOT / "bench" / "results"
TRITONS = ("3.6.0", "newest")
"""With which every kernel was compiled; with 3.5, the lowest, a sample was (docs/gpu.md)."""


def environment(version: str) -> dict[str, str]:
    """Environment variables with which Python finds this version of Triton first; installs it once."""
    folder = CACHE / f"triton-{version}"
    if not (folder / "triton").is_dir():
        wanted = ["--upgrade", "triton"] if version == "newest" else [f"triton=={version}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *wanted], check=True)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


class Ledger:
    """Reports of compiled kernels in a file of JSON lines, by `aot.digest`. Failures are not kept.

    Args:
        path: the file that new reports are added to.
        stored: a compressed file of the same form, with more of them.
    """

    def __init__(self, path: Path, stored: Path | None = None) -> None:
        self.path, self.stored = path, stored
        self._known: dict[str, dict[str, object]] = {}
        if stored is not None and stored.exists():
            self._read(lzma.decompress(stored.read_bytes()).decode())
        if path.exists():
            self._read(path.read_text(encoding="utf-8"))

    def _read(self, lines: str) -> None:
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry.pop("kernel")] = entry
            except (ValueError, KeyError, AttributeError):  # the end of an interrupted run
                continue

    def store(self, jobs: Sequence[Job]) -> int:
        """Write what is known of `jobs` to the compressed file, in place of what is there; return their number."""
        from lgnet_fast.kernels.aot import digest

        if self.stored is None:
            raise ValueError("stored: expected a file, got None")
        wanted = sorted({digest(job) for job in jobs} & self._known.keys())
        lines = [json.dumps({**self._known[kernel], "kernel": kernel}) + "\n" for kernel in wanted]
        self.stored.write_bytes(lzma.compress("".join(lines).encode(), preset=9))
        return len(wanted)

    def get(self, job: Job) -> Report | None:
        """The report of a job that was compiled before."""
        from lgnet_fast.kernels.aot import Code, Report, digest

        entry = self._known.get(digest(job))
        if entry is None:
            return None
        numbers = {name: value for name, value in entry.items() if name != "code"}
        return Report(job, code=Code(*entry["code"]), **numbers)  # type: ignore[arg-type, misc]

    def add(self, report: Report) -> None:
        """Keep a report; it is on disk when this returns."""
        from lgnet_fast.kernels.aot import digest

        if report.error is None:
            entry = {**report._asdict(), "code": list(report.code), "kernel": digest(report.job)}
            del entry["job"], entry["error"]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def count(jobs: Sequence[Job]) -> str:
    """How many kernels there are, by several properties of their first launches."""
    lines = []
    for title, names in (
        ("card", [job.card.name for job in jobs]),
        ("dtype", [job.dtype for job in jobs]),
        ("kernel", [job.kernel for job in jobs]),
    ):
        lines.append(f"by {title}: " + ", ".join(f"{name} {n}" for name, n in Counter(names).most_common()))
    return "\n".join(lines)


def part(text: str) -> tuple[int, int]:
    """The value of --shard: "I/N", I from 1 to N."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return int(number), int(parts)


_row = "{:<12} {:<9} {:<22} {:<44} {:<60} {:>7} {:>5} {:>6} {:>5}  {}".format


class Session:
    """Compiles the jobs of one run that are not in the ledger, prints the reports, and counts.

    Attributes:
        broken: kernels with violations.
        compiled: kernels that were compiled.
        seconds: duration of the compilation.
    """

    def __init__(self, title: str, ledger: Ledger, arguments: argparse.Namespace) -> None:
        self.broken, self.compiled, self.seconds = 0, 0, 0.0
        self._title, self._ledger, self._arguments = title, ledger, arguments

    def _show(self, report: Report) -> None:
        violations = "; ".join(report.violations())
        self.broken += bool(violations)
        if violations or self._arguments.all:
            job = report.job
            numbers = report.shared, report.registers, report.stack, report.code.wgmma
            print(_row(job.card.name, job.dtype, job.kernel, job.label, job.config, *numbers, violations), flush=True)

    def report_all(self, jobs: Sequence[Job]) -> dict[str, Report]:
        """The reports of `jobs` by `aot.digest`, from the ledger or compiled now."""
        import lgnet_fast.kernels.aot as aot

        found = [] if self._arguments.anew else [self._ledger.get(job) for job in jobs]
        known = {aot.digest(report.job): report for report in found if report is not None}
        left = [job for job in jobs if aot.digest(job) not in known]
        print(f"{self._title}: {len(known)} known, {len(left)} to compile", flush=True)
        for report in known.values():
            self._show(report)
        started = time.monotonic()
        for report in aot.compile_all(left, self._arguments.processes, keep=False):
            self._ledger.add(report)
            self._show(report)
            known[aot.digest(report.job)] = report
        self.compiled += len(left)
        self.seconds += time.monotonic() - started
        return known


def selected_jobs(arguments: argparse.Namespace, title: str) -> list[Job]:
    """The kernels of the cards, models, dtypes, batches and part that the arguments select. Prints their number."""
    import lgnet_fast.kernels.aot as aot
    from lgnet_fast.kernels.cards import CARDS

    dtypes, models = arguments.dtype or tuple(aot.DTYPES), arguments.model or aot.MODELS
    cases = [
        case
        for name in arguments.card or CARDS
        for case in aot.card_cases(CARDS[name], dtypes, models, arguments.batch or (1, 16))
    ]
    jobs = aot.jobs(cases)
    print(f"{title}: {len(cases)} cases, {len(jobs)} kernels in {len(aot.groups(jobs))} groups", flush=True)
    if arguments.shard is not None:
        jobs = aot.shard(jobs, *arguments.shard)
        print(f"{title}: part {arguments.shard[0]} of {arguments.shard[1]}: {len(jobs)} kernels", flush=True)
    return jobs


def compile_here(arguments: argparse.Namespace) -> int:
    """Compile with the Triton of this process, print, and return the number of violations."""
    import lgnet_fast.kernels.aot as aot
    import triton

    begin = time.monotonic()
    title = f"triton {triton.__version__}"
    jobs = selected_jobs(arguments, title)
    ledger = Ledger(
        CACHE / f"verdicts-{triton.__version__}.jsonl", STORED / f"aot_triton-{triton.__version__}.jsonl.xz"
    )
    if arguments.count:
        print(count(jobs))
        return 0
    if arguments.store:
        print(f"{title}: {ledger.store(jobs)} of {len(jobs)} kernels stored")
        return 0
    print(_row("card", "dtype", "kernel", "first launch", "config", "shared", "regs", "stack", "wgmma", ""))
    session = Session(title, ledger, arguments)
    rest, pairs = aot.twins(jobs) if arguments.twins else (jobs, [])
    reports = session.report_all(rest)
    near = [one for one, other in pairs if not aot.holds_for_twin(reports[aot.digest(other)])]
    if near:
        session.report_all(near)
    pace = f", {session.seconds / session.compiled:.2f} s a compiled kernel" if session.compiled else ""
    print(
        f"{title}: {len(jobs)} kernels, {len(pairs) - len(near)} of them by their twins in float16, {session.broken} "
        f"with violations, {time.monotonic() - begin:.0f} s{pace}"
    )
    return session.broken


def main(arguments: Sequence[str]) -> int:
    """Print the tables; return the exit code."""
    from lgnet_fast.kernels.cards import CARDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="append", choices=tuple(CARDS), help="default: all")
    parser.add_argument("--model", action="append", help="default: all sizes")
    parser.add_argument("--dtype", action="append", choices=("float16", "bfloat16", "float32", "tf32"))
    parser.add_argument("--batch", action="append", type=int, help="default: 1 and 16")
    parser.add_argument("--triton", action="append", metavar="VERSION", help='default: 3.6.0 and "newest"')
    parser.add_argument("--here", action="store_true", help="with the Triton that is installed")
    parser.add_argument("--shard", type=part, metavar="I/N", help="compile part I of N only")
    parser.add_argument("--count", action="store_true", help="compile nothing, count the kernels")
    parser.add_argument("--twins", action="store_true", help="leave out bfloat16 where float16 gives the same")
    parser.add_argument("--anew", action="store_true", help="compile what earlier runs have compiled, too")
    parser.add_argument("--all", action="store_true", help="print every kernel")
    parser.add_argument("--store", action="store_true", help="compile nothing, store what is known in bench/results")
    parser.add_argument("--processes", type=int, help="default: one a core")
    parsed = parser.parse_args(arguments)
    if parsed.here:
        return 1 if compile_here(parsed) else 0
    command = [sys.executable, __file__, "--here", *arguments]
    return max(
        subprocess.run(command, env=environment(version), check=False).returncode
        for version in parsed.triton or TRITONS
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
