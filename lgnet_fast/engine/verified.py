"""The engine of an NVIDIA GPU, checked on that GPU before use, with fallbacks.

A new GPU, driver or compiler may reject a kernel or compute it wrongly. So the engine runs once on a fixed picture
and is compared with the plan in float32 by PyTorch's operators (:func:`judge`). The first path that passes is used,
and :mod:`lgnet_fast.cache` keeps the verdict:

==========  ========================================================================================
"graph"     the kernels, replayed as one CUDA graph
"direct"    the kernels, launched one by one
"library"   the steps that fail (else all) by PyTorch's operators, cuDNN, channels last; dense
"model"     the model itself, channels last, in eager PyTorch
==========  ========================================================================================

Other shapes and holes than those of the check need other launches: where one of them raises, :class:`Guarded` takes
the next path.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cache, forks
from ..ops.first_use import KNOWN, is_capturing, pass_on_out_of_memory, strict_float32, tf32_allowed
from ..reference.lgnet import LGNet, LocalGlobalRefinement
from . import cuda_measure
from .cuda_executor import CudaExecutor
from .executor import Executor, Regions, Result
from .graphs import error_text
from .library_executor import PAINT, LibraryExecutor
from .model_executor import ModelExecutor
from .plan import PICTURE, ConvStep, Plan, Step
from .recent import Recent
from .torch_executor import TorchExecutor

logger = logging.getLogger("lgnet_fast")

LIMITS = {torch.float16: 2e-2, torch.bfloat16: 4e-2, torch.float32: 1e-3}
"""Largest RMS error in the hole, of pictures in [-1, 1]."""
_STEP_LIMITS = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 2e-3}
"""Largest RMS error of one step's result on exact operands, relative to that result's RMS."""
HOLES_KEPT = 256
"""Most sets of rounded holes that are kept for a shape."""
MOST_MACS = 3 << 38
"""Most multiply-accumulates of a run for which the check uses the sizes of the plan; beyond, one picture of 256x256.

