"""Convolution kernels of the engine against float64, by the rule of `support.assert_accurate`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from lgnet_fast.kernels import conv_kernels, launch
from lgnet_fast.kernels.conv import Conv, conv_forward, paint_forward
from lgnet_fast.kernels.conv_configs import Tile
from lgnet_fast.kernels.conv_kernels import divisor
from lgnet_fast.kernels.results import Merge, Store
from torch import Tensor

from lgnet_fast.engine.torch_executor import ACTIVATIONS
from tests.interpreted.rules import DTYPES, normal
from tests.support import assert_accurate

TILE = Tile(128, 32, 32, 1, 4, 1)
SPLIT = Tile(64, 16, 64, 4, 4, 1)

CONVS = {
    "conv4s2": Conv(24, 20, 4, 2, 1, False, False, False),
    "conv4s2_first": Conv(4, 24, 4, 2, 1, False, False, False),
    "conv3s2": Conv(32, 48, 3, 2, 1, False, False, False),
    "conv3_reflect": Conv(32, 40, 3, 1, 1, False, True, False),
    "conv7_reflect_first": Conv(4, 20, 7, 1, 3, False, True, False),
    "conv3_odd_channels": Conv(5, 7, 3, 1, 1, False, True, False),
    "conv3_37_channels": Conv(37, 19, 3, 1, 1, False, True, False),
    "deconv4s2": Conv(32, 24, 4, 2, 1, True, False, False),
    "deconv4s2_odd_channels": Conv(19, 5, 4, 2, 1, True, False, False),
    "deconv3s2": Conv(32, 24, 3, 2, 1, True, False, False),
    "conv5_merges": Conv(16, 3, 5, 1, 2, False, True, True),
    "deconv4s2_merges": Conv(24, 3, 4, 2, 1, True, False, True),
    "conv4s2_merges": Conv(16, 3, 4, 2, 1, False, False, True),
}


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def wide(batch: int, height: int, width: int, channels: int, dtype: torch.dtype, before: int = 8) -> Tensor:
    """A NaN-filled view [B, H, W, C] of a buffer with `before` channels in front and three behind."""
    buffer = torch.full((batch, height, width, before + channels + 3), math.nan, dtype=dtype)
    return buffer[..., before : before + channels]


def out_size(conv: Conv, height: int, width: int) -> tuple[int, int]:
    if conv.transposed:
        return 2 * height, 2 * width
    return tuple((n + 2 * conv.padding - conv.kernel) // conv.stride + 1 for n in (height, width))  # type: ignore[return-value]


def reference(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if conv.transposed:
        return F.conv_transpose2d(x, weight, bias, 2, conv.padding, output_padding=conv.kernel % 2)
    if conv.reflect:
        return F.conv2d(F.pad(x, [conv.padding] * 4, mode="reflect"), weight, bias, conv.stride)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def operands(conv: Conv, batch: int, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = normal(batch, conv.in_channels, height, width, dtype=dtype)
    pair = (conv.in_channels, conv.out_channels) if conv.transposed else (conv.out_channels, conv.in_channels)
    depth = conv.in_channels * conv.kernel**2
    weight = normal(*pair, conv.kernel, conv.kernel, dtype=dtype, seed=1) / math.sqrt(depth)
    return x, weight.to(dtype), normal(conv.out_channels, dtype=dtype, seed=2)


def check(
    conv: Conv,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tile: Tile = TILE,
    rects: tuple[tuple[int, int, int, int], ...] | None = None,
    residual: bool = False,
    activations: tuple[str, ...] = ("relu",),
    last: bool = False,
) -> None:
    """Every store (or raw and merged picture) inside the rectangles; nothing written outside them."""
    batch, height, width = shape
    x, weight, bias = operands(conv, batch, height, width, dtype)
    size = out_size(conv, height, width)
    source = wide(*shape, conv.in_channels, dtype)
    source.copy_(nhwc(x))
    packed = conv.pack(weight)
    added = normal(batch, conv.out_channels, *size, dtype=dtype, seed=3) if residual else None
    added_view = None
    if added is not None:
        added_view = wide(batch, *size, conv.out_channels, dtype)
        added_view.copy_(nhwc(added))
    stores: tuple[Store, ...] = ()
    merge = None
    image = normal(batch, 3, *size, seed=4)
    mask = normal(batch, 1, *size, seed=5).sigmoid()
    picture = torch.full((batch, *size, 4), math.nan, dtype=dtype)
    raw = torch.full((batch, 3, *size), math.nan)
    merged = torch.full((batch, 3, *size), math.nan)
    if conv.merges:
        merge = Merge(image, mask, raw, merged if last else picture, last)
    else:
        stores = tuple(Store(wide(batch, *size, conv.out_channels, dtype), a) for a in activations)
    everything = (0, size[0], 0, size[1])
    for rect in rects or (everything,):
        rows = conv.work(batch, (height, width), size, rect).all_rows
        partial = torch.full((tile.splits * rows * conv.columns,), math.nan) if tile.splits > 1 else None
        counters = torch.zeros(rows * conv.columns, dtype=torch.int32) if tile.fused else None
        conv_forward(
            conv, source, packed, bias.float(), stores, tile,
            size=size, rect=rect, residual=added_view, merge=merge, partial=partial, counters=counters,
        )  # fmt: skip
        assert counters is None or not counters.any(), "the counters of the next launch"
    inside = torch.zeros(size, dtype=torch.bool)
    for top, bottom, left, right in rects or (everything,):
        inside[top:bottom, left:right] = True
    results = {}
    for precision in (torch.float64, dtype):
        value = reference(conv, *(t.to(precision) for t in (x, weight, bias)))
        if added is not None:
            value = value + added.to(precision)
        results[precision] = value
    exact, eager = results[torch.float64], results[dtype]

    def compare(name: str, actual: Tensor, exact: Tensor, eager: Tensor) -> None:
        assert actual[..., ~inside].isnan().all(), f"{name}: written outside the rectangles"
        assert_accurate(name, actual[..., inside], exact[..., inside], eager[..., inside])

    for number, (store, activation) in enumerate(zip(stores, activations)):
        function = ACTIVATIONS[activation]
        compare(f"store {number}", store.view.permute(0, 3, 1, 2), function(exact), function(eager))
        base = store.view._base
        assert base is not None
        assert base[..., :8].isnan().all()
        assert base[..., -3:].isnan().all()
    if merge is not None:
        compare("raw", raw, torch.tanh(exact), torch.tanh(eager).float())
        exact = image.double() * (1 - mask.double()) + torch.tanh(exact) * mask.double()
        eager = (image * (1 - mask) + torch.tanh(eager).float() * mask).to(torch.float32 if last else dtype)
        compare("merged", merged if last else picture[..., :3].permute(0, 3, 1, 2), exact, eager)
        assert picture[..., 3].isnan().all()


# Each kind of step in every dtype, and by splits in both ways; the other shapes once.
KINDS = ("conv4s2", "conv3_reflect", "deconv4s2", "deconv3s2", "conv5_merges", "deconv4s2_merges")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CONVS for dtype in (DTYPES if name in KINDS else (torch.float32, torch.float16))],
    ids=str,
)
def test_conv(name: str, dtype: torch.dtype) -> None:
    conv = CONVS[name]
    check(conv, (2, 8, 10), dtype)


@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, fused) for name in CONVS for fused in ((False, True) if name in KINDS else (True,))],
    ids=str,
)
def test_split_depth(name: str, fused: bool) -> None:
    check(CONVS[name], (2, 8, 8), torch.float32, SPLIT._replace(fused=fused), residual=not CONVS[name].merges)


@pytest.mark.parametrize("fused", [False, True], ids=["reduced", "fused"])
def test_more_splits_than_steps(fused: bool) -> None:
    check(CONVS["deconv3s2"], (1, 4, 4), torch.float32, Tile(16, 16, 16, 7, 4, 1, fused))


def test_too_few_counters_are_refused() -> None:
    conv = CONVS["deconv4s2"]
    x, weight, bias = operands(conv, 1, 4, 4, torch.float32)
    out = torch.full((1, 8, 8, conv.out_channels), math.nan)
    with pytest.raises(ValueError, match="counters: expected"):
        conv_forward(
            conv, nhwc(x).contiguous(), conv.pack(weight), bias, (Store(out, "none"),), SPLIT._replace(fused=True),
            size=(8, 8), partial=torch.empty(4 * 64 * conv.columns), counters=torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip
    assert out.isnan().all()


@pytest.mark.parametrize("name", CONVS)
def test_rectangles(name: str) -> None:
    rects = ((0, 3, 0, 5), (3, 4, 3, 4), (2, 4, 1, 2))
    check(CONVS[name], (2, 8, 10), torch.float32, rects=rects)


def test_rectangles_of_a_split_depth() -> None:
    check(CONVS["deconv4s2"], (2, 4, 4), torch.float32, SPLIT, rects=((0, 3, 1, 6), (5, 8, 3, 4)))


@pytest.mark.parametrize("name", ["conv4s2", "deconv4s2", "deconv3s2", "deconv4s2_merges"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (2, 1)], ids=str)
def test_maps_smaller_than_the_window(name: str, size: tuple[int, int]) -> None:
    conv = CONVS[name]
    if not conv.transposed:
        size = (2 * size[0], 2 * size[1])
    check(conv, (1, *size), torch.float32)
    check(conv, (3, *size), torch.float32, SPLIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_two_stores(dtype: torch.dtype) -> None:
    for activation in launch.ACTIVATIONS:
        check(CONVS["conv3_reflect"], (2, 8, 8), dtype, residual=True, activations=("none", activation))
    check(CONVS["conv4s2"], (1, 8, 8), dtype, SPLIT, activations=("leaky_relu", "relu"))


@pytest.mark.parametrize("tile", [TILE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("name", ["conv5_merges", "deconv4s2_merges"])
def test_last_stage(name: str, tile: Tile) -> None:
    check(CONVS[name], (2, 6, 8), torch.float16, tile, last=True)
    check(CONVS[name], (1, 8, 12), torch.float32, tile, last=True, rects=((1, 6, 3, 8),))


def test_taps_that_meet_only_zeros_are_left_out() -> None:
    conv = CONVS["conv4s2"]
    assert conv.work(1, (2, 2), (1, 1), (0, 1, 0, 1)).taps == (4,)
    assert conv.work(1, (4, 4), (2, 2), (0, 2, 0, 2)).taps == (16,)
    assert CONVS["deconv4s2"].work(1, (1, 1), (2, 2), (0, 2, 0, 2)).taps == (1, 1, 1, 1)
    assert CONVS["deconv3s2"].work(1, (4, 4), (8, 8), (0, 8, 0, 8)).taps == (1, 2, 2, 4)


def test_bitwise_repeatable() -> None:
    conv = CONVS["deconv4s2"]
    x, weight, bias = operands(conv, 1, 4, 4, torch.float32)
    results = []
    for _ in range(2):
        out = torch.empty(1, 8, 8, conv.out_channels)
        conv_forward(
            conv, nhwc(x).contiguous(), conv.pack(weight), bias, (Store(out, "none"),), SPLIT,
            size=(8, 8), partial=torch.empty(4 * 64 * conv.columns),
        )  # fmt: skip
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("painted", [False, True])
def test_paint(painted: bool) -> None:
    image, start = normal(2, 3, 9, 13), normal(2, 3, 9, 13, seed=1)
    mask = normal(2, 1, 9, 13, seed=2).sigmoid()
    picture, merged = torch.empty(2, 9, 13, 4), torch.empty(2, 3, 9, 13)
    paint_forward(image, mask, start if painted else None, picture, merged)
    paint = start if painted else torch.ones_like(image)
    expected = torch.cat((image * (1 - mask) + paint * mask, mask), dim=1)
    assert_accurate("picture", picture.permute(0, 3, 1, 2), expected, roundings=16)
    assert torch.equal(merged, image)


@triton.jit
def _quotients(numbers, magics, shifts, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    quotient = conv_kernels._divided(tl.load(numbers + at), tl.load(magics + at), tl.load(shifts + at))
    tl.store(out + at, quotient)


def test_division_by_a_magic_number() -> None:
    """At the largest number, and on both sides of multiples, by small, even, odd and the largest divisors."""
    largest = 2**31 - 1
    sizes = [*range(1, 130), 255, 256, 257, 641, 1920, 3840, 65535, 65537, 10**9, 2**30, largest - 1, largest]
    pairs = []
    for size in sizes:
        multiples = {size * times for times in (0, 1, 2, 3, 1000, largest // size // 2, largest // size)}
        near = {multiple + change for multiple in multiples for change in (-1, 0, 1)} | {largest}
        pairs += [(number, size) for number in sorted(near) if 0 <= number <= largest]
    block = 256
    pairs += [(0, 1)] * (-len(pairs) % block)
    columns = torch.tensor([(number, *divisor(size)) for number, size in pairs], dtype=torch.int32).T.contiguous()
    out = torch.full_like(columns[0], -1)
    _quotients[(len(pairs) // block,)](*columns, out, BLOCK=block)
    assert out.tolist() == [number // size for number, size in pairs]
