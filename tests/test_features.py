"""Feature networks and LPIPS against a plain formula, file layouts, hashes, and the Fréchet distance by hand."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lgnet_fast import WeightsError
from lgnet_fast.evaluation import VGGFrechet
from lgnet_fast.evaluation.frechet import frechet_distance
from lgnet_fast.reference.features import LPIPS, ConvFeatures, read_weights, register_features, registered_features
from lgnet_fast.reference.vgg import VGG16Features

VGG = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256)] + [(512, 256)] + [(512, 512)] * 5
ALEXNET = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]
VGG_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
HEADS = {"alexnet": (64, 192, 384, 256, 256), "vgg16": (64, 128, 256, 512, 512)}


def weights(network: str, convolutions: int | None = None) -> dict[str, np.ndarray]:
    """Random weights in the numbered layout, with activations that keep their size, and positive heads."""
    rng = np.random.default_rng(3)
    shapes = ALEXNET if network == "alexnet" else [(*pair, 3) for pair in VGG]
    out = {}
    for i, (width, width_in, kernel) in enumerate(shapes[:convolutions]):
        size = (width, width_in, kernel, kernel)
        out[f"w{i}"] = rng.standard_normal(size, np.float32) * np.float32(2 / (width_in * kernel**2)) ** 0.5
        out[f"b{i}"] = rng.standard_normal(width, np.float32) * np.float32(0.1)
    for i, width in enumerate(HEADS[network]):
        out[f"lin{i}"] = rng.random((1, width, 1, 1), np.float32)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    for network in HEADS:
        np.savez(folder / f"{network}.npz", **weights(network))
    return {network: folder / f"{network}.npz" for network in HEADS}


def pairs(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random pictures [count, 3, side, side] in [-1, 1], and copies with ever more noise."""
    rng = np.random.default_rng(11)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (count, 3, 8, 8)).astype(np.float32))
    a = F.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = torch.from_numpy(rng.standard_normal((count, 3, side, side)).astype(np.float32))
    return a, (a + noise * torch.linspace(0.02, 0.5, count).view(-1, 1, 1, 1)).clamp(-1, 1)


def plain_levels(network: str, w: dict[str, np.ndarray], picture: torch.Tensor) -> list[torch.Tensor]:
    """Features, layer by layer."""
    t = {k: torch.from_numpy(v) for k, v in w.items()}
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, levels = ((picture + 1) / 2 - mean) / deviation, []
    if network == "alexnet":
        for i, (stride, padding, pool) in enumerate([(4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0)]):
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = F.conv2d(x, t[f"w{i}"], t[f"b{i}"], stride=stride, padding=padding).clamp(min=0)
            levels.append(x)
        return levels
    number = 0
    for count in (2, 2, 3, 3, 3):
        x = F.max_pool2d(x, 2) if number else x
        for _ in range(count):
            x = F.conv2d(x, t[f"w{number}"], t[f"b{number}"], padding=1).clamp(min=0)
            number += 1
        levels.append(x)
    return levels


def plain_lpips(network: str, w: dict[str, np.ndarray], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(a))
    for i, (x, y) in enumerate(zip(plain_levels(network, w, a), plain_levels(network, w, b))):
        x, y = x / x.norm(dim=1, keepdim=True).clamp(min=1e-10), y / y.norm(dim=1, keepdim=True).clamp(min=1e-10)
        total += ((x - y) ** 2 * torch.from_numpy(w[f"lin{i}"])).sum(dim=1).mean(dim=(1, 2))
    return total


# -- LPIPS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "side", "count"), [("alexnet", 64, 10), ("alexnet", 31, 2), ("vgg16", 16, 2)])
def test_lpips_is_the_plain_formula(files, network, side, count):
    a, b = pairs(count, side)
    net = LPIPS.from_file(files[network])
    assert net.features.network == network
    got = net(a, b)
    expected = plain_lpips(network, weights(network), a, b)
    assert got.shape == (count,)
    assert torch.allclose(got, expected, rtol=1e-4)
    assert expected.min() > 1e-4
    assert torch.equal(net(a, a), torch.zeros(count))
    assert torch.allclose(net(b, a), got, rtol=1e-5)


