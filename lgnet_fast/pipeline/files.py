"""Picture files: reading them upright with one clear error, and writing them atomically with their metadata."""

from __future__ import annotations

import io
import os
import threading
import uuid
import warnings
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from ..errors import InvalidImageError, LGNetError

# Extensions that a folder run picks up, and the Pillow format that each one names. The first extension of a format
# is the one a file gets when its own does not name the format.
EXTENSIONS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
}
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP"}

_MODES = {
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"},
    "JPEG": {"L", "RGB", "CMYK"},
    "WEBP": {"RGB", "RGBA"},
    "TIFF": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I", "CMYK", "YCbCr"},
    "BMP": {"1", "L", "P", "RGB"},
    "GIF": {"1", "L", "P"},
}
# Modes that hold every sample of another; the pipeline's mode I never exceeds 16 bits, and Pillow has no direct way
# from I;16B to I;16.
_WIDER = {"1": "L", "L": "RGB", "LA": "RGBA", "I;16B": "I", "I": "I;16"}

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

# A TIFF's tags describe its storage too; only those about the picture itself may go into another file.
_TIFF_DESCRIPTIVE = {
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

# Pillow decodes lazily into the object itself, so two threads that share one must not both load it.
_loading = threading.Lock()


def open_upright(
    path: Path, error: type[LGNetError] = InvalidImageError, name: str = "picture"
) -> tuple[Image.Image, int]:
    """The file's first frame, decoded and turned upright by its EXIF orientation; see `upright`.

    Raises `error` naming the path for anything that cannot be read: missing, not a picture, truncated, or over
    Pillow's decompression-bomb limit (`PIL.Image.MAX_IMAGE_PIXELS`, left as it is).
    """
    try:
        # From a file object, not a path: Pillow maps uncompressed TIFFs that it opens by path into memory, and mixes
        # up height and width of those that their orientation turns by a quarter (seen in 13.0).
        with open(path, "rb") as file, Image.open(file) as picture:
            return upright(picture, error, f"{name} {str(path)!r}")
    except LGNetError:
        raise
    except Exception as cause:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more on bad data
        raise error(f"{name}: expected a readable picture file, got {str(path)!r} ({_reason(cause)})") from cause


def upright(
    picture: Image.Image, error: type[LGNetError] = InvalidImageError, name: str = "picture"
) -> tuple[Image.Image, int]:
    """A decoded copy, turned upright, and the EXIF orientation (1 to 8) that it was turned by.

    The copy has no orientation tag; its other metadata is in `.info`, and `.format` is kept.

    `.info["exif"]` is written anew without the thumbnail: it would still show what the fill removes. A picture of
    several frames gives the current one (the first of a file just opened) and a UserWarning. Raises `error` when it
    cannot be decoded.
    """
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        warnings.warn(f"{name}: only one of its {frames} frames is used", UserWarning, stacklevel=2)
    try:
        with _loading:
            orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
            picture.load()
            turned = ImageOps.exif_transpose(picture)
            exif = _exif(picture)
    except Exception as cause:  # as in open_upright: any decoder error
        raise error(
            f"{name}: expected a readable picture, got one that does not decode ({_reason(cause)})"
        ) from cause
    turned.info.pop("exif", None)
    if exif:
        turned.info["exif"] = exif
    turned.format = "JPEG" if picture.format == "MPO" else picture.format
    return turned, orientation


def save_picture(
    picture: Image.Image,
    path: Path,
    *,
    like: Image.Image | None = None,
    format: str | None = None,
    quality: int | None = None,
) -> None:
    """Writes `picture` to `path` atomically, with the EXIF, ICC profile, XMP and DPI of its `.info`.

    `format`: a Pillow format name; None takes the one of the extension. `quality`: 1 to 100, for JPEG and WebP; None
    gives lossless WebP, and for JPEG the quantisation tables and chroma sampling of `like`, the picture as it was
    opened, if that was a JPEG, otherwise quality 95 without subsampling. Raises InvalidImageError when the format
    cannot hold the picture's mode or alpha; OSError from the file system.
    """
    format = format or EXTENSIONS.get(path.suffix.lower())
    if format not in _MODES:
        raise InvalidImageError(f"format: expected one of {', '.join(_MODES)}, got {format or path.suffix!r}")
    picture = _fit_mode(picture, format)
    options: dict[str, Any] = {
        key: picture.info[key]
        for key in ("exif", "icc_profile", "dpi", "xmp", "transparency")
        if picture.info.get(key) is not None
    }
    if format == "JPEG":
        options.update(_jpeg_options(like, picture, quality))
    elif format == "WEBP":
        options.update({"lossless": True, "exact": True} if quality is None else {"quality": quality, "exact": True})
    elif format == "TIFF":
        compression = picture.info.get("compression")
        options["compression"] = compression if compression in _TIFF_LOSSLESS else "tiff_adobe_deflate"
    encoded = io.BytesIO()
    try:
        picture.save(encoded, format=format, **options)
    except ValueError as cause:
        raise InvalidImageError(f"format: {format} could not be written ({_reason(cause)})") from cause
    write_atomically(path, encoded.getvalue())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, flushes it to the disk, then renames: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:100]}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def format_of(path: Path) -> str | None:
    """The Pillow format of a file's contents by its header, None where it is not a picture."""
    try:
        with Image.open(path) as picture:
            return "JPEG" if picture.format == "MPO" else picture.format
    except Exception:  # the item's own run reports the reason
        return None


def _exif(picture: Image.Image) -> bytes:
    exif, kept = picture.getexif(), Image.Exif()
    directories = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
    for tag, value in exif.items():
        if tag != ExifTags.Base.Orientation and (picture.format != "TIFF" or tag in _TIFF_DESCRIPTIVE):
            # Pillow writes a sub-directory only where it is given as a dictionary.
            kept[tag] = exif.get_ifd(tag) if tag in directories else value
    return kept.tobytes() if len(kept) else b""


def _jpeg_options(like: Image.Image | None, picture: Image.Image, quality: int | None) -> dict[str, Any]:
    if quality is not None:
        # Below 90 halved chroma is what an encoder is expected to do.
        return {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    if isinstance(like, JpegImagePlugin.JpegImageFile) and like.mode == picture.mode:
        # The source's own tables reproduce blocks that did not change almost exactly.
        sampling = JpegImagePlugin.get_sampling(like)
        return {"qtables": like.quantization, "subsampling": sampling if sampling >= 0 else 0}
    return {"quality": 95, "subsampling": 0}


def _fit_mode(picture: Image.Image, format: str) -> Image.Image:
    fitted = picture
    while fitted.mode not in _MODES[format]:
        if fitted.mode == "P":
            fitted = fitted.convert("RGBA" if "transparency" in fitted.info else "RGB")
        elif fitted.mode in _WIDER:
            fitted = fitted.convert(_WIDER[fitted.mode])
        else:
            raise InvalidImageError(
                f"format: {format} holds {', '.join(sorted(_MODES[format]))}, got a picture of mode {picture.mode}; "
                "PNG and TIFF keep alpha and depth"
            )
    return fitted


def _reason(cause: BaseException) -> str:
    text = str(cause).splitlines()[0] if str(cause) else ""
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
