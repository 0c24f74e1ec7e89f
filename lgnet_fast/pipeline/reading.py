"""Reading picture files: decoded, turned upright, with their metadata; one kind of error for all that is wrong."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..errors import InvalidImageError, LGNetError
from . import chunks, deep_colour, metadata
from .deep_colour import DeepImage
from .exif import kept_exif, valid_orientation, warn_of_exif
from .notices import warn
from .sources import Encoded, open_image, reason_of

_EXTRA_SAMPLES = 338
_XMP_TEXT, _EXIF_TEXT = chunks.XMP_KEYWORD.decode(), "Raw profile type exif"  # of a PNG

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> how a picture is turned upright."""

# Pillow decodes lazily into the object itself, so two threads that share one must not both load it.
_loading = threading.Lock()


def open_upright(
    path: Path | Encoded, error: type[LGNetError] = InvalidImageError, name: str = "picture"
) -> tuple[Image.Image, int]:
    """The file's first frame, decoded and turned upright by its EXIF orientation; see `upright`.

    Raises `error` naming the path for anything that cannot be read: missing, not a picture, truncated, or over
    Pillow's decompression-bomb limit (`PIL.Image.MAX_IMAGE_PIXELS`, left as it is).
    """
    try:
        # From bytes, not a path: Pillow maps uncompressed TIFFs that it opens by path into memory, and confuses
        # height and width of those that their orientation turns by a quarter (seen in 13.0).
        data = path.data if isinstance(path, Encoded) else path.read_bytes()
        return _upright_of(data, f"{name} {str(path)!r}", error)
    except LGNetError:
        raise
    except Exception as cause:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more on bad data
        raise error(f"{name}: expected a readable picture file, got {str(path)!r} ({reason_of(cause)})") from cause


def read_picture(source: Path | Encoded) -> tuple[Image.Image | DeepImage, int]:
    """Like `open_upright`, with every bit of the file's samples: 16-bit colour is returned as a DeepImage.

    Raises InvalidImageError, also for a colour file with more than 8 bits per sample that is no PNG or TIFF.
    """
    name = f"picture {str(source)!r}"
    try:
        data = source.data if isinstance(source, Encoded) else source.read_bytes()
        format = deep_colour.deep_format(data)
        if format is not None:
            return deep_colour.read_deep(data, format)
        return _upright_of(data, name, InvalidImageError, whole=True)
    except deep_colour.NotInstalledError as cause:
        raise InvalidImageError(f"{name}: {cause}") from cause
    except InvalidImageError as cause:
        raise cause if str(cause).startswith("picture") else InvalidImageError(f"{name}: {cause}") from cause
    except Exception as cause:  # as in open_upright
        raise InvalidImageError(
            f"picture: expected a readable picture file, got {str(source)!r} ({reason_of(cause)})"
        ) from cause


def _upright_of(data: bytes, name: str, error: type[LGNetError], whole: bool = False) -> tuple[Image.Image, int]:
    """See `open_upright`. `whole`: reject files whose samples Pillow would cut to 8 bits."""
    with open_image(data) as picture:
        depth = deep_colour.cut_depth(picture.format, data) if whole else None
        if depth is not None:
            raise error(
                f"{name}: expected at most 8 bits a sample in colour, got {depth} in a {picture.format} file; "
                "make it a 16-bit PNG or TIFF"
            )
        _check_levels(picture, data, error, name, whole)
        if picture.format == "BMP":
            _check_bits(picture.mode, data, error, name)
        turned, orientation = upright(picture, error, name)
        if picture.format == "JPEG2000" and (profile := metadata.jp2_profile(data)) is not None:
            turned.info["icc_profile"] = profile
        if picture.format == "TIFF":
            tags: Any = getattr(picture, "tag_v2", {})
            if whole:
                _check_extra_samples(tags.get(_EXTRA_SAMPLES, ()), error, name)
            if turned.mode == "I;16" and tags.get(ExifTags.Base.PhotometricInterpretation, 0) == 0:
                turned = _black_is_zero(turned)  # Pillow inverts only 8 bits
    xmp = turned.info.get("xmp")
    kept = chunks.kept_chunks(data, xmp if isinstance(xmp, bytes) else None, orientation > 4)
    if kept is not None:
        turned.info["png_chunks"] = kept
    return turned, orientation


def _check_levels(picture: Image.Image, data: bytes, error: type[LGNetError], name: str, whole: bool) -> None:
    """Reject a file whose levels Pillow takes for those of another white, or, if `whole`, rescales."""
    maxval = deep_colour.ppm_maxval(data) if whole and picture.format == "PPM" else None
    if maxval not in (None, 255, 65535):
        raise error(
            f"{name}: expected a PPM or PGM file whose largest level is 255 or 65535, got {maxval}: its levels "
            "would be rescaled; make it a PNG"
        )
    bits = deep_colour.jp2_samples(data)[1] if whole and picture.format == "JPEG2000" else 8
    if picture.format == "TIFF" and getattr(picture, "tag_v2", {}).get(ExifTags.Base.BitsPerSample) == (12,):
        bits = 12
    if bits not in (8, 16):
        raise error(
            f"{name}: expected a {picture.format} file of 8 or 16 bits a sample, got {bits}: its levels would be "
            "rescaled; make it a PNG"
        )


def _check_bits(mode: str, data: bytes, error: type[LGNetError], name: str) -> None:
    """Reject a BMP whose bits Pillow takes for pixels of another depth: a palette of black and white at 8 bits."""
    bits = int.from_bytes(data[28:30], "little")
    oldest = int.from_bytes(data[14:18], "little") == 12  # its header has the bits elsewhere, and whole palettes
    if not oldest and mode in ("1", "L") and bits != {"1": 1, "L": 8}[mode]:
        raise error(
            f"{name}: expected a BMP of 1 bit a pixel for black and white, got one of {bits} bits, which Pillow does "
            "not read right; make it a PNG"
        )


