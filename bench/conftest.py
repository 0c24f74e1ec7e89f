"""What every bench shares: the device, and the environment written into the JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from bench.timing import environment, interleave, summarize


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lgnet_fast"] = environment()
    machine_info.pop("node", None)  # a host's name says nothing about its speed


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return request.param


@pytest.fixture
def compete(benchmark: Any, device: str) -> Callable[..., dict[str, Any]]:
    """``compete(contestants, ours)``: time all of them interleaved, record ratios, and `ours` once more in its own
    right by pytest-benchmark, so that its ``--benchmark-*`` options work."""

    def run(contestants: Mapping[str, Callable[[], Any]], ours: str, rounds: int = 12) -> dict[str, Any]:
        summary = summarize(interleave(contestants, device, rounds), ours)
        benchmark.extra_info.update(summary, device=device)

        def timed() -> None:
            contestants[ours]()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=2)
        return summary

    return run
