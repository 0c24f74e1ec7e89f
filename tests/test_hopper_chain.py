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
from lgnet_fast.kernels.hopper_chain import Chain, ChainLayer, ChainStep, seconds
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

H100 = CARDS["H100"]
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


def layer(conv, source, out, rect, activation="relu", residual=None, seed=0):
    """A layer with weights of noise."""
    first, second = (conv.in_channels, conv.out_channels)[:: 1 if conv.transposed else -1]
    weight = noise(first, second, conv.kernel, conv.kernel, dtype=source.dtype, seed=seed)
    packed = conv.pack(weight / (conv.kernel**2 * conv.in_channels) ** 0.5).contiguous()
    bias = noise(conv.out_channels, seed=seed).float()
    return ChainLayer(conv, source, packed, bias, (Store(out, activation),), rect, residual)


def blocks(conv, maps, rects):
    """Layers from each map to the next: residual blocks, as in NetL."""
    return [
        layer(conv, maps[i], maps[i + 1], rect, "none" if i % 2 else "relu", maps[i - 1] if i % 2 else None, i)
        for i, rect in enumerate(rects)
    ]


def tile_of(tile_h, cluster):
    return HopperTile(tile_h, cluster, groups=hopper_chain.GROUPS)


def one_by_one(layers, tiles):
    for one, tile in zip(layers, tiles):
        hopper.hopper_forward(
            one.conv, one.source, one.weight, one.bias, one.stores, tile,
            size=one.step.out_size, rect=one.rect, residual=one.residual,
        )  # fmt: skip


@emulated
@pytest.mark.parametrize(
    ("tile", "batch", "size", "channels", "layers", "dtype"),
    [
        (tile_of(16, 2), 1, (32, 16), 128, 4, torch.float16),
        (tile_of(16, 1), 1, (20, 11), 64, 3, torch.float16),
        (tile_of(8, 2), 2, (16, 8), 192, 2, torch.bfloat16),
        (tile_of(8, 1), 1, (9, 17), 64, 8, torch.float16),
        (tile_of(4, 2), 1, (8, 16), 192, 3, torch.float16),
        (tile_of(4, 1), 3, (4, 8), 64, 5, torch.bfloat16),
    ],
)
def test_a_chain_gives_the_bits_of_its_layers(kernel, tile, batch, size, channels, layers, dtype):
    """Every order of events; launches in a row; nothing outside the rectangle is written."""
    conv = Conv(channels, channels, 3, 1, 1, False, True, False)
    for rect, kernel.seed in itertools.product(((0, size[0], 0, size[1]), (1, size[0] - 1, 2, size[1] - 3)), (0, 1)):
        start = [noise(batch, *size, channels, dtype=dtype, seed=i) for i in range(layers + 1)]
        own = blocks(conv, [one.clone() for one in start], layers * [rect])
        expected = blocks(conv, [one.clone() for one in start], layers * [rect])
        chain = Chain(own, layers * [tile])
        for _ in range(2):
            chain.launch()
            one_by_one(expected, layers * [tile])
            for i, (one, exact) in enumerate(zip(own, expected)):
                assert torch.equal(one.stores[0].view, exact.stores[0].view), (rect, kernel.seed, i)
        assert not chain._counters.any()
        assert kernel.launched[-1 - layers] == f"lgnet_chain_{str(dtype).removeprefix('torch.')}"


DOWN = Conv(128, 128, 4, 2, 1, False, False, False)
UP = Conv(128, 128, 4, 2, 1, True, False, False)
SAME = Conv(128, 128, 3, 1, 1, False, False, False)
POINTWISE = Conv(128, 128, 1, 1, 0, False, False, False)


