"""Ahead-of-time compilation of the kernels for GPUs that are not here.

The launchers run on tensors of the "meta" device while their launches are recorded, so that what is compiled is what
would be launched: same constants, same specialisation of arguments. Each cubin is then read for shared memory,
registers and spills. Needs triton, no GPU. Used by `tests/test_kernels_aot.py` and `bench/aot_report.py`.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention, configs, conv, conv_configs, merge_concat
from .launch import OPTIONS, Launch, record

TENSOR_MEMORY_COLUMNS = 512
OVERLAPPING = ("sm_90", "sm_100")
_POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# head size -> side of the feature map in a 256 x 256 picture, for LGNet and LGNet_light
NETWORK_SHAPES = {128: 64, 256: 32, 512: 16, 96: 64, 192: 32, 384: 16}
# One of each kind of convolution of LGNet at 256 x 256: (step, side of its input, residual, stores).
NETWORK_CONVS: dict[str, tuple[conv.Conv, int, bool, int]] = {
    "e1": (conv.Conv(4, 64, 4, 2, 1, False, False, False), 256, False, 2),
    "e3": (conv.Conv(128, 256, 4, 2, 1, False, False, False), 64, False, 2),
    "e6": (conv.Conv(512, 512, 4, 2, 1, False, False, False), 8, False, 2),
    "e8": (conv.Conv(512, 512, 4, 2, 1, False, False, False), 2, False, 1),
    "d6": (conv.Conv(1024, 512, 4, 2, 1, True, False, False), 4, False, 1),
    "d3": (conv.Conv(512, 128, 4, 2, 1, True, False, False), 32, False, 1),
    "d1": (conv.Conv(128, 3, 4, 2, 1, True, False, True), 128, False, 0),
    "stem": (conv.Conv(4, 64, 7, 1, 3, False, True, False), 256, False, 1),
    "down2": (conv.Conv(128, 256, 3, 2, 1, False, False, False), 128, False, 1),
    "block": (conv.Conv(256, 256, 3, 1, 1, False, True, False), 64, True, 1),
    "up1": (conv.Conv(256, 128, 3, 2, 1, True, False, False), 64, False, 1),
    "out": (conv.Conv(64, 3, 7, 1, 3, False, True, True), 256, False, 0),
    # LGNet_light: its channels are no powers of two
    "light_e2": (conv.Conv(48, 96, 4, 2, 1, False, False, False), 128, False, 2),
    "light_d2": (conv.Conv(192, 48, 4, 2, 1, True, False, False), 64, False, 1),
}


class Case(NamedTuple):
    """Launches to compile: `run` calls launchers on meta tensors. `dtype` is a name in DTYPES."""

    label: str
    target: str
    dtype: str
    channels: int
    run: Callable[[], Any]


class Report(NamedTuple):
    """One compiled kernel."""

    kernel: str
    target: str
    dtype: str
    channels: int
    label: str
    config: str
    shared: int
    registers: int
    spill_bytes: int
    tensor_memory: int
    error: str | None

    def violation(self) -> str | None:
        """What is wrong with it, or None."""
        if self.error is not None:
            return self.error
        limit = configs.SHARED_LIMITS[self.target]
        if self.shared > limit:
            return f"shared memory {self.shared} > {limit}"
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            return f"tensor memory {self.tensor_memory} > {TENSOR_MEMORY_COLUMNS} columns"
        if self.spill_bytes > 0 and DTYPES[self.dtype] != torch.float32:
            return f"{self.spill_bytes} bytes of spills"
        return None


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes that Triton's own launch would derive (16-byte aligned pointers)."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False))
    values.update({k: v for k, v in launch.meta.items() if k in names})
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, name in enumerate(names):
        value = values[name]
        parameter = launch.kernel.params[index]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        aligned = False
        if isinstance(value, Tensor):
            signature[name] = _POINTER[value.dtype]
            aligned = True
        elif value is None or parameter.is_constexpr or (specialised and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = specialised and value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack (where spills live)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise RuntimeError("cuobjdump is neither in the triton package nor on PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [command, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (re.search(rf"{field}:(\d+)", text) for field in ("REG", "STACK"))
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(registers[1]), int(stack[1])


def launches(case: Case) -> list[Launch]:
    """What the case's launchers would launch on its target."""
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    try:
        with record() as recorded, configs.assume_generation(case.target):
            case.run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    return recorded


