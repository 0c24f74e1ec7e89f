"""Colours converted for screens, and for files of fewer modes than the picture's."""

from __future__ import annotations

import io
from typing import Any

from PIL import ImageCms

from ..pipeline.formats import MODES

_OTHER_SPACES = ("CMYK", "YCbCr", "HSV")


def to_srgb(profile: bytes | None, mode: str) -> Any:
    """A transform from a profile's colours in a mode to sRGB; None without a profile, or where it does not fit."""
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):  # damaged, or of another colour space
        return None


def becomes_rgb(mode: str, format: str) -> bool:
    """Whether a file of a format (a key of MODES) holds RGB, and not the CMYK, YCbCr or HSV of a picture."""
    return mode in _OTHER_SPACES and mode not in MODES[format] and "RGB" in MODES[format]


def as_held(picture: Any, format: str) -> Any:
    """A CMYK, YCbCr or HSV picture as RGB, if a file of the format holds RGB but not its mode; others unchanged.

    CMYK is converted by its profile, which the result does not have. `format`: a key of MODES.
    """
    mode = getattr(picture, "mode", "")
    if not becomes_rgb(mode, format):
        return picture
    transform = to_srgb(picture.info.get("icc_profile"), mode) if mode == "CMYK" else None
    converted = (transform and ImageCms.applyTransform(picture, transform)) or picture.convert("RGB")
    converted.info = {key: value for key, value in picture.info.items() if key != "icc_profile" or mode != "CMYK"}
    converted.format = picture.format
    return converted
