"""Ahead-of-time compilation of the kernels for GPUs that this machine does not have.

The executor and the operators run on tensors of the "meta" device, as if on one of `cards.CARDS` with its number of
multiprocessors, and their launches are recorded. The compiled kernels have the constants and the argument
specialisation of those launches. Launches of several GPUs that need the same kernel are compiled once; GPUs of
compute capability 8.x also share the PTX, because Triton writes the same for them. Each cubin is then checked for
shared memory, registers and local memory. Its disassembly is checked for two faults that compilers do not report:
matrix products that wait for each other, and loops that move 16-bit values one by one. It is made only where the PTX
or the stack shows that such a fault is possible, because nvdisasm takes half as long as the compilation. Needs
triton, no GPU. Used by `tests/test_kernels_aot.py` and `bench/aot_report.py`.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import inspect
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
TWIN_REGISTERS = 255 - 31
"""Most registers of a float16 kernel whose report also holds for its twin, the same kernel in bfloat16."""
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
# loads and stores of 16 bits or fewer, in PTX
_NARROW = re.compile(r"\b(ld|st)\.global\S*\.[busf](8|16)\b")
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
    plan, how = _plan(model, batch), "plain" if overlap else "none"
    return _Elsewhere.of(plan, DTYPES[dtype], device=torch.device("meta"), overlap=how)


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

    Attention in both variants, without gradients and in training (16 bit: also in NHWC), and the merges. Overlapped
    launches (off by default) differ in the first and last instructions of the convolutions alone: LGNet's, batch 1.
    """
    cases = []
    for dtype in dtypes:
        half = DTYPES[dtype] != torch.float32
        for batch in batches:
            for model in models:
                cases += [engine_case(card, model, dtype, batch, restricted) for restricted in (False, True)]
                if card.capability >= (9, 0) and (model, batch) == (MODELS[0], 1):
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
    found: dict[tuple[str, ...], Job] = {}
    recorded = set()
    for case in cases:
        # all that a launch depends on: the H200 launches what the H100 does
        same = (case.card.capability, case.card.num_sms, case.dtype, case.label)
        if same in recorded:
            continue
        recorded.add(same)
        for launch in launches(case):
            one = job(case, launch)
            found.setdefault((str(one.card.capability), *_specialised(one)), one)
    return list(found.values())


def _specialised(one: Job) -> tuple[str, ...]:
    """Everything of a job that the compiled kernel depends on, except the GPU."""
    parts = (one.signature, one.constants, one.attributes, one.options)
    return (one.module, one.kernel, *map(str, parts))


def groups(work: Iterable[Job]) -> list[list[Job]]:
    """The jobs that are compiled together: the same kernel for several compute capabilities 8.x."""
    found: dict[tuple[str, ...], list[Job]] = {}
    for one in work:
        major, minor = one.card.capability
        family = "8.x" if major == 8 else f"{major}.{minor}"
        found.setdefault((family, *_specialised(one)), []).append(one)
    return list(found.values())


def shard(work: Iterable[Job], number: int, count: int) -> list[Job]:
    """Part `number` of `count` (from 1) of the jobs.

    A kernel's part does not depend on what other jobs there are. Twins are in one part, and so are all cards.
    """
    if not 1 <= number <= count:
        raise ValueError(f"shard: expected a number from 1 to {count}, got {number}")
    return [
        one
        for one in work
        if int(hashlib.sha256(repr(_of_float16(one)).encode()).hexdigest()[:12], 16) % count == number - 1
    ]


def _of_float16(one: Job) -> tuple[str, ...]:
    """:func:`_specialised` with float16 in place of bfloat16; the factor of stored queries differs too."""
    scale = list(one.signature).index("Q_SCALE") if "Q_SCALE" in one.signature else -1
    constants = {path: value for path, value in one.constants.items() if path[0] != scale}
    signature = str(one.signature).replace("*bf16", "*fp16")
    return (one.module, one.kernel, signature, str(constants), str(one.attributes), str(one.options))


def twins(work: Iterable[Job]) -> tuple[list[Job], list[tuple[Job, Job]]]:
    """The jobs without those in bfloat16 that have a twin in float16, and the pairs (job in bfloat16, its twin)."""
    work = list(work)
    single = {(one.card.capability, _of_float16(one)): one for one in work if one.dtype == "float16"}
    rest, pairs = [], []
    for one in work:
        other = single.get((one.card.capability, _of_float16(one))) if one.dtype == "bfloat16" else None
        if other is None:
            rest.append(one)
        else:
            pairs.append((one, other))
    return rest, pairs


