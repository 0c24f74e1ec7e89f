"""Several holes: covers of few rectangles, regions joined by cost, plans that compute all that is needed, once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lgnet_fast import create_model
from lgnet_fast.engine import plan as plan_module
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cover import MOST_RECTS, cover, fewer, hole_boxes
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.cuda.executor import CudaExecutor
from lgnet_fast.engine.plan import PICTURE, Plan
from lgnet_fast.engine.regions import Rect, join
from lgnet_fast.engine.torch_executor import TorchExecutor
from tests.support import assert_accurate, case
from tests.test_plan import lively

NARROW = {"coarse_channels": 4, "local_channels": 4, "global_channels": 4}


def square(y: int, x: int, side: int = 16) -> Rect:
    return Rect(y, y + side, x, x + side)


HOLES = {
    "one": [square(120, 120)],
    "two, 4 apart": [square(120, 110), square(120, 130)],
    "two, 32 apart": [square(120, 96), square(120, 144)],
    "two, 100 apart": [square(120, 62), square(120, 178)],
    "four corners": [square(0, 0), square(0, 240), square(240, 0), square(240, 240)],
    "grid of 16": [square(24 + 64 * i, 24 + 64 * j) for i in range(4) for j in range(4)],
    "diagonal of 8": [square(8 + 32 * i, 8 + 32 * i) for i in range(8)],
    "cross": [Rect(120, 136, 40, 216), Rect(40, 216, 120, 136)],
    "frame": [Rect(0, 16, 0, 256), Rect(240, 256, 0, 256), Rect(0, 256, 0, 16), Rect(0, 256, 240, 256)],
}


def painted(rects: Any, size: tuple[int, int] = (256, 256)) -> np.ndarray:
    """How many of the rectangles hold each pixel."""
    count = np.zeros(size, dtype=np.int64)
    for rect in rects:
        count[rect.slices] += 1
    return count


def random_rects(seed: int, number: int, largest: int = 40) -> list[Rect]:
    rng = random.Random(seed)
    rects = []
    for _ in range(number):
        height, width = rng.randint(1, largest), rng.randint(1, largest)
        top, left = rng.randint(0, 256 - height), rng.randint(0, 256 - width)
        rects.append(Rect(top, top + height, left, left + width))
    return rects


def stroke(seed: int, thickness: int) -> np.ndarray:
    """A line that wanders over the picture."""
    rng = random.Random(seed)
    hole = np.zeros((256, 256), dtype=bool)
    y, x = rng.randrange(256), rng.randrange(256)
    down, across = rng.uniform(-1, 1), rng.uniform(-1, 1)
    for _ in range(300):
        hole[max(0, int(y)) : int(y) + thickness, max(0, int(x)) : int(x) + thickness] = True
        down, across = down + rng.uniform(-0.3, 0.3), across + rng.uniform(-0.3, 0.3)
        y, x = min(max(0, y + 2 * down), 255), min(max(0, x + 2 * across), 255)
    return hole


@pytest.fixture(scope="module")
def full() -> Plan:
    with torch.device("meta"):
        return build_plan(plan_stages(create_model("lgnet").eval()), 1, 256, 256)


@pytest.fixture(scope="module")
def narrow() -> Plan:
    torch.manual_seed(0)
    model = lively(create_model("lgnet", **NARROW, backend="eager"))
    return build_plan(plan_stages(model), 1, 256, 256)


# -- covers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_cover_holds_every_hole_pixel_once(seed: int) -> None:
    holes = [
        painted(random_rects(seed, 1 + 3 * seed)) > 0,
        np.random.default_rng(seed).random((100 + seed, 47)) < 0.003 * seed,
        stroke(seed, 3 + seed),
    ]
    for hole in holes:
        rects = cover(hole)
        count = painted(rects, hole.shape)
        assert count.max(initial=0) <= 1
        assert (count[hole] == 1).all()
        assert len(rects) <= MOST_RECTS
        assert list(rects) == sorted(rects)
        for rect in rects:  # no side could be moved inwards
            inside = hole[rect.slices]
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


@pytest.mark.parametrize(
    ("holes", "rects"),
    [
        ("one", [square(120, 120)]),
        ("two, 4 apart", [Rect(120, 136, 110, 146)]),
        ("two, 32 apart", HOLES["two, 32 apart"]),
        ("four corners", HOLES["four corners"]),
        ("grid of 16", HOLES["grid of 16"]),
        ("diagonal of 8", HOLES["diagonal of 8"]),
        ("frame", [Rect(0, 16, 0, 256), Rect(16, 240, 0, 16), Rect(16, 240, 240, 256), Rect(240, 256, 0, 256)]),
    ],
)
def test_cover_of_known_holes(holes: str, rects: list[Rect]) -> None:
    assert cover(painted(HOLES[holes]) > 0) == tuple(rects)


def test_cover_of_simple_holes() -> None:
    assert cover(np.zeros((256, 256), dtype=bool)) == ()
    assert cover(np.ones((100, 47), dtype=bool)) == (Rect(0, 100, 0, 47),)
    hole = np.zeros((256, 512), dtype=bool)
    hole[255, 511] = True
    assert cover(hole) == (Rect(255, 256, 511, 512),)


def test_many_rectangles_become_few() -> None:
    rects = random_rects(0, MOST_RECTS)
    assert fewer(rects, (256, 256)) == tuple(rects)
    rects = random_rects(0, 200, 6)
    found = fewer(rects, (256, 256))
    assert len(found) <= MOST_RECTS
    assert (painted(found)[painted(rects) > 0] == 1).all()


# -- regions ---------------------------------------------------------------------------------------------------------


def test_join_weighs_a_rectangle_against_the_gap() -> None:
    pair = [Rect(0, 10, 0, 10), Rect(12, 22, 0, 10)]  # 200 pixels; their bounding box has 220
    assert join(pair, 19) == tuple(pair)
    assert join(pair, 20) == (Rect(0, 22, 0, 10),)
    assert join([*pair, square(200, 200)], 1e9) == (Rect(0, 216, 0, 216),)


@pytest.mark.parametrize("overhead", [0, 50, 1000])
def test_join_covers_once_for_no_more_and_in_any_order(overhead: float) -> None:
    rng = random.Random(0)
    for seed in range(40):
        rects = random_rects(seed, rng.randint(1, 12), 90)
        joined = join(rects, overhead)
        count = painted(joined)
        assert count.max() == 1
        assert (count >= (painted(rects) > 0)).all()
        assert sum(r.area for r in joined) + overhead <= sum(r.area + overhead for r in rects)
        rng.shuffle(rects)
        assert join(rects + rects[:3], overhead) == joined


def check_regions(plan: Plan) -> None:
    """Every region's source is computed by steps before it, and no output twice."""
    written: dict[str, list[np.ndarray]] = {name: [] for name in plan.buffers}  # by each step that stores there
    written[PICTURE].append(np.ones((plan.height, plan.width), dtype=bool))
    for step in plan.steps:
        once = np.zeros(plan.target(step).size, dtype=bool)
        for region in step.regions:
            assert region.area > 0
            assert not once[region.slices].any(), step.name
            once[region.slices] = True
            reads = [(step.source.buffer, step.reads(region, plan.source(step)))]
            if step.residual is not None:
                reads.append((step.residual.buffer, region))
            for buffer, rect in reads:
                assert written[buffer], step.name
                assert all(there[rect.slices].all() for there in written[buffer]), step.name
        for store in step.stores:
            written[store.view.buffer].append(once)
    for step in plan.steps:
        if step.merges:
            assert plan.holes is not None
            assert set(step.regions) == set(plan.holes)


