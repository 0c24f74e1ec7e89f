"""Chains of convolutions for Hopper without a GPU: the kernel on the CPU (tests/emulator/), its code, errors."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lgnet_fast.kernels import hopper, hopper_chain
from lgnet_fast.kernels.cards import CARDS, card_with
from lgnet_fast.kernels.conv import Conv
from lgnet_fast.kernels.hopper_chain import Chain, ChainLayer
from lgnet_fast.kernels.hopper_shapes import HopperTile, ranked
from lgnet_fast.kernels.results import Store

from lgnet_fast import create_model
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import chains
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.grouped import noise_maps, steps_at, view_of, wrong_step
from lgnet_fast.engine.regions import Rect
from tests import emulator
from tests.compiled_kernels import (
    disassembler,
    emulate_fault,
    fields_in_python,
    hopper_gpu,
    instructions,
)
from tests.test_deep_layers import Weights, plan_of

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "hopper_chain.cu"
BLOCK = Conv(256, 256, 3, 1, 1, False, True, False)
"""NetL's block convolution."""
WHOLE = (0, 64, 0, 64)
emulated = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))


@pytest.fixture
def kernel(monkeypatch):
    """The launchers start kernels on the emulator. Returns the class, whose `launched` has the kernels' names."""
    return emulator.install(monkeypatch, hopper, hopper_chain)


