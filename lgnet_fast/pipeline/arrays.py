"""Layouts and scales of the arrays and tensors of pictures and masks."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..errors import LGNetError


def channels_last(
    array: np.ndarray, error: type[LGNetError], name: str, *, tensor: bool, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, str]:
    """An array [H, W], [H, W, C] or [C, H, W], C = 1 to 4, as a view [H, W, C], and "HW", "HWC" or "CHW".

    Where a 3-dimensional shape fits both orders, the one that gives `size` (height, width) is taken; if both do, a
    tensor is [C, H, W] and an array [H, W, C]. Raises `error` for other shapes.
    """
    if array.ndim == 2:
        return array[..., None], "HW"
    orders = []
    if array.ndim == 3:
        orders = [order for order, axis in (("HWC", 2), ("CHW", 0)) if 1 <= array.shape[axis] <= 4]
    if not orders:
        batch = "" if tensor or array.ndim != 4 else f"; a batch of arrays is a list: list({name})"
        raise error(
            f"{name}: expected {'a tensor' if tensor else 'an array'} [H, W], [H, W, C] or [C, H, W] with "
            f"C = 1 to 4, got {list(array.shape)}{batch}"
        )
    if len(orders) == 2:
        fitting = [order for order in orders if size == (array.shape[:2] if order == "HWC" else array.shape[1:])]
        orders = fitting if len(fitting) == 1 else ["CHW" if tensor else "HWC"]
    return (array if orders[0] == "HWC" else array.transpose(1, 2, 0)), orders[0]


def host_values(tensor: torch.Tensor, error: type[LGNetError], name: str) -> torch.Tensor:
    """The tensor on the CPU without its gradient, as plain values of a dtype that NumPy has: others become float32.

    Raises `error` for a tensor that has no such values: sparse, quantized, or on the meta device.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "one without values, on meta" if tensor.is_meta else f"layout {tensor.layout}, dtype {tensor.dtype}"
        raise error(f"{name}: expected a dense tensor of plain values, got {kind}")
    values = tensor.detach().cpu().resolve_conj().resolve_neg()
    known = (torch.float16, torch.float32, torch.float64)
    return values.float() if values.is_floating_point() and values.dtype not in known else values


def pixels_of(picture: Image.Image) -> np.ndarray:
    """`np.asarray`, converted strip by strip, because at once it would take three times the picture's bytes."""
    rows = max(1, 2**20 // max(1, picture.width))
    strips = (
        picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        for top in range(0, picture.height, rows)
    )
    pixels, done = np.empty(0), 0
    for strip in map(np.asarray, strips):
        if done == 0:
            pixels = np.empty((picture.height, *strip.shape[1:]), strip.dtype)
        pixels[done : done + len(strip)] = strip
        done += len(strip)
    return pixels


def unit_levels(levels: np.ndarray, error: type[LGNetError], name: str) -> np.ndarray:
    """The floats unchanged, if all are finite and in [0, 1] up to rounding: 1e-6, or four units of their precision.

    Raises `error` for NaN, infinity and other levels.
    """
    if not levels.size:
        return levels
    low, high = float(levels.min()), float(levels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise error(f"{name}: expected finite levels in [0, 1], got NaN or infinity")
    slack = max(1e-6, 4 * float(np.finfo(levels.dtype).eps))
    if low < -slack or high > 1 + slack:
        hint = " (divide 8-bit levels by 255)" if 1 < high <= 255 and low >= 0 else ""
        raise error(f"{name}: expected levels in [0, 1], got {low:.7g} to {high:.7g}{hint}")
    return levels
