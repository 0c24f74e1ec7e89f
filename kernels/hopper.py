"""The engine's convolutions on Hopper (compute capability 9.0) by the CUDA C++ kernel of `csrc/cuda/hopper_conv.cu`.

It computes what :func:`.conv.conv_forward` computes, for steps of stride 1, transposed ones, 4x4 ones of stride 2, in
float16 and bfloat16. The patch of the input that a tile of outputs needs is copied to shared memory once and used
for all taps. The machine code is in the package and is loaded by the driver, so that users need no compiler. An
engine's first use measures some tiles of it beside what runs otherwise, the tuner (`lgnet_fast.engine.cuda.tuning`)
all :func:`candidates`. A product uses this kernel where it was the fastest on the GPU in use; a product that was not
measured, where the nearest one does and the estimate is clearly less than that of Triton's kernel.

The first use on a GPU compares it with PyTorch in float32 (:func:`reason_against`).
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled_checks import DTYPES, LIMIT, Divisor, FirstUse, check_bias, check_view, exact_convolution, set_stores
from .configs import device_generation
from .conv import Conv
from .conv_configs import Work
from .cuda_driver import Kernel, call
from .hopper_shapes import (
    CANDIDATES,
    CAPABILITY,
    CHANNELS,
    GROUP_THREADS,
    OTHER_THREADS,
    TILE_HEIGHTS,
    TILE_W,
    HopperTile,
    Product,
    Shape,
    takes_several,
    unsupported,
)
from .launch import device_guard, is_recording
from .results import Store

_MOST_SPLIT_BLOCKS = 160  # an H100 has 132 multiprocessors; more blocks need no split of the depth


class Output(ctypes.Structure):
    """`Output` of csrc/cuda/hopper_conv.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "store0", "store1")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "top", "bottom", "left", "right",
                "stride_r", "stride_0", "stride_1", "activation_0", "activation_1",
            )
        ),
    ]  # fmt: skip


class Args(ctypes.Structure):
    """`Args` of csrc/cuda/hopper_conv.cuh."""

    _fields_ = [
        ("clocks", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("out_h", "out_w", "rows_top", "rows_left", "in_h", "in_w")),
        *((name, Divisor) for name in ("tiles_x", "tiles_y", "m_tiles", "n_blocks")),
        *(
            (name, ctypes.c_int32)
            for name in ("log_sharing", "log_parts", "chunks", "phases", "out_step", "planes", "tap_step")
        ),
        *(
            (name, ctypes.c_int32 * 2)
            for name in ("origin_y", "origin_x", "first_y", "first_x", "count_y", "count_x", "taps")
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "reflect", "pitch", "box_rows", "weight_stages", "weight_bytes", "patch_stages", "patch_bytes",
                "tiles", "sums",
            )
        ),
    ]  # fmt: skip


_SWIZZLE_128B, _PROMOTE_256B = 3, 3
_TYPES = {torch.float16: 6, torch.bfloat16: 9}


class Launch(NamedTuple):
    """Parameters of one launch, without addresses."""

    args: Args
    grid: int
    cluster: int
    shared_bytes: int
    box: tuple[int, int]
    """Pixels and rows of one box of the patch."""


def describe_launch(
    conv: Conv,
    batch: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    rect: tuple[int, int, int, int],
    tile: HopperTile,
    num_sms: int | None = None,
) -> Launch:
    """A launch for outputs `rect` = (top, bottom, left, right), on a GPU of so many multiprocessors; None: as many as
    it has tiles.

    Raises:
        ValueError: the kernel cannot compute the step, or its tile needs more shared memory than a block has.
    """
    return launch_of(Shape.of(Product.of(conv, batch, in_size, out_size, rect), tile, num_sms), in_size, out_size)


