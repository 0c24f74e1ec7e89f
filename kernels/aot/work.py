"""Launches as jobs: kernels to compile, each once, and their division among compilations and machines.

Two launches are one job where everything is equal that the compiled kernel depends on, including the GPU's compute
capability. GPUs of compute capability 8.x share the PTX too, because Triton writes the same for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..cards import Card
from ..launch import OPTIONS, Launch
from ..precompile import Pointer, Task, task
from .cases import Case, launches

_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
_POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
ArgumentPath = tuple[int, ...]
"""Position of an argument of the kernel, followed by positions within nested tuples."""


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
            found.setdefault((str(one.card.capability), *specialised(one)), one)
    return list(found.values())


def specialised(one: Job) -> tuple[str, ...]:
    """Everything of a job that the compiled kernel depends on, except the GPU."""
    parts = (one.signature, one.constants, one.attributes, one.options)
    return (one.module, one.kernel, *map(str, parts))


def groups(work: Iterable[Job]) -> list[list[Job]]:
    """The jobs that are compiled together: the same kernel for several compute capabilities 8.x."""
    found: dict[tuple[str, ...], list[Job]] = {}
    for one in work:
        major, minor = one.card.capability
        family = "8.x" if major == 8 else f"{major}.{minor}"
        found.setdefault((family, *specialised(one)), []).append(one)
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
    """:func:`specialised` with float16 in place of bfloat16; the factor of stored queries differs too."""
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
