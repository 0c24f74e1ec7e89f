"""What the compiled convolutions (`hopper`, `picture_conv`) share: arguments, and checks of results at first use."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lgnet_fast import cache, forks
from lgnet_fast.ops.first_use import KNOWN
from lgnet_fast.ops.torch_state import is_capturing, pass_on_out_of_memory

from .apart import NO_CONTEXT, call_apart
from .conv import Conv
from .conv_kernels import divisor
from .launch import ACTIVATIONS, is_recording
from .results import Store

logger = logging.getLogger("lgnet_fast")
waits = logging.getLogger("lgnet_fast.waits")  # which the command line shows

Check = Callable[[torch.device, torch.dtype], "str | None"]
"""Runs a kernel on a device in a dtype, and returns what is wrong with its results, or None."""
DTYPES = (torch.float16, torch.bfloat16)
"""What the kernels compute in."""
OTHERWISE = "Triton's kernels run"
"""What happens where a kernel is not used."""
LIMIT = 2
"""Relative error (RMS) of a result in 16 bit that passes, in units of the dtype's eps; rounding gives 0.2."""


def check_view(name: str, view: Tensor, dtype: torch.dtype, channels: int, multiple: int = 8) -> None:
    """Check a feature map [B, H, W, channels]: adjacent channels, pixels evenly spaced by a multiple of elements.

    Raises:
        ValueError: it is not.
    """
    if view.dtype != dtype or view.shape[3] != channels or view.stride(3) != 1:
        raise ValueError(
            f"{name}: expected {channels} adjacent channels of {dtype}, got {tuple(view.shape)} {view.dtype}"
        )
    if view.data_ptr() % (2 * multiple) or any(stride % multiple for stride in view.stride()[:3]):
        raise ValueError(f"{name}: expected pixels at multiples of {2 * multiple} bytes, got strides {view.stride()}")
    if view.stride(1) != view.shape[2] * view.stride(2) or view.stride(0) != view.shape[1] * view.stride(1):
        raise ValueError(f"{name}: expected evenly spaced pixels, got strides {view.stride()} of {tuple(view.shape)}")


def check_bias(bias: Tensor, channels: int) -> None:
    """Check a contiguous bias [channels] in float32; kernels read more than 3 channels at multiples of 16 bytes.

    Raises:
        ValueError: it is not.
    """
    aligned = bias.is_contiguous() and (channels < 4 or bias.data_ptr() % 16 == 0)
    if bias.dtype != torch.float32 or bias.shape != (channels,) or not aligned:
        raise ValueError(f"bias: expected {channels} aligned float32, got {tuple(bias.shape)} {bias.dtype}")


class Divisor(ctypes.Structure):
    """`Divisor` of csrc/cuda/divisor.cuh."""

    _fields_ = [("size", ctypes.c_uint32), ("magic", ctypes.c_uint32), ("shift", ctypes.c_int32)]

    @classmethod
    def of(cls, size: int) -> Divisor:
        """For the division of numbers below 2**31 by `size`; 0, of launches without blocks, counts as 1."""
        magic, shift = divisor(max(size, 1))
        return cls(max(size, 1), magic % (1 << 32), shift)


def set_stores(args: ctypes.Structure, stores: Sequence[Store]) -> None:
    """Fill a kernel's arguments store0, stride_0, activation_0, and those of the second store."""
    for number, store in enumerate(stores):
        setattr(args, f"store{number}", store.view.data_ptr())
        setattr(args, f"stride_{number}", store.view.stride(2))
        setattr(args, f"activation_{number}", ACTIVATIONS[store.activation])


def exact_convolution(conv: Conv, source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a step computes before its activations, [B, H, W, Cout] in float64, by PyTorch."""
    planes = source.permute(0, 3, 1, 2).double()
    if conv.transposed:
        exact = F.conv_transpose2d(planes, weight.double(), bias.double(), conv.stride, conv.padding)
    else:
        if conv.reflect:
            planes = F.pad(planes, [conv.padding] * 4, mode="reflect")
        padding = 0 if conv.reflect else conv.padding
        exact = F.conv2d(planes, weight.double(), bias.double(), conv.stride, padding)
    return exact.permute(0, 2, 3, 1)


class FirstUse:
    """The check of a kernel at its first use on a GPU in a dtype.

    The check runs in another process (:mod:`.apart`), or in this one where none can be started. The verdict is kept
    in the user's cache folder, so that later processes do not check.

    Args:
        title: of the kernel, for the log.
        supported: whether GPUs of a compute capability can run it.
        needed: which those are, in words.
        check: a function of a module: runs the kernel on a device in a dtype, and returns what is wrong with its
            results, or None.
    """

    def __init__(self, title: str, supported: Callable[[tuple[int, int]], bool], needed: str, check: Check) -> None:
        self.title, self.supported, self.needed, self.check = title, supported, needed, check
        self._reasons: dict[tuple[int, torch.dtype], str | None] = {}
        self._lock = forks.Lock()

    def reason_against(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the kernel is not used on a GPU in `dtype`, or None. The first call for both runs the check.

        Raises:
            torch.OutOfMemoryError: there is not enough memory for the check.
        """
        if device.type != "cuda" or torch.version.hip is not None or dtype not in DTYPES:
            return "needs an NVIDIA GPU, float16 or bfloat16"
        if not self.supported(torch.cuda.get_device_capability(device)):
            return f"needs {self.needed}"
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        key = device.index, dtype
        if key in self._reasons:  # without the lock, which another GPU's check may hold for long
            return self._reasons[key]
        with self._lock:
            if key in self._reasons:
                return self._reasons[key]
            if is_capturing(device) or is_recording():
                return "not checked yet, and nothing can be run now"
            found = self._kept(device, dtype) or self._found_apart(device, dtype) or self._found_here(device, dtype)
            self._reasons[key] = found.reason
            return found.reason

    def _kept(self, device: torch.device, dtype: torch.dtype) -> _Verdict | None:
        value = cache.get(cache.key_for(device, dtype), cache.VERDICTS, self.title)
        if not isinstance(value, dict) or not {"passed", "reason"} <= value.keys():
            return None
        return _Verdict(None if value["passed"] else f"{value['reason']}; {KNOWN}")

    def _found_apart(self, device: torch.device, dtype: torch.dtype) -> _Verdict | None:
        if not cache.can_keep():  # every process would wait for another one
            return None
        waits.info("checking %s", self.title)
        outcome = call_apart(self.check, device, dtype)
        if outcome is None or outcome.problem == NO_CONTEXT:
            return None
        return self._keep(device, dtype, outcome.problem or outcome.value)

    def _found_here(self, device: torch.device, dtype: torch.dtype) -> _Verdict:
        try:
            reason = self.check(device, dtype)
        except Exception as error:  # rules the kernel out, in this process; the fault may be another's
            pass_on_out_of_memory(error)
            logger.warning("not used: %s: %s: %s", self.title, type(error).__name__, error)
            return _Verdict(f"{type(error).__name__}: {error}")
        return self._keep(device, dtype, reason)

    def _keep(self, device: torch.device, dtype: torch.dtype, reason: str | None) -> _Verdict:
        if reason is not None:
            logger.warning("not used: %s: %s", self.title, reason)
        value = {"passed": reason is None, "reason": reason, "otherwise": OTHERWISE}
        cache.put(cache.key_for(device, dtype), cache.VERDICTS, self.title, value)
        return _Verdict(reason)


class _Verdict(NamedTuple):
    reason: str | None
    """Why the kernel is not used."""
