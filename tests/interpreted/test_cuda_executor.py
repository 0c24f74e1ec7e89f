"""The CUDA executor on CPU tensors, without graphs, against the plan in plain PyTorch."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lgnet_fast.kernels import hopper, hopper_chain, picture_conv
from lgnet_fast.kernels.configs import assume_generation
from lgnet_fast.kernels.picture_conv import PictureTile
from torch import Tensor

from lgnet_fast import create_model
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cuda import chains
from lgnet_fast.engine.cuda import executor as cuda_executor
from lgnet_fast.engine.cuda import launches as cuda_launches
from lgnet_fast.engine.cuda import weights as cuda_weights
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.cuda.library_executor import LibraryExecutor
from lgnet_fast.engine.cuda.weights import Tuned
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.engine.torch_executor import TorchExecutor
from tests import emulator
from tests.interpreted.plans import cast, picture_plan, small_plan, tiny_plan
from tests.interpreted.rules import normal
from tests.support import assert_accurate


def inputs(plan: Plan, soft: bool = False) -> tuple[Tensor, Tensor]:
    image = normal(plan.batch, 3, plan.height, plan.width, seed=7).clamp(-1, 1)
    mask = torch.zeros(plan.batch, 1, plan.height, plan.width)
    mask[..., 3:12, 5:14] = 1
    return image, normal(*mask.shape, seed=8).sigmoid() if soft else mask


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


@pytest.mark.parametrize(("batch", "side", "soft"), [(1, 32, False), (2, 16, True)])
def test_dense(batch: int, side: int, soft: bool) -> None:
    plan = small_plan(batch, side)
    image, mask = inputs(plan, soft)
    executor = CudaExecutor.of(plan, torch.float32)
    check(plan, executor, image, mask)
    check(plan, executor, image, mask, normal(*image.shape, seed=9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit(dtype: torch.dtype) -> None:
    plan = small_plan()
    check(plan, CudaExecutor.of(plan, dtype), *inputs(plan))


def test_known_pixels_are_those_of_the_input() -> None:
    plan = small_plan(side=16)
    image, mask = inputs(plan)
    result, _ = CudaExecutor.of(plan, torch.float16).run(image, mask)
    known = (mask == 0).expand_as(image)
    assert torch.equal(result[known], image[known])


def test_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restricted run gives the dense run's pixels though its memory starts as NaN."""
    bands = []

    def attend(*args: Any) -> None:
        bands.append(args[-1])
        cuda_launches.attend(*args)

    monkeypatch.setattr(cuda_executor, "attend", attend)
    plan = small_plan(side=48)
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
    # of the attention, the rows that meet its region
    (attention,) = (step for step in restricted.steps if step.kind == "attention")
    (region,) = attention.regions
    assert bands == [None, (region.top, region.bottom)]
    assert plan.target(attention).height > 2 * (region.bottom - region.top)


def test_steps_that_share_a_launch_share_it_in_a_restricted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compiled kernel does, the launch computes its steps everywhere, also where less is asked for."""
    plan = tiny_plan()
    image, mask = inputs(plan)
    executor = CudaExecutor.of(plan, torch.float32)
    expected, _ = executor.run(image, mask)
    number = [step.name for step in plan.steps].index("u.block")
    regions = [step.regions for step in plan.steps]
    for own in (number, number + 1):
        regions[own] = (Rect(0, 1, 0, 1),)
    launched: list[int] = []

    def launch(plan: Plan, first: int, *call: Any) -> tuple[Any, None]:
        launched.append(first)
        launches = [one for own in (first, first + 1) for one in executor.step_launches(executor.memory, own)]
        return (lambda: cuda_launches.run_all(launches)), None

    monkeypatch.setattr(cuda_executor, "group_launch", launch)
    monkeypatch.setattr(CudaExecutor, "_deep_groups", lambda own: {number: SimpleNamespace(layers=[None, None])})
    executor.memory.arena.fill_(torch.nan)
    result, _ = executor.run(image, mask, None, regions)
    assert torch.equal(result, expected)
    assert launched == [number]


def test_a_chain_is_one_launch_where_its_rectangles_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In dense and restricted runs; not where a step of it computes nothing, or where its blocks do not fit."""
    plan = tiny_plan()
    image, mask = inputs(plan)
    executor = CudaExecutor.of(plan, torch.float32)
    expected, _ = executor.run(image, mask)
    number = [step.name for step in plan.steps].index("u.block")
    numbers = range(number, number + 2)
    made: list[tuple[Rect, ...]] = []
    fits = True

    def fitting(plan: Plan, numbers: range, weights: Any, view: Any, regions: Any, card: Any) -> Any:
        if (rects := chains.rectangles(plan, numbers, regions)) is None:
            return None
        made.append(rects)
        launches = [
            one for own, rect in zip(numbers, rects) for one in executor.step_launches(executor.memory, own, (rect,))
        ]
        return SimpleNamespace(launch=lambda: cuda_launches.run_all(launches)) if fits else None

    monkeypatch.setattr(CudaExecutor, "_chains", lambda own: [numbers])
    monkeypatch.setattr(chains, "fitting_chain", fitting)
    assert "chain" not in executor.choices.values()  # by estimate a dense run has too many blocks
    monkeypatch.setattr(chains, "tiles", lambda *call: ("a tile",))
    assert [executor.choices[plan.steps[own].name] for own in numbers] == ["chain", "chain"]
    whole = tuple(plan.steps[own].regions[0] for own in numbers)
    for regions, count in (
        (None, len(plan.steps)),
        ([step.regions for step in plan.steps], len(plan.steps)),
        ([() if own == number else step.regions for own, step in enumerate(plan.steps)], len(plan.steps)),
    ):
        assert len(executor.launches(regions)) == count
    assert made == [whole, whole]
    executor.memory.arena.fill_(torch.nan)
    result, _ = executor.run(image, mask)
    assert torch.equal(result, expected)
    fits = False
    assert len(executor.launches()) == len(plan.steps) + 1


