"""The CPU executor against the plan run in plain PyTorch, float64."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lgnet_fast import create_model, native
from lgnet_fast.engine import cpu_choice, cpu_executor, cpu_kernels, cpu_weights
from lgnet_fast.engine.arena import lifetimes, plan_arena
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu_choice import choice_of
from lgnet_fast.engine.cpu_executor import CpuExecutor
from lgnet_fast.engine.cpu_weights import CpuWeights
from lgnet_fast.engine.plan import PICTURE, Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.reference.attention import attention_block
from lgnet_fast.reference.lgnet import LGNet
from tests.support import assert_accurate, case, instruction_sets, released_state

pytestmark = pytest.mark.skipif(
    CpuExecutor.unavailable_reason() is not None, reason=str(CpuExecutor.unavailable_reason())
)

ISAS = instruction_sets()
KERNELS = ("direct", "winograd2", "winograd4")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@cache
def plan_of(
    channels: int,
    stages: str = "C+L+G_att",
    variant: str = "released",
    local: int | None = None,
    cap: int | None = None,
) -> Plan:
    """A plan, float64, of a network whose features have deviation about one."""
    torch.manual_seed(0)
    model = LGNet(
        stages,
        variant,
        coarse_channels=channels,
        local_channels=local or channels,
        global_channels=channels,
        max_channels=cap,
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        model.train()(*picture(1, 256, 256))
    return build_plan(plan_stages(model.eval()), 1, 256, 256)


def picture(batch: int, height: int, width: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 3, height, width, generator=rng, dtype=torch.float64) * 2 - 1
    mask = torch.zeros(batch, 1, height, width, dtype=torch.float64)
    mask[:, :, height // 4 : height * 3 // 4, width // 5 : width // 2] = 1
    mask[:, :, :7, -9:] = 1
    return image, mask


@cache
def truth(plan: tuple[object, ...], batch: int, height: int, width: int) -> tuple[Tensor, list[Tensor]]:
    dense = plan_of(*plan)  # type: ignore[arg-type]
    executor = TorchExecutor(dense).resized(dense.resized(batch, height, width))
    return executor.run(*picture(batch, height, width))


def choices(plan: Plan, kernel: str) -> dict[str, str]:
    """`kernel` wherever it can run."""
    able = {step.name: cpu_kernels.candidates(step) for step in plan.steps}
    return {name: kernel if kernel in options else options[0] for name, options in able.items()}


def assert_close(got: Tensor, expected: Tensor, rms: float = 170, roundings: float = 2**13) -> None:
    """A whole network, where Winograd may be used: root mean square and worst error, in roundings of the scale."""
    assert_accurate("worst", got, expected, roundings=roundings)
    error = (got.double() - expected).square().mean().sqrt()
    assert error <= rms * torch.finfo(got.dtype).eps * expected.abs().max()


def check(
    plan: tuple[object, ...], executor: CpuExecutor, batch: int = 1, height: int = 256, width: int = 256
) -> None:
    result, raw, _ = executor._run(*picture(batch, height, width), None, [], poison=True)
    expected, expected_raw = truth(plan, batch, height, width)
    assert_close(result, expected)
    for got, want in zip(raw, expected_raw, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", [5, 16])
def test_every_kernel(channels, kernel, threads):
    plan = plan_of(channels)
    check((channels,), CpuExecutor.of(plan, choices=choices(plan, kernel)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_instruction_set(isa, kernel):
    plan = plan_of(5)
    check((5,), CpuExecutor.of(plan, choices=choices(plan, kernel)))


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 256, 512), (2, 512, 256)], ids=str)
def test_resized_shares_the_weights(shape):
    plan = plan_of(5)
    executor = CpuExecutor.of(plan)
    other = executor.resized(plan.resized(*shape))
    assert other.weights is executor.weights
    check((5,), other, *shape)
    check((5,), executor)


@pytest.mark.parametrize("stages", ["C", "C+L", "C+G_att", "C+G+G_att", "C+L+G"])
def test_ablations(stages):
    check((5, stages), CpuExecutor.of(plan_of(5, stages)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_paper_s_attention_and_a_width_of_48(kernel):
    key = (48, "C+G_att", "paper")
    plan = plan_of(*key)
    check(key, CpuExecutor.of(plan, choices=choices(plan, kernel)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_capped_widths(kernel):
    key = (16, "C+G_att", "released", None, 32)
    plan = plan_of(*key)
    assert max(buffer.channels for buffer in plan.buffers.values()) == 64
    check(key, CpuExecutor.of(plan, choices=choices(plan, kernel)))


def test_a_given_start_is_painted_into_the_hole():
    plan = plan_of(5, "C+L")
    image, mask = picture(1, 256, 256)
    start = torch.rand_like(image)
    expected, _ = TorchExecutor(plan).run(image, mask, start)
    assert_close(CpuExecutor.of(plan).run(image, mask, start)[0], expected)


HOLES = {
    "centre": [Rect(100, 161, 90, 150)],
    "corner": [Rect(0, 33, 0, 17)],
    "last pixel": [Rect(255, 256, 255, 256)],
    "edges": [Rect(0, 1, 100, 103), Rect(120, 131, 0, 5), Rect(250, 256, 60, 200)],
    "several": [Rect(10, 20, 10, 30), Rect(200, 230, 190, 250), Rect(13, 90, 200, 207)],
    "steps": [Rect(32 * i, 32 * i + 40, 24 * i, 24 * i + 30) for i in range(7)],
    "everywhere": [Rect(0, 256, 0, 256)],
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("holes", HOLES, ids=str)
def test_regions_give_the_same_pixels(holes, kernel):
    plan = plan_of(5)
    image, _ = picture(2, 256, 256)
    mask = torch.zeros(2, 1, 256, 256, dtype=torch.float64)
    for top, bottom, left, right in HOLES[holes]:
        mask[:, :, top:bottom, left:right] = 1
    dense = plan.resized(2, 256, 256)
    executor = CpuExecutor.of(plan, choices=choices(plan, kernel)).resized(dense)
    expected, _ = executor.run(image, mask)
    regions = [step.regions for step in dense.restricted(HOLES[holes]).steps]
    got, _, _ = executor._run(image, mask, None, executor._listed(regions), poison=True)
    assert_close(got, expected.double(), rms=42, roundings=2**11)
    outside = (mask == 0).expand_as(got)
    assert torch.equal(got[outside], image.float()[outside])


def test_regions_are_prepared_once():
    plan = plan_of(5)
    executor = CpuExecutor.of(plan)
    regions = [step.regions for step in plan.restricted(HOLES["several"]).steps]
    assert executor._listed(regions) is executor._listed(list(regions))
    for y in range(40):
        executor._listed([step.regions for step in plan.restricted([Rect(y, y + 9, 0, 9)]).steps])
    assert len(executor._lists) <= 16


def test_regions_on_every_instruction_set(isa):
    plan = plan_of(5)
    image, mask = picture(1, 256, 256)
    executor = CpuExecutor.of(plan)
    regions = [s.regions for s in plan.restricted([Rect(64, 192, 51, 128), Rect(0, 7, 247, 256)]).steps]
    got, _, _ = executor._run(image, mask, None, executor._listed(regions), poison=True)
    assert_close(got, truth((5,), 1, 256, 256)[0])


def test_regions_in_pairs_on_every_instruction_set(isa):
    """Small holes run from patches, a large one from padded maps; what was not computed is NaN."""
    if not native.multiplies("bf16"):
        pytest.skip("no products of bf16 pairs")
    plan = plan_of(5)
    image, mask = picture(1, 256, 256)
    executor = CpuExecutor.of(plan, torch.bfloat16)
    expected, _ = executor.run(image, mask)
    for holes in ([Rect(64, 192, 51, 128), Rect(0, 7, 247, 256)], [Rect(3, 251, 6, 250)]):
        regions = [s.regions for s in executor.restricted(plan, holes).steps]
        got, _, _ = executor._run(image, mask, None, executor._listed(regions), poison=True)
        hole = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
        for top, bottom, left, right in holes:
            hole[..., top:bottom, left:right] = True
        hole = hole.expand_as(got)
        assert_close(got[hole].bfloat16(), expected[hole].double(), rms=2.6, roundings=64)


@pytest.mark.parametrize("threads", [1], indirect=True)  # attention splits its keys among threads
def test_direct_kernels_give_the_same_bits_whether_regions_are_joined_or_not(isa, threads):
    plan = plan_of(5)
    image, _ = picture(1, 256, 256)
    executor = CpuExecutor.of(plan, choices=choices(plan, "direct"))
    for holes in (HOLES["several"], HOLES["steps"]):
        mask = torch.zeros(1, 1, 256, 256, dtype=torch.float64)
        for top, bottom, left, right in holes:
            mask[:, :, top:bottom, left:right] = 1
        dense, _ = executor.run(image, mask)
        for region_macs in (0, plan.total_macs() / 2000, plan.total_macs()):
            regions = [step.regions for step in plan.restricted(holes, region_macs).steps]
            assert torch.equal(executor.run(image, mask, None, regions)[0], dense)


@pytest.mark.parametrize("threads", [1], indirect=True)  # attention splits its keys among threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_else_is_computed_changes_no_bit(isa, dtype, threads):
    """A sample alone and beside another one, whose hole is larger: chunks, bands and the rows of tiles are others.
    Winograd's tiles begin at the hole's corner, so direct kernels."""
    torch.manual_seed(0)
    plan = build_plan(plan_stages(create_model("lgnet_small").eval()), 1, 256, 256)
    tiles = native.library().multiplies_by_tiles()
    executor = CpuExecutor.of(plan, dtype, None if tiles else choices(plan, "direct"))
    image, mask = picture(2, 256, 256)
    regions = [
        [step.regions for step in executor.restricted(plan, [hole]).steps]
        for hole in (Rect(100, 130, 10, 60), Rect(40, 140, 60, 180))
    ]
    both, _ = executor.resized(plan.resized(2, 256, 256)).run_each(image, mask, None, regions)
    for sample, own in enumerate(regions):
        part = slice(sample, sample + 1)
        inside = torch.zeros(1, 3, 256, 256, dtype=torch.bool)
        inside[(..., *own[-1][0].slices)] = True
        alone = executor.run(image[part], mask[part], None, own)[0]
        assert torch.equal(both[part][inside], alone[inside])


def test_each_sample_has_regions_of_its_own():
    plan = plan_of(5).resized(3, 256, 256)
    image, _ = picture(3, 256, 256)
    mask = torch.zeros(3, 1, 256, 256, dtype=torch.float64)
    own = [HOLES["several"], [], HOLES["corner"]]
    for sample, holes in enumerate(own):
        for top, bottom, left, right in holes:
            mask[sample, :, top:bottom, left:right] = 1
    executor = CpuExecutor.of(plan_of(5)).resized(plan)
    expected, _ = executor.run(image, mask)
    regions = [[step.regions for step in plan.restricted(holes).steps] for holes in own]
    for given in (regions, [regions[0], None, regions[2]]):
        got, _ = executor.run_each(image, mask, None, given)
        assert_close(got, expected.double(), rms=42, roundings=2**11)
        assert torch.equal(got[1], image[1].float())
    # Regions of other samples change nothing: tiles are not shared, nor are buffers of samples.
    alone, _ = CpuExecutor.of(plan_of(5)).run(image[:1], mask[:1], None, regions[0])
    assert_close(executor.run_each(image, mask, None, regions)[0][:1], alone.double(), rms=8, roundings=2**7)


def test_no_region_at_all_returns_the_picture():
    plan = plan_of(5)
    image, _ = picture(1, 256, 256)
    got, _ = CpuExecutor.of(plan).run(image, torch.zeros(1, 1, 256, 256), None, [()] * len(plan.steps))
    assert torch.equal(got, image.float())


def test_same_bits_every_time_and_in_eight_threads_at_once(threads):
    plan = plan_of(16)
    executor = CpuExecutor.of(plan)
    pictures = [tuple(t.float() for t in picture(1, 256, 256, seed)) for seed in range(8)]
    expected = [executor.run(*p)[0] for p in pictures]
    assert all(torch.equal(executor.run(*p)[0], e) for p, e in zip(pictures, expected, strict=True))
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(2):
            got[i] = executor.run(*pictures[i])[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(8))


def test_holes_whose_cones_overlap_give_the_same_bits_every_time(threads):
    # If a pixel were computed twice, with other tiles, its rounding would depend on which thread is last.
    plan = plan_of(16)
    holes = [Rect(0, 50, 0, 62), Rect(70, 150, 20, 180), Rect(170, 200, 100, 256)]
    image, _ = (t.float() for t in picture(1, 256, 256))
    mask = torch.zeros(1, 1, 256, 256)
    for top, bottom, left, right in holes:
        mask[:, :, top:bottom, left:right] = 1
    restricted = plan.restricted(holes)
    regions = [step.regions for step in restricted.steps]
    assert max(map(len, regions)) > 1
    executor = CpuExecutor.of(plan)
    first, _ = executor.run(image, mask, None, regions)
    assert all(torch.equal(executor.run(image, mask, None, regions)[0], first) for _ in range(10))


def test_any_strides_and_inputs_unchanged():
    executor = CpuExecutor.of(plan_of(5))
    image, mask = (t.float() for t in picture(1, 256, 256))
    expected, _ = executor.run(image, mask)
    strided = image.transpose(2, 3).contiguous().transpose(2, 3)
    last = image.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(1, 1, 256, 512)
    wide[..., ::2] = mask
    before = image.clone(), mask.clone()
    for variant in (strided, last):
        assert torch.equal(executor.run(variant, wide[..., ::2])[0], expected)
    assert torch.equal(image, before[0])
    assert torch.equal(mask, before[1])


def test_state_restores_without_packing(monkeypatch):
    plan = plan_of(5)
    executor = CpuExecutor.of(plan, choices=choices(plan, "winograd4"))
    image, mask = picture(1, 256, 256)
    monkeypatch.setattr(cpu_weights, "_group_rows", None)
    state = executor.state()
    state["data"] = state["data"].clone()
    loaded = CpuExecutor(plan, CpuWeights.from_state(plan.without_weights(), state))
    assert loaded.choices == executor.choices
    assert torch.equal(loaded.run(image, mask)[0], executor.run(image, mask)[0])
    with pytest.raises(ValueError, match="another network"):
        CpuWeights.from_state(plan_of(5, "C+L").without_weights(), state)
    with pytest.raises(ValueError, match="bytes of weights"):
        CpuWeights.from_state(plan_of(16).without_weights(), state)
    with pytest.raises(ValueError, match="packed for"):
        CpuWeights.from_state(plan.without_weights(), {**state, "isa": "other"})


def test_wrong_arguments_are_refused():
    plan = plan_of(5)
    with pytest.raises(ValueError, match="dtype"):
        CpuExecutor.of(plan, torch.float16)
    executor = CpuExecutor.of(plan)
    image, mask = picture(1, 256, 256)
    with pytest.raises(ValueError, match=r"image: expected shape \[1, 3, 256, 256\]"):
        executor.run(image[..., :128], mask)
    with pytest.raises(ValueError, match="mask: expected shape"):
        executor.run(image, mask[..., :128])


@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("every", [0, 1, 2], ids=["floats", "halves", "both"])
def test_buffers_that_live_together_do_not_overlap(every, channels):
    plan = plan_of(channels)
    halves = list(plan.buffers)[::every] if every else []
    arena, spans = plan_arena(plan, halves=halves), lifetimes(plan)
    sizes = {name: b.height * b.width * b.channels / (2 if name in halves else 1) for name, b in plan.buffers.items()}
    for a in spans:
        for b in spans:
            if a < b and spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]:
                assert (
                    arena.offsets[a] + sizes[a] <= arena.offsets[b] or arena.offsets[b] + sizes[b] <= arena.offsets[a]
                )
    assert arena.size < 0.5 * sum(sizes.values())


# --- feature maps of bf16 -------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(isa: str) -> str:
    """Every instruction set with products of bf16 pairs."""
    if not native.multiplies("bf16"):
        pytest.skip("no products of bf16 pairs")
    return isa


def in_pairs(plan: Plan, kernel: str) -> dict[str, str]:
    """`kernel` wherever it can run, with products of bf16 pairs wherever there are some."""
    return {step.name: choice_of(step, choices(plan, kernel)[step.name], "bf16") for step in plan.steps}


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


@pytest.mark.usefixtures("bf16x3")
def test_bf16x3_has_tiles_of_one_output():
    plan = plan_of(5)
    chosen = CpuExecutor.of(plan).choices
    with pytest.raises(ValueError, match="tile: expected 1 for bf16x3, got 2"):
        CpuExecutor.of(plan, choices=chosen | {"net_l.block0.first": "winograd2/bf16x3"})


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


@pytest.mark.slow(reason="packs the full network a second time: test_engine.py runs it through the engine")
def test_lgnet_with_the_recipe_s_weights():
    """The whole network: 99% of the hole's 8-bit samples equal, none off by more than one, RMS error at most 1e-4."""
    model = LGNet.from_released({net: released_state(net, torch.float32) for net in ("G1", "G2", "G3")})
    plan = build_plan(plan_stages(model), 1, 256, 256)
    image, mask = case("gen256", 1, 256, 256)
    executor = CpuExecutor.of(plan)
    got, _ = executor.run(image, mask)
    weights = sum(4 * step.weight.numel() for step in plan.steps)
    assert executor.packed_bytes + executor.workspace_bytes <= 1.3 * weights + (150 << 20)
    expected = model.double()(image, mask).detach()
    hole = mask.expand_as(image) > 0
    error = (got.double() - expected)[hole]
    levels = (((t[hole].double() + 1) * 127.5).round() for t in (got, expected))
    off = (next(levels) - next(levels)).abs()
    assert (off == 0).double().mean() >= 0.99
    assert off.max() <= 1
    assert error.square().mean().sqrt() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_broken_weight_is_not_hidden(isa, kernel, dtype):
    """NaN or infinity in one weight of each kind of step, in a run restricted to the hole."""
    if dtype == torch.bfloat16 and not native.multiplies("bf16"):
        pytest.skip("no products of bf16 pairs")
    plan = plan_of(2)
    image, mask = picture(1, 256, 256)
    mask = torch.zeros_like(mask)
    mask[..., 60:100, 80:130] = 1
    hole = (mask > 0).expand_as(image)
    regions = [step.regions for step in plan.restricted([Rect(60, 100, 80, 130)]).steps]
    chosen = choices(plan, kernel)
    if dtype == torch.bfloat16:
        chosen = {name: f"{own}/bf16" for name, own in chosen.items()}
    broken = {  # the index of a weight that reads more than padding
        "net_c.e2": (0, 0, 1, 2),
        "net_c.d4": (1, 0, 1, 1),
        "net_l.block3.first": (1, 1, 0, 2),
        "net_l.up1": (0, 1, 2, 0),
        "net_g.e5": (0, 3, 2, 1),
        "net_g.attention_d4": (1, 0, 0, 0),
        "net_g.d1": (1, 2, 2, 2),
    }
    assert torch.isfinite(CpuExecutor.of(plan, dtype, chosen).run(image, mask, None, regions)[0]).all()
    # A third of them for each kernel and instruction set; together they cover every pair of kernel and step.
    turn = ISAS.index(isa) + KERNELS.index(kernel)
    for number, (name, index) in enumerate(broken.items()):
        if (number + turn) % 3:
            continue
        value = (torch.nan, torch.inf, -torch.inf)[number % 3]
        steps = []
        for step in plan.steps:
            if step.name == name:
                weight = step.weight.clone()
                weight[index] = value
                step = replace(step, weight=weight)
            steps.append(step)
        result, _ = CpuExecutor.of(replace(plan, steps=tuple(steps)), dtype, chosen).run(image, mask, None, regions)
        assert not torch.isfinite(result[hole]).all(), (name, value)
        assert torch.equal(result[~hole], image.float()[~hole])


