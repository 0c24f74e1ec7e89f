"""An engine on disk: `engine.json` (its description) and `weights.bin` (packed weights, memory-mapped when read)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import forks
from ..errors import LGNetError, WeightsError
from ..reference.file_sets import complete_set, staged
from ..reference.lgnet import LGNet
from .build import build_plan, plan_stages
from .cpu.executor import CpuExecutor
from .cpu.weights import CpuWeights
from .plan import Plan

_DESCRIPTION, _WEIGHTS = "engine.json", "weights.bin"


def _circumstances(isa: str) -> dict[str, Any]:
    from ..native import library
    from ..version import __version__

    return {
        "instruction set": isa,
        "kernel sources": library().sources,  # how weights are packed may differ between builds of one version
        "threads": forks.program_threads(),
        "lgnet_fast": __version__,
        "torch": torch.__version__,
    }


def _without_weights(config: dict[str, Any], size: tuple[int, int, int]) -> tuple[LGNet, Plan]:
    """The model of a config and its plan for `size` (batch, height, width), both without weights."""
    with torch.device("meta"):
        model = LGNet(**config)
    return model, build_plan(plan_stages(model), *size)


def write_engine(
    directory: Path, config: dict[str, Any], plan: Plan, state: Mapping[str, Any], hole_aware: bool
) -> None:
    """Write both files as one set: see :mod:`..reference.file_sets`. `state`: of the executor.

    Raises:
        LGNetError: the plan is not that of the config, from which it is built when the engine is loaded.
    """
    size = (plan.batch, plan.height, plan.width)
    if _without_weights(config, size)[1].digest != plan.digest:
        raise LGNetError(
            "save: expected an engine of a model with the layers that LGNet made, got one with layers that were "
            "replaced or shared afterwards"
        )
    state = dict(state)
    data = state.pop("data")
    with staged(directory) as staging:
        with open(staging / _WEIGHTS, "wb") as file:
            file.write(data.numpy())  # `tofile` says nothing of a full disk
        description = {
            "config": config,
            "size": list(size),
            "hole_aware": hole_aware,
            "made for": _circumstances(state["isa"]),
            "state": state,
            "bytes": data.numel(),
        }
        (staging / _DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


def read_engine(directory: Path) -> tuple[LGNet, CpuExecutor, bool]:
    """(model without weights, executor, hole_aware).

    Raises:
        WeightsError, LGNetError: see :func:`.engine.load_engine`.
    """
    try:
        folder = complete_set(directory, (_DESCRIPTION, _WEIGHTS), manifest_needed=True)
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        weights = folder / _WEIGHTS
        batch, height, width = description["size"]
        if batch < 1 or min(height, width) < 1 or height % LGNet.size_multiple or width % LGNet.size_multiple:
            raise ValueError(f"size {description['size']}")
        model, plan = _without_weights(description["config"], (batch, height, width))
        state, made_for = dict(description["state"]), dict(description["made for"])
        hole_aware = bool(description["hole_aware"])
    except WeightsError:
        raise
    except Exception as error:  # a wrong description can raise many kinds of errors in JSON, LGNet and the plan
        raise WeightsError(f"{directory}: expected a saved engine ({_DESCRIPTION}, {_WEIGHTS}): {error}") from error
    if (reason := CpuExecutor.unavailable_reason()) is not None:
        raise LGNetError(f"{directory}: the engine cannot run here: {reason}")
    from ..native import isa_name

    here = _circumstances(isa_name())
    differs = [f"{k}: {made_for.get(k)} there, {v} here" for k, v in here.items() if made_for.get(k) != v]
    if differs:
        raise LGNetError(
            f"{directory}: the engine was made elsewhere ({'; '.join(differs)}); optimise the model again"
        )
    try:
        # mapped by NumPy, because torch.from_file takes no names that are not UTF-8
        state["data"] = torch.from_numpy(np.memmap(weights, np.uint8, mode="c", shape=description["bytes"]))
        return model, CpuExecutor(plan, CpuWeights.from_state(plan, state)), hole_aware
    except Exception as error:
        raise WeightsError(f"{directory}: {_DESCRIPTION} does not fit the network: {error}") from error
