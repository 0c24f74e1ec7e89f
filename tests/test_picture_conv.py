"""The convolutions from and to the picture without a GPU: the kernels on the CPU, their machine code, their launcher.

The emulator (tests/emulator/) runs `csrc/cuda/picture_conv.cu` through its launcher. Inputs are small integers, so
that sums are exact in any order.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import multiprocessing
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lgnet_fast.kernels import picture_conv
from lgnet_fast.kernels.cards import CARDS
from lgnet_fast.kernels.compiled_checks import exact_convolution
from lgnet_fast.kernels.configs import assume_generation
from lgnet_fast.kernels.conv import Conv
from lgnet_fast.kernels.picture_conv import PictureTile
from lgnet_fast.kernels.results import Merge, Store

from tests import emulator
from tests.compiled_kernels import build, disassembler, instructions, integers
from tests.emulator.guarded import guarded

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "picture_conv.cu"
STEM = Conv(4, 64, 7, 1, 3, False, True, False)
E1 = Conv(4, 64, 4, 2, 1, False, False, False)
OUT = Conv(64, 3, 7, 1, 3, False, True, True)
D1 = Conv(128, 3, 4, 2, 1, True, False, True)
FROM = {STEM: PictureTile(4, 32), E1: PictureTile(4, 32)}
TO = {OUT: PictureTile(3, 32), D1: PictureTile(2, 32)}
CPU = torch.device("cpu")
emulated = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))


@pytest.fixture
def kernel(monkeypatch):
    """The launcher starts kernels on the emulator. Returns the class, whose `launched` has the kernels' names."""
    monkeypatch.setattr(picture_conv, "Kernel", emulator.EmulatedKernel)
    monkeypatch.setattr(emulator.EmulatedKernel, "launched", [])
    monkeypatch.setattr(emulator.EmulatedKernel, "seed", 0)
    return emulator.EmulatedKernel


def operands(conv, batch, size, dtype=torch.float16):
    """Input, packed weights, bias, and the sums in float64, [B, H, W, C]."""
    source = integers(batch, *size, conv.in_channels, dtype=dtype)
    first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
    weight, bias = integers(first, second, conv.kernel, conv.kernel, dtype=dtype), integers(conv.out_channels).float()
    return source, picture_conv.pack(conv, weight), bias, exact_convolution(conv, source, weight, bias)


def run(conv, batch, size, tile, rect=None, dtype=torch.float16):
    """What a launch writes, NaN elsewhere, and the sums; both [B, H, W, C]. A step to the picture returns tanh."""
    source, weight, bias, exact = operands(conv, batch, size, dtype)
    out_size = tuple(exact.shape[1:3])
    where = {"size": out_size, "rect": rect}
    if not conv.merges:
        out = torch.full(exact.shape, float("nan"), dtype=dtype)
        picture_conv.picture_forward(conv, source, weight, bias, (Store(out, "none"),), tile, **where)
        return out, exact
    raw = torch.full((batch, 3, *out_size), float("nan"))
    image, mask = torch.zeros_like(raw), torch.ones(batch, 1, *out_size)
    merged = raw.clone()
    picture_conv.picture_forward(
        conv, source, weight, bias, (), tile, **where, merge=Merge(image, mask, raw, merged, True)
    )
    assert torch.equal(raw.nan_to_num(9), merged.nan_to_num(9))
    return raw.permute(0, 2, 3, 1), exact


def check(conv, batch, size, tile, rect=None):
    """Every output in the rectangle is the convolution's; nothing outside is written."""
    found, exact = run(conv, batch, size, tile, rect)
    top, bottom, left, right = rect or (0, exact.shape[1], 0, exact.shape[2])
    inside = found[:, top:bottom, left:right]
    expected = exact[:, top:bottom, left:right]
    if conv.merges:
        torch.testing.assert_close(inside.double(), expected.tanh(), rtol=0, atol=1e-6)
    else:
        assert torch.equal(inside.double(), expected)
    assert (
        found.isnan().sum() == (exact[0, ..., 0].numel() - (bottom - top) * (right - left)) * batch * exact.shape[3]
    )


