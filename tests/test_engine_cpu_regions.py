"""Runs of the CPU executor that compute only some regions."""

from __future__ import annotations

import pytest
import torch

from lgnet_fast import create_model, native
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu import kernels as cpu_kernels
from lgnet_fast.engine.cpu import weights as cpu_weights
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.cpu.weights import CpuWeights
from lgnet_fast.engine.regions import Rect
from tests.engine_cpu_support import HOLES, KERNELS, assert_close, choices, picture, plan_of, truth

pytestmark = pytest.mark.skipif(
    CpuExecutor.unavailable_reason() is not None, reason=str(CpuExecutor.unavailable_reason())
)


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
