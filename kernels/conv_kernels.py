"""The kernels of the engine's convolutions; :mod:`.conv` says what they compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import activate, dot, stable_tanh


class Outputs(NamedTuple):
    """Operands and results of the epilogue, None where absent.

    bias: float32. residual, first, second: [B, H, W, C], pixels `Epilogue.residual_stride` or `strides` apart.
    """

    bias: Any
    residual: Any = None
    first: Any = None
    second: Any = None


class Picture(NamedTuple):
    """Inputs (image, mask) and results (raw, merged) of a step that ends a stage, see `conv.Merge`."""

    image: Any
    mask: Any
    raw: Any
    merged: Any


class Place(NamedTuple):
    """Sizes of the output, the rectangle of it to compute, and the product's rows that cover it.

    magic_h, shift_h, magic_w, shift_w: `divisor` of rows_h and rows_w.
    """

    out_h: Any
    out_w: Any
    top: Any
    bottom: Any
    left: Any
    right: Any
    rows_top: Any
    rows_left: Any
    rows_h: Any
    rows_w: Any
    n_rows: Any
    magic_h: Any
    shift_h: Any
    magic_w: Any
    shift_w: Any


def divisor(size: int) -> tuple[int, int]:
    """Magic number and shift by which :func:`_divided` divides by `size`, which is 1 to 2**31 - 1.

    With l = ceil(log2(size)) and m = ceil(2**(31 + l) / size), n // size = n m >> (31 + l) for all n below 2**31
    (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994). m has 32 bits; it is
    given as a signed number, so that it is a 32-bit argument.
    """
    shift = (size - 1).bit_length()
    magic = -(-(1 << (31 + shift)) // size)
    return magic - (1 << 32), shift


class Layout(NamedTuple):
    """Constants of a convolution.

    columns of the product, phases of both axes together, steps and patch as in `conv.Axis`, packed taps of the first
    and second phase of an axis; tap_row: `conv.Conv.tap_row`. Fields are no tuples, because Triton 3.6 loses
    constants in nested tuples.
    """

    in_channels: int
    out_channels: int
    columns: int
    phases: int
    in_step: int
    out_step: int
    patch: int
    taps0: int
    taps1: int
    reflect: bool
    tap_row: int


class Taps(NamedTuple):
    """The taps used along one axis, per phase (first, second): source of the first tap, its index, their number."""

    origin0: int
    origin1: int
    first0: int
    first1: int
    count0: int
    count1: int


class Epilogue(NamedTuple):
    """Constants of the epilogue: pixel strides, values of ACTIVATIONS, whether `Picture.merged` is planar.

    wide: offsets can reach 2**31 elements and need 64-bit arithmetic.
    """

    residual_stride: int
    stride0: int
    stride1: int
    activation0: int
    activation1: int
    last: bool
    wide: bool


@triton.jit
def _of_phase(which, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The first or the second of two constants."""
    if FIRST == SECOND:
        return FIRST
    else:
        return tl.where(which == 0, FIRST, SECOND)


