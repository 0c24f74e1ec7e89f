"""MADF: names, parameters and outputs of the original; dynamic filtering against a plain definition; checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.peers.madf import IMAGENET_MEAN, IMAGENET_STD, MADF, DynamicConv, PointwiseNorm
from lgnet_fast.errors import WeightsError
from tests.peers_support import check_golden, check_keys, check_loaded, checkpoint_like, example, hooked, with_weights
from tests.support import assert_accurate


@pytest.fixture(scope="module")
def network():
    return with_weights(MADF(), "MADF")


def test_names_and_parameters(network):
    check_keys(network, "MADF")
    assert sum(p.numel() for p in network.parameters()) == 85_141_214
    parts = {"filter_gen_1": 82_336, "enc_conv_7": 256, "enc_up_3": 16_640, "deconv_4": 2_097_920, "att_conv_1": 246,
             "dec_ref0_5": 5_965_440, "dec_ref1_2": 352_576, "dec_ref0_1": 222, "dec_ref1_1": 231}  # fmt: skip
    assert {name: sum(p.numel() for p in network.get_submodule(name).parameters()) for name in parts} == parts


def test_outputs_of_the_original(network):
    """Through the adapter, which must normalise and mask like the authors' code."""
    picture, hole = example()
    image = 2 * picture - 1
    pictures, result = hooked("MADF", network, image, hole)
    for output, name in zip(pictures, ("recovery", "refine0", "output"), strict=True):
        check_golden(output, "MADF", name)
    std, mean = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_STD, IMAGENET_MEAN))
    filled = (2 * (pictures[-1] * std + mean) - 1).clamp(-1, 1)
    assert_accurate("result", result, torch.where(hole > 0, filled, image), roundings=8)


def test_dynamic_filtering_by_its_definition():
    """One position and one output channel at a time, on a map that is not square."""
    torch.manual_seed(0)
    layer = DynamicConv(2).double().eval()  # 5x5, 16 -> 32 channels
    torch.nn.init.constant_(layer.bn.weight, 7.0)  # never applied
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    filters = torch.randn(2, 16, 5, 5, 32, 2, 3, dtype=torch.float64)
    found = layer(x, filters.view(2, -1, 2, 3))
    assert found.shape == (2, 32, 2, 3)
    padded = F.pad(x, [2] * 4)
    for position in ((0, 3, 0, 0), (1, 31, 1, 2), (1, 0, 1, 0)):
        b, channel, row, column = position
        window = padded[b, :, 2 * row : 2 * row + 5, 2 * column : 2 * column + 5]
        expected = (window * filters[b, :, :, :, channel, row, column]).sum().clamp_min(0)
        assert found[position].item() == pytest.approx(expected.item(), abs=1e-12)
    assert (found > 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_pointwise_norm_by_its_definition():
    torch.manual_seed(0)
    norm = PointwiseNorm(4).eval()
    norm.batch_norm.running_mean.uniform_()
    norm.batch_norm.running_var.uniform_(0.5, 2)
    x, label = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 3, 3)
    shared = norm.mlp_shared(F.interpolate(label, size=(6, 6), mode="bilinear", align_corners=False))
    mean, variance = (v.view(1, 4, 1, 1) for v in (norm.batch_norm.running_mean, norm.batch_norm.running_var))
    expected = (x - mean) / (variance + 1e-5).sqrt() * (1 + norm.mlp_scale(shared)) + norm.mlp_bias(shared)
    assert_accurate("out", norm(x, label), expected, roundings=16)
    assert (norm.mlp_shared(label) >= 0).all()


def test_pictures_of_a_batch_do_not_meet(network):
    generator = torch.Generator().manual_seed(3)
    known = (torch.rand(2, 1, 128, 128, generator=generator) > 0.3).float().expand(-1, 3, -1, -1)
    image = torch.randn(2, 3, 128, 128, generator=generator) * known
    with torch.inference_mode():
        together = network(image, known)[-1]
        single = torch.cat([network(image[i : i + 1], known[i : i + 1])[-1] for i in range(2)])
    assert_accurate("batch", together, single, roundings=128)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_checkpoint(tmp_path):
    """As its authors save it: prefixed, other entries beside; the norms that are never applied may be missing."""
    file = tmp_path / "places2.pth"
    state = {f"module.model.{key}": value for key, value in checkpoint_like("MADF").items()}
    torch.save({"model": {**state, "module.loss.weight": torch.zeros(2)}, "n_iter": 7}, file)
    check_loaded(MADF.from_checkpoint(file), "MADF")
    del state["module.model.dec_ref1_4.bn.mlp_bias.weight"]
    torch.save({"model": {key: value for key, value in state.items() if ".enc_conv_" not in key}}, file)
    with pytest.raises(WeightsError, match=r"missing \(1\): dec_ref1_4.bn.mlp_bias.weight$"):
        MADF.from_checkpoint(file)


def test_wrong_shapes(network):
    with pytest.raises(
        ValueError, match=r"image: expected \[B, 3, H, W\] with multiples of 128, got \[1, 3, 64, 128\]"
    ):
        network(torch.zeros(1, 3, 64, 128), torch.zeros(1, 3, 64, 128))
    with pytest.raises(ValueError, match=r"mask: expected \[1, 3, 128, 128\] to fit image, got \[1, 1, 128, 128\]"):
        network(torch.zeros(1, 3, 128, 128), torch.zeros(1, 1, 128, 128))
