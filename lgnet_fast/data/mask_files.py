"""Masks in picture files, and folders of them as the field publishes them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InvalidMaskError
from ..pipeline.masks import read_hole
from ..pipeline.reading import open_upright, upright
from .folders import all_below
from .ratios import class_of, hole_ratio

POLARITIES = ("white", "black")
"""The levels that are hole: those above a half of the scale, or the others."""

_LIU_COUNT, _LIU_PER_CLASS = 12_000, 2_000


class MaskFolder:
    """Masks from picture files: folder by folder, in each by the last number in the file's name.

    Layouts that are recognised by themselves:

    * Liu et al.'s 12,000 test masks (``00000.png`` to ``11999.png``): 2,000 for each of :data:`HOLE_CLASSES` in
      order, half of them with holes that reach the border, half with none near it; see :meth:`liu_group`.
    * QD-IMD (Iskakov's Quick Draw irregular masks: ``train/``, ``test/`` of numbered files) and any other folder of
      pictures, searched with its sub-folders.

    Classes follow the measured hole ratio, not the file's name.

    Args:
        folder: where the masks are.
        polarity: "white" = levels above a half are hole; "black" = the others.

    Raises:
        ValueError: no such polarity.
        DataError: no such folder, or no picture in it.
        InvalidMaskError: at access, a file that cannot be read; it names the file.
    """

    def __init__(self, folder: str | Path, *, polarity: str = "white") -> None:
        if polarity not in POLARITIES:
            raise ValueError(f"polarity: expected one of {POLARITIES}, got {polarity!r}")
        self.folder, self.polarity = Path(folder), polarity
        files = all_below(folder, "masks: expected a folder of mask pictures")
        self.files = sorted(files, key=lambda p: (p.parent.as_posix(), _number(p.stem), p.name))
        self._ratios: list[float] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        """Mask `index` at its own size: bool [h, w], True = hole."""
        return read_mask(self.files[index], self.polarity)

    def mask(self, index: int, height: int, width: int) -> np.ndarray:
        """Mask `index` scaled to bool [height, width] (nearest neighbour, as the field's evaluations do)."""
        return resize_mask(self[index], height, width)

    @property
    def is_liu(self) -> bool:
        """Whether this is the numbered set of 12,000."""
        return len(self) == _LIU_COUNT and all(_number(f.stem) == i for i, f in enumerate(self.files))

    def liu_group(self, index: int) -> tuple[int, bool]:
        """(class by Liu et al.'s numbering, whether the hole reaches the border, as measured) of mask `index`."""
        if not self.is_liu:
            raise ValueError(f"folder: expected 12,000 files numbered from 0, got {len(self)} files in {self.folder}")
        return index // _LIU_PER_CLASS, reaches_border(self[index])

    def ratios(self) -> list[float]:
        """The measured hole ratio of every mask; read once, with threads."""
        if self._ratios is None:
            with ThreadPoolExecutor() as pool:
                self._ratios = list(pool.map(lambda i: hole_ratio(self[i]), range(len(self))))
        return self._ratios

    def indices(self, hole_class: int | None) -> list[int]:
        """The masks whose measured ratio lies in the class; None: those that lie in none."""
        return [i for i, ratio in enumerate(self.ratios()) if class_of(ratio) == hole_class]


def reaches_border(mask: np.ndarray) -> bool:
    """Whether any pixel of the outermost rows and columns is hole."""
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def read_mask(path: str | Path, polarity: str = "white") -> np.ndarray:
    """A mask file as bool [h, w], True = hole; see :func:`hole_levels`. Raises InvalidMaskError, which names it."""
    return _hole_of(open_upright(Path(path), InvalidMaskError, "mask")[0], polarity)


def hole_levels(picture: Image.Image, polarity: str = "white") -> np.ndarray:
    """A mask picture, turned upright, as bool [h, w], True = hole: luma times alpha above a half of the scale.

    A mask whose levels are 0 and 1 is bool. Raises InvalidMaskError: it cannot be decoded.
    """
    return _hole_of(upright(picture, InvalidMaskError, "mask")[0], polarity)


def _hole_of(picture: Image.Image, polarity: str) -> np.ndarray:
    return read_hole(picture, picture.height, picture.width, channel="luma", invert=polarity == "black")


def resize_mask(
    mask: np.ndarray, height: int, width: int, part: tuple[slice, slice] = (slice(None), slice(None))
) -> np.ndarray:
    """`mask` sampled at the centres of height x width cells (nearest neighbour); `part`: only these rows, columns."""
    if mask.shape == (height, width):
        return mask[part]
    rows = (2 * np.arange(height)[part[0]] + 1) * mask.shape[0] // (2 * height)
    columns = (2 * np.arange(width)[part[1]] + 1) * mask.shape[1] // (2 * width)
    resized: np.ndarray = mask[rows[:, None], columns]
    return resized


def _number(stem: str) -> int:
    """The last number in a name, so that 2.png comes before 10.png; names without one come first."""
    found = re.findall(r"\d+", stem)
    return int(found[-1]) if found else -1
