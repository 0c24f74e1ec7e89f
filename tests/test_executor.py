"""The calls of the engine to an executor, recorded by a minimal executor, and its defaults."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lgnet_fast import LGNetError, OutOfMemoryError, create_model
from lgnet_fast.engine import engine as engines
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


class Buffered(Notes):
    """Keeps a buffer of the size of its pictures between runs, on a device that has `capacity` such bytes in all."""

    capacity = 0
    held: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()
    failure: Callable[[], Exception] = torch.OutOfMemoryError

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.buffer: Tensor | None = None

    def run(self, image: Tensor, *args: Any, **options: Any) -> Result:
        if self.buffer is None:
            wanted = image.clone()
            Buffered.held.add(wanted)  # also where it does not fit, until this frame is gone
            if Buffered.used() > Buffered.capacity:
                raise Buffered.failure()
            self.buffer = wanted
        return super().run(image, *args, **options)

    @staticmethod
    def used() -> int:
        return sum(buffer.nbytes for buffer in Buffered.held)

    @property
    def buffer_bytes(self) -> int:
        return 3 * 4 * self.plan.batch * self.plan.height * self.plan.width

    def drop_buffers(self) -> None:
        self.buffer = None

    def resized(self, plan: Plan) -> Buffered:
        return Buffered(plan)


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


def test_a_changed_eps_is_refused_as_changed_weights_are() -> None:
    engine, _, model = engine_of(Notes)
    image, mask = picture(Rect(10, 20, 30, 40))
    engine(image, mask)
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    before, norm.eps = norm.eps, 2 * norm.eps
    with pytest.raises(LGNetError, match=r"eps of a BatchNorm of the model changed after optimize\(\)"):
        engine(image, mask)
    norm.eps = before
    engine(image, mask)


def test_rectangles_are_as_coarse_as_the_executor_wants_them() -> None:
    hole = Rect(33, 60, 100, 101)
    for kind, expected in ((Notes, hole), (Coarse, Rect(32, 64, 96, 128))):
        engine, executor, _ = engine_of(kind)
        engine(*picture(hole))
        assert executor.asked == [(expected,)]


def test_only_given_holes_restrict_an_engine_that_is_not_hole_aware() -> None:
    hole = Rect(33, 60, 100, 101)
    engine, executor, _ = engine_of(Notes)
    engine.hole_aware = False
    engine(*picture(hole))
    engine(*picture(hole), holes=[hole])
    assert executor.asked == [None, (hole,)]


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
    stages = engine(*picture(Rect(0, 255, 0, 256), Rect(1, 256, 0, 256)), return_stages=True)
    assert executor.asked[-1] is None  # it would save nothing for either
    assert len(stages.raw) == 2


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


# -- memory of several shapes ----------------------------------------------------------------------------------------

CELL = 3 * 4 * 256 * 256
"""Bytes that :class:`Buffered` keeps for one picture of 256x256."""
HOLE = Rect(0, 256, 0, 256)


def run(engine: Engine, batch: int) -> None:
    image, mask = picture(*[HOLE] * batch)
    assert torch.equal(engine(image, mask), image)


def kept(engine: Engine) -> list[int]:
    """Batches of the shapes that are kept, the least recently used first."""
    return [shape.plan.batch for shape in engine._shapes.values()]


def small_device(monkeypatch: pytest.MonkeyPatch, cells: float, told: bool = True) -> None:
    """A device of so many pictures' buffers; `told`: whether the system says how many are left."""
    monkeypatch.setattr(Buffered, "capacity", int(cells * CELL))
    monkeypatch.setattr(
        engines, "available_memory", lambda device: Buffered.capacity - Buffered.used() if told else None
    )


def test_buffers_of_shapes_are_bounded_by_what_the_device_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    small_device(monkeypatch, 20)  # shapes may keep the half of it
    engine, _, model = engine_of(Buffered)
    for batch in (1, 2, 3, 4):
        run(engine, batch)
    assert kept(engine) == [1, 2, 3, 4]
    run(engine, 2)
    run(engine, 5)  # 1, then 3 are the least recently used ones; 4 + 2 + 5 are still too many
    assert kept(engine) == [2, 5]
    assert Buffered.used() == 7 * CELL
    run(engine, 9)  # alone, and within the half
    assert kept(engine) == [9]
    run(engine, 11)  # more than the half, which is still possible
    assert kept(engine) == [11]
    assert Buffered.used() == 11 * CELL
    del engine, model


def test_more_than_the_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux would grant it, and end the process when it is used; what other shapes keep would be freed."""
    small_device(monkeypatch, 20)
    engine, _, model = engine_of(Buffered)
    run(engine, 8)
    run(engine, 20)
    assert kept(engine) == [20]
    with pytest.raises(OutOfMemoryError, match=r"^image: its buffers take \d+\.\d GiB, \d+\.\d GiB are free; pass"):
        run(engine, 21)
    del engine, model


def test_many_shapes_are_kept_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    small_device(monkeypatch, 200)
    engine, _, model = engine_of(Buffered)
    for batch in range(1, 11):
        run(engine, batch)
    assert kept(engine) == list(range(3, 11))
    assert (
        Buffered.used() == sum(range(3, 11)) * CELL
    )  # also the first shape's, which the engine refers to, are freed
    run(engine, 1)
    assert kept(engine)[-1] == 1
    del engine, model


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError,
        MemoryError,
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you"),
        lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_run_that_finds_no_memory_is_repeated_without_the_other_shapes(
    failure: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_device(monkeypatch, 6, told=False)
    monkeypatch.setattr(Buffered, "failure", failure)
    engine, first, model = engine_of(Buffered)
    for batch in (1, 2, 3):
        run(engine, batch)
    with caplog.at_level(logging.INFO, logger="lgnet_fast"):
        run(engine, 4)
    assert sum("the buffers of 3 other shapes are freed" in message for message in caplog.messages) == 1
    assert kept(engine) == [4]
    assert first.released == 1
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lgnet_fast"), pytest.raises(type(failure())):
        run(engine, 7)  # too large in any case
    run(engine, 6)
    del engine, model


def test_a_lone_shape_without_memory_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small_device(monkeypatch, 0, told=False)
    tries: list[int] = []
    run_once = Buffered.run

    def counted(self: Buffered, *args: Any, **options: Any) -> Result:
        tries.append(1)
        return run_once(self, *args, **options)

    monkeypatch.setattr(Buffered, "run", counted)
    engine, _, model = engine_of(Buffered)
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, 1)
    assert tries == [1]
    del model


def test_other_errors_free_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small_device(monkeypatch, 6, told=False)
    engine, _, model = engine_of(Buffered)
    run(engine, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Buffered, "capacity", 0)
        patch.setattr(Buffered, "failure", lambda: RuntimeError("invalid argument"))
        with pytest.raises(RuntimeError, match="invalid argument"):
            run(engine, 2)
    assert kept(engine) == [1, 2]
    del model
