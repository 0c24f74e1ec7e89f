"""`optimize`: the contract of the engine, whichever executor runs it."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
import threading
import weakref

import pytest
import torch
from torch import nn

from lgnet_fast import (
    Engine,
    LGNet,
    LGNetError,
    LocalGlobalRefinement,
    OutOfMemoryError,
    create_model,
    optimize,
)
from lgnet_fast.engine import engine as engine_module
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.devices import resolve_device
from lgnet_fast.engine.engine import SHAPES_KEPT
from lgnet_fast.engine.model_executor import ModelExecutor
from lgnet_fast.engine.regions import Rect
from tests.engine_support import assert_same_pixels, narrow_model, needs_extension
from tests.support import assert_accurate, case, released_state
from tests.test_plan import NARROW, lively, random_mask


@pytest.fixture
def model() -> LGNet:
    return narrow_model()


@needs_extension
@pytest.mark.parametrize(
    "shape",
    [
        ("gen256", 2, 256, 256),
        pytest.param(
            ("gen512", 1, 512, 256), marks=pytest.mark.slow(reason="narrow networks are tested at other sizes")
        ),
    ],
)
def test_conformance_of_the_float32_engine(shape):
    """LGNet with the recipe's weights, against the float64 reference."""
    model = LGNet.from_released({net: released_state(net) for net in ("G1", "G2", "G3")}, backend="eager")
    image, mask = case(*shape)
    with torch.no_grad():
        exact = model(image, mask)
    fast = optimize(model, size=shape[2:], batch_size=shape[1], dtype="float32")
    assert isinstance(fast._first.executor, CpuExecutor)
    result = fast(image.float(), mask.float())
    assert_same_pixels(result, exact, mask)
    assert torch.equal(torch.where(mask.bool(), image.float(), result), image.float())


