"""Products of bf16 pairs, feature maps of bf16, and float32 by three products of bf16."""

from __future__ import annotations

import pytest
import torch

from lgnet_fast import create_model, native
from lgnet_fast.engine.arena import plan_arena
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu import choice as cpu_choice
from lgnet_fast.engine.cpu import executor as cpu_executor
from lgnet_fast.engine.cpu import weights as cpu_weights
from lgnet_fast.engine.cpu.choice import choice_of
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.plan import PICTURE, Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.reference.lgnet import LGNet
from tests.engine_cpu_support import (
    HOLES,
    ISAS,
    assert_close,
    choices,
    picture,
    plan_of,
    skip_without_tiles,
    truth,
)
from tests.support import instruction_sets

pytestmark = pytest.mark.skipif(
    CpuExecutor.unavailable_reason() is not None, reason=str(CpuExecutor.unavailable_reason())
)


@pytest.fixture
def pairs(isa: str) -> str:
    """Every instruction set with products of bf16 pairs."""
    if not native.multiplies("bf16"):
        pytest.skip("no products of bf16 pairs")
    return isa


def in_pairs(plan: Plan, kernel: str) -> dict[str, str]:
    """`kernel` wherever it can run, with products of bf16 pairs wherever there are some."""
    return {step.name: choice_of(step, choices(plan, kernel, "bf16")[step.name], "bf16") for step in plan.steps}


def with_maps_of_both_kinds(
    plan: Plan, chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[CpuExecutor, CpuExecutor]:
    """The executor, and one with the same weights whose maps are all float32."""
    stored = CpuExecutor.of(plan, torch.bfloat16, chosen)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_executor, "buffers_of_pairs", lambda *_: frozenset())
        full = CpuExecutor(plan, stored.weights)
    assert stored.bf16_buffers
    assert not full.bf16_buffers
    return stored, full


@pytest.mark.parametrize("mixed", [False, True], ids=["pairs", "every second step in float32"])
@pytest.mark.parametrize("channels", [3, 16])
def test_direct_products_round_maps_of_float32_as_they_are_stored_in_bf16(pairs, channels, mixed, monkeypatch):
    """The same bits, dense and in regions: without residuals and attention nothing but rounded values is read."""
    plan = plan_of(channels, "C")
    chosen = in_pairs(plan, "direct")
    if mixed:
        chosen = {
            name: text.removesuffix("/bf16") if i % 2 else text for i, (name, text) in enumerate(chosen.items())
        }
    stored, full = with_maps_of_both_kinds(plan, chosen, monkeypatch)
    image, mask = picture(1, 256, 256)
    assert torch.equal(stored._run(image, mask, None, [], poison=True)[0], full.run(image, mask)[0])
    for holes in (HOLES["several"], HOLES["edges"], [Rect(3, 251, 6, 250)]):
        regions = [step.regions for step in plan.restricted(holes).steps]
        got = stored._run(image, mask, None, stored._listed(regions), poison=True)[0]
        inside = torch.zeros_like(mask, dtype=torch.bool)
        for top, bottom, left, right in holes:
            inside[..., top:bottom, left:right] = True
        inside = inside.expand_as(got)
        assert torch.equal(got[inside], full.run(image, mask, None, regions)[0][inside])
    two = plan.resized(2, 256, 256)
    image, mask = picture(2, 256, 256, seed=4)
    assert torch.equal(
        stored.resized(two)._run(image, mask, None, [], poison=True)[0][1:], stored.run(image[1:], mask[1:])[0]
    )


