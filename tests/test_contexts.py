"""The public calls in PyTorch's contexts (inference mode, default dtype, default device), copied and pickled."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lgnet_fast import BackendError, Inpainter, LGNet, LGNetError, LocalGlobalRefinement, load_engine, optimize
from lgnet_fast.data.metrics import Metrics
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.evaluation.frechet import frechet_distance
from tests.contexts_support import TINY, image_and_mask, operator_and_arguments, saved
from tests.engine_support import needs_extension


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), "C+G_att")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network without attention, which takes most of the time of narrow networks."""
    return saved(tmp_path_factory.mktemp("quick"), "C+L")


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    return image_and_mask()


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
        torch.manual_seed(0)
        cotangent = torch.randn(operator(*arguments, backend="eager").shape)
    expected = run()
    with CONTEXTS[context]():
        results = run()
    assert len(results) == (1 if context == "inference_mode" else len(expected))
    for result, wanted in zip(results, expected):
        assert result.dtype == wanted.dtype
        assert (result - wanted).abs().max() <= 1e-5 * wanted.abs().max()


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


@pytest.mark.parametrize("context", CONTEXTS)
def test_scores(context):
    pytest.importorskip("skimage")
    truth, hole = picture()
    filled = np.where(hole[..., None], 255 - truth, truth)
    features = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32))

    def scores() -> list[float]:
        own = Metrics(("l1", "psnr", "ssim")).scores(filled, truth)
        return [*own.values(), frechet_distance(features, 2 * features + 1)]

    expected = scores()
    with CONTEXTS[context]():
        assert scores() == expected
