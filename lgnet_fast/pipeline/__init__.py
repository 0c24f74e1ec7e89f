"""The pipeline from pictures and masks of any size and kind to filled pictures."""

from __future__ import annotations

from .deep import DeepImage
from .inpainter import Inpainted, Inpainter, Stages

__all__ = ["DeepImage", "Inpainted", "Inpainter", "Stages"]
