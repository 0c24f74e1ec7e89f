"""An engine on disk: `engine.json` (what it is, what it was made for) and `weights.bin` (packed weights, as they lie
in memory, mapped when read)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..errors import LGNetError, WeightsError
from ..reference.lgnet import LGNet
from ..reference.pretrained import staged
from .cpu_executor import CpuExecutor
from .plan import Plan

_DESCRIPTION, _WEIGHTS = "engine.json", "weights.bin"
_CHUNK = 1 << 22


def _circumstances(isa: str) -> dict[str, Any]:
    from .. import __version__

    return {
        "instruction set": isa,
        "threads": torch.get_num_threads(),
        "lgnet_fast": __version__,
        "torch": torch.__version__,
    }


def _checksum(path: Path) -> int:
    """CRC-32 of the CRC-32s of the file's chunks, which several threads can take."""

    def of_chunk(offset: int) -> bytes:
        with open(path, "rb") as f:
            f.seek(offset)
            return zlib.crc32(f.read(_CHUNK)).to_bytes(4, "little")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return zlib.crc32(b"".join(pool.map(of_chunk, range(0, os.path.getsize(path), _CHUNK))))


def write_engine(
    directory: Path, config: dict[str, Any], plan: Plan, executor: CpuExecutor, hole_aware: bool
) -> None:
    """Write both files; a write that fails leaves what was there."""
    state = dict(executor.state)
    data = state.pop("data")
    with staged(directory) as staging:
        data.numpy().tofile(staging / _WEIGHTS)
        description = {
            "config": config,
            "size": [plan.batch, plan.height, plan.width],
            "hole_aware": hole_aware,
            "made for": _circumstances(state["isa"]),
            "state": state,
            "bytes": data.numel(),
            "crc32": _checksum(staging / _WEIGHTS),
        }
        (staging / _DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


def read_engine(directory: Path, build: Callable[..., Plan]) -> tuple[LGNet, CpuExecutor, bool]:
    """(model without weights, executor, hole_aware); ``build(model, batch, height, width)`` makes the plan's shapes.

    Raises:
        WeightsError, LGNetError: see :func:`.engine.load_engine`.
    """
    try:
        description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
        weights = directory / _WEIGHTS
        if os.path.getsize(weights) != description["bytes"] or _checksum(weights) != description["crc32"]:
            raise WeightsError(f"{weights} is damaged: its size or checksum is not what {_DESCRIPTION} says")
        with torch.device("meta"):
            model = LGNet(**description["config"])
        plan = build(model, *description["size"])
        state, made_for = description["state"], description["made for"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{directory}: expected a saved engine ({_DESCRIPTION}, {_WEIGHTS}): {error}") from error
    if (reason := CpuExecutor.unavailable_reason()) is not None:
        raise LGNetError(f"{directory}: the engine cannot run here: {reason}")
    from ..ops.cpp import isa_name

    here = _circumstances(isa_name())
    differs = [f"{k}: {made_for.get(k)} there, {v} here" for k, v in here.items() if made_for.get(k) != v]
    if differs:
        raise LGNetError(
            f"{directory}: the engine was made elsewhere ({'; '.join(differs)}); optimise the model again"
        )
    state["data"] = torch.from_file(str(weights), shared=False, size=description["bytes"], dtype=torch.uint8)
    return model, CpuExecutor.from_state(plan, state), description["hole_aware"]
