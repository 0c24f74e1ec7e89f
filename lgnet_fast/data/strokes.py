"""Shapes drawn into holes, bool [H, W], True = hole: walks of a round brush, and filling up to a hole ratio.

Integer arithmetic and numpy's PCG64 alone, so that a seed gives the same hole on every platform.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

Seed = int | Sequence[int]
"""A non-negative integer or several."""

# Directions of a brush as integers: the last bit of a cosine may differ between math libraries, a rounded one not.
TURN = 256
SCALE = 1 << 12
DIRECTIONS = np.array(
    [
        (round(SCALE * math.cos(2 * math.pi * k / TURN)), round(SCALE * math.sin(2 * math.pi * k / TURN)))
        for k in range(TURN)
    ],
    dtype=np.int64,
)


def generator(seed: Seed) -> np.random.Generator:
    try:
        words = [operator.index(word) for word in (seed if isinstance(seed, Iterable) else (seed,))]
    except TypeError:
        raise TypeError(f"seed: expected a non-negative integer or several, got {seed!r}") from None
    if any(word < 0 for word in words):
        raise ValueError(f"seed: expected non-negative integers, got {seed!r}")
    return np.random.default_rng(np.random.SeedSequence(words))


def fill(
    hole: np.ndarray,
    rng: np.random.Generator,
    draw: Callable[[int, float], None],
    target: int,
    fewest: int,
    most: int,
) -> None:
    """Call draw(missing pixels, size <= 1), which marks pixels of `hole`, until it has about `target` of them."""
    count, attempts, size = 0, 0, 1.0
    # Stop within 1 % of the picture of the target: the rest would be tiny specks.
    while (count < fewest or target - count > hole.size // 100) and attempts < 200:
        attempts += 1
        before = hole.copy()
        draw(target - count, size)
        drawn = int(np.count_nonzero(hole))
        if drawn > most:
            # Too much: undo it and continue with a smaller brush.
            hole[:] = before
            size *= 0.7
        else:
            count = drawn
    if count < fewest:
        _grow(hole, rng, fewest - count)


def walk(hole: np.ndarray, rng: np.random.Generator, radius: int, longest: int) -> None:
    """A walk of 2 to 8 straight pieces, each of a quarter to the whole of `longest`, with a brush of that radius."""
    height, width = hole.shape
    x, y = int(rng.integers(width)), int(rng.integers(height))
    angle = int(rng.integers(TURN))
    pieces = int(rng.integers(2, 9))
    turns = rng.integers(-TURN // 6, TURN // 6 + 1, size=pieces)
    lengths = rng.integers(max(1, longest // 4), longest + 1, size=pieces)
    _stamp(hole, x, y, radius)
    for turn, length in zip(turns.tolist(), lengths.tolist()):
        angle = (angle + turn) % TURN
        dx, dy = (DIRECTIONS[angle] * length // SCALE).tolist()
        # The walk reflects at the border, so that a stroke stays in the picture.
        if not 0 <= x + dx < width:
            dx, angle = -dx, (TURN // 2 - angle) % TURN
        if not 0 <= y + dy < height:
            dy, angle = -dy, -angle % TURN
        capsule(hole, x, y, dx, dy, radius)
        x, y = min(max(x + dx, 0), width - 1), min(max(y + dy, 0), height - 1)
        _stamp(hole, x, y, radius)


@lru_cache(maxsize=32)  # the radii of a picture of 256x256 are fewer; a disc of radius 600 takes 1.4 MB
def _disc(radius: int) -> np.ndarray:
    line = np.arange(-radius, radius + 1) ** 2
    return line[:, None] + line[None, :] <= radius * radius


def _stamp(hole: np.ndarray, x: int, y: int, radius: int) -> None:
    """Mark the disc around (x, y), cut at the borders."""
    height, width = hole.shape
    left, top = max(0, x - radius), max(0, y - radius)
    right, bottom = min(width, x + radius + 1), min(height, y + radius + 1)
    part = _disc(radius)[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
    hole[top:bottom, left:right] |= part


def capsule(hole: np.ndarray, x: int, y: int, dx: int, dy: int, radius: int) -> None:
    """Mark what is within `radius` of the piece from (x, y) to (x + dx, y + dy), without its round ends."""
    height, width = hole.shape
    left, right = max(0, min(x, x + dx) - radius), min(width, max(x, x + dx) + radius + 1)
    top, bottom = max(0, min(y, y + dy) - radius), min(height, max(y, y + dy) + radius + 1)
    if left >= right or top >= bottom:
        return
    columns, rows = np.arange(left - x, right - x), np.arange(top - y, bottom - y)[:, None]
    length2 = dx * dx + dy * dy
    along = columns * dx + rows * dy
    across = np.abs(columns * dy - rows * dx)
    reach = math.isqrt(radius * radius * length2)
    hole[top:bottom, left:right] |= (across <= reach) & (along >= 0) & (along <= length2)


def _grow(hole: np.ndarray, rng: np.random.Generator, missing: int) -> None:
    """Add exactly `missing` pixels at the hole's rim, where no stroke fits the class's bounds."""
    if not hole.any():
        hole[int(rng.integers(hole.shape[0])), int(rng.integers(hole.shape[1]))] = True
        missing -= 1
    while missing > 0:
        rim = np.zeros_like(hole)
        rim[1:] |= hole[:-1]
        rim[:-1] |= hole[1:]
        rim[:, 1:] |= hole[:, :-1]
        rim[:, :-1] |= hole[:, 1:]
        places = np.flatnonzero(rim & ~hole)[:missing]
        hole.flat[places] = True
        missing -= len(places)
