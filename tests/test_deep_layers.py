"""The deep layers in one launch, without a GPU: the kernel on the CPU (tests/emulator/), and its machine code."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", minversion="3.5")

from lgnet_fast.kernels import deep, deep_exchange, deep_shapes
from lgnet_fast.kernels.conv import Conv
from lgnet_fast.kernels.results import Store

from lgnet_fast import create_model
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import deep_layers as engine_deep
from lgnet_fast.engine.cuda import grouped
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.memory import Memory
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.regions import Rect, rounded
from lgnet_fast.engine.torch_executor import ACTIVATIONS
from tests import emulator
from tests.compiled_kernels import disassembler, emulate_fault, hopper_gpu, instructions
from tests.support import assert_accurate

emulated = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))
ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "deep.cu"


class Weights:
    def __init__(self, packed, bias):
        self.packed, self.bias = packed, bias


@functools.cache
def plan_of(name: str, batch: int = 1) -> Plan:
    with torch.device("meta"):
        model = create_model(name).eval()
    return build_plan(plan_stages(model), batch, 256, 256)


def random_weights(plan, numbers):
    """step -> (packed, plain float16 weights as the step has them)."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for number in numbers:
        step = plan.steps[number]
        layer = grouped.layer_of(plan, step)
        plain = torch.randn(step.weight.shape, generator=generator)
        plain = (plain / (4 * step.source.channels) ** 0.5).half()
        bias = torch.randn(step.out_channels, generator=generator)
        found[step.name] = Weights(layer.conv.pack(plain), bias), plain
    return found


def exact(step, plain, bias, source):
    """The step in float64 before its activations, [B, H, W, C]."""
    x = source.double().permute(0, 3, 1, 2)
    g = step.geometry
    if g.transposed:
        value = F.conv_transpose2d(x, plain.double(), bias.double(), g.stride, g.padding, g.output_padding)
    else:
        value = F.conv2d(x, plain.double(), bias.double(), g.stride, g.padding)
    return value.permute(0, 2, 3, 1)


def make_group(name, net, batch, cluster, clusters, dtype=torch.float16, **options):
    """(plan, steps, group, random weights, maps of noise) of a network's deep layers."""
    plan = plan_of(name, batch)
    rows = 64 if name != "lgnet_light" else 16
    numbers = next(run for run in engine_deep.runs(plan, rows) if plan.steps[run[0]].name.startswith(net))
    steps = [plan.steps[number] for number in numbers]
    weights = random_weights(plan, numbers)
    own = {step: Weights(pair[0].packed.to(dtype), pair[0].bias) for step, pair in weights.items()}
    group = engine_deep.make_group(plan, numbers, own, {}, cluster, clusters, **options)
    assert not isinstance(group, str), group
    return plan, steps, group, weights, grouped.noise_maps(plan, steps, dtype, torch.device("cpu"))


def run_group(plan, steps, group, maps, seed=0, error=0, states=None, times=None):
    """Run a group on the CPU, as `DeepGroup.launch` does on a GPU; return its state. error: the code in its state
    before; None: whatever that is, and whatever it becomes."""
    view = functools.partial(grouped.view_of, maps)
    launch, state = engine_deep.group_launch(plan, plan.steps.index(steps[0]), group, view, states, times)
    if error is not None:
        state.counters[0] = error
    turn = int(state.counters[2 * deep_exchange.STATE_STRIDE])
    kernel = f"lgnet_deep_{str(group.dtype).removeprefix('torch.')}"
    options = {"threads": 32 * (deep_shapes.WARPS + 1), "shared_bytes": group.bytes, "cluster": group.cluster}
    address = ctypes.c_void_p(ctypes.addressof(launch.args[1]))
    emulator.launch("deep", kernel, group.grid, [address], cooperative=True, seed=seed, **options)
    if error == 0:
        assert state.counters.nonzero().tolist() == [[2 * deep_exchange.STATE_STRIDE]] * (1 - turn)
        assert (state.exchange[1 - turn] == deep_exchange.ABSENT).all()
        assert not (state.exchange[turn] == deep_exchange.ABSENT).any()
    return state


def test_runs_are_the_deep_layers():
    plan = plan_of("lgnet")
    names = [[plan.steps[n].name for n in run] for run in engine_deep.runs(plan, 64)]
    deep_ones = ["e5", "e6", "e7", "e8", "d8", "d7", "d6", "d5"]
    assert names == [[f"{net}.{part}" for part in deep_ones] for net in ("net_c", "net_g")]
    names = [[plan.steps[n].name[6:] for n in run] for run in engine_deep.runs(plan, 16)]
    assert names == [deep_ones[1:-1]] * 2
    assert engine_deep.runs(plan, 0) == []


