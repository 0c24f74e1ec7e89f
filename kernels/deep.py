"""The deep layers of a U-Net in one launch: blocks that stay for all layers, reading weights without a pause.

Layers of 8x8 outputs and smaller are 4x4 convolutions of stride 2 and transposed ones with 2 to 17 MB of weights
and next to no arithmetic. Launched one by one they take 8 to 12 us each on an H100, where reading their weights takes
3 to 6: each launch begins with cold reads and ends with a sum over the splits of the depth. `csrc/cuda/deep.cu` runs
a group of consecutive layers in one launch: its blocks read ahead of the layer at hand, and meet between layers.

This module describes the group to the kernel: :func:`split` says which block has what of a layer, :func:`pack` puts
weights in the order in which blocks read them, :class:`DeepGroup` holds all that and launches. Compute capability 9.0
(clusters, bulk copies), float16 and bfloat16.

**Split.** A layer is, for each phase, a product of [channels, depth] and [depth, rows]; the depth goes in steps of 32
input channels of one tap. A cluster of blocks has one phase and `channels` output channels, its blocks `block_steps`
steps each, its eight warps ``warps_k`` x ``warps_c`` of them: in round i, warp (k, c) multiplies step
``i * warps_k + k`` of its block for the c-th part of the channels.

**Failure.** All blocks must be on the GPU at once (a cooperative launch sees to that). Every wait is bounded: one
that takes more than `timeout` clocks ends the launch with NaN in the last layer's stores and a code in the state,
which :meth:`DeepGroup.error` reads.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import Conv, Store
from .cuda_driver import Kernel
from .launch import ACTIVATIONS, is_recording

CAPABILITY = (9, 0)
CUBIN = Path(__file__).with_name("deep.cubin")

# As in deep.cu.
MAX_LAYERS = 12
SLOTS, SLOT_BYTES = 20, 8192
WARPS = 8
PASS = 16
STEP = 32
PAD = 4
BARRIER_BYTES = 512
STATE_STRIDE = 32
SHARED_LIMIT = 232448
"""Bytes of shared memory of a block: CUDA C++ Programming Guide, compute capability 9.0."""

CLUSTER = 8
"""Blocks of a cluster: the most that every GPU of the capability has."""
MAX_CLUSTERS = 16
"""Clusters of eight blocks on 132 multiprocessors, one block each."""
MEASURED_ROWS: dict[str, int] = {}
"""dtype kind -> most rows (outputs of a phase) of the layers that run this way; others run one by one."""
TIMEOUT = 4_000_000_000
"""Clocks, about two seconds."""
WAITS = {1: "for room for weights", 2: "for weights", 3: "for the cluster's sums", 4: "for the layer before"}


class _Layer(ctypes.Structure):
    """`Layer` of deep.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "source", "store0", "store1")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "units", "groups", "channels", "warps_k", "log_warps_c", "tiles",
                "rounds", "steps", "block_steps", "chunks", "chunks_inverse", "log_count_x",
                "rows", "log_rows_h", "log_rows_w", "passes", "log_quads", "log_share",
                "in_h", "in_w", "in_step", "out_h", "out_w", "out_step",
                "stride_x", "stride_0", "stride_1", "activation_0", "activation_1",
            )
        ),
        ("origin_y", ctypes.c_int32 * 2),
        ("origin_x", ctypes.c_int32 * 2),
    ]  # fmt: skip


class _Program(ctypes.Structure):
    """`Program` of deep.cu."""

    _fields_ = [
        ("state", ctypes.c_void_p),
        ("times", ctypes.c_void_p),
        ("timeout", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("layers", "cluster", "recv_offset", "evict_first")),
        ("layer", _Layer * MAX_LAYERS),
    ]


