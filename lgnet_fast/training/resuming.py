"""What a run that goes on from a checkpoint must have in common with it, and what else it takes over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import TrainingError
from .config import TrainConfig

_SHARED = ("optim.batch_size", "model.train_stages", "model.freeze_batchnorm")
"""Settings that may not change: the first determines which pictures have been read, the others which parameters the
optimiser has."""

_SCORED = ("run.metric", "validation")
"""What the best score depends on."""

_NEEDED = ("network", "discriminator", "average", "optimisers", "scaler", "random", "step", "position", "processes")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Settings that a resumed run must share, or that the best score depends on."""
    data, run = config.data, config.run
    holes = run.validation_kinds or run.validation_classes
    scored = [data.validation, data.protocol, data.size, run.seed, list(holes), run.validation_pictures]
    if run.metric == "lpips":
        scored.append(config.loss.lpips_weights)  # distances by another network are others
    return {
        "optim.batch_size": config.optim.batch_size,
        "model.train_stages": list(config.model.train_stages),
        "model.freeze_batchnorm": config.model.freeze_batchnorm,
        "run.metric": run.metric,
        "validation": None if data.validation is None else scored,
    }


def refuse_other_runs(state: Mapping[str, Any], settings: Mapping[str, Any], accumulate: int, processes: int) -> None:
    """Check a checkpoint before anything is restored from it.

    Args:
        state: of the checkpoint. One of an old version or an unpacked one may have no settings: it may go on with
            any.
        settings: of the run that goes on, see :func:`settings_of`.
        accumulate, processes: of the run that goes on.

    Raises:
        TrainingError: it is no checkpoint of a run; or the number of processes, ``optim.accumulate``,
            ``optim.batch_size``, ``model.train_stages`` or ``model.freeze_batchnorm`` was another one.
    """
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise TrainingError(f"resume: expected a checkpoint of a run, got one without {', '.join(missing)}")
    if state["processes"] != processes:
        raise TrainingError(
            f"resume: the checkpoint was written by {state['processes']} processes, now there are {processes}"
        )
    if state["position"] != state["step"] * accumulate:
        raise TrainingError("resume: optim.accumulate is not what the checkpoint was written with")
    then = state.get("settings", {})
    for name in _SHARED:
        if then.get(name, settings[name]) != settings[name]:
            raise TrainingError(f"resume: {name} was {then[name]} in the checkpoint, now it is {settings[name]}")


def best_score(state: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
    """The checkpoint's best score; None where it says nothing about the present run: it is by another metric, on
    other pictures, or infinite, which older versions took for the PSNR of equal pictures."""
    best: float | None = state.get("best")
    then = state.get("settings", {})
    pairs = [(then.get(name, settings[name]), settings[name]) for name in _SCORED]
    same = all(a == b or a is None or b is None for a, b in pairs)
    return best if best is not None and same and math.isfinite(best) else None


def warm_from(state: Mapping[str, Any]) -> int:
    """The step from which the learning rate is warmed up again: where the optimisers' moments were reset."""
    if state["step"] and not any(own["state"] for own in state["optimisers"]):
        return int(state["step"])  # a checkpoint that was packed without moments
    return int(state.get("warm_from", 0))
