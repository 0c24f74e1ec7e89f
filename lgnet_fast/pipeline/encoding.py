"""Picture files as results: the mode that a format holds, its options, and the metadata of the input."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageMode, JpegImagePlugin, TiffTags
from PIL.TiffImagePlugin import IPTC_NAA_CHUNK

from ..errors import InvalidImageError
from . import chunks, deep_colour, metadata, tiff
from .deep_colour import DeepImage
from .exif import TIFF_DESCRIPTIVE, name_of_tag
from .formats import EXTENSIONS, KEYED_MODES, MODES, MOST_BYTES, MOST_SIDE, NARROW_HEIC, reason_against_writing
from .notices import warn
from .sources import reason_of
from .writing import write_file

# Mode -> modes that hold all its samples. Mode I of the pipeline never exceeds 16 bits, and Pillow cannot convert
# I;16B to I;16 directly.
_WIDER = {"1": "L", "L": "RGB", "LA": "RGBA", "I;16B": "I", "I": "I;16", "P": "RGB"}
# The same with a transparent level, colour or palette entry, which becomes a channel.
_WITH_ALPHA = {"1": "LA", "L": "LA", "P": "RGBA", "RGB": "RGBA"}

_TIFF_LOSSLESS = {
    "raw",
    "tiff_lzw",
    "tiff_adobe_deflate",
    "tiff_deflate",
    "packbits",
    "group3",
    "group4",
    "lzma",
    "zstd",
}


def save_picture(
    picture: Image.Image | DeepImage,
    path: Path,
    *,
    like: Image.Image | None = None,
    format: str | None = None,
    quality: int | None = None,
) -> None:
    """Write `picture` to `path` atomically, with the EXIF, ICC profile, XMP and DPI of its `.info`.

    From a PNG that was read by `read_picture` or `open_upright`, a PNG also keeps text and colour chunks; for another
    format a UserWarning names the chunks that it cannot hold.

    `format`: a Pillow format name; None: that of the extension. `quality`: 1 to 100, for JPEG, WebP, AVIF and
    HEIC; None gives lossless WebP, and for JPEG the quantisation tables and chroma sampling of `like`, the picture as
    it was opened, if that was a JPEG, otherwise quality 95 without subsampling. Raises InvalidImageError: an unknown
    format, one that cannot hold the picture's mode, alpha or size, or another quality; OSError from the file system.
    """
    format = format or EXTENSIONS.get(path.suffix.lower())
    if format not in MODES:
        raise InvalidImageError(f"format: expected one of {', '.join(MODES)}, got {format or path.suffix!r}")
    write_file(path, encode(picture, format, like, quality))


def encode(
    picture: Image.Image | DeepImage, format: str, like: Image.Image | None = None, quality: int | None = None
) -> bytes:
    """The file that `save_picture` writes. `format`: a key of MODES. Raises InvalidImageError, as `save_picture`."""
    quality = checked_quality(quality)
    if isinstance(picture, DeepImage):
        return deep_colour.encode_deep(picture, format)
    if (reason := reason_against_writing(format)) is not None:
        raise InvalidImageError(f"format: {reason}")
    check_side(picture.size, format)
    modes = held_modes(picture.mode, transparency_of(picture), format, picture.size)
    held = metadata.held(picture.info, format, in_colour=bool(modes) and modes[-1].startswith("RGB"))
    for mode in modes:
        picture = picture.convert(mode)
        if "icc_profile" not in held:  # some of Pillow's encoders would take that of `info`
            picture.info.pop("icc_profile", None)
    if format == "GIF" and _has_alphas(picture):  # Pillow would take its bytes for red, green and blue
        picture = picture.copy()
        picture.putpalette(picture.getpalette("RGB") or ())
    if format == "BMP" and picture.mode == "P" and len(palette := picture.getpalette("RGB") or []) < 9:
        picture = picture.copy()  # Pillow would read a file of two colours, black and white, as one of 1 bit a pixel
        picture.putpalette([*palette, *[0] * (9 - len(palette))])
    tags: dict[int, Any] = {}
    directories: dict[int, dict[int, Any]] = {}
    iptc, profile = held.pop("iptc", None), held.get("icc_profile")
    options: dict[str, Any] = dict(held)
    if (key := picture.info.get("transparency")) is not None:
        options["transparency"] = key
    if format == "JPEG":
        options.update(_jpeg_options(like, picture, quality))
        options["extra"] = metadata.iptc_segment(iptc) if iptc else b""
        options.setdefault("xmp", b"")  # some versions of Pillow would take that of `info`, which may be too long
    elif format == "WEBP":
        options.update({"lossless": True, "exact": True} if quality is None else {"quality": quality, "exact": True})
    elif format in ("AVIF", "HEIF"):
        options["quality"] = 95 if quality is None else quality
        options.update(_chroma(format, picture.mode))
    elif format == "TIFF":
        compression = picture.info.get("compression")
        options["compression"] = compression if compression in _TIFF_LOSSLESS else "tiff_adobe_deflate"
        tags, directories = _tiff_tags(options.pop("exif", b""), options.pop("xmp", None))
        if iptc:
            tags[IPTC_NAA_CHUNK] = iptc
    encoded = io.BytesIO()
    try:
        picture.save(encoded, format=format, **options)
        data = encoded.getvalue()
        if format == "TIFF":
            return tiff.with_tags(data, tags, directories)
    except (ValueError, RuntimeError, OSError, OverflowError, struct.error) as cause:  # the encoders' errors
        raise InvalidImageError(f"format: {format} could not be written ({reason_of(cause)})") from cause
    if format == "JPEG2000" and profile:
        return metadata.with_jp2_profile(data, profile)
    if format != "PNG":
        return data
    if (kept := picture.info.get("png_chunks")) is not None:
        return chunks.put_chunks(data, chunks.fitting(kept, data))
    xmp = picture.info.get("xmp")
    return chunks.put_chunks(data, [chunks.xmp_chunk(xmp)] if isinstance(xmp, bytes) else [])


def _chroma(format: str, mode: str) -> dict[str, Any]:
    """The options of AVIF and HEIC that store colours at full resolution, and of a grey picture none."""
    if format == "AVIF":
        return {"subsampling": "4:0:0" if mode == "L" else "4:4:4"}
    return {} if mode == "L" else {"chroma": 444}


def check_side(size: tuple[int, int], format: str) -> None:
    """Raise InvalidImageError where a side of a picture is longer than `format` (a key of MODES) holds."""
    most = MOST_SIDE.get(format)
    if most is not None and max(size) > most:
        holding = ", ".join(name for name in MODES if name not in MOST_SIDE)
        raise InvalidImageError(
            f"format: {format} holds at most {most} pixels a side, got {max(size)}; longer ones are held by {holding}"
        )
    short, long = NARROW_HEIC
    if format == "HEIF" and min(size) < short and max(size) > long:
        raise InvalidImageError(
            f"format: HEIF holds at most {long} pixels a side where the other has less than {short}, got {max(size)} "
            f"beside {min(size)}; PNG holds more"
        )


def checked_quality(quality: int | None) -> int | None:
    """`quality` as Pillow takes it. Raises InvalidImageError: neither None nor a whole number from 1 to 100."""
    if quality is None:
        return None
    whole = isinstance(quality, (int, np.integer)) and not isinstance(quality, bool)
    if not whole or not 1 <= quality <= 100:
        raise InvalidImageError(f"quality: expected a whole number from 1 to 100, got {quality!r}")
    return int(quality)


def _tiff_tags(exif: bytes, xmp: Any) -> tuple[dict[int, Any], dict[int, dict[int, Any]]]:
    """The tags of a TIFF's first directory for EXIF and XMP, and the directories that it holds.

    A UserWarning names the tags whose values cannot be written.
    """
    read = Image.Exif()
    read.load(exif)
    # Most tags below XMP's describe storage, here that of the file that the EXIF came from.
    tags = {
        tag: value
        for tag, value in read.items()
        if (tag in TIFF_DESCRIPTIVE or tag > ExifTags.Base.XMLPacket) and tag not in TiffTags.TAGS_V2_GROUPS
    }
    good = {tag: value for tag, value in tags.items() if tiff.can_write({tag: value})}
    if names := ", ".join(name_of_tag(tag) for tag in tags if tag not in good):
        warn(f"format: TIFF does not take the values of the picture's EXIF tags {names}")
    if xmp:
        good[ExifTags.Base.XMLPacket] = xmp
    return good, tiff.directories_of(read)


def _jpeg_options(like: Image.Image | None, picture: Image.Image, quality: int | None) -> dict[str, Any]:
    if quality is not None:
        # Below quality 90, encoders usually halve the resolution of chroma.
        return {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    if isinstance(like, JpegImagePlugin.JpegImageFile) and like.mode == picture.mode:
        # With the tables of the source, unchanged blocks are reproduced almost exactly.
        sampling = JpegImagePlugin.get_sampling(like)
        return {"qtables": like.quantization, "subsampling": sampling if sampling >= 0 else 0}
    return {"quality": 95, "subsampling": 0}


def transparency_of(picture: Image.Image) -> Any:
    """The transparent level, colour or palette entry, or the palette's alphas (bytes); None without any."""
    key = picture.info.get("transparency")
    if key is None and _has_alphas(picture):
        alphas = bytes((picture.getpalette("RGBA") or ())[3::4])
        return alphas if min(alphas, default=255) < 255 else None
    return key


