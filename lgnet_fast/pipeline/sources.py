"""Files that callers name or hand over: paths, bytes, open files; their bytes opened by Pillow."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import InvalidImageError, LGNetError
from .formats import ADDRESS, reason_against_reading


@dataclass(frozen=True)
class Encoded:
    """The bytes of a picture file that can be read only once or is part of another file; `name` is for messages."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        """The name's extension, with its dot."""
        return PurePosixPath(self.name).suffix

    def open(self, error: type[LGNetError] = InvalidImageError, name: str = "picture") -> Image.Image:
        """The picture, not yet decoded. Raises `error`: not a picture."""
        try:
            return open_image(self.data)
        except Exception as cause:  # decoders raise OSError, SyntaxError, struct.error and more on bad data
            raise error(f"{name}: expected a readable picture, got {self.name!r} ({reason_of(cause)})") from cause


def file_of(source: Any, error: type[LGNetError], name: str) -> Any:
    """A path as `Path`; the bytes of a file, a file opened for reading bytes (read from its start, as by Pillow, or
    from where a pipe is, to its end), or a file with `read_bytes`, such as `zipfile.Path`, as `Encoded`.

    Anything else is returned as it is. Raises `error`: an empty path, an address such as https://..., a file opened
    as text, or one that cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if not text:
            raise error(f"{name}: expected a picture file, got an empty path")
        if isinstance(text, str) and ADDRESS.match(text) and not os.path.exists(text):
            raise error(f"{name}: expected a picture file, got the address {text}; download it first")
        return Path(os.fsdecode(text))
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return Encoded(f"{len(data)} bytes", data)
    if callable(getattr(source, "read", None)):
        title = str(getattr(source, "name", type(source).__name__))
        try:
            with contextlib.suppress(AttributeError, OSError, ValueError):  # a pipe, or a download
                source.seek(0)
            read = source.read()
        except (OSError, ValueError) as cause:  # ValueError: it is closed
            raise error(f"{name}: expected a readable file, got {title!r} ({reason_of(cause)})") from cause
        if not isinstance(read, bytes):
            raise error(f"{name}: expected a file opened for reading bytes (mode 'rb'), got {title!r} opened as text")
        return Encoded(title, read)
    if callable(getattr(source, "read_bytes", None)):
        try:
            return Encoded(str(source), source.read_bytes())
        except (OSError, KeyError, ValueError) as cause:  # KeyError: not in the archive
            raise error(f"{name}: expected a readable file, got {str(source)!r} ({reason_of(cause)})") from cause
    return source


def open_image(data: bytes) -> Image.Image:
    """Pillow's picture of a file's bytes, not yet decoded. HEIC files need pillow-heif.

    Raises InvalidImageError: pillow-heif is missing. Also errors of Pillow.
    """
    if _is_heif(data) and (reason := reason_against_reading("HEIF")) is not None:
        raise InvalidImageError(reason)
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # Pillow's message names an object in memory
        raise UnidentifiedImageError("no picture that Pillow can read") from None


def format_of(source: Path | Encoded) -> str | None:
    """The Pillow format of a file by its header, None where it is not a picture."""
    try:
        if isinstance(source, Encoded):
            picture = open_image(source.data)
        else:
            with open(source, "rb") as file:
                if _is_heif(file.read(64)):
                    reason_against_reading("HEIF")  # registers the format with Pillow
            picture = Image.open(source)
        with picture:
            return "JPEG" if picture.format == "MPO" else picture.format
    except Exception:  # running the item reports the reason
        return None


def _is_heif(data: bytes) -> bool:
    # AVIF files may begin with "mif1" too; then "avif" is among their compatible brands.
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return data[4:8] == b"ftyp" and data[8:12] in brands and b"avif" not in data[:64]


def reason_of(cause: BaseException) -> str:
    """The kind and the first line of an error, for a message that names the file."""
    text = str(cause).splitlines()[0] if str(cause) else ""
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