@pytest.mark.parametrize("rows", [16, 64])
def test_restricted_runs_share_launches_too(rows):
    """The encoders are whole in every run, so both U-Nets' groups apply, unless their stage computes nothing."""
    plan = plan_of("lgnet")
    groups = engine_deep.runs(plan, rows)
    for hole in (Rect(96, 160, 96, 160), Rect(0, 32, 224, 256)):
        regions = [step.regions for step in CudaExecutor.restricted(plan, [hole]).steps]
        decoder = next(n for n in groups[0] if plan.steps[n].name == "net_c.d6")
        assert regions[decoder] != (plan.target(plan.steps[decoder]).everywhere,)
        for numbers in groups:
            assert engine_deep.applies(plan, numbers, regions)
            feeding = list(regions)
            feeding[numbers.start - 1] = (Rect(0, 1, 0, 1),)  # the layer before the group
            assert not engine_deep.applies(plan, numbers, feeding)
            none = [() if number in numbers else own for number, own in enumerate(regions)]
            assert not engine_deep.applies(plan, numbers, none)


@pytest.mark.parametrize(
    ("rows", "cluster", "clusters"),
    [(16, 8, 15), (16, 8, 16), (16, 4, 30), (16, 2, 66), (64, 8, 15), (64, 8, 16), (64, 4, 30)],
)
def test_every_block_reads_as_many_weights(rows, cluster, clusters):
    plan = plan_of("lgnet")
    layers = [grouped.layer_of(plan, plan.steps[number]) for number in engine_deep.runs(plan, rows)[0]]
    shares = deep_shapes.plan_splits(layers, cluster, clusters)
    assert not isinstance(shares, str), shares
    read = [sum(share.block_bytes(c) for share in shares) for c in range(clusters)]
    weights = 0
    for layer in layers:
        taps = sum(y[1] * x[1] for y, x in map(layer.taps, range(layer.conv.axis.phases**2)))
        weights += 2 * taps * layer.conv.in_channels * layer.conv.out_channels
    assert cluster * sum(read) == weights  # nothing is padded
    assert max(read) - min(read) <= max(
        share.step_rounds * share.warps_k * deep_shapes.PIECE_BYTES for share in shares
    )


def test_best_cluster():
    plan = plan_of("lgnet")
    layers = [grouped.layer_of(plan, plan.steps[number]) for number in engine_deep.runs(plan, 64)[0]]
    assert deep_shapes.best_cluster(layers, {8: 15, 4: 30, 2: 66}) == (8, 15)
    assert deep_shapes.best_cluster(layers, {8: 0, 4: 30, 2: 66}) == (4, 30)
    assert deep_shapes.best_cluster(layers, {8: 0}) == "the GPU holds no cluster"
    assert "shared memory" in deep_shapes.best_cluster(layers, {1: 132})


@emulated
@pytest.mark.parametrize(
    ("name", "net", "batch", "cluster", "clusters"),
    [
        ("lgnet_light", "net_g", 1, 8, 16),
        ("lgnet_demo", "net_g", 1, 8, 5),
        ("lgnet_demo", "net_c", 4, 8, 6),
        ("lgnet_demo", "net_c", 1, 4, 9),
        ("lgnet_demo", "net_c", 2, 1, 7),
        pytest.param("lgnet_light", "net_c", 1, 2, 66, marks=pytest.mark.slow(reason="its plan is like net_g's")),
        pytest.param("lgnet", "net_c", 1, 8, 15, marks=pytest.mark.slow(reason="the light network's plan is alike")),
        pytest.param("lgnet", "net_c", 1, 4, 30, marks=pytest.mark.slow(reason="the demo's plan has this cluster")),
    ],
)
def test_kernel_on_the_cpu(name, net, batch, cluster, clusters):
    plan, steps, group, weights, maps = make_group(name, net, batch, cluster, clusters)
    before = {key: value.clone() for key, value in maps.items()}
    view = functools.partial(grouped.view_of, maps)
    run_group(plan, steps, group, maps)
    for number in range(clusters):
        read = sum(share.block_bytes(number) for share in group.shares)
        assert {emulator.copied("deep", number * cluster + rank) for rank in range(cluster)} == {read}
    written = {key: torch.zeros_like(value, dtype=torch.bool) for key, value in maps.items()}
    for step in steps:
        own, plain = weights[step.name]
        value = exact(step, plain, own.bias, view(step.source))
        for store in step.stores:
            # sums in another order, one rounding
            assert_accurate(step.name, view(store.view), ACTIVATIONS[store.activation](value), roundings=1)
            grouped.view_of(written, store.view)[:] = True
    for key, value in maps.items():
        assert torch.equal(value[~written[key]], before[key][~written[key]]), key


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_do_not_depend_on_the_order_of_events(dtype):
    """Also by launches that keep the weights in the L2 cache, or load them once."""
    found = []
    for seed, evict_first in ((0, True), (1, True), (6, False)):  # 6: slow copies
        plan, steps, group, weights, maps = make_group("lgnet_demo", "net_c", 1, 8, 5, dtype, evict_first=evict_first)
        run_group(plan, steps, group, maps, seed)
        found.append(maps)
    for key, value in found[0].items():
        assert value.isfinite().all()
        assert torch.equal(found[1][key], value), key
        assert torch.equal(found[2][key], value), key
    step = steps[0]
    own, plain = weights[step.name]
    value = exact(step, plain, own.bias, grouped.view_of(maps, step.source))
    store = step.stores[0]
    stored = grouped.view_of(maps, store.view)
    assert_accurate(step.name, stored, ACTIVATIONS[store.activation](value), roundings=1)


