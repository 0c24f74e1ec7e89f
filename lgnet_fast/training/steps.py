"""One optimiser step of the discriminator, then one of the generators (paper, eqs. (1) to (9))."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reference.cascade import Stages
from ..reference.features import LPIPS, FeaturesFn
from ..reference.losses import FeatureOptions, LossWeights, discriminator_loss, generator_loss, hole_share, window

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The objective of a step.

    Args:
        weights, features, lpips, options, lean: see :func:`lgnet_fast.reference.losses.generator_loss`.
        judged_stage: the stage whose merged picture the discriminator judges: 0, the first, in the paper.
        by_hole: weight scores by the hole ratio of their cell, in the losses of generators and discriminator; in the
            paper all scores count equally.
        judged_crop: side of the square around a random hole pixel that it judges; None: the whole picture.
    """

    weights: LossWeights
    features: FeaturesFn | None = None
    lpips: LPIPS | None = None
    options: FeatureOptions | None = None
    lean: bool = True
    judged_stage: int = 0
    by_hole: bool = False
    judged_crop: int | None = None


@dataclass(frozen=True)
class Trained:
    """The networks of a step, plain and wrapped by accelerate for distribution.

    `forward`: (image, mask, return_stages=True) -> Stages; the wrapped network, compiled if configured.
    """

    network: nn.Module
    discriminator: nn.Module
    wrapped: nn.Module
    wrapped_discriminator: nn.Module
    forward: Callable[..., Stages]


class Part(NamedTuple):
    """One batch of a step.

    `share`: its losses' weight in those of the step; `adversarial`, `features`: see :meth:`Step.__call__`.
    """

    image: Tensor
    mask: Tensor
    share: float
    adversarial: bool
    features: bool


class Judged(NamedTuple):
    """A batch, what the generators made of it, and what the discriminator's loss was of that.

    `merged`: what it judged, not detached, and None without it; `share_of_hole`: the weight of its scores.
    """

    part: Part
    stages: Stages
    merged: Tensor | None
    share_of_hole: Tensor | None
    terms: Terms


