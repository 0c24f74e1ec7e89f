"""Merge kernels against float64, by the rule of `support.assert_accurate`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lgnet_fast.kernels.merge_concat import (
    can_run_merge,
    merge_backward,
    merge_concat_backward,
    merge_concat_forward,
    merge_forward,
)
from torch import Tensor

from tests.interpreted.rules import DTYPES, merge_results, normal
from tests.support import assert_accurate

FORWARD = {True: merge_concat_forward, False: merge_forward}
BACKWARD = {True: merge_concat_backward, False: merge_backward}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width = shape
    mask = normal(batch, 1, height, width, seed=2).sigmoid().to(dtype)
    return normal(batch, 3, height, width, dtype=dtype), normal(batch, 3, height, width, dtype=dtype, seed=1), mask


def check(image: Tensor, output: Tensor, mask: Tensor, *, concat: bool, tanh: bool) -> None:
    """Result and all gradients; the mask channel must be the mask itself."""
    tensors = (image, output, mask)
    before = [x.clone() for x in tensors]
    result = FORWARD[concat](image, output, mask, tanh=tanh)
    grad = normal(*result.shape, dtype=image.dtype, seed=3)
    grads = BACKWARD[concat](grad, image, output, mask, tanh=tanh)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    exact = merge_results(*tensors, grad, torch.float64, concat=concat, tanh=tanh)
    eager = merge_results(*tensors, grad, image.dtype, concat=concat, tanh=tanh)
    names = ("merged", "d_image", "d_output", "d_mask")
    for name, actual, reference, plain in zip(names, (result, *grads), exact, eager, strict=True):
        assert actual is not None
        assert_accurate(name, actual, reference, plain)
    if concat:
        assert torch.equal(result[:, 3:], mask)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 13), (2, 37, 41)], ids=str)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(dtype: torch.dtype, concat: bool, tanh: bool, shape: tuple[int, int, int]) -> None:
    check(*inputs(shape, dtype), concat=concat, tanh=tanh)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "channels_sliced": lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
    "batch_expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_views(which: int, view: str) -> None:
    tensors = list(inputs((2, 9, 13)))
    tensors[which] = VIEWS[view](tensors[which])
    check(*tensors, concat=True, tanh=True)
    check(*tensors, concat=False, tanh=False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("concat", [False, True])
def test_out_slice(concat: bool, layout: torch.memory_format) -> None:
    tensors = inputs((2, 9, 13))
    channels = 4 if concat else 3
    buffer = torch.full((2, 9, 9, 13), math.nan).to(memory_format=layout)
    out = buffer[:, 2 : 2 + channels]
    assert FORWARD[concat](*tensors, out=out) is out
    assert torch.equal(out, FORWARD[concat](*tensors))
    assert buffer[:, :2].isnan().all()
    assert buffer[:, 2 + channels :].isnan().all()


def test_known_pixels_are_exact() -> None:
    image, output, _ = inputs((2, 9, 13), torch.float16)
    mask = (normal(2, 1, 9, 13) > 0).half()
    merged = merge_forward(image, output, mask)
    assert torch.equal(merged, torch.where(mask.bool(), output, image))


def test_tanh_is_accurate_near_zero() -> None:
    values = torch.logspace(-8, 2, 3 * 500).reshape(1, 3, 20, 25)
    output = torch.cat([values, -values])
    merged = merge_forward(torch.zeros_like(output), output, torch.ones(2, 1, 20, 25), tanh=True)
    torch.testing.assert_close(merged, torch.tanh(output.double()).float(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("concat", [False, True])
def test_needs(concat: bool) -> None:
    tensors = inputs((1, 9, 13))
    grad = normal(1, 4 if concat else 3, 9, 13, seed=3)
    every = BACKWARD[concat](grad, *tensors, tanh=True)
    for index in range(3):
        needs = tuple(i == index for i in range(3))
        grads = BACKWARD[concat](grad, *tensors, tanh=True, needs=needs)
        assert [g is not None for g in grads] == list(needs)
        assert torch.equal(grads[index], every[index])


def test_empty_batch() -> None:
    tensors = inputs((0, 9, 13))
    assert can_run_merge(*tensors) is None
    assert merge_concat_forward(*tensors).shape == (0, 4, 9, 13)
    assert merge_forward(*tensors).shape == (0, 3, 9, 13)
    assert [x.shape for x in merge_backward(tensors[0], *tensors)] == [x.shape for x in tensors]


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("image of shape", lambda i, o, m: can_run_merge(i[:, :2], o, m)),
        ("output of shape", lambda i, o, m: can_run_merge(i, o[:, :2], m)),
        ("mask of shape", lambda i, o, m: can_run_merge(i, o, i)),
        ("output of torch.float16", lambda i, o, m: can_run_merge(i, o.half(), m)),
        ("mask on meta", lambda i, o, m: can_run_merge(i, o, m.to("meta"))),
        ("dtype", lambda i, o, m: can_run_merge(i.double(), o.double(), m.double())),
    ],
)
def test_reasons(reason: str, call: Callable[[Tensor, Tensor, Tensor], str | None]) -> None:
    tensors = inputs((1, 5, 7))
    assert can_run_merge(*tensors) is None
    assert reason in (call(*tensors) or "")
