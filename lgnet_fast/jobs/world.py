"""The processes that a launcher has started: their number, this one's rank, and what they agree on."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch

from ..errors import BackendError

T = TypeVar("T")

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
"""What asks a process to end. SIGBREAK: Ctrl-Break and the end of the console on Windows, where nothing else sends
SIGTERM."""

_RENDEZVOUS = timedelta(minutes=5)

_rendezvous_count = 0
_stores: list[Any] = []


@dataclass(frozen=True)
class World:
    """This process's rank and the number of processes.

    `launch` is a text that all processes of one launch share, and no other launch has. `launched`: whether
    environment variables of `accelerate launch`, torchrun or mpirun are set.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False
    launch: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def announced(cls) -> World:
        """The process's place from RANK, WORLD_SIZE and LOCAL_RANK (or mpirun's names); without them, a single
        process. `launch` is this process's own.

        Raises BackendError: the variables contradict each other.
        """
        size = _variable("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
        rank = _variable("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
        local = _variable("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
        if size is None or rank is None:
            return cls()
        if not 0 <= rank < size:
            raise BackendError(f"RANK: expected 0 <= RANK < WORLD_SIZE = {size}, got {rank}")
        return cls(rank, size, rank if local is None else local, launched=True)

    @classmethod
    def from_environment(cls) -> World:
        """As :meth:`announced`, but several processes agree on `launch` through the launcher's rendezvous
        (MASTER_ADDR and MASTER_PORT). Only there does a process wait for another, at most 5 minutes.

        Raises BackendError: the variables contradict each other, or no rendezvous.
        """
        world = cls.announced()
        return world if world.size == 1 else replace(world, launch=_agree(world))

    def part(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`: every `size`-th one, starting at `rank`."""
        return list(items[self.rank :: self.size])

    def device(self, device: str) -> str:
        """`device`; for "auto" and "cuda" with several processes, a separate GPU for each, where there are GPUs."""
        if self.size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return device


def _variable(*names: str) -> int | None:
    for name in names:
        text = os.environ.get(name)
        if text is not None:
            try:
                return int(text)
            except ValueError:
                raise BackendError(f"{name}: expected a whole number, got {text!r}") from None
    return None


def _agree(world: World) -> str:
    global _rendezvous_count
    if not torch.distributed.is_available():
        raise BackendError("WORLD_SIZE: this build of torch has no torch.distributed; start a single process")
    # The launcher's store still holds the keys of a worker group's first attempt after a restart.
    key = f"lgnet_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_rendezvous_count}"
    _rendezvous_count += 1
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    try:
        store, _, _ = next(iter(torch.distributed.rendezvous("env://", timeout=_RENDEZVOUS)))
        if world.rank == 0:
            store.set(key, world.launch)
        launch: str = store.get(key).decode()
    except Exception as cause:  # DistNetworkError, DistStoreError, ValueError of a missing variable
        raise BackendError(
            f"WORLD_SIZE: {world.size} processes are announced, but they did not meet "
            f"({str(cause).splitlines()[0]}); start them with `accelerate launch` or torchrun"
        ) from cause
    _stores.append(store)  # process 0's store serves the others, which may start later
    return launch
