"""The shapes that the compared networks take."""

from __future__ import annotations

from torch import Tensor


def check_shapes(name: str, picture: Tensor, channels: int, mask: Tensor, mask_channels: int, multiple: int) -> None:
    """Raise ValueError unless `picture`, the argument `name`, is [B, channels, H, W] with H and W multiples of
    `multiple`, and `mask` [B, mask_channels, H, W]."""
    if picture.dim() != 4 or picture.shape[1] != channels or any(side % multiple for side in picture.shape[2:]):
        raise ValueError(
            f"{name}: expected [B, {channels}, H, W] with multiples of {multiple}, got {list(picture.shape)}"
        )
    expected = [picture.shape[0], mask_channels, *picture.shape[2:]]
    if list(mask.shape) != expected:
        raise ValueError(f"mask: expected {expected} to fit {name}, got {list(mask.shape)}")
