"""Shapes of the convolution for Hopper (`csrc/cuda/hopper_conv.cuh`): what it can compute, in which tiles, and their
estimated time. Nothing here needs a GPU."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lgnet_fast.engine.geometry import Axis

from .cards import H100_CLOCK, SHARED_LIMITS, Card, clustered_blocks
from .conv import Conv
from .conv_configs import INGRESS_ALONE, INGRESS_SHARED, LAUNCH_SECONDS, Cost

CAPABILITY = (9, 0)
CHANNELS = 64
"""Output channels of a thread block, and input channels of a step, which is a row of taps."""
TILE_W = 8
TILE_HEIGHTS = (4, 8, 16, 32)
SHARED_LIMIT = SHARED_LIMITS["sm_90"]
"""Bytes of shared memory of a thread block."""
GROUP_THREADS, OTHER_THREADS = 128, 128
_LINE = 2 * CHANNELS  # bytes of a pixel's channels, or of a depth's columns
_TAP_BYTES = CHANNELS * _LINE  # of the weights of a tap
MAX_WEIGHT_STAGES, MAX_PATCH_STAGES = 12, 4
_BARRIER_BYTES = 8 * (2 * MAX_WEIGHT_STAGES + 3 * MAX_PATCH_STAGES)
_SEVERAL_HEIGHT, _SEVERAL_GROUPS = 16, 2  # of tiles of which a block may compute several
_ALIGNMENT = 1024  # bytes after which the swizzle repeats
ROW_BYTES = 4 * (CHANNELS + 4)  # bytes from one pixel's results to the next in shared memory


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


def takes_several(tile: HopperTile) -> bool:
    """Whether there is a kernel whose blocks compute several such tiles."""
    return (tile.tile_h, tile.groups, tile.split) == (_SEVERAL_HEIGHT, _SEVERAL_GROUPS, False)


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
        and stages % tile.groups == 0  # each warpgroup has its own: a barrier tells odd from even fillings alone
        and tile.weight_taps <= MAX_WEIGHT_STAGES
        and 1 <= tile.patch_stages <= MAX_PATCH_STAGES
    ):
        return f"weights of {tile.weight_taps} taps, {stages} rows of them, and {tile.patch_stages} stages of patches"
    if tile.split and tile.cluster * CHANNELS > in_channels:
        return f"{in_channels} channels among {tile.cluster} blocks (multiples of {CHANNELS} each are supported)"
    if tile.cluster not in (1, 2, 4, 8):
        return f"clusters of {tile.cluster} blocks (1, 2, 4 and 8 are supported)"
    return None


class Reads(NamedTuple):
    """What the tiles read along an axis, for the first and last phase, or the even and the odd plane: the source of
    row 0's first tap, that tap, and the number of taps."""

    origin: tuple[int, int]
    first: tuple[int, int]
    taps: tuple[int, int]


def _reads(conv: Conv, axis: Axis, in_size: int, out_size: int) -> Reads:
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
    return Reads(origin, first_taps, counts)


class Product(NamedTuple):
    """A step in a rectangle, before a tile is chosen. rows: of a phase, (top, bottom), (left, right). chunks and
    n_blocks: of the input and of the output channels. planes: 1, or 4 for stride 2."""

    conv: Conv
    axis: Axis
    samples: int
    rows: tuple[tuple[int, int], tuple[int, int]]
    along_y: Reads
    along_x: Reads
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
    ) -> Product:
        """Raises ValueError where the kernel cannot compute the step."""
        if (reason := unsupported(conv)) is not None:
            raise ValueError(f"conv: {reason}")
        axis = conv.axis
        if any(size % axis.in_step for size in in_size):  # the strides of a plane's tensor map would be refused
            raise ValueError(f"conv: {conv} of a map of {in_size} (even sizes are supported)")
        along_y, along_x = (_reads(conv, axis, in_size[dim], out_size[dim]) for dim in (0, 1))
        chunks, n_blocks = conv.in_channels // CHANNELS, conv.out_channels // CHANNELS
        return cls(conv, axis, batch, conv.rows_of(rect), along_y, along_x, chunks, n_blocks, axis.in_step**2)


