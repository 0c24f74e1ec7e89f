"""Convolutions and transposed convolutions of the engine as implicit matrix products, epilogues fused.

Feature maps are NHWC views ([B, H, W, C], unit channel stride, any pixel stride). Along each axis::

    out[S g + phase] = sum_t source[s g + origin_phase + t] weight_phase[t]

with unit steps between the taps t of a phase: a convolution of stride s has S = 1, one phase and origin -padding; a
transposed one of stride 2 has s = 1, S = 2 and two phases an axis. So the product is

    rows g = (sample, y, x) of a rectangle   x   columns = output channels,   depth = taps x input channels

and phases are further programs of the same launch (no zero insertion, no col2im). Padding, by zeros or by
reflection, is index arithmetic on the rows; taps that meet nothing but zeros in the whole map are left out (of 16 MiB
of 16-bit weights that e8 and d8 have, 4 are read at 256x256). Weights are packed once, [phase, tap, Cin] x Cout.

**Steps that end a stage** have 3 output channels, which would leave most of a matrix unit idle and read every input
pixel once for each tap. Their columns are (y, x, channel) of a small patch of outputs instead: 2x2 for d1 (all four
phases over one 3x3 window), 4x4 for the 7x7 convolution (a 10x10 window, 2.7 times the multiplications, but an
eighth of the reads). Their epilogue applies tanh, writes the raw picture and merges it into the picture.

**Split depth.** Grids of 8x8 and smaller have few rows and many weights: the depth is cut so that the programs fill
the chip, and partial sums go to a float32 workspace [splits, rows, columns]. They are added in a fixed order, so
results are bitwise repeatable, and the epilogue follows: either by the program of a block that comes last, which a
counter tells (`Tile.fused`), or by a second kernel, which spreads many splits over more programs.

**Overlap** (programmatic dependent launch; Hopper and newer; off unless asked for). A launch may start while the one
before it still runs: it brings its part of the weights into the L2 cache, then waits for the other to end before it
touches any feature map. Measured on an H100 it costs 5 to 8 % with the tuned tiles, wherever the trigger stands.

**Epilogue.** value = sum + bias [+ residual]; up to two stores, each with its activation.
Bytes: every program reads (BLOCK_M + BLOCK_N) x depth elements, mostly from the L2 cache; from memory, inputs,
weights and outputs once. Products accumulate in float32.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgnet_fast.engine.geometry import Axis, Geometry

from .conv_configs import Tile, Work
from .launch import (
    ACTIVATIONS,
    MAX_GRID,
    activate,
    device_guard,
    device_reason,
    dot,
    dot_precision,
    is_interpreted,
    launch,
    overlapping,
)
from .merge_concat import _tanh

CAPABILITY = (8, 0)
PICTURE_CHANNELS = 4
"""Channels of the picture's buffer, and columns that one pixel takes in a step that ends a stage."""
RAW_CHANNELS = 3
_PATCH = 4  # outputs a side that the columns of a merging convolution of stride 1 hold


