"""Registering operators with PyTorch from their declarations (:class:`.registry.Operator`).

``torch.ops.lgnet.<name>`` checks the operands and picks a backend. Eager PyTorch is differentiated by autograd. A
fused backend runs in the inner operator ``_<name>``, which also returns the tensors that ``_<name>_backward`` needs.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.compiler.config as compiler_config
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .. import forks
from ..version import __version__
from .dispatch import record, run
from .registry import OPERATORS, Operator, checked_device, checked_tensors, label, like, memory_format

LIBRARY = torch.library.Library("lgnet", "DEF")

_DEVICES = ("CPU", "CUDA")


def tag_compiled_graphs() -> None:
    """Make this package part of the key under which ``torch.compile`` caches graphs on disk.

    A cached graph calls the inner operators with the arguments that they had when it was compiled. PyTorch's key
    contains only the name of the public operator, so after an upgrade an old graph would be found, and would fail or
    use an old formula.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(__version__.encode())
    for room in ("ops", "reference"):
        for path in sorted((package / room).rglob("*.py")):
            digest.update(path.read_bytes())
    compiler_config.cache_key_tag += f" lgnet_fast {digest.hexdigest()[:16]}"


def define(schema: str, *tags: torch.Tag) -> str:
    """Define an operator; returns its qualified name."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    return "lgnet::" + schema.split("(", 1)[0]


def implement(name: str, fn: Callable[..., Any]) -> None:
    """Register `fn` for the devices that have fused kernels."""
    for device in _DEVICES:
        LIBRARY.impl(name.split("::")[1], fn, device)


def composite(name: str, fn: Callable[..., Any], cast: Callable[..., tuple[Any, ...]]) -> None:
    """Register `fn`, which calls other operators, and its autocast rule.

    Under autocast, `fn` is called with the arguments that ``cast(device_type, *args)`` returns.
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
    """Register ``backward(ctx, *grads)`` and ``setup_context(ctx, inputs, output)``, which saves its tensors.

    ``torch.library.register_autograd`` does the same, but rejects the transforms of :mod:`torch.func`. These call the
    autograd kernel of an operator once per level, so this registers an autograd function for a single level.
    """
    short = name.split("::")[1]
    operator = getattr(torch.ops.lgnet, short).default

    def forward(*args: Any) -> Any:
        # The forward of an autograd function disables gradients of both modes, but the levels below this one need
        # them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
    }
    function = type(f"LGNet_{short}", (_SingleLevelFunction,), members)

    def autograd(*args: Any) -> Any:
        _refuse_tangents(name, args)
        if torch.is_grad_enabled() and any([isinstance(a, Tensor) and a.requires_grad for a in args]):
            with enable_single_level_autograd_function():
                return function.apply(*args)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(short, autograd, "Autograd")


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Make forward-mode differentiation (jvp, jacfwd, hessian) an error instead of a silent zero."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise RuntimeError(
            f"{name} cannot be differentiated in forward mode (jvp, jacfwd, hessian); reverse mode works (grad, vjp, "
            "jacrev), with backend='eager' and SDPBackend.MATH also twice"
        )


def no_double_backward(name: str) -> None:
    """Make differentiating a backward operator an error instead of a silent zero."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name} cannot be differentiated: the fused operators have no second derivative; use backend='eager' "
            "for it, within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )

    differentiable(name, refuse)


def vectorized(name: str, maps: int, apart: bool = False) -> None:
    """Register the rule of :func:`torch.vmap`.

    Args:
        maps: number of first arguments that are [B, ...], as all results are: the mapped dimension is merged into B.
            Where another argument is mapped too, there is one call for each of its slices.
        apart: always make one call for each slice, because a result or argument is a sum over B, or has B elsewhere.
    """
    operator = getattr(torch.ops.lgnet, name.split("::")[1])

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **kwargs: Any) -> Any:
        size = info.batch_size
        mapped = [isinstance(dim, int) for dim in in_dims]  # a list for a list argument
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
            # An empty vector stands for a result that was not requested.
            absent = result.dim() == 1 and result.numel() == 0
            return result.expand(size, 0) if absent else result.unflatten(0, (size, batch))

        if isinstance(results, Tensor):
            return split(results), 0
        return tuple(map(split, results)), (0,) * len(results)

    torch.library.register_vmap(name, rule, lib=LIBRARY)


_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[tuple[Any, ...], Callable[..., int]]] = []


class _RegisterFlopsOnImport(importlib.abc.MetaPathFinder):
    """Registers our formulas as soon as ``torch.utils.flop_counter`` is imported.

    Importing it here would always load Triton: 70 MB of memory and a tenth of the start-up time.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadAndRegister(self, spec.loader)
        return spec