def launch_of(shape: Shape, in_size: tuple[int, int], out_size: tuple[int, int]) -> Launch:
    """A launch of a product in tiles."""
    product, axis = shape.product, shape.product.axis
    along_y, along_x = product.along_y, product.along_x
    pair = ctypes.c_int32 * 2
    args = Args(
        out_h=out_size[0], out_w=out_size[1], rows_top=product.rows[0][0], rows_left=product.rows[1][0],
        in_h=in_size[0], in_w=in_size[1],
        tiles_x=Divisor.of(shape.tiles_x), tiles_y=Divisor.of(shape.tiles_y), m_tiles=Divisor.of(shape.m_tiles),
        n_blocks=Divisor.of(product.n_blocks), log_sharing=shape.sharing.bit_length() - 1,
        log_parts=shape.parts.bit_length() - 1, chunks=product.chunks, phases=axis.phases**2,
        out_step=axis.out_step, planes=product.planes, tap_step=axis.in_step,
        origin_y=pair(*along_y.origin), origin_x=pair(*along_x.origin),
        first_y=pair(*along_y.first), first_x=pair(*along_x.first),
        count_y=pair(*along_y.taps), count_x=pair(*along_x.taps),
        taps=pair(axis.taps[0], axis.taps[-1]),
        reflect=product.conv.reflect,
        pitch=shape.box[0], box_rows=shape.box[1], weight_stages=shape.weight_stages,
        weight_bytes=shape.weight_bytes, patch_stages=shape.patch_stages, patch_bytes=shape.patch_bytes,
        tiles=shape.grid, sums=shape.sums,
    )  # fmt: skip
    return Launch(args, shape.blocks or shape.grid, shape.sharing * shape.parts, shape.shared_bytes, shape.box)


CLOCKS = ("start", "ready", "previous", "operands", "products", "end", "for_weights", "for_patches")
"""What a block's first warp stores with `clocks`: `Clock` of hopper_conv.cuh."""
_TIMED_HEIGHT = 16


def _kernel(
    launch: Launch, dtype: torch.dtype, tile: HopperTile, overlap: bool = False, timed: bool = False
) -> Kernel:
    kind = "_timed" if timed else "_several" if launch.args.sums else ""
    return Kernel(
        "hopper_conv",
        f"lgnet_conv_{str(dtype).removeprefix('torch.')}_{tile.tile_h}_{tile.groups}{kind}",
        threads=tile.groups * GROUP_THREADS + OTHER_THREADS,
        shared_bytes=launch.shared_bytes,
        cluster=launch.cluster,
        overlap=overlap,
    )


def tensor_map(tensor: Tensor, sizes: list[int], strides: list[int], box: list[int]) -> Any:
    """A CUtensorMap: dimensions from the innermost on, strides in bytes from the second on."""
    memory = ctypes.create_string_buffer(128 + 128)
    address = -(-ctypes.addressof(memory) // 128) * 128  # the driver wants 64
    rank = len(sizes)
    call(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(address),
        ctypes.c_int(_TYPES[tensor.dtype]),
        ctypes.c_uint(rank),
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_PROMOTE_256B),
        ctypes.c_int(0),
    )
    return (ctypes.c_uint64 * 16).from_buffer_copy(ctypes.string_at(address, 128))


def source_maps(source: Tensor, step: int, box: tuple[int, int]) -> list[Any]:
    """The tensor map of a feature map whose channels are adjacent; with `step` 2, those of its four planes (even
    rows: even and odd columns; odd rows). box: pixels and rows of a patch."""
    batch, height, *_, channels = source.shape
    per_sample = 2 * source.stride(1) * height
    maps = []
    for y, x in itertools.product(range(step), repeat=2):
        plane = source[:, y::step, x::step]
        sizes = [channels, plane.shape[2], plane.shape[1], batch]
        strides = [2 * plane.stride(2), 2 * plane.stride(1), per_sample]
        maps.append(tensor_map(plane, sizes, strides, [CHANNELS, *box, 1]))
    return maps


def weights_map(weight: Tensor, args: Args) -> Any:
    """The tensor map of packed weights, in boxes of what a block loads."""
    depth, channels = weight.shape
    return tensor_map(weight, [channels, depth], [2 * channels], [CHANNELS, CHANNELS >> args.log_sharing])


