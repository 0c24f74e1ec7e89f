"""The suite: four kinds of holes for any pictures, and metrics that distinguish sharp fills from blurred ones.

All metrics are of 8-bit pictures with true known pixels; see :class:`SuiteMetrics` for the formulas.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import folders
from ..data.masks import SUITE_KINDS, suite_mask
from ..data.metrics import (
    LEAST_SQUARED_ERROR,
    LPIPS_VARIABLE,
    LUMA,
    Distance,
    lpips_legend,
    one_line,
    relative_energy,
)
from ..errors import MissingExtraError, UsageError, WeightsError
from ..jobs.folders import MasksByName
from ..jobs.journal import stamp
from ..pipeline.formats import EXTENSIONS
from ..reference.features import LPIPS
from .protocol import PictureFile, mask_of, name_of

SUITE_METRICS = ("l1", "psnr", "ssim", "lpips", "sharp")

_HOLES = {
    "thin": "strokes of 3 to 9 pixels over 10-20 %",
    "thick": "strokes of 17 to 31 pixels over 20-30 %",
    "box": "64x64",
    "blob": "one shape of 15 %",
}


def parse_kinds(kinds: str | Sequence[int | str] | None) -> tuple[str, ...]:
    """Names in SUITE_KINDS, given as a sequence or with commas; None: all. Raises UsageError: another, or none."""
    if kinds is None:
        return SUITE_KINDS
    chosen = [part.strip() for part in (kinds.split(",") if isinstance(kinds, str) else map(str, kinds))]
    if not chosen:
        raise UsageError(f"classes: with `suite` expected names of {', '.join(SUITE_KINDS)}, got none")
    for part in chosen:
        if part not in SUITE_KINDS:
            raise UsageError(f"classes: with `suite` expected names of {', '.join(SUITE_KINDS)}, got {part!r}")
    return tuple(kind for kind in SUITE_KINDS if kind in chosen)


class SuiteMasks:
    """One mask of each kind for each picture: drawn from (seed, index, kind), or a folder's ``<picture>_<kind>.png``.

    Classes are indices in :data:`SUITE_KINDS`.

    Raises UsageError: no masks, or a picture without the mask of a kind, or with several.
    """

    def __init__(
        self,
        pictures: Sequence[PictureFile],
        base: Path,
        folder: Path | None,
        kinds: Sequence[str] = SUITE_KINDS,
        *,
        size: int = 256,
        seed: int = 0,
        invert: bool = False,
    ) -> None:
        self.classes = tuple(SUITE_KINDS.index(kind) for kind in kinds)
        self.pictures, self.size, self.seed = pictures, size, seed
        self.polarity = "black" if invert else "white"
        self.files: dict[tuple[int, int], Path] = {}
        if folder is None:
            return
        found = folders.pictures_in(folder, []) if folder.is_dir() else []
        if not found:
            raise UsageError(f"masks: no pictures in {str(folder)!r} ({', '.join(EXTENSIONS)})")
        by_name = MasksByName(folder, found)
        for index, picture in enumerate(pictures):
            for one in self.classes:
                relative = name_of(picture, base).with_suffix("")
                name = relative.with_name(f"{relative.name}_{SUITE_KINDS[one]}")
                mask, problem = by_name.of_picture(name, suffix=False)
                if mask is None:
                    raise UsageError(f"masks: {problem} (for the picture {str(picture)!r})")
                self.files[index, one] = mask

    @property
    def legend(self) -> str:
        """Descriptions of the kinds; empty for masks of a folder."""
        if self.files:
            return ""
        kinds = (f"{SUITE_KINDS[one]}, {_HOLES[SUITE_KINDS[one]]}" for one in self.classes)
        return f"Holes at 256x256: {'; '.join(kinds)}."

    def mask(self, index: int, hole_class: int, height: int, width: int) -> np.ndarray:
        """The mask of picture `index`: bool [height, width].

        Raises InvalidMaskError: a file that cannot be read, or see :func:`lgnet_fast.evaluation.protocol.mask_of`.
        """
        if not self.files:
            seed = (self.seed, index, hole_class)
            return suite_mask(height, width, kind=SUITE_KINDS[hole_class], seed=seed)
        return mask_of(self.files[index, hole_class], self.polarity, self.pictures[index], self.size)

    def identity(self, index: int, hole_class: int) -> object:
        """The seed values of the mask, or its file."""
        if not self.files:
            return ["suite", self.seed, index, hole_class]
        file = self.files[index, hole_class]
        return [str(file), stamp(file)]


class SuiteMetrics:
    """Metrics of filled pictures against the true one.

    ======  ==========================================================================================================
    l1      100 * mean|a - b| / 255, percent
    psnr    10 log10(255^2 / mean (a - b)^2), dB; the mean is taken as at least 0.001 (78 dB)
    ssim    scikit-image's structural_similarity: uniform windows 7x7 inside the picture, sample covariances, mean of
            RGB
    lpips   LPIPS v0.1, on the network of the weights given: AlexNet or VGG-16
    sharp   energy of the fill in the hole / that of the truth, where energy is the sum of squared differences of
            neighbours, horizontal and vertical, that both lie in the hole, of the luma .299 R + .587 G + .114 B; 1
            where both are 0
    ======  ==========================================================================================================

    Args:
        wanted: names in :data:`SUITE_METRICS`.
        lpips: file of LPIPS weights as :meth:`lgnet_fast.reference.features.LPIPS.from_file` takes it, or any
            callable on two [1, 3, H, W] in [-1, 1] that gives one number; None: the file that the environment
            variable :data:`LPIPS_VARIABLE` names.
        device: where LPIPS runs.

    ``available``: the names, in order. ``missing``: name -> one line why not.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """

    def __init__(
        self,
        wanted: Collection[str] = SUITE_METRICS,
        lpips: str | Path | Distance | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        try:
            from skimage.metrics import structural_similarity
        except ImportError as cause:
            raise MissingExtraError(
                f"suite: scikit-image cannot be imported ({cause}); pip install 'lgnet-fast[eval]'"
            ) from cause
        self._ssim: Callable[..., Any] = structural_similarity
        self.device = torch.device(device)
        self.missing: dict[str, str] = {}
        self._lpips: Distance | None = None
        if "lpips" in wanted:
            source = lpips if lpips is not None else os.environ.get(LPIPS_VARIABLE) or None
            if source is None:
                self.missing["lpips"] = f"no weights; give their file as lpips (--lpips) or by {LPIPS_VARIABLE}"
            else:
                try:
                    network = LPIPS.from_file(source) if isinstance(source, (str, Path)) else source
                    self._lpips = network.to(self.device).eval() if isinstance(network, nn.Module) else network
                except WeightsError as cause:
                    self.missing["lpips"] = one_line(cause)
        self.available = tuple(name for name in SUITE_METRICS if name in wanted and name not in self.missing)

    @property
    def legend(self) -> str:
        """Descriptions of the columns."""
        sharpness = "Sharpness: gradient energy in the hole, 1 = as sharp as the truth, median."
        return " ".join(filter(None, (sharpness if "sharp" in self.available else "", lpips_legend(self._lpips))))

    def scores(
        self, filled: Mapping[str, np.ndarray], truth: np.ndarray, hole: np.ndarray
    ) -> dict[str, dict[str, float]]:
        """Each available metric of each filled picture, uint8 [H, W, 3], by its title; see :func:`summary`.

        Also ``hole_l1`` and ``hole_psnr`` of the hole alone; ``energy`` and ``true_energy`` in it.

        Args:
            filled: sides of at least 16; of 31 for LPIPS on AlexNet.
            truth: uint8 [H, W, 3].
            hole: bool [H, W], with a hole.
        """
        true_energy = gradient_energy(truth, hole)
        result = {}
        for title, picture in filled.items():
            difference = picture.astype(np.float64) - truth
            energy = gradient_energy(picture, hole)
            values = {
                "l1": float(np.abs(difference).mean()) * 100 / 255,
                "psnr": _psnr(difference),
                "hole_l1": float(np.abs(difference[hole]).mean()) * 100 / 255,
                "hole_psnr": _psnr(difference[hole]),
                "energy": energy,
                "true_energy": true_energy,
                "sharp": relative_energy(energy, true_energy),
            }
            if "ssim" in self.available:
                values["ssim"] = float(self._ssim(picture, truth, channel_axis=2))
            result[title] = values
        if self._lpips is not None:
            distances = self._distances(self._lpips, truth, list(filled.values()))
            for values, distance in zip(result.values(), distances):
                values["lpips"] = distance
        return result

    @torch.inference_mode()
    def _distances(self, network: Distance, truth: np.ndarray, filled: Sequence[np.ndarray]) -> list[float]:
        stacked = torch.from_numpy(np.stack([truth, *filled]).transpose(0, 3, 1, 2).astype(np.float32))
        stacked = (stacked / 127.5 - 1).to(self.device)
        if not isinstance(network, LPIPS):
            return [float(network(stacked[i : i + 1], stacked[:1])) for i in range(1, len(stacked))]
        levels = network.directions(stacked)  # of the truth, computed once
        return network.distance([x[1:] for x in levels], [x[:1] for x in levels]).tolist()


def gradient_energy(picture: np.ndarray, hole: np.ndarray) -> float:
    """Sum of squared luma differences of neighbours that both lie in the hole; uint8 [H, W, 3], bool [H, W]."""
    luma = picture.astype(np.float64) @ LUMA
    across = np.diff(luma, axis=1)[hole[:, 1:] & hole[:, :-1]]
    down = np.diff(luma, axis=0)[hole[1:] & hole[:-1]]
    return float((across**2).sum() + (down**2).sum())


def summary(scores: Sequence[Mapping[str, float]], names: Collection[str]) -> dict[str, float]:
    """Summary over pictures: means of the metrics `names`, the median of "sharp", means of "hole_l1" and "hole_psnr",
    and "sharp_all", the ratio of the summed energies."""

    def column(name: str) -> list[float]:
        return [one[name] for one in scores]

    values = {name: float(np.mean(column(name))) for name in (*names, "hole_l1", "hole_psnr")}
    if "sharp" in values:
        values["sharp"] = float(np.median(column("sharp")))
    values["sharp_all"] = relative_energy(sum(column("energy")), sum(column("true_energy")))
    return values


def _psnr(difference: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(float((difference**2).mean()), LEAST_SQUARED_ERROR)))
