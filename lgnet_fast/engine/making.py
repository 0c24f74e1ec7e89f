"""`optimize` and `load_engine`: an engine from a model, or from a folder that `Engine.save` wrote."""

from __future__ import annotations

import logging
import math
import operator
import os
from pathlib import Path

import torch

from .. import forks
from ..reference.lgnet import LGNet, LocalGlobalRefinement
from ..reference.networks import LEVELS
from .build import build_plan, plan_stages
from .cpu import path as cpu_path
from .cpu import tuning as cpu_tuning
from .cpu.executor import CpuExecutor
from .cpu.tuning import SECONDS
from .cuda import tuning as cuda_tuning
from .cuda.executor import CudaExecutor
from .cuda.graphs import error_text
from .cuda.operator_executor import OperatorExecutor
from .cuda.verified import verified
from .devices import resolve_device, resolve_dtype, without_autocast
from .engine import Engine, positive
from .executor import Executor
from .model_executor import ModelExecutor
from .plan import Plan
from .saved import read_engine
from .structure import (
    plain_stages,
    reason_against_engine,
    reason_against_plan,
    refresh_weights,
    weights_in_evaluation,
)

logger = logging.getLogger("lgnet_fast")


def optimize(
    model: LGNet | LocalGlobalRefinement,
    size: tuple[int, int] = (256, 256),
    batch_size: int = 1,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    hole_aware: bool = True,
    tune: bool | float = False,
) -> Engine:
    """A fast form of `model`, called in the same way: ``engine(image, mask)``.

    On an NVIDIA GPU (sm_80 and later, with Triton) the first engine of a network and size in 16 bit measures the
    compiled kernels (:func:`.cuda.first_use.at_first_use`), and all kernels are checked once against the model in
    float32; choices and verdict are kept in the user's cache folder. Where a check fails, a WARNING says so and the
    next best path runs (:mod:`.cuda.verified`). Other NVIDIA GPUs run the same steps by PyTorch's operators, in one
    CUDA graph, checked alike. Where there is no faster executor, the model itself runs, in the best memory format for
    the device. On a CPU that has only the portable C++ kernels, the engine measures once whether they or the model
    are faster (six seconds at most) and keeps the answer (:mod:`.cpu.path`).

    Args:
        model: any LGNet or X_LG; used in evaluation mode, left untouched. From another device its weights are copied
            to `device`. One whose layers were changed (hooks, other activations, convolutions of other classes) runs
            in plain PyTorch, with a WARNING.
        size: (height, width) to prepare for, multiples of 256; other shapes are planned at their first call.
        batch_size: to prepare for.
        device: "auto" (a GPU if there is one), or a name that torch knows.
        dtype: of the computation: "auto" (float32 on a CPU, float16 on a GPU), a torch.dtype or its name.
        hole_aware: compute each layer only where a hole pixel depends on it. The result equals that of a dense run.
        tune: measure the kernels of every step on this machine, for a minute (True) or for this many seconds, and
            keep the fastest in the user's cache folder, where later calls for this network and size find them.
            Of what is not measured a cost model chooses the kernels.

    Returns:
        The engine. It does not keep the model. A call after the weights or the eps of a BatchNorm have changed, or a
        layer was replaced, raises an LGNetError; other changes of the model (a stride, a slope, a hook) are not
        noticed: optimize it again.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        BackendError: a device or dtype that is not there.
        OutOfMemoryError: on a CPU, the buffers for this size and batch exceed the free memory.
        torch.OutOfMemoryError: a GPU's memory does not suffice for the weights, or for the check of one picture.
    """
    forks.prepare()
    if not isinstance(model, (LGNet, LocalGlobalRefinement)):
        raise TypeError(f"model: expected an LGNet or a LocalGlobalRefinement, got {type(model).__name__}")
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        raise TypeError(f"size: expected two integers (height, width), got {size!r}") from None
    if min(height, width) < 1 or height % 2**LEVELS or width % 2**LEVELS:
        raise ValueError(f"size: expected positive multiples of {2**LEVELS}, got {(height, width)}")
    batch = positive("batch_size", batch_size)
    if not isinstance(hole_aware, bool):
        raise TypeError(f"hole_aware: expected a bool, got {type(hole_aware).__name__}")
    if not isinstance(tune, (bool, int, float)) or not 0 <= tune < math.inf:
        raise ValueError(f"tune: expected a bool or a number of seconds, got {tune!r}")
    target = resolve_device(device)
    computed = resolve_dtype(dtype, target)
    if (reason := reason_against_engine(model)) is not None:
        raise TypeError(f"model: expected an LGNet or a LocalGlobalRefinement as they are, but {reason}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model: expected weights with values, got a model on the meta device")
    # The tensors of an engine must also work outside inference mode.
    with torch.inference_mode(False), torch.no_grad(), without_autocast(target):
        executor: Executor
        refresh_weights(model)  # what a forward has left belongs to its graph, and could not be copied
        if (reason := reason_against_plan(model)) is not None:
            logger.warning("the model runs in plain PyTorch: %s", reason)
            plan = build_plan(plain_stages(model), batch, height, width)
            executor = ModelExecutor(model, target, computed)
        else:
            with weights_in_evaluation(model):
                plan = build_plan(plan_stages(model), batch, height, width)
            executor = _executor(model, plan, target, computed, SECONDS if tune is True else float(tune))
    return Engine(model, plan.without_weights(), executor, target, hole_aware)


