"""The public calls in different contexts: inference mode, default dtype and device, function transforms, copies,
pickles, forks, spawned and distributed processes, exporters."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from lgnet_fast import BackendError, Inpainter, LGNet, LGNetError, LocalGlobalRefinement, load_engine, ops, optimize
from lgnet_fast.data.metrics import Metrics, fid_score
from lgnet_fast.engine.cpu_executor import CpuExecutor

needs_extension = pytest.mark.skipif(
    CpuExecutor.unavailable_reason() is not None, reason=f"no C++ executor: {CpuExecutor.unavailable_reason()}"
)

TINY = {"coarse_channels": 1, "local_channels": 1, "global_channels": 1}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# "meta" stands for any other device: tensors there have no memory, and kernels fail on them.
CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "with device": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
}


def saved(path: Path, stages: str) -> Path:
    """A saved model and, where there is an extension, its engine."""
    torch.manual_seed(0)
    model = LGNet(stages, **TINY).eval()
    model.save_pretrained(path)
    if CpuExecutor.unavailable_reason() is None:
        optimize(model).save(path / "engine")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), "C+G_att")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network without attention, which takes most of the time of narrow networks."""
    return saved(tmp_path_factory.mktemp("quick"), "C+L")


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 60:110, 140:200] = 1
    return image, mask


def picture() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hole = np.zeros((64, 80), dtype=bool)
    hole[20:40, 10:50] = True
    return rng.integers(0, 256, (64, 80, 3), dtype=np.uint8), hole


def of_tensors(made: Callable[..., Tensor], image: Tensor, mask: Tensor) -> Tensor:
    return made(image, mask).detach()


def of_picture(made: Inpainter, image: Tensor, mask: Tensor) -> Tensor:
    return torch.from_numpy(made(*picture()).astype(np.float32) / 127.5 - 1)


CALLS: dict[str, tuple[Callable[[Path], object], Callable[..., Tensor]]] = {
    "model": (lambda folder: LGNet.from_pretrained(folder), of_tensors),
    "engine": (lambda folder: optimize(LGNet.from_pretrained(folder), device="cpu"), of_tensors),
    "other shape": (lambda folder: optimize(LGNet.from_pretrained(folder), (256, 512), device="cpu"), of_tensors),
    "pipeline": (lambda folder: Inpainter.from_pretrained(folder, device="cpu"), of_picture),
    "eager pipeline": (lambda folder: Inpainter.from_pretrained(folder, device="cpu", backend="eager"), of_picture),
    "bfloat16": (lambda folder: Inpainter.from_pretrained(folder, device="cpu", dtype="bfloat16"), of_picture),
    "loaded engine": (lambda folder: load_engine(folder / "engine"), of_tensors),
}


