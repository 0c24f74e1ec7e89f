"""Shared by the tests of the compared networks: deterministic weights and input, expected names and outputs.

``tests/data/peers/<network>_keys.json`` has the state dict's names and shapes, ``<network>_golden.json`` outputs of
the original code for these weights and this input: shape, mean, std, min, max and some pixels each.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.adapter import adapt

PEERS = Path(__file__).parent / "data" / "peers"
SIZE = 256
TOLERANCE = 1e-3
"""Tolerance, as a share of an output's standard deviation."""

_GAIN = {"PEN": 2.0, "GCONV": 2.0, "MEDFE": 2.0, "RFR": 1.4, "MADF": 1.0}


def golden(network: str) -> dict[str, dict[str, Any]]:
    """Output's name -> its shape, mean, std, min, max and points; `network` is PEN, GCONV, MEDFE, RFR or MADF."""
    return json.loads((PEERS / f"{network}_golden.json").read_text())


def keys(network: str) -> dict[str, list[int]]:
    """Names and shapes of the state dict."""
    return json.loads((PEERS / f"{network}_keys.json").read_text())


def value(network: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """The deterministic float32 value of one entry of the state dict."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(shape, generator=generator)
    if "mask_conv" in key:
        return torch.ones(shape)
    if key.endswith("ratio"):
        return torch.full(shape, 0.7)
    if key.endswith("running_mean"):
        return 0.1 * noise
    if key.endswith("running_var"):
        return 1 + 0.2 * noise.abs()
    if len(shape) >= 2:
        scale = math.sqrt(_GAIN[network] / (noise.numel() / shape[0]))
        return noise * (0.2 * scale if "filter_gen" in key and ".conv1." in key else scale)
    return 1 + 0.1 * noise if key.endswith("weight") else 0.05 * noise


def weights_for(module: nn.Module, network: str) -> dict[str, Tensor]:
    """A state dict of deterministic weights for the names and shapes of `module`."""
    return {
        key: tensor if key.endswith("num_batches_tracked") else value(network, key, tuple(tensor.shape))
        for key, tensor in module.state_dict().items()
    }


def with_weights(module: nn.Module, network: str) -> nn.Module:
    """`module` in eval mode with :func:`weights_for` loaded strictly."""
    module.load_state_dict(weights_for(module, network))
    return module.eval()


@cache
def example() -> tuple[Tensor, Tensor]:
    """The picture [1, 3, 256, 256] in [0, 1] and the mask [1, 1, 256, 256], 1 = hole. Not to be written to."""
    noise = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(20220101))
    line = torch.arange(SIZE) / 255
    y, x = torch.meshgrid(line, line, indexing="ij")
    picture = 0.5 * noise + 0.5 * torch.stack((x, y, 0.5 + 0.5 * torch.sin(12 * x + 7 * y)))
    hole = torch.zeros(1, 1, SIZE, SIZE)
    hole[..., 60:190, 70:200] = 1
    hole[..., 10:30, 20:240] = 1
    hole[..., 200:203, 5:250] = 1
    return picture, hole


def hooked(name: str, network: nn.Module, image: Tensor, hole: Tensor) -> tuple[Any, Tensor]:
    """The output of `network` when its adapter runs it on one picture, and the result of the adapter."""
    caught: list[Any] = []
    hook = network.register_forward_hook(lambda module, inputs, outputs: caught.append(outputs))
    with torch.inference_mode():
        result = adapt(name, network)(image, hole)
    hook.remove()
    (outputs,) = caught
    return outputs, result


def check_keys(module: nn.Module, network: str) -> None:
    """The names and shapes of `module`'s state dict, and their order, are the original's."""
    assert [(key, list(tensor.shape)) for key, tensor in module.state_dict().items()] == list(keys(network).items())


def checkpoint_like(network: str) -> dict[str, Tensor]:
    """A state dict of the original's names and shapes, each entry filled with another number. Small when saved."""
    return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(keys(network).items(), 1)}


def check_loaded(module: nn.Module, network: str) -> None:
    """`module` holds :func:`checkpoint_like`, and is in eval mode."""
    state = module.state_dict()
    for key, expected in checkpoint_like(network).items():
        assert torch.equal(state[key], expected.to(state[key].dtype)), key
    assert not any(m.training for m in module.modules())


def golden_error(output: Tensor, network: str, name: str) -> float:
    """Largest deviation of `output` from the original's in statistics and pixels, over its standard deviation."""
    expected = golden(network)[name]
    assert list(output.shape) == expected["shape"]
    statistics = {"mean": output.mean(), "std": output.std(), "min": output.min(), "max": output.max()}
    found = [float(statistic) for statistic in statistics.values()]
    found += [float(output[tuple(position)]) for position, _ in expected["points"]]
    wanted = [expected[name] for name in statistics] + [pixel for _, pixel in expected["points"]]
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / expected["std"]


def check_golden(output: Tensor, network: str, name: str) -> None:
    """`output` is the original's output `name` within :data:`TOLERANCE`."""
    error = golden_error(output, network, name)
    assert error < TOLERANCE, f"{network} {name}: off by {error:.1e} of the standard deviation"
