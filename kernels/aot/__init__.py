"""Ahead-of-time compilation of the kernels for GPUs that this machine does not have.

The executor and the operators run on tensors of the "meta" device, as if on one of `cards.CARDS` with its number of
multiprocessors, and their launches are recorded (:mod:`.cases`). The compiled kernels have the constants and the
argument specialisation of those launches; launches of several GPUs that need the same kernel are compiled once
(:mod:`.work`, :mod:`.compiling`). Each cubin is then read for what would not run or be slow (:mod:`.machine_code`),
and its report is kept as long as what it depends on does not change (:mod:`.verdicts`). Needs triton, no GPU. Used by
`tests/test_kernels_aot.py` and `bench/aot_report.py`.
"""

from __future__ import annotations

from .cases import (
    DTYPES,
    HOLE,
    MODELS,
    SIDE,
    Case,
    attention_case,
    card_cases,
    engine_case,
    executor,
    heads,
    inference_case,
    launches,
    merge_case,
)
from .compiling import compile_all, compile_group, compile_job
from .machine_code import Code, Report, read_code
from .verdicts import digest, holds_for_twin
from .work import Job, groups, job, jobs, shard, twins

__all__ = [
    "DTYPES",
    "HOLE",
    "MODELS",
    "SIDE",
    "Case",
    "Code",
    "Job",
    "Report",
    "attention_case",
    "card_cases",
    "compile_all",
    "compile_group",
    "compile_job",
    "digest",
    "engine_case",
    "executor",
    "groups",
    "heads",
    "holds_for_twin",
    "inference_case",
    "job",
    "jobs",
    "launches",
    "merge_case",
    "read_code",
    "shard",
    "twins",
]
