"""The forward kernels of attention for training; :mod:`.attention` says what they compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuned
from .configs import Config, config_kind, device_generation, num_splits, pick
from .launch import dot, dot_precision
from .maps import (
    ABSENT,
    Map,
    add_weighted,
    advance,
    cast_tiles,
    head_columns,
    load_tiles,
    position_rows,
    row_products,
    scale_rows,
    split_head,
    store_tiles,
    tile_masks,
    tile_pointers,
    zero_tiles,
)

KEY_SHIFT = tl.constexpr(1e-7)
NORM_CLAMP = tl.constexpr(1e-12)
LOG2E = tl.constexpr(math.log2(math.e))


class Result(NamedTuple):
    """Outputs of attention: the attended map, and the combiner's operands and result (absent without a combiner).

    attended, features, out: maps. weight: [C, 2C], bias: [C].
    """

    attended: Map
    features: Map = ABSENT
    weight: Any = None
    bias: Any = None
    out: Map = ABSENT


def q_scale(dtype: torch.dtype) -> float:
    """Factor of the stored box sum: a sum of nine float16 values can overflow float16."""
    return 1.0 / 16.0 if dtype == torch.float16 else 1.0


class AttentionCall(NamedTuple):
    """Sizes and arithmetic of one call, from which the block shapes and constants of its launches follow.

    precision: of the matrix products, see `dot_precision`. generation, num_sms: of the GPU. measured: operation ->
    the block shapes measured on it.
    """

    batch: int
    channels: int
    height: int
    width: int
    dtype: torch.dtype
    paper: bool
    precision: str
    generation: str
    num_sms: int
    measured: Mapping[str, tuned.Shape]

    @classmethod
    def of(cls, features: Tensor, variant: str) -> AttentionCall:
        """The call on `features` [B, C, H, W]."""
        batch, channels, height, width = features.shape
        dtype, paper, precision = features.dtype, variant == "paper", dot_precision(features.dtype)
        block = tuned.Block(config_kind(dtype, precision), variant, channels, height * width, batch)
        measured = tuned.shapes(features.device, dtype, block)
        gpu = device_generation(features.device)
        return cls(batch, channels, height, width, dtype, paper, precision, *gpu, measured)

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def kind(self) -> str:
        """Name of the dtype in the tables of block shapes."""
        return config_kind(self.dtype, self.precision)

    @property
    def q_scale(self) -> float:
        """Factor of the stored queries."""
        return 1.0 if self.paper else q_scale(self.dtype)

    def pick(self, op: str) -> Config:
        """Block shapes of `op`."""
        kind = "any" if op == "rows" else self.kind  # bound by memory bandwidth in every dtype
        positions = self.batch * self.positions
        return pick(op, self.generation, kind, self.channels, positions, self.measured.get(op))

    def splits(self, programs: int, block: int) -> tuple[int, int]:
        """Number of splits of the loop over the positions in blocks of `block`, and positions per split."""
        return num_splits(programs, self.positions, block, self.num_sms)

    def block(self, most: int) -> int:
        """Block size along the channels: a power of two, 16 to `most`."""
        return min(most, max(16, 1 << (self.channels - 1).bit_length()))

    def head(self) -> dict[str, int]:
        """Constants of kernels that hold all channels as one or two tiles."""
        d0, d1 = split_head(self.channels)
        return {"HEAD_DIM": self.channels, "D0": d0, "D1": d1}


@triton.jit
def _inverse_norm(
    rows,
    stride_c,
    row_mask,
    HEAD_DIM: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """1 / norm of BLOCK_P key rows; pointers `rows` [BLOCK_P] are at channel 0."""
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        f = tl.load(rows[:, None] + cols.to(tl.int64)[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)
        if not PAPER:
            f = tl.where(mask, f + KEY_SHIFT, 0.0)
        total += tl.sum(f * f, axis=1)
    norm = tl.sqrt(total)
    if PAPER:
        norm = tl.maximum(norm, NORM_CLAMP)
    return 1.0 / tl.where(row_mask, norm, 1.0)


@triton.jit
def _attn_prep_kernel(
    features,  # Map
    q_ptr,  # [B, N, C] rows, or None: box sums * q_scale
    k_ptr,  # [B, N, C] rows, or None: normalised keys
    v_ptr,  # [B, N, C] rows, or None: F
    inv_norm_ptr,  # [B, N] float32, or None
    height,
    width,
    num_blocks,
    q_scale,
    HEAD_DIM: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program writes BLOCK_C channels of BLOCK_P positions; for the norm it reads all their channels."""
    n_positions = height * width
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask = rows < n_positions
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
    f_rows = position_rows(features, batch, rows, width)
    col_offsets = cols.to(tl.int64)[None, :] * features.stride_c
    out_offsets = (batch * n_positions + rows.to(tl.int64))[:, None] * HEAD_DIM + cols[None, :]
    f = tl.load(f_rows[:, None] + col_offsets, mask=mask, other=0.0)

    if v_ptr is not None:
        tl.store(v_ptr + out_offsets, f, mask=mask)
    if k_ptr is not None or inv_norm_ptr is not None:
        inv_norm = _inverse_norm(f_rows, features.stride_c, row_mask, HEAD_DIM, PAPER, BLOCK_C, BLOCK_P)
        if k_ptr is not None:
            key = f.to(tl.float32)
            if not PAPER:
                key += KEY_SHIFT
            tl.store(k_ptr + out_offsets, (key * inv_norm[:, None]).to(k_ptr.dtype.element_ty), mask=mask)
        if inv_norm_ptr is not None:
            end = tl.where(tl.program_id(1) == 0, n_positions, 0)
            tl.store(inv_norm_ptr + batch * n_positions + rows, inv_norm, mask=rows < end)
    if q_ptr is not None:
        h = rows // width
        w = rows % width
        box = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        for dh in range(-1, 2):
            for dw in tl.static_range(-1, 2):
                inside = (h + dh >= 0) & (h + dh < height) & (w + dw >= 0) & (w + dw < width)
                near = position_rows(features, batch, rows + dh * width + dw, width)
                near_mask = mask & inside[:, None]
                box += tl.load(near[:, None] + col_offsets, mask=near_mask, other=0.0).to(tl.float32)
        tl.store(q_ptr + out_offsets, (box * q_scale).to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_product(acc, a, w_ptr, out_cols, cols, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr):
    """acc [rows, outputs] + a W^T over the input channels `cols`; `w_ptr` points at a half of the [C, 2C] weight."""
    w_mask = (out_cols < HEAD_DIM)[:, None] & (cols < HEAD_DIM)[None, :]
    w = tl.load(w_ptr + out_cols[:, None] * (2 * HEAD_DIM) + cols[None, :], mask=w_mask, other=0.0)
    return dot(a, tl.trans(w), acc, PRECISION)


@triton.jit
def weight_halves(w_ptr, HEAD_DIM: tl.constexpr, PAPER: tl.constexpr):
    """Pointers at Wa and Wf of the combiner's [C, 2C] weight."""
    if PAPER:
        return w_ptr + HEAD_DIM, w_ptr
    else:
        return w_ptr, w_ptr + HEAD_DIM


@triton.jit
def exp_above(scores, reference, LOG2E_SCALE: tl.constexpr, DTYPE: tl.constexpr):
    """exp2((scores - reference) * LOG2E_SCALE).

    In 16 bit this is one fused multiply-add; its rounding of the reference is far below the rounding of q and k.
    """
    if tl.float32 == DTYPE:
        return tl.exp2((scores - reference) * LOG2E_SCALE)
    else:
        return tl.exp2(scores * LOG2E_SCALE - reference * LOG2E_SCALE)


@triton.jit
def _store_combined(y, rows, row_mask, cols, out, bias_ptr, HEAD_DIM: tl.constexpr):
    """Add the combiner's bias and store [positions, outputs]; pointers `rows` are at channel 0 of `out`."""
    out_mask = cols < HEAD_DIM
    y += tl.load(bias_ptr + cols, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        rows[:, None] + cols.to(tl.int64)[None, :] * out.stride_c,
        y.to(out.ptr.dtype.element_ty),
        mask=row_mask[:, None] & out_mask[None, :],
    )


@triton.jit
def _attn_fwd_kernel(
    q,  # Rows
    kv,  # Rows
    inv_norm_ptr,  # [B, N] float32 where PAPER, else None
    attended,  # Map; where the keys are split it and the next four are not used
    features,  # Map; with weight, bias and out: of the combiner, absent or None without one
    w_ptr,  # [C, 2C]
    bias_ptr,  # [C]
    out,  # Map
    partial_ptr,  # [splits, B, N, C] float32, or None
    max_ptr,  # [splits, B, N] float32
    sum_ptr,  # [splits, B, N] float32: sum of exp(score - max)
    n_batch,
    n_positions,
    width,
    num_blocks,
    keys_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,  # factor of the stored q
    PAPER: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program computes BLOCK_M queries over the keys of one split."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_m = (tl.program_id(0) % num_blocks) * BLOCK_M
    split = tl.program_id(1)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, n_positions)
    tl.assume(begin < end)  # without it ptxas serialises the matrix products (Triton 3.6)

    rows = tl.arange(0, BLOCK_M)
    row_mask = start_m + rows < n_positions
    keys = tl.arange(0, BLOCK_N)
    cols = head_columns(D0, D1)
    q_base = q.ptr + batch * q.stride_b + start_m.to(tl.int64) * q.stride_n
    k_base = kv.ptr + batch * kv.stride_b + begin.to(tl.int64) * kv.stride_n
    k_ptrs = tile_pointers(k_base, keys, kv.stride_n, cols)
    queries = load_tiles(tile_pointers(q_base, rows, q.stride_n, cols), tile_masks(row_mask, cols, HEAD_DIM))
    acc = zero_tiles(BLOCK_M, D0, D1)
    if PAPER:
        norm_base = inv_norm_ptr + batch * n_positions
        row_scale = tl.load(norm_base + start_m + rows, mask=row_mask, other=0.0) * LOG2E
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    LOG2E_SCALE: tl.constexpr = LOG2E / Q_SCALE

    for start_n in tl.range(begin, end, BLOCK_N):
        key_mask = start_n + keys < end
        k = load_tiles(k_ptrs, tile_masks(key_mask, cols, HEAD_DIM))
        scores = row_products(queries, k, BLOCK_M, BLOCK_N, PRECISION)
        if PAPER:
            col_scale = tl.load(norm_base + start_n + keys, mask=key_mask, other=0.0)
            scores = (scores * row_scale[:, None]) * col_scale[None, :]
        if not EVEN_N:
            scores = tl.where(key_mask[None, :], scores, float("-inf"))
        if PAPER:  # cosines: no running maximum
            p = tl.exp2(scores)
            total += tl.sum(p, axis=1)
        else:
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            p = exp_above(scores, new_max[:, None], LOG2E_SCALE, kv.ptr.dtype.element_ty)
            alpha = tl.exp2((running_max - new_max) * LOG2E_SCALE)
            total = total * alpha + tl.sum(p, axis=1)
            acc = scale_rows(acc, alpha)
            running_max = new_max
        acc = add_weighted(acc, p.to(kv.ptr.dtype.element_ty), k, PRECISION)
        k_ptrs = advance(k_ptrs, BLOCK_N * kv.stride_n)

    row_max = tl.zeros([BLOCK_M], dtype=tl.float32) if PAPER else running_max * (1.0 / Q_SCALE)
    positions = start_m + rows
    row_index = (split.to(tl.int64) * n_batch + batch) * n_positions + positions
    acc = scale_rows(acc, 1.0 / total)

    # Both, not their log-sum-exp: near 1e5 that would have too few digits for the merge of splits and the backward.
    tl.store(max_ptr + row_index, row_max, mask=row_mask)
    tl.store(sum_ptr + row_index, total, mask=row_mask)
    masks = tile_masks(row_mask, cols, HEAD_DIM)
    if partial_ptr is not None:
        store_tiles(tile_pointers(partial_ptr, row_index, HEAD_DIM, cols), acc, masks)
    else:
        a = cast_tiles(acc, kv.ptr.dtype.element_ty)
        a_rows = position_rows(attended, batch, positions, width)
        for i in tl.static_range(len(cols)):
            a_ptrs = a_rows[:, None] + cols[i].to(tl.int64)[None, :] * attended.stride_c
            tl.store(a_ptrs, a[i], mask=masks[i])
        if out.ptr is not None:
            wa_ptr, wf_ptr = weight_halves(w_ptr, HEAD_DIM, PAPER)
            f_rows = position_rows(features, batch, positions, width)
            o_rows = position_rows(out, batch, positions, width)
            # One stage: the weights are read once, and further buffers would not fit beside those of the keys.
            for start_o in tl.range(0, HEAD_DIM, BLOCK_O, num_stages=1):
                out_cols = start_o + tl.arange(0, BLOCK_O)
                y = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
                for i in tl.static_range(len(cols)):
                    y = _add_product(y, a[i], wa_ptr, out_cols, cols[i], HEAD_DIM, PRECISION)
                for start_d in tl.range(0, HEAD_DIM, BLOCK_D, num_stages=1):
                    depth = start_d + tl.arange(0, BLOCK_D)
                    f = tl.load(
                        f_rows[:, None] + depth.to(tl.int64)[None, :] * features.stride_c,
                        mask=row_mask[:, None] & (depth < HEAD_DIM)[None, :],
                        other=0.0,
                    )
                    y = _add_product(y, f, wf_ptr, out_cols, depth, HEAD_DIM, PRECISION)
                _store_combined(y, o_rows, row_mask, out_cols, out, bias_ptr, HEAD_DIM)


@triton.jit
def _split_weight(max_ptr, sum_ptr, index, best, row_mask):
    """Weight of a row of a split, relative to exp(best)."""
    row_max = tl.load(max_ptr + index, mask=row_mask, other=0.0)
    return tl.load(sum_ptr + index, mask=row_mask, other=1.0) * tl.exp2((row_max - best) * LOG2E)


@triton.jit
def _attn_merge_kernel(
    partial_ptr,  # [SPLITS, B, N, C] float32, normalised within its split
    max_ptr,  # [SPLITS, B, N] float32
    sum_ptr,  # [SPLITS, B, N] float32
    stats_ptr,  # [2, B, N] float32: maximum and sum over all splits
    attended,  # Map
    features,  # Map; with weight, bias and out: of the combiner, absent or None without one
    w_ptr,  # [C, 2C]
    bias_ptr,  # [C]
    out,  # Map
    n_batch,
    n_positions,
    width,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PAPER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """attended = sum_s softmax_s(max_s + ln(sum_s)) partial_s, then the combiner.

    With a combiner, a program computes BLOCK_D output channels of BLOCK_M positions over all input channels; the
    first program of a row block stores the attended rows. Without one, a program computes BLOCK_D attended channels.
    """
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    positions = (tl.program_id(0) % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = positions < n_positions
    first_mask = positions < tl.where(tl.program_id(1) == 0, n_positions, 0)
    row_index = batch * n_positions + positions
    split_rows = tl.full([], 1, tl.int64) * n_batch * n_positions

    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        best = tl.maximum(best, tl.load(max_ptr + s * split_rows + row_index, mask=row_mask, other=0.0))
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        total += _split_weight(max_ptr, sum_ptr, s * split_rows + row_index, best, row_mask)
    tl.store(stats_ptr + row_index, best, mask=first_mask)
    tl.store(stats_ptr + split_rows + row_index, total, mask=first_mask)
    inverse = 1.0 / total

    COMBINE: tl.constexpr = out.ptr is not None
    a_rows = position_rows(attended, batch, positions, width)
    if COMBINE:
        wa_ptr, wf_ptr = weight_halves(w_ptr, HEAD_DIM, PAPER)
        f_rows = position_rows(features, batch, positions, width)
        out_cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        y = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        first_d = 0
        end_d = HEAD_DIM
    else:
        first_d = tl.program_id(1) * BLOCK_D
        end_d = first_d + BLOCK_D
    for start_d in range(first_d, end_d, BLOCK_D):
        cols = start_d + tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        merged = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for s in tl.static_range(SPLITS):
            index = s * split_rows + row_index
            share = _split_weight(max_ptr, sum_ptr, index, best, row_mask) * inverse
            tile = tl.load(partial_ptr + index[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0)
            merged += tile * share[:, None]
        a = merged.to(attended.ptr.dtype.element_ty)
        col_offsets = cols.to(tl.int64)[None, :]
        a_mask = mask & first_mask[:, None] if COMBINE else mask
        tl.store(a_rows[:, None] + col_offsets * attended.stride_c, a, mask=a_mask)
        if COMBINE:
            y = _add_product(y, a, wa_ptr, out_cols, cols, HEAD_DIM, PRECISION)
            f = tl.load(f_rows[:, None] + col_offsets * features.stride_c, mask=mask, other=0.0)
            y = _add_product(y, f, wf_ptr, out_cols, cols, HEAD_DIM, PRECISION)
    if COMBINE:
        o_rows = position_rows(out, batch, positions, width)
        _store_combined(y, o_rows, row_mask, out_cols, out, bias_ptr, HEAD_DIM)
