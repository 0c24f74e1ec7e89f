"""GConv: names, parameters and outputs of the original; padding, sampling and fusion; checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench.peers.adapter import adapt
from bench.peers.gconv import Conv, GConv, _fuse, subsample
from lgnet_fast.errors import WeightsError
from tests.peers_support import (
    PEERS,
    check_golden,
    check_keys,
    check_loaded,
    checkpoint_like,
    example,
    hooked,
    with_weights,
)
from tests.support import assert_accurate


@pytest.fixture(scope="module")
def network():
    return with_weights(GConv(), "GCONV")


def test_names_and_parameters(network):
    check_keys(network, "GCONV")
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in network.named_children()}
    assert sum(counts.values()) == 4_052_478
    assert sum(n for name, n in counts.items() if name.startswith("conv")) == 1_631_151


def test_outputs_of_the_original(network):
    """Through the adapter, whose pictures are red first where the network's are blue first."""
    picture, hole = example()
    image = (2 * picture - 1).flip(1)
    (first, output), result = hooked("GConv", network, image, hole)
    check_golden(first, "GCONV", "stage1")
    check_golden(output, "GCONV", "output")
    assert torch.equal(result, torch.where(hole > 0, output.flip(1), image))


def test_gated_convolution_by_its_definition():
    """Strided: zeros are added at the bottom and the right only."""
    torch.manual_seed(0)
    layer = Conv(3, 4, stride=2)
    x = torch.randn(1, 3, 6, 8)
    y = F.conv2d(F.pad(x, (0, 1, 0, 1)), layer.conv.weight, layer.conv.bias, stride=2)
    assert_accurate("out", layer(x), F.elu(y[:, :4]) * torch.sigmoid(y[:, 4:]), roundings=16)
    assert layer(x).shape == (1, 4, 3, 4)


def test_sampled_rows():
    x = torch.arange(64.0).view(1, 1, 64, 1).expand(1, 1, 64, 4)
    assert subsample(x, 32, 2)[0, 0, :, 0].tolist() == [*range(0, 32, 2), *range(33, 64, 2)]
    x = torch.arange(256.0).view(1, 1, 256, 1)
    assert subsample(x, 64, 1)[0, 0, :12, 0].tolist() == [*range(0, 41, 4), 45]


def test_fusion_by_its_definition():
    """On a map that is not square, so that rows and columns cannot be taken for one another."""
    height, width = 3, 4
    length = height * width
    scores = torch.randn(length, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def fused(a):
        padded = F.pad(a, (1, 1, 1, 1))
        return padded[:-2, :-2] + a + padded[2:, 2:]

    by_column = torch.tensor([y * width + x for x in range(width) for y in range(height)])
    expected = torch.empty_like(scores)
    expected[by_column[:, None], by_column] = fused(fused(scores)[by_column][:, by_column])
    found = _fuse(scores.view(1, length, height, width), height, width)
    assert_accurate("fused", found.reshape(length, length), expected)


def test_pictures_of_a_batch_do_not_meet(network):
    """In the adapter; the network itself takes the first picture's mask for all, as the original does."""
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    mask = torch.zeros(2, 1, 32, 48)
    mask[0, :, :9, :20] = 1
    mask[1, :, 12:30, 30:] = 1
    run = adapt("GConv", network)
    with torch.inference_mode():
        together = run(image, mask)
        single = torch.cat([run(image[i : i + 1], mask[i : i + 1]) for i in range(2)])
        raw = network(image * (1 - mask), mask)[1]
        second = network(image[1:] * (1 - mask[1:]), mask[1:])[1]
    assert_accurate("batch", together, single, roundings=64)
    assert (raw[1:] - second).abs().max() > 1e-4


def test_tensorflow_variables():
    shapes = json.loads((PEERS / "GCONV_tf_vars.json").read_text())
    generator = np.random.default_rng(0)
    variables = {name: generator.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    network = GConv.from_tensorflow({**variables, "discriminator/conv1/kernel": np.zeros((5, 5, 4, 64))})
    assert not network.training
    state = network.state_dict()
    assert {GConv.tensorflow_name(key) for key in state} == set(shapes)
    for key, tensor in state.items():
        array = variables[GConv.tensorflow_name(key)]
        assert np.array_equal(tensor.numpy(), array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
    del variables["inpaint_net/conv13_upsample/conv13_upsample_conv/kernel"]
    with pytest.raises(WeightsError, match=r"missing \(1\): conv13_upsample.conv.conv.weight"):
        GConv.from_tensorflow(variables)


@pytest.mark.parametrize("bare", [True, False])
def test_checkpoint(tmp_path, bare):
    file = tmp_path / "states_tf_places2.pth"
    state = checkpoint_like("GCONV")
    torch.save(state if bare else {"G": state}, file)
    check_loaded(GConv.from_checkpoint(file), "GCONV")


def test_wrong_shapes(network):
    with pytest.raises(ValueError, match=r"image: expected \[B, 3, H, W\] with multiples of 8, got \[1, 3, 64, 60\]"):
        network(torch.zeros(1, 3, 64, 60), torch.zeros(1, 1, 64, 60))
    with pytest.raises(ValueError, match=r"mask: expected \[1, 1, 64, 64\] to fit image, got \[1, 3, 64, 64\]"):
        network(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
