"""What the tests of the CPU executor share: small plans, pictures, and the plan run in plain PyTorch, float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lgnet_fast import native
from lgnet_fast.engine.build import build_plan, plan_stages
from lgnet_fast.engine.cpu import kernels as cpu_kernels
from lgnet_fast.engine.cpu.choice import kernels_for
from lgnet_fast.engine.cpu.executor import CpuExecutor
from lgnet_fast.engine.cpu.kernels import Products
from lgnet_fast.engine.plan import Plan
from lgnet_fast.engine.regions import Rect
from lgnet_fast.engine.torch_executor import TorchExecutor
from lgnet_fast.reference.lgnet import LGNet
from tests.support import assert_accurate, instruction_sets

ISAS = instruction_sets()
KERNELS = ("direct", "winograd2", "winograd4")


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


def choices(plan: Plan, kernel: str, products: Products = "float32") -> dict[str, str]:
    """`kernel` wherever it can run with such products."""
    able = {step.name: kernels_for(step, products) for step in plan.steps}
    return {name: kernel if kernel in options else options[0] for name, options in able.items()}


def skip_without_tiles(kernel: str, products: Products) -> None:
    """Skip a test of convolutions by `kernel` where the instruction set in use has no such tiles."""
    if cpu_kernels.TILES[kernel] > native.largest_tile(products):
        pytest.skip(f"no {kernel} by products of {products} here")


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


HOLES = {
    "centre": [Rect(100, 161, 90, 150)],
    "corner": [Rect(0, 33, 0, 17)],
    "last pixel": [Rect(255, 256, 255, 256)],
    "edges": [Rect(0, 1, 100, 103), Rect(120, 131, 0, 5), Rect(250, 256, 60, 200)],
    "several": [Rect(10, 20, 10, 30), Rect(200, 230, 190, 250), Rect(13, 90, 200, 207)],
    "steps": [Rect(32 * i, 32 * i + 40, 24 * i, 24 * i + 30) for i in range(7)],
    "everywhere": [Rect(0, 256, 0, 256)],
}
