"""Shared by all launchers: the launch itself, the device guard, matrix products and activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from lgnet_fast.ops.torch_state import tf32_allowed

from .triton_cache import ensure_folder

ensure_folder()  # every module with kernels imports this one before any is compiled

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_GRID = 2**31 - 1
# explicit, because the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2}


class Launch(NamedTuple):
    """One kernel launch: the arguments of :func:`launch`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("lgnet_fast_recorded_launches", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of making them (`aot` compiles what the launchers would launch)."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether launches are collected instead of made."""
    return _recorded.get() is not None


# Compiled kernels by specialisation. Looking them up here is faster than in Triton.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_COMPILED_KEPT = 4096


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value` with `function` applied to every element of its (nested) tuples."""
    if not isinstance(value, tuple):
        return function(value)
    parts = [map_leaves(part, function) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def specialisation(kernel: Any, args: tuple[Any, ...]) -> list[Any]:
    """The properties of `args` that select a compiled form of `kernel`."""
    key: list[Any] = []
    for parameter, value in zip(kernel.params, args):
        _add_specialisation(key, value, parameter.do_not_specialize)
    return key


def _add_specialisation(key: list[Any], value: Any, fixed: bool) -> None:
    if isinstance(value, Tensor):
        key.append(value.dtype)
        key.append(value.data_ptr() % 16 == 0)
    elif isinstance(value, int):
        wide = value >= 2**31
        key.append(wide if fixed else (value == 1, value % 16 == 0, wide))
    elif isinstance(value, tuple):
        # Triton specialises on elements of tuples even where the parameter is marked do_not_specialize
        for part in value:
            _add_specialisation(key, part, False)
    else:
        key.append(type(value))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid` on the current device; `args` are its parameters up to the first constant, `meta` its
    constants, `num_warps` and `num_stages`."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, meta))
        return
    if is_interpreted():
        kernel[grid](*args, **meta, **OPTIONS)
        return
    key = (kernel, torch.cuda.current_device(), *meta.values(), *specialisation(kernel, args))
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return
    compiled = kernel[grid](*args, **meta, **OPTIONS)
    if len(_compiled) < _COMPILED_KEPT and compiled is not None:
        _compiled[key] = compiled, tuple(meta[name] for name in kernel.arg_names[len(args) :])


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. "upcast" is for Triton's interpreter, which multiplies bit patterns of bfloat16."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def stable_tanh(x):
    """tanh in float32; near 0 by a series, because (1 - e) / (1 + e) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    s = x * x
    near = x + x * s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return tl.where(s < 0.0625, near, far)


@triton.jit
def activate(x, CODE: tl.constexpr):
    """The activation whose value in ACTIVATIONS is CODE."""
    # NaN stays NaN, as in PyTorch
    if CODE == 1:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif CODE == 2:
        return tl.maximum(x, 0.2 * x, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x


def overlapping(overlap: bool) -> dict[str, bool]:
    """The launch option that lets a kernel start before the previous one ends (programmatic dependent launch)."""
    return {"launch_pdl": True} if overlap else {}


def is_interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter, on CPU tensors."""
    return not isinstance(dot, JITFunction)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of the matrix products; tf32 where PyTorch's switch allows it."""
    if is_interpreted():
        return "upcast" if dtype == torch.bfloat16 else "ieee"
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if tf32_allowed() else "ieee"


def device_reason(tensor: Tensor, capability: tuple[int, int]) -> str | None:
    """Why kernels that need compute capability `capability` cannot run on the tensor's device or dtype, or None."""
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype} (float32, float16 and bfloat16 are supported)"
    if is_interpreted():
        return None if tensor.device.type == "cpu" else "Triton runs interpreted, which takes CPU tensors"
    if tensor.device.type != "cuda":
        return f"device {tensor.device.type} (Triton kernels need an NVIDIA GPU)"
    if torch.version.hip is not None:
        return "ROCm (the kernels are written for NVIDIA GPUs)"
    found = torch.cuda.get_device_capability(tensor.device)
    if tensor.dtype == torch.bfloat16:
        capability = max(capability, (8, 0))
    if found < capability:
        return f"compute capability {found[0]}.{found[1]} ({capability[0]}.{capability[1]} or newer is needed)"
    return None