@emulated
def test_launches_in_turn_share_a_state():
    """Each finds its exchange empty, whatever the launches before it stored there; nothing waits for a NaN."""
    plan, steps, group, _, maps = make_group("lgnet_demo", "net_c", 1, 8, 5)
    source = grouped.view_of(maps, steps[0].source)
    first = source.clone()
    broken = first.clone()
    broken[:, 0, 0] = -torch.tensor(torch.nan)  # a sum of it is rounded to the bits that mark what is absent
    states, found = {}, []
    for seed, value in enumerate((first, broken, -first, first)):
        source.copy_(value)
        run_group(plan, steps, group, maps, seed, states=states)
        found.append(grouped.view_of(maps, steps[-1].stores[0].view).clone())
    assert len(states) == 1
    assert found[1].isnan().any()
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[3])


@emulated
def test_maps_that_share_memory():
    """In an arena later maps take the place of earlier ones; these are in the exchange only."""
    plan, steps, group, _, maps = make_group("lgnet_demo", "net_c", 1, 8, 5)
    memory = Memory(plan, torch.float16, torch.device("cpu"))
    source, last = steps[0].source, steps[-1].stores[0].view
    memory.view(source).copy_(grouped.view_of(maps, source))
    stores = [[Store(memory.view(s.view), s.activation) for s in step.stores] for step in steps]
    program = group.program([memory.view(step.source) for step in steps], stores, group.new_state())
    kept = [[bool(layer.store0), bool(layer.store1)] for layer in program.layer[: len(steps)]]
    assert kept[-1][0]
    assert sum(map(sum, kept)) < sum(map(len, stores))
    run_group(plan, steps, group, maps)
    run_group(plan, steps, group, memory.maps, seed=1)
    assert torch.equal(memory.view(last), grouped.view_of(maps, last))


@emulated
def test_a_launch_after_a_failure_ends_with_nan():
    """If the state has an error, no block waits for another, the results are NaN, and the error stays."""
    plan, steps, group, _, maps = make_group("lgnet_demo", "net_c", 1, 8, 5)
    code = 4 << 24 | 3 << 16 | 18
    state = run_group(plan, steps, group, maps, error=code)
    assert state.error() == "block 17 waited for the layer before, at layer 3"
    for store in steps[-1].stores:
        assert grouped.view_of(maps, store.view).isnan().all()


@emulated
def test_clocks():
    plan, steps, group, _, maps = make_group("lgnet_demo", "net_c", 1, 8, 5)
    times = group.new_times()
    run_group(plan, steps, group, maps, times=times)
    works = times[..., 5] > 0
    assert works.all()
    assert (times[..., 1] > times[..., 0]).all()
    assert (times[..., 5] > times[..., 1]).all()


def test_reference_is_the_convolution():
    plan = plan_of("lgnet_demo")
    numbers = engine_deep.runs(plan, 64)[0]
    weights = random_weights(plan, numbers)
    steps = [plan.steps[number] for number in numbers]
    maps = grouped.noise_maps(plan, steps, torch.float16, torch.device("cpu"))
    for step in steps:
        own, plain = weights[step.name]
        source = grouped.view_of(maps, step.source)
        found = deep_shapes.reference(grouped.layer_of(plan, step), source, own.packed, own.bias)
        assert_accurate(step.name, found, exact(step, plain, own.bias, source), roundings=64)


