"""Measured choices of the CPU's kernels: exact tests with a fake clock, loose tests with the real one."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor

from lgnet_fast import cache, create_model, load_engine, native, optimize
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu import choice as cpu_choice
from lgnet_fast.engine.cpu import path as cpu_path
from lgnet_fast.engine.cpu import tuning as cpu_tuning
from lgnet_fast.engine.cpu.choice import RATES, Rates, choose_kernels, modelled
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.cpu.kernels import BY_STAGES, TILES, Choice
from lgnet_fast.engine.cpu.tuning import Timing, kept, measured_choices, tune
from lgnet_fast.engine.plan import ConvStep, Plan
from lgnet_fast.reference.lgnet import LGNet
from tests.support import assert_accurate, case, instruction_sets
from tests.test_plan import lively

pytestmark = [
    pytest.mark.skipif(CpuExecutor.unavailable_reason() is not None, reason=str(CpuExecutor.unavailable_reason())),
    pytest.mark.usefixtures("fresh_cache"),
]

SINGLE = torch.float32
WRONG_RATES = [
    RATES._replace(**{name: getattr(RATES, name) * factor}) for name in RATES._fields for factor in (0.5, 2.0)
]


@pytest.fixture(autouse=True)
def products_of_float32() -> Iterator[None]:
    """The fastest instruction set whose float32 products are such: its steps have the most kernels to choose from."""
    library = native.library()
    for isa in reversed(instruction_sets()):
        library.set_isa(isa)
        if not native.multiplies("bf16x3"):
            break
    yield
    library.set_isa("auto")


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    model = LGNet(coarse_channels=16, local_channels=32, global_channels=16).eval()
    return build_plan(plan_stages(model), 1, 256, 256)


def true_ms(plan: Plan, choices: Mapping[str, str]) -> list[float]:
    """Of every step, where the model's rates are right; a chunk of 28 tiles is better than the rule for NetL."""
    times = []
    for step in plan.steps:
        choice = Choice.parse(choices[step.name])
        if isinstance(step, ConvStep) and choice.kernel in TILES:
            ms = 1e3 * modelled(step, choice.kernel, choice.products, plan.batch, *plan.target(step).size).seconds
            better = {28: 0.8, BY_STAGES: 0.99} if step.name.startswith("net_l.block") else {}
            times.append(ms * (better.get(choice.chunk, 1.1) if choice.chunk else 1.0))
        else:
            times.append(1.0)
    return times


def fake(plan: Plan, pictures: Callable[[Mapping[str, Choice]], Tensor] | None = None) -> cpu_tuning.Measure:
    """A machine on which the rates of the cost model hold exactly."""

    def measure(executor: CpuExecutor) -> Timing:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_choice, "RATES", Rates())
            times = true_ms(plan, executor.choices)
        shown = torch.ones(1, 3, 4, 4) if pictures is None else pictures(executor.weights.choices)
        return Timing(times, [shown])

    return measure


@pytest.mark.parametrize("wrong", WRONG_RATES, ids=str)
def test_wrong_rates_of_the_model_cost_nothing(plan, wrong, monkeypatch):
    best = choose_kernels(plan, SINGLE)
    least = sum(true_ms(plan, best))
    monkeypatch.setattr(cpu_choice, "RATES", wrong)
    found = tune(plan, SINGLE, seconds=math.inf, measure=fake(plan))
    assert found.choices is not None
    assert {name: str(Choice.parse(text).packed) for name, text in found.choices.items()} == best
    chunks = {name: Choice.parse(text).chunk for name, text in found.choices.items()}
    assert {name for name, chunk in chunks.items() if chunk} == {
        step.name for step in plan.steps if step.name.startswith("net_l.block")
    }
    assert set(chunks.values()) == {0, 28}
    monkeypatch.setattr(cpu_choice, "RATES", RATES)
    assert sum(true_ms(plan, found.choices)) < least
    assert found.total_ms == pytest.approx(sum(true_ms(plan, found.choices)))


def test_rates_that_are_off_do_mislead_the_model(plan, monkeypatch):
    """What the test before is about."""
    best = choose_kernels(plan, SINGLE)
    misled = 0
    for wrong in WRONG_RATES:
        monkeypatch.setattr(cpu_choice, "RATES", wrong)
        misled += choose_kernels(plan, SINGLE) != best
    assert misled >= 2


