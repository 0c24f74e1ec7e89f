"""Cosine-similarity softmax attention over a feature map, with its 1x1 combiner: forward and backward.

Features F [B, C, H, W], N = H*W positions, one head of size C (at most 512), no scale::

    released: q = 3x3 zero-padded box sum of F    k = v = (F + 1e-7) / ||F + 1e-7||
    paper:    q = k = F / max(||F||, 1e-12)       v = F
    attended_i = sum_j softmax_j(q_i . k_j) v_j
    released: out = Wa attended + Wf F + bias     weight [C, 2C, 1, 1] = [Wa | Wf]
    paper:    the same                            weight [C, 2C, 1, 1] = [Wf | Wa]

**Forward**, two or three kernels. `_attn_prep_kernel` reads F in any strides and writes rows [B, N, C] for the tensor
cores: box sums and normalised keys (released), or F itself and 1/||F|| (paper; a channels_last F is not copied).
`_attn_fwd_kernel` loads each key tile once for both products: in "released" k = v; in "paper" the raw tile gives
scores and values, because the two norms are factors of the score. "paper" scores lie in [-1, 1] and need no running
maximum. Without splits the epilogue applies the combiner, so neither the attended map nor a concatenation is written.
With splits over the keys, `_attn_merge_kernel` merges the partial results by the maxima and sums of their rows and
applies the combiner.

**Shapes on an H100** (132 multiprocessors). A program (thread block) computes BLOCK_M queries with all C channels. C
is held as two power-of-two chunks D0 + D1 (96 = 64 + 32, 192 = 128 + 64, 384 = 256 + 128, 512 = 256 + 256); padding
384 to 512 would cost a third more. The accumulator of 64 x 512 float32 takes half of the register file, so C = 512
uses 8 warps for 64 queries. One sample of N = 4096, C = 128 gives 32 programs of 128 queries, so its keys are split
in 4; N = 1024, C = 256 gives 16 programs of 64, split in 8; N = 256, C = 512 gives 4 programs, split in 8 of 32 keys.
A batch of 16 gives 512, 128 and 64 programs: only the last is split, in 2.
Bytes moved at N = 4096, C = 128, 16 bit: F 1 MiB read, q and k 2 MiB written, out 1 MiB; partial results 2 MiB per
split in each direction, which stay in the L2 cache. The 8.6 GFLOP take most of the time.

**Backward** recomputes the scores, never holds N x N numbers and uses no atomics. `_attn_bwd_delta_kernel` writes the
rows of grad_attended and delta = <grad_attended, attended>. In `_attn_bwd_dq_kernel` a program computes a block of
queries. In `_attn_bwd_dkv_kernel` a program computes a block of keys: in "released" dK and dV share one accumulator
because k = v, in "paper" they are two launches with one accumulator each. `_attn_bwd_finish_kernel` computes
dF = box3x3(dq) (the box sum is its own adjoint) plus the normalisation's backward of dk + dv ("paper": of dq + dk,
plus dv).

**Numbers.** Products accumulate in float32. In float16 the box sum is stored divided by 16, because a sum of nine
float16 values can overflow; scores are scaled back in float32. The forward saves `stats` [2, B, N]: each row's
maximum m and the sum l of exp(s - m). They are separate because the log-sum-exp of scores near 1e5 would keep few
digits after the point. Recomputed scores of that size may differ from the forward's in the last of these digits, and
then the probabilities would not sum to one. In float32 the dq kernel therefore sums them too, and the others divide
by that sum instead of l.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .attention_backward import (
    _attn_bwd_delta_kernel,
    _attn_bwd_dkv_kernel,
    _attn_bwd_dq_kernel,
    _attn_bwd_finish_kernel,
)
from .attention_forward import AttentionCall, Result, _attn_fwd_kernel, _attn_merge_kernel, _attn_prep_kernel, q_scale
from .attention_inference import attention_block_inference
from .cards import SHARED_LIMITS
from .configs import Config
from .launch import MAX_GRID, device_guard, device_reason, launch
from .maps import ABSENT, Rows, as_map, as_optional_map, is_flat, position_stride

MAX_CHANNELS = 512
# Triton does not use the tensor cores of older GPUs.
CAPABILITY = (8, 0)
VARIANTS = ("released", "paper")


def can_run_attention(
    features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, variant: str = "released"
) -> str | None:
    """Why the kernels cannot take these arguments, in a few words; None where they can.

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


