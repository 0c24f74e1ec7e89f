"""The engine of an NVIDIA GPU, checked on that GPU before use, with fallbacks.

It runs by this package's kernels, and where they cannot run (no Triton, an older GPU) by PyTorch's operators.

A new GPU, driver or compiler may reject a kernel or compute it wrongly. So the engine runs once on a fixed picture
and is compared with the plan in float32 by PyTorch's operators (:mod:`.checks`). The first path of :mod:`.verdicts`
that passes is used, and :mod:`lgnet_fast.cache` keeps the verdict.

Other shapes and holes than those of the check need other launches: where one of them raises,
:class:`.guarded.Guarded` takes the next path.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ... import cache
from ...ops.first_use import KNOWN
from ...ops.torch_state import engine_float32, pass_on_out_of_memory
from ...reference.lgnet import LGNet, LocalGlobalRefinement
from ..model_executor import ModelExecutor
from ..plan import Plan
from . import first_use
from .checks import Example, check_steps, checked_plan, judge, make_example, one_picture
from .executor import CudaExecutor
from .graph_executor import GraphExecutor
from .graphs import error_text, free_cached
from .guarded import Guarded
from .library_executor import LibraryExecutor
from .operator_executor import OperatorExecutor
from .verdicts import Check, Verdict, verdict_name

logger = logging.getLogger("lgnet_fast")
waits = logging.getLogger("lgnet_fast.waits")  # which the command line shows


def verified(
    model: LGNet | LocalGlobalRefinement,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    anew: bool = False,
    graphs: bool = True,
) -> tuple[Guarded | ModelExecutor, Verdict]:
    """The best path that passes its check on this machine, from the cache or by a check now; at most one WARNING.

    A check holds every feature map of its pictures in float32, several times what a run takes. Where that does not
    fit into memory, one picture is checked. That verdict is kept for the size of one picture, so that a later process
    with more memory checks the batch.

    Args:
        model: of the plan; the last fallback.
        plan: dense, float32 weights on `device`.
        anew: check even if the cache has a verdict.
        graphs: try to capture a CUDA graph.

    Raises:
        torch.OutOfMemoryError: there is not enough memory for the check of one picture.
    """
    key = cache.key_for(device, dtype)
    problem: str | None = None
    engine: GraphExecutor | None
    try:
        if (without := CudaExecutor.unavailable_reason(device, dtype)) is None:
            tuned = first_use.at_first_use(plan, dtype, device)
            engine = CudaExecutor.of(plan, dtype, device=device, tuned=tuned, graphs=graphs)
        else:
            logger.info("the engine runs by PyTorch's operators: %s", without)
            engine = OperatorExecutor.of(plan, dtype, device=device, graphs=graphs)
        name = verdict_name(plan, engine.choices)
    except Exception as raised:
        pass_on_out_of_memory(raised)
        engine, name, problem = None, verdict_name(plan, {}), error_text(raised)

    def settled(checked: Plan, name: str) -> tuple[Guarded | ModelExecutor, Verdict]:
        """The path by the verdict of this name, else by a check with the sizes of `checked`."""
        verdict = None if anew else Verdict.from_dict(cache.get(key, cache.VERDICTS, name))
        executor: Guarded | ModelExecutor
        if verdict is not None and not verdict.again:
            with contextlib.suppress(Exception):
                executor = _built(verdict, engine, model, plan, device, dtype)
                if verdict.reason is not None:
                    logger.warning("%s on %s in %s; %s", verdict, key.card, key.dtype, KNOWN)
                return executor, verdict
        begin = time.perf_counter()
        if engine is not None:
            _of_size(engine, plan, checked).precompile()
        compiled = time.perf_counter()
        executor, verdict, warned = _decide(engine, problem, model, plan, checked, dtype)
        verdict = replace(verdict, seconds=time.perf_counter() - compiled)
        waits.info("kernels compiled in %.1f s, checked in %.1f s", compiled - begin, verdict.seconds)
        cache.put(key, cache.VERDICTS, name, verdict.as_dict())
        if verdict.reason is not None and not warned:
            logger.warning("%s on %s in %s", verdict, key.card, key.dtype)
        return executor, verdict

    checked, one = checked_plan(plan), one_picture(plan)
    try:
        return settled(checked, name)
    except torch.OutOfMemoryError as error:
        if checked.batch * checked.height * checked.width <= one.height * one.width:
            raise
        logger.info("one picture is checked, because there is not enough memory for all: %s", error_text(error))
    # Here, because an exception that is being handled keeps the tensors of the frames that it has left.
    if engine is not None:
        engine.drop_buffers()
        free_cached(device)
    return settled(one, verdict_name(one, {} if engine is None else _of_size(engine, plan, one).choices))


def _built(
    verdict: Verdict,
    engine: GraphExecutor | None,
    model: LGNet | LocalGlobalRefinement,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
) -> Guarded | ModelExecutor:
    """The executor that a verdict names."""
    if verdict.runs == "model":
        return ModelExecutor(model, device, dtype, "eager")
    if verdict.runs == "library":
        return Guarded(LibraryExecutor.of_steps(plan, dtype, device=device, steps=verdict.steps or None))
    assert engine is not None
    return Guarded(engine if verdict.runs == "graph" else engine.without_graphs())


class _Decision(NamedTuple):
    executor: Guarded | ModelExecutor
    verdict: Verdict
    warned: bool = False
    """Whether the verdict's reason has been logged."""


