"""Consecutive convolutions of the same shape in one launch on Hopper, by `csrc/cuda/hopper_chain.cu`.

NetL's eight block convolutions are such a chain. The kernel is that of :mod:`.hopper`, but its blocks stay for all
layers and wait for each other between two of them. So every block must run at the same time, and one launch takes the
place of several. The launch is cooperative: CUDA starts it when all its blocks fit, so that two of them on different
streams do not wait for each other for ever (`bench/hopper_contact.py` tries that). A wait of seconds ends in an
error.

The first use on a GPU compares it with PyTorch in float64 (:func:`reason_against`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import hopper_shapes
from .cards import H100_CLOCK, Card
from .compiled_checks import LIMIT, FirstUse, exact_convolution
from .conv import Conv
from .conv_configs import LAUNCH_SECONDS, Cost
from .cuda_driver import Kernel
from .hopper import (
    CLOCKS,
    Launch,
    Output,
    check_clocks,
    check_operands,
    launch_of,
    output_of,
    source_maps,
    weights_map,
)
from .hopper_shapes import (
    CAPABILITY,
    FILL_SECONDS,
    GROUP_THREADS,
    OTHER_THREADS,
    PIXEL_SECONDS,
    ROW_BYTES,
    TILE_W,
    HopperTile,
    Product,
    Shape,
    at_once,
    ranked,
)
from .launch import device_guard, is_recording
from .results import Store

MAX_LAYERS = 8
COUNTER_STRIDE = 32
"""Integers from one counter to the next: each has its own line of the L2 cache."""
TILES = tuple(HopperTile(tile_h, cluster) for tile_h, cluster in itertools.product((16, 8, 4), (2, 1)))
_TAPS = 3

Rect = tuple[int, int, int, int]
"""(top, bottom, left, right)."""


class ChainLayer(NamedTuple):
    """Operands of one convolution, as :func:`.hopper.hopper_forward` takes them."""

    source: Tensor
    weight: Tensor
    bias: Tensor
    stores: tuple[Store, ...]
    rect: Rect
    residual: Tensor | None = None


def union(rects: Sequence[Rect]) -> Rect:
    """The smallest rectangle that contains all of them."""
    tops, bottoms, lefts, rights = zip(*rects)
    return min(tops), max(bottoms), min(lefts), max(rights)


def describe_chain(conv: Conv, batch: int, size: tuple[int, int], rects: Sequence[Rect], tile: HopperTile) -> Launch:
    """The launch of layers that store `rects` of maps of `size`. Its tiles cover all of them.

    Raises:
        ValueError: the kernel cannot compute these layers in such tiles.
    """
    return launch_of(_shape(conv, batch, size, tuple(rects), tile), size, size)


def _shape(conv: Conv, batch: int, size: tuple[int, int], rects: tuple[Rect, ...], tile: HopperTile) -> Shape:
    if not 2 <= len(rects) <= MAX_LAYERS:
        raise ValueError(f"layers: expected 2 to {MAX_LAYERS}, got {len(rects)}")
    if conv.transposed or conv.stride != 1 or conv.in_channels != conv.out_channels:
        raise ValueError(f"conv: expected stride 1 and as many channels out as in, got {conv}")
    if tile not in TILES:
        raise ValueError(f"tile: expected one of {TILES}, got {tile}")
    shape = Shape.of(Product.of(conv, batch, size, size, union(rects)), tile)
    if (shape.product.along_y.taps[0], shape.product.along_x.taps[0]) != (_TAPS, _TAPS):
        raise ValueError(f"conv: expected {_TAPS}x{_TAPS} taps, got {conv} of a map of {size}")
    sums = TILE_W * tile.tile_h * ROW_BYTES  # they replace the patches
    return shape._replace(patch_stages=max(shape.patch_stages, -(-sums // shape.patch_bytes)))


# Between two layers, assumed: 1,000 clocks in which all blocks wait for each other, as measured between deep layers
# (bench/results/h100_deep.jsonl, "layer before ends"), and as many until the first patch has come.
_BETWEEN_SECONDS = 2000 / H100_CLOCK


def chain_cost(shape: Shape, layers: int, card: Card) -> Cost:
    """Estimated seconds of a launch by its parts."""
    one = hopper_shapes.cost(shape, card)
    stored = TILE_W * shape.tile.tile_h * PIXEL_SECONDS
    return Cost(
        start=LAUNCH_SECONDS + FILL_SECONDS + (layers - 1) * _BETWEEN_SECONDS + layers * stored,
        products=layers * one.products,
        reads=layers * one.reads,
        issue=layers * one.issue,
        together=layers * one.together,
        memory=layers * one.memory,
        splits=0.0,
        l2_bytes=layers * one.l2_bytes,
    )


@functools.lru_cache(maxsize=1024)
def ranked_chains(
    conv: Conv, batch: int, size: tuple[int, int], rects: tuple[Rect, ...], card: Card
) -> tuple[tuple[HopperTile, Cost], ...]:
    """The tiles whose blocks run at the same time, and that take less time by estimate than a launch for each layer;
    the one of least time first, each with its cost."""
    alone = [ranked(conv, batch, size, size, rect, card) for rect in rects]
    limit = sum(best[0][1].seconds for best in alone) if all(alone) else 0.0
    found = []
    for tile in TILES:
        with contextlib.suppress(ValueError):
            shape = _shape(conv, batch, size, rects, tile)
            cost = chain_cost(shape, len(rects), card)
            if shape.grid <= at_once(shape, card) and cost.seconds < limit:
                found.append((tile, cost))
    return tuple(sorted(found, key=lambda one: (one[1].seconds, one[0])))


def _layer_type(tensor_map: type) -> type[ctypes.Structure]:
    """`ChainLayer` of csrc/cuda/hopper_chain.cu."""

    class Layer(ctypes.Structure):
        _fields_ = [
            ("source", tensor_map),
            ("weights", tensor_map),
            ("output", Output),
            ("unused", ctypes.c_int32 * 14),
        ]

    return Layer


def _chain_type(layer: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """`Chain` of csrc/cuda/hopper_chain.cu."""

    class Chain(ctypes.Structure):
        _fields_ = [
            ("layer", layer * MAX_LAYERS),
            ("counters", ctypes.c_void_p),
            ("layers", ctypes.c_int32),
            ("unused", ctypes.c_int32 * 13),
        ]

    return Chain


def new_counters(device: torch.device) -> Tensor:
    """int32 zeros for the launches of a chain, each of which leaves them zero."""
    return torch.zeros(MAX_LAYERS * COUNTER_STRIDE, dtype=torch.int32, device=device)


class Chain:
    """A launch of consecutive convolutions. The operands must outlive it.

    Launches that may run at the same time must not share one: its counters belong to one launch.

    Args:
        conv: that of every layer.
        layers: in order. A residual is older than the launch, or an earlier layer of it stored it.
        tile: one of :data:`TILES`.
        clocks: [layers, thread blocks, 8] int64, which gets each block's :data:`.hopper.CLOCKS`; float16 and tiles of
            16 rows only.

    Raises:
        ValueError: an argument is not what the kernel needs.
    """

    def __init__(
        self, conv: Conv, layers: Sequence[ChainLayer], tile: HopperTile, clocks: Tensor | None = None
    ) -> None:
        batch, height, width, _ = layers[0].source.shape
        self.description = describe_chain(conv, batch, (height, width), [layer.rect for layer in layers], tile)
        self._layers = tuple(layers)  # whose memory the launch reads and writes
        self._source = layers[0].source
        self.dtype = self._source.dtype
        for number, layer in enumerate(layers):
            if number > 0:
                _check_alike(self._source, layer)
            check_operands(conv, layer.source, layer.weight, layer.bias, layer.stores, layer.residual)
        _check_alike(self._source, layers[0])
        if clocks is not None:
            check_clocks(clocks, (len(layers), self.description.grid, len(CLOCKS)), self.dtype, tile)
            self.description.args.clocks = clocks.data_ptr()
        with device_guard(self._source):
            self._counters = new_counters(self._source.device)
            self._chain = self._structure()
        name = f"lgnet_chain_{str(self.dtype).removeprefix('torch.')}_{tile.tile_h}"
        self._kernel = _kernel(name if clocks is None else f"{name}_timed", self.description)

    def _structure(self) -> ctypes.Structure:
        made = []
        for layer in self._layers:
            (source,) = source_maps(layer.source, 1, self.description.box)
            weights = weights_map(layer.weight, self.description.args)
            made.append((source, weights, output_of(layer.rect, layer.bias, layer.stores, layer.residual)))
        layer_type = _layer_type(type(made[0][0]))
        return _chain_type(layer_type)(
            counters=self._counters.data_ptr(), layers=len(made), layer=tuple(layer_type(*one) for one in made)
        )

    def fits(self) -> bool:
        """Whether all its blocks run on the GPU at the same time."""
        with device_guard(self._source):
            return self.description.grid <= self._kernel.blocks_at_once()

    def launch(self) -> None:
        """Run it on the current stream of its GPU.

        Raises:
            RuntimeError: the driver rejects the kernel.
        """
        if is_recording() or self.description.grid == 0:  # nothing to compile, or to compute
            return
        parameters = (self._chain, self.description.args)
        with device_guard(self._source):
            self._kernel.launch(self.description.grid, [ctypes.c_void_p(ctypes.addressof(one)) for one in parameters])


def _check_alike(first: Tensor, layer: ChainLayer) -> None:
    """Raises ValueError where a layer's maps are not like the first layer's source, but for their strides."""
    residual = () if layer.residual is None else (("residual", layer.residual),)
    for name, view in (("source", layer.source), *residual, *(("stores", store.view) for store in layer.stores)):
        if view.shape != first.shape or view.dtype != first.dtype:
            raise ValueError(
                f"{name}: expected {tuple(first.shape)} {first.dtype} as the first layer's source, "
                f"got {tuple(view.shape)} {view.dtype}"
            )


def _kernel(name: str, launch: Launch) -> Kernel:
    return Kernel(
        "hopper_chain",
        name,
        threads=GROUP_THREADS + OTHER_THREADS,
        shared_bytes=launch.shared_bytes,
        cluster=launch.cluster,
        cooperative=True,
    )


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is not used on a GPU in `dtype`, or None. The first call per GPU runs and checks the kernel."""
    return _first_use.reason_against(device, dtype)


