"""What the tuners' tests measure with in place of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lgnet_fast.engine.cuda.measure import Timer


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
