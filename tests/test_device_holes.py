"""Holes of masks on a GPU: cells and rectangles, and when the host waits, on an emulated stream."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lgnet_fast.engine.cuda import device_holes
from lgnet_fast.engine.cuda.device_holes import DeviceHoles, boxes, hole_cells
from lgnet_fast.engine.devices import same_device
from lgnet_fast.engine.regions import Rect
from tests.test_plan import random_mask


@pytest.mark.parametrize("seed", range(20))
def test_rectangles_contain_every_hole_pixel(seed: int) -> None:
    mask = torch.cat([random_mask(seed), random_mask(seed + 100)])
    outside = mask.clone()
    for rect in boxes(hole_cells(mask)):
        assert all(side % device_holes.CELL == 0 for side in rect)
        assert outside[..., rect.top : rect.bottom, rect.left : rect.right].any()
        outside[..., rect.top : rect.bottom, rect.left : rect.right] = 0
    assert not outside.any()


def test_cells_of_odd_masks() -> None:
    mask = torch.zeros(2, 1, 256, 512)
    assert boxes(hole_cells(mask)) == ()
    mask[1, 0, 255, 511] = 1e-30
    mask[0, 0, 0, 31] = -1
    assert boxes(hole_cells(mask)) == (Rect(0, 32, 0, 32), Rect(224, 256, 480, 512))
    mask[0, 0, 100, 100] = torch.nan
    assert Rect(96, 128, 96, 128) in boxes(hole_cells(mask))
    turned = mask.transpose(2, 3)  # strided
    assert Rect(480, 512, 224, 256) in boxes(hole_cells(turned))


def test_cells_take_one_launch() -> None:
    class Computed(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view:
                self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    mask = torch.zeros(2, 1, 256, 256)
    with Computed():
        hole_cells(mask)
    assert Computed.names == ["aten.any.dims"]


class Stream:
    """A queue, and searches that end when it is empty."""

    idle = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.waited = 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self)
        monkeypatch.setattr(device_holes, "_begin", self.begin)

    def query(self) -> bool:
        return self.idle

    def begin(self, mask: Tensor, stream: Stream) -> device_holes._Search:
        self.begun += 1
        return device_holes._Search(weakref.ref(mask), hole_cells(mask), self)  # type: ignore[arg-type]

    def synchronize(self) -> None:
        assert self.idle, "the host waited for queued work"
        self.waited += 1


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    return Stream(monkeypatch)


def some_mask() -> Tensor:
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 40:50, 70:80] = 1
    return mask


FOUND = (Rect(32, 64, 64, 96),)


def test_an_idle_stream_is_waited_for(stream: Stream) -> None:
    assert DeviceHoles().find(some_mask()) == FOUND
    assert (stream.begun, stream.waited) == (1, 1)


def test_queued_work_is_not_waited_for_and_the_answer_serves_later(stream: Stream) -> None:
    holes, mask = DeviceHoles(), some_mask()
    stream.idle = False
    assert holes.find(mask) is None
    assert holes.find(mask) is None
    stream.idle = True
    assert holes.find(mask) == FOUND
    assert stream.begun == 1


def test_a_written_or_other_mask_is_searched_anew(stream: Stream) -> None:
    holes, mask = DeviceHoles(), some_mask()
    holes.find(mask)
    mask[..., 200, 200] = 1
    assert holes.find(mask) == (*FOUND, Rect(192, 224, 192, 224))
    for _ in range(3 * device_holes._MASKS_KEPT):
        assert holes.find(torch.zeros(1, 1, 256, 256)) == ()  # at addresses of deleted masks
    assert len(holes._searches) <= device_holes._MASKS_KEPT


def test_masks_that_count_no_writes(stream: Stream) -> None:
    holes = DeviceHoles()
    with torch.inference_mode():
        mask = some_mask()
        assert holes.find(mask) == FOUND
        mask.zero_()
        assert holes.find(mask) == ()
        stream.idle = False
        assert holes.find(mask) is None
    assert stream.begun == 2


def test_nothing_is_read_while_somebody_captures(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_holes, "is_capturing", lambda device: True)
    assert DeviceHoles().find(some_mask()) is None
    assert stream.begun == 0


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("mps", "mps:0", True),
        ("xpu:0", "xpu", True),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cpu", True),
        ("cpu", "mps", False),
    ],
)
def test_devices_with_and_without_a_number(a: str, b: str, same: bool) -> None:
    assert same_device(torch.device(a), torch.device(b)) == same
