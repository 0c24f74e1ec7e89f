"""The part of the EXIF of a picture that its result keeps."""

from __future__ import annotations

import re
from typing import Any

from PIL import ExifTags, Image

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


# Descriptions by tifffile, ImageJ and microscopes' programs of how many pages a TIFF has.
_OF_PAGES = re.compile(r'\{"shape":|ImageJ=|<\?xml.*<OME\b', re.DOTALL)


def counts_pages(tag: int, value: Any) -> bool:
    """Whether a tag describes the pages of a file, which programs then miss in a file of one of them."""
    return tag == ExifTags.Base.ImageDescription and isinstance(value, str) and bool(_OF_PAGES.match(value))


def kept_exif(exif: Image.Exif, format: str | None, frames: int = 1) -> bytes:
    """The EXIF of a picture without orientation and thumbnail; for a TIFF, the tags about the picture.

    `frames`: of the file; where it has several, no description of them.
    """
    kept = Image.Exif()
    kept.endian = exif.endian  # values of undefined type, such as MakerNote, are in this byte order too
    directories = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
    for tag, value in exif.items():
        if frames > 1 and counts_pages(tag, value):
            continue
        if tag != ExifTags.Base.Orientation and (format != "TIFF" or tag in TIFF_DESCRIPTIVE):
            kept[tag] = _directory(exif, tag) if tag in directories else value
    return kept.tobytes() if len(kept) else b""


def valid_orientation(stated: Any) -> int:
    """The orientation (1 to 8) that a tag states; 1 for another value, such as text."""
    return int(stated) if stated in range(1, 9) else 1


def _directory(exif: Image.Exif, tag: int) -> dict[int, Any]:
    """A sub-directory, with the one in it in place of its offset in the old file; Pillow writes both."""
    content = dict(exif.get_ifd(tag))
    if content.pop(ExifTags.IFD.Interop, None) is not None and (inner := exif.get_ifd(ExifTags.IFD.Interop)):
        content[ExifTags.IFD.Interop] = inner
    return content
