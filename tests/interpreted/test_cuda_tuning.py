"""Tuning for a GPU, with the kernels in Triton's interpreter and a fake clock."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from lgnet_fast.kernels import conv, conv_kernels, hopper, picture_conv
from lgnet_fast.kernels.conv_configs import Tile, Work, pick_tile
from lgnet_fast.kernels.hopper_shapes import HopperTile
from lgnet_fast.kernels.picture_conv import PictureTile
from torch import Tensor

from lgnet_fast import cache
from lgnet_fast.engine.cuda import chains
from lgnet_fast.engine.cuda import executor as cuda_executor
from lgnet_fast.engine.cuda import tuning as cuda_tuning
from lgnet_fast.engine.cuda import tuning_convolutions as cuda_tuning_convolutions
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.graphs import CaptureError
from lgnet_fast.engine.cuda.launches import run_all
from lgnet_fast.engine.cuda.measure import Found, kept, product_key
from lgnet_fast.engine.cuda.tuning import gains, tune
from lgnet_fast.engine.cuda.tuning_convolutions import tiles
from lgnet_fast.engine.cuda.weights import Tuned, work_of
from lgnet_fast.engine.plan import PICTURE, ConvStep, Plan
from tests import emulator
from tests.interpreted.plans import picture_plan, tiny_plan
from tests.interpreted.test_cuda_executor import cast, check, inputs
from tests.interpreted.timers import FakeTimer, Group, splits_are_slow

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


def test_the_nearest_number_of_rows_decides() -> None:
    def work(rows: int, columns: int = 64) -> Work:
        return Work(rows, columns, (49,), 4, 0, (7,), False)

    tile, picture = Tile(16, 16, 16, 1, 4, 1), PictureTile(4, 32)
    tuned = Tuned({("half", *work(1000)[:4]): picture, ("half", *work(100000)[:4]): tile})
    for rows, expected in ((1, picture), (1000, picture), (9000, picture), (11000, tile), (10**7, tile)):
        assert tuned.nearest_tile(work(rows), "half") == expected
    assert tuned.nearest_tile(work(1000, columns=128), "half") is None
    assert tuned.nearest_tile(work(1000), "tf32") is None


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


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors whose first two steps share a launch where 64 rows do."""

    def groups(executor: CudaExecutor) -> dict[int, Any]:
        rows = executor.options.deep_rows
        if rows is None:
            rows = executor.weights.tuned.deep_rows.get(executor.plan.name, 0)
        return {0: Group(2)} if rows >= 64 else {}

    def launch(*call: Any) -> tuple[Callable[[], None], None]:
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


def in_chain(first: int) -> None:
    """In place of the launch of the group that begins at step `first`."""


@pytest.mark.parametrize(
    ("gain", "expected"),
    [((0.05, 0.01), (0,)), ((0.05, 0.05), (0, 2)), ((-0.05, -0.05), ()), ((0.01, -0.05), (0,))],
)
def test_of_several_chains_those_of_the_fastest_run_are_kept(
    short: Plan, monkeypatch: pytest.MonkeyPatch, gain: tuple[float, float], expected: tuple[int, ...]
) -> None:
    """None, all of them, or those that the first use has chosen; two percent must be gained to replace these."""
    gains, groups = dict(zip((0, 2), gain)), [range(1), range(2, 3)]
    names = [step.name for step in short.steps]

    def chosen(executor: CudaExecutor) -> list[range]:
        if (asked := executor.options.chains) is not None:
            return groups if asked else []
        wanted = executor.weights.tuned.chains.get(executor.plan.name, ())
        return [numbers for numbers in groups if names[numbers.start] in wanted]

    class RunTimer(FakeTimer):
        def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
            (launch, *_) = launches
            if getattr(launch, "func", None) is not run_all:
                return super().time(launches, spread)
            shared = [one.args[0] for one in launch.args[0] if getattr(one, "func", None) is in_chain]  # type: ignore[attr-defined]
            return 2000.0 * (1 - sum(gains[first] for first in shared))

    def fitting(plan: Plan, numbers: range, *call: Any) -> Any:
        return SimpleNamespace(launch=functools.partial(in_chain, numbers.start))

    monkeypatch.setattr(CudaExecutor, "_chains", chosen)
    monkeypatch.setattr(chains, "tiles", lambda *call: ("a tile",))
    monkeypatch.setattr(chains, "fitting_chain", fitting)
    before = Found(at_first_use=True, chains={short.name: (names[0],)})
    cache.put(cache.key_for(CPU, SINGLE), cache.CHOICES, "at first use", before.as_dict())
    found = run(short, RunTimer(splits_are_slow))
    kept_names = tuple(names[first] for first in expected)
    assert found.chains == ({short.name: kept_names} if kept_names else {})
    assert kept(CPU, SINGLE).chains == found.chains
    assert found.now_ms == pytest.approx(2.0 * (1 - sum(gains[first] for first in expected)))


@pytest.mark.parametrize(("with_us", "gains"), [(1.9, True), (1.97, False)])
def test_chains_share_a_launch_where_the_whole_gains(
    short: Plan, monkeypatch: pytest.MonkeyPatch, with_us: float, gains: bool
) -> None:
    """If the gain is at least two percent, and only for this plan."""

    def groups(executor: CudaExecutor) -> list[range]:
        wanted = executor.options.chains
        if wanted is None:
            wanted = bool(executor.weights.tuned.chains.get(executor.plan.name))
        return [range(2)] if wanted else []

    monkeypatch.setattr(CudaExecutor, "_chains", groups)
    monkeypatch.setattr(chains, "tiles", lambda *call: ("a tile",))
    monkeypatch.setattr(chains, "fitting_chain", lambda *call: SimpleNamespace(launch=lambda: None))
    found = run(short, SharedTimer(len(short.steps), with_us))
    assert found.chains == ({short.name: (short.steps[0].name,)} if gains else {})
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
