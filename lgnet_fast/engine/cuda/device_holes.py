"""The holes of a mask on a GPU, found without making the host wait for the device's queue.

One small reduction reduces the mask to cells of 32x32 pixels, which are copied to the host. Where nothing else is
queued on the stream, the result arrives after some microseconds, and the host waits for it. Where work is queued,
waiting would leave the device idle afterwards: the run then does without the holes, and a later run with the same
mask uses the finished search.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ... import forks
from ...ops.torch_state import is_capturing
from ..recent import Recent
from ..regions import Rect, join

CELL = 32
"""Side of the cells, in pixels; rectangles are rounded outward to it."""
_MASKS_KEPT = 16


class _Search(NamedTuple):
    mask: weakref.ref[Tensor]
    cells: Tensor
    done: torch.cuda.Event


class DeviceHoles:
    """Searches of recent masks. Thread-safe."""

    def __init__(self) -> None:
        self._lock = forks.Lock()
        self._searches: Recent[_Search] = Recent(_MASKS_KEPT)

    def find(self, mask: Tensor) -> tuple[Rect, ...] | None:
        """Rectangles that contain every hole pixel of all samples; None where they are not known yet.

        Args:
            mask: [B, 1, H, W] on an NVIDIA GPU, H and W multiples of 32; not 0 = hole.
        """
        if is_capturing(mask.device):
            return None
        stream = torch.cuda.current_stream(mask.device)
        idle = stream.query()
        if mask.is_inference() and not idle:
            return None  # its writes are not counted, so a later run could not use the result
        search = _begin(mask, stream) if mask.is_inference() else self._known(mask, stream)
        if idle:
            search.done.synchronize()
        return boxes(search.cells) if search.done.query() else None

    def _known(self, mask: Tensor, stream: torch.cuda.Stream) -> _Search:
        key = (id(mask), mask._version)
        with self._lock:
            search = self._searches.get(key, lambda: _begin(mask, stream))
            if search.mask() is not mask:  # the id belonged to another tensor
                search = _begin(mask, stream)
                self._searches.put(key, search)
        return search


def _begin(mask: Tensor, stream: torch.cuda.Stream) -> _Search:
    with torch.cuda.device(mask.device), torch.inference_mode(False), torch.no_grad():
        cells = hole_cells(mask)
        host = torch.empty(cells.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        host.copy_(cells, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
    return _Search(weakref.ref(mask), host, done)


def hole_cells(mask: Tensor) -> Tensor:
    """bool [H/32, W/32]: which cells of a mask [B, 1, H, W] hold a hole pixel of any sample."""
    blocks = mask[:, 0].unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL))
    return torch.any(blocks, dim=(0, 2, 4))  # one launch


def boxes(cells: Tensor) -> tuple[Rect, ...]:
    """Rectangles in pixels around 8-connected groups of hole cells, bool [H/32, W/32] on the CPU."""
    return _boxes(cells.numpy().tobytes(), cells.shape[1])


@lru_cache(maxsize=1024)
def _boxes(cells: bytes, columns: int) -> tuple[Rect, ...]:
    grid = np.frombuffer(cells, dtype=bool).reshape(-1, columns)
    labels, _ = ndimage.label(grid, structure=np.ones((3, 3)))
    return join(
        Rect(rows.start * CELL, rows.stop * CELL, places.start * CELL, places.stop * CELL)
        for rows, places in ndimage.find_objects(labels)
    )
