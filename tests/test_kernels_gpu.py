"""Kernels on a real GPU: the rule of tests/interpreted, at the network's shapes and beyond; `make gpu` runs it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lgnet_fast.kernels.attention import (
    attention_backward,
    attention_block_backward,
    attention_block_forward,
    attention_forward,
    can_run_attention,
)
from lgnet_fast.kernels.configs import assume_generation, device_generation
from lgnet_fast.kernels.merge_concat import (
    can_run_merge,
    merge_backward,
    merge_concat_backward,
    merge_concat_forward,
    merge_forward,
)

from tests.interpreted.rules import (
    DTYPES,
    VARIANTS,
    attention_results,
    block_results,
    merge_results,
    normal,
)
from tests.support import assert_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.usefixtures("strict_float32"),
]
MIB = 2**20


def cuda(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=dtype, seed=seed, device="cuda")


def block_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = shape[1]
    weight = cuda(channels, 2 * channels, 1, 1, dtype=dtype, seed=2) / math.sqrt(2 * channels)
    return cuda(*shape, dtype=dtype), weight, cuda(channels, dtype=dtype, seed=3), cuda(*shape, dtype=dtype, seed=4)


def check_block(shape: tuple[int, ...], dtype: torch.dtype, variant: str, size: float | None = None) -> None:
    """`size`: of the largest features; else they are normal."""
    features, weight, bias, grad = block_inputs(shape, dtype)
    if size is not None:
        features = features.clamp(-1, 1) * size
    assert can_run_attention(features, weight, bias, variant) is None
    out, attended, stats = attention_block_forward(features, weight, bias, variant, save_attended=True)
    assert attended is not None
    grads = attention_block_backward(grad, features, attended, stats, weight, variant)
    exact = block_results(features, weight, bias, variant, grad, torch.float64)
    eager = block_results(features, weight, bias, variant, grad, dtype)
    names = ("out", "dF", "dweight", "dbias")
    for name, actual, reference, plain in zip(names, (out, *grads), exact, eager, strict=True):
        assert actual is not None
        assert_accurate(name, actual, reference, plain)


# Each case compiles about eight kernels: the list is short enough for `make gpu`.
@pytest.mark.parametrize(
    ("shape", "dtype", "variant"),
    [
        ((1, 128, 64, 64), torch.float16, "released"),
        ((1, 128, 64, 64), torch.float16, "paper"),
        ((1, 128, 64, 64), torch.bfloat16, "released"),
        ((1, 128, 64, 64), torch.float32, "released"),
        ((1, 256, 32, 32), torch.float16, "released"),
        ((1, 256, 32, 32), torch.bfloat16, "paper"),
        ((1, 256, 32, 32), torch.float32, "paper"),
        ((1, 512, 16, 16), torch.float16, "released"),
        ((1, 512, 16, 16), torch.float16, "paper"),
        ((1, 512, 16, 16), torch.float32, "released"),
        ((16, 128, 64, 64), torch.float16, "released"),
        ((16, 256, 32, 32), torch.float16, "released"),
        ((16, 512, 16, 16), torch.float16, "released"),
        ((1, 96, 64, 64), torch.float16, "released"),
        ((2, 192, 32, 32), torch.float16, "paper"),
        ((2, 384, 16, 16), torch.bfloat16, "released"),
        ((1, 300, 17, 31), torch.float16, "released"),
        ((3, 5, 9, 13), torch.float32, "paper"),
        ((1, 5, 1, 1), torch.float16, "released"),
    ],
    ids=str,
)
def test_block(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> None:
    check_block(shape, dtype, variant)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e4), (torch.float16, 7e3), (torch.bfloat16, 1e4)], ids=str
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_large_features(variant: str, dtype: torch.dtype, size: float) -> None:
    check_block((1, 128, 16, 16), dtype, variant, size)


def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    features, weight, bias, _ = block_inputs((1, 128, 32, 32), torch.float32)
    out = attention_block_forward(features, weight, bias, "released")[0]
    exact = block_results(features, weight, bias, "released", out, torch.float64)[0]
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error.item() < 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_values(variant: str, dtype: torch.dtype) -> None:
    features = cuda(1, 128, 16, 16, dtype=dtype)
    grad = cuda(1, 128, 16, 16, dtype=dtype, seed=1)
    for values in (torch.zeros_like(features), features * 1e4):
        attended, stats = attention_forward(values, variant)
        assert attended.isfinite().all()
        assert stats.isfinite().all()
        exact = attention_results(values, variant, grad, torch.float64)
        eager = attention_results(values, variant, grad, dtype)
        assert_accurate("attended", attended, exact[0], eager[0])
    df = attention_backward(grad, values, attended, stats, variant)
    assert df.isfinite().all()
    assert_accurate("dF", df, exact[1], eager[1], terms=grad.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_and_out_slices(variant: str) -> None:
    features, weight, bias, _ = block_inputs((2, 96, 17, 31), torch.float16)
    plain = attention_block_forward(features, weight, bias, variant)[0]
    views = (
        features.to(memory_format=torch.channels_last),
        features.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([features, features], dim=3)[..., :31],
        torch.cat([features, features], dim=1)[:, 96:],
    )
    for view in views:
        for layout in (torch.contiguous_format, torch.channels_last):
            buffer = torch.full((2, 200, 17, 31), math.nan, device="cuda", dtype=torch.float16)
            buffer = buffer.to(memory_format=layout)
            attention_block_forward(view, weight, bias, variant, out=buffer[:, 50:146])
            torch.testing.assert_close(buffer[:, 50:146], plain, rtol=1e-3, atol=2e-3)
            assert buffer[:, :50].isnan().all()
            assert buffer[:, 146:].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_splits_agree(variant: str) -> None:
    features, weight, bias, grad = block_inputs((1, 128, 32, 32), torch.float32)
    generation, _ = device_generation(features.device)
    results = []
    for num_sms in (1, 500):
        with assume_generation(generation, num_sms):
            out, attended, stats = attention_block_forward(features, weight, bias, variant, save_attended=True)
            assert attended is not None
            df = attention_block_backward(grad, features, attended, stats, weight, variant)[0]
            assert stats is not None
            results.append((out, stats, df))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bitwise_repeatable() -> None:
    features, weight, bias, grad = block_inputs((2, 256, 32, 32), torch.float16)

    def once() -> tuple[Tensor | None, ...]:
        out, attended, stats = attention_block_forward(features, weight, bias, "released", save_attended=True)
        assert attended is not None
        return out, stats, attention_block_backward(grad, features, attended, stats, weight, "released")[0]

    for a, b in zip(once(), once(), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def extra_memory(function: Callable[[], object]) -> int:
    """Peak bytes allocated during `function`, above what was allocated before; it runs once to warm up."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_of_a_large_picture(variant: str) -> None:
    """d3 of a 1024x1024 picture: 65536 positions, whose scores would take 8 GiB in 16 bit."""
    features, weight, bias, grad = block_inputs((1, 128, 256, 256), torch.float16)
    assert extra_memory(lambda: attention_block_forward(features, weight, bias, variant)) <= 256 * MIB
    out, attended, stats = attention_block_forward(features, weight, bias, variant, save_attended=True)
    assert out.isfinite().all()
    assert attended is not None
    needed = extra_memory(lambda: attention_block_backward(grad, features, attended, stats, weight, variant))
    assert needed <= 512 * MIB
    # a few queries against float64
    rows = torch.arange(0, 65536, 4999, device="cuda")
    leaf = features.double()
    if variant == "released":
        shifted = leaf + 1e-7
        key = (shifted / shifted.norm(dim=1, keepdim=True)).flatten(2)[0]
        query = (torch.nn.functional.avg_pool2d(leaf, 3, 1, 1, count_include_pad=True) * 9).flatten(2)[0]
        value = key
    else:
        key = query = torch.nn.functional.normalize(leaf, dim=1).flatten(2)[0]
        value = leaf.flatten(2)[0]
    exact = torch.softmax(query[:, rows].t() @ key, dim=1) @ value.t()
    error = (attended.flatten(2)[0, :, rows].t().double() - exact).abs().max().item()
    assert error <= 8 * torch.finfo(torch.float16).eps * exact.abs().max().item() + 1e-3


