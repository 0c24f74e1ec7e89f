"""The part of the EXIF of a picture that its result keeps."""

from __future__ import annotations

import re
import struct
from typing import Any

from PIL import ExifTags, Image, TiffTags

from .notices import warn

# The tags of a TIFF also describe its storage; only those about the picture may be copied to another file.
TIFF_DESCRIPTIVE = {
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
    ExifTags.IFD.Exif,
    ExifTags.IFD.GPSInfo,
}
DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
"""Tags of the first directory that hold a directory."""

_PADDING = 0xEA1C
UNDEFINED: dict[int, set[int]] = {
    0: {ExifTags.Base.PrintImageMatching, _PADDING},
    ExifTags.IFD.Exif: {
        ExifTags.Base.OECF,
        ExifTags.Base.ComponentsConfiguration,
        ExifTags.Base.MakerNote,
        ExifTags.Base.UserComment,
        ExifTags.Base.SpatialFrequencyResponse,
        ExifTags.Base.FileSource,
        ExifTags.Base.SceneType,
        ExifTags.Base.DeviceSettingDescription,
        _PADDING,
    },
    ExifTags.IFD.GPSInfo: {ExifTags.GPS.GPSProcessingMethod, ExifTags.GPS.GPSAreaInformation},
}
"""Directory (0: the first) -> its tags of undefined type, which Pillow does not know; other programs expect it."""

# Descriptions by tifffile, ImageJ and microscopes' programs of how many pages a TIFF has.
_OF_PAGES = re.compile(r'\{"shape":|ImageJ=|<\?xml.*<OME\b', re.DOTALL)


def counts_pages(tag: int, value: Any) -> bool:
    """Whether a tag describes the pages of a file, which programs then miss in a file of one of them."""
    return tag == ExifTags.Base.ImageDescription and isinstance(value, str) and bool(_OF_PAGES.match(value))


def kept_exif(exif: Image.Exif, format: str | None, frames: int = 1) -> tuple[bytes, list[str]]:
    """The EXIF of a picture without orientation and thumbnail; for a TIFF, the tags about the picture. And the names
    of tags that are left out, because their values cannot be read or written.

    `frames`: of the file; where it has several, no description of them.
    """
    kept: dict[int, Any] = {}
    broken = []
    for tag in exif:
        if tag == ExifTags.Base.Orientation or (format == "TIFF" and tag not in TIFF_DESCRIPTIVE):
            continue
        try:
            value = _directory(exif, tag) if tag in DIRECTORIES else exif[tag]
        except Exception:  # values of a wrong type or length: decoders raise struct.error, TypeError and more
            broken.append(name_of_tag(tag))
            continue
        if not (frames > 1 and counts_pages(tag, value)):
            kept[tag] = value
    packed, unwritable = packed_exif(kept, exif.endian)
    return packed, broken + unwritable


def warn_of_exif(name: str, left_out: list[str]) -> None:
    """One warning about the picture `name`, if any of its tags are `left_out`."""
    if left_out:
        warn(f"{name}: its EXIF has values that are not of their tags' types, left out: {', '.join(left_out)}")


def packed_exif(tags: dict[int, Any], endian: str | None) -> tuple[bytes, list[str]]:
    """EXIF of these tags, those of a directory as a dict, b"" without any; and the names of those that cannot be
    written. `endian`: "<", ">" or None for either."""
    broken = []
    if not _writable(tags, endian):
        for tag, value in list(tags.items()):
            if tag in DIRECTORIES and isinstance(value, dict):
                good = {inner: one for inner, one in value.items() if _writable({tag: {inner: one}}, endian)}
                broken += [name_of_tag(inner, tag) for inner in value if inner not in good]
                tags[tag] = good
            elif not _writable({tag: value}, endian):
                broken.append(name_of_tag(tag))
                del tags[tag]
    return (_typed(_exif_of(tags, endian).tobytes()) if tags else b""), broken


def _typed(packed: bytes) -> bytes:
    """EXIF with the type undefined for the tags of `UNDEFINED`, which Pillow has written as bytes."""
    data, head = bytearray(packed), len(b"Exif\0\0")
    order = "<" if data[head : head + 2] == b"II" else ">"
    places = [(0, struct.unpack_from(order + "I", data, head + 4)[0])]
    while places:
        directory, place = places.pop()
        begin = head + place + 2
        (count,) = struct.unpack_from(order + "H", data, begin - 2)
        for entry in range(begin, begin + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHII", data, entry)
            if kind == TiffTags.BYTE and tag in UNDEFINED[directory]:
                struct.pack_into(order + "H", data, entry + 2, TiffTags.UNDEFINED)
            elif directory == 0 and tag in DIRECTORIES:
                places.append((tag, value))
    return bytes(data)


class _Text(str):
    """Text as Pillow reads it, one character for each byte. Pillow would write "?" for those that are not ASCII, such
    as of a copyright sign."""

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:
        return str.encode(self, "latin-1")


def exact(value: Any) -> Any:
    """A value of a tag, or a directory, whose text Pillow writes byte for byte as it read it."""
    if isinstance(value, dict):
        return {tag: exact(inner) for tag, inner in value.items()}
    return _Text(value) if isinstance(value, str) else value


def _exif_of(tags: dict[int, Any], endian: str | None) -> Image.Exif:
    made = Image.Exif()
    made.endian = endian  # values of undefined type, such as MakerNote, are in this byte order too
    for tag, value in tags.items():
        made[tag] = exact(value)
    return made


def _writable(tags: dict[int, Any], endian: str | None) -> bool:
    try:
        _exif_of(tags, endian).tobytes()
    except Exception:  # as in `kept_exif`
        return False
    return True


def name_of_tag(tag: int, directory: int | None = None) -> str:
    """The name of a tag of the first directory, or of another one."""
    names = ExifTags.GPSTAGS if directory == ExifTags.IFD.GPSInfo else ExifTags.TAGS
    return names.get(tag, f"{tag:#06x}")


def valid_orientation(stated: Any) -> int:
    """The orientation (1 to 8) that a tag states; 1 for another value, such as text."""
    return int(stated) if stated in range(1, 9) else 1


def _directory(exif: Image.Exif, tag: int) -> dict[int, Any]:
    """A sub-directory, with the one in it in place of its offset in the old file; Pillow writes both."""
    content = dict(exif.get_ifd(tag))
    if content.pop(ExifTags.IFD.Interop, None) is not None and (inner := exif.get_ifd(ExifTags.IFD.Interop)):
        content[ExifTags.IFD.Interop] = inner
    return content