def noise(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def blocks(conv, maps, rects, dtype=torch.float16):
    """Layers from each map to the next: residual blocks, as in NetL."""
    channels = conv.in_channels
    return [
        ChainLayer(
            maps[i],
            conv.pack(noise(channels, channels, 3, 3, dtype=dtype, seed=i) / (9 * channels) ** 0.5).contiguous(),
            noise(channels, seed=i).float(),
            (Store(maps[i + 1], "none" if i % 2 else "relu"),),
            rect,
            maps[i - 1] if i % 2 else None,
        )
        for i, rect in enumerate(rects)
    ]  # fmt: skip


def one_by_one(conv, layers, tile):
    for layer in layers:
        hopper.hopper_forward(
            conv, layer.source, layer.weight, layer.bias, layer.stores, tile,
            size=tuple(layer.source.shape[1:3]), rect=layer.rect, residual=layer.residual,
        )  # fmt: skip


@emulated
@pytest.mark.parametrize(
    ("tile", "batch", "size", "channels", "layers", "dtype"),
    [
        (HopperTile(16, 2), 1, (32, 16), 128, 4, torch.float16),
        (HopperTile(16, 1), 1, (20, 11), 64, 3, torch.float16),
        (HopperTile(8, 2), 2, (16, 8), 192, 2, torch.bfloat16),
        (HopperTile(8, 1), 1, (9, 17), 64, 8, torch.float16),
        (HopperTile(4, 2), 1, (8, 16), 192, 3, torch.float16),
        (HopperTile(4, 1), 3, (4, 8), 64, 5, torch.bfloat16),
    ],
)
def test_a_chain_gives_the_bits_of_its_layers(kernel, tile, batch, size, channels, layers, dtype):
    """Every order of events; launches in a row; nothing outside the rectangle is written."""
    conv = Conv(channels, channels, 3, 1, 1, False, True, False)
    for rect, kernel.seed in itertools.product(((0, size[0], 0, size[1]), (1, size[0] - 1, 2, size[1] - 3)), (0, 1)):
        start = [noise(batch, *size, channels, dtype=dtype, seed=i) for i in range(layers + 1)]
        own = blocks(conv, [one.clone() for one in start], layers * [rect], dtype)
        expected = blocks(conv, [one.clone() for one in start], layers * [rect], dtype)
        chain = Chain(conv, own, tile)
        for _ in range(2):
            chain.launch()
            one_by_one(conv, expected, tile)
            for i, (layer, exact) in enumerate(zip(own, expected)):
                assert torch.equal(layer.stores[0].view, exact.stores[0].view), (rect, kernel.seed, i)
        assert not chain._counters.any()
        name = f"lgnet_chain_{str(dtype).removeprefix('torch.')}_{tile.tile_h}"
        assert kernel.launched[-1 - layers] == name


@emulated
def test_rectangles_that_shrink(kernel):
    """As in a restricted run, where later layers need less. Two stores in views of wider maps, a batch."""
    conv = Conv(128, 128, 3, 1, 1, False, True, False)
    tile = HopperTile(4, 2)
    rects = [(0, 12, 1, 20), (1, 11, 2, 19), (2, 10, 3, 18), (3, 9, 4, 17)]
    found = []
    for together in (True, False):
        maps = [noise(2, 16, 24, 128, seed=i) for i in range(5)]
        wide = [torch.full((2, 16, 24, 256), float("nan"), dtype=torch.float16) for _ in rects]
        layers = [
            layer._replace(stores=(*layer.stores, Store(one[..., 128:], "leaky_relu")))
            for layer, one in zip(blocks(conv, maps, rects), wide)
        ]
        if together:
            Chain(conv, layers, tile).launch()
        else:
            one_by_one(conv, layers, tile)
        found.append([*maps, *(one.nan_to_num(9e4) for one in wide)])
    assert all(map(torch.equal, *found))
    top, bottom, left, right = rects[-1]
    assert (found[0][-1][:, top:bottom, left:right, 128:] < 9e4).all()
    assert (found[0][-1][..., :128] == 9e4).all()


@emulated
def test_the_steps_of_a_plan(kernel):
    """The bundled model's eight steps in the rectangles of a hole, beside the launches of each step."""
    plan = plan_of("lgnet_demo")
    (numbers,) = chains.runs(plan)
    regions = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 128, 96, 128)]).steps]
    rects = chains.rectangles(plan, numbers, regions)
    tile, _ = chains.tiles(plan, numbers, rects, CARDS["H100"])[0]
    steps = steps_at(plan, numbers.start, len(numbers))
    conv = chains.conv_of(steps[0])
    weights = {
        step.name: Weights(
            conv.pack(noise(*step.weight.shape, seed=i) / 24).contiguous(), noise(step.out_channels, seed=i).float()
        )
        for i, step in enumerate(steps)
    }
    maps = noise_maps(plan, steps, torch.float16, torch.device("cpu"))
    alone = {name: one.clone() for name, one in maps.items()}
    chain = chains.make_chain(plan, numbers, weights, functools.partial(view_of, maps), rects, tile)
    chain.launch()
    assert wrong_step(plan, steps, weights, maps, rects[-1]) is None
    assert wrong_step(plan, steps, weights, maps).startswith("net_l.block0.first: relative error")
    for step, rect in zip(steps, rects):
        own = weights[step.name]
        stores = tuple(Store(view_of(alone, s.view), s.activation) for s in step.stores)
        residual = None if step.residual is None else view_of(alone, step.residual)
        hopper.hopper_forward(
            conv, view_of(alone, step.source), own.packed, own.bias, stores, tile,
            size=(64, 64), rect=rect, residual=residual,
        )  # fmt: skip
    assert all(torch.equal(one, alone[name]) for name, one in maps.items())
    assert len(kernel.launched) == 1 + len(steps)


@emulated
def test_clocks(kernel):
    conv = Conv(128, 128, 3, 1, 1, False, True, False)
    maps = [noise(1, 16, 16, 128, seed=i) for i in range(4)]
    layers = blocks(conv, maps, 3 * [(0, 16, 0, 16)])
    clocks = torch.zeros(3, 4, 8, dtype=torch.int64)
    Chain(conv, layers, HopperTile(16, 1), clocks).launch()
    assert kernel.launched == ["lgnet_chain_float16_16_timed"]
    assert (clocks[..., :6].diff(dim=2) > 0).all()
    assert (clocks[..., 6:] > 0).all()
    assert (clocks[1:, :, 0] > clocks[:-1, :, 5]).all()
    with pytest.raises(ValueError, match=r"^clocks: expected \(3, 4, 8\) int64"):
        Chain(conv, layers, HopperTile(16, 1), clocks.int())
    with pytest.raises(ValueError, match=r"^clocks: expected float16 and tiles of 16 rows"):
        Chain(conv, layers, HopperTile(8, 1), torch.zeros(3, 8, 8, dtype=torch.int64))


