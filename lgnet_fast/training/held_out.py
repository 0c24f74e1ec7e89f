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
from ..pipeline.notices import warn
from .config import DataConfig
from .crops import PROTOCOLS, crop_box, decode, quiet, scale
from .samples import VALIDATION, network_range, reason_of
from .sources import Source, open_source


def validation_pairs(
    place: str,
    size: int,
    hole_classes: Sequence[int],
    seed: int,
    protocol: str = "photos",
    limit: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The pictures of a place with one stroke mask of every class: ([1, 3, S, S] in [-1, 1], [1, 1, S, S]) each.

    Drawn masks by (seed, index, class), pictures as of :func:`validation_pictures`.

    Raises:
        DataError: see there.
    """
    pairs = []
    for index, image in validation_pictures(place, size, protocol, limit):
        for hole_class in hole_classes:
            mask = generate_mask(
                size, size, hole_class=hole_class, kind="strokes", seed=(VALIDATION, seed, index, hole_class)
            )
            pairs.append((image, torch.from_numpy(mask)[None, None].float()))
    return pairs


def validation_pictures(place: str, size: int, protocol: str, limit: int | None) -> list[tuple[int, Tensor]]:
    """(number, centre crop [1, 3, S, S] in [-1, 1]) of the pictures of a place, of the first `limit` only.

    A picture that cannot be read is left out with a warning.

    Raises:
        DataError: no such place, or no picture in it that can be read.
    """
    source = open_source([place], "data.validation")
    count = len(source) if limit is None else min(limit, len(source))
    pictures, reasons = [], []
    for index in range(count):
        try:
            with quiet():
                picture = decode(source.picture(index))
        except Exception as error:  # as in InpaintingDataset
            reasons.append(f"{source.name(index)}: {reason_of(error)}")
            continue
        box = crop_box(picture.shape[0], picture.shape[1], size, PROTOCOLS[protocol], None)
        image = scale(picture, box, size, Image.Resampling.BICUBIC).transpose(2, 0, 1)
        pictures.append((index, network_range(np.ascontiguousarray(image))[None]))
    if not pictures:
        raise DataError(
            f"data.validation: none of {count} pictures in {place!r} can be read; the first: {reasons[0]}"
        )
    for reason in reasons:
        warn(f"data.validation: left out {reason}")
    return pictures


def warn_of_trained(data: DataConfig, trained: Source) -> None:
    """Warn where the held-out pictures lie in a folder that is trained on: their scores would be those of pictures
    that the network has seen. Nothing is said of one place that is named for both."""
    if data.validation is None:
        return
    held = Path(data.validation).resolve()
    for place in data.pictures:
        whole = Path(place).resolve()
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
