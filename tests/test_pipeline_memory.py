"""The estimate before a run against the measured memory, and errors where it does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from lgnet_fast.engine.holes import bounding_box, disjoint_boxes
from lgnet_fast.errors import OutOfMemoryError
from lgnet_fast.pipeline import Inpainter, memory
from lgnet_fast.pipeline.filling import Filler
from lgnet_fast.pipeline.memory import OutOfMemoryErrors, available_memory, estimate_memory

from .pipeline_support import BlurFill, box_mask, noise

MEASURE = """
import re, sys
import numpy as np, torch
from lgnet_fast.errors import OutOfMemoryError
from lgnet_fast.pipeline import Inpainter
from lgnet_fast.reference import LGNet
torch.set_num_threads(2)
width, height, across, strategy, backend, holes = *(int(word) for word in sys.argv[1:4]), *sys.argv[4:]
pipe = Inpainter(LGNet(coarse_channels=width, local_channels=width, global_channels=width, backend="eager").eval(),
                 device="cpu", backend=backend)
picture, hole = np.zeros((height, across, 3), np.uint8), np.zeros((height, across), bool)
if holes == "small":
    hole[50:150, 50:150] = True
elif holes == "large":
    hole[height // 9 : height - height // 9, across // 9 : across - across // 9] = True
else:
    for y, x in np.random.default_rng(0).integers(0, (height - 60, across - 60), (40, 2)):
        hole[y : y + 60, x : x + 60] = True
pipe(np.zeros((256, 512, 3), np.uint8), np.eye(256, 512, dtype=bool), strategy="full")
def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # resets the peak
before = status("VmRSS")
pipe(picture, hole, strategy=strategy)
print(status("VmHWM") - before, pipe.estimate_memory(height, across, strategy))
pipe.memory_limit = 1
try:
    pipe(picture, hole, strategy=strategy)
except OutOfMemoryError as error:
    size, unit = re.search("needs about (.*?) (.)iB", str(error)).groups()
    print(float(size) * 1024 ** " KMG".index(unit))
"""


# Fragmentation of glibc's heap on top of live tensors, which varies from run to run.
HEAP = 1.6


def _measured(width, height, across, strategy, backend, holes):
    """Bytes that a run took, the estimate for any hole and the one for these holes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (width, height, across, strategy, backend, holes))],
        cwd=Path(__file__).resolve().parent.parent,
        # With a fixed threshold every tensor is a separate mapping, returned when freed, so the peak is that of live
        # tensors.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "clear_refs" in done.stderr:
        pytest.skip("the peak of this process cannot be reset here")
    assert done.returncode == 0, done.stderr
    return tuple(float(number) for number in done.stdout.split())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("width", "side", "backend", "heap", "slack"),
    [
        (16, 512, "eager", HEAP, 5),
        pytest.param(64, 512, "eager", HEAP, 5, marks=pytest.mark.slow(reason="a wider network's case of the first")),
        # Its buffers are separate mappings.
        (16, 512, "auto", 1, 3),
    ],
)
def test_estimate_bounds_what_a_run_takes(width, side, backend, heap, slack):
    live, any_hole, estimate = _measured(width, side, side, "full", backend, "small")
    assert heap * live <= estimate <= any_hole <= slack * live


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("strategy", ["crop", "resize"])
@pytest.mark.parametrize("holes", ["small", "forty", "large"])
def test_estimate_is_near_what_the_holes_of_a_large_picture_take(holes, strategy):
    took, any_hole, estimate = _measured(8, 4000, 6000, strategy, "auto", holes)
    spare = 48 * 2**20  # strips and small buffers, which the estimate bounds
    assert took <= estimate <= 1.5 * took + spare
    assert estimate <= any_hole
    # The result takes 3 bytes for each of 24 million pixels, the sums 16 for each pixel of the fill.
    if strategy == "crop" and holes == "small":
        assert took < 200 * 2**20
    assert took < 600 * 2**20


def test_estimate_grows_with_the_padded_picture_and_not_beyond_the_window():
    assert estimate_memory(257, 256) > estimate_memory(256, 256)
    assert estimate_memory(256, 256) - 65536 * 20 == memory.fill_bytes(65536) + memory.network_bytes(
        [65536], 64, torch.float32
    )
    for strategy in ("crop", "tile", "resize"):
        large = estimate_memory(4000, 6000, strategy)
        network = memory.network_bytes([512 * 512], 64, torch.float32)
        assert large == 24_000_000 * 20 + memory.fill_bytes(24_000_000) + network
        assert large < estimate_memory(4000, 6000, "full") / 5
        small = estimate_memory(4000, 6000, strategy, window=64)  # no window is smaller than the multiple
        assert small == estimate_memory(4000, 6000, strategy, window=256)
    assert estimate_memory(512, 512, dtype=torch.float16) < estimate_memory(512, 512)
    assert estimate_memory(512, 512, base_channels=16) < estimate_memory(512, 512)
    # An engine takes less, and keeps the buffers of up to eight shapes: windows of 4 cells and less.
    engine = {name: estimate_memory(4000, 6000, name, engine=True) for name in ("full", "tile", "crop", "resize")}
    assert engine["full"] < estimate_memory(4000, 6000, "full") / 2
    assert engine["resize"] < engine["tile"] < engine["crop"]
    one = memory.network_bytes([512 * 512], 64, torch.float32, engine=True)
    assert engine["resize"] + 6 * one < engine["crop"] < engine["resize"] + 7 * one


