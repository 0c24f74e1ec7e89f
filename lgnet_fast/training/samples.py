"""Pictures with holes by position, independent of the number of readers.

A sample depends on (seed, epoch, index) alone, not on the number of workers or processes, nor on the step at which
training was resumed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, DataError
from .config import DataConfig
from .crops import PROTOCOLS, crop_box, decode, quiet, scale
from .holes import MOST_BROKEN, Broken, HoleSource
from .sources import PLACES, open_source

ORDER, CROP, MASK, VALIDATION, BATCH, BANK, KINDS, COLOUR = range(1, 9)
"""Streams of random numbers that must not coincide; each is the first word of a seed of fixed length."""

# With at most _FEW pictures, each worker keeps decoded ones, up to _CACHE_BYTES.
_FEW, _CACHE_BYTES = 500, 200_000_000


class Sample(NamedTuple):
    """`image` float32 [3, S, S] in [-1, 1]; `mask` float32 [1, S, S], 1 = hole; `name` of the picture; `broken`:
    (name, reason) of each unreadable file that this one replaces."""

    image: Tensor
    mask: Tensor
    name: str
    broken: Broken


class InpaintingDataset(Dataset[Sample]):
    """Pictures with holes by position: position p is picture ``p % len`` in the order of epoch ``p // len``.

    Args:
        data: of the configuration.
        seed: determines order, crop, mirroring, colours and mask, together with epoch and index.

    Raises:
        DataError: no pictures, no masks. ConfigError: a category list that cannot be read.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        if not data.pictures:
            raise DataError(f"data.pictures: {PLACES}, got none")
        self.data, self.seed, self.largest = data, seed, PROTOCOLS[data.protocol]
        self.source = open_source(data.pictures, "data.pictures", data.categories).without(data.exclude)
        self.masks = HoleSource(data, self.source)
        self._orders: dict[int, np.ndarray] = {}
        self._cache: dict[int, np.ndarray] = {}
        self._room = _CACHE_BYTES if len(self.source) <= _FEW else 0

    def __len__(self) -> int:
        return len(self.source)

    def order(self, epoch: int) -> np.ndarray:
        """The pictures of an epoch in its order."""
        if epoch not in self._orders:
            rng = np.random.default_rng(np.random.SeedSequence((ORDER, self.seed, epoch)))
            self._orders = {epoch: rng.permutation(len(self))}  # only the latest is kept, because orders may be long
        return self._orders[epoch]

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self))
        index = int(self.order(epoch)[place])
        broken: Broken = []
        tried = index
        for _ in range(min(len(self), MOST_BROKEN)):
            name = self.source.name(tried)
            try:
                levels, mask = self._sample(epoch, index, tried, broken)
                return Sample(self._coloured(levels, epoch, index), torch.from_numpy(mask).float(), name, broken)
            except (DataError, ConfigError):
                raise
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on bad data
                broken.append((name, reason_of(error)))
            tried = (tried + 1) % len(self)
        raise DataError(
            f"data.pictures: none of {len(broken)} in a row can be read; the first: {': '.join(broken[0])}"
        )

    def _sample(self, epoch: int, index: int, tried: int, broken: Broken) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [3, S, S] and bool [1, S, S]; `broken` as in :meth:`HoleSource.draw`."""
        rng = np.random.default_rng(np.random.SeedSequence((CROP, self.seed, epoch, index)))
        size = self.data.size
        picture = self._decoded(tried)
        box = crop_box(picture.shape[0], picture.shape[1], size, self.largest, rng)
        flip = bool(rng.integers(2))
        image = scale(picture, box, size, Image.Resampling.BICUBIC)
        own = self.source.mask(tried) if self.masks.paired else None
        if own is not None:
            mask = self.masks.read(own, picture.shape[:2])
            mask = scale(mask.astype(np.uint8) * 255, box, size, Image.Resampling.BOX) > 127
        else:
            mask = self.masks.draw(size, (MASK, self.seed, epoch, index), broken)
        if flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return np.ascontiguousarray(image.transpose(2, 0, 1)), np.ascontiguousarray(mask[None])

    def _coloured(self, levels: np.ndarray, epoch: int, index: int) -> Tensor:
        """uint8 [3, S, S] as float32 in [-1, 1], with its colours changed by ``data.colour``."""
        image = network_range(levels)
        if not self.data.colour:
            return image
        rng = np.random.default_rng(np.random.SeedSequence((COLOUR, self.seed, epoch, index)))
        return move_colours(image[None], rng, self.data.colour)[0]

    def _decoded(self, index: int) -> np.ndarray:
        """Picture `index`, upright, uint8 [H, W, 3]."""
        if index in self._cache:
            return self._cache[index]
        with quiet():
            picture = self.source.picture(index)
            if not self.masks.paired:
                # A JPEG is decoded at a fraction of its size if that is still twice the needed size.
                wanted = round(2 * self.data.size * (self.largest or 1))
                picture.draft(None, (wanted, wanted))
            levels = decode(picture)
        if levels.nbytes <= self._room:
            self._cache[index] = levels
            self._room -= levels.nbytes
        return levels


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def network_range(levels: np.ndarray) -> Tensor:
    """Levels of 0 to 255 as float32 in [-1, 1]."""
    return torch.from_numpy(levels).float().div_(127.5).sub_(1)


def move_colours(image: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] with gain of each channel, contrast, brightness and saturation changed at
    random by up to `strength`."""
    moved = rng.uniform(-strength, strength, size=(len(image), 6)).astype(np.float32)
    factors = torch.from_numpy(moved).to(image.device, non_blocking=True)[:, :, None, None]
    gain, saturation, brightness = 1 + factors[:, :3] / 2, 1 + factors[:, 3:4], factors[:, 4:5] / 2
    contrast = 1 + factors[:, 5:6]
    image = image * gain
    grey = image.mean(dim=1, keepdim=True)
    image = grey + (image - grey) * saturation
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return (mean + (image - mean) * contrast + brightness).clamp_(-1, 1)
