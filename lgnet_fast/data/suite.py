"""The evaluation suite's holes: thin and thick strokes, a box, a blob."""

from __future__ import annotations

import numpy as np

from .ratios import pixel_bounds
from .strokes import DIRECTIONS, SCALE, TURN, Seed, fill, generator, walk

SUITE_KINDS = ("thin", "thick", "box", "blob")
"""Kinds of :func:`suite_mask`."""


def suite_mask(height: int, width: int, *, kind: str, seed: Seed) -> np.ndarray:
    """Draw a hole of one of the kinds that `lgnet-fast eval --suite` measures.

    Sizes follow the picture's shorter side s; in brackets at 256. The same arguments give the same mask on every
    platform, as with :func:`generate_mask`.

    Args:
        height, width: of the mask, in pixels, each at least 16.
        kind: "thin": strokes of s/85 to s/28 (3 to 9 pixels) over 10-20 % of the picture. "thick": strokes of s/15 to
            s/8 (17 to 31 pixels) over 20-30 %. "box": a square of s/4 (64x64), s/8 or more from the border. "blob":
            one smooth shape of 15 %, round about the middle.
        seed: a non-negative integer or several.

    Returns:
        bool [height, width], True = hole.

    Raises:
        TypeError: `seed` is no integer and no sequence of them.
        ValueError: an argument outside the above.
    """
    if kind not in SUITE_KINDS:
        raise ValueError(f"kind: expected one of {SUITE_KINDS}, got {kind!r}")
    if min(height, width) < 16:
        raise ValueError(f"height, width: expected at least 16 each, got {height}x{width}")
    rng, side = generator(seed), min(height, width)
    hole = np.zeros((height, width), dtype=bool)
    if kind == "box":
        box, rim = side // 4, side // 8
        top = int(rng.integers(rim, height - box - rim + 1))
        left = int(rng.integers(rim, width - box - rim + 1))
        hole[top : top + box, left : left + box] = True
    elif kind == "blob":
        _draw_blob(hole, rng, round(0.15 * hole.size))
    else:
        thin = kind == "thin"
        thinnest, thickest = (side // 256, side // 64) if thin else (side // 32, side // 17)
        fewest, most = pixel_bounds(height, width, 1 if thin else 2)

        def draw(missing: int, size: float) -> None:
            radius = int(rng.integers(max(1, thinnest), max(1, thickest) + 1))
            walk(hole, rng, radius, max(2, round(0.3 * side * size)))

        fill(hole, rng, draw, int(rng.integers(fewest, most + 1)), fewest, most)
    return hole


def _draw_blob(hole: np.ndarray, rng: np.random.Generator, pixels: int) -> None:
    """Mark the `pixels` with the highest sum of inverse squared distances to a few points along a walk.

    Steps of up to 0.18 of the shorter side keep it in one piece: between two points that far apart the sum is above
    the level that encloses a seventh of the picture.
    """
    height, width = hole.shape
    side = min(height, width)
    x, y = (int(rng.integers(length // 3, length - length // 3)) for length in (width, height))
    angle = int(rng.integers(TURN))
    columns, rows = np.arange(width, dtype=np.int64), np.arange(height, dtype=np.int64)[:, None]
    level = np.zeros(hole.shape, dtype=np.int64)
    for _ in range(int(rng.integers(4, 7))):
        weight = int(rng.integers(7, 14))
        level += (weight << 32) // ((columns - x) ** 2 + (rows - y) ** 2 + 1)
        angle = (angle + int(rng.integers(-TURN // 4, TURN // 4 + 1))) % TURN
        step = int(rng.integers(side // 12, round(0.18 * side) + 1))
        dx, dy = (DIRECTIONS[angle] * step // SCALE).tolist()
        # Turned back at the border, so that most of the shape's rim lies in the picture.
        if not side // 6 <= x + dx < width - side // 6:
            dx, angle = -dx, (TURN // 2 - angle) % TURN
        if not side // 6 <= y + dy < height - side // 6:
            dy, angle = -dy, -angle % TURN
        x, y = x + dx, y + dy
    hole.flat[np.argsort(-level, axis=None, kind="stable")[:pixels]] = True
