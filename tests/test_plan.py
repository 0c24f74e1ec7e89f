"""The plan and its plain-PyTorch executor against the reference; regions against the dense run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lgnet_fast import LocalGlobalRefinement, create_model
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cover import hole_boxes
from lgnet_fast.engine.geometry import Geometry
from lgnet_fast.engine.holes import group_holes
from lgnet_fast.engine.plan import PICTURE, Plan
from lgnet_fast.engine.regions import Rect, join, rounded
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.reference.attention import AttentionBlock
from tests.support import assert_accurate, case

NARROW = {"coarse_channels": 4, "local_channels": 5, "global_channels": 6}


def lively(model: nn.Module) -> nn.Module:
    """In evaluation mode, float64, with weights and statistics that make every layer's output vary."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4:
                p.mul_(6)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1, generator=generator)
                m.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval().double()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return lively(create_model("lgnet", **NARROW, backend="eager"))


def plan_of(model: nn.Module, batch: int = 1, height: int = 256, width: int = 256) -> Plan:
    return build_plan(plan_stages(model), batch, height, width)


def random_mask(seed: int, height: int = 256, width: int = 256) -> Tensor:
    """Strokes, boxes, single pixels, holes at borders and corners."""
    rng = random.Random(seed)
    mask = torch.zeros(1, 1, height, width, dtype=torch.float64)
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["box", "pixel", "stroke", "corner", "border"])
        y, x = rng.randrange(height), rng.randrange(width)
        if kind == "pixel":
            mask[..., y, x] = 1
        elif kind == "box":
            mask[..., y : y + rng.randint(1, 90), x : x + rng.randint(1, 90)] = 1
        elif kind == "corner":
            mask[..., height - rng.randint(1, 30) :, : rng.randint(1, 30)] = 1
        elif kind == "border":
            mask[..., : rng.randint(1, 12), x : x + rng.randint(1, 60)] = 1
        else:
            for _ in range(rng.randint(5, 60)):
                mask[..., y : y + 4, x : x + 4] = 1
                y = min(max(0, y + rng.randint(-4, 4)), height - 1)
                x = min(max(0, x + rng.randint(-4, 4)), width - 1)
    return mask


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("lgnet", "released"),
        ("lgnet", "paper"),
        ("lgnet_share", "released"),
        ("C", "released"),
        ("C+L", "paper"),
        ("C+G_att", "paper"),
        ("C+G+G_att", "released"),
        ("C+L+G", "released"),
    ],
)
def test_plan_reproduces_every_model(name, variant):
    torch.manual_seed(0)
    widths = NARROW | ({"coarse_channels": 6} if name == "lgnet_share" else {})
    model = lively(create_model(name, variant=variant, **widths, backend="eager"))
    image, mask = case("gen256", 2, 256, 256)
    with torch.no_grad():
        expected = model(image, mask, return_stages=True)
        merged, raw = TorchExecutor(plan_of(model, 2)).run(image, mask)
    assert (expected.merged[-1] - image).abs().max() > 0.1
    assert_accurate("merged", merged, expected.merged[-1], roundings=2**20)
    for ours, theirs in zip(raw, expected.raw, strict=True):
        assert_accurate("raw", ours, theirs, roundings=2**20)


def test_a_plan_has_the_activations_and_attention_levels_of_the_layers():
    torch.manual_seed(0)
    model = lively(create_model("lgnet", **NARROW, backend="eager"))
    net, plain = model.net_g, plan_of(model)
    assert plain.resized(2, 512, 256).digest == plain.digest
    net.encoder["e3"].activation = nn.ReLU()
    assert plan_of(model).digest != plain.digest  # or a check of the one would hold for the other
    net.encoder["e4"].activation = None
    net.decoder["d8"].activation = net.decoder["d3"].activation = nn.LeakyReLU(0.2)
    del net.attention["d5"]
    channels = net.decoder["d6"].deconv.out_channels
    net.attention["d6"] = AttentionBlock(channels, model.variant).double()
    image, mask = case("gen256", 1, 256, 256)
    with torch.no_grad():
        merged, _ = TorchExecutor(plan_of(model)).run(image, mask)
        assert_accurate("merged", merged, model(image, mask), roundings=2**20)
    for other in (nn.GELU(), nn.LeakyReLU(0.1)):
        net.decoder["d2"].activation = other
        with pytest.raises(TypeError, match=r"activation: plans have .*, got (GELU|LeakyReLU)"):
            plan_of(model)