class Shape(NamedTuple):
    """A product in tiles. sharing: blocks of a cluster with the same weights; parts: of the depth, in a cluster.
    box: pixels and rows of a patch. blocks: of the launch where they compute several tiles each; 0: one."""

    product: Product
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
    blocks: int = 0

    @classmethod
    def of(cls, product: Product, tile: HopperTile, num_sms: int | None = None) -> Shape:
        """The shape on a GPU of so many multiprocessors; None: each block computes one tile.

        Raises:
            ValueError: the tile cannot compute the product, or needs too much shared memory.
        """
        most_y, most_x = (max(reads.taps) for reads in (product.along_y, product.along_x))
        most_taps = max(product.axis.taps) // product.axis.in_step
        if (reason := _unsupported_tile(tile, product.conv.in_channels, most_taps)) is not None:
            raise ValueError(f"conv: {reason}")
        pitch, box_rows = TILE_W + most_x - 1, tile.tile_h + most_y - 1
        patch_bytes = -(-pitch * box_rows * _LINE // _ALIGNMENT) * _ALIGNMENT
        (top, bottom), (left, right) = product.rows
        tiles_y, tiles_x = -(-(bottom - top) // tile.tile_h), -(-(right - left) // TILE_W)
        if tile.cluster > 1 and not tile.split and product.samples * tiles_y * tiles_x % 2:
            tiles_y += 1  # below the rectangle, where nothing is stored: else no blocks would share weights
        m_tiles = product.samples * tiles_y * tiles_x
        sharing = next(n for n in (8, 4, 2, 1) if n <= tile.cluster and m_tiles % n == 0)
        sharing, parts = (1, tile.cluster) if tile.split else (sharing, 1)
        fewest_rows = min(product.along_y.taps)
        if product.chunks // parts * product.planes * fewest_rows < tile.groups:
            raise ValueError(f"tile: {tile} has more warpgroups than the product has steps")
        # A group keeps a patch until its next step, which may belong to a later one; that patch needs a stage, too.
        kept = 1 - (-tile.groups // fewest_rows)
        weight_stages, weight_bytes = tile.weight_taps // most_x, most_x * _TAP_BYTES
        results = tile.groups * TILE_W * tile.tile_h * ROW_BYTES  # they replace weights and patches
        patch_stages = max(
            min(max(tile.patch_stages, kept), -(-product.chunks // parts) * product.planes),
            -((weight_stages * weight_bytes - results) // patch_bytes),
        )
        shape = cls(
            product, tile, tiles_y, tiles_x, sharing, parts, (pitch, box_rows), weight_stages, weight_bytes,
            patch_stages, patch_bytes,
        )  # fmt: skip
        if patch_stages > MAX_PATCH_STAGES or shape.shared_bytes > SHARED_LIMIT:
            raise ValueError(f"tile: {tile} takes {shape.shared_bytes} bytes of shared memory")
        several = None if num_sms is None else shape._several(num_sms)
        return several or shape

    def _several(self, num_sms: int) -> Shape | None:
        """With several tiles a block; None where that gains nothing: a multiprocessor holds two blocks, or blocks as
        many as tiles. The sums of a tile have their own shared memory, so that the next one's loads need not wait."""
        tile, held = self.tile, _held(self, num_sms)
        if not takes_several(tile) or not held < self.grid or held > num_sms:
            return None
        taps = self.weight_bytes // _TAP_BYTES
        patches = max(2, self.patch_stages), 3, 2  # of a tile with one patch another holds that of the next
        for weight_taps, patch_stages in itertools.product((tile.weight_taps, 6), patches):
            shape = self._replace(weight_stages=weight_taps // taps, patch_stages=patch_stages, blocks=held)
            if shape.weight_stages >= 2 and shape.shared_bytes <= SHARED_LIMIT:
                return shape
        return None

    @property
    def m_tiles(self) -> int:
        return self.product.samples * self.tiles_y * self.tiles_x

    @property
    def grid(self) -> int:
        """Tiles of all blocks of output channels, phases and parts of the depth."""
        return self.m_tiles * self.product.n_blocks * self.product.axis.phases**2 * self.parts

    @property
    def shared_bytes(self) -> int:
        results = self.tile.groups * TILE_W * self.tile.tile_h * ROW_BYTES if self.sums else 0
        return _ALIGNMENT + self._operands + _BARRIER_BYTES + results

    @property
    def sums(self) -> int:
        """Bytes in shared memory before the sums of a block's tiles; 0: they replace weights and patches."""
        return self._operands + _BARRIER_BYTES if self.blocks else 0

    @property
    def _operands(self) -> int:
        """Bytes of weights and patches."""
        return self.weight_stages * self.weight_bytes + self.patch_stages * self.patch_bytes


# Fitted to the 28 tiles of an earlier form that ran one block a multiprocessor (bench/results/h100_hopper.jsonl):
# 2.0 us + 2.2 us + 6.4 ns a pixel + (479 + a quarter of the products) clocks a tap, error 2 % (root mean square).
# That form waited and signalled at every tap, in 110 instructions; this one does at every row of taps, in 100.
FILL_SECONDS, PIXEL_SECONDS = 2.2e-6, 6.4e-9
_STEP_CLOCKS, _TAIL = 435, 0.24
# Clocks of products relative to the tensor cores' rate: what the fitted tiles of 256 pixels took.
_PRODUCTS = 1.15
# Assumed: blocks of a cluster meet twice, and read each other's sums.
EXCHANGE_SECONDS = 1.0e-6
# Registers of a thread, by the rows of a tile and the warpgroups. Kernels of several tiles a block have more of them,
# but a multiprocessor holds one such block.
REGISTERS = {
    (4, 1): 80, (4, 2): 80, (8, 1): 88, (8, 2): 96, (16, 1): 136, (16, 2): 136, (32, 1): 184, (32, 2): 160,
}  # fmt: skip


def at_once(shape: Shape, card: Card) -> int:
    """Blocks that run at the same time."""
    return _held(shape, card.num_sms)


def _held(shape: Shape, num_sms: int) -> int:
    tile = shape.tile
    threads = tile.groups * GROUP_THREADS + OTHER_THREADS
    resident = min(
        (SHARED_LIMIT + 1024) // (shape.shared_bytes + 1024),
        65536 // (threads * REGISTERS[tile.tile_h, tile.groups]),
    )
    return max(1, resident) * clustered_blocks(num_sms, shape.sharing * shape.parts)


def cost(shape: Shape, card: Card) -> Cost:
    """Estimated seconds of a launch by its parts. issue: a step's instructions before and after its products.

    Where a block computes several tiles, one warpgroup multiplies while the other stores, and loads run ahead.
    """
    product, tile = shape.product, shape.tile
    pixels, phases = TILE_W * tile.tile_h, product.axis.phases
    waves = -(-shape.grid // (shape.blocks or at_once(shape, card)))
    groups = 1 if shape.blocks else tile.groups
    # Shared memory gives 128 bytes a clock; a tap reads its weights and pixels of 64 channels.
    tap = max(_PRODUCTS * 2 * pixels, (_TAP_BYTES + pixels * _LINE) / 128)
    longest = issue = products = read = 0.0
    for rows, taps in itertools.product(product.along_y.taps[:phases], product.along_x.taps[:phases]):
        patches = -(-product.chunks // shape.parts) * product.planes
        steps = patches * rows
        own = steps * max((_STEP_CLOCKS + _TAIL * 2 * pixels) / groups, taps * tap)
        longest = max(longest, own)
        issue += own / phases**2
        products += steps * taps * tap / phases**2
        read += (
            steps * taps * _TAP_BYTES / shape.sharing + patches * shape.box[0] * shape.box[1] * _LINE
        ) / phases**2
    all_taps = sum(product.along_y.taps[:phases]) * sum(product.along_x.taps[:phases]) * product.planes
    weights = all_taps * product.chunks * product.n_blocks * _TAP_BYTES
    share = card.l2 / card.num_sms
    together = -(-shape.grid // card.num_sms) * max(products / H100_CLOCK, read / (INGRESS_SHARED * share))
    store = pixels * PIXEL_SECONDS
    if shape.blocks:
        turns = -(-waves // tile.groups)  # of a warpgroup
        start = FILL_SECONDS + store
        alone = max(longest, waves * issue) / H100_CLOCK  # products of one after another
        alone = max(alone, turns * (issue / H100_CLOCK + store) - store)
    else:
        start, alone = waves * (FILL_SECONDS + store), waves * longest / H100_CLOCK
    return Cost(
        start=LAUNCH_SECONDS + start,
        products=products / H100_CLOCK,
        reads=read / (INGRESS_ALONE * share),
        issue=alone,
        together=together,
        memory=weights / (card.memory * min(1.0, max(1, shape.grid) / card.num_sms)),
        splits=EXCHANGE_SECONDS if shape.parts > 1 else 0.0,
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
        product = Product.of(conv, batch, in_size, out_size, rect)
        for tile in CANDIDATES:
            with contextlib.suppress(ValueError):
                found.append((tile, cost(Shape.of(product, tile, card.num_sms), card)))
    return tuple(sorted(found, key=lambda one: (one[1].seconds, one[0]))[:8])


def tile_like(tile: HopperTile, best: Sequence[tuple[HopperTile, Cost]]) -> tuple[HopperTile, Cost] | None:
    """Of :func:`ranked`, the tile of least time; of those that take at most 3 % more, which the estimate does not
    tell apart, the one that resembles `tile`, which was measured for a similar product."""
    if not best:
        return None
    close = [one for one in best if one[1].seconds <= 1.03 * best[0][1].seconds]
    return max(close, key=lambda one: sum(a == b for a, b in zip(one[0], tile)))