@pytest.mark.parametrize("kernel", ["direct", "winograd2"])
@pytest.mark.parametrize("channels", [5, 16])
def test_maps_of_bf16_add_little_to_the_error(pairs, channels, kernel, threads, monkeypatch):
    """Of whole networks, with residuals and attention."""
    skip_without_tiles(kernel, "bf16")
    plan = plan_of(channels)
    expected = truth((channels,), 2, 256, 256)[0]
    errors = []
    for executor in with_maps_of_both_kinds(plan, in_pairs(plan, kernel), monkeypatch):
        two = executor.resized(plan.resized(2, 256, 256))
        got = two._run(*picture(2, 256, 256), None, [], poison=True)[0]
        assert_close(got.bfloat16(), expected, rms=2.6, roundings=64)
        assert torch.equal(two.run(*picture(2, 256, 256))[0], got)
        errors.append((got.double() - expected).square().mean().sqrt())
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_which_maps_are_stored_as_bf16(pairs):
    plan = plan_of(16)
    in_float = {step.source.buffer for step in plan.steps} & {PICTURE}
    raw = {step.stores[0].view.buffer for step in plan.steps if step.merges}
    executor = CpuExecutor.of(plan, torch.bfloat16, in_pairs(plan, "direct"))
    chosen = executor.weights.choices
    last = {s.source.buffer for s in plan.steps if chosen[s.name].products != "bf16"}
    assert len(last) == (0 if native.library().multiplies_by_tiles() else 3)  # of stages, by vectors
    assert executor.bf16_buffers == plan.buffers.keys() - in_float - raw - last
    # What a product of float32 reads, as source or residual, is float32.
    one = next(step for step in plan.steps if step.residual is not None)
    mixed = CpuExecutor.of(plan, torch.bfloat16, executor.choices | {one.name: "direct"})
    assert executor.bf16_buffers - mixed.bf16_buffers == {one.source.buffer, one.residual.buffer}
    assert not CpuExecutor.of(plan).bf16_buffers
    image, mask = picture(1, 256, 256)
    mixed.run(image, mask)
    assert_close(mixed.run(image, mask)[0].bfloat16(), truth((16,), 1, 256, 256)[0], rms=2.6, roundings=64)


@pytest.mark.skipif("amx_bf16" not in ISAS, reason="no matrix tiles on this CPU")
def test_maps_of_bf16_take_less_memory():
    plan = plan_of(16)
    image, mask = picture(1, 256, 256)
    executors = [CpuExecutor.of(plan, dtype) for dtype in (torch.bfloat16, torch.float32)]
    sizes = [plan_arena(plan, halves=executor.bf16_buffers).size for executor in executors]
    assert 0.5 <= sizes[0] / sizes[1] < 0.65  # the picture and the raw ones stay, beside few channels
    for executor in executors:
        executor.run(image, mask)
    assert executors[0].workspace_bytes < executors[1].workspace_bytes


@pytest.mark.parametrize("name", ["lgnet_light", "lgnet_small"])
def test_maps_of_bf16_of_the_light_and_the_demo_model(pairs, name, monkeypatch):
    torch.manual_seed(0)
    plan = build_plan(plan_stages(create_model(name).eval()), 1, 256, 256)
    image, mask = picture(1, 256, 256)
    exact = CpuExecutor.of(plan).run(image, mask)[0]
    chosen = CpuExecutor.of(plan, torch.bfloat16).choices
    errors = [
        (executor._run(image, mask, None, [], poison=True)[0] - exact).square().mean().sqrt()
        for executor in with_maps_of_both_kinds(plan, chosen, monkeypatch)
    ]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_a_map_of_bf16_needs_products_of_pairs():
    library = native.library()
    step = library.ConvStep()
    step.source = library.MapSpec(0, 8, 8, 4, 4, True)
    step.targets = [library.TargetSpec(1024, 4, 0, False)]
    with pytest.raises(ValueError, match="source: expected float32 for products other than bf16, got bfloat16"):
        library.Program(1, 8, 8, 2048, 0, [step])


@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="no bf16 products on this CPU")
def test_bf16_is_close():
    plan = plan_of(16)
    result, raw = CpuExecutor.of(plan, torch.bfloat16).run(*picture(1, 256, 256))
    expected, expected_raw = truth((16,), 1, 256, 256)
    assert_close(result.bfloat16(), expected, rms=2.6, roundings=64)
    for got, want in zip(raw, expected_raw, strict=True):
        assert_close(got.bfloat16(), want, rms=6.4, roundings=128)


@pytest.mark.skipif("amx_bf16" not in ISAS, reason="no matrix tiles on this CPU")
def test_matrix_tiles_multiply_every_layer_and_round_less():
    """Direct products of bf16 pairs throughout; their error is below that of the transforms which vectors use."""
    plan, expected = plan_of(16), truth((16,), 1, 256, 256)[0]
    errors = {}
    for isa, kernels in (
        ("amx_bf16", {"direct/bf16", "narrow/bf16", "attention/bf16"}),
        ("avx512_bf16", {"direct/bf16", "winograd2/bf16", "narrow", "attention/bf16"}),
    ):
        native.library().set_isa(isa)
        try:
            executor = CpuExecutor.of(plan, torch.bfloat16)
            assert set(executor.choices.values()) == kernels
            errors[isa] = (executor.run(*picture(1, 256, 256))[0].double() - expected.double()).square().mean()
        finally:
            native.library().set_isa("auto")
    assert 0 < errors["amx_bf16"] < errors["avx512_bf16"]