def test_plan_of_x_lg_starts_from_the_first_stages_picture(model):
    class Grey(nn.Module):
        def forward(self, image, mask):
            return image.mean(dim=(2, 3), keepdim=True).expand_as(image)

    torch.manual_seed(0)
    x_lg = lively(LocalGlobalRefinement(Grey(), local_channels=4, global_channels=4, backend="eager"))
    image, mask = case("gen512", 1, 512, 256)
    with torch.no_grad():
        expected = x_lg(image, mask)
        merged, _ = TorchExecutor(plan_of(x_lg, 1, 512, 256)).run(image, mask, start=Grey()(image, mask))
    assert_accurate("merged", merged, expected, roundings=2**20)


def test_resized_plan_is_the_plan_of_that_size(model):
    small, large = plan_of(model), plan_of(model, 3, 512, 256)
    resized = small.resized(3, 512, 256)
    assert resized.buffers == large.buffers
    assert [s.regions for s in resized.steps] == [s.regions for s in large.steps]
    assert resized.total_macs() == large.total_macs() == 6 * small.total_macs() + extra_attention(small, 3, 2)


def extra_attention(plan: Plan, batch: int, area: int) -> int:
    """Attention's products grow with the square of the area."""
    products = 0
    for step in plan.steps:
        if step.kind == "attention":
            positions = plan.buffers[step.source.buffer].everywhere.area
            products += 2 * positions**2 * step.out_channels
    return products * (batch * area**2 - batch * area)


def test_without_weights_keeps_shapes_and_counts(model):
    plan = plan_of(model)
    bare = plan.without_weights()
    assert all(s.weight.is_meta and s.bias.is_meta for s in bare.steps)
    assert bare.total_macs() == plan.total_macs()


@pytest.mark.parametrize(
    ("hole", "expected"), [(None, 43.029), (64, 13.151), (128, 21.970)], ids=["dense", "64x64", "128x128"]
)
def test_multiply_accumulates_of_the_full_model(hole, expected):
    with torch.device("meta"):
        plan = plan_of(create_model("lgnet").eval())
    if hole is not None:
        start = 128 - hole // 2
        plan = plan.restricted([Rect(start, start + hole, start, start + hole)])
    assert abs(plan.total_macs() / 1e9 - expected) < 5e-4


@pytest.mark.parametrize("seed", range(12))
def test_restricted_plan_gives_the_dense_pixels(model, seed):
    image, _ = case("gen256", 1, 256, 256)
    mask = random_mask(seed)
    plan = plan_of(model)
    restricted = plan.restricted(hole_boxes(mask))
    assert restricted.total_macs() < plan.total_macs()
    executor = TorchExecutor(plan)
    with torch.no_grad():
        dense, _ = executor.run(image, mask)
        # Values that were not computed are NaN, so a region that is too small fails the test.
        sparse, raw = executor.run(image, mask, regions=[s.regions for s in restricted.steps])
    assert_accurate("sparse", sparse, dense)
    assert torch.isnan(raw[0]).any()


def test_regions_in_a_non_square_batch(model):
    image, _ = case("gen512", 2, 512, 256)
    mask = torch.cat([random_mask(1, 512, 256), random_mask(2, 512, 256)])
    plan = plan_of(model, 2, 512, 256)
    regions = [s.regions for s in plan.restricted(hole_boxes(mask)).steps]
    with torch.no_grad():
        dense, _ = TorchExecutor(plan).run(image, mask)
        sparse, _ = TorchExecutor(plan).run(image, mask, regions=regions)
    assert_accurate("sparse", sparse, dense)


