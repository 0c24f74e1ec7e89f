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
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

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


def differentiable(
    name: str,
    backward: Callable[..., tuple[Any, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
) -> None:
    """Register `backward(ctx, *grads)`, with what ``setup_context(ctx, inputs, output)`` kept for it.

    ``torch.library.register_autograd`` does the same, but for :mod:`torch.func`, whose transforms it refuses. They
    call an operator's autograd kernel once a level, hence a function of a single level, which does not itself ask
    which transforms there are.
    """
    short = name.split("::")[1]
    operator = getattr(torch.ops.lgnet, short).default

    def forward(*args: Any) -> Any:
        # Functions run their forward without gradients, but the levels below this one want theirs.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
    }
    function = type(f"LGNet_{short}", (_SingleLevelFunction,), members)

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            with enable_single_level_autograd_function():
                return function.apply(*args)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(short, autograd, "Autograd")


def no_double_backward(name: str) -> None:
    """Make differentiating a backward operator an error instead of a silent zero."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name} cannot be differentiated: the fused operators have no second derivative; "
            "use backend='eager' for it"
        )

    differentiable(name, refuse)


def vectorized(name: str, maps: int, apart: bool = False) -> None:
    """Register the rule of :func:`torch.vmap`.

    Args:
        maps: so many first arguments are [B, ...], as all results are: the mapped dimension joins theirs. Where
            another argument has it too, there is one call for each of its slices.
        apart: one call for each slice always: a result or argument is a sum over B, or has B elsewhere.
    """
    operator = getattr(torch.ops.lgnet, name.split("::")[1])

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **kwargs: Any) -> Any:
        size = info.batch_size
        mapped = [isinstance(dim, int) for dim in in_dims]  # of a list argument it is a list
        if apart or any(mapped[maps:]):
            slices = [
                operator(
                    *(a.select(d, i) if own else a for a, d, own in zip(args, in_dims, mapped, strict=True)), **kwargs
                )
                for i in range(size)
            ]
            if isinstance(slices[0], Tensor):
                return torch.stack(slices), 0
            return tuple(map(torch.stack, zip(*slices, strict=True))), (0,) * len(slices[0])
        front = [
            a.expand(size, *a.shape) if d is None else a.movedim(d, 0)
            for a, d in zip(args[:maps], in_dims[:maps], strict=True)
        ]
        batch = front[0].shape[1]
        results = operator(*(a.flatten(0, 1) for a in front), *args[maps:], **kwargs)

        def split(result: Tensor) -> Tensor:
            # An empty vector stands for a result that nobody asked for.
            absent = result.dim() == 1 and result.numel() == 0
            return result.expand(size, 0) if absent else result.unflatten(0, (size, batch))

        if isinstance(results, Tensor):
            return split(results), 0
        return tuple(map(split, results)), (0,) * len(results)

    torch.library.register_vmap(name, rule, lib=LIBRARY)


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
