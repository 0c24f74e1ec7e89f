"""The convolutions from and to the picture without a GPU: the kernels on the CPU.

The emulator (tests/emulator/) runs `csrc/cuda/picture_conv.cu` through its launcher. Inputs are small integers, so
that sums are exact in any order. The launcher has test_picture_conv_launcher.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import multiprocessing
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lgnet_fast.kernels import picture_conv
from lgnet_fast.kernels.configs import assume_generation
from lgnet_fast.kernels.conv import Conv
from lgnet_fast.kernels.picture_conv import PictureTile
from lgnet_fast.kernels.results import Merge, Store

from tests import emulator
from tests.emulator.guarded import guarded
from tests.picture_conv_support import CPU, D1, E1, FROM, OUT, STEM, TO, operands, plan_convs

emulated = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))


@pytest.fixture
def kernel(monkeypatch):
    """The launcher starts kernels on the emulator. Returns the class, whose `launched` has the kernels' names."""
    return emulator.install(monkeypatch, picture_conv)


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


def nan_in_the_second_store(monkeypatch):
    forward = picture_conv.picture_forward

    def wrong(conv, source, weight, bias, stores, *args, **options):
        forward(conv, source, weight, bias, stores, *args, **options)
        stores[1].view[0, 4, 6, 0] = torch.nan

    monkeypatch.setattr(picture_conv, "picture_forward", wrong)


@emulated
@pytest.mark.parametrize(
    ("fault", "conv"),
    [
        (wrong_weights, STEM),
        (altered(other_activation), STEM),
        (nan_in_the_second_store, STEM),
        (altered(one_row_more), E1),
        (altered(one_row_more), OUT),
        (wrong_weights, D1),
    ],
    ids=["weights", "second store", "NaN", "rectangle", "rectangle of a merge", "weights of a merge"],
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
