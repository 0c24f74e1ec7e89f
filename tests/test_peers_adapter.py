"""The adapter for all compared networks, and their published figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.peers import LGNET_MS, PEERS
from bench.peers.adapter import REFINED, adapt
from tests.support import assert_accurate


@pytest.mark.parametrize("name", PEERS)
def test_published_facts(name):
    peer = PEERS[name]
    with torch.device("meta"):
        network = peer.constructor()
    assert sum(p.numel() for p in network.parameters()) == peer.parameters
    # The paper's tool does not count RFR's partial convolutions and its one scalar.
    missed = 630_817 if name == "RFR" else 0
    assert round((peer.parameters - missed) / 1e6, 2) == peer.published[0]


def test_the_papers_claim_about_speed():
    """LGNet is the fastest on the GPU, and only GConv and PEN are faster on the CPU."""
    cpu, gpu = LGNET_MS["LGNet"]
    assert {name for name, peer in PEERS.items() if peer.published_ms[0] < cpu} == {"GConv", "PEN"}
    assert all(peer.published_ms[1] > gpu for peer in PEERS.values())


class Recorder(nn.Module):
    """Stands for a network: records its inputs, returns one colour."""

    def __init__(self, colour: float) -> None:
        super().__init__()
        self.colour = colour

    def forward(self, image, mask):
        self.image, self.mask = image, mask
        return torch.full_like(image, self.colour)


@pytest.fixture
def case():
    """Two pictures of 256x256 with a gradient in red, 0.2 in green, 1 in blue; NaN-free garbage in the holes."""
    red = torch.linspace(-1, 1, 256).expand(2, 1, 256, 256)
    picture = torch.cat((red, torch.full_like(red, 0.2), torch.ones_like(red)), dim=1)
    mask = torch.zeros(2, 1, 256, 256)
    mask[0, :, 10:50, 60:200] = 1
    mask[1, :, 100:, :30] = 1
    return torch.where(mask > 0, torch.tensor(77.0), picture), mask


def test_rfr_convention(case):
    image, mask = case
    network = Recorder(0.75)
    result = adapt("RFR", network)(image, mask)
    assert torch.equal(network.mask, (1 - mask).expand_as(image))
    known = network.mask > 0
    assert_accurate("image", network.image[known], (image[known] + 1) / 2)
    assert not network.image[~known].any()
    assert torch.equal(result, torch.where(known, image, torch.tensor(0.5)))
    # Its output is linear; the result is a picture all the same.
    assert adapt("RFR", Recorder(9.0))(image, mask)[~known].max() == 1


def test_medfe_convention(case):
    image, mask = case
    network = Recorder(-0.25)
    result = adapt("MEDFE", network)(image, mask)
    assert network.image.shape[0] == 1  # one at a time; this is the last
    assert torch.equal(network.image, image[1:])
    assert torch.equal(network.mask, mask[1:])
    assert torch.equal(result, torch.where(mask > 0, torch.tensor(-0.25), image))
    assert torch.equal(adapt("MEDFE", network, merged=False)(image, mask), torch.full_like(image, -0.25))


def test_refined():
    """PEN_LG is PEN, then LGNet's local and global network."""
    assert REFINED == {"PEN_LG": "PEN", "MEDFE_LG": "MEDFE"}
    torch.manual_seed(0)
    pen = PEERS["PEN"].constructor()
    run = adapt("PEN_LG", pen)
    assert not run.training
    assert sum(p.numel() for p in run.parameters()) == 70_818_744
    image, mask = torch.rand(1, 3, 256, 256) * 2 - 1, torch.zeros(1, 1, 256, 256)
    mask[..., 40:90, 100:180] = 1
    with torch.inference_mode():
        stages = run(image, mask, return_stages=True)
        coarse = adapt("PEN", pen, merged=False)(image, mask)
    assert torch.equal(stages.coarse, coarse)
    assert (coarse - image)[mask.expand_as(image) == 0].abs().max() > 0.1  # raw, not merged
    assert len(stages.merged) == 3
    assert all(torch.equal(merged[mask.expand_as(image) == 0], image[mask.expand_as(image) == 0])
               for merged in stages.merged)  # fmt: skip
    with torch.device("meta"):
        assert sum(p.numel() for p in adapt("MEDFE_LG").parameters()) == 190_903_276


def test_bad_arguments(case):
    image, mask = case
    with pytest.raises(
        ValueError, match=r"name: expected one of \('PEN', 'GConv', .*'PEN_LG', 'MEDFE_LG'\), got 'pen'"
    ):
        adapt("pen")
    with pytest.raises(ValueError, match="merged: expected True for PEN_LG"):
        adapt("PEN_LG", Recorder(0.0), merged=False)
    run = adapt("RFR", Recorder(0.0))
    with pytest.raises(ValueError, match=r"image: expected H and W that are positive multiples of 16"):
        run(image[..., :250], mask[..., :250])
    with pytest.raises(ValueError, match=r"mask: expected \[2, 1, 256, 256\]"):
        run(image, mask.expand_as(image))
    with pytest.raises(TypeError, match="mask: expected a floating dtype, got torch.bool"):
        run(image, mask > 0)
