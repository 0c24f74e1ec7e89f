"""How a picture becomes the square that the network sees."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from ..pipeline.pictures import picture_of

PROTOCOLS: dict[str, float | None] = {
    "photos": 2.0,
    "celeba_hq": None,
    "places2": None,
    "paris_streetview": 1.0,
    "logo_removal": 1.0,
    "text_removal": 1.0,
}
"""Name -> None: the whole picture is scaled to size x size; a number m: the shorter edge is scaled to `size` (in
training to a random length between that and m times that, at most its own), then a square is cropped, at random in
training and from the centre in validation."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, which would come for frames and metadata of a picture in every epoch and worker.

    Not thread-safe: around a pool of threads, not in them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(picture: Image.Image) -> np.ndarray:
    """A picture, upright and without alpha, as uint8 [H, W, 3]. Raises InvalidImageError: it cannot be decoded."""
    read = picture_of(picture)
    levels = read.samples
    if levels.dtype != np.uint8:
        levels = np.rint(levels.astype(np.float64) * (255 / read.white)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels, (*read.size, 3)))


def crop_box(
    height: int, width: int, size: int, largest: float | None, rng: np.random.Generator | None
) -> tuple[float, float, float, float]:
    """The crop of a picture (left, top, right, bottom, in pixels of the picture) that is scaled to size x size.

    Args:
        height, width: of the picture.
        size: of the result.
        largest: of :data:`PROTOCOLS`.
        rng: for scale and place; None: the shorter edge at `size`, the centre.
    """
    if largest is None:
        return 0.0, 0.0, float(width), float(height)
    shorter = min(height, width)
    edge = size
    if rng is not None:
        # Never enlarged, unless the picture is smaller than the result.
        edge = int(rng.integers(size, max(size, min(round(size * largest), shorter)) + 1))
    factor = shorter / edge
    across, down = round(width / factor) - size, round(height / factor) - size
    x, y = (across // 2, down // 2) if rng is None else (int(rng.integers(across + 1)), int(rng.integers(down + 1)))
    side = size * factor
    left, top = max(0.0, min(x * factor, width - side)), max(0.0, min(y * factor, height - side))
    return left, top, min(left + side, float(width)), min(top + side, float(height))


def scale(
    picture: np.ndarray, box: tuple[float, float, float, float], size: int, how: Image.Resampling
) -> np.ndarray:
    """The box of a picture [H, W] or [H, W, 3], scaled to `size`."""
    if picture.shape[:2] == (size, size) and box == (0, 0, size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), how, box=box))
