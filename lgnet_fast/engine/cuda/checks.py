"""Checks of an engine on an NVIDIA GPU: whole runs and single steps against the plan in float32 by PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.torch_state import pass_on_out_of_memory, strict_float32, tf32_allowed
from ..plan import PICTURE, Plan, Step, View
from ..torch_executor import TorchExecutor
from .graph_executor import GraphExecutor
from .graphs import error_text
from .memory import Memory
from .verdicts import Check

LIMITS = {torch.float16: 2e-2, torch.bfloat16: 4e-2, torch.float32: 1e-3}
"""Largest RMS error in the hole, of pictures in [-1, 1]."""
_STEP_LIMITS = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 2e-3}
"""Largest RMS error of one step's result on exact operands, relative to that result's RMS."""
MOST_MACS = 3 << 38
"""Most multiply-accumulates of a run for which the check uses the sizes of the plan; beyond, one picture of 256x256.

LGNet has 4.3e10 a picture of 256x256. Two runs of a check are in float32, at most nine are faster. A slow GPU (5e12
float32 operations a second) needs 0.7 s for the two, so that a check takes less than two seconds. The kernels
are compiled before the check; this is logged.
"""
MOST_PIXELS = 16 * 256 * 256
"""Most pixels of a batch for which the check uses the sizes of the plan; the example is made on the CPU."""

Runner = Callable[[Tensor, Tensor, Tensor | None], Tensor]


# -- the picture and the rule --------------------------------------------------------------------------------------


def checked_plan(plan: Plan) -> Plan:
    """The plan with the sizes that the check uses: its own, or those of one picture (:data:`MOST_MACS`)."""
    if plan.total_macs() <= MOST_MACS and plan.batch * plan.height * plan.width <= MOST_PIXELS:
        return plan
    return one_picture(plan)


def one_picture(plan: Plan) -> Plan:
    """The plan of one picture of at most 256x256."""
    return TorchExecutor(plan).resized(plan.resized(1, min(plan.height, 256), min(plan.width, 256))).plan


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


def check_steps(executor: GraphExecutor, plan: Plan, example: Example) -> list[Check]:
    """Check every step separately, on exact operands, against the plan in float32.

    Args:
        executor: runs the steps.
        plan: of the same sizes, with float32 weights on the executor's device.
    """
    with strict_float32():
        exact = TorchExecutor(plan).buffers_after(example.image, example.mask, example.start)
    limit = _STEP_LIMITS[executor.dtype]
    steps = {step.name: step for step in plan.steps}
    stages, stage = sum(step.merges for step in plan.steps), 0
    checks = []
    with torch.inference_mode(False), torch.no_grad(), executor.turn():
        memory = executor.memory
        memory.take(example.image, example.mask, example.start)
        for name, launches in executor.launches_by_step(example.start is not None):
            if name not in steps:
                checks.append(_check_painting(name, launches, memory, example, limit))
                continue
            step = steps[name]
            stage += step.merges
            _write_operands(memory, step, exact)
            results = _spoilt_results(memory, step, stage, exact)
            check = _check_step(name, launches, results, limit)
            if step.merges and stage < stages:
                check = _check_merging(check, memory, example, results[0][1], limit)
            checks.append(check)
    return checks


def _values(exact: dict[str, Tensor], view: View) -> Tensor:
    """The exact values of a view, [B, C, H, W]."""
    return exact[view.buffer][:, view.offset : view.offset + view.channels]


def _write_operands(memory: Memory, step: Step, exact: dict[str, Tensor]) -> None:
    """What a step reads, except the picture, which the steps before it have left exact."""
    for view in (step.source, step.residual):
        if view is not None and view.buffer != PICTURE:
            memory.view(view).copy_(_values(exact, view).permute(0, 2, 3, 1))


def _spoilt_results(memory: Memory, step: Step, stage: int, exact: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Where a step stores, filled with NaN, and what must be there; `stage`: number of the stages that have ended."""
    results = []
    for store in step.stores:
        found = memory.outputs[stage] if step.merges else memory.view(store.view).permute(0, 3, 1, 2)
        found.fill_(torch.nan)
        results.append((found, _values(exact, store.view)))
    return results


def _check_painting(name: str, launches: Callable[[], None], memory: Memory, example: Example, limit: float) -> Check:
    """Check the launch before the first step, which paints the hole, and leave the exact picture."""
    start = torch.ones_like(example.image) if example.start is None else example.start
    painted = example.image * (1 - example.mask) + start * example.mask
    exact = torch.cat((painted, example.mask), dim=1)
    found = memory.maps[PICTURE].permute(0, 3, 1, 2)
    found.fill_(torch.nan)
    check = _check_step(name, launches, [(found, exact)], limit)
    found.copy_(exact)
    return check


def _check_merging(check: Check, memory: Memory, example: Example, exact: Tensor, limit: float) -> Check:
    """Check the picture that the end of a stage leaves for the next, and leave the exact one.

    `check`: of the stage's raw picture, `exact`; it is the result where it has failed.
    """
    merged = example.image * (1 - example.mask) + exact * example.mask
    found = memory.maps[PICTURE].permute(0, 3, 1, 2)[:, :3]
    if check.passed:
        check = _compare(check.name, [(found, merged)], limit)
    found.copy_(merged)
    return check


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
    errors = [(found - exact).double().square().mean().sqrt() for found, exact in pairs]
    error = torch.stack(errors).max().item()  # a tensor's maximum is NaN where any of them is
    error = error / scale if scale > 0 else error
    if not error <= limit:  # so that NaN fails
        return Check(name, problem=f"relative error {error:.1e}, allowed {limit:.1e}")
    return Check(name, error, limit)