@triton.jit
def _divided(n, magic, shift):
    """n // size, where 0 <= n < 2**31 and (magic, shift) = divisor(size): three instructions, a division takes 15."""
    return (tl.umulhi(n.to(tl.uint32) * 2, magic.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def _positions(rows, place):
    """Sample, y and x of rows of the product; y and x are counted within the rectangle of rows."""
    line = _divided(rows, place.magic_w, place.shift_w)
    sample = _divided(line, place.magic_h, place.shift_h)
    return sample, line - sample * place.rows_h, rows - line * place.rows_w


@triton.jit
def _within(index, low, high):
    """low <= index < high, in one comparison."""
    return (index - low).to(tl.uint32) < (high - low).to(tl.uint32)


@triton.jit
def _finish(
    value,  # [BLOCK_M, BLOCK_N] float32
    rows,
    cols,
    phase,
    outputs,  # Outputs
    picture,  # Picture, or None
    place,  # Place
    LAYOUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """The epilogue. It writes nothing outside the rectangle."""
    sample, y, x = _positions(rows, place)
    y = (y + place.rows_top) * LAYOUT.out_step
    x = (x + place.rows_left) * LAYOUT.out_step
    if LAYOUT.phases > 1:
        x += phase % 2
        y += phase // 2
    if picture is not None:
        # columns are (y, x, channel) of a patch
        channel = cols % 4
        shift = cols // 4
        y2 = y[:, None] + (shift // LAYOUT.patch)[None, :]
        x2 = x[:, None] + (shift % LAYOUT.patch)[None, :]
        c2 = tl.broadcast_to(channel[None, :], value.shape)
        inside = (rows < place.n_rows)[:, None]
        inside = inside & _within(y2, place.top, place.bottom) & _within(x2, place.left, place.right)
        inside = inside & ((cols < LAYOUT.columns) & (channel < LAYOUT.out_channels))[None, :]
        pixel = (sample[:, None] * place.out_h + y2) * place.out_w + x2
        plane = ((sample[:, None] * LAYOUT.out_channels + c2) * place.out_h + y2) * place.out_w + x2
        if EPILOGUE.wide:
            pixel = ((sample[:, None].to(tl.int64)) * place.out_h + y2) * place.out_w + x2
            plane = ((sample[:, None].to(tl.int64) * LAYOUT.out_channels + c2) * place.out_h + y2) * place.out_w + x2
        bias = tl.load(outputs.bias + channel, mask=channel < LAYOUT.out_channels, other=0.0)
        value = stable_tanh(value + bias[None, :])
        m = tl.load(picture.mask + pixel, mask=inside, other=0.0)
        image = tl.load(picture.image + plane, mask=inside, other=0.0)
        merged = image * (1.0 - m) + value * m
        tl.store(picture.raw + plane, value, mask=inside)
        if EPILOGUE.last:
            tl.store(picture.merged + plane, merged, mask=inside)
        else:
            tl.store(picture.merged + pixel * 4 + c2, merged.to(picture.merged.dtype.element_ty), mask=inside)
    else:
        inside = rows < place.n_rows
        if LAYOUT.out_step > 1:  # the rows may cover more than the rectangle
            inside = inside & _within(y, place.top, place.bottom) & _within(x, place.left, place.right)
        mask = inside[:, None] & (cols < LAYOUT.columns)[None, :]
        pixel = (sample * place.out_h + y) * place.out_w + x
        if EPILOGUE.wide:
            pixel = (sample.to(tl.int64) * place.out_h + y) * place.out_w + x
        value += tl.load(outputs.bias + cols, mask=cols < LAYOUT.columns, other=0.0)[None, :]
        if outputs.residual is not None:
            r_ptrs = outputs.residual + (pixel * EPILOGUE.residual_stride)[:, None] + cols[None, :]
            value += tl.load(r_ptrs, mask=mask, other=0.0).to(tl.float32)
        first = activate(value, EPILOGUE.activation0).to(outputs.first.dtype.element_ty)
        tl.store(outputs.first + (pixel * EPILOGUE.stride0)[:, None] + cols[None, :], first, mask=mask)
        if outputs.second is not None:
            second = activate(value, EPILOGUE.activation1).to(outputs.second.dtype.element_ty)
            tl.store(outputs.second + (pixel * EPILOGUE.stride1)[:, None] + cols[None, :], second, mask=mask)


@triton.jit
def _reflected(index, size):
    """Reflection padding: index -i becomes i, index size - 1 + i becomes size - 1 - i."""
    index = tl.abs(index)
    return tl.minimum(index, 2 * (size - 1) - index)


@triton.jit
def _prefetch(pointers):
    """Bring the cache lines of these addresses into the L2 cache; waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


# Integers that Triton must not specialise on "is 1" or "divisible by 16": each rectangle would compile a new kernel.
_GRID_INTEGERS = [
    "in_h", "in_w", "out_h", "out_w", "top", "bottom", "left", "right",
    "rows_top", "rows_left", "rows_h", "rows_w", "n_rows", "magic_h", "shift_h", "magic_w", "shift_w",
]  # fmt: skip


@triton.jit(do_not_specialize=_GRID_INTEGERS)
def _conv_kernel(
    x_ptr,  # [B, H, W, in_channels], pixels STRIDE_X apart
    w_ptr,  # [taps of all phases * in_channels, columns]
    partial_ptr,  # [splits, phases * rows, columns] float32, written where SPLITS > 1
    count_ptr,  # int32, a zero for each block; where given, the last program of a block adds its splits
    outputs,  # Outputs
    picture,  # Picture, or None
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
    magic_h,
    shift_h,
    magic_w,
    shift_w,
    LAYOUT: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    EPILOGUE: tl.constexpr,
    STRIDE_X: tl.constexpr,
    SPLITS: tl.constexpr,
    NO_EMPTY_SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program computes BLOCK_M rows of one phase and BLOCK_N columns, over one split of the depth."""
    CIN: tl.constexpr = LAYOUT.in_channels
    N: tl.constexpr = LAYOUT.columns
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    place = Place(
        out_h, out_w, top, bottom, left, right, rows_top, rows_left, rows_h, rows_w, n_rows,
        magic_h, shift_h, magic_w, shift_w,
    )  # fmt: skip
    pid = tl.program_id(0)
    block_m = pid // n_blocks
    phase = 0
    if LAYOUT.phases > 1:
        phase = LAYOUT.phases - 1 - tl.program_id(2)  # those with the most taps first
    phase_y = phase // 2
    phase_x = phase % 2

    origin_y = _of_phase(phase_y, TAPS_Y.origin0, TAPS_Y.origin1)
    origin_x = _of_phase(phase_x, TAPS_X.origin0, TAPS_X.origin1)
    first_y = _of_phase(phase_y, TAPS_Y.first0, TAPS_Y.first1)
    first_x = _of_phase(phase_x, TAPS_X.first0, TAPS_X.first1)
    count_y = _of_phase(phase_y, TAPS_Y.count0, TAPS_Y.count1)
    count_x = _of_phase(phase_x, TAPS_X.count0, TAPS_X.count1)
    taps_y = _of_phase(phase_y, LAYOUT.taps0, LAYOUT.taps1)
    taps_x = _of_phase(phase_x, LAYOUT.taps0, LAYOUT.taps1)
    TAPS: tl.constexpr = LAYOUT.taps0
    first_tap = phase_y * (TAPS * (TAPS + LAYOUT.taps1)) + phase_x * (taps_y * TAPS)

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = (cols < N)[None, :]
    depths = tl.arange(0, BLOCK_K)
    # rows past the end read the sources of the last row
    read = tl.minimum(rows, n_rows - 1)
    sample, y0, x0 = _positions(read, place)
    y0 = (y0 + rows_top) * LAYOUT.in_step + origin_y
    x0 = (x0 + rows_left) * LAYOUT.in_step + origin_x
    sample = sample * in_h
    if EPILOGUE.wide:
        sample = sample.to(tl.int64)
    w_cols = depths[:, None] * N + cols[None, :]

    if LAYOUT.tap_row > 0:
        # A step takes whole rows of taps. The place in a row is the same in all steps, and with it all of the
        # arithmetic on x.
        tl.static_assert(BLOCK_K % LAYOUT.tap_row == 0)
        TAP_ROWS: tl.constexpr = BLOCK_K // LAYOUT.tap_row
        steps = (count_y + TAP_ROWS - 1) // TAP_ROWS
        tap_rows = depths // LAYOUT.tap_row
        in_row = depths % LAYOUT.tap_row
        x = x0[:, None] + (in_row // CIN)[None, :]
        tap_mask = tl.broadcast_to((in_row < count_x * CIN)[None, :], (BLOCK_M, BLOCK_K))
        if LAYOUT.reflect:
            x = _reflected(x, in_w)
        else:
            tap_mask = tap_mask & _within(x, 0, in_w)
        x_offsets = x * STRIDE_X + (in_row % CIN)[None, :]
        w_row = (first_tap + first_y * taps_x + first_x) * CIN
    else:
        x_offsets = (((sample + y0) * in_w + x0) * STRIDE_X)[:, None] + depths[None, :]
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
        if SPLITS > 1 and LAYOUT.tap_row == 0:
            # Prefetch weights while the previous step still runs: one cache line per row of the depth and 128 bytes
            # of columns.
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
        if LAYOUT.tap_row > 0:
            a_mask = tap_mask
            w_mask = (in_row < count_x * CIN)[:, None] & col_mask
            if TAP_ROWS == 1:
                tap_y = step
                y = (y0 + tap_y)[:, None]
                w_ptrs = w_ptr + (w_row + tap_y * taps_x * CIN) * N + w_cols
            else:
                tap_y = step * TAP_ROWS + tap_rows
                y = y0[:, None] + tap_y[None, :]
                w_rows = w_row + tap_y * (taps_x * CIN) + in_row
                w_ptrs = w_ptr + w_rows[:, None] * N + cols[None, :]
                a_mask = a_mask & (tap_y < count_y)[None, :]
                w_mask = w_mask & (tap_y < count_y)[:, None]
            if LAYOUT.reflect:
                y = _reflected(y, in_h)
            else:
                a_mask = a_mask & _within(y, 0, in_h)
            offsets = (sample[:, None] + y) * in_w * STRIDE_X + x_offsets
            if CIN == 4 and STRIDE_X % 4 == 0:  # a pixel is read at once, which Triton does not find by itself
                offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, 4)), (1, 4))
            a = tl.load(x_ptr + offsets, mask=a_mask, other=0.0)
        else:
            tap = step // CHUNKS
            start = step % CHUNKS * BLOCK_K
            tap_y = tap // count_x
            tap_x = tap % count_x
            y = y0 + tap_y
            x = x0 + tap_x
            depth_mask = start + depths < CIN
            if LAYOUT.reflect:
                pixel = (sample + _reflected(y, in_h)) * in_w + _reflected(x, in_w)
                row_mask = tl.full([BLOCK_M], True, tl.int1)
                a_ptrs = x_ptr + start + ((pixel * STRIDE_X)[:, None] + depths[None, :])
            else:
                row_mask = _within(y, 0, in_h) & _within(x, 0, in_w)
                a_ptrs = x_ptr + ((tap_y * in_w + tap_x) * STRIDE_X + start) + x_offsets
            if CIN % BLOCK_K == 0:
                a = tl.load(a_ptrs) if LAYOUT.reflect else tl.load(a_ptrs, mask=row_mask[:, None], other=0.0)
                w_mask = col_mask
            else:
                a = tl.load(a_ptrs, mask=row_mask[:, None] & depth_mask[None, :], other=0.0)
                w_mask = depth_mask[:, None] & col_mask
            kernel_tap = first_tap + (first_y + tap_y) * taps_x + first_x + tap_x
            w_ptrs = w_ptr + (kernel_tap * CIN + start) * N + w_cols
        EVEN: tl.constexpr = CIN % BLOCK_K == 0 and N % BLOCK_N == 0
        w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=w_mask, other=0.0)
        acc = dot(a, w, acc, PRECISION)

    if SPLITS > 1:
        inside = (rows < n_rows)[:, None] & col_mask
        part_size = tl.full([], LAYOUT.phases * N, tl.int64) * n_rows
        own = partial_ptr + tl.full([], phase * N, tl.int64) * n_rows
        offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(own + tl.program_id(1) * part_size + offsets, acc, mask=inside)
        if count_ptr is not None:
            counter = count_ptr + tl.program_id(2) * tl.num_programs(0) + pid
            # Every thread stores its part before the counter is raised, and the counter is raised before parts are
            # read.
            tl.debug_barrier()
            done = tl.atomic_add(counter, 1, sem="acq_rel")
            if done == SPLITS - 1:
                tl.debug_barrier()
                value = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for split in tl.range(0, SPLITS, num_stages=1):
                    # bypasses the L1 cache, which may be stale after writes of other multiprocessors
                    parts = own + split * part_size + offsets
                    value += tl.load(parts, mask=inside, other=0.0, cache_modifier=".cg")
                _finish(value, rows, cols, phase, outputs, picture, place, LAYOUT, EPILOGUE)
                tl.store(counter, 0)
    else:
        _finish(acc, rows, cols, phase, outputs, picture, place, LAYOUT, EPILOGUE)


@triton.jit(do_not_specialize=[name for name in _GRID_INTEGERS if not name.startswith("in_")])
def _conv_reduce_kernel(
    partial_ptr,  # [SPLITS, phases * rows, columns] float32
    outputs,  # Outputs
    picture,  # Picture, or None
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
    magic_h,
    shift_h,
    magic_w,
    shift_w,
    LAYOUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program adds the splits of BLOCK_M rows of one phase and BLOCK_N columns, in order, then the epilogue."""
    N: tl.constexpr = LAYOUT.columns
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    place = Place(
        out_h, out_w, top, bottom, left, right, rows_top, rows_left, rows_h, rows_w, n_rows,
        magic_h, shift_h, magic_w, shift_w,
    )  # fmt: skip
    pid = tl.program_id(0)
    rows = pid // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = tl.program_id(2)
    mask = (rows < n_rows)[:, None] & (cols < N)[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for split in tl.range(0, SPLITS):
        index = (split * LAYOUT.phases + phase).to(tl.int64) * n_rows + rows
        value += tl.load(partial_ptr + index[:, None] * N + cols[None, :], mask=mask, other=0.0)
    _finish(value, rows, cols, phase, outputs, picture, place, LAYOUT, EPILOGUE)


@triton.jit
def _paint_kernel(
    image_ptr,  # [B, 3, H, W] float32
    mask_ptr,  # [B, 1, H, W] float32
    start_ptr,  # [B, 3, H, W] float32, or None for white
    picture_ptr,  # [B, H, W, 4]
    merged_ptr,  # [B, 3, H, W] float32
    positions,
    OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program paints BLOCK pixels of one sample."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = own < positions
    first = tl.program_id(1).to(tl.int64) * positions
    pixels = first + own
    m = tl.load(mask_ptr + pixels, mask=inside, other=0.0)
    plane = 3 * first + own
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
