"""The part of a picture's EXIF that its result keeps."""

from __future__ import annotations

from PIL import ExifTags, Image

# A TIFF's tags describe its storage too; only those about the picture itself may go into another file.
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
    """A picture's EXIF written anew without orientation and thumbnail; of a TIFF, the tags about the picture."""
    kept = Image.Exif()
    directories = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
    for tag, value in exif.items():
        if tag != ExifTags.Base.Orientation and (format != "TIFF" or tag in TIFF_DESCRIPTIVE):
            # Pillow writes a sub-directory only where it is given as a dictionary.
            kept[tag] = exif.get_ifd(tag) if tag in directories else value
    return kept.tobytes() if len(kept) else b""
