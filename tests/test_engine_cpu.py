"""The CPU executor against the plan run in plain PyTorch, float64."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lgnet_fast.engine.arena import lifetimes, plan_arena
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu import weights as cpu_weights
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.cpu.weights import CpuWeights
from lgnet_fast.engine.plan import AttentionStep
from lgnet_fast.engine.regions import Rect
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.reference.lgnet import LGNet
from tests.engine_cpu_support import (
    ISAS,
    KERNELS,
    assert_close,
    check,
    choices,
    picture,
    plan_of,
    skip_without_tiles,
)
from tests.support import case, released_state

pytestmark = pytest.mark.skipif(
    CpuExecutor.unavailable_reason() is not None, reason=str(CpuExecutor.unavailable_reason())
)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", [5, 16])
def test_every_kernel(channels, kernel, threads):
    plan = plan_of(channels)
    check((channels,), CpuExecutor.of(plan, choices=choices(plan, kernel)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_instruction_set(isa, kernel):
    plan = plan_of(5)
    check((5,), CpuExecutor.of(plan, choices=choices(plan, kernel)))


def test_attention_stores_what_the_plan_says_or_not_at_all():
    def stored(activation):
        steps = []
        for step in plan.steps:
            if isinstance(step, AttentionStep):
                step = replace(step, stores=(replace(step.stores[0], activation=activation),))
            steps.append(step)
        return replace(plan, steps=tuple(steps))

    plan = plan_of(5)
    image, mask = picture(1, 256, 256)
    expected = TorchExecutor(stored("none")).run(image, mask)[0]
    assert_close(CpuExecutor.of(stored("none")).run(image, mask)[0], expected)
    assert (expected - TorchExecutor(plan).run(image, mask)[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"attention_d5: expected no activation or relu, got leaky_relu"):
        CpuExecutor.of(stored("leaky_relu")).run(image, mask)


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 256, 512), (2, 512, 256)], ids=str)
def test_resized_shares_the_weights(shape):
    plan = plan_of(5)
    executor = CpuExecutor.of(plan)
    other = executor.resized(plan.resized(*shape))
    assert other.weights is executor.weights
    check((5,), other, *shape)
    check((5,), executor)


@pytest.mark.parametrize("stages", ["C", "C+L", "C+G_att", "C+G+G_att", "C+L+G"])
def test_ablations(stages):
    check((5, stages), CpuExecutor.of(plan_of(5, stages)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_paper_s_attention_and_a_width_of_48(kernel):
    key = (48, "C+G_att", "paper")
    plan = plan_of(*key)
    check(key, CpuExecutor.of(plan, choices=choices(plan, kernel)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_capped_widths(kernel):
    key = (16, "C+G_att", "released", None, 32)
    plan = plan_of(*key)
    assert max(buffer.channels for buffer in plan.buffers.values()) == 64
    check(key, CpuExecutor.of(plan, choices=choices(plan, kernel)))


def test_a_given_start_is_painted_into_the_hole():
    plan = plan_of(5, "C+L")
    image, mask = picture(1, 256, 256)
    torch.manual_seed(0)
    start = torch.rand_like(image)
    expected, _ = TorchExecutor(plan).run(image, mask, start)
    assert_close(CpuExecutor.of(plan).run(image, mask, start)[0], expected)


@pytest.mark.parametrize("kind", [CpuExecutor.of, TorchExecutor])
def test_without_stages_the_result_is_the_same(kind):
    executor = kind(plan_of(5, "C+L"))
    result, raw = executor.run(*picture(1, 256, 256))
    alone, none = executor.run(*picture(1, 256, 256), stages=False)
    assert torch.equal(alone, result)
    assert (len(raw), none) == (2, [])


def test_same_bits_every_time_and_in_eight_threads_at_once(threads):
    plan = plan_of(16)
    executor = CpuExecutor.of(plan)
    pictures = [tuple(t.float() for t in picture(1, 256, 256, seed)) for seed in range(8)]
    expected = [executor.run(*p)[0] for p in pictures]
    assert all(torch.equal(executor.run(*p)[0], e) for p, e in zip(pictures, expected, strict=True))
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(2):
            got[i] = executor.run(*pictures[i])[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(8))


def test_any_strides_and_inputs_unchanged():
    executor = CpuExecutor.of(plan_of(5))
    image, mask = (t.float() for t in picture(1, 256, 256))
    expected, _ = executor.run(image, mask)
    strided = image.transpose(2, 3).contiguous().transpose(2, 3)
    last = image.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(1, 1, 256, 512)
    wide[..., ::2] = mask
    before = image.clone(), mask.clone()
    for variant in (strided, last):
        assert torch.equal(executor.run(variant, wide[..., ::2])[0], expected)
    assert torch.equal(image, before[0])
    assert torch.equal(mask, before[1])


def test_state_restores_without_packing(monkeypatch):
    plan = plan_of(5)
    executor = CpuExecutor.of(plan, choices=choices(plan, "winograd4"))
    image, mask = picture(1, 256, 256)
    monkeypatch.setattr(cpu_weights, "_group_rows", None)
    state = executor.state()
    state["data"] = state["data"].clone()
    loaded = CpuExecutor(plan, CpuWeights.from_state(plan.without_weights(), state))
    assert loaded.choices == executor.choices
    assert torch.equal(loaded.run(image, mask)[0], executor.run(image, mask)[0])
    with pytest.raises(ValueError, match="another network"):
        CpuWeights.from_state(plan_of(5, "C+L").without_weights(), state)
    with pytest.raises(ValueError, match="bytes of weights"):
        CpuWeights.from_state(plan_of(16).without_weights(), state)
    with pytest.raises(ValueError, match="packed for"):
        CpuWeights.from_state(plan.without_weights(), {**state, "isa": "other"})


def test_wrong_arguments_are_refused():
    plan = plan_of(5)
    with pytest.raises(ValueError, match="dtype"):
        CpuExecutor.of(plan, torch.float16)
    executor = CpuExecutor.of(plan)
    image, mask = picture(1, 256, 256)
    with pytest.raises(ValueError, match=r"image: expected shape \[1, 3, 256, 256\]"):
        executor.run(image[..., :128], mask)
    with pytest.raises(ValueError, match="mask: expected shape"):
        executor.run(image, mask[..., :128])


@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("every", [0, 1, 2], ids=["floats", "halves", "both"])
def test_buffers_that_live_together_do_not_overlap(every, channels):
    plan = plan_of(channels)
    halves = list(plan.buffers)[::every] if every else []
    arena, spans = plan_arena(plan, halves=halves), lifetimes(plan)
    sizes = {name: b.height * b.width * b.channels / (2 if name in halves else 1) for name, b in plan.buffers.items()}
    for a in spans:
        for b in spans:
            if a < b and spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]:
                assert (
                    arena.offsets[a] + sizes[a] <= arena.offsets[b] or arena.offsets[b] + sizes[b] <= arena.offsets[a]
                )
    assert arena.size < 0.5 * sum(sizes.values())


@pytest.mark.slow(reason="packs the full network a second time: test_engine.py runs it through the engine")
def test_lgnet_with_the_recipe_s_weights():
    """The whole network: 99% of the hole's 8-bit samples equal, none off by more than one, RMS error at most 1e-4."""
    model = LGNet.from_released({net: released_state(net, torch.float32) for net in ("G1", "G2", "G3")})
    plan = build_plan(plan_stages(model), 1, 256, 256)
    image, mask = case("gen256", 1, 256, 256)
    executor = CpuExecutor.of(plan)
    got, _ = executor.run(image, mask)
    weights = sum(4 * step.weight.numel() for step in plan.steps)
    assert executor.packed_bytes + executor.workspace_bytes <= 1.3 * weights + (150 << 20)
    expected = model.double()(image, mask).detach()
    hole = mask.expand_as(image) > 0
    error = (got.double() - expected)[hole]
    levels = (((t[hole].double() + 1) * 127.5).round() for t in (got, expected))
    off = (next(levels) - next(levels)).abs()
    assert (off == 0).double().mean() >= 0.99
    assert off.max() <= 1
    assert error.square().mean().sqrt() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_broken_weight_is_not_hidden(isa, kernel, dtype):
    """NaN or infinity in one weight of each kind of step, in a run restricted to the hole."""
    skip_without_tiles(kernel, "bf16" if dtype == torch.bfloat16 else "float32")
    plan = plan_of(2)
    image, mask = picture(1, 256, 256)
    mask = torch.zeros_like(mask)
    mask[..., 60:100, 80:130] = 1
    hole = (mask > 0).expand_as(image)
    regions = [step.regions for step in plan.restricted([Rect(60, 100, 80, 130)]).steps]
    chosen = choices(plan, kernel)
    if dtype == torch.bfloat16:
        chosen = {name: f"{own}/bf16" for name, own in chosen.items()}
    broken = {  # the index of a weight that reads more than padding
        "net_c.e2": (0, 0, 1, 2),
        "net_c.d4": (1, 0, 1, 1),
        "net_l.block3.first": (1, 1, 0, 2),
        "net_l.up1": (0, 1, 2, 0),
        "net_g.e5": (0, 3, 2, 1),
        "net_g.attention_d4": (1, 0, 0, 0),
        "net_g.d1": (1, 2, 2, 2),
    }
    assert torch.isfinite(CpuExecutor.of(plan, dtype, chosen).run(image, mask, None, regions)[0]).all()
    # A third of them for each kernel and instruction set; together they cover every pair of kernel and step.
    turn = ISAS.index(isa) + KERNELS.index(kernel)
    for number, (name, index) in enumerate(broken.items()):
        if (number + turn) % 3:
            continue
        value = (torch.nan, torch.inf, -torch.inf)[number % 3]
        steps = []
        for step in plan.steps:
            if step.name == name:
                weight = step.weight.clone()
                weight[index] = value
                step = replace(step, weight=weight)
            steps.append(step)
        result, _ = CpuExecutor.of(replace(plan, steps=tuple(steps)), dtype, chosen).run(image, mask, None, regions)
        assert not torch.isfinite(result[hole]).all(), (name, value)
        assert torch.equal(result[~hole], image.float()[~hole])


