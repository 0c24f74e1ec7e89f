"""One optimiser step of the discriminator, then one of the generators (paper, eqs. (1) to (9); docs/model.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.cascade import Stages
from ..reference.features import LPIPS, FeaturesFn
from ..reference.losses import FeatureOptions, LossWeights, discriminator_loss, generator_loss, hole_share


def optimise_step(
    network: Callable[..., Stages],
    discriminator: nn.Module,
    judge: nn.Module,
    optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    batches: list[tuple[Tensor, Tensor]],
    features: FeaturesFn | None,
    weights: LossWeights,
    *,
    lpips: LPIPS | None = None,
    options: FeatureOptions | None = None,
    judged: int = 0,
    by_hole: bool = False,
    adversarial: bool = True,
    lean: bool = True,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    backward: Callable[[Tensor], None] = Tensor.backward,
    waiting: Callable[[], Any] = contextlib.nullcontext,
    clip: Callable[[nn.Module | None], None] = lambda module: None,
    refuse: Callable[[str, dict[str, Tensor], int], bool] = lambda total, terms, number: False,
) -> dict[str, Tensor] | None:
    """Train on one or more batches, whose gradients are averaged.

    The discriminator runs three times for each batch. The order matters, because each run advances its power
    iteration: on the detached merged picture, on the truth, and, after its optimiser step, on the merged picture for
    the generators' loss. With several batches its step comes with the last one; for earlier batches the generators'
    loss uses the discriminator before its step.

    Args:
        network: (image, mask, return_stages=True) -> Stages; may be wrapped for distribution.
        discriminator: as wrapped for distribution. `judge`: the module inside, for the generators' loss, which must
            leave no gradients in it.
        optimisers: of the generators, of the discriminator.
        batches: (image [B, 3, H, W] in [-1, 1], mask [B, 1, H, W], 1 = hole) each.
        features, weights, lean, lpips, options: see ``generator_loss``.
        judged: the stage whose merged picture the discriminator judges: 0, the first, in the paper.
        by_hole: scores count by the share of their cell that is hole, in the generators' loss and in the
            discriminator's; in the paper all count.
        adversarial: false leaves the discriminator out; the term ``G_adv`` is then 0.
        autocast, backward, waiting: precision, gradient scaling, and what leaves out the exchange of gradients (for
            all but the last batch).
        clip: called with the discriminator, and with None for the generators, before their steps.
        refuse: called with "D" or "G", the terms so far and the number of the batch before gradients are taken; true
            gives the step up.

    Returns:
        The terms, averaged over the batches, by the names of ``discriminator_loss`` and ``generator_loss``; None for
        a step given up.
    """
    ours, its = optimisers
    share = 1 / len(batches)
    sums: dict[str, Tensor] = {}
    ours.zero_grad()
    its.zero_grad()
    for number, (image, mask) in enumerate(batches):
        last = number == len(batches) - 1
        terms: dict[str, Tensor] = {}
        with contextlib.nullcontext() if last else waiting():
            with autocast():
                stages = network(image, mask, return_stages=True)
            merged = stages.merged[judged]
            share_of_hole: Tensor | None = None
            if adversarial:
                with autocast():
                    fake, real = discriminator(merged.detach()), discriminator(image)
                    share_of_hole = hole_share(mask, fake) if by_hole else None
                    terms |= discriminator_loss(fake, real, share_of_hole)
                if refuse("D", terms, number):
                    return None
                backward(terms["D"] * share)
                if last:
                    clip(judge)
                    its.step()
            with autocast(), _frozen(judge):
                # Scores of 1, the generators' target, give no loss and no gradient.
                scores = judge(merged) if adversarial else merged.new_ones(1)
                terms |= generator_loss(
                    stages,
                    image,
                    mask,
                    scores,
                    features,
                    weights,
                    lean=lean,
                    lpips=lpips,
                    options=options,
                    score_weight=share_of_hole,
                )
            if refuse("G", terms, number):
                return None
            backward(terms["G"] * share)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + share * term.detach()
    clip(None)
    ours.step()
    return sums


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Any:
    """Calls inside this context leave no gradient in the module's parameters, also in a later backward pass."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
