"""PEN: names, parameters and outputs of the original; its attention against a plain definition; checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from bench.peers.contextual import patches
from bench.peers.pen import PEN, AttentionTransfer
from lgnet_fast.errors import WeightsError
from tests.peers_support import check_golden, check_keys, check_loaded, checkpoint_like, example, hooked, with_weights
from tests.support import assert_accurate


@pytest.fixture(scope="module")
def network():
    return with_weights(PEN(), "PEN")


def test_names_and_parameters(network):
    check_keys(network, "PEN")
    assert sum(p.numel() for p in network.parameters()) == 10_231_538
    parts = {"at_conv04": 590_080, "at_conv05": 0, "up_conv05": 2_359_808, "torgb1": 195, "decoder": 19_331}
    assert {name: sum(p.numel() for p in network.get_submodule(name).parameters()) for name in parts} == parts


def test_outputs_of_the_original(network):
    """Through the adapter, which must prepare inputs like the authors' code."""
    picture, hole = example()
    image = 2 * picture - 1
    (pyramid, output), result = hooked("PEN", network, image, hole)
    check_golden(output, "PEN", "output")
    check_golden(pyramid[0], "PEN", "pyramid_1")
    check_golden(pyramid[4], "PEN", "pyramid_5")
    assert [level.shape[-1] for level in pyramid] == [128, 64, 32, 16, 8]
    assert torch.equal(result, torch.where(hole > 0, output, image))


@pytest.mark.parametrize("size", [1, 3])
def test_attention_by_its_definition(size):
    """Position by position and patch by patch, in float64, on a map that is not square."""
    generator = torch.Generator().manual_seed(size)
    height, width, margin = 3, 4, size // 2
    deep = torch.randn(1, 5, height, width, generator=generator, dtype=torch.float64)
    shallow = torch.randn(1, 2, 2 * height, 2 * width, generator=generator, dtype=torch.float64)
    mask = torch.zeros(1, 1, 2 * height, 2 * width, dtype=torch.float64)
    mask[..., 0, :3] = 1

    small = F.pad(F.interpolate(mask, size=(height, width), mode="bilinear", align_corners=True), [margin] * 4)
    padded, source = F.pad(deep, [margin] * 4)[0], F.pad(shallow, [1] * 4)[0]
    positions = [(y, x) for y in range(height) for x in range(width)]
    windows = [padded[:, y : y + size, x : x + size] for y, x in positions]
    known = torch.stack([(small[0, 0, y : y + size, x : x + size].sum() == 0).double() for y, x in positions])
    assert 0 < known.sum() < len(positions)
    expected = torch.zeros(2, 2 * height + 2, 2 * width + 2, dtype=torch.float64)
    for (y, x), window in zip(positions, windows):
        scores = torch.stack([(window * other).sum() / other.norm() for other in windows])
        weights = (torch.softmax(10 * scores * known, 0) * known).clamp_min(1e-8)
        for weight, (v, u) in zip(weights, positions):
            expected[:, 2 * y : 2 * y + 4, 2 * x : 2 * x + 4] += (
                weight / 4 * source[:, 2 * v : 2 * v + 4, 2 * u : 2 * u + 4]
            )
    found = AttentionTransfer(2, size, combine=False)(shallow, deep, mask)
    assert_accurate("found", found[0], expected[:, 1:-1, 1:-1])


def test_patches_are_row_by_row():
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    found = patches(x, 4, stride=2)
    assert found.shape == (6, 2, 4, 4)
    padded = F.pad(x, [1] * 4)[0]
    assert torch.equal(found[4], padded[:, 2:6, 2:6])


def test_pictures_of_a_batch_do_not_meet(network):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 4, 64, 128, generator=generator)
    mask = (torch.rand(2, 1, 64, 128, generator=generator) > 0.7).float()
    with torch.inference_mode():
        together = network(x, mask)[1]
        single = torch.cat([network(x[i : i + 1], mask[i : i + 1])[1] for i in range(2)])
    assert_accurate("batch", together, single, roundings=128)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_initialisation():
    torch.manual_seed(0)
    network = PEN()
    weight = network.up_conv05[0].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean().item()) < 5 * 0.02 / math.sqrt(weight.numel())
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_checkpoint(tmp_path):
    file = tmp_path / "gen_00460.pth"
    torch.save({"netG": checkpoint_like("PEN")}, file)
    check_loaded(PEN.from_checkpoint(file), "PEN")
    torch.save({"netD": checkpoint_like("PEN")}, file)
    with pytest.raises(WeightsError, match="expected a state dict, or a dict with one as 'netG'"):
        PEN.from_checkpoint(file)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="expected a readable checkpoint"):
        PEN.from_checkpoint(file)
    with pytest.raises(WeightsError, match="expected a readable checkpoint"):
        PEN.from_checkpoint(tmp_path / "absent.pth")


def test_wrong_shapes(network):
    with pytest.raises(ValueError, match=r"x: expected \[B, 4, H, W\] with multiples of 64, got \[1, 4, 96, 64\]"):
        network(torch.zeros(1, 4, 96, 64), torch.zeros(1, 1, 96, 64))
    with pytest.raises(ValueError, match=r"mask: expected \[1, 1, 64, 64\] to fit x, got \[1, 3, 64, 64\]"):
        network(torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64))
