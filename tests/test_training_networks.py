"""The networks of a configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lgnet_fast import WeightsError, create_model
from lgnet_fast.reference.discriminator import Discriminator
from lgnet_fast.reference.features import register_features
from lgnet_fast.reference.vgg import VGG16Features
from lgnet_fast.training import ConfigError, DataError, Trainer
from lgnet_fast.training.config import LossConfig, config_of
from lgnet_fast.training.networks import keep_spectral_norm_wide, make_discriminator, make_features, make_lpips
from lgnet_fast.training.trainer import train
from tests.support import released_state
from tests.test_features import weights
from tests.training_support import (
    TINY,
    Features,
    batch,
    own_threads,  # noqa: F401
    tiny_settings,
    write_pictures,
)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def test_wide_spectral_norm_is_the_same_function():
    torch.manual_seed(0)
    a = Discriminator(channels=4).train()
    b = Discriminator(channels=4).train()
    b.load_state_dict(a.state_dict())
    keep_spectral_norm_wide(b)
    x = batch()["image"]
    for _ in range(2):
        assert torch.equal(a(x), b(x))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        b(x)
        weight = b.encoder[0].weight
    assert weight.dtype == torch.float32


def test_slim_discriminator_has_the_papers_shape_at_its_width(tmp_path):
    config = config_of({"discriminator": {"channels": 16, "variant": "paper"}})
    slim, full = make_discriminator(config.discriminator), make_discriminator(config_of({}).discriminator)
    assert [m.out_channels for m in slim.encoder if isinstance(m, nn.Conv2d)] == [16, 32, 64, 128]
    assert sum(p.numel() for p in full.parameters()) == 4_318_401
    assert slim.state_dict().keys() == full.state_dict().keys()
    assert slim(batch()["image"]).shape == (2, 1, 32, 32)
    torch.save(released_state("D", torch.float32), tmp_path / "200_net_D.pth")
    loaded = make_discriminator(
        config_of({"discriminator": {"init_from": str(tmp_path / "200_net_D.pth")}}).discriminator
    )
    assert torch.equal(loaded.classifier.weight, released_state("D", torch.float32)["classifier.weight"])
    assert loaded.training


def test_feature_networks_by_configuration(tmp_path):
    register_features("mine", Features)
    assert isinstance(make_features(LossConfig(features="mine")), Features)
    assert isinstance(make_features(LossConfig(features="lgnet_fast.reference.vgg:VGG16Features")), VGG16Features)
    with pytest.raises(ConfigError, match="loss.features: expected package.module:function, got 'nowhere:at_all'"):
        make_features(LossConfig(features="nowhere:at_all"))
    np.savez(tmp_path / "vgg.npz", **weights("vgg16", convolutions=7))
    file = str(tmp_path / "vgg.npz")
    assert make_features(LossConfig(features=file, features_normalised=True)).normalised
    with pytest.raises(WeightsError, match="expected a SHA-256 of '0000"):
        make_features(LossConfig(features=file, features_sha256="00" * 32))
    assert make_features(LossConfig(features=file, style=0, perceptual=0)) is None
    assert make_lpips(LossConfig()) is None


def test_networks_by_configuration(pictures, tmp_path):
    settings = tiny_settings(pictures, tmp_path)
    settings["model"] = {"init_from": "bundled"}
    assert Trainer(config_of(settings)).network.channels == (32, 32, 32)
    settings["model"] = {"factory": "tests.test_training_networks:make_small"}
    assert Trainer(config_of(settings)).network.channels == (2, 2, 2)
    for model, text in (
        ({"name": "lgnett"}, "^model.name: expected one of .*'lgnett'"),
        ({"name": "lgnett", "init_from": "bundled"}, "^model.name: expected one of .*'lgnett'"),
        ({"overrides": {"width": 3}}, "model: .*width"),
        ({"factory": "nowhere:x"}, "^model.factory: expected package.module:function, got 'nowhere:x'"),
        (
            {"factory": "nowhere:x", "init_from": "bundled"},
            "model.factory: it makes the whole model; leave init_from",
        ),
        ({"factory": "nowhere:x", "overrides": TINY}, "model.factory: it makes the whole model; leave init_from"),
        ({"factory": "math:isqrt2"}, "model.factory: expected package.module:function"),
        ({"factory": "tests.training_support:dict"}, "model.factory"),
        ({"factory": ":x"}, "model.factory: expected package.module:function, got ':x'"),
        ({"factory": "os:sep"}, "model.factory: expected package.module:function, got 'os:sep' .it is of type str"),
        ({"factory": "math:isqrt"}, "model.factory: expected a function without arguments, got math:isqrt"),
        ({"backend": "nope"}, "model.backend: expected one of .*'nope'"),
    ):
        settings["model"] = model
        with pytest.raises(ConfigError, match=text):
            Trainer(config_of(settings))


def make_small():
    return create_model("lgnet_demo", **TINY)


def test_weights_that_cannot_be_downloaded_name_the_setting(monkeypatch):
    def missing(**options):
        raise WeightsError("weights: VGG-16 is not at a and could not be downloaded (b). Download c")

    monkeypatch.setattr(VGG16Features, "from_torchvision", missing)
    with pytest.raises(WeightsError, match=r"^loss.features: VGG-16 is not at a .* Download c; or name the file as"):
        make_features(LossConfig())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("model.init_from", "expected a model directory or a hub id 'owner/name', got 'nothing.pth'"),
        ("discriminator.init_from", "expected a checkpoint file, got nothing.pth, which does not exist"),
        ("loss.features", "expected a file of VGG-16 .*, got 'nothing.pth', which does not exist"),
        ("loss.lpips_weights", "expected a file of VGG-16 .*, got 'nothing.pth', which does not exist"),
    ],
)
def test_weights_that_are_not_there_name_the_setting(pictures, tmp_path, setting, text):
    settings = tiny_settings(pictures, tmp_path)
    section, _, name = setting.partition(".")
    settings |= {"model": {}, "discriminator": {}, "loss": {"features": None}}
    settings["loss"]["lpips"] = float(name == "lpips_weights")
    settings[section] = {**settings.get(section, {}), name: "nothing.pth"}
    with pytest.raises(WeightsError, match=f"^{setting}: {text}"):
        Trainer(config_of(settings))


def test_a_run_without_pictures_ends_before_weights_are_loaded(monkeypatch):
    monkeypatch.setattr(VGG16Features, "from_torchvision", lambda **options: pytest.fail("loaded"))
    with pytest.raises(DataError, match=r"^data.pictures: expected folders of pictures .*, got none"):
        train(config_of({}))