def test_windows_of_any_shape_are_counted_without_trying_each():
    """9 cells are 6 shapes (windows, down, across), 8 cells 10; an engine keeps eight shapes."""
    cell = 8**2
    options = {"size_multiple": 8, "window": 24, "engine": True}
    expected = memory.network_bytes([9 * cell] * 6 + [8 * cell] * 10, 64, torch.float32, True)
    assert estimate_memory(64, 64, "crop", **options) == 64 * 64 * 20 + memory.fill_bytes(64 * 64) + expected
    assert estimate_memory(4000, 6000, "auto", size_multiple=1) > 0  # 2^18 cells


def test_kept_buffers_are_counted_only_as_far_as_the_engine_keeps_them():
    """It keeps at most half of the free memory, and needs what the largest pass takes."""
    sizes = [n * 256**2 for n in range(1, 11)]

    def bytes_of(passes, room=None):
        return memory.network_bytes(passes, 16, torch.float32, engine=True, room=room)

    largest, all_kept = bytes_of(sizes[-1:]), bytes_of(sizes)
    assert all_kept == sum(bytes_of([one]) for one in sizes[-8:]) > 5 * largest
    assert bytes_of(sizes, room=2 * all_kept) == all_kept
    assert bytes_of(sizes, room=all_kept) == all_kept // 2
    assert bytes_of(sizes, room=largest) == largest
    assert memory.network_bytes(sizes, 16, torch.float32, room=1) == memory.network_bytes(sizes, 16, torch.float32)


