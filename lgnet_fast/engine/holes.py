"""The holes of a mask: groups of nearby hole pixels and their bounding boxes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from .regions import Rect

CELL = 16
"""Side in pixels of the cells that group hole pixels: neighbouring cells are one group, also across a corner."""


@dataclass(frozen=True)
class HoleGroups:
    """The groups of a hole bool [H, W].

    `labels` int32 [ceil(H/16), ceil(W/16)]: the group of each cell of 16x16 pixels, numbered from 1 in reading order,
    0 = no hole pixel; `boxes[k - 1]`: the bounding box of group k in pixels.
    """

    labels: np.ndarray
    boxes: tuple[Rect, ...]


def cell_ends(hole: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(cells, y, x, ends): which cells of a hole bool [H, W] have a hole pixel, bool [ceil(H/16), ceil(W/16)]; their
    places in reading order, int [n] each; top, bottom, left and right of the hole pixels in each, int [4, n]."""
    height, width = hole.shape
    columns = np.zeros((-(-height // CELL), width), dtype=bool)
    # One band of cells at a time: numpy's reduceat along the first axis would take a hundred times as long.
    for band in np.unique(np.flatnonzero(hole.any(axis=1)) // CELL):
        hole[band * CELL : (band + 1) * CELL].any(axis=0, out=columns[band])
    cells = np.logical_or.reduceat(columns, np.arange(0, width, CELL), axis=1)
    y, x = np.nonzero(cells)
    found = [_ends(hole, y[part], x[part]) for part in np.array_split(np.arange(len(y)), len(y) // 4096 + 1)]
    ends = np.concatenate(found, axis=1)
    return cells, y, x, np.minimum(ends, np.array([height, height, width, width])[:, None])


def group_holes(hole: np.ndarray) -> HoleGroups:
    """The 8-connected groups of the cells of a hole bool [H, W] that contain a hole pixel."""
    cells, _, _, (top, bottom, left, right) = cell_ends(hole)
    labels, count = ndimage.label(cells, structure=np.ones((3, 3)), output=np.int32)
    if not count:
        return HoleGroups(labels, ())
    groups = labels[cells]
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(1, count + 1))
    boxes = np.stack(
        [
            np.minimum.reduceat(top[order], starts),
            np.maximum.reduceat(bottom[order], starts),
            np.minimum.reduceat(left[order], starts),
            np.maximum.reduceat(right[order], starts),
        ],
        axis=1,
    )
    return HoleGroups(labels, tuple(Rect(*box) for box in boxes.tolist()))


def _ends(hole: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Top, bottom, left and right, int [4, n], of the hole pixels in each cell (y, x). Every cell must have some.

    In cells that extend past the picture, its last row and column count as repeated.
    """
    inside = np.arange(CELL)
    rows = np.minimum(y[:, None] * CELL + inside, hole.shape[0] - 1)
    columns = np.minimum(x[:, None] * CELL + inside, hole.shape[1] - 1)
    cells = hole[rows[:, :, None], columns[:, None, :]]
    by_row, by_column = cells.any(axis=2), cells.any(axis=1)
    return np.stack(
        [
            y * CELL + by_row.argmax(axis=1),
            (y + 1) * CELL - by_row[:, ::-1].argmax(axis=1),
            x * CELL + by_column.argmax(axis=1),
            (x + 1) * CELL - by_column[:, ::-1].argmax(axis=1),
        ]
    )


def bounding_box(hole: np.ndarray) -> Rect:
    """The smallest box that holds every True of a bool [H, W] with at least one."""
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    return Rect(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def disjoint_boxes(boxes: Iterable[Rect], shape: tuple[int, int]) -> list[Rect]:
    """Disjoint boxes, with sides on the grid of cells or on the border of a picture of `shape`, that cover `boxes`.

    Boxes that share a cell are joined, so no cell belongs to two boxes of the result.
    """
    found, before = list(boxes), -1
    while len(found) != before:
        before = len(found)
        cells = np.zeros((-(-shape[0] // CELL), -(-shape[1] // CELL)), dtype=bool)
        for box in found:
            cells[box.top // CELL : -(-box.bottom // CELL), box.left // CELL : -(-box.right // CELL)] = True
        found = [
            Rect(
                rows.start * CELL,
                min(rows.stop * CELL, shape[0]),
                columns.start * CELL,
                min(columns.stop * CELL, shape[1]),
            )
            for rows, columns in ndimage.find_objects(ndimage.label(cells)[0])
        ]
    return found


def check_holes(holes: Sequence[Rect], mask: Tensor) -> tuple[Rect, ...]:
    """Check `holes`: rectangles inside the picture that, for a `mask` [B, 1, H, W] on the CPU, cover its hole.

    The values of a mask on another device are not read, because that would wait for the device.

    Raises:
        TypeError, ValueError: the rectangles do not; the message names ``holes``.
    """
    height, width = mask.shape[2:]
    if not isinstance(holes, Sequence):
        raise TypeError(f"holes: expected a sequence of Rect(top, bottom, left, right), got {type(holes).__name__}")
    checked = []
    for number, hole in enumerate(holes):
        try:
            rect = Rect(*map(operator.index, hole))
        except TypeError as error:
            raise TypeError(
                f"holes: expected Rect(top, bottom, left, right) of four integers, got holes[{number}] = {hole!r}"
            ) from error
        if not (0 <= rect.top < rect.bottom <= height and 0 <= rect.left < rect.right <= width):
            raise ValueError(
                f"holes: expected 0 <= top < bottom <= {height} and 0 <= left < right <= {width}, "
                f"got holes[{number}] = {rect}"
            )
        checked.append(rect)
    if mask.device.type == "cpu":
        outside = (mask.detach() != 0).any(dim=0)[0]
        for rect in checked:
            outside[rect.top : rect.bottom, rect.left : rect.right] = False
        if outside.any():
            y, x = outside.nonzero()[0].tolist()
            raise ValueError(
                f"holes: expected rectangles that contain every hole pixel of the mask, got {int(outside.sum())} "
                f"outside them, the first at row {y}, column {x}"
            )
    return tuple(checked)
