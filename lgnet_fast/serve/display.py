"""Samples converted for a browser: 8 bits, sRGB, as PNG or JPEG."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from ..engine.regions import Rect
from ..pipeline.deep_colour import DeepImage
from .colours import to_srgb
from .session import Patch, Session


@dataclass(frozen=True)
class Display:
    """How one session's samples are shown. `alpha` uint8 [H, W], None = opaque; `to_srgb`: a colour transform, None
    where the samples are sRGB or have no profile."""

    white: float
    alpha: np.ndarray | None
    to_srgb: Any

    @classmethod
    def of(cls, session: Session, rebuilt: Any) -> Display:
        """The display of a session; `rebuilt`: its picture, as `Session.result` returns it."""
        picture = session.picture
        alpha: np.ndarray | None = None
        if isinstance(rebuilt, DeepImage):
            if rebuilt.samples.shape[2] in (2, 4):
                alpha = (rebuilt.samples[..., -1] >> 8).astype(np.uint8)
        elif rebuilt.mode in ("RGBA", "LA", "PA") or "transparency" in rebuilt.info:
            alpha = np.asarray(rebuilt.convert("RGBA").getchannel("A"))
        # That of CMYK is not one of the samples, which are RGB.
        profile = None if rebuilt.mode == "CMYK" else rebuilt.info.get("icc_profile")
        return cls(picture.white, alpha, to_srgb(profile, "RGB" if picture.samples.shape[2] == 3 else "L"))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps."""
        return 0 if self.alpha is None else self.alpha.nbytes

    def picture(self, samples: np.ndarray, box: Rect, size: tuple[int, int] | None = None) -> Image.Image:
        """Samples [h, w, C] of a box as RGB, or RGBA where the picture has alpha, scaled to (width, height)."""
        shown = self._eight_bit(samples)
        if self.alpha is not None:  # scaled together, so that colours of transparent pixels do not show at edges
            shown.putalpha(Image.fromarray(np.ascontiguousarray(self.alpha[box.slices])))
        if size is not None and size != shown.size:
            shown = shown.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
        if self.alpha is None:
            return self._for_screen(shown)
        alpha = shown.getchannel("A")
        shown = self._for_screen(shown.convert(shown.mode[:-1]))
        shown.putalpha(alpha)
        return shown

    def patch(self, patch: Patch) -> tuple[bytes, list[Rect]]:
        """The parts of a fill, stacked in one lossless PNG, transparent where nothing changed; and their boxes."""
        boxes = [part.box for part in patch.parts]
        size = max(box.right - box.left for box in boxes), sum(box.bottom - box.top for box in boxes)
        sheet = Image.new("RGBA", size)
        top = 0
        for part in patch.parts:
            shown = self._for_screen(self._eight_bit(part.samples))
            alpha = np.where(part.touched, np.uint8(255), np.uint8(0))
            if self.alpha is not None:
                alpha = np.minimum(alpha, self.alpha[part.box.slices])
            shown.putalpha(Image.fromarray(alpha))
            sheet.paste(shown, (0, top))
            top += shown.height
        return png(sheet), boxes

    def _eight_bit(self, samples: np.ndarray) -> Image.Image:
        """Samples [h, w, C] as L or RGB."""
        if self.white != 255:
            samples = np.rint(samples * (255 / self.white)).astype(np.uint8)
        return Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else np.ascontiguousarray(samples))

    def _for_screen(self, shown: Image.Image) -> Image.Image:
        """L or RGB as RGB in sRGB."""
        if self.to_srgb is not None:
            return ImageCms.applyTransform(shown, self.to_srgb) or shown
        return shown.convert("RGB")


def png(picture: Image.Image) -> bytes:
    """A PNG encoded for speed, not for size."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def photo(picture: Image.Image, quality: int = 92) -> tuple[bytes, str]:
    """A file for display and its media type: JPEG, or PNG for pictures with alpha."""
    if picture.mode == "RGBA":
        return png(picture), "image/png"
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue(), "image/jpeg"
