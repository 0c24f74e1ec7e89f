"""The deep layers of a U-Net in one launch: a persistent kernel that streams the weights of all layers.

Layers of 8x8 outputs and smaller are 4x4 convolutions of stride 2 and transposed ones, with 2 to 17 MB of weights
and little arithmetic. Launched one by one they take 8 to 12 us each on an H100, although reading their weights takes
3 to 6 us: each launch begins with cold reads and ends with a sum over the splits of the depth. `csrc/cuda/deep.cu`
runs a group of consecutive layers in one launch: its thread blocks prefetch the weights of later layers, and wait for
what other blocks store.

This module describes the group to the kernel: :func:`split` assigns parts of a layer to thread blocks, :func:`pack`
puts weights in the order in which blocks read them, :class:`DeepGroup` holds both and launches. It needs compute
capability 9.0 (clusters, bulk copies), and float16 or bfloat16.

**Split.** A layer is, for each phase, a product of [channels, depth] and [depth, rows]. A unit is 16 output channels
of a phase; a step is 32 input channels of one tap. Clusters of thread blocks get equal numbers of units, some one
more; which ones changes from layer to layer, so that all clusters read about the same over all layers. Each block of
a cluster takes `block_steps` steps of the depth, and copies the positions that they need to shared memory. Its eight
warps take items, (unit, every ``warps_k``-th step of the block), eight at a time.

**Exchange.** What a layer reads and layers of the same launch have stored comes from :attr:`State.exchange`, where a
number that is not there yet is a NaN that the kernel never stores: blocks wait for the numbers themselves. Each layer
but the first reads what the layer before it stores, and its source is stored wholly within the launch. So when a
block stores results of a layer, all blocks have read the source of the layer before: a map that the arena puts in the
place of an older one does not overwrite what is still read.

**Failure.** All blocks must fit on the GPU at once; a cooperative launch guarantees it. Every wait is bounded: one
that takes more than `timeout` clocks ends the launch with NaN in the last layer's stores and a code in the state,
which :meth:`State.error` reads.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lgnet_fast.ops.torch_state import pass_on_out_of_memory

from .cards import H100_CLOCK, SHARED_LIMITS, Card
from .compiled_checks import set_stores
from .conv import Conv
from .conv_configs import LAUNCH_SECONDS, Cost
from .cuda_driver import Kernel
from .launch import is_recording
from .results import Store

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
STATE_STRIDE = 32
ABSENT = -1  # as int16
SHARED_LIMIT = SHARED_LIMITS["sm_90"]
"""Bytes of shared memory of a thread block."""

CLUSTERS = (8, 4, 2)
"""Thread blocks per cluster to try; eight is the most that every GPU of this capability supports."""
MIN_SLOTS = 11
"""Fewest slots of the ring buffer. At 25 bytes per ns they last 3.6 us, longer than the waits between layers."""
MAX_ROWS = 64
TIMEOUT = 20_000_000_000
"""Clocks after which a wait times out: about ten seconds, long enough for a GPU shared by several processes."""
WAITS = {
    1: "for room for weights",
    2: "for weights",
    3: "for the cluster's sums",
    4: "for the layer before",
    5: "for its cluster",
}


class _Layer(ctypes.Structure):
    """`Layer` of deep.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "source", "store0", "store1")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "base", "extra", "shift", "groups",
                "log_warps_k", "step_rounds", "steps", "block_steps", "log_taps", "log_count_x",
                "rows", "log_rows", "log_rows_h", "log_rows_w",
                "log_pixels", "log_in_h", "log_in_w", "log_in_step", "out_h", "out_w", "out_step",
                "stage_w", "stage_h", "stage_half", "stage_pixels", "stage_bytes", "border_y", "border_x",
                "sums", "received",
                "stride_x", "stride_0", "stride_1", "activation_0", "activation_1",
                "exchange_x", "exchange_0", "exchange_1", "pitch_0", "pitch_1",
            )
        ),
        ("origin_y", ctypes.c_int32 * 2),
        ("origin_x", ctypes.c_int32 * 2),
    ]  # fmt: skip


class _Program(ctypes.Structure):
    """`Program` of deep.cu."""

    _fields_ = [
        ("state", ctypes.c_void_p),
        ("exchange", ctypes.c_void_p),
        ("times", ctypes.c_void_p),
        ("timeout", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in ("layers", "log_cluster", "clusters", "slots", "evict_first", "exchange_size")
        ),
        ("layer", _Layer * MAX_LAYERS),
    ]


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


