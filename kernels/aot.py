"""Ahead-of-time compilation of the kernels for GPUs that this machine does not have.

The executor and the operators run on tensors of the "meta" device, as if on one of `cards.CARDS` with its number of
multiprocessors, and their launches are recorded. The compiled kernels have the constants and the argument
specialisation of those launches. Launches of several GPUs that need the same kernel are compiled once. Each cubin is
then checked for shared memory, registers and local memory. Its disassembly is checked for two faults that compilers
do not report: matrix products that wait for each other, and loops that move 16-bit values one by one. Needs triton,
no GPU. Used by `tests/test_kernels_aot.py` and `bench/aot_report.py`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda_executor import CudaExecutor
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.reference.variants import create_model

from . import attention, attention_inference, configs, merge_concat
from .cards import Card
from .launch import OPTIONS, Launch, record
from .precompile import Pointer, Task, task

SIDE = 256
"""Height and width of the pictures."""
HOLE = Rect(96, 160, 96, 160)
"""The hole of the restricted runs, in pixels."""
MODELS = ("lgnet", "lgnet_light", "lgnet_demo", "lgnet_small")
TENSOR_MEMORY_COLUMNS = 512
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
# instructions of the tensor cores: mma.sync, wgmma, tcgen05
_PRODUCT = r"\b([HIQ]MMA|HGMMA|UTC\w*MMA)\b"
_POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
ArgumentPath = tuple[int, ...]
"""Position of an argument of the kernel, followed by positions within nested tuples."""


class Case(NamedTuple):
    """Launches to compile: `run` calls executors or launchers on meta tensors. `dtype` is a name in DTYPES."""

    label: str
    card: Card
    dtype: str
    run: Callable[[], Any]


class Job(NamedTuple):
    """One kernel to compile, picklable. The label and card are those of its first launch."""

    label: str
    card: Card
    dtype: str
    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[ArgumentPath, Any]
    attributes: dict[ArgumentPath, Any]
    options: dict[str, Any]
    config: str


class Code(NamedTuple):
    """Counts of instructions in the machine code of a kernel.

    Main loops are the loops with matrix products; a kernel without such a loop is counted as a whole.

    local: accesses to local memory. wgmma: warp-group matrix products in main loops. waits: waits in main loops until
    no such product is running; serialised code has one for each product. narrow: loads and stores of 16 bits or fewer
    in main loops.
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
            if self.stack > 0:
                found.append(f"{self.stack} bytes of spills")
            if self.code.local > 0:
                found.append(f"{self.code.local} accesses of local memory")
            if self.code.narrow > 0:
                found.append(f"{self.code.narrow} loads or stores of 16 bits in a main loop")
        return found


# -- what is launched ------------------------------------------------------------------------------------------------


