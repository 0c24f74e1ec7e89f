"""The convolution for Hopper without a GPU: the kernel itself on the CPU, its machine code, its launcher's errors.

The emulator (tests/emulator/) runs `csrc/cuda/hopper_conv.cu` through its launcher. Inputs are small integers, so
that sums are exact in any order.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lgnet_fast.kernels import compiled_checks, cuda_driver, hopper, hopper_shapes
from lgnet_fast.kernels.cards import CARDS, card_with
from lgnet_fast.kernels.compiled_checks import Divisor
from lgnet_fast.kernels.conv import Conv
from lgnet_fast.kernels.conv_configs import Cost
from lgnet_fast.kernels.hopper_shapes import HopperTile
from lgnet_fast.kernels.results import Store

from tests import emulator
from tests.compiled_kernels import (
    disassembler,
    emulate_fault,
    fields_in_cpp,
    fields_in_python,
    hopper_gpu,
    instructions,
    integers,
)

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "hopper_conv.cuh"
BLOCK = Conv(256, 256, 3, 1, 1, False, True, False)
"""NetL's block convolution."""
SMALL = Conv(128, 64, 3, 1, 1, False, True, False)
TILE = HopperTile(16, 4)
CLOSE = Cost(1e-5, *(0.0,) * 7)
emulated = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))


# -- the kernel on the CPU ----------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch):
    """The launcher starts kernels on the emulator. Returns the class, whose `launched` has the kernels' names."""
    return emulator.install(monkeypatch, hopper)


def operands(conv, batch, size, dtype=torch.float16):
    """Input, packed weights and the product in float32, [B, H, W, C]."""
    source = integers(batch, *size, conv.in_channels, dtype=dtype)
    first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
    weight = integers(first, second, conv.kernel, conv.kernel, dtype=dtype)
    x = source.permute(0, 3, 1, 2).float()
    if conv.transposed:
        y = F.conv_transpose2d(x, weight.float(), None, conv.stride, conv.padding, 1 if conv.kernel == 3 else 0)
    elif conv.reflect:
        y = F.conv2d(F.pad(x, [conv.padding] * 4, mode="reflect"), weight.float())
    else:
        y = F.conv2d(x, weight.float(), None, conv.stride, conv.padding)
    return source, conv.pack(weight).contiguous(), y.permute(0, 2, 3, 1).contiguous()


def check(kernel, conv, batch, size, tile, rects=(None,), seeds=(0, 1)):
    """Every output in each rectangle is the convolution's; nothing outside is written."""
    source, weight, exact = operands(conv, batch, size)
    for rect, kernel.seed in itertools.product(rects, seeds):
        out = torch.full_like(exact, float("nan"), dtype=torch.float16)
        stores = (Store(out, "none"),)
        bias = torch.zeros(conv.out_channels)
        hopper.hopper_forward(conv, source, weight, bias, stores, tile, size=tuple(exact.shape[1:3]), rect=rect)
        top, bottom, left, right = rect or (0, exact.shape[1], 0, exact.shape[2])
        expected = torch.full_like(out, float("nan"))
        expected[:, top:bottom, left:right] = exact[:, top:bottom, left:right].half()
        assert torch.equal(out.nan_to_num(9e4), expected.nan_to_num(9e4)), (conv, tile, rect)


def plan_convs():
    """Every step of LGNet that the kernel can compute: (name, Conv, size of its input)."""
    from lgnet_fast import create_model
    from lgnet_fast.engine.build import build_plan, plan_stages
    from lgnet_fast.engine.cuda.weights import conv_of
    from lgnet_fast.engine.plan import ConvStep

    with torch.device("meta"):
        model = create_model("lgnet").eval()
    plan = build_plan(plan_stages(model), 1, 256, 256)
    found = []
    for step in plan.steps:
        if not isinstance(step, ConvStep):
            continue
        conv, buffer = conv_of(step), plan.source(step)
        if hopper_shapes.unsupported(conv) is None:
            found.append((step.name, conv, (buffer.height, buffer.width)))
    return found