@pytest.mark.parametrize(
    ("chosen", "tuned", "used"), [(True, False, True), (None, True, True), (None, False, False), (False, True, False)]
)
def test_chains_as_asked_for_or_as_measured(
    monkeypatch: pytest.MonkeyPatch, chosen: bool | None, tuned: bool, used: bool
) -> None:
    """The groups are checked once, on a GPU, and not while a graph is captured."""
    plan = tiny_plan()
    names = {plan.name: ("u.block",)} if tuned else {}
    executor = CudaExecutor.of(plan, torch.float32, chains=chosen, tuned=Tuned(chains=names))
    checked = []
    monkeypatch.setattr(chains, "checked_runs", lambda *call: checked.append(call) or [range(2)])
    assert executor._chains() == []  # no GPU
    monkeypatch.setattr(CudaExecutor, "_can_check", lambda own: True)
    assert executor._chains() == used * [range(2)]
    monkeypatch.setattr(CudaExecutor, "_can_check", lambda own: False)
    assert executor._chains() == used * [range(2)]
    assert [wanted for *_, wanted in checked] == used * [None if chosen else ("u.block",)]
    assert executor.chosen_by.startswith("measurement" if tuned else "table")


@pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))
def test_a_chain_on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own choice of tile, dense and in holes, and its launches; where a launch does not fit, none."""
    kernel = emulator.EmulatedKernel
    monkeypatch.setattr(hopper_chain, "Kernel", kernel)
    monkeypatch.setattr(hopper, "tensor_map", emulator.tensor_map)
    monkeypatch.setattr(kernel, "launched", [])
    monkeypatch.setattr(hopper_chain, "reason_against", lambda device, dtype: None)
    monkeypatch.setattr(CudaExecutor, "_can_check", lambda own: True)
    with torch.device("cpu"):
        model = create_model("lgnet_demo").eval()
    plan = build_plan(plan_stages(model), 1, 256, 256)
    with assume_generation("sm_90"):
        executor = CudaExecutor.of(plan, torch.float16, chains=True)
        assert list(executor.choices.values()).count("chain") == 8
        assert kernel.launched == ["lgnet_chain_float16"]  # the check
        for holes in (None, [Rect(96, 160, 96, 160)], [Rect(0, 32, 0, 32), Rect(224, 256, 224, 256)]):
            regions = holes and [step.regions for step in CudaExecutor.restricted(plan, holes).steps]
            made = [one for one in executor.launches(regions) if getattr(one, "__name__", "") == "launch"]
            assert len(made) == 1
        monkeypatch.setattr(kernel, "held", 4)
        assert all(getattr(one, "__name__", "") != "launch" for one in executor.launches())


def test_resized_shares_the_weights() -> None:
    plan = small_plan(side=16)
    executor = CudaExecutor.of(plan, torch.float32)
    other = executor.resized(plan.resized(2, 16, 32))
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


def test_executors_of_other_sizes_wait_for_unpacked_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their stream may be another than the one on which the weights were unpacked."""
    plan = small_plan()
    executor = CudaExecutor.of(plan, torch.float32)
    event = object()
    monkeypatch.setattr(cuda_weights, "event_of", lambda device: event)
    assert executor.weights.all_by_library(executor.plan, frozenset()).packed is event


