"""Request bodies: the fields that existing clients send (unknown ones are ignored), and the pictures."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidImageError, InvalidMaskError, LGNetError
from ..pipeline.formats import FORMATS
from ..pipeline.sources import Encoded
from .errors import OptionError, RequestError, TooLargeError

_DATA_URL = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_HD_STRATEGIES = {"original": "full", "crop": "crop", "resize": "resize"}
MAX_REACH = 4096
"""Largest dilate and feather, in pixels."""

B = TypeVar("B", bound=BaseModel)


class FillFields(BaseModel):
    """Options of a fill in the page and the API; see `Inpainter`."""

    model_config = ConfigDict(extra="ignore")

    strategy: str | None = Field(None, description="auto, full, crop, resize or tile; before hd_strategy")
    dilate: int = Field(0, ge=0, le=MAX_REACH, description="pixels by which the hole grows")
    feather: int = Field(0, ge=0, le=MAX_REACH, description="pixels over which fill and picture are blended")
    invert_mask: bool = Field(False, description="dark is hole")
    mask_threshold: float = Field(0.5, ge=0, lt=1, description="levels above this share of white are hole")
    mask_channel: str = Field("luma", description="luma, alpha, inverse_alpha, colour or auto: docs/masks.md")
    allow_any_mask: bool = Field(False, description="let a mask of more than 95 % pass")
    format: str | None = Field(None, description=f"{', '.join(FORMATS)}; default: the picture's")
    quality: int | None = Field(None, ge=1, le=100, description="for JPEG, WebP and AVIF")

    def fill_options(self) -> dict[str, Any]:
        """The arguments of `Session.fill`."""
        names = ("dilate", "feather", "invert_mask", "mask_threshold", "mask_channel", "allow_any_mask")
        return {"strategy": self.strategy or "auto", **{name: getattr(self, name) for name in names}}


class InpaintFields(FillFields):
    """The fields of IOPaint that have an effect here; lama-cleaner's are the same in camelCase."""

    hd_strategy: str | None = Field(None, description="Original, Crop or Resize")
    sd_seed: int = Field(42, description="echoed in X-Seed; the model has no randomness")
    stages: bool = Field(False, description="with Accept: application/json, the network's stages too")

    def fill_options(self) -> dict[str, Any]:
        options = super().fill_options()
        if self.strategy is None and self.hd_strategy:
            name = self.hd_strategy.rpartition(".")[2].lower()
            if name not in _HD_STRATEGIES:
                raise RequestError(f"hd_strategy: expected Original, Crop or Resize, got {self.hd_strategy[:40]!r}")
            options["strategy"] = _HD_STRATEGIES[name]
        return options


class InpaintRequest(InpaintFields):
    """`POST /api/v1/inpaint`."""

    image: str = Field(description="a picture file in base64, or as a data URL")
    mask: str = Field(description="its mask, the same way; white is hole")


class AdjustMaskRequest(BaseModel):
    """`POST /api/v1/adjust_mask`."""

    model_config = ConfigDict(extra="ignore")

    mask: str = Field(description="a picture file in base64, or as a data URL")
    operate: str = Field(description="expand, shrink or reverse")
    kernel_size: int = Field(5, ge=0, le=MAX_REACH, description="pixels")


class Img2ImgRequest(BaseModel):
    """`POST /sdapi/v1/img2img`, for masks: other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    init_images: list[str] = Field(min_length=1, max_length=1, description="one picture file in base64")
    mask: str = Field(description="its mask in base64; white is hole")
    mask_blur: int = Field(4, ge=0, le=MAX_REACH, description="pixels of feather")
    inpainting_mask_invert: int = Field(0, ge=0, le=1, description="1: black is hole")
    include_init_images: bool = False


class ModelRequest(BaseModel):
    """`POST /api/v1/model`."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    name: str


def read_json(body: bytes, kind: type[B]) -> B:
    """A JSON body. Raises RequestError 422, which names the fields."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise RequestError(f"body: expected JSON ({str(cause)[:100]})", status=422) from None
    return checked(value, kind)


def checked(value: Any, kind: type[B]) -> B:
    """Fields of a body or a form. Raises RequestError 422, which names them."""
    try:
        return kind.model_validate(value)
    except ValidationError as cause:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'body'}: {problem['msg']}"
            for problem in cause.errors(include_input=False, include_url=False)
        ]
        raise RequestError("; ".join(problems[:8]), status=422) from None


def from_base64(text: str, name: str) -> bytes:
    """The bytes of a bare base64 text or a data URL. Raises RequestError."""
    if re.match(r"\s*(https?|ftp|file):", text, re.IGNORECASE):
        raise RequestError(f"{name}: addresses are not fetched; send the picture's bytes in base64")
    head = _DATA_URL.match(text)
    try:
        data = base64.b64decode("".join(text[head.end() if head else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as cause:
        raise RequestError(f"{name}: expected base64 ({cause})") from None
    if not data:
        raise RequestError(f"{name}: expected a picture file, got nothing")
    return data


def picture_file(data: bytes, name: str, max_pixels: int) -> Encoded:
    """A picture file whose header says that it may be decoded. Raises InvalidImageError, TooLargeError."""
    file = Encoded(name, data)
    _check_pixels(file, InvalidImageError, name, max_pixels)
    return file


def mask_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A mask, not yet decoded. Raises InvalidMaskError, TooLargeError."""
    return _check_pixels(Encoded("mask", data), InvalidMaskError, "mask", max_pixels)


def _check_pixels(file: Encoded, error: type[LGNetError], name: str, max_pixels: int) -> Image.Image:
    if not file.data:
        raise error(f"{name}: expected a picture file, got nothing")
    try:
        opened = file.open(error, name)
    except error as refused:
        if isinstance(refused.__cause__, Image.DecompressionBombError):  # Pillow's own limit; it tells no size
            raise TooLargeError(
                f"{name}: expected at most {max_pixels} pixels (--max-pixels), got more than twice as many"
            ) from None
        raise
    if math.prod(opened.size) > max_pixels:
        raise TooLargeError(
            f"{name}: expected at most {max_pixels} pixels (--max-pixels), got {opened.width}x{opened.height}"
        )
    return opened


def checked_format(name: str) -> str:
    """The short name of a format that can be written. Raises OptionError."""
    if name.lower() not in FORMATS:
        raise OptionError(f"format: expected one of {', '.join(FORMATS)}, got {name[:40]!r}")
    return name.lower()