class Split(NamedTuple):
    """How a layer is shared out; see the head of this module."""

    units: int
    groups: int
    channels: int
    warps_k: int
    warps_c: int
    rounds: int
    steps: int
    block_steps: int

    @property
    def tiles(self) -> int:
        """Blocks of 16 channels that a warp multiplies."""
        return self.channels // 16 // self.warps_c

    @property
    def round_bytes(self) -> int:
        """Weights of a block and round."""
        return 2 * self.warps_k * self.channels * STEP

    @property
    def slots(self) -> int:
        """Parts of the ring that a round takes."""
        return -(-self.round_bytes // SLOT_BYTES)


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

    @property
    def passes(self) -> int:
        """Times 16 rows."""
        return -(-self.rows // PASS)

    def taps(self, phase: int) -> list[tuple[int, int]]:
        """First tap and number of taps used, along y and x, of a phase."""
        axis = self.conv.axis
        which = divmod(phase, axis.phases)
        sizes = zip(which, self.in_size, self.out_size)
        return [axis.used(one, in_size, out_size, False) for one, in_size, out_size in sizes]


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def unsupported(layer: DeepLayer) -> str | None:
    """Why the kernel cannot compute a layer, or None."""
    conv = layer.conv
    if conv.merges or conv.reflect or conv.flat or conv.axis.patch != 1 or conv.axis.phases > 2:
        return "a step that ends a stage, reflects, or has few channels"
    if conv.in_channels % STEP or conv.out_channels % 16:
        return f"{conv.in_channels} to {conv.out_channels} channels (multiples of {STEP} and 16 are supported)"
    if layer.rows > 4 * PASS or not all(_is_power(n) for n in (*layer.rows_size, layer.batch)):
        return (
            f"{layer.batch} x {layer.rows_size} outputs of a phase (powers of two, at most {4 * PASS} are supported)"
        )
    taps = [layer.taps(phase) for phase in range(conv.axis.phases**2)]
    counts = {(y[1], x[1]) for y, x in taps}
    if len(counts) > 1 or not _is_power(taps[0][1][1]):
        return f"taps {sorted(counts)} of its phases"
    chunks, steps = conv.in_channels // STEP, taps[0][0][1] * taps[0][1][1] * conv.in_channels // STEP
    if any(step * _inverse(chunks) >> 16 != step // chunks for step in range(steps)):
        return f"{steps} steps of the depth"
    return None


def _inverse(divisor: int) -> int:
    """n * _inverse(d) >> 16 == n // d for the small n that :func:`unsupported` has tried."""
    return -(-65536 // divisor)


def split(layer: DeepLayer, cluster: int, clusters: int) -> Split | None:
    """The share of each of `clusters` clusters of `cluster` blocks; None: there is none that the kernel supports."""
    conv = layer.conv
    phases = conv.axis.phases**2
    (_, count_y), (_, count_x) = layer.taps(0)
    steps = count_y * count_x * conv.in_channels // STEP
    block_steps = -(-steps // cluster)
    found: list[tuple[int, int, Split]] = []
    for channels in (16, 32, 64, 128):
        units = phases * conv.out_channels // channels
        if conv.out_channels % channels or units > clusters:
            continue
        for warps_c in (1, 2, 4):
            warps_k = WARPS // warps_c
            rounds = -(-block_steps // warps_k)
            one = Split(units, conv.out_channels // channels, channels, warps_k, warps_c, rounds, steps, block_steps)
            if channels % (16 * warps_c) or one.tiles not in (1, 2, 4) or one.rounds * one.slots > SLOTS:
                continue
            found.append((rounds * one.round_bytes, warps_c, one))
    # the fewest weights that nobody needs, then the fewest reads of one position
    return min(found)[2] if found else None


def pack(layer: DeepLayer, weight: Tensor, share: Split, cluster: int) -> Tensor:
    """Weights in the order in which blocks read them.

    Args:
        layer: whose they are.
        weight: :meth:`.conv.Conv.pack` of it.
        share: :func:`split`.
        cluster: blocks of a cluster.

    Returns:
        [unit, block, round, warps_k, warps_c, tile, 2, lane, 8], contiguous, as float16 or bfloat16 as `weight`.
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
        by_phase.append(used.reshape(share.steps, STEP, conv.out_channels))
        begin = end
    steps = weight.new_zeros(len(by_phase), cluster * share.block_steps, STEP, conv.out_channels)
    steps[:, : share.steps] = torch.stack(by_phase)
    blocks = weight.new_zeros(len(by_phase), cluster, share.rounds * share.warps_k, STEP, conv.out_channels)
    blocks[:, :, : share.block_steps] = steps.view(len(by_phase), cluster, share.block_steps, STEP, conv.out_channels)
    # depth of a step: lane % 4, product, upper or lower half of the product's depth, pair;
    # channel: group, part, tile, upper or lower half of the tile, lane // 4
    shape = (len(by_phase), cluster, share.rounds, share.warps_k, 4, 2, 2, 2)
    parts = blocks.view(*shape, share.groups, share.warps_c, share.tiles, 2, 8)
    # phase group | block round k | c tile product | lane // 4, lane % 4 | half of the depth, half of the tile, pair
    order = (0, 8, 1, 2, 3, 9, 10, 5, 12, 4, 6, 11, 7)
    packed = parts.permute(order).contiguous()
    return packed.view(share.units, cluster, share.rounds, share.warps_k, share.warps_c, share.tiles, 2, 32, 8)


def _log(number: int) -> int:
    return number.bit_length() - 1


def describe(layer: DeepLayer, share: Split, cluster: int) -> _Layer:
    """A layer as the kernel is told of it, but for addresses, strides and activations."""
    conv, axis = layer.conv, layer.conv.axis
    (_, count_x) = layer.taps(0)[1]
    last = axis.phases**2 - 1
    origins = [layer.taps(phase) for phase in (0, last)]
    pair = ctypes.c_int32 * 2
    quads = share.channels // 4
    return _Layer(
        units=share.units, groups=share.groups, channels=share.channels,
        warps_k=share.warps_k, log_warps_c=_log(share.warps_c), tiles=share.tiles,
        rounds=share.rounds, steps=share.steps, block_steps=share.block_steps,
        chunks=conv.in_channels // STEP, chunks_inverse=_inverse(conv.in_channels // STEP), log_count_x=_log(count_x),
        rows=layer.rows, log_rows_h=_log(layer.rows_size[0]), log_rows_w=_log(layer.rows_size[1]),
        passes=layer.passes, log_quads=_log(quads), log_share=_log(_finished(layer, share, cluster)),
        in_h=layer.in_size[0], in_w=layer.in_size[1], in_step=axis.in_step,
        out_h=layer.out_size[0], out_w=layer.out_size[1], out_step=axis.out_step,
        origin_y=pair(*(axis.origins[i] + o[0][0] for i, o in zip((0, axis.phases - 1), origins))),
        origin_x=pair(*(axis.origins[i] + o[1][0] for i, o in zip((0, axis.phases - 1), origins))),
    )  # fmt: skip


def _finished(layer: DeepLayer, share: Split, cluster: int) -> int:
    """Fours of channels that a block finishes in a pass."""
    return -(-min(layer.rows, PASS) * share.channels // 4 // cluster)


def shared_bytes(layers: Sequence[DeepLayer], shares: Sequence[Split], cluster: int) -> tuple[int, int]:
    """Dynamic shared memory of a block, and where in it the cluster's sums begin."""
    sums = max(4 * share.warps_k * PASS * (share.channels + PAD) for share in shares)
    begin = BARRIER_BYTES + SLOTS * SLOT_BYTES + sums
    received = max(16 * cluster * one.passes * _finished(one, share, cluster) for one, share in zip(layers, shares))
    return begin + received, begin


def plan_splits(layers: Sequence[DeepLayer], cluster: int, clusters: int) -> list[Split] | str:
    """Every layer's share, or why the kernel cannot run the group."""
    if not 0 < len(layers) <= MAX_LAYERS:
        return f"{len(layers)} layers (1 to {MAX_LAYERS} are supported)"
    shares = []
    for layer in layers:
        if (reason := unsupported(layer)) is not None:
            return reason
        share = split(layer, cluster, clusters)
        if share is None:
            return f"no split of {layer.conv} over {clusters} clusters of {cluster}"
        shares.append(share)
    needed, _ = shared_bytes(layers, shares, cluster)
    if needed > SHARED_LIMIT:
        return f"{needed} bytes of shared memory (there are {SHARED_LIMIT})"
    return shares


def unavailable(device: torch.device, dtype: torch.dtype, cluster: int = CLUSTER) -> str | None:
    """Why the kernel cannot run on a GPU in `dtype`, or None. Loads it there."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.float16, torch.bfloat16):
        return "needs an NVIDIA GPU, float16 or bfloat16"
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return "needs compute capability 9.0"
    if not CUBIN.is_file():
        return f"{CUBIN.name} was not built (make cubin)"
    try:
        with torch.cuda.device(device):
            _kernel(dtype, SHARED_LIMIT, cluster).load()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def clusters_on(device: torch.device, dtype: torch.dtype, cluster: int = CLUSTER) -> int:
    """Clusters that a GPU holds at a time, at most what MAX_CLUSTERS of eight blocks are."""
    with torch.cuda.device(device):
        found = _kernel(dtype, SHARED_LIMIT, cluster).active_clusters()
    return min(found, MAX_CLUSTERS * CLUSTER // cluster)


def _kernel(dtype: torch.dtype, shared: int, cluster: int, cooperative: bool = True, overlap: bool = False) -> Kernel:
    name = f"lgnet_deep_{str(dtype).removeprefix('torch.')}"
    return Kernel(
        CUBIN,
        name,
        threads=32 * (WARPS + 1),
        shared_bytes=shared,
        cluster=cluster,
        cooperative=cooperative,
        overlap=overlap,
    )


class DeepGroup:
    """Consecutive layers with their packed weights, on one GPU.

    Args:
        layers: in order.
        shares: of each, :func:`plan_splits`.
        weights: of each, :func:`pack`, float16 or bfloat16 on the GPU.
        biases: of each, [Cout] float32.
        cluster: blocks of a cluster.
        cooperative, evict_first, overlap, timeout: variants of the launch, for measurements.
    """

    def __init__(
        self,
        layers: Sequence[DeepLayer],
        shares: Sequence[Split],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        cluster: int = CLUSTER,
        cooperative: bool = True,
        evict_first: bool = True,
        overlap: bool = False,
        timeout: int = TIMEOUT,
    ) -> None:
        self.layers, self.shares, self.cluster = tuple(layers), tuple(shares), cluster
        self.weights, self.biases = tuple(weights), tuple(biases)
        self.grid = cluster * max(share.units for share in shares)
        self.bytes, self._recv_offset = shared_bytes(layers, shares, cluster)
        self.dtype = self.weights[0].dtype
        self._evict_first, self._timeout = evict_first, timeout
        self._kernel = _kernel(self.dtype, self.bytes, cluster, cooperative, overlap)

    def new_state(self) -> Tensor:
        """int32 zeros that the launches of one program share and leave as zeros."""
        return torch.zeros((2 + len(self.layers)) * STATE_STRIDE, dtype=torch.int32, device=self.weights[0].device)

    def new_times(self) -> Tensor:
        """Where a launch may note clocks: [layers, blocks, 6]: begin, layer before ends, products, sums sent, sums
        received, stored."""
        size = (len(self.layers), self.grid, 6)
        return torch.zeros(size, dtype=torch.int64, device=self.weights[0].device)

    def program(
        self,
        sources: Sequence[Tensor],
        stores: Sequence[Sequence[Store]],
        state: Tensor,
        times: Tensor | None = None,
        only: int | None = None,
    ) -> _Program:
        """What the kernel is given: every layer's [B, H, W, C] views, on memory that outlives the program.

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
            state=state.data_ptr(), times=None if times is None else times.data_ptr(), timeout=self._timeout,
            layers=len(numbers), cluster=self.cluster, recv_offset=self._recv_offset, evict_first=self._evict_first,
        )  # fmt: skip
        for place, number in enumerate(numbers):
            layer = self.layers[number]
            told = describe(layer, self.shares[number], self.cluster)
            source = sources[number]
            _check_view("sources", source, self.dtype, (layer.batch, *layer.in_size, layer.conv.in_channels))
            told.weights, told.bias = self.weights[number].data_ptr(), self.biases[number].data_ptr()
            told.source, told.stride_x = source.data_ptr(), source.stride(2)
            if not 1 <= len(stores[number]) <= 2:
                raise ValueError(f"stores: expected one or two, got {len(stores[number])}")
            for index, store in enumerate(stores[number]):
                size = (layer.batch, *layer.out_size, layer.conv.out_channels)
                _check_view("stores", store.view, self.dtype, size)
                setattr(told, f"store{index}", store.view.data_ptr())
                setattr(told, f"stride_{index}", store.view.stride(2))
                setattr(told, f"activation_{index}", ACTIVATIONS[store.activation])
            program.layer[place] = told
        return program

    def launch(self, program: _Program) -> None:
        """Run the program on the current stream of its GPU."""
        if is_recording():  # nothing to compile
            return
        with torch.cuda.device(self.weights[0].device):
            self._kernel(self.grid, program)

    @staticmethod
    def error(state: Tensor) -> str | None:
        """What a launch waited for in vain, or None; waits for the device. Until the state is zeroed all fail."""
        code = int(state[0])
        if code == 0:
            return None
        kind, layer, block = code >> 24, code >> 16 & 0xFF, (code & 0xFFFF) - 1
        return f"block {block} waited {WAITS.get(kind, kind)}, at layer {layer}"


def reference(layer: DeepLayer, source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a layer computes before its activation, in float32.

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
    border = 2 * conv.kernel
    padded = F.pad(source.float(), (0, 0, border, border, border, border))
    begin = 0
    for phase_y, phase_x in itertools.product(range(axis.phases), repeat=2):
        out = value[:, phase_y :: axis.out_step, phase_x :: axis.out_step]
        for y, x in itertools.product(range(axis.taps[phase_y]), range(axis.taps[phase_x])):
            top, left = border + axis.origins[phase_y] + y, border + axis.origins[phase_x] + x
            rows = padded[:, top:, left:][:, :: axis.in_step, :: axis.in_step][:, : out.shape[1], : out.shape[2]]
            out += rows @ weight[begin : begin + conv.in_channels].float()
            begin += conv.in_channels
    return value


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
