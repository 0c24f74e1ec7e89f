"""PNG chunks that Pillow drops, copied from a file to its result: text, colour space, significant bits."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_KEYWORD = b"XML:com.adobe.xmp"

_COLOUR = {b"gAMA", b"cHRM", b"sRGB", b"cICP", b"iCCP", b"mDCV", b"cLLI"}
# Their meaning depends on the samples' layout.
_LAYOUT = {b"sBIT", b"bKGD"}
_TEXT = {b"tEXt", b"zTXt", b"iTXt"}
# Old text forms of EXIF are left out, because the result's EXIF is written without thumbnail and orientation.
_EXIF_TEXT = (b"Raw profile type exif\0", b"Raw profile type APP1\0")
_WRITTEN_ANEW = {b"eXIf"}

# Keys of Pillow's `info` that stand for metadata. Programs that copy `info` as text write chunks of these names.
_RESERVED = (
    "background",
    "disposal",
    "dpi",
    "duration",
    "exif",
    "icc_profile",
    "iptc",
    "loop",
    "photoshop",
    "transparency",
    "xmp",
)

# XMP states it as an attribute or as an element.
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation="([1-8])"|<tiff:Orientation>([1-8])</tiff:Orientation>')

Chunk = tuple[bytes, bytes]


@dataclass(frozen=True)
class Kept:
    """Chunks of a source to copy: `chunks` (type, content), `layout`: bit depth and colour type of the source."""

    layout: tuple[int, int]
    chunks: tuple[Chunk, ...]


def read_chunks(data: bytes) -> list[Chunk]:
    """(type, content) of every whole chunk of a PNG file; of the image data only the type. [] for other files."""
    found: list[Chunk] = []
    at = len(SIGNATURE)
    while data.startswith(SIGNATURE) and at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            break
        found.append((kind, b"" if kind == b"IDAT" else data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def kept_chunks(data: bytes, xmp: bytes | None = None, turned: bool = False) -> Kept | None:
    """The chunks that a result copies from a PNG file; None for other files.

    Text and XMP, colour space, significant bits, background, resolution, and chunks of unknown types that are marked
    as safe to copy into a changed picture (PNG specification, section 5.4).

    Args:
        data: the file.
        xmp: replaces the XMP of the file; the caller took the orientation out.
        turned: whether by a quarter; then the directions of the resolution are swapped.
    """
    layout, kept = None, []
    for kind, content in read_chunks(data):
        if kind == b"IHDR" and len(content) == 13:
            layout = (content[8], content[9])
        if kind == b"iTXt" and content.startswith(XMP_KEYWORD + b"\0") and xmp is not None:
            content = xmp_chunk(xmp)[1]
        if kind == b"pHYs" and turned and len(content) == 9:
            content = content[4:8] + content[:4] + content[8:]
        if kind in _TEXT and content.startswith(_EXIF_TEXT):
            continue
        safe_to_copy = bool(kind[0] & 32) and bool(kind[3] & 32) and kind not in _WRITTEN_ANEW
        if kind in _COLOUR or kind in _LAYOUT or safe_to_copy:
            kept.append((kind, content))
    return None if layout is None else Kept(layout, tuple(kept))


def put_chunks(encoded: bytes, added: Iterable[Chunk]) -> bytes:
    """A PNG file with chunks added before its image data; they replace those of the same types."""
    added = list(added)
    own = {kind for kind, _ in added} - _TEXT
    first = [one for one in added if one[0] in _COLOUR or one[0] == b"sBIT"]
    rest = [one for one in added if one not in first]
    parts, at, placed = [SIGNATURE], len(SIGNATURE), False
    while at + 12 <= len(encoded):
        (length,) = struct.unpack_from(">I", encoded, at)
        kind = encoded[at + 4 : at + 8]
        if kind == b"IDAT" and not placed:
            parts += [_chunk(*one) for one in rest]
            placed = True
        if kind not in own:
            parts.append(encoded[at : at + 12 + length])
        if kind == b"IHDR":
            parts += [_chunk(*one) for one in first]
        at += 12 + length
    return b"".join(parts)


def fitting(kept: Kept, encoded: bytes) -> list[Chunk]:
    """The kept chunks that fit a result's bit depth and colour type, and do not repeat its text."""
    present = read_chunks(encoded)
    header = dict(present)[b"IHDR"]
    same = header[9] == kept.layout[1] and (header[8] == kept.layout[0] or header[9] == 3)
    return [one for one in kept.chunks if (one[0] not in _LAYOUT or same) and one not in present]


def drop_text(info: dict[Any, Any]) -> None:
    """Remove from Pillow's `info` text that a PNG has under the name of other metadata, such as "dpi"."""
    for key in _RESERVED:
        value = info.get(key)
        # Text of the name "exif" stays bytes, without the start that Pillow gives the contents of an eXIf chunk.
        if isinstance(value, str) or (
            key == "exif" and isinstance(value, bytes) and not value.startswith(b"Exif\0\0")
        ):
            del info[key]


def names(kept: Kept) -> list[str]:
    """Types of the text and colour chunks except XMP, for a message about a format that has no place for them."""
    shown = _COLOUR - {b"iCCP", b"sRGB"}
    own = (kind for kind, content in kept.chunks if not content.startswith(XMP_KEYWORD + b"\0"))
    return sorted({kind.decode() for kind in own if kind in shown or kind in _TEXT})


def xmp_orientation(xmp: bytes) -> int:
    """The orientation (1 to 8) that an XMP packet states; 1 where it states none."""
    stated = _XMP_ORIENTATION.search(xmp)
    return int(stated[1] or stated[2]) if stated else 1


def upright_xmp(xmp: bytes) -> bytes:
    """An XMP packet without its orientation, which would turn an upright picture again."""
    return _XMP_ORIENTATION.sub(b"", xmp)


def xmp_chunk(xmp: bytes) -> Chunk:
    """An XMP packet as an iTXt chunk."""
    return b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + xmp


def profile_chunk(profile: bytes) -> Chunk:
    """An ICC profile as an iCCP chunk."""
    return b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)


def resolution_chunk(dpi: tuple[float, float]) -> Chunk:
    """Pixels per inch as a pHYs chunk, which counts them per metre."""
    across, down = (round(float(one) / 0.0254) for one in dpi)
    return b"pHYs", struct.pack(">IIB", across, down, 1)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
