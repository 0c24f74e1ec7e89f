"""Baselines: methods without training, two of OpenCV and one of scikit-image."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from ..errors import MissingExtraError

RADIUS = 3.0
"""Radius in pixels of the neighbourhood in both OpenCV methods; the value of OpenCV's example."""


def telea(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """A. Telea, "An image inpainting technique based on the fast marching method", 2004.

    Args:
        picture: uint8 [H, W, 3]; pixels in the hole are ignored.
        hole: bool [H, W], True = to be filled.

    Returns:
        uint8 [H, W, 3]; known pixels are unchanged.

    Raises:
        ValueError: a picture or hole of another shape, or a picture of another dtype.
        MissingExtraError: OpenCV is not installed.
    """
    cv2 = _opencv()
    return _inpaint(cv2, picture, hole, cv2.INPAINT_TELEA)


def navier_stokes(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """M. Bertalmio et al., "Navier-Stokes, fluid dynamics, and image and video inpainting", 2001; else as `telea`."""
    cv2 = _opencv()
    return _inpaint(cv2, picture, hole, cv2.INPAINT_NS)


def biharmonic(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """S. B. Damelin, N. S. Hoang, "On surface completion and image inpainting by biharmonic functions", 2018.

    scikit-image's `inpaint_biharmonic`, all channels together, rounded; else as `telea`.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    _check(picture, hole)
    try:
        from skimage.restoration import inpaint_biharmonic
    except ImportError as cause:
        raise MissingExtraError(
            f"baselines: scikit-image cannot be imported ({cause}); pip install 'lgnet-fast[eval]', or ask for no "
            "baselines"
        ) from cause
    known = np.where(hole[..., None], np.uint8(0), picture)
    filled = np.rint(inpaint_biharmonic(known, hole, channel_axis=2) * 255)
    return np.where(hole[..., None], filled.clip(0, 255).astype(np.uint8), picture)


BASELINES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "telea": ("Telea", telea),
    "ns": ("Navier-Stokes", navier_stokes),
    "biharmonic": ("biharmonic", biharmonic),
}
"""Name in `evaluate` and `--baselines` -> title of the row, and the method."""


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as cause:
        raise MissingExtraError(
            f"baselines: OpenCV cannot be imported ({cause}); pip install 'lgnet-fast[eval]', or ask for no baselines"
        ) from cause
    return cv2


def _inpaint(cv2: ModuleType, picture: np.ndarray, hole: np.ndarray, method: int) -> np.ndarray:
    _check(picture, hole)
    known = np.where(hole[..., None], np.uint8(0), picture)
    filled = cv2.inpaint(known, hole.astype(np.uint8), RADIUS, method)
    return np.where(hole[..., None], filled, picture)


def _check(picture: np.ndarray, hole: np.ndarray) -> None:
    """Raise ValueError where the methods would return no filled picture, and not always an error."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture: expected uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    if hole.shape != picture.shape[:2]:
        raise ValueError(f"hole: expected {list(picture.shape[:2])} to fit the picture, got {list(hole.shape)}")
