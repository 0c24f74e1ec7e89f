"""Converting masks of every accepted kind to a boolean hole, and the alpha for blending fill and picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ..engine.holes import disjoint_boxes, group_holes
from ..errors import InvalidMaskError
from .arrays import channels_last, host_values, pixels_of, unit_levels
from .brushes import black, brush_hole, chroma, largest
from .encoding import transparency_of
from .pictures import Picture
from .reading import open_upright, upright
from .sources import Encoded, file_of

ACCEPTED = (
    "a PIL picture, a path, a file's bytes, a file opened for reading bytes, an array [H, W] or [H, W, C], or a "
    "tensor [H, W], [C, H, W] or [1, C, H, W], C = 1 to 4 (bool, integers, or floats in [0, 1]; larger is hole)"
)

CHANNELS = ("auto", "luma", "alpha", "inverse_alpha", "colour")
"""Choices of `channel` in `read_hole`; docs/masks.md says what "auto" does for each kind of mask."""

# A black mask in a lossy file decodes to levels 0 and 1: there the rule "uint8 whose maximum is 1 means bool"
# would turn coding noise into holes.
_LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}

# Of 255. A pixel is saturated if its largest and smallest channels differ by at least this much. All colours of the
# VOC and Cityscapes palettes are, except their greys.
_SATURATED = 32
# Near black: the levels that lossy coding gives to black beside a coloured stroke.
_BLACK = 48
# Pixels of one colour differ by no more than this in any channel; pixels of a photograph differ by more.
_ONE_COLOUR = 64
# In a JPEG copy of the picture, a pixel counts as unchanged if no channel differs by more.
_COPIED = 24
# In a lossless mask, a pixel differs by no more than this from the colours between the brush and a plain background.
_ROUNDING = 2
# A mask that equals the picture beyond this distance from its strokes is an exact copy of it.
_SOFT = 3
# Rows processed at a time where wide numbers of a whole picture would take too much memory.
_STRIP = 256
_CHOICES = (
    "say which by mask_channel (--mask-channel): luma (bright is hole), alpha (opaque is hole: strokes on a layer), "
    "inverse_alpha (transparent is hole: rubbed out) or colour (saturated is hole)"
)


def read_hole(
    mask: Any,
    height: int,
    width: int,
    *,
    threshold: float = 0.5,
    invert: bool = False,
    channel: str = "auto",
    picture: Picture | None = None,
    note: str = "",
) -> np.ndarray:
    """The hole as bool [height, width], True = to be filled.

    `mask` is one mask of any accepted kind (see `ACCEPTED`); three channels are RGB, a fourth (or second) is alpha.
    uint8 and other integers with maximum 1 mean bool. `channel`, one of `CHANNELS`:

    luma           luma times alpha above `threshold` (0 <= threshold < 1, of full scale) is hole;
    alpha          alpha above `threshold` is hole: by default 128 and more of 255;
    inverse_alpha  the rest is hole: by default alpha below 128;
    colour         the strokes of one brush, as `auto` has them. Where there is no such brush, pixels whose channels
                   differ by 32 of 255 or more are hole, except pixels with alpha below 128 and, where at least half
                   of the mask is a copy of `picture`, pixels equal to the picture;
    auto           the reading of an unambiguous mask, see `_certain_hole`; an ambiguous mask is an error.

    `invert` swaps hole and known. `note` is appended to the message about a wrong size.
    Raises InvalidMaskError: unreadable, wrong type, wrong size, NaN, out of range, a channel that the mask does not
    have, or auto for an ambiguous mask.
    """
    check_reading(threshold, invert, channel)
    planes = _planes(mask, (height, width))
    if planes.size != (height, width):
        raise InvalidMaskError(
            f"mask: expected the picture's size {width}x{height} (width x height), "
            f"got {planes.size[1]}x{planes.size[0]}{note}"
        )
    hole = _hole_by(channel, planes, threshold, picture)
    return ~hole if invert else hole


def check_reading(threshold: float, invert: bool, channel: str) -> None:
    """Raise InvalidMaskError for a value that `read_hole` does not take."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)) or not 0 <= threshold < 1:
        raise InvalidMaskError(f"mask_threshold: expected 0 <= value < 1, got {threshold!r}")
    if channel not in CHANNELS:
        raise InvalidMaskError(f"mask_channel: expected one of {', '.join(CHANNELS)}, got {channel!r}")
    if not isinstance(invert, (bool, np.bool_)):
        raise InvalidMaskError(f"invert_mask: expected True or False, got {invert!r}")


