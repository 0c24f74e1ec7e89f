"""A training run in small files, to move it between machines and to export its model.

    python -m lgnet_fast.training.compact pack runs/demo_gpu OUT          # compact.json, compact-00.safetensors, ...
    python -m lgnet_fast.training.compact unpack OUT runs/demo_gpu --model lgnet-small

`pack` keeps the moving average of the newest checkpoint (the network where there is none) and the discriminator, with
matrices and kernels in float16, but not the moments of the optimisers: `lgnet-fast train --resume` after `unpack`
warms the learning rate up again. With ``--optimiser`` it keeps the moments in bfloat16, which makes the files three
times as large.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import LGNetError, TrainingError
from ..pipeline.writing import write_atomically
from ..reference.file_sets import file_hash
from ..reference.pretrained import CONFIG_FILE, upcast, write_safetensors
from .checkpoints import CheckpointFolder
from .progress import LOG
from .resuming import warm_from

_ABOUT = "compact.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # of Adam, of Adam, of Muon
_HEADER = 128  # largest number of bytes that a safetensors file adds to those of each tensor and its name, and once
_PLAIN = ("step", "position", "processes", "minutes", "skipped")


def pack(run: Path, folder: Path, optimiser: bool = False, part_bytes: int = 15_000_000) -> list[Path]:
    """Write the newest checkpoint of a run's folder, with the log and the model's configuration, to `folder`.

    Args:
        run: the run's folder.
        folder: created if needed.
        optimiser: keep the moments of Adam and Muon.
        part_bytes: largest file, unless one tensor alone is larger.

    Returns:
        The files.

    Raises:
        TrainingError: there is no checkpoint, or it cannot be read.
    """
    checkpoints = CheckpointFolder(run / "checkpoints", keep=1)
    state = checkpoints.load_latest()
    if state is None:
        raise TrainingError(f"run: expected a run's folder with checkpoints, got {str(run)!r}, which has none")
    tensors = _half("network", state["average"] or state["network"]) | _half("discriminator", state["discriminator"])
    if optimiser:
        for number, one in enumerate(state["optimisers"]):
            for index, moments in one["state"].items():
                tensors |= {f"optimiser{number}.{index}.{m}": moments[m].bfloat16() for m in _MOMENTS if m in moments}
    about = {name: state[name] for name in _PLAIN} | {"warm_from": warm_from(state)}
    about["param_groups"] = [one["param_groups"] for one in state["optimisers"]]
    about["adam_steps"] = [
        next((float(moments["step"]) for moments in one["state"].values() if "step" in moments), 0.0)
        for one in state["optimisers"]
    ]
    parts = _in_parts(tensors, part_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ABOUT).unlink(missing_ok=True)  # so that a pack that is cut off is not read with parts of two runs
    written = [folder / f"compact-{number:02d}.safetensors" for number in range(len(parts))]
    for file in set(folder.glob("compact-*.safetensors")).difference(written):
        file.unlink()  # of an earlier, longer run of this command
    for part, file in zip(parts, written, strict=True):
        write_atomically(file, save(part))  # save_file gives files that only their owner can read
    about["parts"] = [file.name for file in written]
    for file, name in ((run / LOG, LOG), (run / "model" / CONFIG_FILE, f"model_{CONFIG_FILE}")):
        if file.is_file():
            written.append(folder / name)
            shutil.copyfile(file, written[-1])
        else:
            (folder / name).unlink(missing_ok=True)  # of another run
    about["hashes"] = {file.name: file_hash(file) for file in written}
    about["hash"] = _hash_of(about)
    written.insert(0, folder / _ABOUT)
    write_atomically(written[0], (json.dumps(about) + "\n").encode())
    return written


def _hash_of(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _check_hashes(folder: Path, about: dict[str, Any]) -> None:
    """Raise ValueError unless the packed files are as they were written. Packs of earlier versions have no hashes."""
    stated = about.pop("hash", None)
    damaged = [] if stated in (None, _hash_of(about)) else [_ABOUT]
    there = {name: own for name, own in about.get("hashes", {}).items() if (folder / name).is_file()}
    damaged += [name for name, own in there.items() if file_hash(folder / name) != own]
    if damaged:
        raise ValueError(f"{', '.join(damaged)}: damaged or of another pack, the hash is not the stated one")


def _in_parts(tensors: Mapping[str, Tensor], part_bytes: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    room = part_bytes - _HEADER
    for name, tensor in tensors.items():
        needed = tensor.nbytes + len(name) + _HEADER
        if parts[-1] and needed > room:
            parts.append({})
            room = part_bytes - _HEADER
        parts[-1][name] = tensor.contiguous()
        room -= needed
    return parts


def unpack(folder: Path, run: Path | None = None, model: Path | None = None) -> None:
    """Make the folder of a run, or of a model, from the files of :func:`pack`.

    Args:
        folder: of the packed files.
        run: folder for the checkpoint and the log; None: not made.
        model: folder for ``model.safetensors`` in float16 and ``config.json``, for ``LGNet.from_pretrained``; None:
            not made.

    Raises:
        TrainingError: `folder` does not hold the files of :func:`pack`, or one is damaged; `run` holds checkpoints
            already; neither `run` nor `model` is given.
    """
    if run is None and model is None:
        raise TrainingError("run, model: expected one of them at least, got none")
    if run is not None and CheckpointFolder(run / "checkpoints", keep=1).files():
        raise TrainingError(
            f"run: expected a folder without checkpoints, got {str(run)!r}, which holds a run already"
        )
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        _check_hashes(folder, about)
        tensors: dict[str, Tensor] = {}
        for part in about["parts"]:
            tensors |= load_file(folder / part)
        config = folder / f"model_{CONFIG_FILE}"
        if model is not None and not config.is_file():
            raise ValueError(f"{config.name} is missing: the run had exported no model when it was packed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainingError(f"compact: {str(folder)!r} cannot be read ({error})") from error
    network = _below("network.", tensors)
    if model is not None:
        model.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, model / CONFIG_FILE)
        write_safetensors(network, model, torch.float16)
    if run is None:
        return
    optimisers = []
    for number, groups in enumerate(about["param_groups"]):
        own: dict[int, dict[str, Tensor]] = {}
        for name, tensor in upcast(_below(f"optimiser{number}.", tensors)).items():
            index, moment = name.split(".")
            own.setdefault(int(index), {"step": torch.tensor(about["adam_steps"][number])})[moment] = tensor
        for group in groups if not own else ():
            group.pop("step", None)  # Muon's Adam corrects the bias of its moments by it, and they begin anew
        optimisers.append({"state": own, "param_groups": [_with_tuples(g) for g in groups]})
    state = {name: about[name] for name in _PLAIN} | {
        "network": upcast(network),
        "discriminator": upcast(_below("discriminator.", tensors)),
        "average": None,
        "optimisers": optimisers,
        "scaler": None,
        "random": [],
        "broken": [],
        "best": None,  # the best checkpoint and its model are not packed
        "warm_from": about.get("warm_from", 0),  # older packs have none
    }
    CheckpointFolder(run / "checkpoints", keep=1).save(about["step"], state)
    if (folder / LOG).is_file():
        shutil.copyfile(folder / LOG, run / LOG)


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group from JSON, which has lists where PyTorch has tuples, except for "params"."""
    return {k: _as_tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}


def _as_tuple(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_as_tuple(v) if isinstance(v, list) else v for v in values)


def _half(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in float16. Vectors, such as running statistics, may exceed its range and are kept."""
    return {
        f"{prefix}.{name}": tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor
        for name, tensor in state.items()
    }


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lgnet_fast.training.compact", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="the newest checkpoint of a run in small files")
    packing.add_argument("run", type=Path)
    packing.add_argument("folder", type=Path)
    packing.add_argument("--optimiser", action="store_true", help="with Adam's moments")
    unpacking = commands.add_parser("unpack", help="a run to resume, a model, or both, from such files")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("run", type=Path, nargs="?")
    unpacking.add_argument("--model", type=Path, help="folder for the model, float16")
    given = parser.parse_args(arguments)
    try:
        if given.command == "pack":
            for file in pack(given.run, given.folder, given.optimiser):
                print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
        else:
            unpack(given.folder, given.run, given.model)
    except (LGNetError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
