"""VGG-16's features: shapes, frozen weights, and loading torchvision's file."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lgnet_fast import WeightsError
from lgnet_fast.reference.vgg import WEIGHTS_FILE, VGG16Features
from tests.support import assert_accurate, recipe

CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}


def state(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The recipe's weights under the names of the plain Sequential."""
    out = {}
    for index, (width_in, width_out) in CONVS.items():
        for leaf, shape in (("weight", (width_out, width_in, 3, 3)), ("bias", (width_out,))):
            key = f"{index}.{leaf}"
            out[key] = torch.from_numpy(recipe.parameter("VGG", key, shape)).to(dtype)
    return out


def torchvision_file(directory: Path, name: str = WEIGHTS_FILE) -> Path:
    """A file laid out as torchvision's: all of VGG-16's names (later shapes are made up)."""
    full = {f"features.{k}": v for k, v in state().items()}
    full |= {f"features.{i}.{leaf}": torch.zeros(1) for i in (17, 19, 21, 24, 26, 28) for leaf in ("weight", "bias")}
    full |= {f"classifier.{i}.{leaf}": torch.zeros(1) for i in (0, 3, 6) for leaf in ("weight", "bias")}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(full, directory / name)
    return directory / name


def test_names_and_shapes_are_torchvisions():
    assert {k: v.shape for k, v in VGG16Features().state_dict().items()} == {k: v.shape for k, v in state().items()}


def test_features_after_each_pool():
    net = VGG16Features().double()
    net.load_state_dict(state(torch.float64))
    x = torch.from_numpy(recipe.image("vgg", 2, 40, 24)).requires_grad_()
    features = net(x)
    assert [list(f.shape) for f in features] == [[2, 64, 20, 12], [2, 128, 10, 6], [2, 256, 5, 3]]
    weights, expected, y = state(torch.float64), [], x.detach()
    for index in CONVS:
        y = F.conv2d(y, weights[f"{index}.weight"], weights[f"{index}.bias"], padding=1).clamp(min=0)
        if index in (2, 7, 14):
            y = F.max_pool2d(y, 2)
            expected.append(y)
    for got, want in zip(features, expected):
        assert_accurate("features", got, want)
    sum(f.sum() for f in features).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


def test_frozen_and_always_in_eval_mode():
    net = torch.nn.Sequential(VGG16Features()).train()[0]
    assert not net.training
    assert not any(layer.training for layer in net)
    assert not any(p.requires_grad for p in net.parameters())


def test_wrong_pictures():
    net = VGG16Features()
    with pytest.raises(TypeError, match="picture: expected a torch.Tensor, got ndarray"):
        net(np.zeros((1, 3, 32, 32)))
    with pytest.raises(ValueError, match=r"picture: expected \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        net(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="picture: expected H and W of at least 8"):
        net(torch.zeros(1, 3, 7, 32))


# -- weights ----------------------------------------------------------------------------------------------------


def test_from_torchvisions_full_file_or_plain_names(tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save(state(), plain)
    for file in (torchvision_file(tmp_path, "vgg16.pth"), plain):
        net = VGG16Features.from_torchvision(file)
        assert all(torch.equal(net.state_dict()[k], v) for k, v in state().items())
        assert not net.training
        assert not any(p.requires_grad or p.is_meta for p in net.parameters())


def test_a_given_files_hash_is_what_its_name_promises(tmp_path):
    with pytest.raises(WeightsError, match="expected a SHA-256 of '397923af'"):
        VGG16Features.from_torchvision(torchvision_file(tmp_path))


def test_the_hub_cache_is_used_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloaded"))
    torchvision_file(tmp_path / "checkpoints")
    assert torch.equal(VGG16Features.from_torchvision().state_dict()["0.bias"], state()["0.bias"])


def test_download_goes_into_the_hub_cache_with_its_hash(tmp_path, monkeypatch):
    asked = []

    def download(url, destination, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torchvision_file(Path(destination).parent)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert torch.equal(VGG16Features.from_torchvision().state_dict()["0.bias"], state()["0.bias"])
    assert asked == [("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")]


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("invalid hash value")])
def test_no_cache_and_no_network_is_one_clear_error(tmp_path, monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(WeightsError) as caught:
        VGG16Features.from_torchvision()
    text = str(caught.value)
    assert str(tmp_path / "checkpoints" / WEIGHTS_FILE) in text
    assert "Download https://download.pytorch.org/models/vgg16-397923af.pth" in text
    assert "from_torchvision(path)" in text


def test_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(WeightsError, match=r"which does not exist\. Download https://.*from_torchvision\(path\)"):
        VGG16Features.from_torchvision(tmp_path / "vgg.pth")


def test_files_of_other_networks_and_broken_files(tmp_path):
    file = tmp_path / "file.pth"
    # VGG-19's third block has a fourth convolution where VGG-16 has the pool.
    torch.save({f"features.{k}": v for k, v in state().items()} | {"features.16.weight": torch.zeros(1)}, file)
    for load in (VGG16Features.from_torchvision, VGG16Features.from_file):
        with pytest.raises(WeightsError, match=r"unexpected \(1\): 16.weight"):
            load(file)
    torch.save({"conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"missing \(14\).*unexpected \(1\): conv1.weight"):
        VGG16Features.from_torchvision(file)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(WeightsError, match="weights: "):
        VGG16Features.from_torchvision(file)


def test_torchvision_is_not_imported():
    code = "import sys, lgnet_fast.reference.vgg as v; v.VGG16Features(); assert 'torchvision' not in sys.modules"
    root = str(Path(__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
