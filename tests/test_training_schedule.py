"""The schedule of the learning rate."""

from __future__ import annotations

import typing

import pytest

from lgnet_fast.training.config import OptimConfig
from lgnet_fast.training.schedule import learning_rate_factor


def test_paper_schedule_is_specs():
    optim = OptimConfig()
    for per_epoch in (1, 7, 6750):
        total = 200 * per_epoch
        for epoch in range(200):
            expected = 1 - max(0, epoch + 1 - 100) / 101
            for step in {epoch * per_epoch, epoch * per_epoch + per_epoch - 1}:
                factor = learning_rate_factor(optim, step, total, step / total, per_epoch)
                assert factor == pytest.approx(expected, abs=1e-12), (per_epoch, epoch)
    # a run of a part of an epoch counts as two
    assert [learning_rate_factor(optim, step, 3, step / 3, 10) for step in range(3)] == [1, 1, 0.5]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1, 0.75, 0.5, 0.25, 0]), ("cosine", [1, 0.853553, 0.5, 0.146447, 0]), ("constant", [1] * 5)],
)
def test_schedules_by_progress(schedule, expected):
    optim = OptimConfig(schedule=schedule, warmup_steps=4)
    warm = [learning_rate_factor(optim, step, 100, step / 100, 10) for step in range(4)]
    assert warm == [0.25, 0.5, 0.75, 1.0]
    found = [learning_rate_factor(optim, 50, 100, progress, 10) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_every_schedule_of_the_configuration_falls_or_stays():
    for schedule in typing.get_args(typing.get_type_hints(OptimConfig)["schedule"]):
        factors = [
            learning_rate_factor(OptimConfig(schedule=schedule), 0, 100, share / 10, 10) for share in range(11)
        ]
        assert factors == sorted(factors, reverse=True)
        assert (factors[0], factors[-1] > 0.9) == (1.0, schedule == "constant")
