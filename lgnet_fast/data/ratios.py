"""Hole ratios and their classes.

A mask is a bool array [H, W], True = hole. The hole ratio is the share of hole pixels; the paper groups its tests by
the six classes of Liu et al. ("Image Inpainting for Irregular Holes Using Partial Convolutions", ECCV 2018),
:data:`HOLE_CLASSES`.
"""

from __future__ import annotations

import math

import numpy as np

HOLE_CLASSES: tuple[tuple[float, float], ...] = (
    (0.01, 0.1),
    (0.1, 0.2),
    (0.2, 0.3),
    (0.3, 0.4),
    (0.4, 0.5),
    (0.5, 0.6),
)
"""Bounds of the hole ratio of each class: above the first, up to and including the second."""


def hole_ratio(mask: np.ndarray) -> float:
    """Share of hole pixels of a bool mask [H, W], in [0, 1]."""
    return int(np.count_nonzero(mask)) / mask.size


def hole_class(mask: np.ndarray) -> int | None:
    """Index in :data:`HOLE_CLASSES` of a bool mask [H, W]; None for ratios up to 0.01 and above 0.6."""
    return class_of(hole_ratio(mask))


def class_of(ratio: float) -> int | None:
    """Index in :data:`HOLE_CLASSES` of a hole ratio, None outside all of them."""
    return next((i for i, (low, high) in enumerate(HOLE_CLASSES) if low < ratio <= high), None)


def pixel_bounds(height: int, width: int, hole_class: int | None) -> tuple[int, int]:
    """Smallest and largest count of hole pixels whose ratio lies in the class; None: from the first to the last."""
    if hole_class is None:
        low, high = HOLE_CLASSES[0][0], HOLE_CLASSES[-1][1]
    elif isinstance(hole_class, (int, np.integer)) and 0 <= hole_class < len(HOLE_CLASSES):
        low, high = HOLE_CLASSES[hole_class]
    else:
        raise ValueError(f"hole_class: expected None or 0 to {len(HOLE_CLASSES) - 1}, got {hole_class!r}")
    pixels = height * width
    fewest, most = math.floor(low * pixels), math.ceil(high * pixels)
    while fewest / pixels <= low:
        fewest += 1
    while most / pixels > high:
        most -= 1
    if fewest > most:
        raise ValueError(f"height, width: {height}x{width} has no pixel count with a hole ratio in ({low}, {high}]")
    return fewest, most
