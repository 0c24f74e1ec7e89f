"""The attention block where nothing is saved for a backward: values projected first, few and short kernels.

The combiner is linear, so it can go before the weighted sum::

    out_i = sum_j softmax_j(q_i . k_j) (v_j Wa^T) + (F_i Wf^T + bias)

`_attn_project_kernel` reads F once and writes the rows q, k, v' = v Wa^T and r = F Wf^T + bias; "released" has
v = k = F / ||F||, so v' is the product of F, divided by the norm afterwards. `_attn_weigh_kernel` walks the keys: a
program owns BLOCK_M queries and BLOCK_V columns of v' and ends with out = activation(sum + r). With splits over the
keys it writes partial results, and `_attn_sum_kernel` weighs and adds them: no product is left for it, unlike
`attention._attn_merge_kernel`, which would read every partial result once for each block of output channels.

On an H100 the three blocks of LGNet at 256x256 are bound by latency, not by their 9.8 GFLOP: 16x16x512 has four
blocks of queries. Columns of v' are cut for it (each program then makes the scores anew, which is cheap at 256 keys),
the keys at 64x64x128.
Bytes at N = 4096, C = 128, 16 bit: F 1 MiB read; q, k, v', r 5 MiB written and read; partial results 2 MiB a split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import _KEY_SHIFT, _LOG2E, _NORM_CLAMP, _exp, _q_scale, _strides, split_head
from .configs import Inference, config_kind, device_generation, num_splits, pick_inference
from .launch import (
    ACTIVATIONS,
    activate,
    device_guard,
    dot,
    dot_precision,
    is_flat,
    launch,
    overlapping,
    position_offsets,
)


class _Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    channels: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.height * self.width


@triton.jit
def _attn_project_kernel(
    f_ptr,  # [B, C, H, W], any strides
    w_ptr,  # [C, 2C]
    bias_ptr,  # [C]
    q_ptr,  # [B, N, C]: box sums * q_scale (released), normalised F (paper)
    k_ptr,  # [B, N, C]: normalised keys; not written where PAPER (the same as q)
    v_ptr,  # [B, N, C]: values times Wa^T
    r_ptr,  # [B, N, C] float32: F Wf^T + bias
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
    FLAT: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns BLOCK_O columns of every result for BLOCK_P positions; it reads all channels of them."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_positions = height * width
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask = rows < n_positions
    cols = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    col_mask = cols < HEAD_DIM
    mask = row_mask[:, None] & col_mask[None, :]
    f_base = f_ptr + batch * stride_fb
    f_rows = f_base + position_offsets(rows, width, stride_fh, stride_fw, FLAT)
    wa_ptr = w_ptr + HEAD_DIM if PAPER else w_ptr
    wf_ptr = w_ptr if PAPER else w_ptr + HEAD_DIM

    squares = tl.zeros([BLOCK_P], dtype=tl.float32)
    value = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
    rest = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
    for start in tl.range(0, HEAD_DIM, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        depth_mask = depth < HEAD_DIM
        f_mask = row_mask[:, None] & depth_mask[None, :]
        f = tl.load(f_rows[:, None] + depth.to(tl.int64)[None, :] * stride_fc, mask=f_mask, other=0.0)
        w_offsets = cols[:, None] * (2 * HEAD_DIM) + depth[None, :]
        w_mask = col_mask[:, None] & depth_mask[None, :]
        wa = tl.load(wa_ptr + w_offsets, mask=w_mask, other=0.0)
        wf = tl.load(wf_ptr + w_offsets, mask=w_mask, other=0.0)
        key = f.to(tl.float32)
        if not PAPER:
            key = tl.where(f_mask, key + _KEY_SHIFT, 0.0)
        squares += tl.sum(key * key, axis=1)
        value = dot(key.to(f.dtype), tl.trans(wa), value, PRECISION)
        rest = dot(f, tl.trans(wf), rest, PRECISION)
    norm = tl.sqrt(squares)
    if PAPER:
        norm = tl.maximum(norm, _NORM_CLAMP)
    inverse = 1.0 / tl.where(row_mask, norm, 1.0)

    out = (batch * n_positions + rows.to(tl.int64))[:, None] * HEAD_DIM + cols[None, :]
    if not PAPER:
        value = value * inverse[:, None]
    tl.store(v_ptr + out, value.to(v_ptr.dtype.element_ty), mask=mask)
    rest += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(r_ptr + out, rest, mask=mask)

    col_offsets = cols.to(tl.int64)[None, :] * stride_fc
    own = tl.load(f_rows[:, None] + col_offsets, mask=mask, other=0.0).to(tl.float32)
    if PAPER:
        tl.store(q_ptr + out, (own * inverse[:, None]).to(q_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(k_ptr + out, ((own + _KEY_SHIFT) * inverse[:, None]).to(k_ptr.dtype.element_ty), mask=mask)
        h = rows // width
        w = rows % width
        box = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
        for dh in tl.static_range(-1, 2):
            for dw in tl.static_range(-1, 2):
                inside = (h + dh >= 0) & (h + dh < height) & (w + dw >= 0) & (w + dw < width)
                near = f_base + position_offsets(rows + dh * width + dw, width, stride_fh, stride_fw, FLAT)
                near_mask = mask & inside[:, None]
                box += tl.load(near[:, None] + col_offsets, mask=near_mask, other=0.0).to(tl.float32)
        tl.store(q_ptr + out, (box * q_scale).to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attn_weigh_kernel(
    q_ptr,  # [B, N, C]
    k_ptr,  # [B, N, C]
    v_ptr,  # [B, N, C]
    r_ptr,  # [B, N, C] float32, read where not PARTIAL
    out_ptr,  # [B, C, H, W], written where not PARTIAL
    partial_ptr,  # [splits, B, N, C] float32, written where PARTIAL, divided by its own sum
    max_ptr,  # [splits, B, N] float32, written where PARTIAL, in units of the stored scores
    sum_ptr,  # [splits, B, N] float32, written where PARTIAL: sum of exp(score - max)
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    n_batch,
    n_positions,
    width,
    num_blocks,
    keys_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,  # factor of the stored q
    PAPER: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN_N: tl.constexpr,
    O_FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_M queries and BLOCK_V columns, and walks the keys of one split."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    v_blocks: tl.constexpr = (HEAD_DIM + BLOCK_V - 1) // BLOCK_V
    block = tl.program_id(0) // v_blocks
    start_v = tl.program_id(0) % v_blocks * BLOCK_V
    batch = (block // num_blocks).to(tl.int64)
    start_m = block % num_blocks * BLOCK_M
    split = tl.program_id(1)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, n_positions)
    tl.assume(begin < end)  # without it ptxas serialises the matrix products (Triton 3.6)

    rows = tl.arange(0, BLOCK_M)
    row_mask = start_m + rows < n_positions
    keys = tl.arange(0, BLOCK_N)
    cols0 = tl.arange(0, D0)
    vcols = start_v + tl.arange(0, BLOCK_V)
    first = batch * n_positions
    q_rows = q_ptr + (first + start_m + rows)[:, None] * HEAD_DIM
    q0 = tl.load(q_rows + cols0[None, :], mask=row_mask[:, None] & (cols0 < HEAD_DIM)[None, :], other=0.0)
    k0_ptrs = k_ptr + (first + begin + keys)[:, None] * HEAD_DIM + cols0[None, :]
    v_ptrs = v_ptr + (first + begin + keys)[:, None] * HEAD_DIM + vcols[None, :]
    if D1 > 0:
        cols1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_rows + cols1[None, :], mask=row_mask[:, None] & (cols1 < HEAD_DIM)[None, :], other=0.0)
        k1_ptrs = k_ptr + (first + begin + keys)[:, None] * HEAD_DIM + cols1[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
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
        if not EVEN_N:
            scores = tl.where(key_mask[None, :], scores, float("-inf"))
        v = tl.load(v_ptrs, mask=key_mask[:, None] & (vcols < HEAD_DIM)[None, :], other=0.0)
        if PAPER:  # cosines: no running maximum
            p = tl.exp2(scores * LOG2E_SCALE)
            total += tl.sum(p, axis=1)
        else:
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            p = _exp(scores, new_max[:, None], LOG2E_SCALE, v_ptr.dtype.element_ty)
            alpha = tl.exp2((running_max - new_max) * LOG2E_SCALE)
            total = total * alpha + tl.sum(p, axis=1)
            acc = acc * alpha[:, None]
            running_max = new_max
        acc = dot(p.to(v_ptr.dtype.element_ty), v, acc, PRECISION)
        k0_ptrs += BLOCK_N * HEAD_DIM
        v_ptrs += BLOCK_N * HEAD_DIM
        if D1 > 0:
            k1_ptrs += BLOCK_N * HEAD_DIM

    positions = start_m + rows
    mask = row_mask[:, None] & (vcols < HEAD_DIM)[None, :]
    acc = acc * (1.0 / total)[:, None]
    if PARTIAL:
        row_max = tl.zeros([BLOCK_M], dtype=tl.float32) if PAPER else running_max
        row_index = (split.to(tl.int64) * n_batch + batch) * n_positions + positions
        own = positions < tl.where(start_v == 0, n_positions, 0)
        tl.store(max_ptr + row_index, row_max, mask=own)
        tl.store(sum_ptr + row_index, total, mask=own)
        tl.store(partial_ptr + row_index[:, None] * HEAD_DIM + vcols[None, :], acc, mask=mask)
    else:
        r = tl.load(r_ptr + (first + positions)[:, None] * HEAD_DIM + vcols[None, :], mask=mask, other=0.0)
        y = activate(acc + r, ACTIVATION)
        o_ptrs = out_ptr + batch * stride_ob + position_offsets(positions, width, stride_oh, stride_ow, O_FLAT)
        tl.store(o_ptrs[:, None] + vcols.to(tl.int64)[None, :] * stride_oc, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attn_sum_kernel(
    partial_ptr,  # [SPLITS, B, N, C] float32
    max_ptr,  # [SPLITS, B, N] float32
    sum_ptr,  # [SPLITS, B, N] float32
    r_ptr,  # [B, N, C] float32
    out_ptr,  # [B, C, H, W]
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    n_batch,
    n_positions,
    width,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    O_FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out = activation(sum_s share_s partial_s + r), share_s = sum_s exp(max_s) over the total of all splits."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    positions = (tl.program_id(0) % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = positions < n_positions
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
    row_index = batch * n_positions + positions
    split_rows = tl.full([], 1, tl.int64) * n_batch * n_positions

    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        best = tl.maximum(best, tl.load(max_ptr + s * split_rows + row_index, mask=row_mask, other=0.0))
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    merged = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        index = s * split_rows + row_index
        row_max = tl.load(max_ptr + index, mask=row_mask, other=0.0)
        weight = tl.load(sum_ptr + index, mask=row_mask, other=1.0) * tl.exp2((row_max - best) * (_LOG2E / Q_SCALE))
        part = tl.load(partial_ptr + index[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0)
        merged += part * weight[:, None]
        total += weight
    r = tl.load(r_ptr + row_index[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0)
    y = activate(merged * (1.0 / total)[:, None] + r, ACTIVATION)
    o_ptrs = out_ptr + batch * stride_ob + position_offsets(positions, width, stride_oh, stride_ow, O_FLAT)
    tl.store(o_ptrs[:, None] + cols.to(tl.int64)[None, :] * stride_oc, y.to(out_ptr.dtype.element_ty), mask=mask)


def attention_block_inference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    variant: str,
    *,
    out: Tensor | None = None,
    activation: str = "none",
    overlap: bool = False,
) -> Tensor:
    """Attention and its 1x1 combiner, nothing kept for a backward.

    Args:
        features: [B, C, H, W], any strides; see :func:`.attention.can_run_attention`.
        weight: [C, 2C, 1, 1], input columns [Wa | Wf] for "released", [Wf | Wa] for "paper".
        bias: [C].
        variant: "released" or "paper".
        out: where to put the result, [B, C, H, W] of the same dtype, any strides.
        activation: a key of ACTIVATIONS.
        overlap: start each kernel while the launch before it still runs (compute capability 9.0, see `conv`).

    Returns:
        [B, C, H, W]: `out` where given, else with the strides of ``torch.empty_like(features)``.
    """
    result = torch.empty_like(features) if out is None else out
    shape = _Shape(*features.shape)
    if shape.batch == 0:
        return result
    dtype, device = features.dtype, features.device
    precision = dot_precision(dtype)
    generation, num_sms = device_generation(device)
    config = pick_inference(
        generation, config_kind(dtype, precision), shape.channels, shape.positions, shape.batch, num_sms
    )
    paper = variant == "paper"
    size = (shape.batch, shape.positions, shape.channels)
    rows = torch.empty((2 if paper else 3, *size), dtype=dtype, device=device)
    q, v, k = rows[0], rows[1], rows[0 if paper else 2]
    r = torch.empty(size, dtype=torch.float32, device=device)
    shared: dict[str, Any] = {"OVERLAP": overlap, **overlapping(overlap)}
    with device_guard(features):
        _project(features, weight, bias, (q, k, v, r), paper, config, precision, shared)
        _weigh((q, k, v, r), result, shape, paper, config, ACTIVATIONS[activation], precision, num_sms, shared)
    return result


def _project(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    paper: bool,
    config: Inference,
    precision: str,
    shared: dict[str, Any],
) -> None:
    batch, channels, height, width = features.shape
    num_blocks = triton.cdiv(height * width, config.project_p)
    launch(
        _attn_project_kernel,
        (num_blocks * batch, triton.cdiv(channels, config.project_o)),
        features,
        weight.reshape(channels, 2 * channels).contiguous(),
        bias.contiguous(),
        *rows,
        *_strides(features),
        height,
        width,
        num_blocks,
        1.0 if paper else _q_scale(features.dtype),
        HEAD_DIM=channels,
        PAPER=paper,
        FLAT=is_flat(features),
        PRECISION=precision,
        BLOCK_P=config.project_p,
        BLOCK_O=config.project_o,
        BLOCK_D=config.project_d,
        num_warps=4,
        num_stages=3 if precision == "ieee" and features.dtype != torch.float32 else 2,
        **shared,
    )


def _weigh(
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    shape: _Shape,
    paper: bool,
    config: Inference,
    activation: int,
    precision: str,
    num_sms: int,
    shared: dict[str, Any],
) -> None:
    q, _, _, r = rows
    batch, channels, _, width = shape
    positions = shape.positions
    num_blocks = triton.cdiv(positions, config.block_m)
    programs = num_blocks * batch * triton.cdiv(channels, config.block_v)
    splits, keys_per_split = num_splits(programs, positions, config.block_n, num_sms, config.max_splits)
    partial = row_max = row_sum = None
    if splits > 1:
        partial = torch.empty((splits, batch, positions, channels), dtype=torch.float32, device=q.device)
        row_max, row_sum = torch.empty((2, splits, batch, positions), dtype=torch.float32, device=q.device)
    d0, d1 = split_head(channels)
    place = {
        "HEAD_DIM": channels,
        "Q_SCALE": 1.0 if paper else _q_scale(q.dtype),
        "O_FLAT": is_flat(out),
        "ACTIVATION": activation,
        **shared,
    }
    launch(
        _attn_weigh_kernel,
        (programs, splits),
        *rows,
        out,
        partial,
        row_max,
        row_sum,
        *_strides(out),
        batch,
        positions,
        width,
        num_blocks,
        keys_per_split,
        PAPER=paper,
        PARTIAL=splits > 1,
        EVEN_N=positions % config.block_n == 0,
        PRECISION=precision,
        D0=d0,
        D1=d1,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **place,
    )
    if splits > 1:
        num_blocks = triton.cdiv(positions, config.sum_m)
        block_v = min(128, triton.next_power_of_2(channels))
        launch(
            _attn_sum_kernel,
            (num_blocks * batch, triton.cdiv(channels, block_v)),
            partial,
            row_max,
            row_sum,
            r,
            out,
            *_strides(out),
            batch,
            positions,
            width,
            num_blocks,
            SPLITS=splits,
            BLOCK_M=config.sum_m,
            BLOCK_V=block_v,
            num_warps=4,
            num_stages=1,
            **place,
        )
