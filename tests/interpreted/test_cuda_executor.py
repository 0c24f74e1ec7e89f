"""The CUDA executor on CPU tensors, without graphs, against the plan in plain PyTorch."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lgnet_fast.engine.build import build_plan
from lgnet_fast.engine.cuda_executor import CudaExecutor
from lgnet_fast.engine.geometry import Geometry
from lgnet_fast.engine.plan import PICTURE, AttentionStep, Buffer, ConvStep, Plan, Step, Store, View
from lgnet_fast.engine.regions import Rect
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.reference.networks import LocalNet
from tests.interpreted.rules import normal
from tests.support import assert_accurate


def small_plan(batch: int = 1, side: int = 32) -> Plan:
    """NetL, and a U-Net of two levels with attention: every kind of step the engine knows, at 32x32, in float64."""
    torch.manual_seed(0)
    local = LocalNet(4).double().eval()
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.normal_(0, 0.2)
    first = build_plan([("l", local, False)], batch, side, side)

    def tensors(name: str, inputs: int, out: int, kernel: int, transposed: bool = False) -> dict[str, Tensor]:
        pair = (inputs, out) if transposed else (out, inputs)
        seed = sum(name.encode())
        weight = normal(*pair, kernel, kernel, dtype=torch.float64, seed=seed) / (inputs * kernel) ** 0.5
        return {"weight": weight, "bias": normal(out, dtype=torch.float64, seed=seed + 1)}

    def conv(name: str, source: View, stores: tuple[Store, ...], out: int, transposed: bool = False, merges=False):
        own = tensors(name, source.channels, out, 4, transposed)
        geometry = Geometry(4, 2, 1, transposed)
        return ConvStep(name=name, source=source, stores=stores, geometry=geometry, merges=merges, **own)

    half, quarter = side // 2, side // 4
    added = {
        "u.e1": Buffer("u.e1", 6, half, half),
        "u.cat1": Buffer("u.cat1", 14, half, half),
        "u.e2": Buffer("u.e2", 20, quarter, quarter),
        "u.d2": Buffer("u.d2", 8, half, half),
        "u.raw": Buffer("u.raw", 3, side, side),
    }
    e1, e2, d2 = View("u.e1", 0, 6), View("u.e2", 0, 20), View("u.d2", 0, 8)
    skip, up, joined = View("u.cat1", 0, 6), View("u.cat1", 6, 8), View("u.cat1", 0, 14)
    two = (Store(e1, "leaky_relu"), Store(skip, "relu"))
    attention = AttentionStep(
        name="u.attention",
        source=d2,
        stores=(Store(up, "relu"),),
        variant="released",
        **tensors("u.attention", 16, 8, 1),
    )
    steps: tuple[Step, ...] = (
        conv("u.e1", View(PICTURE, 0, 4), two, 6),
        conv("u.e2", e1, (Store(e2, "relu"),), 20),
        conv("u.d2", e2, (Store(d2),), 8, True),
        attention,
        conv("u.d1", joined, (Store(View("u.raw", 0, 3), "tanh"),), 3, True, True),
    )
    buffers = {**first.buffers, **added}
    steps = tuple(replace(s, regions=(buffers[s.stores[0].view.buffer].everywhere,)) for s in steps)
    return Plan(batch, side, side, buffers, (*first.steps, *steps))


def inputs(plan: Plan, soft: bool = False) -> tuple[Tensor, Tensor]:
    image = normal(plan.batch, 3, plan.height, plan.width, seed=7).clamp(-1, 1)
    mask = torch.zeros(plan.batch, 1, plan.height, plan.width)
    mask[..., 3:12, 5:14] = 1
    return image, normal(*mask.shape, seed=8).sigmoid() if soft else mask


def cast(plan: Plan, dtype: torch.dtype) -> Plan:
    return replace(
        plan, steps=tuple(replace(s, weight=s.weight.to(dtype), bias=s.bias.to(dtype)) for s in plan.steps)
    )


def check(plan: Plan, executor: CudaExecutor, image: Tensor, mask: Tensor, start: Tensor | None = None) -> None:
    """Picture and raw pictures against the plan in float64, by twice the error of the plan in the same dtype."""
    result, raw = executor.run(image, mask, start)
    exact, exact_raw = TorchExecutor(plan).run(image, mask, start)
    eager, eager_raw = TorchExecutor(cast(plan, executor.dtype)).run(image, mask, start)
    for name, a, b, c in zip(
        ("merged", *(f"raw {i}" for i in range(9))), (result, *raw), (exact, *exact_raw), (eager, *eager_raw)
    ):
        assert a.dtype == torch.float32
        # everything is held in the executor's dtype but these pictures
        assert_accurate(name, a.to(executor.dtype), b, c)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_dense(batch: int, soft: bool) -> None:
    plan = small_plan(batch)
    image, mask = inputs(plan, soft)
    executor = CudaExecutor.of(plan, torch.float32)
    check(plan, executor, image, mask)
    check(plan, executor, image, mask, normal(*image.shape, seed=9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit(dtype: torch.dtype) -> None:
    plan = small_plan()
    check(plan, CudaExecutor.of(plan, dtype), *inputs(plan))


def test_known_pixels_are_those_of_the_input() -> None:
    plan = small_plan()
    image, mask = inputs(plan)
    result, _ = CudaExecutor.of(plan, torch.float16).run(image, mask)
    known = (mask == 0).expand_as(image)
    assert torch.equal(result[known], image[known])


def test_regions() -> None:
    """A restricted run gives the dense run's pixels though its memory starts as NaN."""
    plan = small_plan(side=64)
    image, mask = inputs(plan)
    executor = CudaExecutor.of(plan, torch.float32)
    dense, dense_raw = executor.run(image, mask)
    restricted = plan.restricted([Rect(3, 12, 5, 14)])
    executor.memory.arena.fill_(torch.nan)
    result, raw = executor.run(image, mask, None, [s.regions for s in restricted.steps])
    # block shapes, and so the order of sums, differ between the two
    assert_accurate("result", result, dense, roundings=2**8)
    hole = (mask != 0).expand_as(image)
    for a, b in zip(raw, dense_raw):
        assert_accurate("raw", a[hole], b[hole], roundings=2**8)