@pytest.mark.parametrize(
    ("conv", "size", "reason"),
    [
        (Conv(512, 512, 4, 2, 1, False, False, False), (64, 64), "32, 32"),
        (Conv(24, 512, 4, 2, 1, False, False, False), (8, 8), "24 to 512 channels"),
        (Conv(512, 512, 3, 1, 1, False, True, False), (4, 4), "reflects"),
        (Conv(512, 512, 3, 2, 1, True, False, False), (4, 4), "taps"),
        (Conv(512, 512, 4, 2, 1, False, False, False), (12, 12), "powers of two"),
    ],
)
def test_unsupported_layers_are_named(conv, size, reason):
    out = tuple(2 * s if conv.transposed else s // conv.stride for s in size)
    assert reason in deep_shapes.unsupported(deep_shapes.DeepLayer(conv, 1, size, out))


def test_bad_views_are_named():
    plan = plan_of("lgnet_demo")
    numbers = engine_deep.runs(plan, 64)[0]
    weights = {step: pair[0] for step, pair in random_weights(plan, numbers).items()}
    group = engine_deep.make_group(plan, numbers, weights, {}, 8, 16)
    steps = [plan.steps[number] for number in numbers]
    maps = grouped.noise_maps(plan, steps, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="sources: expected .*torch.float16"):
        engine_deep.group_launch(plan, numbers[0], group, functools.partial(grouped.view_of, maps))


@emulated
def test_a_wait_that_times_out_is_named_and_the_state_can_be_reset():
    plan, steps, group, _, maps = make_group("lgnet_demo", "net_c", 1, 8, 5)
    last = steps[-1].stores[0].view
    states = {}
    state = run_group(plan, steps, group, maps, states=states)
    right = grouped.view_of(maps, last).clone()
    group._timeout = 1
    run_group(plan, steps, group, maps, states=states, error=None)
    assert re.fullmatch(r"block \d+ waited (for .*), at layer \d+", state.error())[1] in deep_exchange.WAITS.values()
    assert grouped.view_of(maps, last).isnan().all()
    group._timeout = deep.TIMEOUT
    state.reset()
    run_group(plan, steps, group, maps, states=states)
    assert torch.equal(grouped.view_of(maps, last), right)


@emulated
@pytest.mark.slow(reason="compiles the kernel three times")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (number > 0) guard.wait<true>(added", "if (false) guard.wait<true>(added"),
        ("before >> 1 & 1, code_of(kCluster", "before & 1, code_of(kCluster"),
        ("return (absent(v.x) | absent(v.y) | absent(v.z) | absent(v.w)) == 0;", "return absent(v.x) == 0;"),
    ],
)
def test_emulator_finds_races(tmp_path, monkeypatch, right, wrong):
    plan, steps, group, _, maps = make_group("lgnet_demo", "net_c", 1, 8, 5)
    last = steps[-1].stores[0].view
    run_group(plan, steps, group, maps)
    expected = grouped.view_of(maps, last).clone()
    emulate_fault(tmp_path, monkeypatch, SOURCE.name, right, wrong)

    def shows(seed):
        try:
            run_group(plan, steps, group, maps, seed)
        except RuntimeError:
            return True
        return not torch.equal(grouped.view_of(maps, last), expected)

    assert any(map(shows, range(8)))


def test_sources_are_stored_by_the_layers_before_or_older():
    def stores(*views):
        return [[Store(view, "none")] for view in views]

    memory = torch.zeros(4096, dtype=torch.float16)
    source, other = memory[:2048].view(1, 4, 8, 64), memory[2048:].view(1, 4, 8, 64)
    low, high = source[..., :32], source[..., 32:]
    assert deep_exchange.writers(source, stores(other)) == []
    assert deep_exchange.writers(source, stores(source)) == [(0, 0, 0)]
    assert deep_exchange.writers(source, stores(low, other, high)) == [(2, 0, 32), (0, 0, 0)]
    dead = memory[:512].view(1, 2, 4, 64)  # a map that was there before
    assert deep_exchange.writers(source, stores(dead, source)) == [(1, 0, 0)]
    wide = memory[: 64 * 33].as_strided((1, 1, 32, 32), (64 * 32, 64 * 32, 64, 1))
    for first, overlaps in ((0, True), (31, True), (32, False), (33, True), (63, True)):
        other = memory[first:].as_strided(wide.shape, wide.stride())
        assert deep_exchange.overlap(wide, other) == deep_exchange.overlap(other, wide) == overlaps, first
    other = memory[2048:].view(1, 4, 8, 64)
    with pytest.raises(ValueError, match="all channels, or none"):
        deep_exchange.writers(source, stores(low, other))
    for view in (dead, memory[32:2080].view(1, 4, 8, 64)):
        with pytest.raises(ValueError, match="each channel from one store"):
            deep_exchange.writers(source, stores(source, view))


def test_a_group_ends_before_a_step_that_reads_older_channels_too():
    plan = plan_of("lgnet")
    group, other = engine_deep.runs(plan, 64)
    number = next(n for n in group if plan.steps[n].name == "net_c.d7")
    skip = next(n for n in group if plan.steps[n].name == "net_c.e7")
    steps = list(plan.steps)
    kept = tuple(store for store in steps[skip].stores if store.view.buffer != steps[number].source.buffer)
    assert len(kept) == 1
    steps[skip] = dataclasses.replace(steps[skip], stores=kept)
    changed = dataclasses.replace(plan, steps=tuple(steps))
    assert engine_deep.runs(changed, 64) == [range(group.start, number), other]  # d6 and d5 read encoders' maps, too


def test_structures_have_the_kernel_s_fields():
    text = re.sub(r"//[^\n]*", "", SOURCE.read_text())

    def fields(name):
        body = re.search(rf"struct {name} {{(.*?)}};", text, re.S)[1]
        lines = [line.strip().split(None, 1 + line.strip().startswith("const")) for line in body.split(";")]
        names = [
            re.sub(r"[*\s]|\[.*?\]", "", one) for line in lines if line and line[0] for one in line[-1].split(",")
        ]
        return [one for one in names if one]

    assert fields("Layer") == [field[0] for field in deep._Layer._fields_]
    assert fields("Program") == [field[0] for field in deep._Program._fields_]
    for name, value in (
        ("kLayers", deep_shapes.MAX_LAYERS),
        ("kMaxSlots", deep_shapes.MAX_SLOTS),
        ("kSlotBytes", deep_shapes.SLOT_BYTES),
        ("kWarps", deep_shapes.WARPS),
        ("kUnit", deep_shapes.UNIT),
        ("kPixelBytes", deep_shapes.PIXEL_BYTES),
        ("kPieceBytes", deep_shapes.PIECE_BYTES),
        ("kStep", deep_shapes.STEP),
        ("kPad", deep_shapes.PAD),
        ("kBarrierBytes", deep_shapes.BARRIER_BYTES),
        ("kStateStride", deep_exchange.STATE_STRIDE),
    ):
        assert int(re.search(rf"constexpr int {name} = (\d+);", text)[1]) == value, name


def test_error_codes():
    state = deep_exchange.State(8, torch.device("cpu"))
    assert state.error() is None
    state.counters[0] = 5 << 24 | 3 << 16 | 18
    assert state.error() == "block 17 waited for its cluster, at layer 3"


@pytest.mark.gpu
@hopper_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_run_with_shared_launches(dtype):
    """By a graph and launch by launch, beside the run whose steps are launched one by one."""
    torch.manual_seed(0)
    plan = build_plan(plan_stages(create_model("lgnet_demo").eval().cuda()), 1, 256, 256)
    image = torch.rand(1, 3, 256, 256, device="cuda") * 2 - 1
    mask = torch.zeros(1, 1, 256, 256, device="cuda")
    mask[..., 60:200, 40:180] = 1
    expected, _ = CudaExecutor.of(plan, dtype, deep_rows=0).run(image, mask)
    executor = CudaExecutor.of(plan, dtype, deep_rows=64)
    assert list(executor.choices.values()).count("deep") == 16
    for one in (executor, executor.without_graphs()):
        found, _ = one.run(image, mask)
        assert torch.equal(found[:, :, :60], image[:, :, :60])
        assert (found - expected).norm() < 64 * torch.finfo(dtype).eps * expected.norm()
    holes = rounded([Rect(60, 200, 40, 180)], CudaExecutor.granularity, 256, 256)
    regions = [step.regions for step in CudaExecutor.restricted(plan, holes).steps]
    executor.memory.arena.fill_(torch.nan)
    found, _ = executor.run(image, mask, None, regions)
    assert (found - expected).norm() < 64 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm here")
def test_machine_code():
    kernels = instructions("deep", "sm_90a")
    assert set(kernels) == {"lgnet_deep_float16", "lgnet_deep_bfloat16"}
    for name, body in kernels.items():
        for opcode in (
            "UBLKCP", "HMMA.16816.F32", "LDS.128", "SYNCS.PHASECHK", "STAS",
            "LDG.E.128.STRONG.GPU", "STG.E.64.STRONG.GPU",
        ):  # fmt: skip
            assert opcode in body, (name, opcode)
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: registers spill"