@emulated
@pytest.mark.parametrize("cluster", [2, 1])
@pytest.mark.parametrize(
    ("size", "convs", "heights"),
    [
        (32, (DOWN, DOWN, DOWN), (16, 8, 4)),
        (8, (UP, UP, DOWN), (4, 8, 16)),
        (16, (DOWN, SAME, UP, SAME, POINTWISE), (4, 16, 8, 4, 4)),  # rows of two taps, three, one
        (8, (POINTWISE, UP, POINTWISE, DOWN), (8, 16, 8, 8)),
        (16, (DOWN._replace(out_channels=256), UP._replace(in_channels=256, out_channels=64)), (8, 16)),
    ],
)
def test_unlike_layers(kernel, size, convs, heights, cluster):
    """The bits of each layer's own launch, in every order of events; parts of the last map; wide maps, a batch."""
    for kernel.seed, batch in ((0, 1), (1, 2), (2, 1)):
        both = []
        for _ in range(2):
            height, width = size, size
            source, layers = noise(batch, size, size, convs[0].in_channels), []
            for number, conv in enumerate(convs):
                height, width = (n * conv.axis.out_step // conv.axis.in_step for n in (height, width))
                out = torch.full((batch, height, width, conv.out_channels + 64), float("nan")).half()[..., 64:]
                last = number == len(convs) - 1
                rect = (1, height - 1, 2, width) if last else (0, height, 0, width)
                added = noise(batch, height, width, conv.out_channels, seed=9) if last else None
                layers.append(layer(conv, source, out, rect, "leaky_relu", added, number))
                source = out
            both.append(layers)
        tiles = [tile_of(tile_h, cluster) for tile_h in heights]
        chain = Chain(both[0], tiles)
        for _ in range(2):
            chain.launch()
        one_by_one(both[1], tiles)
        for i, (one, exact) in enumerate(zip(*both)):
            found, expected = (each.stores[0].view.nan_to_num(9e4) for each in (one, exact))
            assert torch.equal(found, expected), (kernel.seed, i)
        assert not chain._counters.any()
        assert kernel.launched[-2 - len(convs) : -len(convs)] == 2 * ["lgnet_chain_float16"]


@emulated
def test_rectangles_that_shrink(kernel):
    """As in a restricted run, where later layers need less. Two stores in views of wider maps, a batch."""
    conv = Conv(128, 128, 3, 1, 1, False, True, False)
    tiles = 4 * [tile_of(4, 2)]
    rects = [(0, 12, 1, 20), (1, 11, 2, 19), (2, 10, 3, 18), (3, 9, 4, 17)]
    found = []
    for together in (True, False):
        maps = [noise(2, 16, 24, 128, seed=i) for i in range(5)]
        wide = [torch.full((2, 16, 24, 256), float("nan"), dtype=torch.float16) for _ in rects]
        layers = [
            one._replace(stores=(*one.stores, Store(other[..., 128:], "leaky_relu")))
            for one, other in zip(blocks(conv, maps, rects), wide)
        ]
        if together:
            Chain(layers, tiles).launch()
        else:
            one_by_one(layers, tiles)
        found.append([*maps, *(one.nan_to_num(9e4) for one in wide)])
    assert all(map(torch.equal, *found))
    top, bottom, left, right = rects[-1]
    assert (found[0][-1][:, top:bottom, left:right, 128:] < 9e4).all()
    assert (found[0][-1][..., :128] == 9e4).all()


@emulated
@pytest.mark.parametrize(("name", "group", "hole"), [("lgnet_demo", 0, 32), ("lgnet_light", 1, 16)])
def test_the_steps_of_a_plan(kernel, name, group, hole):
    """Groups in the rectangles of a hole, beside the launches of each step."""
    plan = plan_of(name)
    numbers = chains.runs(plan, H100)[group]
    regions = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 96 + hole, 96, 96 + hole)]).steps]
    rects = chains.rectangles(plan, numbers, regions)
    tiles, _ = chains.tiles(plan, numbers, rects, H100)[0]
    steps = steps_at(plan, numbers.start, len(numbers))
    weights = noise_weights(steps)
    maps = noise_maps(plan, steps, torch.float16, torch.device("cpu"))
    alone = {name: one.clone() for name, one in maps.items()}
    chain = chains.make_chain(plan, numbers, weights, functools.partial(view_of, maps), rects, tiles)
    chain.launch()
    assert wrong_step(plan, steps, weights, maps, rects) is None
    assert wrong_step(plan, steps, weights, maps).startswith(f"{steps[0].name}: relative error")
    one_by_one(
        chains.make_chain(plan, numbers, weights, functools.partial(view_of, alone), rects, tiles)._layers, tiles
    )
    assert all(torch.equal(one, alone[name]) for name, one in maps.items())
    assert len(kernel.launched) == 1 + len(steps)


