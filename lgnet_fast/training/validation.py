"""Scores of held-out pictures: by hole classes, with SSIM, or by the evaluation suite's kinds of holes, in batches.

Either way the network runs as the exported one does, without autocast, so that scores do not depend on the precision
of the training and can be compared with those of ``lgnet-fast eval``. Several processes share the pictures, and all
get the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.masks import suite_mask
from ..data.metrics import LEAST_SQUARED_ERROR, LUMA, Metrics, relative_energy
from ..reference.features import LPIPS
from .config import TrainConfig
from .held_out import HeldOut, HeldOutPairs
from .processes import failing_together, own_share, sum_of_processes
from .samples import KINDS

_BATCH = 16
_HIGHEST_PSNR = 10 * math.log10(255**2 / LEAST_SQUARED_ERROR)
"""As in ``lgnet-fast eval --suite``. An infinite one would also stay the best for good."""


def make_validation(config: TrainConfig) -> ClassValidation | KindValidation | None:
    """The validation of a configuration; None: it has none.

    Raises:
        DataError: no such place, or no picture in it that can be read.
    """
    if config.data.validation is None:
        return None
    return KindValidation(config) if config.run.validation_kinds else ClassValidation(config)


class ClassValidation:
    """Held-out pictures, each under one stroke mask of every hole class of ``run.validation_classes``.

    Raises:
        DataError: no such place, or no picture in it that can be read.
    """

    def __init__(self, config: TrainConfig) -> None:
        data, run = config.data, config.run
        pictures = HeldOut(data.validation or "", data.size, data.protocol, run.validation_pictures)
        self.pairs = HeldOutPairs(pictures, run.validation_classes, run.seed)

    @torch.no_grad()
    def scores(self, network: nn.Module, lpips: LPIPS | None, accelerator: Any) -> dict[str, float]:
        """Means over pictures and classes, of 8-bit merged pictures: ``l1`` in %, ``psnr`` in dB, ``ssim``; NaN where
        one has NaN."""
        names = ("l1", "psnr", "ssim")
        metrics = Metrics(names)
        like = next(network.parameters())
        table = torch.zeros(len(self.pairs), len(names), dtype=torch.float64)
        with failing_together(accelerator):
            for number in own_share(accelerator, len(self.pairs)):
                image, mask = self.pairs[number]
                filled = network(image.to(like), mask.to(like))
                if bool(filled.isnan().any()):
                    table[number] = math.nan  # in 8 bits it would be black
                    continue
                found = metrics.scores(_eight_bit(filled), _eight_bit(image))
                found["psnr"] = min(found["psnr"], _HIGHEST_PSNR)
                table[number] = torch.tensor([found[name] for name in names], dtype=torch.float64)
        return dict(zip(names, sum_of_processes(accelerator, table).mean(dim=0).tolist(), strict=True))


class KindValidation:
    """Held-out pictures, each under one hole of every kind of ``run.validation_kinds``.

    Raises:
        DataError: no such place, or no picture in it that can be read.
    """

    def __init__(self, config: TrainConfig) -> None:
        data, run = config.data, config.run
        size = data.size
        self.pictures = HeldOut(data.validation or "", size, data.protocol, run.validation_pictures)
        self.masks = {
            kind: torch.stack(
                [
                    torch.from_numpy(suite_mask(size, size, kind=kind, seed=(KINDS, run.seed, i)))[None]
                    for i in self.pictures.numbers
                ]
            )
            for kind in run.validation_kinds
        }
        """Of each kind: bool [pictures, 1, S, S], True = hole."""

    @torch.no_grad()
    def scores(self, network: nn.Module, lpips: LPIPS | None, accelerator: Any) -> dict[str, float]:
        """Means over pictures and kinds, then kind by kind: "psnr", "psnr_thin", ...

        Of 8-bit merged pictures: ``l1`` in %, ``psnr`` in dB, ``lpips``, and ``sharpness``: the gradient energy of
        grey values in the hole, divided by that of the true picture, as median over pictures; 1 is as sharp.
        """
        names = ["l1", "psnr", "sharpness", *(() if lpips is None else ("lpips",))]
        like = next(network.parameters())
        count = len(self.pictures)
        table = torch.zeros(len(self.masks), count, len(names), dtype=torch.float64)
        masks = list(self.masks.values())
        batches = [(row, first) for row in range(len(masks)) for first in range(0, count, _BATCH)]
        with failing_together(accelerator):
            for number in own_share(accelerator, len(batches)):
                row, first = batches[number]
                some = slice(first, first + _BATCH)
                image, mask = self.pictures.images(some).to(like), masks[row][some].to(like)
                found = _scores(_rounded(network(image, mask).to(like)), _rounded(image), mask, lpips)
                table[row, some] = torch.stack([found[name] for name in names], dim=1).cpu().double()
        rows = sum_of_processes(accelerator, table).numpy()
        result = _summary(names, rows.reshape(-1, len(names)))
        for kind, own in zip(self.masks, rows, strict=True):
            result |= {f"{name}_{kind}": value for name, value in _summary(names, own).items()}
        return result


def _summary(names: Sequence[str], rows: np.ndarray) -> dict[str, float]:
    """Of [pictures, names]: the mean, of sharpness the median (of an even number: the mean of the middle two)."""
    columns = zip(names, rows.T, strict=True)
    return {name: float((np.median if name == "sharpness" else np.mean)(column)) for name, column in columns}


def _eight_bit(picture: Tensor) -> np.ndarray:
    """[1, 3, H, W] in [-1, 1] -> uint8 [H, W, 3], rounded."""
    return _rounded(picture[0].float()).byte().permute(1, 2, 0).cpu().numpy()


def _rounded(picture: Tensor) -> Tensor:
    """8-bit levels, 0 to 255."""
    return ((picture + 1) * 127.5).round().clamp(0, 255)


def _scores(
    filled: Tensor, truth: Tensor, mask: Tensor, lpips: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """Of each picture, [B]."""
    error = filled - truth
    squared = error.square().mean(dim=(1, 2, 3)).clamp(min=LEAST_SQUARED_ERROR)
    values = {
        "l1": 100 / 255 * error.abs().mean(dim=(1, 2, 3)),
        "psnr": 10 * (255**2 / squared).log10(),
        "sharpness": relative_energy(gradient_energy(filled, mask), gradient_energy(truth, mask)),
    }
    if lpips is not None:
        values["lpips"] = lpips(filled / 127.5 - 1, truth / 127.5 - 1)
    return values


def gradient_energy(picture: Tensor, mask: Tensor) -> Tensor:
    """Sum of squared differences of neighbouring grey values that both lie in the hole, [B]; levels 0 to 255."""
    grey = (picture * picture.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    across = grey.diff(dim=3).square() * mask[..., 1:] * mask[..., :-1]
    down = grey.diff(dim=2).square() * mask[:, :, 1:] * mask[:, :, :-1]
    return across.sum(dim=(1, 2, 3)) + down.sum(dim=(1, 2, 3))
