"""Deep layers in one launch (`csrc/cuda/deep.cu`): what the kernel can compute, how layers are split, and their
estimated time. Nothing here needs a GPU.

A layer is, for each phase, a product of [channels, depth] and [depth, rows]. A unit is 16 output channels
of a phase; a step is 32 input channels of one tap. Clusters of thread blocks get equal numbers of units, some one
more; which ones changes from layer to layer, so that all clusters read about the same over all layers. Each block of
a cluster takes `block_steps` steps of the depth, and copies the positions that they need to shared memory. Its eight
warps take items, (unit, every ``warps_k``-th step of the block), eight at a time.

"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cards import H100_CLOCK, SHARED_LIMITS, Card
from .conv import Conv
from .conv_configs import LAUNCH_SECONDS, Cost

CAPABILITY = (9, 0)

# As in deep.cu.
MAX_LAYERS = 12
MAX_SLOTS, SLOT_BYTES = 24, 8192
WARPS = 8
UNIT = 16
STEP = 32
PIXEL_BYTES, PIECE_BYTES = 64, 1024
PAD = 4
BARRIER_BYTES = 512
SHARED_LIMIT = SHARED_LIMITS["sm_90"]
"""Bytes of shared memory of a thread block."""

CLUSTERS = (8, 4, 2)
"""Thread blocks per cluster to try; eight is the most that every GPU of this capability supports."""
MIN_SLOTS = 11
"""Fewest slots of the ring buffer. At 25 bytes per ns they last 3.6 us, longer than the waits between layers."""
MAX_ROWS = 64
"""Most outputs of a phase."""


class Split(NamedTuple):
    """How a layer is split among clusters, blocks and warps; see the docstring of this module."""

    cluster: int
    clusters: int
    units: int
    groups: int
    """Units of a phase."""
    steps: int
    block_steps: int
    warps_k: int
    shift: int = 0
    """Cluster c has the place ``(c + shift) % clusters``; the first places have one unit more."""

    @property
    def most(self) -> int:
        """Most units of any cluster."""
        return -(-self.units // self.clusters)

    @property
    def step_rounds(self) -> int:
        """Steps that one warp computes of a unit."""
        return -(-self.block_steps // self.warps_k)

    @property
    def chunks(self) -> int:
        """Chunks of weights, one slot of the ring buffer each, that a block reads for the layer, at most."""
        return -(-self.most * self.warps_k // WARPS) * self.step_rounds

    def units_of(self, place: int) -> range:
        """The units of the cluster at a place."""
        base, extra = divmod(self.units, self.clusters)
        begin = place * base + min(place, extra)
        return range(begin, begin + base + (place < extra))

    def block_bytes(self, cluster: int) -> int:
        """Number of weights that each block of a cluster reads."""
        units = self.units_of((cluster + self.shift) % self.clusters)
        return len(units) * self.step_rounds * self.warps_k * PIECE_BYTES


class DeepLayer(NamedTuple):
    """One layer of a group: [batch, *in_size, Cin] to [batch, *out_size, Cout]."""

    conv: Conv
    batch: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]

    @property
    def rows_size(self) -> tuple[int, int]:
        """Rows of the product along each axis, of one phase and sample."""
        step = self.conv.axis.out_step
        return -(-self.out_size[0] // step), -(-self.out_size[1] // step)

    @property
    def rows(self) -> int:
        """Rows of the product, of one phase."""
        return self.batch * self.rows_size[0] * self.rows_size[1]

    def taps(self, phase: int) -> list[tuple[int, int]]:
        """First tap and number of taps used, along y and x, of a phase."""
        axis = self.conv.axis
        which = divmod(phase, axis.phases)
        sizes = zip(which, self.in_size, self.out_size)
        return [axis.used(one, in_size, out_size, False) for one, in_size, out_size in sizes]

    @property
    def origins(self) -> tuple[list[int], list[int]]:
        """For the first and last phase: the first position that row 0 reads, along y and x."""
        axis = self.conv.axis
        which = [(phase, self.taps(phase * (axis.phases + 1))) for phase in (0, axis.phases - 1)]
        along_y, along_x = ([axis.origins[phase] + taps[i][0] for phase, taps in which] for i in (0, 1))
        return along_y, along_x

    @property
    def stage(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The positions copied to shared memory, along y and x: border pixels at the begin, and size with borders."""
        borders, sizes = [], []
        counts = [count for _, count in self.taps(0)]
        for origins, in_size, rows, count in zip(self.origins, self.in_size, self.rows_size, counts):
            step = self.conv.axis.in_step
            border = max(0, -min(origins))
            end = max(in_size, max(origins) + (rows - 1) * step + count)
            borders.append(border)
            sizes.append(-(-(border + end) // step) * step)
        return (borders[0], borders[1]), (sizes[0], sizes[1])


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def unsupported(layer: DeepLayer) -> str | None:
    """Why the kernel cannot compute a layer, or None."""
    conv = layer.conv
    if conv.merges or conv.reflect or conv.tap_row or conv.axis.patch != 1 or conv.axis.phases > 2:
        return "a step that ends a stage, reflects, or has few channels"
    if conv.in_channels % STEP or conv.out_channels % 16:
        return f"{conv.in_channels} to {conv.out_channels} channels (multiples of {STEP} and 16 are supported)"
    if layer.rows > MAX_ROWS or not all(_is_power(n) for n in (*layer.rows_size, *layer.in_size, layer.batch)):
        return (
            f"{layer.batch} x {layer.rows_size} outputs of a phase (powers of two, at most {MAX_ROWS} are supported)"
        )
    taps = [layer.taps(phase) for phase in range(conv.axis.phases**2)]
    counts = {(y[1], x[1]) for y, x in taps}
    if len(counts) > 1 or not all(map(_is_power, next(iter(counts)))) or conv.axis.in_step > 2:
        return f"taps {sorted(counts)} of its phases"
    return None


def layer_bytes(layer: DeepLayer, share: Split) -> tuple[int, int, int]:
    """Bytes of shared memory that a block needs for a layer: positions, partial sums, sums of the cluster."""
    (_, count_y), (_, count_x) = layer.taps(0)
    taps = count_y * count_x
    blocks = range(0, share.steps, share.block_steps)
    chunks = max((min(b + share.block_steps, share.steps) - 1) // taps - b // taps + 1 for b in blocks)
    height, width = layer.stage[1]
    sums = 4 * share.warps_k * layer.rows * (UNIT * share.most + PAD)
    received = share.cluster * -(-share.most * layer.rows // share.cluster) * UNIT * 4
    return chunks * layer.batch * height * width * PIXEL_BYTES, sums, received


def split(layer: DeepLayer, cluster: int, clusters: int) -> Split | None:
    """The split of a layer among `clusters` clusters of `cluster` blocks; None where shared memory is too small."""
    conv = layer.conv
    (_, count_y), (_, count_x) = layer.taps(0)
    steps = count_y * count_x * conv.in_channels // STEP
    groups = conv.out_channels // UNIT
    found = []
    for warps_k in (1, 2, 4, 8):
        one = Split(cluster, clusters, groups * conv.axis.phases**2, groups, steps, -(-steps // cluster), warps_k)
        if BARRIER_BYTES + MIN_SLOTS * SLOT_BYTES + sum(layer_bytes(layer, one)) <= SHARED_LIMIT:
            # Least padding of the depth first, then least time: a chunk takes about as long as 128 rows of partial
            # sums.
            time = one.chunks + warps_k * one.most * layer.rows / 128
            found.append((one.step_rounds * warps_k, time, warps_k, one))
    return min(found)[3] if found else None


def pack(layer: DeepLayer, weight: Tensor, share: Split) -> Tensor:
    """Weights in the order in which blocks read them.

    Args:
        layer: the layer.
        weight: :meth:`.conv.Conv.pack` of it.
        share: :func:`split`.

    Returns:
        [pieces, 2, lane, 8], contiguous, float16 or bfloat16 as `weight`: for every place of a cluster and every
        block of it, chunk by chunk, the pieces of a unit and step that the warps of the block read.
    """
    conv, axis = layer.conv, layer.conv.axis
    by_phase = []
    begin = 0
    for phase in range(axis.phases**2):
        (first_y, count_y), (first_x, count_x) = layer.taps(phase)
        taps_y, taps_x = (axis.taps[one] for one in divmod(phase, axis.phases))
        end = begin + taps_y * taps_x * conv.in_channels
        taps = weight[begin:end].view(taps_y, taps_x, conv.in_channels, conv.out_channels)
        used = taps[first_y : first_y + count_y, first_x : first_x + count_x]
        chunks = used.reshape(count_y * count_x, conv.in_channels // STEP, STEP, conv.out_channels)
        by_phase.append(chunks.transpose(0, 1).reshape(share.steps, STEP, conv.out_channels))
        begin = end
    # depth of a step: lane % 4, product, upper or lower half of the product's depth, pair;
    # channel: group, upper or lower half of the unit, lane // 4
    parts = torch.stack(by_phase).view(len(by_phase), share.steps, 4, 2, 2, 2, share.groups, 2, 8)
    # phase group | step | product | lane // 4, lane % 4 | half of the depth, half of the unit, pair
    pieces = parts.permute(0, 6, 1, 3, 8, 2, 4, 7, 5).reshape(share.units * share.steps, 2, 32, 8)
    pieces = torch.cat([pieces, pieces.new_zeros(1, 2, 32, 8)])
    nothing = share.units * share.steps
    order = []
    for place, rank in itertools.product(range(share.clusters), range(share.cluster)):
        units = share.units_of(place)
        items = [(unit, part) for unit in units for part in range(share.warps_k)]
        for item in range(0, len(items), WARPS):
            for first in range(0, share.step_rounds * share.warps_k, share.warps_k):
                for unit, part in items[item : item + WARPS]:
                    step = rank * share.block_steps + first + part
                    used_step = first + part < share.block_steps and step < share.steps
                    order.append(unit * share.steps + step if used_step else nothing)
    return pieces[torch.tensor(order, device=pieces.device)]


def slots_of(layers: Sequence[DeepLayer], shares: Sequence[Split]) -> tuple[int, int]:
    """Parts of the ring buffer, and bytes of dynamic shared memory of a block."""
    most = max(sum(layer_bytes(layer, share)) for layer, share in zip(layers, shares))
    slots = min((SHARED_LIMIT - BARRIER_BYTES - most) // SLOT_BYTES, MAX_SLOTS)
    return slots, BARRIER_BYTES + slots * SLOT_BYTES + most


def plan_splits(layers: Sequence[DeepLayer], cluster: int, clusters: int) -> list[Split] | str:
    """The split of every layer, or why the kernel cannot run the group."""
    if not 0 < len(layers) <= MAX_LAYERS:
        return f"{len(layers)} layers (1 to {MAX_LAYERS} are supported)"
    shares: list[Split] = []
    read = [0] * clusters
    for layer in layers:
        if (reason := unsupported(layer)) is not None:
            return reason
        share = split(layer, cluster, clusters)
        if share is None:
            return (
                f"{layer.conv} over {clusters} clusters of {cluster}: more than {SHARED_LIMIT} bytes of shared memory"
            )
        shifted = [share._replace(shift=shift) for shift in range(clusters)]
        after = [[before + one.block_bytes(c) for c, before in enumerate(read)] for one in shifted]
        uneven = [sum(total**2 for total in totals) for totals in after]
        best = uneven.index(min(uneven))
        read = after[best]
        shares.append(shifted[best])
    return shares


def best_cluster(layers: Sequence[DeepLayer], held: Mapping[int, int]) -> tuple[int, int] | str:
    """(blocks per cluster, clusters) that minimise what a block reads, or why the kernel cannot run the group.

    Args:
        layers: of the group.
        held: blocks per cluster -> clusters that fit on the GPU at once.
    """
    found: list[tuple[int, int, int]] = []
    reason = "the GPU holds no cluster"
    for cluster, clusters in held.items():
        if clusters:
            shares = plan_splits(layers, cluster, clusters)
            if isinstance(shares, str):
                reason = shares
            else:
                cost = sum(max(map(share.block_bytes, range(clusters))) for share in shares)
                found.append((cost, -cluster, clusters))
    if not found:
        return reason
    _, cluster, clusters = min(found)
    return -cluster, clusters


# Clocks of an H100. A layer but its chunks: 6,500 measured, of eight layers in one launch (section "clocks" of
# bench/results/h100_deep.jsonl). Of these, reading the bias after the products took 1,000; a counter in memory, and
# the reading of positions after it, 2,100. A wait for the positions themselves is expected to take 1,100. A chunk:
# expected of the present loop; an earlier one took 700 to 800.
_LAYER_CLOCKS, _CHUNK_CLOCKS = 4500, 275


def cost(layers: Sequence[DeepLayer], shares: Sequence[Split], card: Card) -> Cost:
    """Estimated seconds of a launch by its parts. issue: of the block that reads most weights."""
    chunks = sum(share.chunks for share in shares)
    weights = sum(share.units * share.steps for share in shares) * PIECE_BYTES
    return Cost(
        start=LAUNCH_SECONDS,
        products=0.0,
        reads=0.0,
        issue=(len(layers) * _LAYER_CLOCKS + chunks * _CHUNK_CLOCKS) / H100_CLOCK,
        together=0.0,
        memory=weights / card.memory,
        splits=0.0,
        l2_bytes=float(weights),
    )


def reference(layer: DeepLayer, source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Reference result of a layer before its activation, in float32.

    Args:
        layer: the layer.
        source: [B, H, W, Cin].
        weight: :meth:`.conv.Conv.pack` of it.
        bias: [Cout] float32.

    Returns:
        [B, out_h, out_w, Cout] float32.
    """
    conv, axis = layer.conv, layer.conv.axis
    value = bias.repeat(layer.batch, *layer.out_size, 1)
    border, reflected = 2 * conv.kernel, conv.padding if conv.reflect else 0
    padded = F.pad(source.float().permute(0, 3, 1, 2), 4 * [reflected], mode="reflect")
    padded = F.pad(padded, 4 * [border - reflected]).permute(0, 2, 3, 1)
    begin = 0
    for phase_y, phase_x in itertools.product(range(axis.phases), repeat=2):
        out = value[:, phase_y :: axis.out_step, phase_x :: axis.out_step]
        for y, x in itertools.product(range(axis.taps[phase_y]), range(axis.taps[phase_x])):
            top, left = border + axis.origins[phase_y] + y, border + axis.origins[phase_x] + x
            rows = padded[:, top:, left:][:, :: axis.in_step, :: axis.in_step][:, : out.shape[1], : out.shape[2]]
            out += rows @ weight[begin : begin + conv.in_channels].float()
            begin += conv.in_channels
    return value
