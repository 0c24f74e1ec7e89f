"""Rows to compare with: the two inpainting methods that OpenCV has, neither of which is trained."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from ..training.errors import MissingExtraError

RADIUS = 3.0
"""Pixels around a hole pixel that both methods look at; the value in OpenCV's own example."""


def telea(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """A. Telea, "An image inpainting technique based on the fast marching method", 2004.

    Args:
        picture: uint8 [H, W, 3]; what lies under the hole does not matter.
        hole: bool [H, W], True = to be filled.

    Returns:
        uint8 [H, W, 3]; known pixels keep their bits.

    Raises:
        MissingExtraError: OpenCV is not installed.
    """
    cv2 = _opencv()
    return _inpaint(cv2, picture, hole, cv2.INPAINT_TELEA)


def navier_stokes(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """M. Bertalmio et al., "Navier-Stokes, fluid dynamics, and image and video inpainting", 2001; else as `telea`."""
    cv2 = _opencv()
    return _inpaint(cv2, picture, hole, cv2.INPAINT_NS)


BASELINES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "telea": ("Telea", telea),
    "ns": ("Navier-Stokes", navier_stokes),
}
"""Name for `evaluate` and `--baselines`: the row's title, and the method."""


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as cause:
        raise MissingExtraError(
            f'baselines: OpenCV cannot be imported ({cause}); pip install "lgnet_fast[eval]", or ask for no baselines'
        ) from cause
    return cv2


def _inpaint(cv2: ModuleType, picture: np.ndarray, hole: np.ndarray, method: int) -> np.ndarray:
    known = np.where(hole[..., None], np.uint8(0), picture)
    filled = cv2.inpaint(known, hole.astype(np.uint8), RADIUS, method)
    return np.where(hole[..., None], filled, picture)
