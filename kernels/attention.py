"""Cosine-similarity softmax attention over a feature map, with its 1x1 combiner: forward and backward.

Features F [B, C, H, W], N = H*W positions, one head of size C (at most 512), no scale::

    released: q = 3x3 zero-padded box sum of F    k = v = (F + 1e-7) / ||F + 1e-7||
    paper:    q = k = F / max(||F||, 1e-12)       v = F
    attended_i = sum_j softmax_j(q_i . k_j) v_j
    released: out = Wa attended + Wf F + bias     weight [C, 2C, 1, 1] = [Wa | Wf]
    paper:    the same                            weight [C, 2C, 1, 1] = [Wf | Wa]

**Forward**, two or three kernels. `_attn_prep_kernel` reads F in whatever strides it has and writes the rows
[B, N, C] that the tensor cores want: box sums and normalised keys (released), or F itself and 1/||F|| (paper; no copy
where F already is channels_last). `_attn_fwd_kernel` then loads each key tile once for both products: k = v in
"released"; in "paper" the raw tile gives scores and values, as the two norms are factors of the score. "paper" scores
lie in [-1, 1] and need no running maximum. Without splits its epilogue applies the combiner, so that neither the
attended map nor a concatenation is written; with splits over the keys `_attn_merge_kernel` merges the partial results
by their rows' maxima and sums and applies the combiner.

**Shapes on an H100** (132 multiprocessors). A program owns BLOCK_M queries and all C channels. C is held as two
power-of-two chunks D0 + D1 (96 = 64 + 32, 192 = 128 + 64, 384 = 256 + 128, 512 = 256 + 256), not padded: 384 as 512
would cost a third more. The accumulator of 64 x 512 float32 is half of the register file, which is why C = 512 takes
8 warps for 64 queries. One sample of N = 4096, C = 128 gives 32 programs of 128 queries, so its keys are split in 4;
N = 1024, C = 256 gives 16 of 64, split in 8; N = 256, C = 512 gives 4, split in 8 of 32 keys. A batch of 16 gives
512, 128 and 64 programs: only the last is split, in 2.
Bytes moved at N = 4096, C = 128, 16 bit: F 1 MiB read, q and k 2 MiB written, out 1 MiB; partial results 2 MiB a
split each way, which stay in the L2 cache. The 8.6 GFLOP are what costs.

**Backward** recomputes the scores, never holds N x N numbers and uses no atomics: `_attn_bwd_delta_kernel` (rows of
grad_attended, and delta = <grad_attended, attended>), `_attn_bwd_dq_kernel` (a program owns queries),
`_attn_bwd_dkv_kernel` (a program owns keys; in "released" dK and dV share one accumulator as k = v, in "paper" they
are two launches of one accumulator each), `_attn_bwd_finish_kernel`: dF = box3x3(dq), the box being its own adjoint,
plus the normalisation's backward of dk + dv ("paper": of dq + dk, plus dv).

**Numbers.** Products accumulate in float32. In float16 the box sum is stored divided by 16, as nine times a float16
can pass its range; scores are scaled back in float32. The forward saves `stats` [2, B, N], the rows' maxima m and
sums l of exp(s - m): apart, as scores near 1e5 would leave their log-sum-exp few digits after the point. Recomputed
scores of that size may differ from the forward's in the last of those digits, and the probabilities would not sum to
one: in float32 the dq kernel also sums them, and the others divide by that instead of l.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import SHARED_LIMITS
from .configs import Config, config_kind, device_generation, num_splits, pick
from .launch import (
    MAX_GRID,
    device_guard,
    device_reason,
    dot,
    dot_precision,
    is_flat,
    launch,
    position_offsets,
    position_strides,
)

MAX_CHANNELS = 512
# Triton leaves the tensor cores of older GPUs unused
CAPABILITY = (8, 0)
VARIANTS = ("released", "paper")
LOG2E = math.log2(math.e)

_KEY_SHIFT = tl.constexpr(1e-7)
_NORM_CLAMP = tl.constexpr(1e-12)
_LOG2E = tl.constexpr(LOG2E)


# ---------------------------------------------------------------------------------------------------------------
# forward kernels


@triton.jit
def _inverse_norm(
    f_ptrs,
    stride_fc,
    row_mask,
    HEAD_DIM: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """1 / norm of BLOCK_P key rows; `f_ptrs` [BLOCK_P] point at channel 0."""
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        f = tl.load(f_ptrs[:, None] + cols.to(tl.int64)[None, :] * stride_fc, mask=mask, other=0.0).to(tl.float32)
        if not PAPER:
            f = tl.where(mask, f + _KEY_SHIFT, 0.0)
        total += tl.sum(f * f, axis=1)
    norm = tl.sqrt(total)
    if PAPER:
        norm = tl.maximum(norm, _NORM_CLAMP)
    return 1.0 / tl.where(row_mask, norm, 1.0)


@triton.jit
def _attn_prep_kernel(
    f_ptr,  # [B, C, H, W], any strides
    q_ptr,  # [B, N, C] rows, written where WRITE_Q: box sums * q_scale
    k_ptr,  # [B, N, C] rows, written where WRITE_K: normalised keys
    v_ptr,  # [B, N, C] rows, written where WRITE_V: F
    inv_norm_ptr,  # [B, N] float32, written where WRITE_NORM
    stride_fb,
    stride_fc,
    stride_fh,
    stride_fw,
    height,
    width,
    num_blocks,
    q_scale,
    HEAD_DIM: tl.constexpr,
    PAPER: tl.constexpr,
    WRITE_Q: tl.constexpr,
    WRITE_K: tl.constexpr,
    WRITE_V: tl.constexpr,
    WRITE_NORM: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program writes BLOCK_C channels of BLOCK_P positions (and reads all channels of them for the norm)."""
    n_positions = height * width
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask = rows < n_positions
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
    f_base = f_ptr + batch * stride_fb
    f_rows = f_base + position_offsets(rows, width, stride_fh, stride_fw, FLAT)
    col_offsets = cols.to(tl.int64)[None, :] * stride_fc
    out_offsets = (batch * n_positions + rows.to(tl.int64))[:, None] * HEAD_DIM + cols[None, :]
    f = tl.load(f_rows[:, None] + col_offsets, mask=mask, other=0.0)

    if WRITE_V:
        tl.store(v_ptr + out_offsets, f, mask=mask)
    if WRITE_K or WRITE_NORM:
        inv_norm = _inverse_norm(f_rows, stride_fc, row_mask, HEAD_DIM, PAPER, BLOCK_C, BLOCK_P)
        if WRITE_K:
            key = f.to(tl.float32)
            if not PAPER:
                key += _KEY_SHIFT
            tl.store(k_ptr + out_offsets, (key * inv_norm[:, None]).to(k_ptr.dtype.element_ty), mask=mask)
        if WRITE_NORM:
            end = tl.where(tl.program_id(1) == 0, n_positions, 0)
            tl.store(inv_norm_ptr + batch * n_positions + rows, inv_norm, mask=rows < end)
    if WRITE_Q:
        h = rows // width
        w = rows % width
        box = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        for dh in range(-1, 2):
            for dw in tl.static_range(-1, 2):
                inside = (h + dh >= 0) & (h + dh < height) & (w + dw >= 0) & (w + dw < width)
                near = f_base + position_offsets(rows + dh * width + dw, width, stride_fh, stride_fw, FLAT)
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
def _exp(scores, reference, LOG2E_SCALE: tl.constexpr, DTYPE: tl.constexpr):
    """exp2((scores - reference) * LOG2E_SCALE).

    In 16 bit as one fused multiply-add; its rounding of the reference is far below that of q and k.
    """
    if tl.float32 == DTYPE:
        return tl.exp2((scores - reference) * LOG2E_SCALE)
    else:
        return tl.exp2(scores * LOG2E_SCALE - reference * LOG2E_SCALE)