def _layer_bytes(layer: DeepLayer, share: Split) -> tuple[int, int, int]:
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
        if BARRIER_BYTES + MIN_SLOTS * SLOT_BYTES + sum(_layer_bytes(layer, one)) <= SHARED_LIMIT:
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


def _log(number: int) -> int:
    return number.bit_length() - 1


def describe(layer: DeepLayer, share: Split) -> _Layer:
    """The kernel's description of a layer, without addresses, strides and activations."""
    axis = layer.conv.axis
    (_, count_y), (_, count_x) = layer.taps(0)
    (border_y, border_x), (height, width) = layer.stage
    origins_y, origins_x = layer.origins
    stage, sums, _ = _layer_bytes(layer, share)
    base, extra = divmod(share.units, share.clusters)
    pair = ctypes.c_int32 * 2
    return _Layer(
        base=base, extra=extra, shift=share.shift, groups=share.groups,
        log_warps_k=_log(share.warps_k), step_rounds=share.step_rounds, steps=share.steps,
        block_steps=share.block_steps, log_taps=_log(count_y * count_x), log_count_x=_log(count_x),
        rows=layer.rows, log_rows=_log(layer.rows),
        log_rows_h=_log(layer.rows_size[0]), log_rows_w=_log(layer.rows_size[1]),
        log_pixels=_log(layer.batch * layer.in_size[0] * layer.in_size[1]),
        log_in_h=_log(layer.in_size[0]), log_in_w=_log(layer.in_size[1]), log_in_step=_log(axis.in_step),
        out_h=layer.out_size[0], out_w=layer.out_size[1], out_step=axis.out_step,
        stage_w=width, stage_h=height, stage_half=width // axis.in_step,
        stage_pixels=layer.batch * height * width, stage_bytes=stage, border_y=border_y, border_x=border_x,
        sums=stage, received=stage + sums,
        origin_y=pair(*(border_y + origin for origin in origins_y)),
        origin_x=pair(*(border_x + origin for origin in origins_x)),
    )  # fmt: skip


def _slots(layers: Sequence[DeepLayer], shares: Sequence[Split]) -> tuple[int, int]:
    """Parts of the ring buffer, and bytes of dynamic shared memory of a block."""
    most = max(sum(_layer_bytes(layer, share)) for layer, share in zip(layers, shares))
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


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run on a GPU in `dtype`, or None. Loads the kernel on that GPU."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.float16, torch.bfloat16):
        return "needs an NVIDIA GPU, float16 or bfloat16"
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return "needs compute capability 9.0"
    try:
        with torch.cuda.device(device):
            _kernel(dtype, SHARED_LIMIT, 1).load()
    except (OSError, RuntimeError) as error:
        pass_on_out_of_memory(error)
        return str(error)
    return None


def held_clusters(device: torch.device, dtype: torch.dtype) -> dict[int, int]:
    """Blocks per cluster -> clusters that fit on a GPU at once."""
    with torch.cuda.device(device):
        return {cluster: _kernel(dtype, SHARED_LIMIT, cluster).active_clusters() for cluster in CLUSTERS}


def _kernel(dtype: torch.dtype, shared: int, cluster: int, cooperative: bool = True, overlap: bool = False) -> Kernel:
    return Kernel(
        "deep",
        f"lgnet_deep_{str(dtype).removeprefix('torch.')}",
        threads=32 * (WARPS + 1),
        shared_bytes=shared,
        cluster=cluster,
        cooperative=cooperative,
        overlap=overlap,
    )


