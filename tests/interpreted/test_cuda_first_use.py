"""What an engine measures at its first use on a GPU, with interpreted and emulated kernels and a fake clock."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import (
    apart,
    compiled,
    configs,
    conv,
    conv_configs,
    hopper,
    hopper_attention,
    hopper_shapes,
    picture_conv,
)
from lgnet_fast.kernels.apart import Outcome
from lgnet_fast.kernels.configs import Inference
from lgnet_fast.kernels.conv_configs import Cost
from lgnet_fast.kernels.hopper_shapes import HopperTile
from lgnet_fast.kernels.picture_conv import PictureTile

from lgnet_fast import LGNet, cache, info
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import chains, checks, deep_layers
from lgnet_fast.engine.cuda import executor as cuda_executor
from lgnet_fast.engine.cuda import first_use as cuda_first_use
from lgnet_fast.engine.cuda import tuning as cuda_tuning
from lgnet_fast.engine.cuda import weights as cuda_weights
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.measure import Found, Result, kept, product_key
from lgnet_fast.engine.cuda.tuning import gains, tune
from lgnet_fast.engine.cuda.weights import Tuned, work_of
from lgnet_fast.engine.plan import ConvStep, Plan
from lgnet_fast.engine.regions import Rect
from tests import emulator
from tests.interpreted.plans import attention_plan, picture_plan, tiny_plan
from tests.interpreted.test_cuda_executor import check, inputs
from tests.interpreted.timers import FakeTimer, Group, splits_are_slow

pytestmark = pytest.mark.usefixtures("fresh_cache")

needs_emulator = pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))

CPU = torch.device("cpu")


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


class AttentionTimer(FakeTimer):
    """An attention block takes ten microseconds, by the compiled kernel `compiled_us` a block of a cluster."""

    def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
        if len(launches) != 8:
            return super().time(launches, spread)
        tile = configs._overrides.get()["inference"].hopper
        return 10.0 if tile is None else self.compiled_us * tile[1]


@pytest.fixture
def attention_emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Attention for Hopper has passed its check and runs in the emulator. Returns the names of its launches."""
    monkeypatch.setattr(hopper_attention, "reason_against", lambda device, dtype: None)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(compiled, "AT_FIRST_USE", {})
    return emulator.install(monkeypatch, hopper_attention).launched


@needs_emulator
def test_the_first_use_measures_attention(attention_emulated: list[str], other_process: list[Any]) -> None:
    """It runs in holes and at other sizes too; later uses and networks with as many channels measure nothing."""
    other_process[0] = AttentionTimer(splits_are_slow, compiled_us=8.9)
    plan = attention_plan()
    tuned = first_use(plan)
    assert other_process[1:] == [cuda_first_use.measure_attention]
    (entry,) = cache.entries(cache.CHOICES)
    assert entry.name == f"{plan.name}, attention for Hopper, at first use"
    assert str(Found.from_dict(entry.value)) == "1 attention blocks measured at first use"
    (tile,) = {one.hopper for one in tuned.attention.values()}
    assert tile is not None
    assert tile[1] == 1
    assert first_use(plan) == first_use(attention_plan(2, 64)) == tuned
    assert len(other_process) == 2

    executor = CudaExecutor.of(plan, torch.float16, tuned=tuned)
    assert executor.choices["a.attention"] == f"attention, hopper {tile[0]}x128/1"
    image, mask = inputs(plan)
    attention_emulated.clear()
    check(plan, executor, image, mask)
    assert attention_emulated == [f"lgnet_attention_float16_128_{tile[0]}"]
    dense, _ = executor.run(image, mask)
    executor.memory.arena.fill_(torch.nan)
    executor.run(image, mask)
    restricted = CudaExecutor.restricted(plan, [Rect(3, 12, 5, 14)])
    result, _ = executor.run(image, mask, None, [step.regions for step in restricted.steps])
    assert (result - dense).abs().max() < 4e-3
    assert len(attention_emulated) == 4
    other = executor.resized(plan.resized(2, 64, 64).without_weights())
    assert other.choices["a.attention"].startswith("attention, hopper ")


@needs_emulator
def test_attention_that_gains_too_little_runs_nowhere(
    attention_emulated: list[str], other_process: list[Any]
) -> None:
    """Less than a tenth of the block."""
    other_process[0] = AttentionTimer(splits_are_slow, compiled_us=9.1)
    plan = attention_plan()
    tuned = first_use(plan)
    assert [one.hopper for one in tuned.attention.values()] == [None]
    for used in (plan, attention_plan(2, 64)):
        assert CudaExecutor.of(used, torch.float16, tuned=tuned).choices["a.attention"] == "attention"
    assert first_use(plan) == tuned
    assert len(other_process) == 2


