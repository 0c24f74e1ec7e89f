"""The learning rate through a run."""

from __future__ import annotations

import math

from .config import OptimConfig


def learning_rate_factor(optim: OptimConfig, step: int, total: int, progress: float, steps_an_epoch: int) -> float:
    """What the learning rate is multiplied with.

    Args:
        optim: names the schedule.
        step, total: optimiser steps done, and of the whole run.
        progress: 0 to 1 through the run; step / total, or more where time will end it.
        steps_an_epoch: "paper" falls epoch by epoch: with E of them, constant over the first half,
            then 1 - (epoch + 1 - E/2) / (E - E/2 + 1), counted from 0.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "linear":
        return 1.0 - progress
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    epochs = max(2, round(total / steps_an_epoch))
    constant = epochs // 2
    epoch = int(progress * epochs + 1e-9)  # a share of 3/200 times 200 may be a bit less than 3
    return 1.0 - max(0, epoch + 1 - constant) / (epochs - constant + 1)