class AttentionAlone:
    """A program of an attention block on (picture, mask), [2, 4, H, W], whose result becomes the picture.

    Of more or fewer than four channels: the block's features are a 1x1 convolution of (picture, mask), and its first
    three channels are the result. `scale`: of the features.
    """

    def __init__(
        self,
        variant: str,
        products: str = "float32",
        channels: int = 4,
        size: tuple[int, int] = (11, 13),
        scale: float = 1.0,
    ) -> None:
        library = native.library()
        rng = torch.Generator().manual_seed(3)
        self.size = batch, _, height, width = 2, channels, *size
        self.variant = variant
        self.image = torch.randn(batch, 3, height, width, generator=rng)
        self.mask = torch.rand(batch, 1, height, width, generator=rng)
        self.weight = torch.randn(channels, 2 * channels, 1, 1, generator=rng) / (channels / 4) ** 0.5
        self.bias = torch.randn(channels, generator=rng)
        self.expansion = torch.randn(4, channels, generator=rng) * scale if channels != 4 or scale != 1 else None
        pixels, self.packed = batch * height * width, []
        begin = 0 if self.expansion is None else 4 * pixels
        attention = library.AttentionStep()
        attention.source = library.MapSpec(begin, height, width, channels, channels, False)
        attention.released = variant == "released"
        attention.products = library.Products.__members__[products]
        attention.weight, attention.bias = self.weight.data_ptr(), self.bias.data_ptr()
        end = begin + pixels * channels
        attention.targets = [library.TargetSpec(end, channels, 0, False)]
        attention.out_height, attention.out_width = height, width
        # A convolution with the identity: NaN stays in its pixel.
        steps = [attention, self.conv((end, channels), torch.eye(channels, 4), (0, 4))]
        if self.expansion is not None:
            steps.insert(0, self.conv((0, 4), self.expansion, (begin, channels)))
        self.program = library.Program(batch, height, width, end + pixels * channels, 0, steps)

    def conv(self, source: tuple[int, int], weight: Tensor, target: tuple[int, int]) -> object:
        """A step that multiplies every pixel by weight [in, out]; source, target: offset and channels."""
        library, (height, width) = native.library(), self.size[2:]
        packing = cpu_weights.Packing.of("float32")
        depth, channels = weight.shape
        packed = torch.zeros(1, 1, depth * packing.columns(channels))
        packing.pack(packed, depth, channels, lambda first, last, rows: rows[0].copy_(weight[first:last]))
        zeros = torch.zeros(packing.columns(channels) + packing.lanes)
        self.packed += [packed, zeros]
        step = library.ConvStep()
        step.source = library.MapSpec(source[0], height, width, source[1], source[1], False)
        step.targets = [library.TargetSpec(*target, 0, False)]
        step.weight, step.bias, step.out_channels = packed.data_ptr(), zeros.data_ptr(), channels
        step.jobs = [library.Job(0, 0, [library.Group(1, 1, [(0, 0)], 0)])]
        step.out_height, step.out_width = height, width
        return step

    def run(self, rects: list[tuple[Rect, int]]) -> Tensor:
        """[2, 3, H, W] with NaN where nothing was computed; rects: with their samples, -1 for both."""
        region, everywhere = native.library().Region, (0, self.size[2], 0, self.size[3])
        whole = [region(everywhere, everywhere, -1)]
        lists = [[region(tuple(r), everywhere, sample) for r, sample in rects], whole]
        if self.expansion is not None:
            lists.insert(0, whole)
        out = torch.empty_like(self.image)
        arguments = [native.tensor_arg(t) for t in (self.image, self.mask)]
        threads = torch.get_num_threads()
        self.program.run(*arguments, (0,) * 10, native.tensor_arg(out), [], lists, threads, True)
        return out

    def exact(self, dtype: torch.dtype) -> Tensor:
        features = torch.cat((self.image * (1 - self.mask) + self.mask, self.mask), 1).to(dtype)
        if self.expansion is not None:
            features = torch.einsum("bchw,cd->bdhw", features, self.expansion.to(dtype))
        return attention_block(features, self.weight.to(dtype), self.bias.to(dtype), self.variant)[:, :3]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_attention_computes_the_queries_of_the_rectangles_alone(isa, threads, variant):
    block = AttentionAlone(variant)
    dense = block.run([(Rect(0, 11, 0, 13), -1)])
    assert_accurate("dense", dense, block.exact(torch.float64), block.exact(torch.float32))
    rects = [Rect(0, 1, 4, 9), Rect(3, 7, 0, 2), Rect(6, 11, 10, 13)]  # at every border
    for pairs in ([(r, -1) for r in rects], [(rects[0], 0), (rects[1], 1), (rects[2], 1)], [(rects[2], 1)]):
        wanted = torch.zeros_like(dense, dtype=torch.bool)
        for rect, sample in pairs:
            wanted[(slice(None) if sample < 0 else sample, ..., *rect.slices)] = True
        some = block.run(pairs)
        assert torch.equal(some.isfinite(), wanted)
        assert_accurate("some", some[wanted], block.exact(torch.float64)[wanted], block.exact(torch.float32)[wanted])
        assert torch.equal(some[wanted], block.run(pairs)[wanted])
        if threads == 1:  # else keys are split by the number of queries
            assert torch.equal(some[wanted], dense[wanted])


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize(
    ("channels", "size", "scale"),
    [
        (4, (11, 13), 1.0),
        (4, (9, 7), 30.0),  # scores of hundreds
        (8, (9, 7), 1.0),
        (31, (13, 11), 0.3),
        (128, (48, 48), 0.3),  # several panels share a task
        (256, (20, 21), 3.0),
        (512, (24, 24), 0.1),
    ],
)
def test_attention_by_products_of_bf16(isa, threads, variant, channels, size, scale):
    """bf16x3 keeps to the accuracy of float32, bf16 to that of plain bf16; both run where the instruction set has
    them, and else float32."""
    whole = [(Rect(0, size[0], 0, size[1]), -1)]
    results = {}
    for products in ("float32", "bf16", "bf16x3"):
        block = AttentionAlone(variant, products, channels, size, scale)
        results[products] = block.run(whole)
        assert torch.equal(results[products], block.run(whole)), products
    exact = block.exact(torch.float64)
    assert_accurate("float32", results["float32"], exact, block.exact(torch.float32))
    assert_accurate("bf16x3", results["bf16x3"], exact, results["float32"])
    if native.multiplies("bf16"):
        assert_accurate("bf16", results["bf16"].bfloat16(), exact, block.exact(torch.bfloat16))
    assert torch.equal(results["bf16"], results["float32"]) == (not native.multiplies("bf16"))
    assert torch.equal(results["bf16x3"], results["float32"]) == (not native.multiplies("bf16x3"))
    block = AttentionAlone(variant, "bf16x3", channels, size, scale)
    rect = Rect(size[0] - 3, size[0], 2, 6)
    inside = (1, ..., *rect.slices)
    assert_accurate("region", block.run([(rect, 1)])[inside], exact[inside], results["float32"][inside])