@emulated
def test_the_check_at_first_use(kernel, monkeypatch):
    """It passes for every tile, and finds a wrong layer and bits that change."""
    problem = hopper_chain._problem

    count = 2

    def smaller(tile, shape, channels, dtype, device, repeats):
        return problem(tile, (1, 2 * tile.tile_h, 8), channels, dtype, device, count)

    monkeypatch.setattr(hopper_chain, "_problem", smaller)
    assert hopper_chain._check(torch.device("cpu"), torch.float16) is None
    names = {f"lgnet_chain_float16_{tile_h}" for tile_h in (4, 8, 16)}
    assert set(kernel.launched) == names
    assert len(kernel.launched) == 2 * len(hopper_chain.TILES)
    launch = Chain.launch

    def wrong(chain):
        launch(chain)
        chain._source.add_(1)

    for replaced, repeats, said in (
        (wrong, 1, r"relative error .* in layer 0 with"),
        (wrong, 2, "another result of the same launch with"),
    ):
        count = repeats
        monkeypatch.setattr(Chain, "launch", replaced)
        assert re.match(said, hopper_chain._check(torch.device("cpu"), torch.float16))


@emulated
@pytest.mark.slow(reason="compiles the kernel twice")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (number > 0) wait_for_layer(chain, number - 1);", ""),  # patches of a layer that is not stored yet
        ("load_acquire(counter) < static_cast<int32_t>(gridDim.x)", "load_acquire(counter) < 1"),  # the first alone
    ],
)
def test_emulator_finds_races(kernel, tmp_path, monkeypatch, right, wrong):
    emulate_fault(tmp_path, monkeypatch, SOURCE.name, right, wrong)
    found = []
    for kernel.seed in range(6):
        problem = hopper_chain._problem(HopperTile(8, 1), (1, 16, 8), 128, torch.float16, torch.device("cpu"), 1)
        found.append(problem)
    assert any(found)


# -- the engine's groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lgnet", "lgnet_light", "lgnet_demo"])
def test_runs_are_netls_blocks(name):
    plan = plan_of(name)
    expected = [f"net_l.block{i}.{part}" for i in range(4) for part in ("first", "second")]
    assert [[plan.steps[n].name for n in numbers] for numbers in chains.runs(plan)] == [expected]


def test_a_chain_ends_before_a_residual_that_another_thread_stores(monkeypatch):
    """And after eight layers."""
    plan = plan_of("lgnet_demo")
    (numbers,) = chains.runs(plan)
    third = plan.steps[numbers.start + 3]
    shifted = replace(third, residual=replace(third.residual, offset=8))
    steps = [shifted if step is third else step for step in plan.steps]
    changed = replace(plan, steps=tuple(steps))
    assert chains.runs(changed) == [range(numbers.start, numbers.start + 3), range(numbers.start + 3, numbers.stop)]
    monkeypatch.setattr(hopper_chain, "MAX_LAYERS", 3)
    begin = numbers.start
    assert chains.runs(plan) == [range(begin, begin + 3), range(begin + 3, begin + 6), range(begin + 6, begin + 8)]


def test_rectangles_of_restricted_runs():
    plan = plan_of("lgnet")
    (numbers,) = chains.runs(plan)
    assert chains.rectangles(plan, numbers, None) == 8 * (Rect(*WHOLE),)
    regions = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 160, 96, 160)]).steps]
    rects = chains.rectangles(plan, numbers, regions)
    assert all(one.top <= other.top and one.bottom >= other.bottom for one, other in itertools.pairwise(rects))
    regions[numbers.start + 2] = (Rect(0, 1, 0, 1), Rect(4, 5, 4, 5))
    assert chains.rectangles(plan, numbers, regions) is None
    regions[numbers.start + 2] = ()
    assert chains.rectangles(plan, numbers, regions) is None


