"""How long a report of a compiled kernel holds, and for which other kernel.

A report is kept under a hash of everything that determines it, so that a later run compiles only what has changed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import textwrap
from types import ModuleType
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from .cases import DTYPES
from .machine_code import Report, reading
from .work import Job, specialised

TWIN_REGISTERS = 255 - 31
"""Most registers of a float16 kernel whose report also holds for its twin, the same kernel in bfloat16."""


def holds_for_twin(report: Report) -> bool:
    """Whether the report of a float16 kernel also holds for its twin in bfloat16, except for a few registers.

    Of 4671 pairs compiled with Triton 3.6.0, on every compute capability, all but one had the same shared memory,
    stack and counts of instructions; registers differed by up to 22. The exception had 8 bytes of stack in bfloat16
    alone: ptxas limits registers for a higher occupancy, to a multiple of 8, so kernels with such a number are not
    taken for their twins.
    """
    limited = report.registers % 8 == 0 or report.registers > TWIN_REGISTERS or report.stack > 0
    return not report.violations() and not limited and report.code.wgmma == 0


def digest(one: Job) -> str:
    """Hash of everything that determines the report of a job, for one version of Triton.

    It covers the code of the kernel with the functions that it calls, the specialisation, the compute capability, and
    how the machine code is read. Comments, docstrings and line numbers do not matter.
    """
    half = DTYPES[one.dtype] != torch.float32
    parts = (_code_of(one.module, one.kernel), one.card.capability, half, *specialised(one), _reading())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _reading() -> str:
    patterns, sources = reading()
    return "".join([*patterns, *(ast.dump(_without_docstrings(source)) for source in sources)])


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