def noise_weights(steps):
    found = {}
    for i, step in enumerate(steps):
        conv = chains.conv_of(step)
        packed = conv.pack(noise(*step.weight.shape, seed=i) / step.weight[0].numel() ** 0.5).contiguous()
        found[step.name] = Weights(packed, noise(step.out_channels, seed=i).float())
    return found


@emulated
def test_clocks(kernel):
    conv = Conv(128, 128, 3, 1, 1, False, True, False)
    maps = [noise(1, 16, 16, 128, seed=i) for i in range(4)]
    layers = blocks(conv, maps, 3 * [(0, 16, 0, 16)])
    clocks = torch.zeros(3, 4, 8, dtype=torch.int64)
    Chain(layers, 3 * [tile_of(16, 1)], clocks).launch()
    assert kernel.launched == ["lgnet_chain_float16_timed"]
    assert (clocks[..., :6].diff(dim=2) > 0).all()
    assert (clocks[..., 6:] > 0).all()
    assert (clocks[1:, :, 0] > clocks[:-1, :, 5]).all()
    with pytest.raises(ValueError, match=r"^clocks: expected \(3, 4, 8\) int64"):
        Chain(layers, 3 * [tile_of(16, 1)], clocks.int())
    other = blocks(conv, [one.bfloat16() for one in maps], 3 * [(0, 16, 0, 16)])
    with pytest.raises(ValueError, match=r"^clocks: expected float16, got torch.bfloat16"):
        Chain(other, 3 * [tile_of(16, 1)], clocks)


@emulated
def test_the_check_at_first_use(kernel, monkeypatch):
    """It passes for every tile, and finds a wrong layer and bits that change."""
    problem, residual_blocks = hopper_chain._problem, hopper_chain._residual_blocks
    unlike, count = hopper_chain._unlike_layers, 2
    monkeypatch.setattr(hopper_chain, "_problem", lambda case, tiles, repeats: problem(case, tiles, count))
    monkeypatch.setattr(
        hopper_chain, "_residual_blocks",
        lambda channels, shape, *rest: residual_blocks(channels, (1, shape[1] // 2, 8), *rest),
    )  # fmt: skip
    monkeypatch.setattr(hopper_chain, "_unlike_layers", lambda channels, shape, *rest: unlike(64, (1, 8, 16), *rest))
    assert hopper_chain._check(torch.device("cpu"), torch.float16) is None
    assert kernel.launched == 2 * (len(hopper_chain.TILES) + 12) * ["lgnet_chain_float16"]
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
        ("load_acquire(counter) < tiles", "load_acquire(counter) < 1"),  # the first alone
    ],
)
def test_emulator_finds_races(kernel, tmp_path, monkeypatch, right, wrong):
    emulate_fault(tmp_path, monkeypatch, SOURCE.name, right, wrong)
    found = []
    for kernel.seed in range(6):
        case = hopper_chain._residual_blocks(128, (1, 16, 8), torch.float16, torch.device("cpu"))
        found.append(hopper_chain._problem(case, 4 * (tile_of(8, 1),), 1))
    assert any(found)


# -- the engine's groups ------------------------------------------------------------------------------------------


NETL = [f"net_l.block{i}.{part}" for i in range(4) for part in ("first", "second")]
UPSAMPLING = ["net_l.up1", "net_l.up2"]