def holds_for_twin(report: Report) -> bool:
    """Whether the report of a float16 kernel also holds for its twin in bfloat16, except for a few registers.

    Of 4671 pairs compiled with Triton 3.6.0, on every compute capability, all but one had the same shared memory,
    stack and counts of instructions; registers differed by up to 22. The exception spilled 8 bytes in bfloat16 alone:
    ptxas limits registers for a higher occupancy, to a multiple of 8, so kernels with such a number are not taken for
    their twins.
    """
    limited = report.registers % 8 == 0 or report.registers > TWIN_REGISTERS
    return not report.violations() and not limited and report.code.wgmma == 0


def digest(one: Job) -> str:
    """Hash of everything that determines the report of a job, for one version of Triton.

    It covers the code of the kernel with the functions that it calls, the specialisation, the compute capability, and
    how the machine code is read. Comments, docstrings and line numbers do not matter.
    """
    half = DTYPES[one.dtype] != torch.float32
    parts = (_code_of(one.module, one.kernel), one.card.capability, half, *_specialised(one), _reading())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _reading() -> str:
    code = [ast.dump(_without_docstrings(inspect.getsource(f))) for f in (read_code, _faults_possible)]
    return "".join([_PRODUCT, _NARROW.pattern, *code])


def _without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


@functools.cache
def _code_of(module: str, name: str) -> str:
    """The code of a kernel and, once each, of the functions, types and constants of its module that it names."""
    found: dict[str, str] = {}

    def add(function: Any) -> None:
        tree = _without_docstrings(function.src)
        found[function.__name__] = ast.dump(tree)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for used in sorted(names & function.__globals__.keys() - found.keys()):
            value = function.__globals__[used]
            if isinstance(value, JITFunction):
                add(value)
            elif hasattr(value, "_fields"):
                found[used] = repr(value._fields)
            elif not callable(value) and not isinstance(value, ModuleType):
                found[used] = repr(value)

    add(getattr(importlib.import_module(module), name))
    return repr(sorted(found.items()))


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


def _inspected(one: Job, cubin: bytes, ptx: str, metadata: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, stack = _resources(file.name)
        code = Code(0, 0, 0, 0)
        if _faults_possible(one, ptx, stack):
            code = read_code(_run_tool("nvdisasm", "-c", "--no-dataflow", file.name))
    return Report(one, metadata.shared, registers, stack, getattr(metadata, "tmem_size", None) or 0, code)


def _assembled(ptx: str, architecture: int) -> bytes:
    """The machine code for another capability 8.x, with the options that Triton gives to ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(re.sub(r"\.target sm_\d+", f".target sm_{architecture}", ptx), encoding="utf-8")
        _run_tool("ptxas", "-lineinfo", f"--gpu-name=sm_{architecture}", str(source), "-o", str(cubin))
        return cubin.read_bytes()


def _failed(one: Job, error: Exception) -> Report:
    # a compiler's message can be pages long
    return Report(one, error=f"{type(error).__name__}: {str(error).strip()[:300]}")


@contextlib.contextmanager
def _compiled_files(keep: bool) -> Iterator[None]:
    """Triton's own cache, or a folder that is removed: a kernel's files take half a megabyte."""
    if keep:
        yield
        return
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


def compile_group(group: Sequence[Job], keep: bool = True) -> list[Report]:
    """Compile one of :func:`groups` and read its cubins. keep: leave the compiled files in Triton's cache."""
    first = group[0]
    kernel = getattr(importlib.import_module(first.module), first.kernel)
    reports = []
    try:
        source = ASTSource(kernel, first.signature, first.constants, first.attributes)
        target = GPUTarget("cuda", _architecture(first), 32)
        with _compiled_files(keep):
            compiled = triton.compile(source, target=target, options=first.options)
            ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    except Exception as error:
        return [_failed(one, error) for one in group]
    for one in group:
        try:
            own = cubin if one is first else _assembled(ptx, _architecture(one))
            reports.append(_inspected(one, own, ptx, compiled.metadata))
        except Exception as error:
            reports.append(_failed(one, error))
    return reports


def _architecture(one: Job) -> int:
    major, minor = one.card.capability
    return 10 * major + minor


def compile_job(one: Job) -> Report:
    """Compile one kernel and read its cubin."""
    return compile_group([one])[0]


def compile_all(work: Sequence[Job], processes: int | None = None, keep: bool = True) -> Iterator[Report]:
    """Compile in parallel processes; reports come in the order of :func:`groups`. keep: see :func:`compile_group`."""
    context = multiprocessing.get_context("spawn")
    count = processes or len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        for reports in pool.map(functools.partial(compile_group, keep=keep), groups(work)):
            yield from reports
