"""`lgnet::merge` and `lgnet::merge_concat`, with the preceding tanh fused where asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forks
from ..reference import merge as reference
from .dispatch import launchers, record, run
from .registry import (
    LIBRARY,
    check,
    checked_float,
    composite,
    define,
    differentiable,
    flop_formula,
    implement,
    no_double_backward,
    vectorized,
)


def _check(image: Tensor, output: Tensor, mask: Tensor) -> None:
    forks.prepare()
    for name, tensor in (("image", image), ("output", output), ("mask", mask)):
        checked_float(name, tensor)
    check(image.dim() == 4 and image.shape[1] == 3, "image", "[B, 3, H, W]", list(image.shape))
    check(output.shape == image.shape, "output", f"{list(image.shape)} as image", list(output.shape))
    expected = [image.shape[0], 1, *image.shape[2:]]
    check(list(mask.shape) == expected, "mask", f"{expected} to fit image", list(mask.shape))


def _promote(device: str, image: Tensor, output: Tensor, mask: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Autocast's rule for concatenation: everything in the widest dtype."""
    widest = torch.promote_types(torch.promote_types(image.dtype, output.dtype), mask.dtype)
    return (image.to(widest), output.to(widest), mask.to(widest), *rest)


def _flops(image_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 0  # like torch's own counter, which counts no pointwise work


def _register(op: str, planes: int) -> None:
    """Register operator `op`, whose result has `planes` channels, and its backward."""
    plain = getattr(reference, op)
    tensors = "Tensor image, Tensor output, Tensor mask"
    public = define(f'{op}({tensors}, bool tanh=False, *, str backend="auto") -> Tensor')
    forward = define(f"_{op}({tensors}, bool tanh, str backend) -> Tensor")
    backward = define(
        f"_{op}_backward(Tensor grad, {tensors}, bool tanh, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
    )
    inner = getattr(torch.ops.lgnet, f"_{op}")
    inner_backward = getattr(torch.ops.lgnet, f"_{op}_backward")

    def call(image: Tensor, output: Tensor, mask: Tensor, tanh: bool = False, *, backend: str = "auto") -> Tensor:
        _check(image, output, mask)

        def fused(backend: str, *tensors: Tensor) -> Tensor:
            return inner(*tensors, tanh, backend)

        def eager(image: Tensor, output: Tensor, mask: Tensor) -> Tensor:
            return plain(image, torch.tanh(output) if tanh else output, mask)

        return run(op, backend, (image, output, mask), "of tanh" if tanh else None, fused, eager)

    def run_forward(image: Tensor, output: Tensor, mask: Tensor, tanh: bool, backend: str) -> Tensor:
        record(op, backend)
        return getattr(launchers(op, backend), f"{op}_forward")(image, output, mask, tanh=tanh)

    def run_backward(
        grad: Tensor, image: Tensor, output: Tensor, mask: Tensor, tanh: bool, needs: list[bool], backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        record(f"{op}_backward", backend)
        launch = getattr(launchers(op, backend), f"{op}_backward")
        grads = launch(grad, image, output, mask, tanh=tanh, needs=tuple(needs))
        a, b, c = (grad.new_empty(0) if g is None else g for g in grads)
        return a, b, c

    def fake_forward(image: Tensor, output: Tensor, mask: Tensor, tanh: bool, backend: str) -> Tensor:
        batch, _, height, width = image.shape
        return image.new_empty((batch, planes, height, width))

    def fake_backward(
        grad: Tensor, image: Tensor, output: Tensor, mask: Tensor, tanh: bool, needs: list[bool], backend: str
    ) -> tuple[Tensor, ...]:
        shapes = (image.shape, output.shape, mask.shape)
        return tuple(grad.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.tanh, ctx.backend = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    def grad(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        grads = inner_backward(grad_out, *ctx.saved_tensors, ctx.tanh, needs, ctx.backend)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)

    composite(public, call, _promote)
    implement(forward, run_forward)
    implement(backward, run_backward)
    torch.library.register_fake(forward, fake_forward, lib=LIBRARY)
    torch.library.register_fake(backward, fake_backward, lib=LIBRARY)
    differentiable(forward, grad, setup)
    no_double_backward(backward)
    for name, maps in ((public, 3), (forward, 3), (backward, 4)):
        vectorized(name, maps)
    flop_formula(inner, inner_backward)(_flops)


_register("merge_concat", 4)
_register("merge", 3)
