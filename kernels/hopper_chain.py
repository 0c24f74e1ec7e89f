"""Consecutive convolutions in one launch on Hopper, by `csrc/cuda/hopper_chain.cu`.

NetL's eight block convolutions are such a chain, and the U-Nets' convolutions before and after the deep layers. The
kernel is that of :mod:`.hopper`, but its blocks stay for all layers and wait for each other between two of them. So
every block must run at the same time, and one launch takes the place of several. The launch is cooperative: CUDA
starts it when all its blocks fit, so that two of them on different streams do not wait for each other for ever
(`bench/hopper_contact.py` tries that). A wait of seconds ends in an error.

The first use on a GPU compares it with PyTorch in float64 (:func:`reason_against`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hopper_shapes
from .cards import H100_CLOCK, Card, clustered_blocks
from .compiled_checks import LIMIT, FirstUse, exact_convolution
from .conv import Conv
from .conv_configs import LAUNCH_SECONDS, Cost
from .cuda_driver import Kernel
from .hopper import CLOCKS, Args, Output, check_clocks, check_operands, launch_of, output_of, source_maps, weights_map
from .hopper_shapes import (
    CAPABILITY,
    FILL_SECONDS,
    GROUP_THREADS,
    MAX_PATCH_STAGES,
    OTHER_THREADS,
    PIXEL_SECONDS,
    ROW_BYTES,
    SHARED_LIMIT,
    TILE_W,
    HopperTile,
    Product,
    Shape,
)
from .launch import device_guard, is_recording
from .results import Store

MAX_LAYERS = 8
COUNTER_STRIDE = 32
"""Integers from one counter to the next: each has its own line of the L2 cache."""
GROUPS = 2
"""Warpgroups of a block."""
HEIGHTS, CLUSTERS = (16, 8, 4), (2, 1)
TILES = tuple(HopperTile(tile_h, cluster, groups=GROUPS) for cluster in CLUSTERS for tile_h in HEIGHTS)

Rect = tuple[int, int, int, int]
"""(top, bottom, left, right)."""


class ChainStep(NamedTuple):
    """One convolution of a chain: outputs `rect` of a map of `out_size`, from one of `in_size` (heights, widths)."""

    conv: Conv
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    rect: Rect


class ChainLayer(NamedTuple):
    """Operands of one convolution, as :func:`.hopper.hopper_forward` takes them. The map that it stores to has the
    size of the first store."""

    conv: Conv
    source: Tensor
    weight: Tensor
    bias: Tensor
    stores: tuple[Store, ...]
    rect: Rect
    residual: Tensor | None = None

    @property
    def step(self) -> ChainStep:
        """Its shape."""
        (_, *in_size, _), (_, *out_size, _) = self.source.shape, self.stores[0].view.shape
        return ChainStep(self.conv, tuple(in_size), tuple(out_size), self.rect)  # type: ignore[arg-type]


class ChainLaunch(NamedTuple):
    """Parameters of one launch, without addresses: those of each layer, and pixels and rows of a box of its patch."""

    args: tuple[Args, ...]
    boxes: tuple[tuple[int, int], ...]
    grid: int
    cluster: int
    shared_bytes: int


def union(rects: Sequence[Rect]) -> Rect:
    """The smallest rectangle that contains all of them."""
    tops, bottoms, lefts, rights = zip(*rects)
    return min(tops), max(bottoms), min(lefts), max(rights)


def alike(one: ChainStep, other: ChainStep) -> bool:
    """Whether two layers differ in their rectangles only. Their tiles are the same, and cover both rectangles, so
    that a thread stores the same pixels of both: the later one may have as residual what the earlier one stores."""
    return one[:3] == other[:3]


def describe_chain(steps: Sequence[ChainStep], batch: int, tiles: Sequence[HopperTile]) -> ChainLaunch:
    """The launch of layers, each in tiles of its own.

    Raises:
        ValueError: the kernel cannot compute these layers in such tiles.
    """
    shapes = _shapes(tuple(steps), batch, tuple(tiles))
    launches = [launch_of(shape, step.in_size, step.out_size) for shape, step in zip(shapes, steps)]
    grid = max(launch.grid for launch in launches)
    args, boxes = tuple(one.args for one in launches), tuple(one.box for one in launches)
    return ChainLaunch(args, boxes, grid, launches[0].cluster, launches[0].shared_bytes)


def _shapes(steps: tuple[ChainStep, ...], batch: int, tiles: tuple[HopperTile, ...]) -> list[Shape]:
    """The shape of each layer. All have the same stages of shared memory."""
    if not 2 <= len(steps) <= MAX_LAYERS:
        raise ValueError(f"layers: expected 2 to {MAX_LAYERS}, got {len(steps)}")
    if len(tiles) != len(steps):
        raise ValueError(f"tiles: expected one for each of {len(steps)} layers, got {len(tiles)}")
    if not set(tiles) <= set(TILES) or len({tile.cluster for tile in tiles}) > 1:
        raise ValueError(f"tiles: expected some of {TILES}, in clusters of the same size, got {tiles}")
    for step, tile in zip(steps, tiles):
        if not alike(step, steps[0]) and (step.conv.reflect or steps[0].conv.reflect):
            # a barrier of mended patches tells odd from even fillings, so every tile of a block must mend, or none
            raise ValueError(f"conv: expected {steps[0].conv} where one pads by reflection, got {step.conv}")
        if any(alike(step, other) and tile != its for other, its in zip(steps, tiles)):
            raise ValueError(f"tiles: expected the same one for layers of {step.conv}, got {tiles}")
    shapes = [_alone(step, steps, batch, tile) for step, tile in zip(steps, tiles)]
    patch_bytes, weight_bytes = max(s.patch_bytes for s in shapes), max(s.weight_bytes for s in shapes)
    sums = max(GROUPS * TILE_W * s.tile.tile_h * ROW_BYTES for s in shapes)  # they replace the patches
    stages = max(*(s.patch_stages for s in shapes), -(-sums // patch_bytes))
    shapes = [
        shape._replace(
            weight_stages=min(s.weight_stages for s in shapes), weight_bytes=weight_bytes,
            patch_stages=stages, patch_bytes=patch_bytes,
        )
        for shape in shapes
    ]  # fmt: skip
    if stages > MAX_PATCH_STAGES or shapes[0].shared_bytes > SHARED_LIMIT:
        raise ValueError(f"tiles: {tiles} take {shapes[0].shared_bytes} bytes of shared memory")
    return shapes


def _alone(step: ChainStep, steps: tuple[ChainStep, ...], batch: int, tile: HopperTile) -> Shape:
    """The shape of a layer before shared memory is divided. Its tiles cover the rectangles of all layers like it."""
    rect = union([other.rect for other in steps if alike(step, other)])
    shape = Shape.of(Product.of(step.conv, batch, step.in_size, step.out_size, rect), tile)
    if not shape.grid:
        raise ValueError(f"rect: expected some outputs of every layer, got {rect}")
    if shape.sharing != tile.cluster:
        raise ValueError(f"tiles: no two of {tile} share weights in {step}")
    return shape


# Between two layers, assumed: 1,000 clocks in which all blocks wait for each other, as measured between deep layers
# (bench/results/h100_deep.jsonl, "layer before ends"), and as many until the first patch has come.
_BETWEEN_SECONDS = 2000 / H100_CLOCK


def chain_costs(shapes: Sequence[Shape], card: Card) -> tuple[Cost, ...]:
    """Estimated seconds of each layer by their parts; the first has the start of the launch."""
    costs = []
    for number, shape in enumerate(shapes):
        start = _BETWEEN_SECONDS if number else LAUNCH_SECONDS + FILL_SECONDS
        stored = TILE_W * shape.tile.tile_h * PIXEL_SECONDS
        costs.append(hopper_shapes.cost(shape, card)._replace(start=start + stored))
    return tuple(costs)


@functools.lru_cache(maxsize=1024)
def ranked_chains(
    steps: tuple[ChainStep, ...], batch: int, card: Card
) -> tuple[tuple[tuple[HopperTile, ...], tuple[Cost, ...]], ...]:
    """The tiles of the layers, for each size of clusters with which all blocks run at the same time; the least time
    by estimate first. Each with the layers' costs."""
    found = []
    for cluster in CLUSTERS:
        with contextlib.suppress(ValueError):
            tiles = tuple(_fastest_tile(step, steps, batch, cluster, card) for step in steps)
            found.append((tiles, chain_costs(_shapes(steps, batch, tiles), card)))
    return tuple(sorted(found, key=lambda one: seconds(one[1])))