def fast_executor_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model would run in plain PyTorch on `device` in `dtype`, in one sentence; None where an executor is
    faster."""
    if device.type == "cuda":
        return OperatorExecutor.unavailable_reason(device, dtype)
    if device.type != "cpu":
        return f"there are fast executors for CPUs and NVIDIA GPUs, not for {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ executor computes in float32 or bfloat16, not in {dtype}"
    return CpuExecutor.unavailable_reason()


def _executor(
    model: LGNet | LocalGlobalRefinement, plan: Plan, device: torch.device, dtype: torch.dtype, tune_seconds: float
) -> Executor:
    """The fastest executor for a device and dtype that passes its check there. Where there is none, the model itself
    in the best memory format, with the reason logged."""
    reason = fast_executor_reason(device, dtype)
    if reason is not None:
        logger.info("the model runs in plain PyTorch: %s", reason)
        if tune_seconds:
            logger.warning("kernels are not tuned: %s", reason)
        return ModelExecutor(model, device, dtype)
    # Weights are rounded once, by the executor.
    plan = plan.to(device, torch.float32)
    if device.type != "cpu":
        if tune_seconds and (reason := CudaExecutor.unavailable_reason(device, dtype)) is not None:
            logger.warning("kernels are not tuned: %s", reason)
        elif tune_seconds:
            try:
                cuda_tuning.tune(plan, dtype, device, tune_seconds)
            except Exception as error:  # `verified` finds and reports faults of the kernels
                logger.warning("kernels are not tuned: %s", error_text(error))
        return verified(model, plan, device, dtype)[0]
    if tune_seconds:
        cpu_path.tune(model, plan, dtype, tune_seconds)
    path = cpu_path.choose_path(model, plan, dtype)
    if path.runs == "eager":
        logger.info("the model runs in plain PyTorch: %s", path.reason)
        return ModelExecutor(model, device, dtype, "eager")
    choices = cpu_tuning.kept(plan, dtype)
    return CpuExecutor.of(plan, dtype, choices, "measurement")


def load_engine(directory: str | os.PathLike[str]) -> Engine:
    """Load an engine that :meth:`Engine.save` wrote; nothing is folded, packed or measured again.

    Raises:
        TypeError: `directory` is no path.
        WeightsError: the files are missing or damaged.
        LGNetError: they were written for another instruction set, thread count, version or build of this package, or
            version of PyTorch; it names what differs. Optimise the model again there.
    """
    forks.prepare()
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected a path, got {directory!r}")
    with torch.inference_mode(False), torch.no_grad():
        model, executor, hole_aware = read_engine(Path(directory))
    return Engine(model, executor.plan, executor, torch.device("cpu"), hole_aware)
