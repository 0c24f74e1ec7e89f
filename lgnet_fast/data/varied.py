"""Training's holes of mixed kinds, without hole classes."""

from __future__ import annotations

import numpy as np

from .drawn import KINDS, generate_mask
from .strokes import DIRECTIONS, SCALE, TURN, Seed, capsule, generator
from .suite import SUITE_KINDS, suite_mask

_LEAST_SIDE = 24

# Shares of the kinds: those of the suite, :func:`generate_mask`'s, and "object".
_VARIED = {"thin": 0.25, "thick": 0.25, "box": 0.12, "blob": 0.13, "strokes": 0.1, "boxes": 0.03, "object": 0.12}


def varied_mask(height: int, width: int, *, seed: Seed) -> np.ndarray:
    """Draw a hole of a random kind: thin or thick strokes, boxes, blobs or shapes like objects.

    Args:
        height, width: of the mask, in pixels, each at least 24.
        seed: a non-negative integer or several.

    Returns:
        bool [height, width], True = hole.

    Raises:
        TypeError: `seed` is no integer and no sequence of them.
        ValueError: an argument outside the above.
    """
    _check_size(height, width)
    rng = generator(seed)
    kind = str(rng.choice(list(_VARIED), p=list(_VARIED.values())))
    inner = int(rng.integers(1 << 62))
    if kind in SUITE_KINDS and kind != "box":
        return suite_mask(height, width, kind=kind, seed=inner)
    if kind in KINDS:
        return generate_mask(
            height, width, hole_class=int(rng.integers(4 if kind == "strokes" else 2)), kind=kind, seed=inner
        )
    hole = np.zeros((height, width), dtype=bool)
    if kind == "box":
        side = min(height, width)
        for _ in range(int(rng.integers(1, 3))):
            h, w = (int(rng.integers(side // 6, side // 3)) for _ in range(2))
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            hole[top : top + h, left : left + w] = True
    else:
        _draw_object(hole, rng)
    return hole


def fine_mask(height: int, width: int, *, seed: Seed) -> np.ndarray:
    """Draw a hole for training on details: half are one to three :func:`suite_mask` of thin strokes together, over 10
    to 48 % of the picture, so that a picture teaches more of them; half are :func:`varied_mask`.

    Args:
        height, width: of the mask, in pixels, each at least 24.
        seed: a non-negative integer or several.

    Returns:
        bool [height, width], True = hole.

    Raises:
        TypeError: `seed` is no integer and no sequence of them.
        ValueError: an argument outside the above.
    """
    _check_size(height, width)
    rng = generator(seed)
    if rng.integers(2):
        return varied_mask(height, width, seed=int(rng.integers(1 << 62)))
    hole = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.integers(1, 4))):
        hole |= suite_mask(height, width, kind="thin", seed=int(rng.integers(1 << 62)))
    return hole


FREE_KINDS = {"varied": varied_mask, "fine": fine_mask}
"""Kinds of holes without hole classes: name -> the function that draws one, called as ``f(height, width, seed=)``."""


def _check_size(height: int, width: int) -> None:
    if min(height, width) < _LEAST_SIDE:
        raise ValueError(f"height, width: expected at least {_LEAST_SIDE} each, got {height}x{width}")


def _draw_object(hole: np.ndarray, rng: np.random.Generator) -> None:
    """A body of two to five overlapping tilted ellipses, with up to three limbs, like a person's or an animal's."""
    height, width = hole.shape
    side = min(height, width)
    x, y = (int(rng.integers(length // 4, length - length // 4)) for length in (width, height))
    columns, rows = np.arange(width, dtype=np.int64), np.arange(height, dtype=np.int64)[:, None]
    angle = int(rng.integers(TURN))
    for _ in range(int(rng.integers(2, 6))):
        a, b = int(rng.integers(side // 12, side // 6 + 1)), int(rng.integers(side // 20, side // 9 + 1))
        ux, uy = DIRECTIONS[angle].tolist()
        along = ((columns - x) * ux + (rows - y) * uy) // SCALE
        across = ((rows - y) * ux - (columns - x) * uy) // SCALE
        hole |= along**2 * b**2 + across**2 * a**2 <= a**2 * b**2
        # The next one begins inside this one.
        x, y = (min(max(v + d * a // SCALE, 0), n - 1) for v, d, n in ((x, ux, width), (y, uy, height)))
        angle = (angle + int(rng.integers(-TURN // 5, TURN // 5 + 1))) % TURN
    inside = np.argwhere(hole)
    for _ in range(int(rng.integers(4))):
        row, column = inside[int(rng.integers(len(inside)))].tolist()
        radius = int(rng.integers(max(1, side // 64), side // 24 + 1))
        dx, dy = (DIRECTIONS[int(rng.integers(TURN))] * int(rng.integers(side // 8, side // 4)) // SCALE).tolist()
        capsule(hole, column, row, dx, dy, radius)