def names_of(plan):
    return [[plan.steps[n].name for n in numbers] for numbers in chains.runs(plan, H100)]


@pytest.mark.parametrize("name", ["lgnet_light", "lgnet_demo"])
def test_runs_of_narrow_models(name):
    """Their U-Nets have too few channels."""
    expected = [NETL, UPSAMPLING] if name == "lgnet_light" else [NETL]
    assert names_of(plan_of(name)) == expected


def test_runs():
    """The U-Nets' steps beside the deep layers, and NetL's: blocks, which pad by reflection, and what upsamples."""
    plan = plan_of("lgnet")
    encoders = [[f"{net}.e{i}" for i in (2, 3, 4)] for net in ("net_c", "net_g")]
    assert names_of(plan) == [encoders[0], ["net_c.d4", "net_c.d3", "net_c.d2"], NETL, UPSAMPLING, encoders[1]]
    gaining = [numbers for numbers in chains.runs(plan, H100) if chains.gains(plan, numbers, H100)]
    assert [plan.steps[numbers.start].name for numbers in gaining] == [
        "net_c.e2", "net_c.d4", "net_l.block0.first", "net_g.e2"
    ]  # fmt: skip


def test_a_chain_ends_before_a_residual_that_another_thread_stores(monkeypatch):
    """And after eight layers."""
    plan = plan_of("lgnet_demo")
    (numbers,) = chains.runs(plan, H100)
    third = plan.steps[numbers.start + 3]
    shifted = replace(third, residual=replace(third.residual, offset=8))
    steps = [shifted if step is third else step for step in plan.steps]
    changed = replace(plan, steps=tuple(steps))
    assert chains.runs(changed, H100) == [
        range(numbers.start, numbers.start + 3),
        range(numbers.start + 3, numbers.stop),
    ]
    monkeypatch.setattr(hopper_chain, "MAX_LAYERS", 3)
    begin = numbers.start
    assert chains.runs(plan, H100) == [
        range(begin, begin + 3),
        range(begin + 3, begin + 6),
        range(begin + 6, begin + 8),
    ]


def test_a_residual_of_an_unlike_layer_ends_a_chain():
    """Their tiles differ, so that another thread stores it."""
    plan = plan_of("lgnet")
    numbers = chains.runs(plan, H100)[1]
    d4, d3, d2 = (plan.steps[number] for number in numbers)
    for stored, expected in ((d4, [numbers.start + 2]), (d3, [])):
        own = replace(d2, residual=replace(stored.stores[0].view, channels=d2.out_channels))
        changed = replace(plan, steps=tuple(own if step is d2 else step for step in plan.steps))
        found = [n for n in chains.runs(changed, H100) if numbers.start in n]
        assert [n.stop for n in found] == (expected or [numbers.start + 2]), stored.name
    older = replace(d2, residual=replace(plan.steps[0].stores[0].view, channels=d2.out_channels))
    changed = replace(plan, steps=tuple(older if step is d2 else step for step in plan.steps))
    assert numbers in chains.runs(changed, H100)


def test_rectangles_of_restricted_runs():
    plan = plan_of("lgnet")
    numbers = chains.runs(plan, H100)[2]
    assert chains.rectangles(plan, numbers, None) == 8 * (Rect(*WHOLE),)
    regions = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 160, 96, 160)]).steps]
    rects = chains.rectangles(plan, numbers, regions)
    assert all(one.top <= other.top and one.bottom >= other.bottom for one, other in itertools.pairwise(rects))
    regions[numbers.start + 2] = (Rect(0, 1, 0, 1), Rect(4, 5, 4, 5))
    assert chains.rectangles(plan, numbers, regions) is None
    regions[numbers.start + 2] = ()
    assert chains.rectangles(plan, numbers, regions) is None


def ranked_blocks(rect, batch=1, card=H100):
    return hopper_chain.ranked_chains(8 * (ChainStep(BLOCK, (64, 64), (64, 64), rect),), batch, card)


