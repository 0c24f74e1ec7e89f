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

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgnet_fast.engine.geometry import Axis

from .cards import CLUSTERED, H100_CLOCK, SHARED_LIMITS, Card
from .compiled_checks import DTYPES, LIMIT, Divisor, FirstUse, check_bias, check_view, exact_convolution, set_stores
from .conv import Conv
from .conv_configs import INGRESS_ALONE, INGRESS_SHARED, LAUNCH_SECONDS, Cost, Work
from .cuda_driver import Kernel, call
from .launch import device_guard, is_recording
from .results import Store

CAPABILITY = (9, 0)
CHANNELS = 64
"""Output channels of a thread block, and input channels of a step, which is a row of taps."""
TILE_W = 8
TILE_HEIGHTS = (4, 8, 16, 32)
SHARED_LIMIT = SHARED_LIMITS["sm_90"]
"""Bytes of shared memory of a thread block."""
_GROUP_THREADS, _OTHER_THREADS = 128, 128
_MOST_SPLIT_BLOCKS = 160  # an H100 has 132 multiprocessors; more blocks need no split of the depth
_LINE = 2 * CHANNELS  # bytes of a pixel's channels, or of a depth's columns
_TAP_BYTES = CHANNELS * _LINE  # of the weights of a tap
_MAX_WEIGHT_STAGES, _MAX_PATCH_STAGES = 12, 4
_BARRIER_BYTES = 8 * (2 * _MAX_WEIGHT_STAGES + 3 * _MAX_PATCH_STAGES)
_ALIGNMENT = 1024  # bytes after which the swizzle repeats
_ROW_BYTES = 4 * (CHANNELS + 4)  # bytes from one pixel's results to the next in shared memory


class HopperTile(NamedTuple):
    """Thread blocks of 8 x tile_h pixels by 64 channels."""

    tile_h: int
    cluster: int
    """Blocks that share the weights of a stage, or with `split` the depth of a tile."""
    weight_taps: int = 12
    """Taps of which a block holds weights; a stage has a row of them."""
    patch_stages: int = 4
    groups: int = 1
    """Warpgroups of a block, which multiply in turns."""
    split: bool = False
    """Whether the blocks of a cluster split the input channels of one tile."""

    @property
    def label(self) -> str:
        """Pixels x channels / blocks of a cluster (+: they split the depth), warpgroups of a block."""
        return f"hopper {TILE_W}x{self.tile_h}x{CHANNELS}/{self.cluster}{'+' if self.split else ''} x{self.groups}"


CANDIDATES = tuple(
    HopperTile(tile_h, cluster, 6 * groups if split else 12, 2 if tile_h == 32 else 4, groups, split)
    for split, clusters in ((False, (1, 2)), (True, (2, 4, 8)))
    for tile_h, cluster, groups in itertools.product(TILE_HEIGHTS, clusters, (1, 2))
)
"""Tiles worth measuring: 4 and 8 blocks that share weights were slower on an H100 wherever they were tried. Clusters
of these sizes leave 12 of its multiprocessors idle; blocks that split the depth hold fewer weights, so that two of
some tiles fit on one."""


