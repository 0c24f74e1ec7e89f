"""Tuning for a GPU, with the kernels in Triton's interpreter and a fake clock."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from lgnet_fast.kernels import apart, compiled, conv, conv_configs, conv_kernels, hopper, hopper_shapes, picture_conv
from lgnet_fast.kernels.apart import Outcome
from lgnet_fast.kernels.conv_configs import Cost, Tile, Work, pick_tile
from lgnet_fast.kernels.hopper_shapes import HopperTile
from lgnet_fast.kernels.picture_conv import PictureTile
from torch import Tensor

from lgnet_fast import LGNet, cache, info
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import chains, checks, deep_layers
from lgnet_fast.engine.cuda import executor as cuda_executor
from lgnet_fast.engine.cuda import first_use as cuda_first_use
from lgnet_fast.engine.cuda import tuning as cuda_tuning
from lgnet_fast.engine.cuda import tuning_convolutions as cuda_tuning_convolutions
from lgnet_fast.engine.cuda import weights as cuda_weights
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.graphs import CaptureError
from lgnet_fast.engine.cuda.measure import Found, Result, kept, product_key
from lgnet_fast.engine.cuda.tuning import gains, tune
from lgnet_fast.engine.cuda.tuning_convolutions import LAUNCHES, tiles
from lgnet_fast.engine.cuda.weights import Tuned, work_of
from lgnet_fast.engine.plan import PICTURE, ConvStep, Plan
from lgnet_fast.engine.regions import Rect
from tests import emulator
from tests.interpreted.plans import picture_plan, tiny_plan
from tests.interpreted.test_cuda_executor import cast, check, inputs
from tests.interpreted.timers import IdleTimer

pytestmark = pytest.mark.usefixtures("fresh_cache")

needs_emulator = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))

CPU = torch.device("cpu")
SINGLE = torch.float32


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tiny_plan()


@pytest.fixture(scope="module")
def short(plan: Plan) -> Plan:
    """Two convolutions and the attention block of the plan, because tuning needs no picture."""
    steps = tuple(s for s in plan.steps if s.name in ("u.block", "u.attention", "u.d1"))
    used = {PICTURE, *(v.buffer for s in steps for v in (s.source, *(store.view for store in s.stores)))}
    return replace(plan, steps=steps, buffers={name: b for name, b in plan.buffers.items() if name in used})


class FakeTimer(IdleTimer):
    """Compiles nothing; a launch takes `cost` of its tile (cuDNN: None), whole runs take the values of `runs`.

    compiled_us: what a launch of the compiled kernels takes.
    """

    def __init__(
        self, cost: Callable[[Tile | None], float], runs: Sequence[float] = (3.0, 2.0), compiled_us: float = 1e3
    ) -> None:
        super().__init__()
        self.cost, self.runs, self.compiled_us = cost, list(runs), compiled_us

    def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
        (launch, *others) = launches
        arguments: Any = getattr(launch, "args", ())
        if len(launches) == LAUNCHES:
            assert len(others) == LAUNCHES - 1
            if any(compiled.as_compiled(a) is not None for a in arguments):
                return self.compiled_us
            return self.cost(next((a for a in arguments if isinstance(a, Tile)), None))
        if len(launches) == 1:
            self.runs.append(self.runs.pop(0))
            return 1e3 * self.runs[-1]
        return 5.0  # attention: all alike


def splits_are_slow(tile: Tile | None) -> float:
    """Fewest splits, then the narrowest block, is best; cuDNN is worst."""
    return 1000.0 if tile is None else 10.0 * tile.splits + tile.block_n


def run(plan: Plan, timer: FakeTimer, **options: Any) -> Found:
    return tune(plan, SINGLE, CPU, 1e6, timer=timer, tried=3, **options)


def test_the_fastest_tile_runs_and_is_kept(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FakeTimer(splits_are_slow)
    lines: list[str] = []
    found = run(plan, timer, progress=lines.append)
    assert len(timer.compiled) > len(plan.steps)
    convolutions = [step for step in plan.steps if isinstance(step, ConvStep)]
    assert set(found.tiles) == {product_key(work_of(plan, s), "ieee") for s in convolutions}
    for result in found.tiles.values():
        assert result.us == splits_are_slow(Tile(*result.choice)) <= result.default_us
    assert any(result.choice != result.default for result in found.tiles.values())
    assert (found.before_ms, found.now_ms) == (3.0, 2.0)
    assert any(line.startswith("u.e2: ") and line.endswith("x") for line in lines)
    monkeypatch.setattr(cache, "_known", {})  # another process
    tuned = kept(CPU, SINGLE)
    assert tuned == found.tuned()
    executor = CudaExecutor.of(plan, SINGLE, tuned=tuned)
    for step in convolutions:
        assert executor.tile(step) == tuned.tile(work_of(plan, step), "ieee")
    assert executor.chosen_by.startswith("measurement")
    check(cast(plan, torch.float64), executor, *inputs(plan))
    rows = gains(plan, SINGLE, CPU, found)
    assert [row[0] for row in rows] == [step.name for step in plan.steps]
    assert all(now <= before for _, _, before, _, now in rows)


def test_pytorchs_own_convolution_is_a_candidate(plan: Plan) -> None:
    found = run(plan, FakeTimer(lambda tile: 1.0 if tile is None else 50.0))
    assert {result.choice for result in found.tiles.values()} == {"cudnn"}
    executor = CudaExecutor.of(plan, SINGLE, tuned=found.tuned())
    assert set(executor.choices.values()) == {"cudnn", "attention"}
    check(cast(plan, torch.float64), executor, *inputs(plan))


def test_a_little_faster_is_no_reason_to_change(short: Plan) -> None:
    default = {
        step.name: CudaExecutor.of(short, SINGLE).tile(step) for step in short.steps if isinstance(step, ConvStep)
    }
    found = run(short, FakeTimer(lambda tile: 10.0 if tile in default.values() else 9.9))
    assert all(result.choice == result.default for result in found.tiles.values())


def test_what_is_slower_in_the_whole_is_dropped(short: Plan) -> None:
    found = run(short, FakeTimer(splits_are_slow, (2.0, 2.1)))
    assert (found.tiles, found.attention) == ({}, {})
    assert kept(CPU, SINGLE) == Tuned()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: invalid argument"), torch.OutOfMemoryError()], ids=type)
def test_a_wrong_tile_is_no_contestant(short: Plan, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes zeros, and one that raises, though they are the fastest."""
    step = next(s for s in short.steps if s.name == "u.block")
    assert isinstance(step, ConvStep)
    default = CudaExecutor.of(short, SINGLE).tile(step)
    zeros, raising = default._replace(num_warps=2), default._replace(num_warps=8)
    monkeypatch.setattr(cuda_tuning_convolutions, "tiles", lambda *args: iter([zeros, raising]))
    original = conv.conv_forward

    def faulty(conv: Any, source: Any, weight: Any, bias: Any, stores: Any, tile: Tile, **options: Any) -> None:
        if tile == raising:
            raise error
        original(conv, source, weight, bias, stores, tile, **options)
        if tile == zeros:
            for written in [store.view for store in stores] or [options["merge"].raw]:
                written.zero_()

    monkeypatch.setattr(conv, "conv_forward", faulty)
    found = run(short, FakeTimer(lambda tile: 1.0 if tile in (zeros, raising) else 10.0))
    assert tuple(zeros) not in {result.choice for result in found.tiles.values()}
    assert tuple(raising) not in {result.choice for result in found.tiles.values()}


