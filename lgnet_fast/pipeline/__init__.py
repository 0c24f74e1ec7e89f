"""Pictures in, pictures out: any size, any mask, whole folders."""

from __future__ import annotations

from .deep import DeepImage
from .inpainter import Inpainted, Inpainter, Stages

__all__ = ["DeepImage", "Inpainted", "Inpainter", "Stages"]
