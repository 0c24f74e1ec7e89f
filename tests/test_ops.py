"""The registered operators: dispatch, gradients, opcheck, torch.compile, autocast, FLOPs."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.compiler.config as compiler_config
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lgnet_fast import BackendError, create_model, native, ops
from lgnet_fast.ops import dispatch, library, torch_state
from lgnet_fast.ops.cpu import attention as cpu_attention
from lgnet_fast.reference import attention as reference
from lgnet_fast.reference import merge as reference_merge
from tests.support import assert_accurate, case

VARIANTS = ("released", "paper")

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"no C++ extension: {native.unavailable_reason()}"
)

needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" and shutil.which("cl") is None, reason="PyTorch's compiler needs cl.exe there"
)


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    ops.reset_calls()
    yield
    ops.reset_calls()


def block_inputs(
    batch: int = 2, channels: int = 24, height: int = 9, width: int = 13, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    weight = normal(channels, 2 * channels, 1, 1) * 0.2
    return normal(batch, channels, height, width), weight, normal(channels)


def merge_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((2, 3, 5, 7), generator=generator, dtype=torch.float64)
    output = torch.randn((2, 3, 5, 7), generator=generator, dtype=torch.float64)
    mask = torch.rand((2, 1, 5, 7), generator=generator, dtype=torch.float64)
    return image.to(dtype), output.to(dtype), mask.to(dtype)


def grads(out: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, cotangent)


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors)


def for_attention() -> str:
    """The backend that "auto" takes for attention in float32 and bfloat16 on this CPU."""
    return "eager" if native.isa_name() == "portable" else "cpp"


# -- which backend runs ----------------------------------------------------------------------------------------


def test_auto_runs_the_cpp_kernels_on_a_cpu():
    args = block_inputs()
    with torch.no_grad():
        torch.ops.lgnet.attention_block(*args)
        torch.ops.lgnet.cosine_attention(args[0], "paper")
        torch.ops.lgnet.merge_concat(*merge_inputs())
        torch.ops.lgnet.merge(*merge_inputs())
    assert ops.calls() == {
        ("attention_block", for_attention()): 1,
        ("cosine_attention", for_attention()): 1,
        ("merge_concat", "cpp"): 1,
        ("merge", "cpp"): 1,
    }


def test_auto_leaves_attention_without_vector_kernels_to_pytorch(monkeypatch, caplog):
    """They take five to fifteen times as long there; merging does not. Who asks for them by name gets them."""
    monkeypatch.setattr(dispatch, "_logged", set())
    native.library().set_isa("portable")
    try:
        args = leaves(block_inputs())
        with caplog.at_level(logging.INFO, logger="lgnet_fast"):
            for _ in range(2):
                torch.ops.lgnet.attention_block(*args).sum().backward()
        with torch.no_grad():
            torch.ops.lgnet.cosine_attention(args[0])
            torch.ops.lgnet.merge(*merge_inputs())
            torch.ops.lgnet.attention_block(*args, backend="cpp")
    finally:
        native.library().set_isa("auto")
    expected = {("cosine_attention", "eager"): 1, ("merge", "cpp"): 1}
    assert ops.calls() == {("attention_block", "eager"): 2, ("attention_block", "cpp"): 1} | expected
    told = [record.getMessage() for record in caplog.records if "attention_block" in record.getMessage()]
    assert told == [
        "attention_block runs in eager PyTorch: cpp: the extension has portable kernels only, and PyTorch is faster"
    ]


def test_auto_leaves_attention_in_float64_to_pytorch():
    with torch.no_grad():
        torch.ops.lgnet.attention_block(*block_inputs(dtype=torch.float64))
        torch.ops.lgnet.merge(*merge_inputs(dtype=torch.float64))
    assert ops.calls() == {("attention_block", "eager"): 1, ("merge", "cpp"): 1}


def test_auto_falls_back_and_logs_the_reason_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu_attention, "can_run_attention", lambda *args, **kwargs: "it is Sunday")
    monkeypatch.setattr(dispatch, "_logged", set())
    args = block_inputs()
    with caplog.at_level(logging.INFO, logger="lgnet_fast"):
        for _ in range(3):
            out = torch.ops.lgnet.attention_block(*args)
    assert torch.equal(out, reference.attention_block(*args))
    assert ops.calls() == {("attention_block", "eager"): 3}
    assert [r.message for r in caplog.records] == ["attention_block runs in eager PyTorch: cpp: it is Sunday"]


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("triton", BackendError, "backend='triton' cannot run attention_block: "),
        ("cuda", ValueError, "backend: expected 'auto', 'eager', 'triton' or 'cpp', got 'cuda'"),
    ],
)
def test_explicit_backend(backend, error, message):
    with pytest.raises(error, match=message):
        torch.ops.lgnet.attention_block(*block_inputs(), backend=backend)


def test_a_missing_or_old_triton_is_named(monkeypatch):
    pytest.importorskip("triton")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_missing_triton", dispatch._missing_triton.__wrapped__)  # asked once in a process
        patch.setattr("triton.__version__", "3.3.1")
        with pytest.raises(BackendError, match="triton 3.3.1 is installed, 3.5 or newer is needed"):
            torch.ops.lgnet.attention_block(*block_inputs(), backend="triton")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_missing_triton", dispatch._missing_triton.__wrapped__)
        patch.setitem(sys.modules, "triton", None)
        with pytest.raises(BackendError, match="Triton is not installed \\(pip install 'lgnet-fast\\[triton\\]'\\)"):
            torch.ops.lgnet.attention_block(*block_inputs(), backend="triton")


def test_threads_take_turns_with_the_switches_of_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True, fp32_precision="none"))
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with torch_state.strict_float32():
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=work)
    with torch_state.strict_float32():
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(60)
    assert not torch.backends.cuda.matmul.allow_tf32
    leave.set()
    other.join()
    assert torch.backends.cuda.matmul.allow_tf32


def test_a_thread_may_ask_for_full_precision_twice():
    before = torch_state.cudnn_tf32_allowed()
    with torch_state.strict_float32():
        with torch_state.strict_float32():
            assert not torch_state.cudnn_tf32_allowed()
        assert not torch_state.cudnn_tf32_allowed()
    assert torch_state.cudnn_tf32_allowed() == before


@pytest.mark.parametrize("products", [False, True])
def test_convolutions_of_an_engine_are_in_tf32_only_where_products_may_be(products, monkeypatch):
    monkeypatch.setattr(torch_state, "tf32_allowed", lambda: products)
    before, gpu = torch_state.cudnn_tf32_allowed(), torch.device("cuda", 0)
    with torch_state.engine_float32(gpu, torch.float32):
        assert torch_state.cudnn_tf32_allowed() == (before and products)
    assert torch_state.cudnn_tf32_allowed() == before
    for device, dtype in ((gpu, torch.float16), (torch.device("cpu"), torch.float32)):
        with torch_state.engine_float32(device, dtype):
            assert torch_state.cudnn_tf32_allowed() == before


@pytest.mark.once
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs PyTorch 2.9, for fp32_precision")
@pytest.mark.parametrize(
    "before",
    [
        "pass",
        "backends.cudnn.allow_tf32 = False",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.set_float32_matmul_precision('high')",
    ],
)
def test_the_switches_of_tf32_are_set_back_exactly(before):
    """In a process of its own: a switch that was set once cannot be made unset again by the older names."""
    code = f"""
