"""Where the holes of a mask on a GPU are, found without making the host wait for the device's queue.

The mask is reduced to its cells of 32x32 pixels by one small reduction, and those are copied to the host behind it.
Where nothing else is queued on the stream, the answer is there after some microseconds, and waited for. Where work is
queued, waiting would leave the device without work afterwards: that run is told nothing, and a later one with the same
mask finds the answer.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .graphs import Recent, is_capturing
from .holes import label
from .regions import Rect, join

CELL = 32
"""Side of the cells, in pixels; rectangles are rounded outward to it."""
_MASKS_KEPT = 16


class _Search(NamedTuple):
    mask: weakref.ref[Tensor]
    cells: Tensor
    done: Any


class DeviceHoles:
    """Searches of recent masks. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches: Recent[_Search] = Recent(_MASKS_KEPT)

    def find(self, mask: Tensor) -> tuple[Rect, ...] | None:
        """Rectangles that contain every hole pixel of all samples; None where that is not known yet.

        Args:
            mask: [B, 1, H, W] on a GPU, H and W multiples of 32; not 0 = hole.
        """
        if is_capturing(mask.device):
            return None
        idle = _is_idle(mask.device)
        # an inference tensor counts no writes, so it may have another content the next time
        version = None if mask.is_inference() else mask._version
        with self._lock:
            key = (id(mask), version)
            known = version is not None and key in self._searches
            search = self._searches.get(key, lambda: _begin(mask))
            if search.mask() is not mask or version is None:
                search = search if not known and search.mask() is mask else _begin(mask)
                self._searches.put(key, search)
        if idle:
            search.done.synchronize()
        elif not search.done.query():
            return None
        return boxes(search.cells)


def boxes(cells: Tensor) -> tuple[Rect, ...]:
    """Rectangles in pixels around groups of hole cells, bool [H/32, W/32] on the CPU."""
    labels = label(cells.numpy())
    found: dict[int, Rect] = {}
    for y, x in zip(*labels.nonzero(), strict=True):
        own = Rect(int(y) * CELL, int(y + 1) * CELL, int(x) * CELL, int(x + 1) * CELL)
        group = int(labels[y, x])
        found[group] = found[group].union(own) if group in found else own
    return join(found.values())


def hole_cells(mask: Tensor) -> Tensor:
    """bool [H/32, W/32]: which cells hold a hole pixel of any sample."""
    blocks = mask.detach()[:, 0].unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL))
    return blocks.ne(0).any(dim=4).any(dim=2).any(dim=0)
