"""Pictures in, pictures out: any size, any mask, whole folders."""

from __future__ import annotations

from .inpainter import Inpainted, Inpainter, Stages

__all__ = ["Inpainted", "Inpainter", "Stages"]