_REPEATS = 20
"""Launches that must give the same bits: a wait that is missing shows only sometimes."""


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    with torch.inference_mode(False), torch.no_grad():
        for tile in TILES:
            if (problem := _problem(tile, (2, 4 * tile.tile_h, 32), 128, dtype, device, _REPEATS)) is not None:
                return f"{problem} with {tile}"
    return None


def _problem(
    tile: HopperTile,
    shape: tuple[int, int, int],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> str | None:
    """What is wrong with two residual blocks on noise, each layer beside PyTorch on its own source; or None."""
    generator = torch.Generator("cpu").manual_seed(9)
    conv = Conv(channels, channels, 3, 1, 1, False, True, False)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)

    weights = [noise(channels, channels, 3, 3) / (9 * channels) ** 0.5 for _ in range(4)]
    biases = [noise(channels).float() for _ in weights]
    maps = [noise(*shape, channels) for _ in range(5)]
    rect = 0, shape[1], 0, shape[2]
    layers = [
        ChainLayer(
            maps[i], conv.pack(weights[i]).contiguous(), biases[i], (Store(maps[i + 1], "relu"),), rect,
            maps[i - 1] if i % 2 else None,
        )
        for i in range(4)
    ]  # fmt: skip
    chain = Chain(conv, layers, tile)
    if not chain.fits():  # on a part of a GPU; the engine does not use such a launch either
        return None
    found: list[Tensor] = []
    for _ in range(repeats):
        for one in maps[1:]:
            one.fill_(float("nan"))
        chain.launch()
        if found and not all(map(torch.equal, maps[1:], found)):
            return "another result of the same launch"
        found = [one.clone() for one in maps[1:]]
    for i, layer in enumerate(layers):
        exact = exact_convolution(conv, layer.source, weights[i], biases[i])
        exact = (exact if layer.residual is None else exact + layer.residual.double()).relu()
        error = float((maps[i + 1].double() - exact).norm() / exact.norm())
        if not error < LIMIT * torch.finfo(dtype).eps:
            return f"relative error {error:.1e} in layer {i}"
    return None


_first_use = FirstUse(
    "chains of convolutions for Hopper",
    lambda capability: capability == CAPABILITY,
    "compute capability 9.0",
    _check,
)
