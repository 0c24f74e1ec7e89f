"""The declaration of an operator, and the table of all that are declared.

A declaration says what an operator is: schema, checks, eager form, kernels, what its backward needs, FLOPs. From it
:func:`.library.register` makes everything that PyTorch asks for: ``torch.ops.lgnet.<name>`` with its choice of a
backend, the fake (shapes without values), autograd, the autocast rule, the rule of ``torch.vmap`` and the FLOP
formula. docs/contributing.md lists the files of a new operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def like(tensor: Tensor, channels: int | None = None) -> Tensor:
    """A new dense tensor of this shape (a map [B, `channels`, H, W]): what launchers allocate for a result.

    channels_last where `tensor` is that and not also contiguous, else contiguous.
    """
    shape = list(tensor.shape)
    if channels is not None:
        shape[1] = channels
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The format of results that take after `tensor`."""
    last = tensor.dim() == 4 and not tensor.is_contiguous()
    if last and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def lower(device: str, *operands: Tensor) -> tuple[Tensor, ...]:
    """Autocast's rule for matrix products: its dtype; float64 stays, as it does there."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in operands)


def widest(device: str, *operands: Tensor) -> tuple[Tensor, ...]:
    """Autocast's rule for concatenation: everything in the widest dtype."""
    dtype = operands[0].dtype
    for tensor in operands[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t.to(dtype) for t in operands)


@dataclass(frozen=True)
class Operator:
    """One operator, whose kernels return one tensor.

    "Operands" are its tensors, "options" the other arguments of the schema; functions get them in that order.
    """

    name: str
    """``torch.ops.lgnet.<name>``."""
    schema: str
    """Operands, then options with defaults, as in ``Tensor image, Tensor mask, bool tanh=False``."""
    checks: Callable[..., None]
    """``(*operands, *options)``: raises TypeError or ValueError naming the argument. The only check of shapes."""
    eager: Callable[..., Tensor]
    """``(*operands, *options)``: the operator in plain PyTorch."""
    backends: Mapping[str, str]
    """Backend -> module with the launchers."""
    can_run: str
    """Name of the launchers' function ``(*operands)`` that says why they cannot take them: device, dtype, limits."""
    forward: Callable[..., Any]
    """``(launchers, *operands, *options, save)`` -> result and what `saves` names (None where not `save`)."""
    backward: Callable[..., Any]
    """``(launchers, grad, operands, saved, options, needs)`` -> gradients of the operands, None where not needed.

    `saved` is the result, if `saves_result`, then what `saves` names.
    """
    flops: Callable[[torch.Size], tuple[int, int]]
    """Shape of the first operand -> FLOPs of forward and backward, two a multiply-accumulate."""
    result: Callable[..., Tensor]
    """``(*operands, *options)`` -> a new tensor like the result; for the fake."""
    saves: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    """What the forward saves for the backward besides operands: name -> ``(*operands, *options)`` -> one like it."""
    saves_result: bool = False
    """Whether the backward also takes the result."""
    autocast: Callable[..., tuple[Tensor, ...]] = lower
    """``(device type, *operands)`` -> the operands under autocast."""
    batched: int = 1
    """So many first operands are [B, ...], as the result is; 0: the result is not (vmap then makes single calls)."""
    by_channels: bool = False
    """Whether the kernels are compiled anew for other channels, so that their first use is checked anew."""
    example: tuple[tuple[int, ...], ...] = ()
    """Shapes of operands that `lgnet-fast info` asks the backends about."""

    def launchers(self, backend: str) -> ModuleType:
        """The module with the launchers of `backend`."""
        return import_module(self.backends[backend])

    def examples(self, device: str | torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Operands of the shapes of `example`, without values."""
        return tuple(torch.empty(shape, device=device, dtype=dtype) for shape in self.example)


OPERATORS: dict[str, Operator] = {}
"""Every operator by name; :func:`.library.register` adds to it."""


def check(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ValueError naming `argument`, unless `condition`."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def checked_float(argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` has a real floating dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{argument}: expected a floating dtype, got {tensor.dtype}")


def label(options: Mapping[str, Any]) -> str | None:
    """What tells uses of an operator apart in verdicts: text options by value, switches that are on by name."""
    words = [
        str(value) if isinstance(value, str) else f"of {name}"
        for name, value in options.items()
        if value is not False
    ]
    return " ".join(words) or None
