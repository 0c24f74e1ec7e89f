"""The compiled convolutions (`hopper`, `picture_conv`) as choices of the engine, beside Triton's tiles."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch

from . import hopper, hopper_shapes, picture_conv
from .cards import card_with
from .configs import device_generation
from .conv import Conv
from .conv_configs import Work
from .hopper_shapes import HopperTile
from .picture_conv import PictureTile

CompiledTile: TypeAlias = HopperTile | PictureTile

AT_FIRST_USE: dict[str, ModuleType] = {
    "the kernels for the picture": picture_conv,
    "the convolution for Hopper": hopper,
}
"""Kernels that an engine's first use measures, by what messages call them."""
_FEW = 4

_TILES: dict[str, type[CompiledTile]] = {"hopper": HopperTile, "picture": PictureTile}


def as_compiled(choice: object) -> CompiledTile | None:
    """The choice where it is a tile of a compiled convolution, else None."""
    return choice if isinstance(choice, (HopperTile, PictureTile)) else None


def plain(tile: CompiledTile) -> tuple[Any, ...]:
    """A tile as the cache keeps it: the kernel's name, then the fields."""
    return next(name for name, kind in _TILES.items() if isinstance(tile, kind)), *tile


def tile_of(stored: Any) -> CompiledTile | None:
    """The inverse of :func:`plain`; None for the choice of another kernel."""
    return _TILES[stored[0]](*stored[1:]) if stored[0] in _TILES else None


def candidates(conv: Conv, work: Work, dtype: torch.dtype, device: torch.device) -> list[CompiledTile]:
    """Tiles worth measuring for a step whose product is `work`."""
    return [*hopper.candidates(conv, work, dtype, device), *picture_conv.candidates(conv, dtype, device)]


def few_candidates(
    conv: Conv,
    batch: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Sequence[CompiledTile]:
    """Tiles to measure at an engine's first use of a step: all of `picture_conv`, else those of `hopper` of least
    estimated time; none where the kernel may not be used."""
    if hopper_shapes.unsupported(conv) is not None:
        return [*picture_conv.candidates(conv, dtype, device)]
    if hopper.reason_against(device, dtype) is not None:
        return []
    whole = (0, out_size[0], 0, out_size[1])
    best = hopper_shapes.ranked(conv, batch, in_size, out_size, whole, card_with(*device_generation(device)))[:_FEW]
    return [tile for tile, _ in best]


def usable(tile: CompiledTile, conv: Conv, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tile that was measured for a product can compute another step with that product."""
    if isinstance(tile, HopperTile):
        return hopper.usable(tile, conv, dtype, device)
    return picture_conv.usable(tile, conv, dtype, device)
