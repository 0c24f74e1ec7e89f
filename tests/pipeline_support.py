"""Small networks with LGNet's contract, and pictures and masks to run through the pipeline."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lgnet_fast.evaluation import Evaluation, EvaluationOptions, scoring
from lgnet_fast.jobs import items
from lgnet_fast.jobs.items import Item
from lgnet_fast.jobs.options import FillOptions
from lgnet_fast.jobs.world import World


class BlurFill(nn.Module):
    """Fills the hole with the mean of the known pixels around it, so the result depends on known content only.

    `seen` lists the batch and network size of every call.
    """

    size_multiple = 256
    channels = (4, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, int, int]] = []
        self.eval()

    def forward(self, image: Tensor, mask: Tensor, return_stages: bool = False):
        assert image.shape[1:2] == (3,)
        assert mask.shape == (image.shape[0], 1, *image.shape[2:])
        assert image.dtype == mask.dtype == self.gain.dtype
        assert image.shape[2] % self.size_multiple == 0
        assert image.shape[3] % self.size_multiple == 0
        assert image.abs().max() <= 1
        self.seen.append((image.shape[0], *image.shape[2:]))
        known = 1 - mask
        output = self.gain * _blur(image * known) / _blur(known).clamp(min=1e-3)
        merged = image * known + output * mask
        if not return_stages:
            return merged
        dark = image * known - mask
        return SimpleNamespace(coarse=-torch.ones_like(image), merged=(dark, merged * 0.5 + dark * 0.5, merged))


class ConstantFill(nn.Module):
    """Fills the hole with one colour (three values in [-1, 1])."""

    size_multiple = 256
    channels = (4, 4, 4)

    def __init__(self, *colour: float) -> None:
        super().__init__()
        self.register_buffer("colour", torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1))
        self.eval()

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return image * (1 - mask) + self.colour * mask


class IdentityFill(nn.Module):
    """Returns the known pixels as the network got them, also where the mask says hole (there it gets none)."""

    size_multiple = 256
    channels = (4, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.eval()

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        self.images.append(image.clone())
        self.masks.append(mask.clone())
        return image


def _blur(planes: Tensor) -> Tensor:
    return F.avg_pool2d(F.avg_pool2d(planes, (33, 1), 1, (16, 0)), (1, 33), 1, (0, 16))


def noise(height: int, width: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    """A random RGB array [height, width, 3]."""
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, high, (height, width, 3)).astype(dtype)


def box_mask(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """bool [height, width], True within each (top, left, bottom, right)."""
    mask = np.zeros((height, width), dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


HEIGHT, WIDTH = 40, 60
HOLE = box_mask(HEIGHT, WIDTH, (10, 15, 30, 45))
COLOUR = (0.2, -0.3, 0.7)  # for `ConstantFill`; of 255: 153, 89.25, 216.75; their mean 153


def some_holes(height: int, width: int) -> np.ndarray:
    """bool [height, width]: a rectangle and scattered pixels."""
    hole = np.random.default_rng(height * width).random((height, width)) > 0.9995
    hole[height // 4 : height // 4 + max(1, height // 6), width // 3 : width // 3 + max(1, width // 5)] = True
    return hole


def noise_of_mode(mode: str, height: int = 40, width: int = 60) -> Image.Image:
    """A random picture of one of Pillow's modes that the pipeline keeps."""
    rgb, deep = noise(height, width), noise(height, width, dtype=np.uint16)[..., 0]
    if mode == "I;16":
        return Image.fromarray(deep)
    if mode == "I;16B":
        return Image.frombytes(mode, (width, height), deep.astype(">u2").tobytes())
    if mode == "I":
        return Image.fromarray(deep.astype(np.int32))
    if mode in ("LA", "RGBA"):
        alpha = np.random.default_rng(5).integers(0, 256, (height, width, 1)).astype(np.uint8)
        return Image.fromarray(np.concatenate([rgb[..., : len(mode) - 1], alpha], axis=2))
    if mode == "P":
        return Image.fromarray(rgb).quantize(64)
    return Image.fromarray(rgb).convert(mode)


def smooth_noise(height: int, width: int, seed: int) -> np.ndarray:
    """A random RGB array [height, width, 3] whose neighbouring pixels resemble each other; sides at least 8."""
    small = Image.fromarray(noise(height // 8, width // 8, seed))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def write_picture(path: Path, array: np.ndarray, **options: Any) -> Path:
    """Save an array as a picture, in folders that are made; `options` of Pillow's `save`. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def png_bytes(array: np.ndarray) -> bytes:
    """The bytes of an array as a PNG file."""
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    return encoded.getvalue()


def plan_items(
    source: Path,
    mask: Path | None,
    out: Path | str,
    format: str | None = None,
    world: World | None = None,
    **more: Any,
) -> list[Item]:
    """The items of `lgnet-fast run` for these options."""
    return items.plan_items(FillOptions(source, mask, out, format=format, **more), world)


def evaluate(
    pictures: Path, world: World | None = None, tell: scoring.Tell | None = None, **options: Any
) -> Evaluation | None:
    """`lgnet-fast eval` with these options."""
    return scoring.evaluate(EvaluationOptions(pictures, **options), world, tell)
