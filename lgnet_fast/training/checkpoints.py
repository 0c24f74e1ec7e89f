"""Checkpoints: one file each, written under a temporary name and renamed, so that no checkpoint is incomplete."""

from __future__ import annotations

import contextlib
import os
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..errors import TrainingError
from ..reference.released import check_sums, unreadable

BEST = "best.pt"
_STEP = re.compile(r"step_(\d+)\.pt")
_UNFINISHED = ".unfinished"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """In this context, no other run works in `folder`. Some network disks have no such locks.

    Raises:
        TrainingError: one does. OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / files.LOCK_FILE, "ab") as file:
        # Of the process, not of the file: workers that outlive it for a moment do not hold it.
        if files.lock(file, of_process=True) is False:
            raise TrainingError(
                f"run.directory: expected a folder in which no other run is at work, got {folder}, where one is"
            )
        yield


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to `path` atomically.

    Raises:
        TrainingError: the disk is full or not writable; an old file is kept.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file, _checksums():
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        files.replace(unfinished, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError after the disk's error
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # its text hides the disk's
        raise TrainingError(
            f"checkpoint: {path} cannot be written ({reason}); earlier checkpoints are as they were"
        ) from error


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """``torch.save`` writes checksums in this context, even if the program has switched them off."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, where folders can be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU; only tensors and plain values are unpickled.

    mapped: leave the tensors in the file until they are used. Checksums are not compared then.

    Raises:
        TrainingError: it cannot be read, or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(state, dict):
            raise TypeError(f"expected a dict in it, got {type(state).__name__}")
        if not mapped:
            check_sums(path)
        return state
    except Exception as error:  # pickle, zip and torch errors of many kinds
        raise TrainingError(f"checkpoint: {path} cannot be read (it {unreadable(path, error)})") from error


class CheckpointFolder:
    """The checkpoints of a run: the newest `keep` files ``step_*.pt``, and ``best.pt``."""

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of a step, then drop the oldest ones."""
        path = self.path(step)
        save_checkpoint(path, state)
        # Later ones are of a run that was resumed from an earlier checkpoint because they are damaged.
        for old in [one for one in self.steps() if one <= step][: -self.keep]:
            files.remove(self.path(old))  # one that is read meanwhile goes with the next save
        self.clean()
        return path

    def clean(self) -> None:
        """Remove incomplete files of killed processes."""
        for left in self.folder.glob(f"*{_UNFINISHED}"):
            files.remove(left)

    def files(self) -> list[Path]:
        """The checkpoints from which a run is resumed, in the order in which they are tried: the newest first, the
        best one last."""
        best = self.folder / BEST
        return [*(self.path(step) for step in reversed(self.steps())), *([best] if best.is_file() else [])]

    def load_latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, with a warning for each that cannot; None: there are none.

        Without the files ``step_*.pt`` it is ``best.pt``, with a warning.

        Raises:
            TrainingError: there are checkpoints, but none can be read.
        """
        failure: TrainingError | None = None
        for path in self.files():
            try:
                state = load_checkpoint(path)
            except TrainingError as error:
                warnings.warn(f"{error}; trying the one before", stacklevel=2)
                failure = error
                continue
            if path.name == BEST:
                warnings.warn(
                    f"checkpoint: {path.parent} holds no step_*.pt that can be read; {BEST} is taken, of step "
                    f"{state.get('step')}",
                    stacklevel=2,
                )
            return state
        if failure is not None:
            raise failure
        return None

    def load_best(self) -> dict[str, Any]:
        """``best.pt``, mapped; {} where there is none that can be read."""
        try:
            return load_checkpoint(self.folder / BEST, mapped=True)
        except TrainingError:
            return {}


def random_states() -> dict[str, Any]:
    """The state of every random generator, in types that :func:`load_checkpoint` can read."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (data sets of others may use it)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the state of every random generator."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        # There may be fewer GPUs here than where the checkpoint was written, or more.
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"]):
            torch.cuda.set_rng_state(state, device)
    if states.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
