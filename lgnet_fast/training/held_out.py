"""Held-out pictures for the validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.masks import generate_mask
from ..errors import DataError
from ..files import real_path
from ..pipeline.notices import warn
from .config import DataConfig
from .crops import PROTOCOLS, crop_box, decode, quiet, scale
from .samples import VALIDATION, network_range, reason_of
from .sources import Source, open_source


class HeldOut:
    """The held-out pictures of a place, kept in 8 bits: of a data set of tens of thousands, floats would not fit.

    Args:
        place, size, protocol: of the configuration.
        limit: use the first pictures only.

    Raises:
        DataError: no such place, or no picture in it that can be read. One that cannot is left out with a warning.
    """

    def __init__(self, place: str, size: int, protocol: str, limit: int | None) -> None:
        source = open_source([place], "data.validation")
        count = len(source) if limit is None else min(limit, len(source))
        self.numbers: list[int] = []
        """Of the pictures in the place."""
        self._levels: list[np.ndarray] = []
        reasons = []
        for index in range(count):
            try:
                with quiet():
                    picture = decode(source.picture(index))
            except Exception as error:  # as in InpaintingDataset
                reasons.append(f"{source.name(index)}: {reason_of(error)}")
                continue
            box = crop_box(picture.shape[0], picture.shape[1], size, PROTOCOLS[protocol], None)
            levels = scale(picture, box, size, Image.Resampling.BICUBIC).transpose(2, 0, 1)
            self.numbers.append(index)
            self._levels.append(np.ascontiguousarray(levels))
        if not self.numbers:
            raise DataError(
                f"data.validation: none of {count} pictures in {place!r} can be read; the first: {reasons[0]}"
            )
        for reason in reasons:
            warn(f"data.validation: left out {reason}")

    def __len__(self) -> int:
        return len(self.numbers)

    def images(self, some: slice) -> Tensor:
        """Centre crops [B, 3, S, S] in [-1, 1]."""
        return network_range(np.stack(self._levels[some]))


class HeldOutPairs:
    """Held-out pictures, each with one stroke mask of every class: ([1, 3, S, S] in [-1, 1], [1, 1, S, S]).

    Masks are drawn by (seed, number of the picture, class) at each access.
    """

    def __init__(self, pictures: HeldOut, hole_classes: Sequence[int], seed: int) -> None:
        self._pictures, self._classes, self._seed = pictures, hole_classes, seed

    def __len__(self) -> int:
        return len(self._pictures) * len(self._classes)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        place, which = divmod(range(len(self))[number], len(self._classes))  # IndexError ends an iteration
        image, hole_class = self._pictures.images(slice(place, place + 1)), self._classes[which]
        seed = (VALIDATION, self._seed, self._pictures.numbers[place], hole_class)
        mask = generate_mask(*image.shape[2:], hole_class=hole_class, kind="strokes", seed=seed)
        return image, torch.from_numpy(mask)[None, None].float()


def warn_of_trained(data: DataConfig, trained: Source) -> None:
    """Warn where the held-out pictures lie in a folder that is trained on: their scores would be those of pictures
    that the network has seen. Nothing is said of one place that is named for both."""
    if data.validation is None:
        return
    held = real_path(data.validation)
    for place in data.pictures:
        whole = real_path(place)
        if whole not in held.parents:
            continue
        inside = str(Path(place) / held.relative_to(whole))
        starts = (f"{inside}/", f"{inside}{os.sep}")  # members of shards have a slash on every system
        count = sum(trained.name(i).startswith(starts) for i in range(len(trained)))
        if count:
            warn(
                f"data.validation: {count} of the pictures in {data.validation!r} are trained on too, as part of "
                f"{place!r}; leave them out by data.exclude, or name folders beside each other"
            )
