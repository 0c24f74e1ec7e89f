"""Function transforms, compilers and exporters on models, engines and operators."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from lgnet_fast import BackendError, LGNet, LGNetError, ops, optimize
from tests.contexts_support import image_and_mask, operator_and_arguments, saved
from tests.engine_support import needs_extension


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


@needs_extension
def test_a_second_derivative_by_transforms_is_refused_too():
    operator, (features,) = operator_and_arguments("cosine_attention")
    first = torch.func.grad(lambda x: operator(x, backend="cpp").square().sum())
    with pytest.raises(RuntimeError, match="no second derivative; use backend='eager'"):
        torch.func.grad(lambda x: first(x).sum())(features)
    leaf = features.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative; use backend='eager'"):
        torch.autograd.grad(first(leaf).sum(), leaf)


@needs_extension
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


# -- engines ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch has no such tag")
def test_inductor_takes_no_engine_into_its_cuda_graphs():
    """Their memory is reused, but an engine keeps its buffers."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.lgnet.engine.default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.lgnet.merge.default.tags


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