def test_the_estimate():
    """The chain saves some of the starts; its blocks must run at the same time; fewer rows take less time."""
    (tiles, costs), *others = ranked_blocks(WHOLE)
    steps = 8 * [ChainStep(BLOCK, (64, 64), (64, 64), WHOLE)]
    assert hopper_chain.describe_chain(steps, 1, tiles).grid == 128
    assert all(seconds(costs) <= seconds(other) for _, other in others)
    single = 8 * ranked(BLOCK, 1, (64, 64), (64, 64), WHOLE, H100)[0][1].seconds
    assert 15e-6 < single - seconds(costs) < 8 * 5e-6
    assert costs[0].start > costs[1].start == costs[7].start
    assert ranked_blocks(WHOLE, batch=2) == ()
    assert ranked_blocks(WHOLE, card=card_with("sm_90", 114)) == ()
    assert seconds(ranked_blocks((16, 40, 16, 40))[0][1]) < 0.7 * seconds(costs)


def test_a_chain_must_take_less_time_than_its_steps():
    """By Triton's kernels or Hopper's, whichever are faster by estimate: those are launched otherwise."""
    plan = plan_of("lgnet")
    numbers = chains.runs(plan, H100)[2]
    for rect in itertools.product((8, 16), (41, 49, 57), (8, 16), (41, 49, 57)):
        for _, one in chains.tiles(plan, numbers, 8 * [Rect(*rect)], H100):
            assert seconds(one) < 8 * ranked(BLOCK, 1, (64, 64), (64, 64), rect, H100)[0][1].seconds
    plan = resized_plan("lgnet_demo", 512)
    (numbers,) = [n for n in chains.runs(plan, H100) if plan.steps[n.start].name == "net_c.d5"]
    assert chains.gains(plan, numbers, H100)
    regions = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 160, 96, 160)]).steps]
    rects = chains.rectangles(plan, numbers, regions)
    steps = tuple(chains.shape_of(plan, plan.steps[n], rect) for n, rect in zip(numbers, rects))
    (_, costs), *_ = hopper_chain.ranked_chains(steps, 1, H100)
    by_hopper = sum(ranked(*step[:1], 1, *step[1:], H100)[0][1].seconds for step in steps)
    assert seconds(costs) < by_hopper
    assert chains.tiles(plan, numbers, rects, H100) == ()


def resized_plan(name, size, batch=1):
    return build_plan(plan_stages(create_model(name).eval()), batch, size, size)


@pytest.mark.parametrize(
    ("name", "size", "batch", "expected"),
    [
        # The blocks of e2, of d3 and of d2 do not fit on the GPU at once; the last two are a chain in holes.
        ("lgnet", 512, 1, [["net_c.e3", "net_c.e4", "net_c.e5"], ["net_c.d5", "net_c.d4"], ["net_c.d3", "net_c.d2"]]),
        ("lgnet", 256, 3, [["net_c.e3", "net_c.e4", "net_c.e5"], ["net_c.d5", "net_c.d4"], ["net_c.d3", "net_c.d2"]]),
    ],
)
def test_runs_of_other_sizes(name, size, batch, expected):
    """One that does not fit does not keep the others from sharing a launch."""
    with torch.device("meta"):
        plan = resized_plan(name, size, batch)
    assert names_of(plan)[: len(expected)] == expected


