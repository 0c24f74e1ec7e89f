"""The `lgnet` operator library and what every operator's registration shares."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lgnet", "DEF")

_DEVICES = ("CPU", "CUDA")


def define(schema: str) -> str:
    """Define an operator; its qualified name."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return "lgnet::" + schema.split("(", 1)[0]


def implement(name: str, fn: Callable[..., Any]) -> None:
    """Register `fn` for the devices that have fused kernels."""
    for device in _DEVICES:
        LIBRARY.impl(name.split("::")[1], fn, device)


def composite(name: str, fn: Callable[..., Any], cast: Callable[..., tuple[Any, ...]]) -> None:
    """Register `fn` as made of other operators, and its autocast rule.

    Under autocast, ``cast(device_type, *args)`` gives the arguments that `fn` is then called with.
    """
    short = name.split("::")[1]
    LIBRARY.impl(short, fn, "CompositeImplicitAutograd")
    for device in _DEVICES:
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")

        def autocast(*args: Any, _key: Any = key, _device: str = device.lower(), **kwargs: Any) -> Tensor:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return getattr(torch.ops.lgnet, short)(*cast(_device, *args), **kwargs)

        LIBRARY.impl(short, autocast, f"Autocast{device}")


def no_double_backward(name: str) -> None:
    """Make differentiating a backward operator an error instead of a silent zero."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name} cannot be differentiated: the fused operators have no second derivative; "
            "use backend='eager' for it"
        )

    torch.library.register_autograd(name, refuse, lib=LIBRARY)


_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[tuple[Any, ...], Callable[..., int]]] = []


class _WithCounter(importlib.abc.MetaPathFinder):
    """Hands the formulas over when somebody imports PyTorch's FLOP counter.

    Importing it for them would import Triton too, for everyone: 70 MB of memory and a tenth of the start.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            for operators, formula in _formulas:
                module.register_flop_formula(operators)(formula)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def flop_formula(*operators: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a formula, called with the operands' shapes, with ``torch.utils.flop_counter``."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        if _COUNTER in sys.modules:
            sys.modules[_COUNTER].register_flop_formula(operators)(formula)
        else:
            if not _formulas:
                sys.meta_path.insert(0, _WithCounter())
            _formulas.append((operators, formula))
        return formula

    return register


def check(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ValueError naming `argument`, unless `condition`."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def checked_float(argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` has a real floating dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{argument}: expected a floating dtype, got {tensor.dtype}")