@needs_extension
@pytest.mark.parametrize("name", ["lgnet", "lgnet_share", "C", "C+L", "C+G_att", "C+G+G_att", "C+L+G"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_every_variant(name, variant):
    torch.manual_seed(0)
    widths = NARROW | ({"coarse_channels": 6} if name == "lgnet_share" else {})
    model = lively(create_model(name, variant=variant, **widths, backend="eager"))
    image, mask = case("gen256", 1, 256, 256)
    with torch.no_grad():
        exact = model(image, mask, return_stages=True)
    fast = optimize(model, dtype="float32", hole_aware=False)
    stages = fast(image.float(), mask.float(), return_stages=True)
    assert_same_pixels(fast(image.float(), mask.float()), exact.merged[-1], mask)
    for ours, theirs in zip(stages.raw, exact.raw, strict=True):
        assert_accurate("raw", ours, theirs, roundings=2**14)
    assert (stages.local is None) == (exact.local is None)
    assert (stages.refined is None) == (exact.refined is None)


@needs_extension
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "seeds",
    [range(25), pytest.param(range(25, 200), marks=pytest.mark.slow(reason="the same on more masks"))],
    ids=["25 masks", "175 more"],
)
def test_hole_aware_gives_the_dense_pixels(model, seeds, dtype):
    image, _ = case("gen256", 1, 256, 256, torch.float32)
    precision = getattr(torch, dtype)
    aware, dense, exact = (
        optimize(model, dtype=of, hole_aware=only_hole)
        for of, only_hole in ((dtype, True), (dtype, False), ("float32", False))
    )
    for seed in seeds:
        mask = random_mask(seed).float()
        a, b, e = aware(image, mask), dense(image, mask), exact(image, mask)
        # computed in that dtype, returned in float32
        if dtype == "float32":
            assert_accurate(f"mask {seed}", a, b, roundings=2**10)
        else:
            assert_accurate(f"mask {seed}", a.to(precision), e, b.to(precision), roundings=4)
        assert torch.equal(torch.where(mask.bool(), image, a), image)


@needs_extension
def test_bfloat16_error_is_at_most_twice_that_of_autocast(model):
    image, mask = case("gen256", 1, 256, 256)
    with torch.no_grad():
        exact = model.double()(image, mask)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            eager = model(image.float(), mask.float())
    fast = optimize(model, dtype="bfloat16")(image.float(), mask.float())
    errors = [(x.double() - exact).square().mean().sqrt() for x in (fast, eager)]
    assert errors[0] <= 2 * errors[1] + 1e-3


def test_x_lg(model):
    class Grey(nn.Module):
        def forward(self, image, mask):
            return image.mean(dim=(2, 3), keepdim=True).expand_as(image)

    torch.manual_seed(0)
    x_lg = lively(LocalGlobalRefinement(Grey(), local_channels=4, global_channels=4, backend="eager"))
    image, mask = case("gen256", 1, 256, 256)
    with torch.no_grad():
        exact = x_lg(image, mask)
    fast = optimize(x_lg, dtype="float32")
    assert_same_pixels(fast(image.float(), mask.float()), exact, mask)
    with pytest.raises(LGNetError, match="save: expected an engine of an LGNet"):
        fast.save("anywhere")


class Noisy(nn.Module):
    """A first stage with everything that a mode, a dtype and a device matter for."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, image, mask):
        return self.drop(self.norm(self.conv(torch.cat((image, mask), dim=1)))).tanh()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_first_stage_of_an_x_lg_is_used_in_evaluation_mode_and_left_alone(dtype):
    torch.manual_seed(0)
    x_lg = lively(LocalGlobalRefinement(Noisy(), local_channels=4, global_channels=4, backend="eager")).float()
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        exact = copy.deepcopy(x_lg).eval().double()(image.double(), mask.double())
        first = copy.deepcopy(x_lg.first_stage).eval()(image, mask)
    x_lg.train()
    before = {name: value.clone() for name, value in x_lg.state_dict().items()}
    fast = optimize(x_lg, device="cpu", dtype=dtype)
    for given in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        stages = fast(image.to(given), mask.to(given), return_stages=True)
        assert {picture.dtype for picture in (*stages.raw, *stages.merged)} == {given}
    if dtype != "bfloat16":
        assert_same_pixels(fast(image, mask), exact, mask)
    shown = fast(image, mask, return_stages=True, holes=[(0, 256, 0, 256)]).raw[0]
    assert_accurate("first", shown, first.double(), roundings=64)
    assert all(torch.equal(value, x_lg.state_dict()[name]) for name, value in before.items())
    assert x_lg.first_stage.training


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_16_bit_are_folded_in_32(model, dtype):
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    stored = model.to(dtype)
    fast = optimize(stored, device="cpu", dtype="float32", hole_aware=False)(image, mask)
    wide = optimize(copy.deepcopy(stored).float(), device="cpu", dtype="float32", hole_aware=False)(image, mask)
    assert torch.equal(fast, wide)


def test_known_pixels_of_float64_are_exact(model):
    image, mask = case("gen256", 1, 256, 256)
    fast = optimize(model, dtype="float32")
    for result in (fast(image, mask), fast(image, mask, holes=[(0, 256, 0, 256)])):
        assert result.dtype == torch.float64
        assert torch.equal(torch.where(mask != 0, image, result), image)
        assert not torch.equal(result, image)


def test_a_result_has_no_gradient_and_views_of_any_kind_are_read(model):
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    fast = optimize(model, dtype="float32")
    expected = fast(image, mask)
    assert not fast(image.clone().requires_grad_(), mask).requires_grad
    assert not fast(image.double().requires_grad_(), mask.double()).requires_grad
    unchanged = fast(image.clone().requires_grad_(), torch.zeros_like(mask), return_stages=True)
    assert not any(picture.requires_grad for picture in unchanged.merged)
    assert not fast(image.clone().requires_grad_(), torch.zeros_like(mask)).requires_grad
    negative = torch.complex(torch.zeros_like(image), -image).conj().imag
    assert negative.is_neg()
    assert torch.equal(negative, image)
    assert torch.equal(fast(negative, mask), expected)


def test_stages_of_a_restricted_run_are_merged_and_not_raw(model):
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    mask = torch.zeros_like(mask)
    mask[..., 40:60, 70:110] = 1
    with torch.no_grad():
        expected = model(image, mask, return_stages=True)
    stages = optimize(model)(image, mask, return_stages=True)
    assert (stages.coarse, stages.local, stages.refined, stages.raw) == (None, None, None, ())
    for ours, theirs in zip(stages.merged, expected.merged, strict=True):
        assert_accurate("merged", ours, theirs, roundings=2**13)


def test_empty_and_full_masks(model):
    image, _ = case("gen256", 1, 256, 256, torch.float32)
    fast = optimize(model)
    empty = torch.zeros(1, 1, 256, 256)
    result = fast(image, empty)
    assert torch.equal(result, image)
    assert result.data_ptr() != image.data_ptr()
    merged = fast(image, empty, return_stages=True).merged
    assert [torch.equal(m, image) for m in merged] == [True] * 3
    assert len({m.data_ptr() for m in (image, *merged)}) == 4
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(image.double(), torch.ones(1, 1, 256, 256).double())
    assert_same_pixels(fast(image, torch.ones(1, 1, 256, 256)), exact, torch.ones(1, 1, 256, 256))
    for holes in (None, [Rect(0, 9, 0, 9)]):
        assert fast(image[:0], empty[:0], holes=holes).shape == (0, 3, 256, 256)


def test_given_holes_are_used_instead_of_the_masks(model):
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    fast = optimize(model)
    everywhere = [Rect(0, 256, 0, 256)]
    assert_accurate("given holes", fast(image, mask, holes=everywhere), fast(image, mask), roundings=2**10)


@pytest.mark.parametrize(
    ("holes", "error", "message"),
    [
        ([Rect(30, 60, 40, 257)], ValueError, r"left < right <= 256, got holes\[0\] = Rect\(top=30"),
        ([Rect(-1, 60, 40, 90)], ValueError, "0 <= top"),
        ([Rect(30, 60, 40, 90), Rect(70, 60, 5, 9)], ValueError, r"holes\[1\]"),
        ([Rect(30, 60, 40, 40)], ValueError, "got holes"),
        ([Rect(40, 90, 30, 60)], ValueError, "contain every hole pixel of the mask, got 1100 outside"),
        ([Rect(30, 59, 40, 90)], ValueError, "got 50 outside them, the first at row 59, column 40"),
        ([], ValueError, "got 1500 outside"),
        ([(30, 60, 40)], TypeError, "of four integers"),
        ([Rect(30, 60.0, 40, 90)], TypeError, "of four integers"),
        ([7], TypeError, r"got holes\[0\] = 7"),
        (Rect(30, 60, 40, 90), TypeError, r"got holes\[0\] = 30"),
        (3, TypeError, "expected a sequence of Rect"),
    ],
)
@pytest.mark.parametrize("hole_aware", [True, False])
def test_holes_that_do_not_fit_are_refused(model, holes, error, message, hole_aware, request):
    fast = request.getfixturevalue("narrow_engines")[hole_aware]
    image, mask = torch.zeros(2, 3, 256, 256), torch.zeros(2, 1, 256, 256)
    mask[1, :, 30:60, 40:90] = 0.25  # what is not known is hole
    with pytest.raises(error, match=f"holes: expected .*{message}|holes: .*{message}"):
        fast(image, mask, holes=holes)


@pytest.fixture(scope="module")
def narrow_engines() -> dict[bool, Engine]:
    model = create_model("C", coarse_channels=1)
    return {aware: optimize(model, hole_aware=aware) for aware in (True, False)}


def test_holes_may_be_plain_tuples_and_overlap(narrow_engines):
    torch.manual_seed(0)
    image, mask = torch.rand(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
    mask[..., 30:60, 40:90] = 1
    holes = [(20, 50, 30, 95), (30, 60, 40, 90)]
    for engine in narrow_engines.values():
        assert_accurate("given holes", engine(image, mask, holes=holes), engine(image, mask), roundings=2**10)
        assert torch.equal(engine(image, torch.zeros_like(mask), holes=[]), image)


@pytest.mark.parametrize("hole_aware", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["known", "hole"])
def test_a_broken_input_is_not_hidden(model, hole_aware, value, where):
    image, mask = torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
    mask[..., 120:150, 30:70] = 1
    image[0, 1, 200 if where == "known" else 130, 40] = value
    hole = (mask > 0).expand_as(image)
    with torch.no_grad():
        assert not torch.isfinite(model(image, mask)[hole]).all()
    assert not torch.isfinite(optimize(model, hole_aware=hole_aware)(image, mask)[hole]).all()


def test_same_inputs_same_bits_and_earlier_results_stay(model):
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    fast = optimize(model)
    first = fast(image, mask)
    kept = first.clone()
    for seed in range(100):
        fast(image, random_mask(seed).float())
    assert torch.equal(first, kept)
    assert torch.equal(fast(image, mask), first)


@pytest.mark.once
def test_eight_threads_get_the_serial_results(model):
    image, _ = case("gen256", 1, 256, 256, torch.float32)
    fast = optimize(model)
    masks = [random_mask(seed).float() for seed in range(8)]
    serial = [fast(image, m) for m in masks]
    wrong = []

    def work(number: int) -> None:
        order = list(range(8)) * 7
        random.Random(number).shuffle(order)
        for i in order[:50]:
            if not torch.equal(fast(image, masks[i]), serial[i]):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_changed_weights_are_refused_and_a_gone_model_is_fine(model):
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    fast = optimize(model)
    expected = fast(image, mask)
    with torch.no_grad():
        model.net_l.out.bias.add_(1)
    with pytest.raises(LGNetError, match="weights changed or moved after optimize"):
        fast(image, mask)
    again = optimize(model)
    model.double()
    with pytest.raises(LGNetError, match="weights changed or moved"):
        again(image, mask)
    model.float()
    last = optimize(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    # The fixture still holds the model; the engine must not.
    assert gone() is None or all(r is not last for r in gc.get_referrers(gone()))
    assert (last(image, mask) - expected).abs().max() > 1e-4


def test_the_model_is_left_alone(model):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimize(model)(*case("gen256", 1, 256, 256, torch.float32))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": (255, 256)}, ValueError, r"size: expected positive multiples of 256, got \(255, 256\)"),
        ({"size": 256}, TypeError, r"size: expected two integers \(height, width\), got 256"),
        ({"size": (256.0, 256)}, TypeError, r"size: expected two integers \(height, width\), got \(256.0, 256\)"),
        ({"batch_size": 0}, ValueError, "batch_size: expected a positive integer, got 0"),
        ({"batch_size": True}, ValueError, "batch_size: expected a positive integer, got True"),
        ({"tune": float("nan")}, ValueError, "tune: expected a bool or a number of seconds, got nan"),
        ({"device": "meta"}, LGNetError, "device: expected one that computes, got 'meta'"),
        ({"hole_aware": "yes"}, TypeError, "hole_aware: expected a bool, got str"),
        ({"device": "cuda:99"}, LGNetError, "device: cuda:99 is not available"),
        ({"dtype": "int8"}, LGNetError, "dtype: expected 'auto', float16"),
    ],
)
def test_bad_arguments_of_optimize(model, arguments, error, message):
    with pytest.raises(error, match=message):
        optimize(model, **arguments)


@pytest.mark.parametrize("device", ["mps", "xpu", "vulkan"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(device):
    """Without the backends that PyTorch lists."""
    try:
        torch.zeros(1, device=device)
    except Exception:
        with pytest.raises(LGNetError, match=rf"^device: {device} is not available: .{{1,120}}$"):
            resolve_device(device)
    else:
        pytest.skip(f"{device} is there")


def test_a_numbered_cpu_is_the_cpu(model):
    fast = optimize(model, device="cpu:1")
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    torch.testing.assert_close(fast(image, mask), optimize(model, device="cpu")(image, mask), rtol=0, atol=0)


def test_bad_input_of_a_call(model):
    fast = optimize(model)
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with pytest.raises(ValueError, match="multiples of 256"):
        fast(image[..., :100], mask[..., :100])
    with pytest.raises(ValueError, match="expected device cpu as the engine, got meta"):
        fast(image.to("meta"), mask.to("meta"))
    with pytest.raises(TypeError, match=r"image: expected a dense tensor, got layout torch\.sparse_coo"):
        fast(image.to_sparse(), mask)
    with pytest.raises(TypeError, match="model: expected an LGNet"):
        optimize(nn.Identity())
    with pytest.raises(LGNetError, match="cannot be pickled"):
        pickle.dumps(fast)


def test_other_dtypes_of_input_come_back_as_they_were(model):
    image, mask = case("gen256", 1, 256, 256)
    fast = optimize(model, dtype="float32")
    single = fast(image.float(), mask.float())
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        result = fast(image.to(dtype), mask.to(dtype))
        assert result.dtype == dtype
        assert (result.float() - single).abs().max() < 0.1


def test_shapes_come_and_go_and_are_bounded(model):
    fast = optimize(model)
    for batch in range(1, SHAPES_KEPT + 4):
        image, mask = case("gen256", batch, 256, 256, torch.float32)
        result = fast(image, mask)
    with torch.no_grad():
        assert_accurate("result", result, model(image, mask), roundings=2**14)
    assert len(fast._shapes) == SHAPES_KEPT


@needs_extension
def test_a_size_that_the_memory_cannot_hold_is_refused(monkeypatch):
    """Before the first call, which the system would end."""
    monkeypatch.setattr(engine_module, "available_memory", lambda device: 1 << 20)
    with pytest.raises(OutOfMemoryError, match="^size, batch_size: its buffers take"):
        optimize(create_model("lgnet_demo", **NARROW).eval(), size=(512, 512), device="cpu", dtype="float32")


@needs_extension
def test_buffers_that_no_run_has_taken_are_no_memory_to_be_freed(monkeypatch):
    fast = optimize(create_model("lgnet_demo", **NARROW).eval(), size=(512, 512), device="cpu", dtype="float32")
    own = fast._first.executor.buffer_bytes
    monkeypatch.setattr(engine_module, "available_memory", lambda device: own)
    larger = torch.zeros(1, 3, 512, 768), torch.ones(1, 1, 512, 768)
    with pytest.raises(OutOfMemoryError, match="^image: its buffers take"):
        fast(*larger)
    fast.warmup()
    assert fast(*larger).shape == larger[0].shape  # what the first run has taken is freed for it


def test_plain_pytorch_runs_what_the_extension_cannot(model, monkeypatch, caplog):
    monkeypatch.setattr(CpuExecutor, "unavailable_reason", staticmethod(lambda: "no compiler today"))
    with caplog.at_level(logging.INFO, logger="lgnet_fast"):
        fast = optimize(model)
    assert isinstance(fast._first.executor, ModelExecutor)
    assert "the model runs in plain PyTorch: no compiler today" in caplog.messages
    image, mask = case("gen256", 1, 256, 256, torch.float32)
    with torch.no_grad():
        assert_accurate("plain", fast(image, mask), model(image, mask), roundings=2**13)
