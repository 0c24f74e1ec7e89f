"""Picture files: reading them upright, with one kind of error, and writing them atomically with metadata."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, TiffTags, UnidentifiedImageError, features
from PIL.TiffImagePlugin import IPTC_NAA_CHUNK

from ..errors import InvalidImageError, LGNetError
from . import chunks, deep, metadata
from .deep import DeepImage
from .exif import TIFF_DESCRIPTIVE, kept_exif
from .formats import ADDRESS, EXTENSIONS, MODES
from .notices import warn
from .writing import write_file

_HEIF_EXTRA = "pip install 'lgnet-fast[heif]'"

# Mode -> modes that hold all its samples. Mode I of the pipeline never exceeds 16 bits, and Pillow cannot convert
# I;16B to I;16 directly.
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

_EXTRA_SAMPLES = 338

# Pillow decodes lazily into the object itself, so two threads that share one must not both load it.
_loading = threading.Lock()


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
            raise error(f"{name}: expected a readable picture, got {self.name!r} ({_reason(cause)})") from cause


def file_of(source: Any, error: type[LGNetError], name: str) -> Any:
    """A path as `Path`; the bytes of a file, a file opened for reading bytes (read to its end), or a file with
    `read_bytes`, such as `zipfile.Path`, as `Encoded`.

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
            read = source.read()
        except (OSError, ValueError) as cause:  # ValueError: it is closed
            raise error(f"{name}: expected a readable file, got {title!r} ({_reason(cause)})") from cause
        if not isinstance(read, bytes):
            raise error(f"{name}: expected a file opened for reading bytes (mode 'rb'), got {title!r} opened as text")
        return Encoded(title, read)
    if callable(getattr(source, "read_bytes", None)):
        try:
            return Encoded(str(source), source.read_bytes())
        except (OSError, KeyError, ValueError) as cause:  # KeyError: not in the archive
            raise error(f"{name}: expected a readable file, got {str(source)!r} ({_reason(cause)})") from cause
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


def _is_heif(data: bytes) -> bool:
    # AVIF files may begin with "mif1" too; then "avif" is among their compatible brands.
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return data[4:8] == b"ftyp" and data[8:12] in brands and b"avif" not in data[:64]


def reason_against_reading(format: str) -> str | None:
    """Why pictures of a Pillow format cannot be read, None where they can."""
    if format == "HEIF":
        try:
            import pillow_heif
        except ImportError:
            return f"HEIC pictures need the package pillow-heif: {_HEIF_EXTRA}"
        pillow_heif.register_heif_opener()
    elif format in ("AVIF", "JPEG2000"):
        known = {"AVIF": "avif", "JPEG2000": "jpg_2000"}[format]
        if not (known in features.modules or known in features.codecs) or not features.check(known):
            return f"{format} pictures need a Pillow that was built with {format}"
    return None


def reason_against_writing(format: str) -> str | None:
    """Why pictures of a Pillow format cannot be written, None where they can."""
    if format not in MODES:
        return f"{format} is not written here"
    reason = reason_against_reading(format)
    if reason is None and format == "HEIF":
        import pillow_heif

        if not pillow_heif.libheif_info()["HEIF"]:
            return "HEIC pictures need a pillow-heif with an encoder"
    return reason


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
        raise error(f"{name}: expected a readable picture file, got {str(path)!r} ({_reason(cause)})") from cause


def read_picture(source: Path | Encoded) -> tuple[Image.Image | DeepImage, int]:
    """Like `open_upright`, with every bit of the file's samples: 16-bit colour is returned as a DeepImage.

    Raises InvalidImageError, also for a colour file with more than 8 bits per sample that is no PNG or TIFF.
    """
    name = f"picture {str(source)!r}"
    try:
        data = source.data if isinstance(source, Encoded) else source.read_bytes()
        format = deep.deep_format(data)
        if format is not None:
            return deep.read_deep(data, format)
        return _upright_of(data, name, InvalidImageError, whole=True)
    except deep.NotInstalledError as cause:
        raise InvalidImageError(f"{name}: {cause}") from cause
    except InvalidImageError as cause:
        raise cause if str(cause).startswith("picture") else InvalidImageError(f"{name}: {cause}") from cause
    except Exception as cause:  # as in open_upright
        raise InvalidImageError(
            f"picture: expected a readable picture file, got {str(source)!r} ({_reason(cause)})"
        ) from cause


