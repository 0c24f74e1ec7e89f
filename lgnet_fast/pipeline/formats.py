"""Formats of picture files: their extensions, their names on the command line, the modes that they hold, and which of
them can be read and written here."""

from __future__ import annotations

import re

from PIL import features

_HEIF_EXTRA = "pip install 'lgnet-fast[heif]'"

# Extensions of pictures in folders, and the Pillow format of each. The first extension of a format is used for a file
# whose extension belongs to another format.
EXTENSIONS = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
    ".jpx": "JPEG2000",
    ".jpf": "JPEG2000",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".tga": "TGA",
}
FORMATS = {
    "png": "PNG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "tiff": "TIFF",
    "bmp": "BMP",
    "avif": "AVIF",
    "jp2": "JPEG2000",
    "ppm": "PPM",
    "tga": "TGA",
}
_OTHERS = (
    ".3fr .ai .arw .bpg .cr2 .cr3 .crw .cur .dcm .dcr .dds .dib .dng .emf .eps .erf .exr .fits .fff .flif .hdr .icns "
    ".ico .iiq .jng .jxl .jxr .kdc .mef .mng .mos .mrw .nef .nrw .orf .pam .pcd .pct .pcx .pef .pfm .pic .psb .psd "
    ".qoi .raf .ras .rw2 .rwl .sgi .sr2 .srf .srw .svg .svgz .wbmp .wdp .wmf .x3f .xbm .xcf .xpm"
)
OTHER_EXTENSIONS = frozenset(_OTHERS.split())
"""Pictures, raw photographs and drawings in unsupported formats, which a folder run reports."""

MODES = {
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"},
    "JPEG": {"L", "RGB", "CMYK"},
    "WEBP": {"RGB", "RGBA"},
    "TIFF": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I", "CMYK", "YCbCr"},
    "BMP": {"1", "L", "P", "RGB"},
    "GIF": {"1", "L", "P"},
    "AVIF": {"L", "RGB", "RGBA"},
    "HEIF": {"L", "RGB", "RGBA"},
    "JPEG2000": {"L", "LA", "RGB", "RGBA", "I;16"},
    "PPM": {"1", "L", "RGB", "I;16"},
    "TGA": {"L", "LA", "P", "RGB", "RGBA"},
}
"""Pillow format -> modes that it holds."""
KEYED_MODES = {"PNG": {"1", "L", "P", "RGB", "I;16"}, "GIF": {"1", "L", "P"}}
"""Pillow format -> modes in which one of its levels, colours or palette entries may be transparent."""

MOST_SIDE = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535, "AVIF": 32768, "HEIF": 65528, "TGA": 65535}
"""Pillow format -> most pixels of a side that its encoder takes, or (AVIF, HEIF) that readers take."""
NARROW_HEIC = (32, 4216)
"""x265 takes a side below the first number of pixels only beside one of at most the second."""
MOST_BYTES = {"TIFF": 2**32 - 2**25, "BMP": 2**32 - 2**11}
"""Pillow format -> most bytes of samples, with room for metadata: their files have offsets of 32 bits. How much
smaller compression makes a TIFF is known only at the end."""

_ALL = {"icc_profile", "exif", "xmp"}
METADATA = {
    "PNG": _ALL,
    "JPEG": _ALL | {"iptc"},
    "WEBP": _ALL,
    "TIFF": _ALL | {"iptc"},
    "AVIF": _ALL,
    "HEIF": _ALL,
    "JPEG2000": {"icc_profile"},
}
"""Pillow format -> keys of Pillow's `info` that its files keep; formats that are missing keep none."""

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Start of a URL, such as http://, which is rejected as a path."""


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
    """Why pictures of a Pillow format cannot be written, None where they can; reads well behind "format: "."""
    if format not in MODES:
        return f"expected one of {', '.join(MODES)}, got {format!r}"
    reason = reason_against_reading(format)
    if reason is None and format == "HEIF":
        import pillow_heif

        if not pillow_heif.libheif_info()["HEIF"]:
            return "HEIC pictures need a pillow-heif with an encoder"
    return reason
