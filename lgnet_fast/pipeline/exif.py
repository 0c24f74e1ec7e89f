"""The part of the EXIF of a picture that its result keeps."""

from __future__ import annotations

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


def kept_exif(exif: Image.Exif, format: str | None) -> bytes:
    """The EXIF of a picture without orientation and thumbnail; for a TIFF, the tags about the picture."""
    kept = Image.Exif()
    directories = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
    for tag, value in exif.items():
        if tag != ExifTags.Base.Orientation and (format != "TIFF" or tag in TIFF_DESCRIPTIVE):
            # Pillow writes a sub-directory only where it is given as a dictionary.
            kept[tag] = exif.get_ifd(tag) if tag in directories else value
    return kept.tobytes() if len(kept) else b""
