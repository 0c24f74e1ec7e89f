"""What an engine says about its cost, and the memory that it takes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from lgnet_fast import LGNet, create_model, native, optimize
from lgnet_fast.engine.describe import measure_peaks
from lgnet_fast.engine.regions import Rect
from tests.engine_support import narrow_model, needs_extension
from tests.support import instruction_sets

VECTORS = [isa for isa in instruction_sets() if isa != "portable"]
"""Instruction sets whose kernels run without a measurement beside PyTorch, the slowest first."""


@pytest.fixture
def model() -> LGNet:
    return narrow_model()


@needs_extension
def test_description_names_every_step_and_its_cost(model):
    fast = optimize(model)
    table = fast.describe(rounds=1)
    assert table.row_count == len(fast.plan.steps) + 1
    restricted = fast.describe(holes=[Rect(96, 160, 96, 160)], rounds=1)
    dense_gflop, sparse_gflop = (float(list(t.columns[4].cells)[-1]) for t in (table, restricted))
    assert 0 < sparse_gflop < 0.6 * dense_gflop
    with pytest.raises(ValueError, match=r"^holes: expected 0 <= top < bottom <= 256 .* got holes\[0\]"):
        fast.describe(holes=[Rect(0, 257, 0, 9)], rounds=1)
    # A step cannot move its bytes faster than a copy; Winograd saves at most a factor of four of the arithmetic.
    shares = [float(cell.rstrip("%")) for cell in table.columns[-1].cells if cell]
    assert len(shares) == table.row_count
    assert 0 <= shares[-1] < 400  # whole percents: a narrow network leaves many cores idle


@pytest.mark.parametrize("rounds", [0, -1, True, 1.5, "5", None])
def test_a_description_needs_a_run(rounds, model):
    with pytest.raises(ValueError, match=f"^rounds: expected a positive integer, got {rounds!r}$"):
        optimize(model).describe(rounds=rounds)


@needs_extension
def test_arithmetic_roof():
    """The work timed for the roof has the stated number of operations."""
    library = importlib.import_module("lgnet_fast._C")
    lanes = native.packing("float32")[0]
    once, thrice = (library.multiply_adds(False, rounds, 1) for rounds in (1, 3))
    assert once > 0
    assert once % lanes == 0
    assert (thrice, library.multiply_adds(False, 1, 2)) == (3 * once, 2 * once)
    tiles = 4 * 16 * 16 * 32  # products of [16, 32] and [32, 16]
    pairs = tiles if library.multiplies_by_tiles() else 2 * once if native.multiplies("bf16") else 0
    assert library.multiply_adds(True, 1, 1) == pairs
    peaks = measure_peaks()
    assert (peaks.pair_macs > 0) == native.multiplies("bf16")
    assert peaks.floor(peaks.macs, 0, products="float32") == pytest.approx(1)
    assert peaks.floor(0, 2 * peaks.bytes, products="float32") == pytest.approx(2)


MEMORY = """
import gc, random, sys, torch
import lgnet_fast
torch.manual_seed(0)
fast = lgnet_fast.optimize(lgnet_fast.create_model("lgnet_demo").eval())
gc.collect()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
rng = random.Random(0)
image = torch.zeros(2, 3, 512, 512)
calls, first = map(int, sys.argv[1:])
for call in range(calls):
    batch, height, width = rng.randint(1, 2), 256 * rng.randint(1, 2), 256 * rng.randint(1, 2)
    mask = torch.zeros(batch, 1, height, width)
    top, left = rng.randrange(height - 40), rng.randrange(width - 40)
    mask[:, :, top : top + rng.randint(1, 40), left : left + rng.randint(1, 40)] = 1
    fast(image[:batch, :, :height, :width], mask)
    if call == first - 1:
        before = resident()
print(resident() - before)
"""

TIGHT = """
import logging, resource, sys
import torch
import lgnet_fast
from lgnet_fast.engine import engine as engines

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
torch.set_num_threads(1)
torch.manual_seed(0)
fast = lgnet_fast.optimize(lgnet_fast.create_model("lgnet_demo").eval(), hole_aware=False)
shapes = [(1, 512, 512), (2, 512, 256), (2, 256, 512)]
one = engines._Shape(fast.plan, fast._first.executor.resized(fast.plan.resized(*shapes[0]))).executor.buffer_bytes
image, mask = torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256)
fast(image, mask)  # starts what starts at the first run
engines.available_memory = lambda device: None  # as where the system does not say
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = taken + 5 * one // 2
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for shape in shapes:
    image = torch.zeros(shape[0], 3, *shape[1:])
    assert torch.isfinite(fast(image, torch.ones_like(image[:, :1]))).all()
    print("kept", len(fast._shapes))
"""

RUNNING = """
import gc, sys
import torch

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    kinds = ("RssAnon", "RssShmem") if "RssAnon" in lines else ("VmRSS",)
    return sum(1024 * int(lines[kind].split()[0]) for kind in kinds)

torch.ones(8) + 1
import scipy.ndimage  # labels the holes
before = resident()
import lgnet_fast
from lgnet_fast import native
native.library().set_isa(sys.argv[1])
model = lgnet_fast.create_model("lgnet")
weights = sum(4 * p.numel() for p in model.parameters())
fast = lgnet_fast.optimize(model)
del model
gc.collect()
fast(torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256))
print(weights, resident() - before)
"""


@pytest.mark.once
@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("isa", dict.fromkeys(VECTORS[:1] + VECTORS[-1:]))
def test_a_running_engine_holds_little_more_than_its_weights(isa):
    """Memory that holds data, on two threads; code is the system's, and differs by its libraries."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", RUNNING, isa], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    weights, resident = map(int, done.stdout.split())
    assert weights == 4 * 115_002_185
    # Packed weights are a little larger; the rest is buffers. 5 %: PyTorch's own, which differ by its version.
    assert weights < resident <= 1.05 * (1.3 * weights + 150e6)


@pytest.mark.once
@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")
def test_shapes_that_do_not_fit_together_run_one_after_another():
    """Each of them takes two fifths of the memory that is left."""
    done = subprocess.run([sys.executable, "-c", TIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = [line for line in done.stdout.splitlines() if line.startswith("kept")]
    assert kept[0] == "kept 2"
    assert len(kept) == 3
    assert (
        "other shapes are freed: MemoryError" in done.stdout or "other shapes are freed: RuntimeError" in done.stdout
    )


@pytest.mark.once
@needs_extension
def test_networks_that_stages_share_are_packed_once():
    widths = {"coarse_channels": 16, "local_channels": 16, "global_channels": 16}
    models = {name: create_model(name, **widths) for name in ("lgnet", "lgnet_share", "C")}
    packed = {name: optimize(model)._first.executor.packed_bytes for name, model in models.items()}
    assert packed["lgnet"] - packed["lgnet_share"] == pytest.approx(packed["C"], rel=1e-4)


@pytest.mark.once
@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory from /proc")
@pytest.mark.parametrize(
    ("threads", "calls", "first"),
    [(1, 100, 40), (2, 100, 40), pytest.param(2, 300, 50, marks=pytest.mark.slow(reason="the same for longer"))],
)
def test_changing_shapes_keep_the_memory_flat(threads, calls, first):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", MEMORY, str(calls), str(first)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50e6
