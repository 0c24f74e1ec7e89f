"""Tags and directories of TIFF files, added after the pixels were written.

Libtiff, by which Pillow writes compressed files, ends the process where a tag that it knows has a value of another
type or length than it expects, which any EXIF may have. So it is given none of them.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Mapping
from typing import Any

from PIL import ExifTags, Image, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .exif import DIRECTORIES, UNDEFINED, exact


def directories_of(exif: Image.Exif) -> dict[int, dict[int, Any]]:
    """The Exif and GPS directories of a picture, those that it has, by their tags."""
    directories = {int(tag): dict(exif.get_ifd(tag)) for tag in DIRECTORIES}
    for content in directories.values():
        content.pop(ExifTags.IFD.Interop, None)  # an offset in the old file
    return {tag: content for tag, content in directories.items() if content}


def can_write(tags: Mapping[int, Any]) -> bool:
    """Whether these values are of types that a directory holds."""
    try:
        _packed(tags, (), b"II", 0)
    except Exception:  # struct.error, TypeError, ValueError and more
        return False
    return True


def with_tags(data: bytes, tags: Mapping[int, Any], directories: Mapping[int, Mapping[int, Any]]) -> bytes:
    """A TIFF file with tags and directories added to its first directory, where it has no such tags.

    Args:
        data: the file; no BigTIFF.
        tags: tag -> value, for all of which :func:`can_write` is true.
        directories: tag -> its directory.

    Raises:
        struct.error: the file would exceed 4 GiB.
    """
    file, order = bytearray(data), "<" if data[:2] == b"II" else ">"
    places = {tag: _append(file, content, UNDEFINED[tag]) for tag, content in directories.items()}
    added = _entries(file, order, _append(file, {**tags, **places}))[0]
    present, following = _entries(file, order, struct.unpack_from(order + "I", file, 4)[0])
    entries = {**added, **present}
    file += b"\0" * (len(file) % 2)
    struct.pack_into(order + "I", file, 4, len(file))
    file += struct.pack(order + "H", len(entries))
    file += b"".join(entries[tag] for tag in sorted(entries)) + following
    return bytes(file)


def with_directories(data: bytes, directories: Mapping[int, Mapping[int, Any]]) -> bytes:
    """A TIFF or BigTIFF file with directories appended; its first one has their tags already, as 4-byte numbers.

    tifffile takes no content of a directory.
    """
    file = bytearray(data)
    for tag, content in directories.items():
        _set_tag(file, tag, _append(file, content, UNDEFINED[tag]))
    return bytes(file)


def _packed(tags: Mapping[int, Any], undefined: Container[int], order: bytes, place: int) -> bytes:
    """A directory that begins at `place` of its file, with the values that do not fit into its entries."""
    made = ImageFileDirectory_v2(order + (b"*\0\0\0\0\0" if order == b"II" else b"\0*\0\0\0\0"))
    for tag, value in tags.items():
        if tag in undefined and isinstance(value, bytes):
            made.tagtype[tag] = TiffTags.UNDEFINED
        made[tag] = exact(value)
    return made.tobytes(place)


def _append(file: bytearray, tags: Mapping[int, Any], undefined: Container[int] = ()) -> int:
    """Append a directory to a file; its place."""
    file += b"\0" * (len(file) % 2)
    place = len(file)
    file += _packed(tags, undefined, bytes(file[:2]), place)
    return place


def _entries(file: bytearray, order: str, place: int) -> tuple[dict[int, bytes], bytes]:
    """(tag -> its entry, the place of the next directory, packed) of a directory."""
    (count,) = struct.unpack_from(order + "H", file, place)
    end = place + 2 + 12 * count
    entries = [bytes(file[at : at + 12]) for at in range(place + 2, end, 12)]
    return {struct.unpack_from(order + "H", entry)[0]: entry for entry in entries}, bytes(file[end : end + 4])


def _set_tag(file: bytearray, tag: int, value: int) -> None:
    """Replace the value of a 4-byte tag in the first directory of a TIFF or BigTIFF."""
    order = "<" if file[0] == ord("I") else ">"
    big = 43 in file[2:4]
    count, entry, header = ("Q", "HHQI4x", 8) if big else ("H", "HHII", 2)
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), file, 8 if big else 4)
    (entries,) = struct.unpack_from(order + count, file, at)
    size = struct.calcsize(order + entry)
    for place in range(at + header, at + header + entries * size, size):
        if struct.unpack_from(order + entry, file, place)[0] == tag:
            struct.pack_into(order + entry, file, place, tag, 4, 1, value)
