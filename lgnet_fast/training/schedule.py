"""The schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from .config import OptimConfig

_BY_PROGRESS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
"""The factors of all schedules but "paper", which counts epochs."""


def learning_rate_factor(
    optim: OptimConfig, step: int, total: int, progress: float, steps_an_epoch: int, warm_from: int = 0
) -> float:
    """Factor of the learning rate.

    Args:
        optim: has the name of the schedule.
        step, total: finished optimiser steps, and steps of the whole run.
        progress: 0 to 1; step / total, or more if the time limit will end the run first.
        steps_an_epoch: steps per epoch. "paper" falls at every epoch: with E epochs, constant over the first half,
            then 1 - (epoch + 1 - E/2) / (E - E/2 + 1), with epochs counted from 0.
        warm_from: a later step from which it is warmed up again, in addition; 0: none.
    """
    factor = 1.0
    if warm_from and step - warm_from < optim.warmup_steps:
        factor = (step - warm_from + 1) / optim.warmup_steps
    return factor * _scheduled(optim, step, total, progress, steps_an_epoch)


def _scheduled(optim: OptimConfig, step: int, total: int, progress: float, steps_an_epoch: int) -> float:
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule != "paper":
        return _BY_PROGRESS[optim.schedule](progress)
    epochs = max(2, round(total / steps_an_epoch))
    constant = epochs // 2
    epoch = int(progress * epochs + 1e-9)  # a share of 3/200 times 200 may be a bit less than 3
    return 1.0 - max(0, epoch + 1 - constant) / (epochs - constant + 1)
