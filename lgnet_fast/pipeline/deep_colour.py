"""PNG and TIFF files with 16 bits per sample and several samples per pixel, for which Pillow has no mode.

imagecodecs (libpng) reads and writes PNG files; tifffile reads and writes TIFF files, with compressions by
imagecodecs. Both return the stored samples for every byte order, tiling and predictor. OpenCV would reorder channels
and supports fewer kinds of TIFF; pypng decodes PNG's filters in Python, which takes a minute for a large photograph.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IPTC_NAA_CHUNK, ImageFileDirectory_v2

from ..errors import InvalidImageError
from . import chunks, metadata, tiff
from .exif import (
    TIFF_DESCRIPTIVE,
    counts_pages,
    kept_exif,
    name_of_tag,
    packed_exif,
    valid_orientation,
    warn_of_exif,
)
from .formats import EXTENSIONS
from .notices import warn
from .writing import write_file

EXTRA = "pip install 'lgnet-fast[deep]'"

_COLOUR_TYPES = {2: 3, 4: 2, 6: 4}  # PNG's colour type -> samples per pixel
_MODES = {2: "LA;16", 3: "RGB;16", 4: "RGBA;16"}
_MOST_SIDE_PNG = 1_000_000  # libpng's limit, which imagecodecs keeps
_RGB, _GREY = 2, 1  # TIFF's photometric interpretation
_UNASSOCIATED = (0, 2)  # extra samples that do not change the colours: unspecified, and unassociated alpha
_COMPRESSIONS = {1: None, 5: "lzw", 8: "adobe_deflate", 32946: "adobe_deflate", 50000: "zstd"}

_TIFF_TEXT = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)


# tifffile writes these tags only under its own names.
_DIRECTORIES = {int(ExifTags.IFD.Exif): "ExifTag", int(ExifTags.IFD.GPSInfo): "GPSTag"}


class NotInstalledError(InvalidImageError):
    """A 16-bit colour picture for which the required packages are not installed."""


@dataclass(repr=False)
class DeepImage:
    """A picture with 16 bits per sample and several samples per pixel, which Pillow cannot hold.

    `samples`: uint16 [H, W, C], levels 0 (black) to 65535 (white), C = 2 (grey and alpha), 3 (RGB) or 4 (RGBA); also
    ``numpy.asarray(picture)``.
    `format`: "PNG" or "TIFF". `info`: metadata under Pillow's names ("exif", "icc_profile", "xmp", "dpi").

    Raises InvalidImageError: other samples, or another format.
    """

    samples: np.ndarray
    format: str
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = type(self.samples).__name__
        if isinstance(self.samples, np.ndarray):
            kind = f"{self.samples.dtype} {list(self.samples.shape)}"
            of_16_bits = self.samples.dtype.kind == "u" and self.samples.dtype.itemsize == 2  # of either byte order
            if of_16_bits and self.samples.ndim == 3 and self.samples.shape[2] in _MODES:
                kind = ""
        if kind:
            raise InvalidImageError(f"samples: expected an array uint16 [H, W, C], C = 2 to 4, got {kind}")
        if self.format not in ("PNG", "TIFF"):
            raise InvalidImageError(f"format: expected PNG or TIFF, got {self.format!r}")

    def __repr__(self) -> str:
        return f"DeepImage({self.mode}, {self.size[0]}x{self.size[1]}, {self.format})"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, as in Pillow."""
        return self.samples.shape[1], self.samples.shape[0]

    @property
    def mode(self) -> str:
        """ "LA;16", "RGB;16" or "RGBA;16"."""
        return _MODES[self.samples.shape[2]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.samples, dtype=dtype) if copy else np.asarray(self.samples, dtype=dtype)

    def save(self, path: Any) -> None:
        """Write a PNG or TIFF file with the metadata, atomically; a UserWarning names what the format cannot hold.

        Args:
            path: the file, with the extension of its format.

        Raises:
            InvalidImageError: another extension, or the packages of the extra `[deep]` are not installed.
            OSError: the file cannot be written.
        """
        path = Path(path)
        format = EXTENSIONS.get(path.suffix.lower())
        if format is None:
            raise InvalidImageError(f"format: expected .png or .tif, got {path.suffix!r}")
        write_file(path, encode_deep(self, format))


