"""Choosing the backend of an operator: "auto", "eager", "triton" or "cpp".

An explicit choice that cannot run raises BackendError with the reason. "auto" takes the fused backend of the tensors'
device where it can run and is faster (on a GPU: where it also passed the check of its first use, :mod:`.first_use`),
else eager PyTorch. Each reason for a fallback is logged once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor, nn

from ..errors import BackendError
from ..reference.attention import AttentionBlock
from . import first_use
from .registry import OPERATORS
from .torch_state import pass_on_out_of_memory

logger = logging.getLogger("lgnet_fast")

FUSED = ("triton", "cpp")
CANDIDATES = {"cuda": "triton", "cpu": "cpp"}
"""Device type -> the fused backend that "auto" prefers."""

# (operator, backend) -> number of runs since the process began, or since reset_calls().
_calls: Counter[tuple[str, str]] = Counter()
_logged: set[tuple[str, str]] = set()


def reason_against(op: str, backend: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why `backend` cannot run `op` on these tensors, or None if it can. Reads metadata only."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if any([t.dtype != dtype for t in tensors]):
        return f"tensors have several dtypes: {sorted({str(t.dtype) for t in tensors})}"
    if backend == "cpp" and device != "cpu":
        return f"the C++ kernels run on the CPU, the tensors are on {device}"
    if backend == "triton" and (reason := _missing_triton()) is not None:
        return reason
    declaration = OPERATORS[op]
    can_run: Callable[..., str | None] = getattr(declaration.launchers(backend), declaration.can_run)
    return can_run(*tensors)


@cache  # where Triton is not installed, Python searches all its folders for it at each import
def _missing_triton() -> str | None:
    reason: str | None = import_module("lgnet_fast.kernels").missing()
    return reason


def resolve(op: str, backend: str, tensors: tuple[Tensor, ...]) -> str:
    """The backend that will run: "eager", "triton" or "cpp".

    Raises:
        ValueError: `backend` is not the name of a backend.
        BackendError: `backend` was asked for by name and cannot run.
    """
    if backend == "eager":
        return backend
    if backend in FUSED:
        reason = reason_against(op, backend, tensors)
        if reason is not None:
            raise BackendError(f"backend={backend!r} cannot run {op}: {reason}")
        return backend
    if backend != "auto":
        raise ValueError(f"backend: expected 'auto', 'eager', 'triton' or 'cpp', got {backend!r}")
    candidate = CANDIDATES.get(tensors[0].device.type)
    if candidate is None:
        return "eager"
    reason = reason_against(op, candidate, tensors)
    if reason is None and (slower := getattr(OPERATORS[op].launchers(candidate), OPERATORS[op].slower, None)):
        reason = slower(*tensors)
    if reason is None:
        return candidate
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        logger.info("%s runs in eager PyTorch: %s: %s", op, candidate, reason)
    return "eager"


def require_backend(model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise BackendError unless fused `backend` can run the operators of a network on `device` in `dtype`.

    Checks every attention block of `model` with its channels, and merging; computes nothing.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    for module in model.modules():
        if isinstance(module, AttentionBlock):
            channels = module.channels
            tensors = empty(1, channels, 8, 8), empty(channels, 2 * channels, 1, 1), empty(channels)
            resolve("attention_block", backend, tensors)
    for op in ("merge", "merge_concat"):
        resolve(op, backend, (empty(1, 3, 8, 8), empty(1, 3, 8, 8), empty(1, 1, 8, 8)))


def run(
    op: str,
    asked: str,
    tensors: tuple[Tensor, ...],
    variant: Callable[[], str | None],
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
) -> Tensor:
    """Compute an operator by the requested backend.

    Args:
        op: name of the operator.
        asked: name of the backend, or "auto".
        tensors: the operands.
        variant: tells uses of the operator apart, see :func:`.registry.label`; called only where that is needed.
        fused: called with the backend's name and operands.
        eager: called with operands.

    Raises:
        ValueError, BackendError: see :func:`resolve`.
    """
    backend = resolve(op, asked, tensors)
    if backend == "eager":
        record(op, backend)
        return eager(*tensors)
    if asked != "auto" or backend != "triton":
        return fused(backend, *tensors)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    use = first_use.use_of(OPERATORS[op], tensors, variant(), gradient)
    reason = first_use.reason_against(use, tensors, partial(fused, backend), eager, _uncounted)
    if reason is None:
        try:
            return fused(backend, *tensors)
        except Exception as error:
            pass_on_out_of_memory(error)
            if not first_use.distrust(use, error):
                raise
    record(op, "eager")
    return eager(*tensors)


@contextmanager
def _uncounted() -> Iterator[None]:
    """Do not count runs that a check makes."""
    before = _calls.copy()
    try:
        yield
    finally:
        _calls.clear()
        _calls.update(before)


def record(op: str, backend: str) -> None:
    """Count one run, so that tests and users can ask which backend ran."""
    _calls[op, backend] += 1


def calls() -> dict[tuple[str, str], int]:
    """Which backends have run in this process, in all its threads, since it began or since :func:`reset_calls`.

    Returns:
        {(operator, backend): runs}, the backend "eager", "triton" or "cpp". Backward runs of fused backends are
        counted under ``<op>_backward``. Runs that check a kernel before its first use are not counted. Networks whose
        backend is "eager" and an engine's own kernels do not use the operators, so they are not counted either.
    """
    return dict(_calls)


def reset_calls() -> None:
    """Forget all counts of this process, those of other threads too."""
    _calls.clear()