class Step:
    """One step of both optimisers on one or more batches, whose gradients are averaged.

    The discriminator runs three times for each batch: on the detached merged picture, on the truth, and, after its
    optimiser step, on the merged picture for the generators' loss. The order matters, because each run advances its
    power iteration. With several batches its step follows the last one; for earlier batches the generators' loss uses
    the discriminator before its step.

    Args:
        nets: the networks.
        optimisers: of the generators, of the discriminator.
        objective: the losses.
        accelerator: of accelerate; it does mixed precision, gradient scaling and exchange between processes.
        clip: largest norm of the gradients of the generators, and of the discriminator's; None: no limit.
        on_nonfinite: called with "D" or "G", the terms so far and the number of the batch before gradients are
            computed; if it returns true, the step is skipped.
    """

    def __init__(
        self,
        nets: Trained,
        optimisers: Sequence[torch.optim.Optimizer],
        objective: Objective,
        accelerator: Any,
        clip: float | None = None,
        on_nonfinite: Callable[[str, Terms, int], bool] = lambda total, terms, number: False,
    ) -> None:
        self.nets, self.objective, self.accelerator = nets, objective, accelerator
        self.generator_optimiser, self.discriminator_optimiser = optimisers
        self.clip, self.on_nonfinite = clip, on_nonfinite
        self.parameters = [p for p in nets.network.parameters() if p.requires_grad]

    def __call__(
        self, batches: Sequence[tuple[Tensor, Tensor]], *, adversarial: bool = True, features: bool = True
    ) -> Terms | None:
        """Train on batches of (image [B, 3, H, W] in [-1, 1], mask [B, 1, H, W], 1 = hole).

        Args:
            batches: at least one.
            adversarial: False skips the discriminator; the term ``G_adv`` is then 0.
            features: False skips the terms of feature networks.

        Returns:
            The terms, averaged over the batches, with the names of ``discriminator_loss`` and ``generator_loss``;
            None for a skipped step.
        """
        share = 1 / len(batches)
        sums: Terms = {}
        self._clear_gradients()
        for number, (image, mask) in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                terms = self._train_on(Part(image, mask, share, adversarial, features), number, last)
            if terms is None:
                return None
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + share * term
        self._clip(self.generator_optimiser, self.parameters)
        self.generator_optimiser.step()
        return sums

    def _clear_gradients(self) -> None:
        self.generator_optimiser.zero_grad()
        self.discriminator_optimiser.zero_grad()

    def _train_on(self, part: Part, number: int, last: bool) -> Terms | None:
        """Compute the gradients of one batch and, after the last, the discriminator's step; returns the terms.

        They are detached: else they would keep the batch's autograd graph during the next one, and in it the nodes
        that add up gradients, on the stream of this batch. No CUDA graph can be captured on another stream then.
        """
        judged = self._judge(part)
        if part.adversarial:
            if self.on_nonfinite("D", judged.terms, number):
                return None
            self.accelerator.backward(judged.terms["D"] * part.share)
            self._after_judging(number, last)
        terms = self._generate(judged)
        if self.on_nonfinite("G", terms, number):
            return None
        self.accelerator.backward(terms["G"] * part.share)
        return {name: term.detach() for name, term in terms.items()}

    def _judge(self, part: Part) -> Judged:
        """The generators' forward, and the discriminator's terms if it is `adversarial`."""
        with self.accelerator.autocast():
            stages = self.nets.forward(part.image, part.mask, return_stages=True)
        merged, truth, holes = stages.merged[self.objective.judged_stage], part.image, part.mask
        if not part.adversarial:
            return Judged(part, stages, None, None, {})
        if self.objective.judged_crop is not None:
            merged, truth, holes = window([merged, truth, holes], holes, self.objective.judged_crop)
        with self.accelerator.autocast():
            judge = self.nets.wrapped_discriminator
            fake, real = judge(merged.detach()), judge(truth)
            share_of_hole = hole_share(holes, fake) if self.objective.by_hole else None
            terms = discriminator_loss(fake, real, share_of_hole)
        return Judged(part, stages, merged, share_of_hole, terms)

    def _after_judging(self, number: int, last: bool) -> None:
        """After the discriminator's gradients of a batch: its optimiser step, if the batch is the last."""
        if last:
            self._clip(self.discriminator_optimiser, list(self.nets.discriminator.parameters()))
            self._step_discriminator(earlier=number > 0)

    def _generate(self, judged: Judged) -> Terms:
        """All terms of a batch."""
        objective, part, merged = self.objective, judged.part, judged.merged
        with self.accelerator.autocast(), _frozen(self.nets.discriminator):
            # Scores of 1, the generators' target, give no loss and no gradient.
            scores = part.image.new_ones(1) if merged is None else self.nets.discriminator(merged)
            terms = generator_loss(
                judged.stages,
                part.image,
                part.mask,
                scores,
                objective.features if part.features else None,
                objective.weights,
                lean=objective.lean,
                lpips=objective.lpips if part.features else None,
                options=objective.options,
                score_weight=judged.share_of_hole,
            )
        return judged.terms | terms

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Do not exchange gradients between processes, for all batches but the last."""
        nets, accelerator = self.nets, self.accelerator
        with accelerator.no_sync(nets.wrapped), accelerator.no_sync(nets.wrapped_discriminator):
            yield

    def _step_discriminator(self, earlier: bool) -> None:
        """The discriminator's optimiser step. In fp16 it may change the loss scale: gradients of the generators that
        `earlier` batches have left are brought to the new one, which the last batch's will have."""
        scaler = self.accelerator.scaler if earlier else None
        before = 1.0 if scaler is None else scaler.get_scale()
        self.discriminator_optimiser.step()
        if scaler is not None and (factor := scaler.get_scale() / before) != 1:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)

    def _clip(self, optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """Clip one optimiser's gradients. Accelerate's own clipping would also take the loss scale of fp16 out of the
        other's, to which later batches add gradients that have it."""
        if self.clip is not None:
            self.accelerator.unscale_gradients(optimiser)
            nn.utils.clip_grad_norm_(parameters, self.clip)


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Calls in this context give no gradient to the module's parameters, also in a later backward pass."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