# -- the kernels on the CPU ---------------------------------------------------------------------------------------


def plan_convs():
    """Every step of LGNet that the kernels can compute: name -> Conv."""
    from lgnet_fast import create_model
    from lgnet_fast.engine.build import build_plan, plan_stages
    from lgnet_fast.engine.cuda_weights import conv_of
    from lgnet_fast.engine.plan import ConvStep

    with torch.device("meta"):
        model = create_model("lgnet").eval()
    plan = build_plan(plan_stages(model), 1, 256, 256)
    convs = {step.name: conv_of(step) for step in plan.steps if isinstance(step, ConvStep)}
    return {name: conv for name, conv in convs.items() if picture_conv.unsupported(conv) is None}


def test_supported_steps():
    assert plan_convs() == {
        "net_c.e1": E1, "net_c.d1": D1, "net_l.stem": STEM, "net_l.out": OUT, "net_g.e1": E1, "net_g.d1": D1,
    }  # fmt: skip


@emulated
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("conv", [STEM, E1, OUT, D1], ids=["stem", "e1", "out", "d1"])
def test_every_tile(kernel, conv, seed):
    """Borders on every side, sizes that are no multiples, a batch; copies as late and as early as they may be."""
    kernel.seed = seed
    for tile in picture_conv.tiles(conv):
        check(conv, 2, (23, 71), tile)
    widths = {tile.width for tile in picture_conv.tiles(conv)}
    if conv.merges:
        assert set(kernel.launched) == {f"lgnet_to_float16_{conv.in_channels}_{width}" for width in widths}
    else:
        assert set(kernel.launched) == {f"lgnet_from_float16_{conv.kernel}"}


@emulated
@pytest.mark.parametrize(("conv", "tile"), [*FROM.items(), *TO.items()], ids=["stem", "e1", "out", "d1"])
def test_small_maps_and_rectangles(kernel, conv, tile):
    check(conv, 1, (4, 4), tile)
    size = (40, 44)
    height, width = (2 * n if conv.transposed else n // conv.stride for n in size)
    for rect in ((0, 5, 0, 3), (3, height - 2, 5, width), (height - 1, height, width - 1, width), (6, 7, 9, 20)):
        check(conv, 1, size, tile, rect)
    launch = picture_conv.describe_launch(conv, 1, size, (height, width), (6, 7, 9, 20), tile)
    assert launch.grid == 1


@emulated
def test_padding_without_reflection_and_more_channels(kernel):
    check(Conv(64, 3, 7, 1, 3, False, False, True), 1, (12, 30), TO[OUT])
    check(Conv(4, 128, 7, 1, 3, False, False, False), 1, (9, 40), FROM[STEM])
    check(Conv(4, 192, 4, 2, 1, False, True, False), 2, (10, 12), FROM[E1])


@emulated
@pytest.mark.parametrize(("conv", "tile"), FROM.items(), ids=["stem", "e1"])
def test_what_is_stored_from_the_picture(kernel, conv, tile):
    """Two stores with activations, views of wider maps, in bfloat16."""
    source, weight, bias, exact = operands(conv, 2, (12, 34), torch.bfloat16)
    wide = torch.full((*exact.shape[:3], 192), float("nan"), dtype=torch.bfloat16)
    other = torch.empty(exact.shape, dtype=torch.bfloat16)
    stores = (Store(wide[..., 64:128], "relu"), Store(other, "leaky_relu"))
    pixels = torch.full((2, 12, 34, 8), float("nan"), dtype=torch.bfloat16)
    pixels[..., 4:] = source
    size = tuple(exact.shape[1:3])
    picture_conv.picture_forward(conv, pixels[..., 4:], weight, bias, stores, tile, size=size)
    assert torch.equal(stores[0].view, F.relu(exact.float()).bfloat16())
    assert torch.equal(stores[1].view, F.leaky_relu(exact.float(), 0.2).bfloat16())
    assert wide[..., :64].isnan().all()
    assert wide[..., 128:].isnan().all()


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("conv", "width"), [(OUT, 48), (D1, 32)], ids=["out", "d1"])
def test_the_merge(kernel, conv, width, dtype):
    """Into the picture's buffer, whose fourth channel is left alone, and into a planar picture; masks between."""
    source, weight, bias, exact = operands(conv, 2, (8, 50), dtype)
    size = tuple(exact.shape[1:3])
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, *size, generator=generator)
    mask = torch.rand(2, 1, *size, generator=generator)
    value = exact.permute(0, 3, 1, 2).tanh()
    expected = image * (1 - mask) + value * mask
    for last in (False, True):
        merged = torch.full((2, 3, *size) if last else (2, *size, 4), 7.0, dtype=torch.float32 if last else dtype)
        raw = torch.empty(2, 3, *size)
        merge = Merge(image, mask, raw, merged, last)
        picture_conv.picture_forward(conv, source, weight, bias, (), PictureTile(2, width), size=size, merge=merge)
        torch.testing.assert_close(raw.double(), value, rtol=0, atol=1e-6)
        if last:
            torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-6)
        else:
            eps = torch.finfo(dtype).eps
            colors = merged[..., :3].permute(0, 3, 1, 2)
            torch.testing.assert_close(colors.double(), expected, rtol=eps, atol=1e-6)
            assert (merged[..., 3] == 7).all()
    assert len(set(kernel.launched)) == 1