def deep_format(data: bytes) -> str | None:
    """ "PNG" or "TIFF" for a file of more than 8 bits a sample and several samples a pixel, None for any other."""
    if data.startswith(chunks.SIGNATURE):
        return "PNG" if len(data) > 25 and data[24] == 16 and data[25] in _COLOUR_TYPES else None
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        try:
            bits = _directory(data).get(ExifTags.Base.BitsPerSample, (1,))
        except Exception:  # truncated file: the reader raises the error
            return None
        several = isinstance(bits, tuple) and len(bits) > 1
        return "TIFF" if several and max(bits) > 8 else None
    return None


def cut_depth(format: str | None, data: bytes) -> int | None:
    """Bits per sample of a colour file that Pillow would cut to 8 and that is not supported; None: nothing is cut."""
    depth = 8
    if format == "PPM":
        depth = (ppm_maxval(data) or 255).bit_length() if data[:2] in (b"P3", b"P6") else 8
    elif format == "JPEG2000":
        samples, bits = jp2_samples(data)
        depth = bits if samples > 1 else 8
    elif format in ("AVIF", "HEIF"):
        at = data.find(b"av1C")
        if at >= 0 and len(data) > at + 6 and data[at + 6] & 0x40:
            depth = 12 if data[at + 6] & 0x20 else 10
        at = data.find(b"hvcC")
        if at >= 0 and len(data) > at + 21:
            depth = max(depth, 8 + (data[at + 21] & 7))
    return depth if depth > 8 else None


