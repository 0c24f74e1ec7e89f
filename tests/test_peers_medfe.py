"""MEDFE: names, parameters and outputs of the original; its partial convolution and its Gaussian."""

from __future__ import annotations

import math

import pytest
import torch

from bench.peers.medfe import HOLE_COLOUR, MEDFE, PartialConv, gaussian_weights
from lgnet_fast.errors import WeightsError
from tests.peers_support import check_golden, check_keys, example, keys, with_weights
from tests.support import assert_accurate


@pytest.fixture(scope="module")
def on_meta() -> MEDFE:
    with torch.device("meta"):
        return MEDFE()


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_names_and_parameters(on_meta):
    check_keys(on_meta, "MEDFE")
    assert list(on_meta.state_dict()) == list(keys("MEDFE"))
    assert parameters(on_meta) == 130_316_070
    frozen = {name for name, p in on_meta.named_parameters() if not p.requires_grad}
    assert frozen == {key for key in keys("MEDFE") if "mask_conv" in key}
    assert sum(p.numel() for p in on_meta.parameters() if p.requires_grad) == 103_118_630
    assert [parameters(m) for m in (on_meta.EN, on_meta.DE, on_meta.MEDFE)] == [30_026_432, 18_098_499, 82_191_139]
    block = on_meta.MEDFE.pc_block
    expected = {
        "down_128": 655_360, "down_64": 524_288, "down_32": 65_536, "down_16": 4_194_304, "down_8": 8_388_608,
        "down_4": 12_582_912, "down": 196_608, "fuse": 262_144, "up": 131_072, "up_128": 32_768, "up_64": 65_536,
        "up_32": 131_072, "base": 557_600, "cov_3": 5_900_800, "cov_5": 16_386_560, "cov_7": 32_115_200,
    }  # fmt: skip
    assert {name: parameters(getattr(block, name)) for name in expected} == expected


@pytest.mark.slow(reason="another group's network of full size, whose code here hardly changes")
def test_output_of_the_original():
    """With today's mask of the features (all known) and the earlier one; what is in the hole does not matter."""
    network = with_weights(MEDFE(), "MEDFE")
    picture, hole = example()
    with torch.inference_mode():
        check_golden(network(2 * picture - 1, hole), "MEDFE", "output_all_valid_mask")
        network.MEDFE.pc_block.mask_mode = "nearest"
        check_golden(network((2 * picture - 1) * (1 - hole), hole * 1.25), "MEDFE", "output_nearest_mask")


def test_partial_convolution():
    conv = PartialConv(2, 3)
    torch.manual_seed(0)
    x, mask = torch.rand(1, 2, 8, 8), torch.ones(1, 2, 8, 8)
    mask[..., 4:] = 0
    with torch.no_grad():
        y, known = conv(x, mask)
        full, everywhere = conv(x, torch.ones_like(mask))
        plain = conv.input_conv(x)
    assert_accurate("middle", full[..., 1:-1, 1:-1], plain[..., 1:-1, 1:-1] / 18)
    assert_accurate("corner", full[..., 0, 0], plain[..., 0, 0] / 8)  # 4 of 9 taps in the picture
    assert_accurate("known", y[..., :3], full[..., :3], roundings=16)
    assert (y[..., 5:] == 0).all()
    assert torch.equal(known[0, 0, 4], torch.tensor([1.0] * 5 + [0.0] * 3))
    assert (everywhere == 1).all()


def test_gaussian():
    weights = gaussian_weights(32, 1.5)
    assert weights.shape == (1024, 32, 32)
    assert_accurate("sums", weights.sum((1, 2)), torch.ones(1024), roundings=16)
    middle = weights[16 * 32 + 16]
    assert middle[16, 17] / middle[16, 16] == pytest.approx(math.exp(-1 / 4.5), rel=1e-5)
    assert middle[13, 20] / middle[16, 16] == pytest.approx(math.exp(-25 / 4.5), rel=1e-5)
    line = 1.5 * math.sqrt(2 * math.pi)  # what a whole line of it sums to; in a corner half, and the middle whole
    assert middle[16, 16].item() == pytest.approx(line**-2, rel=1e-5)
    assert weights[0, 0, 0].item() == pytest.approx(((line + 1) / 2) ** -2, rel=1e-5)


def test_masks_of_the_features():
    with torch.device("meta"):
        blocks = {mode: MEDFE(mode).MEDFE.pc_block for mode in ("all_valid", "nearest")}
    hole = example()[1]
    for block in blocks.values():
        block.mean_4x4 = torch.full((1, 1, 4, 4), 1 / 16)
    assert (blocks["all_valid"].known(hole) == 1).all()
    known = blocks["nearest"].known(hole)
    assert known.shape == (1, 256, 32, 32)
    assert torch.equal(1 - known[:, 9:10], hole[..., ::8, ::8])


def test_hole_colour():
    assert pytest.approx((-0.03529, -0.18431, -0.08235), abs=1e-5) == HOLE_COLOUR


@pytest.mark.parametrize("form", ["pkl", "pth"])
def test_checkpoint(tmp_path, form):
    shapes = keys("MEDFE")
    # One number a tensor, expanded: small files with the names and shapes of the original's.
    state = {key: torch.full((1,), i / 8).expand(shape) for i, (key, shape) in enumerate(shapes.items())}
    for network, name in (("EN", "EN"), ("DE", "DE"), ("MEDFE", "MEDEF")):
        part = {key.split(".", 1)[1]: value for key, value in state.items() if key.startswith(network + ".")}
        if form == "pkl":
            torch.save(part, tmp_path / f"{name}.pkl")
        else:
            torch.save({"net": part, "optimize": {"state": {}}}, tmp_path / f"40_net_{network}.pth")
    loaded = MEDFE.from_checkpoint(tmp_path, mask_mode="nearest")
    assert not loaded.training
    assert loaded.MEDFE.pc_block.mask_mode == "nearest"
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    next(tmp_path.glob("*DE.p*")).unlink()
    with pytest.raises(WeightsError, match=r"folder: expected DE\.pkl or one <epoch>_net_DE\.pth in .*, found 0"):
        MEDFE.from_checkpoint(tmp_path)


def test_wrong_arguments(on_meta):
    with pytest.raises(ValueError, match="mask_mode: expected one of"):
        MEDFE("bilinear")
    image, hole = torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
    with pytest.raises(ValueError, match=r"image: expected \[1, 3, 256, 256\], got \[2, 3, 256, 256\]"):
        on_meta(image.expand(2, -1, -1, -1), hole)
    with pytest.raises(ValueError, match=r"hole: expected \[1, 1, 256, 256\], got \[1, 3, 256, 256\]"):
        on_meta(image, image)
