"""Holes for training and evaluation: drawn ones, and the folders of masks that the field uses.

The public names of the modules that hold them. A mask is a bool array [H, W], True = hole.
"""

from __future__ import annotations

from .drawn import KINDS, generate_mask
from .mask_files import POLARITIES, MaskFolder, hole_levels, reaches_border, read_mask, resize_mask
from .ratios import HOLE_CLASSES, hole_class, hole_ratio
from .strokes import Seed
from .suite import SUITE_KINDS, suite_mask
from .varied import FREE_KINDS, fine_mask, varied_mask

__all__ = [
    "FREE_KINDS",
    "HOLE_CLASSES",
    "KINDS",
    "POLARITIES",
    "SUITE_KINDS",
    "MaskFolder",
    "Seed",
    "fine_mask",
    "generate_mask",
    "hole_class",
    "hole_levels",
    "hole_ratio",
    "reaches_border",
    "read_mask",
    "resize_mask",
    "suite_mask",
    "varied_mask",
]
