"""Attention kernels against float64, by the rule of `support.assert_accurate`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import attention_inference, hopper_attention
from lgnet_fast.kernels.attention import (
    attention_backward,
    attention_block_backward,
    attention_block_forward,
    attention_forward,
    can_run_attention,
)
from lgnet_fast.kernels.attention_inference import attention_block_inference
from lgnet_fast.kernels.configs import Config, Inference, assume_generation, num_splits, override
from lgnet_fast.kernels.hopper_attention import AttentionTile
from lgnet_fast.kernels.maps import split_head
from torch import Tensor

from lgnet_fast.reference.attention import attention_block, query_key_value
from tests import emulator
from tests.interpreted.rules import DTYPES, VARIANTS, attention_results, block_results, normal
from tests.support import assert_accurate


def check_attention(features: Tensor, variant: str, grad: Tensor | None = None) -> None:
    """Attended features, log-sum-exp and gradient of the attention alone."""
    if grad is None:
        grad = normal(*features.shape, dtype=features.dtype, seed=1)
    before = features.clone()
    attended, stats = attention_forward(features, variant)
    df = attention_backward(grad, features, attended, stats, variant)
    assert torch.equal(features, before)
    exact = attention_results(features, variant, grad, torch.float64)
    eager = attention_results(features, variant, grad, features.dtype)
    assert_accurate("attended", attended, exact[0], eager[0])
    # with large scores one key wins per row, and its <grad, value> cancels against <grad, attended>
    cancelling = grad.abs().max().item() if features.numel() and features.abs().max() > 1e3 else 0.0
    assert_accurate("dF", df, exact[1], eager[1], terms=cancelling)
    q, k, _ = (x.flatten(2) for x in query_key_value(features.double(), variant))
    scores = q.transpose(1, 2) @ k
    # by the rounding of q and k, from which the scores are summed
    eps = torch.finfo(features.dtype).eps
    terms = max(1.0, scores.abs().max().item())
    lse = stats[0].double() + stats[1].double().log()
    assert (lse - torch.logsumexp(scores, dim=-1)).abs().max().item() <= 4 * eps * terms


def check_block(features: Tensor, variant: str) -> None:
    """The block's output and all its gradients."""
    channels, dtype = features.shape[1], features.dtype
    weight = normal(channels, 2 * channels, 1, 1, dtype=dtype, seed=2) / math.sqrt(2 * channels)
    bias = normal(channels, dtype=dtype, seed=3)
    grad = normal(*features.shape, dtype=dtype, seed=4)
    inputs = (features, weight, bias, grad)
    before = [x.clone() for x in inputs]
    out, attended, stats = attention_block_forward(features, weight, bias, variant, save_attended=True)
    assert attended is not None
    grads = attention_block_backward(grad, features, attended, stats, weight, variant)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    exact = block_results(features, weight, bias, variant, grad, torch.float64)
    eager = block_results(features, weight, bias, variant, grad, dtype)
    for name, actual, truth, plain in zip(
        ("out", "dF", "dweight", "dbias"), (out, *grads), exact, eager, strict=True
    ):
        assert actual is not None
        assert_accurate(name, actual, truth, plain)


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (3, 5, 9, 13), (1, 96, 9, 13)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_block(variant: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_block(normal(*shape, dtype=dtype), variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_block_of_many_positions(variant: str) -> None:
    check_block(normal(1, 5, 17, 31), variant)


@pytest.mark.parametrize(
    ("channels", "variant", "dtype"),
    [
        (128, "released", torch.float16),
        (128, "paper", torch.float32),
        (192, "released", torch.float32),
        (256, "paper", torch.bfloat16),
        (300, "released", torch.float32),
        (512, "released", torch.bfloat16),
    ],
)
def test_head_sizes(channels: int, variant: str, dtype: torch.dtype) -> None:
    check_block(normal(1, channels, 9, 9, dtype=dtype), variant)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows_sliced": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "columns_strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "channels_sliced": lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
    "channels_last_sliced": lambda x: torch.cat([x, x], dim=1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "batch_expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_views(variant: str, view: str) -> None:
    features = VIEWS[view](normal(2, 16, 5, 7))
    grad = VIEWS[view](normal(2, 16, 5, 7, seed=1))
    check_attention(features, variant, grad)
    check_block(features, variant)


@pytest.mark.parametrize("num_sms", [1, 64])
@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", VARIANTS)
def test_out_slice(variant: str, layout: torch.memory_format, combine: bool, num_sms: int) -> None:
    features = normal(2, 12, 9, 13)
    weight, bias = normal(12, 24, 1, 1, seed=2), normal(12, seed=3)
    buffer = torch.full((2, 20, 9, 13), math.nan).to(memory_format=layout)
    out = buffer[:, 3:15]
    with assume_generation("interpreted", num_sms), override("forward", Config(32, 32, 4, 1)):
        if combine:
            result, attended, _ = attention_block_forward(features, weight, bias, variant, out=out)
            assert attended is None
            plain = attention_block_forward(features, weight, bias, variant)[0]
        else:
            result, _ = attention_forward(features, variant, out=out)
            plain = attention_forward(features, variant)[0]
    assert result is out
    assert torch.equal(out, plain)
    assert buffer[:, :3].isnan().all()
    assert buffer[:, 15:].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_splits_agree(variant: str) -> None:
    features = normal(1, 24, 9, 13)
    with override("forward", Config(32, 16, 4, 1)), override("backward_dq", Config(32, 16, 4, 1)):
        with assume_generation("interpreted", 1):
            whole = attention_forward(features, variant)
            check_block(features, variant)
        with assume_generation("interpreted", 32):
            split = attention_forward(features, variant)
            check_block(features, variant)
    for a, b in zip(whole, split, strict=True):
        assert_accurate("splits", a, b, roundings=64)


def test_saved_attended_is_the_attention() -> None:
    features = normal(1, 24, 9, 13)
    weight, bias = normal(24, 48, 1, 1, seed=2), normal(24, seed=3)
    for num_sms in (1, 64):
        with assume_generation("interpreted", num_sms):
            _, attended, stats = attention_block_forward(features, weight, bias, "released", save_attended=True)
            alone, stats_alone = attention_forward(features, "released")
        assert attended is not None
        assert torch.equal(attended, alone)
        assert torch.equal(stats, stats_alone)


def mixed_zeros(shape: tuple[int, ...]) -> Tensor:
    return normal(*shape) * (normal(shape[0], 1, *shape[2:], seed=5) > 0)


EXTREMES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "zeros": torch.zeros,
    "large": lambda shape: 1e4 * normal(*shape),
    "signs": lambda shape: 1e4 * normal(*shape).sign(),
    "mixed_zeros": mixed_zeros,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", EXTREMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_values(variant: str, values: str, dtype: torch.dtype) -> None:
    features = EXTREMES[values]((1, 16, 9, 9)).to(dtype)
    if dtype == torch.float16 and variant == "released" and values in ("large", "signs"):
        # eager overflows in the box sum and gives NaN; rounding q to 11 bits decides between near ties of "signs"
        attended, stats = attention_forward(features, variant)
        df = attention_backward(normal(*features.shape, dtype=dtype), features, attended, stats, variant)
        assert all(x.isfinite().all() for x in (attended, stats, df))
        if values == "large":
            exact = attention_results(features, variant, features, torch.float64)[0]
            assert_accurate("attended", attended, exact, roundings=16)
        return
    check_attention(features, variant)


# As far as eager is finite: nine times 7e3 is near the end of float16. Not bfloat16 of some hundreds: there the
# truncation of q, the interpreter's, decides between near ties.
LARGE = {torch.float32: (1e4,), torch.float16: (300.0, 7e3), torch.bfloat16: (1e4,)}


@pytest.mark.parametrize(("dtype", "size"), [(d, size) for d, sizes in LARGE.items() for size in sizes], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_large_features(variant: str, dtype: torch.dtype, size: float) -> None:
    features = (size * normal(1, 24, 7, 9, seed=6).clamp(-1, 1)).to(dtype)
    with assume_generation("interpreted", 16):  # with splits
        check_block(features, variant)
    with assume_generation("interpreted", 1):
        check_block(features, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batch(variant: str) -> None:
    features = normal(0, 16, 5, 7)
    assert can_run_attention(features, variant=variant) is None
    attended, stats = attention_forward(features, variant)
    assert attended.shape == (0, 16, 5, 7)
    assert stats.shape == (2, 0, 35)
    assert attention_backward(features, features, attended, stats, variant).shape == (0, 16, 5, 7)
    weight, bias = normal(16, 32, 1, 1), normal(16)
    out, _, stats = attention_block_forward(features, weight, bias, variant)
    df, dw, db = attention_block_backward(out, features, attended, stats, weight, variant)
    assert out.shape == (0, 16, 5, 7)
    assert df is not None
    assert dw is not None
    assert db is not None
    assert not dw.any()
    assert not db.any()


def test_needs() -> None:
    features, weight = normal(1, 16, 5, 7), normal(16, 32, 1, 1)
    out, attended, stats = attention_block_forward(features, weight, normal(16), "released", save_attended=True)
    assert attended is not None
    every = attention_block_backward(out, features, attended, stats, weight, "released")
    for index in range(3):
        needs = tuple(i == index for i in range(3))
        grads = attention_block_backward(out, features, attended, stats, weight, "released", needs=needs)
        assert [g is not None for g in grads] == list(needs)
        assert torch.equal(grads[index], every[index])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitwise_repeatable(variant: str) -> None:
    features, grad = normal(2, 16, 9, 13), normal(2, 16, 9, 13, seed=1)

    def once() -> tuple[Tensor, ...]:
        attended, stats = attention_forward(features, variant)
        return attended, stats, attention_backward(grad, features, attended, stats, variant)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("variant", lambda f, w, b: can_run_attention(f, w, b, "other")),
        ("dtype", lambda f, w, b: can_run_attention(f.double())),
        ("channels", lambda f, w, b: can_run_attention(f.expand(1, 513, 5, 7))),
        ("dimensions", lambda f, w, b: can_run_attention(f[0])),
        ("without positions", lambda f, w, b: can_run_attention(f[:, :, :0])),
        ("weight of shape", lambda f, w, b: can_run_attention(f, w[:, :1], b)),
        ("bias of torch.float16", lambda f, w, b: can_run_attention(f, w, b.half())),
        ("together", lambda f, w, b: can_run_attention(f, w)),
        ("CPU tensors", lambda f, w, b: can_run_attention(f.to("meta"))),
    ],
)
def test_reasons(reason: str, call: Callable[[Tensor, Tensor, Tensor], str | None]) -> None:
    features, weight, bias = normal(1, 1, 5, 7), normal(1, 2, 1, 1), normal(1)
    assert can_run_attention(features, weight, bias, "paper") is None
    assert reason in (call(features, weight, bias) or "")


def test_split_head() -> None:
    for channels in range(1, 513):
        first, second = split_head(channels)
        assert first + second >= channels
        assert first >= max(16, second)
        assert first <= 256
        assert first & (first - 1) == 0
        assert second & (second - 1) == 0
    expected = {96: (64, 32), 128: (128, 0), 192: (128, 64), 256: (256, 0), 384: (256, 128), 512: (256, 256)}
    assert {channels: split_head(channels) for channels in expected} == expected


def test_num_splits() -> None:
    for programs, positions, block, num_sms in (
        (32, 4096, 64, 132),
        (4, 256, 32, 132),
        (1, 1, 64, 132),
        (7, 1000, 16, 80),
    ):
        splits, length = num_splits(programs, positions, block, num_sms)
        assert length % block == 0
        assert (splits - 1) * length < positions <= splits * length
    assert num_splits(32, 4096, 64, 132) == (4, 1024)
    assert num_splits(512, 4096, 64, 132)[0] == 1


# Every combination at few channels; wide maps, which take seconds, where each setting has its turn.
WIDE = [(VARIANTS[i % 2], dtype, num_sms) for i, dtype in enumerate(DTYPES) for num_sms in (1, 24)]


@pytest.mark.parametrize(
    ("shape", "variant", "dtype", "num_sms"),
    [
        *(((2, 24, 5, 7), *rest) for rest in itertools.product(VARIANTS, DTYPES, (1, 24))),
        *(((1, 96, 8, 8), *rest) for rest in WIDE),
        ((1, 320, 4, 5), "released", torch.float16, 24),
        ((1, 320, 4, 5), "paper", torch.float32, 1),
    ],
    ids=str,
)
def test_inference(shape: tuple[int, ...], variant: str, dtype: torch.dtype, num_sms: int) -> None:
    """With splits of columns and keys, an activation, and a slice of a wider map of any layout as output."""
    channels = shape[1]
    features = normal(*shape, dtype=dtype)
    weight = (normal(channels, 2 * channels, 1, 1, seed=1) / channels**0.5).to(dtype)
    bias = normal(channels, dtype=dtype, seed=2)
    wide = torch.full((shape[0], *shape[2:], channels + 16), math.nan, dtype=dtype)
    out = wide[..., 8:-8].permute(0, 3, 1, 2)
    config = Inference(16, 16, 32, 4, 1, 16, 32, 32, 8)
    with assume_generation("interpreted", num_sms), override("inference", config):
        attention_block_inference(features, weight, bias, variant, out=out, activation="relu")
    exact, eager = (
        torch.relu(attention_block(*(t.to(kind) for t in (features, weight, bias)), variant))
        for kind in (torch.float64, dtype)
    )
    assert_accurate("out", out, exact, eager)
    assert wide[..., :8].isnan().all()
    assert wide[..., -8:].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("band", [(0, 2), (3, 4), (5, 9), (0, 9)], ids=str)
def test_inference_of_some_rows(monkeypatch: pytest.MonkeyPatch, variant: str, band: tuple[int, int]) -> None:
    """The rows are those of the whole map, other rows are left as they are, and the keys have more splits."""
    features = normal(2, 24, 9, 7)
    weight, bias = normal(24, 48, 1, 1, seed=1) / 5, normal(24, seed=2)
    out = torch.full_like(features, math.nan)
    config = Inference(16, 16, 32, 4, 1, 16, 32, 32, 8, 1)
    grids = {}
    plain = attention_inference.launch

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        grids[kernel.fn.__name__] = grid
        plain(kernel, grid, *args, **meta)

    monkeypatch.setattr(attention_inference, "launch", launch)
    with assume_generation("interpreted", 32), override("inference", config):
        attention_block_inference(features, weight, bias, variant, out=out, band=band)
    blocks = -(-7 * (band[1] - band[0]) // 16)
    assert grids["_attn_weigh_kernel"] == (2 * blocks, 1 if band == (0, 9) else 4)
    exact, eager = (
        attention_block(*(t.to(kind) for t in (features, weight, bias)), variant)
        for kind in (torch.float64, torch.float32)
    )
    inside = torch.zeros(9, dtype=torch.bool)
    inside[band[0] : band[1]] = True
    assert_accurate("rows", out[:, :, inside], exact[:, :, inside], eager[:, :, inside])
    assert out[:, :, ~inside].isnan().all()


@pytest.mark.parametrize("band", [(-1, 2), (2, 2), (3, 2), (0, 10)], ids=str)
def test_a_band_outside_the_map_is_refused(band: tuple[int, int]) -> None:
    features = normal(1, 16, 9, 7)
    out = torch.full_like(features, math.nan)
    with pytest.raises(ValueError, match=r"band: expected 0 <= top < bottom <= 9, got"):
        attention_block_inference(features, normal(16, 32, 1, 1), normal(16), "released", out=out, band=band)
    assert out.isnan().all()


@pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inference_by_the_kernel_for_hopper(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows, and a band of them; a map that it cannot store, or a GPU that has no such kernel, takes Triton's."""
    launched = emulator.install(monkeypatch, hopper_attention).launched
    monkeypatch.setattr(hopper_attention, "reason_against", lambda device, dtype: None)
    features = normal(2, 128, 16, 17, dtype=dtype)
    weight, bias = (normal(128, 256, 1, 1, seed=1) / 11).to(dtype), normal(128, dtype=dtype, seed=2)
    exact, eager = (
        attention_block(*(t.to(kind) for t in (features, weight, bias)), variant) for kind in (torch.float64, dtype)
    )
    config = Inference(16, 32, 128, 4, 1, 32, 128, 64, 16, 8, AttentionTile(128, 2))

    def run(band: tuple[int, int] | None = None, layout: torch.memory_format = torch.channels_last) -> Tensor:
        out = torch.full_like(features, math.nan, memory_format=layout)
        with assume_generation("sm_90"), override("inference", config):
            return attention_block_inference(features, weight, bias, variant, out=out, band=band)

    assert_accurate("out", run(), exact, eager)
    name = f"lgnet_attention_{str(dtype).removeprefix('torch.')}_128"
    assert launched == [f"{name}_128"]
    found = run((3, 5))
    assert_accurate("rows", found[:, :, 3:5], exact[:, :, 3:5], eager[:, :, 3:5])
    assert found[:, :, :3].isnan().all()
    assert found[:, :, 5:].isnan().all()
    assert len(launched) == 2
    assert_accurate("out", run(layout=torch.contiguous_format), exact, eager)
    monkeypatch.setattr(hopper_attention, "reason_against", lambda device, dtype: "another GPU")
    assert_accurate("out", run(), exact, eager)
    assert len(launched) == 2