def _upright_of(data: bytes, name: str, error: type[LGNetError], whole: bool = False) -> tuple[Image.Image, int]:
    """See `open_upright`. `whole`: reject files whose samples Pillow would cut to 8 bits."""
    with open_image(data) as picture:
        depth = deep.cut_depth(picture.format, data) if whole else None
        if depth is not None:
            raise error(
                f"{name}: expected at most 8 bits a sample in colour, got {depth} in a {picture.format} file; "
                "make it a 16-bit PNG or TIFF"
            )
        maxval = deep.ppm_maxval(data) if whole and picture.format == "PPM" else None
        if maxval not in (None, 255, 65535):
            raise error(
                f"{name}: expected a PPM or PGM file whose largest level is 255 or 65535, got {maxval}: its levels "
                "would be rescaled; make it a PNG"
            )
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
            orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
            picture.load()
            turned = ImageOps.exif_transpose(picture)
            exif = kept_exif(picture.getexif(), picture.format)
    except Exception as cause:  # as in open_upright: any decoder error
        # Pillow asserts that there is a file (older ones just use it); the end of `with Image.open(...)` closed it.
        closed = isinstance(cause, AssertionError | AttributeError) and getattr(picture, "fp", None) is None
        reason = "its file was closed before it was read" if closed else _reason(cause)
        raise error(f"{name}: expected a readable picture, got one that does not decode ({reason})") from cause
    key, xmp = turned.info.get("transparency"), turned.info.get("xmp")
    if key_step > 1 and isinstance(key, int):
        turned.info["transparency"] = key % (255 // key_step + 1) * key_step
    if isinstance(xmp, bytes):
        turned.info["xmp"] = chunks.upright_xmp(xmp)
    if picture.format == "TIFF" and ExifTags.Base.XResolution not in getattr(picture, "tag_v2", ()):
        turned.info.pop("dpi", None)  # Pillow's default of 1
    iptc = metadata.iptc_of(picture.info, getattr(picture, "tag_v2", None))
    turned.info.pop("photoshop", None)  # its other resources hold a thumbnail
    if iptc:
        turned.info["iptc"] = iptc
    turned.info.pop("exif", None)
    if exif:
        turned.info["exif"] = exif
    turned.format = "JPEG" if picture.format == "MPO" else picture.format
    return turned, orientation


def _key_step(picture: Image.Image) -> int:
    """The factor by which Pillow widens grey of 2 or 4 bits to 8; it does not widen the transparent level with it.

    1 for other pictures, and for those that are decoded already.
    """
    raw_modes = {str(tile[3]) for tile in getattr(picture, "tile", ())} if picture.format == "PNG" else set()
    return 85 if raw_modes == {"L;2"} else 17 if raw_modes == {"L;4"} else 1


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
    it was opened, if that was a JPEG, otherwise quality 95 without subsampling. Raises InvalidImageError when the
    format cannot hold the picture's mode or alpha; OSError from the file system.
    """
    format = format or EXTENSIONS.get(path.suffix.lower())
    if format not in MODES:
        raise InvalidImageError(f"format: expected one of {', '.join(MODES)}, got {format or path.suffix!r}")
    write_file(path, encode(picture, format, like, quality))


def encode(
    picture: Image.Image | DeepImage, format: str, like: Image.Image | None = None, quality: int | None = None
) -> bytes:
    """The file that `save_picture` writes. `format`: a key of MODES."""
    if isinstance(picture, DeepImage):
        return deep.encode_deep(picture, format)
    metadata.warn_lost(picture.info, format)
    if (reason := reason_against_writing(format)) is not None:
        raise InvalidImageError(f"format: {reason}")
    for mode in held_modes(picture.mode, "transparency" in picture.info, format):
        picture = picture.convert(mode)
    directories: dict[int, dict[int, Any]] = {}
    iptc, profile = picture.info.get("iptc"), picture.info.get("icc_profile")
    options: dict[str, Any] = {
        key: picture.info[key]
        for key in ("exif", "icc_profile", "dpi", "xmp", "transparency")
        if picture.info.get(key) is not None
    }
    if format == "JPEG":
        options.update(_jpeg_options(like, picture, quality))
        options["extra"] = metadata.iptc_segment(iptc) if iptc else b""
    elif format == "WEBP":
        options.update({"lossless": True, "exact": True} if quality is None else {"quality": quality, "exact": True})
    elif format == "AVIF":
        options.update({"quality": quality or 95, "subsampling": "4:4:4"})
    elif format == "HEIF":
        options.update({"quality": quality or 95, "chroma": 444})
    elif format == "TIFF":
        compression = picture.info.get("compression")
        options["compression"] = compression if compression in _TIFF_LOSSLESS else "tiff_adobe_deflate"
        options["tiffinfo"], directories = _tiff_tags(options.pop("exif", b""), options.pop("xmp", None))
        if iptc:
            options["tiffinfo"][IPTC_NAA_CHUNK] = iptc
    encoded = io.BytesIO()
    try:
        picture.save(encoded, format=format, **options)
    except (ValueError, RuntimeError, OSError) as cause:  # the encoders' errors; nothing is written to a disk yet
        raise InvalidImageError(f"format: {format} could not be written ({_reason(cause)})") from cause
    data = encoded.getvalue()
    if format == "TIFF":
        return deep.with_directories(data, directories)
    if format == "JPEG2000" and profile:
        return metadata.with_jp2_profile(data, profile)
    if format != "PNG":
        return data
    if (kept := picture.info.get("png_chunks")) is not None:
        return chunks.put_chunks(data, chunks.fitting(kept, data))
    xmp = picture.info.get("xmp")
    return chunks.put_chunks(data, [chunks.xmp_chunk(xmp)] if isinstance(xmp, bytes) else [])


def _tiff_tags(exif: bytes, xmp: Any) -> tuple[dict[int, Any], dict[int, dict[int, Any]]]:
    """The tags of a TIFF's first directory for EXIF and XMP, and the directories to append."""
    read = Image.Exif()
    read.load(exif)
    directories = deep.tiff_directories(read)
    # Most tags below XMP's describe storage, here that of the file that the EXIF came from.
    tags = {
        tag: value
        for tag, value in read.items()
        if (tag in TIFF_DESCRIPTIVE or tag > ExifTags.Base.XMLPacket) and tag not in TiffTags.TAGS_V2_GROUPS
    }
    tags.update(dict.fromkeys(directories, 0))
    if xmp:
        tags[ExifTags.Base.XMLPacket] = xmp
    return tags, directories


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


def _jpeg_options(like: Image.Image | None, picture: Image.Image, quality: int | None) -> dict[str, Any]:
    if quality is not None:
        # Below quality 90, encoders usually halve the resolution of chroma.
        return {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    if isinstance(like, JpegImagePlugin.JpegImageFile) and like.mode == picture.mode:
        # With the tables of the source, unchanged blocks are reproduced almost exactly.
        sampling = JpegImagePlugin.get_sampling(like)
        return {"qtables": like.quantization, "subsampling": sampling if sampling >= 0 else 0}
    return {"quality": 95, "subsampling": 0}


def held_modes(mode: str, transparent: bool, format: str) -> list[str]:
    """The modes to convert a picture to, one after the other, so that the format can hold it without loss.

    `transparent`: whether a palette has alpha. Raises InvalidImageError: there is no such mode.
    """
    own, steps = mode, []
    while mode not in MODES[format]:
        if mode == "P":
            mode = "RGBA" if transparent else "RGB"
        elif mode in _WIDER:
            mode = _WIDER[mode]
        else:
            raise InvalidImageError(
                f"format: {format} holds {', '.join(sorted(MODES[format]))}, got a picture of mode {own}; "
                "PNG and TIFF keep colour, alpha and depth"
            )
        steps.append(mode)
    return steps


def _reason(cause: BaseException) -> str:
    text = str(cause).splitlines()[0] if str(cause) else ""
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