LGNet has 4.3e10 a picture of 256x256. Two runs of a check are in float32, at most nine are faster. A slow GPU (5e12
float32 operations a second) needs 0.7 s for the two, so that a check takes less than two seconds. The kernels
are compiled before the check; this is logged.
"""
MOST_PIXELS = 16 * 256 * 256
"""Most pixels of a batch for which the check uses the sizes of the plan; the example is made on the CPU."""

Runner = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Check:
    """One comparison: `error` and the `limit` it must not exceed, or `problem`: the exception or finding instead."""

    name: str
    error: float | None = None
    limit: float | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.name}: {self.problem}"
        return f"{self.name}: error {self.error:.1e}, allowed {self.limit:.1e}"


@dataclass(frozen=True)
class Verdict:
    """The path that runs, why no better one does, and the checks."""

    runs: str
    reason: str | None = None
    steps: tuple[str, ...] = ()
    """Steps that "library" runs by PyTorch's operators; none: all."""
    again: bool = False
    """Whether the next process repeats the check, because the failure may have been transient."""
    checks: tuple[Check, ...] = field(default=(), compare=False)
    seconds: float = field(default=0.0, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> Verdict | None:
        """The inverse of :meth:`as_dict`; None where `value` has another form."""
        try:
            checks = tuple(Check(**check) for check in value["checks"])
            verdict = cls(
                str(value["runs"]),
                value["reason"],
                tuple(value["steps"]),
                bool(value["again"]),
                checks,
                float(value["seconds"]),
            )
        except (TypeError, KeyError, ValueError):
            return None
        return verdict if verdict.runs in _TITLES else None

    def __str__(self) -> str:
        title = _TITLES[self.runs]
        if self.runs == "library" and self.steps:
            title = f"the engine with {', '.join(self.steps)} by PyTorch's operators"
        return title if self.reason is None else f"{title} ({self.reason})"


_TITLES = {
    "graph": "the engine, as one CUDA graph",
    "direct": "the engine, without a CUDA graph",
    "library": "the engine's steps by PyTorch's operators",
    "model": "the model itself in eager PyTorch",
}


# -- the picture and the rule -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A fixed input of the sizes of a plan, and the expected picture; hole pixels may differ by `limit`."""

    image: Tensor
    mask: Tensor
    start: Tensor | None
    exact: Tensor
    limit: float


def example_input(plan: Plan, device: torch.device, painted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Smooth colours with some detail, and one hole off the centre that is no multiple of a kernel's tiles."""
    generator = torch.Generator("cpu").manual_seed(20)
    size = (plan.height, plan.width)
    made: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    coarse = torch.rand(plan.batch, 3, 6, 6, **made)
    fine = torch.rand(plan.batch, 3, *size, **made)
    image = (1.6 * F.interpolate(coarse, size, mode="bicubic") + 0.4 * fine - 1).clamp(-1, 1)
    mask = torch.zeros_like(image[:, :1])
    mask[..., plan.height // 5 : plan.height * 7 // 10, plan.width // 4 + 3 : plan.width * 3 // 4 + 1] = 1
    start = image.flip(3).to(device) if painted else None
    return image.to(device), mask.to(device), start


def hole_error(result: Tensor, exact: Tensor, mask: Tensor) -> float:
    """RMS of the difference over the hole's samples."""
    hole = (mask != 0).expand_as(exact)
    return (result - exact)[hole].double().square().mean().sqrt().item()


def make_example(plan: Plan, device: torch.device, dtype: torch.dtype, painted: bool = False) -> Example:
    """The example of a plan with float32 weights on `device`.

    The limit is the least of three: that of the dtype, four times the error of eager PyTorch in the same dtype, and
    half the error of the exact picture moved by a pixel. It is at least a few roundings, and at least 1.5 times the
    error of eager PyTorch where that exceeds an eighth of the moved picture's error.
    """
    image, mask, start = example_input(plan, device, painted)
    with strict_float32():
        exact = TorchExecutor(plan).run(image, mask, start)[0].clone()
    # eager float32 counts as exact here; the rule for a whole float32 engine is ten times stricter
    eager = LIMITS[torch.float32] / 40
    if dtype != torch.float32:
        eager = hole_error(TorchExecutor(plan.to(device, dtype)).run(image, mask, start)[0].float(), exact, mask)
    elif tf32_allowed():
        eager = LIMITS[torch.float32] / 4
    moved = min(hole_error(exact.roll(1, dims=axis), exact, mask) for axis in (2, 3))
    hole = (mask != 0).expand_as(exact)
    floor = 4 * torch.finfo(dtype).eps * exact[hole].square().mean().sqrt().item()
    limit = max(
        min(LIMITS[dtype], max(4 * eager, floor), moved / 2), 1.5 * eager if eager > moved / 8 else 0.0, floor
    )
    return Example(image, mask, start, exact, limit)


def judge(name: str, run: Runner, example: Example) -> Check:
    """Compare a path with the example: finite, known pixels equal to the input, hole pixels within the limit."""
    try:
        result = run(example.image, example.mask, example.start)
        known = (example.mask == 0).expand_as(result)
        if not bool(result.isfinite().all()):
            return Check(name, problem="its picture is not finite")
        if not torch.equal(result[known], example.image[known]):
            return Check(name, problem="it changes known pixels")
        error = hole_error(result, example.exact, example.mask)
    except Exception as raised:  # any error of Triton, the driver or torch rules this path out
        pass_on_out_of_memory(raised)
        return Check(name, problem=error_text(raised))
    problem = None
    if error > example.limit:
        problem = f"RMS error in the hole {error:.1e}, allowed {example.limit:.1e}"
    return Check(name, error, example.limit, problem)


# -- step by step --------------------------------------------------------------------------------------------------


def check_steps(executor: CudaExecutor, plan: Plan, example: Example) -> list[Check]:
    """Check every step separately, on exact operands, against the plan in float32.

    Args:
        executor: runs the steps.
        plan: of the same sizes, with float32 weights on the executor's device.
    """
    with strict_float32():
        exact = TorchExecutor(plan).buffers_after(example.image, example.mask, example.start)
    limit = _STEP_LIMITS[executor.dtype]
    checks = []
    with torch.inference_mode(False), torch.no_grad(), executor._turn():
        memory = executor.memory
        memory.take(example.image, example.mask, example.start)
        launches = executor.launches_by_step(example.start is not None)
        stage = 0
        for name, own in launches:
            step = next((s for s in plan.steps if s.name == name), None)
            expected: list[tuple[Tensor, Tensor]] = []
            if step is None:
                start = torch.ones_like(example.image) if example.start is None else example.start
                painted = example.image * (1 - example.mask) + start * example.mask
                picture = torch.cat((painted, example.mask), dim=1)
                expected.append((memory.maps[PICTURE].permute(0, 3, 1, 2), picture))
                memory.maps[PICTURE].fill_(torch.nan)
            else:
                for view in (step.source, step.residual):
                    if view is not None and view.buffer != PICTURE:
                        values = exact[view.buffer][:, view.offset : view.offset + view.channels]
                        memory.view(view).copy_(values.permute(0, 2, 3, 1))
                for store in step.stores:
                    view = store.view
                    values = exact[view.buffer][:, view.offset : view.offset + view.channels]
                    found = memory.view(view).permute(0, 3, 1, 2)
                    if step.merges:
                        stage += 1
                        found = memory.outputs[stage]
                    found.fill_(torch.nan)
                    expected.append((found, values))
            checks.append(_check_step(name, own, expected, limit))
            if step is None:
                expected[0][0].copy_(expected[0][1])
            elif step.merges and stage < sum(s.merges for s in plan.steps):
                merged = example.image * (1 - example.mask) + expected[0][1] * example.mask
                found = memory.maps[PICTURE].permute(0, 3, 1, 2)[:, :3]
                if checks[-1].passed:
                    checks[-1] = _compare(name, [(found, merged)], limit)
                found.copy_(merged)
    return checks


def steps_checked(executor: Guarded | ModelExecutor, verdict: Verdict, plan: Plan, painted: bool) -> list[Check]:
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


def _check_step(
    name: str, launches: Callable[[], None], expected: list[tuple[Tensor, Tensor]], limit: float
) -> Check:
    try:
        launches()
        return _compare(name, expected, limit)
    except Exception as raised:
        pass_on_out_of_memory(raised)
        return Check(name, problem=error_text(raised))


def _compare(name: str, pairs: list[tuple[Tensor, Tensor]], limit: float) -> Check:
    scale = max(exact.double().square().mean().sqrt().item() for _, exact in pairs)
    error = max((found - exact).double().square().mean().sqrt().item() for found, exact in pairs)
    error = error / scale if scale > 0 else error
    if not error <= limit:  # so that NaN fails
        return Check(name, problem=f"relative error {error:.1e}, allowed {limit:.1e}")
    return Check(name, error, limit)


# -- choosing a path -----------------------------------------------------------------------------------------------


def verdict_name(plan: Plan, choices: Mapping[str, str]) -> str:
    """Name of a verdict within its key: shapes of the network, sizes, and the chosen kernels."""

    def shape(step: Step) -> tuple[object, ...]:
        own = (step.name, step.kind, tuple(step.weight.shape))
        if isinstance(step, ConvStep):
            return (*own, step.geometry.stride, step.geometry.padding, None)
        return (*own, 1, 0, step.variant)

    shapes = [shape(step) for step in plan.steps]
    digest = hashlib.sha256(repr((shapes, sorted(choices.items()))).encode()).hexdigest()[:12]
    return f"engine {digest}, {len(plan.steps)} steps, {plan.batch}x{plan.height}x{plan.width}"


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

    Args:
        model: of the plan; the last fallback.
        plan: dense, float32 weights on `device`.
        anew: check even if the cache has a verdict.
        graphs: try to capture a CUDA graph.

    Raises:
        torch.OutOfMemoryError: there is not enough memory for the check.
    """
    key = cache.key_for(device, dtype)
    problem: str | None = None
    try:
        engine = CudaExecutor.of(plan, dtype, device=device, tuned=cuda_measure.kept(device, dtype), graphs=graphs)
        name = verdict_name(plan, engine.choices)
    except Exception as raised:
        pass_on_out_of_memory(raised)
        engine, name, problem = None, verdict_name(plan, {}), error_text(raised)
    verdict = None if anew else Verdict.from_dict(cache.get(key, cache.VERDICTS, name))
    executor: Guarded | ModelExecutor
    if verdict is not None and not verdict.again:
        with contextlib.suppress(Exception):
            executor = _built(verdict, engine, model, plan, device, dtype)
            if verdict.reason is not None:
                logger.warning("%s on %s in %s; %s", verdict, key.card, key.dtype, KNOWN)
            return executor, verdict
    checked = checked_plan(plan)
    begin = time.perf_counter()
    if engine is not None:
        _of_size(engine, plan, checked).precompile()
    compiled = time.perf_counter()
    executor, verdict, warned = _decide(engine, problem, model, plan, checked, dtype)
    verdict = replace(verdict, seconds=time.perf_counter() - compiled)
    logger.info("kernels compiled in %.1f s, checked in %.1f s", compiled - begin, verdict.seconds)
    cache.put(key, cache.VERDICTS, name, verdict.as_dict())
    if verdict.reason is not None and not warned:
        logger.warning("%s on %s in %s", verdict, key.card, key.dtype)
    return executor, verdict


def _built(
    verdict: Verdict,
    engine: CudaExecutor | None,
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


def _decide(
    engine: CudaExecutor | None,
    problem: str | None,
    model: LGNet | LocalGlobalRefinement,
    plan: Plan,
    checked: Plan,
    dtype: torch.dtype,
) -> tuple[Guarded | ModelExecutor, Verdict, bool]:
    """(executor, reason, whether the reason has been logged). checked: the plan with the sizes of the check."""
    device = plan.steps[0].weight.device
    example = make_example(checked, device, dtype, isinstance(model, LocalGlobalRefinement))

    def at_size(executor: CudaExecutor) -> CudaExecutor:
        return _of_size(executor, plan, checked)

    def runner(executor: Any) -> Runner:
        return lambda image, mask, start: executor.run(image, mask, start)[0]

    checks: list[Check] = []
    steps: tuple[str, ...] = ()
    nothing_runs = False  # no kernel: then the set-up is at fault, such as a missing C compiler, and may be mended
    if engine is None:
        checks.append(Check("engine", problem=problem))
    else:
        sized = at_size(engine)
        checks.append(judge("graph" if engine.uses_graphs else "direct", runner(sized), example))
        if checks[-1].passed:
            reason = sized.graph_reason
            runs = "graph" if engine.uses_graphs and reason is None else "direct"
            # a failed capture has logged its reason
            return Guarded(engine), Verdict(runs, reason, (), reason is not None, tuple(checks)), True
        if engine.uses_graphs:
            direct = engine.without_graphs()
            checks.append(judge("direct", runner(at_size(direct)), example))
            if checks[-1].passed:
                return Guarded(direct), Verdict("direct", str(checks[0]), (), False, tuple(checks)), False
        by_step = _checked_steps(at_size(engine.without_graphs()), checked, example)
        checks += by_step
        steps = tuple(check.name for check in by_step if not check.passed)
        nothing_runs = len(steps) == len(by_step)
    reason = _problems(checks)
    for attempt in [steps, ()] if 0 < len(steps) <= len(plan.steps) else [()]:
        try:
            library = LibraryExecutor.of_steps(plan, dtype, device=device, steps=attempt or None)
            checks.append(judge("library", runner(at_size(library)), example))
        except Exception as raised:
            pass_on_out_of_memory(raised)
            checks.append(Check("library", problem=error_text(raised)))
        if checks[-1].passed:
            return Guarded(library), Verdict("library", reason, attempt, nothing_runs, tuple(checks)), False
        reason += f"; {checks[-1]}"
    last = ModelExecutor(model, device, dtype, "eager")
    checks.append(judge("model", runner(last), example))
    return last, Verdict("model", reason, (), not checks[-1].passed, tuple(checks)), False


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


def _checked_steps(executor: CudaExecutor, plan: Plan, example: Example) -> list[Check]:
    try:
        return check_steps(executor, plan, example)
    except Exception as raised:  # an error that breaks the device permanently is raised again by every call
        pass_on_out_of_memory(raised)
        return [Check("steps", problem=error_text(raised))]


def checked_plan(plan: Plan) -> Plan:
    """The plan with the sizes that the check uses: its own, or those of one picture (:data:`MOST_MACS`)."""
    if plan.total_macs() <= MOST_MACS and plan.batch * plan.height * plan.width <= MOST_PIXELS:
        return plan
    return TorchExecutor(plan).resized(plan.resized(1, 256, 256)).plan


def _of_size(executor: CudaExecutor, plan: Plan, checked: Plan) -> CudaExecutor:
    return executor if checked is plan else executor.resized(checked.without_weights())


class Guarded(Executor):
    """A checked executor with fallbacks for launches of another shape or hole that raise: first the dense run, then
    launches without a graph, then all steps by PyTorch's operators. One WARNING each.

    Out-of-memory errors are passed on, because the caller can reduce the size. A new hole is first run densely,
    because those kernels are compiled already; kernels for its rectangles are compiled when the hole is used again.
    """

    granularity = CudaExecutor.granularity
    region_macs = CudaExecutor.region_macs

    def __init__(self, executor: CudaExecutor) -> None:
        self.executor, self._dense_only = executor, False
        self._lock = forks.Lock()
        self._holes: Recent[None] = Recent(HOLES_KEPT)

    @property
    def device(self) -> torch.device:
        return self.executor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.executor.dtype

    @property
    def choices(self) -> Mapping[str, str]:
        return self.executor.choices

    @property
    def chosen_by(self) -> str:
        return self.executor.chosen_by

    def step_times(self, image: Tensor, mask: Tensor, regions: Regions | None = None, rounds: int = 5) -> list[float]:
        return self.executor.step_times(image, mask, regions, rounds)

    def resized(self, plan: Plan) -> Guarded:
        return Guarded(self.executor.resized(plan))

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        if is_capturing(self.executor.device):
            return self.executor.run(image, mask, start, regions, stages)  # only the capture failed
        if regions is not None and not self._came_before(regions):
            regions = None
        while True:
            executor, where = self.executor, None if self._dense_only else regions
            try:
                return executor.run(image, mask, start, where, stages)
            except Exception as error:
                pass_on_out_of_memory(error)
                title = self._step_down(executor, where is not None)
                if title is None:
                    raise
                if title:
                    logger.warning("from now on %s at this size (%s)", title, error_text(error))

    def _came_before(self, regions: Regions) -> bool:
        holes = self.executor.holes_of(regions)
        with self._lock:
            known = holes in self._holes
            self._holes.get(holes, lambda: None)
        return known

    def _step_down(self, failed: CudaExecutor, restricted: bool) -> str | None:
        """Take the next path; return its name, "" where another thread took it already, None where there is none."""
        if restricted and not self._dense_only:
            self._dense_only = True
            return "everything is computed, not the hole alone,"
        if failed is not self.executor:
            return ""
        if isinstance(failed, LibraryExecutor):
            if not failed.uses_graphs:
                return None
            self.executor = failed.without_graphs()
        elif failed.uses_graphs:
            self.executor = failed.without_graphs()
            return _TITLES["direct"] + " runs"
        else:
            self.executor = LibraryExecutor.taking_over(failed)
        return _TITLES["library"] + " run"


__all__ = [
    "PAINT",
    "Check",
    "Guarded",
    "Verdict",
    "check_steps",
    "judge",
    "make_example",
    "steps_checked",
    "verified",
]