def _check_extra_samples(extra: tuple[int, ...], error: type[LGNetError], name: str) -> None:
    """Reject a TIFF whose samples Pillow changes or drops, by the kinds of its samples beside the colours."""
    if 1 in extra:
        raise error(f"{name}: expected alpha beside the colours, got colours multiplied by it")
    if 0 in extra:
        raise error(
            f"{name}: expected no samples beside colours and alpha, got {extra.count(0)} of unspecified meaning; "
            "drop them, or declare one as alpha"
        )


def _black_is_zero(picture: Image.Image) -> Image.Image:
    """16-bit grey that is stored with white as 0, inverted."""
    inverted = Image.fromarray(65535 - np.asarray(picture))
    inverted.info, inverted.format = picture.info, picture.format
    return inverted


def cut_bits(picture: Image.Image) -> int | None:
    """Bits per sample of the colour file of a picture, of which Pillow will keep 8. None: it keeps all of them, or
    nothing tells, because the picture is decoded already or of no file."""
    file = getattr(picture, "fp", None)
    if len(picture.getbands()) < 2 or file is None:
        return None
    with _loading, contextlib.suppress(AttributeError, OSError, ValueError):  # its file was closed
        if ";16" in str(getattr(picture, "tile", "")):
            return 16
        if picture.format in ("PPM", "JPEG2000", "AVIF", "HEIF"):
            place = file.tell()
            file.seek(0)
            data = file.read()
            file.seek(place)
            return deep_colour.cut_depth(picture.format, data)
    return None


def upright(
    picture: Image.Image, error: type[LGNetError] = InvalidImageError, name: str = "picture"
) -> tuple[Image.Image, int]:
    """A decoded copy, turned upright, and the EXIF orientation (1 to 8) that it was turned by.

    The copy has no orientation in EXIF and XMP; its other metadata is in `.info`, and `.format` is kept.

    `.info["exif"]` has no thumbnail, because that would still show what the fill removes. Of a picture with several
    frames, the current one is used (the first of a file just opened), with a UserWarning. Raises `error` if the
    picture cannot be decoded.
    """
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        warn(f"{name}: only one of its {frames} frames is used")
    try:
        with _loading:
            key_step = _key_step(picture)  # first, because reading the EXIF of a PNG may decode it
            turns_itself = picture.format == "TIFF" and bool(getattr(picture, "tile", None))
            by_pillow = _orientation(picture) if turns_itself else 1
            picture.load()
            if picture.format == "PNG":
                chunks.drop_text(picture.info)
            orientation = _orientation(picture)
            # Pillow's own exif_transpose writes the EXIF anew and fails where a value is not of its tag's type.
            turned = picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture.copy()
            exif, left_out = kept_exif(picture.getexif(), picture.format, frames)
    except Exception as cause:  # as in open_upright: any decoder error
        # Pillow asserts that there is a file (older ones just use it); the end of `with Image.open(...)` closed it.
        closed = isinstance(cause, AssertionError | AttributeError) and getattr(picture, "fp", None) is None
        reason = "its file was closed before it was read" if closed else reason_of(cause)
        raise error(f"{name}: expected a readable picture, got one that does not decode ({reason})") from cause
    warn_of_exif(name, left_out)
    orientation = by_pillow if orientation == 1 else orientation
    key = turned.info.get("transparency")
    if key_step > 1 and isinstance(key, int):
        turned.info["transparency"] = key % (255 // key_step + 1) * key_step
    # All the places in which Pillow looks for an orientation.
    if isinstance(xmp := turned.info.get("xmp"), bytes):
        turned.info["xmp"] = chunks.upright_xmp(xmp)
    if isinstance(text := turned.info.get(_XMP_TEXT), str):
        turned.info[_XMP_TEXT] = chunks.upright_xmp(text.encode("utf-8", "surrogatepass")).decode(
            "utf-8", "surrogatepass"
        )
    turned.info.pop(_EXIF_TEXT, None)
    if picture.format == "TIFF" and ExifTags.Base.XResolution not in getattr(picture, "tag_v2", ()):
        turned.info.pop("dpi", None)  # Pillow's default of 1
    if orientation > 4 and isinstance(dpi := turned.info.get("dpi"), tuple):
        turned.info["dpi"] = dpi[::-1]  # across and down change places
    iptc = metadata.iptc_of(picture.info, getattr(picture, "tag_v2", None))
    turned.info.pop("photoshop", None)  # its other resources hold a thumbnail
    if iptc:
        turned.info["iptc"] = iptc
    turned.info.pop("exif", None)
    if exif:
        turned.info["exif"] = exif
    turned.format = "JPEG" if picture.format == "MPO" else picture.format
    return turned, orientation


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation (1 to 8) that a picture states; Pillow drops that of a TIFF, which it turns as it decodes
    it."""
    return valid_orientation(picture.getexif().get(ExifTags.Base.Orientation))


def _key_step(picture: Image.Image) -> int:
    """The factor by which Pillow widens grey of 2 or 4 bits to 8; it does not widen the transparent level with it.

    1 for other pictures, and for those that are decoded already.
    """
    raw_modes = {str(tile[3]) for tile in getattr(picture, "tile", ())} if picture.format == "PNG" else set()
    return 85 if raw_modes == {"L;2"} else 17 if raw_modes == {"L;4"} else 1
