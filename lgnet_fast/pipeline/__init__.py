"""The pipeline from pictures and masks of any size and kind to filled pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .deep_colour import DeepImage
    from .inpainter import Inpainter
    from .results import Inpainted, Stages

# Not imported here: two threads whose first imports are of different modules of the package would each wait for what
# the other one holds, and Python would then give them modules that are not complete.
__getattr__, __dir__ = attach(
    __name__, {"DeepImage": "deep_colour", "Inpainted": "results", "Inpainter": "inpainter", "Stages": "results"}
)

__all__ = ["DeepImage", "Inpainted", "Inpainter", "Stages"]
