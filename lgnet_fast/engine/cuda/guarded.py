"""A checked executor that takes the next slower path where a launch raises."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ... import forks
from ...ops.torch_state import is_capturing, pass_on_out_of_memory
from ..executor import Executor, Regions, Result
from ..plan import Plan
from ..recent import Recent
from .executor import CudaExecutor
from .graph_executor import GraphExecutor
from .graphs import error_text
from .library_executor import LibraryExecutor
from .verdicts import TITLES

logger = logging.getLogger("lgnet_fast")

HOLES_KEPT = 256
"""Most sets of rounded holes that are kept for a shape."""


class Guarded(Executor):
    """A checked executor with fallbacks for launches of another shape or hole that raise: first the dense run, then
    launches without a graph, then all steps by PyTorch's operators (unless they run already). One WARNING each.

    Out-of-memory errors are passed on, because the caller can reduce the size. A new hole is first run densely,
    because those kernels are compiled already; kernels for its rectangles are compiled when the hole is used again.
    """

    granularity = CudaExecutor.granularity
    region_macs = CudaExecutor.region_macs

    def __init__(self, executor: GraphExecutor) -> None:
        self.executor, self._dense_only = executor, False
        self.restricts = executor.restricts
        self._lock = forks.Lock()
        self._holes: Recent[None] = Recent(HOLES_KEPT)

    @property
    def device(self) -> torch.device:
        return self.executor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.executor.dtype

    @property
    def choices(self) -> Mapping[str, str]:
        return self.executor.choices

    @property
    def chosen_by(self) -> str:
        return self.executor.chosen_by

    @property
    def buffer_bytes(self) -> int:
        return self.executor.buffer_bytes

    @property
    def held_bytes(self) -> int:
        return self.executor.held_bytes

    def drop_buffers(self) -> None:
        self.executor.drop_buffers()

    def step_times(self, image: Tensor, mask: Tensor, regions: Regions | None = None, rounds: int = 5) -> list[float]:
        return self.executor.step_times(image, mask, regions, rounds)

    def resized(self, plan: Plan) -> Guarded:
        return Guarded(self.executor.resized(plan))

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        if is_capturing(self.executor.device):
            return self.executor.run(image, mask, start, regions, stages)  # only the capture failed
        if not self.executor.restricts or (regions is not None and not self._came_before(regions)):
            regions = None
        while True:
            executor, where = self.executor, None if self._dense_only else regions
            try:
                return executor.run(image, mask, start, where, stages)
            except Exception as error:
                pass_on_out_of_memory(error)
                title = self._step_down(executor, where is not None)
                if title is None:
                    raise
                if title:
                    logger.warning("from now on %s at this size (%s)", title, error_text(error))

    def _came_before(self, regions: Regions) -> bool:
        holes = self.executor.holes_of(regions)
        with self._lock:
            known = holes in self._holes
            self._holes.get(holes, lambda: None)
        return known

    def _step_down(self, failed: GraphExecutor, restricted: bool) -> str | None:
        """Take the next path; return its name, "" where another thread took it already, None where there is none."""
        with self._lock:
            if restricted:
                known, self._dense_only = self._dense_only, True
                return "" if known else "everything is computed, not the hole alone,"
            if failed is not self.executor:
                return ""
            library = isinstance(failed, LibraryExecutor)
            if failed.uses_graphs:
                self.executor = failed.without_graphs()
            elif isinstance(failed, CudaExecutor) and not library:
                self.executor, library = LibraryExecutor.taking_over(failed), True
            else:
                return None
            return TITLES["library"] + " run" if library else TITLES["direct"] + " runs"
