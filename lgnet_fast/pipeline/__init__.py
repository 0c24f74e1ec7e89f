"""The pipeline from pictures and masks of any size and kind to filled pictures."""

from __future__ import annotations

from .deep import DeepImage
from .inpainter import Inpainter
from .results import Inpainted, Stages

__all__ = ["DeepImage", "Inpainted", "Inpainter", "Stages"]