class _LoadAndRegister(importlib.abc.Loader):
    """Loads the counter by its own loader, which stays as it is: in frozen programs it loads other modules too."""

    def __init__(self, finder: _RegisterFlopsOnImport, loader: Any) -> None:
        self._finder, self._loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self._finder)
        for operators, formula in _formulas:
            module.register_flop_formula(operators)(formula)


def flop_formula(operator: Any, formula: Callable[..., int]) -> None:
    """Register a formula, called with the operands' shapes, with ``torch.utils.flop_counter``."""
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula((operator,))(formula)
        return
    if not _formulas:
        sys.meta_path.insert(0, _RegisterFlopsOnImport())
    _formulas.append(((operator,), formula))


# -- from a declaration ------------------------------------------------------------------------------------------


def register(declaration: Operator) -> None:
    """Define ``torch.ops.lgnet.<name>`` and the inner operators that its declaration requires."""
    OPERATORS[declaration.name] = declaration
    public = define(f'{declaration.name}({declaration.schema}, *, str backend="auto") -> Tensor')
    inner = _Inner(declaration, _arguments(declaration.name))
    inner.define()
    composite(public, _public(declaration, inner), _cast(declaration, inner))
    vectorized(public, declaration.batched)


def _arguments(name: str) -> list[Any]:
    """The positional arguments in an operator's schema."""
    return [a for a in getattr(torch.ops.lgnet, name).default._schema.arguments if not a.kwarg_only]


def _cast(declaration: Operator, inner: _Inner) -> Callable[..., tuple[Any, ...]]:
    tensors = tuple(a.name for a in inner.operands)
    count = len(tensors)

    def cast(device: str, *args: Any) -> tuple[Any, ...]:
        checked_tensors(tensors, args[:count])
        return (*declaration.autocast(device, *args[:count]), *args[count:])

    return cast


def _public(declaration: Operator, inner: _Inner) -> Callable[..., Tensor]:
    """The operator that picks a backend."""
    count = len(inner.operands)
    defaults = tuple(a.default_value for a in inner.options)
    names = tuple(a.name for a in inner.options)
    tensors = tuple(a.name for a in inner.operands)
    name, saves = declaration.name, bool(declaration.saves)

    def call(*args: Any, backend: str = "auto") -> Tensor:
        forks.prepare()
        operands, options = args[:count], args[count:]
        options += defaults[len(options) :]
        checked_tensors(tensors, operands)
        declaration.checks(*operands, *options)
        checked_device(tensors, operands)

        def fused(backend: str, *operands: Tensor) -> Tensor:
            if not saves:
                return inner.operator(*operands, *options, backend)
            save = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
            return inner.operator(*operands, *options, save, backend)[0]

        def eager(*operands: Tensor) -> Tensor:
            return declaration.eager(*operands, *options)

        return run(name, backend, operands, lambda: label(dict(zip(names, options))), fused, eager)

    return call


