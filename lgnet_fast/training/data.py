"""Names of the modules that hold the data of training."""

from .held_out import validation_pairs, validation_pictures
from .loader import PositionSampler, make_loader
from .samples import InpaintingDataset

__all__ = ["InpaintingDataset", "PositionSampler", "make_loader", "validation_pairs", "validation_pictures"]
