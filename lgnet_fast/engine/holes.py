"""Where a mask's holes are: groups of nearby hole pixels and their bounding boxes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .regions import Rect, join

CELL = 16
"""Side of the cells that holes are grouped by: closer than one cell is one group, two cells apart never is."""


def cell_grid(hole: np.ndarray) -> np.ndarray:
    """bool [H, W] -> bool [ceil(H/16), ceil(W/16)]: which cells contain a hole pixel."""
    down = np.logical_or.reduceat(hole, np.arange(0, hole.shape[0], CELL), axis=0)
    return np.logical_or.reduceat(down, np.arange(0, hole.shape[1], CELL), axis=1)


def label(grid: np.ndarray) -> np.ndarray:
    """8-connected groups of a small bool grid, numbered from 1 in reading order; 0 = no hole."""
    labels = np.zeros(grid.shape, dtype=np.int32)
    count = 0
    for start in zip(*np.nonzero(grid), strict=True):
        if labels[start]:
            continue
        count += 1
        labels[start] = count
        pending = [start]
        while pending:
            y, x = pending.pop()
            for near_y in range(max(0, y - 1), min(grid.shape[0], y + 2)):
                for near_x in range(max(0, x - 1), min(grid.shape[1], x + 2)):
                    if grid[near_y, near_x] and not labels[near_y, near_x]:
                        labels[near_y, near_x] = count
                        pending.append((near_y, near_x))
    return labels


def group_boxes(hole: np.ndarray, labels: np.ndarray) -> dict[int, Rect]:
    """Each group's bounding box in pixels, for a hole bool [H, W] and the labels of its cells."""
    boxes: dict[int, Rect] = {}
    for y, x in zip(*np.nonzero(labels), strict=True):
        top, left = int(y) * CELL, int(x) * CELL
        cell = hole[top : top + CELL, left : left + CELL]
        rows, columns = np.flatnonzero(cell.any(axis=1)), np.flatnonzero(cell.any(axis=0))
        own = Rect(top + int(rows[0]), top + int(rows[-1]) + 1, left + int(columns[0]), left + int(columns[-1]) + 1)
        group = int(labels[y, x])
        boxes[group] = boxes[group].union(own) if group in boxes else own
    return boxes


def hole_boxes(mask: Tensor) -> tuple[Rect, ...]:
    """Bounding boxes of the holes of a mask [B, 1, H, W] on the CPU, of all samples together; none if it is empty."""
    hole = (mask != 0).any(dim=0)[0].numpy()
    return join(group_boxes(hole, label(cell_grid(hole))).values())


def check_holes(holes: Sequence[Rect], mask: Tensor) -> tuple[Rect, ...]:
    """`holes` as rectangles that lie inside the picture and, where `mask` [B, 1, H, W] is on the CPU, cover it.

    The values of a mask on another device are not read: that would wait for the device.

    Raises:
        TypeError, ValueError: they do not; the message names ``holes``.
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
