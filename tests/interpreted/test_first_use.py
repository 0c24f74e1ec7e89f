"""The first automatic use of an operator's kernel, with faults injected into its launcher."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import attention as kernels
from lgnet_fast.kernels import merge_concat as merge_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
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


def test_kernels_by_tf32_have_a_check_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may allow TF32 after the first use; the kernels are compiled anew then."""
    checks = count_checks(monkeypatch)
    torch.ops.lgnet.attention_block(*operands())
    with monkeypatch.context() as patch:
        patch.setattr(first_use, "tf32_allowed", lambda: True)
        for _ in range(2):
            torch.ops.lgnet.attention_block(*operands())
        assert checks == [2]
        torch.ops.lgnet.attention_block(*operands(dtype=torch.float16))
    torch.ops.lgnet.attention_block(*operands(dtype=torch.float16))
    torch.ops.lgnet.attention_block(*operands())
    assert checks == [3]
    assert sum("TF32" in name for name in kept()) == 1


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


@pytest.mark.parametrize("fault", [zeros, moved, nothing])
def test_a_wrong_forward_with_right_gradients_ends_in_eager(
    fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inject(monkeypatch, "attention_block_forward", fault)
    tensors = tuple(t.requires_grad_() for t in operands())
    assert torch.equal(torch.ops.lgnet.attention_block(*tensors), reference.attention_block(*tensors))
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("fault", [zeros, moved, nothing, out_of_resources])
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


def test_a_full_gpu_is_no_fault_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading a kernel fails then, with an error of Triton's own; PyTorch's type of it is what callers handle."""

    def full(result: Any) -> Any:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    tensors = operands()
    with monkeypatch.context() as patch:
        inject(patch, "attention_block_forward", full)
        with pytest.raises(torch.OutOfMemoryError, match="Triton Error"):
            torch.ops.lgnet.attention_block(*tensors)
    assert kept() == {}
    ops.reset_calls()
    torch.ops.lgnet.attention_block(*tensors)
    assert ops.calls() == {("attention_block", "triton"): 1}
    assert not warnings(caplog)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("90 GiB"), RuntimeError("Triton Error [CUDA]: out of memory")], ids=type
)
def test_a_kernel_without_memory_leaves_none_allocated(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may try again with a smaller batch, before any garbage collection."""
    torch.ops.lgnet.attention_block(*operands())
    seen: list[weakref.ref[Tensor]] = []

    def full(result: Any) -> Any:
        taken = torch.empty(1000)
        seen.append(weakref.ref(taken))
        raise type(error)(str(error))

    inject(monkeypatch, "attention_block_forward", full)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.ops.lgnet.attention_block(*operands())
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_check_that_finds_no_memory_takes_smaller_operands(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else training on a small GPU would try the same check in every step. The verdict is that of the use, which has
    no size."""
    monkeypatch.setattr(first_use, "_SCORES", 2 * 8**4)
    sizes: list[tuple[int, ...]] = []
    seen: list[weakref.ref[Tensor]] = []
    left: list[bool] = []
    compare = first_use.compare
    largest = 2 * 16 * 8 * 8

    def limited(use: first_use.Use, tensors: tuple[Tensor, ...], *args: Any) -> tuple[float, float]:
        sizes.append(tuple(tensors[0].shape))
        left.append(any(one() is not None for one in seen))
        copy = tensors[0].clone()
        seen.append(weakref.ref(copy))
        if copy.numel() >= largest:
            raise torch.OutOfMemoryError("90 GiB")
        return compare(use, tensors, *args)

    monkeypatch.setattr(first_use, "compare", limited)
    tensors = (normal(2, 16, 8, 8), *operands()[1:])
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            torch.ops.lgnet.attention_block(*tensors)
    finally:
        gc.enable()
    assert sizes == [(2, 16, 8, 8), (1, 16, 4, 4)]
    assert left == [False, False]  # what the first attempt had allocated was free
    assert ops.calls() == {("attention_block", "triton"): 2}
    assert [value["passed"] for value in kept().values()] == [True]
    assert not warnings(caplog)
    # smaller operands do not fit either: the kernel is used, and the next call tries again
    monkeypatch.setattr(first_use, "_verdicts", {})
    cache.drop(cache.key_for(torch.device("cpu"), torch.float32), cache.VERDICTS)
    largest = 0
    sizes.clear()
    for _ in range(2):
        torch.ops.lgnet.attention_block(*tensors)
    assert sizes == [(2, 16, 8, 8), (1, 16, 4, 4)] * 2
    assert kept() == {}


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


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (1, 0, 2, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("save", [False, True])
def test_results_have_the_layout_that_torch_compile_expects(order: tuple[int, ...], save: bool) -> None:
    """Also for features in a layout that is neither contiguous nor channels_last."""
    features, weight, bias = operands()
    features = normal(*(features.shape[i] for i in order)).permute(*map(order.index, range(4)))
    for op, arguments in (("_attention_block", (features, weight, bias)), ("_cosine_attention", (features,))):
        operator = getattr(torch.ops.lgnet, op)
        results = operator(*arguments, "released", save, "triton")
        with FakeTensorMode() as mode:
            expected = operator(*map(mode.from_tensor, arguments), "released", save, "triton")
        assert [r.stride() for r in results] == [e.stride() for e in expected]


def use(channels: int, gradient: bool = True, op: str = "attention_block") -> first_use.Use:
    return first_use.Use(op, torch.device("cpu"), torch.float32, None, channels, gradient)


def test_large_operands_are_cut() -> None:
    big = torch.empty(64, 4, 256, 300, device="meta")
    cut, weight = first_use._cut(use(16), (big, torch.empty(4, 8, 1, 1, device="meta")))
    assert cut.shape == (1, 4, 64, 128)
    assert weight.shape == (4, 8, 1, 1)
    pixels = torch.empty(2, 4, 1, 1, device="meta")
    assert first_use._cut(use(16), (pixels, weight))[1].shape == (4, 8, 1, 1)
    assert first_use._cut(use(16), (torch.empty(64, 4, 64, 64, device="meta"),))[0].shape == (4, 4, 64, 64)
    # LGNet's largest block
    block = torch.empty(16, 128, 64, 64, device="meta")
    assert first_use._cut(use(128), (block,))[0].shape == (2, 128, 64, 64)
    assert first_use._cut(use(128, False), (block[:1],))[0].shape == (1, 128, 64, 64)
    picture = torch.empty(16, 3, 512, 512, device="meta")
    assert first_use._cut(use(0, op="merge"), (picture, picture))[1].shape == (16, 3, 128, 128)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 128, 64, 64), (64, 512, 128, 128), (1, 512, 512, 16), (1000, 16, 8, 8)], ids=str
)
def test_a_checks_work_is_bounded(shape: tuple[int, ...], gradient: bool) -> None:
    """So that it takes less than two seconds on a slow GPU; only the largest operands are cropped."""
    (cut,) = first_use._cut(use(shape[1], gradient), (torch.empty(shape, device="meta"),))
    block = first_use.OPERATORS["attention_block"]
    work = sum(block.flops(cut.shape)[: 1 + gradient])
    assert work <= first_use.MOST_FLOPS
    assert (
        cut.shape == shape
        or work > first_use.MOST_FLOPS / 8
        or cut.shape[0] * (cut.shape[2] * cut.shape[3]) ** 2 > 2**23
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_a_check_runs_the_kernel_once(gradient: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """And eager PyTorch twice, on operands of a bounded size; then the call itself."""
    runs: list[tuple[str, tuple[int, ...]]] = []

    def counted(module: Any, name: str, title: str) -> None:
        original = getattr(module, name)

        def spy(features: Tensor, *args: Any, **options: Any) -> Any:
            runs.append((title, tuple(features.shape)))
            return original(features, *args, **options)

        monkeypatch.setattr(module, name, spy)

    counted(kernels, "attention_block_forward", "kernel")
    counted(kernels, "attention_block_backward", "kernel's backward")
    counted(reference, "query_key_value", "eager")
    monkeypatch.setattr(first_use, "MOST_FLOPS", 1 << 17)
    tensors = tuple(t.requires_grad_(gradient) for t in operands(side=8))
    with caplog.at_level(logging.INFO, "lgnet_fast"):
        torch.ops.lgnet.attention_block(*tensors)
    *checked, own = runs
    assert own == ("kernel", (1, 16, 8, 8))
    small = checked[0][1]
    assert small[2] * small[3] < 64
    assert sum(first_use.OPERATORS["attention_block"].flops(torch.Size(small))[: 1 + gradient]) <= 1 << 17
    names = ["kernel", "eager", "eager"] + gradient * ["kernel's backward"]
    assert sorted(checked) == sorted((name, small) for name in names)
    assert any("compiled and run in" in record.message for record in caplog.records)
