"""What an engine measures at its first use on a GPU, without a tuning, because it takes seconds.

In 16 bit, in this order: the convolutions in CUDA C++ (`kernels/picture_conv.py`; on Hopper `kernels/hopper.py`)
beside what runs otherwise; on Hopper, attention in CUDA C++ (`kernels/hopper_attention.py`) in the same way, then
whether groups of layers that can share a launch take less time so (:mod:`.deep_layers`, :mod:`.chains`). Another
process measures each of these, because it may not have run on this GPU yet. The results are kept; a failure is logged
and kept, and what runs without it stays. Nothing is measured where no process can be started, or where the result
could not be kept. :mod:`.tuning` measures more, and its results replace these.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import cache
from ..plan import PICTURE, AttentionStep, ConvStep, Plan, Step
from . import chains, deep_layers
from .checks import checked_plan
from .executor import CudaExecutor, CudaOptions
from .graphs import error_text
from .launches import Launch, run_all
from .measure import GAIN_ALONE, Found, Log, Timer, kept, progress_of, tuned_plans
from .tuning_attention import compare_compiled
from .tuning_convolutions import Contest, tune_convolutions
from .weights import CudaWeights, Tuned, card_of, conv_of, target_of, work_of

logger = logging.getLogger("lgnet_fast")
waits = logging.getLogger("lgnet_fast.waits")  # which the command line shows

SHARED = {"deep": "deep layers in one launch", "chain": "chains of convolutions in one launch"}
"""Kinds of groups of layers that share a launch, as in the executor's `choices`, by what messages call them."""
ATTENTION = "attention for Hopper"
"""What messages call its measurement."""
_DEEP_ROWS = 64
"""Value of :attr:`.executor.CudaOptions.deep_rows` that is timed."""


def at_first_use(plan: Plan, dtype: torch.dtype, device: torch.device) -> Tuned:
    """All choices that are kept for a GPU. Before, those that they lack are measured, see above.

    Args:
        plan: dense, with float32 weights on `device`.
        dtype, device: of the computation.
    """
    from lgnet_fast.kernels.compiled import AT_FIRST_USE
    from lgnet_fast.kernels.compiled_checks import DTYPES

    if dtype in DTYPES:
        for title, kernel in AT_FIRST_USE.items():
            _tried(title, _compiled, title, kernel, plan, dtype, device)
        _tried(ATTENTION, _attention, plan, dtype, device)
        for kind, title in SHARED.items():
            _tried(title, _shared, kind, plan, dtype, device)
    return kept(device, dtype)


def _tried(title: str, measure: Callable[..., str | None], *arguments: Any) -> None:
    """Call `measure`; log why it measured nothing. The engine can do without."""
    try:
        reason = measure(*arguments)
    except Exception as error:
        reason = error_text(error)
    if reason is not None:
        logger.info("not measured: %s: %s", title, reason)


def _compiled(title: str, kernel: ModuleType, plan: Plan, dtype: torch.dtype, device: torch.device) -> str | None:
    """Measure a compiled convolution where that was not done; why not, or None. The plan has the size of a check,
    because the choices hold for all sizes."""
    if not kernel.runs_on(device):
        return None
    part = _part(
        checked_plan(plan), lambda step: isinstance(step, ConvStep) and kernel.unsupported(conv_of(step)) is None
    )
    if _has_all(kept(device, dtype), part, dtype, device):
        return None
    return _measured_apart(title, plan.name, dtype, device, measure_compiled, title, part)


def _attention(plan: Plan, dtype: torch.dtype, device: torch.device) -> str | None:
    """Measure compiled attention where that was not done for blocks of as many channels; why not, or None."""
    from lgnet_fast.kernels import hopper
    from lgnet_fast.kernels.hopper_attention import CHANNELS

    if not hopper.runs_on(device):
        return None
    part = _part(checked_plan(plan), lambda step: isinstance(step, AttentionStep) and step.out_channels in CHANNELS)
    measured = {channels for channels, _, _ in kept(device, dtype).attention}
    if measured.issuperset(step.out_channels for step in part.steps):
        return None
    return _measured_apart(ATTENTION, plan.name, dtype, device, measure_attention, part)