def check_operands(
    conv: Conv, source: Tensor, weight: Tensor, bias: Tensor, stores: tuple[Store, ...], residual: Tensor | None
) -> None:
    """Raises ValueError where an operand is not what the kernel needs."""
    dtype = source.dtype
    if dtype not in DTYPES:
        raise ValueError(f"source: expected float16 or bfloat16, got {dtype}")
    check_view("source", source, dtype, conv.in_channels)
    for store in stores:
        check_view("stores", store.view, dtype, conv.out_channels)
    if residual is not None:
        check_view("residual", residual, dtype, conv.out_channels)
    if weight.dtype != dtype or weight.shape[1] != conv.out_channels or not weight.is_contiguous():
        raise ValueError(f"weight: expected Conv.pack in {dtype}, got {tuple(weight.shape)} {weight.dtype}")
    check_bias(bias, conv.out_channels)


def output_of(
    rect: tuple[int, int, int, int], bias: Tensor, stores: tuple[Store, ...], residual: Tensor | None
) -> Output:
    """What the kernel adds and where it stores, for operands that :func:`check_operands` has passed."""
    top, bottom, left, right = rect
    output = Output(bias.data_ptr(), top=top, bottom=bottom, left=left, right=right)
    if residual is not None:
        output.residual, output.stride_r = residual.data_ptr(), residual.stride(2)
    set_stores(output, stores)
    return output


def _prepare(
    conv: Conv,
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    stores: tuple[Store, ...],
    tile: HopperTile,
    size: tuple[int, int],
    rect: tuple[int, int, int, int] | None,
    residual: Tensor | None,
    num_sms: int | None,
) -> tuple[Launch, list[Any], list[Any]]:
    """The launch, the addresses of its parameters, and the objects that must be kept until it is made."""
    batch, in_h, in_w, _ = source.shape
    rect = (0, size[0], 0, size[1]) if rect is None else rect
    launch = describe_launch(conv, batch, (in_h, in_w), size, rect, tile, num_sms)
    check_operands(conv, source, weight, bias, stores, residual)
    maps = source_maps(source, conv.axis.in_step, launch.box)
    sources = (type(maps[0]) * 4)(*maps)
    kept = [sources, weights_map(weight, launch.args), launch.args, output_of(rect, bias, stores, residual)]
    return launch, [ctypes.c_void_p(ctypes.addressof(parameter)) for parameter in kept], kept


def hopper_forward(
    conv: Conv,
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    stores: tuple[Store, ...],
    tile: HopperTile,
    *,
    size: tuple[int, int],
    rect: tuple[int, int, int, int] | None = None,
    residual: Tensor | None = None,
    overlap: bool = False,
    clocks: Tensor | None = None,
    num_sms: int | None = None,
) -> None:
    """One step, with the arguments of :func:`.conv.conv_forward`, on the current stream of the source's GPU.

    Args:
        clocks: [thread blocks, 8] int64, which gets each block's :data:`CLOCKS`; float16 and tiles of 16 rows only,
            one tile a block.
        num_sms: multiprocessors, of which each has one block where there are more tiles; None: those of the GPU.

    Raises:
        ValueError: an argument is not what the kernel needs.
        RuntimeError: the driver rejects the kernel.
    """
    if is_recording():  # nothing to compile
        return
    with device_guard(source):
        if clocks is None and num_sms is None and source.device.type == "cuda":
            num_sms = device_generation(source.device)[1]
        launch, addresses, kept = _prepare(conv, source, weight, bias, stores, tile, size, rect, residual, num_sms)
        if launch.grid == 0:
            return
        if clocks is not None:
            if launch.args.sums:
                raise ValueError(f"num_sms: expected as many as tiles where clocks are stored, got {num_sms}")
            check_clocks(clocks, (launch.grid, len(CLOCKS)), source.dtype)
            if tile.tile_h != _TIMED_HEIGHT:
                raise ValueError(f"clocks: expected tiles of {_TIMED_HEIGHT} rows, got {tile}")
            launch.args.clocks = clocks.data_ptr()
        _kernel(launch, source.dtype, tile, overlap, clocks is not None).launch(launch.grid, addresses)
        del kept


