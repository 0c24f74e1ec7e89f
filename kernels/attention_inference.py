"""The attention block for inference: nothing is saved for a backward, values are projected first.

The combiner is linear, so it can be applied before the weighted sum::

    out_i = sum_j softmax_j(q_i . k_j) (v_j Wa^T) + (F_i Wf^T + bias)

`_attn_project_kernel` reads F once and writes the rows q, k, v' = v Wa^T and r = F Wf^T + bias. In "released"
v = k = F / ||F||, so v' is F Wa^T divided by the norm. `_attn_weigh_kernel` loops over the keys: a program computes
BLOCK_M queries and BLOCK_V columns of v' and ends with out = activation(sum + r). With splits over the keys it writes
partial results, which `_attn_sum_kernel` weights and adds. That kernel has no matrix product, unlike
`attention._attn_merge_kernel`, which reads every partial result once for each block of output channels. On Hopper one
launch of :mod:`.hopper_attention` takes the place of both where it was measured as faster (`Inference.hopper`).

A restricted run needs some rows of the map only: the queries are theirs, the keys are all positions. The fewer blocks
of queries there are, the more splits the keys get.

On an H100 the three blocks of LGNet at 256x256 are bound by latency, not by their 9.8 GFLOP: 16x16x512 has only four
blocks of queries. There the columns of v' are split over programs, each of which recomputes the scores, which is
cheap at 256 keys. At 64x64x128 the keys are split.
Bytes at N = 4096, C = 128, 16 bit: F 1 MiB read; q, k, v', r 5 MiB written and read; partial results 2 MiB a split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper_attention
from .attention_forward import KEY_SHIFT, LOG2E, NORM_CLAMP, AttentionCall, exp_above, weight_halves
from .cards import card_with
from .configs import Inference, inference_splits, pick_inference
from .hopper_attention import AttentionTile
from .launch import ACTIVATIONS, activate, device_guard, dot, launch, overlapping
from .maps import (
    advance,
    as_map,
    head_columns,
    load_tiles,
    position_rows,
    row_products,
    tile_masks,
    tile_pointers,
)


class Projected(NamedTuple):
    """Results of the projection, rows [B, N, C] each.

    q: box sums * q_scale (released), normalised F (paper). k: normalised keys; in "paper" not written, as it equals
    q.
    v: values times Wa^T. r: F Wf^T + bias in float32.
    """

    q: Any
    k: Any
    v: Any
    r: Any


class Partial(NamedTuple):
    """Results of the splits of the keys, float32.

    rows: [splits, B, queries, C], divided by `sum`. max: [splits, B, queries], in units of the stored scores.
    sum: [splits, B, queries], of exp(score - max).
    """

    rows: Any
    max: Any
    sum: Any


@triton.jit
def _attn_project_kernel(
    features,  # Map
    w_ptr,  # [C, 2C]
    bias_ptr,  # [C]
    projected,  # Projected
    height,
    width,
    num_blocks,
    q_scale,
    HEAD_DIM: tl.constexpr,
    PAPER: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program computes BLOCK_O columns of every result for BLOCK_P positions, from all their channels."""
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
    f_rows = position_rows(features, batch, rows, width)
    wa_ptr, wf_ptr = weight_halves(w_ptr, HEAD_DIM, PAPER)

    squares = tl.zeros([BLOCK_P], dtype=tl.float32)
    value = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
    rest = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
    for start in tl.range(0, HEAD_DIM, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        depth_mask = depth < HEAD_DIM
        f_mask = row_mask[:, None] & depth_mask[None, :]
        f = tl.load(f_rows[:, None] + depth.to(tl.int64)[None, :] * features.stride_c, mask=f_mask, other=0.0)
        w_offsets = cols[:, None] * (2 * HEAD_DIM) + depth[None, :]
        w_mask = col_mask[:, None] & depth_mask[None, :]
        wa = tl.load(wa_ptr + w_offsets, mask=w_mask, other=0.0)
        wf = tl.load(wf_ptr + w_offsets, mask=w_mask, other=0.0)
        key = f.to(tl.float32)
        if not PAPER:
            key = tl.where(f_mask, key + KEY_SHIFT, 0.0)
        squares += tl.sum(key * key, axis=1)
        value = dot(key.to(f.dtype), tl.trans(wa), value, PRECISION)
        rest = dot(f, tl.trans(wf), rest, PRECISION)
    norm = tl.sqrt(squares)
    if PAPER:
        norm = tl.maximum(norm, NORM_CLAMP)
    inverse = 1.0 / tl.where(row_mask, norm, 1.0)

    out = (batch * n_positions + rows.to(tl.int64))[:, None] * HEAD_DIM + cols[None, :]
    if not PAPER:
        value = value * inverse[:, None]
    tl.store(projected.v + out, value.to(projected.v.dtype.element_ty), mask=mask)
    rest += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(projected.r + out, rest, mask=mask)

    col_offsets = cols.to(tl.int64)[None, :] * features.stride_c
    own = tl.load(f_rows[:, None] + col_offsets, mask=mask, other=0.0).to(tl.float32)
    if PAPER:
        tl.store(projected.q + out, (own * inverse[:, None]).to(projected.q.dtype.element_ty), mask=mask)
    else:
        key = (own + KEY_SHIFT) * inverse[:, None]
        tl.store(projected.k + out, key.to(projected.k.dtype.element_ty), mask=mask)
        h = rows // width
        w = rows % width
        box = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
        for dh in tl.static_range(-1, 2):
            for dw in tl.static_range(-1, 2):
                inside = (h + dh >= 0) & (h + dh < height) & (w + dw >= 0) & (w + dw < width)
                near = position_rows(features, batch, rows + dh * width + dw, width)
                near_mask = mask & inside[:, None]
                box += tl.load(near[:, None] + col_offsets, mask=near_mask, other=0.0).to(tl.float32)
        tl.store(projected.q + out, (box * q_scale).to(projected.q.dtype.element_ty), mask=mask)


@triton.jit
def _store_activated(value, out, batch, positions, width, cols, mask, ACTIVATION: tl.constexpr):
    """Store activation(value) [positions, channels] in a `Map`."""
    y = activate(value, ACTIVATION).to(out.ptr.dtype.element_ty)
    o_rows = position_rows(out, batch, positions, width)
    tl.store(o_rows[:, None] + cols.to(tl.int64)[None, :] * out.stride_c, y, mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def _attn_weigh_kernel(
    projected,  # Projected
    out,  # Map, written where the keys are not split
    partial,  # Partial, or None
    n_batch,
    n_positions,
    first_query,
    n_queries,
    width,
    num_blocks,
    keys_per_split,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,  # factor of the stored q
    PAPER: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program computes BLOCK_M queries and BLOCK_V columns over the keys of one split.

    The queries are the positions [first_query, first_query + n_queries).
    """
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
    row_mask = start_m + rows < n_queries
    start_q = first_query + start_m
    keys = tl.arange(0, BLOCK_N)
    cols = head_columns(D0, D1)
    v_cols = start_v + tl.arange(0, BLOCK_V)
    first = batch * n_positions
    q_ptrs = tile_pointers(projected.q, first + start_q + rows, HEAD_DIM, cols)
    q = load_tiles(q_ptrs, tile_masks(row_mask, cols, HEAD_DIM))
    k_ptrs = tile_pointers(projected.k, first + begin + keys, HEAD_DIM, cols)
    v_ptrs = projected.v + (first + begin + keys)[:, None] * HEAD_DIM + v_cols[None, :]
    DTYPE: tl.constexpr = projected.v.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    LOG2E_SCALE: tl.constexpr = LOG2E / Q_SCALE

    for start_n in tl.range(begin, end, BLOCK_N):
        key_mask = start_n + keys < end
        k = load_tiles(k_ptrs, tile_masks(key_mask, cols, HEAD_DIM))
        scores = row_products(q, k, BLOCK_M, BLOCK_N, PRECISION)
        if not EVEN_N:
            scores = tl.where(key_mask[None, :], scores, float("-inf"))
        v = tl.load(v_ptrs, mask=key_mask[:, None] & (v_cols < HEAD_DIM)[None, :], other=0.0)
        if PAPER:  # cosines: no running maximum
            p = tl.exp2(scores * LOG2E_SCALE)
            total += tl.sum(p, axis=1)
        else:
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            p = exp_above(scores, new_max[:, None], LOG2E_SCALE, DTYPE)
            alpha = tl.exp2((running_max - new_max) * LOG2E_SCALE)
            total = total * alpha + tl.sum(p, axis=1)
            acc = acc * alpha[:, None]
            running_max = new_max
        acc = dot(p.to(DTYPE), v, acc, PRECISION)
        k_ptrs = advance(k_ptrs, BLOCK_N * HEAD_DIM)
        v_ptrs += BLOCK_N * HEAD_DIM

    positions = start_q + rows
    mask = row_mask[:, None] & (v_cols < HEAD_DIM)[None, :]
    acc = acc * (1.0 / total)[:, None]
    if partial is not None:
        row_max = tl.zeros([BLOCK_M], dtype=tl.float32) if PAPER else running_max
        row_index = (split.to(tl.int64) * n_batch + batch) * n_queries + start_m + rows
        own = start_m + rows < tl.where(start_v == 0, n_queries, 0)
        tl.store(partial.max + row_index, row_max, mask=own)
        tl.store(partial.sum + row_index, total, mask=own)
        tl.store(partial.rows + row_index[:, None] * HEAD_DIM + v_cols[None, :], acc, mask=mask)
    else:
        r = tl.load(projected.r + (first + positions)[:, None] * HEAD_DIM + v_cols[None, :], mask=mask, other=0.0)
        _store_activated(acc + r, out, batch, positions, width, v_cols, mask, ACTIVATION)


@triton.jit(do_not_specialize=["num_blocks"])
def _attn_sum_kernel(
    partial,  # Partial
    r_ptr,  # [B, N, C] float32
    out,  # Map
    n_batch,
    n_positions,
    first_query,
    n_queries,
    width,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    Q_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
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
    queries = (tl.program_id(0) % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = queries < n_queries
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
    row_index = batch * n_queries + queries
    split_rows = tl.full([], 1, tl.int64) * n_batch * n_queries

    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        best = tl.maximum(best, tl.load(partial.max + s * split_rows + row_index, mask=row_mask, other=0.0))
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    merged = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        index = s * split_rows + row_index
        row_max = tl.load(partial.max + index, mask=row_mask, other=0.0)
        weight = tl.load(partial.sum + index, mask=row_mask, other=1.0) * tl.exp2(
            (row_max - best) * (LOG2E / Q_SCALE)
        )
        part = tl.load(partial.rows + index[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0)
        merged += part * weight[:, None]
        total += weight
    positions = first_query + queries
    r = tl.load(r_ptr + (batch * n_positions + positions)[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0)
    value = merged * (1.0 / total)[:, None] + r
    _store_activated(value, out, batch, positions, width, cols, mask, ACTIVATION)


def attention_block_inference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    variant: str,
    *,
    out: Tensor | None = None,
    activation: str = "none",
    overlap: bool = False,
    band: tuple[int, int] | None = None,
) -> Tensor:
    """Attention and its 1x1 combiner; nothing is kept for a backward.

    Args:
        features: [B, C, H, W], any strides; see :func:`.attention.can_run_attention`.
        weight: [C, 2C, 1, 1], input columns [Wa | Wf] for "released", [Wf | Wa] for "paper".
        bias: [C].
        variant: "released" or "paper".
        out: where to put the result, [B, C, H, W] of the same dtype, any strides.
        activation: a key of ACTIVATIONS.
        overlap: start each kernel while the launch before it still runs (compute capability 9.0, see `conv`).
        band: rows [top, bottom) of the map to compute, 0 <= top < bottom <= H; the rest of the result is left as it
            is. None: all rows.

    Returns:
        [B, C, H, W]: `out` where given, else with the strides of ``torch.empty_like(features)``.

    Raises:
        ValueError: `band` is no band of rows of the map.
    """
    result = torch.empty_like(features) if out is None else out
    call = AttentionCall.of(features, variant)
    if call.batch == 0:
        return result
    top, bottom = (0, call.height) if band is None else band
    if not 0 <= top < bottom <= call.height:
        raise ValueError(f"band: expected 0 <= top < bottom <= {call.height}, got {band}")
    config = pick_inference(call.generation, call.kind, call.channels, call.positions, call.batch, call.num_sms)
    size = (call.batch, call.positions, call.channels)
    rows = features.new_empty((2 if call.paper else 3, *size))
    r = features.new_empty(size, dtype=torch.float32)
    projected = Projected(rows[0], rows[0 if call.paper else 2], rows[1], r)
    shared: dict[str, Any] = {"OVERLAP": overlap, **overlapping(overlap)}
    with device_guard(features):
        _project(call, features, weight, bias, projected, config, shared)
        queries = top * call.width, (bottom - top) * call.width
        if (tile := _hopper_tile(call, config, queries[1], result)) is None:
            _weigh(call, projected, result, queries, config, shared | {"ACTIVATION": ACTIVATIONS[activation]})
        else:
            hopper_attention.weigh(
                *projected, result, tile,
                scale=LOG2E.value / call.q_scale, queries=queries, activation=activation, overlap=overlap,
            )  # fmt: skip
    return result


def _hopper_tile(call: AttentionCall, config: Inference, queries: int, out: Tensor) -> AttentionTile | None:
    """The tile for `queries` of the positions where `hopper_attention` runs; None: Triton's kernels do."""
    if config.hopper is None or not hopper_attention.can_store(out):
        return None
    if not hopper_attention.usable(call.channels, out.dtype, out.device):
        return None
    if queries == call.positions:
        return AttentionTile(*config.hopper)
    size = call.channels, call.positions, queries, call.batch
    return hopper_attention.best_tile(*size, out.dtype, out.device, card_with(call.generation, call.num_sms))


def _project(
    call: AttentionCall,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    projected: Projected,
    config: Inference,
    shared: dict[str, Any],
) -> None:
    """Fill `projected`."""
    num_blocks = triton.cdiv(call.positions, config.project_p)
    launch(
        _attn_project_kernel,
        (num_blocks * call.batch, triton.cdiv(call.channels, config.project_o)),
        as_map(features),
        weight.reshape(call.channels, 2 * call.channels).contiguous(),
        bias.contiguous(),
        projected,
        call.height,
        call.width,
        num_blocks,
        call.q_scale,
        HEAD_DIM=call.channels,
        PAPER=call.paper,
        PRECISION=call.precision,
        BLOCK_P=config.project_p,
        BLOCK_O=config.project_o,
        BLOCK_D=config.project_d,
        num_warps=4,
        num_stages=3 if call.precision == "ieee" and call.dtype != torch.float32 else 2,
        **shared,
    )


def _weigh(
    call: AttentionCall,
    projected: Projected,
    out: Tensor,
    queries: tuple[int, int],
    config: Inference,
    shared: dict[str, Any],
) -> None:
    """out = activation(softmax-weighted sum of projected.v + projected.r); with splits over the keys two launches.

    queries: the first position that is computed, and the number of positions.
    """
    size = call.channels, queries[1], call.positions, call.batch
    programs, splits, keys_per_split = inference_splits(config, *size, call.num_sms)
    partial = None
    if splits > 1:
        stats = projected.r.new_empty((2, splits, call.batch, queries[1]))
        partial = Partial(projected.r.new_empty((*stats.shape[1:], call.channels)), stats[0], stats[1])
    # without a limit ptxas may spill registers for a higher occupancy, which shared memory does not allow
    limit = {"maxnreg": 255} if call.generation == "sm_89" and 256 < call.channels <= 384 else {}
    launch(
        _attn_weigh_kernel,
        (programs, splits),
        projected,
        as_map(out),
        partial,
        call.batch,
        call.positions,
        *queries,
        call.width,
        triton.cdiv(queries[1], config.block_m),
        keys_per_split,
        Q_SCALE=call.q_scale,
        PAPER=call.paper,
        EVEN_N=call.positions % config.block_n == 0,
        PRECISION=call.precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **limit,
        **call.head(),
        **shared,
    )
    if partial is not None:
        _sum_splits(call, partial, splits, projected.r, out, queries, config, shared)


def _sum_splits(
    call: AttentionCall,
    partial: Partial,
    splits: int,
    r: Tensor,
    out: Tensor,
    queries: tuple[int, int],
    config: Inference,
    shared: dict[str, Any],
) -> None:
    """out = activation(weighted sum of the splits' partial results + r)."""
    num_blocks = triton.cdiv(queries[1], config.sum_m)
    block_v = min(128, triton.next_power_of_2(call.channels))
    launch(
        _attn_sum_kernel,
        (num_blocks * call.batch, triton.cdiv(call.channels, block_v)),
        partial,
        r,
        as_map(out),
        call.batch,
        call.positions,
        *queries,
        call.width,
        num_blocks,
        HEAD_DIM=call.channels,
        Q_SCALE=call.q_scale,
        SPLITS=splits,
        BLOCK_M=config.sum_m,
        BLOCK_V=block_v,
        num_warps=4,
        num_stages=1,
        **shared,
    )
