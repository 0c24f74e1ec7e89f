"""The losses against formulas written out in numpy, and at the edges: empty masks, 16 bit, ablations."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch

from lgnet_fast.reference import CASCADES, Stages, create_model
from lgnet_fast.reference.losses import (
    FeatureOptions,
    LossWeights,
    adversarial_loss,
    discriminator_loss,
    edge_l1,
    generator_loss,
    gram_matrix,
    hole_share,
    masked_l1,
    perceptual_distance,
    rim_discount,
    style_distance,
    total_variation,
    window,
)
from lgnet_fast.reference.vgg import VGG16Features


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


def features(picture: torch.Tensor) -> list[torch.Tensor]:
    """A stand-in for VGG: two levels of cheap non-negative features."""
    first = torch.relu(torch.cat((picture, -picture), dim=1))
    return [first, torch.nn.functional.max_pool2d(first, 2)]


def stages_of(count: int, side: int = 16, batch: int = 2, dtype: torch.dtype = torch.float64):
    """(stages, image, mask) with random pictures; the raw ones are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(count)

    def picture() -> torch.Tensor:
        return torch.rand(batch, 3, side, side, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)

    image = picture()
    mask = (torch.rand(batch, 1, side, side, generator=generator) < 0.3).to(dtype)
    raw = tuple(picture().requires_grad_() for _ in range(count))
    merged = tuple(image * (1 - mask) + o * mask for o in raw)
    return Stages(raw[0], None, None, raw, merged), image, mask


# -- terms ------------------------------------------------------------------------------------------------------


def test_masked_l1_by_hand():
    output = tensor([[[[1.0, 0.0], [0.5, -1.0]]] * 3, [[[1.0, 1.0], [1.0, 1.0]]] * 3])
    target = torch.zeros_like(output)
    mask = tensor([[[[1.0, 0.0], [1.0, 0.0]]], [[[0.0, 0.0], [0.0, 1.0]]]])
    # Sample 0: the hole's errors are 1 and 0.5; sample 1: 1. Three equal channels do not change a mean.
    assert masked_l1(output, target, mask).item() == pytest.approx((0.75 + 1.0) / 2)
    assert masked_l1(output, target, 1 - mask).item() == pytest.approx((0.5 + 1.0) / 2)


def test_masked_l1_is_per_sample_then_the_mean(rng):
    o, t = rng.standard_normal((2, 3, 3, 5, 7))
    m = (rng.random((3, 1, 5, 7)) < [[[[0.1]]], [[[0.5]]], [[[0.9]]]]).astype(float)
    expected = np.mean([np.abs((o[b] - t[b]) * m[b]).sum() / (3 * m[b].sum() + 1e-12) for b in range(3)])
    assert masked_l1(tensor(o), tensor(t), tensor(m)).item() == pytest.approx(expected, rel=1e-12)


def test_total_variation_by_hand(rng):
    x = tensor([[[[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]]]])
    assert total_variation(x).item() == pytest.approx((2 + 1 + 4) / 3 + (1 + 2 + 0 + 3) / 4)
    p = rng.standard_normal((2, 3, 5, 6))
    expected = np.abs(np.diff(p, axis=2)).mean() + np.abs(np.diff(p, axis=3)).mean()
    assert total_variation(tensor(p)).item() == pytest.approx(expected, rel=1e-12)


def test_edge_l1_by_hand():
    picture = tensor([[1, 2, 4], [8, 16, 32]])[None, None]
    weight = tensor([[1, 1, 0], [0, 1, 1]])[None, None]
    down, across = 14, (1 + 16) / 2  # only where both neighbours are weighted
    assert edge_l1(picture, torch.zeros_like(picture), weight).item() == pytest.approx(down + across, rel=1e-12)


