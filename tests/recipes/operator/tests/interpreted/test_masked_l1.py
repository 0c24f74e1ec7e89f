"""The Triton kernels of `lgnet::masked_l1` against float64, and their first automatic use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lgnet_fast.kernels import masked_l1 as kernels
from lgnet_fast.kernels.masked_l1 import can_run_masked_l1, masked_l1_backward, masked_l1_forward
from torch import Tensor

from lgnet_fast import cache, ops
from lgnet_fast.ops import dispatch, first_use
from lgnet_fast.reference.losses import masked_l1
from tests.interpreted.rules import DTYPES, normal
from tests.support import assert_accurate


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    weight = (normal(shape[0], 1, *shape[2:], seed=2) > 0).to(dtype)
    return [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), weight]


def results(operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in operands]
    loss = masked_l1(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(operands: list[Tensor]) -> None:
    dtype = operands[0].dtype
    assert can_run_masked_l1(*operands) is None
    loss, sums = masked_l1_forward(*operands)
    grads = masked_l1_backward(torch.ones(()), *operands, sums)
    exact, eager = results(operands, torch.float64), results(operands, dtype)
    for actual, truth, plain in zip((loss, *grads), exact, eager, strict=True):
        assert actual is not None
        assert_accurate("masked_l1", actual, truth, plain)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 3, 9, 13), (2, 3, 37, 41)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_l1(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    check(inputs(shape, dtype))


def test_strides() -> None:
    output, target, weight = inputs((2, 3, 9, 13))
    check([output.to(memory_format=torch.channels_last), target.transpose(2, 3).contiguous().transpose(2, 3), weight])


def test_first_use_is_checked(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setattr(dispatch, "CANDIDATES", {"cpu": "triton"})
    monkeypatch.setattr(first_use, "_verdicts", {})
    operands = inputs((2, 3, 9, 13))
    ops.reset_calls()
    torch.ops.lgnet.masked_l1(*operands)
    assert ops.calls() == {("masked_l1", "triton"): 1}
    monkeypatch.setattr(first_use, "_verdicts", {})
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "other"))
    forward = kernels.masked_l1_forward

    def doubled(*operands: Tensor) -> tuple[Tensor, Tensor]:
        loss, sums = forward(*operands)
        return 2 * loss, sums

    monkeypatch.setattr(kernels, "masked_l1_forward", doubled)
    ops.reset_calls()
    assert torch.equal(torch.ops.lgnet.masked_l1(*operands), masked_l1(*operands))
    assert ops.calls() == {("masked_l1", "eager"): 1}