@pytest.mark.parametrize("ended", [False, True])
def test_what_differs_from_the_plain_kernel_is_left_out(plan, caplog, ended):
    """`ended`: the time is over when it is found."""
    step = next(s.name for s in plan.steps if choose_kernels(plan, SINGLE)[s.name] == "winograd4")
    broken = Choice("winograd4")

    def pictures(choices: Mapping[str, Choice]) -> Tensor:
        return torch.full((1, 3, 4, 4), torch.nan if choices[step].packed == broken else 1.0)

    with caplog.at_level(logging.WARNING, logger="lgnet_fast"):
        found = tune(
            plan,
            SINGLE,
            measure=fake(plan, pictures),
            clock=lambda: math.inf if ended and caplog.messages else 0.0,
        )
    assert found.wrong == [(step, "winograd4")]
    assert caplog.messages == [f"{step}: winograd4 differs from the plain kernel and is left out"]
    assert found.choices is not None
    assert found.choices[step] in ("direct", "winograd2")
    kernels = {name: Choice.parse(text).kernel for name, text in found.choices.items() if name != step}
    assert "winograd4" in kernels.values()


def test_packed_weights_keep_to_a_budget(plan, monkeypatch):
    """1.44 times the network's own bytes; in exchange, runs take at most a quarter more by the model."""
    costs = cpu_choice.modelled_costs(plan, SINGLE)
    owners = {step.name: step for step in plan.steps}
    own = sum(4 * owners[name].weight.numel() for name in costs)

    def bytes_and_seconds() -> tuple[int, float]:
        chosen = choose_kernels(plan, SINGLE)
        used = [costs[step.weights_of][chosen[step.name]] for step in plan.steps if step.weights_of in costs]
        return sum(costs[name][chosen[name]].weight_bytes for name in costs), sum(cost.seconds for cost in used)

    free, least = bytes_and_seconds()  # small networks may have 128 MB more
    assert 1.44 * own < free <= own + 128 * 2**20
    fastest = {name: min(c.seconds for c in by_choice.values()) for name, by_choice in costs.items()}
    assert least == pytest.approx(sum(fastest.get(step.weights_of, 0) for step in plan.steps))
    monkeypatch.setattr(cpu_choice, "_WEIGHT_SLACK_BYTES", 0)
    packed, seconds = bytes_and_seconds()
    assert 1.3 * own < packed <= 1.44 * own
    assert least < seconds < 1.25 * least


@pytest.mark.parametrize(("ms", "taken"), [(0.985, True), (0.995, False)])
def test_a_chunk_must_gain_one_percent(plan, ms, taken):
    chosen = choose_kernels(plan, SINGLE)
    step = next(name for name, choice in chosen.items() if choice in TILES)
    found = cpu_tuning.Measured()
    found.times[step].update({f"{chosen[step]} by rule": 1.0, f"{chosen[step]}@56": ms})
    expected = f"{chosen[step]}@56" if taken else chosen[step]
    assert measured_choices(plan, SINGLE, found) == chosen | {step: expected}


def test_steps_that_share_weights_count_by_their_mean():
    torch.manual_seed(0)
    model = create_model("lgnet_share", local_channels=8, global_channels=8).eval()
    plan = build_plan(plan_stages(model), 1, 256, 256)
    shared = {step.weights_of for step in plan.steps if step.weights_of != step.name}
    assert shared

    def measure(executor: CpuExecutor) -> Timing:
        return Timing([1.0 if step.weights_of == step.name else 3.0 for step in plan.steps], [torch.ones(1, 3, 4, 4)])

    found = tune(plan, SINGLE, seconds=math.inf, measure=measure)
    for step in plan.steps:
        if step.weights_of == step.name:
            kernels = [ms for choice, ms in found.times[step.name].items() if "@" not in choice and " " not in choice]
            assert kernels == pytest.approx([2.0 if step.name in shared else 1.0] * len(kernels)), step.name


def test_results_are_kept_as_they_come(plan, monkeypatch):
    """A tuning that ends after the first round of candidates keeps it, and a later process uses it."""
    ticks = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        tune(plan, SINGLE, 60, measure=interrupted(fake(plan), 9), clock=lambda: next(ticks))
    monkeypatch.setattr(cache, "_known", {})
    (entry,) = cache.entries(cache.CHOICES)
    assert entry.name == plan.name
    assert entry.key == cpu_tuning.key(SINGLE)
    assert entry.value["choices"] is None
    assert entry.value["times"]
    choices = kept(plan, SINGLE)
    assert choices is not None
    found = cpu_tuning.Measured.from_dict(entry.value)
    assert found is not None
    assert choices == measured_choices(plan, SINGLE, found)


def interrupted(measure: cpu_tuning.Measure, calls: int) -> cpu_tuning.Measure:
    left = iter(range(calls))

    def counted(executor: CpuExecutor) -> Timing:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return measure(executor)

    return counted


