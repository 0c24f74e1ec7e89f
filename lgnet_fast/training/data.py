"""Pictures and holes for training, from folders, tar shards and Hugging Face datasets, independent of the number of
readers.

A sample depends on (seed, epoch, index) alone, not on the number of workers or processes, nor on the step at which
training was resumed.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.masks import (
    FINE,
    VARIED,
    MaskFolder,
    fine_mask,
    generate_mask,
    hole_levels,
    pictures_below,
    resize_mask,
    varied_mask,
)
from ..data.shards import Member, samples_in
from ..errors import ConfigError, DataError, InvalidMaskError, LGNetError, MissingExtraError
from ..pipeline.pictures import picture_of
from ..pipeline.sources import open_image
from .config import DataConfig

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

MASKS = ("generated", "paired")
"""Values of `data.masks` other than a folder: drawn strokes and boxes, or the masks of a tar shard."""

# Streams of random numbers that must not coincide; each is the first word of a seed of fixed length.
_ORDER, _CROP, _MASK, _VALIDATION = 1, 2, 3, 4

# Number of neighbours tried in place of an unreadable picture.
_MOST_BROKEN = 1000

# With at most _FEW pictures, each worker keeps decoded ones, up to _CACHE_BYTES.
_FEW, _CACHE_BYTES = 500, 200_000_000


class Source(Protocol):
    """Pictures by number. `name(i)`: unique name of picture i; `picture(i)`: the picture, possibly not decoded yet;
    `mask(i)`: its mask file, or None."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def picture(self, index: int) -> Image.Image: ...
    def mask(self, index: int) -> Image.Image | None: ...


# -- sources -----------------------------------------------------------------------------------------------------


class FolderSource:
    """The picture files (of every format that Pillow reads) of a folder and its sub-folders, by their paths.

    Args:
        folder: of the pictures.
        categories: keep only files in folders of these names, at any depth; None: all.

    Raises:
        DataError: no such folder, no picture in it, or a category without pictures.
    """

    def __init__(self, folder: Path, categories: Sequence[str] | None = None) -> None:
        self.files = sorted(pictures_below(folder, "data: expected a folder of pictures"))
        if categories is not None:
            parts = {file: set(file.relative_to(folder).parts[:-1]) for file in self.files}
            missing = [c for c in categories if not any(c in where for where in parts.values())]
            if missing:
                raise DataError(f"data.categories: no pictures in {str(folder)!r} for {', '.join(missing)}")
            self.files = [file for file in self.files if parts[file].intersection(categories)]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def picture(self, index: int) -> Image.Image:
        # Opened from memory: a file that Pillow opens by path stays open until the picture is decoded.
        return open_image(self.files[index].read_bytes())

    def mask(self, index: int) -> Image.Image | None:
        return None