@pytest.mark.parametrize("network", ["alexnet", "vgg16"])
def test_lpips_of_the_published_weights(network):
    """Ten pairs against figures of another implementation; LGNET_FAST_LPIPS_WEIGHTS names the folder of weights."""
    folder = os.environ.get("LGNET_FAST_LPIPS_WEIGHTS")
    if folder is None:
        pytest.skip("LGNET_FAST_LPIPS_WEIGHTS: a folder of lpips_alexnet_f16.npz and lpips_vgg16_f16.npz")
    expected = json.loads((Path(__file__).parent / "data" / "lpips.json").read_text())[network]
    a, b = pairs(10, 64)
    got = LPIPS.from_file(Path(folder) / f"lpips_{network}_f16.npz")(a, b).tolist()
    assert len(expected) == 10
    assert got == pytest.approx(expected, abs=1e-4)


def test_lpips_has_a_finite_gradient_where_no_channel_answers(files):
    net = LPIPS.from_file(files["alexnet"])
    with torch.no_grad():
        net.features.convolutions[0].bias.fill_(-1e3)  # every ReLU of the first level is 0
    a, b = pairs(1, 64)
    a.requires_grad_()
    net(a, b).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_lpips_gradient(files):
    net = LPIPS.from_file(files["alexnet"]).double()
    a, b = (p[..., :63, :63].double() for p in pairs(1, 64))
    a.requires_grad_()
    net(a, b).sum().backward()
    step = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(0)) * 1e-6
    with torch.no_grad():
        slope = float((net(a + step, b) - net(a - step, b)) / 2)
    assert slope == pytest.approx(float((a.grad * step).sum()), rel=1e-3)
    assert not any(p.requires_grad for p in net.parameters())


def test_heads_from_another_file(files, tmp_path):
    own = weights("alexnet")
    np.savez(tmp_path / "headless.npz", **{k: v for k, v in own.items() if not k.startswith("lin")})
    torch.save({f"lin{i}.model.1.weight": torch.from_numpy(own[f"lin{i}"]) for i in range(5)}, tmp_path / "alex.pth")
    a, b = pairs(2, 64)
    net = LPIPS.from_file(tmp_path / "headless.npz", heads=tmp_path / "alex.pth")
    assert torch.equal(net(a, b), LPIPS.from_file(files["alexnet"])(a, b))
    torch.save({f"lin{i}": torch.from_numpy(own[f"lin{i}"]) for i in range(4)}, tmp_path / "four.pth")
    with pytest.raises(WeightsError, match=r"missing \(1\): lin4"):
        LPIPS.from_file(tmp_path / "headless.npz", heads=tmp_path / "four.pth")


def test_heads_that_torchmetrics_brings(tmp_path):
    pytest.importorskip("torchmetrics")
    np.savez(tmp_path / "headless.npz", **{k: v for k, v in weights("alexnet").items() if not k.startswith("lin")})
    net = LPIPS.from_file(tmp_path / "headless.npz")
    assert [int(getattr(net, f"head{i}").numel()) for i in range(5)] == list(HEADS["alexnet"])
    assert min(float(getattr(net, f"head{i}").min()) for i in range(5)) >= 0


# -- files ------------------------------------------------------------------------------------------------------


