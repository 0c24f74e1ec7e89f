"""The attention block: ours against other ways to compute it, forward and forward + backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.attention_forms import forms
from bench.timing import SMOKE
from lgnet_fast.reference.attention import attention_block

Arguments = tuple[Tensor, Tensor, Tensor]
"""Features, the combiner's weight and bias."""

# (C, H, W) of the three blocks at 256x256.
SHAPES = {"64x64x128": (128, 64, 64), "32x32x256": (256, 32, 32), "16x16x512": (512, 16, 16)}
LARGEST = "64x64x128"
if SMOKE:
    LARGEST = "16x16x512"
    SHAPES = {LARGEST: SHAPES[LARGEST]}


def inputs(device: str, dtype: torch.dtype, shape: tuple[int, int, int], batch: int) -> Arguments:
    """Features of the scale the trained networks have, and a combiner that keeps it."""
    channels, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    weight = normal(channels, 2 * channels, 1, 1) / channels**0.5
    return normal(batch, channels, height, width) * 0.5, weight, normal(channels)


def ours(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    backend = "triton" if features.is_cuda else "cpp"
    return torch.ops.lgnet.attention_block(features, weight, bias, "released", backend=backend)


def relative_error(form: Callable[..., Tensor], args: Arguments, exact: Tensor) -> float:
    return ((form(*args).double() - exact).norm() / exact.norm()).item()


def contestants(args: Arguments) -> dict[str, Callable[..., Tensor]]:
    """The forms that run on these tensors with a correct result; ours must be among them."""
    features, weight, bias = (a.double() for a in args)
    exact = attention_block(features, weight, bias, "released")
    tolerance = 1e-5 if args[0].dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else 2e-2
    ours_error = relative_error(ours, args, exact)
    assert ours_error < tolerance, f"ours is wrong: {ours_error}"
    running: dict[str, Callable[..., Tensor]] = {"ours": ours}
    others = 2e-2 if features.is_cuda else tolerance  # their convolutions are in TF32 there by default
    for name, form in forms().items():
        if SMOKE and name in ("flex", "compiled"):  # compiling takes longer than everything else
            continue
        try:
            error = relative_error(form, args, exact)
        except Exception as reason:  # a form that raises any error here is left out
            print(f"{name}: cannot run: {str(reason).splitlines()[0][:100]}")
            continue
        if not error < others:  # torch.compile's bfloat16 product of matrices gives NaN on processors with AMX
            print(f"{name}: left out, its relative error is {error:.2g}")
            continue
        running[name] = form
    return running


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: str, batch: int, dtype: torch.dtype, device: str, compete: Any) -> None:
    if device == "cpu" and (dtype == torch.float16 or batch > 1):
        pytest.skip("the CPU is measured at batch 1 in fp32 and bf16")
    args = inputs(device, dtype, SHAPES[shape], batch)
    with torch.no_grad():
        calls = {name: lambda form=form: form(*args) for name, form in contestants(args).items()}
        summary = compete(calls, "ours", rounds=15)
    print(shape, batch, dtype, summary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_backward(dtype: torch.dtype, device: str, compete: Any) -> None:
    batch = 1 if device == "cpu" else 4
    args = inputs(device, dtype, SHAPES[LARGEST], batch)
    leaves = tuple(a.clone().requires_grad_() for a in args)
    cotangent = torch.randn_like(args[0])

    def step(form: Callable[..., Tensor]) -> None:
        torch.autograd.grad(form(*leaves), leaves, cotangent)

    with torch.no_grad():
        running = contestants(args)
    calls = {}
    for name, form in running.items():
        try:
            step(form)
        except Exception as reason:
            assert name != "ours"
            print(f"{name}: no gradient here: {str(reason).splitlines()[0][:100]}")
            continue
        calls[name] = lambda form=form: step(form)
    print("forward + backward", dtype, compete(calls, "ours", rounds=8))
