"""Masks of every accepted kind, as a boolean hole, and the alpha with which a fill is laid over the picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InvalidMaskError
from .files import open_upright, upright

ACCEPTED = (
    "a PIL picture, a path, a bool, uint8 or float array [H, W], or a tensor [B, 1, H, W] "
    "(uint8 in 0..255, floats in [0, 1]; larger is hole)"
)

# A black mask in a lossy file decodes to levels 0 and 1: there the rule "uint8 whose maximum is 1 means bool"
# would turn coding noise into holes.
_LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}


def read_hole(
    mask: Any, height: int, width: int, *, threshold: float = 0.5, invert: bool = False, note: str = ""
) -> np.ndarray:
    """The hole as bool [height, width], True = to be filled.

    `mask` is one mask of any accepted kind (see `ACCEPTED`). Levels above `threshold` (0 <= threshold < 1, of full
    scale) are hole; `invert` swaps hole and known. Colour masks count by luma times alpha, so transparent is known.
    uint8 with maximum 1 means bool. `note` is appended to the message about a wrong size.
    Raises InvalidMaskError: unreadable, wrong type, wrong size, NaN, out of range.
    """
    if not 0 <= threshold < 1:
        raise InvalidMaskError(f"mask_threshold: expected 0 <= value < 1, got {threshold!r}")
    levels = _levels(mask)
    if levels.shape != (height, width):
        raise InvalidMaskError(
            f"mask: expected the picture's size {width}x{height} (width x height), "
            f"got {levels.shape[1]}x{levels.shape[0]}{note}"
        )
    hole = levels if levels.dtype == np.bool_ else levels > threshold
    return ~hole if invert else hole


def masks_for(mask: Any, count: int) -> list[Any]:
    """One mask for each of `count` pictures: from a list of `count`, a tensor [count, 1, H, W], or one for all.

    Raises InvalidMaskError when a list or a tensor has another length (a tensor's may also be 1).
    """
    if isinstance(mask, (list, tuple)):
        if len(mask) != count:
            raise InvalidMaskError(f"mask: expected one mask or {count} masks for {count} pictures, got {len(mask)}")
        return list(mask)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[0] != 1:
        if mask.shape[0] != count:
            raise InvalidMaskError(f"mask: expected [{count} or 1, 1, H, W], got {list(mask.shape)}")
        return list(mask.split(1))
    return [mask] * count


def soft_edge(hole: np.ndarray, dilate: int = 0, feather: int = 0) -> np.ndarray:
    """Alpha float32 [H, W] in [0, 1] of the fill over the picture.

    1 within `dilate` pixels of the hole (Euclidean: the structuring element is a disk), then a linear ramp over the
    next `feather` pixels, outside the dilated hole, and 0 beyond.
    """
    for name, pixels in (("dilate", dilate), ("feather", feather)):
        if isinstance(pixels, bool) or not isinstance(pixels, (int, np.integer)) or pixels < 0:
            raise InvalidMaskError(f"{name}: expected a whole number of pixels >= 0, got {pixels!r}")
    alpha = hole.astype(np.float32)
    if dilate + feather == 0 or not hole.any():
        return alpha
    reach = int(dilate + feather)
    box = grow_box(bounding_box(hole), reach, hole.shape)
    distance = _distance(hole[box], reach)
    ramp = np.where(distance <= reach, 1 - (distance - dilate) / (feather + 1), 0)
    alpha[box] = np.where(distance <= dilate, 1, ramp)
    return alpha


def bounding_box(hole: np.ndarray) -> tuple[slice, slice]:
    """The smallest (rows, columns) that hold every True of a bool [H, W] with at least one."""
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def grow_box(box: tuple[slice, slice], by: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """`box` grown by `by` pixels on every side, clipped to `shape`."""
    rows, columns = box
    return (
        slice(max(0, rows.start - by), min(shape[0], rows.stop + by)),
        slice(max(0, columns.start - by), min(shape[1], columns.stop + by)),
    )


def _distance(hole: np.ndarray, reach: int) -> np.ndarray:
    """Euclidean distance to the nearest hole pixel, float32 [H, W], exact up to `reach`, larger beyond.

    Separable: the squared distance is the least, over column offsets, of the offset squared plus the squared
    distance along that column.
    """
    height, width = hole.shape
    far = reach + 1
    along = np.full((height, width), far, dtype=np.int32)
    along[hole] = 0
    for y in range(1, height):
        np.minimum(along[y], along[y - 1] + 1, out=along[y])
    for y in range(height - 2, -1, -1):
        np.minimum(along[y], along[y + 1] + 1, out=along[y])
    column = np.minimum(along, far) ** 2
    nearest = column.copy()
    for offset in range(1, min(reach, width - 1) + 1):
        np.minimum(nearest[:, offset:], column[:, :-offset] + offset * offset, out=nearest[:, offset:])
        np.minimum(nearest[:, :-offset], column[:, offset:] + offset * offset, out=nearest[:, :-offset])
    return np.sqrt(nearest, dtype=np.float32)


def _levels(mask: Any) -> np.ndarray:
    """The mask as bool [H, W], or as float32 [H, W] in [0, 1]."""
    if isinstance(mask, (str, os.PathLike)):
        return _levels_of_picture(open_upright(Path(mask), InvalidMaskError, "mask")[0])
    if isinstance(mask, Image.Image):
        return _levels_of_picture(upright(mask, InvalidMaskError, "mask")[0])
    if isinstance(mask, torch.Tensor):
        if mask.ndim != 4 or mask.shape[0] != 1 or mask.shape[1] != 1:
            raise InvalidMaskError(f"mask: expected one tensor mask [1, 1, H, W] a picture, got {list(mask.shape)}")
        mask = mask[0, 0].detach().cpu()
        return _levels_of_array((mask.float() if mask.is_floating_point() else mask).numpy())
    if isinstance(mask, np.ndarray):
        if mask.ndim == 3 and mask.shape[2] == 1:
            mask = mask[..., 0]
        if mask.ndim != 2:
            raise InvalidMaskError(f"mask: expected an array [H, W], got {list(mask.shape)}")
        return _levels_of_array(mask)
    raise InvalidMaskError(f"mask: expected {ACCEPTED}, got {type(mask).__name__}")


def _levels_of_array(mask: np.ndarray) -> np.ndarray:
    if mask.dtype == np.bool_:
        return mask
    if mask.dtype == np.uint8:
        return mask.astype(bool) if mask.size and mask.max() == 1 else mask.astype(np.float32) / 255
    if mask.dtype.kind != "f":
        raise InvalidMaskError(f"mask: expected bool, uint8 or float, got {mask.dtype}")
    if not np.isfinite(mask).all():
        raise InvalidMaskError("mask: expected finite levels in [0, 1], got NaN or infinity")
    if mask.size and (mask.min() < 0 or mask.max() > 1):
        raise InvalidMaskError(f"mask: expected levels in [0, 1], got {mask.min():g} to {mask.max():g}")
    return mask.astype(np.float32)


def _levels_of_picture(mask: Image.Image) -> np.ndarray:
    if mask.mode == "1":
        return np.array(mask)
    if mask.mode == "F":
        return _levels_of_array(np.asarray(mask))
    if mask.mode.startswith("I"):
        deep = np.asarray(mask).astype(np.int64)
        low, high = (int(deep.min()), int(deep.max())) if deep.size else (0, 0)
        if low < 0 or high > 65535:
            raise InvalidMaskError(f"mask: expected levels in 0..65535 for mode {mask.mode}, got {low} to {high}")
        # Mode I holds whatever integers it was made from: 8-bit levels are told from 16-bit ones by their maximum.
        full = 65535 if mask.mode != "I" or high > 255 else 255
        return deep.astype(bool) if high == 1 else (deep / full).astype(np.float32)
    if mask.mode == "L":
        grey = np.asarray(mask)
        return grey.astype(np.float32) / 255 if mask.format in _LOSSY_FORMATS else _levels_of_array(grey)
    try:
        colour = np.asarray(mask.convert("RGBA"))
    except ValueError as error:
        raise InvalidMaskError(f"mask: expected a mode that converts to grey, got {mask.mode}") from error
    luma = np.asarray(Image.fromarray(colour[..., :3]).convert("L"), dtype=np.float32)
    return luma * colour[..., 3] / (255 * 255)
