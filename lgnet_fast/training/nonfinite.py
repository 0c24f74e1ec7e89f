"""Losses that are not finite: the run stops with the batch saved, or the step is skipped (``run.on_nan``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from .checkpoints import save_checkpoint
from .config import RunConfig
from .processes import any_process


class NotFiniteError(TrainingError):
    """A loss is not finite. Networks and optimisers are as before the step, in all processes."""


class FiniteLosses:
    """The check of a step's losses, for ``on_nonfinite`` of :class:`.steps.Step`.

    Args:
        run: `on_nan`, `finite_every`, and the directory for batches with such a loss.
        accelerator: of the run.
        network, discriminator, discriminator_optimiser: what a step has changed before its last loss is known.
    """

    def __init__(
        self,
        run: RunConfig,
        accelerator: Any,
        network: nn.Module,
        discriminator: nn.Module,
        discriminator_optimiser: torch.optim.Optimizer,
    ) -> None:
        self.run, self.accelerator = run, accelerator
        self.network, self.discriminator, self.optimiser = network, discriminator, discriminator_optimiser
        self._skipping = run.on_nan == "skip"
        self._step = 0
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._before: list[tuple[Tensor, Tensor]] = []
        self._optimiser_before: dict[str, Any] | None = None

    @property
    def _stopping(self) -> bool:
        """Whether this step's losses may end the run."""
        return not self._skipping and self._step % self.run.finite_every == 0

    def begin(self, step: int, batches: Sequence[Mapping[str, Any]]) -> None:
        """Remember what step `step` (from 0) works on, and what :meth:`undo` restores."""
        self._step, self._batches = step, batches
        changed: list[Tensor] = []
        if self._skipping or self._stopping:
            changed += self.network.buffers()
        if self._stopping:
            changed += [*self.discriminator.parameters(), *self.discriminator.buffers()]
            self._optimiser_before = copy.deepcopy(self.optimiser.state_dict())
        self._before = [(tensor, tensor.detach().clone()) for tensor in changed]

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the running statistics, which have seen values that are not finite; with "stop" also the
        discriminator and its optimiser, whose step came before the generators' loss. With "skip" a loss of the
        discriminator that is not finite has kept it from its step."""
        for tensor, before in self._before:
            tensor.copy_(before)
        if self._stopping and self._optimiser_before is not None:
            self.optimiser.load_state_dict(self._optimiser_before)

    def __call__(self, total: str, terms: Mapping[str, Tensor], number: int) -> bool:
        """Whether to skip the step, because `terms[total]`, "D" or "G", of batch `number` is not finite in some
        process.

        Raises:
            NotFiniteError: it is not finite, and ``run.on_nan`` is "stop".
        """
        if not self._skipping and (total == "D" or not self._stopping):
            # A bad loss of D also makes the generators' loss of the same step bad, and nothing of that step is kept,
            # so one wait for the device is enough.
            return False
        if not any_process(self.accelerator, not bool(torch.isfinite(terms[total]))):
            return False
        if self._skipping:
            return True
        self.undo()
        raise NotFiniteError(
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
        try:
            save_checkpoint(path, {**{k: batch[k] for k in ("image", "mask", "name")}, "terms": values})
        except TrainingError as error:  # the loss is the error to report
            return f" ({', '.join(bad)}); its batch could not be saved: {error}"
        return f" ({', '.join(bad)}); its batch is in {path}"
