"""What the tests of tuning and first use measure with in place of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lgnet_fast.kernels import compiled
from lgnet_fast.kernels.conv_configs import Tile

from lgnet_fast.engine.cuda.measure import Timer
from lgnet_fast.engine.cuda.tuning_convolutions import LAUNCHES


class IdleTimer(Timer):
    """Compiles nothing and waits for nothing. `time` is left to the tests.

    Attributes:
        compiled: the launches that were to be compiled.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.compiled: list[Any] = []

    def compile(self, launches: Sequence[Any]) -> list[str]:
        self.compiled += launches
        return []

    def workers(self) -> int:
        return 1

    def wait(self) -> None:
        pass


class FakeTimer(IdleTimer):
    """Compiles nothing; a launch takes `cost` of its tile (cuDNN: None), whole runs take the values of `runs`.

    compiled_us: what a launch of the compiled kernels takes.
    """

    def __init__(
        self, cost: Callable[[Tile | None], float], runs: Sequence[float] = (3.0, 2.0), compiled_us: float = 1e3
    ) -> None:
        super().__init__()
        self.cost, self.runs, self.compiled_us = cost, list(runs), compiled_us

    def time(self, launches: Sequence[Callable[[], None]], spread: bool = False) -> float:
        (launch, *others) = launches
        arguments: Any = getattr(launch, "args", ())
        if len(launches) == LAUNCHES:
            assert len(others) == LAUNCHES - 1
            if any(compiled.as_compiled(a) is not None for a in arguments):
                return self.compiled_us
            return self.cost(next((a for a in arguments if isinstance(a, Tile)), None))
        if len(launches) == 1:
            self.runs.append(self.runs.pop(0))
            return 1e3 * self.runs[-1]
        return 5.0  # attention: all alike


def splits_are_slow(tile: Tile | None) -> float:
    """Fewest splits, then the narrowest block, is best; cuDNN is worst."""
    return 1000.0 if tile is None else 10.0 * tile.splits + tile.block_n


class Group:
    """Steps in one launch, on a machine without the kernel: they run one by one."""

    def __init__(self, steps: int) -> None:
        self.layers = [None] * steps