def test_dropped_buffers_are_allocated_anew(threads):
    executor = CpuExecutor.of(plan_of(5))
    inputs = picture(1, 256, 256)
    least = executor.buffer_bytes
    assert executor.workspace_bytes == 0
    expected = executor.run(*inputs)[0]
    assert executor.held_bytes == executor.buffer_bytes == executor.workspace_bytes >= least > 0
    executor.drop_buffers()
    assert (executor.held_bytes, executor.workspace_bytes, executor.buffer_bytes) == (0, 0, least)
    assert torch.equal(executor.run(*inputs)[0], expected)


def test_buffers_may_be_dropped_while_threads_run():
    executor = CpuExecutor.of(plan_of(5))
    inputs = picture(1, 256, 256)
    expected = executor.run(*inputs)[0]
    results: list[Tensor] = []

    def work():
        for _ in range(4):
            results.append(executor.run(*inputs)[0])

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        executor.drop_buffers()
    for worker in workers:
        worker.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


def test_more_threads_than_work_or_processors_change_nothing_but_rounding(monkeypatch):
    """For a hole of a few pixels most threads have no task."""
    executor = CpuExecutor.of(plan_of(5))
    image, mask = (t.float() for t in picture(1, 256, 256))
    holes = executor.restricted(executor.plan, [Rect(100, 109, 31, 47)])
    for regions in (None, [step.regions for step in holes.steps]):
        monkeypatch.setattr("lgnet_fast.forks.kernel_threads", lambda: 1)
        expected = executor.run(image, mask, regions=regions)[0]
        for count in (3, 7, 64, 128):
            monkeypatch.setattr("lgnet_fast.forks.kernel_threads", lambda count=count: count)
            got = executor.run(image, mask, regions=regions)[0]
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), count
