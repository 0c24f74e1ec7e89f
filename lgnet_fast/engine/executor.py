"""What can run a plan, and what each kind of it can do: the interface between the engine and its executors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .plan import Plan
from .regions import Rect

Regions: TypeAlias = Sequence[tuple[Rect, ...]]
"""The rectangles that each step of a plan computes, in the order of the steps."""
Result: TypeAlias = tuple[Tensor, list[Tensor]]
"""The merged picture and every stage's raw picture, [B, 3, H, W] float32 each."""


class Executor(ABC):
    """Runs a plan of one batch and size. What an executor cannot do, it inherits from here: an honest "no".

    Attributes:
        granularity: rectangles of holes are rounded outward to multiples of this many pixels before regions are made.
        per_sample: whether :meth:`run_each` computes each sample in regions of its own.
        restricts: whether regions save anything at all.
    """

    granularity = 1
    per_sample = False
    restricts = True

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where pictures come from and results go."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @abstractmethod
    def run(self, image: Tensor, mask: Tensor, start: Tensor | None = None, regions: Regions | None = None) -> Result:
        """The merged picture and the stages' raw ones.

        Args:
            image, mask: [B, 3, H, W] and [B, 1, H, W] of the plan's sizes.
            start: painted into the hole at first, [B, 3, H, W]; None: white.
            regions: each step's rectangles, of all samples alike; None: everywhere. Raw pictures hold anything
                outside the last step's rectangles.
        """

    def run_each(
        self, image: Tensor, mask: Tensor, start: Tensor | None, regions: Sequence[Regions | None]
    ) -> Result:
        """Like :meth:`run`, with regions for each sample; here everything is computed."""
        return self.run(image, mask, start)

    @abstractmethod
    def resized(self, plan: Plan) -> Executor:
        """An executor of the same weights for another batch or size."""

    @property
    def choices(self) -> Mapping[str, str]:
        """Step's name -> name of the kernel that runs it; empty where steps do not run one by one."""
        return {}

    @property
    def chosen_by(self) -> str:
        """What the choices follow, in a few words."""
        return "rule"

    def step_times(
        self, image: Tensor, mask: Tensor, regions: Regions | None = None, rounds: int = 5
    ) -> list[float] | None:
        """Milliseconds of every step in place, the least of `rounds` runs; None where steps cannot be timed."""
        return None

    def release(self) -> None:  # noqa: B027
        """Give memory that nobody uses any more back to the system, where there may be some."""

    def state(self) -> Mapping[str, Any] | None:
        """What a later process needs to go on without packing; None where that cannot be kept."""
        return None
