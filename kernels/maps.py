"""Feature maps as kernel arguments, and tuples of tiles, for several kernels.

A kernel takes a feature map as one argument, a `Map`. It holds C channels as a tuple of one or two tiles whose widths
are powers of two (:func:`split_head`); loops carry such a tuple like a single tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import dot


class Map(NamedTuple):
    """A feature map [B, C, H, W] with any strides. stride_h is None where all positions are stride_w apart."""

    ptr: Any
    stride_b: int | None
    stride_c: int | None
    stride_h: int | None
    stride_w: int | None


class Rows(NamedTuple):
    """Rows [B, N, C] with unit channel stride."""

    ptr: Any
    stride_b: int
    stride_n: int


def is_flat(tensor: Tensor) -> bool:
    """Whether the positions of [B, C, H, W] are evenly spaced, so that one stride addresses them."""
    height, width = tensor.shape[2:]
    return height <= 1 or width == 1 or tensor.stride(2) == width * tensor.stride(3)


def position_stride(tensor: Tensor) -> int:
    """Elements between neighbouring positions of a flat [B, C, H, W], and between columns of any other."""
    return tensor.stride(2) if tensor.shape[3] == 1 and tensor.shape[2] > 1 else tensor.stride(3)


def as_map(tensor: Tensor) -> Map:
    """[B, C, H, W] as a kernel's argument."""
    stride_b, stride_c, stride_h, _ = tensor.stride()
    return Map(tensor, stride_b, stride_c, None if is_flat(tensor) else stride_h, position_stride(tensor))


# Kernels test its pointer: Triton 3.6 cannot compare a tuple that contains None with None.
ABSENT = Map(None, None, None, None, None)


def as_optional_map(tensor: Tensor | None) -> Map:
    """:func:`as_map` for a map that may be absent."""
    return ABSENT if tensor is None else as_map(tensor)


def split_head(channels: int) -> tuple[int, int]:
    """Two power-of-two chunks (the second may be 0) that cover the head size with little padding."""
    first = max(16, min(256, 1 << (channels.bit_length() - 1)))
    if channels <= first:
        return first, 0
    second = max(16, 1 << (channels - first - 1).bit_length())
    if second == first and first < 256:
        return 2 * first, 0
    return first, second


@triton.jit
def position_rows(map, batch, positions, width):
    """Pointers [positions] at channel 0 of a sample of a `Map`."""
    base = map.ptr + batch * map.stride_b
    if map.stride_h is None:
        return base + positions.to(tl.int64) * map.stride_w
    else:
        row = (positions // width).to(tl.int64) * map.stride_h
        return base + (row + (positions % width).to(tl.int64) * map.stride_w)


# ---------------------------------------------------------------------------------------------------------------
# tuples of one or two tiles: [rows, D0] and, where D1 > 0, [rows, D1]


@triton.jit
def head_columns(D0: tl.constexpr, D1: tl.constexpr):
    """Channels of each tile."""
    if D1 > 0:
        return tl.arange(0, D0), D0 + tl.arange(0, D1)
    else:
        return (tl.arange(0, D0),)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Accumulators, zeros [ROWS, D0] and [ROWS, D1] in float32."""
    if D1 > 0:
        return tl.zeros([ROWS, D0], dtype=tl.float32), tl.zeros([ROWS, D1], dtype=tl.float32)
    else:
        return (tl.zeros([ROWS, D0], dtype=tl.float32),)


@triton.jit
def tile_pointers(base, rows, stride, cols):
    """Pointers at `rows`, which are `stride` elements apart; channels are adjacent."""
    return [base + rows[:, None] * stride + c[None, :] for c in cols]


@triton.jit
def advance(pointers, step):
    """All pointers `step` elements further."""
    return [p + step for p in pointers]


@triton.jit
def tile_masks(row_mask, cols, HEAD_DIM: tl.constexpr):
    """Masks of the rows and channels of each tile that exist."""
    return [row_mask[:, None] & (c < HEAD_DIM)[None, :] for c in cols]


@triton.jit
def load_tiles(pointers, masks):
    """The tiles, with zeros where the mask is false."""
    if len(pointers) == 2:
        first = tl.load(pointers[0], mask=masks[0], other=0.0)
        return first, tl.load(pointers[1], mask=masks[1], other=0.0)
    else:
        return (tl.load(pointers[0], mask=masks[0], other=0.0),)


@triton.jit
def store_tiles(pointers, tiles, masks):
    for i in tl.static_range(len(tiles)):
        tl.store(pointers[i], tiles[i], mask=masks[i])


@triton.jit
def scale_rows(tiles, factor):
    """Each row times its factor [rows]."""
    return [t * factor[:, None] for t in tiles]


@triton.jit
def cast_tiles(tiles, DTYPE: tl.constexpr):
    return [t.to(DTYPE) for t in tiles]


@triton.jit
def row_products(a, b, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T [ROWS, COLS] over all channels."""
    products = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i in tl.static_range(len(a)):
        products = dot(a[i], tl.trans(b[i]), products, PRECISION)
    return products


@triton.jit
def add_weighted(acc, weights, values, PRECISION: tl.constexpr):
    """acc + weights values, tile by tile."""
    if len(values) == 2:
        first = dot(weights, values[0], acc[0], PRECISION)
        return first, dot(weights, values[1], acc[1], PRECISION)
    else:
        return (dot(weights, values[0], acc[0], PRECISION),)
