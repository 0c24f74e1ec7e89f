"""A training step's accelerator where accelerate is not installed: one process, one device, no loss scaling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor, nn


class OneDevice:
    """What :class:`lgnet_fast.training.steps.Step` takes from ``accelerate.Accelerator``.

    Args:
        autocast: gives the context of the networks' forward passes.
    """

    scaler = None

    def __init__(self, autocast: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self.autocast = autocast

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the parameters."""
        loss.backward()

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Nothing: there are no other processes to wait for."""
        return contextlib.nullcontext()
