"""Tuning attention for training, with the kernels in Triton's interpreter and a fake clock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import attention, tuned
from lgnet_fast.kernels.cards import CARDS
from lgnet_fast.kernels.configs import Config, pick
from lgnet_fast.kernels.launch import record

from lgnet_fast import cache
from lgnet_fast.engine.cuda import tuning_training as cuda_tuning_training
from lgnet_fast.engine.cuda.measure import kept
from lgnet_fast.engine.cuda.tuning_training import (
    OPERATIONS,
    REPEATS,
    blocks_of,
    candidates,
    tune_training,
)
from lgnet_fast.engine.cuda.weights import Tuned
from lgnet_fast.engine.plan import Plan
from lgnet_fast.jobs.tune import render, training_report
from lgnet_fast.ops import dispatch, first_use
from lgnet_fast.reference.attention import attention_block
from tests.interpreted.plans import tiny_plan
from tests.interpreted.timers import IdleTimer
from tests.support import assert_accurate

CPU = torch.device("cpu")
SINGLE = torch.float32
Cost = Callable[[str, dict[str, Any]], float]


@pytest.fixture(autouse=True)
def machine(fresh_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    another_process(monkeypatch)


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_known", {})
    tuned._kept.cache_clear()


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The attention block of a small plan."""
    whole = tiny_plan()
    return replace(whole, steps=tuple(s for s in whole.steps if s.name == "u.attention"))


class FakeTimer(IdleTimer):
    """Compiles nothing; launches take `cost` of their kernels' names and constants, whole runs that of `whole`."""

    def __init__(self, cost: Cost, whole: Sequence[float] = (9.0, 8.0)) -> None:
        super().__init__()
        self.cost, self.whole = cost, list(whole)

    def time(self, launches: Sequence[Callable[[], None]]) -> float:
        if len(launches) == 1:
            self.whole.append(self.whole.pop(0))
            return self.whole[-1]
        assert len(launches) == REPEATS
        assert isinstance(launches[0], functools.partial)
        (concerned,) = launches[0].args
        return sum(self.cost(one.kernel.__name__, one.meta) for one in concerned)


def small_is_fast(kernel: str, meta: dict[str, Any]) -> float:
    """The least block is best, and kernels of the rows are all alike."""
    return 1.0 * meta["BLOCK_M"] * meta["BLOCK_N"] if "BLOCK_N" in meta else 5.0


def run(plan: Plan, timer: FakeTimer, tried: int = 4) -> tuned.Training:
    (found,) = tune_training(
        blocks_of(plan, SINGLE, CPU), SINGLE, CPU, 1e6, lambda *args, **figures: None, timer, tried
    )
    return found