class Args(ctypes.Structure):
    """`Args` of csrc/cuda/hopper_conv.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "store0", "store1", "clocks")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "out_h", "out_w", "top", "bottom", "left", "right",
                "rows_top", "rows_left", "in_h", "in_w",
            )
        ),
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
                "stride_r", "stride_0", "stride_1", "activation_0", "activation_1", "reflect",
                "pitch", "box_rows", "weight_stages", "weight_bytes", "patch_stages", "patch_bytes",
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


def unsupported(conv: Conv, tile: HopperTile | None = None) -> str | None:
    """Why the kernel cannot compute a step (with this tile, if given), or None."""
    axis = conv.axis
    if axis.patch != 1 or conv.merges:
        return "a step that ends a stage"
    if conv.in_channels % CHANNELS or conv.out_channels % CHANNELS:
        return f"{conv.in_channels} to {conv.out_channels} channels (multiples of {CHANNELS} are supported)"
    if axis.in_step > 1 and (axis.in_step, *axis.taps) != (2, 4):
        return f"{conv.kernel}x{conv.kernel} taps of stride {conv.stride} (4x4 of stride 2 are supported)"
    most_taps = max(axis.taps) // axis.in_step
    if most_taps > 3 or (conv.reflect and (conv.padding > 1 or axis.in_step > 1)):
        return f"{conv.kernel}x{conv.kernel} taps (at most 3x3 a phase are supported)"
    return None if tile is None else _unsupported_tile(tile, conv.in_channels, most_taps)


def _unsupported_tile(tile: HopperTile, in_channels: int, most_taps: int) -> str | None:
    if tile.tile_h not in TILE_HEIGHTS:
        return f"tiles of {tile.tile_h} rows ({TILE_HEIGHTS} are supported)"
    if tile.groups not in (1, 2):
        return f"{tile.groups} warpgroups (1 and 2 are supported)"
    stages = tile.weight_taps // most_taps
    if not (
        2 * tile.groups <= stages
        and tile.weight_taps <= _MAX_WEIGHT_STAGES
        and 1 <= tile.patch_stages <= _MAX_PATCH_STAGES
    ):
        return f"weights of {tile.weight_taps} taps, {stages} rows of them, and {tile.patch_stages} stages of patches"
    if tile.split and tile.cluster * CHANNELS > in_channels:
        return f"{in_channels} channels among {tile.cluster} blocks (multiples of {CHANNELS} each are supported)"
    if tile.cluster not in (1, 2, 4, 8):
        return f"clusters of {tile.cluster} blocks (1, 2, 4 and 8 are supported)"
    return None


class _Reads(NamedTuple):
    """What the tiles read along an axis, for the first and last phase, or the even and the odd plane: the source of
    row 0's first tap, that tap, and the number of taps."""

    origin: tuple[int, int]
    first: tuple[int, int]
    taps: tuple[int, int]


