"""The masked l1 loss: ``mean_b S_b / D_b`` with ``D_b = C W_b + 1e-12``.

Of each sample ``S = sum_cp |(o - t) w|`` and ``W = sum_p w`` over channels c and pixels p. Backward, g the loss's
gradient, ``s = sign((o - t) w)``::

    d_o = -d_t = g / (B D) s w        d_w = g / B (sum_c s (o - t) / D - C S / D^2)

Bound by memory: forward reads 7 planes of a picture, backward 7 and writes up to 7. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GRID, device_guard, device_reason, launch

_BLOCK = 512


@triton.jit
def _masked_l1_fwd_kernel(
    output_ptr,
    target_ptr,
    weight_ptr,
    partial_ptr,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    stride_tb,
    stride_tc,
    stride_th,
    stride_tw,
    stride_wb,
    stride_wh,
    stride_ww,
    n_positions,
    width,
    num_blocks,
    channels,
    BLOCK: tl.constexpr,
):
    """A program sums BLOCK pixels of one sample: partial [B, num_blocks, 2]."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    n = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_positions
    y = (n // width).to(tl.int64)
    x = (n % width).to(tl.int64)
    w_ptrs = weight_ptr + batch * stride_wb + y * stride_wh + x * stride_ww
    o_ptrs = output_ptr + batch * stride_ob + y * stride_oh + x * stride_ow
    t_ptrs = target_ptr + batch * stride_tb + y * stride_th + x * stride_tw
    weight = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    error = tl.zeros([BLOCK], dtype=tl.float32)
    for c in range(channels):
        plane = tl.full([], c, tl.int64)
        output = tl.load(o_ptrs + plane * stride_oc, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(t_ptrs + plane * stride_tc, mask=inside, other=0.0).to(tl.float32)
        error += tl.abs((output - target) * weight)
    place = partial_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(place, tl.sum(error, 0))
    tl.store(place + 1, tl.sum(weight, 0))


@triton.jit
def _masked_l1_bwd_kernel(
    output_ptr,
    target_ptr,
    weight_ptr,
    sums_ptr,
    grad_ptr,
    d_output_ptr,
    d_target_ptr,
    d_weight_ptr,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    stride_tb,
    stride_tc,
    stride_th,
    stride_tw,
    stride_wb,
    stride_wh,
    stride_ww,
    n_positions,
    width,
    num_blocks,
    channels,
    n_samples,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK pixels of one sample; gradients that are wanted are contiguous."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    n = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_positions
    y = (n // width).to(tl.int64)
    x = (n % width).to(tl.int64)
    error = tl.load(sums_ptr + batch * 2)
    divisor = channels * tl.load(sums_ptr + batch * 2 + 1) + 1e-12
    scale = tl.load(grad_ptr) / (n_samples * divisor)
    w_ptrs = weight_ptr + batch * stride_wb + y * stride_wh + x * stride_ww
    o_ptrs = output_ptr + batch * stride_ob + y * stride_oh + x * stride_ow
    t_ptrs = target_ptr + batch * stride_tb + y * stride_th + x * stride_tw
    weight = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], dtype=tl.float32) - channels * error / divisor
    for c in range(channels):
        plane = tl.full([], c, tl.int64)
        output = tl.load(o_ptrs + plane * stride_oc, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(t_ptrs + plane * stride_tc, mask=inside, other=0.0).to(tl.float32)
        difference = output - target
        signed = difference * weight
        sign = tl.where(signed > 0, 1.0, tl.where(signed < 0, -1.0, 0.0))
        d_weight += sign * difference
        place = (batch * channels + plane) * n_positions + n
        if d_output_ptr is not None:
            value = scale * sign * weight
            tl.store(d_output_ptr + place, value.to(d_output_ptr.dtype.element_ty), mask=inside)
        if d_target_ptr is not None:
            value = -scale * sign * weight
            tl.store(d_target_ptr + place, value.to(d_target_ptr.dtype.element_ty), mask=inside)
    if d_weight_ptr is not None:
        value = scale * d_weight
        tl.store(d_weight_ptr + batch * n_positions + n, value.to(d_weight_ptr.dtype.element_ty), mask=inside)


def can_run_masked_l1(output: Tensor, target: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot take these operands' device, dtype or size, or None."""
    reason = device_reason(output, (7, 5))
    if reason is not None:
        return reason
    batch, _, height, width = output.shape
    if height * width > MAX_GRID - _BLOCK or batch * triton.cdiv(height * width, _BLOCK) > MAX_GRID:
        return f"{batch} x {height} x {width} pixels (more than one grid holds)"
    return None


def _strides(output: Tensor, target: Tensor, weight: Tensor) -> tuple[int, ...]:
    stride_b, _, stride_h, stride_w = weight.stride()
    return (*output.stride(), *target.stride(), stride_b, stride_h, stride_w)


def masked_l1_forward(output: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and sums [B, 2] of each sample: of ``|(output - target) * weight|``, and of the weight."""
    batch, channels, height, width = output.shape
    num_blocks = triton.cdiv(height * width, _BLOCK)
    partial = torch.empty((batch, num_blocks, 2), dtype=torch.float32, device=output.device)
    with device_guard(output):
        launch(
            _masked_l1_fwd_kernel,
            (num_blocks * batch,),
            output,
            target,
            weight,
            partial,
            *_strides(output, target, weight),
            height * width,
            width,
            num_blocks,
            channels,
            BLOCK=_BLOCK,
            num_warps=2,
            num_stages=1,
        )
    sums = partial.sum(dim=1)
    return (sums[:, 0] / (channels * sums[:, 1] + 1e-12)).mean(), sums


def masked_l1_backward(
    grad: Tensor,
    output: Tensor,
    target: Tensor,
    weight: Tensor,
    sums: Tensor,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of output, target and weight, contiguous, None where not needed."""
    batch, channels, height, width = output.shape
    num_blocks = triton.cdiv(height * width, _BLOCK)
    operands = (output, target, weight)
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(operands, needs, strict=True)
    ]
    with device_guard(output):
        launch(
            _masked_l1_bwd_kernel,
            (num_blocks * batch,),
            *operands,
            sums,
            grad,
            *grads,
            *_strides(*operands),
            height * width,
            width,
            num_blocks,
            channels,
            batch,
            BLOCK=_BLOCK,
            num_warps=2,
            num_stages=1,
        )
    return grads[0], grads[1], grads[2]