def test_tiles_of_unlike_layers():
    """Each layer has its own; all have the same stages of shared memory, which holds the largest patch and sums."""
    plan = plan_of("lgnet")
    for group, expected in ((0, (8, 4, 4)), (1, (4, 8, 16))):
        numbers = chains.runs(plan, H100)[group]
        rects = chains.rectangles(plan, numbers, None)
        (tiles, costs), *_ = chains.tiles(plan, numbers, rects, H100)
        assert tuple(tile.tile_h for tile in tiles) == expected
        steps = [chains.shape_of(plan, plan.steps[n], rect) for n, rect in zip(numbers, rects)]
        launch = hopper_chain.describe_chain(steps, 1, tiles)
        assert launch.grid == max(args.tiles for args in launch.args) == 128
        stages = {(a.weight_stages, a.weight_bytes, a.patch_stages, a.patch_bytes) for a in launch.args}
        ((weight_stages, weight_bytes, patch_stages, patch_bytes),) = stages
        assert weight_bytes == 2 * 64 * 128
        assert all(args.pitch * args.box_rows * 128 <= patch_bytes for args in launch.args)
        assert patch_stages * patch_bytes >= 2 * 8 * max(expected) * 4 * 68
        assert weight_stages * weight_bytes + patch_stages * patch_bytes < launch.shared_bytes <= 227 * 1024
        alone = [ranked(*one[:1], 1, *one[1:], H100)[0][1].seconds for one in steps]
        assert 4e-6 < sum(alone) - seconds(costs) < 10e-6


@emulated
@pytest.mark.parametrize(
    ("broken", "held", "groups"), [(False, 132, 1), (True, 132, 0), (False, 31, 0), (False, 32, 1)]
)
def test_a_group_is_checked_before_it_is_used(kernel, monkeypatch, caplog, broken, held, groups):
    """As the engine launches it, in the dense run; the bundled model's has 32 blocks."""
    plan = plan_of("lgnet_demo")
    monkeypatch.setattr(hopper_chain, "reason_against", lambda device, dtype: None)
    monkeypatch.setattr(kernel, "held", held)
    weights = noise_weights(steps_at(plan, chains.runs(plan, H100)[0].start, 8))
    monkeypatch.setattr(hopper_chain, "TILES", (tile_of(16, 2),))
    monkeypatch.setattr(hopper_chain, "ranked_chains", hopper_chain.ranked_chains.__wrapped__)  # not kept for others
    if broken:
        output_of = hopper_chain.output_of
        monkeypatch.setattr(hopper_chain, "output_of", lambda rect, *rest: output_of((0, 60, *rect[2:]), *rest))
    found = chains.checked_runs(plan, weights, H100)
    assert len(found) == groups
    launched = len(kernel.launched)
    assert chains.checked_runs(plan, weights, H100, ("net_c.e2",)) == []
    assert len(kernel.launched) == launched
    assert chains.checked_runs(plan, weights, H100, ("net_l.block0.first",)) == found
    if broken:
        assert "net_l.block0.first and after are launched one by one: net_l.block0.first: relative er" in caplog.text
    elif not groups:
        assert "its blocks do not fit on the GPU at the same time" in caplog.text
    monkeypatch.setattr(hopper_chain, "reason_against", lambda device, dtype: "another GPU")
    assert chains.checked_runs(plan, weights, H100) == []
    assert chains.checked_runs(plan, weights, H100._replace(num_sms=1)) == []


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
                            ("kGroups", hopper_chain.GROUPS)):  # fmt: skip
        assert int(re.search(rf"constexpr int {constant} = (\d+);", text)[1]) == value
    sizes = dict(re.findall(r"static_assert\(sizeof\((\w+)\) == (\d+)", text))
    assert sizes == {"ChainLayer": "960", "Chain": "7744"}


