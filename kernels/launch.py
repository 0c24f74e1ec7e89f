"""What every launcher shares: the launch itself, the device guard, position offsets, and matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_GRID = 2**31 - 1
# the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2}


class Launch(NamedTuple):
    """One kernel launch as it was asked for."""

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


# What Triton compiled, by what it specialises on: its own look-up takes 0.1 ms for a kernel of fifty arguments.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_COMPILED_KEPT = 4096


def specialisation(kernel: Any, args: tuple[Any, ...]) -> list[Any]:
    """What decides which compiled form of `kernel` serves `args`."""
    key: list[Any] = []
    for parameter, value in zip(kernel.params, args):
        if isinstance(value, Tensor):
            key.append(value.dtype)
            key.append(value.data_ptr() % 16 == 0)
        elif isinstance(value, int):
            wide = value >= 2**31
            key.append(wide if parameter.do_not_specialize else (value == 1, value % 16 == 0, wide))
        else:
            key.append(type(value))
    return key


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
    """Makes the tensor's GPU the current one, as Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def position_offsets(n, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Element offsets (int64) of the positions `n` of an image plane; FLAT: stride_h == width * stride_w."""
    if FLAT:
        return n.to(tl.int64) * stride_w
    else:
        return (n // width).to(tl.int64) * stride_h + (n % width).to(tl.int64) * stride_w


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. "upcast" is for Triton's interpreter, which multiplies bfloat16's bit patterns."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(x, CODE: tl.constexpr):
    """A value of ACTIVATIONS."""
    if CODE == 1:
        # not maximum: NaN must stay NaN
        return tl.where(x < 0.0, 0.0, x)
    elif CODE == 2:
        return tl.where(x < 0.0, 0.2 * x, x)
    else:
        return x


def overlapping(overlap: bool) -> dict[str, bool]:
    """The launch option that lets a kernel start before the one ahead of it ends (programmatic dependent launch)."""
    return {"launch_pdl": True} if overlap else {}


def is_interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter, on CPU tensors."""
    return not isinstance(position_offsets, JITFunction)


def is_flat(tensor: Tensor) -> bool:
    """Whether the positions of [B, C, H, W] are evenly spaced, so that one stride walks through them."""
    height, width = tensor.shape[2:]
    return height <= 1 or width == 1 or tensor.stride(2) == width * tensor.stride(3)


def position_strides(tensor: Tensor) -> tuple[int, int]:
    """stride_h and stride_w for `position_offsets`."""
    if tensor.shape[3] == 1 and tensor.shape[2] > 1:
        return tensor.stride(2), tensor.stride(2)
    return tensor.stride(2), tensor.stride(3)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of the products: torch's own switch decides about tf32."""
    if is_interpreted():
        return "upcast" if dtype == torch.bfloat16 else "ieee"
    if dtype != torch.float32:
        return "ieee"
    try:
        allowed = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # raised where a program has set tf32 by the newer switch as well
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


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
