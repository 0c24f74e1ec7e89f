"""The metrics of `lgnet-fast eval` against their definitions, and their networks' weights."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

from lgnet_fast.data import metrics as metrics_module
from lgnet_fast.data.metrics import Metrics
from lgnet_fast.errors import MissingExtraError, WeightsError
from lgnet_fast.evaluation import biharmonic, telea
from lgnet_fast.evaluation.frechet import frechet_distance

from .evaluation_support import PLAIN, invoke_eval, write_waves
from .pipeline_support import box_mask, evaluate, noise, smooth_noise


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_waves(tmp_path / "pictures")


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, where the 11x11 Gaussian window (sigma 1.5) lies inside the picture; mean of RGB."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(values, (11, 11), axis=(0, 1))
        return np.einsum("hwcij,ij->hwc", windows, window)

    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return float((((2 * ma * mb + c1) * (2 * vab + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_l1_psnr_and_ssim_are_those_of_their_definitions():
    truth = smooth_noise(48, 40, 0)
    filled = truth.copy()
    filled[10:30, 5:25] = noise(20, 20, 1)
    scores = Metrics(PLAIN).scores(filled, truth)
    difference = filled.astype(np.float64) - truth
    assert scores["l1"] == pytest.approx(100 * np.abs(difference).mean() / 255, rel=1e-12)
    assert scores["psnr"] == pytest.approx(10 * np.log10(255**2 / (difference**2).mean()), rel=1e-6)
    assert scores["ssim"] == pytest.approx(_ssim(filled, truth), abs=1e-9)
    assert Metrics(PLAIN).scores(truth, truth) == {
        "l1": 0.0,
        "psnr": float("inf"),
        "ssim": pytest.approx(1, abs=1e-6),
    }


def test_ssim_of_bright_flat_parts():
    """In float32 the squares of levels near 255 have larger rounding errors than the variances."""
    rng = np.random.default_rng(0)
    truth = (255 - (rng.random((64, 48, 3)) < 0.01)).astype(np.uint8)
    filled = (255 - (rng.random((64, 48, 3)) < 0.01)).astype(np.uint8)
    assert Metrics(PLAIN).scores(filled, truth)["ssim"] == pytest.approx(_ssim(filled, truth), abs=1e-9)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.normal(size=(40, 3)).astype(np.float32))
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    shift = torch.tensor([1, 0, 2])
    assert frechet_distance(real, real + shift) == pytest.approx(5, abs=1e-4)  # equal covariances: |shift|^2
    line = real[:, :1]
    mean, spread = float(line.mean()), float(line.std())
    expected = (2 * mean) ** 2 + (2 * spread) ** 2  # one dimension: (m1 - m2)^2 + (s1 - s2)^2
    assert frechet_distance(line, 3 * line) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_frechet_distance_of_broken_features_is_not_a_number(bad):
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    broken = rows.clone()
    broken[3, 1] = bad
    assert np.isnan(frechet_distance(rows, broken))
    assert np.isnan(frechet_distance(broken, rows))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)


def test_lpips_and_fid_networks_may_be_given():
    seen = []

    def distance(a, b):
        seen.append((a.shape, a.dtype, float(a.min()), float(a.max())))
        return (a - b).abs().mean()

    class Mean(nn.Module):
        def forward(self, picture):
            assert picture.dtype == torch.uint8
            assert not self.training
            return picture.float().mean(dim=(2, 3))

    white, black = np.full((16, 20, 3), 255, np.uint8), np.zeros((16, 20, 3), np.uint8)
    measure = Metrics(("lpips", "fid"), lpips=distance, fid=Mean())
    assert measure.available == ("lpips", "fid")
    assert measure.scores(white, black) == {"lpips": 2.0}
    assert seen == [((1, 3, 16, 20), torch.float32, 1.0, 1.0)]
    np.testing.assert_array_equal(measure.features(white), [255, 255, 255])
    assert socket.getdefaulttimeout() is None  # that of the downloads has gone


def test_missing_backbones_are_one_line_each_and_the_other_metrics_stay(tmp_path, pictures):
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"torn")
    result = evaluate(
        pictures, classes="1", size=64, baselines=["telea"], models=[], seed=3, lpips=tmp_path / "a.pth",
        fid=tmp_path / "b.pth",
    )  # fmt: skip
    assert set(result.missing) == {"lpips", "fid"}
    assert all(reason and "\n" not in reason for reason in result.missing.values())
    assert "b.pth" in result.missing["fid"]
    score = result.score("Telea", "10-20%")
    assert (score.lpips, score.fid) == (None, None)
    assert score.psnr > 15
    assert "LPIPS: n/a (" in result.markdown()
    assert result.markdown().count("n/a |") == 2


def test_a_mean_that_is_no_number_has_a_reason(pictures):
    """LPIPS by a network that gives NaN on one picture: its other means are shown."""

    def distance(a, b):
        return torch.tensor(np.nan) if a.shape[2:] == (80, 64) else torch.tensor(0.5)

    options = {"metrics": ["l1", "lpips"], "lpips": distance, "size": 0, "models": [], "baselines": ["ns"]}
    result = evaluate(pictures, classes="1", **options)
    assert result.score("Navier-Stokes", "10-20%").lpips is None
    assert result.score("Navier-Stokes", "10-20%").l1 > 0
    assert result.missing == {"lpips": "not a number on some pictures"}
    assert "- LPIPS: n/a (not a number on some pictures)" in result.markdown()
    assert evaluate(pictures, **{**options, "size": 64}, classes="1").missing == {}


def _alexnet_features() -> nn.Sequential:
    """torchvision's ``alexnet().features``, random."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(3, 2)]
    for inputs, outputs in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2))


