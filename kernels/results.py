"""What a convolution of the engine stores: feature maps with their activations, or the picture that ends a stage."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Store(NamedTuple):
    """A result: the view [B, H, W, C] that it is written to, and its activation (a key of ACTIVATIONS)."""

    view: Tensor
    activation: str


class Merge(NamedTuple):
    """The end of a stage: ``merged = image * (1 - mask) + tanh(value) * mask``.

    image, mask: [B, 3, H, W] and [B, 1, H, W] float32, contiguous. raw: [B, 3, H, W] float32 contiguous, tanh(value).
    merged: the picture's buffer [B, H, W, 4] (channel 3 is left alone), or [B, 3, H, W] float32 for the last stage.
    """

    image: Tensor
    mask: Tensor
    raw: Tensor
    merged: Tensor
    last: bool
