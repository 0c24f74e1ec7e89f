"""Compares the machine code of the kernels with another commit's; needs no GPU.

    python -m bench.compare_kernels REF [NEW] [--card H100] [--model lgnet] [--dtype float16] [--batch 1]
                                    [--case PATTERN] [--kernel PATTERN] [--triton here] [--processes 2]

Commit REF is compared with commit NEW, or with this tree as it is. Commits are checked out as git worktrees in a
temporary folder. Each tree records the launches that `make aot` would compile, selected by the options (defaults as
above). For each launch, in order, both kernels are compiled, and one line is printed for each distinct pair: PTX
instructions, shared memory, registers, stack. A pair is worse where the new kernel has

* more PTX instructions, more shared memory or more stack (spills),
* over 2 registers more than the multiprocessor allotted before (it allots them by eights),
* fewer programs on a multiprocessor (occupancy),
* or does not compile.

Occupancy is not compared where the instructions are the same, because the order of the parameters alone changes the
registers of ptxas by a few; neither registers nor occupancy are compared where the new kernel spills less.

Exit code 1 if a pair is worse or the trees do not launch the same number of kernels. `--triton 3.6.0` compiles with
that version, installed once under .cache/aot; "here", the default, is the installed version; several may be given.
Compiled kernels stay in .cache/aot too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REGISTERS_MORE = 2
# of a multiprocessor: 32-bit registers, bytes of shared memory reserved per program, threads
REGISTER_FILE = 65536
SHARED_RESERVED = 1024
THREADS = {(8, 6): 1536, (8, 9): 1536, (12, 0): 1536}


class Kernel(NamedTuple):
    """One compiled kernel. programs: how many fit on a multiprocessor. opcodes: PTX instructions, by opcode."""

    name: str
    label: str
    config: str
    opcodes: dict[str, int]
    shared: int
    registers: int
    stack: int
    programs: int
    error: str | None

    @property
    def instructions(self) -> int:
        """PTX instructions in all."""
        return sum(self.opcodes.values())


class Tree(NamedTuple):
    """The launches of one tree: for each case the indices of its kernels, in order, and the kernels."""

    cases: dict[str, list[int]]
    kernels: list[Kernel]


# -- one tree --------------------------------------------------------------------------------------------------------


def opcodes(ptx: str) -> dict[str, int]:
    """PTX instructions by opcode."""
    found: Counter[str] = Counter()
    for line in ptx.splitlines():
        instruction = re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)[^:]*;", line)
        if instruction is not None:
            found[instruction[1]] += 1
    return dict(sorted(found.items()))


def allotted(registers: int) -> int:
    """Registers that a multiprocessor allots to a thread that uses this many."""
    return -(-registers // 8) * 8


def programs_resident(capability: tuple[int, int], shared_limit: int, shared: int, registers: int, warps: int) -> int:
    """Occupancy: the number of programs of a kernel that fit on a multiprocessor."""
    by_registers = REGISTER_FILE // (allotted(registers) * 32 * warps)
    by_shared = (shared_limit + SHARED_RESERVED) // (shared + SHARED_RESERVED)
    return min(by_registers, by_shared, THREADS.get(capability, 2048) // (32 * warps), 32)


def compile_one(job: Any) -> Kernel:
    """Compile one job of `lgnet_fast.kernels.aot`."""
    import triton
    from lgnet_fast.kernels import aot
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    report = aot.compile_job(job)
    if report.error is not None:
        return Kernel(job.kernel, job.label, job.config, {}, 0, 0, 0, 0, report.error)
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    major, minor = job.card.capability
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=job.options)
    programs = programs_resident(
        job.card.capability, job.card.shared_limit, report.shared, report.registers, job.options["num_warps"]
    )
    found = opcodes(compiled.asm["ptx"])
    return Kernel(
        job.kernel, job.label, job.config, found, report.shared, report.registers, report.stack, programs, None
    )


def measure(arguments: argparse.Namespace) -> Tree:
    """Record and compile the launches of the `lgnet_fast` that this process imports."""
    from lgnet_fast.kernels import aot
    from lgnet_fast.kernels.cards import CARDS

    cases: dict[str, list[int]] = {}
    jobs: dict[str, tuple[int, Any]] = {}
    for name in arguments.card:
        for case in aot.card_cases(CARDS[name], arguments.dtype, arguments.model, arguments.batch):
            if not re.search(arguments.case, case.label):
                continue
            indices = cases[f"{name} {case.dtype} {case.label}"] = []
            for launch in aot.launches(case):
                if not re.search(arguments.kernel, launch.kernel.__name__):
                    continue
                job = aot.job(case, launch)
                parts = job.card.capability, job.kernel, job.signature, job.constants, job.attributes, job.options
                indices.append(jobs.setdefault(str(parts), (len(jobs), job))[0])
    context = multiprocessing.get_context("spawn")
    count = arguments.processes or len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        return Tree(cases, list(pool.map(compile_one, [job for _, job in jobs.values()])))


def tree_of(folder: Path | None, options: Sequence[str], variables: dict[str, str]) -> Tree:
    """Measure `folder`, or the installed package, in a separate process."""
    if folder is not None:
        path = os.pathsep.join(filter(None, (str(folder), variables.get("PYTHONPATH"))))
        variables = {**variables, "PYTHONPATH": path}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, __file__, "--measure", file.name, *options]
        subprocess.run(command, env=variables, check=True)
        content = json.load(file)
    return Tree(content["cases"], [Kernel(*kernel) for kernel in content["kernels"]])


# -- two trees -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def worktree(ref: str | None) -> Iterator[Path | None]:
    """The tree of commit `ref` in a temporary folder; None where `ref` is None."""
    if ref is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), ref], check=True)
        # the installed layout: kernels/ is the package lgnet_fast.kernels
        (folder / "lgnet_fast" / "kernels").symlink_to(folder / "kernels", target_is_directory=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def faults(base: Kernel, new: Kernel) -> list[str]:
    """What is worse in the new kernel."""
    if new.error is not None:
        return [new.error] if base.error is None else []
    if base.error is not None:
        return []
    counts = [
        ("instructions", base.instructions, new.instructions),
        ("shared memory", base.shared, new.shared),
        ("stack", base.stack, new.stack),
    ]
    if new.stack >= base.stack:
        counts.append(("registers", allotted(base.registers) + REGISTERS_MORE, new.registers))
    found = [f"more {what}" for what, before, after in counts if after > before]
    if new.programs < base.programs and new.stack >= base.stack and new.opcodes != base.opcodes:
        found.append(f"{new.programs} programs a multiprocessor, not {base.programs}")
    return found


def difference(base: Kernel, new: Kernel) -> str:
    """Opcodes that one kernel has more often than the other."""
    if base.opcodes == new.opcodes:
        return "the same instructions"
    more = Counter(new.opcodes)
    more.subtract(base.opcodes)
    return " ".join(f"{count:+d} {opcode}" for opcode, count in sorted(more.items()) if count)


def compare(base: Tree, new: Tree) -> int:
    """Print one line for each distinct pair of kernels; return the number of faults."""
    row = "{:<24} {:<46} {:<60} {:>11} {:>15} {:>9} {:>9}  {}".format
    print(row("kernel", "first launch", "config", "PTX", "shared", "regs", "stack", ""))
    pairs: dict[tuple[int, int], None] = {}
    broken = 0
    for label in sorted(base.cases.keys() | new.cases.keys()):
        before, after = base.cases.get(label), new.cases.get(label)
        if before is None or after is None or len(before) != len(after):
            counts = ["not there" if x is None else f"{len(x)} launches" for x in (before, after)]
            print(f"{label}: {counts[0]} before, {counts[1]} now")
            broken += 1
            continue
        pairs.update(dict.fromkeys(zip(before, after)))
    same = 0
    for i, j in pairs:
        a, b = base.kernels[i], new.kernels[j]
        wrong = faults(a, b)
        broken += bool(wrong)
        same += a.opcodes == b.opcodes
        numbers = [
            str(y) if x == y else f"{x}>{y}"
            for x, y in (
                (a.instructions, b.instructions),
                (a.shared, b.shared),
                (a.registers, b.registers),
                (a.stack, b.stack),
            )
        ]
        note = difference(a, b) if a.error is None and b.error is None else "does not compile"
        print(row(b.name, b.label, b.config, *numbers, f"WORSE: {'; '.join(wrong)}; {note}" if wrong else note))
    print(f"{len(pairs)} kernels, {same} of the same instructions, {broken} worse")
    if not pairs and not broken:
        print("no kernel matches --case and --kernel: nothing is compared")
        return 1
    return broken


def main(arguments: Sequence[str]) -> int:
    """Print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", nargs="?", help="the commit to compare with")
    parser.add_argument("new", nargs="?", help="another commit; default: this tree")
    parser.add_argument("--triton", action="append", metavar="VERSION", help='such as 3.6.0; default: "here"')
    options = parser.add_argument_group("what is compared")
    options.add_argument("--card", action="append", help="default: H100")
    options.add_argument("--model", action="append", help="default: lgnet")
    options.add_argument("--dtype", action="append", help="default: float16")
    options.add_argument("--batch", action="append", type=int, help="default: 1")
    options.add_argument("--case", default="", help="only cases whose label matches this pattern")
    options.add_argument("--kernel", default="", help="only kernels whose name matches this pattern")
    options.add_argument("--processes", type=int, help="default: one a core")
    options.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    for name, default in (("card", "H100"), ("model", "lgnet"), ("dtype", "float16"), ("batch", 1)):
        setattr(parsed, name, getattr(parsed, name) or [default])
    if parsed.measure is not None:
        Path(parsed.measure).write_text(json.dumps(measure(parsed)._asdict()), encoding="utf-8")
        return 0
    if parsed.ref is None:
        parser.error("REF: expected the commit to compare with")
    passed = [f"--case={parsed.case}", f"--kernel={parsed.kernel}"]
    for name in ("card", "model", "dtype", "batch"):
        passed += [f"--{name}={value}" for value in getattr(parsed, name)]
    if parsed.processes is not None:
        passed.append(f"--processes={parsed.processes}")
    # imported here, because a measuring process must not find this tree's packages
    from bench.aot_report import CACHE, environment

    broken = 0
    with worktree(parsed.ref) as before, worktree(parsed.new) as after:
        for version in parsed.triton or ["here"]:
            variables = {**os.environ, "OMP_NUM_THREADS": "1"} if version == "here" else environment(version)
            variables["TRITON_CACHE_DIR"] = str(CACHE / "kernels")
            base, new = (tree_of(folder, passed, variables) for folder in (before, after))
            print(f"triton {version}: {parsed.ref} and {parsed.new or 'this tree'}", flush=True)
            broken += compare(base, new)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