@triton.jit
def _attn_fwd_kernel(
    q_ptr,  # [B, N, C] rows
    kv_ptr,  # [B, N, C] rows
    inv_norm_ptr,  # [B, N] float32, read where PAPER
    f_ptr,  # [B, C, H, W], read where COMBINE
    w_ptr,  # [C, 2C], read where COMBINE
    bias_ptr,  # [C], read where COMBINE
    out_ptr,  # [B, C, H, W], written where COMBINE
    attended_ptr,  # [B, C, H, W], written where ATTENDED
    partial_ptr,  # [splits, B, N, C] float32, written where PARTIAL
    max_ptr,  # [splits, B, N] float32
    sum_ptr,  # [splits, B, N] float32: sum of exp(score - max)
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kn,
    stride_fb,
    stride_fc,
    stride_fh,
    stride_fw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    stride_ab,
    stride_ac,
    stride_ah,
    stride_aw,
    n_batch,
    n_positions,
    width,
    num_blocks,
    keys_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,  # factor of the stored q
    PAPER: tl.constexpr,
    PARTIAL: tl.constexpr,
    ATTENDED: tl.constexpr,
    COMBINE: tl.constexpr,
    EVEN_N: tl.constexpr,
    F_FLAT: tl.constexpr,
    O_FLAT: tl.constexpr,
    A_FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns BLOCK_M queries and walks the keys of one split."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_m = (tl.program_id(0) % num_blocks) * BLOCK_M
    split = tl.program_id(1)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, n_positions)
    tl.assume(begin < end)  # without it ptxas serialises the matrix products (Triton 3.6)

    rows = tl.arange(0, BLOCK_M)
    row_mask = start_m + rows < n_positions
    keys = tl.arange(0, BLOCK_N)
    cols0 = tl.arange(0, D0)
    q_base = q_ptr + batch * stride_qb + start_m.to(tl.int64) * stride_qn
    k_base = kv_ptr + batch * stride_kb + begin.to(tl.int64) * stride_kn
    k0_ptrs = k_base + keys[:, None] * stride_kn + cols0[None, :]
    q0 = tl.load(
        q_base + rows[:, None] * stride_qn + cols0[None, :],
        mask=row_mask[:, None] & (cols0 < HEAD_DIM)[None, :],
        other=0.0,
    )
    acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    if D1 > 0:
        cols1 = D0 + tl.arange(0, D1)
        k1_ptrs = k_base + keys[:, None] * stride_kn + cols1[None, :]
        q1 = tl.load(
            q_base + rows[:, None] * stride_qn + cols1[None, :],
            mask=row_mask[:, None] & (cols1 < HEAD_DIM)[None, :],
            other=0.0,
        )
        acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    if PAPER:
        norm_base = inv_norm_ptr + batch * n_positions
        row_scale = tl.load(norm_base + start_m + rows, mask=row_mask, other=0.0) * _LOG2E
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    LOG2E_SCALE: tl.constexpr = _LOG2E / Q_SCALE

    for start_n in tl.range(begin, end, BLOCK_N):
        key_mask = start_n + keys < end
        k0 = tl.load(k0_ptrs, mask=key_mask[:, None] & (cols0 < HEAD_DIM)[None, :], other=0.0)
        scores = dot(q0, tl.trans(k0), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
        if D1 > 0:
            k1 = tl.load(k1_ptrs, mask=key_mask[:, None] & (cols1 < HEAD_DIM)[None, :], other=0.0)
            scores = dot(q1, tl.trans(k1), scores, PRECISION)
        if PAPER:
            col_scale = tl.load(norm_base + start_n + keys, mask=key_mask, other=0.0)
            scores = (scores * row_scale[:, None]) * col_scale[None, :]
            if not EVEN_N:
                scores = tl.where(key_mask[None, :], scores, float("-inf"))
            p = tl.exp2(scores)
            total += tl.sum(p, axis=1)
        else:
            if not EVEN_N:
                scores = tl.where(key_mask[None, :], scores, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            p = _exp(scores, new_max[:, None], LOG2E_SCALE, kv_ptr.dtype.element_ty)
            alpha = tl.exp2((running_max - new_max) * LOG2E_SCALE)
            total = total * alpha + tl.sum(p, axis=1)
            acc0 = acc0 * alpha[:, None]
            if D1 > 0:
                acc1 = acc1 * alpha[:, None]
            running_max = new_max
        p = p.to(kv_ptr.dtype.element_ty)
        acc0 = dot(p, k0, acc0, PRECISION)
        k0_ptrs += BLOCK_N * stride_kn
        if D1 > 0:
            acc1 = dot(p, k1, acc1, PRECISION)
            k1_ptrs += BLOCK_N * stride_kn

    row_max = tl.zeros([BLOCK_M], dtype=tl.float32) if PAPER else running_max * (1.0 / Q_SCALE)
    positions = start_m + rows
    row_index = (split.to(tl.int64) * n_batch + batch) * n_positions + positions
    inverse = 1.0 / total
    acc0 = acc0 * inverse[:, None]
    if D1 > 0:
        acc1 = acc1 * inverse[:, None]

    # not their log-sum-exp: near 1e5 it would keep too few digits after the point, for the splits and the backward
    tl.store(max_ptr + row_index, row_max, mask=row_mask)
    tl.store(sum_ptr + row_index, total, mask=row_mask)
    if PARTIAL:
        out_rows = partial_ptr + row_index[:, None] * HEAD_DIM
        tl.store(out_rows + cols0[None, :], acc0, mask=row_mask[:, None] & (cols0 < HEAD_DIM)[None, :])
        if D1 > 0:
            tl.store(out_rows + cols1[None, :], acc1, mask=row_mask[:, None] & (cols1 < HEAD_DIM)[None, :])
    else:
        a0 = acc0.to(kv_ptr.dtype.element_ty)
        if D1 > 0:
            a1 = acc1.to(kv_ptr.dtype.element_ty)
        if ATTENDED:
            a_rows = (
                attended_ptr + batch * stride_ab + position_offsets(positions, width, stride_ah, stride_aw, A_FLAT)
            )
            tl.store(
                a_rows[:, None] + cols0.to(tl.int64)[None, :] * stride_ac,
                a0,
                mask=row_mask[:, None] & (cols0 < HEAD_DIM)[None, :],
            )
            if D1 > 0:
                tl.store(
                    a_rows[:, None] + cols1.to(tl.int64)[None, :] * stride_ac,
                    a1,
                    mask=row_mask[:, None] & (cols1 < HEAD_DIM)[None, :],
                )
        if COMBINE:
            wa_ptr = w_ptr + HEAD_DIM if PAPER else w_ptr
            wf_ptr = w_ptr if PAPER else w_ptr + HEAD_DIM
            f_ptrs = f_ptr + batch * stride_fb + position_offsets(positions, width, stride_fh, stride_fw, F_FLAT)
            o_ptrs = out_ptr + batch * stride_ob + position_offsets(positions, width, stride_oh, stride_ow, O_FLAT)
            # one stage: the weights are read once, and buffers for more would not fit beside the keys'
            for start_o in tl.range(0, HEAD_DIM, BLOCK_O, num_stages=1):
                out_cols = start_o + tl.arange(0, BLOCK_O)
                out_mask = out_cols < HEAD_DIM
                y = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
                y = _add_product(y, a0, wa_ptr, out_cols, cols0, HEAD_DIM, PRECISION)
                if D1 > 0:
                    y = _add_product(y, a1, wa_ptr, out_cols, cols1, HEAD_DIM, PRECISION)
                for start_d in tl.range(0, HEAD_DIM, BLOCK_D, num_stages=1):
                    cols = start_d + tl.arange(0, BLOCK_D)
                    f = tl.load(
                        f_ptrs[:, None] + cols.to(tl.int64)[None, :] * stride_fc,
                        mask=row_mask[:, None] & (cols < HEAD_DIM)[None, :],
                        other=0.0,
                    )
                    y = _add_product(y, f, wf_ptr, out_cols, cols, HEAD_DIM, PRECISION)
                y += tl.load(bias_ptr + out_cols, mask=out_mask, other=0.0).to(tl.float32)[None, :]
                tl.store(
                    o_ptrs[:, None] + out_cols.to(tl.int64)[None, :] * stride_oc,
                    y.to(out_ptr.dtype.element_ty),
                    mask=row_mask[:, None] & out_mask[None, :],
                )


@triton.jit
def _split_weight(max_ptr, sum_ptr, index, best, row_mask):
    """What a split's row counts for, relative to exp(best)."""
    row_max = tl.load(max_ptr + index, mask=row_mask, other=0.0)
    return tl.load(sum_ptr + index, mask=row_mask, other=1.0) * tl.exp2((row_max - best) * _LOG2E)


@triton.jit
def _attn_merge_kernel(
    partial_ptr,  # [SPLITS, B, N, C] float32, normalised within its split
    max_ptr,  # [SPLITS, B, N] float32
    sum_ptr,  # [SPLITS, B, N] float32
    f_ptr,  # [B, C, H, W], read where COMBINE
    w_ptr,  # [C, 2C], read where COMBINE
    bias_ptr,  # [C], read where COMBINE
    out_ptr,  # [B, C, H, W], written where COMBINE
    attended_ptr,  # [B, C, H, W], written where ATTENDED
    stats_ptr,  # [2, B, N] float32: maximum and sum over all splits
    stride_fb,
    stride_fc,
    stride_fh,
    stride_fw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    stride_ab,
    stride_ac,
    stride_ah,
    stride_aw,
    n_batch,
    n_positions,
    width,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PAPER: tl.constexpr,
    ATTENDED: tl.constexpr,
    COMBINE: tl.constexpr,
    F_FLAT: tl.constexpr,
    O_FLAT: tl.constexpr,
    A_FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """attended = sum_s softmax_s(max_s + ln(sum_s)) partial_s, then the combiner.

    COMBINE: a program owns BLOCK_O output channels of BLOCK_M positions and walks the input channels; the first
    program of a row block stores the attended rows. Otherwise a program owns BLOCK_D attended channels.
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

    a_rows = attended_ptr + batch * stride_ab + position_offsets(positions, width, stride_ah, stride_aw, A_FLAT)
    if COMBINE:
        wa_ptr = w_ptr + HEAD_DIM if PAPER else w_ptr
        wf_ptr = w_ptr if PAPER else w_ptr + HEAD_DIM
        f_ptrs = f_ptr + batch * stride_fb + position_offsets(positions, width, stride_fh, stride_fw, F_FLAT)
        o_ptrs = out_ptr + batch * stride_ob + position_offsets(positions, width, stride_oh, stride_ow, O_FLAT)
        out_cols = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        out_mask = out_cols < HEAD_DIM
        y = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
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
        a = merged.to(attended_ptr.dtype.element_ty)
        if ATTENDED:
            if COMBINE:
                mask = mask & first_mask[:, None]
            tl.store(a_rows[:, None] + cols.to(tl.int64)[None, :] * stride_ac, a, mask=mask)
        if COMBINE:
            y = _add_product(y, a, wa_ptr, out_cols, cols, HEAD_DIM, PRECISION)
            f = tl.load(
                f_ptrs[:, None] + cols.to(tl.int64)[None, :] * stride_fc,
                mask=row_mask[:, None] & (cols < HEAD_DIM)[None, :],
                other=0.0,
            )
            y = _add_product(y, f, wf_ptr, out_cols, cols, HEAD_DIM, PRECISION)
    if COMBINE:
        y += tl.load(bias_ptr + out_cols, mask=out_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(
            o_ptrs[:, None] + out_cols.to(tl.int64)[None, :] * stride_oc,
            y.to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & out_mask[None, :],
        )


# ---------------------------------------------------------------------------------------------------------------
# backward kernels


@triton.jit
def _attn_bwd_delta_kernel(
    grad_ptr,  # [B, C, H, W], any strides: grad_attended
    attended_ptr,  # [B, C, H, W], any strides
    do_ptr,  # [B, N, C] rows: grad_attended
    delta_ptr,  # [B, N] float32
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_ab,
    stride_ac,
    stride_ah,
    stride_aw,
    n_positions,
    width,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    G_FLAT: tl.constexpr,
    A_FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """do rows = grad_attended, delta_i = <grad_attended_i, attended_i>."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask = rows < n_positions
    row_index = batch * n_positions + rows
    g_ptrs = grad_ptr + batch * stride_gb + position_offsets(rows, width, stride_gh, stride_gw, G_FLAT)
    a_ptrs = attended_ptr + batch * stride_ab + position_offsets(rows, width, stride_ah, stride_aw, A_FLAT)
    delta = tl.zeros([BLOCK_P], dtype=tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        g = tl.load(g_ptrs[:, None] + cols.to(tl.int64)[None, :] * stride_gc, mask=mask, other=0.0)
        a = tl.load(a_ptrs[:, None] + cols.to(tl.int64)[None, :] * stride_ac, mask=mask, other=0.0)
        delta += tl.sum(g.to(tl.float32) * a.to(tl.float32), axis=1)
        tl.store(do_ptr + row_index[:, None] * HEAD_DIM + cols[None, :], g, mask=mask)
    tl.store(delta_ptr + row_index, delta, mask=row_mask)


@triton.jit
def _attn_bwd_dq_kernel(
    q_ptr,  # [B, N, C] rows
    k_ptr,  # [B, N, C] rows
    v_ptr,  # [B, N, C] rows, read where not SHARED_KV
    do_ptr,  # [B, N, C] rows
    stats_ptr,  # [2, B, N] float32: m, l
    delta_ptr,  # [B, N] float32
    dq_ptr,  # [splits, B, N, C] float32
    sum_ptr,  # [splits, B, N] float32, written where RENORM: sum_j exp(s_ij - m_i)
    n_batch,
    n_positions,
    num_blocks,
    keys_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,
    SHARED_KV: tl.constexpr,
    RENORM: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq_i = sum_j ds_ij k_j, ds = p (dp - delta), p = exp(s - m) / l, dp = do v^T; a program owns BLOCK_M queries.

    RENORM: without the division.
    """
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_m = (tl.program_id(0) % num_blocks) * BLOCK_M
    split = tl.program_id(1)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, n_positions)
    tl.assume(begin < end)  # without it ptxas serialises the matrix products (Triton 3.6)

    rows = tl.arange(0, BLOCK_M)
    row_mask = start_m + rows < n_positions
    keys = tl.arange(0, BLOCK_N)
    cols0 = tl.arange(0, D0)
    first_row = batch * n_positions
    m_base = (first_row + start_m) * HEAD_DIM
    n_base = (first_row + begin) * HEAD_DIM
    m0_offsets = rows[:, None] * HEAD_DIM + cols0[None, :]
    n0_offsets = keys[:, None] * HEAD_DIM + cols0[None, :]
    m0_mask = row_mask[:, None] & (cols0 < HEAD_DIM)[None, :]
    q0 = tl.load(q_ptr + m_base + m0_offsets, mask=m0_mask, other=0.0)
    do0 = tl.load(do_ptr + m_base + m0_offsets, mask=m0_mask, other=0.0)
    k0_ptrs = k_ptr + n_base + n0_offsets
    v0_ptrs = v_ptr + n_base + n0_offsets
    acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    if D1 > 0:
        cols1 = D0 + tl.arange(0, D1)
        m1_offsets = rows[:, None] * HEAD_DIM + cols1[None, :]
        n1_offsets = keys[:, None] * HEAD_DIM + cols1[None, :]
        m1_mask = row_mask[:, None] & (cols1 < HEAD_DIM)[None, :]
        q1 = tl.load(q_ptr + m_base + m1_offsets, mask=m1_mask, other=0.0)
        do1 = tl.load(do_ptr + m_base + m1_offsets, mask=m1_mask, other=0.0)
        k1_ptrs = k_ptr + n_base + n1_offsets
        v1_ptrs = v_ptr + n_base + n1_offsets
        acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    positions = start_m + rows
    # in units of the stored scores
    row_max = tl.load(stats_ptr + first_row + positions, mask=row_mask, other=0.0) * Q_SCALE
    LOG2E_SCALE: tl.constexpr = _LOG2E / Q_SCALE
    delta = tl.load(delta_ptr + first_row + positions, mask=row_mask, other=0.0)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if not RENORM:
        all_rows = tl.full([], 1, tl.int64) * n_batch * n_positions
        inverse = 1.0 / tl.load(stats_ptr + all_rows + first_row + positions, mask=row_mask, other=1.0)
        delta *= inverse

    for start_n in tl.range(begin, end, BLOCK_N):
        key_mask = start_n + keys < end
        n0_mask = key_mask[:, None] & (cols0 < HEAD_DIM)[None, :]
        k0 = tl.load(k0_ptrs, mask=n0_mask, other=0.0)
        v0 = k0 if SHARED_KV else tl.load(v0_ptrs, mask=n0_mask, other=0.0)
        scores = dot(q0, tl.trans(k0), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
        dp = dot(do0, tl.trans(v0), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
        if D1 > 0:
            n1_mask = key_mask[:, None] & (cols1 < HEAD_DIM)[None, :]
            k1 = tl.load(k1_ptrs, mask=n1_mask, other=0.0)
            v1 = k1 if SHARED_KV else tl.load(v1_ptrs, mask=n1_mask, other=0.0)
            scores = dot(q1, tl.trans(k1), scores, PRECISION)
            dp = dot(do1, tl.trans(v1), dp, PRECISION)
        if not EVEN_N:
            scores = tl.where(key_mask[None, :], scores, float("-inf"))
        p = _exp(scores, row_max[:, None], LOG2E_SCALE, k_ptr.dtype.element_ty)
        if RENORM:
            total += tl.sum(p, axis=1)
        else:
            dp *= inverse[:, None]
        ds = (p * (dp - delta[:, None])).to(k_ptr.dtype.element_ty)
        acc0 = dot(ds, k0, acc0, PRECISION)
        k0_ptrs += BLOCK_N * HEAD_DIM
        v0_ptrs += BLOCK_N * HEAD_DIM
        if D1 > 0:
            acc1 = dot(ds, k1, acc1, PRECISION)
            k1_ptrs += BLOCK_N * HEAD_DIM
            v1_ptrs += BLOCK_N * HEAD_DIM

    row_index = (split.to(tl.int64) * n_batch + batch) * n_positions + positions
    if RENORM:
        tl.store(sum_ptr + row_index, total, mask=row_mask)
    out_rows = dq_ptr + row_index[:, None] * HEAD_DIM
    tl.store(out_rows + cols0[None, :], acc0, mask=m0_mask)
    if D1 > 0:
        tl.store(out_rows + cols1[None, :], acc1, mask=m1_mask)


@triton.jit
def _attn_bwd_dkv_kernel(
    q_ptr,  # [B, N, C] rows
    k_ptr,  # [B, N, C] rows
    v_ptr,  # [B, N, C] rows, read where dp is needed and not SHARED_KV
    do_ptr,  # [B, N, C] rows
    stats_ptr,  # [2, B, N] float32: m, l
    delta_ptr,  # [B, N] float32
    sum_ptr,  # [SUMS, B, N] float32, read where RENORM
    dkv_ptr,  # [splits, B, N, C] float32
    n_batch,
    n_positions,
    num_blocks,
    queries_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,
    SHARED_KV: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
    RENORM: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum_i ds_ij q_i (WITH_DK) + sum_i p_ij do_i (WITH_DV); a program owns BLOCK_N keys; scores are transposed."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_n = (tl.program_id(0) % num_blocks) * BLOCK_N
    split = tl.program_id(1)
    begin = split * queries_per_split
    end = tl.minimum(begin + queries_per_split, n_positions)
    tl.assume(begin < end)  # as in the forward

    keys = tl.arange(0, BLOCK_N)
    key_mask = start_n + keys < n_positions
    rows = tl.arange(0, BLOCK_M)
    cols0 = tl.arange(0, D0)
    first_row = batch * n_positions
    n_base = (first_row + start_n) * HEAD_DIM
    m_base = (first_row + begin) * HEAD_DIM
    n0_offsets = keys[:, None] * HEAD_DIM + cols0[None, :]
    m0_offsets = rows[:, None] * HEAD_DIM + cols0[None, :]
    n0_mask = key_mask[:, None] & (cols0 < HEAD_DIM)[None, :]
    k0 = tl.load(k_ptr + n_base + n0_offsets, mask=n0_mask, other=0.0)
    if WITH_DK:
        v0 = k0 if SHARED_KV else tl.load(v_ptr + n_base + n0_offsets, mask=n0_mask, other=0.0)
    q0_ptrs = q_ptr + m_base + m0_offsets
    do0_ptrs = do_ptr + m_base + m0_offsets
    acc0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    if D1 > 0:
        cols1 = D0 + tl.arange(0, D1)
        n1_offsets = keys[:, None] * HEAD_DIM + cols1[None, :]
        m1_offsets = rows[:, None] * HEAD_DIM + cols1[None, :]
        n1_mask = key_mask[:, None] & (cols1 < HEAD_DIM)[None, :]
        k1 = tl.load(k_ptr + n_base + n1_offsets, mask=n1_mask, other=0.0)
        if WITH_DK:
            v1 = k1 if SHARED_KV else tl.load(v_ptr + n_base + n1_offsets, mask=n1_mask, other=0.0)
        q1_ptrs = q_ptr + m_base + m1_offsets
        do1_ptrs = do_ptr + m_base + m1_offsets
        acc1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    split_rows = tl.full([], 1, tl.int64) * n_batch * n_positions
    LOG2E_SCALE: tl.constexpr = _LOG2E / Q_SCALE

    for start_m in tl.range(begin, end, BLOCK_M):
        row_mask = start_m + rows < end
        row_index = first_row + start_m + rows
        m0_mask = row_mask[:, None] & (cols0 < HEAD_DIM)[None, :]
        q0 = tl.load(q0_ptrs, mask=m0_mask, other=0.0)
        do0 = tl.load(do0_ptrs, mask=m0_mask, other=0.0)
        scores = dot(k0, tl.trans(q0), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32), PRECISION)
        if WITH_DK:
            dp = dot(v0, tl.trans(do0), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32), PRECISION)
        if D1 > 0:
            m1_mask = row_mask[:, None] & (cols1 < HEAD_DIM)[None, :]
            q1 = tl.load(q1_ptrs, mask=m1_mask, other=0.0)
            do1 = tl.load(do1_ptrs, mask=m1_mask, other=0.0)
            scores = dot(k1, tl.trans(q1), scores, PRECISION)
            if WITH_DK:
                dp = dot(v1, tl.trans(do1), dp, PRECISION)
        # m = +inf past the end makes p = 0 there
        row_max = tl.load(stats_ptr + row_index, mask=row_mask, other=float("inf")) * Q_SCALE
        p = _exp(scores, row_max[None, :], LOG2E_SCALE, k_ptr.dtype.element_ty)
        if RENORM:
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
            for s in tl.static_range(SUMS):
                total += tl.load(sum_ptr + s * split_rows + row_index, mask=row_mask, other=1.0)
        else:
            total = tl.load(stats_ptr + split_rows + row_index, mask=row_mask, other=1.0)
        p *= (1.0 / total)[None, :]
        if WITH_DV:
            pv = p.to(k_ptr.dtype.element_ty)
            acc0 = dot(pv, do0, acc0, PRECISION)
            if D1 > 0:
                acc1 = dot(pv, do1, acc1, PRECISION)
        if WITH_DK:
            delta = tl.load(delta_ptr + row_index, mask=row_mask, other=0.0)
            ds = (p * ((dp - delta[None, :]) * (1.0 / Q_SCALE))).to(k_ptr.dtype.element_ty)
            acc0 = dot(ds, q0, acc0, PRECISION)
            if D1 > 0:
                acc1 = dot(ds, q1, acc1, PRECISION)
        q0_ptrs += BLOCK_M * HEAD_DIM
        do0_ptrs += BLOCK_M * HEAD_DIM
        if D1 > 0:
            q1_ptrs += BLOCK_M * HEAD_DIM
            do1_ptrs += BLOCK_M * HEAD_DIM

    out_rows = dkv_ptr + ((split.to(tl.int64) * n_batch + batch) * n_positions + start_n + keys)[:, None] * HEAD_DIM
    tl.store(out_rows + cols0[None, :], acc0, mask=n0_mask)
    if D1 > 0:
        tl.store(out_rows + cols1[None, :], acc1, mask=n1_mask)


@triton.jit
def _sum_splits(ptrs, split_stride, mask, splits):
    """Sum over the leading split dimension of a float32 workspace. A run-time count: unrolled loads would spill."""
    total = tl.load(ptrs, mask=mask, other=0.0)
    for s in range(1, splits):
        total += tl.load(ptrs + s * split_stride, mask=mask, other=0.0)
    return total


@triton.jit
def _attn_bwd_finish_kernel(
    f_ptr,  # [B, C, H, W], any strides
    dq_ptr,  # [dq_splits, B, N, C] float32
    sum_ptr,  # [dq_splits, B, N] float32, read where RENORM
    dk_ptr,  # [dkv_splits, B, N, C] float32: dk + dv (released), dk (paper)
    dv_ptr,  # [dkv_splits, B, N, C] float32, read where PAPER
    direct_ptr,  # [B, C, H, W], any strides, read where DIRECT: gradient that reaches F past the attention
    df_ptr,  # [B, C, H, W], any strides
    stride_fb,
    stride_fc,
    stride_fh,
    stride_fw,
    stride_rb,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    n_batch,
    height,
    width,
    num_blocks,
    dq_splits,
    dkv_splits,
    HEAD_DIM: tl.constexpr,
    PAPER: tl.constexpr,
    RENORM: tl.constexpr,
    DIRECT: tl.constexpr,
    F_FLAT: tl.constexpr,
    R_FLAT: tl.constexpr,
    O_FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With x = F + 1e-7 (paper: F), y = x / ||x||, g its gradient: dx = (g - y <y, g>) / ||x||; then the rest."""
    n_positions = height * width
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask = rows < n_positions
    row_index = batch * n_positions + rows
    split_rows = tl.full([], 1, tl.int64) * n_batch * n_positions
    split_stride = split_rows * HEAD_DIM
    f_rows = f_ptr + batch * stride_fb + position_offsets(rows, width, stride_fh, stride_fw, F_FLAT)

    square = tl.zeros([BLOCK_P], dtype=tl.float32)
    inner = tl.zeros([BLOCK_P], dtype=tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        x = tl.load(f_rows[:, None] + cols.to(tl.int64)[None, :] * stride_fc, mask=mask, other=0.0).to(tl.float32)
        offsets = row_index[:, None] * HEAD_DIM + cols[None, :]
        g = _sum_splits(dk_ptr + offsets, split_stride, mask, dkv_splits)
        if PAPER:
            g += _sum_splits(dq_ptr + offsets, split_stride, mask, dq_splits)
        else:
            x = tl.where(mask, x + _KEY_SHIFT, 0.0)
        square += tl.sum(x * x, axis=1)
        inner += tl.sum(x * g, axis=1)
    norm = tl.sqrt(square)
    if PAPER:
        inverse = 1.0 / tl.maximum(norm, _NORM_CLAMP)
        # below the clamp the denominator is a constant
        slope = tl.where(norm >= _NORM_CLAMP, (inner * inverse) * inverse, 0.0)
    else:
        inverse = 1.0 / tl.where(row_mask, norm, 1.0)
        slope = (inner * inverse) * inverse

    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
    col_offsets = cols.to(tl.int64)[None, :]
    offsets = row_index[:, None] * HEAD_DIM + cols[None, :]
    x = tl.load(f_rows[:, None] + col_offsets * stride_fc, mask=mask, other=0.0).to(tl.float32)
    g = _sum_splits(dk_ptr + offsets, split_stride, mask, dkv_splits)
    if PAPER:
        g += _sum_splits(dq_ptr + offsets, split_stride, mask, dq_splits)
        rest = _sum_splits(dv_ptr + offsets, split_stride, mask, dkv_splits)
    else:
        x += _KEY_SHIFT
        h = rows // width
        w = rows % width
        rest = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        for dh in range(-1, 2):
            for dw in tl.static_range(-1, 2):
                inside = (h + dh >= 0) & (h + dh < height) & (w + dw >= 0) & (w + dw < width) & row_mask
                near = row_index + dh * width + dw
                near_mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
                part = _sum_splits(
                    dq_ptr + near[:, None] * HEAD_DIM + cols[None, :], split_stride, near_mask, dq_splits
                )
                if RENORM:
                    total = tl.load(sum_ptr + near, mask=inside, other=1.0)
                    for s in range(1, dq_splits):
                        total += tl.load(sum_ptr + s * split_rows + near, mask=inside, other=0.0)
                    part = part / total[:, None]
                rest += part
    df = (g - x * slope[:, None]) * inverse[:, None] + rest
    if DIRECT:
        r_rows = direct_ptr + batch * stride_rb + position_offsets(rows, width, stride_rh, stride_rw, R_FLAT)
        df += tl.load(r_rows[:, None] + col_offsets * stride_rc, mask=mask, other=0.0).to(tl.float32)
    o_rows = df_ptr + batch * stride_ob + position_offsets(rows, width, stride_oh, stride_ow, O_FLAT)
    tl.store(o_rows[:, None] + col_offsets * stride_oc, df.to(df_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------
# launchers


def split_head(channels: int) -> tuple[int, int]:
    """Two power-of-two chunks (the second may be 0) that cover the head size with little padding."""
    first = max(16, min(256, 1 << (channels.bit_length() - 1)))
    if channels <= first:
        return first, 0
    second = max(16, 1 << (channels - first - 1).bit_length())
    if second == first and first < 256:
        return 2 * first, 0
    return first, second


def can_run_attention(
    features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, variant: str = "released"
) -> str | None:
    """Why the kernels cannot take these arguments, or None.

    Args:
        features: [B, C, H, W], float32, float16 or bfloat16, C at most 512, any strides.
        weight, bias: [C, 2C, 1, 1] and [C] of the combiner, or None for the attention alone.
        variant: "released" or "paper".
    """
    if variant not in VARIANTS:
        return f"variant {variant!r} ({' and '.join(VARIANTS)} are supported)"
    if features.ndim != 4:
        return f"features of {features.ndim} dimensions (4 are needed)"
    reason = device_reason(features, CAPABILITY)
    if reason is not None:
        return reason
    batch, channels, height, width = features.shape
    if not 1 <= channels <= MAX_CHANNELS:
        return f"{channels} channels (1 to {MAX_CHANNELS} are supported)"
    if height * width == 0:
        return "a feature map without positions"
    if height * width > MAX_GRID // 512 or batch * triton.cdiv(height * width, 16) > MAX_GRID:
        return f"{batch} x {height} x {width} positions (more than one grid holds)"
    for name, tensor, shape in (
        ("weight", weight, (channels, 2 * channels, 1, 1)),
        ("bias", bias, (channels,)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"{name} of shape {tuple(tensor.shape)} ({shape} is needed)"
        if tensor.dtype != features.dtype:
            return f"{name} of {tensor.dtype} with features of {features.dtype}"
        if tensor.device != features.device:
            return f"{name} on {tensor.device} with features on {features.device}"
    if (weight is None) != (bias is None):
        return "weight and bias must be given together"
    return None


def _strides(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """stride_b, stride_c, stride_h, stride_w, or zeros for an absent tensor."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.stride(0), tensor.stride(1), *position_strides(tensor)


def _row_blocks(generation: str, channels: int, positions: int) -> dict[str, int]:
    """Block sizes of the bandwidth-bound kernels; `positions` of all samples together."""
    config = pick("rows", generation, "any", channels, positions)
    block_c = min(config.block_n, max(16, triton.next_power_of_2(channels)))
    return {
        "BLOCK_P": config.block_m,
        "BLOCK_C": block_c,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _q_scale(dtype: torch.dtype) -> float:
    """Factor of the stored box sum: nine times a float16 can pass float16's range."""
    return 1.0 / 16.0 if dtype == torch.float16 else 1.0


def _is_rows(features: Tensor) -> bool:
    """Whether the features can be read as [B, N, C] rows in place."""
    return features.stride(1) == 1 and is_flat(features)


def _prepare(features: Tensor, variant: str, *, backward: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v rows and 1/||F|| as the variant's kernels need them.

    Rows have unit channel stride. released: q, k, k, None. paper forward: F, F, F, 1/||F||; backward: k, k, F, None.
    """
    batch, channels, height, width = features.shape
    positions = height * width
    paper = variant == "paper"

    def rows() -> Tensor:
        return torch.empty((batch, positions, channels), dtype=features.dtype, device=features.device)

    write_k = backward or not paper
    # the backward kernels want dense rows
    write_v = paper and (backward or not _is_rows(features))
    q = None if paper else rows()
    k = rows() if write_k else None
    v = rows() if write_v else None
    inv_norm = None
    if paper and not backward:
        inv_norm = torch.empty((batch, positions), dtype=torch.float32, device=features.device)
    generation, _ = device_generation(features.device)
    blocks = _row_blocks(generation, channels, batch * positions)
    num_blocks = triton.cdiv(positions, blocks["BLOCK_P"])
    launch(
        _attn_prep_kernel,
        (num_blocks * batch, triton.cdiv(channels, blocks["BLOCK_C"])),
        features,
        q,
        k,
        v,
        inv_norm,
        *_strides(features),
        height,
        width,
        num_blocks,
        _q_scale(features.dtype),
        HEAD_DIM=channels,
        PAPER=paper,
        WRITE_Q=q is not None,
        WRITE_K=write_k,
        WRITE_V=write_v,
        WRITE_NORM=inv_norm is not None,
        FLAT=is_flat(features),
        **blocks,
    )
    if not paper:
        assert q is not None
        assert k is not None
        return q, k, k, None
    if v is None:
        stride_n = position_strides(features)[1]
        v = features.as_strided((batch, positions, channels), (features.stride(0), stride_n, 1))
    return (v, v, v, inv_norm) if k is None else (k, k, v, None)


def _merge_stages(config: Config, columns: int, splits: int, element: int, generation: str) -> int:
    """The most pipeline stages, up to the table's, whose tiles of all splits fit the card's shared memory."""
    tiles = splits * config.block_m * columns * 4 + (2 * columns + config.block_m) * columns * element
    stages = config.num_stages
    while stages > 1 and (stages - 1) * tiles > 0.9 * SHARED_LIMITS[generation]:
        stages -= 1
    return stages


def _forward(
    features: Tensor,
    variant: str,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    attended: Tensor | None = None,
) -> Tensor:
    """Fill `attended` and (with `weight`) `out`, either may be None; return stats."""
    batch, channels, height, width = features.shape
    positions = height * width
    device = features.device
    stats = torch.empty((2, batch, positions), dtype=torch.float32, device=device)
    if batch == 0:
        return stats
    precision = dot_precision(features.dtype)
    generation, num_sms = device_generation(device)
    kind = config_kind(features.dtype, precision)
    config = pick("forward", generation, kind, channels, batch * positions)
    num_blocks = triton.cdiv(positions, config.block_m)
    splits, keys_per_split = num_splits(num_blocks * batch, positions, config.block_n, num_sms)
    paper = variant == "paper"
    combine = weight is not None
    weight_rows = None if weight is None else weight.reshape(channels, 2 * channels).contiguous()
    bias = None if bias is None else bias.contiguous()
    d0, d1 = split_head(channels)
    partial, (row_max, row_sum) = None, stats
    if splits > 1:
        partial = torch.empty((splits, batch, positions, channels), dtype=torch.float32, device=device)
        row_max, row_sum = torch.empty((2, splits, batch, positions), dtype=torch.float32, device=device)
    flags = {
        "PAPER": paper,
        "COMBINE": combine and splits == 1,
        "ATTENDED": attended is not None and splits == 1,
        "F_FLAT": is_flat(features),
        "O_FLAT": out is None or is_flat(out),
        "A_FLAT": attended is None or is_flat(attended),
        "PRECISION": precision,
    }
    with device_guard(features):
        q, _, kv, inv_norm = _prepare(features, variant, backward=False)
        launch(
            _attn_fwd_kernel,
            (num_blocks * batch, splits),
            q,
            kv,
            inv_norm,
            features,
            weight_rows,
            bias,
            out,
            attended,
            partial,
            row_max,
            row_sum,
            q.stride(0),
            q.stride(1),
            kv.stride(0),
            kv.stride(1),
            *_strides(features),
            *_strides(out),
            *_strides(attended),
            batch,
            positions,
            width,
            num_blocks,
            keys_per_split,
            HEAD_DIM=channels,
            Q_SCALE=1.0 if paper else _q_scale(features.dtype),
            PARTIAL=splits > 1,
            EVEN_N=positions % config.block_n == 0,
            D0=d0,
            D1=d1,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_O=min(32, max(16, triton.next_power_of_2(channels))),
            BLOCK_D=min(64, max(16, triton.next_power_of_2(channels))),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **flags,
        )
        if splits > 1:
            merge = pick("merge", generation, kind, channels, batch * positions)
            if splits * merge.block_m > 128:  # addresses of that many rows would spill registers
                merge = merge._replace(block_m=16)
            flags["COMBINE"] = combine
            flags["ATTENDED"] = attended is not None
            num_blocks = triton.cdiv(positions, merge.block_m)
            block_d = min(merge.block_n, max(16, triton.next_power_of_2(channels)))
            launch(
                _attn_merge_kernel,
                (num_blocks * batch, triton.cdiv(channels, block_d)),
                partial,
                row_max,
                row_sum,
                features,
                weight_rows,
                bias,
                out,
                attended if attended is not None else out,
                stats,
                *_strides(features),
                *_strides(out),
                *_strides(attended),
                batch,
                positions,
                width,
                num_blocks,
                HEAD_DIM=channels,
                SPLITS=splits,
                BLOCK_M=merge.block_m,
                BLOCK_O=block_d,
                BLOCK_D=block_d,
                num_warps=merge.num_warps,
                num_stages=_merge_stages(merge, block_d, splits, features.element_size(), generation),
                **flags,
            )
    return stats


def attention_forward(features: Tensor, variant: str, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v over the positions.

    Args:
        features: [B, C, H, W], any strides; see :func:`can_run_attention`.
        variant: "released" or "paper".
        out: where to put the attended features, [B, C, H, W] of the same dtype, any strides.

    Returns:
        attended [B, C, H, W] (`out` where given, else with the strides of ``torch.empty_like(features)``), and
        stats [2, B, H*W] float32: of each query's scores the maximum m (0 in "paper"), and the sum of exp(score - m).
    """
    attended = torch.empty_like(features) if out is None else out
    stats = _forward(features, variant, attended=attended)
    return attended, stats


def attention_block_forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    variant: str,
    *,
    out: Tensor | None = None,
    save_attended: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention and its 1x1 combiner.

    Args:
        features: [B, C, H, W], any strides; see :func:`can_run_attention`.
        weight: [C, 2C, 1, 1], input columns [Wa | Wf] for "released", [Wf | Wa] for "paper".
        bias: [C].
        variant: "released" or "paper".
        out: where to put the result, [B, C, H, W] of the same dtype, any strides.
        save_attended: also return what the backward needs; otherwise `attention_inference` computes the result.

    Returns:
        out [B, C, H, W], attended [B, C, H, W] or None, stats [2, B, H*W] float32 as from
        :func:`attention_forward` or None.
    """
    if not save_attended:
        from .attention_inference import attention_block_inference  # which imports this module

        return attention_block_inference(features, weight, bias, variant, out=out), None, None
    result = torch.empty_like(features) if out is None else out
    attended = torch.empty_like(features)
    stats = _forward(features, variant, weight=weight, bias=bias, out=result, attended=attended)
    return result, attended, stats


def _backward(
    grad_attended: Tensor,
    features: Tensor,
    attended: Tensor,
    stats: Tensor,
    variant: str,
    direct: Tensor | None,
) -> Tensor:
    """dF, with `direct` (the gradient that reaches F past the attention) added."""
    df = torch.empty_like(features)
    batch, channels, height, width = features.shape
    if batch == 0:
        return df
    positions = height * width
    device = features.device
    paper = variant == "paper"
    precision = dot_precision(features.dtype)
    generation, num_sms = device_generation(device)
    kind = config_kind(features.dtype, precision)
    size = batch * positions
    dq_config = pick("backward_dq", generation, kind, channels, size)
    dkv_config = pick("backward_dkv", generation, kind, channels, size)
    d0, d1 = split_head(channels)
    dq_blocks = triton.cdiv(positions, dq_config.block_m)
    dq_splits, keys_per_split = num_splits(dq_blocks * batch, positions, dq_config.block_n, num_sms)
    dkv_blocks = triton.cdiv(positions, dkv_config.block_n)
    dkv_splits, queries_per_split = num_splits(dkv_blocks * batch, positions, dkv_config.block_m, num_sms)
    renorm = features.dtype == torch.float32 and not paper
    rows_shape = (batch, positions, channels)

    def workspace(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with device_guard(features):
        q, k, v, _ = _prepare(features, variant, backward=True)
        rows = _row_blocks(generation, channels, size)
        row_grid = triton.cdiv(positions, rows["BLOCK_P"])
        do = workspace(*rows_shape, dtype=features.dtype)
        delta = workspace(batch, positions)
        launch(
            _attn_bwd_delta_kernel,
            (row_grid * batch,),
            grad_attended,
            attended,
            do,
            delta,
            *_strides(grad_attended),
            *_strides(attended),
            positions,
            width,
            row_grid,
            HEAD_DIM=channels,
            G_FLAT=is_flat(grad_attended),
            A_FLAT=is_flat(attended),
            **rows,
        )
        dq = workspace(dq_splits, *rows_shape)
        sums = workspace(dq_splits, batch, positions) if renorm else None
        shared = {
            "HEAD_DIM": channels,
            "Q_SCALE": 1.0 if paper else _q_scale(features.dtype),
            "SHARED_KV": not paper,
            "RENORM": renorm,
            "PRECISION": precision,
            "D0": d0,
            "D1": d1,
        }
        launch(
            _attn_bwd_dq_kernel,
            (dq_blocks * batch, dq_splits),
            q,
            k,
            v,
            do,
            stats,
            delta,
            dq,
            sums,
            batch,
            positions,
            dq_blocks,
            keys_per_split,
            EVEN_N=positions % dq_config.block_n == 0,
            **shared,
            **dq_config.meta(),
        )

        def dkv(with_dk: bool, with_dv: bool) -> Tensor:
            result = workspace(dkv_splits, *rows_shape)
            launch(
                _attn_bwd_dkv_kernel,
                (dkv_blocks * batch, dkv_splits),
                q,
                k,
                v,
                do,
                stats,
                delta,
                sums,
                result,
                batch,
                positions,
                dkv_blocks,
                queries_per_split,
                WITH_DK=with_dk,
                WITH_DV=with_dv,
                SUMS=dq_splits,
                **shared,
                **dkv_config.meta(),
            )
            return result

        dk = dkv(True, not paper)
        dv = dkv(False, True) if paper else None
        launch(
            _attn_bwd_finish_kernel,
            (row_grid * batch, triton.cdiv(channels, rows["BLOCK_C"])),
            features,
            dq,
            sums,
            dk,
            dv,
            direct,
            df,
            *_strides(features),
            *_strides(direct),
            *_strides(df),
            batch,
            height,
            width,
            row_grid,
            dq_splits,
            dkv_splits,
            HEAD_DIM=channels,
            PAPER=paper,
            RENORM=renorm,
            DIRECT=direct is not None,
            F_FLAT=is_flat(features),
            R_FLAT=direct is None or is_flat(direct),
            O_FLAT=is_flat(df),
            # ptxas may spill registers to fit more programs on a multiprocessor; on an H100 it does not
            **({} if generation == "sm_90" else {"maxnreg": 255}),
            **rows,
        )
    return df


def attention_backward(
    grad_attended: Tensor, features: Tensor, attended: Tensor, stats: Tensor, variant: str
) -> Tensor:
    """Gradient with respect to the features.

    Args:
        grad_attended: [B, C, H, W], any strides, the dtype of `features`.
        features: what the forward was given.
        attended, stats: what :func:`attention_forward` returned.
        variant: "released" or "paper".

    Returns:
        [B, C, H, W], with the strides of ``torch.empty_like(features)``. Deterministic: no atomics.
    """
    return _backward(grad_attended, features, attended, stats, variant, None)


def attention_block_backward(
    grad_out: Tensor,
    features: Tensor,
    attended: Tensor,
    stats: Tensor,
    weight: Tensor,
    variant: str,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to features, weight and bias, as `needs` asks.

    Args:
        grad_out: [B, C, H, W], any strides, the dtype of `features`.
        features, weight, variant: what the forward was given.
        attended, stats: what :func:`attention_block_forward` returned with ``save_attended=True``.

    Returns:
        [B, C, H, W], [C, 2C, 1, 1], [C], each None where not needed.
    """
    _, channels, height, width = features.shape
    paper = variant == "paper"
    df = dw = db = None
    with device_guard(features):
        grad_rows = grad_out.flatten(2)
        if needs[0]:
            columns = weight.reshape(channels, 2 * channels).t()
            grad_pair = torch.matmul(columns, grad_rows).unflatten(2, (height, width))
            grad_a, grad_f = grad_pair[:, :channels], grad_pair[:, channels:]
            if paper:
                grad_a, grad_f = grad_f, grad_a
            df = _backward(grad_a, features, attended, stats, variant, grad_f)
        if needs[1]:
            pair = (features, attended) if paper else (attended, features)
            halves = [torch.einsum("bon,bcn->oc", grad_rows, x.flatten(2)) for x in pair]
            dw = torch.cat(halves, dim=1).reshape(weight.shape)
        if needs[2]:
            db = grad_out.sum(dim=(0, 2, 3))
    return df, dw, db