def masks_for(mask: Any, count: int) -> list[Any]:
    """One mask for each of `count` pictures: from a list of `count`, a tensor [count, C, H, W], or one for all.

    Raises InvalidMaskError if a list or a tensor has another length (for a tensor, 1 is allowed), and for an array or
    a tensor [count, H, W], which can be a mask for each picture or the channels of one.
    """
    if isinstance(mask, (list, tuple)):
        if len(mask) != count:
            raise InvalidMaskError(f"mask: expected one mask or {count} masks for {count} pictures, got {len(mask)}")
        return list(mask)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[0] != 1:
        if mask.shape[0] != count:
            raise InvalidMaskError(f"mask: expected [{count} or 1, C, H, W], got {list(mask.shape)}")
        return [mask[i : i + 1] for i in range(count)]
    if isinstance(mask, (torch.Tensor, np.ndarray)) and mask.ndim == 3 and mask.shape[0] == count > 1:
        raise InvalidMaskError(
            f"mask: expected a list of {count} masks or a tensor [{count}, 1, H, W], or [1, {count}, H, W] for one "
            f"mask of {count} channels, got {list(mask.shape)}, which can mean both"
        )
    read = file_of(mask, InvalidMaskError, "mask")  # a pipe can be read only once
    return [read if isinstance(read, Encoded) else mask] * count


def checked_edge(dilate: int, feather: int) -> tuple[int, int]:
    """Both as Python's integers, whose sums do not overflow. Raises InvalidMaskError."""
    for name, pixels in (("dilate", dilate), ("feather", feather)):
        if isinstance(pixels, bool) or not isinstance(pixels, (int, np.integer)) or pixels < 0:
            raise InvalidMaskError(f"{name}: expected a whole number of pixels >= 0, got {pixels!r}")
    return int(dilate), int(feather)


def soft_edge(hole: np.ndarray, dilate: int = 0, feather: int = 0) -> np.ndarray:
    """Alpha float32 [H, W] in [0, 1] of the fill over the picture.

    1 within `dilate` pixels of the hole (Euclidean: the structuring element is a disk), then a linear ramp over the
    next `feather` pixels, outside the dilated hole, and 0 beyond. Both may exceed the picture. The cost depends only
    on the area that they cover.
    """
    dilate, feather = checked_edge(dilate, feather)
    alpha = hole.astype(np.float32)
    if dilate + feather == 0:
        return alpha
    # No pixel of the picture is farther than `far`; a ramp of 2^40 pixels is 1 in float32 all over it.
    far = sum(hole.shape)
    dilate, feather = min(dilate, far), min(feather, 2**40)
    reach = dilate + feather
    grown = [box.grown(reach, hole.shape) for box in group_holes(hole).boxes]
    for box in disjoint_boxes(grown, hole.shape):
        # Indices of the nearest hole pixel; distances are computed from them strip by strip, which takes less memory.
        nearest = ndimage.distance_transform_edt(~hole[box.slices], return_distances=False, return_indices=True)
        columns = np.arange(nearest.shape[2])
        part = alpha[box.slices]
        for top in range(0, nearest.shape[1], _STRIP):
            strip = slice(top, min(top + _STRIP, nearest.shape[1]))
            down = nearest[0, strip] - np.arange(strip.start, strip.stop)[:, None]
            distance = np.sqrt(np.square(down, dtype=np.float64) + np.square(nearest[1, strip] - columns))
            ramp = np.where(distance <= reach, 1 - (distance - dilate) / (feather + 1), 0)
            part[strip] = np.where(distance <= dilate, 1, ramp)
    return alpha