@emulated
@pytest.mark.parametrize(("conv", "tile"), [*FROM.items(), *TO.items()], ids=["stem", "e1", "out", "d1"])
def test_bits_do_not_depend_on_the_order_of_events(kernel, conv, tile):
    """Noise instead of integers, so that another order of a sum shows."""
    found = set()
    for kernel.seed in range(6):
        generator = torch.Generator().manual_seed(1)
        found.add(picture_conv._Trial(conv, (1, 14, 34), torch.float16, CPU, generator).error(tile))
    assert len(found) == 1


@emulated
def test_the_check_at_first_use_passes(kernel, monkeypatch):
    """Everywhere and in a rectangle, both stores, and both kinds of merge."""
    monkeypatch.setattr(picture_conv, "_CHECKED_SIZE", (1, 14, 40))
    with assume_generation("sm_90", 132):
        assert picture_conv._check(CPU, torch.float16) is None
    runs = {conv: 4 if conv.merges else 2 for conv in picture_conv._CHECKED}
    assert len(kernel.launched) == sum(n * len(picture_conv.tiles(conv)) for conv, n in runs.items())
    assert set(picture_conv._CHECKED) == set(plan_convs().values())


def wrong_weights(monkeypatch):
    pack = picture_conv.pack
    monkeypatch.setattr(picture_conv, "pack", lambda conv, weight: pack(conv, 1.1 * weight))


def altered(change):
    """Arguments of the launcher, changed by `change(args)` just before the launch."""

    class Altered(emulator.EmulatedKernel):
        def launch(self, grid, addresses):
            change(ctypes.cast(addresses[0], ctypes.POINTER(picture_conv.Args)).contents)
            super().launch(grid, addresses)

    return lambda monkeypatch: monkeypatch.setattr(picture_conv, "Kernel", Altered)


def other_activation(args):
    args.activation_1 = 1


def one_row_more(args):
    args.bottom = min(args.bottom + 1, args.out_h)