import torch
from torch import backends
from lgnet_fast.ops.torch_state import strict_float32

def state():
    places = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn)
    return [place.fp32_precision for place in places]

{before}
expected = state()
with strict_float32():
    assert backends.cuda.matmul.fp32_precision == "ieee"
    assert backends.cudnn.conv.fp32_precision != "tf32"
assert state() == expected, (state(), expected)
backends.fp32_precision = "tf32"
assert backends.cuda.matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpp_refuses_what_is_not_on_the_cpu():
    args = tuple(t.to("meta") for t in block_inputs())
    with pytest.raises(BackendError, match="the C\\+\\+ kernels run on the CPU, the tensors are on meta"):
        torch.ops.lgnet.attention_block(*args, backend="cpp")
    assert torch.ops.lgnet.attention_block(*args).shape == args[0].shape


def test_attention_in_float16_is_left_to_pytorch_on_a_cpu():
    with torch.no_grad():
        torch.ops.lgnet.attention_block(*block_inputs(dtype=torch.float16))
    assert ops.calls() == {("attention_block", "eager"): 1}


def test_model_uses_the_kernels_in_eval_and_in_training():
    torch.manual_seed(0)
    model = create_model("lgnet_demo", coarse_channels=4, local_channels=4, global_channels=8, backend="cpp").train()
    image, mask = case("train0", 2, 256, 256, torch.float32)
    model(image, mask).square().mean().backward()
    assert ops.calls() == {
        ("merge_concat", "cpp"): 3,
        ("merge", "cpp"): 1,
        ("attention_block", "cpp"): 3,
        ("attention_block_backward", "cpp"): 3,
        ("merge_concat_backward", "cpp"): 2,
        ("merge_backward", "cpp"): 1,
    }
    fused = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_backend("eager")(image, mask).square().mean().backward()
    for name, p in model.named_parameters():
        assert (fused[name] - p.grad).norm() <= 2e-3 * p.grad.norm() + 1e-7, name