def test_the_time_is_kept(plan):
    """Nothing is begun after it: the plain kernels, and whole runs by the model, from which nothing differs."""
    calls = []

    def measure(executor: CpuExecutor) -> Timing:
        calls.append(executor)
        return fake(plan)(executor)

    now = iter([0.0] + [100.0] * 100)
    found = tune(plan, SINGLE, 10, measure=measure, clock=lambda: next(now))
    assert len(calls) == 4 + 4
    assert found.choices is not None
    assert found.total_ms == found.model_ms


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        {},
        {"times": {}, "wrong": [], "choices": {"x": "direct"}, "total_ms": 1},
        {"times": {}, "wrong": [], "choices": {"x": "direct"}, "total_ms": None, "model_ms": None},
    ],
    ids=str,
)
def test_what_does_not_fit_is_not_used(plan, value):
    cache.put(cpu_tuning.key(SINGLE), cache.CHOICES, plan.name, value)
    assert kept(plan, SINGLE) is None


def test_a_kernel_that_a_step_cannot_have_is_not_used(plan):
    found = tune(plan, SINGLE, seconds=math.inf, measure=fake(plan))
    assert kept(plan, SINGLE) == found.choices
    assert kept(plan.resized(2, 256, 256), SINGLE) is None
    value = found.as_dict()
    for name, text in (
        ("net_c.e1", "winograd2"),
        ("net_c.d1", "direct"),
        ("net_c.e2", "narrow"),
        ("net_l.down1", "?"),
    ):
        edited = {**value, "choices": {**value["choices"], name: text}}
        cache.put(cpu_tuning.key(SINGLE), cache.CHOICES, plan.name, edited)
        assert kept(plan, SINGLE) is None


@pytest.mark.parametrize("chunk", [BY_STAGES, 14, 112])
def test_chunks_change_no_bit(plan, chunk):
    """A product sums the same terms in the same order, for every number of tiles in its chunk."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    mask = torch.ones_like(image[:, :1])
    executor = CpuExecutor.of(plan)
    texts = {n: str(c._replace(chunk=chunk)) for n, c in executor.weights.choices.items() if c.kernel in TILES}
    other = CpuExecutor(plan, executor.weights.with_choices(plan, texts))
    assert other.weights.data is executor.weights.data
    assert not other.weights.apart
    assert_accurate("chunked", other.run(image, mask)[0], executor.run(image, mask)[0])


def test_weights_packed_beside_the_others(plan):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    mask = torch.ones_like(image[:, :1])
    plain = {step.name: cpu_choice.plain_choice(step, "float32") for step in plan.steps}
    executor = CpuExecutor.of(plan, SINGLE, plain)
    changed = {"net_l.block0.first": "winograd4", "net_g.e3": "winograd2"}
    other = CpuExecutor(plan, executor.weights.with_choices(plan, changed))
    whole = CpuExecutor.of(plan, SINGLE, {**plain, **changed})
    assert set(other.weights.apart) == set(changed)
    assert torch.equal(other.run(image, mask)[0], whole.run(image, mask)[0])


@pytest.mark.parametrize("parts", [False, True], ids=["float32", "bf16x3"])
def test_a_tuned_engine(tmp_path, caplog, monkeypatch, parts):
    """Measured for real, on a small network: no slower than by the model, the same pictures, and kept."""
    if parts:
        native.library().set_isa(instruction_sets()[-1])
        if not native.multiplies("bf16x3"):
            pytest.skip("no products of bf16x3")
    torch.manual_seed(0)
    model = lively(create_model("lgnet", coarse_channels=8, local_channels=8, global_channels=8)).float()
    image, mask = case("gen256", 1, 256, 256, SINGLE)
    before = optimize(model, device="cpu")
    assert before._first.executor.chosen_by == "model"
    assert "chosen by model" in str(before.describe(rounds=1).title)
    # Whether PyTorch is faster on this machine is another test's matter.
    monkeypatch.setattr(cpu_path, "_faster", lambda engine, eager: cpu_path.Path("engine", ""))
    tuned = optimize(model, device="cpu", tune=5)
    assert tuned._first.executor.chosen_by == "measurement"
    assert "chosen by measurement" in str(tuned.describe(rounds=1).title)
    # Other Winograd tiles round differently, and this network amplifies the difference.
    assert_accurate("tuned", tuned(image, mask), before(image, mask), roundings=2**19 if parts else 2**17)
    found = next(
        cpu_tuning.Measured.from_dict(e.value) for e in cache.entries(cache.CHOICES) if e.name.startswith("engine")
    )
    assert found is not None
    assert found.total_ms is not None
    assert found.model_ms is not None
    assert found.total_ms <= found.model_ms
    assert dict(optimize(model, device="cpu")._first.executor.choices) == found.choices
    tuned.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert loaded._first.executor.chosen_by == "measurement"
    assert torch.equal(loaded(image, mask), tuned(image, mask))


@pytest.mark.parametrize("tune", [-1, "yes", None])
def test_a_wrong_time_is_refused(tune):
    with pytest.raises(ValueError, match="tune: expected a bool or a number of seconds"):
        optimize(create_model("C", coarse_channels=4).eval(), device="cpu", tune=tune)
