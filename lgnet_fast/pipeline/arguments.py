"""The arguments of `Inpainter` and its calls, and their checks."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MaskOptions:
    """How a mask becomes a hole, see :class:`Inpainter`; `read_hole` and `soft_edge` check the values.

    `allow_any_mask`: whether a mask that selects nothing or more than 95 % is a warning, not an error.
    """

    mask_threshold: float = 0.5
    invert_mask: bool = False
    mask_channel: str = "auto"
    allow_any_mask: bool = True
    dilate: int = 0
    feather: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> MaskOptions:
        """Options by their names. Raises TypeError for another name."""
        for name in options:
            if name not in MASK_OPTIONS:
                raise TypeError(f"{name}: expected one of the options {', '.join(MASK_OPTIONS)}")
        return cls(**options)


MASK_OPTIONS = tuple(field.name for field in fields(MaskOptions))
"""The names of all options of a mask."""


def checked_window(window: int, multiple: int) -> int:
    """`window` rounded down to a multiple of `multiple`, the network's. Raises TypeError, ValueError."""
    try:
        pixels = operator.index(window)
    except TypeError:
        raise TypeError(f"window: expected a whole number of pixels, got {window!r}") from None
    if pixels < multiple:
        raise ValueError(f"window: expected at least the network's multiple {multiple}, got {window}")
    return pixels // multiple * multiple


def check_memory_limit(limit: int | None) -> None:
    """Raise TypeError or ValueError unless it is a number of bytes or None."""
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, (int, float, np.number)):
        raise TypeError(f"memory_limit: expected a number of bytes or None, got {limit!r}")
    if not limit >= 0:
        raise ValueError(f"memory_limit: expected at least 0 bytes, got {limit}")


def check_sides(height: int, width: int) -> None:
    """Raise TypeError or ValueError unless both are at least one pixel."""
    for name, pixels in (("height", height), ("width", width)):
        if isinstance(pixels, bool) or not isinstance(pixels, (int, np.integer)):
            raise TypeError(f"{name}: expected a whole number of pixels, got {pixels!r}")
        if pixels < 1:
            raise ValueError(f"{name}: expected at least 1 pixel, got {pixels}")
