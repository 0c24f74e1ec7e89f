"""The compiled convolutions (`hopper`, `picture_conv`) as choices of the engine, beside Triton's tiles."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from . import hopper, picture_conv
from .conv import Conv
from .conv_configs import Work
from .hopper import HopperTile
from .picture_conv import PictureTile

CompiledTile: TypeAlias = HopperTile | PictureTile

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


def usable(tile: CompiledTile, conv: Conv, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tile that was measured for a product can compute another step with that product."""
    if isinstance(tile, HopperTile):
        return hopper.usable(tile, conv, dtype, device)
    return picture_conv.usable(tile, conv, dtype, device)