def operands(plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (block,) = blocks_of(plan, SINGLE, CPU)
    return block.features, block.weight, block.bias, block.grad


def launched(plan: Plan) -> dict[str, dict[str, Any]]:
    """Kernel -> its constants, as forward and backward launch them now."""
    features, weight, bias, grad = operands(plan)
    (step,) = plan.steps
    with record() as launches:
        _, attended, stats = attention.attention_block_forward(
            features, weight, bias, step.variant, save_attended=True
        )
        assert attended is not None
        assert stats is not None
        attention.attention_block_backward(grad, features, attended, stats, weight, step.variant)
    return {one.kernel.__name__: one.meta for one in launches}


def test_faster_shapes_are_kept_and_launched(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operators themselves, in the next process, with the right result and gradient."""
    shipped = launched(plan)
    timer = FakeTimer(small_is_fast)
    found = run(plan, timer)
    assert {"rows", "forward", "backward_dq", "backward_dkv"} <= found.operations.keys()
    for op in ("forward", "backward_dq", "backward_dkv"):
        result = found.operations[op]
        assert result.default == pick(op, "interpreted", "ieee", *found.block[2:4])
        assert result.shape[0] * result.shape[1] < result.default[0] * result.default[1]
        assert result.us < result.default_us
    rows = found.operations["rows"]
    assert rows.shape == rows.default  # all alike
    assert (found.before_us, found.now_us) == (9.0, 8.0)
    assert len(timer.compiled) > 12
    tensors = [arg for one in timer.compiled for arg in one.args if isinstance(arg, torch.Tensor)]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
    another_process(monkeypatch)
    now = launched(plan)
    for kernel, op in (("fwd", "forward"), ("bwd_dq", "backward_dq"), ("bwd_dkv", "backward_dkv")):
        name = f"_attn_{kernel}_kernel"
        kept = Config(*found.operations[op].shape).meta()
        assert {constant: now[name][constant] for constant in kept} == kept
        assert {constant: shipped[name][constant] for constant in kept} != kept
    # the operator, as a network calls it
    monkeypatch.setattr(dispatch, "CANDIDATES", {"cpu": "triton"})
    monkeypatch.setattr(first_use, "_verdicts", {})
    used: list[Config] = []
    original = attention.AttentionCall.pick

    def spy(call: attention.AttentionCall, op: str) -> Config:
        used.append(original(call, op))
        return used[-1]

    monkeypatch.setattr(attention.AttentionCall, "pick", spy)
    features, weight, bias, grad = operands(plan)
    leaf, plain = (features.clone().requires_grad_() for _ in range(2))
    (step,) = plan.steps
    torch.ops.lgnet.attention_block(leaf, weight, bias, step.variant).backward(grad)
    assert {Config(*found.operations[op].shape) for op in ("forward", "backward_dq", "backward_dkv")} <= set(used)
    attention_block(plain, weight, bias, step.variant).backward(grad)
    exact = features.double().requires_grad_()
    attention_block(exact, weight.double(), bias.double(), step.variant).backward(grad.double())
    assert leaf.grad is not None
    assert exact.grad is not None
    assert_accurate("gradient", leaf.grad, exact.grad, plain.grad)
    # other sizes, dtypes and tensors without values have the shipped shapes
    call = attention.AttentionCall.of(features, step.variant)
    assert set(call.measured) == set(found.operations)
    for other in (features[:, :, :4], features.half(), features.to("meta"), torch.cat([features] * 2)):
        assert not attention.AttentionCall.of(other, step.variant).measured


def test_a_little_faster_is_no_reason_to_change(plan: Plan) -> None:
    found = run(plan, FakeTimer(lambda kernel, meta: 100.0 if meta.get("BLOCK_M") == 64 else 99.0))
    assert all(result.shape == result.default for result in found.operations.values())


def test_what_is_slower_in_the_whole_is_dropped(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = launched(plan)
    found = run(plan, FakeTimer(small_is_fast, (8.0, 8.1)))
    assert found.now_us == found.before_us == 8.0
    assert all(result.shape == result.default for result in found.operations.values())
    another_process(monkeypatch)
    assert launched(plan) == shipped


def test_wrong_and_failing_shapes_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is wrong, a gradient that is NaN, and a shape that cannot run, though they are the fastest."""
    wrong, failing, right = Config(16, 16, 4, 1), Config(32, 32, 4, 1), Config(32, 64, 4, 1)
    monkeypatch.setattr(cuda_tuning_training, "candidates", lambda *args: iter([wrong, failing, right]))
    attended, backward = attention._forward, attention._backward_dkv

    def faulty(features: torch.Tensor, variant: str, result: Any) -> torch.Tensor:
        shape = attention.AttentionCall.of(features, variant).pick("forward")
        if shape == failing:
            raise RuntimeError("CUDA error: invalid argument")
        stats = attended(features, variant, result)
        if shape == wrong:
            result.out.ptr.zero_()
        return stats

    def spoilt(call: Any, *args: Any, **options: Any) -> Any:
        gradient = backward(call, *args, **options)
        if call.pick("backward_dkv") == wrong:
            gradient.rows.fill_(torch.nan)
        return gradient

    monkeypatch.setattr(attention, "_forward", faulty)
    monkeypatch.setattr(attention, "_backward_dkv", spoilt)
    lines: list[dict[str, Any]] = []
    (found,) = tune_training(
        blocks_of(plan, SINGLE, CPU), SINGLE, CPU, 1e6, lambda section, **figures: lines.append(figures),
        FakeTimer(small_is_fast), 4,
    )  # fmt: skip
    assert found.operations["forward"].shape == right
    assert found.operations["backward_dkv"].shape == failing  # which fails in the forward only
    refused = {(line["part"], tuple(line["config"])) for line in lines if "wrong" in line or "error" in line}
    assert refused >= {("forward", wrong), ("forward", failing), ("backward_dkv", wrong)}


def test_a_kill_leaves_what_was_measured(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(kernel: str, meta: dict[str, Any]) -> float:
        if kernel == "_attn_bwd_dq_kernel":
            raise KeyboardInterrupt
        return small_is_fast(kernel, meta)

    with pytest.raises(KeyboardInterrupt):
        run(plan, FakeTimer(cost))
    another_process(monkeypatch)
    (entry,) = cache.entries(cache.CHOICES)
    left = tuned.Training.from_dict(entry.value)
    assert left is not None
    assert set(left.operations) == {"rows", "forward"}
    assert left.now_us is None
    assert "not measured to the end" in str(left)
    measured = left.operations["forward"]
    assert measured.shape != measured.default
    assert launched(plan)["_attn_fwd_kernel"]["BLOCK_M"] == measured.shape[0]
    # the engine's own choices are other entries of the same cache
    assert kept(CPU, SINGLE) == Tuned()


def test_no_time_is_left(plan: Plan) -> None:
    lines: list[dict[str, Any]] = []
    (found,) = tune_training(
        blocks_of(plan, SINGLE, CPU), SINGLE, CPU, -1.0, lambda section, **figures: lines.append(figures),
        FakeTimer(small_is_fast),
    )  # fmt: skip
    assert found.operations == {}
    assert lines[-1] == {"cut_off": "u.attention rows"}


def test_the_commands_report(plan: Plan) -> None:
    lines: list[str] = []
    report = training_report(plan, CPU, SINGLE, 1e6, lines.append, FakeTimer(small_is_fast), 4)
    steps = [row.step for row in report.rows]
    assert steps[:2] == ["u.attention rows", "u.attention forward"]
    assert max(row.gain for row in report.rows) > 1.5
    assert (report.before_ms, report.now_ms) == pytest.approx((9e-3, 8e-3))
    assert report.as_dict()["steps"][1]["now"] == report.rows[1].now
    assert any(line.startswith("u.attention forward: ") for line in lines)
    assert render(report).renderables


@pytest.mark.parametrize(
    "value", [None, {}, {"training": [1]}, {"training": ["ieee", "paper", 8, 64, 1], "operations": 3}]
)
def test_a_spoilt_entry_is_as_if_not_there(value: Any, plan: Plan) -> None:
    assert tuned.Training.from_dict(value) is None
    cache.put(cache.key_for(CPU, SINGLE), cache.CHOICES, "attention in training x", value)
    tuned._kept.cache_clear()
    assert "_attn_fwd_kernel" in launched(plan)


def test_candidates_fit_every_card() -> None:
    for card in CARDS.values():
        for kind, element in (("half", 2), ("tf32", 4), ("ieee", 4)):
            for channels, positions in ((128, 4096), (512, 256)):
                block = tuned.Block(kind, "released", channels, positions, 1)
                for op in OPERATIONS:
                    default = pick(op, card.generation, "any" if op == "rows" else kind, channels, positions)
                    found = list(candidates(op, default, block, card.generation))
                    assert len(set(found)) == len(found) >= 4
                    assert default not in found
                    if op == "forward":
                        rows = max(shape.block_m + (shape.num_stages - 1) * shape.block_n for shape in found)
                        assert element * rows * channels <= card.shared_limit
