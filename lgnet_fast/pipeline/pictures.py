"""Converting pictures of every accepted kind to samples of the same depth, and back; known pixels do not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..engine.regions import Rect
from ..errors import InvalidImageError
from .arrays import channels_last, host_values, pixels_of, unit_levels
from .deep_colour import DeepImage, check_deep_format
from .encoding import check_side, held_modes, transparency_of
from .notices import warn
from .reading import cut_bits, read_picture, upright
from .sources import Encoded, file_of

ACCEPTED = (
    "a PIL picture, a path, a file's bytes, a file opened for reading bytes, a DeepImage, an array [H, W] or "
    "[H, W, C] of uint8, uint16 or floats in [0, 1], a tensor [H, W], [C, H, W] or [B, C, H, W] of uint8 or floats "
    "in [0, 1], C = 1 to 4, or a list of those"
)
PIL_MODES = "1, L, LA, P, RGB, RGBA, I, I;16, I;16B, CMYK, YCbCr, HSV"

# Pixels that are blended at a time, and that are compared with all colours of a palette at a time.
_STRIP_PIXELS = 2**16
_MATCHED_PIXELS = 2**11


@dataclass(frozen=True)
class Picture:
    """One picture in the form that the pipeline processes.

    `samples` [H, W, C], C = 1 (grey) or 3 (RGB), in the depth of the picture, 0 = black, `white` = white.
    `rebuild(samples, touched)` makes a picture of the caller's kind; `touched` bool [H, W] marks pixels that may have
    changed: all others, and all alpha, come from the original. `note` explains the size of a turned picture.
    `check_mode(format)` raises InvalidImageError if a file of that format could not hold the result's mode, or so
    much of it.
    `rebuild_bytes`: most bytes per pixel that `rebuild` takes, with its result. `mode`: Pillow's, "" without one.
    `exact`: whether the result has the filled colours; else `rebuild` takes the nearest ones that its palette or its
    levels hold, or rounds them to YCbCr or HSV.
    """

    samples: np.ndarray
    white: float
    rebuild: Callable[[np.ndarray, np.ndarray], Any]
    note: str = ""
    check_mode: Callable[[str], Any] = lambda format: None
    rebuild_bytes: int = 0
    mode: str = ""
    exact: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.samples.shape[0], self.samples.shape[1]

    def check_format(self, format: str) -> None:
        """Raise InvalidImageError if a file of a format (a key of MODES) could not hold the result."""
        check_side(self.size, format)
        self.check_mode(format)

    @property
    def result_bytes(self) -> int:
        """Bytes that `with_fill` takes at most."""
        return self.samples.nbytes + self.size[0] * self.size[1] * self.rebuild_bytes

    def network_range(self, rows: slice, columns: slice) -> np.ndarray:
        """A region as float32 [h, w, 3] in [-1, 1]: level / (white / 2) - 1."""
        region = self.samples[rows, columns].astype(np.float32)
        region /= np.float32(self.white / 2)
        region -= 1
        if self.samples.dtype.kind == "f":  # rounding may move a level out of its range
            np.clip(region, -1, 1, out=region)
        return np.broadcast_to(region, (*region.shape[:2], 3))

    def with_fill(self, fills: list[tuple[Rect, np.ndarray]], alpha: np.ndarray) -> Any:
        """A picture of the caller's kind, with fills float32 [h, w, 3] in [-1, 1] blended into disjoint boxes by
        `alpha`.

        `alpha`: bool, or float in [0, 1]; [H, W], 0 outside the boxes. See `painted`.
        """
        return self.rebuild(self.painted([(box, fill, alpha[box.slices]) for box, fill in fills]), alpha > 0)

    def painted(self, fills: list[tuple[Rect, np.ndarray, np.ndarray]]) -> np.ndarray:
        """A copy of the samples with fills blended into disjoint boxes: (box, fill float32 [h, w, 3] in [-1, 1],
        alpha [h, w], bool or float in [0, 1]).

        Pixels of alpha 0 do not change. Grey pictures take the mean of the three channels. Integer depths are rounded
        to nearest and clamped.
        """
        samples: np.ndarray = self.samples.copy()
        for box, fill, alpha in fills:
            step = max(1, _STRIP_PIXELS // fill.shape[1])
            for top in range(0, len(fill), step):
                rows = slice(top, top + step)
                self._paint(samples[box.slices][rows], fill[rows], alpha[rows])
        return samples

    def _paint(self, old: np.ndarray, fill: np.ndarray, alpha: np.ndarray) -> None:
        """Blend a fill into samples, in place; in float64, which takes 100 bytes a pixel."""
        touched = alpha > 0
        painted = fill[touched].astype(np.float64)
        if old.shape[2] == 1:
            painted = painted.mean(axis=1, keepdims=True)
        painted = np.clip((painted + 1) * (self.white / 2), 0, self.white)
        weight = alpha[touched].astype(np.float64)[:, None]
        # Where alpha is 1 the old sample is not read, because it may be NaN or infinite.
        blended = np.where(weight == 1, painted, old[touched] * (1 - weight) + painted * weight)
        old[touched] = blended if old.dtype.kind == "f" else np.rint(blended)


def picture_of(picture: Any) -> Picture:
    """One PIL picture, path, file's bytes, file opened for reading bytes, DeepImage, or array [H, W], [H, W, C] or
    [C, H, W], C = 1 to 4 (a second or fourth channel is alpha, which is kept), of uint8, uint16 or floats in [0, 1].

    The result is a DeepImage for a file with 16 bits per sample in colour, a PIL picture for other files.

    Raises InvalidImageError for anything else, for an empty picture, and for unsupported modes.
    """
    picture = file_of(picture, InvalidImageError, "picture")
    if isinstance(picture, (Path, Encoded)):
        read, orientation = read_picture(picture)
        note = _note(orientation)
        return _of_deep_colour(read, note) if isinstance(read, DeepImage) else _of_pil(read, note)
    if isinstance(picture, Picture):
        return picture
    if isinstance(picture, DeepImage):
        return _of_deep_colour(picture, "")
    if isinstance(picture, Image.Image):
        if (bits := cut_bits(picture)) is not None:
            warn(f"picture: Pillow cuts {bits}-bit colour to 8 bits; give the file's path")
        turned, orientation = upright(picture)
        return _of_pil(turned, _note(orientation))
    if isinstance(picture, np.ndarray):
        return _of_array(picture, tensor=False)
    if isinstance(picture, (list, tuple, torch.Tensor)):
        raise InvalidImageError(
            f"picture: expected one PIL picture, path, array or DeepImage, got {type(picture).__name__}, which only "
            "a call of the Inpainter takes"
        )
    raise InvalidImageError(f"picture: expected {ACCEPTED}, got {type(picture).__name__}")


def pictures_of_tensor(batch: torch.Tensor) -> tuple[list[Picture], Callable[[list[torch.Tensor]], torch.Tensor]]:
    """The pictures of a tensor [B, C, H, W], [C, H, W], [H, W, C] or [H, W], C = 1 to 4, of uint8 or floats in
    [0, 1], and a function that joins their results in one tensor of that shape, dtype and device.

    Raises InvalidImageError: shape, dtype, NaN, infinity or levels outside [0, 1].
    """
    if not batch.is_floating_point() and batch.dtype != torch.uint8:
        raise InvalidImageError(f"picture: expected a tensor of uint8 or of floats in [0, 1], got {batch.dtype}")
    if batch.ndim == 4 and (not 1 <= batch.shape[1] <= 4 or 0 in batch.shape[2:]):
        turned = "; permute(0, 3, 1, 2) turns [B, H, W, C]" if 1 <= batch.shape[3] <= 4 else ""
        raise InvalidImageError(
            f"picture: expected a tensor [B, C, H, W] with C = 1 to 4, got {list(batch.shape)}{turned}"
        )
    known = host_values(batch, InvalidImageError, "picture")
    if known.is_floating_point() and known.dtype != torch.float64:
        known = known.float()

    def one(levels: torch.Tensor) -> Picture:
        picture = _of_array(levels.numpy(), tensor=True)

        def rebuild(samples: np.ndarray, touched: np.ndarray) -> torch.Tensor:
            whole = np.ascontiguousarray(picture.rebuild(samples, touched))
            return torch.from_numpy(whole).to(batch.device, batch.dtype)

        # A contiguous copy, one in the tensor's dtype, and the tensor of all results.
        size = picture.rebuild_bytes + 3 * levels.element_size() * levels.shape.numel() // math.prod(picture.size)
        return replace(picture, rebuild=rebuild, rebuild_bytes=size)

    if batch.ndim == 4:
        # Each is [C, H, W], for every width.
        return [one(levels) for levels in known], lambda done: torch.stack(done) if done else batch.clone()
    return [one(known)], lambda done: done[0]


def _of_array(array: np.ndarray, tensor: bool) -> Picture:
    array = np.asarray(array)  # numpy.matrix and other subclasses do not take a third axis
    pixels, order = channels_last(array, InvalidImageError, "picture", tensor=tensor)
    if array.size == 0:
        raise InvalidImageError(f"picture: expected at least one pixel, got {list(array.shape)}")
    if array.dtype.kind == "f":
        unit_levels(array, InvalidImageError, "picture")
        white = 1.0
    elif array.dtype.kind == "u" and array.dtype.itemsize <= 2:  # of either byte order
        white = float(np.iinfo(array.dtype).max)
    else:
        raise InvalidImageError(f"picture: expected uint8, uint16 or floats in [0, 1], got {array.dtype}")
    with_alpha = pixels.shape[2] in (2, 4)

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> np.ndarray:
        # of the array's dtype, because NumPy joins arrays in the machine's byte order
        whole = np.concatenate([samples, pixels[..., -1:]], axis=2, dtype=array.dtype) if with_alpha else samples
        if order == "CHW":
            return np.ascontiguousarray(whole.transpose(2, 0, 1))
        return whole if order == "HWC" else whole[..., 0]

    copies = int(with_alpha) + int(order == "CHW")
    size = copies * pixels.shape[2] * pixels.itemsize
    return Picture(pixels[..., :-1] if with_alpha else pixels, white, rebuild, rebuild_bytes=size)


def _note(orientation: int) -> str:
    return f" (the picture is turned upright by its EXIF orientation {orientation})" if orientation != 1 else ""


def _of_pil(picture: Image.Image, note: str) -> Picture:
    key = transparency_of(picture)
    exact = key is None and picture.mode not in ("1", "P", "YCbCr", "HSV")
    check = partial(held_modes, picture.mode, key, size=picture.size)
    return replace(_of_mode(picture, note), check_mode=check, mode=picture.mode, exact=exact)


def _of_mode(picture: Image.Image, note: str) -> Picture:
    if 0 in picture.size:
        raise InvalidImageError(f"picture: expected at least one pixel, got {picture.width}x{picture.height}")
    mode = picture.mode
    if mode == "P":
        return _of_palette(picture, note)
    if mode == "1":
        return _of_bilevel(picture, note)
    if mode in ("LA", "RGBA"):
        return _with_alpha(picture, note)
    if mode in ("L", "RGB"):
        return _with_colour_key(picture, note)
    if mode in ("I", "I;16", "I;16B"):
        return _of_deep(picture, note)
    if mode in ("CMYK", "YCbCr", "HSV"):
        return _of_other_space(picture, note)
    raise InvalidImageError(
        f"picture: expected one of the modes {PIL_MODES}, got {mode}; convert it, for example to RGB"
    )


@dataclass(frozen=True)
class _Origin:
    """The part of a picture that `_like` needs. The pixels are left out, because the samples hold them already."""

    info: dict[Any, Any]
    format: str | None


def _like(picture: Image.Image, original: Image.Image | _Origin) -> Image.Image:
    picture.info = dict(original.info)
    picture.format = original.format
    return picture


def _with_alpha(picture: Image.Image, note: str) -> Picture:
    array, origin = pixels_of(picture), _Origin(dict(picture.info), picture.format)

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> Image.Image:
        return _like(Image.fromarray(np.concatenate([samples, array[..., -1:]], axis=2)), origin)

    return Picture(array[..., :-1], 255.0, rebuild, note, rebuild_bytes=6)


def _of_deep_colour(picture: DeepImage, note: str) -> Picture:
    """16 bits per sample: RGB with or without alpha, or grey with alpha."""
    array = picture.samples
    colours = 3 if array.shape[2] > 2 else 1
    keep_key = _colour_key(array, picture.info)

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> DeepImage:
        keep_key(samples)
        merged = np.concatenate([samples, array[..., colours:]], axis=2)
        return DeepImage(merged, picture.format, dict(picture.info))

    size, check = 2 * array.shape[2], partial(check_deep_format, picture.mode, picture.size)
    exact = not picture.info.get("transparency")
    return Picture(array[..., :colours], 65535.0, rebuild, note, check, rebuild_bytes=size, exact=exact)


def _with_colour_key(picture: Image.Image, note: str) -> Picture:
    """L and RGB; a PNG may declare one colour as transparent."""
    array = pixels_of(picture).reshape(picture.height, picture.width, -1)
    origin, keep_key = _Origin(dict(picture.info), picture.format), _colour_key(array, picture.info)

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> Image.Image:
        keep_key(samples)
        return _like(Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples), origin)

    return Picture(array, 255.0, rebuild, note, rebuild_bytes=4)


def _colour_key(array: np.ndarray, info: dict[Any, Any]) -> Callable[[np.ndarray], None]:
    """A function that keeps the alpha that the transparent colour of `info` gives to `array` [H, W, C], in place.

    It changes filled samples of that colour by one level, and leaves transparent pixels unchanged.
    """
    key = info.get("transparency")
    if key is None or isinstance(key, bytes):
        return lambda samples: None
    clear = (array == np.array(key)).all(axis=2)

    def keep(samples: np.ndarray) -> None:
        collides = (samples == np.array(key)).all(axis=2) & ~clear
        samples[collides, 0] ^= 1
        samples[clear] = array[clear]

    return keep


def _of_bilevel(picture: Image.Image, note: str) -> Picture:
    """1: filled levels become black or white. Where one of them is transparent and a fill has it, the result is L."""
    grey = np.asarray(picture.convert("L"))[..., None]
    keep_key = _colour_key(grey, picture.info)

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> Image.Image:
        levels = np.where(samples >= 128, np.uint8(255), np.uint8(0))
        keep_key(levels)
        result = Image.fromarray(levels[..., 0])
        if np.isin(levels, (0, 255)).all():
            result = result.convert("1", dither=Image.Dither.NONE)
        return _like(result, picture)

    return Picture(grey, 255.0, rebuild, note, rebuild_bytes=6)


def _of_deep(picture: Image.Image, note: str) -> Picture:
    array = np.asarray(picture)
    stored = {"I": "=i4", "I;16": "<u2", "I;16B": ">u2"}[picture.mode]
    if picture.mode == "I" and (array.min() < 0 or array.max() > 65535):
        raise InvalidImageError(
            f"picture: expected levels in 0..65535 for mode I, got {int(array.min())} to {int(array.max())}"
        )

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> Image.Image:
        keep_key(samples)
        data = samples[..., 0].astype(stored).tobytes()
        return _like(Image.frombytes(picture.mode, picture.size, data), picture)

    native = array.astype(np.int32 if picture.mode == "I" else np.uint16)[..., None]
    keep_key = _colour_key(native, picture.info)
    return Picture(native, 65535.0, rebuild, note, rebuild_bytes=2 * array.itemsize + 2)


def _of_other_space(picture: Image.Image, note: str) -> Picture:
    """CMYK, YCbCr, HSV: the network gets RGB, known pixels keep their values, filled ones are converted back."""
    array = np.asarray(picture)

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> Image.Image:
        converted = Image.fromarray(samples).convert(picture.mode)
        merged = np.where(touched[..., None], np.asarray(converted), array)
        return _like(Image.frombytes(picture.mode, picture.size, merged.tobytes()), picture)

    return Picture(np.array(picture.convert("RGB")), 255.0, rebuild, note, rebuild_bytes=18)


def _of_palette(picture: Image.Image, note: str) -> Picture:
    """P: known pixels keep their index, filled ones get the nearest palette colour of the same alpha."""
    index = np.asarray(picture)
    entries = picture.resize((256, 1))
    entries.paste(Image.frombytes("P", (256, 1), bytes(range(256))))
    table = np.asarray(entries.convert("RGBA"))[0]
    used = min(256, max(len(picture.getpalette("RGB") or ()) // 3, int(index.max()) + 1))
    colours, alphas = table[:used, :3].astype(np.int32), table[:used, 3]

    def rebuild(samples: np.ndarray, touched: np.ndarray) -> Image.Image:
        changed = index.copy()
        flat, marked, wanted = changed.reshape(-1), touched.reshape(-1), samples.reshape(-1, 3)
        for start in range(0, flat.size, _MATCHED_PIXELS):
            part = slice(start, start + _MATCHED_PIXELS)
            here = start + np.flatnonzero(marked[part])
            own_alpha = alphas[flat[here]]
            for alpha in np.unique(own_alpha):
                choices, places = np.flatnonzero(alphas == alpha), here[own_alpha == alpha]
                apart = ((wanted[places, None].astype(np.int32) - colours[None, choices]) ** 2).sum(axis=2)
                flat[places] = choices[apart.argmin(axis=1)]
        result = picture.copy()
        result.paste(Image.frombytes("P", picture.size, changed.tobytes()))
        return _like(result, picture)

    return Picture(table[index][..., :3], 255.0, rebuild, note, rebuild_bytes=5)
