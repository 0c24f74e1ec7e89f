"""The discriminator: the released network's scores, map sizes, weights loading."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from lgnet_fast import WeightsError
from lgnet_fast.reference.discriminator import Discriminator
from tests.support import CONFORMANCE, assert_accurate, case, keys, released_state


@pytest.fixture(scope="module")
def net() -> Discriminator:
    return Discriminator.from_released(released_state("D"))


def test_scores_of_the_released_network(net):
    image, _ = case("disc", 2, 256, 256)
    with torch.no_grad():
        scores = net(image)
    assert scores.dtype == torch.float64
    expected = torch.from_numpy(np.load(CONFORMANCE / "discriminator.npz")["y"])
    # Five layers, scores of 1e6: results of two processors differ in the last 15 bits.
    assert_accurate("scores", scores, expected, roundings=2**20)


@pytest.mark.parametrize(("variant", "side"), [("released", 27), ("paper", 32)])
def test_map_size_names_and_parameter_count(variant, side):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = Discriminator(variant)
        with torch.no_grad():
            scores = net(torch.zeros(1, 3, 256, 256))
    assert scores.shape == (1, 1, side, side)
    assert net.map_size(256, 256) == (side, side)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == keys()["shapes"]["D"]
    assert sum(p.numel() for p in net.parameters()) == 4_318_401


def test_a_new_one_has_the_papers_initialisation():
    torch.manual_seed(0)
    state = Discriminator().state_dict()
    for name in ("encoder.2.weight_orig", "encoder.6.weight_orig", "classifier.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.03)
    assert not state["classifier.bias"].any()


def test_power_iteration_moves_in_training_only(net):
    net = Discriminator.from_released(net.state_dict())
    image = case("disc", 1, 64, 64)[0]
    u = net.state_dict()["encoder.2.weight_u"].clone()
    net.eval()(image)
    assert torch.equal(net.state_dict()["encoder.2.weight_u"], u)
    net.train()(image)
    assert not torch.equal(net.state_dict()["encoder.2.weight_u"], u)
    for _ in range(30):
        net.encoder[0](image)
    weight = net.state_dict()["encoder.0.weight_orig"].flatten(1)
    spectral = net.encoder[0].weight.flatten(1)
    assert torch.linalg.matrix_norm(spectral, 2).item() == pytest.approx(1.0, rel=1e-3)
    assert torch.allclose(weight / torch.linalg.matrix_norm(weight, 2), spectral, rtol=1e-3)


def test_two_forward_passes_then_one_backward(net):
    net = Discriminator.from_released(net.state_dict()).train()
    image = case("disc", 2, 64, 64)[0].requires_grad_()
    (net(image).sum() + net(image.flip(3)).sum()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in net.parameters())
    assert image.grad.any()


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_smallest_picture(variant):
    net = Discriminator(variant)
    side = net._smallest_side()
    assert net(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    if side > 1:
        with pytest.raises(ValueError, match=f"picture: .*needs {side}"):
            net(torch.zeros(1, 3, side - 1, side))


@pytest.mark.parametrize(
    ("picture", "error", "text"),
    [
        (np.zeros((1, 3, 64, 64)), TypeError, "picture: expected a torch.Tensor, got ndarray"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "picture: expected a floating dtype"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"picture: expected \[B, 3, H, W\], got \[1, 4, 64, 64\]"),
        (torch.zeros(3, 64, 64), ValueError, r"picture: expected \[B, 3, H, W\]"),
    ],
)
def test_wrong_pictures(net, picture, error, text):
    with pytest.raises(error, match=text):
        net(picture)


def test_unknown_variant_and_no_width():
    with pytest.raises(ValueError, match="variant: expected one of"):
        Discriminator("theirs")
    with pytest.raises(ValueError, match="channels: expected a positive integer, got 0"):
        Discriminator(channels=0)


# -- weights ----------------------------------------------------------------------------------------------------


def test_from_a_file_with_module_prefix_and_half_precision(tmp_path):
    state = {f"module.{k}": v.half() for k, v in released_state("D").items()}
    file = tmp_path / "200_net_D.pth"
    torch.save(state, file)
    net = Discriminator.from_released(file, variant="paper")
    assert net.padding == 2
    assert not net.training
    assert all(p.dtype == torch.float32 and p.requires_grad and not p.is_meta for p in net.parameters())
    assert torch.equal(net.classifier.weight, state["module.classifier.weight"].float())
    assert torch.isfinite(net(torch.zeros(1, 3, 64, 64))).all()


def test_does_not_share_memory_with_the_callers_tensors():
    state = released_state("D")
    net = Discriminator.from_released(state).train()
    net(case("disc", 1, 64, 64)[0])
    assert torch.equal(state["encoder.0.weight_u"], released_state("D")["encoder.0.weight_u"])


def test_wrong_names_and_shapes_are_listed():
    state = released_state("D")
    del state["encoder.4.weight_u"]
    state["encoder.4.wieght_u"] = torch.zeros(256)
    state["classifier.weight"] = torch.zeros(1, 512, 3, 3)
    with pytest.raises(WeightsError) as caught:
        Discriminator.from_released(state)
    text = str(caught.value)
    assert "missing (1): encoder.4.weight_u" in text
    assert "unexpected (1): encoder.4.wieght_u" in text
    assert "classifier.weight: expected [1, 512, 5, 5], got [1, 512, 3, 3]" in text


def test_unusable_sources(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        Discriminator.from_released(tmp_path / "none_net_D.pth")
    with pytest.raises(WeightsError, match="expected a state dict"):
        Discriminator.from_released({"classifier.weight": 1.0})
    with pytest.raises(TypeError, match="source: expected a path or a state dict, got int"):
        Discriminator.from_released(3)
