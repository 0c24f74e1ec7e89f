"""What `csrc/cuda/deep.cu` does, in NumPy: the same tables, addresses and index arithmetic, warp by warp."""

from __future__ import annotations

import ctypes
from collections import defaultdict

import numpy as np

SLOTS, SLOT_BYTES = 20, 8192
PASS, STEP, TILE_BYTES, PAD, WARPS = 16, 32, 512, 4, 8

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
    """Runs a program. `shared_bytes`: of a block; nothing may pass them."""

    def __init__(self, program: object, grid: int, shared_bytes: int, barrier_bytes: int) -> None:
        self.program, self.grid, self.shared_bytes = program, grid, shared_bytes
        self.sums_begin = barrier_bytes + SLOTS * SLOT_BYTES
        self.chunks: defaultdict[int, int] = defaultdict(int)

    def run(self) -> None:
        """Every layer, all blocks of one after all of the one before."""
        for number in range(self.program.layers):
            self.layer(self.program.layer[number])

    def layer(self, layer) -> None:
        """One layer by all clusters."""
        cluster = self.program.cluster
        for unit in range(self.grid // cluster):
            if unit >= layer.units:
                continue
            share, quads = 1 << layer.log_share, 1 << layer.log_quads
            everything = layer.passes * share
            received = np.full((cluster, cluster, everything, 4), np.nan)  # [owner, from, place, 4]
            assert self.program.recv_offset + 16 * cluster * everything <= self.shared_bytes
            for rank in range(cluster):
                slots = self.weights(layer, unit, rank)
                for number in range(layer.passes):
                    sums = self.sums(layer, unit, rank, number, slots)
                    total = min(layer.rows, PASS) << layer.log_quads
                    f = np.arange(total)
                    row, quad = f >> layer.log_quads, f & (quads - 1)
                    four = sums[:, row[:, None], quad[:, None] * 4 + np.arange(4)].sum(0)
                    owner = f >> layer.log_share
                    place = (number << layer.log_share) + f - (owner << layer.log_share)
                    assert np.isnan(received[owner, rank, place]).all()
                    received[owner, rank, place] = four
            for rank in range(cluster):
                self.finish(layer, unit, rank, received[rank].sum(0))

    def weights(self, layer, unit: int, rank: int) -> tuple[int, np.ndarray]:
        """The ring after a block's weights of a layer have arrived, and the number of their first chunk."""
        block = unit * self.program.cluster + rank
        round_bytes = layer.warps_k * layer.channels * STEP * 2
        ring = np.full(SLOTS * SLOT_BYTES // 2, np.nan, np.float16)
        begin = chunk = self.chunks[block]
        address = layer.weights + block * layer.rounds * round_bytes
        for _ in range(layer.rounds):
            for at in range(0, round_bytes, SLOT_BYTES):
                count = min(round_bytes - at, SLOT_BYTES) // 2
                to = chunk % SLOTS * SLOT_BYTES // 2
                ring[to : to + count] = _memory(address, count)
                address += 2 * count
                chunk += 1
        assert chunk - begin <= SLOTS  # warps free slots that they do not read
        self.chunks[block] = chunk
        return begin, ring

    def sums(self, layer, unit: int, rank: int, number: int, slots: tuple[int, np.ndarray]) -> np.ndarray:
        """[warps_k, 16, channels + PAD] partial sums of a block and pass."""
        begin, ring = slots
        first = rank * layer.block_steps
        count = min(layer.block_steps, layer.steps - first)
        phase = unit // layer.groups
        round_bytes = layer.warps_k * layer.channels * STEP * 2
        per_round = -(-round_bytes // SLOT_BYTES)
        pixels = (layer.rows >> layer.log_rows_h >> layer.log_rows_w) * layer.in_h * layer.in_w
        source = _memory(layer.source, (pixels - 1) * layer.stride_x + layer.chunks * STEP)
        sums = np.full((layer.warps_k, PASS, layer.channels + PAD), np.nan)
        end = self.sums_begin + 4 * sums.size
        assert end <= self.program.recv_offset
        rows = number * PASS + np.arange(2)[:, None] * 8 + (_LANE // 4)[None]
        y = rows >> layer.log_rows_w
        x0 = (rows - (y << layer.log_rows_w)) * layer.in_step + layer.origin_x[phase & 1]
        sample = (y >> layer.log_rows_h) * layer.in_h
        y0 = (y & ((1 << layer.log_rows_h) - 1)) * layer.in_step + layer.origin_y[phase >> 1]
        for warp in range(WARPS):
            warp_k, warp_c = warp >> layer.log_warps_c, warp & ((1 << layer.log_warps_c) - 1)
            offset = warp * layer.tiles * 2 * TILE_BYTES
            total = np.zeros((layer.tiles, 2, 32, 4))
            for turn in range(layer.rounds):
                step = turn * layer.warps_k + warp_k
                if step >= count:
                    continue
                tap = (first + step) * layer.chunks_inverse >> 16
                channel = (first + step - tap * layer.chunks) * STEP + _LANE % 4 * 8
                tap_y = tap >> layer.log_count_x
                tap_x = tap - (tap_y << layer.log_count_x)
                at_y, at_x = y0 + tap_y, x0 + tap_x
                inside = (rows < layer.rows) & (at_y >= 0) & (at_y < layer.in_h) & (at_x >= 0) & (at_x < layer.in_w)
                pixel = np.where(inside, (sample + at_y) * layer.in_w + at_x, 0)
                index = (pixel * layer.stride_x + channel)[..., None] + np.arange(8)
                x = np.where(inside[..., None], source[index].astype(np.float64), 0.0)  # [2, lane, 8]
                own = begin + turn * per_round + offset // SLOT_BYTES
                at = own % SLOTS * SLOT_BYTES + offset % SLOT_BYTES
                assert offset % SLOT_BYTES + layer.tiles * 2 * TILE_BYTES <= SLOT_BYTES
                read = ring[at // 2 : at // 2 + layer.tiles * TILE_BYTES].reshape(layer.tiles, 2, 32, 4, 2)
                for half in (0, 1):
                    b = x.reshape(2, 32, 2, 2, 2)[:, :, half]  # x and y, or z and w
                    total += multiply(read[:, None, half].astype(np.float64), b[None])
            for tile in range(layer.tiles):
                for r in (0, 1):
                    if r * 8 >= layer.rows:
                        continue
                    channel = (warp_c * layer.tiles + tile) * 16 + _C_ROW
                    sums[warp_k, r * 8 + _C_COL, channel] = total[tile, r]
        return sums

    def finish(self, layer, unit: int, rank: int, values: np.ndarray) -> None:
        """A block's part of the results, `values` [passes * share, 4]."""
        phase = unit // layer.groups
        base = (unit - phase * layer.groups) * layer.channels
        total = min(layer.rows, PASS) << layer.log_quads
        for index in range(layer.passes << layer.log_share):
            number = index >> layer.log_share
            f = (rank << layer.log_share) + index - (number << layer.log_share)
            if f >= total:
                continue
            row = number * PASS + (f >> layer.log_quads)
            channel = base + (f & ((1 << layer.log_quads) - 1)) * 4
            bias = np.ctypeslib.as_array((ctypes.c_float * 4).from_address(layer.bias + 4 * channel))
            value = values[index] + bias
            y = row >> layer.log_rows_w
            sample = y >> layer.log_rows_h
            out_x = (row - (y << layer.log_rows_w)) * layer.out_step + (phase & 1)
            out_y = (y - (sample << layer.log_rows_h)) * layer.out_step + (phase >> 1)
            pixel = (sample * layer.out_h + out_y) * layer.out_w + out_x
            for store, stride, code in (
                (layer.store0, layer.stride_0, layer.activation_0),
                (layer.store1, layer.stride_1, layer.activation_1),
            ):
                if store:
                    _memory(store + 2 * (pixel * stride + channel), 4)[:] = _activate(value, code)