def compile_launch(case: Case, launch: Launch) -> Report:
    """Compile one recorded launch for the case's target."""
    signature, constants, attributes = _specialise(launch)
    options = {name: launch.meta[name] for name in ("num_warps", "num_stages")}
    shapes = {k: v for k, v in launch.meta.items() if k.startswith("BLOCK_") or k in options}
    report = Report(
        launch.kernel.__name__,
        case.target,
        case.dtype,
        case.channels,
        case.label,
        " ".join(f"{k.removeprefix('BLOCK_').lower()}={v}" for k, v in shapes.items()),
        *(0, 0, 0, 0, None),
    )
    target = GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    try:
        source = ASTSource(launch.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options | OPTIONS)
        registers, stack = _resources(compiled.asm["cubin"])
    except Exception as error:
        # a compiler's message can be pages long
        return report._replace(error=f"{type(error).__name__}: {str(error).strip()[:300]}")
    return report._replace(
        shared=compiled.metadata.shared,
        registers=registers,
        spill_bytes=stack,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def _compile_nth(work: tuple[Callable[[], list[Case]], int, int]) -> Report:
    cases, case_index, launch_index = work
    case = cases()[case_index]
    return compile_launch(case, launches(case)[launch_index])


def compile_all(cases: Callable[[], list[Case]], processes: int | None = None) -> Iterator[Report]:
    """Compile every distinct launch of `cases()`, which must be picklable, in parallel processes."""
    work = []
    seen = set()
    for case_index, case in enumerate(cases()):
        for launch_index, launch in enumerate(launches(case)):
            signature, constants, attributes = _specialise(launch)
            options = (launch.meta["num_warps"], launch.meta["num_stages"])
            key = (case.target, launch.kernel.__name__, str(signature), str(constants), str(attributes), options)
            if key not in seen:
                seen.add(key)
                work.append((cases, case_index, launch_index))
    context = multiprocessing.get_context("spawn")
    count = processes or os.cpu_count() or 1
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        yield from pool.map(_compile_nth, work)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_case(target: str, dtype: str, batch: int, channels: int, side: int, variant: str) -> Case:
    """The attention block on [batch, channels, side, side], forward (with the attended map) and backward."""

    def run() -> None:
        features = _meta(batch, channels, side, side, dtype=DTYPES[dtype])
        weight = _meta(channels, 2 * channels, 1, 1, dtype=DTYPES[dtype])
        bias = _meta(channels, dtype=DTYPES[dtype])
        out, attended, stats = attention.attention_block_forward(features, weight, bias, variant, save_attended=True)
        assert attended is not None
        attention.attention_block_backward(out, features, attended, stats, weight, variant)

    return Case(f"block {variant} b{batch} {side}x{side}", target, dtype, channels, run)


def merge_case(target: str, dtype: str, tanh: bool) -> Case:
    """Both merges at 256x256, forward and backward."""

    def run() -> None:
        image = _meta(1, 3, 256, 256, dtype=DTYPES[dtype])
        mask = _meta(1, 1, 256, 256, dtype=DTYPES[dtype])
        grad = merge_concat.merge_concat_forward(image, image, mask, tanh=tanh)
        merge_concat.merge_concat_backward(grad, image, image, mask, tanh=tanh)
        merge_concat.merge_forward(image, image, mask, tanh=tanh)
        merge_concat.merge_backward(image, image, image, mask, tanh=tanh)

    return Case("merge tanh" if tanh else "merge", target, dtype, 3, run)


def conv_case(target: str, dtype: str, batch: int, name: str, overlap: bool = False) -> Case:
    """A convolution of the engine, NETWORK_CONVS[name], with the block shapes it would run with on `target`."""
    step, side, has_residual, stores = NETWORK_CONVS[name]
    size = 2 * side if step.transposed else side // step.stride
    work = step.work(batch, (side, side), (size, size), (0, size, 0, size))

    def run() -> None:
        element = DTYPES[dtype]
        kind = configs.config_kind(element, "tf32" if dtype == "tf32" else "ieee")
        generation, num_sms = configs.device_generation(torch.device("meta"))
        tile = conv_configs.pick_tile(work, kind, generation, num_sms)
        full = torch.float32
        out = _meta(batch, size, size, step.out_channels, dtype=element)
        merge = None
        if step.merges:
            picture, raw = _meta(batch, size, size, 4, dtype=element), _meta(batch, 3, size, size, dtype=full)
            merge = conv.Merge(raw, _meta(batch, 1, size, size, dtype=full), raw, picture, False)
        pair = (step.in_channels, step.out_channels)[:: 1 if step.transposed else -1]
        conv.conv_forward(
            step,
            _meta(batch, side, side, step.in_channels, dtype=element),
            step.pack(_meta(*pair, step.kernel, step.kernel, dtype=element)),
            _meta(step.out_channels, dtype=full),
            (conv.Store(out, "leaky_relu"), conv.Store(out, "relu"))[:stores],
            tile,
            size=(size, size),
            residual=out if has_residual else None,
            merge=merge,
            overlap=overlap,
            partial=_meta(tile.splits * work.all_rows * work.columns, dtype=full) if tile.splits > 1 else None,
        )

    return Case(f"conv {name} b{batch}{' overlapped' if overlap else ''}", target, dtype, step.in_channels, run)


def network_cases(
    targets: Sequence[str],
    works: Sequence[tuple[str, str, int]],
    channels: Sequence[int] = tuple(NETWORK_SHAPES),
    convs: Sequence[str] = tuple(NETWORK_CONVS),
) -> list[Case]:
    """The network's attention blocks and merges, and the engine's convolutions.

    Args:
        targets: such as "sm_90".
        works: (dtype name, variant, batch) of the attention blocks.
        channels: head sizes, keys of NETWORK_SHAPES.
        convs: keys of NETWORK_CONVS, each in the dtypes and for the batches of `works`.
    """
    cases = []
    for target in targets:
        for dtype, variant, batch in works:
            cases += [attention_case(target, dtype, batch, size, NETWORK_SHAPES[size], variant) for size in channels]
        cases += [merge_case(target, "float16", tanh) for tanh in (False, True)]
        for dtype, batch in dict.fromkeys((dtype, batch) for dtype, _, batch in works):
            cases += [conv_case(target, dtype, batch, name) for name in convs]
            if target in OVERLAPPING:
                cases += [
                    conv_case(target, dtype, batch, name, True) for name in convs if name in ("e6", "d6", "block")
                ]
    return cases
