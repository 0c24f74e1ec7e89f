"""The deep layers of a U-Net in one launch: a persistent kernel that streams the weights of all layers.

Layers of 8x8 outputs and smaller are 4x4 convolutions of stride 2 and transposed ones, with 2 to 17 MB of weights
and little arithmetic. Launched one by one they take 8 to 12 us each on an H100, although reading their weights takes
3 to 6 us: each launch begins with cold reads and ends with a sum over the splits of the depth. `csrc/cuda/deep.cu`
runs a group of consecutive layers in one launch: its thread blocks prefetch the weights of later layers, and wait for
what other blocks store.

This module describes the group to the kernel, and launches it (:class:`DeepGroup`). :mod:`.deep_shapes` assigns parts
of the layers to thread blocks and puts weights in the order in which blocks read them; :mod:`.deep_exchange` has what
passes from layer to layer. The kernel needs compute capability 9.0 (clusters, bulk copies), and float16 or bfloat16.

**Failure.** All blocks must fit on the GPU at once; a cooperative launch guarantees it. Every wait is bounded: one
that takes more than `timeout` clocks ends the launch with NaN in the last layer's stores and a code in the state,
which :meth:`.deep_exchange.State.error` reads.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lgnet_fast.ops.torch_state import pass_on_out_of_memory

from .compiled_checks import set_stores
from .cuda_driver import Kernel
from .deep_exchange import State, overlap, writers
from .deep_shapes import (
    CAPABILITY,
    CLUSTERS,
    MAX_LAYERS,
    SHARED_LIMIT,
    WARPS,
    DeepLayer,
    Split,
    layer_bytes,
    slots_of,
)
from .launch import is_recording
from .results import Store

TIMEOUT = 20_000_000_000
"""Clocks after which a wait times out: about ten seconds, long enough for a GPU shared by several processes."""


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


def _log(number: int) -> int:
    return number.bit_length() - 1


def describe(layer: DeepLayer, share: Split) -> _Layer:
    """The kernel's description of a layer, without addresses, strides and activations."""
    axis = layer.conv.axis
    (_, count_y), (_, count_x) = layer.taps(0)
    (border_y, border_x), (height, width) = layer.stage
    origins_y, origins_x = layer.origins
    stage, sums, _ = layer_bytes(layer, share)
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


class DeepGroup:
    """Consecutive layers with their packed weights, on one GPU.

    Args:
        layers: in order.
        shares: the split of each layer, see :func:`.deep_shapes.plan_splits`.
        weights: of each layer, see :func:`.deep_shapes.pack`, float16 or bfloat16 on the GPU.
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
        self.slots, self.bytes = slots_of(layers, shares)
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
            found = writers(source, stores[:reader])
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
                if any(overlap(store.view, view) for view in later):
                    setattr(program.layer[number], f"store{which}", None)

    def launch(self, program: _Program) -> None:
        """Run the program on the current stream of its GPU."""
        if is_recording():  # nothing to compile
            return
        with torch.cuda.device(self.weights[0].device):
            self._kernel.launch(self.grid, [ctypes.c_void_p(ctypes.addressof(program))])


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
