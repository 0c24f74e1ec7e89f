"""Fréchet distance of features of two sets of pictures: FID, where they are Inception's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
