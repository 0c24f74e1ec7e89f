"""Holes for training: drawn, from a folder of masks, or those that come with the pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.masks import FREE_KINDS, MaskFolder, generate_mask, hole_levels, resize_mask
from ..data.shards import Member
from ..errors import DataError, InvalidMaskError
from .config import DataConfig
from .sources import Source

MASKS = ("generated", "paired")
"""Values of `data.masks` other than a folder: drawn strokes and boxes, or the masks of a tar shard."""

MOST_BROKEN = 1000
"""Number of files tried, one after the other, in place of one that cannot be read."""

Broken = list[tuple[str, str]]
"""(name, reason) of each file that cannot be read."""


class HoleSource:
    """Holes of the configured kind, for the pictures of a source.

    Raises:
        DataError: no folder of masks, or a picture without a mask where they come with the pictures.
    """

    def __init__(self, data: DataConfig, source: Source) -> None:
        self.kind, self.classes, self.polarity = data.mask_kind, data.hole_classes, data.mask_polarity
        self.paired = data.masks == "paired"
        try:
            self.folder = None if data.masks in MASKS else MaskFolder(data.masks, polarity=data.mask_polarity)
        except DataError as error:
            raise DataError(f"data.{error}") from error
        without = [i for i in range(len(source)) if source.mask(i) is None] if self.paired else []
        if without:
            raise DataError(
                "data.masks: expected <key>.mask.<extension> beside each <key>.<extension> in tar shards, got none "
                f"for {len(without)} of {len(source)} pictures, the first {source.name(without[0])}"
            )

    def read(self, file: Member, size: tuple[int, ...]) -> np.ndarray:
        """The mask in a file, bool [H, W] of its picture's `size`.

        Raises:
            InvalidMaskError: it cannot be read, or is of another size.
        """
        mask = hole_levels(file.open(InvalidMaskError, "mask"), self.polarity)
        if mask.shape != size:
            raise InvalidMaskError(f"mask: expected the picture's size {size}, got {mask.shape}")
        return mask

    def draw(self, size: int, seed: Sequence[int], broken: Broken) -> np.ndarray:
        """A random mask, bool [size, size], with a hole.

        Of a folder whose file cannot be read or has no hole, the next one, because the picture is not at fault;
        `broken` receives each of these files.

        Raises:
            DataError: no file of the folder can be used.
        """
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        if self.folder is None and self.kind in FREE_KINDS:
            return FREE_KINDS[self.kind](size, size, seed=(*seed, 1))
        if self.folder is None:
            return generate_mask(
                size, size, hole_class=int(rng.choice(self.classes)), kind=self.kind, seed=(*seed, 1)
            )
        first, turns, mirrored = int(rng.integers(len(self.folder))), int(rng.integers(4)), bool(rng.integers(2))
        for number in range(first, first + min(len(self.folder), MOST_BROKEN)):
            file = number % len(self.folder)
            try:
                mask = self.folder[file]
            except InvalidMaskError as error:
                broken.append((str(self.folder.files[file]), " ".join(str(error).split())))
                continue
            # The eight symmetries: simple operations that keep the hole ratio.
            mask = np.rot90(mask, turns)
            mask = resize_mask(mask[:, ::-1] if mirrored else mask, size, size)
            if mask.any():
                return mask
            name = str(self.folder.files[file])
            broken.append((name, f"mask {name!r}: no hole pixel at {size}x{size}"))
        raise DataError(f"data.masks: none of {len(broken)} masks in a row can be used; the first: {broken[0][1]}")