@needs_emulator
def test_wrong_attention_is_not_used(
    attention_emulated: list[str],
    other_process: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other_process[0] = AttentionTimer(splits_are_slow, compiled_us=1.0)
    weigh = hopper_attention.weigh

    def wrong(*arguments: Any, **options: Any) -> None:
        weigh(*arguments, **options)
        arguments[4].mul_(1.1)

    monkeypatch.setattr(hopper_attention, "weigh", wrong)
    plan = attention_plan()
    with caplog.at_level(logging.INFO, "lgnet_fast"):
        assert first_use(plan) == Tuned()
    assert "not measured: attention for Hopper: a.attention with [" in caplog.text
    assert "relative error 1.0e-01" in caplog.text
    assert first_use(plan) == Tuned()
    assert len(other_process) == 2


@needs_emulator
def test_the_tuner_measures_attention_for_hopper(attention_emulated: list[str]) -> None:
    """In one launch, so that no sum over splits is searched; what it prints names the tile."""
    plan = attention_plan()
    timer = AttentionTimer(splits_are_slow, compiled_us=1.0)
    found = tune(plan, torch.float16, CPU, 1e6, timer=timer, tried=4)
    (result,) = found.attention.values()
    assert (result.us, result.default_us) == (1.0, 10.0)
    before, now = next(row for row in gains(plan, torch.float16, CPU, found) if row[0] == "a.attention")[1::2]
    assert re.fullmatch(r"\d+(x\d+){9}", before)
    assert re.fullmatch(r"hopper \d+x128/1", now)
    assert Found.from_dict(json.loads(json.dumps(found.as_dict()))).tuned() == found.tuned()
    tuned = kept(CPU, torch.float16)
    assert CudaExecutor.of(plan, torch.float16, tuned=tuned).choices["a.attention"] == f"attention, {now}"


def test_the_nearest_attention_decides() -> None:
    one, other = Inference(64, 64, 64, 4, 2, 32, 64, 64, 16), Inference(128, 64, 64, 4, 2, 32, 64, 64, 16)
    tuned = Tuned(attention={(128, 4096, 1): one, (128, 256, 16): other})
    assert tuned.nearest_attention(128, 1024, 1) is one
    assert tuned.nearest_attention(128, 1024, 8) is other
    assert tuned.nearest_attention(256, 4096, 1) is None


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
            wanted = names[chain.start] in executor.weights.tuned.chains.get(executor.plan.name, ())
        found = inside(executor.plan, chain)
        return [found] if found and wanted else []

    monkeypatch.setattr(compiled, "AT_FIRST_USE", {})
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(deep_layers, "runs", lambda plan, rows: [deep])
    monkeypatch.setattr(chains, "runs", lambda plan, card: [chain])
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
    [(17.9, 26.9, {"deep": 2, "chain": 3}), (18.1, 26.9, {"chain": 3}), (17.9, 27.1, {"deep": 2}), (18.1, 27.1, {})],
)
def test_the_first_use_measures_launches_of_several_layers(
    groups: Plan, other_process: list[Any], deep_us: float, chain_us: float, used: dict[str, int]
) -> None:
    """Used where they take a tenth less than one by one (20 and 30 us), of this plan alone."""
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


def test_each_chain_is_measured(groups: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two takes a tenth less time than its launches one by one, the second hardly that."""
    monkeypatch.setattr(CudaExecutor, "_chains", lambda own: [range(len(own.plan.steps))] * bool(own.options.chains))
    monkeypatch.setattr(
        chains, "fitting_chain",
        lambda plan, numbers, *call: SimpleNamespace(launch=functools.partial(in_one_launch, steps=len(numbers))),
    )  # fmt: skip
    monkeypatch.setattr(cuda_first_use, "Timer", lambda device: GroupTimer({2: 18.1, 3: 26.9}))
    parts = [cuda_first_use._part(groups, groups.steps[first:stop].__contains__) for first, stop in ((4, 7), (1, 3))]
    found = Found.from_dict(cuda_first_use.measure_shared(CPU, torch.float16, "chain", groups.name, parts))
    assert found is not None
    assert found.chains == {groups.name: (groups.steps[4].name,)}


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
    assert kept(CPU, torch.float16, at_first_use=True).chains == {groups.name: (groups.steps[4].name,)}
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
    assert "not measured: the convolution for Hopper: p.block with ('hopper', " in caplog.text
    assert first_use(picture_plan(inner=True)) == tuned
    assert len(other_process) == 3


@needs_emulator
@pytest.mark.parametrize("case", ["tuned before", "nothing can be kept", "other steps", "float32", "no process"])
@pytest.mark.usefixtures("emulated")
def test_when_the_first_use_measures_nothing(
    case: str, other_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tiny_plan() if case == "other steps" else picture_plan()
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
