"""What several test files share: the conformance recipe, and small models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.data.conformance import recipe

CONFORMANCE = Path(__file__).parent / "data" / "conformance"


@cache
def keys() -> dict[str, dict[str, dict[str, list[int]]]]:
    """keys.json: names and shapes of the released networks, and which weights are transposed."""
    return json.loads((CONFORMANCE / "keys.json").read_text())


def released_state(net: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The recipe's weights of released network `net` ("G1", "G2", "G3" or "D")."""
    transposed = keys()["transposed"][net]
    state = {}
    for name, shape in keys()["shapes"][net].items():
        if name in transposed:
            value = recipe.transposed_parameter(net, name, tuple(shape), transposed[name])
        else:
            value = recipe.parameter(net, name, tuple(shape))
        tensor = torch.from_numpy(np.asarray(value))
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state


def case(name: str, batch: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The recipe's image [B, 3, H, W] and mask [B, 1, H, W] of that name."""
    image = torch.from_numpy(recipe.image(name, batch, height, width)).to(dtype)
    return image, torch.from_numpy(recipe.mask(name, batch, height, width)).to(dtype)