class _Elsewhere(CudaExecutor):
    """An executor for a GPU that this machine does not have: its launches can be recorded, not made."""

    @staticmethod
    def unavailable_reason(device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
        return None

    def _overlap_reason(self) -> str | None:
        return None

    def launch_all(self, holes: Sequence[Rect] | None) -> None:
        """Make all launches of one run, in order."""
        regions = None
        if holes is not None:
            regions = [step.regions for step in self.restricted(self.plan, holes).steps]
        with torch.no_grad():
            for launch in self._launches(self.memory, regions, painted=holes is not None):
                launch()


@functools.lru_cache(maxsize=64)
def _plan(model: str, batch: int) -> Plan:
    with torch.device("meta"):
        network = create_model(model).eval()
    return build_plan(plan_stages(network), batch, SIDE, SIDE)


def heads(model: str) -> list[tuple[int, int]]:
    """(channels, side of the map) of the model's attention blocks."""
    plan = _plan(model, 1)
    return [(s.out_channels, plan.buffers[s.source.buffer].height) for s in plan.steps if s.kind == "attention"]


def executor(model: str, dtype: str, batch: int, overlap: bool = False) -> _Elsewhere:
    """An executor on meta tensors; call it within `configs.assume_generation`."""
    return _Elsewhere.of(_plan(model, batch), DTYPES[dtype], device=torch.device("meta"), overlap=overlap)


def engine_case(card: Card, model: str, dtype: str, batch: int, restricted: bool, overlap: bool = False) -> Case:
    """All launches of a run of the engine, dense or within HOLE."""

    def run() -> None:
        executor(model, dtype, batch, overlap).launch_all([HOLE] if restricted else None)

    kind = ("restricted" if restricted else "dense") + (" overlapped" if overlap else "")
    return Case(f"{model} b{batch} {kind}", card, dtype, run)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention_tensors(
    batch: int, channels: int, side: int, dtype: str, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    element = DTYPES[dtype]
    features = _meta(batch, channels, side, side, dtype=element)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    return features, _meta(channels, 2 * channels, 1, 1, dtype=element), _meta(channels, dtype=element)


def attention_case(
    card: Card, dtype: str, batch: int, channels: int, side: int, variant: str, channels_last: bool = False
) -> Case:
    """The attention block on [batch, channels, side, side] in training: forward and backward."""

    def run() -> None:
        features, weight, bias = _attention_tensors(batch, channels, side, dtype, channels_last)
        out, attended, stats = attention.attention_block_forward(features, weight, bias, variant, save_attended=True)
        assert attended is not None
        assert stats is not None
        attention.attention_block_backward(out, features, attended, stats, weight, variant)

    layout = " NHWC" if channels_last else ""
    return Case(f"training {variant} C={channels} {side}x{side} b{batch}{layout}", card, dtype, run)


def inference_case(card: Card, dtype: str, batch: int, channels: int, side: int, variant: str) -> Case:
    """The attention block without gradients, as the operator calls it."""

    def run() -> None:
        features, weight, bias = _attention_tensors(batch, channels, side, dtype, False)
        attention_inference.attention_block_inference(features, weight, bias, variant)

    return Case(f"no gradient {variant} C={channels} {side}x{side} b{batch}", card, dtype, run)


def merge_case(card: Card, dtype: str, batch: int, tanh: bool) -> Case:
    """Both merges, forward and backward."""

    def run() -> None:
        image = _meta(batch, 3, SIDE, SIDE, dtype=DTYPES[dtype])
        mask = _meta(batch, 1, SIDE, SIDE, dtype=DTYPES[dtype])
        grad = merge_concat.merge_concat_forward(image, image, mask, tanh=tanh)
        merge_concat.merge_concat_backward(grad, image, image, mask, tanh=tanh)
        merge_concat.merge_forward(image, image, mask, tanh=tanh)
        merge_concat.merge_backward(image, image, image, mask, tanh=tanh)

    return Case(f"merge{' tanh' if tanh else ''} b{batch}", card, dtype, run)


def card_cases(
    card: Card,
    dtypes: Sequence[str] = tuple(DTYPES),
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = (1, 16),
) -> list[Case]:
    """All cases of a GPU: the engine, dense and restricted, and the operators.

    Attention in both variants, without gradients and in training (16 bit: also in NHWC), and the merges.
    """
    cases = []
    for dtype in dtypes:
        half = DTYPES[dtype] != torch.float32
        for batch in batches:
            for model in models:
                cases += [engine_case(card, model, dtype, batch, restricted) for restricted in (False, True)]
                if card.capability >= (9, 0):
                    cases.append(engine_case(card, model, dtype, batch, False, overlap=True))
                for channels, side in heads(model):
                    for variant in attention.VARIANTS:
                        cases.append(inference_case(card, dtype, batch, channels, side, variant))
                        for channels_last in (False, True) if half else (False,):
                            cases.append(attention_case(card, dtype, batch, channels, side, variant, channels_last))
            cases += [merge_case(card, dtype, batch, tanh) for tanh in (False, True)]
    return cases


# -- what is compiled ------------------------------------------------------------------------------------------------


def launches(case: Case) -> list[Launch]:
    """What the case launches on its card."""
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    try:
        with record() as recorded, configs.assume_generation(case.card.generation, case.card.num_sms):
            case.run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    return recorded


def _specialise(work: Task, kernel: Any) -> tuple[dict[str, Any], dict[ArgumentPath, Any], dict[ArgumentPath, Any]]:
    """Signature, constants and attributes that Triton's own launch would derive."""
    names = kernel.arg_names
    values = dict(zip(names, work.args, strict=False))
    values.update({k: v for k, v in work.meta if k in names})
    constants: dict[ArgumentPath, Any] = {}
    attributes: dict[ArgumentPath, Any] = {}

    def type_of(value: Any, path: ArgumentPath, constant: bool, specialised: bool) -> Any:
        if constant or value is None or (specialised and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            types = [type_of(part, (*path, i), False, True) for i, part in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if isinstance(value, Pointer):
            if value.aligned:
                attributes[path] = [["tt.divisibility", 16]]
            return _POINTER[value.dtype]
        if isinstance(value, int):
            if specialised and value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if value < 2**31 else "i64"
        return "fp32"

    signature = {
        name: type_of(values[name], (index,), parameter.is_constexpr, not parameter.do_not_specialize)
        for index, (name, parameter) in enumerate(zip(names, kernel.params))
    }
    return signature, constants, attributes


def job(case: Case, launch: Launch) -> Job:
    """The job of one recorded launch of a case."""
    work = task(launch)
    options = {name: value for name, value in launch.meta.items() if name in _OPTIONS}
    shapes = {k: v for k, v in launch.meta.items() if k.startswith("BLOCK_") or k in ("SPLITS", *options)}
    config = " ".join(f"{k.removeprefix('BLOCK_').removeprefix('num_').lower()}={v}" for k, v in shapes.items())
    specialised = _specialise(work, launch.kernel)
    return Job(case.label, case.card, case.dtype, work.module, work.kernel, *specialised, options | OPTIONS, config)


def jobs(cases: Iterable[Case]) -> list[Job]:
    """One job for each kernel that the cases launch; GPUs of one compute capability share jobs."""
    found: dict[tuple[Any, ...], Job] = {}
    for case in cases:
        for launch in launches(case):
            one = job(case, launch)
            parts = (one.signature, one.constants, one.attributes, one.options)
            found.setdefault((one.card.capability, one.module, one.kernel, *map(str, parts)), one)
    return list(found.values())


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


def compile_job(one: Job) -> Report:
    """Compile one kernel and read its cubin."""
    major, minor = one.card.capability
    kernel = getattr(importlib.import_module(one.module), one.kernel)
    try:
        source = ASTSource(kernel, one.signature, one.constants, one.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=one.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            registers, stack = _resources(file.name)
            code = read_code(_run_tool("nvdisasm", "-c", file.name))
    except Exception as error:
        # a compiler's message can be pages long
        return Report(one, error=f"{type(error).__name__}: {str(error).strip()[:300]}")
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Report(one, compiled.metadata.shared, registers, stack, columns, code)


def compile_all(work: Sequence[Job], processes: int | None = None) -> Iterator[Report]:
    """Compile in parallel processes; reports come in the order of `work`."""
    context = multiprocessing.get_context("spawn")
    count = processes or len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        yield from pool.map(compile_job, work)
