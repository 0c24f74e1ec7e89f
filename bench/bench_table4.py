"""Table IV's times in one run: the paper's eight networks, PEN_LG and MEDFE_LG, and our engine for five of them.

256x256, batch 1, float32, random weights (which do not change the time). The compared networks run in eager PyTorch,
like their authors' code. "LGNet", "LGNet_share", "LGNet_light" are the eager reference, "ours_..." are
``lgnet_fast.optimize``. In PEN_LG and MEDFE_LG our engine runs the stages after the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.bench_inference import SIZE, inputs, model_of
from bench.peers import PEERS
from bench.peers.adapter import REFINED, adapt
from bench.timing import SMOKE
from lgnet_fast import optimize

OWN = {"LGNet": "lgnet", "LGNet_share": "lgnet_share", "LGNet_light": "lgnet_light"}
"""Row -> name for ``create_model``."""


def networks(device: str) -> dict[str, Any]:
    """Row -> network; MEDFE_LG and PEN_LG share their first stage's weights with MEDFE and PEN."""
    torch.manual_seed(0)
    rows: dict[str, Any] = {}
    for name in ("PEN", "GConv") if SMOKE else PEERS:
        rows[name] = adapt(name)
    for row, name in OWN.items():
        if not SMOKE or row == "LGNet_light":
            rows[row] = model_of(name)
    for name, first in REFINED.items():
        if first in rows and not SMOKE:
            rows[name] = adapt(name, rows[first].network)
    return {name: network.to(device) for name, network in rows.items()}


def test_table4(compete: Any, device: str, benchmark: Any) -> None:
    image, mask = (x.to(device) for x in inputs(SIZE // 2))
    known = (1 - mask).expand_as(image).bool()
    rows = networks(device)
    running: dict[str, Any] = {}
    with torch.inference_mode():
        for name, network in rows.items():
            result = network(image, mask)
            assert result.shape == image.shape
            assert result.isfinite().all(), name
            assert torch.equal(result[known], image[known]), name
            running[name] = lambda network=network: network(image, mask)
            if name in OWN or name in REFINED:
                ours = optimize(network, device=device, dtype=torch.float32, hole_aware=False)
                error = ours(image, mask) - result
                if device == "cuda":  # where eager convolutions use tf32 by default
                    assert rms(error) < 5e-3, name
                else:
                    assert error.abs().max() < 2e-3, name
                running[f"ours_{name}"] = lambda ours=ours: ours(image, mask)
                if device == "cuda":
                    half = optimize(network, device=device, dtype=torch.float16, hole_aware=False)
                    assert rms(half(image, mask) - result) < 2e-2, name
                    running[f"ours_{name}_fp16"] = lambda half=half: half(image, mask)
        summary = compete(running, "ours_LGNet_light" if SMOKE else "ours_LGNet", rounds=5, warmup=1, long_rounds=2)
    least = summary["least_ms"]
    benchmark.extra_info["times_faster_than_eager"] = {
        name: round(least[name] / least[f"ours_{name}"], 3) for name in rows if f"ours_{name}" in least
    }
    for name, ms in sorted(least.items(), key=lambda item: item[1]):
        print(f"{name:24} {ms:10.2f} ms")


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