def test_gram_style_and_perceptual(rng):
    a, b = ([rng.standard_normal((2, c, h, w)) for c, h, w in ((3, 4, 5), (2, 3, 3))] for _ in range(2))
    style = perceptual = 0.0
    for x, y in zip(a, b):
        c, h, w = x.shape[1:]
        grams = [np.stack([f.reshape(c, -1) @ f.reshape(c, -1).T for f in z]) for z in (x, y)]
        np.testing.assert_allclose(gram_matrix(tensor(x)).numpy(), grams[0], rtol=1e-12)
        style += np.abs(grams[0] - grams[1]).mean() / (c * h * w)
        perceptual += np.abs(x - y).mean()
    a, b = [tensor(x) for x in a], [tensor(x) for x in b]
    assert style_distance(a, b).item() == pytest.approx(style, rel=1e-12)
    assert perceptual_distance(a, b).item() == pytest.approx(perceptual, rel=1e-12)
    assert style_distance(a, a).item() == perceptual_distance(b, b).item() == 0.0


def test_adversarial_by_hand():
    scores = tensor([[0.5, -1.0]])
    assert adversarial_loss(scores, True).item() == pytest.approx((0.25 + 4.0) / 2)
    assert adversarial_loss(scores, False).item() == pytest.approx((0.25 + 1.0) / 2)
    terms = discriminator_loss(scores, scores)
    assert list(terms) == ["D_fake", "D_real", "D"]
    assert terms["D"].item() == pytest.approx((0.625 + 2.125) / 2)


def test_gradients_are_right(rng):
    x, y = (tensor(rng.standard_normal((2, 3, 4, 4))).requires_grad_() for _ in range(2))
    mask = tensor(rng.random((2, 1, 4, 4)) < 0.5)
    assert torch.autograd.gradcheck(lambda a, b: masked_l1(a, b, mask), (x, y))
    assert torch.autograd.gradcheck(total_variation, (x,))
    assert torch.autograd.gradcheck(lambda a, b: style_distance([a], [b]), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: perceptual_distance([a], [b]), (x, y))


# -- totals -----------------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum():
    stages, image, mask = stages_of(3)
    scores = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    terms = {k: v.item() for k, v in generator_loss(stages, image, mask, scores, features).items()}
    assert list(terms) == [
        "valid1", "hole1", "valid2", "hole2", "tv2", "style2", "perceptual2",
        "valid3", "hole3", "tv3", "style3", "perceptual3", "G_adv", "G",
    ]  # fmt: skip
    expected = sum(terms[f"valid{i}"] + 6 * terms[f"hole{i}"] for i in (1, 2, 3)) + 0.1 * terms["G_adv"]
    expected += sum(0.1 * terms[f"tv{i}"] + 0.05 * terms[f"perceptual{i}"] + 120 * terms[f"style{i}"] for i in (2, 3))
    assert terms["G"] == pytest.approx(expected, rel=1e-12)
    weights = LossWeights(hole=1, adversarial=2, total_variation=3, perceptual=5, style=7)
    expected = sum(terms[f"valid{i}"] + terms[f"hole{i}"] for i in (1, 2, 3)) + 2 * terms["G_adv"]
    expected += sum(3 * terms[f"tv{i}"] + 5 * terms[f"perceptual{i}"] + 7 * terms[f"style{i}"] for i in (2, 3))
    total = generator_loss(stages, image, mask, scores, features, weights)["G"].item()
    assert total == pytest.approx(expected, rel=1e-12)