def _shared(kind: str, plan: Plan, dtype: torch.dtype, device: torch.device) -> str | None:
    """Measure the groups of a :data:`SHARED` kind where that was not done; why not, or None."""
    from lgnet_fast.kernels import hopper

    key, title = cache.key_for(device, dtype), SHARED[kind]
    if not hopper.runs_on(device) or cache.get(key, cache.CHOICES, _entry(plan.name, title)) is not None:
        return None
    if plan.name in tuned_plans(key):
        return None
    if kind == "deep":
        groups = deep_layers.runs(plan, _DEEP_ROWS)
    else:
        card = card_of(device, dtype)
        groups = [numbers for numbers in chains.runs(plan, card) if chains.gains(plan, numbers, card)]
    if not groups:
        return None
    parts = [_part(plan, plan.steps[numbers.start : numbers.stop].__contains__) for numbers in groups]
    return _measured_apart(title, plan.name, dtype, device, measure_shared, kind, plan.name, parts)


def _part(plan: Plan, belongs: Callable[[Step], bool]) -> Plan:
    """Some steps of a plan, without their weights."""
    owners: dict[str, str] = {}  # of weights that several steps share: the first step of the part
    steps = tuple(replace(s, weights_of=owners.setdefault(s.weights_of, s.name)) for s in plan.steps if belongs(s))
    views = [view for s in steps for view in (s.source, s.residual, *(store.view for store in s.stores)) if view]
    used = {PICTURE, *(view.buffer for view in views)}
    part = replace(plan, steps=steps, buffers={n: b for n, b in plan.buffers.items() if n in used})
    return part.without_weights()


def _entry(name: str, title: str) -> str:
    """The name of a result in the cache."""
    return f"{name}, {title}, at first use"


def _measured_apart(
    title: str,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    measure: Callable[..., dict[str, Any]],
    *arguments: Any,
) -> str | None:
    """Why nothing is measured now; None where it is, was tried before, or could not be kept.

    Args:
        title: of what is measured.
        name: of the plan.
        dtype, device: of the computation.
        measure: a function of this module, called in another process with device, dtype and `arguments`.
    """
    from lgnet_fast.kernels.apart import call_apart, unavailable
    from lgnet_fast.kernels.compiled_checks import OTHERWISE

    if not cache.can_keep():
        return None
    key, attempt = cache.key_for(device, dtype), f"{title}, {name}"
    if cache.get(key, cache.VERDICTS, attempt) is not None:
        return None  # it has failed before
    if (reason := unavailable(device)) is not None:
        return reason
    waits.info("checking and measuring %s", title)
    outcome = call_apart(measure, device, dtype, *arguments)
    if outcome is None:
        return "the other process had too little memory, or was ended"
    if (found := Found.from_dict(outcome.value)) is not None:
        cache.put(key, cache.CHOICES, _entry(name, title), found.as_dict())
        return None
    value = {"passed": False, "reason": outcome.problem, "otherwise": OTHERWISE}
    cache.put(key, cache.VERDICTS, attempt, value)
    return outcome.problem