def seconds(costs: Sequence[Cost]) -> float:
    """Estimated seconds of a launch, by the costs of its layers."""
    return sum(cost.seconds for cost in costs)


def fits(step: ChainStep, batch: int, card: Card) -> bool:
    """Whether in some tile the blocks of a layer run at the same time."""
    for cluster in CLUSTERS:
        with contextlib.suppress(ValueError):
            _fastest_tile(step, (step,), batch, cluster, card)
            return True
    return False


def _fastest_tile(step: ChainStep, steps: tuple[ChainStep, ...], batch: int, cluster: int, card: Card) -> HopperTile:
    """The tile of least time for a layer, of those whose blocks run at the same time, one a multiprocessor.

    Raises:
        ValueError: there is none.
    """
    found = []
    for tile in TILES:
        with contextlib.suppress(ValueError):
            shape = _alone(step, steps, batch, tile)
            if tile.cluster == cluster and shape.grid <= clustered_blocks(card.num_sms, cluster):
                found.append((chain_costs([shape], card)[0].seconds, tile))
    if not found:
        raise ValueError(f"tiles: in none do the blocks of {step} run at the same time")
    return min(found)[1]


def _layer_type(tensor_map: Any) -> type[ctypes.Structure]:
    """`ChainLayer` of csrc/cuda/hopper_chain.cu."""

    class Layer(ctypes.Structure):
        _fields_ = [
            ("planes", tensor_map * 4),
            ("weights", tensor_map),
            ("args", Args),
            ("output", Output),
            ("tile_h", ctypes.c_int32),
            ("unused", ctypes.c_int32 * 11),
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
        layers: in order. A residual is older than the launch, or an earlier layer that is :func:`alike` stored it.
        tiles: for each layer one of :data:`TILES`.
        clocks: [layers, thread blocks, 8] int64, which gets each block's :data:`.hopper.CLOCKS`; float16 only.

    Raises:
        ValueError: an argument is not what the kernel needs.
    """

    def __init__(
        self, layers: Sequence[ChainLayer], tiles: Sequence[HopperTile], clocks: Tensor | None = None
    ) -> None:
        self._layers = tuple(layers)  # whose memory the launch reads and writes
        self._source = layers[0].source
        self.dtype = self._source.dtype
        batch = self._source.shape[0]
        self.description = describe_chain([layer.step for layer in layers], batch, tiles)
        for layer in layers:
            check_operands(layer.conv, layer.source, layer.weight, layer.bias, layer.stores, layer.residual)
            _check_maps(self._source, layer)
        if clocks is not None:
            check_clocks(clocks, (len(layers), self.description.grid, len(CLOCKS)), self.dtype)
            for args in self.description.args:
                args.clocks = clocks.data_ptr()
        with device_guard(self._source):
            self._counters = new_counters(self._source.device)
            self._chain = self._structure(tiles)
        name = f"lgnet_chain_{str(self.dtype).removeprefix('torch.')}"
        self._kernel = _kernel(name if clocks is None else f"{name}_timed", self.description)

    def _structure(self, tiles: Sequence[HopperTile]) -> ctypes.Structure:
        made = []
        for layer, tile, args, box in zip(self._layers, tiles, self.description.args, self.description.boxes):
            planes = source_maps(layer.source, layer.conv.axis.in_step, box)
            output = output_of(layer.rect, layer.bias, layer.stores, layer.residual)
            weights = weights_map(layer.weight, args)
            made.append(((type(weights) * 4)(*planes), weights, args, output, tile.tile_h))
        layer_type = _layer_type(type(made[0][1]))
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
        if is_recording():  # nothing to compile
            return
        with device_guard(self._source):
            self._kernel.launch(self.description.grid, [ctypes.c_void_p(ctypes.addressof(self._chain))])


def _check_maps(first: Tensor, layer: ChainLayer) -> None:
    """Raises ValueError where a layer's maps have another batch or dtype than the first layer's source, or what it
    stores and adds has not the size of its first store."""
    if layer.source.dtype != first.dtype or layer.source.shape[0] != first.shape[0]:
        raise ValueError(
            f"source: expected a batch of {first.shape[0]} in {first.dtype} as the first layer's source, "
            f"got {tuple(layer.source.shape)} {layer.source.dtype}"
        )
    expected = (first.shape[0], *layer.step.out_size, layer.conv.out_channels)
    residual = () if layer.residual is None else (("residual", layer.residual),)
    for name, view in (*residual, *(("stores", store.view) for store in layer.stores)):
        if view.shape != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(view.shape)}")


def _kernel(name: str, launch: ChainLaunch) -> Kernel:
    return Kernel(
        "hopper_chain",
        name,
        threads=GROUPS * GROUP_THREADS + OTHER_THREADS,
        shared_bytes=launch.shared_bytes,
        cluster=launch.cluster,
        cooperative=True,
    )


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is not used on a GPU in `dtype`, or None. The first call per GPU runs and checks the kernel."""
    return _first_use.reason_against(device, dtype)


class _Case(NamedTuple):
    """Layers on noise, and the weights of each as PyTorch takes them."""

    layers: list[ChainLayer]
    weights: list[Tensor]


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    with torch.inference_mode(False), torch.no_grad():
        for tile in TILES:
            blocks = _residual_blocks(128, (2, 4 * tile.tile_h, 32), dtype, device)
            if (problem := _problem(blocks, 4 * (tile,), _REPEATS)) is not None:
                return f"{problem} with {tile}"
        unlike = _unlike_layers(64, (2, 16, 32), dtype, device)
        for cluster, heights in itertools.product(CLUSTERS, itertools.permutations(HEIGHTS)):
            tiles = tuple(HopperTile(tile_h, cluster, groups=GROUPS) for tile_h in heights)
            if (problem := _problem(unlike, tiles, _REPEATS)) is not None:
                return f"{problem} with {tiles}"
    return None


def _residual_blocks(channels: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> _Case:
    """Two residual blocks on maps of batch, height, width."""
    return _case([Conv(channels, channels, 3, 1, 1, False, True, False)] * 4, shape, (1, 3), dtype, device)


def _unlike_layers(channels: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> _Case:
    """A 4x4 convolution of stride 2, a 3x3 one, and a transposed one, which adds the source of the first."""
    wide = 2 * channels
    convs = [
        Conv(channels, wide, 4, 2, 1, False, False, False),
        Conv(wide, wide, 3, 1, 1, False, False, False),
        Conv(wide, channels, 4, 2, 1, True, False, False),
    ]
    return _case(convs, shape, (2,), dtype, device)


def _case(
    convs: Sequence[Conv],
    shape: tuple[int, int, int],
    adding: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> _Case:
    """Convolutions one after another. shape: batch, height, width of the first source. adding: the layers that add
    the last map of this size and as many channels that is older than their source."""
    generator = torch.Generator("cpu").manual_seed(9)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)

    maps, weights, layers = [noise(*shape, convs[0].in_channels)], [], []
    for number, conv in enumerate(convs):
        source = maps[-1]
        batch, *size, _ = source.shape
        size = [length * conv.axis.out_step // conv.axis.in_step for length in size]
        stored = noise(batch, *size, conv.out_channels)
        first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
        weights.append(noise(first, second, conv.kernel, conv.kernel) / (conv.in_channels * conv.kernel**2) ** 0.5)
        residual = [one for one in maps[:-1] if one.shape == stored.shape][-1] if number in adding else None
        packed, bias = conv.pack(weights[-1]).contiguous(), noise(conv.out_channels).float()
        rect = 0, size[0], 0, size[1]
        layers.append(ChainLayer(conv, source, packed, bias, (Store(stored, "relu"),), rect, residual))
        maps.append(stored)
    return _Case(layers, weights)


_REPEATS = 20
"""Launches that must give the same bits: a wait that is missing shows only sometimes."""


def _problem(case: _Case, tiles: Sequence[HopperTile], repeats: int) -> str | None:
    """What is wrong with a launch, each layer beside PyTorch on its own source; or None."""
    chain = Chain(case.layers, tiles)
    if not chain.fits():  # on a part of a GPU; the engine does not use such a launch either
        return None
    stored = [layer.stores[0].view for layer in case.layers]
    found: list[Tensor] = []
    for _ in range(repeats):
        for one in stored:
            one.fill_(float("nan"))
        chain.launch()
        if found and not all(map(torch.equal, stored, found)):
            return "another result of the same launch"
        found = [one.clone() for one in stored]
    for number, (layer, weight) in enumerate(zip(case.layers, case.weights)):
        exact = exact_convolution(layer.conv, layer.source, weight, layer.bias)
        exact = (exact if layer.residual is None else exact + layer.residual.double()).relu()
        error = float((stored[number].double() - exact).norm() / exact.norm())
        if not error < LIMIT * torch.finfo(chain.dtype).eps:
            return f"relative error {error:.1e} in layer {number}"
    return None


_first_use = FirstUse(
    "chains of convolutions for Hopper",
    lambda capability: capability == CAPABILITY,
    "compute capability 9.0",
    _check,
)