def test_rounded_rectangles_stay_inside():
    assert rounded([Rect(1, 33, 32, 64)], 32, 256, 256) == (Rect(0, 64, 32, 64),)
    assert rounded([Rect(0, 1, 0, 1), Rect(2, 3, 5, 6)], 32, 256, 256) == (Rect(0, 32, 0, 32),)
    assert rounded([Rect(0, 40, 0, 40)], 32, 48, 48) == (Rect(0, 48, 0, 48),)


def test_join_covers_the_same_pixels_once_and_costs_no_more():
    rng = random.Random(0)
    for _ in range(50):
        rects = []
        for _ in range(rng.randint(1, 6)):
            top, left = rng.randrange(30), rng.randrange(30)
            rects.append(Rect(top, top + rng.randint(1, 12), left, left + rng.randint(1, 12)))
        before, after = torch.zeros(45, 45), torch.zeros(45, 45)
        for r in rects:
            before[r.top : r.bottom, r.left : r.right] = 1
        joined = join(rects)
        for r in joined:
            after[r.top : r.bottom, r.left : r.right] += 1
        assert (after >= before).all()
        assert after.max() == 1
        assert sum(r.area for r in joined) <= sum(r.area for r in set(rects))


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "reflect"), [(4, 2, 1, 0), (3, 1, 1, 1), (3, 2, 1, 0), (7, 1, 3, 1)]
)
def test_reads_is_exactly_what_a_convolution_reads(kernel, stride, pad, reflect):
    size = 16
    for top in range(0, size // stride):
        for bottom in range(top + 1, size // stride + 1):
            x = torch.zeros(1, 1, size, size, requires_grad=True)
            padded = nn.functional.pad(x, (pad,) * 4, mode="reflect" if reflect else "constant")
            y = nn.functional.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride)
            y[:, :, top:bottom, 2:5].sum().backward()
            rows, columns = x.grad[0, 0].sum(1).nonzero(), x.grad[0, 0].sum(0).nonzero()
            read = Rect(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
            geometry = Geometry(kernel, stride, pad, reflect=bool(reflect))
            assert geometry.reads(Rect(top, bottom, 2, 5), (size, size)) == read
            assert geometry.out_size((size, size)) == tuple(y.shape[2:])


@pytest.mark.parametrize(("kernel", "pad", "output_padding"), [(4, 1, 0), (3, 1, 1)])
def test_reads_is_also_exactly_what_a_transposed_convolution_reads(kernel, pad, output_padding):
    for top in range(0, 16):
        for bottom in range(top + 1, 17):
            x = torch.zeros(1, 1, 8, 8, requires_grad=True)
            y = nn.functional.conv_transpose2d(
                x, torch.ones(1, 1, kernel, kernel), stride=2, padding=pad, output_padding=output_padding
            )
            y[:, :, top:bottom, 3:9].sum().backward()
            rows, columns = x.grad[0, 0].sum(1).nonzero(), x.grad[0, 0].sum(0).nonzero()
            read = Rect(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
            geometry = Geometry(kernel, 2, pad, transposed=True, output_padding=output_padding)
            assert geometry.reads(Rect(top, bottom, 3, 9), (8, 8)) == read
            assert geometry.out_size((8, 8)) == tuple(y.shape[2:])


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(3, 1, 1),
        Geometry(4, 2, 1),
        Geometry(7, 1, 3),
        Geometry(5, 3, 2),
        Geometry(4, 2, 1, True),
        Geometry(3, 2, 1, True, output_padding=1),
    ],
    ids=str,
)
def test_phases_and_axes_are_the_convolution(geometry):
    """Sums over the phases of the CPU's kernels, and over those of the GPU's, along one axis."""
    size, rng = 9, np.random.default_rng(0)
    source, taps = torch.from_numpy(rng.normal(size=size)), torch.from_numpy(rng.normal(size=geometry.kernel))
    operator = nn.functional.conv_transpose1d if geometry.transposed else nn.functional.conv1d
    more = (geometry.output_padding,) if geometry.transposed else ()
    exact = operator(source[None, None], taps[None, None], None, geometry.stride, geometry.padding, *more)[0, 0]
    assert geometry.out_size((size, size)) == (len(exact), len(exact))

    def at(index: int) -> Tensor:
        return source[index] if 0 <= index < size else torch.zeros((), dtype=torch.float64)

    phases = geometry.phases()
    assert sorted({phase.out for phase in phases}) == list(range(geometry.out_step))
    axes = [geometry.axis(), geometry.axis(2 * geometry.out_step)]
    for output, expected in enumerate(exact):
        row, out = divmod(output, geometry.out_step)
        total = sum(
            taps[tap] * at(geometry.in_step * row + phase.start + n * phase.stride)
            for phase in phases
            if phase.out == out
            for n, tap in enumerate(phase.taps)
        )
        assert_accurate("phases", total, expected)
        for axis in axes:
            row, shift = divmod(output, axis.out_step)
            phase = shift if axis.phases > 1 else 0
            first, count = axis.used(phase, size, len(exact), reflect=False)
            total = torch.zeros((), dtype=torch.float64)
            for n in range(first, first + count):
                tap = geometry.tap(shift, axis.origins[phase] + n)
                if tap is not None:
                    total += taps[tap] * at(axis.in_step * row + axis.origins[phase] + n)
            assert_accurate("axis", total, expected)


def test_hole_boxes_contain_every_hole_pixel_tightly():
    assert hole_boxes(torch.zeros(2, 1, 256, 256)) == ()
    mask = torch.zeros(2, 1, 256, 512)
    mask[0, :, 10:20, 30:40] = 1
    mask[1, :, 200, 511] = 0.25
    assert hole_boxes(mask) == (Rect(10, 20, 30, 40), Rect(200, 201, 511, 512))
    for seed in range(20):
        mask = random_mask(seed)
        covered = torch.zeros_like(mask)
        for r in hole_boxes(mask):
            covered[..., r.top : r.bottom, r.left : r.right] = 1
            assert mask[..., r.top : r.bottom, r.left : r.right].any()
        assert (covered >= mask).all()


@pytest.mark.parametrize("size", [(1, 1), (16, 33), (100, 47), (161, 320)])
@pytest.mark.parametrize("density", [0.0, 0.0003, 0.003, 0.5])
def test_groups_of_holes(size, density):
    """Against the definition: cells of 16x16 with a hole pixel, joined over sides and corners."""
    hole = np.random.default_rng(size[0]).random(size) < density
    found = group_holes(hole)
    cells = {(y // 16, x // 16) for y, x in np.argwhere(hole).tolist()}
    assert set(map(tuple, np.argwhere(found.labels > 0).tolist())) == cells
    firsts = []
    for number, box in enumerate(found.boxes, 1):
        own = set(map(tuple, np.argwhere(found.labels == number).tolist()))
        reached, todo = set(), [min(own)]
        firsts.append(min(own))
        while todo:
            y, x = todo.pop()
            if (y, x) in cells - reached:
                reached.add((y, x))
                todo += [(y + down, x + across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
        assert reached == own
        ys, xs = np.array([(y, x) for y, x in np.argwhere(hole).tolist() if (y // 16, x // 16) in own]).T
        assert box == Rect(ys.min(), ys.max() + 1, xs.min(), xs.max() + 1)
    assert firsts == sorted(firsts)


def test_picture_buffer_keeps_known_pixels_and_mask(model):
    image, mask = case("gen256", 1, 256, 256)
    with torch.no_grad():
        picture = TorchExecutor(plan_of(model)).buffers_after(image, mask)[PICTURE]
    assert torch.equal(picture[:, 3:], mask)
    assert torch.equal(torch.where(mask.bool(), image, picture[:, :3]), image)