@pytest.fixture
def bf16x3():
    """The fastest instruction set here, which must have products of bf16x3."""
    library = native.library()
    library.set_isa(instruction_sets()[-1])
    if not native.multiplies("bf16x3"):
        library.set_isa("auto")
        pytest.skip("no products of bf16x3")
    yield
    library.set_isa("auto")


@pytest.mark.usefixtures("bf16x3")
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_float32_by_three_products_of_bf16(threads):
    """Float32 products keep eight bits more, products of bf16 eight bits less."""
    plan = plan_of(5)
    image, mask = picture(1, 256, 256)
    expected, _ = truth((5,), 1, 256, 256)

    def error(executor):
        return (executor.run(image, mask)[0].double() - expected).square().mean().sqrt().item()

    executor = CpuExecutor.of(plan)
    assert set(executor.choices.values()) <= {"direct/bf16x3", "narrow/bf16x3", "narrow", "attention/bf16x3"}
    assert executor.choices["net_l.block0.first"] == "direct/bf16x3"
    plain = CpuExecutor.of(plan, choices=choices(plan, "direct"))
    pairs = CpuExecutor.of(plan, torch.bfloat16)
    assert 0 < error(executor) < 64 * error(plain)
    assert error(executor) < error(pairs) / 100
    assert torch.equal(executor.run(image, mask)[0], executor.run(image, mask)[0])


@pytest.mark.usefixtures("bf16x3")
def test_bf16x3_keeps_sixteen_bits_of_both_factors():
    """Ones plus small parts of 2^-9 to 2^-15: one product of bf16 would lose them all."""
    weights = cpu_weights.Packing.of("bf16x3")
    depth, channels = 8, 3
    exact = 1 + 2.0 ** -torch.arange(9, 16).repeat(4)[: depth * channels].view(1, depth, channels)
    into = torch.empty(2, 1, depth * weights.columns(channels), dtype=torch.bfloat16)
    weights.pack(into, depth, channels, lambda begin, end, u: u.copy_(exact[:, begin:end]))
    high, low = into.float()
    assert torch.equal((high + low).unique(), torch.cat((torch.zeros(1), exact.unique())))


@pytest.mark.usefixtures("bf16x3")
@pytest.mark.parametrize("place", ["", "mkldnn", "mkldnn.conv"])
def test_full_precision_is_kept_where_the_program_asks_pytorch_for_it(place):
    settings = torch.backends
    if not hasattr(settings.mkldnn, "conv"):
        pytest.skip("this PyTorch has no fp32_precision")
    for name in filter(None, place.split(".")):
        settings = getattr(settings, name)
    plan = plan_of(5)
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        chosen = cpu_choice.choose_kernels(plan, torch.float32)
    finally:
        settings.fp32_precision = before
    assert not any("bf16" in choice for choice in chosen.values())
    assert any("bf16x3" in choice for choice in cpu_choice.choose_kernels(plan, torch.float32).values())


def test_products_have_tiles_up_to_a_size(isa):
    plan = plan_of(5)
    sizes = {products: native.largest_tile(products) for products in ("float32", "bf16", "bf16x3")}
    by_tiles = isa == "amx_bf16"
    assert sizes == {
        "float32": 4,
        "bf16": (1 if by_tiles else 2) if native.multiplies("bf16") else 0,
        "bf16x3": 1 if by_tiles else 0,
    }
    for products in ("bf16", "bf16x3"):
        if native.multiplies(products):
            size = 2 * sizes[products]
            chosen = choices(plan, "direct") | {"net_l.block0.first": f"winograd{size}/{products}"}
            with pytest.raises(ValueError, match=f"tile: expected at most {size // 2} for such products, got {size}"):
                CpuExecutor.of(plan, choices=chosen)


def test_an_odd_number_of_channels_has_no_pairs_in_a_last_step(isa):
    if not native.multiplies("bf16"):
        pytest.skip("no products of bf16 pairs")
    network = LGNet(coarse_channels=2, local_channels=5, global_channels=2, backend="eager")
    plan = build_plan(plan_stages(network.eval()), 1, 256, 256)
    executor = CpuExecutor.of(plan, torch.bfloat16)
    assert executor.choices["net_l.out"] == "narrow"
    tiles = native.library().multiplies_by_tiles()
    assert executor.choices["net_g.d1"] == ("narrow/bf16" if tiles else "narrow")
    with pytest.raises(ValueError, match="expected narrow for the 5 channels of net_l.out, got narrow/bf16"):
        CpuExecutor.of(plan, torch.bfloat16, executor.choices | {"net_l.out": "narrow/bf16"})