def _has_all(tuned: Tuned, part: Plan, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every product of a part was measured."""
    kind, _, _ = target_of(device, dtype)
    return all(tuned.tile(work_of(part, s), kind) is not None for s in part.steps if isinstance(s, ConvStep))


def measure_compiled(device: torch.device, dtype: torch.dtype, title: str, part: Plan) -> dict[str, Any]:
    """The measurements of the kernel `title` and its :func:`_part` on a GPU, as a dictionary, with noise as weights.

    Raises:
        RuntimeError: a tile is wrong or fails, so that none may be used.
    """
    from lgnet_fast.kernels.compiled import AT_FIRST_USE

    def measure(found: Found, log: Log) -> None:
        contest = Contest(_with_noise(part, device), dtype, device, GAIN_ALONE)
        tune_convolutions(contest, found, Timer(device), log, lambda: None, contest.few_candidates, lambda: False)

    return _all_right(AT_FIRST_USE[title].reason_against(device, dtype), "tile", measure)


def measure_attention(device: torch.device, dtype: torch.dtype, part: Plan) -> dict[str, Any]:
    """The measurements of compiled attention for the blocks of a :func:`_part`, as a dictionary.

    Raises:
        RuntimeError: a tile is wrong or fails, so that none may be used.
    """
    from lgnet_fast.kernels import hopper_attention

    def measure(found: Found, log: Log) -> None:
        compare_compiled(part, dtype, device, found, Timer(device), log, GAIN_ALONE)

    return _all_right(hopper_attention.reason_against(device, dtype), "config", measure)


def _all_right(reason: str | None, what: str, measure: Callable[[Found, Log], None]) -> dict[str, Any]:
    """What `measure` finds, as a dictionary.

    Args:
        reason: why the kernel is not used, or None.
        what: the figure of a log that names the candidate.
        measure: measures, and logs candidates that are wrong or fail.

    Raises:
        RuntimeError: `reason`, or the first problem that was logged.
    """
    if reason is not None:
        raise RuntimeError(reason)
    found, problems = Found(at_first_use=True), []
    tell = progress_of(logger.info)

    def log(section: str, **figures: Any) -> None:
        if "error" in figures or "wrong" in figures:
            problem = figures.get("error") or f"relative error {figures['wrong']:.1e}"
            problems.append(f"{figures['step']} with {figures[what]}: {problem}")
        tell(section, **figures)

    with torch.inference_mode(False), torch.no_grad():
        measure(found, log)
    if problems:
        raise RuntimeError(problems[0])
    return found.as_dict()


def measure_shared(
    device: torch.device, dtype: torch.dtype, kind: str, name: str, parts: Sequence[Plan]
) -> dict[str, Any]:
    """Whether groups of layers, each a part of the plan `name`, take less time in one launch, as a dictionary: deep
    layers all together, of chains each.

    Each group has noise as weights, and the kernels that were measured for its steps when they are launched one by
    one. A launch whose results are wrong is not used.
    """
    times: dict[str, tuple[float, ...]] = {}  # of the group that begins with this step
    with torch.inference_mode(False), torch.no_grad():
        tuned = kept(device, dtype)
        for part in parts:
            weights = CudaWeights.pack(_with_noise(part, device), dtype, device=device, tuned=tuned)
            alone = CudaOptions(graphs=False, overlap="none", deep_rows=0, chains=False)
            together = replace(alone, deep_rows=_DEEP_ROWS, chains=True)
            both = [CudaExecutor(part, weights, options) for options in (alone, together)]
            first = part.steps[0].name
            if both[1].choices[first] == kind:
                both[0].precompile()
                times[first] = tuple(_group_runs(both, Timer(device)))
    found = Found(at_first_use=True)
    if kind == "chain":
        faster = tuple(first for first, both in times.items() if _gains(*both))
        found.chains = {name: faster} if faster else {}
    elif times and _gains(*map(sum, zip(*times.values()))):
        found.deep_rows = {name: _DEEP_ROWS}
    return found.as_dict()


def _gains(without: float, shared: float) -> bool:
    return shared < (1 - GAIN_ALONE) * without


def whole_runs(executors: Sequence[CudaExecutor], timer: Timer) -> list[float]:
    """Milliseconds of a dense run of each executor, the least of three rounds; the executors take turns."""
    return _least_ms(executors, [executor.launches() for executor in executors], timer, 1)


def _group_runs(executors: Sequence[CudaExecutor], timer: Timer) -> list[float]:
    """The same without the launch that paints the picture, and of ten runs in a row: a chain takes hardly longer than
    the start of a graph."""
    return _least_ms(executors, [executor.launches()[1:] for executor in executors], timer, 10)


def _least_ms(
    executors: Sequence[CudaExecutor], launches: Sequence[list[Launch]], timer: Timer, repeats: int
) -> list[float]:
    for executor in executors:
        executor.memory.arena.zero_()
    best = [float("inf")] * len(executors)
    for _ in range(3):
        for number, executor in enumerate(executors):
            run = functools.partial(run_all, launches[number])
            best[number] = min(best[number], 1e-3 * timer.time([run] * repeats, executor.overlap == "spread"))
    return best


def _with_noise(part: Plan, device: torch.device) -> Plan:
    steps: tuple[Step, ...] = tuple(
        replace(s, weight=_noise(s.weight, device), bias=_noise(s.bias, device)) for s in part.steps
    )
    return replace(part, steps=steps)


def _noise(like: Tensor, device: torch.device) -> Tensor:
    return torch.randn(like.shape, device=device, dtype=torch.float32) / max(1, like.numel() // like.shape[0]) ** 0.5
