"""The training losses: the terms of the paper's eqs. (1)-(9) with the released network's normalisation.

================  ============================================  ======  =======================
term              formula                                       weight  on
================  ============================================  ======  =======================
valid             :func:`masked_l1` with 1 - mask               1       every stage, raw
hole              :func:`masked_l1` with mask                   6       every stage, raw
adversarial       mean((D(merged) - 1)^2), least squares        0.1     first stage, merged
total variation   :func:`total_variation` of merged * mask      0.1     later stages
perceptual        :func:`perceptual_distance` to the image      0.05    later stages, raw and merged
style             :func:`style_distance` to the image           120     later stages, raw and merged
edge              :func:`edge_l1` in the mask                   0       every stage, raw; not the paper's
================  ============================================  ======  =======================

16-bit pictures, features and scores are brought to float32 before anything is summed, so that the terms can be
taken under autocast. Nothing divides by zero: masks may be all 0 or all 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cascade import Stages

FeaturesFn = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms in the generators' total; the defaults are the paper's (valid has weight 1)."""

    hole: float = 6.0
    adversarial: float = 0.1
    total_variation: float = 0.1
    perceptual: float = 0.05
    style: float = 120.0
    edge: float = 0.0
    """Not the paper's: for training without a feature network, which else has nothing that asks for sharpness."""


def _wide(x: Tensor) -> Tensor:
    """Float32 at least: sums over a picture overflow in 16 bit."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same_shape(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{second}: expected {list(a.shape)} as {first}, got {list(b.shape)}")


# -- terms -------------------------------------------------------------------------------------------------------


def masked_l1(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute error where `weight` is 1: the valid and the hole term.

    Per sample ``sum|(output - target) * weight| / (C * sum(weight) + 1e-12)``, then the mean over the batch.

    Args:
        output, target: [B, C, H, W].
        weight: [B, 1, H, W] in [0, 1]; the mask for the hole's error, 1 - mask for the valid pixels'.

    Returns:
        0-dimensional, float32 at least; 0 for a sample whose weight is all 0.
    """
    _same_shape("output", output, "target", target)
    expected = [output.shape[0], 1, *output.shape[2:]]
    if list(weight.shape) != expected:
        raise ValueError(f"weight: expected {expected} to fit output, got {list(weight.shape)}")
    output, target, weight = _wide(output), _wide(target), _wide(weight)
    error = ((output - target) * weight).abs().sum(dim=(1, 2, 3))
    return (error / (output.shape[1] * weight.sum(dim=(1, 2, 3)) + 1e-12)).mean()


