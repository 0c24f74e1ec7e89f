"""Scores of held-out pictures with the evaluation suite's kinds of holes, in batches on the device of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.masks import suite_mask
from ..reference.features import LPIPS
from .data import validation_pictures

_MASKS = 7  # a stream of random numbers, see data.py
_BATCH = 16
_GREY = (0.299, 0.587, 0.114)


class KindValidation:
    """Held-out pictures, each under one hole of every kind.

    Args:
        place, size, protocol, pictures: see :func:`.data.validation_pictures`; `pictures` is its limit.
        kinds: of :data:`.masks.SUITE_KINDS`.
        seed: of the masks.

    Raises:
        DataError: no such place, or no picture in it that can be read.
    """

    def __init__(
        self, place: str, size: int, kinds: Sequence[str], seed: int, protocol: str, pictures: int | None
    ) -> None:
        found = validation_pictures(place, size, protocol, pictures)
        self.images = torch.cat([image for _, image in found])
        self.masks = {
            kind: torch.stack(
                [torch.from_numpy(suite_mask(size, size, kind=kind, seed=(_MASKS, seed, i)))[None] for i, _ in found]
            ).float()
            for kind in kinds
        }

    @torch.no_grad()
    def scores(
        self, network: Callable[[Tensor, Tensor], Tensor], lpips: LPIPS | None, like: Tensor
    ) -> dict[str, float]:
        """Means over pictures and kinds, then kind by kind: "psnr", "psnr_thin", ...

        The network gets pictures of the dtype and on the device of `like`.

        Of 8-bit merged pictures: ``l1`` in %, ``psnr`` in dB, ``lpips``, and ``sharpness``: the gradient energy of
        grey values in the hole, divided by that of the true picture, as median over pictures; 1 is as sharp.
        """
        result: dict[str, float] = {}
        for kind, masks in self.masks.items():
            rows: list[dict[str, Tensor]] = []
            for image, mask in zip(self.images.split(_BATCH), masks.split(_BATCH), strict=True):
                image, mask = image.to(like), mask.to(like)
                filled = network(image, mask).to(like)
                rows.append(_scores(_rounded(filled), _rounded(image), mask, lpips))
            for name in rows[0]:
                values = torch.cat([row[name] for row in rows])
                result[f"{name}_{kind}"] = float(values.median() if name == "sharpness" else values.mean())
        names = dict.fromkeys(name.rpartition("_")[0] for name in result)
        return {n: sum(result[f"{n}_{k}"] for k in self.masks) / len(self.masks) for n in names} | result


def _rounded(picture: Tensor) -> Tensor:
    """8-bit levels, 0 to 255."""
    return ((picture + 1) * 127.5).round().clamp(0, 255)


def _scores(filled: Tensor, truth: Tensor, mask: Tensor, lpips: LPIPS | None) -> dict[str, Tensor]:
    """Of each picture, [B]."""
    error = (filled - truth) / 255
    values = {
        "l1": 100 * error.abs().mean(dim=(1, 2, 3)),
        "psnr": -10 * error.square().mean(dim=(1, 2, 3)).clamp(min=1e-8).log10(),
        "sharpness": gradient_energy(filled, mask) / gradient_energy(truth, mask).clamp(min=1e-9),
    }
    if lpips is not None:
        values["lpips"] = lpips(filled / 127.5 - 1, truth / 127.5 - 1)
    return values


def gradient_energy(picture: Tensor, mask: Tensor) -> Tensor:
    """Sum of squared differences of neighbouring grey values that both lie in the hole, [B]; levels 0 to 255."""
    grey = (picture * picture.new_tensor(_GREY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    across = grey.diff(dim=3).square() * mask[..., 1:] * mask[..., :-1]
    down = grey.diff(dim=2).square() * mask[:, :, 1:] * mask[:, :, :-1]
    return across.sum(dim=(1, 2, 3)) + down.sum(dim=(1, 2, 3))