def captured(function: Callable[[], tuple[Tensor | None, ...]]) -> None:
    """Replaying the graph gives the bits of the eager call."""
    expected = [x.clone() for x in function() if x is not None]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [x for x in function() if x is not None]
    for x in results:
        x.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_capture_of_attention(variant: str) -> None:
    features, weight, bias, grad = block_inputs((1, 256, 32, 32), torch.float16)
    captured(lambda: attention_forward(features, variant))
    captured(lambda: attention_block_forward(features, weight, bias, variant, save_attended=True))
    _, attended, stats = attention_block_forward(features, weight, bias, variant, save_attended=True)
    assert attended is not None
    captured(lambda: (attention_backward(grad, features, attended, stats, variant),))
    captured(lambda: attention_block_backward(grad, features, attended, stats, weight, variant))


def merge_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width = shape
    mask = cuda(batch, 1, height, width, seed=2).sigmoid().to(dtype)
    return cuda(batch, 3, height, width, dtype=dtype), cuda(batch, 3, height, width, dtype=dtype, seed=1), mask


def test_graph_capture_of_merge() -> None:
    tensors = merge_inputs((1, 64, 64), torch.float16)
    grad = cuda(1, 4, 64, 64, dtype=torch.float16)
    captured(lambda: (merge_concat_forward(*tensors, tanh=True),))
    captured(lambda: (merge_forward(*tensors),))
    captured(lambda: merge_concat_backward(grad, *tensors, tanh=True))
    captured(lambda: merge_backward(grad[:, :3], *tensors))