@pytest.fixture(scope="module")
def outside(quick: Path, inputs: tuple[Tensor, Tensor]) -> Callable[[str], tuple[object, Tensor]]:
    """The arguments of a call and its result, made outside the tested context."""

    @functools.cache
    def made(call: str) -> tuple[object, Tensor]:
        make, use = CALLS[call]
        own = make(quick)
        return own, use(own, *inputs)

    return made


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_made_and_used_inside_and_outside(quick, inputs, outside, context, call):
    if call == "loaded engine" and CpuExecutor.unavailable_reason() is not None:
        pytest.skip("only the C++ executor's engines can be saved")
    make, use = CALLS[call]
    there, expected = outside(call)
    assert torch.isfinite(expected).all()
    limit = 0.05 if call == "bfloat16" else 2 / 255 if use is of_picture else 1e-5
    with CONTEXTS[context]():
        inside = make(quick)
        results = [use(inside, *inputs), use(there, *inputs)]
    results.append(use(inside, *inputs))
    for result in results:
        assert result.dtype == expected.dtype
        assert (result - expected).abs().max() <= limit


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("name", ["cosine_attention", "attention_block", "merge", "merge_concat"])
def test_operators_and_their_gradients(context, backend, name):
    operator, arguments = operator_and_arguments(name)

    def run() -> list[Tensor]:
        leaves = [a.clone().requires_grad_() for a in arguments]
        out = operator(*leaves, backend=backend)
        return [out, *(torch.autograd.grad(out, leaves, cotangent) if out.requires_grad else ())]

    with torch.random.fork_rng():
        cotangent = torch.randn(operator(*arguments, backend="eager").shape)
    expected = run()
    with CONTEXTS[context]():
        results = run()
    assert len(results) == (1 if context == "inference_mode" else len(expected))
    for result, wanted in zip(results, expected):
        assert result.dtype == wanted.dtype
        assert (result - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def operator_and_arguments(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "cosine_attention": lambda: [normal(2, 6, 5, 7)],
        "attention_block": lambda: [normal(2, 6, 5, 7), normal(6, 12, 1, 1), normal(6)],
        "merge": lambda: [normal(2, 3, 5, 7), normal(2, 3, 5, 7), normal(2, 1, 5, 7)],
        "merge_concat": lambda: [normal(2, 3, 5, 7), normal(2, 3, 5, 7), normal(2, 1, 5, 7)],
    }
    return getattr(torch.ops.lgnet, name), tensors[name]()


@needs_extension
@pytest.mark.parametrize("name", ["cosine_attention", "attention_block", "merge", "merge_concat"])
def test_function_transforms(name):
    """grad, vjp, vmap and their nestings, with every argument or only the first one mapped, against eager PyTorch."""
    operator, arguments = operator_and_arguments(name, torch.float64)
    several = [torch.stack([a, 2 * a, a - 1]) for a in arguments]
    numbers = tuple(range(len(arguments)))
    first = (0, *(None for _ in numbers[1:]))

    def all_of(backend: str) -> list[Tensor]:
        def run(*args: Tensor) -> Tensor:
            return operator(*args, backend=backend)

        def loss(*args: Tensor) -> Tensor:
            return run(*args).square().mean()

        mapped = torch.vmap(torch.func.grad(loss, argnums=numbers))
        results: list[Tensor] = [*torch.func.grad(loss, argnums=numbers)(*arguments)]
        value, pullback = torch.func.vjp(run, *arguments)
        results += [value, *pullback(torch.ones_like(value))]
        results.append(torch.vmap(run)(*several))
        results.append(torch.vmap(run, in_dims=first)(several[0], *arguments[1:]))
        results.append(torch.vmap(run, in_dims=(1, *first[1:]), out_dims=2)(several[0].movedim(0, 1), *arguments[1:]))
        results += mapped(*several)
        results += torch.vmap(torch.func.grad(loss, argnums=numbers), in_dims=first)(several[0], *arguments[1:])
        results += torch.func.grad(lambda *args: torch.vmap(loss)(*args).sum(), argnums=numbers)(*several)
        leaves = [a.clone().requires_grad_() for a in several]
        results += torch.autograd.grad(torch.vmap(run)(*leaves).square().sum(), leaves)
        results.append(torch.func.jacrev(lambda *args: run(*args).mean(dim=(0, 2)))(*arguments))
        return results

    ops.reset_calls()
    fast = all_of("cpp")
    assert not any(backend == "eager" for _, backend in ops.calls())
    assert {op for op, _ in ops.calls()} == {name, f"{name}_backward"}
    for result, wanted in zip(fast, all_of("eager"), strict=True):
        assert result.shape == wanted.shape
        assert (result - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_a_second_derivative_by_transforms_is_refused_too():
    operator, (features,) = operator_and_arguments("cosine_attention")
    first = torch.func.grad(lambda x: operator(x, backend="cpp").square().sum())
    with pytest.raises(RuntimeError, match="no second derivative; use backend='eager'"):
        torch.func.grad(lambda x: first(x).sum())(features)
    leaf = features.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative; use backend='eager'"):
        torch.autograd.grad(first(leaf).sum(), leaf)


@pytest.mark.parametrize("name", ["cosine_attention", "merge"])
def test_forward_mode_is_refused_and_never_zero(name):
    operator, given = operator_and_arguments(name)
    arguments = tuple(given)
    tangents = tuple(map(torch.ones_like, arguments))

    def run(*given):
        return operator(*given, backend="cpp")

    def loss(*given):
        return run(*given).square().sum()

    refused = pytest.raises(RuntimeError, match="cannot be differentiated in forward mode")
    with refused:
        torch.func.jvp(run, arguments, tangents)
    with refused:
        torch.func.jacfwd(loss)(*arguments)
    with refused, torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(arguments[0], tangents[0]), *arguments[1:])
    with refused:
        torch.func.jvp(torch.func.grad(loss), arguments, tangents)
    with refused:
        torch.func.grad(lambda *given: torch.func.jvp(loss, given, tangents)[1])(*arguments)
    with torch.autograd.forward_ad.dual_level():  # open, but nothing in it is a dual number
        assert torch.equal(run(*arguments), operator(*arguments, backend="cpp"))


@pytest.mark.parametrize("backend", ["auto", "eager", "cpp", "triton"])
@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_models_copy_and_pickle(backend, how):
    for model in (
        LGNet("C+G_att", **TINY, backend=backend),
        LocalGlobalRefinement(torch.nn.Conv2d(4, 3, 1), local_channels=1, global_channels=1, backend=backend),
    ):
        if how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        elif how == "deepcopy":
            other = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert other.backend == backend
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
        other.set_backend("eager")
        assert model.backend == backend


@pytest.mark.parametrize("backend", ["auto", "eager", pytest.param("cpp", marks=needs_extension)])
def test_pipelines_copy_and_pickle(quick, backend):
    pipe = Inpainter.from_pretrained(quick, device="cpu", backend=backend, window=256)
    expected = pipe(*picture())
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert other.window == 256
        assert np.abs(other(*picture()).astype(int) - expected).max() <= 1


def test_engines_refuse_both(quick):
    engine = optimize(LGNet.from_pretrained(quick), device="cpu")
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(LGNetError, match="an engine cannot be pickled"):
            call(engine)


def test_weights_of_inference_mode_are_used_and_their_replacement_is_noticed(quick, inputs):
    model = LGNet.from_pretrained(quick)
    expected = model(*inputs).detach()
    with torch.inference_mode():
        cast = model.double().float()  # its weights are inference tensors now
    assert all(p.is_inference() for p in cast.parameters())
    engine = optimize(cast, device="cpu")
    assert (engine(*inputs) - expected).abs().max() <= 1e-4
    cast.net_l.out.bias = torch.nn.Parameter(cast.net_l.out.bias + 1)
    with pytest.raises(LGNetError, match="weights changed or moved"):
        engine(*inputs)


def test_weights_changed_under_inference_mode_are_noticed(quick, inputs):
    model = LGNet.from_pretrained(quick)
    engine = optimize(model, device="cpu")
    with torch.inference_mode():
        model.net_l.out.bias.add_(1)
    with pytest.raises(LGNetError, match="weights changed or moved"):
        engine(*inputs)


def test_weights_that_go_to_shared_memory_are_still_the_engines(quick, inputs):
    model = LGNet.from_pretrained(quick)
    engine = optimize(model, device="cpu")
    expected = engine(*inputs)
    before = model.net_l.out.bias.data_ptr()
    model.share_memory()
    assert model.net_l.out.bias.data_ptr() != before
    assert torch.equal(engine(*inputs), expected)
    with torch.no_grad():
        model.net_l.out.bias.add_(1)
    with pytest.raises(LGNetError, match="weights changed or moved"):
        engine(*inputs)


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("triton", "float32", "triton"),
        pytest.param("cpp", "float16", "float16", marks=needs_extension),
        ("cuda", "float32", "expected one of"),
        ("tensorrt", "float32", "expected one of"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_by_the_constructor(folder, backend, dtype, message):
    with pytest.raises(BackendError, match=message):
        Inpainter(LGNet.from_pretrained(folder), device="cpu", dtype=dtype, backend=backend)


def test_a_backend_is_refused_for_a_network_without_a_choice():
    with pytest.raises(BackendError, match="has no choice"):
        Inpainter(torch.nn.Conv2d(4, 3, 1), device="cpu", backend="cpp")


# -- compilers and transforms ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="PyTorch 2.7 breaks the graph before the call")
def test_compiled_code_calls_an_engine_as_one_operator(quick, inputs):
    engine = optimize(LGNet.from_pretrained(quick), device="cpu")
    image, mask = inputs

    def around(image: Tensor, mask: Tensor) -> Tensor:
        return engine(image / 2, mask).relu()

    found = torch._dynamo.explain(around)(image, mask)
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    compiled = torch.compile(around, backend="aot_eager", fullgraph=True)
    for other in (mask, mask.flip(2), torch.zeros_like(mask)):
        assert torch.equal(compiled(image, other), around(image, other))
    wide = torch.cat([image, image], dim=3), torch.cat([mask, mask], dim=3)
    assert torch.equal(compiled(*wide), around(*wide))
    assert not compiled(image.clone().requires_grad_(), mask).requires_grad
    with pytest.raises(ValueError, match=r"mask: expected \[1, 1, 256, 256\] to fit image"):
        compiled(image, mask[..., :128])
    given = torch.compile(lambda *pair: engine(*pair, holes=[(60, 110, 140, 200)]), backend="eager", fullgraph=True)
    assert torch.equal(given(image, mask), engine(image, mask))
    with pytest.raises(ValueError, match="holes: "):
        given(image, mask.flip(2))
    torch.library.opcheck(torch.ops.lgnet.engine, (image, mask, None, engine._number))


def test_a_graph_whose_engine_is_gone_says_so(quick, inputs):
    number = optimize(LGNet.from_pretrained(quick), device="cpu")._number
    gc.collect()
    with pytest.raises(LGNetError, match="engine: it was deleted"):
        torch.ops.lgnet.engine(*inputs, None, number)


def test_an_engine_is_neither_exported_nor_transformed(quick, inputs):
    engine = optimize(LGNet.from_pretrained(quick), device="cpu")

    class Program(torch.nn.Module):
        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return engine(image, mask)

    for export in (functools.partial(torch.export.export, strict=False), torch.jit.trace):
        with pytest.raises(LGNetError, match="cannot be exported"):
            export(Program(), inputs)
    image, mask = inputs
    with pytest.raises(LGNetError, match="cannot be transformed"):
        torch.vmap(lambda one: engine(one[None], mask)[0])(image)
    with pytest.raises(LGNetError, match="cannot be transformed"):
        torch.func.grad(lambda image: engine(image, mask).sum())(image)


def test_an_engine_is_not_run_on_tensors_without_memory_of_their_own(quick, inputs):
    """A recorded graph would return memory that nothing has written."""
    engine = optimize(LGNet.from_pretrained(quick), device="cpu")
    image, mask = inputs
    with pytest.raises(LGNetError, match="cannot be exported"):
        make_fx(engine)(image, mask)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(image), mode.from_tensor(mask)
    with mode, pytest.raises(LGNetError, match="expected plain tensors, got a FakeTensorMode"):
        engine(*fakes)
    with pytest.raises(LGNetError, match="expected plain tensors, got FakeTensor"):
        engine(*fakes)
    with pytest.raises(LGNetError, match="expected plain tensors, got TwoTensor"):
        engine(image, TwoTensor(mask, mask))

    class Named(Tensor):
        """Without values of its own."""

    assert torch.equal(engine(image.as_subclass(Named), mask), engine(image, mask))


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
def test_scores(context):
    pytest.importorskip("torchmetrics")
    truth, hole = picture()
    filled = np.where(hole[..., None], 255 - truth, truth)
    features = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)

    def scores() -> list[float]:
        own = Metrics(("l1", "psnr", "ssim")).scores(filled, truth)
        return [*own.values(), fid_score(features, features[::-1] + 1)]

    expected = scores()
    with CONTEXTS[context]():
        assert scores() == expected


# -- other processes -----------------------------------------------------------------------------------------------


def in_process(code: str, *arguments: object, seconds: float = 100) -> str:
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
    done = subprocess.run([sys.executable, script, quick], capture_output=True, text=True, timeout=200)
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
    done = subprocess.run([sys.executable, script, quick, tmp_path], capture_output=True, text=True, timeout=200)
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


# -- exporters -----------------------------------------------------------------------------------------------------


def test_exported_program_is_plain_pytorch(folder, inputs):
    """torch.export with the default backend: no operator of this package is left in the program."""
    model = LGNet.from_pretrained(folder)
    program = torch.export.export(model, inputs)
    assert not any("lgnet" in str(node.target) for node in program.graph.nodes)
    assert any("scaled_dot_product" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        assert (program.module()(*inputs) - model(*inputs)).abs().max() <= 1e-4


def test_onnx_export(folder, inputs, tmp_path):
    model = LGNet.from_pretrained(folder)
    onnxruntime = pytest.importorskip("onnxruntime")
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=["image", "mask"])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"image": inputs[0].numpy(), "mask": inputs[1].numpy()})
    with torch.no_grad():
        assert np.abs(result - model(*inputs).numpy()).max() <= 1e-4


@needs_extension
def test_onnx_export_names_the_backend_to_choose(folder, inputs, tmp_path):
    pytest.importorskip("onnx")
    model = LGNet.from_pretrained(folder).set_backend("cpp")
    with pytest.raises(BackendError, match=r"'cpp' has no ONNX form; call set_backend\('auto'\)"):
        torch.onnx.export(model, inputs, str(tmp_path / "model.onnx"), dynamo=False)