def test_resized_shares_the_weights() -> None:
    plan = small_plan()
    executor = CudaExecutor.of(plan, torch.float32)
    other = executor.resized(plan.resized(2, 32, 64))
    assert other.weights is executor.weights
    steps = tuple(replace(new, weight=s.weight, bias=s.bias) for new, s in zip(other.plan.steps, plan.steps))
    check(replace(other.plan, steps=steps), other, *inputs(other.plan))


def test_steps_by_library_convolutions() -> None:
    plan = small_plan()
    choices = {step.name: "cudnn" for step in plan.steps if step.kind != "attention"}
    executor = CudaExecutor.of(plan, torch.float32, choices=choices)
    check(plan, executor, *inputs(plan))
    assert set(executor.choices.values()) == {"cudnn", "attention"}
    assert executor.packed_bytes > CudaExecutor.of(plan, torch.float32).packed_bytes


def test_step_times() -> None:
    plan = small_plan()
    executor = CudaExecutor.of(plan, torch.float32)
    image, mask = inputs(plan)
    before = executor.run(image, mask)[0]
    assert len(executor.step_times(image, mask, rounds=1)) == len(plan.steps)
    assert torch.equal(executor.run(image, mask)[0], before)
    assert list(executor.choices) == [step.name for step in plan.steps]


def test_threads_take_turns() -> None:
    plan = small_plan()
    image, mask = inputs(plan)
    images = [image, -image]
    executor = CudaExecutor.of(plan, torch.float32)
    expected = [executor.run(x, mask)[0] for x in images]
    results: list[Tensor | None] = [None, None]

    def work(index: int) -> None:
        results[index] = executor.run(images[index], mask)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(results, expected):
        assert a is not None
        assert torch.equal(a, b)


def test_outputs_without_clones_are_the_executors_own() -> None:
    plan = small_plan()
    image, mask = inputs(plan)
    executor = CudaExecutor.of(plan, torch.float32, clone_outputs=False)
    first, _ = executor.run(image, mask)
    second, _ = executor.run(-image, mask)
    assert first.data_ptr() == second.data_ptr()


def test_refuses_float64() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        CudaExecutor.of(small_plan(), torch.float64)