def test_the_structures_of_a_gpu(monkeypatch):
    """With the driver's tensor maps: 128 bytes each, at multiples of 64, where the kernel reads them."""
    count = itertools.count(1)

    def encode(name, address, *rest):
        assert name == "cuTensorMapEncodeTiled"
        ctypes.memmove(address, bytes([next(count), 0] * 64), 128)

    monkeypatch.setattr(hopper, "call", encode)
    down, up = (conv._replace(in_channels=64, out_channels=64) for conv in (DOWN, UP))
    maps = [torch.zeros(1, size, size, 64, dtype=torch.float16) for size in (16, 8, 16)]
    layers = [layer(down, *maps[:2], (0, 8, 0, 8)), layer(up, *maps[1:], (0, 16, 0, 16))]
    chain = Chain(layers, [tile_of(8, 1), tile_of(4, 1)])
    found = bytes(chain._chain)
    assert len(found) == 7744

    def map_at(at):
        assert at % 64 == 0
        return found[at : at + 128]

    first = [map_at(128 * part) for part in range(5)]
    assert first == [bytes([number, 0] * 64) for number in range(1, 6)]
    second = [map_at(960 + 128 * part) for part in range(5)]
    assert second == [bytes([6, 0] * 64), *3 * [bytes(128)], bytes([7, 0] * 64)]
    for number in range(2):
        at = 960 * number + 5 * 128
        args, output = found[at : at + 200], found[at + 200 : at + 272]
        assert args == bytes(chain.description.args[number])
        assert int.from_bytes(output[16:24], "little") == maps[number + 1].data_ptr()
        assert int.from_bytes(found[at + 272 : at + 276], "little") == (8, 4)[number]
    assert int.from_bytes(found[7680:7688], "little") == chain._counters.data_ptr()
    assert int.from_bytes(found[7688:7692], "little") == 2


