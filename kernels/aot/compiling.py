"""Compiling jobs, in several processes, to reports. A job that fails gives a report with the error."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .machine_code import Report, assembled, inspected
from .work import Job, groups


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
            own = cubin if one is first else assembled(ptx, _architecture(one))
            reports.append(inspected(one, own, ptx, compiled.metadata))
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