@emulated
@pytest.mark.parametrize(
    ("fault", "conv"),
    [
        (wrong_weights, STEM),
        (altered(other_activation), STEM),
        (altered(one_row_more), E1),
        (altered(one_row_more), OUT),
        (wrong_weights, D1),
    ],
    ids=["weights", "second store", "rectangle", "rectangle of a merge", "weights of a merge"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_check_finds_a_fault(kernel, monkeypatch, fault, conv, dtype):
    fault(monkeypatch)
    monkeypatch.setattr(picture_conv, "_CHECKED_SIZE", (1, 14, 40))
    monkeypatch.setattr(picture_conv, "_CHECKED", (conv,))
    tile = (
        PictureTile(2, 48 if conv is OUT else 32) if conv.merges else FROM[conv]
    )  # those of the emulator in bfloat16
    monkeypatch.setattr(picture_conv, "tiles", lambda conv: [tile])
    with assume_generation("sm_90", 132):
        assert "relative error" in picture_conv._check(CPU, dtype)


@emulated
@pytest.mark.slow(reason="compiles the kernels three times")
@pytest.mark.parametrize(
    ("conv", "after"),
    [
        (OUT, "    multiply(sum, patch, weights + kStageWeights"),
        (STEM, "    float sum[2]"),
        (D1, "#pragma unroll\n    for (int i = 0; i < kItems"),
    ],
    ids=["second half", "patch", "products"],
)
def test_emulator_finds_races(kernel, tmp_path, monkeypatch, conv, after):
    """Without a wait for all threads, a fault that a GPU shows now and then, results are wrong."""
    for folder in ("csrc/cuda", "tests/emulator"):
        shutil.copytree(emulator.ROOT / folder, tmp_path / folder)
    source = tmp_path / "csrc" / "cuda" / "picture_conv.cu"
    text = source.read_text()
    right = f"    __syncthreads();\n{after}"
    assert text.count(right) == 1
    source.write_text(text.replace(right, after))
    monkeypatch.setattr(emulator, "ROOT", tmp_path)
    monkeypatch.setattr(emulator, "HERE", tmp_path / "tests" / "emulator")
    monkeypatch.setattr(emulator, "_library", functools.cache(emulator._library.__wrapped__))

    def check_all():
        for kernel.seed in range(4):
            check(conv, 1, (16, 40), {**FROM, **TO}[conv])

    with pytest.raises((AssertionError, RuntimeError)):
        check_all()


def _run_between_forbidden_pages(convs, size):
    """Steps in a process of its own, which an access outside the operands ends. size: claimed of sources of 12x44."""
    picture_conv.Kernel = emulator.EmulatedKernel
    describe = picture_conv.describe_launch
    picture_conv.describe_launch = lambda conv, batch, _, *rest: describe(conv, batch, size, *rest)
    for conv, rect, at_end in itertools.product(convs, (None, (1, 6, 3, 20)), (False, True)):
        emulator.EmulatedKernel.seed = int(at_end)  # copies late and early
        source, weight, bias, exact = (guarded(tensor, at_end) for tensor in operands(conv, 2, (12, 44)))
        merge, stores = None, ()
        if conv.merges:
            image, mask, merged = (torch.zeros(2, n, *exact.shape[1:3]) for n in (3, 1, 4))
            merged = merged.permute(0, 2, 3, 1).contiguous().half()
            merge = Merge(*(guarded(tensor, at_end) for tensor in (image, mask, image, merged)), False)
        else:
            stores = tuple(Store(guarded(exact.half(), at_end), name) for name in ("none", "relu"))
        tile = {**FROM, **TO}[conv]
        where = {"size": tuple(exact.shape[1:3]), "rect": rect, "merge": merge}
        picture_conv.picture_forward(conv, source, weight, bias, stores, tile, **where)


@emulated
@pytest.mark.parametrize("convs", [(STEM, E1), (OUT, D1)], ids=["from", "to"])
def test_nothing_outside_the_operands_is_touched(convs):
    context = multiprocessing.get_context("spawn")

    def exit_code(size):
        process = context.Process(target=_run_between_forbidden_pages, args=(convs, size))
        process.start()
        process.join()
        return process.exitcode

    assert exit_code((12, 44)) == 0
    assert exit_code((13, 44)) == -signal.SIGSEGV  # a row that is not there


# -- the launcher -------------------------------------------------------------------------------------------------


def test_arguments_match_the_kernel():
    """Names and order of `Args`, and the constants, agree in C++ and Python."""
    text = SOURCE.read_text()
    body = re.sub(r"//[^\n]*", "", re.search(r"struct Args \{(.*?)\};", text, re.S).group(1))
    fields = []
    for declaration in body.split(";"):
        words = re.sub(r"^\s*(const )?(float|void|int32_t)\*?", "", declaration.strip())
        fields += [(name.strip(), "*" in declaration) for name in words.split(",") if name.strip()]
    assert fields == [(name, kind is ctypes.c_void_p) for name, kind in picture_conv.Args._fields_]
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
