"""The first automatic use of an operator's kernel, with faults injected into its launcher."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import attention as kernels
from lgnet_fast.kernels import merge_concat as merge_kernels
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.errors import OutOfResources

from lgnet_fast import BackendError, cache, ops
from lgnet_fast.ops import dispatch, first_use
from lgnet_fast.reference import attention as reference
from tests.interpreted.rules import normal


@pytest.fixture(autouse=True)
def machine(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" takes Triton, and there are no verdicts yet."""
    monkeypatch.setattr(dispatch, "CANDIDATES", {"cpu": "triton"})
    monkeypatch.setattr(first_use, "_verdicts", {})
    ops.reset_calls()


def operands(channels: int = 16, dtype: torch.dtype = torch.float32, side: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(1, channels, side, side, dtype=dtype),
        normal(channels, 2 * channels, 1, 1, dtype=dtype, seed=1) / 6,
        normal(channels, dtype=dtype, seed=2),
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def kept() -> dict[str, Any]:
    return {e.name: e.value for e in cache.entries(cache.VERDICTS)}


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    checks = [0]
    compare = first_use.compare

    def counted(*args: Any) -> tuple[float, float]:
        checks[0] += 1
        return compare(*args)

    monkeypatch.setattr(first_use, "compare", counted)
    return checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_right_kernels_run_and_are_checked_once(
    dtype: torch.dtype, gradient: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checks = count_checks(monkeypatch)
    tensors = tuple(t.requires_grad_(gradient) for t in operands(dtype=dtype))
    for _ in range(2):
        out = torch.ops.lgnet.attention_block(*tensors)
    if gradient:
        out.sum().backward()
        assert all(t.grad is not None for t in tensors)
    assert checks == [1]
    expected = {("attention_block", "triton"): 2} | ({("attention_block_backward", "triton"): 1} if gradient else {})
    assert ops.calls() == expected
    assert not warnings(caplog)
    name = f"attention_block released, up to 16 channels, {'with' if gradient else 'without'} gradient"
    assert kept()[name]["passed"]
    assert kept()[name]["error"] <= kept()[name]["limit"]


def test_every_kind_of_use_has_a_check_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = count_checks(monkeypatch)
    block = torch.ops.lgnet.attention_block
    block(*operands())
    block(*operands(side=5))  # another size is the same use
    assert checks == [1]
    block(*operands(), "paper")
    block(*operands(dtype=torch.float16))
    block(*operands(channels=20))
    torch.ops.lgnet.cosine_attention(operands()[0])
    picture = normal(1, 3, 4, 4)
    for tanh in (False, True):
        torch.ops.lgnet.merge_concat(picture, picture, picture[:, :1], tanh)
    assert checks == [7]
    assert len(list(cache.entries(cache.VERDICTS))) == 7
    assert {backend for _, backend in ops.calls()} == {"triton"}


def zeros(result: Any) -> Any:
    return tuple(None if r is None else torch.zeros_like(r) for r in result)


def moved(result: Any) -> Any:
    return (result[0].roll(1, dims=-1), *result[1:])


def nothing(result: Any) -> Any:
    return (torch.full_like(result[0], torch.nan), *result[1:])


def out_of_resources(result: Any) -> Any:
    raise OutOfResources(122880, 101376, "shared memory")


def broken(result: Any) -> Any:
    raise RuntimeError("CUDA error: invalid argument")


def inject(monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[[Any], Any]) -> None:
    original = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args, **options: fault(original(*args, **options)))


@pytest.mark.parametrize("fault", [zeros, moved, nothing, out_of_resources, broken])
def test_a_wrong_forward_ends_in_eager(
    fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inject(monkeypatch, "attention_block_forward", fault)
    tensors = operands()
    for _ in range(2):
        assert torch.equal(torch.ops.lgnet.attention_block(*tensors), reference.attention_block(*tensors))
    assert ops.calls() == {("attention_block", "eager"): 2}
    (warning,) = warnings(caplog)
    assert warning.startswith("attention_block released, up to 16 channels, without gradient runs in eager PyTorch")
    # a later process finds the verdict, and reports it
    monkeypatch.setattr(first_use, "_verdicts", {})
    monkeypatch.setattr(cache, "_known", {})
    checks = count_checks(monkeypatch)
    torch.ops.lgnet.attention_block(*tensors)
    assert checks == [0]
    assert "known from an earlier run" in warnings(caplog)[1]


@pytest.mark.parametrize("fault", [zeros, moved, out_of_resources])
def test_a_wrong_backward_ends_in_eager(
    fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inject(monkeypatch, "attention_block_backward", fault)
    tensors = tuple(t.requires_grad_() for t in operands())
    torch.ops.lgnet.attention_block(*tensors).sum().backward()
    plain = tuple(t.detach().requires_grad_() for t in tensors)
    reference.attention_block(*plain, "released").sum().backward()
    for ours, theirs in zip(tensors, plain):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert ops.calls() == {("attention_block", "eager"): 1}
    assert len(warnings(caplog)) == 1
    # without a gradient the kernel is another use, and right
    torch.ops.lgnet.attention_block(*operands())
    assert ops.calls()["attention_block", "triton"] == 1


def test_merges_fall_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_kernels, "merge_forward", lambda image, *args, **options: torch.zeros_like(image))
    image, output, mask = normal(1, 3, 4, 4), normal(1, 3, 4, 4, seed=1), (normal(1, 1, 4, 4) > 0).float()
    assert torch.equal(torch.ops.lgnet.merge(image, output, mask), image * (1 - mask) + output * mask)
    assert ops.calls() == {("merge", "eager"): 1}


def test_an_explicit_backend_is_neither_checked_nor_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = count_checks(monkeypatch)
    torch.ops.lgnet.attention_block(*operands(), backend="triton")
    inject(monkeypatch, "attention_block_forward", out_of_resources)
    with pytest.raises(OutOfResources):
        torch.ops.lgnet.attention_block(*operands(), backend="triton")
    with pytest.raises(BackendError):
        torch.ops.lgnet.attention_block(*operands(dtype=torch.float64), backend="triton")
    assert checks == [0]


def test_a_launch_that_fails_after_its_check(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.ops.lgnet.attention_block(*operands())
    inject(monkeypatch, "attention_block_forward", out_of_resources)
    tensors = operands(side=5)
    for _ in range(2):
        assert torch.equal(torch.ops.lgnet.attention_block(*tensors), reference.attention_block(*tensors))
    assert ops.calls()["attention_block", "eager"] == 2
    assert len(warnings(caplog)) == 1
    inject(monkeypatch, "attention_forward", lambda result: (_ for _ in ()).throw(torch.OutOfMemoryError("90 GiB")))
    with pytest.raises(torch.OutOfMemoryError):
        torch.ops.lgnet.cosine_attention(tensors[0])


def test_nothing_is_checked_where_values_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = count_checks(monkeypatch)
    block = torch.ops.lgnet.attention_block
    with FlopCounterMode(display=False) as counter:
        block(*operands())
    assert counter.get_total_flops() > 0
    assert ops.calls() == {("attention_block", "triton"): 1}
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        block(*operands())
    assert block(*(t.to("meta") for t in operands())).is_meta
    assert checks == [0]
    with torch.inference_mode():
        block(*operands())
    assert checks == [1]
    assert ops.calls()["attention_block", "triton"] == 3


def test_large_operands_are_cut() -> None:
    big = torch.empty(64, 4, 256, 300, device="meta")
    cut, weight = first_use._cut((big, torch.empty(4, 8, 1, 1, device="meta")))
    assert cut.shape == (1, 4, 128, 128)
    assert weight.shape == (4, 8, 1, 1)
    assert first_use._cut((torch.empty(64, 4, 64, 64, device="meta"),))[0].shape == (16, 4, 64, 64)