class State:
    """What launches of a group leave to the next one.

    Args:
        size: numbers of 16 bits in an exchange.
        device: of the group.
    """

    counters: Tensor
    """[3 * STATE_STRIDE] int32: the code of an error, the blocks that have ended, which exchange is next."""
    exchange: Tensor
    """[2, size] int16. One is :data:`ABSENT` throughout between launches."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.counters = torch.zeros(3 * STATE_STRIDE, dtype=torch.int32, device=device)
        self.exchange = torch.full((2, size), ABSENT, dtype=torch.int16, device=device)

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return self.counters.nbytes + self.exchange.nbytes

    def reset(self) -> None:
        """As at first, after a launch that failed."""
        self.counters.zero_()
        self.exchange.fill_(ABSENT)

    def error(self) -> str | None:
        """The wait that timed out, or None. Waits for the device. All launches with this state fail until it is
        :meth:`reset`."""
        code = int(self.counters[0])
        if code == 0:
            return None
        kind, layer, block = code >> 24, code >> 16 & 0xFF, (code & 0xFFFF) - 1
        return f"block {block} waited {WAITS.get(kind, kind)}, at layer {layer}"


class DeepGroup:
    """Consecutive layers with their packed weights, on one GPU.

    Args:
        layers: in order.
        shares: the split of each layer, see :func:`plan_splits`.
        weights: of each layer, see :func:`pack`, float16 or bfloat16 on the GPU.
        biases: of each layer, [Cout] float32.
        cooperative, evict_first, overlap, timeout: variants of the launch, for measurements.
    """

    def __init__(
        self,
        layers: Sequence[DeepLayer],
        shares: Sequence[Split],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        cooperative: bool = True,
        evict_first: bool = True,
        overlap: bool = False,
        timeout: int = TIMEOUT,
    ) -> None:
        self.layers, self.shares = tuple(layers), tuple(shares)
        self.weights, self.biases = tuple(weights), tuple(biases)
        self.cluster, self.clusters = shares[0].cluster, shares[0].clusters
        self.grid = self.cluster * self.clusters
        self.slots, self.bytes = _slots(layers, shares)
        self.dtype = self.weights[0].dtype
        self._evict_first, self._timeout = evict_first, timeout
        self._kernel = _kernel(self.dtype, self.bytes, self.cluster, cooperative, overlap)

        # Where each layer's source begins in the exchange, of which the first layer needs none.
        ends = itertools.accumulate(
            layer.batch * math.prod(layer.in_size) * layer.conv.in_channels for layer in layers[1:]
        )
        self._begins = [-1, 0, *ends]

    def new_state(self) -> State:
        """What the launches of one program share, and programs that never run at the same time."""
        return State(self._begins[-1], self.weights[0].device)

    def new_times(self) -> Tensor:
        """A buffer for the clocks of a launch, [layers, blocks, 6]: begin, positions in shared memory, products, sums
        sent, sums received, results stored. Blocks without work in a layer store the first and the last."""
        size = (len(self.layers), self.grid, 6)
        return torch.zeros(size, dtype=torch.int64, device=self.weights[0].device)

    def program(
        self,
        sources: Sequence[Tensor],
        stores: Sequence[Sequence[Store]],
        state: State,
        times: Tensor | None = None,
        only: int | None = None,
    ) -> _Program:
        """Arguments of the kernel for given feature maps [B, H, W, C], which must outlive the program.

        Args:
            sources, stores: of each layer.
            state: :meth:`new_state`.
            times: :meth:`new_times`.
            only: run this layer alone.

        Raises:
            ValueError: a view is not what the kernel needs.
        """
        numbers = range(len(self.layers)) if only is None else [only]
        program = _Program(
            state=state.counters.data_ptr(), exchange=state.exchange.data_ptr(),
            times=None if times is None else times.data_ptr(), timeout=self._timeout,
            layers=len(numbers), log_cluster=_log(self.cluster), clusters=self.clusters, slots=self.slots,
            evict_first=self._evict_first, exchange_size=state.exchange.shape[1],
        )  # fmt: skip
        for place, number in enumerate(numbers):
            layer = self.layers[number]
            told = describe(layer, self.shares[number])
            source = sources[number]
            _check_view("sources", source, self.dtype, (layer.batch, *layer.in_size, layer.conv.in_channels))
            told.weights, told.bias = self.weights[number].data_ptr(), self.biases[number].data_ptr()
            told.source, told.stride_x = source.data_ptr(), source.stride(2)
            if not 1 <= len(stores[number]) <= 2:
                raise ValueError(f"stores: expected one or two, got {len(stores[number])}")
            for store in stores[number]:
                size = (layer.batch, *layer.out_size, layer.conv.out_channels)
                _check_view("stores", store.view, self.dtype, size)
            set_stores(told, stores[number])
            told.exchange_x = told.exchange_0 = told.exchange_1 = -1
            program.layer[place] = told
        self._join(program, [sources[number] for number in numbers], [stores[number] for number in numbers])
        return program

    def _join(self, program: _Program, sources: Sequence[Tensor], stores: Sequence[Sequence[Store]]) -> None:
        """Let the layers of a program read through the exchange what others of it store."""
        for reader, source in enumerate(sources[1:], 1):
            found = _writers(source, stores[:reader])
            if reader - 1 not in (writer for writer, _, _ in found):
                raise ValueError("sources: expected each layer to read what the layer before it stores")
            for writer, which, offset in found:
                told = program.layer[writer]
                if getattr(told, f"exchange_{which}") >= 0:
                    raise ValueError("stores: expected each to be read by one layer")
                setattr(told, f"exchange_{which}", self._begins[reader] + offset)
                setattr(told, f"pitch_{which}", source.shape[3])
            program.layer[reader].exchange_x = self._begins[reader]
            program.layer[reader].stride_x = source.shape[3]
        for number, own in enumerate(stores):
            for which, store in enumerate(own):
                later = [one.view for after in stores[number + 1 :] for one in after]
                # What a later layer overwrites nobody reads after the launch, and stores of two layers have no order.
                if any(_overlap(store.view, view) for view in later):
                    setattr(program.layer[number], f"store{which}", None)

    def launch(self, program: _Program) -> None:
        """Run the program on the current stream of its GPU."""
        if is_recording():  # nothing to compile
            return
        with torch.cuda.device(self.weights[0].device):
            self._kernel.launch(self.grid, [ctypes.c_void_p(ctypes.addressof(program))])


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


def _bytes_of(view: Tensor) -> range:
    """Addresses from a view's first number to its last."""
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride()))
    return range(view.data_ptr(), view.data_ptr() + (last + 1) * view.element_size())


