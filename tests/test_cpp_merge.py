"""The C++ merge kernels against plain PyTorch in float64: values, gradients, tanh, layouts."""

from __future__ import annotations

import math

import pytest
import torch

from lgnet_fast import native
from lgnet_fast.ops.cpu import merge_concat as cpu_merge
from tests.cpp_support import LAYOUTS, merge_inputs, views, with_grads
from tests.support import assert_accurate

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))

MERGE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def merge(image, output, mask, tanh, concat):
    merged = image * (1 - mask) + (output.tanh() if tanh else output) * mask
    return torch.cat((merged, mask), dim=1) if concat else merged


@pytest.mark.parametrize("concat", [True, False], ids=["merge_concat", "merge"])
@pytest.mark.parametrize("tanh", [False, True], ids=["", "tanh"])
@pytest.mark.parametrize("dtype", MERGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 13), (0, 4, 4), (2, 17, 31), (1, 130, 129)], ids=str)
def test_merge_and_its_gradients(isa, shape, dtype, tanh, concat):
    inputs = merge_inputs(shape, dtype)
    before = [t.clone() for t in inputs]
    rng = torch.Generator().manual_seed(2)
    grad = torch.randn(shape[0], 4 if concat else 3, *shape[1:], generator=rng).to(dtype)
    forward = cpu_merge.merge_concat_forward if concat else cpu_merge.merge_forward
    backward = cpu_merge.merge_concat_backward if concat else cpu_merge.merge_backward
    truth = with_grads(lambda *a: merge(*a, tanh, concat), [t.double() for t in inputs], grad.double())
    eager = with_grads(lambda *a: merge(*a, tanh, concat), inputs, grad)
    got = (forward(*inputs, tanh=tanh), *backward(grad, *inputs, tanh=tanh))
    for name, g, e, t in zip(("out", "image", "output", "mask"), got, eager, truth, strict=True):
        # The output's gradient has a factor 1 - tanh(output)^2, whose terms may cancel.
        terms = grad.abs().max().item() if tanh and name == "output" and grad.numel() else 0.0
        assert_accurate(name, g, t, e, terms=terms)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    for wanted in range(3):
        needs = tuple(i == wanted for i in range(3))
        alone = backward(grad, *inputs, tanh=tanh, needs=needs)
        assert [g is not None for g in alone] == list(needs)
        assert torch.equal(alone[wanted], got[1 + wanted])


def test_merge_is_exact_outside_and_inside_the_hole():
    image, output, mask = merge_inputs((2, 40, 50), torch.float32)
    mask = (mask > 0.5).float()
    out = cpu_merge.merge_concat_forward(image, output, mask)
    assert torch.equal(out[:, :3], torch.where(mask.bool(), output, image))
    assert torch.equal(out[:, 3:], mask)


def test_tanh_to_a_few_ulp(isa):
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.logspace(-30, 2, 50_000), -torch.logspace(-30, 2, 50_000)])
    x = x[: x.numel() // 3 * 3].view(1, 3, 1, -1)
    ones, zeros = torch.ones(1, 1, 1, x.shape[3]), torch.zeros_like(x)
    got = cpu_merge.merge_forward(zeros, x, ones, tanh=True)
    truth = x.double().tanh()
    ulp = (got.double() - truth).abs() / (truth.abs() * 2.0**-23).clamp_min(2.0**-149)
    assert ulp.max() < 4
    assert got.abs().max() <= 1
    special = torch.tensor([float("nan"), float("inf"), -float("inf")]).view(1, 3, 1, 1)
    got = cpu_merge.merge_forward(torch.zeros_like(special), special, torch.ones(1, 1, 1, 1), tanh=True).flatten()
    assert got[0].isnan()
    assert got[1:].tolist() == [1.0, -1.0]


def test_tanh_is_1_and_flat_where_it_rounds_to_1(isa):
    """From 13 log 2 on. A result a few roundings below 1 would have a slope of some 1e-7 instead of 0."""
    x = torch.logspace(math.log10(13 * math.log(2) + 1e-5), 38, 999).repeat(3).view(1, 3, 1, -1)
    x[:, 1] *= -1
    ones, zeros = torch.ones(1, 1, 1, x.shape[3]), torch.zeros_like(x)
    assert torch.equal(cpu_merge.merge_forward(zeros, x, ones, tanh=True), x.sign())
    slope = cpu_merge.merge_backward(torch.ones_like(x), zeros, x, ones, tanh=True)[1]
    assert torch.equal(slope, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_strides_and_slices(layout, dtype):
    image, output, mask = (views(t)[layout] for t in merge_inputs((2, 19, 45), dtype))
    expected = cpu_merge.merge_concat_forward(*(t.contiguous() for t in (image, output, mask)), tanh=True)
    got = cpu_merge.merge_concat_forward(image, output, mask, tanh=True)
    assert torch.equal(got, expected)
    buffer = torch.full((2, 9, 19, 45), float("nan"), dtype=dtype)
    for target in (buffer[:, 2:6], buffer.contiguous(memory_format=torch.channels_last)[:, 2:6]):
        out = cpu_merge.merge_concat_forward(image, output, mask, tanh=True, out=target)
        assert out is target
        assert torch.equal(target, expected)
    assert buffer[:, :2].isnan().all()
    assert buffer[:, 6:].isnan().all()
    torch.manual_seed(0)
    grad = torch.randn_like(expected)
    want = cpu_merge.merge_concat_backward(grad, *(t.contiguous() for t in (image, output, mask)), tanh=True)
    have = cpu_merge.merge_concat_backward(views(grad)["transposed"], image, output, mask, tanh=True)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.once
@pytest.mark.parametrize(("dtype", "height"), [(torch.float32, 1056), (torch.bfloat16, 2080), (torch.float32, 1057)])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_merge_past_the_caches(offset, dtype, height):
    # Above 16 MB the output is written by non-temporal stores, in blocks that begin at lines of the caches.
    width = 1024 if height % 2 == 0 else 1023  # odd planes have no lines in common
    image, output, mask = merge_inputs((1, height, width), dtype)
    storage = torch.full((4 * height * width + 64,), float("nan"), dtype=dtype)
    out = storage[offset : offset + 4 * height * width].view(1, 4, height, width)
    cpu_merge.merge_concat_forward(image, output, mask, out=out)
    exact = merge(*(t.double() for t in (image, output, mask)), False, True)
    assert_accurate("merged", out, exact, roundings=8)
    assert storage[:offset].isnan().all()
    assert storage[offset + out.numel() :].isnan().all()
