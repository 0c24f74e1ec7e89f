"""Tar shards in webdataset's layout: ``<key>.<extension>`` is a picture, ``<key>.mask.<extension>`` its mask."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from ..errors import InvalidImageError, LGNetError
from ..pipeline.formats import EXTENSIONS, OTHER_EXTENSIONS
from ..pipeline.sources import Encoded
from .folders import unread

MASK_MARK = "mask"
SHARD = ".tar"
BESIDE_PICTURES = "a tar shard beside pictures; give it alone, or a folder of shards"
"""Why a shard in a folder with pictures is left out."""


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

    def read(self) -> Encoded:
        """The file's bytes. Raises OSError."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return Encoded(str(self), file.read(self.size))

    def open(self, error: type[LGNetError] = InvalidImageError, name: str = "picture") -> Image.Image:
        """The picture, not yet decoded. Raises `error`: not a picture, or a truncated shard."""
        return self.read().open(error, name)


@dataclass(frozen=True)
class Sample:
    """The files of a shard with one key: its pictures and masks, normally one of each."""

    key: str
    pictures: tuple[Member, ...]
    masks: tuple[Member, ...]


@dataclass(frozen=True)
class Shard:
    """The samples of a shard that have pictures, in order, and pictures that are `left_out`, with reasons."""

    samples: list[Sample]
    left_out: list[tuple[Member, str]]


def is_shard(path: Path) -> bool:
    """Whether a file is a shard, by its name."""
    return path.suffix.lower() == SHARD


def apart(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """(shards, other files), each in their order."""
    found: tuple[list[Path], list[Path]] = ([], [])
    for path in files:
        found[0 if is_shard(path) else 1].append(path)
    return found


def read_shard(shard: Path) -> Shard:
    """The contents of a shard.

    As in webdataset, a key is a file's path up to the first dot of its name. Files of other kinds (captions, labels,
    ``<key>.depth.png`` beside ``<key>.png``) and hidden ones, also in hidden folders, are skipped; only the headers
    are read. Pictures in unsupported formats, links to other places, pictures that tar stored sparse (``tar
    --sparse``), and ``<key>.1.png`` without a ``<key>.png``, are left out.

    Raises InvalidImageError: not a plain tar file (compressed ones cannot be read at random), or a damaged or
    truncated one.
    """
    found: dict[str, tuple[list[Member], list[Member], list[Member]]] = {}
    stored: dict[str, tarfile.TarInfo] = {}
    left_out = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                path = PurePosixPath(info.name)
                hidden = any(part.startswith(".") and part != ".." for part in path.parts)
                # tar stores a file with several names once, and the other names as hard links to it.
                data = stored.get(info.linkname) if info.islnk() else info
                if not (info.isreg() or info.islnk() or info.issym()):
                    continue
                if data is not None:
                    stored[info.name] = data
                if hidden:
                    continue
                stem, *extensions = path.name.split(".")
                extension = f".{extensions[-1].lower()}" if extensions else ""
                member = Member(shard, info.name, info.offset_data, info.size)
                if extension in OTHER_EXTENSIONS:
                    left_out.append((member, unread(extension)))
                if extension not in EXTENSIONS:
                    continue
                if data is None or not data.isreg() or data.sparse is not None:
                    left_out.append((member, _why_unread(data)))
                    continue
                member = replace(member, offset=data.offset_data, size=data.size)
                pictures, masks, further = found.setdefault(str(path.with_name(stem)), ([], [], []))
                if len(extensions) == 1:
                    pictures.append(member)
                elif extensions[:-1] == [MASK_MARK]:
                    masks.append(member)
                else:
                    further.append(member)
            _check_end(shard, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as cause:
        raise InvalidImageError(f"shard: expected an uncompressed tar file, got {str(shard)!r} ({cause})") from cause
    for key, (pictures, _, further) in found.items():
        reason = f"in a shard a name ends at its first dot, and there is no picture of the name {key!r}"
        left_out += [] if pictures else [(member, reason) for member in further]
    samples = [Sample(k, tuple(pictures), tuple(masks)) for k, (pictures, masks, _) in found.items() if pictures]
    return Shard(samples, left_out)


def _why_unread(data: tarfile.TarInfo | None) -> str:
    """`data`: what a shard holds of a picture that cannot be read at random."""
    if data is None:
        return "a hard link to a file that is not before it in the shard"
    return "a symbolic link; pack the file itself" if data.issym() else "stored sparse; pack it without --sparse"


def _check_end(shard: Path, offset: int) -> None:
    """Raise tarfile.ReadError where no block of zeros follows the last file, at `offset`: tarfile takes a damaged or
    truncated header for the end."""
    with open(shard, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"{'damaged' if len(block) == tarfile.BLOCKSIZE else 'truncated'} at byte {offset}")