@dataclass(frozen=True)
class _Planes:
    """The channels of a mask. Grey: `levels` [H, W], bool or in units of 1 / `white`; else `colour` uint8 [H, W, 3].
    With transparency: `alpha` uint8 [H, W]; `levels` are then uint8."""

    levels: np.ndarray | None
    white: float
    colour: np.ndarray | None
    alpha: np.ndarray | None
    kind: str

    @property
    def size(self) -> tuple[int, int]:
        plane = self.colour if self.levels is None else self.levels
        assert plane is not None
        return plane.shape[0], plane.shape[1]


def _hole_by(channel: str, planes: _Planes, threshold: float, picture: Picture | None) -> np.ndarray:
    if channel == "auto":
        return _certain_hole(planes, threshold, picture)
    if channel == "luma":
        return _by_luma(planes, threshold)
    if channel == "colour":
        if planes.colour is None:
            raise InvalidMaskError(f"mask_channel: 'colour' needs a mask in colour, got {planes.kind}")
        if planes.alpha is None or planes.alpha.min() >= 128:
            strokes = _strokes(planes.colour, picture)
            if strokes is not None:
                return strokes
        hole = chroma(planes.colour) >= _SATURATED
        # Where the mask is a painted copy of the picture: at least half of it is equal, or equal up to JPEG errors.
        if picture is not None:
            for apart in (0, _COPIED):
                own = _copied(planes.colour, picture, apart)
                if own.mean() >= 0.5:
                    hole &= ~own
                    break
        return hole if planes.alpha is None else hole & (planes.alpha >= 128)
    if planes.alpha is None:
        raise InvalidMaskError(f"mask_channel: {channel!r} needs a mask with transparency, got {planes.kind}")
    opaque = _above(planes.alpha, 255, threshold)
    return opaque if channel == "alpha" else ~opaque


def _certain_hole(planes: _Planes, threshold: float, picture: Picture | None) -> np.ndarray:
    """The hole of an unambiguous mask; otherwise InvalidMaskError, which names the choices.

    Opaque and grey: by luma. Partly transparent: by alpha, if the opaque pixels have one colour, white or saturated,
    and are at most half of the mask (strokes on a layer). Opaque and in colour: by colour, if at most half has one
    colour, on black or on a copy of the picture.
    """
    if planes.alpha is not None and planes.alpha.min() < 128:
        opaque = planes.alpha >= 128
        plane = planes.colour if planes.levels is None else planes.levels
        assert plane is not None
        if 0 < np.count_nonzero(opaque) <= opaque.size / 2:
            pixels = plane[opaque].reshape(np.count_nonzero(opaque), -1)
            mean = pixels.mean(axis=0)
            if _one_colour(pixels) and (mean.min() >= 255 - _BLACK or np.ptp(mean) >= _ONE_COLOUR):
                return _above(planes.alpha, 255, threshold)
        raise InvalidMaskError(
            f"mask: it is partly transparent ({planes.kind}), which can mean strokes on a layer or a picture with "
            f"the hole rubbed out; {_CHOICES}"
        )
    if planes.colour is None or (chroma(planes.colour) < _SATURATED).all():
        return _by_luma(planes, threshold)
    strokes = _strokes(planes.colour, picture)
    if strokes is not None:
        return strokes
    raise InvalidMaskError(
        f"mask: it is in colour ({planes.kind}), which can mean a coloured brush, labels or a photograph; {_CHOICES}"
    )


def _strokes(colour: np.ndarray, picture: Picture | None) -> np.ndarray | None:
    """The strokes of one brush on black or on a copy of the picture, bool [H, W]; None where a mask uint8 [H, W, 3]
    is another one."""
    on_black = _strokes_on_black(colour)
    if on_black is not None or picture is None:
        return on_black
    differs = ~_copied(colour, picture, 0)
    brush = colour[differs]
    if 0 < len(brush) <= differs.size / 2 and _one_colour(brush, 0):  # a hard brush on an exact copy
        saturated = np.ptp(brush[0]) >= _ONE_COLOUR
        return differs if saturated and not (colour[~differs] == brush[0]).all(axis=1).any() else None
    hole = brush_hole(colour, lambda rows: _bytes_of(picture, rows))
    if hole is None or (differs & ~ndimage.binary_dilation(hole, iterations=_SOFT)).any():
        return hole
    return differs  # a soft brush on an exact copy


