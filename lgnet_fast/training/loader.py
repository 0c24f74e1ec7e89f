"""Batches of samples, in a fixed order, read ahead by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ..jobs.world import STOP_SIGNALS
from .samples import InpaintingDataset, Sample


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """A batch: "image" [B, 3, S, S] and "mask" [B, 1, S, S] as in :class:`Sample`, "name" and "broken" lists."""
    return {
        "image": torch.stack([sample.image for sample in samples]),
        "mask": torch.stack([sample.mask for sample in samples]),
        "name": [sample.name for sample in samples],
        "broken": [one for sample in samples for one in sample.broken],
    }


class PositionSampler(Sampler[list[int]]):
    """Endless batches of positions for one of several processes.

    Together the processes read the same samples as one process with the larger batch, in the same order.

    Args:
        start: number of batches that every process has read before.
        batch_size: of one process.
        rank, processes: index of this process, and number of processes.
    """

    def __init__(self, start: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.start, self.batch_size, self.rank, self.processes = start, batch_size, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        first = (self.start * self.processes + self.rank) * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.processes * self.batch_size


def make_loader(dataset: InpaintingDataset, sampler: PositionSampler, pin: bool) -> DataLoader[Sample]:
    """Batches of :func:`collate` in the sampler's order, read ahead by ``data.workers`` processes.

    pin: use page-locked memory, from which copies to a GPU are faster.
    """
    workers = dataset.data.workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=dataset.data.prefetch if workers else None,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        # A separate generator: a new iterator would otherwise advance torch's global one, whose state is in
        # checkpoints.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    # They may reach the whole process group (Ctrl-C, timeout, a job's end). The trainer finishes its step, for which
    # it needs the workers, and then ends them.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
