"""Attention for inference on Hopper (compute capability 9.0): the loop over the keys in CUDA C++, splits included.

`csrc/cuda/hopper_attention.cu` takes the place of `_attn_weigh_kernel` and `_attn_sum_kernel` of
:mod:`.attention_inference`: one launch instead of two, because the blocks of a cluster split the keys and read each
other's sums. It needs 128, 256 or 512 channels, float16 or bfloat16. An engine's first use and the tuner measure it
beside Triton's kernels; the first use on a GPU compares it with PyTorch in float64 (:func:`reason_against`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgnet_fast.ops.torch_state import pass_on_out_of_memory

from .cards import H100_CLOCK, Card, clustered_blocks
from .compiled_checks import DTYPES, LIMIT, Divisor, FirstUse
from .conv_configs import INGRESS_ALONE, INGRESS_SHARED, LAUNCH_SECONDS, Cost
from .cuda_driver import Kernel
from .hopper import tensor_map
from .hopper_shapes import CAPABILITY, EXCHANGE_SECONDS, FILL_SECONDS, PIXEL_SECONDS, SHARED_LIMIT
from .launch import ACTIVATIONS, device_guard, is_recording
from .maps import is_flat, position_stride

CHANNELS = (128, 256, 512)
"""That the kernel supports."""
COLUMNS = 128
"""Columns of the values of a thread block."""
QUERIES = (64, 128)
"""Of a thread block."""
MAX_CLUSTER, MAX_STAGES = 8, 4
THREADS = 256 + 32  # of two warpgroups that multiply, and of a warp that loads
_GROUPS, _ROWS, _LINE = 2, 64, 128
_ALIGNMENT = 1024  # bytes after which the swizzle repeats
_BARRIER_BYTES = 8 * (1 + 3 * MAX_STAGES)
_MOST_PARTS = 160
_RESULT_BYTES = _GROUPS * _ROWS * (4 * (COLUMNS + 8) + 8) + _MOST_PARTS * 12
"""Of the sums, the maximum and the sum of each row, and what a block merges; they replace the operands."""


def keys_of_tile(channels: int, queries: int) -> int:
    """Keys of a tile of a block with so many queries."""
    return queries if channels == 128 else 16384 // channels


class AttentionTile(NamedTuple):
    """Queries of a thread block, and blocks of a cluster, which split the keys."""

    queries: int
    cluster: int

    @property
    def label(self) -> str:
        """Queries x columns / splits of the keys."""
        return f"hopper {self.queries}x{COLUMNS}/{self.cluster}"


CANDIDATES = tuple(AttentionTile(*one) for one in itertools.product(QUERIES, (1, 2, 3, 4, 6, 8)))
"""Tiles worth measuring. Clusters of 4 leave 12 of an H100's multiprocessors idle, clusters of 3 fewer."""


