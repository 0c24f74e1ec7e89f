"""Covering a hole with few rectangles: its bounding box is cut repeatedly, where that leaves less to compute.

Cuts follow the grid of cells of 16x16 pixels, and each part shrinks to the bounding box of its hole pixels. The part
that loses the most area is cut first, until there are :data:`MOST_RECTS` parts or no cut is useful. Then a cut is
undone if it and the cuts of its halves together save no more than :data:`PIXELS_PER_RECT` pixels for each rectangle
that they add. So a frame around a picture becomes four rectangles, although its first cuts save nothing. The time
does not depend on the number of holes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .holes import CELL, cell_ends
from .regions import Rect

MOST_RECTS = 16
"""Rectangles of a cover, at most: the time to plan a run, and the cuts where their cones overlap, grow with them."""
PIXELS_PER_RECT = 300
"""Fixed cost of a rectangle beside its area, in pixels. With 100, strokes and blobs would get a third more rectangles
for 0.1 % fewer multiplications; with 1000 they would take 1 % more."""
_NOTHING = 1 << 40


@dataclass
class _Part:
    box: Rect
    cost: int
    halves: tuple[_Part, _Part] | None = None


def cover(hole: np.ndarray) -> tuple[Rect, ...]:
    """At most :data:`MOST_RECTS` disjoint rectangles that contain every True of a bool [H, W], in reading order."""
    ends = _grid(hole)
    if ends is None:
        return ()
    areas = np.where(ends[0] < _NOTHING, (ends[0] + ends[1]) * (ends[2] + ends[3]), 0)
    waiting: list[tuple[int, int, _Part, tuple[Rect, Rect]]] = []
    parts: list[_Part] = []

    def add(box: Rect) -> _Part:
        part = _Part(box, box.area + PIXELS_PER_RECT)
        parts.append(part)
        cells = np.s_[box.top // CELL : -(-box.bottom // CELL), box.left // CELL : -(-box.right // CELL)]
        # whatever the cuts, at least the cells' own boxes are left
        if box.area - int(areas[cells].sum()) > PIXELS_PER_RECT:
            halves = _best_halves(ends[:, cells[0], cells[1]], areas[cells])
            left = halves[0].area + halves[1].area
            heapq.heappush(waiting, (left - box.area, len(parts), part, halves))
        return part

    whole = add(_box(ends.min(axis=(1, 2))))
    for _ in range(MOST_RECTS - 1):
        if not waiting:
            break
        *_, part, halves = heapq.heappop(waiting)
        part.halves = add(halves[0]), add(halves[1])
    for part in reversed(parts):  # both halves of a part come before it
        if part.halves is not None:
            cost = part.halves[0].cost + part.halves[1].cost
            if cost < part.cost:
                part.cost = cost
            else:
                part.halves = None
    found, todo = [], [whole]
    while todo:
        part = todo.pop()
        if part.halves is None:
            found.append(part.box)
        else:
            todo += part.halves
    return tuple(sorted(found))


def hole_boxes(mask: Tensor) -> tuple[Rect, ...]:
    """The cover of the holes of a mask [B, 1, H, W] on the CPU, for all samples together; none without holes."""
    return cover((mask != 0).any(dim=0)[0].numpy())


def fewer(rects: Iterable[Rect], size: tuple[int, int]) -> tuple[Rect, ...]:
    """The rectangles, or where they are more than :data:`MOST_RECTS` a cover of them.

    Args:
        rects: inside a picture of `size` (height, width).
        size: of the picture.
    """
    rects = tuple(rects)
    if len(rects) <= MOST_RECTS:
        return rects
    hole = np.zeros(size, dtype=bool)
    for rect in rects:
        hole[rect.slices] = True
    return cover(hole)


def _grid(hole: np.ndarray) -> np.ndarray | None:
    """(top, -bottom, left, -right) of the hole pixels in each cell, int [4, cells down, cells across]; a large number
    where a cell has none, so that the least of several cells is their bounding box. None without hole pixels."""
    cells, y, x, ends = cell_ends(hole)
    if not len(y):
        return None
    grid = np.full((4, *cells.shape), _NOTHING)
    grid[:, y, x] = ends
    grid[1::2, y, x] *= -1
    return grid


def _box(ends: np.ndarray) -> Rect:
    top, bottom, left, right = ends.tolist()
    return Rect(top, -bottom, left, -right)


def _best_halves(ends: np.ndarray, areas: np.ndarray) -> tuple[Rect, Rect]:
    """The boxes before and after the line between rows or columns of cells that leaves the least area; of several
    such lines, the one with the half that has least outside its cells' own boxes, which need not be cut again.

    Args:
        ends: of cells as :func:`_grid` gives them; the outer rows and columns are not empty.
        areas: of the cells' own boxes.
    """
    best: tuple[int, int, Rect, Rect] | None = None
    for axis in (1, 0):
        lines = ends.min(axis=axis + 1)
        if lines.shape[1] < 2:
            continue
        before = np.minimum.accumulate(lines, axis=1)[:, :-1]
        after = np.minimum.accumulate(lines[:, ::-1], axis=1)[:, -2::-1]
        own = areas.sum(axis=axis).cumsum()
        left_before = (before[0] + before[1]) * (before[2] + before[3])
        left_after = (after[0] + after[1]) * (after[2] + after[3])
        left = left_before + left_after
        outside = np.minimum(left_before - own[:-1], left_after - (own[-1] - own[:-1]))
        cut = int(np.where(left == left.min(), outside, _NOTHING).argmin())
        score = int(left[cut]), int(outside[cut])
        if best is None or score < best[:2]:
            best = *score, _box(before[:, cut]), _box(after[:, cut])
    assert best is not None  # a single cell is its own box
    return best[2:]
