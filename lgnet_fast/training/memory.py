"""Pictures and holes that are decoded once and stay in memory, on the GPU where there is one.

A GPU that trains on hundreds of pictures per second is faster than the JPEG decoders of a whole processor. A batch
depends on (seed, position of its first sample) alone.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import limits
from ..errors import DataError
from .crops import decode, quiet
from .holes import Broken
from .loader import PositionSampler
from .samples import BANK, BATCH, InpaintingDataset, move_colours, reason_of

# Further shorter sides at which a picture is kept if it is large enough, as multiples of data.size.
SCALES = (1.0, 1.125, 1.25, 1.5, 2.0)

_LONGEST = 16  # times the shorter side: what is kept of a longer picture, its middle
_COLUMNS = 7
_FEW_MASKS = 64  # for fewer masks a process pool costs more than it saves
_SHARE = 0.9  # of the free memory that the pictures may take


class MemoryBatches:
    """Every picture of a dataset at several scales, and a bank of masks.

    Args:
        dataset: source of pictures, order and masks.
        workers: number of processes that draw masks and of threads that decode; None: number of cores.

    Raises:
        DataError: paired masks, no picture or no mask that can be read, or pictures that exceed the free memory.
    """

    def __init__(self, dataset: InpaintingDataset, workers: int | None = None) -> None:
        self.dataset, self.data, self.seed = dataset, dataset.data, dataset.seed
        if dataset.masks.paired:
            raise DataError("data.in_memory: masks that come with the pictures cannot be kept; set data.masks")
        workers = workers or _cores()
        self.broken: Broken = []
        # Done first, because the worker processes must be forked before the GPU is used.
        self.masks = self._draw_masks(workers)
        self.names: list[str] = []
        self.places: list[list[tuple[int, int, int]]] = []
        """Of each picture that can be read, at each of its scales: offset in `pixels`, height, width."""
        self.pixels = self._read_pictures(workers)

    def _read_pictures(self, workers: int) -> Tensor:
        """uint8 [all pixels, 3]"""
        source, free = self.dataset.source, limits.memory()
        kept: list[np.ndarray] = []
        offset = 0
        with quiet(), ThreadPoolExecutor(workers) as pool:
            for index, levels in enumerate(pool.map(self._levels, range(len(source)))):
                if isinstance(levels, str):
                    self.broken.append((source.name(index), levels))
                    continue
                self.names.append(source.name(index))
                self.places.append([])
                for level in levels:
                    self.places[-1].append((offset, *level.shape[:2]))
                    kept.append(level.reshape(-1, 3))
                    offset += len(kept[-1])
                if free is not None and 3 * offset > _SHARE * free:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise DataError(
                        f"data.in_memory: expected pictures that fit into the {free / 1e9:.3g} GB of free memory, "
                        f"got {3 * offset / 1e9:.3g} GB by the first {index + 1} of {len(source)}; without it they "
                        "are read from the disk"
                    )
        if not kept:
            name, reason = self.broken[-1]
            raise DataError(f"data.pictures: none of {len(source)} can be read; the last: {name}: {reason}")
        pixels = np.empty((offset, 3), dtype=np.uint8)
        kept.reverse()
        start = 0
        while kept:  # each is freed once it is copied: two whole copies may not fit
            part = kept.pop()
            pixels[start : start + len(part)] = part
            start += len(part)
        return torch.from_numpy(pixels)

    def _levels(self, index: int) -> list[np.ndarray] | str:
        """A picture at its scales, uint8 [H, W, 3] each; or the reason why it cannot be read."""
        size, largest = self.data.size, self.dataset.largest
        try:
            picture = decode(self.dataset.source.picture(index))
        except Exception as error:  # as in InpaintingDataset
            return reason_of(error)
        if largest is None:
            return [np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))]
        height, width = picture.shape[:2]
        shorter = min(height, width)
        # A strip of a few rows would be enlarged to gigabytes.
        down, across = (max(0, side - _LONGEST * shorter) // 2 for side in (height, width))
        picture = picture[down : height - down, across : width - across]
        height, width = picture.shape[:2]
        levels = []
        for scale in SCALES:
            edge = round(size * scale)
            if scale > 1 and (edge > shorter or scale > largest):
                break
            shape = (max(size, round(width * edge / shorter)), max(size, round(height * edge / shorter)))
            whole = shape == (width, height)
            levels.append(
                picture if whole else np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.LANCZOS))
            )
        return levels

    def _draw_masks(self, workers: int) -> Tensor:
        """uint8 [count, S, S], 1 = hole."""
        count, size = self.data.mask_bank, self.data.size
        # macOS has fork, but its libraries may crash in the child.
        forks = sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()
        if workers > 1 and count >= _FEW_MASKS and forks:
            fork = multiprocessing.get_context("fork")
            with warnings.catch_warnings(), ProcessPoolExecutor(workers, mp_context=fork) as pool:
                # Python 3.12 warns of forks in processes with threads; these children run numpy's integer code, or
                # decode masks.
                warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
                drawn = list(pool.map(self._packed_mask, range(count), chunksize=max(1, count // (4 * workers))))
        else:
            drawn = [self._packed_mask(number) for number in range(count)]
        # A file that cannot be read stands for many masks of the bank.
        self.broken += dict.fromkeys(one for _, broken in drawn for one in broken)
        packed = np.stack([mask for mask, _ in drawn])
        return torch.from_numpy(np.unpackbits(packed, axis=1).reshape(count, size, size))

    def _packed_mask(self, number: int) -> tuple[np.ndarray, Broken]:
        broken: Broken = []
        return np.packbits(self.dataset.masks.draw(self.data.size, (BANK, self.seed, number), broken)), broken

    def to(self, device: torch.device) -> MemoryBatches:
        """Move pictures and masks. Returns self."""
        self.pixels, self.masks = self.pixels.to(device), self.masks.to(device)
        return self

    def batch(self, first: int, count: int) -> dict[str, Any]:
        """The samples from position `first` on, as of :func:`.loader.collate`, on the device that holds the pictures.

        Each is a crop of its picture at one of its scales, mirrored at random, with its colours changed at random
        (`data.colour`), and a mask of the bank in one of its eight symmetries.
        """
        rng = np.random.default_rng(np.random.SeedSequence((BATCH, self.seed, first)))
        size = self.data.size
        choice = np.empty((count, _COLUMNS), dtype=np.int64)
        names = []
        for i in range(count):
            epoch, place = divmod(first + i, len(self.dataset))
            number = int(self.dataset.order(epoch)[place]) % len(self.places)
            names.append(self.names[number])
            levels = self.places[number]
            offset, down, across = levels[int(rng.integers(len(levels)))]
            top, left = int(rng.integers(down - size + 1)), int(rng.integers(across - size + 1))
            flips = rng.integers(2, size=4)
            choice[i] = (offset + top * across + left, across, rng.integers(len(self.masks)), *flips)
        device = self.pixels.device
        origin, width, mask, mirrored, turned, upside, sideways = (
            torch.from_numpy(choice).to(device, non_blocking=True)[:, :, None, None].unbind(1)
        )
        line = torch.arange(size, device=device)
        rows, columns = line[:, None], line[None, :]
        columns_of = torch.where(mirrored == 1, size - 1 - columns, columns)
        image = self.pixels[origin + rows * width + columns_of]  # [B, S, S, 3]
        image = image.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.data.colour:
            image = move_colours(image, rng, self.data.colour)
        rows_of = torch.where(upside == 1, size - 1 - rows, rows)
        columns_of = torch.where(sideways == 1, size - 1 - columns, columns)
        rows_of, columns_of = (
            torch.where(turned == 1, columns_of, rows_of),
            torch.where(turned == 1, rows_of, columns_of),
        )
        hole = self.masks.view(-1)[(mask * size + rows_of) * size + columns_of]
        return {"image": image, "mask": hole[:, None].float(), "name": names, "broken": []}

    def batches(self, sampler: PositionSampler) -> Iterator[dict[str, Any]]:
        """Endless batches in the sampler's order; the first one of the first process lists pictures that cannot be
        read, because every process has read all of them."""
        broken = self.broken if sampler.rank == 0 else []
        for positions in sampler:
            yield {**self.batch(positions[0], len(positions)), "broken": broken}
            broken = []


def _cores() -> int:
    """Processors that this process may use."""
    cores = os.cpu_count() or 1
    return min(cores, limits.granted() or cores)