class TarSource:
    """The pictures of uncompressed tar shards in webdataset's layout, read by their offsets.

    ``<key>.mask.<extension>`` is the mask of picture ``<key>.<extension>``.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        samples = [sample for shard in shards for sample in samples_in(shard)]
        self.pictures: list[Member] = [sample.pictures[0] for sample in samples]
        self.masks: list[Member | None] = [sample.masks[0] if sample.masks else None for sample in samples]
        if not self.pictures:
            raise DataError(f"data: expected tar shards with pictures, got none in {[str(s) for s in shards]}")

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return str(self.pictures[index])

    def picture(self, index: int) -> Image.Image:
        return self.pictures[index].open()

    def mask(self, index: int) -> Image.Image | None:
        member = self.masks[index]
        return None if member is None else member.open(InvalidMaskError, "mask")


class HuggingFaceSource:
    """A Hugging Face dataset with a column of pictures: a folder of save_to_disk, or a name for load_dataset."""

    def __init__(self, name: str, split: str, column: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError(
                'data: "hf:" needs the package datasets: pip install "lgnet_fast[datasets]"'
            ) from error
        try:
            found: Any = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
            if isinstance(found, Mapping):
                if split not in found:
                    raise DataError(f"data.split: expected one of {', '.join(found)}, got {split!r}")
                found = found[split]
        except LGNetError:
            raise
        except Exception as error:  # the hub, the disk and the dataset's script raise many types
            raise DataError(f"data: the dataset {name!r} could not be loaded ({error})") from error
        if column not in found.column_names:
            raise DataError(f"data.column: expected one of {', '.join(found.column_names)}, got {column!r}")
        self.title, self.column = name, column
        # Not decoded, so that a damaged picture raises where it can be skipped.
        self.rows = found.cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"hf:{self.title}[{index}]"

    def picture(self, index: int) -> Image.Image:
        stored = self.rows[index][self.column]
        data = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        return open_image(data)

    def mask(self, index: int) -> Image.Image | None:
        return None


class JoinedSource:
    """Several sources one after the other, or a selection of the pictures of one."""

    def __init__(self, sources: Sequence[Source], chosen: Sequence[tuple[int, int]] | None = None) -> None:
        self.sources = sources
        everything = ((s, i) for s, source in enumerate(sources) for i in range(len(source)))
        self.places = list(everything if chosen is None else chosen)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        source, i = self.places[index]
        return self.sources[source].name(i)

    def picture(self, index: int) -> Image.Image:
        source, i = self.places[index]
        return self.sources[source].picture(i)

    def mask(self, index: int) -> Image.Image | None:
        source, i = self.places[index]
        return self.sources[source].mask(i)

    def without(self, stems: Iterable[str]) -> JoinedSource:
        """All but the pictures of these file stems. Raises DataError: a stem that no picture has."""
        left_out = set(stems)
        found = [Path(self.name(i)).stem for i in range(len(self))]
        if missing := left_out.difference(found):
            raise DataError(f"data.exclude: no picture of the name {', '.join(sorted(missing))}")
        return JoinedSource(self.sources, [place for place, stem in zip(self.places, found) if stem not in left_out])


def open_source(places: Sequence[str], categories: Sequence[str] | None = None) -> JoinedSource:
    """The pictures of every place: a folder, a tar shard, a folder of tar shards, "hf:NAME[:SPLIT[:COLUMN]]".

    Args:
        places: one after the other.
        categories: see :class:`FolderSource`.

    Raises:
        DataError: no pictures; categories of a place without folders. MissingExtraError: a Hugging Face dataset, but
            its package is not installed.
    """
    sources: list[Source] = []
    for place in places:
        path = Path(place)
        if categories is not None and (place.startswith("hf:") or path.suffix.lower() == ".tar"):
            raise DataError(f"data.categories: expected folders of pictures to choose from, got {place!r}")
        if place.startswith("hf:"):
            name, split, column = [*place[3:].split(":"), *("train", "image")[place.count(":") - 1 :]][:3]
            sources.append(HuggingFaceSource(name, split, column))
        elif path.suffix.lower() == ".tar":
            sources.append(TarSource([path]))
        elif path.is_dir() and (shards := sorted(path.glob("*.tar"))):
            sources.append(TarSource(shards))
        else:
            sources.append(FolderSource(path, categories))
    return JoinedSource(sources)


# -- samples -----------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """`image` float32 [3, S, S] in [-1, 1]; `mask` float32 [1, S, S], 1 = hole; `name` of the picture; `broken`:
    (name, reason) of each unreadable picture that this one replaces."""

    image: Tensor
    mask: Tensor
    name: str
    broken: list[tuple[str, str]]


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """A batch: "image" [B, 3, S, S] and "mask" [B, 1, S, S] as in :class:`Sample`, "name" and "broken" lists."""
    return {
        "image": torch.stack([sample.image for sample in samples]),
        "mask": torch.stack([sample.mask for sample in samples]),
        "name": [sample.name for sample in samples],
        "broken": [one for sample in samples for one in sample.broken],
    }


class InpaintingDataset(Dataset[Sample]):
    """Pictures with holes by position: position p is picture ``p % len`` in the order of epoch ``p // len``.

    Args:
        data: of the configuration.
        seed: determines order, crop, mirroring and mask, together with epoch and index.

    Raises:
        DataError: no pictures, no masks. ConfigError: an unknown protocol, a category list that cannot be read.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        if data.protocol not in PROTOCOLS:
            raise ConfigError(f"data.protocol: expected one of {', '.join(PROTOCOLS)}, got {data.protocol!r}")
        if not data.pictures:
            raise DataError("data.pictures: expected folders, tar shards or datasets, got none")
        self.data, self.seed, self.largest = data, seed, PROTOCOLS[data.protocol]
        self.source = open_source(data.pictures, _categories(data.categories)).without(data.exclude)
        if not len(self.source):
            raise DataError(
                f"data.pictures: expected pictures in {', '.join(data.pictures)}, got none after exclusion"
            )
        self.masks = _Masks(data)
        self._orders: dict[int, np.ndarray] = {}
        self._cache: dict[int, np.ndarray] = {}
        self._room = _CACHE_BYTES if len(self.source) <= _FEW else 0

    def __len__(self) -> int:
        return len(self.source)

    def order(self, epoch: int) -> np.ndarray:
        """The pictures of an epoch in its order."""
        if epoch not in self._orders:
            rng = np.random.default_rng(np.random.SeedSequence((_ORDER, self.seed, epoch)))
            self._orders = {epoch: rng.permutation(len(self))}  # only the latest is kept, because orders may be long
        return self._orders[epoch]

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self))
        index = int(self.order(epoch)[place])
        broken: list[tuple[str, str]] = []
        tried = index
        for _ in range(min(len(self), _MOST_BROKEN)):
            name = self.source.name(tried)
            try:
                image, mask = self._sample(epoch, index, tried, broken)
                return Sample(_network_range(image), torch.from_numpy(mask).float(), name, broken)
            except (DataError, ConfigError):
                raise
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on bad data
                reason = " ".join(str(error).split()) or type(error).__name__
                broken.append((name, reason))
            tried = (tried + 1) % len(self)
        raise DataError(
            f"data: none of {len(broken)} pictures in a row can be read; the first: {': '.join(broken[0])}"
        )

    def _sample(
        self, epoch: int, index: int, tried: int, broken: list[tuple[str, str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [3, S, S] and bool [1, S, S]; `broken` as in :meth:`_Masks.draw`."""
        rng = np.random.default_rng(np.random.SeedSequence((_CROP, self.seed, epoch, index)))
        size = self.data.size
        picture = self._decoded(tried)
        box = crop_box(picture.shape[0], picture.shape[1], size, self.largest, rng)
        flip = bool(rng.integers(2))
        image = scale(picture, box, size, Image.Resampling.BICUBIC)
        if self.masks.paired:
            mask = self.masks.own(self.source, tried, picture.shape[:2])
            mask = scale(mask.astype(np.uint8) * 255, box, size, Image.Resampling.BOX) > 127
        else:
            mask = self.masks.draw(size, (_MASK, self.seed, epoch, index), broken)
        if flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return np.ascontiguousarray(image.transpose(2, 0, 1)), np.ascontiguousarray(mask[None])

    def _decoded(self, index: int) -> np.ndarray:
        """Picture `index`, upright, uint8 [H, W, 3]."""
        if index in self._cache:
            return self._cache[index]
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


def validation_pairs(
    folder: str,
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
    for index, image in validation_pictures(folder, size, protocol, limit):
        for hole_class in hole_classes:
            mask = generate_mask(
                size, size, hole_class=hole_class, kind="strokes", seed=(_VALIDATION, seed, index, hole_class)
            )
            pairs.append((image, torch.from_numpy(mask)[None, None].float()))
    return pairs


def validation_pictures(folder: str, size: int, protocol: str, limit: int | None) -> list[tuple[int, Tensor]]:
    """(number, centre crop [1, 3, S, S] in [-1, 1]) of the pictures of a place, of the first `limit` only.

    A picture that cannot be read is left out with a warning.

    Raises:
        DataError: no such place, or no picture in it that can be read.
    """
    source = open_source([folder])
    pictures = []
    for index in range(len(source) if limit is None else min(limit, len(source))):
        try:
            picture = decode(source.picture(index))
        except Exception as error:  # as in InpaintingDataset
            warnings.warn(f"validation: {source.name(index)} is left out ({error})", stacklevel=2)
            continue
        box = crop_box(picture.shape[0], picture.shape[1], size, PROTOCOLS[protocol], None)
        image = scale(picture, box, size, Image.Resampling.BICUBIC).transpose(2, 0, 1)
        pictures.append((index, _network_range(np.ascontiguousarray(image))[None]))
    if not pictures:
        raise DataError(f"data.validation: none of {len(source)} pictures in {folder!r} can be read")
    return pictures


def decode(picture: Image.Image) -> np.ndarray:
    """A picture, upright and without alpha, as uint8 [H, W, 3]. Raises InvalidImageError: it cannot be decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about frames and metadata, in every epoch and worker
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


def _network_range(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels).float().div_(127.5).sub_(1)


class _Masks:
    """Holes of the configured kind: generated, drawn at random from a folder, or the mask of the picture."""

    def __init__(self, data: DataConfig) -> None:
        self.kind, self.classes, self.polarity = data.mask_kind, data.hole_classes, data.mask_polarity
        self.paired = data.masks == "paired"
        self.folder = None if data.masks in MASKS else MaskFolder(data.masks, polarity=data.mask_polarity)

    def own(self, source: Source, index: int, size: tuple[int, ...]) -> np.ndarray:
        """The mask of picture `index`, bool [H, W] of its size."""
        picture = source.mask(index)
        if picture is None:
            raise DataError(f"data.masks: {source.name(index)} has no <key>.mask.<extension> beside it")
        mask = hole_levels(picture, self.polarity)
        if mask.shape != size:
            raise InvalidMaskError(f"mask: expected the picture's size {size}, got {mask.shape}")
        return mask

    @staticmethod
    def _read(folder: MaskFolder, first: int, broken: list[tuple[str, str]]) -> np.ndarray:
        """Mask `first` of the folder, or the next one that can be read: the picture is not at fault."""
        for number in range(first, first + min(len(folder), _MOST_BROKEN)):
            file = number % len(folder)
            try:
                return folder[file]
            except InvalidMaskError as error:
                broken.append((str(folder.files[file]), " ".join(str(error).split())))
        raise DataError(f"data.masks: none of {len(broken)} masks in a row can be read; the first: {broken[0][1]}")

    def draw(self, size: int, seed: Sequence[int], broken: list[tuple[str, str]]) -> np.ndarray:
        """A random mask, bool [size, size]; `broken` receives (name, reason) of each file that cannot be read."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        free = {VARIED: varied_mask, FINE: fine_mask}.get(self.kind)
        if self.folder is None and free is not None:
            return free(size, size, seed=(*seed, 1))
        if self.folder is None:
            return generate_mask(
                size, size, hole_class=int(rng.choice(self.classes)), kind=self.kind, seed=(*seed, 1)
            )
        # The eight symmetries: simple operations that keep the hole ratio.
        number, turns = int(rng.integers(len(self.folder))), int(rng.integers(4))
        mask = np.rot90(self._read(self.folder, number, broken), turns)
        return resize_mask(mask[:, ::-1] if rng.integers(2) else mask, size, size)


def _categories(given: Sequence[str] | None) -> list[str] | None:
    """Names of folders; a name that ends in .txt is a file of names, one per line, such as Places365's /a/abbey."""
    if given is None:
        return None
    names: list[str] = []
    for name in given:
        if not name.endswith(".txt"):
            names.append(name)
            continue
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"data.categories: expected a text file of names, got {name!r} ({error})") from error
        names += [line.strip().rstrip("/").rsplit("/", 1)[-1] for line in lines if line.strip()]
    return names


# -- loading -----------------------------------------------------------------------------------------------------


class PositionSampler(Sampler[list[int]]):
    """Endless batches of positions for one of several processes.

    Together the processes read the same samples as one process with the larger batch, in the same order.

    Args:
        start: number of batches that every process has read before.
        batch_size: of one process.
        rank, processes: index of this process, and number of processes.
    """

    def __init__(self, start: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.start, self.batch_size, self.rank, self.processes = start, batch_size, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        first = (self.start * self.processes + self.rank) * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.processes * self.batch_size


def make_loader(dataset: InpaintingDataset, sampler: PositionSampler, pin: bool) -> DataLoader[Sample]:
    """Batches of :func:`collate` in the sampler's order, read ahead by ``data.workers`` processes.

    pin: use page-locked memory, from which copies to a GPU are faster.
    """
    workers = dataset.data.workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=dataset.data.prefetch if workers else None,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        # A separate generator: a new iterator would otherwise advance torch's global one, whose state is in
        # checkpoints.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    # Both may reach the whole process group (Ctrl-C, timeout, a job's end). The trainer finishes its step, for which
    # it needs the workers, and then ends them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
