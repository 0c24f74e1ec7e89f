"""The C++ attention kernels against plain PyTorch in float64: values, gradients, layouts, memory; errors of all."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lgnet_fast import create_model, native
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.plan import AttentionStep
from lgnet_fast.ops.cpu import attention as cpu
from lgnet_fast.ops.cpu import merge_concat as cpu_merge
from lgnet_fast.reference import attention as reference
from tests.cpp_support import LAYOUTS, merge_inputs, views, with_grads
from tests.support import assert_accurate

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))

VARIANTS = ("released", "paper")
NAMES = ("out", "dF", "dweight", "dbias")


def attention(features, variant):
    if variant == "released":
        query = F.avg_pool2d(features, 3, 1, 1, count_include_pad=True) * 9
        shifted = features + 1e-7
        key = value = shifted / shifted.norm(dim=1, keepdim=True)
    else:
        query = key = features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)
        value = features
    query, key, value = (t.flatten(2) for t in (query, key, value))
    scores = query.transpose(1, 2) @ key
    attended = value @ scores.softmax(dim=-1).transpose(1, 2)
    return attended.view(features.shape), scores.logsumexp(dim=-1)


def log_sum_exp(stats):
    maximum, total = stats.double()
    return maximum * math.log(2) + total.log()


def block(features, weight, bias, variant):
    attended, _ = attention(features, variant)
    pair = (attended, features) if variant == "released" else (features, attended)
    return F.conv2d(torch.cat(pair, dim=1), weight, bias)


def make(shape, dtype=torch.float32, seed=0):
    channels = shape[1]
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=rng).to(dtype)
    weight = (torch.randn(channels, 2 * channels, 1, 1, generator=rng) / channels**0.5).to(dtype)
    bias = torch.randn(channels, generator=rng).to(dtype)
    grad = torch.randn(shape, generator=rng).to(dtype)
    return features, weight, bias, grad


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SHAPES = [(1, 1, 1, 1), (2, 7, 9, 13), (3, 96, 17, 31), (1, 128, 24, 24), (1, 192, 1, 50), (0, 8, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_block_and_its_gradients(isa, variant, dtype, shape):
    features, weight, bias, grad = make(shape, dtype)
    inputs = (features, weight, bias)
    before = [t.clone() for t in inputs]

    def run(*args):
        return block(*args, variant)

    truth = with_grads(run, [t.double() for t in inputs], grad.double())
    eager = with_grads(run, inputs, grad)
    out, attended, stats = cpu.attention_block_forward(*inputs, variant, save_attended=True)
    grads = cpu.attention_block_backward(grad, features, attended, stats, weight, variant)
    for name, got, e, t in zip(NAMES, (out, *grads), eager, truth, strict=True):
        assert_accurate(name, got, t, e)
    exact, exact_lse = attention(features.double(), variant)
    assert_accurate("attended", attended, exact, attention(features, variant)[0])
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate("lse", log_sum_exp(stats).to(dtype), exact_lse, attention(features, variant)[1])
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_size_of_the_network(variant):
    features, weight, bias, grad = make((1, 128, 64, 64))
    truth, *truth_grads = with_grads(
        lambda *a: block(*a, variant), [t.double() for t in (features, weight, bias)], grad.double()
    )
    eager, *eager_grads = with_grads(lambda *a: block(*a, variant), (features, weight, bias), grad)
    out, attended, stats = cpu.attention_block_forward(features, weight, bias, variant, save_attended=True)
    assert_accurate("out", out, truth, eager)
    grads = cpu.attention_block_backward(grad, features, attended, stats, weight, variant)
    for name, got, e, t in zip(NAMES[1:], grads, eager_grads, truth_grads, strict=True):
        assert_accurate(name, got, t, e)


def test_weights_that_vanish_cost_no_time(isa, threads_restored):
    """At scale 10 many weights are near 2^-126; products with subnormal numbers took nine times as long."""
    torch.set_num_threads(1)  # threads that wait for others count as processor time
    times = {}
    for scale in (1, 10) * 5:
        features, weight, _, grad = make((1, 64, 24, 24))
        features *= scale
        start = time.process_time()
        _, attended, stats = cpu.attention_block_forward(features, weight, None, "released", save_attended=True)
        cpu.attention_block_backward(grad, features, attended, stats, weight, "released")
        times.setdefault(scale, []).append(time.process_time() - start)
    assert min(times[10]) < 2.5 * min(times[1])


@pytest.mark.parametrize("channels", [387, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_many_channels(isa, threads_restored, variant, dtype, channels):
    """With few positions the combiner is split by output channels, in a larger batch by panels, with equal bits."""
    features, weight, bias, _ = make((2, channels, 7, 15), dtype)
    truth = block(*(t.double() for t in (features, weight, bias)), variant)
    eager = block(features, weight, bias, variant)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        out, attended, _ = cpu.attention_block_forward(features, weight, bias, variant, save_attended=True)
        assert_accurate(f"{threads} threads", out, truth, eager)
    exact, plain = attention(features.double(), variant)[0], attention(features, variant)[0]
    assert_accurate("attended", attended, exact, plain)
    batch = features.repeat(10, 1, 1, 1)
    assert torch.equal(cpu.attention_block_forward(batch, weight, bias, variant)[0], out.repeat(10, 1, 1, 1))
    strided = weight.transpose(0, 1).contiguous().transpose(0, 1)  # not read in place
    assert torch.equal(cpu.attention_block_forward(features, strided, bias, variant)[0], out)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(cpu.attention_block_forward(channels_last, weight, bias, variant)[0], out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_in_float64(variant):
    class Block(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features, weight, bias):
            out, attended, stats = cpu.attention_block_forward(features, weight, bias, variant, save_attended=True)
            ctx.save_for_backward(features, weight, attended, stats)
            return out

        @staticmethod
        def backward(ctx, grad):
            features, weight, attended, stats = ctx.saved_tensors
            return cpu.attention_block_backward(grad, features, attended, stats, weight, variant)

    inputs = [t.double().requires_grad_() for t in make((2, 3, 3, 4))[:3]]
    assert torch.autograd.gradcheck(Block.apply, inputs)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_threads(threads_restored, variant, threads):
    # Many threads and few queries: the keys are split and merged, gradients summed over rectangles.
    features, weight, bias, grad = make((2, 40, 13, 19))
    truth = with_grads(lambda *a: block(*a, variant), [t.double() for t in (features, weight, bias)], grad.double())
    eager = with_grads(lambda *a: block(*a, variant), (features, weight, bias), grad)
    torch.set_num_threads(threads)
    out, attended, stats = cpu.attention_block_forward(features, weight, bias, variant, save_attended=True)
    grads = cpu.attention_block_backward(grad, features, attended, stats, weight, variant)
    again = cpu.attention_block_forward(features, weight, bias, variant)[0]
    for name, got, e, t in zip(NAMES, (out, *grads), eager, truth, strict=True):
        assert_accurate(name, got, t, e)
    assert torch.equal(out, again)  # the same bits every time


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_reads_any_strides(dtype, layout):
    features, weight, bias, grad = make((2, 20, 9, 13), dtype)
    view = views(features)[layout]
    dense = view.contiguous()
    transposed_weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    expected, attended, stats = cpu.attention_block_forward(dense, weight, bias, "released", save_attended=True)
    out, attended_too, _ = cpu.attention_block_forward(view, transposed_weight, bias, "released", save_attended=True)
    assert torch.equal(out, expected)
    assert torch.equal(attended, attended_too)
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)
    else:
        assert out.is_contiguous()
    want = cpu.attention_backward(grad, dense, attended, stats, "released")
    got = cpu.attention_backward(views(grad)["sliced"], view, views(attended)["transposed"], stats, "released")
    assert torch.equal(got, want)
    for a, b in zip(
        cpu.attention_block_backward(
            views(grad)["channels_last"], view, views(attended)["transposed"], stats, weight, "released"
        ),
        cpu.attention_block_backward(grad, dense, attended, stats, weight, "released"),
        strict=True,
    ):
        assert_accurate("gradient", a, b, roundings={torch.float32: 16, torch.bfloat16: 2}[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_attention_writes_into_a_slice(last):
    features, weight, bias, _ = make((2, 20, 9, 13))
    buffer = torch.full((2, 50, 9, 13), float("nan"))
    if last:
        buffer = buffer.contiguous(memory_format=torch.channels_last)
    target = buffer[:, 11:31]
    out, attended, _ = cpu.attention_block_forward(features, weight, bias, "paper", out=target)
    assert out.data_ptr() == target.data_ptr()
    assert attended is None
    assert torch.equal(target, cpu.attention_block_forward(features, weight, bias, "paper")[0])
    assert buffer[:, :11].isnan().all()
    assert buffer[:, 31:].isnan().all()
    cpu.attention_forward(features, "paper", out=buffer[:, 30:50])
    assert torch.equal(buffer[:, 30:50], cpu.attention_forward(features, "paper")[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["zero", "1e4", "-1e4", "random 1e4", "half zero", "one hot"])
def test_extreme_features(isa, variant, kind):
    features, weight, bias, grad = make((1, 16, 9, 13))
    if kind == "zero":
        features.zero_()
    elif kind == "half zero":
        features[:, :, :5] = 0
    elif kind == "random 1e4":
        features *= 1e4
    elif kind == "one hot":
        features = torch.zeros_like(features)
        features[:, 3, 4, 5] = 1e4
    else:
        features.fill_(float(kind))
    truth, exact_lse = attention(features.double(), variant)
    eager, _ = attention(features, variant)
    out, attended, stats = cpu.attention_block_forward(features, weight, bias, variant, save_attended=True)
    assert_accurate("attended", attended, truth, eager)
    inputs = (features, weight, bias)
    assert_accurate("out", out, block(*(t.double() for t in inputs), variant), block(*inputs, variant))
    # The maximum, in units of log 2, is rounded once; the sum is added in float64.
    assert_accurate("lse", log_sum_exp(stats).float(), exact_lse, roundings=16)
    got = cpu.attention_backward(grad, features, attended, stats, variant)
    assert got.isfinite().all()
    if kind in ("zero", "half zero") and variant == "paper":
        eager_grad = with_grads(lambda f: attention(f, variant)[0], [features], grad)[1]
        truth_grad = with_grads(lambda f: attention(f, variant)[0], [features.double()], grad.double())[1]
        assert_accurate("dF", got, truth_grad, eager_grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stats_may_have_any_strides(isa, variant):
    features, _, _, grad = make((1, 24, 40, 40), torch.float32)
    attended, stats = cpu.attention_forward(features, variant)
    expected = cpu.attention_backward(grad, features, attended, stats, variant)
    apart = torch.empty(*stats.shape, 2)[..., 0].copy_(stats)
    assert not apart.is_contiguous()
    assert torch.equal(cpu.attention_backward(grad, features, attended, apart, variant), expected)


SIZES = {torch.float32: (1e4, 3e7), torch.bfloat16: (30.0, 1e3, 1e4), torch.float64: (1e4,)}


@pytest.mark.parametrize(("dtype", "size"), [(d, size) for d, sizes in SIZES.items() for size in sizes], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_large_features(isa, threads_restored, variant, dtype, size):
    """Probabilities are recomputed from maxima and sums of rows, because log-sum-exps would lose digits."""
    features, weight, bias, grad = make((2, 40, 11, 14), dtype, seed=3)
    inputs = (features * size, weight, bias)
    truth = with_grads(lambda *a: block(*a, variant), [t.double() for t in inputs], grad.double())
    eager = with_grads(lambda *a: reference.attention_block(*a, variant), inputs, grad)
    for threads in (1, 3):  # one range of keys, and several that are merged
        torch.set_num_threads(threads)
        out, attended, stats = cpu.attention_block_forward(*inputs, variant, save_attended=True)
        grads = cpu.attention_block_backward(grad, inputs[0], attended, stats, weight, variant)
        for name, got, e, t in zip(NAMES, (out, *grads), eager, truth, strict=True):
            assert_accurate(f"{name}, {threads} threads", got, t, e)


@pytest.mark.parametrize("channels", [16, 160])
@pytest.mark.parametrize("scale", [1e6, 1e12])
def test_slopes_are_zero_where_one_weight_is_one(isa, channels, scale):
    """dP and D are then the same sums, and their difference is no rounding that queries and keys multiply."""
    features, weight, bias, grad = make((1, channels, 12, 12), seed=5)
    inputs = (features * scale, weight, bias)
    double = [tensor.double() for tensor in inputs]
    _, truth, *_ = with_grads(lambda *operands: block(*operands, "released"), double, grad.double())
    _, attended, stats = cpu.attention_block_forward(*inputs, "released", save_attended=True)
    got, _, _ = cpu.attention_block_backward(grad, inputs[0], attended, stats, weight, "released")
    assert_accurate("dF", got, truth, roundings=64)


@pytest.mark.parametrize("channels", [5, 64])
def test_slopes_of_bf16_are_zero_where_one_weight_is_one(isa, channels):
    """The attended features are saved in bf16, so dP and D are the same only with values that are rounded alike."""
    features, _, _, grad = make((2, channels, 9, 7), torch.bfloat16, seed=5)
    features = features * 1e6
    _, truth = with_grads(lambda x: attention(x, "released")[0], [features.double()], grad.double())
    attended, stats = cpu.attention_forward(features, "released")
    got = cpu.attention_backward(grad, features, attended, stats, "released")
    assert_accurate("dF", got, truth, roundings=64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_key_of_one_channel_has_no_slope(isa, variant):
    """It is the sign of the feature. What rounding leaves of its gradient is divided by the feature, here 1e-4."""
    features, _, _, grad = make((2, 1, 6, 7))
    features = features.sign() * torch.linspace(1e-4, 2, features.numel()).view(features.shape)
    exact, truth = with_grads(lambda x: attention(x, variant)[0], [features.double()], grad.double())
    attended, stats = cpu.attention_forward(features, variant)
    assert_accurate("out", attended, exact, roundings=16)
    found = cpu.attention_backward(grad, features, attended, stats, variant)
    assert_accurate("dF", found, truth, roundings=64)


def test_a_bias_larger_than_the_products(isa):
    features, weight, bias, _ = make((1, 200, 6, 7), seed=4)
    inputs = (features, weight, bias * 1e4)
    out = cpu.attention_block_forward(*inputs, "released")[0]
    eager, exact = block(*inputs, "released"), block(*(t.double() for t in inputs), "released")
    # Without the bias, so that the scale is that of the products.
    assert_accurate("products", *(t - inputs[2].to(t.dtype)[:, None, None] for t in (out, exact, eager)))


@pytest.mark.once
def test_bound_on_memory():
    """65,536 positions: a score matrix would take 16 GiB; the whole block stays within 256 MB."""
    code = """
        import threading, time, psutil, torch
        from lgnet_fast import native
        from lgnet_fast.ops.cpu import attention as cpu
        features = torch.randn(1, 128, 256, 256)
        weight, bias = torch.randn(128, 256, 1, 1), torch.randn(128)
        out = torch.empty_like(features).fill_(0)
        cpu.attention_block_forward(features[:, :, :8, :8], weight, bias, "{variant}")
        process, peak, done = psutil.Process(), [0], threading.Event()
        before = process.memory_info().rss
        def watch():
            while not done.wait(0.002):
                peak[0] = max(peak[0], process.memory_info().rss)
        thread = threading.Thread(target=watch)
        thread.start()
        def call():
            cpu.attention_block_forward(features, weight, bias, "{variant}", out=out)
        threading.Thread(target=call, daemon=True).start()
        # All memory is taken before the first panel is done: the sum over the keys need not be waited for.
        while peak[0] - before < 4 * 2**20:
            time.sleep(0.01)
        time.sleep(1.5)
        done.set(); thread.join()
        import os
        print((peak[0] - before) / 2**20, flush=True)
        os._exit(0)
    """
    for variant in VARIANTS:
        script = textwrap.dedent(code).format(variant=variant)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
        used = float(done.stdout)
        assert used < 256, f"{variant}: {used:.0f} MB"


@pytest.mark.once
def test_elements_further_apart_than_int32_counts(isa):
    try:
        storage = torch.empty(2**32, dtype=torch.float16)  # few of its pages are ever touched
    except RuntimeError:
        pytest.skip("no 8 GB of address space")

    def apart(tensor, batch, channel):
        shape, strides = tensor.shape, (batch, channel, tensor.shape[3], 1)
        return storage.view(tensor.dtype).as_strided(shape, strides).copy_(tensor)

    image, output, mask = merge_inputs((1, 8, 40), torch.float16)
    expected = cpu_merge.merge_concat_forward(image, output, mask)
    assert torch.equal(cpu_merge.merge_concat_forward(apart(image, 0, 2**30 + 8), output, mask), expected)
    out = apart(torch.zeros_like(expected), 0, 2**30)
    assert torch.equal(cpu_merge.merge_concat_forward(image, output, mask, out=out), expected)
    features = make((3, 4, 6, 9))[0]
    far = apart(features, 2**30 - 1000, 54)
    for got, want in zip(cpu.attention_forward(far, "released"), cpu.attention_forward(features, "released")):
        assert torch.equal(got, want)


def test_errors_name_argument_expected_and_got():
    features, weight, bias, _ = make((1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"weight: expected shape \[1, 1, 8, 16\], got \[1, 1, 8, 8\]"):
        cpu.attention_block_forward(features, weight[:, :8], bias, "released")
    with pytest.raises(ValueError, match=r"variant: expected one of .*, got 'other'"):
        cpu.attention_forward(features, "other")
    model = create_model("C+G_att", coarse_channels=2, global_channels=2)
    plan = build_plan(plan_stages(model.eval()), 1, 256, 256)
    steps = [replace(step, variant="other") if isinstance(step, AttentionStep) else step for step in plan.steps]
    with pytest.raises(ValueError, match=r"variant: expected one of .*, got 'other'"):
        CpuExecutor.of(replace(plan, steps=tuple(steps)))
    with pytest.raises(ValueError, match=r"attended: expected shape \[1, 8, 4, 4\], got \[1, 8, 4, 5\]"):
        cpu.attention_forward(features, "paper", out=torch.empty(1, 8, 4, 5))
    with pytest.raises(ValueError, match=r"out: expected memory other than that of features, got the same address"):
        cpu.attention_block_forward(features, weight, bias, "paper", out=features)
    with pytest.raises(ValueError, match=r"attended: expected memory other than that of features"):
        cpu.attention_forward(features, "released", out=features)
    with pytest.raises(ValueError, match=r"features: expected a tensor on the CPU, got one on meta"):
        cpu.attention_forward(features.to("meta"), "paper")
    with pytest.raises(ValueError, match="float16"):
        cpu.attention_forward(features.half(), "paper")
    reason = cpu.can_run_attention(features, weight, bias.double())
    assert reason == "bias: expected torch.float32, got torch.float64"
    assert "on meta" in cpu.can_run_attention(features.to("meta"))
    image, output, mask = merge_inputs((1, 4, 4), torch.float32)
    with pytest.raises(ValueError, match=r"mask: expected shape \[1, 1, 4, 4\], got \[1, 3, 4, 4\]"):
        cpu_merge.merge_forward(image, output, image)
    assert "output: expected torch.float32, got torch.float16" in cpu_merge.can_run_merge(image, output.half(), mask)
    assert cpu_merge.can_run_merge(image, output, mask) is None
    with pytest.raises(ValueError, match=r"weight: expected at most four dimensions, got \[1, 1, 1, 1, 8\]"):
        native.tensor_arg(bias[None, None, None, None], "weight")
    assert native.tensor_arg(bias)[1:] == (0, 1, 1, 1, 8, 0, 0, 0, 1)
    assert native.tensor_arg(weight.flatten(1))[2:] == (1, 1, *weight.shape[:2], 0, 0, weight.shape[1], 1)
    with pytest.raises(TypeError, match=r"mask: expected a torch.Tensor, got list"):
        native.tensor_arg([], "mask")
    library = native.library()
    with pytest.raises(ValueError, match=r"set_isa: name: expected one of auto, portable.*, got sse"):
        library.set_isa("sse")
    args = [native.tensor_arg(t) for t in (image, output, mask[:, :, :3])]
    with pytest.raises(ValueError, match=r"merge_forward: mask: expected shape \[1, 1, 4, 4\], got \[1, 1, 3, 4\]"):
        library.merge_forward(*args, False, False, native.tensor_arg(image), 1)


def test_a_program_keeps_the_instruction_set_that_it_was_made_for():
    torch.manual_seed(0)
    model = create_model("lgnet", coarse_channels=4, local_channels=5, global_channels=6).eval()
    image, mask = torch.rand(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
    mask[..., 64:192, 64:192] = 1
    executor = CpuExecutor.of(build_plan(plan_stages(model), 1, 256, 256))
    before, _ = executor.run(image, mask)
    library = native.library()
    try:
        for name in library.isa_available():
            library.set_isa(name)
            assert torch.equal(executor.run(image, mask)[0], before), name
    finally:
        library.set_isa("auto")