def test_the_estimate():
    """The chain saves some of the starts; its blocks must run at the same time; fewer rows take less time."""
    h100 = CARDS["H100"]
    (tile, cost), *others = hopper_chain.ranked_chains(BLOCK, 1, (64, 64), 8 * (WHOLE,), h100)
    assert hopper_chain.describe_chain(BLOCK, 1, (64, 64), 8 * (WHOLE,), tile).grid == 128
    assert all(cost.seconds <= other.seconds for _, other in others)
    single = 8 * ranked(BLOCK, 1, (64, 64), (64, 64), WHOLE, h100)[0][1].seconds
    assert 15e-6 < single - cost.seconds < 8 * 5e-6
    assert hopper_chain.ranked_chains(BLOCK, 2, (64, 64), 8 * (WHOLE,), h100) == ()
    assert hopper_chain.ranked_chains(BLOCK, 1, (64, 64), 8 * (WHOLE,), card_with("sm_90", 114)) == ()
    hole = hopper_chain.ranked_chains(BLOCK, 1, (64, 64), 8 * ((16, 40, 16, 40),), h100)[0][1]
    assert hole.seconds < 0.7 * cost.seconds
    for rect in itertools.product((8, 16), (41, 49, 57), (8, 16), (41, 49, 57)):
        for _, one in hopper_chain.ranked_chains(BLOCK, 1, (64, 64), 8 * (rect,), h100):
            assert one.seconds < 8 * ranked(BLOCK, 1, (64, 64), (64, 64), rect, h100)[0][1].seconds


@emulated
@pytest.mark.parametrize(
    ("broken", "held", "groups"), [(False, 132, 1), (True, 132, 0), (False, 31, 0), (False, 32, 1)]
)
def test_a_group_is_checked_before_it_is_used(kernel, monkeypatch, caplog, broken, held, groups):
    """As the engine launches it, in the dense run; the bundled model's has 32 blocks."""
    plan = plan_of("lgnet_demo")
    monkeypatch.setattr(hopper_chain, "reason_against", lambda device, dtype: None)
    monkeypatch.setattr(kernel, "held", held)
    steps = steps_at(plan, chains.runs(plan)[0].start, 8)
    conv = chains.conv_of(steps[0])
    weights = {
        step.name: Weights(
            conv.pack(noise(*step.weight.shape, seed=i) / 24).contiguous(), noise(step.out_channels, seed=i).float()
        )
        for i, step in enumerate(steps)
    }
    monkeypatch.setattr(hopper_chain, "TILES", (HopperTile(16, 2),))
    monkeypatch.setattr(hopper_chain, "ranked_chains", hopper_chain.ranked_chains.__wrapped__)  # not kept for others
    if broken:
        output_of = hopper_chain.output_of
        monkeypatch.setattr(hopper_chain, "output_of", lambda rect, *rest: output_of((0, 60, *rect[2:]), *rest))
    found = chains.checked_runs(plan, weights, CARDS["H100"])
    assert len(found) == groups
    if broken:
        assert "net_l.block0.first and after are launched one by one: net_l.block0.first: relative er" in caplog.text
    elif not groups:
        assert "its blocks do not fit on the GPU at the same time" in caplog.text
    monkeypatch.setattr(hopper_chain, "reason_against", lambda device, dtype: "another GPU")
    assert chains.checked_runs(plan, weights, CARDS["H100"]) == []
    assert chains.checked_runs(plan, weights, CARDS["H100"]._replace(num_sms=1)) == []


# -- the launcher -------------------------------------------------------------------------------------------------


def test_structures_have_the_kernel_s_fields():
    layer = hopper_chain._layer_type(emulator.TensorMap)
    text = SOURCE.read_text()
    kinds = {"TensorMap": "CUtensorMap", "Layer": "ChainLayer"}
    lengths = {"kMaxLayers": hopper_chain.MAX_LAYERS}
    for structure, name in ((layer, "ChainLayer"), (hopper_chain._chain_type(layer), "Chain")):
        body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.S)[1]
        declared = re.findall(r"^  (\w+\*?) ([^;]+);", body, re.M)
        in_cpp = [
            (field, int(lengths.get(length, length) or 1), "*" if kind.endswith("*") else kind)
            for kind, names in declared
            for field, length in re.findall(r"(\w+)(?:\[(\w+)\])?", names)
        ]
        found = [(field, count, kinds.get(kind, kind)) for field, count, kind in fields_in_python(structure)]
        assert in_cpp == found
    for constant, value in (("kMaxLayers", hopper_chain.MAX_LAYERS), ("kCounterStride", hopper_chain.COUNTER_STRIDE),
                            ("kTaps", hopper_chain._TAPS)):  # fmt: skip
        assert int(re.search(rf"constexpr int {constant} = (\d+);", text)[1]) == value