def test_style_and_perceptual_compare_raw_and_merged_to_the_image():
    stages, image, mask = stages_of(2)
    terms = generator_loss(stages, image, mask, torch.ones(1), features)
    gt, raw, merged = features(image), features(stages.raw[1]), features(stages.merged[1])
    assert torch.allclose(terms["style2"], style_distance(gt, raw) + style_distance(gt, merged), rtol=1e-12)
    expected = perceptual_distance(gt, raw) + perceptual_distance(gt, merged)
    assert torch.allclose(terms["perceptual2"], expected, rtol=1e-12)
    assert torch.allclose(terms["tv2"], total_variation(stages.merged[1] * mask), rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_all_known_or_all_hole(value, dtype):
    stages, image, mask = stages_of(3, dtype=dtype)
    mask = torch.full_like(mask, value)
    merged = tuple(image * (1 - mask) + o * mask for o in stages.raw)
    stages = stages._replace(merged=merged)
    terms = generator_loss(stages, image, mask, torch.zeros(2, 1, 3, 3, dtype=dtype), features)
    assert all(torch.isfinite(t) and t.dtype == torch.float32 for t in terms.values())
    assert terms["hole1" if value == 0 else "valid1"].item() == 0.0
    terms["G"].backward()
    assert all(torch.isfinite(o.grad).all() for o in stages.raw)
    assert stages.raw[0].grad.any()


@pytest.mark.parametrize("stages", CASCADES)
def test_ablations_have_the_terms_of_their_stages(stages):
    torch.manual_seed(0)
    model = create_model(stages, coarse_channels=2, local_channels=2, global_channels=2, backend="eager")
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    mask = torch.zeros(1, 1, 256, 256)
    mask[:, :, 80:150, 60:200] = 1
    out = model(image, mask, return_stages=True)
    terms = generator_loss(out, image, mask, out.merged[0].mean((1, 2, 3)), features)
    count = stages.count("+") + 1
    expected = ["valid1", "hole1"]
    for i in range(2, count + 1):
        expected += [f"valid{i}", f"hole{i}", f"tv{i}", f"style{i}", f"perceptual{i}"]
    assert list(terms) == [*expected, "G_adv", "G"]
    terms["G"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is None for p in model.parameters()) == 0


def test_first_stage_alone_never_asks_for_features():
    stages, image, mask = stages_of(1)

    def forbidden(picture):
        raise AssertionError("features were computed")

    assert list(generator_loss(stages, image, mask, torch.ones(1), forbidden)) == ["valid1", "hole1", "G_adv", "G"]


# -- 16 bit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_is_float32_under_autocast(dtype):
    torch.manual_seed(0)
    a = (torch.rand(1, 8, 64, 64) * 100).to(dtype)  # entries near 1e7: beyond float16
    with torch.autocast("cpu", dtype=dtype):
        gram = gram_matrix(a)
        loss = style_distance([a], [a * 0.5])
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype  # autocast itself goes on
    exact = a.double().flatten(2)
    exact = exact @ exact.transpose(1, 2)
    assert gram.dtype == loss.dtype == torch.float32
    assert exact.max() > 65504
    assert torch.allclose(gram.double(), exact, rtol=1e-5)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_terms_are_those_of_float64_on_the_same_numbers(dtype):
    stages, image, mask = stages_of(3, side=64, dtype=dtype)
    scores = torch.linspace(-2, 2, 50, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        terms = generator_loss(stages, image, mask, scores, features)
        terms |= discriminator_loss(scores, scores)
    wide = Stages(*stages[:3], *(tuple(p.double() for p in group) for group in stages[3:]))
    exact = generator_loss(wide, image.double(), mask.double(), scores.double(), features)
    exact |= discriminator_loss(scores.double(), scores.double())
    for name, value in exact.items():
        assert terms[name].dtype == torch.float32, name
        assert math.isclose(terms[name].item(), value.item(), rel_tol=2e-5), name
    terms["G"].backward()
    assert all(torch.isfinite(o.grad).all() for o in stages.raw)


# -- wrong arguments --------------------------------------------------------------------------------------------


def test_wrong_shapes_name_the_argument():
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"target: expected \[2, 3, 8, 8\] as output, got \[2, 3, 8, 9\]"):
        masked_l1(x, torch.zeros(2, 3, 8, 9), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"weight: expected \[2, 1, 8, 8\] to fit output, got \[2, 3, 8, 8\]"):
        masked_l1(x, x, x)
    with pytest.raises(ValueError, match="picture: expected"):
        total_variation(torch.zeros(1, 3, 1, 8))
    with pytest.raises(ValueError, match="features: expected"):
        gram_matrix(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="b: expected 2 levels as a, got 1"):
        style_distance([x, x], [x])
    with pytest.raises(ValueError, match=r"b\[1\]: expected"):
        perceptual_distance([x, x], [x, x[:1]])
    stages, image, mask = stages_of(2)
    with pytest.raises(ValueError, match="image: expected"):
        generator_loss(stages, image[:1], mask, torch.ones(1), features)
    with pytest.raises(ValueError, match="weight: expected"):
        generator_loss(stages, image, mask[:1], torch.ones(1), features)


@pytest.mark.parametrize("frozen", [False, True])
def test_lean_gives_the_same_gradients_and_keeps_no_feature_maps(frozen):
    weights = LossWeights(style=7.0, perceptual=3.0)
    results = []
    for lean in (False, True):
        kept: list[weakref.ref] = []

        def watched(picture: torch.Tensor, kept: list[weakref.ref] = kept) -> list[torch.Tensor]:
            levels = features(picture)
            if picture.requires_grad:
                kept += [weakref.ref(level) for level in levels]
            return levels

        stages, image, mask = stages_of(3)
        if frozen:
            stages = Stages(
                *stages[:3], tuple(r.detach() for r in stages.raw), tuple(m.detach() for m in stages.merged)
            )
        scores = (image * 0.5).requires_grad_()
        terms = generator_loss(stages, image, mask, scores, watched, weights, lean=lean)
        assert [ref() is None for ref in kept] == [] if frozen else [lean] * 4
        (0.25 * terms["G"]).backward()  # as one of four batches of a step
        results.append((terms, [None if frozen else r.grad for r in stages.raw]))
    (plain, gradients), (ahead, same) = results
    assert list(plain) == list(ahead)
    for name in plain:
        assert ahead[name].item() == pytest.approx(plain[name].item(), rel=1e-12)
    if not frozen:
        for a, b in zip(gradients, same, strict=True):
            assert (a - b).abs().max() <= 1e-12 * a.abs().max()


# -- cheaper and further terms ----------------------------------------------------------------------------------


def test_style_and_perceptual_of_vgg_are_the_plain_formula(tmp_path):
    """From a weights file to the terms, in float64, against layers and sums written out."""
    rng = np.random.default_rng(0)
    pairs = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256)]
    weights = {f"w{i}": rng.standard_normal((*p, 3, 3)) * (2 / (9 * p[1])) ** 0.5 for i, p in enumerate(pairs)}
    weights |= {f"b{i}": rng.standard_normal(p[0]) * 0.1 for i, p in enumerate(pairs)}
    np.savez(tmp_path / "vgg.npz", **weights)
    stages, image, mask = stages_of(2)
    terms = generator_loss(stages, image, mask, torch.ones(1), VGG16Features.from_file(tmp_path / "vgg.npz"))

    def levels(x):
        out = []
        for i in range(7):
            w, b = tensor(weights[f"w{i}"]), tensor(weights[f"b{i}"])
            x = torch.nn.functional.conv2d(x, w, b, padding=1).clamp(min=0)
            if i in (1, 3, 6):
                x = torch.nn.functional.max_pool2d(x, 2)
                out.append(x.detach().numpy())
        return out

    style = perceptual = 0.0
    for picture in (stages.raw[1], stages.merged[1]):
        for a, b in zip(levels(image), levels(picture)):
            c, h, w = a.shape[1:]
            a, b = a.reshape(-1, c, h * w), b.reshape(-1, c, h * w)
            perceptual += np.abs(a - b).mean()
            style += np.abs(a @ a.transpose(0, 2, 1) - b @ b.transpose(0, 2, 1)).mean() / (c * h * w)
    assert terms["style2"].item() == pytest.approx(style, rel=1e-6)
    assert terms["perceptual2"].item() == pytest.approx(perceptual, rel=1e-6)


