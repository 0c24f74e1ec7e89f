"""RFR: names, parameters and outputs of the original; its partial convolution and its attention's memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.peers.rfr import RFR, KnowledgeConsistentAttention, Memory, PartialConv2d
from lgnet_fast.errors import WeightsError
from tests.peers_support import check_golden, check_keys, example, keys, with_weights
from tests.support import assert_accurate


@pytest.fixture(scope="module")
def network() -> RFR:
    return with_weights(RFR(), "RFR")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_names_and_parameters(network):
    check_keys(network, "RFR")
    assert list(network.state_dict()) == list(keys("RFR"))
    assert parameters(network) == 31_224_065
    unet = network.RFRModule
    parts = {
        network.Pconv1: 9_408, network.Pconv2: 200_704, network.Pconv21: 200_704, network.Pconv22: 200_704,
        unet.enc_1: 73_984, unet.enc_2: 295_424, unet.enc_3: 1_180_672, unet.enc_6: 2_360_320, unet.att: 524_801,
        unet.dec_5: 4_719_616, unet.dec_3: 8_389_632, unet.dec_2: 3_146_240, unet.dec_1: 393_344,
        network.Tconv: 65_536, network.tail1: 19_296, network.tail2: 1_184, network.out: 1_728,
    }  # fmt: skip
    assert {name: parameters(m) for name, m in network.named_modules() if m in parts} == {
        name: parts[m] for name, m in network.named_modules() if m in parts
    }


def test_output_of_the_original(network):
    picture, hole = example()
    known = (1 - hole).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        check_golden(network(picture * known, known), "RFR", "output")


def test_pictures_and_calls_do_not_meet(network):
    """The attention's memory is of one call, and each picture of a batch has its own keys."""
    generator = torch.Generator().manual_seed(1)
    known = (torch.rand(2, 1, 32, 48, generator=generator) > 0.4).float().expand(-1, 3, -1, -1)
    image = torch.rand(2, 3, 32, 48, generator=generator) * known
    with torch.inference_mode():
        alone = torch.cat([network(image[i : i + 1], known[i : i + 1]) for i in range(2)])
        assert_accurate("batch", network(image, known), alone, roundings=2**10)


def test_partial_convolution():
    conv = PartialConv2d(2, 3, 3).double()
    conv.ones = conv.ones.double()
    torch.manual_seed(0)
    x, mask = torch.rand(1, 2, 8, 8, dtype=torch.float64), torch.ones(1, 2, 8, 8, dtype=torch.float64)
    mask[..., 4:] = 0
    y, updated = conv(x, mask)
    # In float32, as 1e-8 is added to the number of known values.
    assert_accurate("known", y[..., 1:-1, 1:3].float(), F.conv2d(x, conv.weight)[..., 0:2])  # all known: a plain one
    assert (y[..., 5:] == 0).all()  # nothing known
    # Half of the window's columns known in column 3 + 1: 6 of 18 values, so three times as much.
    expected = 3 * F.conv2d(x * mask, conv.weight)[..., 3]
    assert_accurate("half known", y[..., 1:-1, 4].float(), expected)
    assert torch.equal(updated[0, :, 4], torch.tensor([1.0] * 5 + [0.0] * 3).double().expand(3, 8))


def test_attention_remembers_where_it_knew():
    attention = KnowledgeConsistentAttention()
    with torch.no_grad():
        attention.ratio.fill_(-0.5)
    features = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 16, 16)
    mask[..., 8:] = 0
    with torch.no_grad():
        _, first = attention(features, mask, None)
        assert torch.equal(first.known[0, 0, 0], torch.tensor([1.0, 1, 0, 0]))
        assert_accurate("sums", first.weights.sum(1), torch.ones(1, 4, 4), roundings=16)
        before = Memory(first.weights.flip(1), first.known)
        attended, second = attention(features, mask, before)
    mean = (before.weights + 0.5 * first.weights) / 1.5
    assert_accurate("mean", second.weights[..., :2], mean[..., :2], roundings=64)
    assert_accurate("kept", second.weights[..., 2:], first.weights[..., 2:], roundings=64)
    keys_ = F.normalize(features.flatten(2) + 1e-7, dim=1)[0]
    assert_accurate("attended", attended[0].flatten(1), keys_ @ second.weights[0].flatten(1), roundings=16)


def test_checkpoint(tmp_path):
    # One number a tensor, expanded: a small file with the names and shapes of the original's.
    state = {
        key: torch.full((1,), 3).expand(shape) if key.endswith("tracked") else torch.full((1,), i / 8).expand(shape)
        for i, (key, shape) in enumerate(keys("RFR").items())
        if shape
    }
    state |= {key: torch.tensor(7) for key, shape in keys("RFR").items() if not shape}
    file = tmp_path / "g_300000.pth"
    torch.save({"n_iter": 300_000, "generator": state, "optimizer_G": {"state": {}, "param_groups": []}}, file)
    network = RFR.from_checkpoint(file)
    assert not network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    del state["out.weight"]
    torch.save({"generator": state}, file)
    with pytest.raises(WeightsError, match=r"g_300000\.pth.*out\.weight"):
        RFR.from_checkpoint(file)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="file: expected a readable checkpoint of tensors only"):
        RFR.from_checkpoint(file)


@pytest.mark.parametrize(
    ("image", "mask", "text"),
    [
        (
            (1, 3, 40, 64),
            (1, 3, 40, 64),
            r"image: expected \[B, 3, H, W\] with multiples of 16, got \[1, 3, 40, 64\]",
        ),
        ((1, 4, 64, 64), (1, 3, 64, 64), "image: expected"),
        ((1, 3, 64, 64), (1, 1, 64, 64), r"mask: expected \[1, 3, 64, 64\] to fit image, got \[1, 1, 64, 64\]"),
    ],
)
def test_wrong_shapes(network, image, mask, text):
    with pytest.raises(ValueError, match=text):
        network(torch.zeros(image), torch.zeros(mask))