def _has_alphas(picture: Image.Image) -> bool:
    """Whether the colours of a palette have alphas; in some pictures `info` has them too."""
    picture.load()
    return picture.mode == "P" and picture.im.getpalettemode() == "RGBA"


def held_modes(mode: str, transparent: Any, format: str, size: tuple[int, int]) -> list[str]:
    """The modes to convert a picture to, one after the other, so that the format can hold it without loss.

    `transparent`: of `transparency_of`.
    Raises InvalidImageError: there is no such mode, or its samples take more bytes than the format holds.
    """
    steps: list[str] = []
    keyed = transparent is not None and (mode in _WITH_ALPHA or mode.startswith("I"))
    what = f"mode {mode} with a transparent colour" if keyed else f"mode {mode}"

    def held(name: str) -> set[str]:
        if not keyed:
            return MODES[name]
        return set() if name == "GIF" and isinstance(transparent, bytes) else KEYED_MODES.get(name, set())

    while mode not in held(format):
        wider = (_WITH_ALPHA if keyed and mode in _WITH_ALPHA else _WIDER).get(mode)
        if wider is None:
            holding = [name for name in MODES if mode in held(name)]
            advice = f"it is held by {', '.join(holding)}" if holding else "convert it to RGB before"
            raise InvalidImageError(
                f"format: {format} holds {', '.join(sorted(MODES[format]))}, got a picture of {what}; {advice}"
            )
        keyed = keyed and mode not in _WITH_ALPHA
        mode = wider
        steps.append(mode)
    own, most = _sample_bytes(size, mode), MOST_BYTES.get(format)
    if most is not None and own > most:
        raise InvalidImageError(
            f"format: {format} holds at most {most} bytes of samples, got {own} ({size[0]}x{size[1]}, mode {mode}); "
            "PNG and PPM hold more"
        )
    return steps


def _sample_bytes(size: tuple[int, int], mode: str) -> int:
    """The bytes of a picture's samples, each row in whole words of 4 bytes, as in a BMP."""
    known = ImageMode.getmode(mode)
    bits = 1 if mode == "1" else len(known.bands) * int(known.typestr[-1]) * 8
    return size[1] * ((size[0] * bits + 31) // 32 * 4)