def _channels_of(view: Tensor, source: Tensor) -> range | None:
    """The channels of `source` that a view of the same pixels is, some of which it may lack; None: other pixels."""
    first, rest = divmod(view.data_ptr() - source.data_ptr(), view.element_size())
    if rest or abs(first) >= source.stride(2) or view.shape[:3] != source.shape[:3]:
        return None
    return range(first, first + view.shape[3]) if view.stride() == source.stride() else None


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two views have numbers in common. Those of the same pixels may lie side by side in each pixel."""
    a, b = _bytes_of(one), _bytes_of(other)
    if a.stop <= b.start or b.stop <= a.start:
        return False
    if _channels_of(one, other) is None:
        return True
    pixel = one.stride(2)
    first = (one.data_ptr() - other.data_ptr()) // one.element_size() % pixel
    return first < other.shape[3] or first + one.shape[3] > pixel


def _writers(source: Tensor, stores: Sequence[Sequence[Store]]) -> list[tuple[int, int, int]]:
    """(layer, number of its store, first channel) of the last stores of each of a source's channels; none where it is
    older than all of them.

    Raises:
        ValueError: some of its channels are older, or a store has others than these.
    """
    found: list[tuple[int, int, int]] = []
    missing = set(range(source.shape[3]))
    for layer in reversed(range(len(stores))):
        for which, store in enumerate(stores[layer]):
            channels = _channels_of(store.view, source)
            if missing and _overlap(store.view, source):
                if channels is None or not missing.issuperset(channels):
                    raise ValueError("sources: expected each channel from one store of the layers before")
                missing.difference_update(channels)
                found.append((layer, which, channels.start))
    if found and missing:
        raise ValueError("sources: expected all channels, or none, from the layers before")
    return found


def _check_view(name: str, view: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if view.dtype != dtype or tuple(view.shape) != shape or view.stride(3) != 1:
        raise ValueError(
            f"{name}: expected {shape} of {dtype}, channels adjacent, got {tuple(view.shape)} {view.dtype}"
        )
    if view.data_ptr() % 16 or view.stride(2) % 8:
        raise ValueError(f"{name}: expected pixels at multiples of 16 bytes, got strides {view.stride()}")
    steps = (view.shape[1] * view.shape[2] * view.stride(2), view.shape[2] * view.stride(2))
    if any(size > 1 and stride != step for size, stride, step in zip(shape, view.stride(), steps)):
        raise ValueError(f"{name}: expected evenly spaced pixels, got strides {view.stride()} of {shape}")