def test_launcher_names_the_argument():
    conv = Conv(64, 64, 3, 1, 1, False, True, False)
    maps = [torch.zeros(1, 16, 16, 64, dtype=torch.float16) for _ in range(3)]
    layers = blocks(conv, maps, 2 * [(0, 16, 0, 16)])
    tiles = 2 * [tile_of(8, 1)]
    with pytest.raises(ValueError, match="^layers: expected 2 to 8, got 1"):
        Chain(layers[:1], tiles[:1])
    with pytest.raises(ValueError, match="^tiles: expected one for each of 2 layers, got 1"):
        Chain(layers, tiles[:1])
    for wrong in (tile_of(32, 1), HopperTile(8, 1), tile_of(8, 2)):
        with pytest.raises(ValueError, match=r"^tiles: expected some of .*, in clusters of the same size"):
            Chain(layers, [tiles[0], wrong])
    with pytest.raises(ValueError, match="^tiles: expected the same one for layers of Conv"):
        Chain(layers, [tiles[0], tile_of(4, 1)])
    with pytest.raises(ValueError, match="^source: expected float16 or bfloat16"):
        Chain([layers[0]._replace(source=maps[0].float()), layers[1]], tiles)
    for name, expected, one in (
        ("source", "a batch of 1 in", layers[1]._replace(
            source=maps[1].bfloat16(), weight=layers[1].weight.bfloat16(), residual=None,
            stores=(Store(maps[2].bfloat16(), "none"),))),
        ("source", "a batch of 1 in", layers[1]._replace(source=torch.cat(2 * [maps[1]]), residual=None)),
        ("residual", r"\(1, 16, 16, 64\)", layers[1]._replace(residual=torch.zeros(1, 8, 16, 64).half())),
        ("residual", "64 adjacent channels of torch.float16", layers[1]._replace(residual=maps[0].float())),
        ("stores", r"\(1, 16, 16, 64\)", layers[1]._replace(
            stores=(*layers[1].stores, Store(torch.zeros(1, 8, 16, 64).half(), "none")))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: expected {expected}"):
            Chain([layers[0], one], tiles)
    step = ChainStep(conv, (16, 16), (16, 16), (0, 16, 0, 16))
    other = step._replace(conv=conv._replace(reflect=False))
    with pytest.raises(ValueError, match="^conv: expected Conv.* where one pads by reflection, got Conv"):
        hopper_chain.describe_chain([step, other], 1, tiles)
    with pytest.raises(ValueError, match=r"^conv: 3x3 taps of stride 2 \(4x4 of stride 2 are supported"):
        hopper_chain.describe_chain(2 * [other._replace(conv=SAME._replace(stride=2))], 1, tiles)
    with pytest.raises(ValueError, match="^rect: expected some outputs of every layer"):
        hopper_chain.describe_chain(2 * [other._replace(rect=(0, 0, 0, 16))], 1, tiles)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        hopper_chain.describe_chain(2 * [other._replace(conv=POINTWISE)], 1, 2 * [tile_of(16, 1)])


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
    gaining = [numbers for numbers in chains.runs(plan, H100) if chains.gains(plan, numbers, card)]
    if not gaining:
        pytest.skip(f"{card.num_sms} multiprocessors hold too few blocks")
    expected, _ = CudaExecutor.of(plan, dtype, chains=False).run(image, mask)
    executor = CudaExecutor.of(plan, dtype, chains=True)
    assert list(executor.choices.values()).count("chain") == sum(map(len, gaining))
    for one in (executor, executor.without_graphs()):
        one.memory.arena.fill_(torch.nan)
        found, _ = one.run(image, mask)
        assert (found - expected).norm() < 64 * torch.finfo(dtype).eps * expected.norm()
    regions = [step.regions for step in CudaExecutor.restricted(plan, [Rect(96, 160, 96, 160)]).steps]
    assert len(executor.launches(regions)) < len(CudaExecutor.of(plan, dtype, chains=False).launches(regions)) - 7
    for _ in range(3):  # launch by launch at first, then by a graph
        executor.memory.arena.fill_(torch.nan)
        found, _ = executor.run(image, mask, None, regions)
        assert (found - expected).norm() < 64 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm here")
def test_machine_code():
    """Of every tile and row of taps, all products in flight with one wait, loads by the copy engine, nothing in local
    memory."""
    kernels = instructions("hopper_chain", "sm_90a")
    assert set(kernels) == {"lgnet_chain_float16", "lgnet_chain_bfloat16", "lgnet_chain_float16_timed"}
    for name, body in kernels.items():
        order = re.findall(r"HGMMA\.64x(\d+)x16\.F32|DEPBAR\.LE gsb0, (0x[01])", body)
        runs = [(kind, len(list(run))) for kind, run in itertools.groupby(pixels or wait for pixels, wait in order)]
        loops = [runs[i : i + 3] for i in range(0, 27, 3)]
        expected = [(str(8 * tile_h), 4 * taps) for tile_h in hopper_chain.HEIGHTS for taps in (3, 2, 1)]
        assert sorted(loop[0] for loop in loops) == sorted(expected), f"{name}: serialised products: {runs}"
        for _, within, after in loops:
            assert (within, after[0]) == (("0x1", 1), "0x0"), f"{name}: {runs}"
        assert {kind for kind, _ in runs[27:]} <= {"0x0"}, f"{name}: {runs}"
        # What the layer after this one reads by copies: stores, fences, all threads, then the count; and in the
        # thread that waits: the count, the fence, the first copy.
        for tile_h in hopper_chain.HEIGHTS:
            part = body[body.rindex(f"HGMMA.64x{8 * tile_h}x16") :].split("HGMMA")[1]
            order = re.findall(r"STG\.E\.128|FENCE\.VIEW\.ASYNC\.[GS]|BAR\.SYNC|MEMBAR\.ALL\.GPU|REDG\.E\.ADD", part)
            last = len(order) - order[::-1].index("STG.E.128")
            end = [kind for kind, _ in itertools.groupby(order[last:])]
            assert sorted(end[:2]) == ["FENCE.VIEW.ASYNC.G", "FENCE.VIEW.ASYNC.S"], (name, end)
            assert end[2:5] == ["BAR.SYNC", "MEMBAR.ALL.GPU", "REDG.E.ADD"], (name, end)
        before = body[: body.index("UTMALDG.4D")]
        assert before.rindex("LDG.E.STRONG.GPU") < before.rindex("FENCE.VIEW.ASYNC.G"), name
        assert "UTMALDG.2D.MULTICAST" in body, name
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: spills"
        registers = 1 + max(map(int, re.findall(r"\bR(\d+)\b", body)))
        assert registers * (hopper_chain.GROUPS * hopper.GROUP_THREADS + hopper.OTHER_THREADS) <= 65536, name