@pytest.mark.parametrize("region_macs", [0, 5e6, 1e8])
@pytest.mark.parametrize("seed", range(6))
def test_plans_compute_all_that_is_read_and_nothing_twice(full: Plan, seed: int, region_macs: float) -> None:
    for holes in (random_rects(seed, 2 + 3 * seed), list(cover(stroke(seed, 8)))):
        plan = full.restricted(holes, region_macs)
        assert plan.holes is not None
        assert (painted(plan.holes)[painted(holes) > 0] == 1).all()
        check_regions(plan)


def test_plans_of_many_holes_stay_small(full: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining takes the square of the rectangles; with 200 holes as they come, their squares summed to millions."""
    numbers: list[int] = []

    def counted(rects: Any, overhead: float = 0.0) -> tuple[Rect, ...]:
        rects = list(rects)
        numbers.append(len(set(rects)))
        return join(rects, overhead)

    monkeypatch.setattr(plan_module, "join", counted)
    for number in (8, 40, 200, 1000):
        numbers.clear()
        CpuExecutor.restricted(full, random_rects(number, number, 6))
        assert len(numbers) <= 2 * len(full.steps)
        assert sum(n**2 for n in numbers) < 40_000


@pytest.mark.parametrize(
    ("holes", "share", "regions"),
    [
        ("one", 0.2198, 49),
        ("two, 4 apart", 0.2316, 49),
        ("two, 32 apart", 0.2450, 62),
        ("two, 100 apart", 0.2584, 71),
        ("four corners", 0.2421, 118),
        ("grid of 16", 0.6199, 274),
        ("diagonal of 8", 0.3786, 268),
        ("cross", 0.4176, 189),
        ("frame", 0.5342, 121),
    ],
)
def test_multiply_accumulates_of_several_holes(full: Plan, holes: str, share: float, regions: int) -> None:
    """As the CPU runs them. As one box each, the diagonal has 0.98, the cross 0.73 and the frame all of them."""
    plan = full.restricted(cover(painted(HOLES[holes]) > 0), 5e6)
    assert plan.total_macs() / full.total_macs() == pytest.approx(share, abs=1e-3)
    assert sum(len(step.regions) for step in plan.steps) == pytest.approx(regions, rel=0.05)


def test_a_launch_costs_more_than_the_pixels_between_holes(full: Plan) -> None:
    """On a GPU two holes are one region of every step, if not nearly everything is computed then."""
    plan = CudaExecutor.restricted(full, HOLES["two, 100 apart"])
    assert all(len(step.regions) == 1 for step in plan.steps)
    assert plan.holes == (Rect(96, 160, 32, 224),)
    for holes in HOLES.values():
        plan = CudaExecutor.restricted(full, holes)
        regions = sum(len(step.regions) for step in plan.steps)
        assert CudaExecutor.cost(plan) == plan.total_macs() + CudaExecutor.region_macs * regions
        assert CudaExecutor.cost(plan) <= CudaExecutor.cost(full)
    # with more pictures a launch, gaps cost more
    assert max(len(s.regions) for s in CudaExecutor.restricted(full.resized(64, 256, 256), HOLES["cross"]).steps) > 1


def test_regions_of_a_sample_do_not_depend_on_the_batch(full: Plan) -> None:
    holes = HOLES["diagonal of 8"]
    alone, among = (CpuExecutor.restricted(full.resized(b, 256, 256), holes) for b in (1, 16))
    assert [s.regions for s in alone.steps] == [s.regions for s in among.steps]


@pytest.mark.parametrize("holes", ["two, 32 apart", "diagonal of 8", "cross", "frame"])
def test_joined_and_separate_regions_give_the_dense_pixels(narrow: Plan, holes: str) -> None:
    image, _ = case("gen256", 1, 256, 256)
    mask: Tensor = torch.from_numpy(painted(HOLES[holes]) > 0).to(image)[None, None]
    executor = TorchExecutor(narrow)
    with torch.no_grad():
        dense, _ = executor.run(image, mask)
        numbers = []
        for region_macs in (0, narrow.total_macs() / 2000, narrow.total_macs()):
            plan = narrow.restricted(hole_boxes(mask), region_macs)
            numbers.append(sum(len(step.regions) for step in plan.steps))
            # values that were not computed are NaN
            sparse, _ = executor.run(image, mask, regions=[step.regions for step in plan.steps])
            assert_accurate("sparse", sparse, dense)
    assert numbers[0] >= numbers[1] >= numbers[2] == len(narrow.steps) < numbers[0]