def test_layouts_give_the_same_tensors(files, tmp_path):
    own = {k: torch.from_numpy(v) for k, v in weights("vgg16").items()}
    names = {f"{k[0]}{i}": f"features.{p}.{k}" for i, p in enumerate(VGG_PLACES) for k in ("weight", "bias")}
    theirs = {full: own[short] for short, full in names.items()}
    torch.save(theirs | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    save_file(own, tmp_path / "vgg.safetensors")
    a, _ = pairs(1, 16)
    expected = ConvFeatures.from_file(files["vgg16"])(a)
    for name in ("vgg.pth", "vgg.safetensors"):
        assert all(torch.equal(x, y) for x, y in zip(ConvFeatures.from_file(tmp_path / name)(a), expected))
    for name in ("vgg.pth", "vgg.safetensors", files["vgg16"]):
        net = VGG16Features.from_file(tmp_path / name)
        assert torch.equal(net[14].weight, own["w6"])
        assert not any(p.requires_grad for p in net.parameters())


def test_half_precision_files_up_to_pool3(tmp_path):
    own = weights("vgg16", convolutions=7)
    np.savez(tmp_path / "vgg.npz", **{k: v.astype(np.float16) for k, v in own.items() if k[0] in "wb"})
    net = VGG16Features.from_file(tmp_path / "vgg.npz")
    assert net[0].weight.dtype == torch.float32
    assert torch.allclose(net[0].weight, torch.from_numpy(own["w0"]), rtol=1e-3)
    assert ConvFeatures.from_file(tmp_path / "vgg.npz").widths == (64, 128, 256)
    with pytest.raises(WeightsError, match="LPIPS expected all 13 convolutions of vgg16 .* got 7"):
        LPIPS.from_file(tmp_path / "vgg.npz")


def test_normalised_input_is_imagenets(files):
    a, _ = pairs(1, 32)
    plain, normalised = (
        VGG16Features.from_file(files["vgg16"]),
        VGG16Features.from_file(files["vgg16"], normalised=True),
    )
    levels = plain_levels("vgg16", weights("vgg16"), a)
    for got, level in zip(normalised(a), levels):
        assert torch.allclose(got, F.max_pool2d(level, 2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(a)[0], normalised(a)[0], rtol=0.1)


def test_hashes(files, tmp_path):
    content = files["alexnet"].read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert "w0" in read_weights(files["alexnet"], digest)
    good, bad = tmp_path / f"alexnet-{digest[:8]}.npz", tmp_path / "alexnet-00000000.npz"
    good.write_bytes(content)
    bad.write_bytes(content)
    assert "w0" in read_weights(good)
    with pytest.raises(WeightsError, match=f"expected a SHA-256 of '00000000'.*got {digest}"):
        read_weights(bad)
    with pytest.raises(WeightsError, match="expected a SHA-256 of 'ff'"):
        read_weights(good, "ff")


def test_broken_files(tmp_path):
    for name in ("a.npz", "a.safetensors", "a.pth"):
        with pytest.raises(WeightsError, match="does not exist"):
            read_weights(tmp_path / name)
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(WeightsError, match="weights: "):
            read_weights(tmp_path / name)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(WeightsError, match="first convolution w0 .* got none"):
        ConvFeatures.from_file(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", w0=np.array([None]))
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(tmp_path / "objects.npz")


def test_bad_arguments(files):
    net = LPIPS.from_file(files["alexnet"])
    with pytest.raises(ValueError, match="network: expected one of"):
        ConvFeatures("resnet")
    with pytest.raises(TypeError, match="a: expected a torch.Tensor"):
        net(1, 2)
    with pytest.raises(ValueError, match=r"b: expected \[1, 3, 64, 64\] as a"):
        net(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 65))


def test_registered_features():
    register_features("doubled", lambda: lambda picture: [2 * picture])
    features = registered_features("doubled")
    assert features is not None
    assert torch.equal(features(torch.ones(1, 3, 2, 2))[0], torch.full((1, 3, 2, 2), 2.0))
    assert isinstance(registered_features("lgnet_fast.reference.vgg:VGG16Features"), VGG16Features)
    assert registered_features("weights/vgg.npz") is None
    with pytest.raises(ValueError, match="features: expected package.module:function"):
        registered_features("lgnet_fast:nothing_of_that_name")


# -- Fréchet distance -------------------------------------------------------------------------------------------


def test_frechet_distance_by_the_matrix_formula():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((30, 5)) + 0.5
    s, t = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(s @ t).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * roots.sum()
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-9)
    # Fewer vectors than dimensions; a shift by (1, ..., 1) is the number of dimensions.
    few = torch.from_numpy(rng.standard_normal((3, 64)))
    assert frechet_distance(few, few + 1) == pytest.approx(64, rel=1e-9)


def test_frechet_distance_of_vgg_features(files):
    metric = VGGFrechet(files["vgg16"])
    a, b = pairs(3, 16)
    with pytest.raises(ValueError, match="got 0 true, 0 filled"):
        metric.compute()
    for x, y in zip(a.split(2), b.split(2)):
        metric.update(x, real=True)
        metric.update(y, real=False)
    expected = [plain_levels("vgg16", weights("vgg16"), p)[4].mean(dim=(2, 3)) for p in (a, b)]
    assert metric.compute() == pytest.approx(frechet_distance(*expected), rel=1e-3)
    assert VGGFrechet(files["vgg16"], level=0).features(a.double()).shape == (3, 64)
    with pytest.raises(ValueError, match="level: expected one of 5 levels, got 5"):
        VGGFrechet(files["vgg16"], level=5)
    with pytest.raises(ValueError, match="file: expected the weights of vgg16, got those of alexnet"):
        VGGFrechet(files["alexnet"])