class Conv(NamedTuple):
    """What a step computes, apart from sizes. `transposed` needs stride 2; `merges` ends a stage."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    transposed: bool
    reflect: bool
    merges: bool

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.kernel, self.stride, self.padding, self.transposed, self.reflect)

    @property
    def axis(self) -> Axis:
        """The same along both axes."""
        if not self.merges:
            return self.geometry.axis()
        return self.geometry.axis(self.stride if self.transposed else _PATCH if self.stride == 1 else 1)

    @property
    def columns(self) -> int:
        """Columns of the product."""
        return self.axis.patch**2 * PICTURE_CHANNELS if self.merges else self.out_channels

    @property
    def flat(self) -> bool:
        """Whether a block of the depth spans taps, as one has too few channels for a block of its own."""
        return self.in_channels < 16

    def kernel_tap(self, offset: int, source: int) -> int | None:
        """The kernel's tap by which output `offset` of row 0 reads `source`, if any."""
        return self.geometry.tap(offset, source)

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in, k, k] (or [in, out, k, k] transposed) -> [sum of taps of all phases x in, columns]."""
        taps_first = weight.permute((2, 3, 0, 1) if self.transposed else (2, 3, 1, 0))
        axis = self.axis
        blocks = []
        for phase_y, phase_x in itertools.product(range(axis.phases), repeat=2):
            for y, x in itertools.product(range(axis.taps[phase_y]), range(axis.taps[phase_x])):
                block = weight.new_zeros(self.in_channels, self.columns)
                for shift_y, shift_x in itertools.product(range(axis.patch), repeat=2):
                    tap_y = self.kernel_tap(phase_y + shift_y, axis.origins[phase_y] + y)
                    tap_x = self.kernel_tap(phase_x + shift_x, axis.origins[phase_x] + x)
                    if tap_y is not None and tap_x is not None:
                        column = (shift_y * axis.patch + shift_x) * PICTURE_CHANNELS
                        block[:, column : column + self.out_channels] = taps_first[tap_y, tap_x]
                blocks.append(block)
        return torch.cat(blocks)

    def work(
        self, batch: int, in_size: tuple[int, int], out_size: tuple[int, int], rect: tuple[int, int, int, int]
    ) -> Work:
        """Size of the product for outputs `rect` = (top, bottom, left, right)."""
        axis = self.axis
        (top, bottom), (left, right) = self.rows_of(rect)
        taps = []
        for phase_y, phase_x in itertools.product(range(axis.phases), repeat=2):
            _, count_y = axis.used(phase_y, in_size[0], out_size[0], self.reflect)
            _, count_x = axis.used(phase_x, in_size[1], out_size[1], self.reflect)
            taps.append(count_y * count_x)
        rows = batch * (bottom - top) * (right - left)
        return Work(rows, self.columns, tuple(taps), self.in_channels, self.flat, self.merges)

    def rows_of(self, rect: tuple[int, int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows g of the product along each axis that cover outputs (top, bottom, left, right)."""
        step = self.axis.out_step
        top, bottom, left, right = rect
        return (top // step, -(-bottom // step)), (left // step, -(-right // step))


class Store(NamedTuple):
    """Where a result goes, [B, H, W, C], and its activation (a key of ACTIVATIONS)."""

    view: Tensor
    activation: str


class Merge(NamedTuple):
    """The end of a stage: ``merged = image * (1 - mask) + tanh(value) * mask``.

    image, mask: [B, 3, H, W] and [B, 1, H, W] float32, contiguous. raw: [B, 3, H, W] float32 contiguous, tanh(value).
    merged: the picture's buffer [B, H, W, 4] (channel 3 is left alone), or [B, 3, H, W] float32 for the last stage.
    """

    image: Tensor
    mask: Tensor
    raw: Tensor
    merged: Tensor
    last: bool


@triton.jit
def _pick(which, first: tl.constexpr, second: tl.constexpr):
    """A constant of the first or the second phase."""
    if first == second:
        return first
    else:
        return tl.where(which == 0, first, second)


@triton.jit
def _finish(
    value,  # [BLOCK_M, BLOCK_N] float32
    rows,
    cols,
    phase,
    bias_ptr,
    residual_ptr,
    store0_ptr,
    store1_ptr,
    image_ptr,
    mask_ptr,
    raw_ptr,
    merged_ptr,
    out_h,
    out_w,
    top,
    bottom,
    left,
    right,
    rows_top,
    rows_left,
    rows_h,
    rows_w,
    n_rows,
    N: tl.constexpr,
    PHASES: tl.constexpr,
    OUT_STEP: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE_R: tl.constexpr,
    STRIDE_0: tl.constexpr,
    STRIDE_1: tl.constexpr,
    ACTIVATION_0: tl.constexpr,
    ACTIVATION_1: tl.constexpr,
    MERGE: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The epilogue. Nothing outside the rectangle is written."""
    x = (rows % rows_w + rows_left) * OUT_STEP
    y = (rows // rows_w % rows_h + rows_top) * OUT_STEP
    sample = rows // (rows_w * rows_h)
    if PHASES > 1:
        x += phase % 2
        y += phase // 2
    if MERGE:
        # columns are (y, x, channel) of a patch
        channel = cols % 4
        shift = cols // 4
        y2 = y[:, None] + (shift // PATCH)[None, :]
        x2 = x[:, None] + (shift % PATCH)[None, :]
        c2 = tl.broadcast_to(channel[None, :], value.shape)
        inside = (rows < n_rows)[:, None] & (y2 >= top) & (y2 < bottom) & (x2 >= left) & (x2 < right)
        inside = inside & ((cols < N) & (channel < CHANNELS))[None, :]
        pixel = (sample[:, None] * out_h + y2) * out_w + x2
        plane = ((sample[:, None] * CHANNELS + c2) * out_h + y2) * out_w + x2
        if WIDE:
            pixel = ((sample[:, None].to(tl.int64)) * out_h + y2) * out_w + x2
            plane = ((sample[:, None].to(tl.int64) * CHANNELS + c2) * out_h + y2) * out_w + x2
        bias = tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0)
        value = _tanh(value + bias[None, :])
        m = tl.load(mask_ptr + pixel, mask=inside, other=0.0)
        image = tl.load(image_ptr + plane, mask=inside, other=0.0)
        merged = image * (1.0 - m) + value * m
        tl.store(raw_ptr + plane, value, mask=inside)
        if LAST:
            tl.store(merged_ptr + plane, merged, mask=inside)
        else:
            tl.store(merged_ptr + pixel * 4 + c2, merged.to(merged_ptr.dtype.element_ty), mask=inside)
    else:
        inside = (rows < n_rows) & (y >= top) & (y < bottom) & (x >= left) & (x < right)
        mask = inside[:, None] & (cols < N)[None, :]
        pixel = (sample * out_h + y) * out_w + x
        if WIDE:
            pixel = (sample.to(tl.int64) * out_h + y) * out_w + x
        value += tl.load(bias_ptr + cols, mask=cols < N, other=0.0)[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + (pixel * STRIDE_R)[:, None] + cols[None, :], mask=mask, other=0.0)
            value += residual.to(tl.float32)
        first = activate(value, ACTIVATION_0).to(store0_ptr.dtype.element_ty)
        tl.store(store0_ptr + (pixel * STRIDE_0)[:, None] + cols[None, :], first, mask=mask)
        if store1_ptr is not None:
            second = activate(value, ACTIVATION_1).to(store1_ptr.dtype.element_ty)
            tl.store(store1_ptr + (pixel * STRIDE_1)[:, None] + cols[None, :], second, mask=mask)


@triton.jit
def _reflected(index, size):
    """Index -i is i, index size - 1 + i is size - 1 - i."""
    index = tl.where(index < 0, -index, index)
    return tl.where(index >= size, 2 * (size - 1) - index, index)


@triton.jit
def _prefetch(pointers):
    """Bring the cache lines of these addresses into the L2 cache; waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


# Grid integers: specialised on "is 1" and "divisible by 16" they would give each rectangle of a hole its own kernels.
_GRID_INTEGERS = [
    "in_h", "in_w", "out_h", "out_w", "top", "bottom", "left", "right",
    "rows_top", "rows_left", "rows_h", "rows_w", "n_rows", "m_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=_GRID_INTEGERS)
def _conv_kernel(
    x_ptr,  # [B, H, W, CIN], pixels STRIDE_X apart
    w_ptr,  # [taps of all phases * CIN, N]
    partial_ptr,  # [splits, PHASES * rows, N] float32, written where SPLITS > 1
    count_ptr,  # int32, a zero for each block; where given, the last program of a block adds its splits
    bias_ptr,  # float32
    residual_ptr,
    store0_ptr,
    store1_ptr,
    image_ptr,
    mask_ptr,
    raw_ptr,
    merged_ptr,
    in_h,
    in_w,
    out_h,
    out_w,
    top,
    bottom,
    left,
    right,
    rows_top,
    rows_left,
    rows_h,
    rows_w,
    n_rows,
    m_blocks,
    CIN: tl.constexpr,
    STRIDE_X: tl.constexpr,
    N: tl.constexpr,
    PHASES: tl.constexpr,
    IN_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    # of the first and second phase: source of the first tap used, that tap, taps used, taps packed
    ORIGIN_Y: tl.constexpr,
    ORIGIN_Y1: tl.constexpr,
    ORIGIN_X: tl.constexpr,
    ORIGIN_X1: tl.constexpr,
    FIRST_Y: tl.constexpr,
    FIRST_Y1: tl.constexpr,
    FIRST_X: tl.constexpr,
    FIRST_X1: tl.constexpr,
    COUNT_Y: tl.constexpr,
    COUNT_Y1: tl.constexpr,
    COUNT_X: tl.constexpr,
    COUNT_X1: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS1: tl.constexpr,
    STRIDE_R: tl.constexpr,
    STRIDE_0: tl.constexpr,
    STRIDE_1: tl.constexpr,
    ACTIVATION_0: tl.constexpr,
    ACTIVATION_1: tl.constexpr,
    MERGE: tl.constexpr,
    LAST: tl.constexpr,
    REFLECT: tl.constexpr,
    FLAT: tl.constexpr,
    SPLITS: tl.constexpr,
    NO_EMPTY_SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program owns BLOCK_M rows of one phase and BLOCK_N columns, over one part of the depth."""
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    block_m = pid // n_blocks % m_blocks
    # the phases with the most taps first
    phase = PHASES - 1 - pid // (n_blocks * m_blocks)
    phase_y = phase // 2
    phase_x = phase % 2

    origin_y = _pick(phase_y, ORIGIN_Y, ORIGIN_Y1)
    origin_x = _pick(phase_x, ORIGIN_X, ORIGIN_X1)
    first_y = _pick(phase_y, FIRST_Y, FIRST_Y1)
    first_x = _pick(phase_x, FIRST_X, FIRST_X1)
    count_y = _pick(phase_y, COUNT_Y, COUNT_Y1)
    count_x = _pick(phase_x, COUNT_X, COUNT_X1)
    taps_y = _pick(phase_y, TAPS, TAPS1)
    taps_x = _pick(phase_x, TAPS, TAPS1)
    first_tap = phase_y * (TAPS * (TAPS + TAPS1)) + phase_x * (taps_y * TAPS)

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = (cols < N)[None, :]
    depths = tl.arange(0, BLOCK_K)
    # rows past the end read what the last one reads
    read = tl.minimum(rows, n_rows - 1)
    y0 = (read // rows_w % rows_h + rows_top) * IN_STEP + origin_y
    x0 = (read % rows_w + rows_left) * IN_STEP + origin_x
    sample = (read // (rows_w * rows_h)) * in_h
    if WIDE:
        sample = sample.to(tl.int64)

    if FLAT:
        steps = (count_y * count_x * CIN + BLOCK_K - 1) // BLOCK_K
    else:
        CHUNKS: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
        steps = count_y * count_x * CHUNKS
    begin = 0
    if SPLITS > 1:
        part = (steps + SPLITS - 1) // SPLITS
        begin = tl.program_id(1) * part
        steps = tl.minimum(begin + part, steps)
        if NO_EMPTY_SPLIT:
            # without it ptxas serialises the matrix products of a loop that may be empty (Triton 3.6)
            tl.assume(begin < steps)

    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if SPLITS > 1 and not FLAT:
            # a line of weights for each row of the depth and 128 bytes of columns, while the last step still runs
            LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
            lines = tl.minimum(pid % n_blocks * BLOCK_N + tl.arange(0, (BLOCK_N + LINE - 1) // LINE) * LINE, N - 1)
            for step in tl.range(begin, steps, num_stages=1):
                tap = step // CHUNKS
                kernel_tap = first_tap + (first_y + tap // count_x) * taps_x + first_x + tap % count_x
                w_rows = kernel_tap * CIN + tl.minimum(step % CHUNKS * BLOCK_K + depths, CIN - 1)
                _prefetch(w_ptr + w_rows[:, None] * N + lines[None, :])
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in tl.range(begin, steps):
        if FLAT:
            depth = step * BLOCK_K + depths
            depth_mask = depth < count_y * count_x * CIN
            tap = depth // CIN
            tap_y = tap // count_x
            tap_x = tap % count_x
            y = y0[:, None] + tap_y[None, :]
            x = x0[:, None] + tap_x[None, :]
            if REFLECT:
                y = _reflected(y, in_h)
                x = _reflected(x, in_w)
                a_mask = tl.broadcast_to(depth_mask[None, :], (BLOCK_M, BLOCK_K))
            else:
                a_mask = (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w) & depth_mask[None, :]
            # the last block of a reflecting step may point past the map
            pixel = tl.where(a_mask, (sample[:, None] + y) * in_w + x, 0)
            a = tl.load(x_ptr + pixel * STRIDE_X + (depth % CIN)[None, :], mask=a_mask, other=0.0)
            w_rows = (first_tap + (first_y + tap_y) * taps_x + first_x + tap_x) * CIN + depth % CIN
            w_mask = depth_mask[:, None] & col_mask
        else:
            tap = step // CHUNKS
            start = step % CHUNKS * BLOCK_K
            tap_y = tap // count_x
            tap_x = tap % count_x
            y = y0 + tap_y
            x = x0 + tap_x
            depth_mask = start + depths < CIN
            if REFLECT:
                y = _reflected(y, in_h)
                x = _reflected(x, in_w)
                row_mask = tl.full([BLOCK_M], True, tl.int1)
            else:
                row_mask = (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
            pixel = (sample + y) * in_w + x
            a_ptrs = x_ptr + (pixel * STRIDE_X)[:, None] + (start + depths)[None, :]
            if CIN % BLOCK_K == 0:
                a = tl.load(a_ptrs) if REFLECT else tl.load(a_ptrs, mask=row_mask[:, None], other=0.0)
                w_mask = col_mask
            else:
                a = tl.load(a_ptrs, mask=row_mask[:, None] & depth_mask[None, :], other=0.0)
                w_mask = depth_mask[:, None] & col_mask
            w_rows = (first_tap + (first_y + tap_y) * taps_x + first_x + tap_x) * CIN + start + depths
        w_ptrs = w_ptr + w_rows[:, None] * N + cols[None, :]
        EVEN: tl.constexpr = CIN % BLOCK_K == 0 and N % BLOCK_N == 0
        w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=w_mask, other=0.0)
        acc = dot(a, w, acc, PRECISION)

    if SPLITS > 1:
        index = (tl.program_id(1) * PHASES + phase).to(tl.int64) * n_rows + rows
        inside = (rows < n_rows)[:, None] & col_mask
        tl.store(partial_ptr + index[:, None] * N + cols[None, :], acc, mask=inside)
        if count_ptr is not None:
            # every thread's part is stored before the block is counted, and counted before it is read
            tl.debug_barrier()
            done = tl.atomic_add(count_ptr + pid, 1, sem="acq_rel")
            if done == SPLITS - 1:
                tl.debug_barrier()
                value = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for split in tl.range(0, SPLITS, num_stages=1):
                    index = (split * PHASES + phase).to(tl.int64) * n_rows + rows
                    parts = partial_ptr + index[:, None] * N + cols[None, :]
                    # past the L1 cache, which does not see what other multiprocessors wrote
                    value += tl.load(parts, mask=inside, other=0.0, cache_modifier=".cg")
                _finish(
                    value,
                    rows,
                    cols,
                    phase,
                    bias_ptr,
                    residual_ptr,
                    store0_ptr,
                    store1_ptr,
                    image_ptr,
                    mask_ptr,
                    raw_ptr,
                    merged_ptr,
                    out_h,
                    out_w,
                    top,
                    bottom,
                    left,
                    right,
                    rows_top,
                    rows_left,
                    rows_h,
                    rows_w,
                    n_rows,
                    N,
                    PHASES,
                    OUT_STEP,
                    PATCH,
                    CHANNELS,
                    STRIDE_R,
                    STRIDE_0,
                    STRIDE_1,
                    ACTIVATION_0,
                    ACTIVATION_1,
                    MERGE,
                    LAST,
                    WIDE,
                )
                tl.store(count_ptr + pid, 0)
    else:
        _finish(
            acc,
            rows,
            cols,
            phase,
            bias_ptr,
            residual_ptr,
            store0_ptr,
            store1_ptr,
            image_ptr,
            mask_ptr,
            raw_ptr,
            merged_ptr,
            out_h,
            out_w,
            top,
            bottom,
            left,
            right,
            rows_top,
            rows_left,
            rows_h,
            rows_w,
            n_rows,
            N,
            PHASES,
            OUT_STEP,
            PATCH,
            CHANNELS,
            STRIDE_R,
            STRIDE_0,
            STRIDE_1,
            ACTIVATION_0,
            ACTIVATION_1,
            MERGE,
            LAST,
            WIDE,
        )


@triton.jit(do_not_specialize=[name for name in _GRID_INTEGERS if not name.startswith("in_")])
def _conv_reduce_kernel(
    partial_ptr,  # [SPLITS, PHASES * rows, N] float32
    bias_ptr,
    residual_ptr,
    store0_ptr,
    store1_ptr,
    image_ptr,
    mask_ptr,
    raw_ptr,
    merged_ptr,
    out_h,
    out_w,
    top,
    bottom,
    left,
    right,
    rows_top,
    rows_left,
    rows_h,
    rows_w,
    n_rows,
    m_blocks,
    N: tl.constexpr,
    PHASES: tl.constexpr,
    OUT_STEP: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE_R: tl.constexpr,
    STRIDE_0: tl.constexpr,
    STRIDE_1: tl.constexpr,
    ACTIVATION_0: tl.constexpr,
    ACTIVATION_1: tl.constexpr,
    MERGE: tl.constexpr,
    LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program adds the parts of BLOCK_M rows of one phase and BLOCK_N columns, in order, and finishes them."""
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    rows = pid // n_blocks % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = pid // (n_blocks * m_blocks)
    mask = (rows < n_rows)[:, None] & (cols < N)[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for split in tl.range(0, SPLITS):
        index = (split * PHASES + phase).to(tl.int64) * n_rows + rows
        value += tl.load(partial_ptr + index[:, None] * N + cols[None, :], mask=mask, other=0.0)
    _finish(
        value,
        rows,
        cols,
        phase,
        bias_ptr,
        residual_ptr,
        store0_ptr,
        store1_ptr,
        image_ptr,
        mask_ptr,
        raw_ptr,
        merged_ptr,
        out_h,
        out_w,
        top,
        bottom,
        left,
        right,
        rows_top,
        rows_left,
        rows_h,
        rows_w,
        n_rows,
        N,
        PHASES,
        OUT_STEP,
        PATCH,
        CHANNELS,
        STRIDE_R,
        STRIDE_0,
        STRIDE_1,
        ACTIVATION_0,
        ACTIVATION_1,
        MERGE,
        LAST,
        WIDE,
    )


@triton.jit
def _paint_kernel(
    image_ptr,  # [B, 3, H, W] float32
    mask_ptr,  # [B, 1, H, W] float32
    start_ptr,  # [B, 3, H, W] float32, or None for white
    picture_ptr,  # [B, H, W, 4]
    merged_ptr,  # [B, 3, H, W] float32
    positions,
    n_pixels,
    OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program paints BLOCK pixels."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pixels = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < n_pixels
    m = tl.load(mask_ptr + pixels, mask=inside, other=0.0)
    plane = pixels // positions * (3 * positions) + pixels % positions
    for c in tl.static_range(3):
        image = tl.load(image_ptr + plane + c * positions, mask=inside, other=0.0)
        tl.store(merged_ptr + plane + c * positions, image, mask=inside)
        painted = image * (1.0 - m)
        if start_ptr is None:
            painted += m
        else:
            painted += tl.load(start_ptr + plane + c * positions, mask=inside, other=0.0) * m
        tl.store(picture_ptr + pixels * 4 + c, painted.to(picture_ptr.dtype.element_ty), mask=inside)
    tl.store(picture_ptr + pixels * 4 + 3, m.to(picture_ptr.dtype.element_ty), mask=inside)


def can_run_conv(conv: Conv, source: Tensor) -> str | None:
    """Why the kernels cannot run this step on `source` [B, H, W, C], or None."""
    reason = device_reason(source, CAPABILITY)
    if reason is not None:
        return reason
    if conv.transposed and conv.stride != 2:
        return f"a transposed convolution of stride {conv.stride} (2 is supported)"
    if conv.merges and conv.out_channels != RAW_CHANNELS:
        return f"{conv.out_channels} channels at the end of a stage ({RAW_CHANNELS} are needed)"
    if source.shape[0] * source.shape[1] * source.shape[2] * 4 > MAX_GRID:
        return f"{tuple(source.shape[:3])} pixels (more than one grid holds)"
    if source.stride(3) != 1 and source.shape[3] > 1:
        return "features whose channels are not adjacent"
    return None


def can_overlap(device: torch.device) -> str | None:
    """Why launches cannot overlap there (programmatic dependent launch), or None."""
    if device.type != "cuda" or is_interpreted():
        return "only GPUs overlap launches"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "compute capability below 9.0"
    return None


def paint_forward(
    image: Tensor, mask: Tensor, start: Tensor | None, picture: Tensor, merged: Tensor, overlap: bool = False
) -> None:
    """What a run starts from: picture = (image * (1 - mask) + start * mask, mask) and merged = image.

    Args:
        image, mask: [B, 3, H, W], [B, 1, H, W] float32, contiguous.
        start: as `image`, or None for white.
        picture: [B, H, W, 4], contiguous.
        merged: as `image`.
        overlap: let the next launch start meanwhile, where :func:`can_overlap` allows it.
    """
    batch, _, height, width = image.shape
    block = 256
    with device_guard(image):
        launch(
            _paint_kernel,
            (triton.cdiv(batch * height * width, block),),
            image,
            mask,
            start,
            picture,
            merged,
            height * width,
            batch * height * width,
            OVERLAP=overlap,
            BLOCK=block,
            num_warps=2,
            num_stages=1,
        )


def conv_forward(
    conv: Conv,
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    stores: tuple[Store, ...],
    tile: Tile,
    *,
    size: tuple[int, int],
    rect: tuple[int, int, int, int] | None = None,
    residual: Tensor | None = None,
    merge: Merge | None = None,
    partial: Tensor | None = None,
    counters: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """One step: value = conv(source) + bias [+ residual], then every store, or the merge.

    Args:
        conv: the step.
        source: [B, H, W, Cin] view.
        weight: :meth:`Conv.pack`, in the dtype of `source`.
        bias: [Cout] float32.
        stores: one or two, none where `merge` is given.
        tile: block shapes and splits.
        size: (height, width) of the output.
        rect: (top, bottom, left, right) of the outputs to compute, None: all.
        residual: [B, H, W, Cout] view, added before the activations.
        merge: what a step that ends a stage reads and writes beside its features.
        overlap: start while the previous launch still runs, where :func:`can_overlap` allows it.
        partial: float32 workspace of at least ``tile.splits * work.all_rows * columns`` elements, where splits > 1.
        counters: int32 zeros, one for each block of the product (``programs(work, tile) / tile.splits``), where
            ``tile.fused``; they are zeros again afterwards.
    """
    batch, in_h, in_w, _ = source.shape
    out_h, out_w = size
    top, bottom, left, right = (0, out_h, 0, out_w) if rect is None else rect
    axis = conv.axis
    rows_y, rows_x = conv.rows_of((top, bottom, left, right))
    rows_h, rows_w = rows_y[1] - rows_y[0], rows_x[1] - rows_x[0]
    n_rows = batch * rows_h * rows_w
    if n_rows == 0:
        return
    phases = axis.phases**2
    columns = conv.columns
    last_phase = axis.phases - 1
    fused = tile.fused and tile.splits > 1
    constants: dict[str, int] = {}
    for name, in_size, out_size in (("Y", in_h, out_h), ("X", in_w, out_w)):
        for suffix, phase in (("", 0), ("1", last_phase)):
            first, count = axis.used(phase, in_size, out_size, conv.reflect)
            constants[f"ORIGIN_{name}{suffix}"] = axis.origins[phase] + first
            constants[f"FIRST_{name}{suffix}"] = first
            constants[f"COUNT_{name}{suffix}"] = count
    views = [source, *(s.view for s in stores), *([] if residual is None else [residual])]
    most = max(v.shape[0] * v.stride(0) for v in views)
    common = {
        "N": columns,
        "PHASES": phases,
        "OUT_STEP": axis.out_step,
        "PATCH": axis.patch,
        "CHANNELS": conv.out_channels,
        "STRIDE_R": 0 if residual is None else residual.stride(2),
        "STRIDE_0": stores[0].view.stride(2) if stores else 0,
        "STRIDE_1": stores[1].view.stride(2) if len(stores) > 1 else 0,
        "ACTIVATION_0": ACTIVATIONS[stores[0].activation] if stores else 0,
        "ACTIVATION_1": ACTIVATIONS[stores[1].activation] if len(stores) > 1 else 0,
        "MERGE": merge is not None,
        "LAST": merge is not None and merge.last,
        "SPLITS": tile.splits,
        # pointers span 2**31 elements of 32-bit arithmetic
        "WIDE": max(most, batch * out_h * out_w * PICTURE_CHANNELS) >= MAX_GRID,
        "OVERLAP": overlap,
    }
    common |= overlapping(overlap)
    tail = (
        bias,
        residual,
        stores[0].view if stores else None,
        stores[1].view if len(stores) > 1 else None,
        *((None,) * 4 if merge is None else (merge.image, merge.mask, merge.raw, merge.merged)),
    )
    place = (out_h, out_w, top, bottom, left, right, rows_y[0], rows_x[0], rows_h, rows_w, n_rows)
    m_blocks = triton.cdiv(n_rows, tile.block_m)
    n_blocks = triton.cdiv(columns, tile.block_n)
    work = conv.work(batch, (in_h, in_w), (out_h, out_w), (top, bottom, left, right))
    lengths = work.steps(tile.block_k)
    if fused and (counters is None or counters.numel() < m_blocks * n_blocks * phases):
        raise ValueError(f"counters: expected {m_blocks * n_blocks * phases} or more int32 zeros for {tile}")
    with device_guard(source):
        launch(
            _conv_kernel,
            (m_blocks * n_blocks * phases, tile.splits),
            source,
            weight,
            partial if tile.splits > 1 else None,
            counters if fused else None,
            *tail,
            in_h,
            in_w,
            *place,
            m_blocks,
            CIN=conv.in_channels,
            STRIDE_X=source.stride(2),
            IN_STEP=axis.in_step,
            TAPS=axis.taps[0],
            TAPS1=axis.taps[last_phase],
            REFLECT=conv.reflect,
            FLAT=conv.flat,
            NO_EMPTY_SPLIT=all((tile.splits - 1) * -(-length // tile.splits) < length for length in lengths),
            PRECISION=dot_precision(source.dtype),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            # ptxas may spill registers of large accumulators to fit one more program on a multiprocessor
            **({"maxnreg": 255} if fused and tile.block_m * tile.block_n >= 2048 * tile.num_warps else {}),
            **constants,
            **common,
        )
        if tile.splits > 1 and not fused:
            block_m = min(4, triton.next_power_of_2(n_rows))
            block_n = min(128, triton.next_power_of_2(columns))
            m_blocks = triton.cdiv(n_rows, block_m)
            launch(
                _conv_reduce_kernel,
                (m_blocks * triton.cdiv(columns, block_n) * phases,),
                partial,
                *tail,
                *place,
                m_blocks,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=2,
                num_stages=1,
                **common,
            )
