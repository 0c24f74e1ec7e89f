"""What `Inpainter.inpaint` and `Inpainter.stages` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inpainted:
    """One filled picture and how it was made.

    `picture`: of the kind of the input: for an array one of its shape and dtype, for a file a PIL picture, or a
    DeepImage for 16-bit colour. `size`: (height, width) in pixels. `hole_ratio`: share of hole pixels in the mask, in
    [0, 1], before dilation. `strategy`: the one that ran, None for an empty mask. `passes`: number of windows on
    which the network has run, 0 for an empty mask.
    """

    picture: Any
    size: tuple[int, int]
    hole_ratio: float
    strategy: str | None
    passes: int


@dataclass(frozen=True)
class Stages:
    """One picture after every stage of the network, each of the kind and size of the input, as in `Inpainted`.

    `masked`: the picture with a white hole, the input of the network. `merged`: the merged picture after every stage,
    in order (three for LGNet, one or two for some ablations).
    """

    masked: Any
    merged: tuple[Any, ...]

    @property
    def coarse(self) -> Any:
        """After the first stage."""
        return self.merged[0]

    @property
    def local(self) -> Any | None:
        """After the second of three stages, LGNet's local one.

        None for a network of fewer stages, also where its second one is local ("C+L"): that picture is `result`.
        """
        return self.merged[1] if len(self.merged) > 2 else None

    @property
    def result(self) -> Any:
        """After the last stage: the result."""
        return self.merged[-1]