def _reads(conv: Conv, axis: Axis, in_size: int, out_size: int) -> _Reads:
    if axis.in_step == 1:
        phases = (0, axis.phases - 1)
        used = [axis.used(phase, in_size, out_size, conv.reflect) for phase in phases]
        found = [(axis.origins[phase] + first, first, count) for phase, (first, count) in zip(phases, used)]
    else:
        found = []
        for plane in (0, 1):
            first = (plane - axis.origins[0]) % axis.in_step
            found.append(((axis.origins[0] + first) // axis.in_step, first, axis.taps[0] // axis.in_step))
    origin, first_taps, counts = zip(*found)
    return _Reads(origin, first_taps, counts)


class _Product(NamedTuple):
    """A step in a rectangle, before a tile is chosen. rows: of a phase, (top, bottom), (left, right). chunks and
    n_blocks: of the input and of the output channels. planes: 1, or 4 for stride 2."""

    conv: Conv
    axis: Axis
    samples: int
    rows: tuple[tuple[int, int], tuple[int, int]]
    along_y: _Reads
    along_x: _Reads
    chunks: int
    n_blocks: int
    planes: int

    @classmethod
    def of(
        cls,
        conv: Conv,
        batch: int,
        in_size: tuple[int, int],
        out_size: tuple[int, int],
        rect: tuple[int, int, int, int],
    ) -> _Product:
        """Raises ValueError where the kernel cannot compute the step."""
        if (reason := unsupported(conv)) is not None:
            raise ValueError(f"conv: {reason}")
        axis = conv.axis
        if any(size % axis.in_step for size in in_size):  # the strides of a plane's tensor map would be refused
            raise ValueError(f"conv: {conv} of a map of {in_size} (even sizes are supported)")
        along_y, along_x = (_reads(conv, axis, in_size[dim], out_size[dim]) for dim in (0, 1))
        chunks, n_blocks = conv.in_channels // CHANNELS, conv.out_channels // CHANNELS
        return cls(conv, axis, batch, conv.rows_of(rect), along_y, along_x, chunks, n_blocks, axis.in_step**2)


class _Shape(NamedTuple):
    """A product in tiles. sharing: blocks of a cluster with the same weights; parts: of the depth, in a cluster.
    box: pixels and rows of a patch."""

    product: _Product
    tile: HopperTile
    tiles_y: int
    tiles_x: int
    sharing: int
    parts: int
    box: tuple[int, int]
    weight_stages: int
    weight_bytes: int
    patch_stages: int
    patch_bytes: int

    @classmethod
    def of(cls, product: _Product, tile: HopperTile) -> _Shape:
        """Raises ValueError where the tile cannot compute the product, or needs too much shared memory."""
        most_y, most_x = (max(reads.taps) for reads in (product.along_y, product.along_x))
        most_taps = max(product.axis.taps) // product.axis.in_step
        if (reason := _unsupported_tile(tile, product.conv.in_channels, most_taps)) is not None:
            raise ValueError(f"conv: {reason}")
        pitch, box_rows = TILE_W + most_x - 1, tile.tile_h + most_y - 1
        patch_bytes = -(-pitch * box_rows * _LINE // _ALIGNMENT) * _ALIGNMENT
        (top, bottom), (left, right) = product.rows
        tiles_y, tiles_x = -(-(bottom - top) // tile.tile_h), -(-(right - left) // TILE_W)
        m_tiles = product.samples * tiles_y * tiles_x
        sharing = next(n for n in (8, 4, 2, 1) if n <= tile.cluster and m_tiles % n == 0)
        sharing, parts = (1, tile.cluster) if tile.split else (sharing, 1)
        fewest_rows = min(product.along_y.taps)
        if product.chunks // parts * product.planes * fewest_rows < tile.groups:
            raise ValueError(f"tile: {tile} has more warpgroups than the product has steps")
        # A group keeps a patch until its next step, which may belong to a later one; that patch needs a stage, too.
        kept = 1 - (-tile.groups // fewest_rows)
        weight_stages, weight_bytes = tile.weight_taps // most_x, most_x * _TAP_BYTES
        results = tile.groups * TILE_W * tile.tile_h * _ROW_BYTES  # they replace weights and patches
        patch_stages = max(
            min(max(tile.patch_stages, kept), -(-product.chunks // parts) * product.planes),
            -((weight_stages * weight_bytes - results) // patch_bytes),
        )
        shape = cls(
            product, tile, tiles_y, tiles_x, sharing, parts, (pitch, box_rows), weight_stages, weight_bytes,
            patch_stages, patch_bytes,
        )  # fmt: skip
        if patch_stages > _MAX_PATCH_STAGES or shape.shared_bytes > SHARED_LIMIT:
            raise ValueError(f"tile: {tile} takes {shape.shared_bytes} bytes of shared memory")
        return shape

    @property
    def m_tiles(self) -> int:
        return self.product.samples * self.tiles_y * self.tiles_x

    @property
    def grid(self) -> int:
        return self.m_tiles * self.product.n_blocks * self.product.axis.phases**2 * self.parts

    @property
    def shared_bytes(self) -> int:
        held = self.weight_stages * self.weight_bytes + self.patch_stages * self.patch_bytes
        return held + _ALIGNMENT + _BARRIER_BYTES


def describe_launch(
    conv: Conv,
    batch: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    rect: tuple[int, int, int, int],
    tile: HopperTile,
) -> Launch:
    """A launch for outputs `rect` = (top, bottom, left, right).

    Raises:
        ValueError: the kernel cannot compute the step, or its tile needs more shared memory than a block has.
    """
    shape = _Shape.of(_Product.of(conv, batch, in_size, out_size, rect), tile)
    product, axis = shape.product, shape.product.axis
    along_y, along_x = product.along_y, product.along_x
    pair = ctypes.c_int32 * 2
    args = Args(
        out_h=out_size[0], out_w=out_size[1], top=rect[0], bottom=rect[1], left=rect[2], right=rect[3],
        rows_top=product.rows[0][0], rows_left=product.rows[1][0], in_h=in_size[0], in_w=in_size[1],
        tiles_x=Divisor.of(shape.tiles_x), tiles_y=Divisor.of(shape.tiles_y), m_tiles=Divisor.of(shape.m_tiles),
        n_blocks=Divisor.of(product.n_blocks), log_sharing=shape.sharing.bit_length() - 1,
        log_parts=shape.parts.bit_length() - 1, chunks=product.chunks, phases=axis.phases**2,
        out_step=axis.out_step, planes=product.planes, tap_step=axis.in_step,
        origin_y=pair(*along_y.origin), origin_x=pair(*along_x.origin),
        first_y=pair(*along_y.first), first_x=pair(*along_x.first),
        count_y=pair(*along_y.taps), count_x=pair(*along_x.taps),
        taps=pair(axis.taps[0], axis.taps[-1]),
        reflect=conv.reflect,
        pitch=shape.box[0], box_rows=shape.box[1], weight_stages=shape.weight_stages,
        weight_bytes=shape.weight_bytes, patch_stages=shape.patch_stages, patch_bytes=shape.patch_bytes,
    )  # fmt: skip
    return Launch(args, shape.grid, shape.sharing * shape.parts, shape.shared_bytes, shape.box)


# Fitted to the 28 tiles of an earlier form that ran one block a multiprocessor (bench/results/h100_hopper.jsonl):
# 2.0 us + 2.2 us + 6.4 ns a pixel + (479 + a quarter of the products) clocks a tap, error 2 % (root mean square).
# That form waited and signalled at every tap, in 110 instructions; this one does at every row of taps, in 100.
_FILL_SECONDS, _PIXEL_SECONDS = 2.2e-6, 6.4e-9
_STEP_CLOCKS, _TAIL = 435, 0.24
# Clocks of products relative to the tensor cores' rate: what the fitted tiles of 256 pixels took.
_PRODUCTS = 1.15
# Assumed: blocks of a cluster meet twice, and read each other's sums.
_EXCHANGE_SECONDS = 1.0e-6
# Registers of a thread, by the rows of a tile and the warpgroups.
_REGISTERS = {
    (4, 1): 80, (4, 2): 72, (8, 1): 88, (8, 2): 96, (16, 1): 136, (16, 2): 136, (32, 1): 184, (32, 2): 160,
}  # fmt: skip


def _at_once(shape: _Shape, card: Card) -> int:
    """Blocks that run at the same time."""
    tile = shape.tile
    threads = tile.groups * _GROUP_THREADS + _OTHER_THREADS
    resident = min(
        (SHARED_LIMIT + 1024) // (shape.shared_bytes + 1024),
        65536 // (threads * _REGISTERS[tile.tile_h, tile.groups]),
    )
    cluster = shape.sharing * shape.parts
    held = card.num_sms if cluster <= 2 else int(card.num_sms * CLUSTERED)
    return max(1, resident) * max(cluster, held // cluster * cluster)


def _cost(shape: _Shape, card: Card) -> Cost:
    """Estimated seconds of a launch by its parts. issue: a step's instructions before and after its products."""
    product, tile = shape.product, shape.tile
    pixels, phases = TILE_W * tile.tile_h, product.axis.phases
    waves = -(-shape.grid // _at_once(shape, card))
    # Shared memory gives 128 bytes a clock; a tap reads its weights and pixels of 64 channels.
    tap = max(_PRODUCTS * 2 * pixels, (_TAP_BYTES + pixels * _LINE) / 128)
    issue = products = read = 0.0
    for rows, taps in itertools.product(product.along_y.taps[:phases], product.along_x.taps[:phases]):
        patches = -(-product.chunks // shape.parts) * product.planes
        steps = patches * rows
        longest = steps * max((_STEP_CLOCKS + _TAIL * 2 * pixels) / tile.groups, taps * tap)
        issue = max(issue, longest)
        products += steps * taps * tap / phases**2
        read += (
            steps * taps * _TAP_BYTES / shape.sharing + patches * shape.box[0] * shape.box[1] * _LINE
        ) / phases**2
    all_taps = sum(product.along_y.taps[:phases]) * sum(product.along_x.taps[:phases]) * product.planes
    weights = all_taps * product.chunks * product.n_blocks * _TAP_BYTES
    share = card.l2 / card.num_sms
    together = -(-shape.grid // card.num_sms) * max(products / H100_CLOCK, read / (INGRESS_SHARED * share))
    return Cost(
        start=LAUNCH_SECONDS + waves * (_FILL_SECONDS + pixels * _PIXEL_SECONDS),
        products=products / H100_CLOCK,
        reads=read / (INGRESS_ALONE * share),
        issue=waves * issue / H100_CLOCK,
        together=together,
        memory=weights / (card.memory * min(1.0, max(1, shape.grid) / card.num_sms)),
        splits=_EXCHANGE_SECONDS if shape.parts > 1 else 0.0,
        l2_bytes=shape.grid * read,
    )


@functools.lru_cache(maxsize=4096)
def ranked(
    conv: Conv,
    batch: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    rect: tuple[int, int, int, int],
    card: Card,
) -> tuple[tuple[HopperTile, Cost], ...]:
    """The eight candidates of least estimated time for outputs `rect` of a step, and their costs; fewer where others
    cannot compute it."""
    found: list[tuple[HopperTile, Cost]] = []
    with contextlib.suppress(ValueError):
        product = _Product.of(conv, batch, in_size, out_size, rect)
        for tile in CANDIDATES:
            with contextlib.suppress(ValueError):
                found.append((tile, _cost(_Shape.of(product, tile), card)))
    return tuple(sorted(found, key=lambda one: (one[1].seconds, one[0]))[:8])


def tile_like(tile: HopperTile, best: Sequence[tuple[HopperTile, Cost]]) -> tuple[HopperTile, Cost] | None:
    """Of :func:`ranked`, the tile of least time; of those that take at most 3 % more, which the estimate does not
    tell apart, the one that resembles `tile`, which was measured for a similar product."""
    if not best:
        return None
    close = [one for one in best if one[1].seconds <= 1.03 * best[0][1].seconds]
    return max(close, key=lambda one: sum(a == b for a, b in zip(one[0], tile)))


CLOCKS = ("start", "ready", "previous", "operands", "products", "end", "for_weights", "for_patches")
"""What a block's first warp stores with `clocks`: `Clock` of hopper_conv.cu."""
_TIMED_HEIGHT = 16


def _kernel_name(dtype: torch.dtype, tile: HopperTile, timed: bool = False) -> str:
    name = f"lgnet_conv_{str(dtype).removeprefix('torch.')}_{tile.tile_h}_{tile.groups}"
    return f"{name}_timed" if timed else name


def _kernel(
    launch: Launch, dtype: torch.dtype, tile: HopperTile, overlap: bool = False, timed: bool = False
) -> Kernel:
    return Kernel(
        "hopper_conv",
        _kernel_name(dtype, tile, timed),
        threads=tile.groups * _GROUP_THREADS + _OTHER_THREADS,
        shared_bytes=launch.shared_bytes,
        cluster=launch.cluster,
        overlap=overlap,
    )


def _tensor_map(tensor: Tensor, sizes: list[int], strides: list[int], box: list[int]) -> Any:
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
    return (ctypes.c_char * 128).from_buffer_copy(ctypes.string_at(address, 128))


def _planes(source: Tensor, step: int, box: tuple[int, int]) -> Any:
    """`Sources` of csrc/cuda/hopper_conv.cu: the tensor maps of a feature map, or of its even and odd rows and
    columns, whose channels are adjacent."""
    batch, height, *_, channels = source.shape
    per_sample = 2 * source.stride(1) * height
    maps = []
    for y, x in itertools.product(range(step), repeat=2):
        plane = source[:, y::step, x::step]
        sizes = [channels, plane.shape[2], plane.shape[1], batch]
        strides = [2 * plane.stride(2), 2 * plane.stride(1), per_sample]
        maps.append(_tensor_map(plane, sizes, strides, [CHANNELS, *box, 1]))
    return (type(maps[0]) * 4)(*maps)


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
) -> tuple[Launch, list[Any], list[Any]]:
    """The launch, the addresses of its parameters, and the objects that must be kept until it is made."""
    batch, in_h, in_w, _ = source.shape
    rect = (0, size[0], 0, size[1]) if rect is None else rect
    launch = describe_launch(conv, batch, (in_h, in_w), size, rect, tile)
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
    args = launch.args
    args.bias, args.residual = bias.data_ptr(), None if residual is None else residual.data_ptr()
    args.stride_r = 0 if residual is None else residual.stride(2)
    set_stores(args, stores)
    sources = _planes(source, conv.axis.in_step, launch.box)
    weights = _tensor_map(
        weight,
        [conv.out_channels, weight.shape[0]],
        [2 * conv.out_channels],
        [CHANNELS, CHANNELS >> args.log_sharing],
    )
    kept = [sources, weights, args]
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
) -> None:
    """One step, with the arguments of :func:`.conv.conv_forward`, on the current stream of the source's GPU.

    Args:
        clocks: [thread blocks, 8] int64, which gets each block's :data:`CLOCKS`; float16 and tiles of 16 rows only.

    Raises:
        ValueError: an argument is not what the kernel needs.
        RuntimeError: the driver rejects the kernel.
    """
    if is_recording():  # nothing to compile
        return
    with device_guard(source):
        launch, addresses, kept = _prepare(conv, source, weight, bias, stores, tile, size, rect, residual)
        if launch.grid == 0:
            return
        if clocks is not None:
            _check_clocks(clocks, launch, source.dtype, tile)
            launch.args.clocks = clocks.data_ptr()
        _kernel(launch, source.dtype, tile, overlap, clocks is not None).launch(launch.grid, addresses)
        del kept


def _check_clocks(clocks: Tensor, launch: Launch, dtype: torch.dtype, tile: HopperTile) -> None:
    shape = (launch.grid, len(CLOCKS))
    if clocks.dtype != torch.int64 or tuple(clocks.shape) != shape or not clocks.is_contiguous():
        raise ValueError(f"clocks: expected {shape} int64, contiguous, got {tuple(clocks.shape)} {clocks.dtype}")
    if dtype != torch.float16 or tile.tile_h != _TIMED_HEIGHT:
        raise ValueError(f"clocks: expected float16 and tiles of {_TIMED_HEIGHT} rows, got {dtype} and {tile}")


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is not used on a GPU in `dtype`, or None. The first call per GPU runs and checks the kernel."""
    return _first_use.reason_against(device, dtype)


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
                error = _error(conv, tile, (2, 32, 16), dtype, device, generator)
                if not error < LIMIT * torch.finfo(dtype).eps:
                    return f"relative error {error:.1e} in {conv} with {tile}"
    return None


def _error(
    conv: Conv,
    tile: HopperTile,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
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
    hopper_forward(conv, x, conv.pack(weight).contiguous(), bias, stores, tile, size=size, residual=residual)
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
            return tile.groups <= chunks
        blocks = -(-work.rows // (tile.tile_h * TILE_W)) * (conv.out_channels // CHANNELS) * len(work.taps)
        return tile.groups <= chunks // tile.cluster and blocks * tile.cluster <= _MOST_SPLIT_BLOCKS

    return list(filter(worth_measuring, CANDIDATES))


def runs_on(device: torch.device) -> bool:
    """Whether a device is a GPU that the kernel was compiled for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == CAPABILITY


def usable(tile: HopperTile, conv: Conv, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tile that was measured for a product can compute another step with that product."""
    return unsupported(conv, tile) is None and reason_against(device, dtype) is None
