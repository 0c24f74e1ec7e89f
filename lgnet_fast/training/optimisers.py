"""The optimisers: Adam or Muon of the generators, Adam of the discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError
from .config import OptimConfig

_SMALLEST = 16
"""Rows and columns that a weight, taken as a matrix, needs for Muon."""


def generator_optimiser(network: nn.Module, optim: OptimConfig, fused: bool | None) -> torch.optim.Optimizer:
    """The optimiser of the parameters of `network` that require gradients.

    ``optim.optimizer: muon`` orthogonalises the momentum of every convolution between feature maps (Jordan 2024,
    "Muon: an optimizer for hidden layers in neural networks") and scales it so that its updates are about as large as
    Adam's at the same learning rate (Liu et al. 2025, "Muon is scalable for LLM training", Section 2.2). The other
    parameters, those that read or write a picture among them, are optimised by Adam.

    Args:
        network: its frozen parameters are left out.
        optim: optimizer, learning rate and betas.
        fused: PyTorch's fused Adam; None: its default.

    Raises:
        MissingExtraError: pytorch_optimizer, which has Muon, is not installed.
    """
    return _MAKERS[optim.optimizer]([p for p in network.parameters() if p.requires_grad], optim, fused)


def _adam(trained: list[nn.Parameter], optim: OptimConfig, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.Adam(trained, lr=optim.learning_rate, betas=optim.betas, fused=fused)


def _muon(trained: list[nn.Parameter], optim: OptimConfig, fused: bool | None) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import Muon
    except ImportError as error:
        raise MissingExtraError(
            "optim.optimizer: muon needs pytorch_optimizer: pip install 'lgnet-fast[train]'"
        ) from error
    hidden = [p for p in trained if _is_hidden(p)]
    others = [p for p in trained if not _is_hidden(p)]
    groups: list[dict[str, Any]] = [
        {"params": hidden, "use_muon": True, "use_adjusted_lr": True},
        {"params": others, "use_muon": False, "betas": optim.betas, "eps": 1e-8},
    ]
    made: torch.optim.Optimizer = Muon([{**group, "lr": optim.learning_rate} for group in groups if group["params"]])
    return made


_MAKERS = {"adam": _adam, "muon": _muon}


def discriminator_optimiser(
    discriminator: nn.Module, optim: OptimConfig, fused: bool | None
) -> torch.optim.Optimizer:
    """Adam with the discriminator's learning rate; see :func:`generator_optimiser`."""
    return torch.optim.Adam(discriminator.parameters(), lr=learning_rates(optim)[1], betas=optim.betas, fused=fused)


def learning_rates(optim: OptimConfig) -> tuple[float, float]:
    """Of the generators, of the discriminator, before the schedule's factor."""
    own = optim.discriminator_learning_rate
    return optim.learning_rate, optim.learning_rate if own is None else own


def _is_hidden(parameter: nn.Parameter) -> bool:
    """Whether it is the weight of a convolution from feature maps to feature maps."""
    return parameter.ndim == 4 and min(parameter.shape[:2]) >= _SMALLEST
