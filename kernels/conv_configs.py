"""Block shapes and numbers of splits of the engine's convolutions.

`conv_tables.py` holds what `bench/gpu_contact.py` measured on a GPU. For other products, the candidate with the least
estimated time is taken (:func:`cost`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import triton

from .cards import SHARED_LIMITS, card_for
from .conv_tables import TUNED

MAX_SPLITS = 64


class Tile(NamedTuple):
    """BLOCK_M rows by BLOCK_N columns per program, BLOCK_K of the depth per step, the depth split in `splits`.

    fused: the last program of a block adds its splits; else a second kernel does.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    fused: bool = False

    @property
    def label(self) -> str:
        """As text: BLOCK_MxBLOCK_NxBLOCK_K/splits, then "f" where fused."""
        return f"{self.block_m}x{self.block_n}x{self.block_k}/{self.splits}{'f' if self.fused else ''}"


class Work(NamedTuple):
    """Size of one matrix product: rows of a phase, columns, the taps of every phase, and input channels.

    tap_row: `conv.Conv.tap_row`. tap_rows: rows of taps of every phase. merges: it ends a stage.
    """

    rows: int
    columns: int
    taps: tuple[int, ...]
    in_channels: int
    tap_row: int
    tap_rows: tuple[int, ...]
    merges: bool

    @property
    def all_rows(self) -> int:
        """Rows of all phases together."""
        return self.rows * len(self.taps)

    def steps(self, block_k: int) -> tuple[int, ...]:
        """Steps along the depth, of each phase."""
        if self.tap_row:
            return tuple(-(-count * self.tap_row // block_k) for count in self.tap_rows)
        return tuple(taps * -(-self.in_channels // block_k) for taps in self.taps)


LAUNCH_SECONDS = 2.0e-6
"""Seconds for the start, drain and dependency of one kernel within a graph."""
# The constants below are fitted to 225 measured tiles of 24 products on an H100 (bench/results/h100_contact_*.jsonl):
# the logarithms of estimate and measurement differ by 0.17 (standard deviation).
# Seconds from the start of a program to its first product, and the least for a step of 64 along the depth.
FILL_SECONDS = 0.8e-6
_STEP_SECONDS = 9.0e-8
# Share of the tensor cores' rate that blocks of 128 by 128 reach, and how it falls with the block's area.
_EFFICIENCY = 0.6
_AREA_EXPONENT = 0.3
# L2 bandwidth of a multiprocessor relative to an even share: with one program, and with several.
INGRESS_ALONE, INGRESS_SHARED = 1.8, 1.5
# L2 bandwidth of the last program of a block while it reads the splits, relative to an even share.
_SPLIT_READ = 0.6
# Factor for the index arithmetic where a step takes rows of taps; measured when that arithmetic was longer.
_FLAT = 2.4


def _shared_bytes(tile: Tile, element: int) -> int:
    return tile.num_stages * tile.block_k * (tile.block_m + tile.block_n) * element


def programs(work: Work, tile: Tile) -> int:
    """Programs of the main launch."""
    blocks = -(-work.rows // tile.block_m) * -(-work.columns // tile.block_n)
    return blocks * len(work.taps) * tile.splits


class Cost(NamedTuple):
    """Estimated seconds of a launch for each possible bottleneck.

    start: launch and pipeline fill. products, reads, issue: of the longest program alone. together: of all programs
    of a multiprocessor. memory: reading the weights from device memory. splits: adding them. l2_bytes: bytes that all
    programs read from the L2 cache.
    """

    start: float
    products: float
    reads: float
    issue: float
    together: float
    memory: float
    splits: float
    l2_bytes: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole launch."""
        body = max(self.products, self.reads, self.issue, self.together, self.memory)
        return self.start + body + self.splits

    @property
    def bound(self) -> str:
        """Name of the largest part."""
        parts = {name: getattr(self, name) for name in ("products", "reads", "issue", "together", "memory")}
        name = max(parts, key=lambda part: parts[part])
        return "start" if self.start > parts[name] else name


def cost(work: Work, tile: Tile, kind: str, generation: str, num_sms: int) -> Cost:
    """Estimated time of a product: one launch, or two where a second kernel adds the splits."""
    card = card_for(generation, num_sms)
    element = 4 if kind in ("tf32", "ieee") else 2
    rate = card.macs / card.num_sms * {"half": 1.0, "tf32": 0.5, "ieee": 0.06}[kind]
    area = tile.block_m * tile.block_n
    products = tile.block_k * area / (rate * _EFFICIENCY * min(1.0, area / (128 * 128)) ** _AREA_EXPONENT)
    read = tile.block_k * (tile.block_m + tile.block_n) * element
    share = card.l2 / num_sms
    steps = work.steps(tile.block_k)
    longest = -(-max(steps) // tile.splits)
    mean = sum(max(1, -(-s // tile.splits)) for s in steps) / len(steps)
    count = programs(work, tile)
    slowed = _FLAT if work.tap_row else 1.0
    weights = work.columns * sum(work.taps) * work.in_channels * element
    splits = 0.0
    if tile.fused:  # the last program reads every part of its block alone
        splits = 4 * area * tile.splits / (_SPLIT_READ * share)
    elif tile.splits > 1:
        splits = LAUNCH_SECONDS + 8 * work.all_rows * work.columns * tile.splits / card.l2 + 2e-8 * tile.splits
    return Cost(
        start=LAUNCH_SECONDS + FILL_SECONDS,
        products=slowed * longest * products,
        reads=slowed * longest * read / (INGRESS_ALONE * share),
        issue=slowed * longest * _STEP_SECONDS * (tile.block_k / 64) ** 0.5,
        together=slowed * mean * -(-count // num_sms) * max(products, read / (INGRESS_SHARED * share)),
        memory=weights / (card.memory * min(1.0, count / num_sms)),
        splits=splits,
        l2_bytes=count * mean * read,
    )


def estimate(work: Work, tile: Tile, kind: str, generation: str, num_sms: int) -> float:
    """Seconds of :func:`cost`."""
    return cost(work, tile, kind, generation, num_sms).seconds


def candidates(work: Work, kind: str, generation: str, num_sms: int) -> Iterator[Tile]:
    """Candidate tiles: those that fit the shared memory and suit the size of the product."""
    element = 4 if kind in ("tf32", "ieee") else 2
    columns = max(16, triton.next_power_of_2(work.columns))
    rows = max(16, triton.next_power_of_2(work.rows))
    depth = max(16, triton.next_power_of_2(max(work.tap_rows) * work.tap_row or work.in_channels))
    # [BLOCK_M, BLOCK_N, warps]
    shapes: tuple[tuple[int, int, int], ...]
    if kind == "ieee":
        shapes = ((16, 32, 4), (32, 32, 4), (64, 32, 4), (64, 64, 8))
    elif kind == "tf32":
        shapes = ((16, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4), (128, 64, 8))
    else:
        shapes = (
            (16, 64, 4), (16, 128, 4), (32, 64, 4), (64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4),
            (128, 64, 4), (128, 128, 8), (128, 256, 8),
        )  # fmt: skip
    if generation == "interpreted":  # their time depends on the number of operations, not of elements
        shapes = ((min(1024, rows), 64, 4),)
    seen = set()
    for block_m, wanted_n, warps in shapes:
        block_n = min(wanted_n, columns)
        if block_m > max(rows, 16) or (block_m, block_n) in seen:
            continue
        if work.tap_row and block_m < min(rows, 64):  # the index arithmetic of this one would spill registers
            continue
        seen.add((block_m, block_n))
        block_k = min(depth, {"half": 64, "tf32": 32, "ieee": 16}[kind])
        if work.tap_row:
            block_k = max(block_k, work.tap_row)
        elif work.in_channels % block_k and work.in_channels % (block_k // 2) == 0:
            block_k = max(16, block_k // 2)
        for num_stages in (4, 3, 2):
            tile = Tile(block_m, block_n, block_k, 1, warps, 1 if kind == "ieee" else num_stages)
            if _shared_bytes(tile, element) <= SHARED_LIMITS[generation] * 0.9:
                break
        else:
            continue
        longest = max(work.steps(block_k))
        single = programs(work, tile)
        splits = 1
        # the full epilogue beside a large accumulator would spill registers
        most = 64 * 32 if work.merges else 128 * 128
        crowded = block_m * block_n > most and generation != "interpreted"
        if crowded and generation == "sm_100" and not work.merges:  # there also beside the sum over the splits
            continue
        while splits <= min(MAX_SPLITS, longest // 2 or 1):
            if (splits == 1 and not crowded) or (splits > 1 and single * splits <= 4 * num_sms):
                # measured: a second kernel for the sum is faster only with the epilogue that ends a stage
                yield tile._replace(splits=splits, fused=splits > 1 and not work.merges)
            splits *= 2


@functools.lru_cache(maxsize=4096)
def pick_tile(work: Work, kind: str, generation: str, num_sms: int) -> Tile:
    """The tuned tile of this product, else the candidate of least estimated time."""
    tuned = TUNED.get(generation, {}).get((kind, *work[:4]))
    if tuned is not None and tuned != "cudnn":
        return Tile(*tuned)
    return min(
        candidates(work, kind, generation, num_sms), key=lambda t: estimate(work, t, kind, generation, num_sms)
    )


def is_tuned_cudnn(work: Work, kind: str, generation: str) -> bool:
    """Whether the tuner found PyTorch's own convolution faster for this product."""
    return TUNED.get(generation, {}).get((kind, *work[:4])) == "cudnn"
