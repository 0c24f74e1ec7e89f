"""The convolutions from and to the picture: what their launcher takes and refuses, and their machine code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import picture_conv
from lgnet_fast.kernels.cards import CARDS
from lgnet_fast.kernels.configs import assume_generation
from lgnet_fast.kernels.conv import Conv
from lgnet_fast.kernels.picture_conv import PictureTile
from lgnet_fast.kernels.results import Merge, Store

from tests.compiled_kernels import build, disassembler, fields_in_cpp, fields_in_python, instructions
from tests.picture_conv_support import CPU, D1, FROM, OUT, STEM, TO, operands, plan_convs

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "picture_conv.cu"


# -- the launcher -------------------------------------------------------------------------------------------------


def test_arguments_match_the_kernel():
    """Names and order of `Args`, and the constants, agree in C++ and Python."""
    assert fields_in_cpp(SOURCE, "Args") == fields_in_python(picture_conv.Args)
    text = SOURCE.read_text()
    constants = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    expected = {
        "kChannels": picture_conv.CHANNELS, "kSpan": picture_conv.SPAN, "kWarp": picture_conv._WARP,
        "kFragment": picture_conv._FRAGMENT_BYTES, "kPixel": picture_conv._PIXEL_BYTES,
        "kStages": picture_conv._STAGES,
    }  # fmt: skip
    assert {name: int(constants[name]) for name in expected} == expected
    names = set(re.findall(r"LGNET_KERNEL\(lgnet_(\w+)_##dtype##_(\w+), (\d+), ", text))
    of_launcher = {("from", str(kernel), "512") for kernel, _ in picture_conv._FROM}
    for (channels, *_), (threads, widths) in picture_conv._TO.items():
        of_launcher |= {("to", f"{channels}_{width}", str(threads)) for width in widths}
    assert names == of_launcher


@pytest.mark.parametrize(
    "conv",
    [
        Conv(4, 48, 7, 1, 3, False, True, False),  # channels
        Conv(4, 64, 5, 1, 2, False, True, False),  # taps
        Conv(4, 64, 4, 2, 1, True, False, False),  # transposed
        Conv(3, 64, 7, 1, 3, False, True, False),
        Conv(96, 3, 7, 1, 3, False, True, True),
        Conv(64, 3, 4, 2, 1, True, False, True),
        Conv(64, 3, 4, 2, 1, False, False, True),
        Conv(256, 256, 3, 1, 1, False, True, False),
    ],
)
def test_steps_they_cannot_compute(conv):
    channels = f"{conv.in_channels} to {conv.out_channels} channels"
    assert channels in picture_conv.unsupported(conv)
    with pytest.raises(ValueError, match=f"^conv: {channels}"):
        picture_conv.describe_launch(conv, 1, (8, 8), (8, 8), (0, 8, 0, 8), PictureTile(4, 32))
    with pytest.raises(ValueError, match=f"^conv: {channels}"):
        picture_conv.pack(conv, torch.zeros(1))
    assert picture_conv.tiles(conv) == []


def test_launcher_names_the_argument():
    source, weight, bias, _ = operands(STEM, 1, (8, 8))
    out = (Store(torch.zeros(1, 8, 8, 64, dtype=torch.float16), "relu"),)

    def launch(conv=STEM, source=source, weight=weight, bias=bias, stores=out, tile=FROM[STEM], merge=None):
        picture_conv.picture_forward(conv, source, weight, bias, stores, tile, size=(8, 8), merge=merge)

    with pytest.raises(ValueError, match="^source: expected float16 or bfloat16"):
        launch(source=source.float())
    with pytest.raises(ValueError, match="^source: expected 4 adjacent channels"):
        launch(source=source.permute(0, 1, 3, 2))
    with pytest.raises(ValueError, match="^source: expected pixels at multiples of 8 bytes"):
        launch(source=torch.zeros(1, 8, 8, 6, dtype=torch.float16)[..., :4])
    with pytest.raises(ValueError, match=r"^weight: expected pack\(conv, weight\) in torch.float16"):
        launch(weight=STEM.pack(torch.zeros(64, 4, 7, 7, dtype=torch.float16)))
    with pytest.raises(ValueError, match=r"^weight: expected pack\(conv, weight\) in torch.float16, got \(128,\)"):
        launch(weight=weight[:128])
    with pytest.raises(ValueError, match="^bias: expected 64 aligned float32"):
        launch(bias=bias.half())
    with pytest.raises(ValueError, match="^stores: expected one or two, got 3"):
        launch(stores=3 * out)
    with pytest.raises(ValueError, match=r"^stores: expected \(1, 8, 8\) pixels, got \(1, 8, 4\)"):
        launch(stores=(Store(torch.zeros(1, 8, 4, 64, dtype=torch.float16), "relu"),))
    for rect in ((0, 9, 0, 8), (-1, 8, 0, 8), (5, 4, 0, 8), (0, 8, 0, 9)):
        with pytest.raises(ValueError, match=r"^rect: expected \(top, bottom, left, right\) inside \(8, 8\), got"):
            picture_conv.picture_forward(STEM, source, weight, bias, out, FROM[STEM], size=(8, 8), rect=rect)
    with pytest.raises(ValueError, match="^stores: expected 64 adjacent channels"):
        launch(stores=(Store(torch.zeros(1, 8, 8, 64), "relu"),))
    with pytest.raises(ValueError, match="^merge: expected for a step that ends a stage"):
        launch(stores=())
    with pytest.raises(ValueError, match=r"^tile: expected widths of \(32,\)"):
        launch(tile=PictureTile(4, 64))
    for wrong in (PictureTile(17, 32), PictureTile(0, 32)):
        with pytest.raises(ValueError, match="^tile: expected .* at most 512 threads"):
            launch(tile=wrong)

    source, weight, bias, _ = operands(OUT, 1, (8, 8))
    image, mask = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    merge = Merge(image, mask, image.clone(), image.clone(), True)
    operands_of_out = {"conv": OUT, "source": source, "weight": weight, "bias": bias, "stores": (), "tile": TO[OUT]}
    for name, value in (("image", image.double()), ("mask", image), ("raw", image.mT), ("merged", mask)):
        with pytest.raises(ValueError, match=rf"^merge\.{name}: expected \(1, "):
            launch(**operands_of_out, merge=merge._replace(**{name: value}))
    with pytest.raises(ValueError, match=r"^merge\.merged: expected \(1, 8, 8, 4\) torch.float16"):
        launch(**operands_of_out, merge=merge._replace(last=False))


def test_not_used_without_such_a_gpu(monkeypatch):
    assert "NVIDIA GPU" in picture_conv.reason_against(CPU, torch.float16)
    assert picture_conv.candidates(OUT, torch.float16, CPU) == []
    assert not picture_conv.usable(TO[OUT], OUT, torch.float16, CPU)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert (
        picture_conv.reason_against(torch.device("cuda", 0), torch.float16) == "needs compute capability 8.0 or newer"
    )


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_candidates_fit_every_card(card, monkeypatch):
    """All of them can be launched, and a card with little shared memory has several for every step."""
    monkeypatch.setattr(picture_conv, "reason_against", lambda device, dtype: None)
    with assume_generation(card.generation, card.num_sms):
        for conv in set(plan_convs().values()):
            size = (128, 128) if conv.transposed else (256, 256)
            out_size = tuple(2 * n if conv.transposed else n // conv.stride for n in size)
            tiles = picture_conv.candidates(conv, torch.float16, CPU)
            assert len(tiles) >= 3
            for tile in tiles:
                whole = (0, out_size[0], 0, out_size[1])
                launch = picture_conv.describe_launch(conv, 1, size, out_size, whole, tile)
                assert launch.shared_bytes <= card.shared_limit
                assert launch.grid > 0
                assert picture_conv.usable(tile, conv, torch.float16, CPU)


def test_an_h100_is_filled_once():
    """The tiles for which the kernels were made: one block for each of the 132 multiprocessors."""
    made_for = {OUT: (PictureTile(10, 64), 130), D1: (PictureTile(3, 48), 129), STEM: (PictureTile(16, 32), 128)}
    for conv, (tile, blocks) in made_for.items():
        size = (128, 128) if conv.transposed else (256, 256)
        assert picture_conv.describe_launch(conv, 1, size, (256, 256), (0, 256, 0, 256), tile).grid == blocks


def test_a_hole_gets_a_tile_of_its_own():
    """By the estimate: a dense run's tile would leave most multiprocessors idle."""
    card, step, hole = CARDS["L40S"], (D1, 1, (128, 128), (256, 256)), (96, 128, 96, 128)
    dense, _ = picture_conv.pick_tile(*step, (0, 256, 0, 256), card)
    tile, launch = picture_conv.pick_tile(*step, hole, card)
    assert launch[1:] == picture_conv.describe_launch(*step, hole, tile)[1:]  # all but the structure of arguments
    assert launch.shared_bytes <= card.shared_limit
    others = {one: picture_conv.describe_launch(*step, hole, one) for one in picture_conv.tiles(D1)}
    least = picture_conv.cost(launch, card).seconds
    assert all(picture_conv.cost(one, card).seconds >= least for one in others.values())
    assert picture_conv.cost(others[dense], card).seconds > 1.2 * least
    with pytest.raises(ValueError, match="^conv: 4 to 48 channels"):
        picture_conv.pick_tile(Conv(4, 48, 7, 1, 3, False, True, False), *step[1:], hole, card)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < picture_conv.CAPABILITY,
    reason="no NVIDIA GPU of compute capability 8.0 here",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_candidate_is_right_on_a_gpu(dtype):
    """Every kind of step, each tile beside PyTorch in float64."""
    assert picture_conv.reason_against(torch.device("cuda"), dtype) is None