def check_clocks(clocks: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError where a kernel that stores :data:`CLOCKS` does not exist, or needs another tensor."""
    if clocks.dtype != torch.int64 or tuple(clocks.shape) != shape or not clocks.is_contiguous():
        raise ValueError(f"clocks: expected {shape} int64, contiguous, got {tuple(clocks.shape)} {clocks.dtype}")
    if dtype != torch.float16:
        raise ValueError(f"clocks: expected float16, got {dtype}")


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is not used on a GPU in `dtype`, or None. The first call per GPU runs and checks the kernel."""
    return _first_use.reason_against(device, dtype)


_CHECKED = (((2, 32, 16), None), ((3, 64, 16), 2))
"""Batch and sizes of a map, and multiprocessors of which each computes several tiles: three, of stride 2."""


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare with PyTorch: a 3x3 convolution with reflection, and 4x4 ones of stride 2, also transposed."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(9)
        for tile in CANDIDATES:
            channels = CHANNELS * (tile.cluster if tile.split else 2)
            for conv in (
                Conv(channels, 128, 3, 1, 1, False, True, False),
                Conv(channels, 64, 4, 2, 1, True, False, False),
                Conv(channels, 64, 4, 2, 1, False, False, False),
            ):
                for shape, num_sms in _CHECKED if takes_several(tile) else _CHECKED[:1]:
                    error = _error(conv, tile, shape, dtype, device, generator, num_sms)
                    if not error < LIMIT * torch.finfo(dtype).eps:
                        several = "" if num_sms is None else ", several tiles a block"
                        return f"relative error {error:.1e} in {conv} with {tile}{several}"
    return None


def _error(
    conv: Conv,
    tile: HopperTile,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    num_sms: int | None = None,
) -> float:
    """RMS of the error against float32, relative to the RMS of the result, for a step on noise."""

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)

    batch, height, width = shape
    up, down = conv.axis.out_step, conv.axis.in_step
    size = height * up // down, width * up // down
    x = noise(batch, height, width, conv.in_channels)
    first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
    weight = noise(first, second, conv.kernel, conv.kernel) / (conv.in_channels * conv.kernel**2) ** 0.5
    bias = noise(conv.out_channels).float()
    residual = noise(batch, *size, conv.out_channels)
    out = torch.full_like(residual, float("nan"))
    stores = (Store(out, "relu"),)
    packed = conv.pack(weight).contiguous()
    hopper_forward(conv, x, packed, bias, stores, tile, size=size, residual=residual, num_sms=num_sms)
    exact = (exact_convolution(conv, x, weight, bias) + residual.double()).relu()
    return float((out.double() - exact).norm() / exact.norm())


_first_use = FirstUse(
    "the convolution for Hopper",
    lambda capability: capability == CAPABILITY,
    "compute capability 9.0",
    _check,
)


def candidates(conv: Conv, work: Work, dtype: torch.dtype, device: torch.device) -> list[HopperTile]:
    """Tiles worth measuring for a product; none where the kernel cannot compute it or may not be used on `device`."""
    if unsupported(conv) is not None or reason_against(device, dtype) is not None:
        return []
    chunks = -(-conv.in_channels // CHANNELS)

    def worth_measuring(tile: HopperTile) -> bool:
        if tile.tile_h > TILE_HEIGHTS[0] and tile.tile_h * TILE_W > work.rows:
            return False
        if not tile.split:
            return tile.groups <= chunks or takes_several(tile)
        blocks = -(-work.rows // (tile.tile_h * TILE_W)) * (conv.out_channels // CHANNELS) * len(work.taps)
        return tile.groups <= chunks // tile.cluster and blocks * tile.cluster <= _MOST_SPLIT_BLOCKS

    return list(filter(worth_measuring, CANDIDATES))


def runs_on(device: torch.device) -> bool:
    """Whether a device is a GPU that the kernel was compiled for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == CAPABILITY


def usable(tile: HopperTile, conv: Conv, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tile that was measured for a product can compute another step with that product."""
    return unsupported(conv, tile) is None and reason_against(device, dtype) is None