@pytest.mark.parametrize("kernel", ["winograd2", "winograd4"])
def test_few_outputs_read_only_those_weights_that_direct_convolution_needs(isa, threads, kernel):
    """Transposed 4x4 convolutions have phases of 2x2 taps: 4 of Winograd's 9 or 25 points give the taps."""
    plan = plan_of(8)
    image, mask = picture(1, 256, 256)
    mask = torch.zeros_like(mask)
    mask[..., 120:136, 120:136] = 1
    hole = (mask > 0).expand_as(image)
    small = plan.restricted([Rect(120, 136, 120, 136)])
    chosen = choices(plan, kernel)
    weights = CpuWeights.pack(plan, torch.float32, chosen)
    executor = CpuExecutor(plan, weights)
    regions = [step.regions for step in small.steps]
    result = executor.run(image, mask, None, regions)[0]
    direct = CpuExecutor.of(plan, torch.float32, choices(plan, "direct"))
    assert_close(result[hole], direct.run(image, mask)[0][hole].double())
    m = cpu_kernels.TILES[kernel]
    step = next(step for step in plan.steps if step.name == "net_c.d4")
    packing = cpu_weights.Packing.of("float32")
    groups = [group for job in cpu_kernels.jobs_of(step.geometry, m) for group in job.groups]
    for offset, group in zip(weights.placed[step.name].weights, groups, strict=True):
        point = len(group.starts) * step.source.channels * packing.columns(step.out_channels)
        side = m + 1
        packed = weights.data[offset : offset + 4 * side * side * point].view(torch.float32).view(side, side, point)
        packed[1:-1] = torch.nan
        packed[:, 1:-1] = torch.nan
    assert torch.equal(executor.run(image, mask, None, regions)[0], result)
    assert not executor.run(image, mask)[0][hole].isfinite().all()  # a dense run reads them all


