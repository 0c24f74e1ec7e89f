"""What `Inpainter.inpaint` and `Inpainter.stages` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inpainted:
    """One filled picture and how it was made.

    `picture`: of the kind of the input. `size`: (height, width). `hole_ratio`: share of hole pixels in the mask,
    before dilation. `strategy`: the one that ran, None for an empty mask. `passes`: number of network runs.
    """

    picture: Any
    size: tuple[int, int]
    hole_ratio: float
    strategy: str | None
    passes: int


@dataclass(frozen=True)
class Stages:
    """One picture after every stage of the network, each of the kind of the input.

    `masked`: the picture with a white hole, the input of the network. `merged`: the merged picture after every stage,
    in order (three for LGNet, fewer for ablations).
    """

    masked: Any
    merged: tuple[Any, ...]

    @property
    def coarse(self) -> Any:
        """After the first stage."""
        return self.merged[0]

    @property
    def local(self) -> Any | None:
        """After the local stage; None for networks of fewer than three stages."""
        return self.merged[1] if len(self.merged) > 2 else None

    @property
    def result(self) -> Any:
        """After the last stage: the result."""
        return self.merged[-1]
