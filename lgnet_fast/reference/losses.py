"""The training losses: the terms of the paper's eqs. (1)-(9) with the released network's normalisation.

================  ============================================  ======  =======================
term              formula                                       weight  on
================  ============================================  ======  =======================
valid             :func:`masked_l1` with 1 - mask               1       every stage, raw
hole              :func:`masked_l1` with mask, in the last      6       every stage, raw
                  stage times :func:`rim_discount` where set
adversarial       mean((D(merged) - 1)^2), least squares        0.1     first stage, merged
total variation   :func:`total_variation` of merged * mask      0.1     later stages
perceptual        :func:`perceptual_distance` to the image      0.05    later stages, raw and merged
style             :func:`style_distance` to the image           120     later stages, raw and merged
edge              :func:`edge_l1` in the mask                   0       every stage, raw; not the paper's
LPIPS             :class:`.features.LPIPS` to the image         0       later stages, merged; not the paper's
================  ============================================  ======  =======================

16-bit pictures, features and scores are brought to float32 before anything is summed, so that the terms can be
taken under autocast. Nothing divides by zero: masks may be all 0 or all 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .cascade import Stages
from .features import LPIPS, FeaturesFn


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms in the generators' total; the defaults are the paper's (valid has weight 1)."""

    hole: float = 6.0
    adversarial: float = 0.1
    total_variation: float = 0.1
    perceptual: float = 0.05
    style: float = 120.0
    edge: float = 0.0
    """Not in the paper. For training without a feature network, where no other term rewards sharpness."""
    lpips: float = 0.0
    """Not the paper's."""
    hole_discount: float = 1.0
    """Factor of the last stage's hole term for each pixel of distance from the rim, see :func:`rim_discount`; 1, as
    in the paper: none. Deep in a hole many fills are plausible, and l1 favours their median, which is blurred."""


@dataclass(frozen=True)
class FeatureOptions:
    """Inputs of the style, perceptual and LPIPS terms; the defaults are the paper's, the others cost less."""

    stages: Literal["later", "last"] = "later"
    """Every stage after the first, or the last alone."""
    pictures: Literal["both", "merged"] = "both"
    """Raw and merged pictures, or merged ones alone (LPIPS always)."""
    crop: int | None = None
    """Side of the square for these terms, around a random hole pixel; None: the whole picture."""
    factor: float = 1.0
    """Factor of these terms in the total: k where they are computed in every k-th step only."""


def _wide(x: Tensor) -> Tensor:
    """At least float32: sums over a picture overflow in 16 bit."""
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


_DEEPEST = 32
"""Where :func:`rim_discount` ends."""


def rim_discount(mask: Tensor, factor: float) -> Tensor:
    """``factor ** d``, d = number of hole pixels between a pixel and the nearest known one: the spatially discounted
    reconstruction loss of Yu et al. 2018 ("Generative Image Inpainting with Contextual Attention"), there with 0.99.

    Args:
        mask: [B, 1, H, W], 1 = hole.
        factor: in (0, 1].

    Returns:
        [B, 1, H, W]: 1 on known pixels and beside them, factor in the next ring of hole pixels, and so on. A diagonal
        step counts as one; from 32 on, d stays 32. What lies beyond the picture counts as hole.
    """
    if not 0 < factor <= 1:
        raise ValueError(f"factor: expected a number in (0, 1], got {factor!r}")
    discount, known = torch.ones_like(mask), 1 - mask
    for _ in range(_DEEPEST if factor < 1 else 0):
        known = F.max_pool2d(known, 3, stride=1, padding=1)
        discount = torch.where(known > 0, discount, discount * factor)
    return discount


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


def adversarial_loss(scores: Tensor, real: bool, weight: Tensor | None = None) -> Tensor:
    """Least squares GAN: ``mean((scores - 1)^2)`` if `real`, else ``mean(scores^2)``.

    Args:
        scores: any shape, the discriminator's score map.
        real: whether the target of the scores is 1 (true) or 0.
        weight: of each score, not negative, of the same shape; the mean is then weighted. None: all the same.

    Returns:
        0-dimensional, float32 at least.
    """
    errors = (_wide(scores) - float(real)).square()
    if weight is None:
        return errors.mean()
    _same_shape("scores", scores, "weight", weight)
    return (errors * weight).sum() / (weight.sum() + 1e-12)