def test_windows_of_many_shapes_need_the_memory_of_the_largest(monkeypatch):
    """Where the free memory bounds what an engine keeps."""
    picture, hole = noise(1200, 1900), box_mask(1200, 1900, (100, 100, 120, 120), (100, 500, 120, 800))
    hole |= box_mask(1200, 1900, (700, 100, 1000, 120), (600, 500, 950, 850))
    model = BlurFill()
    pipe = Inpainter(model)
    monkeypatch.setattr(type(pipe._network), "engine_on_cpu", True)
    largest = memory.network_bytes([512 * 512], 4, torch.float32, engine=True)
    beside = memory.fill_bytes(hole.size // 4)
    monkeypatch.setattr(memory, "available_memory", lambda device: int(1.1 * largest) + beside)
    assert pipe.inpaint(picture, hole, strategy="crop").strategy == "crop"
    shapes = {batch * height * width for batch, height, width in model.seen}
    assert memory.network_bytes(list(shapes), 4, torch.float32, engine=True) > 1.1 * largest + beside
    monkeypatch.setattr(memory, "available_memory", lambda device: int(0.9 * largest))
    with pytest.raises(OutOfMemoryError):
        pipe(picture, hole, strategy="crop")


@pytest.mark.parametrize("strategy", ["full", "crop", "tile", "resize"])
def test_a_run_that_does_not_fit_stops_before_the_network(strategy):
    model = BlurFill()
    pipe = Inpainter(model, memory_limit=1_000_000)
    with pytest.raises(OutOfMemoryError, match=r"needs about .*MiB.*977 KiB are available on cpu; try"):
        pipe(noise(600, 700), box_mask(600, 700, (100, 100, 200, 200)), strategy=strategy)
    assert model.seen == []


def needed(hole, network):
    """The estimate for an RGB array with this hole, run by BlurFill on so many network pixels at once."""
    boxes = disjoint_boxes([bounding_box(hole)], hole.shape)
    fills = memory.fill_bytes(sum(box.area for box in boxes))
    return 3 * hole.size + fills + memory.network_bytes([network], 4, torch.float32)


def test_auto_goes_to_smaller_windows_until_the_run_fits(monkeypatch):
    hole = np.zeros((900, 900), bool)
    hole[::100] = hole[:, ::100] = True  # lines everywhere: tiles of 512 at first
    picture = noise(900, 900)
    roomy = Inpainter(BlurFill(), memory_limit=10**10).inpaint(picture, hole)
    assert roomy.strategy == "tile"
    model = BlurFill()
    limit = needed(hole, 256 * 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tight = Inpainter(model, memory_limit=limit).inpaint(picture, hole)
    assert tight.strategy == "tile"  # at native scale
    assert model.seen == [(1, 256, 256)] * 49  # one at a time: only one fits
    np.testing.assert_array_equal(tight.picture[~hole], picture[~hole])
    with pytest.raises(OutOfMemoryError, match="strategy resize"):
        Inpainter(BlurFill(), memory_limit=limit - 1)(picture, hole)
    with pytest.raises(OutOfMemoryError, match="strategy resize"):
        Inpainter(BlurFill(), memory_limit=limit).stages(picture, hole)  # a picture for each of three stages
    monkeypatch.setattr(memory, "available_memory", lambda device: limit - 1)
    with pytest.raises(OutOfMemoryError, match="strategy resize"):
        Inpainter(BlurFill())(picture, hole)  # fills and network share the memory of a CPU


def test_windows_of_a_network_of_a_small_multiple_do_not_become_smaller_than_256():
    """A tile of 8x8 would show nothing but its hole."""
    hole = np.zeros((900, 900), bool)
    hole[::100] = hole[:, ::100] = True
    model = BlurFill()
    model.size_multiple = 8
    limit = needed(hole, 256 * 256)
    Inpainter(model, memory_limit=limit)(noise(900, 900), hole)
    assert set(model.seen) == {(1, 256, 256)}
    with pytest.raises(OutOfMemoryError, match="strategy resize"):
        Inpainter(model, memory_limit=limit - 1)(noise(900, 900), hole)
    Inpainter(model, memory_limit=limit - 1, window=64)(noise(900, 900), hole)  # where it is asked for
    assert {size[1:] for size in model.seen} == {(256, 256), (64, 64)}


def test_auto_warns_where_less_memory_means_a_lower_scale():
    picture, hole = noise(900, 900), box_mask(900, 900, (200, 200, 600, 600))
    limit = needed(hole, 256 * 256)
    pipe = Inpainter(BlurFill(), memory_limit=limit)
    with pytest.warns(UserWarning, match="memory: too little for strategy crop; filled by crop, at 32% .* of 64%,"):
        done = pipe.inpaint(picture, hole)
    assert (done.strategy, done.passes) == ("crop", 1)


def test_windows_run_one_by_one_where_a_batch_does_not_fit():
    holes = [(y, x, y + 20, x + 20) for y in (300, 900) for x in (300, 900, 1500)]
    picture, hole = noise(1200, 1800), box_mask(1200, 1800, *holes)
    one = memory.fill_bytes(32 * 32) - memory.fill_bytes(0)  # of a hole of 20x20 at 300: two cells of 16 either way
    limit = 3 * hole.size + memory.fill_bytes(0) + 6 * one + memory.network_bytes([256 * 256], 4, torch.float32)
    model = BlurFill()
    done = Inpainter(model, memory_limit=limit)(picture, hole, strategy="crop")
    assert model.seen == [(1, 256, 256)] * 6
    np.testing.assert_array_equal(done, Inpainter(BlurFill())(picture, hole, strategy="crop"))


class RunsOut(BlurFill):
    """Fails like torch's allocators do, above 256x256."""

    failure: BaseException = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def forward(self, image, mask, return_stages=False):
        if image.shape[2:].numel() > 256 * 256:
            raise self.failure
        return super().forward(image, mask, return_stages)


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate 20 GiB"),
    ],
)
def test_an_allocation_that_fails_is_reported_and_auto_tries_again(failure):
    model = RunsOut()
    model.failure = failure
    picture, hole = noise(500, 500), box_mask(500, 500, (50, 50, 400, 400))
    pipe = Inpainter(model)
    with pytest.raises(OutOfMemoryError, match="allocate"):
        pipe(picture, hole, strategy="full")
    with pytest.warns(UserWarning, match="memory: too little for strategy full; filled by crop, at 51% "):
        done = pipe.inpaint(picture, hole)
    assert done.strategy == "crop"
    assert model.seen == [(1, 256, 256)]


def test_the_estimate_of_an_unknown_strategy_is_an_error():
    with pytest.raises(ValueError, match="strategy: expected one of auto, .*, got 'foo'"):
        estimate_memory(100, 100, "foo")


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shape"), OutOfMemoryErrors("picture"):
        raise RuntimeError("shape mismatch")
    with pytest.raises(OutOfMemoryError, match="^image: out of memory$"), OutOfMemoryErrors("picture"):
        raise OutOfMemoryError("image: out of memory")  # the library's own


def test_available_memory_is_what_the_system_says():
    psutil = pytest.importorskip("psutil")
    available = available_memory(torch.device("cpu"))
    assert 0 < available <= psutil.virtual_memory().total


class RunsOutAnew(BlurFill):
    def forward(self, image, mask, return_stages=False):
        if image.shape[2:].numel() > 256 * 256:
            raise MemoryError  # another one each time, because one that is kept would keep the frames below it
        return super().forward(image, mask, return_stages)


def test_the_buffers_of_a_plan_that_failed_are_gone_when_the_next_one_runs(monkeypatch):
    """An exception that is kept would keep them, by its traceback."""
    kept: list[weakref.ref[np.ndarray]] = []
    run_batch = Filler._run_batch

    def watched(self, picture, region, windows, stages):
        assert all(one() is None for one in kept)
        content = np.zeros(10)
        kept.append(weakref.ref(content))
        return run_batch(self, picture, region, windows, stages)

    monkeypatch.setattr(Filler, "_run_batch", watched)
    picture, hole = noise(500, 500), box_mask(500, 500, (50, 50, 400, 400))
    with pytest.warns(UserWarning, match="memory: too little for strategy full"):
        Inpainter(RunsOutAnew())(picture, hole)
    assert len(kept) > 1
