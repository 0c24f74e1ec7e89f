"""Losses that are not finite: the run stops with the batch saved, or the step is skipped (``run.on_nan``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from .checkpoints import save_checkpoint
from .config import RunConfig
from .processes import any_process


class FiniteLosses:
    """The check of a step's losses, for ``on_nonfinite`` of :class:`.steps.Step`.

    Args:
        run: `on_nan`, `finite_every`, and the directory for batches with such a loss.
        accelerator: of the run.
    """

    def __init__(self, run: RunConfig, accelerator: Any) -> None:
        self.run, self.accelerator = run, accelerator
        self._step = 0
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def begin(self, step: int, batches: Sequence[Mapping[str, Any]], network: nn.Module) -> None:
        """Remember what step `step` (from 0) works on. With "skip", also the network's buffers."""
        self._step, self._batches = step, batches
        skipping = self.run.on_nan == "skip"
        self._buffers = [(buffer, buffer.clone()) for buffer in network.buffers()] if skipping else []

    def undo(self) -> None:
        """Restore the buffers, because values that are not finite have also entered the running statistics."""
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def __call__(self, total: str, terms: Mapping[str, Tensor], number: int) -> bool:
        """Whether to skip the step, because `terms[total]`, "D" or "G", of batch `number` is not finite in some
        process.

        Raises:
            TrainingError: it is not finite, and ``run.on_nan`` is "stop".
        """
        skipping = self.run.on_nan == "skip"
        if not skipping and (total == "D" or self._step % self.run.finite_every):
            # A bad loss of D also makes the generators' loss of the same step bad, and nothing of that step is kept,
            # so one wait for the device is enough.
            return False
        if not any_process(self.accelerator, not bool(torch.isfinite(terms[total]))):
            return False
        if skipping:
            return True
        raise TrainingError(
            f"the loss of step {self._step + 1} is not finite{self._save_batch(terms, number)}; "
            "set run.on_nan=skip to leave such batches out"
        )

    def _save_batch(self, terms: Mapping[str, Tensor], number: int) -> str:
        """Save the batch if the loss is bad in this process; the part of the message that says so."""
        bad = sorted(name for name, term in terms.items() if not bool(torch.isfinite(term)))
        if not bad:
            return ""
        batch = self._batches[number]
        name = f"not_finite_step_{self._step + 1}_process_{self.accelerator.process_index}.pt"
        path = Path(self.run.directory) / name
        values = {name: term.item() for name, term in terms.items()}
        save_checkpoint(path, {**{k: batch[k] for k in ("image", "mask", "name")}, "terms": values})
        return f" ({', '.join(bad)}); its batch is in {path}"