def jp2_samples(data: bytes) -> tuple[int, int]:
    """(samples per pixel, bits of the first one) of a JPEG 2000 file or stream; (1, 8) where it states none."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(data) <= at + 42:
        return 1, 8
    return int.from_bytes(data[at + 40 : at + 42], "big"), (data[at + 42] & 127) + 1


def ppm_maxval(data: bytes) -> int | None:
    """The level of white that a PPM or PGM file states; None for other files."""
    fields = [line.split(b"#")[0] for line in data[:4096].split(b"\n")]
    header = b" ".join(fields).split()[:4]
    stated = header[:1] in ([b"P2"], [b"P3"], [b"P5"], [b"P6"]) and len(header) == 4 and header[3].isdigit()
    return int(header[3]) if stated else None


def read_deep(data: bytes, format: str) -> tuple[DeepImage, int]:
    """The upright picture of a file that `deep_format` recognised, and its former EXIF orientation (1 to 8).

    Raises InvalidImageError: a layout that cannot be kept, or the packages are missing; the decoders' own errors for
    damaged files.
    """
    samples, orientation, info = _read_png(data) if format == "PNG" else _read_tiff(data)
    samples = np.ascontiguousarray(_turned(samples, orientation))
    if format == "PNG":
        info["png_chunks"] = chunks.kept_chunks(data, info["xmp"], orientation > 4)
    if orientation > 4 and info["dpi"] is not None:
        info["dpi"] = info["dpi"][::-1]
    return DeepImage(samples, format, {key: value for key, value in info.items() if value}), orientation


def check_deep_format(mode: str, size: tuple[int, int], format: str) -> None:
    """Raise InvalidImageError for a format (Pillow's name) without 16-bit colour, or where a side is too long."""
    if format not in ("PNG", "TIFF"):
        raise InvalidImageError(
            f"format: {format} does not hold 16 bits a sample in colour, got a picture of mode {mode}; "
            "PNG and TIFF do"
        )
    if format == "PNG" and max(size) > _MOST_SIDE_PNG:
        raise InvalidImageError(
            f"format: PNG holds at most {_MOST_SIDE_PNG} pixels a side at 16 bits a sample in colour, got "
            f"{max(size)}; longer ones are held by TIFF"
        )


def encode_deep(picture: DeepImage, format: str) -> bytes:
    """The file of a deep picture, with its metadata. Raises InvalidImageError, as `check_deep_format`."""
    check_deep_format(picture.mode, picture.size, format)
    dpi = metadata.held(picture.info, format).get("dpi")
    picture = replace(picture, info={**picture.info, "dpi": dpi})
    return _encode_png(picture) if format == "PNG" else _encode_tiff(_with_alpha(picture))


def _with_alpha(picture: DeepImage) -> DeepImage:
    """The picture with a channel for its transparent colour, where it has one."""
    if (key := picture.info.get("transparency")) is None:
        return picture
    alpha = np.where((picture.samples == key).all(axis=2), np.uint16(0), np.uint16(65535))
    return replace(picture, samples=np.dstack([picture.samples, alpha]))


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        import imagecodecs
        import tifffile
    except ImportError as cause:
        raise NotInstalledError(
            f"16 bits a sample in colour need the packages imagecodecs and tifffile: {EXTRA}"
        ) from cause
    return imagecodecs, tifffile


def _check_size(width: int, height: int, opened: bool) -> None:
    """Check Pillow's limit against decompression bombs, for files that Pillow does not decode. `opened`: whether it
    opens the file, and so gives its own warning."""
    limit, pixels = Image.MAX_IMAGE_PIXELS, width * height
    if limit is not None and pixels > 2 * limit:
        raise Image.DecompressionBombError(f"{pixels} pixels exceed the limit of {2 * limit}")
    if limit is not None and pixels > limit and not opened:
        warn(f"{pixels} pixels exceed {limit}, could be a decompression bomb", Image.DecompressionBombWarning)


# -- PNG ---------------------------------------------------------------------------------------------------------


def _read_png(data: bytes) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Stored samples [H, W, C], EXIF orientation, metadata."""
    imagecodecs, _ = _packages()
    width, height = struct.unpack_from(">II", data, 16)
    _check_size(width, height, opened=True)
    samples = imagecodecs.png_decode(data)
    count = _COLOUR_TYPES[data[25]]
    if samples.dtype != np.uint16 or samples.shape[:2] != (height, width) or samples.ndim != 3:
        raise InvalidImageError(f"expected 16 bits a sample, got {samples.dtype} {list(samples.shape)}")
    with Image.open(io.BytesIO(data)) as header:
        chunks.drop_text(header.info)
        info = {key: header.info.get(key) for key in ("icc_profile", "dpi")}
        own = {kind: content for kind, content in chunks.read_chunks(data) if kind in (b"eXIf", b"tRNS")}
        if b"eXIf" in own or "Raw profile type exif" not in header.info:
            # Without it Pillow would decode the whole picture in search of EXIF behind the image data.
            header.info["exif"] = own.get(b"eXIf", b"")
        exif = header.getexif()
        packets = [_xmp_of(content) for kind, content in chunks.read_chunks(data) if kind == b"iTXt"]
        xmp = next((one for one in packets if one), header.info.get("xmp"))  # Pillow's: of a compressed chunk
    info["xmp"] = chunks.upright_xmp(xmp) if isinstance(xmp, bytes) else None
    if count == 3 and len(own.get(b"tRNS", b"")) == 6:
        info["transparency"] = struct.unpack(">3H", own[b"tRNS"])
    info["exif"], left_out = kept_exif(exif, "PNG")
    warn_of_exif("picture", left_out)
    return samples[..., :count], valid_orientation(exif.get(ExifTags.Base.Orientation)), info


def _xmp_of(content: bytes) -> bytes | None:
    plain = chunks.XMP_KEYWORD + b"\0\0\0\0\0"
    return content[len(plain) :] if content.startswith(plain) else None


def _encode_png(picture: DeepImage) -> bytes:
    imagecodecs, _ = _packages()
    encoded = bytes(imagecodecs.png_encode(np.ascontiguousarray(picture.samples, dtype=np.uint16)))
    info, added = picture.info, []
    if info.get("exif"):
        added.append((b"eXIf", info["exif"].removeprefix(b"Exif\0\0")))
    if info.get("transparency"):
        added.append((b"tRNS", struct.pack(">3H", *info["transparency"])))
    kept = info.get("png_chunks")
    if kept is not None:
        return chunks.put_chunks(encoded, [*chunks.fitting(kept, encoded), *added])
    if info.get("icc_profile"):
        added.append(chunks.profile_chunk(info["icc_profile"]))
    if info.get("dpi"):
        added.append(chunks.resolution_chunk(info["dpi"]))
    if info.get("xmp"):
        added.append(chunks.xmp_chunk(info["xmp"]))
    return chunks.put_chunks(encoded, added)


# -- TIFF --------------------------------------------------------------------------------------------------------


def _directory(data: bytes, place: int | None = None) -> ImageFileDirectory_v2:
    """The tags of a TIFF's first directory, or of the one at `place`."""
    file = io.BytesIO(data)
    header = file.read(16 if data[2:4] in (b"+\0", b"\0+") else 8)
    directory = ImageFileDirectory_v2(header)
    file.seek(directory.next if place is None else place)
    directory.load(file)
    return directory


def _tiff_exif(data: bytes, directory: ImageFileDirectory_v2, frames: int) -> bytes:
    """The result of `kept_exif`, also for a BigTIFF, which Pillow's EXIF reader does not support."""
    kept: dict[int, Any] = {}
    broken = []
    for tag in TIFF_DESCRIPTIVE & directory.keys():
        try:
            value = directory[tag]
            if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
                value = dict(_directory(data, int(value)))
                value.pop(ExifTags.IFD.Interop, None)  # an offset in the old file
        except Exception:  # as in `kept_exif`
            broken.append(name_of_tag(tag))
            continue
        if not (frames > 1 and counts_pages(tag, value)):
            kept[tag] = value
    packed, unwritable = packed_exif(kept, None)
    warn_of_exif("picture", broken + unwritable)
    return packed


def _read_tiff(data: bytes) -> tuple[np.ndarray, int, dict[str, Any]]:
    """As `_read_png`."""
    _, tifffile = _packages()
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        frames = len(file.pages)
        if frames > 1:
            warn(f"only one of its {frames} frames is used")
        page = file.pages[0]
        _check_size(page.imagewidth, page.imagelength, opened=False)
        colours = {_RGB: 3, _GREY: 1}.get(page.photometric)
        extra = tuple(page.extrasamples)
        fits = page.dtype == np.uint16 and page.bitspersample == 16 and page.imagedepth == 1 and len(extra) < 2
        if not fits or colours is None or page.samplesperpixel != colours + len(extra):
            raise InvalidImageError(
                f"expected a TIFF of 16 bits a sample, RGB or grey, with at most one alpha, got "
                f"{page.samplesperpixel} samples of {page.dtype} ({page.bitspersample} bits), "
                f"{getattr(page.photometric, 'name', page.photometric)}"
            )
        if any(one not in _UNASSOCIATED for one in extra):
            raise InvalidImageError("expected alpha beside the colours, got colours multiplied by it")
        samples = page.asarray()
        if page.planarconfig == 2:
            samples = np.moveaxis(samples, 0, -1)
        compression = _COMPRESSIONS.get(int(page.compression), "adobe_deflate")
        extra_kind = extra[0] if extra else None
    directory = _directory(data)
    unit = directory.get(ExifTags.Base.ResolutionUnit, 2)  # 1: none, 2: inch, 3: centimetre
    inch = 2.54 if unit == 3 else 1.0
    across, down = (directory.get(tag) for tag in (ExifTags.Base.XResolution, ExifTags.Base.YResolution))
    xmp = _as_bytes(directory.get(ExifTags.Base.XMLPacket)) or b""
    info = {
        "exif": _tiff_exif(data, directory, frames),
        "icc_profile": _as_bytes(directory.get(ExifTags.Base.InterColorProfile)),
        "xmp": chunks.upright_xmp(xmp),
        "iptc": metadata.iptc_of({}, directory),
        "dpi": None if across is None or down is None or unit == 1 else (float(across) * inch, float(down) * inch),
        "tiff": {"compression": compression, "extra": extra_kind},
    }
    stated = directory.get(ExifTags.Base.Orientation, chunks.xmp_orientation(xmp))
    return samples, valid_orientation(stated), info


def _as_bytes(value: Any) -> bytes | None:
    return bytes(value) if isinstance(value, (bytes, tuple)) else None


def _encode_tiff(picture: DeepImage) -> bytes:
    _, tifffile = _packages()
    info, channels = picture.info, picture.samples.shape[2]
    exif = Image.Exif()
    if info.get("exif"):
        exif.load(info["exif"])
    stored = info.get("tiff", {})
    compression = stored.get("compression", "adobe_deflate")
    text = {tag: str(exif[tag]).encode("latin-1") for tag in _TIFF_TEXT if tag in exif}  # as Pillow reads it
    description = text.pop(ExifTags.Base.ImageDescription, None)
    tags: list[tuple[Any, ...]] = [(int(tag), 2, 0, one, True) for tag, one in text.items()]
    if info.get("xmp"):
        tags.append((int(ExifTags.Base.XMLPacket), 1, len(info["xmp"]), info["xmp"], True))
    if info.get("iptc"):
        tags.append((IPTC_NAA_CHUNK, 7, len(info["iptc"]), info["iptc"], True))
    directories = tiff.directories_of(exif)
    tags += [(_DIRECTORIES[tag], 4, 1, 0, True) for tag in directories]
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        picture.samples,
        byteorder="<",
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig",
        extrasamples=[stored.get("extra") or 2] if channels % 2 == 0 else None,
        compression=compression,
        predictor=compression is not None,
        iccprofile=info.get("icc_profile"),
        resolution=info.get("dpi"),
        resolutionunit="inch" if info.get("dpi") else None,
        description=description,
        software=False,
        metadata=None,
        extratags=tags,
    )
    return tiff.with_directories(file.getvalue(), directories)


def _turned(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Samples [H, W, C] turned upright by the EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        samples = samples.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return samples
