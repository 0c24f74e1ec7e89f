"""Rectangles of a feature map, and how they spread backwards through convolutions: the cone of a hole.

Only pixels under the mask survive the merge, so a stage's output is needed inside the hole only, and every layer
only where something needed reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Rect(NamedTuple):
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def slices(self) -> tuple[slice, slice]:
        """(rows, columns), to index an array with."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def union(self, other: Rect) -> Rect:
        """The smallest rectangle around both."""
        return Rect(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )

    def meets(self, other: Rect) -> bool:
        """Whether they share a pixel."""
        rows = self.top < other.bottom and other.top < self.bottom
        return rows and self.left < other.right and other.left < self.right

    def moved(self, down: int, across: int) -> Rect:
        """Moved by so many pixels."""
        return Rect(self.top + down, self.bottom + down, self.left + across, self.right + across)

    def grown(self, by: int, shape: tuple[int, ...]) -> Rect:
        """Grown by `by` pixels on every side, inside a picture of `shape` (height, width)."""
        return Rect(
            max(0, self.top - by),
            min(shape[0], self.bottom + by),
            max(0, self.left - by),
            min(shape[1], self.right + by),
        )


def _without(rect: Rect, hole: Rect) -> list[Rect]:
    """Disjoint rectangles that cover `rect` outside `hole`; above and below the hole they are whole rows."""
    top, bottom = max(rect.top, hole.top), min(rect.bottom, hole.bottom)
    left, right = max(rect.left, hole.left), min(rect.right, hole.right)
    if top >= bottom or left >= right:
        return [rect]
    pieces = (
        Rect(rect.top, top, rect.left, rect.right),
        Rect(top, bottom, rect.left, left),
        Rect(top, bottom, right, rect.right),
        Rect(bottom, rect.bottom, rect.left, rect.right),
    )
    return [piece for piece in pieces if piece.area]


def rounded(rects: Iterable[Rect], granularity: int, height: int, width: int) -> tuple[Rect, ...]:
    """Rectangles rounded outward to multiples of `granularity` pixels within height x width, and joined."""
    return join(
        Rect(
            r.top // granularity * granularity,
            min(height, -(-r.bottom // granularity) * granularity),
            r.left // granularity * granularity,
            min(width, -(-r.right // granularity) * granularity),
        )
        for r in rects
    )


def join(rects: Iterable[Rect], overhead: float = 0.0) -> tuple[Rect, ...]:
    """Disjoint rectangles that cover the same pixels. A rectangle costs its area and `overhead` pixels: two are
    replaced by their bounding box while that costs no more than both. What still overlaps is cut.

    Disjoint, because each is computed with tiles of its own: a pixel in two of them would get the rounding of
    whichever thread came last. The result depends on the set of rectangles only, not on their order; the time grows
    with the square of their number.
    """
    found = sorted(set(rects))
    if len(found) < 2:
        return tuple(found)
    kept: list[tuple[int, int, int, int, float]] = []  # sides and cost of rectangles of which no two can be replaced
    for rect in found:
        top, bottom, left, right = rect
        cost, i = rect.area + overhead, 0
        while i < len(kept):
            # Without calls: this loop takes most of the time of a plan for many holes.
            other_top, other_bottom, other_left, other_right, other_cost = kept[i]
            up = top if top < other_top else other_top
            down = bottom if bottom > other_bottom else other_bottom
            west = left if left < other_left else other_left
            east = right if right > other_right else other_right
            union_cost = (down - up) * (east - west) + overhead
            if union_cost <= cost + other_cost:
                kept[i] = kept[-1]
                kept.pop()
                top, bottom, left, right, cost, i = up, down, west, east, union_cost, 0
            else:
                i += 1
        kept.append((top, bottom, left, right, cost))
    apart: list[Rect] = []
    for rect in sorted((Rect(*sides) for *sides, _ in kept), key=lambda r: (-r.area, r)):
        pieces = [rect]
        for other in apart:
            if rect.meets(other):
                pieces = [left for piece in pieces for left in _without(piece, other)]
        apart += pieces
    return tuple(sorted(apart))