def test_step_times() -> None:
    plan = tiny_plan()
    executor = CudaExecutor.of(plan, torch.float32)
    image, mask = inputs(plan)
    before = executor.run(image, mask)[0]
    assert len(executor.step_times(image, mask, rounds=1)) == len(plan.steps)
    assert torch.equal(executor.run(image, mask)[0], before)
    assert list(executor.choices) == [step.name for step in plan.steps]


PICTURE_TILES = {
    "p.stem": PictureTile(4, 32),
    "p.out": PictureTile(2, 48),
    "q.e1": PictureTile(4, 32),
    "q.d1": PictureTile(2, 32),
}


@pytest.mark.skipif(emulator.UNAVAILABLE is not None, reason=str(emulator.UNAVAILABLE))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_first_and_last_layers_by_compiled_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, and restricted in memory that starts as NaN; the compiled kernels run, on the CPU."""
    monkeypatch.setattr(picture_conv, "Kernel", emulator.EmulatedKernel)
    monkeypatch.setattr(emulator.EmulatedKernel, "launched", launched := [])
    plan = picture_plan(2, 64)
    image, mask = inputs(plan)
    executor = CudaExecutor.of(plan, dtype, choices=PICTURE_TILES)
    assert executor.choices == {name: tile.label for name, tile in PICTURE_TILES.items()}
    check(plan, executor, image, mask)
    name = str(dtype).removeprefix("torch.")
    kernels = [f"from_{name}_7", f"to_{name}_64_48", f"from_{name}_4", f"to_{name}_128_32"]
    assert launched == [f"lgnet_{kernel}" for kernel in kernels]
    dense, _ = executor.run(image, mask)
    executor.memory.arena.fill_(torch.nan)
    restricted = CudaExecutor.restricted(plan, [Rect(3, 12, 5, 14)])
    assert plan.cost() > 2 * restricted.cost()
    result, _ = executor.run(image, mask, None, [step.regions for step in restricted.steps])
    assert torch.equal(result, dense)
    assert len(launched) == 12


def test_threads_take_turns() -> None:
    plan = tiny_plan()
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


def test_without_stages_only_the_result_is_copied() -> None:
    plan = tiny_plan()
    image, mask = inputs(plan)
    executor = CudaExecutor.of(plan, torch.float32)
    expected, _ = executor.run(image, mask)
    result, raw = executor.run(image, mask, stages=False)
    assert raw == []
    assert torch.equal(result, expected)
    assert result.untyped_storage().nbytes() == result.nbytes


def test_refuses_float64() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        CudaExecutor.of(small_plan(), torch.float64)


def test_dropped_buffers_are_allocated_anew() -> None:
    plan = tiny_plan()
    image, mask = inputs(plan)
    executor = CudaExecutor.of(plan, torch.float32)
    least = executor.buffer_bytes
    expected = executor.run(image, mask)[0]
    memory = executor.memory
    tensors = (memory.arena, memory.image, memory.mask, memory.start, memory.outputs)
    assert least == sum(tensor.nbytes for tensor in tensors)
    assert executor.held_bytes == executor.buffer_bytes == memory.bytes >= least
    gone = weakref.ref(memory.arena)
    del memory, tensors
    executor.drop_buffers()
    assert gone() is None
    assert (executor.held_bytes, executor.buffer_bytes) == (0, least)
    assert torch.equal(executor.run(image, mask)[0], expected)
    executor.drop_buffers()
    executor.drop_buffers()


@pytest.mark.parametrize("kind", ["kernels", "cudnn", "library"])
def test_memory_is_freed_with_the_last_reference(kind: str) -> None:
    """A garbage collection may come much later, when the GPU is full."""
    plan = tiny_plan()
    convolutions = [step.name for step in plan.steps if step.kind != "attention"]
    choices = {name: "cudnn" for name in convolutions} if kind == "cudnn" else {}
    executor = (
        LibraryExecutor.of_steps(plan, torch.float32)
        if kind == "library"
        else CudaExecutor.of(plan, torch.float32, choices=choices)
    )
    gone = weakref.ref(executor)
    gc.collect()
    gc.disable()
    try:
        executor.run(*inputs(plan))
        arena = weakref.ref(executor.memory.arena)
        del executor
        assert gone() is None
        assert arena() is None
    finally:
        gc.enable()


def test_a_workspace_that_cannot_grow_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CudaExecutor.of(tiny_plan(), torch.float32).memory
    before = memory.partial(100), memory.counters(10), memory.bytes

    def full(*args: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", full)
        patch.setattr(torch, "zeros", full)
        for grow in (memory.partial, memory.counters):
            with pytest.raises(torch.OutOfMemoryError):
                grow(1000)
    assert (memory.partial(100), memory.counters(10), memory.bytes) == before
