"""Drawn holes of the hole-ratio classes: strokes, boxes, or both."""

from __future__ import annotations

import math

import numpy as np

from .ratios import pixel_bounds
from .strokes import Seed, fill, generator, walk

KINDS = ("strokes", "boxes", "mixed")
"""Kinds of :func:`generate_mask`."""


def generate_mask(height: int, width: int, *, hole_class: int | None, kind: str, seed: Seed) -> np.ndarray:
    """Draw a hole of brush strokes, of boxes, or of both.

    The same arguments give the same mask on every platform: integer arithmetic, and numpy's PCG64 seeded by
    ``SeedSequence(seed)``.

    Args:
        height, width: of the mask, in pixels.
        hole_class: index in :data:`HOLE_CLASSES`; the hole ratio is within its bounds; None: anywhere in (0.01, 0.6].
        kind: "strokes" (random walks of a thick round brush), "boxes" (rectangles) or "mixed" (strokes, boxes or
            both, chosen at random).
        seed: a non-negative integer or several, e.g. (seed, epoch, index).

    Returns:
        bool [height, width], True = hole.

    Raises:
        TypeError: `seed` is no integer and no sequence of them.
        ValueError: an argument outside the above, or a picture too small for the class.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if height < 1 or width < 1:
        raise ValueError(f"height, width: expected positive sizes, got {height}x{width}")
    fewest, most = pixel_bounds(height, width, hole_class)
    rng = generator(seed)
    target = int(rng.integers(fewest, most + 1))
    if kind == "mixed":
        kind = ("strokes", "boxes", "both")[int(rng.integers(3))]
    hole = np.zeros((height, width), dtype=bool)

    def draw(missing: int, size: float) -> None:
        if kind == "boxes" or (kind == "both" and rng.integers(2)):
            _draw_box(hole, rng, missing, size)
        else:
            _draw_stroke(hole, rng, size)

    fill(hole, rng, draw, target, fewest, most)
    return hole


def _draw_stroke(hole: np.ndarray, rng: np.random.Generator, size: float) -> None:
    """One free-form stroke: a walk of straight pieces that turns by up to 60 degrees, with a round brush."""
    height, width = hole.shape
    side = min(height, width)
    thickest = max(1, round(0.075 * side * size))
    radius = int(rng.integers(max(1, thickest // 4), thickest + 1))
    walk(hole, rng, radius, max(2, round(0.25 * side * size)))


def _draw_box(hole: np.ndarray, rng: np.random.Generator, missing: int, size: float) -> None:
    """One rectangle with sides in a ratio of up to 1:3, of between a quarter and all of the `missing` pixels."""
    height, width = hole.shape
    area = max(1, height * width // 500, round(missing * size))
    area = int(rng.integers(max(1, area // 4), area + 1))
    # Aspect as a fraction of integers: h/w from 1/3 to 3.
    a, b = int(rng.integers(4, 13)), int(rng.integers(4, 13))
    h = min(height, max(1, math.isqrt(area * a // b)))
    w = min(width, max(1, area // h))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    hole[top : top + h, left : left + w] = True
