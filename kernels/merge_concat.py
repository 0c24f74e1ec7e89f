"""Merging a network's output into the known picture, and the concatenation that feeds the next stage.

With image, output [B, 3, H, W] and mask m [B, 1, H, W] (1 = hole), o = output or tanh(output)::

    merge:        out = image * (1 - m) + o * m                                     [B, 3, H, W]
    merge_concat: out[:, :3] = the same, out[:, 3] = m                              [B, 4, H, W]
    backward:     d_image = g (1 - m)      d_output = g m (1 - tanh(output)^2 where tanh)
                  d_mask = sum_c g_c (o_c - image_c)  (+ g_3 for merge_concat)

The kernels are bound by memory bandwidth: a program reads its pixels of the mask once for all three channels, and
every plane once. Forward at 256x256 in 16 bit: 7 planes read, 4 written, 1.4 MB per sample. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GRID, device_guard, device_reason, launch, stable_tanh
from .maps import as_map, as_optional_map, position_rows

_BLOCK = 512


@triton.jit
def _merge_fwd_kernel(
    image,  # Map, as all of them
    output,
    mask,
    out,
    n_positions,
    width,
    num_blocks,
    TANH: tl.constexpr,
    CONCAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program merges BLOCK pixels of one sample."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    n = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_positions
    m_ptrs = position_rows(mask, batch, n, width)
    i_ptrs = position_rows(image, batch, n, width)
    o_ptrs = position_rows(output, batch, n, width)
    r_ptrs = position_rows(out, batch, n, width)
    hole = tl.load(m_ptrs, mask=inside, other=0.0)
    m = hole.to(tl.float32)
    for c in tl.static_range(3):
        plane = tl.full([], c, tl.int64)
        known = tl.load(i_ptrs + plane * image.stride_c, mask=inside, other=0.0).to(tl.float32)
        painted = tl.load(o_ptrs + plane * output.stride_c, mask=inside, other=0.0).to(tl.float32)
        if TANH:
            painted = stable_tanh(painted)
        merged = known * (1.0 - m) + painted * m
        tl.store(r_ptrs + plane * out.stride_c, merged.to(out.ptr.dtype.element_ty), mask=inside)
    if CONCAT:
        tl.store(r_ptrs + tl.full([], 3, tl.int64) * out.stride_c, hole, mask=inside)


@triton.jit
def _merge_bwd_kernel(
    grad,  # Map, as all of them
    image,
    output,
    mask,
    d_image,  # or ABSENT, as the next two
    d_output,
    d_mask,
    n_positions,
    width,
    num_blocks,
    TANH: tl.constexpr,
    CONCAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes the gradients of BLOCK pixels of one sample."""
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    n = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_positions
    g_ptrs = position_rows(grad, batch, n, width)
    m = tl.load(position_rows(mask, batch, n, width), mask=inside, other=0.0).to(tl.float32)
    READ_OUTPUT: tl.constexpr = d_mask.ptr is not None or (d_output.ptr is not None and TANH)
    if d_mask.ptr is not None:
        i_ptrs = position_rows(image, batch, n, width)
        d_hole = tl.zeros([BLOCK], dtype=tl.float32)
    if READ_OUTPUT:
        o_ptrs = position_rows(output, batch, n, width)
    if d_image.ptr is not None:
        di_ptrs = position_rows(d_image, batch, n, width)
    if d_output.ptr is not None:
        do_ptrs = position_rows(d_output, batch, n, width)
    for c in tl.static_range(3):
        plane = tl.full([], c, tl.int64)
        g = tl.load(g_ptrs + plane * grad.stride_c, mask=inside, other=0.0).to(tl.float32)
        if READ_OUTPUT:
            painted = tl.load(o_ptrs + plane * output.stride_c, mask=inside, other=0.0).to(tl.float32)
            if TANH:
                painted = stable_tanh(painted)
        if d_image.ptr is not None:
            d_known = (g * (1.0 - m)).to(d_image.ptr.dtype.element_ty)
            tl.store(di_ptrs + plane * d_image.stride_c, d_known, mask=inside)
        if d_output.ptr is not None:
            d_painted = g * m
            if TANH:
                d_painted *= 1.0 - painted * painted
            tl.store(do_ptrs + plane * d_output.stride_c, d_painted.to(d_output.ptr.dtype.element_ty), mask=inside)
        if d_mask.ptr is not None:
            known = tl.load(i_ptrs + plane * image.stride_c, mask=inside, other=0.0).to(tl.float32)
            d_hole += g * (painted - known)
    if d_mask.ptr is not None:
        if CONCAT:
            d_hole += tl.load(g_ptrs + tl.full([], 3, tl.int64) * grad.stride_c, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(position_rows(d_mask, batch, n, width), d_hole.to(d_mask.ptr.dtype.element_ty), mask=inside)


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
            as_map(image),
            as_map(output),
            as_map(mask),
            as_map(out),
            positions,
            width,
            num_blocks,
            TANH=tanh,
            CONCAT=concat,
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
            as_map(grad),
            as_map(image),
            as_map(output),
            as_map(mask),
            as_optional_map(d_image),
            as_optional_map(d_output),
            as_optional_map(d_mask),
            positions,
            width,
            num_blocks,
            TANH=tanh,
            CONCAT=concat,
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