@pytest.mark.parametrize(
    ("out", "read", "sample", "got"),
    [
        ((0, 257, 0, 10), (0, 10, 0, 10), -1, "rows 0 to 257, columns 0 to 10"),
        ((-1, 5, 0, 10), (0, 10, 0, 10), -1, "rows -1 to 5"),
        ((9, 5, 0, 10), (0, 10, 0, 10), -1, "rows 9 to 5"),
        ((0, 5, 10, 10), (0, 10, 0, 10), -1, "columns 10 to 10"),
        ((0, 5, 0, 10), (0, 10, 0, 1 << 40), -1, f"columns 0 to {1 << 40}"),
        ((0, 5, 0, 10), (0, 10, 0, 10), 1, "got 1"),
        ((0, 5, 0, 10), (0, 10, 0, 10), -2, "got -2"),
    ],
)
def test_regions_outside_a_map_are_refused_before_any_kernel_runs(out, read, sample, got):
    plan = plan_of(5)
    executor = CpuExecutor.of(plan)
    image, mask = picture(1, 256, 256)
    lists = executor._listed([step.regions for step in plan.steps])
    lists[-1] = [native.library().Region(out, read, sample)]
    with pytest.raises(ValueError, match=f"Program.run: regions: expected .*{got}"):
        executor._run(image, mask, None, lists)


def test_regions_of_all_samples_and_of_one_do_not_mix():
    plan = plan_of(5)
    executor = CpuExecutor.of(plan).resized(plan.resized(2, 256, 256))
    lists = executor._listed([step.regions for step in executor.plan.steps])
    out, read = (0, 256, 0, 256), (0, 128, 0, 128)
    lists[-1] = [native.library().Region(out, read, -1), native.library().Region(out, read, 0)]
    with pytest.raises(ValueError, match="regions: expected samples 0 to 1, or -1 for all of them"):
        executor._run(*picture(2, 256, 256), None, lists)