def test_an_interrupted_tuning_keeps_what_it_found(short: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def cost(tile: Tile | None) -> float:
        seen.add(len(list(cache.entries(cache.CHOICES))))
        (entry,) = list(cache.entries(cache.CHOICES)) or [None]
        if entry is not None and len(entry.value["tiles"]) == 1:
            raise KeyboardInterrupt
        return splits_are_slow(tile)

    with pytest.raises(KeyboardInterrupt):
        run(short, FakeTimer(cost))
    monkeypatch.setattr(cache, "_known", {})
    assert len(kept(CPU, SINGLE).tiles) == 1
    assert seen == {0, 1}


def test_the_kernel_for_hopper_is_a_candidate(short: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is the fastest, it is kept and runs in the next process, except for steps that it cannot compute."""
    tile = HopperTile(4, 2)
    ran: list[HopperTile] = []
    block = next(step for step in short.steps if step.name == "u.block")
    assert isinstance(block, ConvStep)
    default = CudaExecutor.of(short, SINGLE).tile(block)._replace(splits=1, fused=False)

    def forward(*arguments: Any, **where: Any) -> None:
        *operands, given = arguments
        ran.append(given)
        conv.conv_forward(*operands, default, **where)

    monkeypatch.setattr(hopper, "unsupported", lambda conv, tile=None: "transposed" if conv.transposed else None)
    monkeypatch.setattr(hopper, "reason_against", lambda device, dtype: None)
    monkeypatch.setattr(hopper, "CANDIDATES", (tile,))
    monkeypatch.setattr(hopper, "hopper_forward", forward)
    timer = FakeTimer(splits_are_slow, compiled_us=1.0)
    found = run(short, timer)
    chosen = {step.name: found.tiles[product_key(work_of(short, step), "ieee")] for step in short.steps
              if isinstance(step, ConvStep)}  # fmt: skip
    assert chosen["u.block"].choice == ("hopper", *tile)
    assert chosen["u.block"].us == 1.0
    assert chosen["u.d1"].choice[0] != "hopper"
    monkeypatch.setattr(cache, "_known", {})  # another process
    tuned = kept(CPU, SINGLE)
    executor = CudaExecutor.of(short, SINGLE, tuned=tuned)
    assert executor.choices["u.block"] == "hopper 8x4x64/2 x1"
    assert next(row[3] for row in gains(short, SINGLE, CPU, found)) == "hopper 8x4x64/2 x1"
    ran.clear()
    executor.memory.arena.zero_()
    for launch in executor.launches():
        launch()
    assert ran == [tile]
    monkeypatch.setattr(hopper, "reason_against", lambda device, dtype: "another card")
    assert not executor.choices["u.block"].startswith("hopper")


@needs_emulator
def test_the_kernels_for_the_picture_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for all four steps that they can compute; a wrong result rules a tile out."""
    wrong = PictureTile(4, 48)

    class Wrong(emulator.EmulatedKernel):
        def launch(self, grid: int, addresses: Sequence[Any]) -> None:
            if not (self.name.endswith("_64_48") and self.options["threads"] == 32 * 2 * wrong.rows):
                super().launch(grid, addresses)

    monkeypatch.setattr(picture_conv, "Kernel", Wrong)
    monkeypatch.setattr(picture_conv, "reason_against", lambda device, dtype: None)
    monkeypatch.setattr(emulator.EmulatedKernel, "launched", [])
    plan = picture_plan()
    lines: list[dict[str, Any]] = []
    contest = cuda_tuning_convolutions.Contest(plan, torch.float16, CPU)
    found = Found()
    timer = FakeTimer(splits_are_slow, compiled_us=1.0)
    cuda_tuning_convolutions.tune_convolutions(
        contest, found, timer, lambda section, **figures: lines.append(figures), lambda: None,
        functools.partial(contest.candidates, tried=1), lambda: False,
    )  # fmt: skip
    assert [line["tile"] for line in lines if "wrong" in line] == [("picture", *wrong)]
    assert {result.choice[0] for result in found.tiles.values()} == {"picture"}
    again = Found.from_dict(json.loads(json.dumps(found.as_dict())))
    assert again is not None
    executor = CudaExecutor.of(plan, torch.float16, tuned=again.tuned())
    labels = {name: label.split()[0] for name, label in executor.choices.items()}
    assert labels == {step.name: "picture" for step in plan.steps}
    assert all(row[3].startswith("picture ") for row in gains(plan, torch.float16, CPU, found))
    monkeypatch.setattr(picture_conv, "reason_against", lambda device, dtype: "another card")
    assert not any(label.startswith("picture") for label in executor.choices.values())


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels for the picture have passed their check and run in the emulator, with one tile each.

    Returns the names of their launches.
    """
    few = {64: [PictureTile(3, 32)], 128: [PictureTile(2, 32)], 4: [PictureTile(4, 32)]}
    monkeypatch.setattr(picture_conv, "tiles", lambda conv: few.get(conv.in_channels, []))
    launched: list[str] = []
    monkeypatch.setattr(emulator.EmulatedKernel, "launched", launched)
    monkeypatch.setattr(picture_conv, "Kernel", emulator.EmulatedKernel)
    for kernel in (picture_conv, hopper):
        monkeypatch.setattr(kernel, "reason_against", lambda device, dtype: None)
    monkeypatch.setattr(picture_conv, "runs_on", lambda device: True)
    return launched


@pytest.fixture
def other_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process in the place of the other one, with the clock `[0]`; the functions that were called follow."""
    calls: list[Any] = [FakeTimer(splits_are_slow, compiled_us=1.0)]

    def call_apart(function: Any, device: torch.device, dtype: torch.dtype, *arguments: Any) -> Outcome:
        calls.append(function)
        sent = pickle.loads(pickle.dumps(arguments))
        try:
            return Outcome(json.loads(json.dumps(function(device, dtype, *sent))))
        except RuntimeError as error:
            return Outcome(None, str(error))

    monkeypatch.setattr(apart, "call_apart", call_apart)
    monkeypatch.setattr(apart, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda_first_use, "Timer", lambda device: calls[0])
    return calls


def first_use(plan: Plan) -> Tuned:
    """As a new process has it."""
    cache._known.clear()
    return cuda_first_use.at_first_use(plan, torch.float16, CPU)


@needs_emulator
def test_the_first_use_measures_the_kernels_for_the_picture(emulated: list[str], other_process: list[Any]) -> None:
    """They are kept, and run in holes and at other sizes too; later uses measure nothing."""
    plan = picture_plan(side=64)
    tuned = first_use(plan)
    (entry,) = cache.entries(cache.CHOICES)
    assert entry.name == f"{plan.name}, the kernels for the picture, at first use"
    assert str(Found.from_dict(entry.value)) == "4 convolutions measured at first use"
    assert other_process[1:] == [cuda_first_use.measure_compiled]
    assert first_use(plan) == tuned
    assert len(other_process) == 2

    executor = CudaExecutor.of(plan, torch.float16, tuned=tuned)
    image, mask = inputs(plan)
    emulated.clear()
    check(plan, executor, image, mask)
    assert len(emulated) == 4
    dense, _ = executor.run(image, mask)
    executor.memory.arena.fill_(torch.nan)
    restricted = CudaExecutor.restricted(plan, [Rect(3, 12, 5, 14)])
    assert plan.cost() > 2 * restricted.cost()
    emulated.clear()
    result, _ = executor.run(image, mask, None, [step.regions for step in restricted.steps])
    assert torch.equal(result, dense)
    assert len(emulated) == 4
    other = executor.resized(plan.resized(2, 64, 128).without_weights())
    assert {label.split()[0] for label in other.choices.values()} == {"picture"}


@needs_emulator
@pytest.mark.parametrize("us", [1e3, 9.1])
def test_a_kernel_for_the_picture_that_gains_too_little_runs_nowhere(
    emulated: list[str], other_process: list[Any], us: float
) -> None:
    """Less than a tenth: no whole runs are compared."""
    plan = picture_plan(side=64)
    other_process[0] = FakeTimer(lambda tile: 10.0, compiled_us=us)
    tuned = first_use(plan)
    assert len(tuned.tiles) == 4
    executor = CudaExecutor.of(plan, torch.float16, tuned=tuned)
    restricted = CudaExecutor.restricted(plan, [Rect(3, 12, 5, 14)])
    assert plan.cost() > 2 * restricted.cost()
    for regions in (None, tuple(step.regions for step in restricted.steps)):
        launches: list[Any] = executor.launches(regions)
        assert [launch.func for launch in launches[1:]] == [conv.conv_forward] * 4


@pytest.fixture
def hopper_emulated(emulated: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """And the convolution for Hopper, with two tiles."""
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(hopper, "Kernel", emulator.EmulatedKernel)
    monkeypatch.setattr(hopper, "tensor_map", emulator.tensor_map)
    for module in (hopper, hopper_shapes):
        monkeypatch.setattr(module, "CANDIDATES", (HopperTile(8, 1), HopperTile(16, 1, groups=2)))
    monkeypatch.setattr(hopper_shapes, "ranked", hopper_shapes.ranked.__wrapped__)  # not kept for other tests
    return emulated


@needs_emulator
def test_the_first_use_measures_the_convolution_for_hopper(
    hopper_emulated: list[str], other_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own; elsewhere the estimate decides between it and Triton's kernel."""
    plan = picture_plan(side=64, inner=True)
    tuned = first_use(plan)
    titles = ("the convolution for Hopper", "the kernels for the picture")
    assert sorted(entry.name for entry in cache.entries(cache.CHOICES)) == [
        f"{plan.name}, {title}, at first use" for title in titles
    ]
    assert other_process[1:] == 2 * [cuda_first_use.measure_compiled]
    assert first_use(plan) == tuned
    assert len(other_process) == 3
    executor = CudaExecutor.of(plan, torch.float16, tuned=tuned)
    image, mask = inputs(plan)
    hopper_emulated.clear()
    check(plan, executor, image, mask)
    assert len(hopper_emulated) == 7
    assert len([name for name in hopper_emulated if name.startswith("lgnet_conv_float16")]) == 3

    other = executor.resized(plan.resized(2, 64, 128).without_weights())
    steps = [step for step in plan.steps if isinstance(step, ConvStep) and step.name in ("p.block", "p.down", "p.up")]
    measured = {step.name: tuned.tile(work_of(plan, step), "half").label for step in steps}
    monkeypatch.setattr(conv_configs, "estimate", lambda *product: 1e-5)
    monkeypatch.setattr(conv_configs, "pick_tile", conv_configs.pick_tile.__wrapped__)  # not kept for other tests
    for module in (cuda_executor, cuda_weights):
        monkeypatch.setattr(module, "target_of", lambda *target: ("half", "sm_90", 114))
    for seconds, kernel in ((0.89e-5, "hopper"), (0.91e-5, "Triton")):
        cards = []
        least = Cost(seconds, *(0.0,) * 7)

        def ranked(*product: Any, cards: list[Any] = cards, least: Cost = least) -> Any:
            cards.append(product[-1])
            unlike = HopperTile(32, 8, 6, 2, 1, split=True)
            return tuple((tile, least) for tile in (unlike, *hopper_shapes.CANDIDATES))

        monkeypatch.setattr(hopper_shapes, "ranked", ranked)
        assert [other.choices[name] == label for name, label in measured.items()] == 3 * [kernel == "hopper"]
        assert {card.num_sms for card in cards} == {114}


def in_one_launch() -> None:
    """In place of the launch of a group."""


class GroupTimer(FakeTimer):
    """Runs take ten microseconds a launch, those with the group of so many steps what `us` says."""

    def __init__(self, us: dict[int, float]) -> None:
        super().__init__(splits_are_slow)
        self.us = us

    def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
        run: Any = launches[0]
        made = run.args[0]
        group = next((one for one in made if getattr(one, "func", None) is in_one_launch), None)
        return 10.0 * len(made) if group is None else self.us[group.keywords["steps"]]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan on a Hopper GPU: "p.block" and "p.down" are deep layers, the last three convolutions a chain."""
    plan = picture_plan(side=64, inner=True)
    names = [step.name for step in plan.steps]
    deep, chain = range(1, 3), range(4, 7)

    def inside(part: Plan, group: range) -> range | None:
        """The group in a part of the plan."""
        own = [step.name for step in part.steps]
        begin = own.index(names[group.start]) if names[group.start] in own else None
        return None if begin is None else range(begin, begin + len(group))

    def deep_groups(executor: CudaExecutor) -> dict[int, Any]:
        rows = executor.options.deep_rows
        if rows is None:
            rows = executor.weights.tuned.deep_rows.get(executor.plan.name, 0)
        found = inside(executor.plan, deep)
        return {found.start: Group(len(found))} if found and rows >= 64 else {}

    def chain_runs(executor: CudaExecutor) -> list[range]:
        wanted = executor.options.chains
        if wanted is None:
            wanted = executor.plan.name in executor.weights.tuned.chains
        found = inside(executor.plan, chain)
        return [found] if found and wanted else []

    monkeypatch.setattr(compiled, "AT_FIRST_USE", {})
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(deep_layers, "runs", lambda plan, rows: [deep])
    monkeypatch.setattr(chains, "runs", lambda plan: [chain])
    monkeypatch.setattr(chains, "tiles", lambda *call: ("a tile",))
    monkeypatch.setattr(CudaExecutor, "_deep_groups", deep_groups)
    monkeypatch.setattr(CudaExecutor, "_chains", chain_runs)
    launched = {count: functools.partial(in_one_launch, steps=count) for count in (2, 3)}
    monkeypatch.setattr(cuda_executor, "group_launch", lambda *call: (launched[2], None))
    monkeypatch.setattr(chains, "fitting_chain", lambda *call: SimpleNamespace(launch=launched[3]))
    return plan


def shared_steps(plan: Plan, tuned: Tuned) -> dict[str, int]:
    """How many steps share a launch, by kind."""
    labels = list(CudaExecutor.of(plan, torch.float16, tuned=tuned).choices.values())
    return {kind: labels.count(kind) for kind in ("deep", "chain") if kind in labels}


@pytest.mark.parametrize(
    ("deep_us", "chain_us", "used"),
    [(26.9, 35.9, {"deep": 2, "chain": 3}), (27.1, 35.9, {"chain": 3}), (26.9, 36.1, {"deep": 2}), (27.1, 36.1, {})],
)
def test_the_first_use_measures_launches_of_several_layers(
    groups: Plan, other_process: list[Any], deep_us: float, chain_us: float, used: dict[str, int]
) -> None:
    """Used where they take a tenth less than one by one (30 and 40 us with the picture's), of this plan alone."""
    other_process[0] = GroupTimer({2: deep_us, 3: chain_us})
    tuned = first_use(groups)
    assert other_process[1:] == 2 * [cuda_first_use.measure_shared]
    assert shared_steps(groups, tuned) == used
    assert shared_steps(groups.resized(2, 64, 64), tuned) == {}
    assert sorted(entry.name for entry in cache.entries(cache.CHOICES)) == [
        f"{groups.name}, {title} in one launch, at first use" for title in ("chains of convolutions", "deep layers")
    ]
    for entry in cache.entries(cache.CHOICES):
        assert str(Found.from_dict(entry.value)).startswith("launches of several layers measured at first use")
    assert first_use(groups) == tuned
    assert len(other_process) == 3


def test_a_tuning_decides_which_layers_share_launches(groups: Plan, other_process: list[Any]) -> None:
    """Also that none do, once it has come to its end; then the first use of that plan measures nothing."""
    other_process[0] = GroupTimer({2: 1.0, 3: 1.0})
    both = {"deep": 2, "chain": 3}
    assert shared_steps(groups, first_use(groups)) == both
    key = cache.key_for(CPU, torch.float16)
    for found, used in (
        (Found(), both),
        (Found(now_ms=1.0), {}),
        (Found(now_ms=1.0, deep_rows={groups.name: 64}), {"deep": 2}),
    ):
        cache.put(key, cache.CHOICES, groups.name, found.as_dict())
        assert shared_steps(groups, first_use(groups)) == used
    assert kept(CPU, torch.float16, at_first_use=True).chains == {groups.name}
    for entry in list(cache.entries(cache.CHOICES)):
        if entry.name != groups.name:
            cache.drop(entry.key, cache.CHOICES)
    cache.put(key, cache.CHOICES, groups.name, Found(now_ms=1.0).as_dict())
    assert shared_steps(groups, first_use(groups)) == {}
    assert len(other_process) == 3


@pytest.mark.parametrize(("gain", "stays"), [(0.01, True), (0.03, False)])
def test_a_tuning_starts_from_what_the_first_use_has_chosen(
    groups: Plan, other_process: list[Any], monkeypatch: pytest.MonkeyPatch, gain: float, stays: bool
) -> None:
    """Launches one by one must gain two percent of the run to replace it; a tuning that did not end does not."""
    other_process[0] = GroupTimer({2: 1.0, 3: 1.0})
    first_use(groups)

    class RunTimer(FakeTimer):
        def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
            if len(launches) > 1:
                return super().time(launches)
            run: Any = launches[0]
            shared = sum(getattr(one, "func", None) is in_one_launch for one in run.args[0])
            return 2000.0 * (1 - gain * (2 - shared))

    def stopped(*call: Any) -> Any:
        raise KeyboardInterrupt

    timer = RunTimer(splits_are_slow)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_tuning, "_best_overlap", stopped)
        with pytest.raises(KeyboardInterrupt):
            tune(groups, torch.float16, CPU, 1e6, timer=timer, tried=1)
    assert shared_steps(groups, kept(CPU, torch.float16)) == {"deep": 2, "chain": 3}
    found = tune(groups, torch.float16, CPU, 1e6, timer=timer, tried=1)
    used = {"deep": 2, "chain": 3} if stays else {}
    assert shared_steps(groups, kept(CPU, torch.float16)) == used
    assert (bool(found.deep_rows), bool(found.chains)) == (stays, stays)
    assert found.before_ms == pytest.approx(2.0)
    assert found.now_ms == pytest.approx(2.0 if stays else 2.0 * (1 - 2 * gain))


def test_launches_of_several_layers_that_fail_are_not_tried_again(
    groups: Plan, other_process: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kind that fails does not rule out the other one."""
    measure = cuda_first_use.measure_shared

    def fails(device: torch.device, dtype: torch.dtype, kind: str, *rest: Any) -> dict[str, Any]:
        if kind == "deep":
            raise RuntimeError("an illegal instruction was encountered")
        return measure(device, dtype, kind, *rest)

    other_process[0] = GroupTimer({3: 1.0})
    monkeypatch.setattr(cuda_first_use, "measure_shared", fails)
    with caplog.at_level(logging.INFO, "lgnet_fast"):
        assert shared_steps(groups, first_use(groups)) == {"chain": 3}
        assert shared_steps(groups, first_use(groups)) == {"chain": 3}
    assert caplog.text.count("not measured: deep layers in one launch: an illegal instruction") == 1
    assert len(other_process) == 3


def test_a_group_whose_weights_another_stage_has() -> None:
    """In the part that is measured its first step has them."""
    with torch.device("meta"):
        model = LGNet(share_coarse=True).eval()
    plan = build_plan(plan_stages(model), 1, 256, 256)
    for numbers in deep_layers.runs(plan, 64):
        part = cuda_first_use._part(plan, plan.steps[numbers.start : numbers.stop].__contains__)
        assert [step.name for step in part.steps] == [plan.steps[number].name for number in numbers]
        assert all(step.weights_of == step.name for step in part.steps)
        assert deep_layers.runs(part, 64) == [range(len(numbers))]
    assert {plan.steps[number].weights_of.split(".")[0] for number in numbers} == {"net_c"}


@pytest.mark.usefixtures("groups")
def test_other_gpus_have_no_launches_of_several_layers(
    groups: Plan, other_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "runs_on", lambda device: False)
    assert shared_steps(groups, first_use(groups)) == {}
    assert len(other_process) == 1


@needs_emulator
def test_a_wrong_kernel_for_hopper_leaves_those_for_the_picture(
    hopper_emulated: list[str],
    other_process: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = hopper.hopper_forward

    def forward(step: Any, source: Any, weight: Any, bias: Any, stores: Any, *rest: Any, **options: Any) -> None:
        original(step, source, weight, bias, stores, *rest, **options)
        stores[0].view.mul_(2)

    monkeypatch.setattr(hopper, "hopper_forward", forward)
    with caplog.at_level(logging.INFO, "lgnet_fast"):
        tuned = first_use(picture_plan(inner=True))
    assert {type(tile) for tile in tuned.tiles.values()} == {PictureTile}
    assert "not measured: the convolution for Hopper: p.block with ('hopper', 8, 1," in caplog.text
    assert first_use(picture_plan(inner=True)) == tuned
    assert len(other_process) == 3


def test_the_nearest_number_of_rows_decides() -> None:
    def work(rows: int, columns: int = 64) -> Work:
        return Work(rows, columns, (49,), 4, 0, (7,), False)

    tile, picture = Tile(16, 16, 16, 1, 4, 1), PictureTile(4, 32)
    tuned = Tuned({("half", *work(1000)[:4]): picture, ("half", *work(100000)[:4]): tile})
    for rows, expected in ((1, picture), (1000, picture), (9000, picture), (11000, tile), (10**7, tile)):
        assert tuned.nearest_tile(work(rows), "half") == expected
    assert tuned.nearest_tile(work(1000, columns=128), "half") is None
    assert tuned.nearest_tile(work(1000), "tf32") is None


@needs_emulator
@pytest.mark.parametrize("case", ["tuned before", "nothing can be kept", "other steps", "float32", "no process"])
@pytest.mark.usefixtures("emulated")
def test_when_the_first_use_measures_nothing(
    case: str, plan: Plan, other_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = plan if case == "other steps" else picture_plan()
    dtype = torch.float32 if case == "float32" else torch.float16
    before = Found()
    if case == "tuned before":
        tune(used, dtype, CPU, 1e6, timer=FakeTimer(splits_are_slow), tried=1)
        (entry,) = cache.entries(cache.CHOICES)
        before = Found.from_dict(entry.value) or before
        assert len(before.tiles) == 4
    elif case == "nothing can be kept":
        monkeypatch.setattr(cache, "can_keep", lambda: False)
    elif case == "no process":
        monkeypatch.setattr(apart, "unavailable", lambda device: "there is no GPU")
    assert cuda_first_use.at_first_use(used, dtype, CPU) == before.tuned()
    assert len(other_process) == 1
    assert len(list(cache.entries(cache.CHOICES))) == (case == "tuned before")
    assert not list(cache.entries(cache.VERDICTS))


@needs_emulator
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("the process", "its process ended with status -6"),
        ("the check", "another card"),
        ("a wrong tile", "q.d1 with ('picture', 2, 32): relative error"),
        ("a tile that raises", "q.d1 with ('picture', 2, 32): RuntimeError: misaligned address"),
        ("the default", "p.out with"),
    ],
)
@pytest.mark.usefixtures("emulated")
def test_a_first_use_that_fails_is_told_and_tried_once(
    fault: str, told: str, other_process: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One wrong tile rules all out, because holes and other sizes choose among all."""
    plan = picture_plan()
    original, plain_forward = picture_conv.picture_forward, conv.conv_forward

    def forward(step: Any, *arguments: Any, **options: Any) -> None:
        original(step, *arguments, **options)
        if step.in_channels == 128:
            if fault == "a tile that raises":
                raise RuntimeError("misaligned address")
            options["merge"].raw.mul_(2)

    def default(step: Any, *arguments: Any, **options: Any) -> None:
        if step.in_channels == 64:
            raise RuntimeError("Failed to find C compiler")
        plain_forward(step, *arguments, **options)

    if fault == "the process":
        monkeypatch.setattr(apart, "call_apart", lambda *arguments: Outcome(None, told))
    elif fault == "the check":
        monkeypatch.setattr(picture_conv, "reason_against", lambda device, dtype: told)
    elif fault == "the default":
        monkeypatch.setattr(conv, "conv_forward", default)
    else:
        monkeypatch.setattr(picture_conv, "picture_forward", forward)
    with caplog.at_level(logging.INFO, "lgnet_fast"):
        assert first_use(plan) == Tuned()
    assert f"not measured: the kernels for the picture: {told}" in caplog.text
    (entry,) = cache.entries(cache.VERDICTS)
    assert entry.name == f"the kernels for the picture, {plan.name}"
    assert info._found(entry.value).startswith(f"Triton's kernels run: {told}")
    tried: list[Any] = []
    monkeypatch.setattr(apart, "call_apart", lambda *arguments: tried.append(1))
    assert first_use(plan) == Tuned()
    assert tried == []
    cache.drop(entry.key, cache.VERDICTS)  # as `lgnet-fast verify` does
    assert first_use(plan) == Tuned()
    assert tried == [1]
    assert not list(cache.entries(cache.VERDICTS))  # nothing was found out


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_an_entry_that_cannot_be_read_is_measured_again(other_process: list[Any]) -> None:
    plan = picture_plan()
    cache.put(cache.key_for(CPU, torch.float16), cache.CHOICES, f"{plan.name}, at first use", {"tiles": 1})
    assert len(first_use(plan).tiles) == 4


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_large_plans_are_measured_by_one_picture(other_process: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And plans of several batches once."""
    monkeypatch.setattr(checks, "MOST_PIXELS", 32 * 32)
    plan = picture_plan()
    tuned = first_use(picture_plan(batch=3))
    assert tuned.tiles.keys() == {
        product_key(work_of(plan, s), "half") for s in plan.steps if isinstance(s, ConvStep)
    }
    assert first_use(plan) == first_use(picture_plan(batch=2)) == tuned
    assert len(other_process) == 2


@needs_emulator
@pytest.mark.parametrize("case", ["no time", "interrupted", "slower in the whole"])
@pytest.mark.usefixtures("emulated", "other_process")
def test_tunings_take_nothing_away_that_the_first_use_has_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = picture_plan()
    before = first_use(plan)
    assert {type(tile) for tile in before.tiles.values()} == {PictureTile}
    timer = FakeTimer(splits_are_slow, (2.0, 3.0))

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    if case == "interrupted":
        monkeypatch.setattr(timer, "compile", interrupted)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            tune(plan, torch.float16, CPU, 0.0 if case == "no time" else 1e6, timer=timer, tried=1)
    cache._known.clear()
    assert kept(CPU, torch.float16).tiles == before.tiles


@needs_emulator
@pytest.mark.usefixtures("emulated", "other_process")
def test_a_tuning_replaces_what_the_first_use_has_found() -> None:
    """In whatever order the folder has the entries."""
    plan = picture_plan()
    first_use(plan)
    tune(plan, torch.float16, CPU, 1e6, timer=FakeTimer(splits_are_slow), tried=1)
    for number in range(6):  # the same, under names with other hashes
        found = Found(dict.fromkeys(kept(CPU, torch.float16).tiles, Result(("picture", 1, 2), 1.0, "cudnn", 2.0)))
        entry = replace(found, at_first_use=True).as_dict()
        cache.put(cache.key_for(CPU, torch.float16), cache.CHOICES, f"{number}", entry)
    cache._known.clear()
    assert not any(isinstance(tile, PictureTile) for tile in kept(CPU, torch.float16).tiles.values())


def test_a_candidate_that_cannot_be_launched_leaves_the_plain_weights(plan: Plan) -> None:
    """The tuner compares whole runs with those weights."""
    contest = cuda_tuning_convolutions.Contest(plan, SINGLE, CPU)
    number = next(i for i, step in enumerate(plan.steps) if isinstance(step, ConvStep) and not step.merges)

    def full(elements: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    contest.executor.memory.partial = full  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        contest.launch(number, Tile(16, 16, 16, 2, 4, 1), contest.weights(number))
    assert contest.executor.weights is contest.plain_weights


class SharedTimer(FakeTimer):
    """A whole run of so many launches, in which two steps share one, takes `with_us`; others 3 and 2 ms in turn."""

    def __init__(self, launches: int, with_us: float) -> None:
        super().__init__(splits_are_slow, (3.0, 2.0))
        self.launches, self.with_us = launches, with_us

    def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
        (launch, *_) = launches
        if len(launches) == 1 and len(getattr(launch, "args", [[]])[0]) == self.launches:
            return 1e3 * self.with_us
        return super().time(launches, spread)


class Group:
    """Steps in one launch, on a machine without the kernel: they run one by one."""

    def __init__(self, steps: int) -> None:
        self.layers = [None] * steps


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors whose first two steps share a launch where 64 rows do."""

    def groups(executor: CudaExecutor) -> dict[int, Any]:
        rows = executor.options.deep_rows
        if rows is None:
            rows = executor.weights.tuned.deep_rows.get(executor.plan.name, 0)
        return {0: Group(2)} if rows >= 64 else {}

    def launch(plan: Plan, first: int, group: Group, view: Any) -> tuple[Callable[[], None], None]:
        return (lambda: None), None

    monkeypatch.setattr(CudaExecutor, "_deep_groups", groups)
    monkeypatch.setattr(cuda_executor, "group_launch", launch)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(("with_us", "rows"), [(1.9, 64), (1.97, 0)])
def test_deep_layers_share_a_launch_where_the_whole_gains(short: Plan, with_us: float, rows: int) -> None:
    """If the gain is at least two percent, and only for this plan."""

    found = run(short, SharedTimer(len(short.steps), with_us))
    assert found.deep_rows == ({short.name: rows} if rows else {})
    assert found.now_ms == pytest.approx(with_us if rows else 2.0)
    tuned = kept(CPU, SINGLE)
    assert tuned.deep_rows == found.deep_rows
    executor = CudaExecutor.of(short, SINGLE, tuned=tuned)
    first = [executor.choices[step.name] for step in short.steps[:2]]
    assert (first == ["deep", "deep"]) == bool(rows)
    assert len(executor.launches()) == len(short.steps) + (not rows)
    assert len(executor.launches([step.regions for step in short.steps])) == len(short.steps) + (not rows)
    assert CudaExecutor.of(short, SINGLE, tuned=tuned, deep_rows=0).choices[short.steps[0].name] != "deep"
    larger = executor.resized(short.resized(2, short.height, short.width))
    assert "deep" not in larger.choices.values()


@pytest.mark.parametrize(("with_us", "gains"), [(1.9, True), (1.97, False)])
def test_chains_share_a_launch_where_the_whole_gains(
    short: Plan, monkeypatch: pytest.MonkeyPatch, with_us: float, gains: bool
) -> None:
    """If the gain is at least two percent, and only for this plan."""

    def groups(executor: CudaExecutor) -> list[range]:
        wanted = executor.options.chains
        if wanted is None:
            wanted = executor.plan.name in executor.weights.tuned.chains
        return [range(2)] if wanted else []

    monkeypatch.setattr(CudaExecutor, "_chains", groups)
    monkeypatch.setattr(chains, "tiles", lambda *call: ("a tile",))
    monkeypatch.setattr(chains, "fitting_chain", lambda *call: SimpleNamespace(launch=lambda: None))
    found = run(short, SharedTimer(len(short.steps), with_us))
    assert found.chains == ({short.name} if gains else set())
    assert found.now_ms == pytest.approx(with_us if gains else 2.0)
    assert ("chains of convolutions in one launch" in str(found)) == gains
    tuned = kept(CPU, SINGLE)
    assert tuned.chains == found.chains
    assert list(CudaExecutor.of(short, SINGLE, tuned=tuned).choices.values()).count("chain") == 2 * gains
    assert "chain" not in CudaExecutor.of(short, SINGLE, tuned=tuned, chains=False).choices.values()


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches may overlap; the interpreter makes them one after another, and has no kernel to wait for."""
    monkeypatch.setattr(conv, "can_overlap", lambda device: None)
    monkeypatch.setattr(cuda_tuning, "_EQUAL_RUNS", 2)
    monkeypatch.setattr(conv_kernels, "_prefetch", lambda pointers: None)
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(tl.extra.cuda, name, lambda _semantic=None: None)


@pytest.mark.usefixtures("overlapping")
@pytest.mark.parametrize(
    ("plain_ms", "spread_ms", "how"), [(1.9, 1.8, "spread"), (1.9, 1.95, "plain"), (1.97, 2.1, "none")]
)
def test_launches_overlap_where_the_whole_gains(short: Plan, plain_ms: float, spread_ms: float, how: str) -> None:
    """If the gain is at least two percent, and only for this plan."""

    class OverlapTimer(FakeTimer):
        def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
            (launch, *others) = launches
            run: Any = launch
            if others or not run.args[0][0].args[-1]:  # whether the first launch of the run overlaps
                assert not spread
                return super().time(launches)
            return 1e3 * (spread_ms if spread else plain_ms)

    found = run(short, OverlapTimer(splits_are_slow))
    assert found.overlap == ({} if how == "none" else {short.name: how})
    assert found.now_ms == pytest.approx({"plain": plain_ms, "spread": spread_ms, "none": 2.0}[how])
    tuned = kept(CPU, SINGLE)
    assert tuned.overlap == found.overlap
    executor = CudaExecutor.of(short, SINGLE, tuned=tuned)
    assert executor.overlap == how
    assert executor.choices.get("launches") == (None if how == "none" else f"overlap, {how}")  # of the verdict's name
    assert [launch.keywords["overlap"] for launch in executor.launches()[1:] if launch.keywords] == [
        how != "none"
    ] * 2
    assert CudaExecutor.of(short, SINGLE, tuned=tuned, overlap="none").overlap == "none"
    assert executor.resized(short.resized(2, short.height, short.width)).overlap == "none"


@pytest.mark.usefixtures("overlapping")
def test_what_was_measured_stays_where_the_driver_lets_no_blocks_be_spread(
    short: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    class RefusingTimer(FakeTimer):
        def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
            if spread:
                raise CaptureError("cuGraphKernelNodeSetParams_v2: invalid argument (1)")
            return super().time(launches)

    with caplog.at_level(logging.INFO, "lgnet_fast"):
        found = run(short, RefusingTimer(splits_are_slow))
    assert found.overlap == {}
    assert found.tiles
    assert "whole runs are not compared: cuGraphKernelNodeSetParams_v2" in caplog.text


@pytest.mark.usefixtures("overlapping")
def test_overlapping_launches_that_change_a_picture_are_no_contestant(
    short: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint = conv.paint_forward

    def early(image: Tensor, mask: Tensor, start: Any, picture: Tensor, merged: Tensor, overlap: bool) -> None:
        paint(image, mask, start, picture, merged, overlap)
        if overlap:
            merged[0, 0, 0, 0] += 1

    monkeypatch.setattr(conv, "paint_forward", early)
    assert run(short, FakeTimer(splits_are_slow)).overlap == {}


@pytest.mark.parametrize("value", [None, {}, {"tiles": [1]}, {"tiles": [], "attention": [[[1], 2]]}], ids=str)
def test_a_spoilt_entry_is_as_if_not_there(value: Any) -> None:
    cache.put(cache.key_for(CPU, SINGLE), cache.CHOICES, "engine x", value)
    assert kept(CPU, SINGLE) == Tuned()


def test_attention_shapes(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that are measured are those that run."""
    timer = FakeTimer(splits_are_slow)
    calls: list[int] = []

    def time(launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
        if len(launches) == 8:
            calls.append(1)
            return 5.0 / len(calls)  # ever faster: the last is taken
        return FakeTimer.time(timer, launches)

    monkeypatch.setattr(timer, "time", time)
    found = run(plan, timer)
    (key,) = found.attention
    assert key == (8, 64, 1)
    result = found.attention[key]
    assert result.us < result.default_us
    executor = CudaExecutor.of(plan, SINGLE, tuned=found.tuned())
    check(cast(plan, torch.float64), executor, *inputs(plan))


def test_tiles_fit_the_cards_memory() -> None:
    from lgnet_fast.kernels.cards import CARDS

    work = Work(4096, 256, (9,), 256, 0, (3,), False)
    for card in CARDS.values():
        for kind, element in (("half", 2), ("tf32", 4), ("ieee", 4)):
            found = list(tiles(work, kind, card.generation, card.num_sms))
            assert len(found) > 10
            assert len(set(found)) == len(found)
            for tile in found:
                used = tile.num_stages * tile.block_k * (tile.block_m + tile.block_n) * element
                assert used <= card.shared_limit
            assert pick_tile(work, kind, card.generation, card.num_sms)
