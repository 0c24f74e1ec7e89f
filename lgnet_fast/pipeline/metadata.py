"""Metadata that Pillow does not write: IPTC in JPEG and TIFF, colour profiles in JPEG 2000; and what is lost."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from PIL.TiffImagePlugin import IPTC_NAA_CHUNK, ImageFileDirectory_v2

from . import chunks
from .formats import METADATA
from .notices import warn

_NAMES = {"icc_profile": "colour profile", "exif": "EXIF", "xmp": "XMP", "iptc": "IPTC"}
_PHOTOSHOP, _IPTC_RESOURCE = b"Photoshop 3.0\0", 0x0404
_SEGMENT_BYTES = 65533
_XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
# Pillow format -> most pixels per inch that its field holds; PNG and BMP count those per metre in 31 bits.
_MOST_DPI = {"JPEG": 65535, "PNG": (2**31 - 1) * 0.0254, "BMP": (2**31 - 1) * 0.0254, "TIFF": 2**32 - 1}


def held(info: Mapping[Any, Any], format: str, in_colour: bool = False) -> dict[str, Any]:
    """The metadata of a picture that `format` (Pillow's name) can hold, by Pillow's keys, and its resolution ("dpi").

    One UserWarning names the rest. A resolution that is none, such as 0/0, is dropped. `in_colour`: the file will
    hold RGB, for which a profile of greys says nothing.
    """
    there = {key: info[key] for key in _NAMES if info.get(key)}
    # In a JPEG file each of them, except the profile, must fit one segment.
    room = {"exif": _SEGMENT_BYTES, "xmp": _SEGMENT_BYTES - len(_XMP_HEADER), "iptc": _iptc_room()}
    fitting = {
        key: value
        for key, value in there.items()
        if key in METADATA.get(format, set()) and (format != "JPEG" or key not in room or len(value) <= room[key])
    }
    if in_colour and fitting.get("icc_profile", b"")[16:20] == b"GRAY":
        del fitting["icc_profile"]
    lost = [_NAMES[key] for key in there if key not in fitting]
    if (dpi := _resolution(info)) is not None:
        if max(dpi) <= _MOST_DPI.get(format, math.inf):
            fitting["dpi"] = dpi
        else:
            lost.append("resolution")
    kept = info.get("png_chunks")
    if kept is not None and format != "PNG" and (names := chunks.names(kept)):
        lost.append(f"PNG chunks {', '.join(names)}")
    if lost:
        warn(f"format: {format} does not hold the picture's {', '.join(lost)}")
    return fitting


def _resolution(info: Mapping[Any, Any]) -> tuple[float, float] | None:
    """Pixels per inch, across and down; None unless both are positive numbers."""
    dpi = info.get("dpi")
    if dpi is None or not all(math.isfinite(float(one)) and one > 0 for one in dpi):
        return None
    return dpi[0], dpi[1]


def iptc_of(info: Mapping[Any, Any], directory: ImageFileDirectory_v2 | None) -> bytes | None:
    """The IPTC records of a picture, from Pillow's `info` of a JPEG file or a TIFF's first directory."""
    if directory is None:
        return (info.get("photoshop") or {}).get(_IPTC_RESOURCE)
    # The stored bytes, as in Pillow's getiptcinfo: Photoshop declares them as 32-bit numbers.
    return directory._tagdata.get(IPTC_NAA_CHUNK)


def _iptc_room() -> int:
    """The most bytes of IPTC that one segment of a JPEG file holds."""
    return (_SEGMENT_BYTES - len(_iptc_resource(b""))) // 2 * 2  # an odd length is padded


def iptc_segment(iptc: bytes) -> bytes:
    """A JPEG segment (APP13) with IPTC records."""
    content = _iptc_resource(iptc)
    return b"\xff\xed" + struct.pack(">H", 2 + len(content)) + content


def _iptc_resource(iptc: bytes) -> bytes:
    header = struct.pack(">4sHHI", b"8BIM", _IPTC_RESOURCE, 0, len(iptc))
    return _PHOTOSHOP + header + iptc + b"\0" * (len(iptc) % 2)


def jp2_profile(data: bytes) -> bytes | None:
    """The ICC profile of a JPEG 2000 file."""
    for place, end in _boxes(data, b"jp2h"):
        for inner, stop in _boxes(data[place:end], b"colr"):
            box = data[place + inner : place + stop]
            if box[:1] in (b"\2", b"\3"):
                return box[3:]
    return None


def with_jp2_profile(data: bytes, profile: bytes) -> bytes:
    """A JPEG 2000 file whose colour specification is an ICC profile.

    Pillow writes an enumerated colour space, which readers would prefer to a profile that comes after it.
    """
    ((place, end),) = _boxes(data, b"jp2h")
    header = data[place:end]
    ((inner, stop),) = _boxes(header, b"colr")
    # The method "restricted ICC profile", precedence and approximation; JP2 has no other for a profile.
    header = header[: inner - 8] + _box(b"colr", b"\2\0\0" + profile) + header[stop:]
    return data[: place - 8] + _box(b"jp2h", header) + data[end:]


def _boxes(data: bytes, kind: bytes) -> Iterator[tuple[int, int]]:
    """(begin, end) of the content of each box of a kind, in the sequence of boxes that `data` starts with."""
    at = 0
    while at + 8 <= len(data):
        length, own = struct.unpack_from(">I4s", data, at)
        if length < 8 or at + length > len(data):  # the last box, without a length, or one of more than 4 GiB
            return
        if own == kind:
            yield at + 8, at + length
        at += length


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content