def edge_l1(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """:func:`masked_l1` of the differences of neighbours, down and across, where both are weighted; their sum.

    Args:
        output, target, weight: as there.
    """
    down, across = (weight[:, :, 1:] * weight[:, :, :-1], weight[..., 1:] * weight[..., :-1])
    return masked_l1(output.diff(dim=2), target.diff(dim=2), down) + masked_l1(
        output.diff(dim=3), target.diff(dim=3), across
    )


def total_variation(picture: Tensor) -> Tensor:
    """``mean|dy| + mean|dx|``, differences of neighbours down and across.

    Args:
        picture: [B, C, H, W]; H and W of at least 2. The released network takes it of ``merged * mask``.

    Returns:
        0-dimensional, float32 at least.
    """
    if picture.dim() != 4 or min(picture.shape[2:]) < 2:
        raise ValueError(f"picture: expected [B, C, H, W] with H, W of at least 2, got {list(picture.shape)}")
    picture = _wide(picture)
    return picture.diff(dim=2).abs().mean() + picture.diff(dim=3).abs().mean()


def gram_matrix(features: Tensor) -> Tensor:
    """``A A^T`` of features [B, C, H, W] seen as A [B, C, H*W]: [B, C, C].

    Float32 at least, under autocast too: in float16 the sum over positions overflows.
    """
    if features.dim() != 4:
        raise ValueError(f"features: expected [B, C, H, W], got {list(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        rows = _wide(features).flatten(2)
        return rows @ rows.transpose(1, 2)


def _check_levels(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} levels as a, got {len(b)}")
    for level, (x, y) in enumerate(zip(a, b, strict=True)):
        _same_shape(f"a[{level}]", x, f"b[{level}]", y)


def perceptual_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum over levels of ``mean|A - B|``.

    Args:
        a, b: the features of two batches, level by level, [B, C, H, W] each; see :class:`.vgg.VGG16Features`.

    Returns:
        0-dimensional, float32 at least.
    """
    _check_levels(a, b)
    return torch.stack([(_wide(x) - _wide(y)).abs().mean() for x, y in zip(a, b, strict=True)]).sum()


def style_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum over levels of ``mean|Gram(A) - Gram(B)| / (C * H * W)``.

    Args:
        a, b: as in :func:`perceptual_distance`.

    Returns:
        0-dimensional, float32 at least.
    """
    _check_levels(a, b)
    levels = [
        (gram_matrix(x) - gram_matrix(y)).abs().mean() / math.prod(x.shape[1:]) for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(levels).sum()


def adversarial_loss(scores: Tensor, real: bool) -> Tensor:
    """Least squares GAN: ``mean((scores - 1)^2)`` if `real`, else ``mean(scores^2)``.

    Args:
        scores: any shape, the discriminator's score map.
        real: what the scores are pulled to: 1 or 0.

    Returns:
        0-dimensional, float32 at least.
    """
    return (_wide(scores) - float(real)).square().mean()


# -- totals ------------------------------------------------------------------------------------------------------


def discriminator_loss(fake_scores: Tensor, real_scores: Tensor) -> dict[str, Tensor]:
    """The discriminator's loss.

    Args:
        fake_scores: the scores of the first stage's merged picture, ``discriminator(stages.merged[0].detach())``.
        real_scores: the scores of the ground truth. In training mode the order counts (power iteration): fake
            first.

    Returns:
        0-dimensional terms ``D_fake`` and ``D_real``, and the total ``D`` = half their sum.
    """
    fake, real = adversarial_loss(fake_scores, False), adversarial_loss(real_scores, True)
    return {"D_fake": fake, "D_real": real, "D": 0.5 * (fake + real)}


class _GradientAhead(torch.autograd.Function):
    """``fn(x)``, with its gradient computed at once, so that nothing inside `fn` waits for the backward pass.

    fn: x -> (0-dimensional loss, further tensors, which come back without a gradient).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fn: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            total, *rest = fn(inner)
            (gradient,) = torch.autograd.grad(total, inner)
        ctx.save_for_backward(gradient)
        rest = [value.detach() for value in rest]
        ctx.mark_non_differentiable(*rest)
        return total.detach(), *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:
        (ahead,) = ctx.saved_tensors
        return (ahead * gradient).to(ahead.dtype), None


def generator_loss(
    stages: Stages,
    image: Tensor,
    mask: Tensor,
    scores: Tensor,
    features: FeaturesFn | None,
    weights: LossWeights | None = None,
    lean: bool = False,
) -> dict[str, Tensor]:
    """The generators' loss, one total for all stages.

    Args:
        stages: ``model(image, mask, return_stages=True)``. Ablations have fewer stages, and fewer terms.
        image: ground truth [B, 3, H, W] in [-1, 1].
        mask: [B, 1, H, W], 1 = hole.
        scores: ``discriminator(stages.merged[0])``, not detached, after the discriminator's own step.
        features: picture -> features level by level, :class:`.vgg.VGG16Features`. Called for stages after the first;
            None: there are no style and perceptual terms.
        weights: of the terms; None: the paper's.
        lean: differentiate the style and perceptual terms of each stage at once, which frees the feature network's
            maps before the next stage needs its own: less memory, the same arithmetic. Only ``G`` may then be
            differentiated, once. In float16 these gradients are not loss-scaled: use it with float32 or bfloat16.

    Returns:
        0-dimensional, unweighted terms ``valid<i>``, ``hole<i>`` (and ``edge<i>`` where it has a weight) for stage
        i = 1, 2, ... in the order of ``stages.raw``; ``tv<i>``, ``style<i>``, ``perceptual<i>`` for i >= 2;
        ``G_adv``; and the weighted total ``G``, to be differentiated.
    """
    weights = LossWeights() if weights is None else weights
    terms: dict[str, Tensor] = {}
    feature_totals: list[Tensor] = []
    real: Sequence[Tensor] = ()
    for i, (raw, merged) in enumerate(zip(stages.raw, stages.merged, strict=True), start=1):
        _same_shape(f"stages.raw[{i - 1}]", raw, "image", image)
        terms[f"valid{i}"] = masked_l1(raw, image, 1 - mask)
        terms[f"hole{i}"] = masked_l1(raw, image, mask)
        if weights.edge:
            terms[f"edge{i}"] = edge_l1(raw, image, mask)
        if i == 1:
            continue
        terms[f"tv{i}"] = total_variation(merged * mask)
        if features is None:
            continue
        if not real:
            with torch.no_grad():
                real = features(image)

        def feature_terms(
            pictures: Tensor, features: FeaturesFn = features, real: Sequence[Tensor] = real
        ) -> tuple[Tensor, Tensor, Tensor]:
            # One pass for both pictures.
            levels = [level.chunk(2) for level in features(pictures)]
            ours, blended = [a for a, _ in levels], [b for _, b in levels]
            style = style_distance(real, ours) + style_distance(real, blended)
            perceptual = perceptual_distance(real, ours) + perceptual_distance(real, blended)
            return weights.style * style + weights.perceptual * perceptual, style, perceptual

        pictures = torch.cat((raw, merged))
        ahead = lean and pictures.requires_grad
        total, style, perceptual = _GradientAhead.apply(pictures, feature_terms) if ahead else feature_terms(pictures)
        feature_totals.append(total)
        terms[f"style{i}"], terms[f"perceptual{i}"] = style, perceptual
    terms["G_adv"] = adversarial_loss(scores, True)
    factors = {
        "valid": 1.0,
        "hole": weights.hole,
        "edge": weights.edge,
        "tv": weights.total_variation,
        "G_adv": weights.adversarial,
    }
    named = [(factors.get(name.rstrip("0123456789")), term) for name, term in terms.items()]
    plain = [factor * term for factor, term in named if factor is not None]
    terms["G"] = torch.stack(plain + feature_totals).sum()
    return terms