def test_the_structures_of_a_gpu(monkeypatch):
    """With the driver's tensor maps: 128 bytes each, at multiples of 64, where the kernel reads them."""
    count = itertools.count(1)

    def encode(name, address, *rest):
        assert name == "cuTensorMapEncodeTiled"
        ctypes.memmove(address, bytes([next(count), 0] * 64), 128)

    monkeypatch.setattr(hopper, "call", encode)
    conv = Conv(64, 64, 3, 1, 1, False, True, False)
    maps = [torch.zeros(1, 8, 8, 64, dtype=torch.float16) for _ in range(4)]
    chain = Chain(conv, blocks(conv, maps, 3 * [(0, 8, 0, 8)]), HopperTile(8, 1))
    found = bytes(chain._chain)
    assert len(found) == 3136
    assert [
        found[384 * layer + 128 * part : 384 * layer + 128 * part + 128] for layer in range(3) for part in (0, 1)
    ] == [bytes([number, 0] * 64) for number in range(1, 7)]
    stores = [int.from_bytes(found[384 * layer + 256 + 16 : 384 * layer + 256 + 24], "little") for layer in range(3)]
    assert stores == [one.data_ptr() for one in maps[1:]]
    assert int.from_bytes(found[3072:3080], "little") == chain._counters.data_ptr()
    assert int.from_bytes(found[3080:3084], "little") == 3


def test_launcher_names_the_argument():
    conv = Conv(64, 64, 3, 1, 1, False, True, False)
    maps = [torch.zeros(1, 16, 16, 64, dtype=torch.float16) for _ in range(3)]
    layers = blocks(conv, maps, 2 * [(0, 16, 0, 16)])
    tile = HopperTile(8, 1)
    with pytest.raises(ValueError, match="^layers: expected 2 to 8, got 1"):
        Chain(conv, layers[:1], tile)
    with pytest.raises(ValueError, match="^tile: expected one of"):
        Chain(conv, layers, HopperTile(32, 1))
    with pytest.raises(ValueError, match="^source: expected float16 or bfloat16"):
        Chain(conv, [layers[0]._replace(source=maps[0].float()), layers[1]], tile)
    for name, layer in (
        ("source", layers[1]._replace(source=maps[1].bfloat16(), weight=layers[1].weight.bfloat16(), residual=None,
                                      stores=(Store(maps[2].bfloat16(), "none"),))),
        ("source", layers[1]._replace(source=maps[1][:, :8], residual=None)),
        ("residual", layers[1]._replace(residual=maps[0][:, :8])),
        ("residual", layers[1]._replace(residual=maps[0].float())),
        ("stores", layers[1]._replace(stores=(Store(maps[2][:, :8], "none"),))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: expected \(1, 16, 16, 64\) torch.float16 as the first"):
            Chain(conv, [layers[0], layer], tile)
    for other, said in (
        (conv._replace(stride=2, kernel=4), "stride 1 and as many"),
        (conv._replace(out_channels=128), "stride 1 and as many"),
        (conv._replace(kernel=1, padding=0), "3x3 taps"),
    ):
        with pytest.raises(ValueError, match=f"^conv: expected {said}"):
            hopper_chain.describe_chain(other, 1, (16, 16), 2 * [(0, 16, 0, 16)], tile)


def test_not_used_without_such_a_gpu():
    assert "NVIDIA GPU" in hopper_chain.reason_against(torch.device("cpu"), torch.float16)


@pytest.mark.gpu
@hopper_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_run_with_a_chain(dtype):
    """By a graph and launch by launch, and in a hole, beside the run whose steps are launched one by one."""
    torch.manual_seed(0)
    plan = build_plan(plan_stages(create_model("lgnet").eval().cuda()), 1, 256, 256)
    image = torch.rand(1, 3, 256, 256, device="cuda") * 2 - 1
    mask = torch.zeros(1, 1, 256, 256, device="cuda")
    mask[..., 96:160, 96:160] = 1
    card = card_with("sm_90", torch.cuda.get_device_properties(0).multi_processor_count)
    (numbers,) = chains.runs(plan)
    if not chains.tiles(plan, numbers, chains.rectangles(plan, numbers, None), card):
        pytest.skip(f"{card.num_sms} multiprocessors hold too few blocks")
    expected, _ = CudaExecutor.of(plan, dtype, chains=False).run(image, mask)
    executor = CudaExecutor.of(plan, dtype, chains=True)
    assert list(executor.choices.values()).count("chain") == 8
    for one in (executor, executor.without_graphs()):
        one.memory.arena.fill_(torch.nan)
        found, _ = one.run(image, mask)
        assert (found - expected).norm() < 64 * torch.finfo(dtype).eps * expected.norm()
    regions = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 160, 96, 160)]).steps]
    assert len(executor.launches(regions)) == len(CudaExecutor.of(plan, dtype, chains=False).launches(regions)) - 7
    for _ in range(3):  # launch by launch at first, then by a graph
        executor.memory.arena.fill_(torch.nan)
        found, _ = executor.run(image, mask, None, regions)
        assert (found - expected).norm() < 64 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm here")