def _row_blocks(call: AttentionCall) -> dict[str, int]:
    """Block sizes of the kernels bound by memory bandwidth."""
    config = call.pick("rows")
    return {
        "BLOCK_P": config.block_m,
        "BLOCK_C": call.block(config.block_n),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _is_rows(features: Tensor) -> bool:
    """Whether the features can be read as [B, N, C] rows in place."""
    return features.stride(1) == 1 and is_flat(features)


def _prepare(
    features: Tensor, call: AttentionCall, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows q, k, v [B, N, C] with unit channel stride, and 1/||F|| [B, N] or None.

    released: q, k, k, None. paper forward: F, F, F, 1/||F||; paper backward: k, k, F, None.
    """
    paper = call.paper
    rows_shape = (call.batch, call.positions, call.channels)
    write_k = backward or not paper
    # The backward kernels need dense rows.
    write_v = paper and (backward or not _is_rows(features))
    q = None if paper else features.new_empty(rows_shape)
    k = features.new_empty(rows_shape) if write_k else None
    v = features.new_empty(rows_shape) if write_v else None
    inv_norm = None
    if paper and not backward:
        inv_norm = features.new_empty(rows_shape[:2], dtype=torch.float32)
    blocks = _row_blocks(call)
    num_blocks = triton.cdiv(call.positions, blocks["BLOCK_P"])
    launch(
        _attn_prep_kernel,
        (num_blocks * call.batch, triton.cdiv(call.channels, blocks["BLOCK_C"])),
        as_map(features),
        q,
        k,
        v,
        inv_norm,
        call.height,
        call.width,
        num_blocks,
        q_scale(features.dtype),
        HEAD_DIM=call.channels,
        PAPER=paper,
        **blocks,
    )
    if not paper:
        assert q is not None
        assert k is not None
        return q, k, k, None
    if v is None:
        v = features.as_strided(rows_shape, (features.stride(0), position_stride(features), 1))
    return (v, v, v, inv_norm) if k is None else (k, k, v, None)


class _Partial(NamedTuple):
    """Results of the splits of the keys, float32: rows [splits, B, N, C], their maxima and sums [splits, B, N].

    Without splits the rows are None, and the maxima and sums are the call's `stats`.
    """

    rows: Tensor | None
    max: Tensor
    sum: Tensor


def _forward(features: Tensor, variant: str, result: Result) -> Tensor:
    """Fill the maps of `result`; return stats [2, B, N]."""
    call = AttentionCall.of(features, variant)
    stats = features.new_empty((2, call.batch, call.positions), dtype=torch.float32)
    if call.batch == 0:
        return stats
    config = call.pick("forward")
    num_blocks = triton.cdiv(call.positions, config.block_m)
    splits, keys_per_split = call.splits(num_blocks * call.batch, config.block_n)
    partial = _Partial(None, stats[0], stats[1])
    if splits > 1:
        rows = stats.new_empty((splits, call.batch, call.positions, call.channels))
        partial = _Partial(rows, *stats.new_empty((2, splits, call.batch, call.positions)))
    with device_guard(features):
        q, _, kv, inv_norm = _prepare(features, call, backward=False)
        launch(
            _attn_fwd_kernel,
            (num_blocks * call.batch, splits),
            Rows(q, q.stride(0), q.stride(1)),
            Rows(kv, kv.stride(0), kv.stride(1)),
            inv_norm,
            *(result if splits == 1 else Result(ABSENT)),
            *partial,
            call.batch,
            call.positions,
            call.width,
            num_blocks,
            keys_per_split,
            Q_SCALE=call.q_scale,
            PAPER=call.paper,
            EVEN_N=call.positions % config.block_n == 0,
            PRECISION=call.precision,
            BLOCK_O=call.block(32),
            BLOCK_D=call.block(64),
            **call.head(),
            **config.meta(),
        )
        if splits > 1:
            _merge_splits(call, partial, splits, stats, result)
    return stats


def _merge_splits(call: AttentionCall, partial: _Partial, splits: int, stats: Tensor, result: Result) -> None:
    """Merge the splits' partial results into the maps of `result` and into `stats`."""
    config = call.pick("merge")
    if splits * config.block_m > 128:  # the addresses of more rows would spill registers
        config = config._replace(block_m=16)
    num_blocks = triton.cdiv(call.positions, config.block_m)
    block_d = call.block(config.block_n)
    launch(
        _attn_merge_kernel,
        (num_blocks * call.batch, triton.cdiv(call.channels, block_d)),
        *partial,
        stats,
        *result,
        call.batch,
        call.positions,
        call.width,
        num_blocks,
        HEAD_DIM=call.channels,
        SPLITS=splits,
        PAPER=call.paper,
        PRECISION=call.precision,
        BLOCK_M=config.block_m,
        BLOCK_D=block_d,
        num_warps=config.num_warps,
        num_stages=_merge_stages(config, block_d, splits, call),
    )


def _merge_stages(config: Config, columns: int, splits: int, call: AttentionCall) -> int:
    """The most pipeline stages, up to the table's, for which the tiles of all splits fit the GPU's shared memory."""
    tiles = splits * config.block_m * columns * 4 + (2 * columns + config.block_m) * columns * call.dtype.itemsize
    stages = config.num_stages
    while stages > 1 and (stages - 1) * tiles > 0.9 * SHARED_LIMITS[call.generation]:
        stages -= 1
    return stages


def attention_forward(features: Tensor, variant: str, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v over the positions.

    Args:
        features: [B, C, H, W], any strides; see :func:`can_run_attention`.
        variant: "released" or "paper".
        out: where to put the attended features, [B, C, H, W] of the same dtype, any strides.

    Returns:
        attended [B, C, H, W] (`out` where given, else with the strides of ``torch.empty_like(features)``), and
        stats [2, B, H*W] float32: for each query the maximum m of its scores (0 in "paper") and the sum of
        exp(score - m).
    """
    attended = torch.empty_like(features) if out is None else out
    return attended, _forward(features, variant, Result(as_map(attended)))


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
        out [B, C, H, W], attended alike or None, stats [2, B, H*W] float32 as from
        :func:`attention_forward` or None.
    """
    if not save_attended:
        return attention_block_inference(features, weight, bias, variant, out=out), None, None
    out = torch.empty_like(features) if out is None else out
    attended = torch.empty_like(out)
    channels = features.shape[1]
    weight_rows = weight.reshape(channels, 2 * channels).contiguous()
    result = Result(as_map(attended), as_map(features), weight_rows, bias.contiguous(), as_map(out))
    return out, attended, _forward(features, variant, result)


class _Saved(NamedTuple):
    """Operands of the backward's products.

    q, k, v: rows [B, N, C]; v is None in "released", where it equals k. grad: rows of grad_attended. stats: [2, B,
    N], from the forward. delta: [B, N], <grad_attended, attended>.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    grad: Tensor
    stats: Tensor
    delta: Tensor


class _Gradient(NamedTuple):
    """A gradient before its splits are added, float32.

    rows: [splits, B, N, C]. sums: sums of the recomputed probabilities, [splits, B, N], or None.
    """

    rows: Tensor
    sums: Tensor | None = None

    @property
    def splits(self) -> int:
        return self.rows.shape[0]


def _backward(
    grad_attended: Tensor,
    features: Tensor,
    attended: Tensor,
    stats: Tensor,
    variant: str,
    direct: Tensor | None,
) -> Tensor:
    """dF, plus `direct`, the gradient that reaches F through the combiner's direct input."""
    df = torch.empty_like(features)
    call = AttentionCall.of(features, variant)
    if call.batch == 0:
        return df
    with device_guard(features):
        q, k, values, _ = _prepare(features, call, backward=True)
        grad, delta = _backward_delta(call, grad_attended, attended)
        saved = _Saved(q, k, values if call.paper else None, grad, stats, delta)
        dq = _backward_dq(call, saved)
        dk = _backward_dkv(call, saved, dq, with_dk=True, with_dv=not call.paper)
        dv = _backward_dkv(call, saved, dq, with_dk=False, with_dv=True) if call.paper else None
        _backward_finish(call, features, dq, dk, dv, direct, df)
    return df


def _backward_delta(call: AttentionCall, grad_attended: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of grad_attended [B, N, C], and <grad_attended, attended> [B, N] in float32."""
    grad = attended.new_empty((call.batch, call.positions, call.channels))
    delta = attended.new_empty((call.batch, call.positions), dtype=torch.float32)
    blocks = _row_blocks(call)
    num_blocks = triton.cdiv(call.positions, blocks["BLOCK_P"])
    launch(
        _attn_bwd_delta_kernel,
        (num_blocks * call.batch,),
        as_map(grad_attended),
        as_map(attended),
        grad,
        delta,
        call.positions,
        call.width,
        num_blocks,
        HEAD_DIM=call.channels,
        **blocks,
    )
    return grad, delta


def _backward_dq(call: AttentionCall, saved: _Saved) -> _Gradient:
    """Gradient of the queries; for "released" in float32 also the sums of the recomputed probabilities."""
    config = call.pick("backward_dq")
    num_blocks = triton.cdiv(call.positions, config.block_m)
    splits, keys_per_split = call.splits(num_blocks * call.batch, config.block_n)
    rows = saved.delta.new_empty((splits, call.batch, call.positions, call.channels))
    renormalise = call.dtype == torch.float32 and not call.paper
    sums = saved.delta.new_empty(rows.shape[:3]) if renormalise else None
    launch(
        _attn_bwd_dq_kernel,
        (num_blocks * call.batch, splits),
        *saved,
        rows,
        sums,
        call.batch,
        call.positions,
        num_blocks,
        keys_per_split,
        EVEN_N=call.positions % config.block_n == 0,
        Q_SCALE=call.q_scale,
        PRECISION=call.precision,
        **call.head(),
        **config.meta(),
    )
    return _Gradient(rows, sums)


def _backward_dkv(call: AttentionCall, saved: _Saved, dq: _Gradient, *, with_dk: bool, with_dv: bool) -> _Gradient:
    """Gradient of the keys, of the values, or the sum of both."""
    config = call.pick("backward_dkv")
    num_blocks = triton.cdiv(call.positions, config.block_n)
    splits, queries_per_split = call.splits(num_blocks * call.batch, config.block_m)
    rows = saved.delta.new_empty((splits, call.batch, call.positions, call.channels))
    launch(
        _attn_bwd_dkv_kernel,
        (num_blocks * call.batch, splits),
        *saved,
        dq.sums,
        rows,
        call.batch,
        call.positions,
        num_blocks,
        queries_per_split,
        WITH_DK=with_dk,
        WITH_DV=with_dv,
        SUMS=dq.splits,
        Q_SCALE=call.q_scale,
        PRECISION=call.precision,
        **call.head(),
        **config.meta(),
    )
    return _Gradient(rows)


def _backward_finish(
    call: AttentionCall,
    features: Tensor,
    dq: _Gradient,
    dk: _Gradient,
    dv: _Gradient | None,
    direct: Tensor | None,
    df: Tensor,
) -> None:
    """df = the gradients of queries, keys and values through the box sum and the norm, plus `direct`."""
    blocks = _row_blocks(call)
    num_blocks = triton.cdiv(call.positions, blocks["BLOCK_P"])
    launch(
        _attn_bwd_finish_kernel,
        (num_blocks * call.batch, triton.cdiv(call.channels, blocks["BLOCK_C"])),
        as_map(features),
        dq.rows,
        dq.sums,
        dk.rows,
        None if dv is None else dv.rows,
        as_optional_map(direct),
        as_map(df),
        call.batch,
        call.height,
        call.width,
        num_blocks,
        dq.splits,
        dk.splits,
        HEAD_DIM=call.channels,
        PAPER=call.paper,
        maxnreg=255,  # without a limit ptxas may spill registers for a higher occupancy
        **blocks,
    )


def attention_backward(
    grad_attended: Tensor, features: Tensor, attended: Tensor, stats: Tensor, variant: str
) -> Tensor:
    """Gradient with respect to the features.

    Args:
        grad_attended: [B, C, H, W], any strides, the dtype of `features`.
        features: the argument of the forward.
        attended, stats: the results of :func:`attention_forward`.
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
    """Gradients with respect to features, weight and bias.

    Args:
        grad_out: [B, C, H, W], any strides, the dtype of `features`.
        features, weight, variant: the arguments of the forward.
        attended, stats: the results of :func:`attention_block_forward` with ``save_attended=True``.
        needs: which of the three gradients to compute.

    Returns:
        [B, C, H, W], [C, 2C, 1, 1], [C], each None where not needed.
    """
    channels = features.shape[1]
    paper = variant == "paper"
    df = dw = db = None
    with device_guard(features):
        grad_rows = grad_out.flatten(2)
        if needs[0]:
            columns = weight.reshape(channels, 2 * channels).t()
            grad_pair = torch.matmul(columns, grad_rows)
            grad_a = grad_pair[:, :channels].view(features.shape)
            grad_f = grad_pair[:, channels:].view(features.shape)
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