class _Inner:
    """The operators ``_<name>`` and ``_<name>_backward`` of a declaration, which run fused kernels."""

    def __init__(self, declaration: Operator, arguments: list[Any]) -> None:
        self.declaration = declaration
        self.operands = [a for a in arguments if str(a.type) == "Tensor"]
        self.options = [a for a in arguments if str(a.type) != "Tensor"]
        self.saves = tuple(declaration.saves)
        kept = ("result",) * declaration.saves_result + self.saves
        operands = ", ".join(f"Tensor {a.name}" for a in self.operands)
        options = "".join(f", {a.type} {a.name}" for a in self.options)
        results = ", ".join(["Tensor"] * (1 + len(self.saves)))
        gradients = ", ".join(["Tensor"] * len(self.operands))
        save = ", bool save" if self.saves else ""
        self.schema = f"_{declaration.name}({operands}{options}{save}, str backend) -> ({results})"
        self.backward_schema = (
            f"_{declaration.name}_backward(Tensor grad, {operands}{''.join(f', Tensor {k}' for k in kept)}{options}, "
            f"bool[] needs, str backend) -> ({gradients})"
        )
        self.kept = len(kept)

    def define(self) -> None:
        """Register both: kernels, fakes, gradients, vmap rule, FLOPs."""
        declaration, count = self.declaration, len(self.operands)
        forward, backward = define(self.schema), define(self.backward_schema)
        self.operator = getattr(torch.ops.lgnet, f"_{declaration.name}")
        self.backward_operator = getattr(torch.ops.lgnet, f"_{declaration.name}_backward")
        implement(forward, self.run)
        implement(backward, self.run_backward)
        torch.library.register_fake(forward, self.fake, lib=LIBRARY)
        torch.library.register_fake(backward, self.fake_backward, lib=LIBRARY)
        differentiable(forward, self.gradient, self.keep)
        no_double_backward(backward)
        vectorized(forward, declaration.batched, apart=bool(self.saves))
        vectorized(backward, 1 + declaration.batched, apart=bool(self.saves) or declaration.batched < count)
        flop_formula(self.operator, lambda first, *args, **kwargs: declaration.flops(first)[0])
        flop_formula(self.backward_operator, lambda grad, first, *args, **kwargs: declaration.flops(first)[1])

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...], bool]:
        """Arguments of ``_<name>``: operands, options, whether to save."""
        end = len(self.operands) + len(self.options)
        return args[: len(self.operands)], args[len(self.operands) : end], bool(self.saves) and args[end]

    def run(self, *args: Any) -> Any:
        operands, options, save = self._split(args)
        backend = args[-1]
        record(self.declaration.name, backend)
        result, *saved = self.declaration.forward(self.declaration.launchers(backend), *operands, *options, save)
        if not self.saves:
            return result
        # A schema has no optional results: an empty vector stands for a tensor that is not saved.
        return (result, *(s if save else operands[0].new_empty(0) for s in saved))

    def fake(self, *args: Any) -> Any:
        operands, options, save = self._split(args)
        result = self.declaration.result(*operands, *options)
        if not self.saves:
            return result
        made = (make(*operands, *options) if save else operands[0].new_empty(0) for make in self._makers())
        return (result, *made)

    def _makers(self) -> Iterable[Callable[..., Tensor]]:
        return self.declaration.saves.values()

    def _split_backward(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """Arguments of ``_<name>_backward`` after the gradient: operands, saved tensors, options."""
        first, second = len(self.operands), len(self.operands) + self.kept
        return args[:first], args[first:second], args[second : second + len(self.options)]

    def run_backward(self, grad: Tensor, *args: Any) -> Any:
        operands, saved, options = self._split_backward(args)
        needs, backend = tuple(args[-2]), args[-1]
        record(f"{self.declaration.name}_backward", backend)
        kernels = self.declaration.launchers(backend)
        found = self.declaration.backward(kernels, grad, operands, saved, options, needs)
        return self._gradients(
            [
                operand.new_empty(0) if g is None else g.contiguous(memory_format=memory_format(operand))
                for g, operand in zip(found, operands, strict=True)
            ]
        )

    def fake_backward(self, grad: Tensor, *args: Any) -> Any:
        operands, _, _ = self._split_backward(args)
        return self._gradients(
            [like(t) if need else t.new_empty(0) for t, need in zip(operands, args[-2], strict=True)]
        )

    def _gradients(self, found: list[Tensor]) -> Any:
        return found[0] if len(found) == 1 else tuple(found)

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        operands, ctx.options, _ = self._split(inputs)
        ctx.backend = inputs[-1]
        results = output if self.saves else (output,)
        ctx.save_for_backward(*operands, *(results if self.declaration.saves_result else results[1:]))

    def gradient(self, ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        count = len(self.operands)
        needs = list(ctx.needs_input_grad[:count])
        found = self.backward_operator(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
        found = (found,) if count == 1 else found
        rest = (None,) * (len(self.options) + bool(self.saves) + 1)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *rest)
