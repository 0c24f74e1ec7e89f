"""Tar shards as webdataset writes them: ``<key>.<extension>`` is a picture, ``<key>.mask.<extension>`` its mask."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from ..errors import InvalidImageError, LGNetError
from .files import EXTENSIONS

MASK_MARK = "mask"


@dataclass(frozen=True)
class Member:
    """One file in a shard, at `offset`, of `size` bytes. Its text is ``shard.tar/name``."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    @property
    def suffix(self) -> str:
        """The extension, with its dot."""
        return PurePosixPath(self.name).suffix

    def open(self, error: type[LGNetError] = InvalidImageError, name: str = "picture") -> Image.Image:
        """The picture, not yet decoded. Raises `error`: not a picture, or a torn shard."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        try:
            return Image.open(io.BytesIO(data))
        except Exception as cause:  # decoders raise OSError, SyntaxError, struct.error and more on bad data
            raise error(f"{name}: expected a readable picture, got {str(self)!r} ({type(cause).__name__})") from cause


@dataclass(frozen=True)
class Sample:
    """What a shard holds under one key: its only picture and its only mask, or none of them, or too many."""

    key: str
    pictures: tuple[Member, ...]
    masks: tuple[Member, ...]


def samples_in(shard: Path) -> list[Sample]:
    """The samples with pictures in a shard, in its order.

    As webdataset has it, a key is a file's path up to the first dot of its name. Files of other kinds (captions,
    labels) and hidden ones are passed over; only the headers are read.

    Raises InvalidImageError: not a plain tar file (compressed ones cannot be read at random), or a damaged one.
    """
    found: dict[str, tuple[list[Member], list[Member]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                path = PurePosixPath(info.name)
                if not info.isreg() or info.sparse is not None or path.name.startswith("."):
                    continue
                stem, *extensions = path.name.split(".")
                if not extensions or f".{extensions[-1].lower()}" not in EXTENSIONS:
                    continue
                pictures, masks = found.setdefault(str(path.with_name(stem)), ([], []))
                member = Member(shard, info.name, info.offset_data, info.size)
                if len(extensions) == 1:
                    pictures.append(member)
                elif extensions[:-1] == [MASK_MARK]:
                    masks.append(member)
    except (tarfile.TarError, OSError, EOFError) as cause:
        raise InvalidImageError(f"shard: expected an uncompressed tar file, got {str(shard)!r} ({cause})") from cause
    return [Sample(key, tuple(pictures), tuple(masks)) for key, (pictures, masks) in found.items() if pictures]
