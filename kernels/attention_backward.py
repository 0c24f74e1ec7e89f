"""The backward kernels of attention; :mod:`.attention` says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_forward import KEY_SHIFT, LOG2E, NORM_CLAMP, exp_above
from .maps import (
    add_weighted,
    advance,
    head_columns,
    load_tiles,
    position_rows,
    row_products,
    store_tiles,
    tile_masks,
    tile_pointers,
    zero_tiles,
)


@triton.jit
def _attn_bwd_delta_kernel(
    grad,  # Map: grad_attended
    attended,  # Map
    do_ptr,  # [B, N, C] rows: grad_attended
    delta_ptr,  # [B, N] float32
    n_positions,
    width,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """do rows = grad_attended, delta_i = <grad_attended_i, attended_i>."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask = rows < n_positions
    row_index = batch * n_positions + rows
    g_rows = position_rows(grad, batch, rows, width)
    a_rows = position_rows(attended, batch, rows, width)
    delta = tl.zeros([BLOCK_P], dtype=tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        g = tl.load(g_rows[:, None] + cols.to(tl.int64)[None, :] * grad.stride_c, mask=mask, other=0.0)
        a = tl.load(a_rows[:, None] + cols.to(tl.int64)[None, :] * attended.stride_c, mask=mask, other=0.0)
        delta += tl.sum(g.to(tl.float32) * a.to(tl.float32), axis=1)
        tl.store(do_ptr + row_index[:, None] * HEAD_DIM + cols[None, :], g, mask=mask)
    tl.store(delta_ptr + row_index, delta, mask=row_mask)


@triton.jit
def _attn_bwd_dq_kernel(
    q_ptr,  # [B, N, C] rows
    k_ptr,  # [B, N, C] rows
    v_ptr,  # [B, N, C] rows, or None: v = k
    do_ptr,  # [B, N, C] rows
    stats_ptr,  # [2, B, N] float32: m, l
    delta_ptr,  # [B, N] float32
    dq_ptr,  # [splits, B, N, C] float32
    sum_ptr,  # [splits, B, N] float32, or None: sum_j exp(s_ij - m_i)
    n_batch,
    n_positions,
    num_blocks,
    keys_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq_i = sum_j ds_ij k_j, ds = p (dp - delta), p = exp(s - m) / l, dp = do v^T; BLOCK_M queries per program.

    With `sum_ptr`, dq is not divided by l: the finish kernel divides it by the more accurate recomputed sums.
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
    cols = head_columns(D0, D1)
    first_row = batch * n_positions
    m_base = (first_row + start_m) * HEAD_DIM
    n_base = (first_row + begin) * HEAD_DIM
    m_masks = tile_masks(row_mask, cols, HEAD_DIM)
    q = load_tiles(tile_pointers(q_ptr + m_base, rows, HEAD_DIM, cols), m_masks)
    do = load_tiles(tile_pointers(do_ptr + m_base, rows, HEAD_DIM, cols), m_masks)
    k_ptrs = tile_pointers(k_ptr + n_base, keys, HEAD_DIM, cols)
    if v_ptr is not None:
        v_ptrs = tile_pointers(v_ptr + n_base, keys, HEAD_DIM, cols)
    acc = zero_tiles(BLOCK_M, D0, D1)
    positions = start_m + rows
    # in units of the stored scores
    row_max = tl.load(stats_ptr + first_row + positions, mask=row_mask, other=0.0) * Q_SCALE
    LOG2E_SCALE: tl.constexpr = LOG2E / Q_SCALE
    delta = tl.load(delta_ptr + first_row + positions, mask=row_mask, other=0.0)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sum_ptr is None:
        all_rows = tl.full([], 1, tl.int64) * n_batch * n_positions
        inverse = 1.0 / tl.load(stats_ptr + all_rows + first_row + positions, mask=row_mask, other=1.0)
        delta *= inverse

    for start_n in tl.range(begin, end, BLOCK_N):
        key_mask = start_n + keys < end
        n_masks = tile_masks(key_mask, cols, HEAD_DIM)
        k = load_tiles(k_ptrs, n_masks)
        if v_ptr is not None:
            v = load_tiles(v_ptrs, n_masks)
            v_ptrs = advance(v_ptrs, BLOCK_N * HEAD_DIM)
        else:
            v = k
        scores = row_products(q, k, BLOCK_M, BLOCK_N, PRECISION)
        dp = row_products(do, v, BLOCK_M, BLOCK_N, PRECISION)
        if not EVEN_N:
            scores = tl.where(key_mask[None, :], scores, float("-inf"))
        p = exp_above(scores, row_max[:, None], LOG2E_SCALE, k_ptr.dtype.element_ty)
        if sum_ptr is not None:
            total += tl.sum(p, axis=1)
        else:
            dp *= inverse[:, None]
        ds = (p * (dp - delta[:, None])).to(k_ptr.dtype.element_ty)
        acc = add_weighted(acc, ds, k, PRECISION)
        k_ptrs = advance(k_ptrs, BLOCK_N * HEAD_DIM)

    row_index = (split.to(tl.int64) * n_batch + batch) * n_positions + positions
    if sum_ptr is not None:
        tl.store(sum_ptr + row_index, total, mask=row_mask)
    store_tiles(tile_pointers(dq_ptr, row_index, HEAD_DIM, cols), acc, m_masks)


@triton.jit
def _attn_bwd_dkv_kernel(
    q_ptr,  # [B, N, C] rows
    k_ptr,  # [B, N, C] rows
    v_ptr,  # [B, N, C] rows, or None: v = k
    do_ptr,  # [B, N, C] rows
    stats_ptr,  # [2, B, N] float32: m, l
    delta_ptr,  # [B, N] float32
    sum_ptr,  # [SUMS, B, N] float32 that replaces l, or None
    dkv_ptr,  # [splits, B, N, C] float32
    n_batch,
    n_positions,
    num_blocks,
    queries_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum_i ds_ij q_i (WITH_DK) + sum_i p_ij do_i (WITH_DV); BLOCK_N keys per program; scores are transposed."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_n = (tl.program_id(0) % num_blocks) * BLOCK_N
    split = tl.program_id(1)
    begin = split * queries_per_split
    end = tl.minimum(begin + queries_per_split, n_positions)
    tl.assume(begin < end)  # as in the forward

    keys = tl.arange(0, BLOCK_N)
    key_mask = start_n + keys < n_positions
    rows = tl.arange(0, BLOCK_M)
    cols = head_columns(D0, D1)
    first_row = batch * n_positions
    n_base = (first_row + start_n) * HEAD_DIM
    m_base = (first_row + begin) * HEAD_DIM
    n_masks = tile_masks(key_mask, cols, HEAD_DIM)
    k = load_tiles(tile_pointers(k_ptr + n_base, keys, HEAD_DIM, cols), n_masks)
    if WITH_DK and v_ptr is not None:
        v = load_tiles(tile_pointers(v_ptr + n_base, keys, HEAD_DIM, cols), n_masks)
    else:
        v = k
    q_ptrs = tile_pointers(q_ptr + m_base, rows, HEAD_DIM, cols)
    do_ptrs = tile_pointers(do_ptr + m_base, rows, HEAD_DIM, cols)
    acc = zero_tiles(BLOCK_N, D0, D1)
    split_rows = tl.full([], 1, tl.int64) * n_batch * n_positions
    LOG2E_SCALE: tl.constexpr = LOG2E / Q_SCALE

    for start_m in tl.range(begin, end, BLOCK_M):
        row_mask = start_m + rows < end
        row_index = first_row + start_m + rows
        m_masks = tile_masks(row_mask, cols, HEAD_DIM)
        q = load_tiles(q_ptrs, m_masks)
        do = load_tiles(do_ptrs, m_masks)
        scores = row_products(k, q, BLOCK_N, BLOCK_M, PRECISION)
        if WITH_DK:
            dp = row_products(v, do, BLOCK_N, BLOCK_M, PRECISION)
        # m = +inf past the end makes p = 0 there
        row_max = tl.load(stats_ptr + row_index, mask=row_mask, other=float("inf")) * Q_SCALE
        p = exp_above(scores, row_max[None, :], LOG2E_SCALE, k_ptr.dtype.element_ty)
        if sum_ptr is not None:
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
            for s in tl.static_range(SUMS):
                total += tl.load(sum_ptr + s * split_rows + row_index, mask=row_mask, other=1.0)
        else:
            total = tl.load(stats_ptr + split_rows + row_index, mask=row_mask, other=1.0)
        p *= (1.0 / total)[None, :]
        if WITH_DV:
            acc = add_weighted(acc, p.to(k_ptr.dtype.element_ty), do, PRECISION)
        if WITH_DK:
            delta = tl.load(delta_ptr + row_index, mask=row_mask, other=0.0)
            ds = (p * ((dp - delta[None, :]) * (1.0 / Q_SCALE))).to(k_ptr.dtype.element_ty)
            acc = add_weighted(acc, ds, q, PRECISION)
        q_ptrs = advance(q_ptrs, BLOCK_M * HEAD_DIM)
        do_ptrs = advance(do_ptrs, BLOCK_M * HEAD_DIM)

    out_rows = (split.to(tl.int64) * n_batch + batch) * n_positions + start_n + keys
    store_tiles(tile_pointers(dkv_ptr, out_rows, HEAD_DIM, cols), acc, n_masks)


@triton.jit
def _sum_splits(ptrs, split_stride, mask, splits):
    """Sum over the leading split dimension of a float32 workspace. The loop is not unrolled: it would spill."""
    total = tl.load(ptrs, mask=mask, other=0.0)
    for s in range(1, splits):
        total += tl.load(ptrs + s * split_stride, mask=mask, other=0.0)
    return total


@triton.jit
def _attn_bwd_finish_kernel(
    features,  # Map
    dq_ptr,  # [dq_splits, B, N, C] float32
    sum_ptr,  # [dq_splits, B, N] float32 that dq has to be divided by, or None
    dk_ptr,  # [dkv_splits, B, N, C] float32: dk + dv (released), dk (paper)
    dv_ptr,  # [dkv_splits, B, N, C] float32 where PAPER, else None
    direct,  # Map, or ABSENT: gradient that reaches F past the attention
    df,  # Map
    n_batch,
    height,
    width,
    num_blocks,
    dq_splits,
    dkv_splits,
    HEAD_DIM: tl.constexpr,
    PAPER: tl.constexpr,
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
    f_rows = position_rows(features, batch, rows, width)

    square = tl.zeros([BLOCK_P], dtype=tl.float32)
    inner = tl.zeros([BLOCK_P], dtype=tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
        x = tl.load(f_rows[:, None] + cols.to(tl.int64)[None, :] * features.stride_c, mask=mask, other=0.0)
        x = x.to(tl.float32)
        offsets = row_index[:, None] * HEAD_DIM + cols[None, :]
        g = _sum_splits(dk_ptr + offsets, split_stride, mask, dkv_splits)
        if PAPER:
            g += _sum_splits(dq_ptr + offsets, split_stride, mask, dq_splits)
        else:
            x = tl.where(mask, x + KEY_SHIFT, 0.0)
        square += tl.sum(x * x, axis=1)
        inner += tl.sum(x * g, axis=1)
    norm = tl.sqrt(square)
    if PAPER:
        inverse = 1.0 / tl.maximum(norm, NORM_CLAMP)
        # below the clamp the denominator is a constant
        slope = tl.where(norm >= NORM_CLAMP, (inner * inverse) * inverse, 0.0)
    else:
        inverse = 1.0 / tl.where(row_mask, norm, 1.0)
        slope = (inner * inverse) * inverse

    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
    col_offsets = cols.to(tl.int64)[None, :]
    offsets = row_index[:, None] * HEAD_DIM + cols[None, :]
    x = tl.load(f_rows[:, None] + col_offsets * features.stride_c, mask=mask, other=0.0).to(tl.float32)
    g = _sum_splits(dk_ptr + offsets, split_stride, mask, dkv_splits)
    if PAPER:
        g += _sum_splits(dq_ptr + offsets, split_stride, mask, dq_splits)
        rest = _sum_splits(dv_ptr + offsets, split_stride, mask, dkv_splits)
    else:
        x += KEY_SHIFT
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
                if sum_ptr is not None:
                    total = tl.load(sum_ptr + near, mask=inside, other=1.0)
                    for s in range(1, dq_splits):
                        total += tl.load(sum_ptr + s * split_rows + near, mask=inside, other=0.0)
                    part = part / total[:, None]
                rest += part
    gradient = (g - x * slope[:, None]) * inverse[:, None] + rest
    if direct.ptr is not None:
        r_rows = position_rows(direct, batch, rows, width)
        gradient += tl.load(r_rows[:, None] + col_offsets * direct.stride_c, mask=mask, other=0.0).to(tl.float32)
    o_rows = position_rows(df, batch, rows, width)
    tl.store(o_rows[:, None] + col_offsets * df.stride_c, gradient.to(df.ptr.dtype.element_ty), mask=mask)
