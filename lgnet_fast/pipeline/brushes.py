"""Strokes of one coloured brush in a lossy mask, such as a JPEG: on black, or on a copy of the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy import ndimage

Background = Callable[[slice], np.ndarray]
"""Rows of a picture to its colours in them, as numbers in 0..255 that broadcast to [rows, W, 3]."""

# Pixels processed at a time, because numbers wider than bytes of a whole picture would take too much memory.
_STRIP_PIXELS = 2**18

# Units are levels of 255; distances are between colours as `_luma_chroma` has them.

# A brush's largest and smallest channels differ by this much, and some channel from the background by this much.
_CHROMA = 64
_CHANGED = 48
# Pixels of the brush lie within this distance, in each channel, of the centre of the commonest colours' bin.
_NEAR = 24
# A background closer than this to the brush's colour shows no stroke; no larger share of a picture may be so close.
_CONTRAST = 32
_MOST_ALIKE = 0.005
# The brush's share of a pixel that is hole. Half is the stroke's edge; halved chroma may shift it by a pixel, and
# a hole that is a pixel too wide does less harm than a rim that is left.
_HOLE = 0.3
# Every stroke has a pixel of this share; others are noise of the coding.
_STROKE = 0.75

# What is true of the mask of a brush, but not of a photograph. Away from edges, pixels are all background or all
# brush; of the hole's size, so many may not be.
_EDGE = 3
_MOST_BETWEEN = 0.02
_BETWEEN = (0.2, 0.8)
# So much of the hole is all brush, and away from edges the mean share is this.
_LEAST_FULL = 0.5
_LEAST_MEAN = 0.9
# Colours are between those of background and brush: 95 % of the hole, and 99 % of the rest, up to these distances.
_HOLE_OFF = 32
_REST_OFF = 28
# The mean colour of the strokes is the commonest one, up to this in each channel.
_MEAN_OFF = 32
# So many of the pixels of strokes away from edges may differ from it by more than this in some channel.
_OTHER = 56
_MOST_OTHERS = 0.05


def black(rows: slice) -> np.ndarray:
    """The background of a mask on black."""
    return np.zeros((1, 1, 3), np.int16)


def brush_hole(colour: np.ndarray, background: Background) -> np.ndarray | None:
    """The strokes of a brush of one saturated colour over a known background, as bool [H, W].

    For every pixel the brush's share is estimated, mostly by luma, because lossy formats store colour in less detail.
    Pixels with a share of 0.3 or more are hole.

    Args:
        colour: the mask, uint8 [H, W, 3].
        background: the colours without the strokes, up to the noise of lossy coding.

    Returns:
        None where the mask is not such a picture: where it has several colours, soft strokes wider than some pixels,
        a hole over more than half of it, or where the background has the brush's colour.
    """
    brush = _brush(colour, background)
    if brush is None:
        return None
    size = colour.shape[:2]
    share, off = np.empty(size, np.uint8), np.empty(size, np.uint8)
    alike = np.empty(size, bool)
    for rows in _strips(colour):
        below = background(rows).astype(np.float32)
        to_brush = _luma_chroma(brush - below)
        change = _luma_chroma(colour[rows] - below)
        contrast = _product(to_brush, to_brush)
        part = np.clip(_product(change, to_brush) / np.maximum(contrast, _CONTRAST**2), 0, 1)
        share[rows] = np.rint(part * 255)
        alike[rows] = contrast < _CONTRAST**2
        change -= part * to_brush
        off[rows] = np.minimum(np.sqrt(_product(change, change)), 255)
    if np.count_nonzero(alike) > _MOST_ALIKE * alike.size:
        return None
    hole: np.ndarray = share >= _HOLE * 255
    strokes, count = ndimage.label(hole, np.ones((3, 3)))
    kept = np.zeros(count + 1, bool)
    kept[strokes[hole & (share >= _STROKE * 255)]] = True
    hole = kept[strokes]
    del strokes
    if not _plausible(colour, brush, hole, share, off, alike):
        return None
    if alike.any():  # where the picture has the brush's colour, its surroundings decide
        hole |= alike & ndimage.binary_closing(hole, iterations=2)
    return hole


def _plausible(
    colour: np.ndarray, brush: np.ndarray, hole: np.ndarray, share: np.ndarray, off: np.ndarray, alike: np.ndarray
) -> bool:
    """Whether a hole is the strokes of a brush. `off` uint8 [H, W]: distances from the colours between background
    and brush; `alike`: where the background has the brush's colour."""
    count = np.count_nonzero(hole)
    if not 0 < count <= hole.size / 2:
        return False
    full = hole & (share >= _BETWEEN[1] * 255)
    if np.count_nonzero(full) < _LEAST_FULL * count or np.abs(_mean(colour, full) - brush).max() > _MEAN_OFF:
        return False
    if _quantile(off[hole], 0.95) > _HOLE_OFF or _quantile(off[~hole], 0.99) > _REST_OFF:
        return False
    inside = ndimage.binary_erosion(hole, iterations=_EDGE, border_value=1)
    if inside.any() and (share[inside].mean() < _LEAST_MEAN * 255 or _others(colour, brush, inside) > _MOST_OTHERS):
        return False
    between = (share > _BETWEEN[0] * 255) & (share < _BETWEEN[1] * 255) & ~alike
    between &= inside | ~ndimage.binary_dilation(hole, iterations=_EDGE)
    return bool(np.count_nonzero(between) <= _MOST_BETWEEN * count)


