"""The declaration of an operator, and the table of all that are declared.

A declaration has the schema, checks, eager form, kernels, saved tensors and FLOPs of an operator. From it
:func:`.library.register` makes ``torch.ops.lgnet.<name>`` with its choice of a backend, the fake (shapes without
values), autograd, the autocast rule, the rule of ``torch.vmap`` and the FLOP formula. docs/contributing.md lists the
files of a new operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def like(tensor: Tensor, channels: int | None = None) -> Tensor:
    """A new tensor like `tensor` [B, C, H, W] with `channels` channels (None: C), for the result of a launcher.

    channels_last where `tensor` is channels_last and not also contiguous, else contiguous.
    """
    shape = list(tensor.shape)
    if channels is not None:
        shape[1] = channels
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format of results of an operation on `tensor`."""
    last = tensor.dim() == 4 and not tensor.is_contiguous()
    if last and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def lower(device: str, *operands: Tensor) -> tuple[Tensor, ...]:
    """Autocast's rule for matrix products: cast to its dtype, except float64."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in operands)


def widest(device: str, *operands: Tensor) -> tuple[Tensor, ...]:
    """Autocast's rule for concatenation: cast all operands to the widest dtype."""
    dtype = operands[0].dtype
    for tensor in operands[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t.to(dtype) for t in operands)


@dataclass(frozen=True)
class Operator:
    """One operator, whose kernels return one tensor.

    "Operands" are its tensors, "options" the other arguments of the schema; functions take them in that order.
    """

    name: str
    """``torch.ops.lgnet.<name>``."""
    schema: str
    """Operands, then options with defaults, as in ``Tensor image, Tensor mask, bool tanh=False``."""
    checks: Callable[..., None]
    """``(*operands, *options)``: raises TypeError or ValueError naming the argument. Shapes are checked only here."""
    eager: Callable[..., Tensor]
    """``(*operands, *options)``: the operator in plain PyTorch."""
    backends: Mapping[str, str]
    """Backend -> module with the launchers."""
    can_run: str
    """Name of the launchers' function ``(*operands)`` that returns why they cannot run (device, dtype, limits)."""
    forward: Callable[..., Any]
    """``(launchers, *operands, *options, save)`` -> the result and the tensors of `saves` (None where not `save`)."""
    backward: Callable[..., Any]
    """``(launchers, grad, operands, saved, options, needs)`` -> gradients of the operands, None where not needed.

    `saved` is the result, if `saves_result`, then the tensors of `saves`.
    """
    flops: Callable[[torch.Size], tuple[int, int]]
    """Shape of the first operand -> FLOPs of forward and backward, two per multiply-accumulate."""
    result: Callable[..., Tensor]
    """``(*operands, *options)`` -> a new tensor like the result; for the fake."""
    saves: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    """What the forward saves besides operands: name -> ``(*operands, *options)`` -> a new tensor like it."""
    saves_result: bool = False
    """Whether the backward also takes the result."""
    autocast: Callable[..., tuple[Tensor, ...]] = lower
    """``(device type, *operands)`` -> the operands under autocast."""
    batched: int = 1
    """Number of first operands that are [B, ...], like the result. 0: the result is not; vmap makes single calls."""
    by_channels: bool = False
    """Whether kernels are compiled for each number of channels, so that the first use of each is checked."""
    slower: str = ""
    """Name of the launchers' function ``(*operands)`` that returns why "auto" leaves kernels that can run to plain
    PyTorch, which is faster; launchers without it have none that are slower."""
    example: tuple[tuple[int, ...], ...] = ()
    """Shapes of operands for which `lgnet-fast info` shows whether the backends can run."""

    def launchers(self, backend: str) -> ModuleType:
        """The module with the launchers of `backend`."""
        return _module(self.backends[backend])

    def examples(self, device: str | torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Operands of the shapes of `example`, without values."""
        return tuple(torch.empty(shape, device=device, dtype=dtype) for shape in self.example)


_module = cache(import_module)  # import_module takes a while also where the module is loaded

OPERATORS: dict[str, Operator] = {}
"""Every operator by name; :func:`.library.register` adds to it."""


def unexpected(argument: str, expected: str, got: object) -> ValueError:
    """The error for an argument of another shape or value. Made where a check fails, because texts take time."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def checked_float(argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is dense, with a real floating dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{argument}: expected a floating dtype, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{argument}: expected a dense tensor, got layout {tensor.layout}")


def checked_tensors(arguments: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise TypeError for None, which PyTorch passes on as a tensor."""
    for argument, tensor in zip(arguments, tensors, strict=True):
        if tensor is None:
            raise TypeError(f"{argument}: expected a tensor, got None")


def checked_device(arguments: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless all operands are on the device of the first.

    PyTorch does not always: its convolution of a tensor on the CPU with a weight on "meta" returns memory that
    nothing has written.
    """
    device = tensors[0].device
    for argument, tensor in zip(arguments, tensors, strict=True):
        if tensor.device != device:
            raise ValueError(f"{argument}: expected device {device} as {arguments[0]}, got {tensor.device}")


def label(options: Mapping[str, Any]) -> str | None:
    """Label that distinguishes uses of an operator: values of text options, names of switches that are on."""
    words = [
        str(value) if isinstance(value, str) else f"of {name}"
        for name, value in options.items()
        if value is not False
    ]
    return " ".join(words) or None