def test_only_the_last_stage_and_merged_pictures():
    stages, image, mask = stages_of(3)
    options = FeatureOptions(stages="last", pictures="merged", factor=4)
    terms = generator_loss(stages, image, mask, torch.ones(1), features, options=options)
    assert "style2" not in terms
    gt, merged = features(image), features(stages.merged[2])
    assert torch.allclose(terms["style3"], style_distance(gt, merged), rtol=1e-12)
    assert torch.allclose(terms["perceptual3"], perceptual_distance(gt, merged), rtol=1e-12)
    plain = sum(terms[f"valid{i}"] + 6 * terms[f"hole{i}"] for i in (1, 2, 3)) + 0.1 * (terms["tv2"] + terms["tv3"])
    expected = plain + 4 * (120 * terms["style3"] + 0.05 * terms["perceptual3"])
    assert terms["G"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_windows_hold_the_same_place_of_every_picture_and_a_hole_pixel():
    torch.manual_seed(0)
    places = torch.arange(20 * 24, dtype=torch.float64).view(1, 1, 20, 24).expand(3, 2, 20, 24)
    mask = torch.zeros(3, 1, 20, 24, dtype=torch.float64)
    mask[0, 0, 0, 0] = mask[1, 0, 19, 23] = mask[2, 0, 10, 12] = 1
    cut, holes = window([places, mask], mask, 8)
    assert cut.shape == (3, 2, 8, 8)
    assert holes.sum(dim=(1, 2, 3)).tolist() == [1, 1, 1]
    assert [int(c[0, 0, 0]) for c in cut] == [0, 12 * 24 + 16, 6 * 24 + 8]
    assert torch.equal(cut[2, 1], places[2, 1, 6:14, 8:16])
    with pytest.raises(ValueError, match="side: expected 1 to 20, got 21"):
        window([places], mask, 21)
    (anywhere,) = window([places], torch.zeros_like(mask), 20)
    assert anywhere.shape == (3, 2, 20, 20)


def test_crops_restrict_the_terms_and_their_gradient():
    stages, image, mask = stages_of(2, side=32)
    mask = torch.zeros_like(mask)
    mask[:, :, 2, 3] = 1  # the window is the upper left corner
    options = FeatureOptions(crop=16)
    weights = LossWeights(hole=0, total_variation=0, adversarial=0)
    terms = generator_loss(stages, image, mask, torch.ones(1), features, weights, options=options)
    part = Stages(None, None, None, *(tuple(p[..., :16, :16] for p in kind) for kind in (stages.raw, stages.merged)))
    small = generator_loss(part, image[..., :16, :16], mask[..., :16, :16], torch.ones(1), features, weights)
    assert terms["style2"].item() == pytest.approx(small["style2"].item(), rel=1e-12)
    assert terms["perceptual2"].item() == pytest.approx(small["perceptual2"].item(), rel=1e-12)
    (120 * terms["style2"]).backward()
    assert stages.raw[1].grad[..., :16, :16].any()
    assert not stages.raw[1].grad[..., 16:, :].any()
    assert not stages.raw[1].grad[..., 16:].any()


def test_each_stages_crop_is_compared_with_the_same_place_of_the_image():
    _, image, mask = stages_of(3, side=32)
    right = Stages(None, None, None, (image,) * 3, (image,) * 3)
    terms = generator_loss(right, image, mask, torch.ones(1), features, options=FeatureOptions(crop=8))
    assert [terms[f"{name}{i}"].item() for i in (2, 3) for name in ("style", "perceptual")] == [0] * 4


class _LPIPS:
    """A stand-in with LPIPS's two methods."""

    def directions(self, picture):
        return features(picture)

    def distance(self, a, b):
        return torch.stack([(x - y).square().mean(dim=(1, 2, 3)) for x, y in zip(a, b)]).sum(dim=0)


@pytest.mark.parametrize("lean", [False, True])
def test_lpips_term(lean):
    stages, image, mask = stages_of(3)
    weights = LossWeights(hole=0, total_variation=0, adversarial=0, lpips=3)
    terms = generator_loss(stages, image, mask, torch.ones(1), None, weights, lean, lpips=_LPIPS())
    expected = [_LPIPS().distance(features(image), features(m)).mean() for m in stages.merged[1:]]
    assert terms["lpips2"].item() == pytest.approx(expected[0].item(), rel=1e-12)
    assert terms["lpips3"].item() == pytest.approx(expected[1].item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(3 * expected[1], stages.raw[2], retain_graph=True)
    (valid,) = torch.autograd.grad(masked_l1(stages.raw[2], image, 1 - mask), stages.raw[2])
    terms["G"].backward()
    assert torch.allclose(stages.raw[2].grad, gradient + valid, rtol=1e-9, atol=1e-15)


def test_scores_weighted_by_the_hole():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[..., :4, :2] = 1
    scores = tensor([[[[0.5, 3.0], [-2.0, 7.0]]]])
    weight = hole_share(mask, scores)
    assert weight.flatten().tolist() == [0.5, 0, 0, 0]
    assert adversarial_loss(scores, True, weight).item() == pytest.approx(0.25)
    assert discriminator_loss(scores, scores, weight)["D"].item() == pytest.approx(0.25)
    assert adversarial_loss(scores, True, torch.zeros_like(weight)).item() == 0.0
    with pytest.raises(ValueError, match=r"weight: expected \[1, 1, 2, 2\] as scores"):
        adversarial_loss(scores, True, mask)


# -- discount by distance ---------------------------------------------------------------------------------------


def test_rim_discount_by_hand():
    mask = torch.zeros(2, 1, 7, 8, dtype=torch.float64)
    mask[0, 0, 1:6, 1:8] = 1  # beside the right edge of the picture, which is no rim
    discount = rim_discount(mask, 0.5)
    ring = [1, 1, 1, 1, 1, 1, 1]
    expected = [
        [1] * 8,
        [1, *ring],
        [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        [1, 1, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25],
        [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        [1, *ring],
        [1] * 8,
    ]
    assert discount[0, 0].tolist() == expected
    assert torch.equal(discount[1], torch.ones_like(discount[1]))
    assert torch.equal(rim_discount(mask, 1.0), torch.ones_like(mask))
    deep = rim_discount(torch.ones(1, 1, 8, 8, dtype=torch.float64), 0.9)
    assert deep.flatten().tolist() == pytest.approx([0.9**32] * 64)
    for factor in (0, 1.5):
        with pytest.raises(ValueError, match=rf"factor: expected a number in \(0, 1\], got {factor}"):
            rim_discount(mask, factor)


def test_the_hole_term_of_the_last_stage_is_discounted():
    stages, image, _ = stages_of(3)
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    mask[:, :, 4:12, 4:12] = 1
    plain = generator_loss(stages, image, mask, torch.ones(1), None)
    terms = generator_loss(stages, image, mask, torch.ones(1), None, LossWeights(hole_discount=0.8))
    assert all(torch.equal(terms[name], plain[name]) for name in terms if name not in ("hole3", "G"))
    error = (stages.raw[2] - image).abs().mean(dim=1, keepdim=True)
    expected = (error * rim_discount(mask, 0.8) * mask).sum() / mask.sum()
    assert terms["hole3"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert (plain["G"] - terms["G"]).item() == pytest.approx(6 * (plain["hole3"] - terms["hole3"]).item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(terms["hole3"], stages.raw[2])
    rim, middle = gradient[0, 0, 4, 4].abs(), gradient[0, 0, 7, 7].abs()
    assert (middle / rim).item() == pytest.approx(0.8**3, rel=1e-9)