def out_size(conv, size):
    """Height and width of a step's outputs."""
    return tuple(n * conv.axis.out_step // conv.axis.in_step for n in size)


def test_supported_steps():
    names = [name for name, *_ in plan_convs()]
    blocks = [f"net_l.block{i}.{part}" for i in range(4) for part in ("first", "second")]
    assert [name for name in names if name.startswith("net_l")] == [*blocks, "net_l.up1", "net_l.up2"]
    layers = [*(f"e{i}" for i in range(2, 9)), *(f"d{i}" for i in range(8, 1, -1))]
    for net in ("net_c", "net_g"):
        assert [name for name in names if name.startswith(net)] == [f"{net}.{layer}" for layer in layers]


@emulated
def test_every_product_of_the_plan(kernel):
    """Distinct steps (NetL's eight are one): the first and the last tile of the map, all channels."""
    seen = {}
    for _, conv, size in plan_convs():
        if (conv, size) in seen:
            continue
        height, width = out_size(conv, size)
        tile_h = 16 if height >= 16 else 4
        tall, wide = min(height, tile_h), min(width, 8)
        tile = HopperTile(tile_h, 2, patch_stages=2, groups=1 + len(seen) % 2)
        seen[conv, size] = tile
        rects = {(0, tall, 0, wide), (height - tall, height, width - wide, width)}
        check(kernel, conv, 1, size, tile, rects, seeds=(len(seen) // 2 % 2,))
    assert {f"lgnet_conv_float16_{tile.tile_h}_{tile.groups}" for tile in seen.values()} == set(kernel.launched)


@emulated
@pytest.mark.slow(reason="ten seconds; the test above has its first and last tile")
@pytest.mark.parametrize("groups", [1, 2])
def test_every_pixel_of_the_local_network(kernel, groups):
    check(kernel, BLOCK, 1, (64, 64), HopperTile(16, 4, groups=groups), seeds=(1,))


@emulated
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tile_h", hopper_shapes.TILE_HEIGHTS)
def test_tiles(kernel, tile_h, groups):
    """Stride 1, transposed and stride 2; every border, a batch, stages that are used again."""
    tile = HopperTile(tile_h, 2, 6 * groups, 2, groups)
    check(kernel, SMALL, 2, (tile_h + 8, 16), tile)
    check(kernel, Conv(64, 64, 3, 1, 1, False, False, False), 1, (12, 11), tile)
    check(kernel, Conv(64, 64, 3, 1, 1, False, True, False), 1, (12, 11), tile)
    check(kernel, Conv(128, 64, 4, 2, 1, True, False, False), 1, (tile_h, 16), tile)
    check(kernel, Conv(256, 64, 3, 2, 1, True, False, False), 1, (9, 8), tile)
    check(kernel, Conv(128, 64, 4, 2, 1, False, False, False), 2, (2 * tile_h + 2, 18), tile)
    assert set(kernel.launched) == {f"lgnet_conv_float16_{tile_h}_{groups}"}


@emulated
@pytest.mark.parametrize(
    ("channels", "cluster", "groups"), [(128, 2, 1), (192, 2, 2), (512, 4, 2), (512, 8, 1), (576, 8, 2)]
)
def test_blocks_that_split_the_depth(kernel, channels, cluster, groups):
    """Even and uneven parts, borders, rectangles, a batch; every block stores some of the pixels."""
    tile = HopperTile(8, cluster, 6 * groups, 2, groups, split=True)
    conv = Conv(channels, 64, 3, 1, 1, False, True, False)
    check(kernel, conv, 2, (12, 11), tile)
    check(kernel, conv, 1, (16, 16), tile, ((3, 13, 5, 16),))
    check(kernel, Conv(channels, 64, 4, 2, 1, True, False, False), 1, (8, 8), tile)
    check(kernel, Conv(channels, 64, 4, 2, 1, False, False, False), 1, (16, 20), tile)
    size = (0, 12, 0, 11)
    launch = hopper.describe_launch(conv, 2, (12, 11), (12, 11), size, tile)
    assert launch.grid == cluster * hopper.describe_launch(conv, 2, (12, 11), (12, 11), size, HopperTile(8, 1)).grid
    assert launch.cluster == cluster


@emulated
def test_few_stages_and_taps(kernel):
    """One tap a phase: a warpgroup keeps a patch while the other needs the next two."""
    corner = Conv(512, 64, 4, 2, 1, True, False, False)
    for groups, patch_stages in ((1, 1), (2, 1), (2, 2)):
        tile = HopperTile(4, 1, 6 * groups, patch_stages, groups)
        check(kernel, SMALL, 1, (8, 8), tile)
        check(kernel, corner, 1, (1, 1), tile)
        launch = hopper.describe_launch(corner, 1, (1, 1), (2, 2), (0, 2, 0, 2), tile)
        assert launch.args.patch_stages >= 1 + groups


@emulated
def test_rectangles(kernel):
    conv = Conv(64, 128, 3, 1, 1, False, True, False)
    tile = HopperTile(8, 2, 12, 2, 2)
    check(kernel, conv, 1, (24, 24), tile, ((0, 7, 0, 5), (3, 20, 9, 22), (19, 24, 1, 24), (23, 24, 23, 24)))
    check(kernel, Conv(64, 64, 4, 2, 1, True, False, False), 1, (16, 16), tile, ((5, 19, 2, 31),))
    check(kernel, Conv(64, 64, 4, 2, 1, False, False, False), 1, (32, 48), tile, ((5, 14, 2, 23), (15, 16, 23, 24)))


@emulated
@pytest.mark.parametrize(("cluster", "groups"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_what_is_stored(kernel, cluster, groups):
    """Bias, residual, two stores with activations, views of wider maps, in bfloat16."""
    source, weight, exact = operands(SMALL, 2, (16, 8), torch.bfloat16)
    bias, residual = integers(64).float(), integers(*exact.shape, dtype=torch.bfloat16)
    wide = torch.full((*exact.shape[:3], 192), float("nan"), dtype=torch.bfloat16)
    stores = (Store(wide[..., 64:128], "relu"), Store(torch.empty_like(residual), "leaky_relu"))
    tile = HopperTile(16, cluster, 12, 2, groups, split=cluster > 1)
    hopper.hopper_forward(SMALL, source, weight, bias, stores, tile, size=(16, 8), residual=residual)
    value = exact + bias + residual.float()
    assert torch.equal(stores[0].view, F.relu(value).bfloat16())
    assert torch.equal(stores[1].view, F.leaky_relu(value, 0.2).bfloat16())
    assert wide[..., :64].isnan().all()
    assert wide[..., 128:].isnan().all()
    assert kernel.launched == [f"lgnet_conv_bfloat16_16_{groups}"]


@emulated
@pytest.mark.parametrize("split", [False, True])
def test_bits_do_not_depend_on_the_order_of_events(kernel, split):
    """Noise instead of integers, so that another order of a sum shows."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(1, 16, 16, 128, generator=generator).half()
    weight = SMALL.pack(torch.randn(64, 128, 3, 3, generator=generator).half()).contiguous()
    found = []
    for kernel.seed in range(6):
        out = torch.empty(1, 16, 16, 64, dtype=torch.float16)
        tile = HopperTile(8, 2, 12, 2, 2, split)
        hopper.hopper_forward(SMALL, source, weight, torch.zeros(64), (Store(out, "none"),), tile, size=(16, 16))
        found.append(out)
    assert all(torch.equal(out, found[0]) for out in found)


@emulated
@pytest.mark.parametrize("groups", [1, 2])
def test_clocks(kernel, groups):
    source, weight, exact = operands(SMALL, 1, (16, 16))
    out = torch.empty_like(exact, dtype=torch.float16)
    clocks = torch.zeros(2, 8, dtype=torch.int64)
    arguments = (SMALL, source, weight, torch.zeros(64), (Store(out, "none"),), HopperTile(16, 1, groups=groups))
    hopper.hopper_forward(*arguments, size=(16, 16), clocks=clocks)
    assert torch.equal(out, exact.half())
    assert (clocks[:, :6].diff(dim=1) > 0).all()  # start, ready, previous, operands, products, end
    assert (clocks[:, 6:] > 0).all()
    assert kernel.launched == [f"lgnet_conv_float16_16_{groups}_timed"]
    for wrong in (clocks.int(), clocks[:1]):
        with pytest.raises(ValueError, match=r"^clocks: expected \(2, 8\) int64"):
            hopper.hopper_forward(*arguments, size=(16, 16), clocks=wrong)


@emulated
def test_the_check_at_first_use_passes(kernel, monkeypatch):
    """Every candidate can compute what it is checked by; on a GPU a refusal would rule the kernel out."""
    error = hopper._error
    for conv in (SMALL, Conv(128, 64, 4, 2, 1, True, False, False), Conv(128, 64, 4, 2, 1, False, False, False)):
        for cluster, (shape, num_sms) in itertools.product((1, 2), hopper._CHECKED):
            size, tile = out_size(conv, shape[1:]), HopperTile(16, cluster, groups=2)
            launch = hopper.describe_launch(conv, shape[0], shape[1:], size, (0, size[0], 0, size[1]), tile, num_sms)
            assert (launch.args.sums > 0) == (num_sms is not None)
    small = {(2, 32, 16): (2, 16, 8), (3, 64, 16): (3, 64, 8)}
    monkeypatch.setattr(hopper, "_error", lambda conv, tile, shape, *rest: error(conv, tile, small[shape], *rest))
    assert hopper._check(torch.device("cpu"), torch.float16) is None
    alone = {f"lgnet_conv_float16_{h}_{g}" for h in hopper_shapes.TILE_HEIGHTS for g in (1, 2)}
    assert set(kernel.launched) == {*alone, "lgnet_conv_float16_16_2_several"}
    several = [tile for tile in hopper_shapes.CANDIDATES if tile.tile_h == 16 and not tile.split and tile.groups == 2]
    assert len(kernel.launched) == 3 * (len(hopper_shapes.CANDIDATES) + len(several))


@emulated
def test_emulator_finds_a_wait_that_never_ends(kernel):
    """Arguments that the launcher does not make: a ring of one stage, which is released after the next is read."""
    source, weight, exact = operands(SMALL, 1, (8, 8))
    stores = (Store(torch.empty_like(exact, dtype=torch.float16), "none"),)
    tile = HopperTile(4, 1, 12, 2)
    launch, addresses, _ = hopper._prepare(
        SMALL, source, weight, torch.zeros(64), stores, tile, (8, 8), None, None, None
    )
    launch.args.weight_stages = 1
    with pytest.raises(RuntimeError, match="every thread waits for ever: .*a barrier in shared memory"):
        hopper._kernel(launch, torch.float16, tile).launch(launch.grid, addresses)


@emulated
@pytest.mark.slow(reason="compiles the kernel twice")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("products_wait<1>();", "products_wait<2>();"),  # a stage is released while it is read
        ("reading.mending ? memory.patch_mended(", "false ? memory.patch_mended("),  # a border is read too early
    ],
)
def test_emulator_finds_races(kernel, tmp_path, monkeypatch, right, wrong):
    """A kernel with a fault that a GPU shows now and then gives wrong results."""
    emulate_fault(tmp_path, monkeypatch, SOURCE.name, right, wrong)
    with pytest.raises(AssertionError):
        check(kernel, SMALL, 1, (16, 16), HopperTile(8, 1, 6, 2), seeds=range(4))


def test_every_block_of_a_cluster_has_the_same_weights():
    for _, conv, size in plan_convs():
        height, width = out_size(conv, size)
        launch = hopper.describe_launch(conv, 1, size, (height, width), (0, height, 0, width), HopperTile(4, 8))
        assert launch.grid % launch.cluster == 0
        assert launch.args.m_tiles.size % launch.cluster == 0


SEVERAL = (
    (BLOCK._replace(in_channels=128, out_channels=64), 2, 1, (45, 20), 4),
    (BLOCK._replace(in_channels=64, out_channels=128), 1, 3, (33, 9), 5),
    (Conv(64, 64, 4, 2, 1, True, False, False), 2, 2, (20, 12), 6),
    (Conv(64, 128, 4, 2, 1, False, False, False), 1, 2, (70, 18), 3),
    (Conv(128, 64, 3, 2, 1, True, False, False), 1, 1, (33, 17), 2),
)
"""Step, blocks of a cluster, batch, size of the map, multiprocessors."""


@emulated
@pytest.mark.parametrize(("conv", "cluster", "batch", "size", "num_sms"), SEVERAL)
def test_several_tiles_a_block(kernel, conv, cluster, batch, size, num_sms):
    """The bits of a warpgroup that computes one tile a block; the last turn has no tile for some; rectangles."""
    source, weight, exact = operands(conv, batch, size)
    bias, residual = integers(conv.out_channels).float(), integers(*exact.shape)
    height, width = exact.shape[1:3]
    for rect, kernel.seed in itertools.product((None, (1, height - 1, 2, width - 1)), (0, 1, 6, 7)):
        found = []
        for tile, held in ((HopperTile(16, cluster, groups=2), num_sms), (HopperTile(16, cluster), None)):
            out = torch.full_like(residual, float("nan"))
            hopper.hopper_forward(
                conv, source, weight, bias, (Store(out, "relu"),), tile,
                size=(height, width), rect=rect, residual=residual, num_sms=held,
            )  # fmt: skip
            found.append(out.nan_to_num(9e4))
        assert torch.equal(*found), (rect, kernel.seed)
        assert kernel.launched[-2:] == ["lgnet_conv_float16_16_2_several", "lgnet_conv_float16_16_1"]
    whole = (0, height, 0, width)
    tile = HopperTile(16, cluster, groups=2)
    launch = hopper.describe_launch(conv, batch, size, (height, width), whole, tile, num_sms)
    assert launch.grid == num_sms
    assert launch.args.tiles > 2 * num_sms


def test_when_a_block_computes_several_tiles():
    """Where each multiprocessor holds one block and there are more tiles than those."""
    for batch, tile, blocks in (
        (1, HopperTile(16, 2, groups=2), 0),
        (2, HopperTile(16, 2, groups=2), 132),
        (16, HopperTile(16, 1, groups=2), 132),
        (16, HopperTile(16, 2), 0),
        (16, HopperTile(16, 2, 12, groups=2, split=True), 0),
        (16, HopperTile(8, 2, groups=2), 0),
    ):
        product = hopper_shapes.Product.of(BLOCK, batch, (64, 64), (64, 64), (0, 64, 0, 64))
        shape = hopper_shapes.Shape.of(product, tile, 132)
        assert shape.blocks == blocks, (batch, tile)
        assert shape.shared_bytes <= hopper_shapes.SHARED_LIMIT
        alone = hopper_shapes.Shape.of(product, tile)
        assert alone.blocks == 0
        if blocks:
            least, other = hopper_shapes.cost(shape, CARDS["H100"]), hopper_shapes.cost(alone, CARDS["H100"])
            more = -(-shape.grid // 132) - 1
            assert shape.patch_stages >= 2
            saved = more * (hopper_shapes.FILL_SECONDS + 128 * hopper_shapes.PIXEL_SECONDS)
            assert other.seconds - least.seconds == pytest.approx(saved, rel=0.3)
    assert hopper_shapes.Shape.of(product, HopperTile(16, 2, groups=2), 113).blocks == 112  # whole clusters
    narrow = Conv(64, 64, 3, 1, 1, False, True, False)  # one patch a tile
    product = hopper_shapes.Product.of(narrow, 1, (256, 256), (256, 256), (0, 256, 0, 256))
    assert hopper_shapes.Shape.of(product, HopperTile(16, 2, groups=2), 132).patch_stages == 2


def test_an_odd_number_of_tiles_has_another_row_of_them():
    """So that blocks can share weights: 25 tiles of a hole become 30; one of 5 tiles of a batch is of another row."""
    for batch, rect, tiles in ((1, (16, 49, 16, 49), 30), (2, (16, 49, 16, 49), 50), (1, (0, 40, 0, 8), 6)):
        launch = hopper.describe_launch(BLOCK, batch, (64, 64), (64, 64), rect, HopperTile(8, 2))
        assert (launch.args.m_tiles.size, launch.grid, launch.cluster) == (tiles, 4 * tiles, 2)
    alone = hopper.describe_launch(BLOCK, 1, (64, 64), (64, 64), (16, 49, 16, 49), HopperTile(8, 1))
    assert (alone.grid, alone.cluster) == (100, 1)


def test_netl_fills_the_chip():
    launch = hopper.describe_launch(BLOCK, 1, (64, 64), (64, 64), (0, 64, 0, 64), HopperTile(16, 4))
    assert launch.grid == 128
    assert launch.cluster == 4


# -- the launcher -------------------------------------------------------------------------------------------------


def test_arguments_match_the_kernel():
    """Names and order of `Args` and `Output`, and the limits, agree in C++ and Python."""
    for structure in (hopper.Args, hopper.Output):
        assert fields_in_cpp(SOURCE, structure.__name__) == fields_in_python(structure)
    text = SOURCE.read_text()
    constants = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    assert int(constants["kChannels"]) == hopper_shapes.CHANNELS
    assert int(constants["kGroupThreads"]) == hopper_shapes.GROUP_THREADS
    assert int(constants["kOtherThreads"]) == hopper_shapes.OTHER_THREADS
    assert int(constants["kClocks"]) == len(hopper.CLOCKS)
    assert int(constants["kMaxWeightStages"]) == hopper_shapes.MAX_WEIGHT_STAGES
    assert int(constants["kMaxPatchStages"]) == hopper_shapes.MAX_PATCH_STAGES


def test_division():
    """`Divisor` divides as its C++ twin does."""
    assert fields_in_cpp(SOURCE.with_name("divisor.cuh"), "Divisor") == fields_in_python(Divisor)
    for size in (1, 2, 3, 5, 7, 12, 64, 100, 641, 2**20 - 1, 2**31 - 1):
        made = Divisor.of(size)
        assert made.size == size
        for number in (0, 1, size - 1, size, size + 1, 7 * size - 1, 7 * size, 2**31 - 1):
            if number < 2**31:
                assert number * made.magic >> 31 >> made.shift == number // size
    assert Divisor.of(0).size == 1


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Conv(64, 64, 3, 2, 1, False, False, False), "stride 2"),
        (Conv(64, 3, 4, 2, 1, True, False, True), "ends a stage"),
        (Conv(96, 64, 3, 1, 1, False, False, False), "multiples of 64"),
        (Conv(64, 64, 7, 1, 3, False, True, False), "7x7"),
        (Conv(64, 64, 6, 2, 2, False, False, False), "6x6 taps of stride 2"),
    ],
)
def test_steps_it_cannot_compute(conv, reason):
    assert reason in hopper_shapes.unsupported(conv)
    with pytest.raises(ValueError, match="conv: "):
        hopper.describe_launch(conv, 1, (8, 8), (8, 8), (0, 8, 0, 8), HopperTile(8, 1))


def test_launcher_names_the_argument():
    conv = Conv(64, 64, 3, 1, 1, False, True, False)
    x = torch.zeros(1, 16, 16, 64, dtype=torch.float16)
    weight = torch.zeros(9 * 64, 64, dtype=torch.float16)
    bias = torch.zeros(64)
    store = (Store(torch.zeros_like(x), "relu"),)

    def launch(source=x, weight=weight, bias=bias, stores=store, tile=TILE, residual=None):
        hopper.hopper_forward(conv, source, weight, bias, stores, tile, size=(16, 16), residual=residual)

    wide = torch.zeros(1, 16, 16, 68, dtype=torch.float16)
    with pytest.raises(ValueError, match="^source: expected float16 or bfloat16"):
        launch(source=x.float())
    with pytest.raises(ValueError, match="^source: expected 64 adjacent channels"):
        launch(source=x.permute(0, 1, 3, 2))
    with pytest.raises(ValueError, match="^source: expected pixels at multiples of 16 bytes"):
        launch(source=wide[..., :64])
    with pytest.raises(ValueError, match="^source: expected evenly spaced pixels"):
        launch(source=torch.zeros(1, 16, 24, 64, dtype=torch.float16)[:, :, :16])
    with pytest.raises(ValueError, match="^stores: expected 64 adjacent channels"):
        launch(stores=(Store(x.float(), "none"),))
    with pytest.raises(ValueError, match="^residual: expected 64 adjacent channels"):
        launch(residual=wide)
    with pytest.raises(ValueError, match="^weight: expected Conv.pack"):
        launch(weight=weight.float())
    with pytest.raises(ValueError, match="^bias: expected 64 aligned float32"):
        launch(bias=bias.half())
    with pytest.raises(ValueError, match="^tile: .* bytes of shared memory"):
        hopper.describe_launch(BLOCK, 1, (64, 64), (64, 64), (0, 64, 0, 64), HopperTile(32, 4, 12, 4))
    with pytest.raises(ValueError, match="^conv: clusters of 3"):
        launch(tile=HopperTile(16, 3))
    with pytest.raises(ValueError, match="^conv: 64 channels among 2 blocks"):
        launch(tile=HopperTile(16, 2, split=True))
    with pytest.raises(ValueError, match="^conv: 4 warpgroups"):
        launch(tile=HopperTile(16, 1, groups=4))
    deepest = Conv(64, 64, 4, 2, 1, True, False, False)
    with pytest.raises(ValueError, match=r"^conv: .* of a map of \(7, 8\) \(even sizes are supported\)"):
        hopper.describe_launch(deepest._replace(transposed=False), 1, (7, 8), (3, 4), (0, 3, 0, 4), HopperTile(4, 1))
    with pytest.raises(ValueError, match="^tile: .* has more warpgroups than the product has steps"):
        hopper.describe_launch(deepest, 1, (1, 1), (2, 2), (0, 2, 0, 2), HopperTile(4, 1, groups=2))


def test_not_used_without_such_a_gpu():
    cpu = torch.device("cpu")
    assert "NVIDIA GPU" in hopper.reason_against(cpu, torch.float16)
    work = BLOCK.work(1, (64, 64), (64, 64), (0, 64, 0, 64))
    assert hopper.candidates(BLOCK, work, torch.float16, cpu) == []
    assert not hopper.usable(TILE, BLOCK, torch.float16, cpu)


def test_the_stream_of_the_kernels_gpu_is_asked(monkeypatch):
    """GPU 1's stream is captured while GPU 0 is the current one."""
    current = [0]

    @contextlib.contextmanager
    def chosen(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hopper_shapes.CAPABILITY)
    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    passed = compiled_checks._Verdict(None)
    monkeypatch.setattr(hopper._first_use, "_kept", lambda device, dtype: passed)
    monkeypatch.setattr(hopper._first_use, "_reasons", {})
    assert "not checked yet" in hopper.reason_against(torch.device("cuda", 1), torch.float16)
    assert hopper.reason_against(torch.device("cuda", 0), torch.float16) is None


@pytest.mark.parametrize(("system", "name"), [("win32", "nvcuda.dll"), ("linux", "libcuda.so.1")])
def test_name_of_the_driver(monkeypatch, system, name):
    monkeypatch.setattr(cuda_driver.sys, "platform", system)
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: name)
    assert cuda_driver._library.__wrapped__() == name


def test_candidates_can_be_launched(monkeypatch):
    """Every candidate of every product of the plan fits shared memory; small maps get small tiles only."""
    monkeypatch.setattr(hopper, "reason_against", lambda device, dtype: None)
    for _, conv, size in plan_convs():
        height, width = out_size(conv, size)
        whole = (0, height, 0, width)
        tiles = hopper.candidates(
            conv, conv.work(1, size, (height, width), whole), torch.float16, torch.device("cpu")
        )
        heights = {tile.tile_h for tile in tiles}
        rows = height * width // conv.axis.out_step**2
        assert max(heights) == max(h for h in hopper_shapes.TILE_HEIGHTS if h == 4 or 8 * h <= rows)
        for tile in tiles:
            assert hopper.usable(tile, conv, torch.float16, torch.device("cpu"))
            assert hopper.describe_launch(conv, 1, size, (height, width), whole, tile).grid > 0
    stride_2 = Conv(64, 64, 3, 2, 1, False, False, False)
    work = stride_2.work(1, (64, 64), (32, 32), (0, 32, 0, 32))
    assert hopper.candidates(stride_2, work, torch.float16, torch.device("cpu")) == []


def test_the_estimate_ranks_the_tiles():
    """One block for each multiprocessor; a split depth where the map has too few tiles; parts that add up."""
    card = CARDS["H100"]
    convs = {name: (conv, size) for name, conv, size in plan_convs()}
    found = {}
    for name in ("net_l.block0.first", "net_c.e4", "net_c.d4"):
        conv, size = convs[name]
        product = conv, 1, size, out_size(conv, size)
        whole = (0, product[3][0], 0, product[3][1])
        best = hopper_shapes.ranked(*product, whole, card)
        seconds = [cost.seconds for _, cost in best]
        assert seconds == sorted(seconds)
        tile, cost = best[0]
        assert hopper.describe_launch(*product, whole, tile).grid == 128, name
        work = conv.work(1, size, product[3], whole)
        macs = work.all_rows * work.columns * sum(work.taps) / len(work.taps) * work.in_channels
        assert cost.products > macs / card.macs / 1.2  # the H100's figure is of a lower clock
        found[name] = tile, cost
    tile, cost = found["net_l.block0.first"]
    assert (tile.tile_h, tile.split, cost.bound) == (16, False, "products")
    assert 6e-6 < cost.seconds - cost.start < 7e-6
    assert found["net_c.e4"][0].split
    assert not found["net_c.d4"][0].split
    conv, size = convs["net_c.d4"]
    product = hopper_shapes.Product.of(conv, 1, size, (32, 32), (0, 32, 0, 32))
    split = hopper_shapes.Shape.of(product, HopperTile(16, 4, 6, split=True))
    assert (split.grid, hopper_shapes.at_once(split, card)) == (128, 120)
    small = hopper_shapes.Shape.of(product, HopperTile(8, 2, 6))
    assert hopper_shapes.at_once(small, card) == 2 * 132
    assert (
        hopper_shapes.at_once(small._replace(tile=HopperTile(8, 2, 6, groups=2)), card) == 132
    )  # for lack of registers
    hole = hopper_shapes.ranked(BLOCK, 1, (64, 64), (64, 64), (8, 24, 8, 24), card)[0][1]
    assert hole.seconds < cost.seconds
    assert (
        hopper_shapes.ranked(Conv(96, 64, 3, 1, 1, False, False, False), 1, (8, 8), (8, 8), (0, 8, 0, 8), card) == ()
    )
    assert (
        hopper_shapes.ranked(Conv(64, 64, 4, 2, 1, False, False, False), 1, (7, 8), (3, 4), (0, 3, 0, 4), card) == ()
    )


def test_tiles_that_the_estimate_does_not_tell_apart():
    """The one that resembles the measured tile, not the first in order."""
    best = [(HopperTile(16, 1), CLOSE), (HopperTile(16, 2, groups=2), CLOSE._replace(start=1.02e-5)),
            (HopperTile(8, 2, groups=2), CLOSE._replace(start=1.2e-5))]  # fmt: skip
    assert hopper_shapes.tile_like(HopperTile(16, 1), best) == best[0]
    assert hopper_shapes.tile_like(HopperTile(8, 2, groups=2), best) == best[1]
    assert hopper_shapes.tile_like(HopperTile(8, 2, groups=2), []) is None


def test_a_smaller_gpu_takes_longer():
    conv, size = next((conv, size) for name, conv, size in plan_convs() if name == "net_l.up1")
    product = conv, 1, size, (128, 128), (0, 128, 0, 128)
    whole, part = (card_with("sm_90", count) for count in (132, 114))
    assert whole == CARDS["H100"]
    assert (part.num_sms, part.macs) == (114, CARDS["H100"].macs * 114 / 132)
    assert (
        hopper_shapes.ranked(*product, part)[0][1].seconds > 1.1 * hopper_shapes.ranked(*product, whole)[0][1].seconds
    )


@pytest.mark.gpu
@hopper_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_candidate_is_right_on_a_gpu(dtype):
    """Three kinds of step with a residual, each candidate beside PyTorch in float64."""
    assert hopper.reason_against(torch.device("cuda"), dtype) is None


# -- the machine code ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm here")
def test_machine_code():
    """Matrix products on the tensor cores in flight, loads by the copy engine, nothing in local memory."""
    kernels = instructions("hopper_conv", "sm_90a")
    names = {
        f"lgnet_conv_{kind}_{form}"
        for kind in ("float16", "bfloat16")
        for form in (
            *(f"{h}_{g}" for h in hopper_shapes.TILE_HEIGHTS for g in (1, 2)),
            "16_2_several",
        )
    }
    assert set(kernels) == names | {f"lgnet_conv_float16_16_{groups}_timed" for groups in (1, 2)}
    for name, body in kernels.items():
        pixels = 8 * int(name.split("_")[3])
        # The loops for 1, 2 and 3 taps a row each have one wait inside and one after it. ptxas may add one before the
        # sums are stored.
        order = re.findall(rf"HGMMA\.64x{pixels}x16\.F32|DEPBAR\.LE gsb0, 0x[01]", body)
        runs = [(kind[-3:], len(list(run))) for kind, run in itertools.groupby(order)]
        assert sorted(runs[0::3][:3]) == [("F32", 4), ("F32", 8), ("F32", 12)], f"{name}: serialised products: {runs}"
        assert runs[1::3] == 3 * [("0x1", 1)], f"{name}: {runs}"
        assert [kind for kind, _ in runs[2::3]] == 3 * ["0x0"], f"{name}: {runs}"
        assert 3 <= sum(count for kind, count in runs if kind == "0x0") <= 4, f"{name}: {runs}"
        # A release of a stage needs no memory fence; one in every step would take longer than its products.
        assert "MEMBAR" not in body[body.index("HGMMA") : body.rindex("HGMMA")], name
        # What `at_once` takes; and, of blocks that split no depth, the first four reads before a store.
        registers = 1 + max(map(int, re.findall(r"\bR(\d+)\b", body)))
        expected = hopper_shapes.REGISTERS[tuple(map(int, name.split("_")[3:5]))]
        if name.endswith("several"):
            assert registers * (2 * hopper.GROUP_THREADS + hopper.OTHER_THREADS) <= 65536, (name, registers)
        elif not name.endswith("timed"):
            assert expected - 16 < registers <= expected, (name, registers)
        end = re.findall(r"LDS\.128|STG\.E\.128", body[body.rindex("HGMMA") :])
        first = end.index("LDS.128")
        assert end[first:].index("STG.E.128") >= 4, name
        assert "UTMALDG.4D" in body, name
        assert "UTMALDG.2D.MULTICAST" in body, name
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: spills"
        assert "STG.E.128" in body, name
