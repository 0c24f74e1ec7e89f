"""What the tests of whole engines share: a small network, the rule for its pixels, and graphs without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lgnet_fast import LGNet, create_model
from lgnet_fast.engine.cpu.executor import CpuExecutor
from tests.test_plan import NARROW, lively

needs_extension = pytest.mark.skipif(
    CpuExecutor.unavailable_reason() is not None, reason=f"no C++ executor: {CpuExecutor.unavailable_reason()}"
)


def narrow_model() -> LGNet:
    """LGNet of few channels, in float32, whose result depends on every layer."""
    torch.manual_seed(0)
    return lively(create_model("lgnet", **NARROW, backend="eager")).float()


def levels(x: Tensor) -> Tensor:
    """8-bit samples."""
    return ((x + 1) * 127.5).round().clamp(0, 255)


def assert_same_pixels(fast: Tensor, exact: Tensor, mask: Tensor) -> None:
    """The project's rule for a whole float32 engine."""
    hole = (mask > 0).expand_as(exact)
    difference = (levels(fast.double()) - levels(exact))[hole].abs()
    assert difference.max() <= 1
    assert (difference == 0).double().mean() >= 0.99
    assert (fast.double() - exact)[hole].square().mean().sqrt() <= 1e-4


class FakePool:
    """Memory of graphs on the CPU."""

    def renew(self) -> None:
        pass


class FakeGraph:
    """Replays by launching; counts."""

    replays = 0

    def __init__(self, launches: Callable[[], None]) -> None:
        self.launches = launches

    def replay(self) -> None:
        FakeGraph.replays += 1
        self.launches()
