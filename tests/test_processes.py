"""Models, engines and pipelines in other processes: forked, spawned, distributed; what is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgnet_fast import LGNet
from tests.contexts_support import saved
from tests.engine_support import needs_extension


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), "C+G_att")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network without attention, which takes most of the time of narrow networks."""
    return saved(tmp_path_factory.mktemp("quick"), "C+L")


def in_process(code: str, *arguments: object, seconds: float = 600) -> str:
    """The output of a program; a hang fails by a timeout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORKED = """
import os, sys, threading, numpy as np, torch
from lgnet_fast import Inpainter, LGNet, optimize
torch.set_num_threads(2)
torch.manual_seed(0)
folder = sys.argv[1]
image, mask = torch.rand(1, 3, 256, 256) * 2 - 1, torch.zeros(1, 1, 256, 256)
mask[..., 40:90, 100:180] = 1
features = torch.randn(1, 8, 64, 64, requires_grad=True)
rng = np.random.default_rng(0)
picture, hole = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8), np.eye(300, dtype=bool)

def results(make):
    with torch.no_grad():
        out = [make["model"](image, mask), make["engine"](image, mask)]
    out.append(torch.from_numpy(make["pipe"](picture, hole)))
    out.append(torch.autograd.grad(torch.ops.lgnet.cosine_attention(features).sum(), features)[0])
    return out

def made():
    model = LGNet.from_pretrained(folder)
    return {"model": model, "engine": optimize(model, device="cpu"), "pipe": Inpainter(model, device="cpu")}

torch.nn.functional.conv2d(torch.rand(1, 8, 512, 512), torch.rand(8, 8, 3, 3))  # starts PyTorch's threads
here = made()
expected = results(here)
held = here["engine"]._lock  # as if another thread of the parent were just planning
held.__enter__()
pid = os.fork()
if pid == 0:
    try:
        for make in (here, made()):
            for a, b in zip(results(make), expected, strict=True):
                assert (a.double() - b.double()).abs().max() <= 1e-3 * b.double().abs().max(), (a, b)
        print("child", torch.get_num_threads(), flush=True)
    except BaseException as error:
        print(repr(error), flush=True)
    os._exit(0)
held.__exit__(None, None, None)
os.waitpid(pid, 0)
for a, b in zip(results(here), expected, strict=True):
    assert torch.allclose(a, b)
print("parent", torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS's libraries do not work after fork()")
def test_a_forked_child_works(folder):
    assert in_process(FORKED, folder).split() == ["child", "1", "parent", "2"]


LOADED = """
import sys
from lgnet_fast import Inpainter, load_engine
load_engine(sys.argv[1])
print(*({"torch._dynamo", "rich.table"} & sys.modules.keys()))
"""


@needs_extension
def test_loading_an_engine_loads_no_compiler_and_no_tables(quick):
    """PyTorch's compiler takes a second or more, ten times as long as the rest of `load_engine`."""
    assert in_process(LOADED, quick / "engine").split() == []


@pytest.mark.parametrize("missing", ["fastapi", "prometheus_client", "python_multipart"])
def test_the_server_names_its_extra(missing):
    code = "import sys; sys.modules[sys.argv[1]] = None\nfrom lgnet_fast import Session\n"
    code += "try: from lgnet_fast.serve import State, create_app\nexcept ImportError as error: print(error)"
    assert in_process(code, missing) == f"serve: {missing} is missing: pip install 'lgnet-fast[serve]'\n"


SPAWNED = """
import sys
import numpy as np
import torch
import torch.multiprocessing as mp
from lgnet_fast import Inpainter, LGNet

def work(rank, model, pipe, queue):
    image, mask = torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256)
    with torch.no_grad():
        pixels = int(pipe(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)).sum())
        queue.put((rank, float(model(image, mask).sum()), pixels))

if __name__ == "__main__":
    model = LGNet.from_pretrained(sys.argv[1])
    pipe = Inpainter(model, device="cpu")
    queue = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(work, args=(model, pipe, queue), nprocs=2, join=False)
    rows = sorted(queue.get() for _ in range(2))
    processes.join()
    here = mp.SimpleQueue()
    work(-1, model, pipe, here)
    _, total, pixels = here.get()
    for _, there, own in rows:
        assert abs(there - total) <= 1e-4 * abs(total) + 1e-3 and abs(own - pixels) <= 8, (rows, total, pixels)
    print([row[0] for row in rows])
"""


def test_spawned_workers_take_models_and_pipelines(quick, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, script, quick], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[0,", "1]"]


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from lgnet_fast import LGNet

def work(rank, folder, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = LGNet.from_pretrained(folder)
    wrapped = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)
    image = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 50:200, 60:190] = 1
    wrapped(image, mask).square().mean().backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{results}/{rank}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    folder, results = sys.argv[1:]
    mp.spawn(work, args=(folder, f"file://{results}/meeting", results), nprocs=2)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_distributed_data_parallel_averages_the_gradients(quick, tmp_path):
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    done = subprocess.run([sys.executable, script, quick, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    gradients = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = LGNet.from_pretrained(quick)
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 50:200, 60:190] = 1
    losses = []
    for rank in range(2):
        image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(rank)) * 2 - 1
        losses.append(model(image, mask).square().mean())
    (sum(losses) / 2).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(gradients[0][name], gradients[1][name])
        scale = parameter.grad.abs().max()
        assert (gradients[0][name] - parameter.grad).abs().max() <= 1e-3 * scale + 1e-7, name
