"""Builds check_kernels.cpp with the kernels, without Python or PyTorch, and runs it for every instruction set.

    python tests/native/run.py          for this machine, by c++ (or $CXX); on x86-64 Linux the instructions of the
                                        register blocks' inner loops are counted too
    python tests/native/run.py --arm    for 64-bit Arm: cross-compiled, run under an emulator; the instructions of the
                                        register blocks' inner loops are counted too (`make test-arm`)
    python tests/native/run.py --cross  for Windows, run under Wine, and for macOS on Arm, compiled and linked alone,
                                        by the Clang of the package ziglang (`make test-cross`)
    python tests/native/run.py --sanitized
                                        for this machine with AddressSanitizer and UndefinedBehaviorSanitizer, then
                                        with ThreadSanitizer (`make test-sanitized`): minutes

Objects stay in build/native-* and are compiled again only if a source or header is newer. MAX_JOBS limits the number
of jobs. Emulated runs check results, not speed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BINDINGS = ("module", "program_bindings")
# GCC 12 warns thousands of times about intentionally undefined values in its AVX-512 header.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")
# Folder below build/ -> flags. Without Python threads are the kernels' own, which ThreadSanitizer knows; libgomp's it
# does not.
SANITIZERS = {
    "native-address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    "native-thread": ("-fsanitize=thread",),
}
# Option -> program -> its package in Debian and Ubuntu.
TOOLS = {
    "--arm": {
        "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
        "aarch64-linux-gnu-objdump": "binutils-aarch64-linux-gnu",
        "qemu-aarch64": "qemu-user",
    },
    "--cross": {"wine": "wine"},
}
# Folder below build/ -> target of Zig's Clang, which has the headers and libraries of these systems.
CROSS = {"native-windows": "x86_64-windows-gnu", "native-macos": "aarch64-macos"}


@dataclass(frozen=True)
class Target:
    """Which functions have counted inner loops, how to read their disassembly, and what it must show.

    Attributes:
        blocks: names of the functions, which are members of a vector class or of a template of one.
        branch, product: names of instructions, as patterns. `by_element`: of the operands of a product.
        vector: a vector register among the operands; its group is the number.
        stack: an operand in the stack.
        least_part: of the instructions of a loop that are products.
        least_registers: vector registers that a loop names.
    """

    blocks: tuple[str, ...]
    branch: str
    product: str
    by_element: str
    vector: str
    stack: str
    least_part: float
    least_registers: int


ARM = Target(
    blocks=("conv_block<6>", "score_block", "value_block"),
    branch=r"b(\..+)?|cbn?z|tbn?z",
    product="fmla|bfdot",
    by_element=r"\[",
    vector=r"\b[vqs](\d+)\b",
    stack=r"\[sp",
    least_part=0.85,
    least_registers=31,  # of 32
)
# Beside the products are the loads: of 12 products 8, of 28 products 16, and those that prefetch. Numbers and
# pointers in the stack are no spills of a block.
X86 = Target(
    blocks=("rows_of_blocks<2>", "attend_keys<3>"),
    branch="j.+",
    product="vfmadd.+ps|vdpbf16ps",
    by_element="",
    vector=r"%[yz]mm(\d+)",
    stack=r"mm.*\(%rsp|\(%rsp.*mm",
    least_part=0.5,
    least_registers=15,  # of 16 or 32
)
# Unit -> its vector classes.
ARM_UNITS = {"isa_neon": ("F32",), "isa_neon_bf16": ("Bf16",)}
X86_UNITS = {"isa_avx2": ("F32",), "isa_avx512": ("F32",), "isa_avx512_bf16": ("Bf16",)}


@dataclass(frozen=True)
class Loop:
    """The instructions of one innermost loop."""

    function: str
    instructions: int
    products: int  # multiply-adds, or dot products
    registers: int  # vector registers that it names
    stack: int  # instructions that reach the stack, on x86 those with vector registers: spills

    @property
    def part(self) -> float:
        return self.products / self.instructions


def inner_loops(disassembly: str, target: Target) -> list[Loop]:
    """The innermost loops with products of ``objdump -d -C --no-show-raw-insn``."""
    loops = []
    for function, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", disassembly + "\n", re.MULTILINE):
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", body, re.MULTILINE)
        at = {address: i for i, (address, _, _) in enumerate(lines)}
        spans = []
        for i, (_, name, operands) in enumerate(lines):
            goal = re.search(r"\b([0-9a-f]+) <", operands)
            if re.fullmatch(target.branch, name) and goal and at.get(goal[1], i) < i:
                spans.append((at[goal[1]], i))
        for begin, end in spans:
            if any(begin <= b and e <= end for b, e in spans if (b, e) != (begin, end)):
                continue
            inside = [(name, operands) for _, name, operands in lines[begin : end + 1]]
            products = sum(
                bool(re.fullmatch(target.product, name) and re.search(target.by_element, operands))
                for name, operands in inside
            )
            if products:
                named = re.findall(target.vector, " ".join(operands for _, operands in inside))
                stack = sum(bool(re.search(target.stack, operands)) for _, operands in inside)
                loops.append(Loop(function, len(inside), products, len(set(named)), stack))
    return loops


def check_blocks(disassembly: str, target: Target, classes: tuple[str, ...]) -> list[str]:
    """A line for each register block of each vector class; raises SystemExit where one falls short."""
    lines, short = [], False
    loops = inner_loops(disassembly, target)
    for kind in classes:
        for block in target.blocks:
            found = [loop for loop in loops if re.search(rf"::{kind}>?::{re.escape(block)}\(", loop.function)]
            if not found:
                raise SystemExit(f"{kind}::{block}: not found in the disassembly")
            loop = max(found, key=lambda loop: (loop.products, loop.part))
            good = loop.part >= target.least_part and loop.registers >= target.least_registers and loop.stack == 0
            short = short or not good
            lines.append(
                f"{'ok  ' if good else 'FAIL'}  {kind}::{block}: {loop.products} products of {loop.instructions} "
                f"instructions ({loop.part:.1%}), {loop.registers} registers, {loop.stack} spills"
            )
    if short:
        raise SystemExit("\n".join(lines))
    return lines


def missing_tools(option: str) -> str | None:
    """What must be installed for an option, in one sentence; None where nothing is missing."""
    packages = [package for tool, package in TOOLS.get(option, {}).items() if shutil.which(tool) is None]
    return f"{option} needs: apt-get install {' '.join(packages)}" if packages else None


def build(compiler: list[str], folder: Path, root: Path = ROOT, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compiles what is out of date of the tree at `root` and links ``folder``/check_kernels; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [p for p in sorted((root / "csrc").glob("*.cpp")) if p.stem not in BINDINGS]
    sources.append(root / "tests" / "native" / "check_kernels.cpp")
    headers = [p for p in (root / "csrc").rglob("*") if p.suffix in (".h", ".inc")]
    newest = max(p.stat().st_mtime for p in headers)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.is_file() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            done = subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], check=False)
            if done.returncode:
                target.unlink(missing_ok=True)
                raise SystemExit(f"{source.name}: does not compile")
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources)]
    program = folder / ("check_kernels.exe" if folder.name == "native-windows" else "check_kernels")
    own = [] if folder.name in CROSS else ["-ldl"] if compiler == host_compiler() else ["-static"]
    link = ["-pthread", *own]
    link += [flag for flag in flags if flag.startswith("-fsanitize=")]
    subprocess.run([*compiler, *objects, *link, "-o", str(program)], check=True)
    return program


def host_compiler() -> list[str]:
    return [os.environ.get("CXX") or "c++"]


def run_all(command: list[str]) -> bool:
    """Runs the program for every instruction set that it lists; returns whether all checks passed."""
    names = subprocess.run([*command, "list"], capture_output=True, text=True, check=True).stdout.split()
    return all([subprocess.run([*command, name], check=False).returncode == 0 for name in names])


def run_cross() -> bool:
    programs = {}
    for folder, target in CROSS.items():
        print(f"{folder}: {target}", flush=True)
        compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
        programs[folder] = build(compiler, ROOT / "build" / folder, flags=(*FLAGS, "-Wno-unknown-warning-option"))
    os.environ["WINEDEBUG"] = "-all"
    return run_all(["wine", str(programs["native-windows"])])


def run_sanitized(folder: str, flags: tuple[str, ...]) -> bool:
    print(f"{folder}: {' '.join(flags)}", flush=True)
    return run_all([str(build(host_compiler(), ROOT / "build" / folder, flags=(*FLAGS, "-O1", "-g", *flags)))])


def count_blocks(objdump: str, folder: Path, target: Target, units: dict[str, tuple[str, ...]]) -> None:
    """Prints the counts of the register blocks of each unit's vector classes; raises SystemExit where one falls
    short."""
    for unit, classes in units.items():
        dump = [objdump, "-d", "-C", "--no-show-raw-insn", str(folder / f"{unit}.o")]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        print(f"{unit}:")
        print("\n".join(check_blocks(text, target, classes)), flush=True)


def counts_here() -> bool:
    """Whether blocks are counted on this machine: other compilers than GCC give functions other bounds."""
    if platform.machine() not in ("x86_64", "AMD64") or shutil.which("objdump") is None:
        return False
    version = subprocess.run([*host_compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return "Free Software Foundation" in version


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--arm"], ["--cross"], ["--sanitized"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        folder = ROOT / "build" / "native-host"
        program = build(host_compiler(), folder)
        if counts_here():
            count_blocks("objdump", folder, X86, X86_UNITS)
        return 0 if run_all([str(program)]) else 1
    if arguments == ["--sanitized"]:
        return 0 if all([run_sanitized(*sanitizer) for sanitizer in SANITIZERS.items()]) else 1
    if (missing := missing_tools(arguments[0])) is not None:
        print(missing, file=sys.stderr)
        return 2
    if arguments == ["--cross"]:
        return 0 if run_cross() else 1
    folder = ROOT / "build" / "native-arm"
    program = build(["aarch64-linux-gnu-g++"], folder)
    count_blocks("aarch64-linux-gnu-objdump", folder, ARM, ARM_UNITS)
    return 0 if run_all(["qemu-aarch64", "-cpu", "max", str(program)]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