@pytest.mark.parametrize("shape", [(1, 256, 256), (4, 256, 256), (2, 37, 41), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(dtype: torch.dtype, tanh: bool, shape: tuple[int, int, int]) -> None:
    tensors = merge_inputs(shape, dtype)
    assert can_run_merge(*tensors) is None
    for concat, forward, backward in (
        (True, merge_concat_forward, merge_concat_backward),
        (False, merge_forward, merge_backward),
    ):
        result = forward(*tensors, tanh=tanh)
        grad = cuda(*result.shape, dtype=dtype, seed=3)
        actual = (result, *backward(grad, *tensors, tanh=tanh))
        exact = merge_results(*tensors, grad, torch.float64, concat=concat, tanh=tanh)
        eager = merge_results(*tensors, grad, dtype, concat=concat, tanh=tanh)
        for name, a, reference, plain in zip(
            ("merged", "d_image", "d_output", "d_mask"), actual, exact, eager, strict=True
        ):
            assert a is not None
            assert_accurate(name, a, reference, plain)


def test_stream_and_device() -> None:
    """Launches go to the current stream of the tensors' device, whichever device is current."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    features, weight, bias, _ = (x.to(device) for x in block_inputs((1, 128, 32, 32), torch.float16))
    with torch.cuda.device(0):
        expected = attention_block_forward(features, weight, bias, "released")[0]
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        source = features.clone()
        result = attention_block_forward(source, weight, bias, "released")[0]
    stream.synchronize()
    assert result.device == device
    assert torch.equal(result, expected)


def test_offsets_past_31_bits() -> None:
    """The second sample lies more than 2^31 elements after the first."""
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    shape = (16, 8, 8)
    step = 2**31 + 64
    storage = torch.empty(step + math.prod(shape), dtype=torch.float16, device="cuda")
    far = storage.as_strided((2, *shape), (step, 64, 8, 1))
    far.copy_(cuda(2, *shape, dtype=torch.float16))
    near = far.contiguous()
    for variant in VARIANTS:
        attended, stats = attention_forward(far, variant)
        expected, expected_stats = attention_forward(near, variant)
        assert torch.equal(attended, expected)
        assert torch.equal(stats, expected_stats)
        assert torch.equal(
            attention_backward(far, far, attended, stats, variant),
            attention_backward(near, near, attended, stats, variant),
        )
    mask = near[:, :1].sigmoid()
    assert torch.equal(
        merge_concat_forward(far[:, :3], far[:, :3], mask), merge_concat_forward(near[:, :3], near[:, :3], mask)
    )
