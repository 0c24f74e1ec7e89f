"""A NumPy emulation of `csrc/cuda/deep.cu`: the same tables, addresses and index arithmetic, warp by warp."""

from __future__ import annotations

import ctypes
from collections import defaultdict

import numpy as np

SLOT_BYTES = 8192
UNIT, STEP, PIXEL_BYTES, PIECE_BYTES, PAD, WARPS = 16, 32, 64, 1024, 4, 8

_LANE = np.arange(32)
# PTX ISA, mma.m16n8k16: [lane, register, half of it] -> row and column of A, row of B; [lane, register] of C
_A_ROW = (_LANE // 4)[:, None, None] + 8 * (np.arange(4) & 1)[None, :, None] + np.zeros((1, 1, 2), int)
_A_COL = (_LANE % 4 * 2)[:, None, None] + np.arange(2)[None, None] + 8 * (np.arange(4) >> 1)[None, :, None]
_B_ROW = (_LANE % 4 * 2)[:, None, None] + np.arange(2)[None, None] + 8 * np.arange(2)[None, :, None]
_C_ROW = (_LANE // 4)[:, None] + 8 * (np.arange(4) >> 1)[None]
_C_COL = (_LANE % 4 * 2)[:, None] + (np.arange(4) & 1)[None]


def _memory(address: int, count: int) -> np.ndarray:
    """`count` 16-bit words at an address of this process."""
    return np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(address)).view(np.float16)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mma.m16n8k16 of [..., lane, 4, 2] and [..., lane, 2, 2] registers, to [..., lane, 4]."""
    left = np.zeros((*a.shape[:-3], 16, 16))
    left[..., _A_ROW, _A_COL] = a
    right = np.zeros((*b.shape[:-3], 16, 8))
    right[..., _B_ROW, np.broadcast_to((_LANE // 4)[:, None, None], _B_ROW.shape)] = b
    return (left @ right)[..., _C_ROW, _C_COL]


def _activate(x: np.ndarray, code: int) -> np.ndarray:
    return np.where(x < 0, {0: 1.0, 1: 0.0, 2: 0.2}[code] * x, x)


class Machine:
    """Runs a program. `shared_bytes`: shared memory of a block, which no access may exceed."""

    def __init__(self, program: object, grid: int, shared_bytes: int, barrier_bytes: int) -> None:
        self.program, self.grid = program, grid
        self.cluster = 1 << program.log_cluster
        self.left = shared_bytes - barrier_bytes - program.slots * SLOT_BYTES
        self.chunks: defaultdict[int, int] = defaultdict(int)
        self.read: defaultdict[int, int] = defaultdict(int)
        """Block -> bytes of weights."""

    def run(self) -> None:
        """Run every layer: all blocks of one layer before the next."""
        assert self.grid == self.cluster * self.program.clusters
        for number in range(self.program.layers):
            self.layer(self.program.layer[number])

    def place(self, layer, cluster: int) -> tuple[int, int]:
        """First unit of a cluster, and number of units."""
        turn = cluster + layer.shift
        if turn >= self.program.clusters:
            turn -= self.program.clusters
        return turn * layer.base + min(turn, layer.extra), layer.base + (turn < layer.extra)

    def layer(self, layer) -> None:
        """One layer by all clusters."""
        places = [self.place(layer, number) for number in range(self.program.clusters)]
        owners = sorted(unit for begin, units in places for unit in range(begin, begin + units))
        assert owners == list(range(layer.groups * layer.out_step**2))
        for number, (begin, units) in enumerate(places):
            if units == 0:
                continue
            rows = units << layer.log_rows  # of 16 channels
            most = -(-rows // self.cluster) * 4
            received = np.full((self.cluster, self.cluster, most, 4), np.nan)  # [owner, from, place, 4]
            assert layer.received + self.cluster * most * 16 <= self.left
            sent = [0] * self.cluster
            for rank in range(self.cluster):
                sums = self.sums(layer, number, rank, begin, units)
                index = np.arange(rows * 4)
                quad, which = index & 3, index >> 2
                row, unit = which & (layer.rows - 1), which >> layer.log_rows
                four = sums[:, row[:, None], unit[:, None] * UNIT + quad[:, None] * 4 + np.arange(4)].sum(0)
                owner, mine = which & (self.cluster - 1), (which >> self.program.log_cluster) * 4 + quad
                assert np.isnan(received[owner, rank, mine]).all()
                received[owner, rank, mine] = four
                for one in owner:
                    sent[one] += 16
            for rank in range(self.cluster):
                last = rows - 1 - rank
                finished = 0 if last < 0 else (last >> self.program.log_cluster) + 1
                assert sent[rank] == (finished * UNIT * 4) << self.program.log_cluster  # bytes its barrier expects
                self.finish(layer, rank, begin, received[rank].sum(0)[: finished * 4])

    def positions(self, layer, first: int, steps: int) -> np.ndarray:
        """A block's copy of the positions, [pixels of all chunks, 32], with zeros around."""
        stage = np.full(layer.stage_bytes // 2, np.nan, np.float16)
        stage[:] = 0
        assert layer.stage_bytes % 16 == 0
        if steps == 0:
            return stage
        chunk0 = first >> layer.log_taps
        chunks = ((first + steps - 1) >> layer.log_taps) - chunk0 + 1
        pixels = 1 << layer.log_pixels
        width = layer.steps >> layer.log_taps
        source = _memory(layer.source, (pixels - 1) * layer.stride_x + width * STEP)
        index = np.arange(chunks << (layer.log_pixels + 2))
        part, chunk, pixel = index & 3, index >> (layer.log_pixels + 2), (index >> 2) & (pixels - 1)
        line = pixel >> layer.log_in_w
        x = (pixel & ((1 << layer.log_in_w) - 1)) + layer.border_x
        y = (line >> layer.log_in_h) * layer.stage_h + (line & ((1 << layer.log_in_h) - 1)) + layer.border_y
        column = (x & ((1 << layer.log_in_step) - 1)) * layer.stage_half + (x >> layer.log_in_step)
        assert (column < layer.stage_w).all()
        to = (chunk * layer.stage_pixels + y * layer.stage_w + column) * PIXEL_BYTES // 2 + part * 8
        assert len(set(to.tolist())) == len(to)
        at = pixel * layer.stride_x + (chunk0 + chunk) * STEP + part * 8
        stage[to[:, None] + np.arange(8)] = source[at[:, None] + np.arange(8)]
        return stage

    def sums(self, layer, cluster: int, rank: int, begin: int, units: int) -> np.ndarray:
        """[warps_k, rows, units * 16 + PAD] partial sums of a block."""
        first = rank * layer.block_steps
        steps = max(min(layer.block_steps, layer.steps - first), 0)
        stage = self.positions(layer, first, steps)
        warps_k, items = 1 << layer.log_warps_k, units << layer.log_warps_k
        pieces = layer.step_rounds << layer.log_warps_k
        block = cluster * self.cluster + rank
        address = layer.weights + (begin * self.cluster + rank * units) * pieces * PIECE_BYTES
        assert layer.sums >= layer.stage_bytes
        sums = np.full((warps_k, layer.rows, units * UNIT + PAD), np.nan)
        assert layer.sums + 4 * sums.size <= layer.received
        groups = -(-layer.rows // 8)
        row = (np.arange(groups)[:, None] * 8 + (_LANE // 4)[None]) & (layer.rows - 1)
        line = row >> layer.log_rows_w
        y = (line & ((1 << layer.log_rows_h) - 1)) << layer.log_in_step
        y = (line >> layer.log_rows_h) * layer.stage_h + y
        base = (y * layer.stage_w + (row & ((1 << layer.log_rows_w) - 1))) * PIXEL_BYTES + _LANE % 4 * 16
        for item0 in range(0, items, WARPS):
            present = min(items - item0, WARPS)
            total = np.zeros((WARPS, groups, 32, 4))
            for turn in range(layer.step_rounds):
                slot = _memory(address, present * PIECE_BYTES // 2).reshape(present, 2, 32, 4, 2)
                address += present * PIECE_BYTES
                self.read[block] += present * PIECE_BYTES
                self.chunks[block] += 1
                for warp in range(present):
                    unit, part = (item0 + warp) >> layer.log_warps_k, (item0 + warp) & (warps_k - 1)
                    phase = (begin + unit) // layer.groups
                    step = (turn << layer.log_warps_k) + part
                    if step >= steps:
                        continue
                    depth = first + step
                    tap = depth & ((1 << layer.log_taps) - 1)
                    tap_y = layer.origin_y[phase >> 1] + (tap >> layer.log_count_x)
                    tap_x = layer.origin_x[phase & 1] + (tap & ((1 << layer.log_count_x) - 1))
                    column = tap_x & ((1 << layer.log_in_step) - 1)
                    column = column * layer.stage_half + (tap_x >> layer.log_in_step)
                    chunk = (depth >> layer.log_taps) - (first >> layer.log_taps)
                    pixel = chunk * layer.stage_pixels + tap_y * layer.stage_w + column
                    at = base + pixel * PIXEL_BYTES
                    x = stage[at[..., None] // 2 + np.arange(8)].astype(np.float64)  # [groups, lane, 8]
                    for half in (0, 1):
                        b = x.reshape(groups, 32, 2, 2, 2)[:, :, half]  # x and y, or z and w
                        total[warp] += multiply(slot[warp, half].astype(np.float64), b)
            for warp in range(present):
                unit, part = (item0 + warp) >> layer.log_warps_k, (item0 + warp) & (warps_k - 1)
                for r in range(groups):
                    to, channel = np.broadcast_arrays(r * 8 + _C_COL, unit * UNIT + _C_ROW)
                    inside = to < layer.rows
                    assert np.isnan(sums[part, to[inside], channel[inside]]).all()
                    sums[part, to[inside], channel[inside]] = total[warp, r][inside]
        return sums

    def finish(self, layer, rank: int, begin: int, values: np.ndarray) -> None:
        """A block's part of the results, `values` [rows of 16 channels * 4, 4]."""
        for index, summed in enumerate(values):
            which = ((index >> 2) << self.program.log_cluster) + rank
            row, unit = which & (layer.rows - 1), begin + (which >> layer.log_rows)
            phase = unit // layer.groups
            channel = (unit - phase * layer.groups) * UNIT + (index & 3) * 4
            bias = np.ctypeslib.as_array((ctypes.c_float * 4).from_address(layer.bias + 4 * channel))
            value = summed + bias
            y = row >> layer.log_rows_w
            sample = y >> layer.log_rows_h
            out_x = (row & ((1 << layer.log_rows_w) - 1)) * layer.out_step + (phase & 1)
            out_y = (y & ((1 << layer.log_rows_h) - 1)) * layer.out_step + (phase >> 1)
            pixel = (sample * layer.out_h + out_y) * layer.out_w + out_x
            for store, stride, code in (
                (layer.store0, layer.stride_0, layer.activation_0),
                (layer.store1, layer.stride_1, layer.activation_1),
            ):
                if store:
                    _memory(store + 2 * (pixel * stride + channel), 4)[:] = _activate(value, code)
