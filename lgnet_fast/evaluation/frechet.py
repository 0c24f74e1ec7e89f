"""Fréchet distance of features of two sets of pictures: FID of Inception's, and of VGG-16's for use without it.

Values of the two networks cannot be compared.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..reference.features import ConvFeatures


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions with the means and covariances of two sets of vectors.

    ``|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``. With fewer vectors than dimensions it is biased
    upwards, so only sets of equal size can be compared. NaN where a vector is not finite.

    Args:
        a, b: [N, D] and [M, D], N and M at least 2.
    """
    for name, rows in (("a", a), ("b", b)):
        if rows.dim() != 2 or len(rows) < 2 or rows.shape[1] != a.shape[1]:
            expected = "[N, D] with N of at least 2" if name == "a" else f"[M, {a.shape[1]}] with M of at least 2"
            raise ValueError(f"{name}: expected {expected}, got {list(rows.shape)}")
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan  # the decomposition below would raise
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    # S = R^T R for the centred rows R: the trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b^T,
    # which is exact where the covariances are singular. The factor of the QR decomposition has at most D rows.
    rows_a, rows_b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    root_a, root_b = (torch.linalg.qr(rows, mode="r").R for rows in (rows_a, rows_b))
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    squared = (mean_a - mean_b).square().sum() + rows_a.square().sum() + rows_b.square().sum() - 2 * overlap
    return max(0.0, float(squared))


class VGGFrechet:
    """Fréchet distance between true and filled pictures, on means over positions of one level of VGG-16. It is no
    FID, whose features are Inception's.

    Args:
        file: VGG-16's weights, in one of the layouts that LPIPS and the style and perceptual losses read.
        level: of the features, counted from 0, relu1_2; -1: the last that the file has (relu5_3 of a whole one).
        device: where VGG-16 runs.

    Raises:
        WeightsError: the file cannot be read. ValueError: it is not VGG-16's, or has no such level.
    """

    def __init__(self, file: str | Path, level: int = -1, device: torch.device | str = "cpu") -> None:
        self.network = ConvFeatures.from_file(file).to(device).eval()
        if self.network.network != "vgg16":
            raise ValueError(f"file: expected the weights of vgg16, got those of {self.network.network}")
        levels = self.network.levels
        if not -levels <= level < levels:
            raise ValueError(f"level: expected one of {levels} levels, got {level}")
        self.level, self.device = level, torch.device(device)
        self._rows: dict[bool, list[Tensor]] = {True: [], False: []}

    @torch.inference_mode()
    def features(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, D], float32, on the CPU."""
        levels: list[Tensor] = self.network(pictures.to(self.device, torch.float32))
        return levels[self.level].mean(dim=(2, 3)).cpu()

    def update(self, pictures: Tensor, real: bool) -> None:
        """Add pictures [B, 3, H, W] in [-1, 1], true or filled ones."""
        self._rows[real].append(self.features(pictures))

    def compute(self) -> float:
        """The distance of the pictures added so far. Raises ValueError: fewer than two of either kind."""
        counts = {real: sum(map(len, rows)) for real, rows in self._rows.items()}
        if min(counts.values()) < 2:
            raise ValueError(
                f"pictures: expected two or more of each, got {counts[True]} true, {counts[False]} filled"
            )
        return frechet_distance(torch.cat(self._rows[True]), torch.cat(self._rows[False]))