def test_machine_code():
    """A row's twelve products in flight with one wait, loads by the copy engine, nothing in local memory."""
    kernels = instructions("hopper_chain", "sm_90a")
    names = {f"lgnet_chain_{kind}_{tile_h}" for kind in ("float16", "bfloat16") for tile_h in (4, 8, 16)}
    assert set(kernels) == names | {"lgnet_chain_float16_16_timed"}
    for name, body in kernels.items():
        pixels = 8 * int(name.split("_")[3])
        order = re.findall(rf"HGMMA\.64x{pixels}x16\.F32|DEPBAR\.LE gsb0, 0x[01]", body)
        runs = [(kind[-3:], len(list(run))) for kind, run in itertools.groupby(order)]
        assert runs[:2] == [("F32", 12), ("0x1", 1)], f"{name}: serialised products: {runs}"
        assert [kind for kind, _ in runs[2:]] == ["0x0"], f"{name}: {runs}"
        # What the layer after this one reads by copies: stores, fences, all threads, then the count; and in the
        # thread that waits: the count, the fence, the first copy.
        after = body[body.rindex("HGMMA") :]
        order = re.findall(r"STG\.E\.128|FENCE\.VIEW\.ASYNC\.[GS]|BAR\.SYNC|MEMBAR\.ALL\.GPU|REDG\.E\.ADD", after)
        last = len(order) - order[::-1].index("STG.E.128")
        end = [kind for kind, _ in itertools.groupby(order[last:])]
        assert end[:3] in (["FENCE.VIEW.ASYNC.G", "FENCE.VIEW.ASYNC.S", "BAR.SYNC"],
                           ["FENCE.VIEW.ASYNC.S", "FENCE.VIEW.ASYNC.G", "BAR.SYNC"]), (name, end)  # fmt: skip
        assert order[order.index("REDG.E.ADD") - 1] == "MEMBAR.ALL.GPU", (name, order)
        before = body[: body.index("UTMALDG.4D")]
        assert before.rindex("LDG.E.STRONG.GPU") < before.rindex("FENCE.VIEW.ASYNC.G"), name
        for opcode in (
            "UTMALDG.4D",
            "UTMALDG.2D.MULTICAST",
            "STG.E.128",
            "REDG.E.ADD",
            "LDG.E.STRONG.GPU",
            "VIEW.ASYNC.G",
        ):
            assert opcode in body, (name, opcode)
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: spills"
