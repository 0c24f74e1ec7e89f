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

import torch
import triton
from torch import Tensor

from .attention_backward import (
    _attn_bwd_delta_kernel,
    _attn_bwd_dkv_kernel,
    _attn_bwd_dq_kernel,
    _attn_bwd_finish_kernel,
)
from .attention_forward import Result, _attn_fwd_kernel, _attn_merge_kernel, _attn_prep_kernel, q_scale
from .attention_inference import attention_block_inference
from .cards import SHARED_LIMITS
from .configs import Config, config_kind, device_generation, num_splits, pick
from .launch import MAX_GRID, device_guard, device_reason, dot_precision, launch
from .maps import ABSENT, Rows, as_map, as_optional_map, is_flat, position_stride, split_head

MAX_CHANNELS = 512
# Triton leaves the tensor cores of older GPUs unused
CAPABILITY = (8, 0)
VARIANTS = ("released", "paper")


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
        as_map(features),
        q,
        k,
        v,
        inv_norm,
        height,
        width,
        num_blocks,
        q_scale(features.dtype),
        HEAD_DIM=channels,
        PAPER=paper,
        **blocks,
    )
    if not paper:
        assert q is not None
        assert k is not None
        return q, k, k, None
    if v is None:
        v = features.as_strided((batch, positions, channels), (features.stride(0), position_stride(features), 1))
    return (v, v, v, inv_norm) if k is None else (k, k, v, None)


def _merge_stages(config: Config, columns: int, splits: int, element: int, generation: str) -> int:
    """The most pipeline stages, up to the table's, whose tiles of all splits fit the card's shared memory."""
    tiles = splits * config.block_m * columns * 4 + (2 * columns + config.block_m) * columns * element
    stages = config.num_stages
    while stages > 1 and (stages - 1) * tiles > 0.9 * SHARED_LIMITS[generation]:
        stages -= 1
    return stages


def _forward(features: Tensor, variant: str, result: Result) -> Tensor:
    """Fill the maps of `result`; return stats."""
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
    d0, d1 = split_head(channels)
    whole = splits == 1
    partial, (row_max, row_sum) = None, stats
    if not whole:
        partial = torch.empty((splits, batch, positions, channels), dtype=torch.float32, device=device)
        row_max, row_sum = torch.empty((2, splits, batch, positions), dtype=torch.float32, device=device)
    with device_guard(features):
        q, _, kv, inv_norm = _prepare(features, variant, backward=False)
        launch(
            _attn_fwd_kernel,
            (num_blocks * batch, splits),
            Rows(q, q.stride(0), q.stride(1)),
            Rows(kv, kv.stride(0), kv.stride(1)),
            inv_norm,
            *(result if whole else Result(ABSENT)),
            partial,
            row_max,
            row_sum,
            batch,
            positions,
            width,
            num_blocks,
            keys_per_split,
            HEAD_DIM=channels,
            Q_SCALE=1.0 if paper else q_scale(features.dtype),
            PAPER=paper,
            EVEN_N=positions % config.block_n == 0,
            PRECISION=precision,
            D0=d0,
            D1=d1,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_O=min(32, max(16, triton.next_power_of_2(channels))),
            BLOCK_D=min(64, max(16, triton.next_power_of_2(channels))),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if not whole:
            merge = pick("merge", generation, kind, channels, batch * positions)
            if splits * merge.block_m > 128:  # addresses of that many rows would spill registers
                merge = merge._replace(block_m=16)
            num_blocks = triton.cdiv(positions, merge.block_m)
            block_d = min(merge.block_n, max(16, triton.next_power_of_2(channels)))
            launch(
                _attn_merge_kernel,
                (num_blocks * batch, triton.cdiv(channels, block_d)),
                partial,
                row_max,
                row_sum,
                stats,
                *result,
                batch,
                positions,
                width,
                num_blocks,
                HEAD_DIM=channels,
                SPLITS=splits,
                PAPER=paper,
                PRECISION=precision,
                BLOCK_M=merge.block_m,
                BLOCK_D=block_d,
                num_warps=merge.num_warps,
                num_stages=_merge_stages(merge, block_d, splits, features.element_size(), generation),
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
        out [B, C, H, W], attended [B, C, H, W] or None, stats [2, B, H*W] float32 as from
        :func:`attention_forward` or None.
    """
    if not save_attended:
        return attention_block_inference(features, weight, bias, variant, out=out), None, None
    out = torch.empty_like(features) if out is None else out
    attended = torch.empty_like(features)
    channels = features.shape[1]
    weight_rows = weight.reshape(channels, 2 * channels).contiguous()
    result = Result(as_map(attended), as_map(features), weight_rows, bias.contiguous(), as_map(out))
    return out, attended, _forward(features, variant, result)


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
        q, k, values, _ = _prepare(features, variant, backward=True)
        v = values if paper else None
        rows = _row_blocks(generation, channels, size)
        row_grid = triton.cdiv(positions, rows["BLOCK_P"])
        do = workspace(*rows_shape, dtype=features.dtype)
        delta = workspace(batch, positions)
        launch(
            _attn_bwd_delta_kernel,
            (row_grid * batch,),
            as_map(grad_attended),
            as_map(attended),
            do,
            delta,
            positions,
            width,
            row_grid,
            HEAD_DIM=channels,
            **rows,
        )
        dq = workspace(dq_splits, *rows_shape)
        sums = workspace(dq_splits, batch, positions) if renorm else None
        shared = {
            "HEAD_DIM": channels,
            "Q_SCALE": 1.0 if paper else q_scale(features.dtype),
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
            as_map(features),
            dq,
            sums,
            dk,
            dv,
            as_optional_map(direct),
            as_map(df),
            batch,
            height,
            width,
            row_grid,
            dq_splits,
            dkv_splits,
            HEAD_DIM=channels,
            PAPER=paper,
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
