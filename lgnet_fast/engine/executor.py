"""The interface between the engine and its executors, which run plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .plan import Plan
from .regions import Rect, rounded

Regions: TypeAlias = Sequence[tuple[Rect, ...]]
"""The rectangles that each step of a plan computes, in the order of the steps."""
Result: TypeAlias = tuple[Tensor, list[Tensor]]
"""The merged picture and the raw picture of every stage or of none, [B, 3, H, W] float32 each."""


class Executor(ABC):
    """Runs a plan of one batch and size. The defaults here are those of an executor without optional abilities.

    Attributes:
        granularity: rectangles of holes are rounded outward to multiples of this many pixels before regions are made.
        region_macs: what a region costs beside its outputs, in multiply-accumulates: for each sample where
            `per_sample`, else once for the batch.
        per_sample: whether :meth:`run_each` computes each sample in separate regions.
        restricts: whether regions save any work.
    """

    granularity = 1
    region_macs = 0.0
    per_sample = False
    restricts = True

    @classmethod
    def restricted(cls, plan: Plan, holes: Iterable[Rect]) -> Plan:
        """A dense plan restricted to what pixels inside `holes` depend on, in regions that suit this executor."""
        if cls.granularity > 1:
            holes = rounded(holes, cls.granularity, plan.height, plan.width)
        return plan.restricted(holes, cls._region_macs(plan))

    @classmethod
    def cost(cls, plan: Plan) -> float:
        """What a plan takes here, in multiply-accumulates; only ratios of costs mean anything."""
        return plan.cost(cls._region_macs(plan))

    @classmethod
    def _region_macs(cls, plan: Plan) -> float:
        return cls.region_macs * (plan.batch if cls.per_sample else 1)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the pictures and of the results."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""

    @abstractmethod
    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        """The merged picture and the raw picture of every stage.

        Args:
            image, mask: [B, 3, H, W] and [B, 1, H, W] of the plan's sizes.
            start: the initial picture in the hole, [B, 3, H, W]; None: white.
            regions: the rectangles of each step, for all samples alike; None: everywhere. Raw pictures are undefined
                outside the rectangles of the last step.
            stages: return the raw pictures; else the list of them is empty, and no memory is taken for them.
        """

    def run_each(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None,
        regions: Sequence[Regions | None],
        stages: bool = True,
    ) -> Result:
        """Like :meth:`run`, with regions for each sample. The default computes everything."""
        return self.run(image, mask, start, stages=stages)

    @abstractmethod
    def resized(self, plan: Plan) -> Executor:
        """An executor with the same weights for another batch or size."""

    @property
    def choices(self) -> Mapping[str, str]:
        """Step's name -> name of the kernel that runs it; empty where steps do not run one by one."""
        return {}

    @property
    def chosen_by(self) -> str:
        """How the kernels were chosen, in a few words."""
        return "rule"

    def step_times(
        self, image: Tensor, mask: Tensor, regions: Regions | None = None, rounds: int = 5
    ) -> list[float] | None:
        """Milliseconds of every step within a run, the least of `rounds` runs; None where steps cannot be timed."""
        return None

    @property
    def buffer_bytes(self) -> int:
        """Bytes that runs leave allocated for later ones; before the first run, what it will leave at least."""
        return 0

    @property
    def held_bytes(self) -> int:
        """Bytes of :attr:`buffer_bytes` that are allocated now."""
        return self.buffer_bytes

    def drop_buffers(self) -> None:  # noqa: B027
        """Free the buffers that runs have left; the next run allocates them anew. Other threads may be running."""

    def release(self) -> None:  # noqa: B027
        """Return unused memory to the system."""

    def state(self) -> Mapping[str, Any] | None:
        """State from which another process can build the executor without packing; None where it cannot be saved."""
        return None