class _Trial:
    """The paths of one engine, each tried on the same example.

    Args:
        model, plan, dtype: of the engine.
        checked: the plan with the sizes of the check.
    """

    def __init__(self, model: LGNet | LocalGlobalRefinement, plan: Plan, checked: Plan, dtype: torch.dtype) -> None:
        self.model, self.plan, self.checked, self.dtype = model, plan, checked, dtype
        self.device = plan.steps[0].weight.device
        self.example = make_example(checked, self.device, dtype, isinstance(model, LocalGlobalRefinement))
        self.checks: list[Check] = []
        """What was found, in order."""

    def at_size(self, executor: GraphExecutor) -> GraphExecutor:
        """The executor for the sizes of the check."""
        return _of_size(executor, self.plan, self.checked)

    def passes(self, name: str, executor: Any) -> bool:
        """Whether an executor for the sizes of the check computes the example."""
        self.checks.append(judge(name, lambda image, mask, start: executor.run(image, mask, start)[0], self.example))
        return self.checks[-1].passed

    def engine(self, engine: GraphExecutor) -> _Decision | None:
        """The engine with its graphs, else its launches one by one; None where neither passes."""
        sized = self.at_size(engine)
        if self.passes("graph" if engine.uses_graphs else "direct", sized):
            reason = sized.graph_reason
            runs = "graph" if engine.uses_graphs and reason is None else "direct"
            verdict = Verdict(runs, reason, (), reason is not None, tuple(self.checks))
            return _Decision(Guarded(engine), verdict, warned=True)  # a failed capture has logged its reason
        if not engine.uses_graphs:
            return None
        direct, reason = engine.without_graphs(), str(self.checks[-1])
        if not self.passes("direct", self.at_size(direct)):
            return None
        return _Decision(Guarded(direct), Verdict("direct", reason, (), False, tuple(self.checks)))

    def steps(self, engine: CudaExecutor) -> tuple[tuple[str, ...], bool]:
        """Names of the steps that fail by themselves, and whether all do."""
        found = _each_step(self.at_size(engine.without_graphs()), self.checked, self.example)
        self.checks += found
        failed = tuple(check.name for check in found if not check.passed)
        return failed, len(failed) == len(found)

    def library(self, steps: tuple[str, ...]) -> Guarded | None:
        """These steps, or all where none is named, by PyTorch's operators; None where that does not pass."""
        try:
            library = LibraryExecutor.of_steps(self.plan, self.dtype, device=self.device, steps=steps or None)
            sized = self.at_size(library)
        except Exception as raised:
            pass_on_out_of_memory(raised)
            self.checks.append(Check("library", problem=error_text(raised)))
            return None
        return Guarded(library) if self.passes("library", sized) else None


def _decide(
    engine: GraphExecutor | None,
    problem: str | None,
    model: LGNet | LocalGlobalRefinement,
    plan: Plan,
    checked: Plan,
    dtype: torch.dtype,
) -> _Decision:
    """The first path that passes, else the model. engine: None where it could not be made, by `problem`."""
    trial = _Trial(model, plan, checked, dtype)
    steps: tuple[str, ...] = ()
    nothing_runs = False  # no kernel: then the set-up is at fault, such as a missing C compiler, and may be mended
    if engine is None:
        trial.checks.append(Check("engine", problem=problem))
    elif (decision := trial.engine(engine)) is not None:
        return decision
    elif isinstance(engine, CudaExecutor):
        steps, nothing_runs = trial.steps(engine)
    reason = _problems(trial.checks)
    attempts = [steps, ()] if 0 < len(steps) <= len(plan.steps) else [()]
    if isinstance(engine, OperatorExecutor):
        attempts = []  # PyTorch's operators have failed already
    for attempt in attempts:
        if (library := trial.library(attempt)) is not None:
            return _Decision(library, Verdict("library", reason, attempt, nothing_runs, tuple(trial.checks)))
        reason += f"; {trial.checks[-1]}"
    last = ModelExecutor(model, trial.device, dtype, "eager")
    with engine_float32(trial.device, dtype):  # TF32, which a program may allow its models, is no fault of the set-up
        passed = trial.passes("model", last)
    return _Decision(last, Verdict("model", reason, (), not passed, tuple(trial.checks)))


def _problems(checks: Sequence[Check]) -> str:
    """The checks that failed and why; those that failed alike together, at most three of them by name."""
    names: dict[str, list[str]] = {}
    for check in checks:
        if check.problem is not None:
            names.setdefault(check.problem, []).append(check.name)
    return "; ".join(
        f"{', '.join(alike[:3])}{f' and {len(alike) - 3} more' if len(alike) > 3 else ''}: {problem}"
        for problem, alike in names.items()
    )


def _each_step(executor: GraphExecutor, plan: Plan, example: Example) -> list[Check]:
    try:
        return check_steps(executor, plan, example)
    except Exception as raised:  # an error that breaks the device permanently is raised again by every call
        pass_on_out_of_memory(raised)
        return [Check("steps", problem=error_text(raised))]


def _of_size(executor: GraphExecutor, plan: Plan, checked: Plan) -> GraphExecutor:
    return executor if checked is plan else executor.resized(checked.without_weights())


def recheck_steps(executor: Guarded | ModelExecutor, verdict: Verdict, plan: Plan, painted: bool) -> list[Check]:
    """:func:`check_steps` of what :func:`verified` returned; none where PyTorch's operators run in its steps' place.

    Args:
        executor, verdict: the results of :func:`verified`.
        plan: see :func:`check_steps`.
        painted: whether a first stage's picture is painted into the hole.
    """
    if verdict.runs not in ("graph", "direct") or not isinstance(executor, Guarded):
        return []
    example = make_example(plan, executor.device, executor.dtype, painted)
    return check_steps(executor.executor, plan, example)
