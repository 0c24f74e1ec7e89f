"""Merging a network's output into the known picture, and the concatenation that feeds the next stage.

With image, output [B, 3, H, W] and mask m [B, 1, H, W] (1 = hole), o = output or tanh(output)::

    merge:        out = image * (1 - m) + o * m                                     [B, 3, H, W]
    merge_concat: out[:, :3] = the same, out[:, 3] = m                              [B, 4, H, W]
    backward:     d_image = g (1 - m)      d_output = g m (1 - tanh(output)^2 where tanh)
                  d_mask = sum_c g_c (o_c - image_c)  (+ g_3 for merge_concat)

Bound by memory: a program reads its pixels of the mask once for all three channels, and every plane once. Forward at
256x256 in 16 bit: 7 planes read, 4 written, 1.4 MB a sample. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GRID, device_guard, device_reason, is_flat, launch, position_offsets, position_strides

_BLOCK = 512


@triton.jit
def _tanh(x):
    """tanh in float32: a series near 0, where (1 - e) / (1 + e) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    s = x * x
    near = x + x * s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return tl.where(s < 0.0625, near, far)


@triton.jit
def _merge_fwd_kernel(
    image_ptr,
    output_ptr,
    mask_ptr,
    out_ptr,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    stride_mb,
    stride_mh,
    stride_mw,
    stride_rb,
    stride_rc,
    stride_rh,
    stride_rw,
    n_positions,
    width,
    num_blocks,
    TANH: tl.constexpr,
    CONCAT: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program merges BLOCK pixels of one sample."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    n = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_positions
    m_ptrs = mask_ptr + batch * stride_mb + position_offsets(n, width, stride_mh, stride_mw, FLAT)
    i_ptrs = image_ptr + batch * stride_ib + position_offsets(n, width, stride_ih, stride_iw, FLAT)
    o_ptrs = output_ptr + batch * stride_ob + position_offsets(n, width, stride_oh, stride_ow, FLAT)
    r_ptrs = out_ptr + batch * stride_rb + position_offsets(n, width, stride_rh, stride_rw, FLAT)
    mask = tl.load(m_ptrs, mask=inside, other=0.0)
    m = mask.to(tl.float32)
    for c in tl.static_range(3):
        plane = tl.full([], c, tl.int64)
        image = tl.load(i_ptrs + plane * stride_ic, mask=inside, other=0.0).to(tl.float32)
        output = tl.load(o_ptrs + plane * stride_oc, mask=inside, other=0.0).to(tl.float32)
        if TANH:
            output = _tanh(output)
        merged = image * (1.0 - m) + output * m
        tl.store(r_ptrs + plane * stride_rc, merged.to(out_ptr.dtype.element_ty), mask=inside)
    if CONCAT:
        tl.store(r_ptrs + tl.full([], 3, tl.int64) * stride_rc, mask, mask=inside)


@triton.jit
def _merge_bwd_kernel(
    grad_ptr,
    image_ptr,
    output_ptr,
    mask_ptr,
    d_image_ptr,
    d_output_ptr,
    d_mask_ptr,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    stride_mb,
    stride_mh,
    stride_mw,
    stride_dib,
    stride_dic,
    stride_dih,
    stride_diw,
    stride_dob,
    stride_doc,
    stride_doh,
    stride_dow,
    stride_dmb,
    stride_dmh,
    stride_dmw,
    n_positions,
    width,
    num_blocks,
    TANH: tl.constexpr,
    CONCAT: tl.constexpr,
    NEED_IMAGE: tl.constexpr,
    NEED_OUTPUT: tl.constexpr,
    NEED_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK pixels of one sample."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    n = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_positions
    g_ptrs = grad_ptr + batch * stride_gb + position_offsets(n, width, stride_gh, stride_gw, FLAT)
    m_ptrs = mask_ptr + batch * stride_mb + position_offsets(n, width, stride_mh, stride_mw, FLAT)
    m = tl.load(m_ptrs, mask=inside, other=0.0).to(tl.float32)
    if NEED_MASK:
        i_ptrs = image_ptr + batch * stride_ib + position_offsets(n, width, stride_ih, stride_iw, FLAT)
        d_mask = tl.zeros([BLOCK], dtype=tl.float32)
    if NEED_MASK or (NEED_OUTPUT and TANH):
        o_ptrs = output_ptr + batch * stride_ob + position_offsets(n, width, stride_oh, stride_ow, FLAT)
    if NEED_IMAGE:
        di_ptrs = d_image_ptr + batch * stride_dib + position_offsets(n, width, stride_dih, stride_diw, FLAT)
    if NEED_OUTPUT:
        do_ptrs = d_output_ptr + batch * stride_dob + position_offsets(n, width, stride_doh, stride_dow, FLAT)
    for c in tl.static_range(3):
        plane = tl.full([], c, tl.int64)
        g = tl.load(g_ptrs + plane * stride_gc, mask=inside, other=0.0).to(tl.float32)
        if NEED_MASK or (NEED_OUTPUT and TANH):
            output = tl.load(o_ptrs + plane * stride_oc, mask=inside, other=0.0).to(tl.float32)
            if TANH:
                output = _tanh(output)
        if NEED_IMAGE:
            tl.store(di_ptrs + plane * stride_dic, (g * (1.0 - m)).to(d_image_ptr.dtype.element_ty), mask=inside)
        if NEED_OUTPUT:
            d_output = g * m
            if TANH:
                d_output *= 1.0 - output * output
            tl.store(do_ptrs + plane * stride_doc, d_output.to(d_output_ptr.dtype.element_ty), mask=inside)
        if NEED_MASK:
            image = tl.load(i_ptrs + plane * stride_ic, mask=inside, other=0.0).to(tl.float32)
            d_mask += g * (output - image)
    if NEED_MASK:
        if CONCAT:
            d_mask += tl.load(g_ptrs + tl.full([], 3, tl.int64) * stride_gc, mask=inside, other=0.0).to(tl.float32)
        dm_ptrs = d_mask_ptr + batch * stride_dmb + position_offsets(n, width, stride_dmh, stride_dmw, FLAT)
        tl.store(dm_ptrs, d_mask.to(d_mask_ptr.dtype.element_ty), mask=inside)


def can_run_merge(image: Tensor, output: Tensor, mask: Tensor) -> str | None:
    """Why the kernels cannot take these arguments, or None.

    Args:
        image, output: [B, 3, H, W], float32, float16 or bfloat16, any strides.
        mask: [B, 1, H, W], the same dtype and device.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        return f"image of shape {tuple(image.shape)} ([B, 3, H, W] is needed)"
    reason = device_reason(image, (7, 5))
    if reason is not None:
        return reason
    batch, _, height, width = image.shape
    for name, tensor, shape in (
        ("output", output, (batch, 3, height, width)),
        ("mask", mask, (batch, 1, height, width)),
    ):
        if tuple(tensor.shape) != shape:
            return f"{name} of shape {tuple(tensor.shape)} ({shape} is needed)"
        if tensor.dtype != image.dtype:
            return f"{name} of {tensor.dtype} with an image of {image.dtype}"
        if tensor.device != image.device:
            return f"{name} on {tensor.device} with an image on {image.device}"
    if height * width > MAX_GRID - _BLOCK or batch * triton.cdiv(height * width, _BLOCK) > MAX_GRID:
        return f"{batch} x {height} x {width} pixels (more than one grid holds)"
    return None


def _strides(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """stride_b, stride_c, stride_h, stride_w, or zeros for an absent tensor."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.stride(0), tensor.stride(1), *position_strides(tensor)


def _plane_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """stride_b, stride_h, stride_w of a single-channel tensor."""
    stride_b, _, stride_h, stride_w = _strides(tensor)
    return stride_b, stride_h, stride_w


def _forward(image: Tensor, output: Tensor, mask: Tensor, tanh: bool, out: Tensor, concat: bool) -> Tensor:
    batch, _, height, width = image.shape
    positions = height * width
    if out.numel() == 0:
        return out
    num_blocks = triton.cdiv(positions, _BLOCK)
    with device_guard(image):
        launch(
            _merge_fwd_kernel,
            (num_blocks * batch,),
            image,
            output,
            mask,
            out,
            *_strides(image),
            *_strides(output),
            *_plane_strides(mask),
            *_strides(out),
            positions,
            width,
            num_blocks,
            TANH=tanh,
            CONCAT=concat,
            FLAT=all(is_flat(x) for x in (image, output, mask, out)),
            BLOCK=_BLOCK,
            num_warps=2,
            num_stages=1,
        )
    return out


def _backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    tanh: bool,
    needs: tuple[bool, bool, bool],
    concat: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    batch, _, height, width = image.shape
    positions = height * width
    grads = [torch.empty_like(x) if need else None for x, need in zip((image, output, mask), needs, strict=True)]
    d_image, d_output, d_mask = grads
    if image.numel() == 0 or not any(needs):
        return d_image, d_output, d_mask
    num_blocks = triton.cdiv(positions, _BLOCK)
    with device_guard(image):
        launch(
            _merge_bwd_kernel,
            (num_blocks * batch,),
            grad,
            image,
            output,
            mask,
            d_image,
            d_output,
            d_mask,
            *_strides(grad),
            *_strides(image),
            *_strides(output),
            *_plane_strides(mask),
            *_strides(d_image),
            *_strides(d_output),
            *_plane_strides(d_mask),
            positions,
            width,
            num_blocks,
            TANH=tanh,
            CONCAT=concat,
            NEED_IMAGE=needs[0],
            NEED_OUTPUT=needs[1],
            NEED_MASK=needs[2],
            FLAT=all(is_flat(x) for x in (grad, image, output, mask, *grads) if x is not None),
            BLOCK=_BLOCK,
            num_warps=2,
            num_stages=1,
        )
    return d_image, d_output, d_mask


def merge_forward(
    image: Tensor, output: Tensor, mask: Tensor, *, tanh: bool = False, out: Tensor | None = None
) -> Tensor:
    """``image * (1 - mask) + o * mask`` with o = output or tanh(output).

    Args:
        image, output, mask: see :func:`can_run_merge`.
        tanh: apply tanh to `output` first.
        out: where to put the result, [B, 3, H, W] of the same dtype, any strides.

    Returns:
        [B, 3, H, W]: `out` where given, else with the strides of ``torch.empty_like(image)``.
    """
    return _forward(image, output, mask, tanh, torch.empty_like(image) if out is None else out, False)


def merge_concat_forward(
    image: Tensor, output: Tensor, mask: Tensor, *, tanh: bool = False, out: Tensor | None = None
) -> Tensor:
    """The next stage's input: :func:`merge_forward` in channels 0 to 2, the mask in channel 3.

    Args:
        image, output, mask: see :func:`can_run_merge`.
        tanh: apply tanh to `output` first.
        out: where to put the result, [B, 4, H, W] of the same dtype, any strides.

    Returns:
        [B, 4, H, W]: `out` where given, else contiguous.
    """
    if out is None:
        batch, _, height, width = image.shape
        out = torch.empty((batch, 4, height, width), dtype=image.dtype, device=image.device)
    return _forward(image, output, mask, tanh, out, True)


def merge_backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`merge_forward` with respect to image, output and mask, None where not needed.

    Args:
        grad: [B, 3, H, W], any strides, the dtype of `image`.
    """
    return _backward(grad, image, output, mask, tanh, needs, False)


def merge_concat_backward(
    grad: Tensor,
    image: Tensor,
    output: Tensor,
    mask: Tensor,
    *,
    tanh: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`merge_concat_forward` with respect to image, output and mask, None where not needed.

    Args:
        grad: [B, 4, H, W], any strides, the dtype of `image`.
    """
    return _backward(grad, image, output, mask, tanh, needs, True)
