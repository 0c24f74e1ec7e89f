"""Convolutions and transposed convolutions of the engine as implicit matrix products, epilogues fused.

Feature maps are NHWC views ([B, H, W, C], unit channel stride, any pixel stride). Along each axis::

    out[S g + phase] = sum_t source[s g + origin_phase + t] weight_phase[t]

with unit steps between the taps t of a phase. A convolution of stride s has S = 1, one phase and origin -padding; a
transposed one of stride 2 has s = 1, S = 2 and two phases per axis. So the matrix product is

    rows g = (sample, y, x) of a rectangle   x   columns = output channels,   depth = taps x input channels

and the phases are further programs of the same launch (no zero insertion, no col2im). Zero and reflection padding are
index arithmetic on the rows. Taps that read only padding in the whole map are left out: of the 16 MiB of 16-bit
weights of e8 and d8, 4 are read at 256x256. Weights are packed once, [phase, tap, Cin] x Cout.

**Steps that end a stage** have 3 output channels, which would leave most of a matrix unit idle and read every input
pixel once for each tap. Instead their columns are (y, x, channel) of a small patch of outputs: 2x2 for d1 (all four
phases over one 3x3 window), 4x4 for the 7x7 convolution (a 10x10 window, 2.7 times the multiplications, but an
eighth of the reads). Their epilogue applies tanh, writes the raw picture and merges it into the picture.

**Split depth** (split-K). Maps of 8x8 and smaller have few rows and many weights. The depth is split so that the
programs fill the GPU, and partial sums go to a float32 workspace [splits, rows, columns]. They are added in a fixed
order, so results are bitwise repeatable, and the epilogue follows. Either the last program of a block adds them,
found by a counter (`Tile.fused`), or a second kernel does, which spreads many splits over more programs.

**Overlap** (programmatic dependent launch; Hopper and newer; off by default). A launch may start while the previous
one still runs: it prefetches its weights into the L2 cache, then waits for the end of the previous launch before it
reads or writes any feature map. On an H100 it is 5 to 8 % slower with the tuned tiles, for any place of the trigger.

**Index arithmetic.** A program has few warps and is often alone on its multiprocessor, so instructions before its
first product and after its last one are time. Rows are divided by multiplication (`conv_kernels.divisor`). Where a
tap has few channels, a step takes whole rows of taps, each padded to a power of two (`Conv.tap_row`): what depends on
the place in a row is computed once.

**Epilogue.** value = sum + bias [+ residual]; up to two stores, each with its activation.
Every program reads (BLOCK_M + BLOCK_N) x depth elements, mostly from the L2 cache. Inputs, weights and outputs pass
through device memory once. Products accumulate in float32.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lgnet_fast.engine.geometry import Axis, Geometry

from .configs import device_generation
from .conv_configs import Tile, Work
from .conv_kernels import (
    Epilogue,
    Layout,
    Outputs,
    Picture,
    Place,
    Taps,
    _conv_kernel,
    _conv_reduce_kernel,
    _paint_kernel,
    divisor,
)
from .launch import (
    ACTIVATIONS,
    MAX_GRID,
    device_guard,
    dot_precision,
    is_interpreted,
    launch,
    overlapping,
)
from .results import Merge, Store

CAPABILITY = (8, 0)
PICTURE_CHANNELS = 4
"""Channels of the picture buffer (RGB, mask); also columns per output pixel of a step that ends a stage."""
RAW_CHANNELS = 3
_PATCH = 4  # outputs per side of the patch, for a convolution of stride 1 that ends a stage


class Conv(NamedTuple):
    """A (transposed) convolution, apart from sizes. `transposed` needs stride 2; `merges`: it ends a stage."""

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
        """Taps and phases along one axis; both axes are alike."""
        if not self.merges:
            return self.geometry.axis()
        return self.geometry.axis(self.stride if self.transposed else _PATCH if self.stride == 1 else 1)

    @property
    def columns(self) -> int:
        """Columns of the product."""
        return self.axis.patch**2 * PICTURE_CHANNELS if self.merges else self.out_channels

    @property
    def tap_row(self) -> int:
        """Depth of a row of taps with all its channels, padded to a power of two, where a tap has fewer than 16
        channels: a block of the depth then holds whole rows. 0: a block holds channels of one tap."""
        return triton.next_power_of_2(max(self.axis.taps) * self.in_channels) if self.in_channels < 16 else 0

    def kernel_tap(self, offset: int, source: int) -> int | None:
        """The kernel's tap by which output `offset` of row 0 reads `source`, if any."""
        return self.geometry.tap(offset, source)

    def pack(self, weight: Tensor) -> Tensor:
        """Weights [out, in, k, k] (transposed: [in, out, k, k]) packed as [taps of all phases * in, columns]."""
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
        """Size of the matrix product for outputs `rect` = (top, bottom, left, right)."""
        axis = self.axis
        (top, bottom), (left, right) = self.rows_of(rect)
        taps, tap_rows = [], []
        for phase_y, phase_x in itertools.product(range(axis.phases), repeat=2):
            _, count_y = axis.used(phase_y, in_size[0], out_size[0], self.reflect)
            _, count_x = axis.used(phase_x, in_size[1], out_size[1], self.reflect)
            taps.append(count_y * count_x)
            tap_rows.append(count_y)
        rows = batch * (bottom - top) * (right - left)
        return Work(rows, self.columns, tuple(taps), self.in_channels, self.tap_row, tuple(tap_rows), self.merges)

    def rows_of(self, rect: tuple[int, int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows g of the product along each axis that cover outputs (top, bottom, left, right)."""
        step = self.axis.out_step
        top, bottom, left, right = rect
        return (top // step, -(-bottom // step)), (left // step, -(-right // step))


def can_overlap(device: torch.device) -> str | None:
    """Why launches on `device` cannot overlap (programmatic dependent launch), or None where they can."""
    if device.type != "cuda" or is_interpreted():
        return "only GPUs overlap launches"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "compute capability below 9.0"
    return None


def paint_forward(
    image: Tensor, mask: Tensor, start: Tensor | None, picture: Tensor, merged: Tensor, overlap: bool = False
) -> None:
    """Set the buffers at the start of a run: picture = (image * (1 - mask) + start * mask, mask), merged = image.

    Args:
        image, mask: [B, 3, H, W], [B, 1, H, W] float32, contiguous.
        start: as `image`, or None for white.
        picture: [B, H, W, 4], contiguous.
        merged: as `image`.
        overlap: let the next launch start before this one ends, where :func:`can_overlap` allows it.
    """
    batch, _, height, width = image.shape
    block = 256
    with device_guard(image):
        launch(
            _paint_kernel,
            (triton.cdiv(height * width, block), batch),
            image,
            mask,
            start,
            picture,
            merged,
            height * width,
            OVERLAP=overlap,
            BLOCK=block,
            num_warps=2,
            num_stages=1,
        )


def _layout(conv: Conv) -> Layout:
    axis = conv.axis
    return Layout(
        conv.in_channels,
        conv.out_channels,
        conv.columns,
        axis.phases**2,
        axis.in_step,
        axis.out_step,
        axis.patch,
        axis.taps[0],
        axis.taps[-1],
        conv.reflect,
        conv.tap_row,
    )


def _taps(axis: Axis, in_size: int, out_size: int, reflect: bool) -> Taps:
    """The taps that read any input, not only padding, along one axis."""
    phases = (0, axis.phases - 1)
    (first0, count0), (first1, count1) = (axis.used(phase, in_size, out_size, reflect) for phase in phases)
    return Taps(axis.origins[0] + first0, axis.origins[-1] + first1, first0, first1, count0, count1)


def _place(conv: Conv, batch: int, size: tuple[int, int], rect: tuple[int, int, int, int] | None) -> Place:
    """The place of the outputs `rect` (None: all) of `batch` maps of `size` (height, width)."""
    bounds = (0, size[0], 0, size[1]) if rect is None else rect
    (rows_top, rows_bottom), (rows_left, rows_right) = conv.rows_of(bounds)
    rows_h, rows_w = rows_bottom - rows_top, rows_right - rows_left
    n_rows = batch * rows_h * rows_w
    return Place(
        *size,
        *bounds,
        rows_top,
        rows_left,
        rows_h,
        rows_w,
        n_rows,
        *divisor(max(1, rows_h)),
        *divisor(max(1, rows_w)),
    )


def _epilogue(
    source: Tensor, stores: tuple[Store, ...], residual: Tensor | None, merge: Merge | None, size: tuple[int, int]
) -> Epilogue:
    views = [source, *(store.view for store in stores), *([] if residual is None else [residual])]
    most = max(max(v.shape[0] * v.stride(0) for v in views), source.shape[0] * size[0] * size[1] * PICTURE_CHANNELS)
    (stride0, activation0), (stride1, activation1) = [_stored(store) for store in (*stores, None, None)[:2]]
    residual_stride = 0 if residual is None else residual.stride(2)
    last = merge is not None and merge.last
    return Epilogue(residual_stride, stride0, stride1, activation0, activation1, last, most >= MAX_GRID)


def _stored(store: Store | None) -> tuple[int, int]:
    """Pixel stride and code of the activation."""
    return (0, 0) if store is None else (store.view.stride(2), ACTIVATIONS[store.activation])


class _Step(NamedTuple):
    """Arguments that all launches of one step share. constants: of the kernels, and options of the launch."""

    conv: Conv
    source: Tensor
    outputs: Outputs
    picture: Picture | None
    place: Place
    constants: dict[str, Any]


def _multiply(step: _Step, weight: Tensor, partial: Tensor | None, counters: Tensor | None, tile: Tile) -> None:
    """The matrix product, then the epilogue; with `partial` but no `counters`, both are left to :func:`_reduce`."""
    conv, source, place = step.conv, step.source, step.place
    _, in_h, in_w, _ = source.shape
    axis = conv.axis
    phases = axis.phases**2
    blocks = triton.cdiv(place.n_rows, tile.block_m) * triton.cdiv(conv.columns, tile.block_n)
    fused = tile.fused and tile.splits > 1
    if fused and (counters is None or counters.numel() < blocks * phases):
        raise ValueError(f"counters: expected {blocks * phases} or more int32 zeros for {tile}")
    bounds = (place.top, place.bottom, place.left, place.right)
    work = conv.work(source.shape[0], (in_h, in_w), (place.out_h, place.out_w), bounds)
    lengths = work.steps(tile.block_k)
    launch(
        _conv_kernel,
        (blocks, tile.splits, phases),
        source,
        weight,
        partial,
        counters,
        step.outputs,
        step.picture,
        in_h,
        in_w,
        *place,
        TAPS_Y=_taps(axis, in_h, place.out_h, conv.reflect),
        TAPS_X=_taps(axis, in_w, place.out_w, conv.reflect),
        STRIDE_X=source.stride(2),
        NO_EMPTY_SPLIT=all((tile.splits - 1) * -(-length // tile.splits) < length for length in lengths),
        PRECISION=dot_precision(source.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"maxnreg": 255} if _may_spill(step, tile) else {}),
        **step.constants,
    )


def _may_spill(step: _Step, tile: Tile) -> bool:
    """Whether ptxas, without a limit, may spill registers of the accumulator for a higher occupancy."""
    generation = device_generation(step.source.device)[0]
    if generation == "sm_89" and tile.splits == 1:
        if step.conv.in_channels % tile.block_k:  # every load has a mask
            return tile.block_m * tile.block_n // tile.num_warps >= 2048
        return step.outputs.residual is not None and tile.block_m * tile.block_n // tile.num_warps <= 512
    if generation == "sm_100":
        least = 512 if tile.splits == 1 else 1024
    elif tile.splits >= 8:
        least = 0 if generation == "sm_89" and tile.splits >= 16 else 1024
    elif tile.splits > 1 and tile.fused:
        least = 2048
    else:
        return False
    return tile.block_m * tile.block_n // tile.num_warps >= least


def _reduce(step: _Step, partial: Tensor | None) -> None:
    """Add the partial sums of the splits, then the epilogue."""
    columns = step.conv.columns
    block_m = min(4, triton.next_power_of_2(step.place.n_rows))
    block_n = min(128, triton.next_power_of_2(columns))
    blocks = triton.cdiv(step.place.n_rows, block_m) * triton.cdiv(columns, block_n)
    launch(
        _conv_reduce_kernel,
        (blocks, 1, step.conv.axis.phases**2),
        partial,
        step.outputs,
        step.picture,
        *step.place,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=2,
        num_stages=1,
        **step.constants,
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
        merge: pictures and mask of a step that ends a stage, else None.
        overlap: start while the previous launch still runs, where :func:`can_overlap` allows it.
        partial: float32 workspace of at least ``tile.splits * work.all_rows * columns`` elements, where splits > 1.
        counters: int32 zeros, one for each block of the product (``programs(work, tile) / tile.splits``), where
            ``tile.fused``; they are zeros again afterwards.
    """
    place = _place(conv, source.shape[0], size, rect)
    if place.n_rows == 0:
        return
    first, second = (*stores, None, None)[:2]
    step = _Step(
        conv,
        source,
        Outputs(bias, residual, None if first is None else first.view, None if second is None else second.view),
        None if merge is None else Picture(merge.image, merge.mask, merge.raw, merge.merged),
        place,
        {
            "LAYOUT": _layout(conv),
            "EPILOGUE": _epilogue(source, stores, residual, merge, size),
            "SPLITS": tile.splits,
            "OVERLAP": overlap,
            **overlapping(overlap),
        },
    )
    with device_guard(source):
        if tile.splits == 1:
            _multiply(step, weight, None, None, tile)
        elif tile.fused:
            _multiply(step, weight, partial, counters, tile)
        else:
            _multiply(step, weight, partial, None, tile)
            _reduce(step, partial)