# -- the machine code ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm here")
def test_machine_code():
    """For five generations: products on the tensor cores, asynchronous copies, whole sectors, no local memory."""
    for target in (target for target in build.TARGETS["picture_conv"] if target.startswith("sm_")):
        kernels = instructions("picture_conv", target)
        assert len(kernels) == 14
        for name, body in kernels.items():
            assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: local memory"
            assert re.search(r"\bLDGSTS\b", body), name
            if not target.startswith("sm_8"):  # wait for the kernel before, then read what it may have written
                before, after = body.split("ACQBULK")
                assert len(re.findall(r"\bPREEXIT\b", after)) == 1, name
                assert not re.search(r"\bLDGSTS\.E\.64\b|\bLDG\b", before), name
                assert "from" in name or len(re.findall(r"\bLDGSTS\b", before)) == 1, name
            if "from" in name:
                taps = int(name[-1])
                assert len(re.findall(r"\bHMMA\.16816\.F32", body)) == taps * -(-taps // 4) * 16, name
                assert "STG.E.128" in body, name
            else:
                channels, width = map(int, name.split("_")[-2:])
                per_tap_row, rows = {64: (3, 7), 128: (5, 3)}[channels]
                assert len(re.findall(r"\bHMMA\.16816\.F32", body)) == 2 * rows * per_tap_row * width // 16, name
                assert len(re.findall(r"\bLDSM\b", body)) == 2 * rows * width // 16, name
