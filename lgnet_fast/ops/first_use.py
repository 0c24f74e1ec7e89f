"""The check at the first automatic use of a Triton kernel on a machine: kernel against eager PyTorch, once.

A use is (operator, device, dtype, variant, class of channels, with or without gradient, TF32 or not). Its verdict is
kept in the user's cache folder (:mod:`lgnet_fast.cache`), so that only the first process checks. Nothing is checked
during tracing or graph capture, where values cannot be read; there the kernel is used unless it has failed before.

A check is a run of the kernel and two of eager PyTorch, on operands that are cropped to :data:`MOST_FLOPS`, so that
it takes less than two seconds. Compiling the kernel takes longer; both times are logged.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cache, forks
from .registry import OPERATORS, Operator
from .torch_state import is_capturing, one_line, pass_on_out_of_memory, strict_float32, tf32_allowed

logger = logging.getLogger("lgnet_fast")

FACTOR = 4.0
"""Largest ratio of a kernel's error to that of eager PyTorch in the same dtype; a few roundings are added."""
_ROUNDINGS = 16
KNOWN = "known from an earlier run, `lgnet-fast verify` tries anew"
MOST_FLOPS = 1 << 36
"""Most floating-point operations of one run of a check, forward and backward; larger operands are cropped.

The slowest run is eager PyTorch's in float64: 0.2 s at 4e11 operations a second (an L4, a sixty-fourth of its rate in
float32). Twice LGNet's largest block at 256x256 is not cropped.
"""
_SCORES = 1 << 26
"""Most attention scores that a check computes, because eager PyTorch holds them all, several times."""
_ELEMENTS = 1 << 24
"""Most elements of the first operand."""
_SIDE = 128
_LESS = 1 / 16
"""Share of these limits for a check that is repeated where the first one found no memory."""

_lock = forks.Lock()
# use -> why the kernel is not used; None where it passed
_verdicts: dict[Use, str | None] = {}


class Use(NamedTuple):
    """The calls that one check covers."""

    op: str
    device: torch.device
    dtype: torch.dtype
    variant: str | None
    channels: int
    """The power of two for which kernels are compiled; 0 where channels do not matter."""
    gradient: bool
    tf32: bool = False
    """Whether the program lets products of float32 be computed in TF32: the kernels are others then."""

    @property
    def name(self) -> str:
        """Its name in the cache and in `lgnet-fast info`."""
        variant = f" {self.variant}" if self.variant else ""
        channels = f", up to {self.channels} channels" if self.channels else ""
        precision = ", TF32" if self.tf32 else ""
        return f"{self.op}{variant}{channels}, {'with' if self.gradient else 'without'} gradient{precision}"


def use_of(operator: Operator, tensors: tuple[Tensor, ...], variant: str | None, gradient: bool) -> Use:
    """The use to which a call belongs."""
    first = tensors[0]
    channels = max(16, 1 << (first.shape[1] - 1).bit_length()) if operator.by_channels else 0
    tf32 = first.dtype == torch.float32 and tf32_allowed()
    return Use(operator.name, first.device, first.dtype, variant, channels, gradient, tf32)


def reason_against(
    use: Use,
    tensors: tuple[Tensor, ...],
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    around: Callable[[], contextlib.AbstractContextManager[None]],
) -> str | None:
    """Why `fused` must not be used, or None. Checks it now, if it is unchecked and values can be read here.

    Args:
        use: the use of this call.
        tensors: the operands of the call.
        fused, eager: the operator by the kernel and by PyTorch, as functions of the operands.
        around: a context entered during a check.
    """
    if use in _verdicts:
        return _verdicts[use]
    if not _can_check(tensors):
        return None
    with _lock:
        if use not in _verdicts:
            key = cache.key_for(use.device, use.dtype)
            kept = cache.get(key, cache.VERDICTS, use.name)
            if isinstance(kept, dict) and {"passed", "reason"} <= kept.keys():
                reason = None if kept["passed"] else f"{kept['reason']}; {KNOWN}"
            else:
                try:
                    with around():
                        reason = check(use, tensors, fused, eager).reason
                except torch.OutOfMemoryError:
                    return None  # not a fault of the kernel; the next call may have enough memory
            _settle(use, reason)
        return _verdicts[use]


class Outcome(NamedTuple):
    """Result of a check: why the kernel must not be used (None: passed), and its error and limit, if it ran."""

    reason: str | None
    error: float | None
    limit: float | None


def check(
    use: Use,
    tensors: tuple[Tensor, ...],
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    keep: bool = True,
) -> Outcome:
    """Compare `fused` with `eager`; a verdict that is to be kept is written to the cache.

    Raises:
        torch.OutOfMemoryError: there is not enough memory, for smaller operands neither.
    """
    _wait(use.device)  # raises errors of earlier launches, which are not this kernel's
    cut, less = _cut(use, tensors), _cut(use, tensors, _LESS)
    outcome = None
    try:
        outcome = _outcome(use, cut, fused, eager)
    except torch.OutOfMemoryError:
        if cut[0].shape == less[0].shape:
            raise
    if outcome is None:  # here, because an exception that is being handled keeps the tensors of its frames
        outcome = _outcome(use, less, fused, eager)
    if keep:
        value = {"passed": outcome.reason is None, **outcome._asdict()}
        cache.put(cache.key_for(use.device, use.dtype), cache.VERDICTS, use.name, value)
    return outcome


