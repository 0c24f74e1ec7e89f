"""Engines under ``torch.compile``: a call is one operator of the graph, which PyTorch does not trace into."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LGNetError
from ..ops.library import LIBRARY, define
from .regions import Rect

_engines: weakref.WeakValueDictionary[int, Callable[..., Any]] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_NOT_EXPORTED = "an engine cannot be exported: its kernels and buffers are this process's; export the model"


def number_of(engine: Callable[..., Any]) -> int:
    """A new number by which graphs of this process name an engine."""
    number = next(_numbers)
    _engines[number] = engine
    return number


def call(number: int, image: Tensor, mask: Tensor, holes: Sequence[Rect] | None) -> Tensor:
    """The engine's result, by the operator. For code that is being compiled; arguments are checked when it runs."""
    if torch.compiler.is_exporting():
        raise LGNetError(_NOT_EXPORTED)
    if holes is not None and any(len(hole) != 4 for hole in holes):
        raise TypeError(f"holes: expected Rect(top, bottom, left, right) of four integers each, got {holes!r}")
    edges = None if holes is None else [edge for hole in holes for edge in hole]
    result: Tensor = torch.ops.lgnet.engine(image.detach(), mask.detach(), edges, number)
    return result


def refuse_transforms(*tensors: object) -> None:
    """Raise LGNetError where PyTorch records or transforms the call, because it does not see inside an engine.

    Args:
        tensors: arguments of the call; those without values of their own (fake, distributed, functional tensors) are
            an error too.
    """
    if torch.jit.is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise LGNetError(_NOT_EXPORTED)
    faking = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    for tensor in tensors:
        wraps = isinstance(tensor, Tensor) and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if faking or wraps:
            kind = "a FakeTensorMode" if faking else type(tensor).__name__
            raise LGNetError(f"an engine reads the memory of its arguments: expected plain tensors, got {kind}")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise LGNetError("an engine cannot be transformed by torch.func (grad, vmap, ...); transform the model")


def _run(image: Tensor, mask: Tensor, edges: list[int] | None, number: int) -> Tensor:
    engine = _engines.get(number)
    if engine is None:
        raise LGNetError("engine: it was deleted, or belongs to another process; compile again with a new one")
    holes = None if edges is None else [tuple(edges[i : i + 4]) for i in range(0, len(edges), 4)]
    # A new tensor object, because compiled code reuses tensors without counting its writes to them, and the engine
    # remembers the holes of a mask that it has seen.
    result: Tensor = engine(image, mask.detach(), holes=holes)
    return result.contiguous()


def _fake(image: Tensor, mask: Tensor, edges: list[int] | None, number: int) -> Tensor:
    return image.new_empty(image.shape)


# Not part of the CUDA graphs of mode="reduce-overhead": their memory is reused, but an engine keeps its buffers and
# graphs. (Older versions of PyTorch have no such tag.)
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
_NAME = define("engine(Tensor image, Tensor mask, int[]? holes, int number) -> Tensor", *_TAGS)
LIBRARY.impl("engine", _run, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=LIBRARY)