def _brush(colour: np.ndarray, background: Background) -> np.ndarray | None:
    """The commonest saturated colour that is not the background's, float32 [3]; None where there is none."""

    def changed(rows: slice) -> np.ndarray:
        pixels = colour[rows]
        far = largest(np.abs(pixels - background(rows))) >= _CHANGED
        found: np.ndarray = pixels[far & (chroma(pixels) >= _CHROMA)].astype(np.int16)
        return found

    counts = np.zeros(16**3, np.int64)
    for rows in _strips(colour):
        bins = changed(rows) >> 4
        counts += np.bincount(bins @ np.array([256, 16, 1]), minlength=len(counts))
    if not counts.any():
        return None
    centre = np.array(np.unravel_index(counts.argmax(), (16, 16, 16))) * 16 + 8
    total, number = np.zeros(3), 0
    for rows in _strips(colour):
        pixels = changed(rows)
        near = pixels[largest(np.abs(pixels - centre)) <= _NEAR]
        total += near.sum(axis=0)
        number += len(near)
    return (total / number).astype(np.float32)


def largest(colour: np.ndarray) -> np.ndarray:
    """Largest channel of [..., 3]."""
    found: np.ndarray = np.maximum(np.maximum(colour[..., 0], colour[..., 1]), colour[..., 2])
    return found


def chroma(colour: np.ndarray) -> np.ndarray:
    """Largest minus smallest channel of [..., 3]."""
    smallest = np.minimum(np.minimum(colour[..., 0], colour[..., 1]), colour[..., 2])
    found: np.ndarray = largest(colour) - smallest
    return found


def _luma_chroma(colour: np.ndarray) -> np.ndarray:
    """Luma and half of the two colour differences of JPEG (ITU-T T.871), so that colour counts less: float32
    [3, H, W] of float32 [H, W, 3]."""
    red, green, blue = np.moveaxis(colour, 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, 0.282 * (blue - luma), 0.357 * (red - luma)])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products [H, W] of [3, H, W] and [3, H, W] or [3, 1, 1]."""
    product: np.ndarray = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def _strips(colour: np.ndarray) -> Iterator[slice]:
    height = max(1, _STRIP_PIXELS // max(1, colour.shape[1]))
    return (slice(top, min(top + height, len(colour))) for top in range(0, len(colour), height))


def _mean(colour: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean colour [3] of the pixels `where` bool [H, W], at least one."""
    total = np.zeros(3)
    for rows in _strips(colour):
        total += colour[rows][where[rows]].sum(axis=0, dtype=np.float64)
    return total / np.count_nonzero(where)


def _others(colour: np.ndarray, brush: np.ndarray, where: np.ndarray) -> float:
    """The part of the pixels `where` bool [H, W], at least one, whose colour is not the brush's."""
    far = sum(
        np.count_nonzero(largest(np.abs(colour[rows][where[rows]] - brush)) > _OTHER) for rows in _strips(colour)
    )
    return far / np.count_nonzero(where)


def _quantile(levels: np.ndarray, part: float) -> int:
    """The least level that at least a `part` of uint8 levels do not exceed; 0 of none."""
    return int(np.searchsorted(np.bincount(levels, minlength=256).cumsum(), part * len(levels)))