@pytest.mark.parametrize("name", ["lgnet", "paper"])
def test_full_width_model_stays_within_the_rule(name):
    torch.manual_seed(0)
    model = create_model("lgnet", variant="paper" if name == "paper" else "released").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4:
                p.mul_(2)
        image, mask = case("gen256", 1, 256, 256)
        exact = model.double().set_backend("eager")(image, mask)
        model.float()
        eager = model(image.float(), mask.float())
        ops.reset_calls()
        fast = model.set_backend("cpp")(image.float(), mask.float())
    assert ops.calls()["attention_block", "cpp"] == 3
    assert (exact - image).abs().max() > 0.1
    rms = [(x.double() - exact).square().mean().sqrt() for x in (fast, eager)]
    assert rms[0] <= 2 * rms[1] + 1e-7


# -- values and gradients through autograd -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_block_and_gradients_within_the_rule(variant, dtype):
    exact_in = leaves(block_inputs(dtype=dtype), torch.float64)
    fast_in, eager_in = leaves(block_inputs(dtype=dtype)), leaves(block_inputs(dtype=dtype))
    exact = reference.attention_block(*exact_in, variant)
    eager = reference.attention_block(*eager_in, variant)
    fast = torch.ops.lgnet.attention_block(*fast_in, variant, backend="cpp")
    assert_accurate("out", fast, exact, eager)
    for f, e, x in zip(grads(fast, fast_in), grads(eager, eager_in), grads(exact, exact_in), strict=True):
        assert_accurate("gradient", f, x, e)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_the_float64_path(variant):
    args = leaves(block_inputs(1, 5, 3, 4, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *a: torch.ops.lgnet.attention_block(*a, variant, backend="cpp"), args, atol=1e-7
    )
    assert torch.autograd.gradcheck(
        lambda x: torch.ops.lgnet.cosine_attention(x, variant, backend="cpp"), args[:1], atol=1e-7
    )


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("op", ["merge", "merge_concat"])
def test_gradcheck_of_merging(op, tanh):
    args = leaves(merge_inputs(torch.float64))
    function = getattr(torch.ops.lgnet, op)
    assert torch.autograd.gradcheck(lambda *a: function(*a, tanh, backend="cpp"), args, atol=1e-8)
    expected = getattr(reference_merge, op)(args[0], args[1].tanh() if tanh else args[1], args[2])
    assert_accurate("merged", function(*args, tanh, backend="cpp"), expected, roundings=8)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_the_gradients_asked_for(needed):
    args = [t.detach() for t in block_inputs()]
    args[needed].requires_grad_()
    out = torch.ops.lgnet.attention_block(*args, backend="cpp")
    (gradient,) = grads(out, (args[needed],))
    reference_args = leaves(tuple(args))
    expected = grads(reference.attention_block(*reference_args), reference_args)[needed]
    assert_accurate("gradient", gradient, expected, roundings=64)


def test_second_derivative_is_refused():
    args = leaves(block_inputs())
    (gradient,) = torch.autograd.grad(
        torch.ops.lgnet.attention_block(*args, backend="cpp").sum(), args[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivative_by_the_eager_backend(variant):
    """As the error and the docs advise."""
    features = torch.rand(1, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(
            lambda f: torch.ops.lgnet.cosine_attention(f, variant, backend="eager"), features.requires_grad_()
        )


# -- the operators as PyTorch sees them --------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_attention(variant, grad):
    args = leaves(block_inputs()) if grad else block_inputs()
    torch.library.opcheck(torch.ops.lgnet.attention_block, (*args, variant))
    torch.library.opcheck(torch.ops.lgnet.cosine_attention, (args[0], variant))
    torch.library.opcheck(torch.ops.lgnet._attention_block, (*args, variant, grad, "cpp"))
    torch.library.opcheck(torch.ops.lgnet._cosine_attention, (args[0], variant, grad, "cpp"))


@pytest.mark.once
@pytest.mark.parametrize("op", ["merge", "merge_concat"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_merging(op, grad):
    args = leaves(merge_inputs()) if grad else merge_inputs()
    torch.library.opcheck(getattr(torch.ops.lgnet, op), (*args, True))
    torch.library.opcheck(getattr(torch.ops.lgnet, f"_{op}"), (*args, False, "cpp"))


def test_channels_last_comes_back_channels_last_in_eager_and_in_the_fake():
    features, weight, bias = block_inputs()
    features = features.to(memory_format=torch.channels_last)
    out = torch.ops.lgnet.attention_block(features, weight, bias, backend="cpp")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_accurate("out", out, reference.attention_block(features, weight, bias), roundings=64)
    torch.library.opcheck(torch.ops.lgnet._attention_block, (features, weight, bias, "paper", True, "cpp"))


@pytest.mark.parametrize("op", ["merge", "merge_concat"])
def test_channels_last_merging_as_the_fake_says(op):
    tensors = leaves(tuple(t.to(memory_format=torch.channels_last) for t in merge_inputs()))
    out = getattr(torch.ops.lgnet, op)(*tensors, backend="cpp")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in grads(out, tensors))
    torch.library.opcheck(getattr(torch.ops.lgnet, f"_{op}"), (*tensors, True, "cpp"))


@pytest.mark.parametrize("operator", ops.OPERATORS.values(), ids=lambda operator: operator.name)
def test_a_declaration_says_what_its_kernels_give(operator):
    torch.manual_seed(0)
    operands = tuple(torch.rand(shape).sub(0.5) for shape in operator.example)
    public = getattr(torch.ops.lgnet, operator.name)
    arguments = public.default._schema.arguments[len(operands) :]
    operator.checks(*operands, *(a.default_value for a in arguments if not a.kwarg_only))
    result = public(*operands)
    assert ops.calls() == {(operator.name, for_attention() if operator.slower else "cpp"): 1}
    assert_accurate(operator.name, result, operator.eager(*operands), roundings=64)
    result = public(*operands, backend="cpp")  # "auto" may have left it to PyTorch
    with FakeTensorMode() as mode:
        fake = public(*map(mode.from_tensor, operands), backend="cpp")
    assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), result.dtype)
    assert set(operator.backends) == {"triton", "cpp"}


@needs_compiler
@pytest.mark.skipif(" " in tempfile.gettempdir(), reason="PyTorch's compiler does not quote paths")
def test_compiled_fullgraph_forward_and_backward():
    def network(features: Tensor, weight: Tensor, bias: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        attended = torch.ops.lgnet.attention_block(features.relu(), weight, bias, "released", backend="cpp")
        return torch.ops.lgnet.merge_concat(image, attended[:, :3], mask, True, backend="cpp")

    image, _, mask = merge_inputs()
    args = block_inputs(2, 8, 5, 7)
    compiled = torch.compile(network, fullgraph=True)
    eager_in, compiled_in = leaves(args), leaves(args)
    out, expected = compiled(*compiled_in, image, mask), network(*eager_in, image, mask)
    assert_accurate("out", out, expected, roundings=64)
    for a, b in zip(grads(out, compiled_in), grads(expected, eager_in), strict=True):
        assert_accurate("gradient", a, b, roundings=64)
    assert ops.calls()["attention_block_backward", "cpp"] == 2


@needs_compiler
def test_a_graph_kept_by_torch_compile_is_not_used_by_another_version(tmp_path, monkeypatch):
    """Its calls have the schemas of the version that compiled it; see `library.tag_compiled_graphs`."""

    def found_and_missed() -> tuple[int, int]:
        torch.compiler.reset()
        counters.clear()
        inputs = leaves(block_inputs(1, 8, 5, 7))
        compiled = torch.compile(lambda *args: torch.ops.lgnet.attention_block(*args, "released", backend="cpp"))
        grads(compiled(*inputs), inputs)
        seen = counters["aot_autograd"]
        return seen["autograd_cache_hit"], seen["autograd_cache_miss"]

    assert compiler_config.cache_key_tag.count("lgnet_fast") == 1
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert found_and_missed() == (0, 1)
    assert found_and_missed() == (1, 0)
    with compiler_config.patch(cache_key_tag=""), monkeypatch.context() as other:
        other.setattr(library, "__version__", "0.0.0")
        library.tag_compiled_graphs()
        assert found_and_missed() == (0, 1)
    assert found_and_missed() == (1, 0)
    torch.compiler.reset()


def test_autocast_lowers_attention_and_widens_merging():
    args, (image, output, mask) = block_inputs(), merge_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.lgnet.attention_block(*args).dtype == torch.bfloat16
        assert torch.ops.lgnet.cosine_attention(args[0].double()).dtype == torch.float64
        assert torch.ops.lgnet.merge(image, output.bfloat16(), mask.bfloat16()).dtype == torch.float32
        merged = torch.ops.lgnet.merge_concat(image, output.bfloat16(), mask)
    assert merged.dtype == torch.float32
    expected = reference_merge.merge_concat(image, output.bfloat16().float(), mask)
    assert_accurate("merged", merged, expected, roundings=8)
    assert ops.calls()["attention_block", for_attention()] == 1


def test_flops_of_the_fused_operators_are_those_of_the_eager_ones():
    args = leaves(block_inputs())
    totals = []
    for backend in ("cpp", "eager"):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            out = torch.ops.lgnet.attention_block(*args, backend=backend)
        totals.append(counter.get_total_flops())
    positions, channels = 9 * 13, 24
    expected = 2 * (4 * positions**2 * channels + 4 * positions * channels**2)
    assert totals == [expected, expected]
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.lgnet.attention_block(*args, backend="cpp")
        out.sum().backward()
    assert counter.get_total_flops() == expected + 2 * (10 * positions**2 * channels + 8 * positions * channels**2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda a: torch.ops.lgnet.attention_block(a[0][0], *a[1:]),
            ValueError,
            r"features: expected \[B, C, H, W\]",
        ),
        (
            lambda a: torch.ops.lgnet.attention_block(a[0], a[1][:, 1:], a[2]),
            ValueError,
            r"weight: expected \[24, 48",
        ),
        (lambda a: torch.ops.lgnet.attention_block(a[0], a[1], a[2][1:]), ValueError, r"bias: expected \[24\]"),
        (
            lambda a: torch.ops.lgnet.attention_block(a[0], a[1].half(), a[2]),
            TypeError,
            "weight: expected dtype torch.float32 as features, got torch.float16",
        ),
        (
            lambda a: torch.ops.lgnet.attention_block(a[0].half(), a[1].half(), a[2]),
            TypeError,
            "bias: expected dtype torch.float16 as features, got torch.float32",
        ),
        (lambda a: torch.ops.lgnet.attention_block(*a[:2], None), TypeError, "bias: expected a tensor, got None"),
        (lambda a: torch.ops.lgnet.attention_block(*a, "other"), ValueError, "variant: expected one of"),
        (lambda a: torch.ops.lgnet.cosine_attention(a[0].int()), TypeError, "features: expected a floating dtype"),
        (lambda a: torch.ops.lgnet.cosine_attention(a[0][..., :0]), ValueError, "C, H and W of at least 1"),
        (
            lambda a: torch.ops.lgnet.cosine_attention(a[0].to_sparse()),
            TypeError,
            "features: expected a dense tensor",
        ),
        (
            lambda a: torch.ops.lgnet.attention_block(a[0], a[1].to("meta"), a[2]),
            ValueError,
            "weight: expected device cpu as features, got meta",
        ),
        (
            lambda a: torch.ops.lgnet.attention_block(a[0].to("meta"), a[1], a[2], backend="eager"),
            ValueError,
            "weight: expected device meta as features, got cpu",
        ),
        (lambda a: torch.ops.lgnet.merge(a[0], a[0], a[0]), ValueError, r"image: expected \[B, 3, H, W\]"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(block_inputs())
    if "None" in message:
        with pytest.raises(error, match=message), torch.autocast("cpu", torch.bfloat16):
            call(block_inputs())


def test_merge_arguments_are_named():
    image, output, mask = merge_inputs()
    with pytest.raises(ValueError, match=r"output: expected \[2, 3, 5, 7\] as image"):
        torch.ops.lgnet.merge_concat(image, output[:1], mask)
    with pytest.raises(ValueError, match=r"mask: expected \[2, 1, 5, 7\] to fit image"):
        torch.ops.lgnet.merge_concat(image, output, image)


def test_empty_batch():
    features, weight, bias = leaves(block_inputs(0))
    out = torch.ops.lgnet.attention_block(features, weight, bias, backend="cpp")
    assert out.shape == features.shape
    out.sum().backward()
    assert (weight.grad == 0).all()
