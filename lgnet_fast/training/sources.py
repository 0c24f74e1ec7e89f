"""Pictures for training by number: of folders, tar shards and Hugging Face datasets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..data.folders import all_below, warn_of_left_out
from ..data.shards import SHARD, Member, apart, is_shard, read_shard
from ..errors import ConfigError, DataError, InvalidImageError, LGNetError, MissingExtraError
from ..pipeline.formats import EXTENSIONS
from ..pipeline.sources import open_image

PLACES = "expected folders of pictures or of tar shards, uncompressed tar shards, or hf:NAME[:SPLIT[:COLUMN]]"
"""What the settings `data.pictures` and `data.validation` take, for messages."""

_HUB = "hf:"


class Source(Protocol):
    """Pictures by number. `name(i)`: unique name of picture i; `picture(i)`: the picture, possibly not decoded yet;
    `mask(i)`: the file of the mask that comes with it, or None."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def picture(self, index: int) -> Image.Image: ...
    def mask(self, index: int) -> Member | None: ...


class FileSource:
    """Picture files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def picture(self, index: int) -> Image.Image:
        # Opened from memory: a file that Pillow opens by path stays open until the picture is decoded.
        return open_image(self.files[index].read_bytes())

    def mask(self, index: int) -> Member | None:
        return None


class TarSource:
    """The pictures of uncompressed tar shards in webdataset's layout, read by their offsets.

    ``<key>.mask.<extension>`` is the mask of picture ``<key>.<extension>``. Of several pictures or masks of one key,
    the first counts. One warning for the pictures that are left out.

    Args:
        shards: the files.
        setting: that names them, for messages.

    Raises:
        DataError: no tar file, a damaged one, or no picture in any.
    """

    def __init__(self, shards: Sequence[Path], setting: str) -> None:
        try:
            found = [read_shard(shard) for shard in shards]
        except InvalidImageError as error:
            raise DataError(f"{setting}: {str(error).removeprefix('shard: ')}") from error
        samples = [sample for shard in found for sample in shard.samples]
        left_out = [f"{member}: {reason}" for shard in found for member, reason in shard.left_out]
        self.pictures: list[Member] = [sample.pictures[0] for sample in samples]
        self.masks: list[Member | None] = [sample.masks[0] if sample.masks else None for sample in samples]
        names = [str(shard) for shard in shards]
        if not self.pictures:
            reason = f" ({left_out[0]})" if left_out else ""
            raise DataError(f"{setting}: expected tar shards with pictures, got none in {names}{reason}")
        warn_of_left_out(left_out, repr(names[0]) if len(names) == 1 else f"{len(names)} shards")

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return str(self.pictures[index])

    def picture(self, index: int) -> Image.Image:
        return self.pictures[index].open()

    def mask(self, index: int) -> Member | None:
        return self.masks[index]


class HuggingFaceSource:
    """A Hugging Face dataset with a column of pictures.

    Args:
        place: ``hf:NAME[:SPLIT[:COLUMN]]``, by default train and image; NAME is a folder of save_to_disk, or a name
            for load_dataset.
        setting: that names it, for messages.

    Raises:
        DataError: it cannot be loaded, or has no such split or column, or no rows.
        MissingExtraError: the package datasets is not installed.
    """

    def __init__(self, place: str, setting: str) -> None:
        rest = place.removeprefix(_HUB)
        drive = re.match(r"[A-Za-z]:(?=[\\/])|", rest)[0]  # type: ignore[index]
        parts = rest[len(drive) :].split(":")
        parts[0] = drive + parts[0]
        if len(parts) > 3 or not all(parts):
            raise DataError(f"{setting}: expected hf:NAME[:SPLIT[:COLUMN]], got {place!r}")
        name, split, column = [*parts, *("train", "image")[len(parts) - 1 :]]
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError(
                f"{setting}: 'hf:' needs the package datasets: pip install 'lgnet-fast[datasets]'"
            ) from error
        try:
            found: Any = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
            if isinstance(found, Mapping):
                if split not in found:
                    raise DataError(f"{setting}: expected {place!r} to name a split of {', '.join(found)}")
                found = found[split]
            if column not in found.column_names:
                raise DataError(f"{setting}: expected {place!r} to name a column of {', '.join(found.column_names)}")
            # Not decoded, so that a damaged picture raises where it can be skipped.
            self.rows = found.cast_column(column, datasets.Image(decode=False))
        except LGNetError:
            raise
        except Exception as error:  # the hub, the disk, the dataset's script and the cast raise many types
            reason = " ".join(str(error).split())
            raise DataError(f"{setting}: the pictures of {place!r} could not be loaded ({reason})") from error
        if not len(self.rows):
            raise DataError(f"{setting}: expected a dataset with pictures, got {place!r}, which has none")
        self.title, self.column = name, column

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{_HUB}{self.title}[{index}]"

    def picture(self, index: int) -> Image.Image:
        stored = self.rows[index][self.column]
        if stored is None:
            raise InvalidImageError("picture: expected a picture in every row, got an empty one")
        data = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        return open_image(data)

    def mask(self, index: int) -> Member | None:
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

    def mask(self, index: int) -> Member | None:
        source, i = self.places[index]
        return self.sources[source].mask(i)

    def without(self, stems: Iterable[str]) -> JoinedSource:
        """All but the pictures of these file stems. Raises DataError: a stem that no picture has, or all pictures."""
        left_out = set(stems)
        if not left_out:
            return self
        found = [Path(self.name(i)).stem for i in range(len(self))]
        if missing := left_out.difference(found):
            raise DataError(f"data.exclude: no picture of the name {', '.join(sorted(missing))}")
        kept = [place for place, stem in zip(self.places, found) if stem not in left_out]
        if not kept:
            raise DataError(f"data.exclude: expected names of some of the {len(self)} pictures, got all of them")
        return JoinedSource(self.sources, kept)


def open_source(places: Sequence[str], setting: str, categories: Sequence[str] | None = None) -> JoinedSource:
    """The pictures of every place: a folder, a tar shard, a folder of tar shards, "hf:NAME[:SPLIT[:COLUMN]]".

    Folders are read as :func:`lgnet_fast.data.folders.scan` does: with their sub-folders, through links, without
    hidden ones.

    Args:
        places: one after the other.
        setting: that names them, for messages.
        categories: names of folders, at any depth, whose pictures are kept, with those of the folders in them; as
            :func:`read_categories` takes them.

    Raises:
        DataError: no such place, no pictures in it, pictures beside tar shards; a category without pictures, or of a
            place without folders. MissingExtraError: a Hugging Face dataset, but its package is not installed.
        ConfigError: see :func:`read_categories`.
    """
    wanted = None if categories is None else read_categories(categories)
    sources: list[Source] = []
    seen: set[str] = set()
    for place in places:
        source = HuggingFaceSource(place, setting) if place.startswith(_HUB) else _files_at(place, setting)
        if wanted is not None:
            if not isinstance(source, FileSource):
                raise DataError(f"data.categories: expected folders of pictures to choose from, got {place!r}")
            names = {
                folder: {name for name in wanted if f"/{name}/" in f"/{folder.relative_to(place).as_posix()}/"}
                for folder in {file.parent for file in source.files}
            }
            source = FileSource([file for file in source.files if names[file.parent]])
            seen.update(*names.values())
        sources.append(source)
    if wanted is not None and (missing := wanted - seen):
        raise DataError(f"data.categories: no pictures in {', '.join(places)} for {', '.join(sorted(missing))}")
    return JoinedSource(sources)


def _files_at(place: str, setting: str) -> FileSource | TarSource:
    """The pictures of a folder, of its tar shards, or of a tar shard."""
    path = Path(place)
    if is_shard(path) and not path.is_dir():
        return TarSource([path], setting)
    files = all_below(place, f"{setting}: {PLACES}", (*EXTENSIONS, SHARD))
    shards, pictures = apart(files)
    if not shards:
        return FileSource(files)
    if pictures:
        raise DataError(
            f"{setting}: expected a folder of pictures or of tar shards, got {place!r} with both: "
            f"{len(pictures)} pictures ({str(pictures[0])!r}, ...) and {len(shards)} shards "
            f"({str(shards[0])!r}, ...); name the shards, or a folder without them"
        )
    return TarSource(shards, setting)


def read_categories(given: Sequence[str]) -> set[str]:
    """Names of folders, or of a folder in another, such as "cabin/outdoor".

    A name that ends in .txt is a file of names, one per line, as Places365's: "/a/abbey", or "/c/cabin/outdoor 66".
    The letter, by which Places365 sorts its folders, and the number do not count.

    Raises:
        ConfigError: such a file cannot be read, or there are no names.
    """
    names: set[str] = set()
    for name in given:
        if not name.endswith(".txt"):
            names.add(name)
            continue
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:  # ValueError: not UTF-8
            raise ConfigError(f"data.categories: expected a text file of names, got {name!r} ({error})") from error
        names.update(re.sub(r"^(/.*?)\s+\d+$", r"\1", line.strip()) for line in lines)
    names = {re.sub(r"^\w/(?=.)", "", name.strip("/")) for name in names if name.strip("/")}
    if not names:
        raise ConfigError(f"data.categories: expected names of folders, got none in {list(given)}")
    return names
