"""The calls of the engine to an executor, recorded by a minimal executor, and its defaults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lgnet_fast import LGNetError, create_model
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.engine import Engine
from lgnet_fast.engine.executor import Executor, Regions, Result
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.regions import Rect

CPU = torch.device("cpu")


class Notes(Executor):
    """Returns the picture, and records its calls."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.asked: list[Any] = []
        self.stages: list[bool] = []
        self.released = 0

    @property
    def device(self) -> torch.device:
        return CPU

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def run(
        self,
        image: Tensor,
        mask: Tensor,
        start: Tensor | None = None,
        regions: Regions | None = None,
        stages: bool = True,
    ) -> Result:
        self.asked.append(None if regions is None else regions[-1])
        self.stages.append(stages)
        return image.clone(), [image.clone() for step in self.plan.steps if step.merges and stages]

    def resized(self, plan: Plan) -> Notes:
        return Notes(plan)

    def release(self) -> None:
        self.released += 1


class Coarse(Notes):
    granularity = 32


class Apart(Notes):
    per_sample = True

    def run_each(
        self, image: Tensor, mask: Tensor, start: Tensor | None, regions: Any, stages: bool = True
    ) -> Result:
        result = self.run(image, mask, stages=stages)
        self.asked[-1] = [None if own is None else own[-1] for own in regions]
        return result


class Costly(Notes):
    region_macs = 1e8


def engine_of(kind: type[Notes], batch: int = 1) -> tuple[Engine, Notes, Any]:
    model = create_model("C+L", coarse_channels=4, local_channels=4).eval()
    plan = build_plan(plan_stages(model), batch, 256, 256).without_weights()
    executor = kind(plan)
    return Engine(model, plan, executor, CPU, True), executor, model


def picture(*holes: Rect) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(len(holes), 1, 256, 256)
    for sample, hole in enumerate(holes):
        mask[sample, :, hole.top : hole.bottom, hole.left : hole.right] = 1
    return torch.zeros(len(holes), 3, 256, 256), mask


def test_rectangles_are_as_coarse_as_the_executor_wants_them() -> None:
    hole = Rect(33, 60, 100, 101)
    for kind, expected in ((Notes, hole), (Coarse, Rect(32, 64, 96, 128))):
        engine, executor, _ = engine_of(kind)
        engine(*picture(hole))
        assert executor.asked == [(expected,)]


def test_what_saves_nothing_is_dense() -> None:
    """By the coarse rectangles: these cover all but a margin that the fine ones leave."""
    hole = Rect(1, 255, 1, 255)
    engine, executor, _ = engine_of(Coarse)
    engine(*picture(hole))
    assert executor.asked == [None]


def test_holes_are_one_box_where_regions_are_expensive() -> None:
    holes = Rect(16, 32, 16, 32), Rect(80, 96, 16, 32)
    for kind, expected in ((Notes, holes), (Costly, (Rect(16, 96, 16, 32),))):
        engine, executor, _ = engine_of(kind)
        image, mask = picture(*holes)
        engine(image[:1], mask.amax(dim=0, keepdim=True))
        assert executor.asked == [expected]
    engine, executor, _ = engine_of(Costly)
    corners = [Rect(y, y + 16, x, x + 16) for y in (0, 240) for x in (0, 240)]
    engine(*picture(Rect(0, 1, 0, 1)), holes=corners)  # neither four of every step nor nearly everything
    assert executor.asked == [None]


def test_samples_apart_or_together() -> None:
    holes = Rect(0, 16, 0, 16), Rect(200, 216, 96, 112)
    engine, executor, _ = engine_of(Notes, 2)
    engine(*picture(*holes))
    assert executor.asked == [holes]
    engine, executor, _ = engine_of(Apart, 2)
    engine(*picture(*holes))
    assert executor.asked == [[(holes[0],), (holes[1],)]]
    engine(*picture(holes[0], holes[0]))  # alike: no need to tell them apart
    assert executor.asked[-1] == (holes[0],)


def test_raw_pictures_are_asked_for_with_the_stages_alone() -> None:
    """Their memory would be taken and freed in every call."""
    holes = Rect(0, 16, 0, 16), Rect(200, 216, 96, 112)
    for kind in (Notes, Apart):
        engine, executor, _ = engine_of(kind, 2)
        for stages in (False, True):
            engine(*picture(*holes), return_stages=stages)
            engine(*picture(*holes), return_stages=stages, holes=[Rect(0, 256, 0, 256)])
        assert executor.stages == [False, False, True, True]


def test_what_an_executor_leaves_out(tmp_path: Any) -> None:
    engine, executor, _ = engine_of(Notes)
    assert executor.step_times(*picture(Rect(0, 1, 0, 1))) is None
    table = engine.describe()
    assert table.row_count == len(engine.plan.steps) + 1
    assert set(table.columns[7].cells) == {""}  # no milliseconds
    with pytest.raises(LGNetError, match="save: expected an engine of an LGNet on the C"):
        engine.save(tmp_path)
    image, mask = picture(Rect(0, 9, 0, 9))
    result, _ = executor.run_each(image, mask, None, [None])
    assert torch.equal(result, image)


def test_a_gone_model_s_memory_is_given_back_once() -> None:
    engine, executor, model = engine_of(Notes)
    engine(*picture(Rect(0, 9, 0, 9)))
    assert executor.released == 0
    del model
    engine(*picture(Rect(0, 9, 0, 9)))
    engine(*picture(Rect(0, 9, 0, 9)))
    assert executor.released == 1
