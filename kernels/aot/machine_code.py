"""Reading compiled kernels: resources, counts of instructions, and what is wrong with them.

Shared memory, registers and the size of the stack are read of every cubin. Its disassembly is checked for three
faults that compilers do not report: matrix products that wait for each other, accesses of local memory (spills), and
loops that move 16-bit values one by one. It is made only where the PTX or the stack shows that such a fault is
possible, because nvdisasm takes half as long as the compilation.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .cases import DTYPES
from .work import Job

TENSOR_MEMORY_COLUMNS = 512
# loads and stores of 16 bits or fewer, in PTX
_NARROW = re.compile(r"\b(ld|st)\.global\S*\.[busf](8|16)\b")
# instructions of the tensor cores: mma.sync, wgmma, tcgen05
_PRODUCT = r"\b([HIQ]MMA|HGMMA|UTC\w*MMA)\b"


class Code(NamedTuple):
    """Counts of instructions in the machine code of a kernel.

    Main loops are the loops with matrix products; a kernel without such a loop is counted as a whole.

    local: accesses to local memory. wgmma: warp-group matrix products in main loops. waits: waits in main loops until
    no such product is running; serialised code has one for each product. narrow: loads and stores of 16 bits or fewer
    in main loops. float32: local and narrow are not counted without wgmma, because they are no faults there.
    """

    local: int
    wgmma: int
    waits: int
    narrow: int


class Report(NamedTuple):
    """One compiled kernel."""

    job: Job
    shared: int = 0
    registers: int = 0
    stack: int = 0
    tensor_memory: int = 0
    code: Code = Code(0, 0, 0, 0)
    error: str | None = None

    def violations(self) -> list[str]:
        """What is wrong with the kernel, one sentence each."""
        if self.error is not None:
            return [self.error]
        found = []
        if self.shared > self.job.card.shared_limit:
            found.append(f"shared memory {self.shared} > {self.job.card.shared_limit}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"tensor memory {self.tensor_memory} > {TENSOR_MEMORY_COLUMNS} columns")
        if 0 < self.code.wgmma <= self.code.waits:
            found.append(f"serialised: {self.code.waits} waits for {self.code.wgmma} matrix products")
        if DTYPES[self.job.dtype] != torch.float32:
            # a stack alone costs nothing: ptxas can reserve one that it then does not use
            if self.code.local > 0:
                found.append(f"{self.code.local} accesses of local memory, {self.stack} bytes of stack (spills)")
            if self.code.narrow > 0:
                found.append(f"{self.code.narrow} loads or stores of 16 bits in a main loop")
        return found


def _run_tool(name: str, *arguments: str) -> str:
    """Standard output of one of the CUDA tools that come with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = str(tool) if tool.exists() else shutil.which(name)
    if command is None:
        raise RuntimeError(f"{name} is neither in the triton package nor on PATH")
    return subprocess.run([command, *arguments], capture_output=True, text=True, check=True).stdout


def _resources(cubin: str) -> tuple[int, int]:
    """Registers a thread, and bytes of stack (where spills live), of a file."""
    text = _run_tool("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack = (re.search(rf"{field}:(\d+)", text) for field in ("REG", "STACK"))
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(registers[1]), int(stack[1])


def read_code(text: str) -> Code:
    """Count instructions in the output of nvdisasm."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+([^;]*);", line):
            if (jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])) and jump[1] in labels:
                loops.append(range(labels[jump[1]], len(instructions)))
            instructions.append(instruction[1])

    def count(pattern: str, among: Iterable[str] = instructions) -> int:
        return sum(re.search(pattern, instruction) is not None for instruction in among)

    inside = {index for loop in loops if count(_PRODUCT, (instructions[i] for i in loop)) for index in loop}
    main = [instructions[index] for index in sorted(inside)]
    return Code(
        local=count(r"\b(LDL|STL)\b"),
        wgmma=count(r"\bHGMMA\b", main or instructions),
        waits=count(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", main or instructions),
        narrow=count(r"\b(LDG|STG|LDGSTS)\.\S*\b[US](16|8)\b", main),
    )


def _faults_possible(one: Job, ptx: str, stack: int) -> bool:
    """Whether the machine code can have a fault that only its disassembly shows.

    ptxas makes warp-group products and narrow accesses only of those in the PTX, and local memory lies on the stack.
    """
    half = DTYPES[one.dtype] != torch.float32
    return "wgmma" in ptx or (half and (stack > 0 or _NARROW.search(ptx) is not None))


def reading() -> tuple[list[str], list[str]]:
    """What the counts of a report depend on besides the kernel: patterns, and sources of functions."""
    return [_PRODUCT, _NARROW.pattern], [inspect.getsource(f) for f in (read_code, _faults_possible)]


def inspected(one: Job, cubin: bytes, ptx: str, metadata: Any) -> Report:
    """The report of a job from its machine code, its PTX and Triton's metadata."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, stack = _resources(file.name)
        code = Code(0, 0, 0, 0)
        if _faults_possible(one, ptx, stack):
            code = read_code(_run_tool("nvdisasm", "-c", "--no-dataflow", file.name))
    return Report(one, metadata.shared, registers, stack, getattr(metadata, "tmem_size", None) or 0, code)


def assembled(ptx: str, architecture: int) -> bytes:
    """The machine code for another capability 8.x, with the options that Triton gives to ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(re.sub(r"\.target sm_\d+", f".target sm_{architecture}", ptx), encoding="utf-8")
        _run_tool("ptxas", "-lineinfo", f"--gpu-name=sm_{architecture}", str(source), "-o", str(cubin))
        return cubin.read_bytes()
