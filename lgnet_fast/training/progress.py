"""Reports of a training run: TensorBoard, ``log.jsonl``, and the terminal (a progress bar, or lines without a
terminal)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MissingExtraError
from ..pipeline.writing import write_atomically, write_stream

LOG = "log.jsonl"


def say(text: str) -> None:
    """Print one line to standard error, if there is one. A terminal that is gone, a closed pipe or a full disk does
    not end a run of hours."""
    if sys.stderr is not None:  # None: closed, as for a service; print would take standard output
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


class Means:
    """The means of the terms of several steps, each over the steps that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, Tensor]:
        """The means since the last call."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class Report:
    """The report of the first process. A line or a picture that cannot be written, on a full disk for instance, is
    left out with one message: it does not end the run.

    Args:
        folder: of the run.
        step, total: first step, and length of the run. Lines of later steps, of an interrupted run, are dropped.
        progress: 0 to 1, the finished share of the run, by steps or by time.
        tensorboard: write TensorBoard's files too.

    Raises:
        OSError: the log cannot be opened.
    """

    def __init__(self, folder: Path, step: int, total: int, progress: float, tensorboard: bool = True) -> None:
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingExtraError(
                    "TensorBoard is missing: pip install 'lgnet-fast[train]', or set run.tensorboard=false"
                ) from error
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        log = folder / LOG
        if log.exists():
            write_atomically(log, b"".join(_lines_until(log, step)))
        # Unbuffered, so that a line that could not be written is not tried again when the file is closed.
        self._log = open(log, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self._lost = 0
        self._total, self._began, self._first, self._done = total, time.monotonic(), step, progress
        self._bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty():  # None: closed, as for a service
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("step {task.fields[step]}/{task.fields[steps]}"),
                *Progress.get_default_columns()[1:3],
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "training", total=1.0, completed=progress, step=step, steps=total, loss=""
            )
            self._bar.start()

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._bar is None:
            say(text)
        else:
            with contextlib.suppress(OSError):
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One line of the log, and TensorBoard's curves. JSON has no infinity and no NaN: null."""
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"kind": kind, "step": step, **plain}, allow_nan=False) + "\n"
        end = self._log.seek(0, os.SEEK_END)
        try:
            write_stream(self._log, line.encode())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._log.truncate(end)  # no half line
            self._lost += 1
            if self._lost == 1:
                self.say(f"{LOG}: a line could not be written ({error}); the training goes on")
        for name, value in values.items():
            self._board(partial(_add_scalar, f"{kind}/{name}", value, step))

    def _board(self, write: Callable[[Any], None]) -> None:
        """Do `write` with TensorBoard's writer, if there is one; after an error there is none any more."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except Exception as error:  # of the thread that writes the files
            self._writer = None
            self.say(f"tensorboard: its files cannot be written ({error}); the training goes on without them")

    def train(self, step: int, epoch: int, values: Mapping[str, float], progress: float, pictures: int) -> None:
        """Report mean terms since the last call. progress: 0 to 1; also the pictures per step."""
        self._write("train", step, values)
        text = ", ".join(f"{name} {values[name]:.4f}" for name in ("G", "D") if name in values)
        passed = time.monotonic() - self._began
        speed = (step - self._first) / passed
        text = f"epoch {epoch}, {text}, {speed * pictures:.1f} pictures/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=progress, step=step, loss=text)
            return
        left = (self._total - step) / speed
        if progress > max(step / self._total, self._done):  # the time limit will end the run first
            left = min(left, passed * (1 - progress) / (progress - self._done))
        self.say(f"step {step}/{self._total}: {text}, {timedelta(seconds=round(left))} left")

    def validation(self, step: int, scores: Mapping[str, float], best: bool) -> None:
        """Report the scores of the held-out pictures."""
        self._write("validation", step, scores)
        text = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.say(f"step {step}: validation {text}{' (best)' if best else ''}")

    def pictures(self, step: int, grid: Tensor) -> None:
        """Write a picture grid [3, H, W] in [0, 1]."""
        self._board(lambda writer: writer.add_image("train/pictures", grid, step))

    def close(self, skipped: int, broken: int) -> None:
        """Close the files and the bar, and print how much was left out."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None
        self._board(lambda writer: writer.close())
        self._log.close()
        if self._lost:
            self.say(f"{self._lost} lines of {LOG} could not be written")
        if skipped:
            self.say(f"{skipped} steps were skipped: their loss was not finite")
        if broken:
            self.say(f"{broken} pictures could not be read and were skipped")


def _add_scalar(name: str, value: float, step: int, writer: Any) -> None:
    writer.add_scalar(name, value, step)


def _lines_until(log: Path, step: int) -> list[bytes]:
    kept = []
    for line in log.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # truncated by a kill
            continue
    return kept