class Args(ctypes.Structure):
    """`Args` of csrc/cuda/hopper_attention.cu."""

    _fields_ = [
        ("rest", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("sample_stride", ctypes.c_int64),
        ("position_stride", ctypes.c_int64),
        ("tiles", Divisor),
        ("column_blocks", Divisor),
        *(
            (name, ctypes.c_int32)
            for name in ("positions", "first_query", "queries", "key_tiles", "cluster", "stages", "activation")
        ),
        ("scale", ctypes.c_float),
    ]


class Shape(NamedTuple):
    """A launch in tiles. parts: of the sums of a row, in a block. stages: tiles of keys and values that it holds."""

    channels: int
    positions: int
    queries: int
    batch: int
    tile: AttentionTile
    parts: int
    stages: int

    @classmethod
    def of(cls, channels: int, positions: int, queries: int, batch: int, tile: AttentionTile) -> Shape:
        """A launch for `queries` of the positions.

        Raises:
            ValueError: the kernel cannot compute it.
        """
        if channels not in CHANNELS:
            raise ValueError(f"channels: expected one of {CHANNELS}, got {channels}")
        if tile.queries not in QUERIES or not 1 <= tile.cluster <= MAX_CLUSTER:
            raise ValueError(f"tile: expected {QUERIES} queries and 1 to {MAX_CLUSTER} blocks, got {tile}")
        parts = _GROUPS * _ROWS // tile.queries
        key_tiles = -(-positions // keys_of_tile(channels, tile.queries))
        if key_tiles // tile.cluster < parts:
            raise ValueError(f"tile: {tile} leaves a warpgroup none of {key_tiles} tiles of keys")
        shape = cls(channels, positions, queries, batch, tile, parts, 0)
        least = _ALIGNMENT + _BARRIER_BYTES + shape.query_bytes
        fitting = (SHARED_LIMIT - least) // shape.stage_bytes
        needed = -(-(_RESULT_BYTES - shape.query_bytes) // shape.stage_bytes)
        stages = max(min(MAX_STAGES, fitting, -(-key_tiles // tile.cluster)), needed)
        # Warpgroups that take tiles in turns have stages of their own: a barrier tells only whether a stage was
        # filled an even or odd number of times, and a warpgroup does not wait for the other's tiles.
        stages += stages % parts
        if stages > fitting:
            raise ValueError(f"tile: {tile} takes more than {SHARED_LIMIT} bytes of shared memory")
        return shape._replace(stages=stages)

    @property
    def key_tiles(self) -> int:
        return -(-self.positions // self.keys)

    @property
    def keys(self) -> int:
        """Of a tile."""
        return keys_of_tile(self.channels, self.tile.queries)

    @property
    def tiles(self) -> int:
        """Tiles of queries of a sample."""
        return -(-self.queries // self.tile.queries)

    @property
    def column_blocks(self) -> int:
        return self.channels // COLUMNS

    @property
    def grid(self) -> int:
        return self.batch * self.tiles * self.column_blocks * self.tile.cluster

    @property
    def query_bytes(self) -> int:
        return self.channels // 64 * self.tile.queries * _LINE

    @property
    def stage_bytes(self) -> int:
        return (self.channels + COLUMNS) // 64 * self.keys * _LINE

    @property
    def shared_bytes(self) -> int:
        return _ALIGNMENT + _BARRIER_BYTES + self.query_bytes + self.stages * self.stage_bytes


# Assumed: clocks of a warpgroup from the scores of a tile to their exponentials, a key (64 exponentials, of which a
# multiprocessor computes 16 a clock, and six more instructions of a thread for each of its scores), and a tile.
_KEY_CLOCKS, _TILE_CLOCKS = 4 + 3, 200


def cost(shape: Shape, card: Card) -> Cost:
    """Estimated seconds of a launch by its parts. issue: of a warpgroup by itself, whose products wait for its
    exponentials."""
    keys, cluster = shape.keys, shape.tile.cluster
    waves = -(-shape.grid // clustered_blocks(card.num_sms, cluster))
    # A product of 64 x keys x 16 takes keys / 2 clocks, and reads (64 + keys) * 32 bytes of the 128 a clock.
    products = shape.channels // 16 * max(keys / 2, 16 + keys / 4) + keys / 16 * COLUMNS / 2
    tiles = -(-shape.key_tiles // cluster)
    own = -(-tiles // shape.parts)  # of a warpgroup
    all_products = tiles * _GROUPS / shape.parts * products / H100_CLOCK
    issue = own * (products + keys * _KEY_CLOCKS + _TILE_CLOCKS) / H100_CLOCK
    read = shape.query_bytes + tiles * shape.stage_bytes
    share = card.l2 / card.num_sms
    return Cost(
        start=LAUNCH_SECONDS + waves * (FILL_SECONDS + _GROUPS * _ROWS * PIXEL_SECONDS),
        products=waves * all_products,
        reads=waves * read / (INGRESS_ALONE * share),
        issue=waves * issue,
        together=waves * read * min(1.0, shape.grid / card.num_sms) / (INGRESS_SHARED * share),
        memory=0.0,
        splits=EXCHANGE_SECONDS if cluster > 1 else 0.0,
        l2_bytes=shape.grid * read,
    )


@functools.lru_cache(maxsize=1024)
def ranked(
    channels: int, positions: int, queries: int, batch: int, card: Card
) -> tuple[tuple[AttentionTile, Cost], ...]:
    """The candidates that can compute `queries` of the positions, the one of least estimated time first, and their
    costs; none where the kernel cannot."""
    found = []
    for tile in CANDIDATES:
        with contextlib.suppress(ValueError):
            found.append((tile, cost(Shape.of(channels, positions, queries, batch, tile), card)))
    return tuple(sorted(found, key=lambda one: (one[1].seconds, one[0])))


def _rows_map(rows: Tensor, box_rows: int) -> Any:
    """The tensor map of rows [B, N, C], in boxes of 64 channels of `box_rows` positions of a sample."""
    batch, positions, channels = rows.shape
    per_sample = 2 * positions * channels
    return tensor_map(
        rows, [channels, positions, 1, batch], [2 * channels, per_sample, per_sample], [64, box_rows, 1, 1]
    )


def can_store(out: Tensor) -> bool:
    """Whether the kernel can store a map [B, C, H, W]: adjacent channels, evenly spaced pixels at multiples of 16
    bytes."""
    strides = out.stride(0), position_stride(out)
    aligned = out.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return out.stride(1) == 1 and is_flat(out) and aligned


def weigh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rest: Tensor,
    out: Tensor,
    tile: AttentionTile,
    *,
    scale: float,
    queries: tuple[int, int] | None = None,
    activation: str = "none",
    overlap: bool = False,
) -> None:
    """out = activation(softmax(scale q k^T) v + rest), on the current stream of the GPU.

    Args:
        q, k, v: [B, N, C] contiguous, float16 or bfloat16, C 128, 256 or 512.
        rest: the same in float32.
        out: [B, C, H, W] with H W = N, in the dtype of q; see :func:`can_store`.
        tile: see :class:`AttentionTile`.
        scale: of the scores, to base 2, more than 0: log2(e) for a softmax of q k^T.
        queries: the first position to compute, and the number of positions; None: all.
        activation: a key of ACTIVATIONS.
        overlap: start while the launch before still runs.

    Raises:
        ValueError: an argument is not what the kernel needs.
        RuntimeError: the driver rejects the kernel.
    """
    batch, positions, channels = q.shape
    first, count = (0, positions) if queries is None else queries
    shape = Shape.of(channels, positions, count, batch, tile)
    _check_operands(q, k, v, rest, out)
    if not 0 <= first < first + count <= positions:
        raise ValueError(f"queries: expected a first one and a number within {positions}, got {queries}")
    if not scale > 0:
        raise ValueError(f"scale: expected more than 0, got {scale}")
    if is_recording():  # nothing to compile
        return
    args = Args(
        rest.data_ptr(), out.data_ptr(), out.stride(0), position_stride(out),
        Divisor.of(shape.tiles), Divisor.of(shape.column_blocks),
        positions, first, count, shape.key_tiles, tile.cluster, shape.stages, ACTIVATIONS[activation], scale,
    )  # fmt: skip
    with device_guard(q):
        keys = shape.keys
        parameters = [_rows_map(q, tile.queries), _rows_map(k, keys), _rows_map(v, keys), args]
        _kernel(shape, q.dtype, overlap).launch(
            shape.grid, [ctypes.c_void_p(ctypes.addressof(one)) for one in parameters]
        )


def _kernel(shape: Shape, dtype: torch.dtype, overlap: bool = False) -> Kernel:
    return Kernel(
        "hopper_attention",
        f"lgnet_attention_{str(dtype).removeprefix('torch.')}_{shape.channels}_{shape.tile.queries}",
        threads=THREADS,
        shared_bytes=shape.shared_bytes,
        cluster=shape.tile.cluster,
        overlap=overlap,
    )


def _check_operands(q: Tensor, k: Tensor, v: Tensor, rest: Tensor, out: Tensor) -> None:
    """Raises ValueError where an operand is not what the kernel needs."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected float16 or bfloat16, got {q.dtype}")
    for name, rows, dtype in (("q", q, q.dtype), ("k", k, q.dtype), ("v", v, q.dtype), ("rest", rest, torch.float32)):
        aligned = rows.is_contiguous() and rows.data_ptr() % 16 == 0
        if rows.shape != q.shape or rows.dtype != dtype or not aligned:
            raise ValueError(
                f"{name}: expected {tuple(q.shape)} {dtype}, contiguous and aligned, "
                f"got {tuple(rows.shape)} {rows.dtype}"
            )
    batch, positions, channels = q.shape
    sizes = out.ndim == 4 and out.shape[:2] == (batch, channels) and out.shape[2] * out.shape[3] == positions
    if not sizes or out.dtype != q.dtype or not can_store(out):
        raise ValueError(
            f"out: expected [{batch}, {channels}, H, W] of {positions} positions in {q.dtype}, channels last, "
            f"got {tuple(out.shape)} {out.dtype} of strides {out.stride()}"
        )


def usable(channels: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel can compute an attention block on a GPU."""
    return channels in CHANNELS and reason_against(device, dtype) is None


def candidates(
    channels: int, positions: int, batch: int, dtype: torch.dtype, device: torch.device, card: Card
) -> list[AttentionTile]:
    """Tiles worth measuring, those of least estimated time first; none where the kernel may not be used."""
    if not usable(channels, dtype, device):
        return []
    return list(_running(channels, positions, positions, batch, dtype, device, card))


def best_tile(
    channels: int, positions: int, queries: int, batch: int, dtype: torch.dtype, device: torch.device, card: Card
) -> AttentionTile | None:
    """The tile of least estimated time for `queries` of the positions; None where the kernel cannot compute them."""
    return next(_running(channels, positions, queries, batch, dtype, device, card), None)


def _running(
    channels: int, positions: int, queries: int, batch: int, dtype: torch.dtype, device: torch.device, card: Card
) -> Iterator[AttentionTile]:
    for tile, _ in ranked(channels, positions, queries, batch, card):
        if _can_run(Shape.of(channels, positions, queries, batch, tile), dtype, device):
            yield tile


@functools.lru_cache(maxsize=1024)
def _can_run(shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GPU holds such a cluster: a part of one may have too few multiprocessors side by side."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            return _kernel(shape, dtype).blocks_at_once() > 0
        except RuntimeError as error:
            pass_on_out_of_memory(error)
            return False


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is not used on a GPU in `dtype`, or None. The first call per GPU runs and checks the kernel."""
    return _first_use.reason_against(device, dtype)


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    with torch.inference_mode(False), torch.no_grad():
        for channels, tile in itertools.product(CHANNELS, CANDIDATES):
            size = 2, 16, keys_of_tile(channels, tile.queries) + 1  # tiles for every cluster, the last one not full
            positions = size[1] * size[2]
            if not _can_run(Shape.of(channels, positions, positions, size[0], tile), dtype, device):
                continue
            error = _error(channels, size, tile, dtype, device)
            if not error < LIMIT * torch.finfo(dtype).eps:
                return f"relative error {error:.1e} of {channels} channels with {tile}"
    return None


def _error(
    channels: int, shape: tuple[int, int, int], tile: AttentionTile, dtype: torch.dtype, device: torch.device
) -> float:
    """RMS of the error against float64, relative to the RMS of the result, on noise of [batch, height, width]."""
    generator = torch.Generator("cpu").manual_seed(9)
    batch, height, width = shape
    size = batch, height * width, channels

    def noise(factor: float = 1.0) -> Tensor:
        made = torch.randn(size, generator=generator, device="cpu", dtype=torch.float32) * factor
        return made.to(device, dtype)

    # scores of a standard deviation of 2, so that some keys count much more than others
    q, k, v, rest = noise(2.0), noise(channels**-0.5), noise(), noise().float()
    out = torch.full((batch, height, width, channels), float("nan"), dtype=dtype, device=device)
    weigh(q, k, v, rest, out.permute(0, 3, 1, 2), tile, scale=math.log2(math.e), activation="relu")
    shares = (q.double() @ k.double().transpose(1, 2)).softmax(dim=2)
    exact = (shares @ v.double() + rest.double()).relu()
    return float((out.double().reshape(size) - exact).norm() / exact.norm())


_first_use = FirstUse(
    "attention for Hopper",
    lambda capability: capability == CAPABILITY,
    "compute capability 9.0",
    _check,
)