def _strokes_on_black(colour: np.ndarray) -> np.ndarray | None:
    saturated = chroma(colour) >= _SATURATED
    if not 0 < np.count_nonzero(saturated) <= saturated.size / 2:
        return None
    brightest = largest(colour)
    brush, darkest = (colour.reshape(-1, 3)[at] for at in (brightest.argmax(), brightest.argmin()))
    lossless = brightest[~saturated].max() <= _BLACK and _blends(colour.reshape(-1, 3), darkest, brush)
    return saturated if lossless else brush_hole(colour, black)


def _by_luma(planes: _Planes, threshold: float) -> np.ndarray:
    if planes.levels is not None and planes.alpha is None:
        return planes.levels if planes.levels.dtype == np.bool_ else _above(planes.levels, planes.white, threshold)
    luma = planes.levels
    if luma is None:
        assert planes.colour is not None
        luma = np.asarray(Image.fromarray(planes.colour).convert("L"))
    if planes.alpha is None:
        return _above(luma, 255, threshold)
    above: np.ndarray = luma.astype(np.float32) * planes.alpha / (255 * 255) > threshold
    return above


def _above(levels: np.ndarray, white: float, threshold: float) -> np.ndarray:
    """Bool [H, W]: where a level, as a share of `white`, exceeds a threshold."""
    above: np.ndarray
    if levels.dtype != np.uint8:
        above = levels / np.float32(white) > threshold
    else:  # compare bytes with the least level that exceeds the threshold; white does
        above = levels >= int((np.arange(256) / white > threshold).argmax())
    return above


def _one_colour(pixels: np.ndarray, apart: int = _ONE_COLOUR) -> bool:
    """Whether pixels uint8 [N, C] differ by no more than `apart` in each channel."""
    return bool(all(int(channel.max()) - int(channel.min()) <= apart for channel in pixels.T))