def _outcome(
    use: Use, tensors: tuple[Tensor, ...], fused: Callable[..., Tensor], eager: Callable[..., Tensor]
) -> Outcome:
    try:
        error, limit = compare(use, tensors, fused, eager)
    except Exception as raised:  # any error of Triton or the driver
        pass_on_out_of_memory(raised)
        return Outcome(one_line(raised), None, None)
    reason = None if error <= limit else f"its error is {error:.1e}, {limit:.1e} is allowed"
    return Outcome(reason, error, limit)


def distrust(use: Use, error: Exception) -> bool:
    """Whether an automatic call falls back to eager PyTorch after `error` of its kernel; later calls then do too."""
    if torch.compiler.is_compiling() or is_capturing(use.device):
        return False
    with _lock:
        if _verdicts.get(use) is None:
            _settle(use, one_line(error))
    return True


def _settle(use: Use, reason: str | None) -> None:
    _verdicts[use] = reason
    if reason is not None:
        logger.warning("%s runs in eager PyTorch on %s in %s: triton: %s", use.name, use.device, use.dtype, reason)


def _can_check(tensors: tuple[Tensor, ...]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # fake, functional and other tensors without values, and modes that count or record operators
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta or t.numel() == 0 for t in tensors):
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if tensors[0].is_cuda:
        return not is_capturing(tensors[0].device) and torch.cuda.get_sync_debug_mode() == 0
    return True


def _wait(device: torch.device) -> None:
    """Wait for the current stream. Waiting for all streams would end another thread's capture."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def compare(
    use: Use, tensors: tuple[Tensor, ...], fused: Callable[..., Tensor], eager: Callable[..., Tensor]
) -> tuple[float, float]:
    """(error of `fused`, its limit), for the result or gradient that comes nearest to its limit.

    Both are relative to the largest exact value. Exact: eager PyTorch in float32 for 16-bit operands, else in
    float64.
    """
    dtype, gradient = tensors[0].dtype, use.gradient
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    device = tensors[0].device.type
    with torch.inference_mode(False), torch.set_grad_enabled(gradient), torch.autocast(device, enabled=False):
        begin = time.perf_counter()
        found = _results(fused, tensors, dtype, gradient)
        _wait(use.device)
        compiled = time.perf_counter()
        plain = _results(eager, tensors, dtype, gradient)
        with strict_float32():
            exact = _results(eager, tensors, wide, gradient)
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and tf32_allowed():
        eps = 2.0**-10
    compared = []
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        scale = true.abs().max().item() or 1.0
        error = (ours.to(wide) - true).abs().max().item() / scale
        limit = FACTOR * (theirs.to(wide) - true).abs().max().item() / scale + _ROUNDINGS * eps
        compared.append((error, limit))
    now = time.perf_counter()
    logger.info("%s: compiled and run in %.1f s, checked in %.1f s", use.name, compiled - begin, now - compiled)
    # One that fails comes first, because NaN is neither less nor greater than the others.
    return max(compared, key=lambda one: (not one[0] <= one[1], one[0] / one[1]))


def _cut(use: Use, tensors: tuple[Tensor, ...], share: float = 1) -> tuple[Tensor, ...]:
    """Operands cropped to this share of :data:`MOST_FLOPS` and of the other limits: first samples are left out, then
    rows and columns of the picture."""
    first = tensors[0]
    flops = OPERATORS[use.op].flops
    batch, (height, width) = first.shape[0], (min(side, _SIDE) for side in first.shape[2:])

    def large() -> bool:
        shape = torch.Size((batch, first.shape[1], height, width))
        scores = batch * (height * width) ** 2 if use.channels else 0
        work = sum(flops(shape)[: 1 + use.gradient])
        return work > share * MOST_FLOPS or scores > share * _SCORES or shape.numel() > share * _ELEMENTS

    while batch > 1 and large():
        batch = (batch + 1) // 2
    while max(height, width) > 1 and large():
        height, width = ((height + 1) // 2, width) if height >= width else (height, (width + 1) // 2)
    # beside maps of a single pixel, the weight of a 1x1 convolution differs in its first size alone
    sizes = first.shape[0], *first.shape[2:]
    return tuple(
        t.detach()[:batch, :, :height, :width] if (t.shape[0], *t.shape[2:]) == sizes else t.detach() for t in tensors
    )


def _results(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], dtype: torch.dtype, gradient: bool
) -> list[Tensor]:
    """The result, and the gradients of all operands for a fixed gradient of the result."""
    leaves = [t.to(dtype, copy=True).requires_grad_(gradient) for t in tensors]
    out = function(*leaves)
    if not gradient:
        return [out]
    # positive, so that the gradient of a bias is not a sum that cancels
    cotangent = (
        1 + torch.linspace(0, 37, out.numel(), dtype=torch.float32, device=out.device).cos().view(out.shape) / 2
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]