def hole_share(mask: Tensor, scores: Tensor) -> Tensor:
    """Hole ratio of each cell of a score map, [B, 1, h, w] in [0, 1].

    The network fills the hole only; the other cells of a merged picture are true pixels.
    """
    return F.adaptive_avg_pool2d(_wide(mask), (scores.shape[2], scores.shape[3]))


def window(pictures: Sequence[Tensor], mask: Tensor, side: int) -> list[Tensor]:
    """The same square of each of several batches, around a hole pixel of each sample, drawn by torch's generator.

    Args:
        pictures: [B, C, H, W] each.
        mask: [B, 1, H, W], 1 = hole; of a sample without a hole any pixel may be drawn.
        side: of the square, at most H and W, within which it is kept.
    """
    batch, _, height, width = mask.shape
    if not 0 < side <= min(height, width):
        raise ValueError(f"side: expected 1 to {min(height, width)}, got {side}")
    drawn = torch.multinomial(_wide(mask).flatten(1) + 1e-9, 1)
    reach = torch.arange(side, device=mask.device)
    rows = (drawn // width - side // 2).clamp(0, height - side) + reach
    columns = (drawn % width - side // 2).clamp(0, width - side) + reach
    sample = torch.arange(batch, device=mask.device)[:, None, None]
    places = (sample, rows[:, :, None], columns[:, None, :])
    return [picture.permute(0, 2, 3, 1)[places].permute(0, 3, 1, 2) for picture in pictures]


# -- totals ------------------------------------------------------------------------------------------------------


def discriminator_loss(fake_scores: Tensor, real_scores: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """The discriminator's loss.

    Args:
        fake_scores: the scores of the first stage's merged picture, ``discriminator(stages.merged[0].detach())``.
        real_scores: the scores of the ground truth. In training mode the order counts (power iteration): fake
            first.
        weight: of the scores, see :func:`adversarial_loss`, e.g. :func:`hole_share`; None: the paper's.

    Returns:
        0-dimensional terms ``D_fake`` and ``D_real``, and the total ``D`` = half their sum.
    """
    fake, real = adversarial_loss(fake_scores, False, weight), adversarial_loss(real_scores, True, weight)
    return {"D_fake": fake, "D_real": real, "D": 0.5 * (fake + real)}


class _GradientAhead(torch.autograd.Function):
    """``fn(x)`` with its gradient computed in the forward pass, so that no activation of `fn` is kept until the
    backward.

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
    *,
    lpips: LPIPS | None = None,
    options: FeatureOptions | None = None,
    score_weight: Tensor | None = None,
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
        lean: differentiate the style, perceptual and LPIPS terms of each stage at once, which frees the maps of the
            feature network before the next stage: less memory, the same arithmetic. Only ``G`` may then
            be differentiated, once. In float16 these gradients are not loss-scaled: use it with float32 or bfloat16.
        lpips: the network of the LPIPS term; None: there is none.
        options: inputs of these terms; None: the paper's.
        score_weight: see :func:`adversarial_loss`.

    Returns:
        0-dimensional, unweighted terms ``valid<i>``, ``hole<i>`` (and ``edge<i>`` where it has a weight) for stage
        i = 1, 2, ... in the order of ``stages.raw``; ``tv<i>``, ``style<i>``, ``perceptual<i>``, ``lpips<i>`` for
        i >= 2; ``G_adv``; and the weighted total ``G``, to be differentiated.
    """
    weights = LossWeights() if weights is None else weights
    options = FeatureOptions() if options is None else options
    terms: dict[str, Tensor] = {}
    feature_totals: list[Tensor] = []
    truth: _Truth | None = None
    count = len(stages.raw)
    for i, (raw, merged) in enumerate(zip(stages.raw, stages.merged, strict=True), start=1):
        _same_shape(f"stages.raw[{i - 1}]", raw, "image", image)
        of_raw = _terms_of_raw(raw, image, mask, weights, i == count)
        terms |= {f"{name}{i}": term for name, term in of_raw.items()}
        if i == 1:
            continue
        terms[f"tv{i}"] = total_variation(merged * mask)
        if (features is None and lpips is None) or (options.stages == "last" and i < count):
            continue
        pictures, seen = [merged] if options.pictures == "merged" else [raw, merged], image
        if options.crop is not None:
            seen, *pictures = window([image, *pictures], mask, options.crop)
        if truth is None or options.crop is not None:
            truth = _Truth(seen, features, lpips, weights)
        together = torch.cat(pictures)
        ahead = lean and together.requires_grad
        if ahead:
            total, *parts = _GradientAhead.apply(together, truth.terms)  # type: ignore[no-untyped-call]
        else:
            total, *parts = truth.terms(together)
        feature_totals.append(options.factor * total)
        terms |= {f"{name}{i}": part for name, part in zip(truth.names, parts, strict=True)}
    terms["G_adv"] = adversarial_loss(scores, True, score_weight)
    factors = {
        "valid": 1.0,
        "hole": weights.hole,
        "edge": weights.edge,
        "tv": weights.total_variation,
        "G_adv": weights.adversarial,
    }
    named = [(name.rstrip("0123456789"), term) for name, term in terms.items()]
    plain = [factors[name] * term for name, term in named if name not in _FEATURE_TERMS]
    terms["G"] = torch.stack(plain + feature_totals).sum()
    return terms


def _terms_of_raw(raw: Tensor, image: Tensor, mask: Tensor, weights: LossWeights, last: bool) -> dict[str, Tensor]:
    """The terms of the raw picture of a stage, by name; `last`: of the last stage."""
    terms = {"valid": masked_l1(raw, image, 1 - mask)}
    if last and weights.hole_discount < 1:
        # The factor is on both pictures, not on the weight, which masked_l1 would normalise by.
        discount = rim_discount(mask, weights.hole_discount)
        terms["hole"] = masked_l1(discount * raw, discount * image, mask)
    else:
        terms["hole"] = masked_l1(raw, image, mask)
    if weights.edge:
        terms["edge"] = edge_l1(raw, image, mask)
    return terms


_FEATURE_TERMS = ("style", "perceptual", "lpips")
"""Terms whose weights :class:`_Truth` applies."""


class _Truth:
    """The features of the true picture, and the loss terms of other pictures against them."""

    def __init__(self, image: Tensor, features: FeaturesFn | None, lpips: LPIPS | None, weights: LossWeights) -> None:
        self.features, self.lpips, self.weights, self.batch = features, lpips, weights, len(image)
        with torch.no_grad():
            self.levels = () if features is None else features(image)
            self.directions = [] if lpips is None else lpips.directions(image)
        self.names = (() if features is None else _FEATURE_TERMS[:2]) + (() if lpips is None else _FEATURE_TERMS[2:])

    def terms(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """The weighted total, then what is in `names`; `pictures`: one or two batches, one after the other, of which
        the last is the merged one."""
        parts, totals = [], []
        if self.features is not None:
            # One pass for both pictures.
            levels = [level.split(self.batch) for level in self.features(pictures)]
            batches = [list(batch) for batch in zip(*levels, strict=True)]
            style = torch.stack([style_distance(self.levels, batch) for batch in batches]).sum()
            perceptual = torch.stack([perceptual_distance(self.levels, batch) for batch in batches]).sum()
            parts += [style, perceptual]
            totals += [self.weights.style * style + self.weights.perceptual * perceptual]
        if self.lpips is not None:
            distance = self.lpips.distance(self.directions, self.lpips.directions(pictures[-self.batch :])).mean()
            parts.append(distance)
            totals.append(self.weights.lpips * distance)
        return torch.stack(totals).sum(), *parts
