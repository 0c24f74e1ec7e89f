"""The batches of a run from a step on, from memory or from a loader's worker processes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import LGNetError, TrainingError
from .loader import PositionSampler, make_loader
from .memory import MemoryBatches
from .samples import InpaintingDataset
from .signals import LateDeaths


class Batches:
    """The batches of one process.

    Args:
        source: pictures in memory, or a dataset, which is read by worker processes.
        position: number of batches that every process has read before.
        batch_size: of one process.
        accelerator: says which of how many processes this is.
    """

    def __init__(
        self, source: MemoryBatches | InpaintingDataset, position: int, batch_size: int, accelerator: Any
    ) -> None:
        sampler = PositionSampler(position, batch_size, accelerator.process_index, accelerator.num_processes)
        self._batches: Iterator[Any]
        if isinstance(source, MemoryBatches):
            self._batches = source.batches(sampler)
        else:
            self._batches = iter(make_loader(source, sampler, pin=accelerator.device.type == "cuda"))
        self._deaths = LateDeaths()

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next `count` batches.

        Raises DataError: none of many pictures can be read. TrainingError: a worker has died, now or since the last
        call.
        """
        try:
            with self._deaths.raised():
                return [next(self._batches) for _ in range(count)]
        except LGNetError as error:
            # An error of a worker contains its traceback as text; its last line has the type and the message.
            lines = str(error).strip().splitlines()
            if len(lines) > 1:
                raise type(error)(lines[-1].partition(": ")[2]) from None
            raise
        except RuntimeError as error:
            text = " ".join(str(error).split()).rstrip(".")
            if not text.startswith("DataLoader worker"):
                raise
            shared = " and less of /dev/shm" if sys.platform == "linux" else ""
            spawned = multiprocessing.get_start_method() != "fork"  # they import the program again
            guard = "; a program starts the training under `if __name__ == '__main__':`" if spawned else ""
            raise TrainingError(
                f"data.workers: a process that reads pictures has died ({text}); fewer of them, or a smaller "
                f"data.prefetch, need less memory{shared}{guard}"
            ) from error

    def close(self) -> None:
        """End the workers. They ignore SIGTERM, and the traceback of an error keeps the loader: at its exit, Python
        would wait for them for ever."""
        end = getattr(self._batches, "_shutdown_workers", None)
        if end is not None:
            end()
        self._deaths.close()