def test_lpips_with_a_local_backbone_is_that_of_its_definition(tmp_path):
    """Zhang et al. 2018, eq. (1): squared differences of unit features, weighted by v0.1's linear layers."""
    backbone = _alexnet_features()
    state = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    lpips_module = pytest.importorskip("torchmetrics.functional.image.lpips")
    measure = Metrics(("lpips",), lpips=tmp_path / "alexnet.pth")
    assert measure.missing == {}
    truth, filled = smooth_noise(64, 64, 0), smooth_noise(64, 64, 1)

    linear = torch.load(
        Path(lpips_module.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected, taps = 0.0, (1, 4, 7, 9, 11)
    with torch.inference_mode():
        maps = []
        for picture in (filled, truth):
            x = ((torch.from_numpy(picture.copy()) / 127.5 - 1 - shift) / scale).permute(2, 0, 1)[None]
            maps.append([])
            for index, layer in enumerate(backbone):
                x = layer(x)
                if index in taps:
                    maps[-1].append(x / x.norm(dim=1, keepdim=True))
        for level, (a, b) in enumerate(zip(*maps)):
            expected += float((linear[f"lin{level}.model.1.weight"] * (a - b) ** 2).sum(1).mean())
    assert measure.scores(filled, truth)["lpips"] == pytest.approx(expected, rel=1e-4)

    torch.save({**state, "features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    other = Metrics(("lpips",), lpips=tmp_path / "other.pth")
    assert "names and shapes do not fit. wrong shape (7)" in other.missing["lpips"]
    assert len(other.missing["lpips"]) <= 480
    assert "does not exist" in Metrics(("lpips",), lpips=tmp_path / "none.pth").missing["lpips"]


def test_a_backbone_that_cannot_be_downloaded_names_its_file_and_address(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.hub.set_dir(str(tmp_path / "hub"))

    def refuse(url, file, **options):
        raise URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(WeightsError, match=r"alexnet-owt-7be5be79.pth.*not known.*`lpips`.*https://"):
        metrics_module._alexnet_file()
    assert Metrics(("lpips",)).missing["lpips"].endswith("alexnet-owt-7be5be79.pth")
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"")
    assert metrics_module._alexnet_file() == tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"


@pytest.fixture(autouse=True)
def _hub_directory():
    yield
    torch.hub._hub_dir = None


def test_extras_that_are_not_installed_are_named(monkeypatch, pictures):
    hole = box_mask(20, 20, (5, 5, 10, 10))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"lgnet-fast\[eval\]"):
        telea(noise(20, 20), hole)
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    with pytest.raises(MissingExtraError, match=r"scikit-image.*lgnet-fast\[eval\]"):
        biharmonic(noise(20, 20), hole)
    result = invoke_eval("-i", pictures, "-o", pictures.parent / "out", "--metrics", "l1", "--size", 64)
    assert result.exit_code == 2
    assert result.stderr.strip().count("\n") == 0
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(MissingExtraError, match=r"scikit-image.*lgnet-fast\[eval\]"):
        Metrics()