def _blends(pixels: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether all pixels uint8 [N, 3] are blends of two different colours [3], up to rounding."""
    low = low.astype(np.float32)
    way = high - low
    widest = np.abs(way).argmax()
    if way[widest] == 0:
        return False
    for start in range(0, len(pixels), 2**20):
        change = pixels[start : start + 2**20] - low
        if (np.abs(change - change[:, widest, None] * (way / way[widest])) > _ROUNDING).any():
            return False
    return True


def _bytes_of(picture: Picture, rows: slice) -> np.ndarray:
    """Rows of a picture in levels of 255, int16."""
    return np.rint(picture.samples[rows] * (255 / picture.white)).astype(np.int16)


def _copied(colour: np.ndarray, picture: Picture, apart: int) -> np.ndarray:
    """Bool [H, W]: where a mask's colour uint8 [H, W, 3] equals the picture, within `apart` in each channel."""
    same = np.ones(colour.shape[:2], dtype=bool)
    for top in range(0, colour.shape[0], _STRIP):
        strip = slice(top, top + _STRIP)
        same[strip] = largest(np.abs(colour[strip] - _bytes_of(picture, strip))) <= apart
    return same


def _planes(mask: Any, size: tuple[int, int]) -> _Planes:
    """The channels of one mask of any accepted kind, for a picture of `size` (height, width)."""
    mask = file_of(mask, InvalidMaskError, "mask")
    if isinstance(mask, (Path, Encoded)):
        return _of_pil(open_upright(mask, InvalidMaskError, "mask")[0])
    if isinstance(mask, Image.Image):
        return _of_pil(upright(mask, InvalidMaskError, "mask")[0])
    if isinstance(mask, torch.Tensor):
        if mask.ndim == 4 and mask.shape[0] != 1:
            raise InvalidMaskError(f"mask: expected one tensor mask [1, C, H, W] a picture, got {list(mask.shape)}")
        one = mask[0] if mask.ndim == 4 else mask
        values = host_values(one, InvalidMaskError, "mask").numpy()
        return _of_array(values, size, str(mask.dtype), True)
    if isinstance(mask, np.ndarray):
        return _of_array(np.asarray(mask), size, str(mask.dtype), False)  # numpy.matrix does not take a third axis
    raise InvalidMaskError(f"mask: expected {ACCEPTED}, got {type(mask).__name__}")


def _of_array(mask: np.ndarray, size: tuple[int, int], dtype: str, tensor: bool) -> _Planes:
    kind = f"{'a tensor' if tensor else 'an array'} {list(mask.shape)} of {dtype}"
    mask, _ = channels_last(mask, InvalidMaskError, "mask", tensor=tensor, size=size)
    levels, white = _scaled(mask)
    channels = levels.shape[2]
    if channels == 1:
        return _Planes(levels[..., 0], white, None, None, kind)
    if channels == 3 and _is_grey(levels):
        return _Planes(levels[..., 0], white, None, None, kind)
    if white != 255:
        levels = np.rint(np.clip(levels * np.float32(255 / white), 0, 255)).astype(np.uint8)
    return _of_bytes(levels, kind)


def _scaled(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Levels, bool or of a dtype that holds them, and the level of white."""
    if mask.dtype == np.bool_:
        return mask, 1.0
    if mask.dtype.kind == "f":
        return unit_levels(mask, InvalidMaskError, "mask"), 1.0
    if mask.dtype.kind not in "iu":
        raise InvalidMaskError(f"mask: expected bool, integers or floats, got {mask.dtype}")
    low, high = (int(mask.min()), int(mask.max())) if mask.size else (0, 0)
    if low < 0 or high > 65535:
        raise InvalidMaskError(f"mask: expected levels in 0..65535 for {mask.dtype}, got {low} to {high}")
    if high == 1:
        return mask.astype(bool), 1.0
    # Wide integer types may hold 8-bit or 16-bit levels, which are distinguished by their
    # maximum.
    deep = mask.dtype.itemsize == 2 and mask.dtype.kind == "u"
    return (mask, 65535.0) if deep or high > 255 else (mask.astype(np.uint8), 255.0)


def _of_pil(mask: Image.Image) -> _Planes:
    kind = f"a picture of mode {mask.mode}"
    if mask.mode == "F" or mask.mode.startswith("I"):
        levels, white = _scaled(pixels_of(mask))
        return _Planes(levels, white, None, None, kind)
    if mask.mode == "La":  # Pillow has no way from it to RGBA
        mask = mask.convert("LA")
    keyed = mask.mode in ("1", "L", "RGB", "P") and transparency_of(mask) is not None
    if mask.mode in ("1", "L") and not keyed:
        grey = pixels_of(mask)
        levels, white = (grey, 255.0) if mask.format in _LOSSY_FORMATS else _scaled(grey)
        return _Planes(levels, white, None, None, kind)
    if keyed:
        kind += " with transparency"
    try:
        wanted = "RGBA" if keyed or mask.mode in ("LA", "PA", "RGBA", "RGBa") else "RGB"
        return _of_bytes(pixels_of(mask if mask.mode == wanted else mask.convert(wanted)), kind)
    except ValueError as error:
        raise InvalidMaskError(f"mask: expected a mode that converts to grey, got {mask.mode}") from error


def _of_bytes(levels: np.ndarray, kind: str) -> _Planes:
    """The planes of a uint8 [H, W, C], C = 2 (grey, alpha), 3 or 4 (RGBA)."""
    alpha = None if levels.shape[2] == 3 else levels[..., -1]
    if levels.shape[2] == 2 or _is_grey(levels):
        return _Planes(levels[..., 0], 255.0, None, alpha, kind)
    return _Planes(None, 255.0, levels[..., :3], alpha, kind)


def _is_grey(levels: np.ndarray) -> bool:
    """Whether the first three channels of [H, W, C] are the same."""
    return bool(np.array_equal(levels[..., 0], levels[..., 1]) and np.array_equal(levels[..., 1], levels[..., 2]))
